"""What a load run came to: figures, tables for the terminal, and a page with plots.

Latencies: time to first token of every stream that got one, time per output token and end-to-end
of the completed ones, gaps between the chunks of all. Throughput is over the time from the first
request to the last answer, tokens of cancelled requests included.
"""

import collections
import dataclasses
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from .load_client import STATUSES, Record, Reservoir
from .load_metrics import ServerFigures

_PERCENTILES = 50, 90, 95, 99
_LISTED_ERRORS = 20


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """One finished run."""

    settings: dict[str, Any]
    records: list[Record]
    """In the order in which they ended."""
    gaps: Reservoir
    """Seconds between chunks of one stream."""
    seconds: float
    client_share: float
    """Processor time of this client per second: near 1, it is itself the bottleneck."""
    server: ServerFigures | None
    """None: the server has no metrics."""

    @property
    def counts(self) -> dict[str, int]:
        """Requests by status."""
        found = collections.Counter(record.status for record in self.records)
        return {status: found[status] for status in STATUSES}

    @property
    def errors(self) -> dict[str, int]:
        """What went wrong and how often, the most frequent first."""
        found = collections.Counter(r.detail for r in self.records if r.status == "error")
        return dict(found.most_common(_LISTED_ERRORS))

    @property
    def problems(self) -> list[str]:
        """Why this run is not a success, one line each; empty: it is one."""
        errors = self.counts["error"]
        lines = [f"{errors} of {len(self.records)} requests ended in an error"] if errors else []
        return lines + (self.server.problems() if self.server else [])

    @property
    def latencies(self) -> dict[str, Sequence[float]]:
        """Seconds, by what they are of."""
        completed = [record for record in self.records if record.status == "completed"]
        return {
            "time to first token": _present(r.time_to_first_token for r in self.records),
            "time per output token": _present(r.time_per_output_token for r in completed),
            "gap between chunks": self.gaps.values,
            "end to end": [r.end - r.begin for r in completed],
        }

    @property
    def throughput(self) -> dict[str, float]:
        """Rates over the whole run."""
        tokens = sum(record.tokens for record in self.records)
        return {
            "output tokens/s": tokens / self.seconds,
            "completed requests/s": self.counts["completed"] / self.seconds,
        }


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Count, mean, percentiles and maximum, in seconds; of nothing only the count."""
    if not len(seconds):
        return {"count": 0}
    values = np.asarray(seconds)
    return {
        "count": len(values),
        "mean": float(values.mean()),
        **{f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES},
        "max": float(values.max()),
    }


def as_data(result: LoadResult) -> dict[str, Any]:
    """All figures, for json.dumps."""
    return {
        "settings": result.settings,
        "seconds": result.seconds,
        "problems": result.problems,
        "requests": result.counts,
        "errors": result.errors,
        "retries": sum(record.retries for record in result.records),
        "prompt_tokens": sum(record.prompt_tokens for record in result.records),
        "output_tokens": sum(record.tokens for record in result.records),
        "throughput": result.throughput,
        "latency_seconds": {name: summarise(v) for name, v in result.latencies.items()},
        "client_share": result.client_share,
        "server": result.server and result.server.as_data(),
    }


# ---- in the terminal ---------------------------------------------------------------------------


def tables(result: LoadResult) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of what is shown; the first row of each holds the names of the columns."""
    columns = ["mean", *(f"p{p}" for p in _PERCENTILES), "max"]
    latency = [["milliseconds", *columns, "count"]]
    for name, seconds in result.latencies.items():
        row = summarise(seconds)
        figures = [f"{1e3 * row[c]:.1f}" if c in row else "" for c in columns]
        latency.append([name, *figures, str(row["count"])])
    run = [["run", ""], ["seconds", f"{result.seconds:.1f}"]]
    run += [[name, f"{value:.2f}"] for name, value in result.throughput.items()]
    run += [["client's processor time per second", f"{result.client_share:.2f}"]]
    run += [[f"requests {status}", str(count)] for status, count in result.counts.items()]
    shown = [("Latency", latency), ("Run", run)]
    if result.server:
        shown.append(("Server", [["server", ""], *_server_rows(result.server)]))
    if result.errors:
        rows = [[detail, str(count)] for detail, count in result.errors.items()]
        shown.append(("Errors", [["error", "requests"], *rows]))
    return shown


def _server_rows(server: ServerFigures) -> list[list[str]]:
    figures = {
        "acceptance length": server.acceptance_length,
        "acceptance rate of draft tokens": server.acceptance_rate,
        **{f"accepted at depth {d}": x for d, x in enumerate(server.acceptance_by_depth, 1)},
    }
    counts = {
        "new tokens": server.generation_tokens,
        "leaked pages": server.leaked_pages,
        "compilations since warm": server.compilations,
    }
    return [
        *([name, f"{x:.3f}"] for name, x in figures.items() if x is not None),
        *([name, f"{x:.0f}"] for name, x in counts.items() if x is not None),
        ["idle afterwards", "yes" if server.idle else "no"],
    ]


def print_report(result: LoadResult) -> None:
    """Prints the tables, and what went wrong."""
    console = Console()
    for _, (names, *rows) in tables(result):
        table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column(names[0])
        for name in names[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table, "", markup=False)
    for problem in result.problems:
        console.print(f"PROBLEM: {problem}", style="bold red", markup=False)


# ---- the page ----------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 0 0 1em }
th, td { padding: .1em .8em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
svg { width: 100%; margin: 0 0 1em } svg text { font-size: 12px; fill: #555 }
.problem { color: #b00; font-weight: bold }
"""
_WIDTH, _HEIGHT, _LEFT, _TOP = 800, 160, 60, 20
_BLUE, _ORANGE = "#2563a8", "#c8641c"


def html_page(result: LoadResult) -> str:
    """A page that needs nothing else: distributions, the run over time, all tables."""
    latencies = result.latencies
    plots = [
        histogram(name, latencies[name])
        for name in ("time to first token", "time per output token", "end to end")
        if len(latencies[name])
    ]
    running, rate = timeline(result.records, result.seconds)
    plots += [
        plot("requests running, over the run", running, (0, result.seconds), "s", _ORANGE),
        plot("output tokens/s, over the run", rate, (0, result.seconds), "s", _ORANGE),
    ]
    title = f"Load on {result.settings['model']} at {result.settings['url']}"
    problems = "".join(f"<p class=problem>{html.escape(p)}</p>" for p in result.problems)
    shown = "".join(f"<h2>{name}</h2>{_html_table(rows)}" for name, rows in tables(result))
    settings = html.escape(json.dumps(result.settings, indent=1))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{problems}{''.join(plots)}{shown}"
        f"<h2>Settings</h2><pre>{settings}</pre></html>\n"
    )


def _html_table(rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in body]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def histogram(name: str, seconds: Sequence[float], bars: int = 60) -> str:
    """Plot of a distribution in milliseconds; the slowest hundredth is in the last bar."""
    values = 1e3 * np.asarray(seconds)
    limit = max(float(np.percentile(values, 99)), 1e-3)
    counts, _ = np.histogram(np.minimum(values, limit), bins=bars, range=(0, limit))
    title = f"{name}: requests by milliseconds, up to the 99th percentile"
    return plot(title, counts, (0, limit), "ms", _BLUE)


def timeline(
    records: Sequence[Record], seconds: float, bins: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """(running requests, output tokens/s) in equal parts of the run.

    A request's tokens count as evenly spread from its first chunk to its last.
    """
    edges = np.linspace(0, seconds, bins + 1)
    begins = np.sort([record.begin for record in records])
    ends = np.sort([record.end for record in records])
    middles = (edges[:-1] + edges[1:]) / 2
    running = np.searchsorted(begins, middles) - np.searchsorted(ends, middles)
    streams = [(r.first, r.last, r.tokens) for r in records if r.first is not None]
    first, last, tokens = np.array(streams, float).reshape(-1, 3).T
    so_far = [
        np.sum(tokens * np.clip((edge - first) / np.maximum(last - first, 1e-9), 0, 1))
        for edge in edges
    ]
    return running, np.diff(so_far) * bins / seconds


def plot(
    title: str, heights: Sequence[float] | np.ndarray, span: tuple[float, float], unit: str,
    colour: str,
) -> str:  # fmt: skip
    """Bars of equal width over `span`, as an SVG element."""
    top = max(float(np.max(heights)), 1e-9)
    x = np.linspace(_LEFT, _WIDTH, len(heights) + 1)
    y = _TOP + _HEIGHT * (1 - np.asarray(heights) / top)
    bottom = _TOP + _HEIGHT
    steps = "".join(
        f"L{a:.1f} {h:.1f}L{b:.1f} {h:.1f}" for a, b, h in zip(x, x[1:], y, strict=False)
    )
    ticks = "".join(
        f'<text x="{_LEFT + share * (_WIDTH - _LEFT):.0f}" y="{bottom + 15}" '
        f'text-anchor="{anchor}">{span[0] + share * (span[1] - span[0]):.4g} {unit}</text>'
        for share, anchor in ((0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"),
                              (1, "end"))
    )  # fmt: skip
    return (
        f'<svg viewBox="0 0 {_WIDTH} {bottom + 20}" role="img">'
        f'<text x="{_LEFT}" y="12">{html.escape(title)}</text>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 10}" text-anchor="end">{top:.4g}</text>'
        f'<path d="M{_LEFT} {bottom}{steps}L{_WIDTH} {bottom}Z" fill="{colour}"/>{ticks}</svg>'
    )
