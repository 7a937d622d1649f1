"""Puts load on an OpenAI-compatible server and reports latency, throughput, acceptance and errors.

    python -m benchmarks.serve_load --url http://127.0.0.1:8000 --num-requests 2000 \\
        --concurrency 64 --max-tokens 8:128 --cancel 0.2 --malformed 0.05 --html load.html

A closed loop keeps `--concurrency` requests running; `--request-rate` makes an open loop, in which
requests come at random (Poisson) times whether or not the server keeps up: then a request's clock
starts when it is due, so waiting for one of the connections counts. Time per output token is per
token, by the server's own count, never per chunk: chunks of a speculating server hold several.

Arrivals, lengths, cancels and malformed requests depend on `--seed` and the request's number alone.
Exit code 1: some request ended in an error, or the server is not idle, leaks pages or has compiled
in traffic. What counts as an error is in `load_client`, what is measured in `load_report`.
"""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx2
import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_eagle.machine import describe_machine
from jax_eagle.program import run_program

from .load_client import LoadClient, Record
from .load_metrics import ServerFigures, read_metrics_when_idle
from .load_plan import PATHS, LoadSettings, Plan, plans, read_questions, warmup_plans
from .load_report import LoadResult, as_data, html_page, print_report

_IDLE_SECONDS = 30.0


async def run_load(
    settings: LoadSettings, on_record: Callable[[Record], None] | None = None
) -> LoadResult:
    """Runs one load against one server and waits until the server is idle again.

    Args:
      on_record: called with what became of each measured request, as it ends.

    Raises:
      ValueError: prompts that cannot be read or do not suit the endpoint.
      OSError: nothing that lists a model answers at the URL.
    """
    questions = read_questions(settings)
    limits = httpx2.Limits(
        max_connections=None,
        max_keepalive_connections=settings.workers,
        keepalive_expiry=2,  # sooner than servers close idle connections, or both meet midway
    )
    key = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    async with httpx2.AsyncClient(
        base_url=settings.url, headers=key, limits=limits, timeout=None, trust_env=False
    ) as http:
        model = settings.model or await _first_model(http)
        settings = dataclasses.replace(settings, model=model)
        await _drive(http, settings, warmup_plans(settings, questions))
        before = await read_metrics_when_idle(http, _IDLE_SECONDS)
        records: list[Record] = []

        def keep(record: Record) -> None:
            records.append(record)
            if on_record:
                on_record(record)

        cpu = time.process_time()
        client = await _drive(http, settings, plans(settings, questions), keep)
        seconds, cpu = client.now(), time.process_time() - cpu
        after = await read_metrics_when_idle(http, _IDLE_SECONDS)
    server = ServerFigures.between(before, after) if before and after else None
    return LoadResult(settings.as_data(), records, client.gaps, seconds, cpu / seconds, server)


async def _first_model(http: httpx2.AsyncClient) -> str:
    try:
        response = await http.get("/v1/models", timeout=10)
        return response.raise_for_status().json()["data"][0]["id"]
    except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
        url = str(http.base_url).rstrip("/")
        raise OSError(
            f"no list of models from {url}/v1/models ({error}); is the server up, and is this its "
            "address?"
        ) from None


async def _drive(
    http: httpx2.AsyncClient,
    settings: LoadSettings,
    todo: Iterator[Plan],
    on_record: Callable[[Record], None] = lambda record: None,
) -> LoadClient:
    """Workers take the plans in order; in an open loop each sleeps until its plan is due."""
    client = LoadClient(
        http, PATHS[settings.endpoint], timeout=settings.timeout, retry=settings.retry
    )

    async def work() -> None:
        for plan in todo:
            on_record(await client.send(plan))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(settings.workers, settings.num_requests)):
            group.create_task(work())
    return client


# ---- the program -------------------------------------------------------------------------------


def main(
    url: Annotated[str, typer.Option(help="Server.")] = "http://127.0.0.1:8000",
    num_requests: Annotated[int, typer.Option()] = 200,
    concurrency: Annotated[
        int | None, typer.Option(help="In flight at most: 8, or 512 with a rate.")
    ] = None,
    request_rate: Annotated[
        float | None, typer.Option(help="Open loop: arrivals a second, Poisson.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL: prompt, messages or turns. Default: MT-Bench.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Default: the server's first.")] = None,
    max_tokens: Annotated[str, typer.Option(help="N, or least:most.")] = "64",
    temperature: Annotated[float, typer.Option()] = 0.0,
    cancel: Annotated[float, typer.Option(help="Share closed in mid-stream.")] = 0.0,
    malformed: Annotated[float, typer.Option(help="Share broken on purpose.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos")] = False,
    extra: Annotated[str, typer.Option(help="JSON object: fields for every body.")] = "{}",
    api_key: Annotated[str | None, typer.Option()] = None,
    warmup: Annotated[int, typer.Option(help="Requests first that do not count.")] = 0,
    retry: Annotated[bool, typer.Option("--retry", help="Ask again after a 429.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds a request.")] = 120.0,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
) -> int:
    """Puts load on an OpenAI-compatible server; exit code 1 if anything went wrong."""
    settings = LoadSettings(
        url, num_requests, concurrency, request_rate, endpoint, prompts, model,
        _range(max_tokens), temperature, cancel, malformed, ignore_eos, _json_object(extra),
        api_key, warmup, retry, timeout, seed,
    )  # fmt: skip
    result = asyncio.run(_run_with_progress(settings))
    print_report(result)
    if out:
        data = {"client_machine": _client_machine()} | as_data(result)
        _write(out, json.dumps(data, indent=1) + "\n")
    if html:
        _write(html, html_page(result))
    return 1 if result.problems else 0


async def _run_with_progress(settings: LoadSettings) -> LoadResult:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task, errors = progress.add_task("load", total=settings.num_requests), 0

        def advance(record: Record) -> None:
            nonlocal errors
            errors += record.status == "error"
            progress.update(task, advance=1, description=f"load, {errors} errors")

        return await run_load(settings, advance)


def _client_machine() -> dict[str, str | int]:
    jax.config.update("jax_platforms", "cpu")  # an accelerator here is the server's
    machine = describe_machine()
    return {key: machine[key] for key in ("cpu", "cores", "python", "date")}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise ValueError(f"--max-tokens is a number or least:most, got {text}") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"--extra is a JSON object, got {text}")
    return value


if __name__ == "__main__":
    run_program(main, "benchmarks.serve_load")
