"""Logits of the tiny golden models, made by transformers (see make_goldens.py).

Whole texts; and Llama 4 from a cache, where chunks of 16 positions and query factors that change
every 8 have their borders inside of prompt chunks, between single tokens and across a tree.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eagle.prefill import empty_prefill, extend_prompt
from jax_eagle.tree import Tree, ancestor_mask
from tests.golden import check, golden

pytestmark = pytest.mark.usefixtures("quick_compiler")

LLAMA4 = ["l4_s", "l4_s2", "l4_m"]
CHUNK = 11
SINGLES = range(4 * CHUNK, 6 * CHUNK)
"""Positions that are decoded one by one."""
PAGES = 10  # of 8 tokens


@pytest.mark.parametrize("case", ["l3_a", "l3_b", *LLAMA4])
def test_logits_equal_those_of_transformers(case):
    target, expected = golden(case)
    check(target.logits(expected["ids"]), expected["logits"])


@jax.jit
def extend(target, carry, tokens_BT, count_B):
    """What prefill and plain decoding do, with the logits of every row."""
    carry, x_BTD = extend_prompt(target, None, carry, tokens_BT, count_B)
    return carry, target.head(x_BTD)


@pytest.mark.parametrize("case", LLAMA4)
def test_prompt_chunks_and_single_tokens_equal_the_whole_text(case, small_pages):
    target, expected = golden(case)
    B, T = expected["ids"].shape[0], 7 * CHUNK
    carry, parts = empty_prefill(target, None, B, B, PAGES), []
    borders = sorted({*range(CHUNK, T, CHUNK), *SINGLES})
    for part_BT in np.split(expected["ids"][:, :T], borders, axis=1):
        count_B = np.full(B, part_BT.shape[1], np.int32)
        carry, logits_BTV = extend(target, carry, part_BT, count_B)
        parts.append(logits_BTV)
    check(np.concatenate(parts, axis=1), expected["logits"][:, :T])


@jax.jit
def tree_logits(target, cache, nodes_BM, parents_BM):
    mask_BMM = ancestor_mask(parents_BM, parents_BM.shape[1])
    depth_BM = jnp.sum(mask_BMM, axis=2, dtype=jnp.int32) - 1
    tree = Tree(parents_BM, depth_BM, jnp.zeros_like(depth_BM), mask_BMM)
    return target.head(target(nodes_BM, tree, cache).x)


@pytest.mark.parametrize("case", LLAMA4)
def test_nodes_of_a_tree_equal_the_ends_of_their_paths(case, small_pages):
    target, expected = golden(case)
    B, length_B = len(expected["ids"]), expected["lengths"]
    carry = empty_prefill(target, None, B, B, PAGES)
    for begin in range(0, 2 * CHUNK, CHUNK):
        part_BT = expected["ids"][:, begin : begin + CHUNK]
        carry, _ = extend(target, carry, part_BT, np.clip(length_B - begin, 0, CHUNK))
    np.testing.assert_array_equal(carry.cache.length, length_B)
    parents_BM = np.tile(expected["parents"], (B, 1))
    logits_BMV = tree_logits(target, carry.cache, expected["nodes"], parents_BM)
    check(logits_BMV, expected["node_logits"])
