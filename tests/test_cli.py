"""The program `jax-eagle`, as its users run it: answers on stdout, one line for bad input."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from jax_eagle import Draft, Target, bench, cli, generate, load_draft, load_target, terminal
from jax_eagle.checkpoint import eagle, hf, profiles
from jax_eagle.checkpoint.mapping import draft_entries, nested, target_entries
from jax_eagle.config import DraftConfig, LlamaConfig
from jax_eagle.generate import RoundEvent
from jax_eagle.tokenizer import TextPieces
from tests import serving

pytestmark = pytest.mark.usefixtures("quick_compiler")

CONFIG = LlamaConfig(
    vocab_size=260, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8, max_position=256,
)  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ '<user>' + m['content'] + '<end>' }}{% endfor %}"
WEIGHTS = "model.safetensors"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    """Tiny random models: `target` has a tokenizer with chat template, `ids` has none; drafts."""
    folder = tmp_path_factory.mktemp("models")
    target = Target(random_params(target_entries(CONFIG)), CONFIG, byte_tokenizer())
    hf.save(target, folder / "target")
    hf.save(target.replace(tokenizer=None), folder / "ids")
    for name, change in ("draft", {}), ("wide", {"hidden_size": 32}), ("words", {"vocab_size": 9}):
        config = DraftConfig.for_target(dataclasses.replace(CONFIG, **change))
        params = random_params(draft_entries(config))
        eagle.save(Draft(params=params, draft_to_target=None, config=config), folder / name)
    return folder


def random_params(entries):
    rng = np.random.default_rng(0)
    return nested({entry.path: rng.normal(size=entry.shape).astype("f") for entry in entries})


def byte_tokenizer():
    return serving.byte_tokenizer(TEMPLATE, ("<user>", "<end>"))


@pytest.fixture
def run(models_folder, capsys, monkeypatch):
    """Runs the program in this process, in the folder of models: (exit code, stdout, stderr)."""
    monkeypatch.chdir(models_folder)
    monkeypatch.delenv("JAX_EAGLE_DEBUG", raising=False)

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        return stop.value.code, *capsys.readouterr()

    return call


def process(*command, cwd):
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def assert_one_line(text, expected, program="jax-eagle"):
    assert text.startswith(f"{program}: error: ")
    assert text.count("\n") == 1 and text.endswith("\n"), text
    assert expected in text
    assert "Traceback" not in text


# ---- what it does -------------------------------------------------------------------------------


def test_process_streams_the_text_of_the_library(models_folder):
    done = process(
        sys.executable, "-m", "jax_eagle.cli", "generate", "--model", "ids", "--draft", "draft",
        "--prompt-ids", "1,2,3", "--max-new-tokens", "12", "--tree", "chain:2", cwd=models_folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    target = load_target(models_folder / "ids")
    expected = generate(target, None, [[1, 2, 3]], max_new_tokens=12)
    assert [int(token) for token in done.stdout.split()] == expected.tokens[0]
    assert done.stderr.startswith("12 tokens (") and done.stderr.count("\n") == 1
    assert "ended by length" in done.stderr


def test_console_script_ends_with_code_2_on_bad_input(models_folder):
    script = Path(sys.executable).parent / "jax-eagle"  # there once the package is installed
    program = [script] if script.exists() else [sys.executable, "-m", "jax_eagle.cli"]
    done = process(*program, "inspect", "nothing", cwd=models_folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "nothing: no such file or folder")


def test_generate_with_and_without_stream_chat_and_sampling(run):
    options = ("--model", "target", "--draft", "draft", "--max-new-tokens", 12, "--tree", "chain:2")
    asked = ("--prompt", "Tell me", "--temperature", 1.5, "--top-p", 0.95, "--seed", 7)
    code, streamed, spent = run("generate", *options, *asked)
    assert code == 0 and "tokens/s" in spent
    code, whole, spent = run("generate", *options, *asked, "--no-stream")
    assert code == 0 and spent.startswith("12 tokens, ")
    # Bytes that are no text: a stream holds them back until the rest comes, a text shows them.
    assert whole.startswith(streamed.rstrip("\n").split("\ufffd")[0])
    code, raw, _ = run("generate", *options, *asked, "--no-stream", "--raw")
    assert code == 0 and raw != whole


def test_inspect_target_and_draft(run):
    code, text, _ = run("inspect", "target")
    assert code == 0
    size = sum(np.prod(x.shape) for x in jax.tree.leaves(load_target("target").params))
    assert f"{size:,} (" in text
    assert "  64 bytes a token, 4,096 a page" in text
    assert "embed/embedding                      float32 [260, 16]" in text
    code, text, _ = run("inspect", "draft", "--target", "target", "--no-smoke")
    assert code == 0 and "fits (hidden size 16, vocabulary 260)" in text
    assert "  kind                 EAGLE\n" in text and "\nacceptance" not in text
    code, text, _ = run("inspect", "draft")
    assert code == 0 and "not checked; needs hidden size 16" in text and "\nacceptance" not in text


def test_inspect_eagle3_of_another_program(run, tmp_path):
    """Only the target tells which layers are tapped, and that the stored embedding is its own."""
    deep = dataclasses.replace(CONFIG, num_layers=8)
    target = Target(random_params(target_entries(deep)), deep)
    config = DraftConfig.eagle3_for_target(deep)
    draft = Draft(random_params(draft_entries(config)), None, config)
    hf.save(target, tmp_path / "target")
    profiles.save(
        draft, tmp_path / "draft", "eagle3", target=target, with_embedding=True, numbering="enter"
    )
    arguments = "inspect", tmp_path / "draft", "--target", tmp_path / "target"
    _, text, _ = run(*arguments, "--no-smoke", "--read-numbering", "output")
    assert "EAGLE-3, features from layers 3, 5, 6\n" in text
    path = tmp_path / "draft" / "config.json"
    fields = json.loads(path.read_text())
    del fields["eagle_aux_hidden_state_layer_ids"]
    path.write_text(json.dumps(fields))
    code, text, _ = run(*arguments)
    assert code == 0 and "EAGLE-3, features from layers 2, 4, 5\n" in text
    assert re.search(r"own_embedding +False\n", text)
    assert "fits (hidden size 16, vocabulary 260)" in text
    code, _, err = run(*arguments[:2])
    assert code == 2
    assert_one_line(err, "load the draft with its target")


def test_inspect_measures_a_draft_on_a_few_prompts(run, monkeypatch):
    monkeypatch.setattr(bench, "PROMPTS", ("Explain", "Write"))
    code, text, _ = run("inspect", "draft", "--target", "target")
    assert code == 0
    line = text.splitlines()[-1]
    assert line.startswith("acceptance length ")
    assert "with chain:3, a smoke test on 62 tokens of 2 prompts" in line
    assert "counts the bonus token" in line
    code, text, _ = run("inspect", "draft", "--target", "ids")
    assert code == 0 and text.splitlines()[-1].startswith("acceptance not measured: its prompts")


def test_demo_tells_tokens_apart_and_compares_speed(run, monkeypatch):
    monkeypatch.setattr(bench, "PROMPTS", ("Explain", "Write"))
    code, text, _ = run(
        "demo", "--model", "target", "--draft", "draft", "--tree", "chain:2",
        "--max-new-tokens", 12, "--repetitions", 1,
    )  # fmt: skip
    assert code == 0
    for part in ("Compiling", "‹accepted draft tokens›", "> Explain\n", "acceptance", "ratio"):
        assert part in text
    rows = [line.split() for line in text.splitlines()]
    plain, chain = (row for row in rows if row[:1] in (["plain"], ["chain:2"]))
    assert plain[1] == "1.00" and chain[-1] == "100%"


def test_bench_prints_json_or_a_table(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["Tell me", "more"]}\n\n{"prompt": "Why"}\n')
    arguments = (
        "bench", "--model", "target", "--draft", "draft", "--tree", "chain:2", "--repetitions", 1,
        "--max-new-tokens", 12, "--prompts", tmp_path / "prompts.jsonl",
    )  # fmt: skip
    code, text, _ = run(*arguments, "--json")
    data = json.loads(text)
    assert code == 0
    assert [row["tree"] for row in data["summaries"]] == ["plain", "chain:2"]
    assert data["summaries"][0]["acceptance_length"] == 1.0
    assert all(row["same_text"] == 1.0 for row in data["summaries"])
    assert len(data["runs"]) == 4 and 0 < data["floor"]["share"]
    code, text, _ = run(*arguments, "--limit", 1)
    assert code == 0 and "1 prompts" in text and "of the limit" in text


def test_download_prints_the_path(run):
    code, text, _ = run("download", "target")
    assert (code, text) == (0, "target\n")


def test_help_teaches(run):
    code, text, _ = run("--help")
    assert code == 0
    for part in ("Examples", "jax-eagle demo", "Trees.", "chain:3", "paths:[[0],[0,0],[1]]"):
        assert part in text
    assert run() == (2, text, "")


# ---- bad input ----------------------------------------------------------------------------------

GENERATE = ("generate", "--model", "target", "--draft", "draft", "--max-new-tokens", "4")
ASKED = (*GENERATE, "--prompt", "Hi")
BAD_OPTIONS = {
    "unknown model": (("inspect", "nothing"), "no such file or folder, and no known name"),
    "unknown draft": ((*ASKED, "--draft", "nothing"), "nothing: no such file or folder"),
    "no known draft": ((*ASKED, "--draft", "auto"), "give --draft NAME, or --draft none"),
    "width": ((*ASKED, "--draft", "wide"), "its feature width is 32, this target needs 16"),
    "vocabulary": ((*ASKED, "--draft", "words"), "its vocabulary size is 9, this target needs 260"),
    "inspect width": (("inspect", "wide", "--target", "target"), "a draft of another target"),
    "two targets": (("inspect", "target", "--target", "target"), "target is a target, expected"),
    "numbering": (("inspect", "target", "--read-numbering", "enter"), "expected a draft"),
    "target as draft": ((*ASKED, "--draft", "target"), "not an EAGLE draft"),
    "draft as target": ((*ASKED, "--model", "draft"), "unknown architecture EagleLlama"),
    "empty prompt": ((*GENERATE, "--prompt", " "), "the prompt is empty"),
    "no ids": ((*GENERATE, "--prompt-ids", ""), "prompt 0 is empty"),
    "no prompt": (GENERATE, "give one prompt: --prompt TEXT or --prompt-ids 1,2,3"),
    "two prompts": ((*ASKED, "--prompt-ids", "1"), "give one prompt"),
    "letters": ((*GENERATE, "--prompt-ids", "1,a"), "'1,a', expected numbers like 1,2,3"),
    "id": ((*GENERATE, "--prompt-ids", "260"), "token ids outside 0..259"),
    "long": ((*GENERATE, "--prompt", "x" * 300), "has 302 tokens, the context holds 256"),
    "no tokenizer": ((*ASKED, "--model", "ids"), "this model has no tokenizer"),
    "no tokenizer, raw": ((*ASKED, "--model", "ids", "--raw"), "this model has no tokenizer"),
    "tree": ((*ASKED, "--tree", "oak"), "unknown tree 'oak': expected auto, plain, chain:K"),
    "paths": ((*ASKED, "--tree", "paths:[[0,0]]"), "needs its parent"),
    "bench tree": (("bench", "--tree", "static:5"), "unknown tree 'static:5'"),
    "sampled": (
        (*ASKED, "--drafting", "sampled", "--tree", "dynamic:depth=2,width=2,nodes=4"),
        "sampled drafting is lossless only if no drawn node is dropped",
    ),
    "drafting": ((*ASKED, "--drafting", "wild"), "'wild' is not one of 'greedy', 'sampled'"),
    "temperature": ((*ASKED, "--temperature", "-1"), "temperature is -1.0, expected 0 or more"),
    "nan": ((*ASKED, "--temperature", "nan"), "temperature is nan, expected 0 or more"),
    "top_p": ((*ASKED, "--top-p", "0"), "top_p is 0.0, expected above 0 and at most 1"),
    "top_k": ((*ASKED, "--top-k", "-5"), "top_k is -5, expected"),
    "min_p": ((*ASKED, "--min-p", "2"), "min_p is 2.0, expected from 0 to 1"),
    "seed": ((*ASKED, "--seed", "-1"), "seed is -1, expected an unsigned integer"),
    "tokens": ((*ASKED, "--max-new-tokens", "0"), "Invalid value for '--max-new-tokens'"),
    "option": ((*ASKED, "--colour"), "No such option: --colour"),
    "command": (("dance",), "No such command 'dance'"),
    "prompts file": (("bench", "--prompts", "nothing.txt"), "nothing.txt"),
    "demo draft": (("demo", "--draft", "none"), "the demo needs a draft"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_give_one_line(run, case):
    arguments, expected = BAD_OPTIONS[case]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert_one_line(err, expected)


def without_weights(folder):
    (folder / WEIGHTS).unlink()


def truncated(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def changed_tensor(change):
    def apply(folder):
        tensors = safetensors.numpy.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)

    return apply


def other_architecture(folder):
    fields = json.loads((folder / "config.json").read_text())
    fields["architectures"] = ["MambaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(fields))


NORM = "model.norm.weight"
DAMAGE = {
    "missing file": (without_weights, "model.safetensors: no such file"),
    "truncated": (truncated, "truncated, or not a safetensors file"),
    "not json": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
    "missing": (changed_tensor(lambda t: t.pop(NORM)), f"tensor {NORM} is missing"),
    "left over": (changed_tensor(lambda t: t.update(x=t[NORM])), "tensor x is not expected"),
    "shape": (changed_tensor(lambda t: t.update({NORM: t[NORM][:3]})), "shape [3], expected [16]"),
    "architecture": (other_architecture, "unknown architecture MambaForCausalLM"),
    "nan": (changed_tensor(lambda t: t[NORM].fill(np.nan)), "the target's logits are NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_give_one_line(run, tmp_path, case):
    damage, expected = DAMAGE[case]
    shutil.copytree("ids", tmp_path / "model")
    damage(tmp_path / "model")
    code, _, err = run(
        "generate", "--model", tmp_path / "model", "--draft", "none", "--prompt-ids", "1",
        "--max-new-tokens", 12, "--no-stream",
    )  # fmt: skip
    assert code == 2
    assert_one_line(err[err.index("jax-eagle") :], expected)


PROGRAMS = {
    "run": (["train.export", "none", "--out", "x"], "none: not the folder of a run"),
    "config": (["train.train", "--config", "none.yaml"], "none.yaml"),
    "option": (["train.train", "--depth", "3"], "No such option: --depth"),
    "model": (
        ["train.prompts", "--out", "p", "--count", "1", "--model", "none"],
        "none: no such file or folder",
    ),
    "benchmark": (["benchmarks.acceptance", "--model", "none"], "none: no such file or folder"),
}


ONE_BY_ONE = """
import contextlib, io, json, runpy, sys

ends = []
for sys.argv[1:] in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
        except SystemExit as end:
            ends.append([end.code, out.getvalue(), err.getvalue()])
print(json.dumps(ends))
"""
"""As `python -m` would, but what the programs have in common is imported once: none of them imports
one that comes later, which would then be there already."""


@pytest.fixture(scope="module")
def ends():
    """Exit code, stdout and stderr of each of PROGRAMS."""
    arguments = json.dumps([arguments for arguments, _ in PROGRAMS.values()])
    done = process(sys.executable, "-c", ONE_BY_ONE, arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(zip(PROGRAMS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", PROGRAMS)
def test_bad_input_of_other_programs_gives_one_line(ends, case):
    ((program, *_), message), (code, out, err) = PROGRAMS[case], ends[case]
    assert (code, out) == (2, "")
    assert_one_line(err, message, program)


def test_unexpected_errors_show_their_trace_only_on_request(run, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(cli, "describe", broken)
    code, _, err = run("inspect", "target")
    assert code == 1
    assert_one_line(err, "first second (RuntimeError; JAX_EAGLE_DEBUG=1 shows where)")
    with pytest.raises(RuntimeError, match="first"):
        cli.main(["--debug", "inspect", "target"])
    monkeypatch.setenv("JAX_EAGLE_DEBUG", "1")
    with pytest.raises(RuntimeError, match="first"):
        cli.main(["inspect", "target"])


# ---- parts --------------------------------------------------------------------------------------


def test_pieces_hold_back_cut_characters():
    tokenizer, text = byte_tokenizer(), "naïve 🦅 flies"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    pieces = TextPieces(tokenizer)
    shown = [pieces.push(token) for token in ids]
    assert "".join(shown) == text
    assert "🦅" in shown and "\ufffd" not in "".join(shown)


def test_stream_marks_or_colours_accepted_tokens():
    tokenizer = byte_tokenizer()

    def events():
        for text, accepted in ("a", 0), ("bcd", 2), ("e", 0), ("fg", 2):
            yield RoundEvent([tokenizer.encode(text)], [accepted], [[0] * accepted], ["length"])

    plain, coloured = io.StringIO(), io.StringIO()
    done = terminal.stream(Console(file=plain), tokenizer, events(), marks=True)
    assert plain.getvalue() == "a‹bc›de‹fg›\n"
    assert (done.tokens, done.rounds, done.accepted) == (7, 3, 4)
    assert done.acceptance_length == 2.0
    terminal.stream(
        Console(file=coloured, force_terminal=True, color_system="standard"), tokenizer, events()
    )
    assert "\x1b[32mb\x1b[0m\x1b[32mc\x1b[0m\x1b[1;33md\x1b[0m" in coloured.getvalue()


def test_ratios_are_medians_over_pairs():
    def timed(tree, batch, seconds, rounds, tokens=(1, 2, 3, 4, 5)):
        return bench.Run(tree, batch, 0, 1.0, seconds, rounds, rounds, (tokens,))

    runs = [
        timed("plain", 0, 8.0, 4), timed("chain:3", 0, 4.0, 2),
        timed("plain", 1, 8.0, 4), timed("chain:3", 1, 2.0, 2, tokens=(1, 2, 3, 4, 6)),
        timed("plain", 2, 8.0, 4), timed("chain:3", 2, 8.0, 4),
        timed("plain", 3, 0.0, 0, tokens=(9,)), timed("chain:3", 3, 0.0, 0, tokens=(9,)),
    ]  # fmt: skip
    plain, chain = bench.summarise(runs)
    assert (plain.tree, plain.ratio, plain.acceptance_length) == ("plain", 1.0, 1.0)
    assert (chain.ratio, chain.acceptance_length, chain.rounds) == (2.0, 12 / 8, 8)
    assert chain.same_text == pytest.approx(2 / 3)
    assert chain.call_ratio == pytest.approx(9 / 5)


def test_floor_reads_the_weights_once(models_folder):
    target = load_target(models_folder / "ids")
    load_draft(models_folder / "draft", target)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(target.params))
    assert bench.weight_bytes(target) == total - 259 * 16 * 4
    tied = target.replace(config=dataclasses.replace(CONFIG, tie_embeddings=True))
    assert bench.weight_bytes(tied) == total
    runs = [bench.Run("plain", 0, 0, 0.0, 2.0, 4, 4, ((1, 2),))]
    limit = bench.floor(target, runs, [1.0, 2.0, 4.0])
    assert limit.share == pytest.approx(bench.weight_bytes(target) / 2.0 / 0.5)
    assert bench.bandwidth_probe(2**22)() > 0
