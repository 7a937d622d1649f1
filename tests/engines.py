"""A small engine over random models, and requests on their way through it."""

import itertools
from collections.abc import Sequence

from jax_eagle import Draft, SamplingParams, Target
from serve.device import EngineConfig
from serve.dispatch import PLAIN, Programs
from serve.engine import Engine
from serve.request import Delta, Request

PAGE, SLOTS, CONTEXT, VOCAB = 8, 16, 64, 6
BUSHY = "paths:[[0],[1],[0,0],[0,1]]"
PROGRAMS = Programs(((1, BUSHY), (8, "chain:2"), (None, PLAIN)), (1, SLOTS))
NUM_PAGES = SLOTS * CONTEXT // PAGE

_numbers = itertools.count()


def make_engine(target: Target, draft: Draft) -> Engine:
    """Warm; the same programs for all models of these shapes."""
    config = EngineConfig(
        max_model_len=CONTEXT, programs=PROGRAMS, num_pages=1 + NUM_PAGES, page_size=PAGE,
        chunk_sizes=(4, 16), tokens_per_step=16,
    )  # fmt: skip
    engine = Engine(target, draft, config)
    names = [name for name, _ in engine.warm_up()]
    assert len(names) == len(set(names)) == len(PROGRAMS.pairs) + 2 + 2 + 2
    return engine


def request(prompt: Sequence[int], max_tokens: int = 12, **options) -> Request:
    """A request with an id of its own; greedy unless `sampling` is among the options."""
    sampling = options.pop("sampling", SamplingParams())
    return Request(f"r{next(_numbers)}", tuple(prompt), sampling, max_tokens, **options)


class Run:
    """Requests on their way through an engine, and what came of them."""

    def __init__(self, engine: Engine):
        self.engine, self.deltas = engine, {}

    def add(self, *requests: Request) -> None:
        for each in requests:
            self.deltas[each.id] = []
            self.engine.add(each, self.deltas[each.id].append)

    def step(self, hostages: Sequence[int] = ()) -> None:
        """One step, behind which every page is where it should be. Nothing compiles in it.

        `hostages` are pages that a test has taken from the pool.
        """
        compiled = self.engine.status.compilations
        self.engine.step()
        assert self.engine.status.compilations == compiled
        self.engine.pool.check([*self.engine.scheduler.held, hostages])

    def finish(self, hostages: Sequence[int] = ()) -> None:
        for _ in range(100_000):
            if not self.engine.busy:
                return
            self.step(hostages)
        raise AssertionError("the engine does not come to an end")

    def tokens(self, each: Request) -> list[int]:
        return [token for delta in self.deltas[each.id] for token in delta.token_ids]

    def last(self, each: Request) -> Delta:
        *before, last = self.deltas[each.id]
        assert last.finish_reason and not any(delta.finish_reason for delta in before)
        return last


def run(engine: Engine, *requests: Request) -> Run:
    it = Run(engine)
    it.add(*requests)
    it.finish()
    return it
