"""The tree dispatcher: which programs are compiled, and which one a batch gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eagle.tree import AUTO_TREES
from serve.dispatch import PLAIN, Dispatcher, Programs

LADDER = ((4, "static:8"), (16, "chain:3"), (None, PLAIN))
buckets = st.sets(st.integers(1, 70), min_size=1, max_size=6).map(lambda s: tuple(sorted(s)))


@given(st.sampled_from([LADDER, *AUTO_TREES.values()]), buckets, st.data())
def test_every_batch_has_a_program_for_every_tree_it_may_get(ladder, sizes, data):
    programs = Programs(ladder, sizes)
    dispatcher, pairs = Dispatcher(ladder), set(programs.pairs)
    assert len(pairs) == len(programs.pairs) and programs.trees[-1] == PLAIN
    for count in data.draw(st.lists(st.integers(1, sizes[-1]), max_size=40)):
        for tree in (dispatcher.choose(count), PLAIN):
            calls = programs.split(tree, count)
            assert all((rows, tree) in pairs for rows in calls)
            assert sum(calls) >= count and sum(calls[:-1]) < count


def test_a_rung_beyond_the_slots_is_not_compiled():
    assert Programs(LADDER, (1, 4)).pairs == [
        (1, "static:8"), (4, "static:8"), (1, PLAIN), (4, PLAIN),
    ]  # fmt: skip
    assert Programs(LADDER, (1, 32)).pairs == [
        (1, "static:8"), (32, "static:8"), (32, "chain:3"), (32, PLAIN), (1, PLAIN),
    ]  # fmt: skip


def test_it_climbs_at_once_and_comes_down_when_it_has_been_calm():
    dispatcher = Dispatcher(LADDER)
    assert [dispatcher.choose(n) for n in (1, 4, 5, 17)] == [
        "static:8", "static:8", "chain:3", PLAIN,
    ]  # fmt: skip
    calm = [dispatcher.choose(3) for _ in range(40)]
    assert calm.count("static:8") == 40 - calm.index("static:8")
    assert 8 < calm.index("static:8") < 30 and "chain:3" not in calm
    assert dispatcher.choose(9) == "chain:3"


@pytest.mark.parametrize("counts", [(4, 5), (16, 17)])
def test_a_count_that_swings_around_a_limit_does_not_make_the_tree_swing(counts):
    dispatcher = Dispatcher(LADDER)
    trees = [dispatcher.choose(counts[i % 2]) for i in range(100)]
    assert sum(a != b for a, b in zip(trees, trees[1:], strict=False)) == 1
