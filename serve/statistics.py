"""Running totals of the engine: what the metrics and the log lines are made of."""

from collections import Counter
from collections.abc import Mapping, Sequence

from .request import EngineStatus
from .scheduler import Scheduler


class Statistics:
    """Counted by the engine's thread."""

    def __init__(self):
        """Nothing has happened yet."""
        self.prompt_tokens = self.generation_tokens = 0
        self.steps = 0
        self.step_seconds = self.wait_seconds = 0.0
        self._rounds: Counter[str] = Counter()
        self._drafted: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()
        self._by_depth: Counter[int] = Counter()
        self._by_rank: Counter[int] = Counter()

    def count_step(self, seconds: float, waited: float) -> None:
        """One iteration of the engine, and how long it waited for the device."""
        self.steps += 1
        self.step_seconds += seconds
        self.wait_seconds += waited

    def count_round(self, tree: str, drafted: int, ranks: Sequence[int]) -> None:
        """One target call of one sequence; `ranks` are the sibling ranks of what was accepted."""
        self._rounds[tree] += 1
        self._drafted[tree] += drafted
        self._accepted[tree] += len(ranks)
        self._by_depth.update(range(len(ranks)))
        self._by_rank.update(ranks)

    def status(self, scheduler: Scheduler, compilations: int) -> EngineStatus:
        """The totals, with the gauges of the scheduler."""
        pool = scheduler.pool
        return EngineStatus(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_usage=pool.usage,
            leaked_pages=pool.leaked(scheduler.held),
            compilations=compilations,
            preemptions=scheduler.preemptions,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            rounds_by_tree=dict(self._rounds),
            draft_tokens_by_tree=dict(self._drafted),
            accepted_by_tree=dict(self._accepted),
            accepted_by_depth=by_index(self._by_depth),
            accepted_by_rank=by_index(self._by_rank),
            steps=self.steps,
            step_seconds=self.step_seconds,
            wait_seconds=self.wait_seconds,
        )


def by_index(counts: Mapping[int, int]) -> tuple[int, ...]:
    """Counts of 0, 1, 2, ... as a tuple, up to the largest one."""
    return tuple(counts.get(i, 0) for i in range(max(counts, default=-1) + 1))
