"""Packing, batches in their order, kept features, and a batch as text."""

import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jax_eagle.config import ConfigError
from tests.corpora import VOCAB, chat, chatml_tokenizer, write_lines
from train.batch_view import show_batch
from train.config import DataConfig, Source
from train.corpus import Corpus, build_corpus
from train.features import FeatureStore, fingerprint
from train.feed import Feed
from train.rows import pack

LENGTH = 16
SOURCES = (Source("chat", "a", prompt_weight=0.25), Source("text", "b", answer_weight=0.5))
DTYPES = {
    "tokens": np.int32, "segment": np.int32, "position": np.int32, "weight": np.float32,
    "source": np.int32, "index": np.int64,
}  # fmt: skip


def settings(**changes) -> DataConfig:
    return DataConfig(**{"sources": SOURCES, "length": LENGTH, "batch": 4} | changes)


def make_corpus(lengths, seed: int = 0, validation_share: float = 0.0) -> Corpus:
    """Random tokens, learnt or not, in segments of these lengths, the sources in turn."""
    rng, count = np.random.default_rng(seed), len(lengths)
    start = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    source = np.arange(count, dtype=np.int32) % 2
    return Corpus(
        sources=SOURCES,
        vocab_size=50,
        stop_token_ids=(),
        tokens_N=rng.integers(0, 50, start[-1]).astype(np.int32),
        learnt_N=rng.random(start[-1]) < 0.5,
        start_S=start,
        source_S=source,
        validation_S=rng.random(count) < validation_share,
        validation_questions=[],
        figures=[],
        fingerprint=f"{seed} {lengths}",
        tokenizer_hash="",
    )


def assert_equal_batches(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


lengths_lists = st.lists(st.integers(2, LENGTH), min_size=1, max_size=24)
seeds = st.integers(0, 2**40)


# ---- rows and batches --------------------------------------------------------------------------


@given(lengths=lengths_lists, seed=seeds)
def test_rows_hold_each_segment_once_and_no_row_was_opened_too_early(lengths, seed):
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    rows = pack(order, np.array(lengths), LENGTH)
    assert sorted(rows.segments.tolist()) == list(range(len(lengths)))
    members = [rows[i].tolist() for i in range(len(rows))]
    sizes = [sum(lengths[s] for s in row) for row in members]
    assert max(sizes) <= LENGTH
    for later, row in enumerate(members):
        assert [order.index(s) for s in row] == sorted(order.index(s) for s in row)
        assert all(size + lengths[row[0]] > LENGTH for size in sizes[:later])


def test_the_fullest_row_with_room_is_chosen():
    rows = pack(range(4), np.array([10, 12, 3, 6]), LENGTH)
    assert [rows[i].tolist() for i in range(len(rows))] == [[0, 3], [1, 2]]


@given(
    lengths=lengths_lists,
    seed=seeds,
    epochs=st.integers(1, 3),
    batch=st.integers(1, 5),
    share=st.sampled_from([0.0, 0.3]),
)
def test_an_epoch_holds_every_training_token_once(lengths, seed, epochs, batch, share):
    corpus = make_corpus(lengths, seed=7, validation_share=share)
    if corpus.validation_S.all():
        return
    config = settings(batch=batch, epochs=epochs)
    feed = Feed(corpus, config, seed=seed)
    batches = list(feed)
    assert len(batches) == feed.num_batches
    train = np.repeat(~corpus.validation_S, corpus.length_S)
    every = np.concatenate([b["index"] for b in batches])
    assert every.shape == (len(batches) * batch, LENGTH)
    for epoch in range(epochs):
        rows = every[epoch * feed.num_rows : (epoch + 1) * feed.num_rows]
        np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.flatnonzero(train))
    assert (every[epochs * feed.num_rows :] == -1).all()


@given(lengths=lengths_lists, seed=seeds)
def test_segments_stand_whole_with_positions_from_zero(lengths, seed):
    corpus = make_corpus(lengths)
    for batch in Feed(corpus, settings(), seed=seed):
        assert {name: array.dtype for name, array in batch.items()} == DTYPES
        assert all(array.shape == (4, LENGTH) for array in batch.values())
        padding = batch["segment"] == 0
        np.testing.assert_array_equal(padding, batch["index"] == -1)
        assert not any(batch[n][padding].any() for n in ("tokens", "position", "weight", "source"))
        for row in range(4):
            numbers = batch["segment"][row]
            assert (np.diff(numbers[numbers > 0]) >= 0).all()
            assert not padding[row][: (numbers > 0).sum()].any()
            for number in range(1, numbers.max() + 1):
                check_segment(corpus, {n: a[row][numbers == number] for n, a in batch.items()})


def check_segment(corpus, columns):
    segment = np.searchsorted(corpus.start_S, columns["index"][0], "right") - 1
    here = slice(corpus.start_S[segment], corpus.start_S[segment + 1])
    size = corpus.length_S[segment]
    np.testing.assert_array_equal(columns["index"], np.arange(here.start, here.stop))
    np.testing.assert_array_equal(columns["position"], np.arange(size))
    np.testing.assert_array_equal(columns["tokens"], corpus.tokens_N[here])
    source = SOURCES[segment % 2]
    assert (columns["source"] == segment % 2).all()
    expected = np.zeros(size, np.float32)
    for i in range(1, size - 1):  # row i predicts token i+1
        learnt = corpus.learnt_N[here.start + i + 1]
        expected[i] = source.answer_weight if learnt else source.prompt_weight
    np.testing.assert_array_equal(columns["weight"], expected)


def test_epochs_and_seeds_differ_in_order():
    corpus = make_corpus([LENGTH] * 40)
    rows = [
        np.concatenate([b["index"][:, 0] for b in Feed(corpus, settings(epochs=2), seed=seed)])
        for seed in (0, 1)
    ]
    orders = [rows[0][:40], rows[0][40:], rows[1][:40], rows[1][40:]]
    assert len({tuple(order) for order in orders}) == 4


def test_without_training_segments_there_is_no_feed():
    corpus = make_corpus([9] * 30, validation_share=1.0)
    with pytest.raises(ConfigError, match="no segments for training"):
        Feed(corpus, settings(), seed=0)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_rows_are_weighted_by_the_token_they_predict(tmp_path, prompt_weight):
    """A draft has to say "ello" and the end of turn; prefill says "h", the template the rest."""
    source = Source(
        "chat",
        str(write_lines(tmp_path / "c.jsonl", [chat("hi", "hello")])),
        prompt_weight=prompt_weight,
    )
    config = settings(sources=(source,), length=128, batch=1, validation_share=0.0)
    corpus = build_corpus(config, chatml_tokenizer(), vocab_size=VOCAB, folder=tmp_path / "corpus")
    batch = next(Feed(corpus, config, seed=0))
    tokens, weight = batch["tokens"][0], batch["weight"][0]
    size = corpus.num_tokens
    last_header = size - len("\nhello") - 2
    assert chatml_tokenizer().decode(tokens[last_header : last_header + 2].tolist()) == "\nh"
    expected = np.zeros(128, np.float32)
    expected[1 : size - 1] = prompt_weight
    expected[last_header + 1 : last_header + 6] = 1.0
    np.testing.assert_array_equal(weight, expected)
    predicted = tokens[1:][weight[:-1] == 1.0]
    assert chatml_tokenizer().decode(predicted.tolist()) == "ello<|im_end|>"


# ---- hosts and resuming ------------------------------------------------------------------------


@given(lengths=lengths_lists, seed=seeds, hosts=st.sampled_from([1, 2, 4]))
def test_hosts_share_the_same_global_batches(lengths, seed, hosts):
    corpus, config = make_corpus(lengths), settings(epochs=2)
    shares = [
        list(Feed(corpus, config, seed=seed, process_index=i, process_count=hosts))
        for i in range(hosts)
    ]
    together = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    assert_equal_batches(together, list(Feed(corpus, config, seed=seed)))


def test_hosts_must_share_evenly():
    with pytest.raises(ConfigError, match="4 rows over 3 hosts"):
        Feed(make_corpus([9]), settings(), seed=0, process_index=0, process_count=3)


@given(lengths=lengths_lists, seed=seeds, data=st.data())
def test_a_restored_feed_goes_on_bit_for_bit(lengths, seed, data):
    corpus, config = make_corpus(lengths), settings(epochs=2)
    feed = Feed(corpus, config, seed=seed)
    stop = data.draw(st.integers(0, feed.num_batches))
    for number in range(stop):
        assert_equal_batches([next(feed)], [feed.batch(number)])
    state = json.loads(json.dumps(feed.state()))
    rest = list(feed)
    assert len(rest) == feed.num_batches - stop
    other = Feed(corpus, config, seed=seed)
    other.restore(state)
    assert_equal_batches(list(other), rest)
    feed.restore(state)
    assert_equal_batches(list(feed), rest)


def test_a_state_of_other_data_is_refused():
    corpus = make_corpus([9] * 8)
    state = Feed(corpus, settings(), seed=0).state()
    for other, message in (
        (Feed(corpus, settings(), seed=1), "seed 0, here 1"),
        (Feed(corpus, settings(batch=2), seed=0), "batch 4, here 2"),
        (Feed(make_corpus([8] * 8), settings(), seed=0), "corpus '0 "),
    ):
        with pytest.raises(ConfigError, match=message):
            other.restore(state)
    with pytest.raises(ConfigError, match="batch 99 of 2"):
        Feed(corpus, settings(), seed=0).restore(state | {"given": 99})


def test_a_closed_feed_gives_nothing_more():
    feed = Feed(make_corpus([9] * 8), settings(), seed=0)
    next(feed)
    feed.close()
    with pytest.raises(ValueError, match="closed"):
        next(feed)


# ---- kept features -----------------------------------------------------------------------------

WIDTH = 3


def features_of(index_BT: np.ndarray) -> np.ndarray:
    """Features that tell whose they are."""
    return np.stack([index_BT, index_BT % 7, -index_BT], axis=-1).astype(np.float32)


def open_store(folder: Path, num_tokens: int = 400, max_bytes: int = 1 << 20, name="a"):
    return FeatureStore(folder, num_tokens, WIDTH, max_bytes=max_bytes, fingerprint=name)


def test_features_are_read_once_all_of_a_batch_are_kept(tmp_path):
    corpus = make_corpus([9, 16, 5, 2, 7] * 8)
    first, second = list(Feed(corpus, settings(), seed=0))[:2]
    store = open_store(tmp_path, corpus.num_tokens)
    assert store.read(first["index"]) is None
    store.write(first["index"], features_of(first["index"]))
    assert len(store) == (first["index"] >= 0).sum()
    assert store.read(second["index"]) is None
    assert store.read(np.concatenate([first["index"], second["index"]])) is None
    store.write(first["index"], np.full((4, LENGTH, WIDTH), 99.0))  # kept ones stay
    store.close()
    found = open_store(tmp_path, corpus.num_tokens).read(first["index"])
    assert found is not None and found.dtype == np.float16
    expected = np.where(first["index"][..., None] >= 0, features_of(first["index"]), 0.0)
    np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_the_store_stays_within_its_bytes(tmp_path):
    store = open_store(tmp_path, num_tokens=100, max_bytes=10 * WIDTH * 2 + 1)
    assert store.capacity == 10
    index = np.array([[7, 8, 9, 10, 11, -1]])
    store.write(index, features_of(index))
    assert len(store) == 3 and (tmp_path / "values.bin").stat().st_size <= 61
    assert store.read(index) is None
    np.testing.assert_array_equal(store.read(index[:, :3]), features_of(index[:, :3]))
    store.close()
    larger = open_store(tmp_path, num_tokens=100, max_bytes=20 * WIDTH * 2)
    assert (larger.capacity, len(larger)) == (20, 3)
    larger.write(index, features_of(index))
    assert larger.read(index) is not None


def test_stores_that_cannot_serve_are_refused(tmp_path):
    open_store(tmp_path / "a").close()
    with pytest.raises(ConfigError, match="another fingerprint .a, here b"):
        open_store(tmp_path / "a", name="b")
    with pytest.raises(ConfigError, match="5 bytes hold no feature of 6 bytes"):
        open_store(tmp_path / "b", max_bytes=5)
    with pytest.raises(ConfigError, match="lower data.keep_features_gb"):
        open_store(tmp_path / "c", num_tokens=10**15, max_bytes=10**15)
    assert not (tmp_path / "c" / "values.bin").exists()


def test_a_target_is_told_by_weights_taps_and_corpus(make_target):
    target = make_target()
    changed = jax.tree.map(lambda x: x, target.params)
    changed["norm"] = {"scale": changed["norm"]["scale"].at[3].add(1e-3)}
    names = {
        fingerprint(target, "c"),
        fingerprint(make_target(2), "c"),
        fingerprint(target.replace(params=changed), "c"),
        fingerprint(target, "d"),
        fingerprint(target, "c", (0, 1)),
    }
    assert len(names) == 5 and fingerprint(make_target(), "c") in names


WRITER = """
import sys
import numpy as np
from pathlib import Path
from train.features import FeatureStore
store = FeatureStore(Path(sys.argv[1]), 4_000_000, 3, max_bytes=1 << 30, fingerprint="a")
print("ready", flush=True)
for first in range(0, 4_000_000, 40):
    index = np.arange(first, first + 40)[None]
    store.write(index, np.stack([index % 2039, index % 7, -(index % 3)], axis=-1) + 1.0)
"""


def test_a_killed_writer_claims_nothing_that_is_not_there(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    time.sleep(0.3 + 0.2 * random.random())
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    store = open_store(tmp_path, 4_000_000, 1 << 30)
    index = np.flatnonzero(np.fromfile(tmp_path / "kept.bool", np.bool_))[None]
    assert 0 < index.size < 4_000_000
    expected = np.stack([index % 2039, index % 7, -(index % 3)], axis=-1) + 1.0
    np.testing.assert_array_equal(store.read(index), expected)


# ---- a batch as text ---------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_a_batch_is_shown_with_what_is_learnt_in_colour(tmp_path, prompt_weight):
    chats = write_lines(tmp_path / "c.jsonl", [chat("hi?", "[b]hello[/b]")])
    source = Source("chat", str(chats), prompt_weight=prompt_weight, answer_weight=0.7)
    config = settings(sources=(source,), length=128, batch=2, validation_share=0.0)
    tokenizer = chatml_tokenizer()
    corpus = build_corpus(config, tokenizer, vocab_size=VOCAB, folder=tmp_path / "corpus")
    console = Console(
        record=True, width=100, force_terminal=True, color_system="standard", file=io.StringIO()
    )
    show_batch(next(Feed(corpus, config, seed=0)), tokenizer, console)
    shown = console.export_text(styles=True)
    assert "\x1b[1;32mb]hello[/b]<|im_end|>\x1b[0m" in shown  # prefill gives the "["
    size, answer = corpus.num_tokens, len("b]hello[/b]") + 1
    if prompt_weight:
        # The first row has no feature before it, so the second token is not learnt either.
        assert "\x1b[2m<|im_start|>u\x1b[0m\x1b[33mser\x1b[0m\n" in shown
        assert "\n\x1b[33m[\x1b[0m\x1b[1;32mb]" in shown
        assert f"\x1b[33mlearnt at less weight\x1b[0m {(size - answer - 2) / size:.1%}" in shown
    else:
        assert "\x1b[2m<|im_start|>user\x1b[0m\n" in shown
        assert "\n\x1b[2m[\x1b[0m\x1b[1;32mb]" in shown
    assert f"\x1b[1;32mlearnt\x1b[0m {answer / size:.1%} of tokens" in shown
    assert f"padding {1 - size / 256:.1%}" in shown
