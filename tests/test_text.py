"""Streamed text: whole characters, cut at the first stop string wherever tokens begin and end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.text import TextStream
from tests.serving import byte_tokenizer

TOKENIZER = byte_tokenizer()
"""One token a byte: characters beyond ASCII are cut by token borders."""
letters = st.text(alphabet="abé🦅", max_size=20)


def stream(text: str, cuts: list[int], stop=(), **options) -> tuple[str, int, str | None]:
    """(what was sent, tokens used, stop string) when `text` comes in groups of `cuts` tokens."""
    ids, it, sent, used = TOKENIZER.encode(text), TextStream(TOKENIZER, stop, **options), "", 0
    sizes = iter(cuts)
    while used < len(ids):
        group = ids[used : used + next(sizes, 1)]
        piece, count = it.push(group)
        sent, used = sent + piece, used + count
        if it.stopped_by is not None:
            return sent, used, it.stopped_by
        assert count == len(group)
    return sent + it.finish(), used, it.stopped_by


def cut(text: str, stop) -> tuple[str, str | None]:
    """The text before the stop string that ends first (the longest of those), and that one."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    end, _, found = min(ends)
    return text[: end - len(found)], found


@given(
    letters,
    st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(1, 5), max_size=20),
)
def test_the_text_ends_at_the_first_stop_string(text, stop, cuts):
    expected, found = cut(text, stop)
    sent, used, stopped_by = stream(text, cuts, stop)
    assert (sent, stopped_by) == (expected, found)
    # The token that completes the stop string is the last one that counts.
    whole = text if found is None else expected + found
    assert used == len(TOKENIZER.encode(whole))
    sent, _, _ = stream(text, cuts, stop, include_stop=True)
    assert sent == whole


def test_nothing_is_sent_that_may_become_a_stop_string():
    it = TextStream(TOKENIZER, ["END!"])
    sent = [it.push(TOKENIZER.encode(letter))[0] for letter in "xENDxEN"]
    assert sent == ["x", "", "", "", "ENDx", "", ""]
    assert it.finish() == "EN"


def test_stop_strings_count_behind_min_tokens():
    sent, used, found = stream("abab", [1] * 4, ["b"], min_tokens=2)
    assert (sent, used, found) == ("aba", 4, "b")


def test_special_tokens_show_only_when_asked_for():
    ids = [*TOKENIZER.encode("a"), *TOKENIZER.special_ids]
    for skip, expected in ((True, "a"), (False, "a<assistant><end>")):
        it = TextStream(TOKENIZER, skip_special_tokens=skip)
        assert it.push(ids)[0] + it.finish() == expected


@pytest.mark.parametrize("group", [1, 3])
def test_a_broken_character_does_not_hold_up_the_text(group):
    whole = TOKENIZER.encode("🦅")
    ids = whole[:2] + TOKENIZER.encode("abcdefghijkl")
    it, sent = TextStream(TOKENIZER), ""
    for begin in range(0, len(ids), group):
        sent += it.push(ids[begin : begin + group])[0]
    assert (sent + it.finish()).endswith("abcdefghijkl")


def test_without_a_tokenizer_there_is_no_text():
    it = TextStream(None, ["a"])
    assert it.push([1, 2, 3]) == ("", 3) and it.finish() == ""
