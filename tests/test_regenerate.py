"""The target writes training data: answers, prompts, and the files that survive a kill."""

import dataclasses
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jax_eagle import SamplingParams, load_draft, load_target
from jax_eagle.config import ConfigError
from tests.serving import ROOT, save_tiny_model
from train.jsonl import append_batches, chunks, read_lines, write_lines
from train.library import LibraryFile
from train.prompts import OPENINGS, Requests, library_requests, make_prompts
from train.regenerate import Answering, answer, batches_of, main, read_conversations

pytestmark = pytest.mark.usefixtures("quick_compiler")

SAMPLED = SamplingParams(temperature=1.0, seed=3, logit_bias=((257, 2.5),))
"""Some answers of the tiny model reach the end of their turn, some the limit."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def target(models):
    return load_target(models / "target")


def write(path: Path, *lines) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return path


def lines_of(path: Path) -> list[dict]:
    return [line for _, line in read_lines(path)]


def by_id(path: Path) -> dict:
    lines = lines_of(path)
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def asks(count: int, name=int) -> list[dict]:
    """Prompts for which the tiny model compiles one program, in batches of 4."""
    return [{"prompt": "Why? " * (6 + i % 5), "id": name(i)} for i in range(count)]


def how(turns: int = 1, share: float = 1.0, sampling: SamplingParams = SAMPLED) -> Answering:
    return Answering(max_new_tokens=16, turns=turns, sampled_share=share, sampling=sampling,
                     tree="auto")  # fmt: skip


# ---- resuming ----------------------------------------------------------------------------------


def test_killed_and_resumed_gives_the_lines_of_one_run(models, tmp_path):
    prompts = write(tmp_path / "p.jsonl", *asks(96))
    options = {"prompts": prompts, "model": str(models / "target"), "batch": 4}
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    main(**options, out=whole, max_new_tokens=16)
    command = [sys.executable, "-m", "train.regenerate", "--out", str(cut), "--max-new-tokens=16"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not cut.exists() or cut.stat().st_size < 500):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = cut.read_bytes()
    assert 0 < before.count(b"\n") < 96
    cut.write_bytes(before[:-20])  # within a line, as a kill of the machine leaves it
    main(**options, out=cut, max_new_tokens=16)
    assert by_id(cut) == by_id(whole)
    assert sorted(by_id(whole)) == list(range(96))
    assert cut.read_bytes().startswith(before[: before[:-20].rfind(b"\n") + 1])
    after = cut.read_bytes()
    write(prompts, *asks(96), *asks(4, "new{}".format))
    main(**options, out=cut, max_new_tokens=16)
    assert cut.read_bytes().startswith(after)
    assert sorted(list(by_id(cut))[96:]) == ["new0", "new1", "new2", "new3"]


@settings(max_examples=40)
@given(cut=st.integers(0, 400), batch=st.integers(1, 5), text=st.text(max_size=8))
def test_a_file_cut_at_any_byte_is_completed(tmp_path_factory, cut, batch, text):
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"

    def make(numbers):
        return [{"messages": text, "id": number} for number in numbers], len(numbers)

    def run():
        return append_batches(path, range(9), int, lambda missing: chunks(missing, batch), make)

    run()
    whole = path.read_bytes()
    assert lines_of(path) == make(range(9))[0]
    path.write_bytes(whole[:cut])
    done = run()
    assert path.read_bytes() == whole
    assert done.lines == 9 - whole[:cut].count(b"\n")


@pytest.mark.parametrize(
    "content", [b'{"prompt": "a"}\n{"prompt": "b"}', b"a text", b'{"id": 1}\n[2]\n{"id": 3}\n']
)
def test_another_file_is_refused_and_stays_as_it_is(tmp_path, content):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{path}:[12]: "):
        append_batches(path, [1], int, lambda missing: [missing], lambda part: ([], 0))
    assert path.read_bytes() == content


def test_a_full_disk_loses_no_line_that_was_written(tmp_path):
    path = tmp_path / "out.jsonl"

    def run():
        def make(numbers):
            return [{"text": "a" * 1000, "id": number} for number in numbers], 1

        append_batches(path, range(40), int, lambda missing: chunks(missing, 1), make)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(OSError, match="File too large"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = path.read_bytes()
    assert len(kept) == 20_000 and not kept.endswith(b"\n")
    run()
    assert [line["id"] for line in lines_of(path)] == list(range(40))


# ---- reading prompts ---------------------------------------------------------------------------


def test_every_form_of_a_prompt(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a"},
        "",
        {"turns": ["b", "c"], "id": "second"},
        {"messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "d"},
            {"role": "assistant", "content": None}, {"role": "user", "content": "e"},
        ]},
    )  # fmt: skip
    found = [(c.id, c.system, c.questions) for c in read_conversations(path)]
    assert found == [(1, None, ("a",)), ("second", None, ("b", "c")), (4, "s", ("d", "e"))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('["a"]', "expected an object, got list"),
        (r'{"prompt": "\ud800"}', "surrogates not allowed"),
        ({"text": "a"}, "expected 'messages', 'turns' or 'prompt'"),
        ({"prompt": 3}, "a message is 3, expected text"),
        ({"prompt": " "}, "expected text"),
        ({"turns": []}, "no message of the user"),
        ({"turns": "a"}, "expected a list of turns, got str"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no message of the user"),
        ({"messages": [{"role": "human", "content": "a"}]}, "unknown role 'human'"),
        ({"messages": [{"content": "a"}]}, "expected 'role' and 'content'"),
        ({"prompt": "a", "id": None}, "'id' is None"),
        ({"prompt": "a", "id": 1}, "id 1 was given before, at .*:1"),
    ],
)
def test_bad_prompts_are_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "good"}, line)
    with pytest.raises(ConfigError, match=f"{path}:2: .*{message}"):
        read_conversations(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match=f"{path}:2: not JSON"):
        read_conversations(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="no prompts"):
        read_conversations(write(tmp_path / "empty.jsonl"))


# ---- answering ---------------------------------------------------------------------------------


def test_later_questions_are_asked_after_finished_answers(target, tmp_path):
    messages = [
        {"role": "system", "content": "You talk about trees."},
        {"role": "user", "content": "What is a tree?"},
        {"role": "assistant", "content": "thrown away"},
        {"role": "user", "content": "What is a leaf?"},
    ]
    path = write(tmp_path / "p.jsonl", *({"messages": messages, "id": i} for i in range(4)))
    conversations = read_conversations(path)
    lines, num_tokens = answer(target, None, conversations, how(turns=2))
    once, fewer_tokens = answer(target, None, conversations, how(turns=1))
    assert {line["finish_reason"] for line in once} == {"stop", "length"}
    for line, first in zip(lines, once, strict=True):
        asked_again = first["finish_reason"] == "stop"
        roles = [message["role"] for message in line["messages"]]
        assert roles == ["system"] + ["user", "assistant"] * (1 + asked_again)
        assert line["messages"][:3] == first["messages"]
        texts = [message["content"] for message in line["messages"]]
        assert texts[1] == "What is a tree?" and (not asked_again or texts[3] == "What is a leaf?")
        assert not any("thrown" in text or "<end>" in text for text in texts)
    assert fewer_tokens < num_tokens <= 4 * 2 * 16


def test_answers_depend_on_the_id_alone(target, tmp_path):
    conversations = read_conversations(write(tmp_path / "p.jsonl", *asks(8, "q{}".format)))
    first, _ = answer(target, None, conversations[:4], how(share=0.5))
    mixed, _ = answer(target, None, conversations[6:1:-2] + conversations[:1], how(share=0.5))
    assert [line["id"] for line in mixed] == ["q6", "q4", "q2", "q0"]
    assert mixed[2:] == [first[2], first[0]]
    other = how(share=0.5, sampling=dataclasses.replace(SAMPLED, seed=4))
    assert answer(target, None, conversations[:4], other)[0] != first


def test_share_that_is_sampled(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": "a"} for _ in range(2000)))
    conversations = read_conversations(path)
    for share in (0.0, 0.25, 1.0):
        settings_of = [how(share=share).sampling_of(c, turn=0) for c in conversations]
        sampled = [sampling for sampling in settings_of if sampling.temperature > 0]
        assert abs(len(sampled) / 2000 - share) < 0.05
        assert len({sampling.seed for sampling in sampled}) == len(sampled)
        assert all(s == SamplingParams() for s in settings_of if s not in sampled)
    sampling = how()
    first, second = (sampling.sampling_of(conversations[0], turn) for turn in (0, 1))
    assert first.seed != second.seed
    for wrong in ({"share": 1.5}, {"turns": 0}):
        with pytest.raises(ConfigError, match="sampled-share 1.5|start at 1"):
            how(**wrong)


def test_a_draft_changes_no_answer(models, target, tmp_path):
    conversations = read_conversations(write(tmp_path / "p.jsonl", *asks(4)))
    draft = load_draft(models / "draft", target)
    plain = answer(target, None, conversations, how(share=0.5))
    assert answer(target, draft, conversations, how(share=0.5)) == plain


def test_batches_hold_each_prompt_that_fits_once(target, tmp_path, capsys):
    lengths = [1, 9, 2, 8, 3, 7, 300, 4, 6, 5]
    path = write(tmp_path / "p.jsonl", *({"prompt": "a" * n} for n in lengths))
    batches = batches_of(target, read_conversations(path), 3)
    sizes = [[len(c.questions[0]) for c in batch] for batch in batches]
    assert sorted(sizes) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]] and sizes != sorted(sizes)
    assert f"1 prompts of 256 tokens or more left out: {path}:7" in capsys.readouterr().err


# ---- prompts -----------------------------------------------------------------------------------

MODULE = '''
"""Words about trees, which this paragraph tells at some length, so that it is longer than a hundred
and fifty letters, ends with a full stop and is made of nothing but words."""

def grow(tree, by=1):
    """Return the tree after it has grown by some rings."""
    return tree + by

class Wood:
    """A class."""

    def cut(self):
        """Cut all of the trees in the wood, whatever they are."""
'''


def test_kinds_of_prompts():
    requests = library_requests([LibraryFile("wood.py", MODULE)], seed=1)
    assert len(requests.code) == 6 and len(requests.text) == 8
    assert all("grow" in request or "some rings" in request for request in requests.code)
    assert all("Words about trees, which" in request for request in requests.text)
    lines, num_tokens = make_prompts(None, range(400), requests, 0.0, seed=1)
    assert num_tokens == 0 and [line["id"] for line in lines] == list(range(400))
    for kind, expected in (("code", requests.code), ("text", requests.text)):
        asked = [line["prompt"] for line in lines if line["kind"] == kind]
        assert 160 < len(asked) < 240 and set(asked) == set(expected)
    assert library_requests([LibraryFile("wood.py", MODULE)], seed=2) != requests


def test_own_prompts_go_on_as_if_never_stopped(target, tmp_path):
    def run(name: str, count: int) -> list[dict]:
        append_batches(
            tmp_path / name, range(count), int, lambda missing: chunks(missing, 4),
            lambda numbers: make_prompts(target, numbers, Requests([], []), 1.0, seed=1),
        )  # fmt: skip
        return lines_of(tmp_path / name)

    whole = run("whole", 8)
    assert run("grown", 4) == whole[:4] and run("grown", 8) == whole
    prompts = [line["prompt"] for line in whole]
    assert all(prompt.startswith(tuple(OPENINGS)) for prompt in prompts)
    assert len(set(prompts)) == 8 and not set(prompts) <= set(OPENINGS)
    assert [c.questions for c in read_conversations(tmp_path / "whole")] == [(p,) for p in prompts]


def test_a_file_written_whole_replaces_the_old_one(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    assert write_lines(path, [{"text": "ä"}, {"text": "b\n"}]) == 2
    with pytest.raises(ZeroDivisionError):
        write_lines(path, ({"n": 1 // n} for n in (1, 0)))
    assert lines_of(path) == [{"text": "ä"}, {"text": "b\n"}]
