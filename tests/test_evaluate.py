"""Evaluations of a run and what becomes of them: figures, log, plot, card."""

import dataclasses
import io
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

from jax_eagle.acceptance import decode_acceptance, forced_acceptance, greedy_answers
from jax_eagle.config import ConfigError
from tests.serving import byte_tokenizer
from train.config import (
    DataConfig,
    DraftSettings,
    EvaluationConfig,
    Source,
    TrainConfig,
)
from train.evaluate import Evaluation, Evaluator, evaluation_prompts
from train.log import METRICS, Log, read_metrics
from train.plot import PLOT, main, plot
from train.report import Effort, write_card

pytestmark = pytest.mark.usefixtures("quick_compiler")

CONFIG = EvaluationConfig(max_new_tokens=9, depth=3, trees=("chain:3", "paths:[[0],[1],[0,0]]"))


@pytest.fixture(scope="module")
def target(make_target):
    return make_target(max_position=64)


@pytest.fixture(scope="module")
def draft(make_draft):
    return make_draft(max_position=64)


@pytest.fixture(scope="module")
def suites(ragged_prompts):
    return {"short": ragged_prompts(3), "long": ragged_prompts(5, seed=1)}


@pytest.fixture(scope="module")
def evaluator(target, suites):
    return Evaluator(lambda: target, suites, CONFIG)


@pytest.fixture(scope="module")
def evaluation(evaluator, draft):
    return evaluator(draft)


# ---- evaluations --------------------------------------------------------------------------------


def test_figures_are_those_of_acceptance(target, draft, suites, evaluation):
    figures, prompts = evaluation.figures, [*suites["short"], *suites["long"]]
    assert next(iter(figures)) == "acceptance_length/chain:3"
    assert evaluation.acceptance_length == figures["acceptance_length/chain:3"]
    decoded = decode_acceptance(target, draft, prompts, trees=CONFIG.trees, max_new_tokens=9)
    for tree in CONFIG.trees:
        names = [f"acceptance_length{end}/{tree}" for end in ("", "_low", "_high")]
        assert tuple(figures[name] for name in names) == decoded[tree].acceptance_length()
        for suite, rows in ("short", range(3)), ("long", range(3, 8)):
            own = decoded[tree].take(rows).acceptance_length()
            assert figures[f"acceptance_length/{tree}/{suite}"] == own.value
        second = decoded[tree].depths.conditional(2).value
        assert figures[f"decoded_conditional/{tree}/depth2"] == second
    assert "decoded_conditional/paths:[[0],[1],[0,0]]/depth3" not in figures
    answers = greedy_answers(target, prompts, max_new_tokens=9)
    forced = forced_acceptance(target, draft, prompts, answers, depth=3)
    assert figures["chains"] == 8 * 8
    assert figures["conditional_high/depth2"] == forced.depths.conditional(2).high
    assert figures["joint/depth3"] == forced.depths.joint(3).value
    assert figures["rank/depth1/rank2"] == forced.depths.by_rank(1)[1] > 0
    assert figures["expected_acceptance/depth1"] == forced.expected_acceptance().value
    assert figures["chain_length/depth3"] == evaluation.acceptance_length
    assert all(type(value) is float for value in figures.values())
    json.dumps(figures, allow_nan=False)


def test_new_weights_are_evaluated_without_compiling(evaluator, draft, evaluation):
    new = jax.tree.map(lambda x: jnp.asarray(-1.5 * np.asarray(x)), draft.params)
    compiled = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        trained = evaluator(draft.replace(params=new))
        assert evaluator(draft).figures == evaluation.figures
        assert trained.figures != evaluation.figures
        assert not compiled
        jax.jit(lambda x: x + 17)(1)  # the listener hears
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_line_says_what_its_figures_mean(evaluation):
    line = evaluation.line()
    assert line.startswith(f"acceptance length chain:3 {evaluation.acceptance_length:.3f} [")
    assert "conditional by depth" in line and "counts the bonus token" in line


@pytest.mark.parametrize(
    "prompts, trees, message",
    [
        ({"validation": []}, ("chain:3",), "at least one prompt"),
        ({"validation": [[1]]}, (), "one tree"),
        ({"validation": [[1]]}, ("oak",), "unknown tree 'oak'"),
    ],
)
def test_an_evaluator_refuses_what_it_cannot_use(target, prompts, trees, message):
    with pytest.raises(ValueError, match=message):
        Evaluator(lambda: target, prompts, dataclasses.replace(CONFIG, trees=trees))


def test_prompts_are_the_first_of_each_suite_as_chats(tmp_path):
    tokenizer, file = byte_tokenizer(), tmp_path / "own.jsonl"
    file.write_text('{"prompt": "Hello"}\n{"turns": ["Why?", "And?"]}\n')
    config = EvaluationConfig(prompts=("validation", str(file)), num_prompts=2)
    prompts = evaluation_prompts(config, tokenizer, ["One", "Two", "Three"])
    assert list(prompts) == ["validation", "own.jsonl"]

    def chats(*texts):
        return [tokenizer.apply_chat_template([{"role": "user", "content": t}]) for t in texts]

    assert prompts["validation"] == chats("One", "Two")
    assert prompts["own.jsonl"] == chats("Hello", "Why?")
    with pytest.raises(ConfigError, match="'validation': there are none; raise"):
        evaluation_prompts(config, tokenizer, [])
    with pytest.raises(ConfigError, match="'own.jsonl' twice"):
        evaluation_prompts(EvaluationConfig(prompts=(str(file), str(file))), tokenizer, [])
    with pytest.raises(ConfigError, match="expected mt-bench, humaneval or a file"):
        evaluation_prompts(EvaluationConfig(prompts=("mtbench",)), tokenizer, [])


# ---- log ----------------------------------------------------------------------------------------


def made_up(length: float) -> Evaluation:
    figures = {}
    for name, key in ("acceptance_length", "chain:3"), ("conditional", "depth1"):
        for end, shift in ("", 0.0), ("_low", -0.1), ("_high", 0.1):
            figures[f"{name}{end}/{key}"] = (length if key == "chain:3" else length / 3) + shift
    return Evaluation(figures, ("chain:3",))


def write_log(folder, steps, *, start=0, **options) -> str:
    """Logs these steps of 100 tokens each, and an evaluation at every second one."""
    screen = io.StringIO()
    with Log(folder, 10, step=start, console=Console(file=screen, width=200), **options) as log:
        for step in steps:
            log.step(step, 100 * step, {"loss": 1 / step, "flops_per_token": 10.0})
            if step % 2 == 0:
                log.evaluation(step, 100 * step, made_up(1 + step / 10))
    return screen.getvalue()


def board_steps(folder) -> list[tuple[int, str]]:
    """(step, name) of all scalars in the event files that no later session purged."""
    kept = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                kept = [entry for entry in kept if entry[0] < event.step]
            kept += [(event.step, value.tag) for value in event.summary.value]
    return kept


def test_a_resumed_log_holds_every_step_once(tmp_path):
    write_log(tmp_path, range(1, 6))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    before = list(read_metrics(tmp_path))
    assert [record["step"] for record in before] == [1, 2, 2, 3, 4, 4, 5]
    write_log(tmp_path, range(4, 7), start=3)
    records = list(read_metrics(tmp_path))
    assert records[:4] == before[:4]
    assert [record["step"] for record in records] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [record["tokens"] for record in records[::3]] == [100, 300, 500]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)  # the clock of the run goes on
    losses = [step for step, name in board_steps(tmp_path) if name == "loss"]
    assert losses == [1, 2, 3, 4, 5, 6]
    lengths = [
        step for step, name in board_steps(tmp_path) if name.startswith("acceptance_length/")
    ]
    assert lengths == [2, 4, 6]


def test_a_log_says_where_it_is_broken(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        Log(tmp_path, 10, step=2)


def test_progress_tells_speed_and_share_of_the_peak(tmp_path):
    shown = write_log(tmp_path, range(1, 3), peak_flops=1e9)
    assert "step 2: 200 tokens, loss 0.5000, " in shown and "of peak" in shown
    assert "step 2: acceptance length chain:3 1.200 [1.100, 1.300]" in shown
    record = next(read_metrics(tmp_path))
    assert record["peak_share"] == pytest.approx(record["tokens_per_second"] * 10 / 1e9)


def test_the_time_left_is_told_though_calls_are_minutes_apart(tmp_path):
    screen, now = io.StringIO(), 0.0
    console = Console(file=screen, width=200, get_time=lambda: now)
    with Log(tmp_path, 100, console=console) as log:
        for step in (20, 40, 60):
            now += 160.0
            log.step(step, 100 * step, {"loss": 1.0})
    lines = screen.getvalue().splitlines()
    assert "left" not in lines[0]  # one call tells no speed
    assert lines[1].endswith(", 0:08:00 left") and lines[2].endswith(", 0:05:20 left")
    bar = write_log(tmp_path, [3], start=2)
    assert "step 3/10" in bar and "loss 0.3333" in bar and "of peak" not in bar


# ---- plot and card ------------------------------------------------------------------------------


def test_plot_of_one_run_and_of_several(tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, steps in zip(runs, (range(1, 7), range(1, 4)), strict=True):
        run.mkdir()
        write_log(run, steps)
    main(runs[:1], runs[0] / PLOT)
    plot(runs, tmp_path / "both.png")
    images = [path.read_bytes() for path in (runs[0] / PLOT, tmp_path / "both.png")]
    assert all(image.startswith(b"\x89PNG") for image in images) and images[0] != images[1]
    with pytest.raises(ConfigError, match="not the folder of a run"):
        plot([tmp_path], tmp_path / "none.png")
    with pytest.raises(ConfigError, match="'xyz' is not supported"):
        plot(runs, tmp_path / "both.xyz")
    (runs[1] / METRICS).write_text('{"step": 1, "tokens": 100, "loss": 1.0}\n')
    with pytest.raises(ConfigError, match="holds no evaluation yet"):
        plot(runs, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_card_has_the_figures_and_no_paths(tmp_path, draft, evaluation):
    secret = str(tmp_path / "secret")
    config = TrainConfig(
        target="tiny", run=secret, output=str(tmp_path / "draft"), card="Made for a test.",
        data=DataConfig(sources=(Source("chat", secret),), held_out=(secret,), features=secret),
        draft=DraftSettings(start=f"{secret}/old"),
        evaluation=dataclasses.replace(CONFIG, prompts=("short", f"{secret}/long")),
    )  # fmt: skip
    effort = Effort(steps=7, tokens=7000, seconds=120.4, distinct_tokens=3500, source_tokens=[3500])
    card = write_card(config, draft.config, effort, evaluation)
    text = (tmp_path / "draft" / "card.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(card))
    assert card["acceptance"]["acceptance_length/chain:3"] == evaluation.acceptance_length
    assert card["settings"]["draft"]["start"] == "old"
    readme = (tmp_path / "draft" / "README.md").read_text()
    assert f"| chain:3, all | {evaluation.acceptance_length:.3f} (" in readme
    assert "| chain:3, long | " in readme and "(64 chains)" in readme
    assert "7 steps, 7,000 tokens, 2 minutes" in readme and readme.endswith("Made for a test.\n")
    assert secret not in text and secret not in readme
