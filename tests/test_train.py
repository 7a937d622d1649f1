"""The trainer on a tiny random target: it learns, leaks nothing, resumes and exports exactly."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jax_eagle import Target, load_draft
from jax_eagle.cache import init_cache
from jax_eagle.config import ConfigError, DraftConfig, LlamaConfig
from jax_eagle.draft import Sync
from jax_eagle.llama import init_params
from train import checkpoint, data, init
from train.config import Source, TrainConfig, load_config
from train.evaluate import evaluate
from train.export import export
from train.features import FeatureStore
from train.feed import Feed
from train.loss import distillation_loss
from train.step import (
    Batch,
    draft_outputs,
    make_draft,
    make_optimizer,
    make_train_step,
    target_features,
)
from train.train import run

LENGTH, U = 32, 24
CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=8, tie_embeddings=True, stop_token_ids=(39,),
)  # fmt: skip
YAML = Path(__file__).parent.parent / "configs" / "smollm2_eagle_cpu.yaml"


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(init_params(CONFIG, jax.random.key(0)), CONFIG)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with one shard of 48 dialogues whose tokens follow each other by a simple rule."""
    folder = tmp_path_factory.mktemp("dialogues")
    rng = np.random.default_rng(0)
    rows = [(rng.integers(36) + 3 * np.arange(rng.integers(8, 24))) % 36 for _ in range(48)]
    np.savez(
        folder / "00000.npz",
        tokens=np.concatenate(rows).astype(np.int32),
        answer=np.concatenate([np.arange(len(row)) >= 4 for row in rows]),
        lengths=np.array([len(row) for row in rows], np.int32),
    )
    return folder


@pytest.fixture(scope="module")
def settings(shards) -> TrainConfig:
    return TrainConfig(
        target="tiny",
        output="",
        run="",
        sources=(Source("dialogues", str(shards)),),
        length=LENGTH,
        draft_vocab_size=U,
        epochs=2,
        validation_share=0.1,
        start_rows=8,
        learning_rate=3e-3,
        ema=0.9,
    )


@pytest.fixture(scope="module")
def packed(settings) -> data.Data:
    return data.load_data(
        settings.sources, None, vocab_size=40, length=LENGTH, validation_share=0.1
    )


@pytest.fixture(scope="module")
def batch(packed, target) -> Batch:
    """Two packed rows with the target's features."""
    batch = Feed(packed.train, None, batch=2).batch(np.arange(2))
    return dataclasses.replace(batch, features=features_of(target, batch).astype(jnp.float16))


features_of = jax.jit(target_features)
outputs_of = jax.jit(draft_outputs)


@pytest.fixture(scope="module")
def step(settings):
    """(train step, make a state with random or closed-form parameters)."""
    optimizer = make_optimizer(settings, 30)
    config = DraftConfig.for_target(CONFIG, draft_vocab_size=U)

    def start(target, batch=None):
        key = jax.random.key(1)
        params = (
            init.random_params(config, key)
            if batch is None
            else init.ridge_params(config, target, [batch], key)
        )
        ids = jnp.arange(U, dtype=jnp.int32)
        scale = init.input_scale(target)
        return init.make_state(config, params, scale, ids, optimizer, with_average=True)

    return make_train_step(settings, optimizer), start


def test_loss_falls_and_the_target_stays(target, batch, step):
    train_step, start = step
    before = jax.tree.map(np.array, target.params)
    state, losses = start(target), []
    for _ in range(25):
        state, metrics, _ = train_step(state, target, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 25
    jax.tree.map(np.testing.assert_array_equal, before, target.params)


def test_closed_form_start_beats_random(target, batch, step):
    train_step, start = step
    first = [
        float(train_step(state, target, batch)[1].feature_loss)
        for state in (start(target), start(target, batch))
    ]
    assert first[1] < 0.7 * first[0]


def test_kept_features_train_like_the_target_itself(target, batch, step):
    train_step, start = step
    kept, kept_metrics, _ = train_step(start(target), target, batch)
    online, metrics, features = train_step(
        start(target), target, dataclasses.replace(batch, features=None)
    )
    np.testing.assert_array_equal(features, batch.features)
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(online), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)
    assert float(metrics.loss) == pytest.approx(float(kept_metrics.loss), rel=1e-6)


def test_segments_of_a_row_do_not_see_each_other(target, packed, step):
    batch = Feed(packed.train, None, batch=2).batch(np.arange(2))
    draft = step[1](target).draft()
    second = np.array(batch.segment == 2)
    assert second.any()
    changed = jnp.where(batch.segment == 1, (batch.tokens + 5) % 36, batch.tokens)
    other = dataclasses.replace(batch, tokens=changed)
    results = [
        (f := features_of(target, b), outputs_of(draft, target, b, f)) for b in (batch, other)
    ]
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(np.array(one)[second], np.array(two)[second])
        assert not np.array_equal(np.array(one), np.array(two))


def test_rows_are_those_of_the_drafts_own_cache(target, packed, step):
    """The packed forward computes what drafting computes: row i is slot i."""
    draft = step[1](target).draft()
    batch = Feed(packed.train, None, batch=2).batch(np.arange(1))
    features = features_of(target, batch)
    x_BTD = outputs_of(draft, target, batch, features)
    size = int((batch.segment[0] == 1).sum())
    cache = init_cache(CONFIG, jnp.arange(1, 9)[None], num_pages=9, page_size=4)
    before = jnp.pad(features[:, : size - 1], ((0, 0), (1, 0), (0, 0)), constant_values=7.0)
    sync = Sync(batch.tokens[:, :size], before, jnp.array([size]))
    _, expected_BAD = draft.extend(target, cache, sync)
    np.testing.assert_allclose(x_BTD[:, 1:size], expected_BAD[:, 1:], atol=2e-5)


def test_packing(packed, settings, shards):
    rows = packed.train
    assert not rows.weight[rows.position == 0].any()
    assert set(np.unique(rows.weight)) == {np.float32(w) for w in (0.0, 0.3, 1.0)}
    segments = list(data.read_source(settings.sources[0], None))
    held_out = [data.is_held_out(s.group, 0.1) for s in segments]
    expected = sorted(tuple(s.tokens) for s, out in zip(segments, held_out, strict=True) if not out)
    found = [
        tuple(rows.tokens[r][rows.segment[r] == s])
        for r in range(len(rows))
        for s in range(1, rows.segment[r].max() + 1)
    ]
    assert sorted(found) == expected and 0 < sum(held_out) < len(segments)
    assert set(np.unique(packed.validation.weight)) == {0.0, 1.0}
    with pytest.raises(ConfigError, match="a token is not in 0..9"):
        data.load_data(settings.sources, None, vocab_size=10, length=32, validation_share=0.1)


def test_long_segments_are_cut():
    tokens = np.arange(70, dtype=np.int32)
    rows = data.pack([data.Segment(tokens, tokens > 0, "a")], 32, 0, 0.5, 1.0)
    assert [int((row > 0).sum()) for row in rows.segment] == [32, 32, 6]
    np.testing.assert_array_equal(rows.tokens[1], np.arange(32, 64))
    np.testing.assert_array_equal(rows.position[1], np.arange(32))


def test_draft_vocabulary_has_the_frequent_and_the_stop_tokens():
    counts = np.array([5.0, 0, 9, 1, 0, 7, 0, 0])
    assert data.draft_vocabulary(counts, 3, [6]).tolist() == [2, 5, 6]
    assert data.draft_vocabulary(counts, 6, []).tolist() == [0, 1, 2, 3, 4, 5]


def test_loss_is_the_formula_and_chunks_change_nothing():
    rng = np.random.default_rng(0)
    x, features = (jnp.asarray(rng.normal(size=(2, 5, 8)) * 2, jnp.float32) for _ in range(2))
    weight = jnp.asarray(rng.integers(0, 3, (2, 5)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)

    def loss(x, chunk):
        return distillation_loss(x, features, weight, lambda h: h @ rows.T, ce_weight=0.1,
                                 chunk=chunk)  # fmt: skip

    def law(h):
        scores = np.exp(np.asarray(h) @ np.asarray(rows).T)
        return scores / scores.sum(-1, keepdims=True)

    size = np.abs(np.asarray(x - features))
    regression = np.where(size < 1, 0.5 * size**2, size - 0.5).mean(-1)
    cross_entropy = -(law(features) * np.log(law(x))).sum(-1)
    expected = np.average(regression + 0.1 * cross_entropy, weights=weight)
    whole, metrics = loss(x, 1024)
    assert float(whole) == pytest.approx(float(expected), rel=1e-5)
    agreement = law(features).argmax(-1) == law(x).argmax(-1)
    assert float(metrics.top1) == pytest.approx(np.average(agreement, weights=weight))
    gradients = [jax.grad(lambda x, c=c: loss(x, c)[0])(x) for c in (1024, 3)]
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_a_resumed_run_equals_one_without_interruption(target, settings, tmp_path):
    drafts = []
    for name, stops in (("whole", ()), ("parts", (7,))):
        config = dataclasses.replace(
            settings, run=str(tmp_path / name), output=str(tmp_path / name / "draft")
        )
        for number, stop in enumerate((*stops, None)):
            card = run(config, target=target, resume=number > 0, stop_at=stop)
        drafts.append(load_draft(config.output, target))
    jax.tree.map(np.testing.assert_array_equal, drafts[0].params, drafts[1].params)
    assert card["validation"]["0-dialogues"]["tokens"] > 0
    assert 0 < card["validation"]["all"]["top1"] <= card["validation"]["all"]["covered"] <= 1
    with pytest.raises(ConfigError, match="holds a run already"):
        run(config, target=target)

    from_checkpoint = checkpoint.load_draft(tmp_path / "parts")
    for form in ("safetensors", "orbax"):
        export(from_checkpoint, tmp_path / form, form)
        loaded = load_draft(tmp_path / form, target)
        jax.tree.map(np.testing.assert_array_equal, loaded.params, drafts[0].params)
        np.testing.assert_array_equal(loaded.draft_to_target, drafts[0].draft_to_target)
        x = jnp.ones((1, CONFIG.hidden_size))
        np.testing.assert_array_equal(loaded.bind_head(target)(x), drafts[0].bind_head(target)(x))
    half = checkpoint.load_draft(tmp_path / "parts", dtype="bfloat16")
    export(half, tmp_path / "half", "safetensors")
    assert load_draft(tmp_path / "half", target, dtype="bfloat16").params["fc"]["kernel"].dtype == (
        jnp.bfloat16
    )


def test_validation_counts_the_targets_own_favourites(target, packed, step):
    draft = step[1](target).draft()
    feed = Feed(packed.validation, None, batch=1)
    figures = evaluate(draft, target, feed, np.arange(1), ["dialogues"])["dialogues"]
    batch = feed.batch(np.arange(1))
    features = features_of(target, batch).astype(jnp.float16).astype(jnp.float32)
    favourite = np.argmax(target.head(features), -1)
    x_BTD = outputs_of(draft, target, batch, features)
    guess = np.argmax(draft.bind_head(target)(x_BTD), -1)  # draft ids are target ids here
    scored = np.array(batch.weight) > 0
    assert figures["tokens"] == scored.sum()
    assert figures["top1"] == pytest.approx((favourite == guess)[scored].mean())
    assert figures["covered"] == pytest.approx((favourite < U)[scored].mean())


def test_going_on_from_a_draft_starts_with_that_draft(target, step):
    state = step[1](target)
    draft = state.draft()
    params = init.scaled_params(draft.params, init.input_scale(target))
    again = make_draft(params, state)
    for one, other in zip(*map(jax.tree.leaves, (draft.params, again.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_feature_store_survives_a_torn_write(target, tmp_path):
    store = FeatureStore(tmp_path, target, length=4, width=3)
    rows = np.arange(24, dtype=np.float16).reshape(2, 4, 3)
    for key, row in zip((b"a" * 16, b"b" * 16), rows, strict=True):
        store.write(key, row)
    store.close()
    with (tmp_path / "keys.bin").open("ab") as file:
        file.write(b"torn")
    store = FeatureStore(tmp_path, target, length=4, width=3)
    assert len(store) == 2 and b"c" * 16 not in store
    store.write(b"c" * 16, rows[0])
    np.testing.assert_array_equal(store.read(b"b" * 16), rows[1])
    np.testing.assert_array_equal(store.read(b"c" * 16), rows[0])
    store.close()
    with pytest.raises(ConfigError, match="holds features of"):
        FeatureStore(tmp_path, target, length=8, width=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"learnig_rate": 1}, "unknown key 'learnig_rate'"),
        ({"epochs": "many"}, "epochs: expected int, found 'many'"),
        ({"sources": [{"kind": "novels"}]}, "source kind 'novels'"),
        ({"sources": [{"kind": "dialogues"}]}, "needs the key path"),
        ({"sources": []}, "at least one"),
    ],
)
def test_bad_configs_get_one_clear_line(tmp_path, change, message):
    tree = yaml.safe_load(YAML.read_text(encoding="utf-8")) | change
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_shipped_config_and_overrides():
    config = load_config(YAML, ["sources.0.path=elsewhere", "learning_rate=2e-4", "epochs=7"])
    assert (config.sources[0].path, config.learning_rate, config.epochs) == ("elsewhere", 2e-4, 7)
    with pytest.raises(ConfigError, match="unknown key 'epoch'"):
        load_config(YAML, ["epoch=7"])
    with pytest.raises(ConfigError, match="there is no such key"):
        load_config(YAML, ["sources.9.path=x"])
