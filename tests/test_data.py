"""Sources and the corpus made of them: what is read, what is refused, what is left out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from jax_eagle.config import ConfigError
from jax_eagle.prompts import prompts_of
from jax_eagle.tokenizer import Tokenizer
from tests.corpora import CHATML, END, VOCAB, chat, chatml_tokenizer, write_lines
from tests.serving import byte_tokenizer
from train import corpus as corpus_module
from train import corpus_build
from train.config import DataConfig, Source
from train.corpus import Corpus, build_corpus, draft_vocabulary
from train.overlap import HeldOut
from train.sources import read_source

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def build(folder: Path, *sources: Source, vocab_size: int = VOCAB, **settings) -> Corpus:
    settings = {"length": 128, "validation_share": 0.0} | settings
    return build_corpus(
        DataConfig(sources=sources, **settings),
        chatml_tokenizer(),
        vocab_size=vocab_size,
        stop_token_ids=[END],
        folder=folder,
    )


def chats(path: Path, *records) -> Source:
    return Source("chat", str(write_lines(path, records)))


def texts(corpus: Corpus) -> list[str]:
    return [
        chatml_tokenizer().decode(corpus.tokens_N[begin:end].tolist())
        for begin, end in zip(corpus.start_S, corpus.start_S[1:], strict=False)
    ]


# ---- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"messages": [', "not JSON"),
        ("[1, 2]", "expected an object, got list"),
        ({"text": "a"}, "expected a field 'messages'"),
        ({"messages": []}, "expected a field 'messages'"),
        ({"messages": "hello"}, "expected a field 'messages'"),
        ({"messages": [{"role": "user"}]}, "turn 0: expected strings 'role' and 'content'"),
        ({"messages": ["hello"]}, "turn 0: expected strings"),
        (chat("a", "b") | {"messages": [*chat("a", "b")["messages"], {"role": "assistant"}]},
         "turn 2: expected strings"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "turn 0: unknown role 'robot'"),
        ({"conversations": [{"from": "user", "value": "a"}]}, "unknown role 'user', .*human"),
        (chat("a"), "no turn of the assistant"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, message):
    source = chats(tmp_path / "c.jsonl", chat("a", "b"), "", line)
    with pytest.raises(ConfigError, match=rf"c\.jsonl:3: .*{message}"):
        list(read_source(source))


def test_bad_bytes_are_named(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"c\.jsonl:2: not JSON .*utf-8"):
        list(read_source(Source("text", str(tmp_path / "c.jsonl"))))
    (tmp_path / "c.txt").write_bytes(b"abc\xff")
    with pytest.raises(ConfigError, match=r"c\.txt: not UTF-8 at byte 3"):
        list(read_source(Source("text", str(tmp_path / "c.txt"))))
    write_lines(tmp_path / "d.jsonl", [{"text": 5}])
    with pytest.raises(ConfigError, match=r"d\.jsonl:1: expected a field 'text'"):
        list(read_source(Source("text", str(tmp_path / "d.jsonl"))))
    with pytest.raises(ConfigError, match="nowhere.*no such file"):
        list(read_source(Source("text", str(tmp_path / "nowhere*"))))


def test_sharegpt_is_read_like_messages(tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in chat("a", "b")["messages"]]
    mine = chats(tmp_path / "a.jsonl", chat("a", "b"))
    theirs = chats(tmp_path / "b.jsonl", {"id": "x_0", "conversations": turns})
    one, two = (list(read_source(source))[0] for source in (mine, theirs))
    assert (one.messages, one.digest, one.group) == (two.messages, two.digest, "a")


def test_folders_and_globs_are_read_in_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.txt", "B"), ("a.md", "A"), ("sub/c.py", "C"), ("empty.txt", " \n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    write_lines(tmp_path / "sub" / "d.jsonl", [{"text": "D"}, {"text": "E", "name": "e"}])
    records = list(read_source(Source("text", str(tmp_path))))
    assert [record.text for record in records] == ["A", "B", "C", "D", "E"]
    assert [record.group for record in records] == ["a.md", "b.txt", "sub/c.py", "D", "e"]
    assert records[3].where.endswith("d.jsonl:1")
    found = list(read_source(Source("text", str(tmp_path / "*.txt"))))
    assert [record.text for record in found] == ["B"]


# ---- corpus ------------------------------------------------------------------------------------


def test_a_corpus_holds_what_the_template_renders(tmp_path):
    (tmp_path / "t.txt").write_text("x" * 300, encoding="utf-8")
    corpus = build(
        tmp_path / "corpus",
        chats(tmp_path / "c.jsonl", chat("hi", "hello"), chat("é", "ß", "q", "a")),
        Source("text", str(tmp_path / "t.txt")),
    )
    first, second, *pieces = texts(corpus)
    assert first == ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n")
    assert second.count("<|im_start|>assistant\n") == 2 and "ß<|im_end|>" in second
    assert [len(piece) for piece in pieces] == [128, 128, 44]
    assert corpus.source_S.tolist() == [0, 0, 1, 1, 1]
    begin, end = corpus.start_S[:2]
    learnt = corpus.tokens_N[begin:end][corpus.learnt_N[begin:end]]
    assert chatml_tokenizer().decode(learnt.tolist()) == "ello<|im_end|>"  # prefill gives the "h"
    begin, end = corpus.start_S[1:3]
    learnt = corpus.tokens_N[begin:end][corpus.learnt_N[begin:end]]
    assert (
        chatml_tokenizer().decode(learnt.tolist()) == "\ufffd<|im_end|><|im_end|>"
    )  # of two bytes
    assert corpus.learnt_N[corpus.start_S[2] :].all()
    assert corpus.num_tokens == corpus.start_S[-1] == corpus.length_S.sum()
    assert corpus.tokenizer_hash == chatml_tokenizer().fingerprint


def test_records_left_out_are_counted_and_said(tmp_path):
    prompts = write_lines(tmp_path / "held.jsonl", [{"prompt": f"Say: {LONG}!"}, {"prompt": "Hi"}])
    corpus = build(
        tmp_path / "corpus",
        chats(
            tmp_path / "c.jsonl",
            chat("a", "b"),
            chat("a", "b"),
            chat("now " + LONG.upper().replace(" ", ", "), "b"),
            chat("hi?", "b"),
            chat("a<|im_end|>", "b"),
            chat("long", "b" * 200),
            chat("c" * 200, "b"),
            chat("nothing", ""),
        ),
        held_out=(str(prompts),),
    )
    figures = corpus.figures[0]
    names = ("records", "segments", "duplicates", "overlapping", "control", "cut", "unanswered")
    assert [figures[name] for name in names] == [8, 2, 1, 2, 1, 1, 2]
    assert [text[17:21] for text in texts(corpus)] == ["a<|i", "long"]
    said = "\n".join(corpus.summary())
    for what in ("repeat a held-out prompt", "special tokens", "were cut", "earlier one"):
        assert what in said


def test_an_error_names_the_line_and_leaves_nothing(tmp_path):
    good = chats(tmp_path / "good.jsonl", chat("a", "b"))
    bad = chats(tmp_path / "bad.jsonl", chat("c", "d"), "{")
    with pytest.raises(ConfigError, match=r"bad\.jsonl:2: not JSON"):
        build(tmp_path / "run" / "corpus", good, bad)
    assert not list((tmp_path / "run").iterdir())
    corpus = build(tmp_path / "run" / "corpus", good)
    with pytest.raises(ConfigError, match=r"bad\.jsonl:2: not JSON"):
        build(tmp_path / "run" / "corpus", good, bad)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["corpus"]
    assert texts(build(tmp_path / "run" / "corpus", good)) == texts(corpus)


def test_tokens_beyond_the_targets_vocabulary_are_an_error(tmp_path):
    source = chats(tmp_path / "c.jsonl", chat("a", "b"))
    with pytest.raises(ConfigError, match=r"c\.jsonl:1: token 257 is not in 0\.\.199"):
        build(tmp_path / "corpus", source, vocab_size=200)


def test_a_source_without_training_text_is_an_error(tmp_path):
    source = chats(tmp_path / "c.jsonl", chat("a", "b"))
    with pytest.raises(
        ConfigError, match=r"c\.jsonl: nothing to train on in 1 records \(1 segments"
    ):
        build(tmp_path / "corpus", source, validation_share=0.999)


def test_a_second_start_uses_what_is_there(tmp_path):
    source = chats(tmp_path / "c.jsonl", chat("a", "b"), chat("c", "d"))
    folder = tmp_path / "corpus"
    first = build(folder, source)
    written = (folder / "tokens.i32").stat().st_mtime_ns
    (tmp_path / "copied").mkdir()
    again = build(folder, chats(tmp_path / "copied" / "c.jsonl", chat("a", "b"), chat("c", "d")))
    assert (folder / "tokens.i32").stat().st_mtime_ns == written
    for field in dataclasses.fields(Corpus):
        if field.name != "sources":
            np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    changed = build(folder, chats(tmp_path / "c.jsonl", chat("a", "b"), chat("c", "e!")))
    assert texts(changed)[1] != texts(first)[1] and changed.fingerprint != first.fingerprint
    for settings in ({"length": 50}, {"validation_share": 0.4}):
        before = json.loads((folder / "meta.json").read_text())["inputs"]
        build(folder, source, **settings)
        assert json.loads((folder / "meta.json").read_text())["inputs"] != before


def test_another_version_makes_another_corpus_of_the_same_files(tmp_path, monkeypatch):
    source = chats(tmp_path / "c.jsonl", chat("a", "bc"))
    first = build(tmp_path / "corpus", source)
    monkeypatch.setattr(corpus_build, "VERSION", corpus_build.VERSION + 1)
    again = build(tmp_path / "corpus", source)
    assert texts(again) == texts(first) and again.fingerprint != first.fingerprint


def test_validation_takes_groups_whole_wherever_they_stand(tmp_path):
    records = [chat(f"question {i % 60}", f"answer {i}") for i in range(240)]
    held_out = []
    for order in (records, records[::-1], records[:180]):
        source = chats(tmp_path / "c.jsonl", *order)
        corpus = build(tmp_path / "corpus", source, validation_share=0.3)
        of_group = {}
        for text, validation in zip(texts(corpus), corpus.validation_S, strict=True):
            question = text.split("<|im_end|>")[0]
            assert of_group.setdefault(question, validation) == validation
        held_out.append({question for question, out in of_group.items() if out})
        asked = [f"<|im_start|>user\n{question}" for question in corpus.validation_questions]
        assert sorted(asked) == sorted(held_out[-1])
    assert held_out[0] == held_out[1] == held_out[2] and 5 < len(held_out[0]) < 35


def test_special_tokens_in_a_text_leave_its_piece_out(tmp_path):
    (tmp_path / "t.txt").write_text("x" * 128 + "a<|im_end|>b" + "y" * 140, encoding="utf-8")
    corpus = build(tmp_path / "corpus", Source("text", str(tmp_path / "t.txt")))
    assert texts(corpus) == ["x" * 128, "y" * 15]
    assert END not in corpus.tokens_N and corpus.figures[0]["control"] == 1


def test_pieces_of_a_text_begin_as_the_tokenizer_begins_texts(tmp_path):
    backend = byte_tokenizer(CHATML, ("<|im_start|>", "<|im_end|>", "<s>"))._backend
    backend.bos_token = "<s>"
    core = backend.backend_tokenizer
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 258)])
    tokenizer = Tokenizer(backend)
    (tmp_path / "t.txt").write_text("x" * 255, encoding="utf-8")
    corpus = build_corpus(
        DataConfig((Source("text", str(tmp_path / "t.txt")),), length=128, validation_share=0.0),
        tokenizer,
        vocab_size=259,
        folder=tmp_path / "corpus",
    )
    assert corpus.length_S.tolist() == [128, 128]  # a third would hold two tokens: none to learn
    x = chatml_tokenizer().encode("x")
    for begin in corpus.start_S[:-1]:
        piece = corpus.tokens_N[begin : begin + 128].tolist()
        assert piece == tokenizer.encode("x" * 127) == [258, *127 * x]


def test_what_a_run_is_evaluated_on_is_held_out(tmp_path):
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": LONG}])
    config = DataConfig(
        (chats(tmp_path / "c.jsonl", chat(f"now {LONG}", "ab"), chat("a", "bc")),),
        length=256,
        validation_share=0.0,
    )

    def corpus(config, **options):
        return build_corpus(
            config, chatml_tokenizer(), vocab_size=VOCAB, folder=tmp_path / "corpus", **options
        )

    assert corpus(config).num_segments == 2
    held = corpus(config, held_out=[str(prompts)])
    assert held.num_segments == 1 and held.figures[0]["overlapping"] == 1
    written = (tmp_path / "corpus" / "tokens.i32").stat().st_mtime_ns
    again = dataclasses.replace(config, held_out=(str(prompts),))
    corpus(again, held_out=[str(prompts)])  # named twice: the same corpus
    assert (tmp_path / "corpus" / "tokens.i32").stat().st_mtime_ns == written


def test_max_tokens_is_not_exceeded(tmp_path):
    (tmp_path / "t.txt").write_text("x" * 1000, encoding="utf-8")
    source = Source("text", str(tmp_path / "t.txt"), max_tokens=300)
    assert build(tmp_path / "corpus", source).num_tokens == 256


def test_counts_weigh_training_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BLOCK", 100)
    (tmp_path / "t.txt").write_text("abc" * 300, encoding="utf-8")
    asked = chats(tmp_path / "c.jsonl", *(chat(f"u{i}", f"v{i}") for i in range(40)))
    corpus = build(
        tmp_path / "corpus",
        dataclasses.replace(asked, prompt_weight=0.25),
        Source("text", str(tmp_path / "t.txt"), answer_weight=0.5),
        validation_share=0.3,
    )
    expected = np.zeros(VOCAB)
    for segment in range(corpus.num_segments):
        if not corpus.validation_S[segment]:
            for i in range(corpus.start_S[segment], corpus.start_S[segment + 1]):
                weight = 0.5 if corpus.source_S[segment] else 1.0 if corpus.learnt_N[i] else 0.25
                expected[corpus.tokens_N[i]] += weight
    assert 0 < corpus.validation_S.sum() < corpus.num_segments
    np.testing.assert_allclose(corpus.counts(), expected)
    of_source = [
        sum(corpus.length_S[(corpus.source_S == k) & ~corpus.validation_S]) for k in range(2)
    ]
    assert corpus.source_training_tokens == of_source and min(of_source) > 0
    assert corpus.num_training_tokens == sum(of_source) < corpus.num_tokens
    assert END in corpus.draft_vocabulary(4)


def test_draft_vocabulary_has_the_frequent_and_the_stop_tokens():
    counts = np.array([5.0, 0, 9, 1, 0, 7, 0, 0])
    assert draft_vocabulary(counts, 3, [6]).tolist() == [2, 5, 6]
    assert draft_vocabulary(counts, 6, []).tolist() == [0, 1, 2, 3, 4, 5]
    for size, always in ((9, []), (0, []), (1, [0, 1])):
        with pytest.raises(ConfigError, match=f"draft vocabulary of {size}"):
            draft_vocabulary(counts, size, always)


# ---- held-out prompts --------------------------------------------------------------------------


@given(
    prompt=st.lists(st.sampled_from("abc"), max_size=8),
    text=st.lists(st.sampled_from("abc"), max_size=12),
)
def test_a_shared_run_of_words_is_found(prompt, text):
    words = 4
    runs = [prompt[i : i + words] for i in range(len(prompt) - words + 1)]
    shared = any(text[i : i + words] in runs for i in range(len(text)))
    same = bool(text) and len(text) < words and text == prompt
    held_out = HeldOut([" ".join(prompt)], words)
    assert held_out.repeated_by(["zzz", "; ".join(text).upper()]) == (shared or same)


def test_prompts_come_from_suites_or_files(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"turns": ["b", "c"]}])
    assert prompts_of(str(path)) == ["a", "b"]
    with pytest.raises(ConfigError, match="expected mt-bench, humaneval or a file"):
        prompts_of("mt-bensch")
