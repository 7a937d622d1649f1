"""Tile sizes: the rule, the table in front of it, and the program that writes the table."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from benchmarks import tune
from pallas_kernels.tree_attention import config
from pallas_kernels.tree_attention.config import MAX_ROWS, TileConfig, num_splits, tile_config
from pallas_kernels.tree_attention.shapes import NODES, SHAPES


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("nodes", NODES)
def test_one_tile_holds_the_rows_of_a_tree_while_it_can(shape, nodes):
    tiles = tile_config(head_dim=shape.head_dim, group=shape.group, nodes=nodes, dtype=jnp.bfloat16)
    rows = nodes * shape.group
    assert tiles.block_q >= min(rows, 128)
    assert (tiles.block_q >= rows) == (rows <= MAX_ROWS)
    assert tiles.block_q < 2 * max(rows, 16)


@pytest.mark.parametrize(
    "programs, capacity, splits",
    [(8, 8192, 32), (8, 128, 1), (8, 1024, 8), (64, 8192, 8), (300, 8192, 1)],
)
def test_the_prefix_is_split_while_programs_are_missing_and_blocks_are_left(
    programs, capacity, splits
):
    tiles = TileConfig(16, 64, 4, 3)
    assert num_splits(tiles, programs=programs, capacity=capacity) == splits


def test_candidates_are_distinct_and_begin_with_the_rule():
    found = list(config.candidates(128, 4, 16, jnp.bfloat16))
    assert found[0] == config.default_tiles(128, 4, 16, jnp.bfloat16)
    assert len(set(found)) == len(found) > 30


def test_the_tuner_writes_what_the_kernels_read(tmp_path, monkeypatch):
    out = tmp_path / config.TABLE
    tune.main(["smollm2-135m"], [1], ["bfloat16"], 128, [1], out, rehearse=True)
    ((key, entry),) = json.loads(out.read_text()).items()
    assert key == "64/3/1/bfloat16"
    assert TileConfig(**entry) in config.candidates(64, 3, 1, jnp.bfloat16)

    other = dataclasses.replace(TileConfig(**entry), num_warps=1)
    monkeypatch.setattr(config, "_table", lambda: {key: other})
    assert tile_config(head_dim=64, group=3, nodes=1, dtype=jnp.bfloat16) == other
    assert tile_config(head_dim=64, group=3, nodes=4, dtype=jnp.bfloat16) != other


def test_the_tuner_wants_a_gpu_and_a_shape_that_exists():
    with pytest.raises(ValueError, match="no GPU"):
        tune.main()
    with pytest.raises(ValueError, match="'gpt'.*llama-3.1-8b"):
        tune.main(["gpt"], rehearse=True)
