"""What a server says about itself: its Prometheus metrics before and after a load run.

The counters of speculation are those of vLLM; `drafts` are rounds that speculated, so acceptance
length = 1 + accepted / drafts counts the bonus token. Gauges of leaked pages and of compilations
are our own server's; a server without them is not asked for them.
"""

import asyncio
import dataclasses
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]

_FAMILIES = ("vllm:", "jax_eagle:")
_SUMMED_LABELS = {"model_name", "engine"}
_IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_LEAKED_PAGES = "jax_eagle:leaked_pages"
_COMPILATIONS = "jax_eagle:compilations_since_warm_total"


@dataclasses.dataclass(frozen=True)
class Metrics:
    """One reading, summed over models and engines; histograms without their buckets."""

    samples: dict[tuple[str, Labels], float]

    def total(self, name: str) -> float | None:
        """The sum over all labels; None if the server has no such metric."""
        values = [value for (n, _), value in self.samples.items() if n == name]
        return sum(values) if values else None

    def since(self, before: "Metrics") -> "Metrics":
        """What the counters have gained."""
        return Metrics(
            {
                key: value - before.samples.get(key, 0.0)
                for key, value in self.samples.items()
                if key[0].endswith(("_total", "_sum", "_count"))
            }
        )

    @property
    def idle(self) -> bool:
        """No request runs or waits, as far as the server says."""
        return not any(self.total(name) for name in _IDLE)

    def as_data(self) -> dict[str, float]:
        """Names with their labels to values, for json.dumps."""
        return {
            " ".join([name, *(f"{label}={text}" for label, text in labels)]): value
            for (name, labels), value in sorted(self.samples.items())
        }


async def read_metrics(http: httpx2.AsyncClient) -> Metrics | None:
    """The server's metrics; None if it has none that can be read."""
    try:
        response = await http.get("/metrics", timeout=10)
        families = list(text_string_to_metric_families(response.raise_for_status().text))
    except (httpx2.HTTPError, ValueError):
        return None
    samples: dict[tuple[str, Labels], float] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name.startswith(_FAMILIES) and not sample.name.endswith(("_bucket", "_created")):
            labels = ((k, v) for k, v in sample.labels.items() if k not in _SUMMED_LABELS)
            key = sample.name, tuple(sorted(labels))
            samples[key] = samples.get(key, 0.0) + sample.value
    return Metrics(samples)


async def read_metrics_when_idle(http: httpx2.AsyncClient, seconds: float) -> Metrics | None:
    """The metrics as soon as no request runs or waits, or as they are after so many seconds."""
    end = asyncio.get_running_loop().time() + seconds
    while (metrics := await read_metrics(http)) is not None:
        if metrics.idle or asyncio.get_running_loop().time() > end:
            break
        await asyncio.sleep(0.1)
    return metrics


@dataclasses.dataclass(frozen=True)
class ServerFigures:
    """What a run was to the server. None: it does not say."""

    idle: bool
    """Whether nothing ran or waited at the end."""
    generation_tokens: float | None
    acceptance_length: float | None
    """Tokens a round that speculated, bonus included."""
    acceptance_rate: float | None
    """Accepted draft tokens of those drafted; of a tree, of its nodes."""
    acceptance_by_depth: list[float]
    """Share of the rounds in which a token of depth 1, 2, ... was accepted."""
    leaked_pages: float | None
    compilations: float | None
    """Since the server was warm."""
    counters: dict[str, float]
    """What every counter has gained."""

    @classmethod
    def between(cls, before: Metrics, after: Metrics) -> "ServerFigures":
        """Figures of a run from a reading before it and one after it."""
        gained = after.since(before)
        drafts = gained.total("vllm:spec_decode_num_drafts_total")
        drafted = gained.total("vllm:spec_decode_num_draft_tokens_total")
        accepted = gained.total("vllm:spec_decode_num_accepted_tokens_total")
        by_depth = {
            int(dict(labels)["position"]): value
            for (name, labels), value in gained.samples.items()
            if name == "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        }
        return cls(
            idle=after.idle,
            generation_tokens=gained.total("vllm:generation_tokens_total"),
            acceptance_length=1 + accepted / drafts if drafts and accepted is not None else None,
            acceptance_rate=accepted / drafted if drafted and accepted is not None else None,
            acceptance_by_depth=[n / drafts for _, n in sorted(by_depth.items())] if drafts else [],
            leaked_pages=after.total(_LEAKED_PAGES),
            compilations=after.total(_COMPILATIONS),
            counters=gained.as_data(),
        )

    def problems(self) -> list[str]:
        """What should not be, one line each."""
        lines = {
            "requests still run or wait on the server": not self.idle,
            f"{self.leaked_pages or 0:g} pages leaked": self.leaked_pages,
            f"{self.compilations or 0:g} compilations since the server was warm": self.compilations,
        }
        return [line for line, wrong in lines.items() if wrong]

    def as_data(self) -> dict[str, Any]:
        """For json.dumps."""
        return dataclasses.asdict(self)
