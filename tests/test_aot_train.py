"""The training step of an 8B target, compiled for described H100s: its memory.

Needs the CUDA plugin; `make aot` installs it and runs these tests.
"""

import dataclasses
from pathlib import Path

import jax
import pytest

from jax_eagle.config import LlamaConfig
from jax_eagle.planning import read_target
from train import init
from train.config import DraftSettings, LossConfig, MeshConfig, TrainConfig, load_config
from train.plan import (
    StepMemory,
    abstract_teacher,
    find_place,
    step_memory,
)
from train.start import empty_state
from train.step import make_optimizer

pytestmark = pytest.mark.aot

CONFIG = Path(__file__).parent.parent / "configs" / "llama_3_1_8b_eagle.yaml"
GB = 1e9


def shape_of_8b() -> LlamaConfig:
    return read_target(str(CONFIG.parent / "targets" / "llama-3.1-8b"), "bfloat16")


def compile_step(config: TrainConfig) -> tuple[StepMemory, int]:
    """(memory of each device, bytes of a state over all devices)."""
    place, target = find_place(config, "h100"), shape_of_8b()
    optimizer = make_optimizer(config, 100)
    state = empty_state(config, init.draft_config(config.draft, target), optimizer)
    memory = step_memory(config, place, optimizer, state, abstract_teacher(target, place))
    return memory, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def show(capsys, name: str, memory: StepMemory) -> None:
    sizes = {name: f"{size / GB:.1f} GB" for name, size in dataclasses.asdict(memory).items()}
    with capsys.disabled():
        print(f"\n{name}: peak {memory.peak / GB:.1f} GB, {sizes}")


def test_the_config_is_the_case_that_is_claimed():
    config, target = load_config(CONFIG), shape_of_8b()
    assert (config.data.batch, config.data.length) == (4, 2048)
    assert (config.draft.num_layers, config.draft.vocab_size) == (3, None)
    assert (target.vocab_size, target.hidden_size, target.num_layers) == (128_256, 4096, 32)
    assert config.dtype == "bfloat16"


def test_an_8b_target_on_one_device(capsys):
    """No logits of all positions (4.2 GB each), no scores of a whole text (2.1 GB each)."""
    memory, state = compile_step(load_config(CONFIG))
    show(capsys, "8B, 3 layers, 4 x 2048", memory)
    assert memory.peak < 80 * GB
    assert memory.temporaries < 9 * GB
    assert memory.aliases >= 0.999 * state  # updated in place


def test_an_unrolled_eagle3_draft_fits_as_well(capsys):
    config = dataclasses.replace(
        load_config(CONFIG),
        draft=DraftSettings(kind="eagle3", num_layers=1),
        loss=LossConfig(feature="none", unroll=4),
    )
    memory, _ = compile_step(config)
    show(capsys, "8B, EAGLE-3 with four passes, 4 x 2048", memory)
    assert memory.peak < 80 * GB


def test_eight_devices_hold_a_part_each(capsys):
    one = load_config(CONFIG)
    data = dataclasses.replace(one.data, batch=16)
    config = dataclasses.replace(one, data=data, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    memory, state = compile_step(config)
    show(capsys, "8B, 3 layers, 16 x 2048, (2, 2, 2)", memory)
    target = 16.06 * GB
    assert memory.arguments < 1.01 * (target + state) / 4
    assert memory.temporaries < 9 * GB
