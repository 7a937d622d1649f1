"""A tiny target and batches for tests of the trainer."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_eagle import Target
from jax_eagle.checkpoint import hf
from jax_eagle.config import LlamaConfig
from jax_eagle.llama import init_params
from tests.serving import byte_tokenizer
from train import init
from train.config import DataConfig, DraftSettings, LossConfig, OptimizerConfig, Source, TrainConfig
from train.step import Batch, TrainState, make_optimizer, teach
from train.teacher import Teacher

LENGTH, ROWS, U, NUM_STEPS = 32, 4, 24, 30
CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=8, num_heads=4, num_kv_heads=2,
    head_dim=8, tie_embeddings=True, stop_token_ids=(39,),
)  # fmt: skip


def make_target() -> Target:
    return Target(init_params(CONFIG, jax.random.key(0)), CONFIG)


def make_config(*, draft: DraftSettings, loss: LossConfig, **optimizer) -> TrainConfig:
    """A config whose paths nobody opens."""
    return TrainConfig(
        target="tiny",
        run="unused",
        output="unused",
        data=DataConfig((Source("chat", "unused"),), length=LENGTH, batch=ROWS),
        draft=draft,
        loss=loss,
        optimizer=OptimizerConfig(**{"learning_rate": 3e-3, "ema": 0.9} | optimizer),
    )


def make_batch(seed: int = 0, rows: int = ROWS) -> Batch:
    """Rows of three segments, each of tokens that follow each other by a rule, and padding."""
    rng = np.random.default_rng(seed)
    tokens, segment, position = np.zeros((3, rows, LENGTH), np.int32)
    for row in range(rows):
        begin = 0
        for number in range(1, 4):
            size = min(int(rng.integers(8, 15)), LENGTH - begin)
            here = np.s_[row, begin : begin + size]
            tokens[here] = (rng.integers(36) + 3 * np.arange(size)) % 36
            segment[here], position[here] = number, np.arange(size)
            begin += size
        padding = np.s_[row, LENGTH - int(rng.integers(0, 5)) :]
        tokens[padding] = segment[padding] = position[padding] = 0
    weight = ((segment > 0) & (position > 0)).astype(np.float32)
    weight[position == 1] = 0.25
    return Batch(*map(jnp.asarray, (tokens, segment, position, weight)))


def with_features(teacher: Teacher, batch: Batch, draft_config) -> Batch:
    """The batch with the target's features, rounded as a run that keeps them does."""
    return batch.replace(features=teach(teacher, draft_config, batch))


def first_state(
    config: TrainConfig, target: Target, batch: Batch
) -> tuple[TrainState, optax.GradientTransformation]:
    """The state of step 0, as the trainer makes it, with its optimiser."""
    draft = init.draft_config(config.draft, target.config)
    ids = None if config.draft.vocab_size is None else jnp.arange(U, dtype=jnp.int32)
    batches = [with_features(Teacher.of(target), batch, draft)]
    scale, key = init.input_scale(draft, target, batches), jax.random.key(1)
    if config.draft.start == "random":
        params = init.random_params(draft, key)
    else:
        params = init.ridge_params(draft, target, ids, scale, batches, key)
    optimizer = make_optimizer(config, NUM_STEPS)
    ema = config.optimizer.ema is not None
    state = init.make_state(draft, params, scale, ids, optimizer, seed=0, with_average=ema)
    return state, optimizer


CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def save_tiny_target(folder: Path) -> None:
    """A random model of byte tokens with a ChatML template."""
    tokenizer = byte_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"))
    config = dataclasses.replace(CONFIG, vocab_size=258, num_layers=2, stop_token_ids=(257,))
    hf.save(Target(init_params(config, jax.random.key(0)), config, tokenizer), folder)


def save_chats(path: Path, count: int) -> None:
    """Chats of one question and one answer each."""
    lines = []
    for i in range(count):
        user = {"role": "user", "content": f"count to {i % 9}, {i}"}
        reply = {"role": "assistant", "content": " ".join(map(str, range(i % 9 + 1)))}
        lines.append(json.dumps({"messages": [user, reply]}))
    path.write_text("\n".join(lines) + "\n")
