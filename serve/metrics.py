"""Prometheus metrics: vLLM's names, and ours for trees.

Gauges and counters are those of the engine's last snapshot, a quarter of a second old at most while
it runs, and cost nothing between. Histograms are filled as requests go on. What vLLM counts by
"position" is depth here; a tree drafts several nodes at a depth, so accepted over drafted tokens is
no measure of quality: the series `..._per_node` are there for those who want that ratio. The label
`engine` numbers the replicas, from 0.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .dispatch import PLAIN
from .request import Delta, EngineStatus, RequestStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAST = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5,
    10,
)  # fmt: skip
SLOW = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 60, 120, 300, 600)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the request to its first token.", FAST + (20, 60)),
    "inter_token_latency_seconds": ("Between tokens; those of one chunk share its gap.", FAST),
    "request_time_per_output_token_seconds": ("Decoding time by tokens after the first.", FAST),
    "e2e_request_latency_seconds": ("From the request to its last token.", SLOW),
    "request_queue_time_seconds": ("Waiting for a slot.", SLOW),
    "request_prefill_time_seconds": ("From admission to the first token.", SLOW),
    "request_decode_time_seconds": ("From the first token to the last.", SLOW),
    "request_inference_time_seconds": ("Prefill and decoding.", SLOW),
    "request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "request_generation_tokens": ("New tokens of a request.", TOKENS),
}


class Metrics:
    """All metrics of one server."""

    def __init__(
        self, model: str, statuses: Callable[[], Sequence[EngineStatus]], engines: int = 1
    ):
        """`statuses` is asked at every scrape; nothing: the engines are not there yet."""
        self.registry = CollectorRegistry()
        labels = [{"model_name": model, "engine": str(engine)} for engine in range(engines)]
        names = list(labels[0])
        histograms = {
            name: Histogram(f"vllm:{name}", text, names, buckets=buckets, registry=self.registry)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._histograms = [
            {name: family.labels(**own) for name, family in histograms.items()} for own in labels
        ]
        self._finished = Counter(
            "vllm:request_success", "Requests by how they ended.",
            [*names, "finished_reason"], registry=self.registry,
        )  # fmt: skip
        self._labels = labels
        self._http = Counter(
            "http_requests", "Answers by path and status.", ["method", "handler", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.registry.register(_EngineCollector(labels, statuses))

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

    def answered(self, method: str, handler: str, status: int) -> None:
        """Counts one HTTP answer; `handler` is a route, not what a client made up."""
        self._http.labels(method, handler, str(status)).inc()

    def finished(self, engine: int, reason: str) -> None:
        """Counts one sequence that ended."""
        self._finished.labels(**self._labels[engine], finished_reason=reason).inc()

    def observe(self, engine: int, name: str, value: float, times: int = 1) -> None:
        """Adds `times` equal values to a histogram."""
        for _ in range(times):
            self._histograms[engine][name].observe(value)


class Watch:
    """Measures one sequence, delta by delta."""

    def __init__(self, metrics: Metrics, engine: int):
        """Begins now; `engine` is the replica that the sequence is on."""
        self._metrics, self._engine, self._begin = metrics, engine, time.perf_counter()
        self._last: float | None = None
        self._over = False

    def delta(self, delta: Delta) -> None:
        """Takes in what the sequence gained."""
        now, count = time.perf_counter(), len(delta.token_ids)
        if count and self._last is None:
            self._observe("time_to_first_token_seconds", now - self._begin)
        elif count and self._last is not None:
            gap = (now - self._last) / count
            self._observe("inter_token_latency_seconds", gap, count)
        self._last = now if count else self._last
        if delta.finish_reason is not None:
            self._end(delta.finish_reason, delta.stats, now)

    def left(self) -> None:
        """The client went away, or the request failed."""
        if not self._over:
            self._end("abort", None, time.perf_counter())

    def _end(self, reason: str, stats: RequestStats | None, now: float) -> None:
        self._over = True
        self._metrics.finished(self._engine, reason)
        if stats is None:
            return
        observe = self._observe
        observe("e2e_request_latency_seconds", now - self._begin)
        observe("request_queue_time_seconds", stats.queue_seconds)
        observe("request_prefill_time_seconds", stats.prefill_seconds)
        observe("request_decode_time_seconds", stats.decode_seconds)
        observe("request_inference_time_seconds", stats.prefill_seconds + stats.decode_seconds)
        observe("request_prompt_tokens", stats.prompt_tokens)
        observe("request_generation_tokens", stats.new_tokens)
        if stats.new_tokens > 1:
            per_token = stats.decode_seconds / (stats.new_tokens - 1)
            observe("request_time_per_output_token_seconds", per_token)

    def _observe(self, name: str, value: float, times: int = 1) -> None:
        self._metrics.observe(self._engine, name, value, times)


class _EngineCollector:
    """Turns the engines' statuses into metrics when Prometheus asks."""

    def __init__(
        self, labels: list[dict[str, str]], statuses: Callable[[], Sequence[EngineStatus]]
    ):
        self._labels, self._statuses = labels, statuses

    def collect(self) -> Iterator[Metric]:
        """One family a metric; none while the engines are loading."""
        families: dict[str, Any] = {}
        for label, status in zip(self._labels, self._statuses(), strict=False):
            for kind, name, text, keys, values in _series(status):
                if name not in families:
                    families[name] = kind(name, text, labels=[*label, *keys])
                for key, value in values.items():
                    families[name].add_metric([*label.values(), *key], value)
        yield from families.values()


def _series(status: EngineStatus) -> Iterator[tuple[Any, str, str, tuple[str, ...], Mapping]]:
    """(kind, name, text, labels, values by labels) of all metrics of one engine."""
    for name, text, value in _gauges(status):
        yield GaugeMetricFamily, name, text, (), {(): value}
    for name, text, value in _counters(status):
        yield CounterMetricFamily, name, text, (), {(): value}
    for name, text, key, values in _tables(status):
        yield CounterMetricFamily, name, text, (key,), {(str(k),): value for k, value in values}
    per_node = {
        (tree,): status.accepted_by_tree.get(tree, 0) / nodes
        for tree, nodes in status.draft_tokens_by_tree.items()
        if nodes
    }
    text = "Accepted tokens over drafted nodes since the start: falls with the tree's width."
    name = "jax_eagle:spec_decode_accepted_tokens_per_node"
    yield GaugeMetricFamily, name, text, ("tree",), per_node


def _gauges(status: EngineStatus) -> Iterable[tuple[str, str, float]]:
    yield "vllm:num_requests_running", "Sequences in slots.", status.running
    yield "vllm:num_requests_waiting", "Sequences waiting for a slot.", status.waiting
    yield "vllm:kv_cache_usage_perc", "Share of the pages in use, 0 to 1.", status.kv_usage
    yield "jax_eagle:leaked_pages", "Pages lost; 0, or there is a bug.", status.leaked_pages
    host = 1 - status.wait_seconds / status.step_seconds if status.step_seconds else 0.0
    yield "jax_eagle:host_share", "Share of a step that is not waiting for the device.", host


def _counters(status: EngineStatus) -> Iterable[tuple[str, str, float]]:
    """Totals; Prometheus adds `_total` to the names."""
    drafts = sum(n for tree, n in status.rounds_by_tree.items() if tree != PLAIN)
    nodes, accepted = status.draft_tokens_by_tree, status.accepted_by_tree
    yield "vllm:prompt_tokens", "Prompt tokens, cached ones included.", status.prompt_tokens
    yield "vllm:generation_tokens", "New tokens.", status.generation_tokens
    yield "vllm:prefix_cache_queries", "Prompt tokens looked up.", status.prefix_queries
    yield "vllm:prefix_cache_hits", "Prompt tokens found.", status.prefix_hits
    yield "vllm:num_preemptions", "Sequences put back into the queue.", status.preemptions
    yield "vllm:spec_decode_num_drafts", "Trees drafted.", drafts
    yield "vllm:spec_decode_num_draft_tokens", "Nodes drafted.", sum(nodes.values())
    yield "vllm:spec_decode_num_accepted_tokens", "Drafts accepted.", sum(accepted.values())
    compiled = "Programs compiled in traffic; 0, or a request waited for the compiler."
    yield "jax_eagle:compilations_since_warm", compiled, status.compilations
    yield "jax_eagle:engine_steps", "Steps of the engine.", status.steps
    yield "jax_eagle:engine_step_seconds", "Their time.", status.step_seconds
    yield "jax_eagle:engine_wait_seconds", "Of it waiting for the device.", status.wait_seconds


def _tables(status: EngineStatus) -> Iterable[tuple[str, str, str, Iterable[tuple]]]:
    """(name, text, label, values by label)."""
    depth = list(enumerate(status.accepted_by_depth))
    from_one = [(d + 1, count) for d, count in depth]
    rank = enumerate(status.accepted_by_rank)
    ours = "jax_eagle:spec_decode_"
    text = "Accepted tokens by position in the draft, from 0."
    yield "vllm:spec_decode_num_accepted_tokens_per_pos", text, "position", depth
    yield f"{ours}accepted_tokens_by_depth", "The same by depth, from 1.", "depth", from_one
    yield f"{ours}accepted_tokens_by_rank", "By sibling rank, from 0.", "rank", rank
    calls, nodes = status.rounds_by_tree.items(), status.draft_tokens_by_tree.items()
    yield f"{ours}target_calls_by_tree", "Target calls of sequences.", "tree", calls
    yield f"{ours}draft_tokens_by_tree", "Nodes drafted.", "tree", nodes
    by_tree = status.accepted_by_tree.items()
    yield f"{ours}accepted_tokens_by_tree", "Drafts accepted.", "tree", by_tree
