"""The training step on a tiny random target: what it learns, and what it must not touch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eagle.tree import Tree
from jax_eagle.unroll import unroll
from tests.training import (
    U,
    first_state,
    make_batch,
    make_config,
    make_target,
    with_features,
)
from train.config import DraftSettings, LossConfig
from train.step import RUNNING, Batch, make_draft, make_train_step, pass_weights
from train.teacher import Teacher, ancestors_of_text

pytestmark = pytest.mark.usefixtures("quick_compiler")

KINDS = {
    "eagle": make_config(
        draft=DraftSettings(vocab_size=U), loss=LossConfig(logits_weight=0.3, unroll=2)
    ),
    "eagle3": make_config(
        draft=DraftSettings(kind="eagle3", vocab_size=U, num_layers=2),
        loss=LossConfig(feature="none", logits="kl", logits_weight=1.0, unroll=3),
    ),
}


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def teacher(target):
    return Teacher.of(target)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def step(kind, target, batch):
    """(train step, make the state of step 0) of a kind of draft."""
    config = KINDS[kind]
    _, optimizer = first_state(config, target, batch)
    return make_train_step(config, optimizer), lambda: first_state(config, target, batch)[0]


def mean(metrics, name: str) -> float:
    return float(jnp.sum(metrics[name].sum) / jnp.sum(metrics[name].count))


def equal(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def close(one, other, rtol=1e-5, atol=2e-6) -> None:
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_the_teacher_is_the_target(target, teacher, batch):
    zeros = jnp.zeros_like(batch.position)
    tree = Tree(zeros, batch.position, zeros, ancestors_of_text(batch.text))
    for taps in ((), (2, 4, 5)):
        out = target(batch.tokens, tree, None, taps)
        close(teacher(batch.text, taps), (out.features, out.x), rtol=1e-4, atol=1e-5)
    equal(teacher.unstacked().params, target.params)


def test_loss_falls_and_the_target_stays(teacher, batch, step):
    train_step, start = step
    before = jax.tree.map(np.array, teacher)
    state, losses = start(), []
    for _ in range(25):
        state, output = train_step(state, teacher, batch)
        losses.append(mean(output.metrics, "loss"))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 25 and int(state.failed) == RUNNING
    equal(before, teacher)


def test_closed_form_start_beats_random(target, teacher, batch):
    config = KINDS["eagle"]
    random = dataclasses.replace(config, draft=dataclasses.replace(config.draft, start="random"))
    (state, optimizer), (other, _) = (first_state(c, target, batch) for c in (config, random))
    train_step = make_train_step(config, optimizer)
    first, second = (train_step(s, teacher, batch)[1].metrics for s in (state, other))
    assert mean(first, "feature_loss") < 0.7 * mean(second, "feature_loss")


def test_kept_features_train_like_the_target_itself(teacher, batch, step):
    train_step, start = step
    state = start()
    kept_batch = with_features(teacher, batch, state.config)
    online, output = train_step(jax.tree.map(jnp.copy, state), teacher, batch)
    kept, kept_output = train_step(state, teacher, kept_batch)
    # Kept features are rounded to float16.
    close(kept.params, online.params, rtol=1e-2, atol=1e-3)
    close(kept_output.metrics, output.metrics, rtol=2e-3, atol=1e-4)


def test_segments_of_a_row_do_not_see_each_other(target, teacher, batch, step):
    """Other tokens in the first segment of each row change nothing in the others."""
    _, start = step
    state = start()
    draft = make_draft(state.params, state)
    first = batch.segment == 1
    changed = batch.replace(tokens=jnp.where(first, (batch.tokens + 7) % 36, batch.tokens))

    def run(batch):
        features = teacher(batch.text, draft.config.taps).features
        return jnp.stack([p.state for p in unroll(draft, target, batch.text, features, 2)])

    one, other = run(batch), run(changed)
    rest = np.asarray(batch.segment > 1)
    np.testing.assert_array_equal(one[:, rest], other[:, rest])
    assert not np.array_equal(one[:, np.asarray(first)], other[:, np.asarray(first)])


def test_parts_of_a_batch_add_up(kind, target, teacher, batch, step):
    """Weights differ from row to row: a mean of the parts' means would show."""
    config = KINDS[kind]
    rows = jnp.asarray([1.0, 0.5, 0.0, 2.0])[:, None]
    batch = batch.replace(weight=batch.weight * rows)
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, accumulate=2)
    )
    state, optimizer = first_state(config, target, batch)
    whole, whole_output = step[0](jax.tree.map(jnp.copy, state), teacher, batch)
    parts, output = make_train_step(config, optimizer)(state, teacher, batch)
    close(parts.opt_state, whole.opt_state, rtol=2e-4)
    close(output.metrics, whole_output.metrics, rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing(teacher, batch, step):
    train_step, start = step
    state, _ = train_step(start(), teacher, batch)
    good = jax.tree.map(np.array, state)
    broken = batch.replace(weight=batch.weight.at[1, 3].set(jnp.inf))
    state, output = train_step(state, teacher, broken)
    assert int(output.failed) == int(state.failed) == 1
    state, output = train_step(state, teacher, batch)  # the host had not looked yet
    assert int(output.failed) == 1
    equal(state.replace(failed=good.failed), good)


def test_same_key_same_noise(target, teacher, batch):
    loss = LossConfig(feature_noise=0.5)
    config = make_config(draft=DraftSettings(vocab_size=U), loss=loss)
    state, optimizer = first_state(config, target, batch)
    train_step = make_train_step(config, optimizer)
    copies = [jax.tree.map(jnp.copy, state) for _ in range(2)]
    one, again = (train_step(s, teacher, batch)[0] for s in copies)
    equal(one, again)
    later = state.replace(step=state.step + 1)
    other, _ = train_step(later, teacher, batch)
    assert not np.array_equal(
        one.opt_state[1].mu["fc"]["kernel"], other.opt_state[1].mu["fc"]["kernel"]
    )


def test_remat_changes_no_gradient(kind, target, teacher, batch, step):
    config = dataclasses.replace(KINDS[kind], remat=True)
    state, optimizer = first_state(config, target, batch)
    plain, _ = step[0](jax.tree.map(jnp.copy, state), teacher, batch)
    again, _ = make_train_step(config, optimizer)(state, teacher, batch)
    close(again.opt_state, plain.opt_state, rtol=1e-4)


def test_passes_count_where_a_chain_may_have_begun():
    config = KINDS["eagle3"]
    weight = jnp.asarray([[0, 1, 2, 1, 0, 1, 1, 1, 1]], jnp.float32)
    zeros = jnp.zeros(weight.shape, jnp.int32)
    first, second, third = jnp.unstack(
        pass_weights(config, Batch(zeros, zeros, zeros, weight)), axis=2
    )
    np.testing.assert_array_equal(first, weight)
    np.testing.assert_array_equal(second[0], [0, 0, 2, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(third[0], [0, 0, 0, 1, 0, 0, 0, 1, 1])
