"""The scheduler against a simulated device: nobody waits for ever, and no page holds a wrong text.

The device keeps in every place of a page which text ends there, so it notices whoever reads a page
that was never written, was given away or belongs to another text. Its calls run when they are
enqueued; their results are read later, as in the engine.
"""

import dataclasses
import random
from collections import Counter, deque
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.dispatch import PLAIN, Programs
from serve.pages import PagePool
from serve.scheduler import Chunk, Decode, Phase, Scheduler, Sequence, Step

PAGE = 4
CHUNKS = (2, 8)
DEPTHS = {"bush": 2, "chain": 3, PLAIN: 0}
LADDER = ((1, "bush"), (3, "chain"), (None, PLAIN))
SLOTS = 5
SYNC = 4
"""Pairs that may wait for the draft."""
STOP = 9
"""The token that ends a sequence on the device."""


# ---- the device --------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One life of a sequence on the device."""

    text: list[int]
    """All tokens, the root and what a limit or stop token cut off included."""
    length: int
    draft_length: int
    waiting: int = 0
    """Pairs that wait for the draft."""
    given: int = 0
    """Tokens given out."""
    done: bool = False


@dataclasses.dataclass
class Result:
    """What one call has to say about one sequence."""

    sequence: Sequence
    epoch: int
    growth: int
    tokens: list[int]
    length: int
    draft_length: int
    done: bool


class Device:
    """Two caches, a row for every sequence that runs, and what each place of a page holds."""

    def __init__(self):
        self.target: dict[tuple[int, int], tuple] = {}
        self.draft: dict[tuple[int, int], tuple] = {}
        self.rows: dict[Sequence, Row] = {}

    def admit(self, sequence: Sequence) -> None:
        found = sequence.found
        assert sequence.boundary_page == (sequence.pages[found // PAGE - 1] if found else 0)
        self.rows[sequence] = row = Row(list(sequence.context), found, found)
        row.given = max(len(sequence.output) - 1, 0)
        for memory in (self.target, self.draft):
            self._read(memory, sequence, found)

    def prefill(self, chunk: Chunk, rng: random.Random) -> list[Result]:
        sequence, row = chunk.sequence, self.rows[chunk.sequence]
        assert row.length == row.draft_length == chunk.begin
        assert chunk.size in CHUNKS and 0 < chunk.count <= chunk.size
        for memory in (self.target, self.draft):
            self._read(memory, sequence, chunk.begin)
            self._write(memory, sequence, chunk.begin, chunk.begin + chunk.count)
        row.length = row.draft_length = chunk.begin + chunk.count
        assert chunk.last == (row.length == len(row.text))
        if not chunk.last:
            return []
        root = sequence.root
        row.text.append(root if root >= 0 else _token(rng))
        row.waiting = 1
        tokens = self._emit(sequence, 1)
        return [self._result(sequence, 0, [] if root >= 0 else tokens)]

    def catch_up(self, sequence: Sequence) -> None:
        row = self.rows[sequence]
        assert row.waiting <= SYNC
        self._sync(sequence, max(row.waiting - 1, 0))
        row.waiting = min(row.waiting, 1)

    def decode(self, call: Decode, rng: random.Random) -> list[Result]:
        return [self._round(sequence, DEPTHS[call.tree], rng) for sequence in call.sequences]

    def _round(self, sequence: Sequence, depth: int, rng: random.Random) -> Result:
        row = self.rows[sequence]
        assert row.length + 1 == len(row.text)  # the prompt is whole, the root is not cached
        self._read(self.target, sequence, row.length)
        if depth:
            assert row.waiting <= depth + 1
            self._read(self.draft, sequence, row.draft_length)
            self._sync(sequence, row.waiting)
            row.waiting = 0
        if row.done:
            return self._result(sequence, depth + 1, [])
        accepted = rng.randint(0, depth)
        row.text += [_token(rng) for _ in range(accepted + 1)]
        self._write(self.target, sequence, row.length, row.length + accepted + 1)
        row.length += accepted + 1
        row.waiting += accepted + 1
        assert row.waiting <= SYNC
        return self._result(sequence, depth + 1, self._emit(sequence, accepted + 1))

    def _emit(self, sequence: Sequence, count: int) -> list[int]:
        """Gives out the last `count` tokens, up to the first stop token and the limit."""
        row = self.rows[sequence]
        tokens = row.text[-count:][: sequence.max_tokens - row.given]
        if STOP in tokens:
            tokens = tokens[: tokens.index(STOP) + 1]
        row.given += len(tokens)
        row.done = row.given == sequence.max_tokens or STOP in tokens
        return tokens

    def _result(self, sequence: Sequence, growth: int, tokens: list[int]) -> Result:
        row = self.rows[sequence]
        return Result(
            sequence, sequence.epoch, growth, tokens, row.length, row.draft_length, row.done
        )

    def _sync(self, sequence: Sequence, count: int) -> None:
        row = self.rows[sequence]
        self._write(self.draft, sequence, row.draft_length, row.draft_length + count)
        row.draft_length += count

    def _places(self, sequence: Sequence, begin: int, end: int) -> Iterator[tuple[tuple, tuple]]:
        """Where positions are in the pages, and the text that ends there."""
        text = self.rows[sequence].text
        for position in range(begin, end):
            if position // PAGE < len(sequence.pages):
                place = sequence.pages[position // PAGE], position % PAGE
                yield place, (sequence.salt, *text[: position + 1])
            else:  # what lies behind the limit may go to the trash
                assert position >= len(sequence.prompt) + sequence.max_tokens

    def _write(self, memory: dict, sequence: Sequence, begin: int, end: int) -> None:
        memory.update(self._places(sequence, begin, end))

    def _read(self, memory: dict, sequence: Sequence, length: int) -> None:
        for place, text in self._places(sequence, 0, length):
            assert memory.get(place) == text


def _token(rng: random.Random) -> int:
    return rng.choice([0] * 24 + [1] * 6 + [STOP])


# ---- the engine --------------------------------------------------------------------------------


@dataclasses.dataclass
class Before:
    """What stood before a step."""

    ready: set[Sequence]
    pending: dict[Sequence, int]
    pages: dict[Sequence, int]
    running: list[Sequence]
    preemptions: int


class Simulation:
    """The scheduler, the device, and between them what the engine does."""

    def __init__(self, num_pages: int = 100, budget: int = 8, prefix_caching: bool = True):
        self.pool = PagePool(num_pages + 1, PAGE, prefix_caching=prefix_caching)
        self.programs = Programs(LADDER, (1, 2, SLOTS))
        self.budget = budget
        self.scheduler = Scheduler(
            self.pool, self.programs, DEPTHS, chunk_sizes=CHUNKS, tokens_per_step=budget,
            sync_length=SYNC,
        )  # fmt: skip
        self.device = Device()
        self.calls: deque[list[Result]] = deque()
        self.live: list[Sequence] = []
        self.events: Counter[str] = Counter()

    def add(self, prompt, max_tokens: int = 8, **options) -> Sequence:
        sequence = Sequence(f"s{len(self.live)}", tuple(prompt), max_tokens, **options)
        self.scheduler.add(sequence)
        self.live.append(sequence)
        return sequence

    def step(self, rng: random.Random | None = None, *, late: bool = True) -> Step:
        """One step; with `late` the results of its own calls wait for the next one."""
        rng = rng or random.Random(0)
        scheduler = self.scheduler
        ready = {s for s in scheduler.running if s.decoding and not s.exhausted}
        before = Before(
            ready, {s: s.pending for s in ready}, {s: len(s.pages) for s in ready},
            list(scheduler.running), scheduler.preemptions,
        )  # fmt: skip
        earlier = len(self.calls)
        plan = scheduler.step()
        self.check_decodes(plan, before)
        self.check_prompts(plan, before)
        self.launch(plan, rng)
        for _ in range(earlier if late else len(self.calls)):
            for result in self.calls.popleft():
                self.take(result, rng)
        self.check()
        return plan

    def launch(self, plan: Step, rng: random.Random) -> None:
        for call in plan.decodes:
            for sequence in call.catch_up:
                self.device.catch_up(sequence)
            self.events["catch up"] += len(call.catch_up)
            self.calls.append(self.device.decode(call, rng))
        for sequence in plan.admitted:
            self.events["hit"] += sequence.found > 0
            self.device.admit(sequence)
        for chunk in plan.chunks:
            self.calls.append(self.device.prefill(chunk, rng))

    def take(self, result: Result, rng: random.Random) -> None:
        sequence = result.sequence
        if sequence.epoch != result.epoch:
            self.events["late result"] += 1
            return
        self.scheduler.read(sequence, result.tokens, result.length)
        self.scheduler.written(sequence, min(result.length, result.draft_length))
        if (
            result.tokens and rng.random() < 0.03
        ):  # a stop string, which the device knows nothing of
            used = rng.randrange(1, len(result.tokens) + 1)
            del sequence.output[len(sequence.output) - len(result.tokens) + used :]
            self.end(sequence)
        elif result.done:
            assert len(sequence.output) == sequence.max_tokens or sequence.output[-1] == STOP
            self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        known = min(sequence.length, len(sequence.prompt) + len(sequence.output))
        if sequence.decoding and known // PAGE > sequence.registered:
            self.device.catch_up(sequence)
            self.scheduler.written(sequence, known)
        self.scheduler.finish(sequence)
        self.live.remove(sequence)

    def finish(self, steps: int = 1000) -> None:
        """Runs until nobody is left."""
        rng = random.Random(1)
        for _ in range(steps):
            if not self.live and not self.calls:
                break
            self.step(rng)
        assert not self.live and not self.calls
        assert self.scheduler.running == self.scheduler.waiting == []
        assert self.pool.num_held == 0

    # ---- what must hold ------------------------------------------------------------------------

    def check_decodes(self, plan: Step, before: Before) -> None:
        decoded = [s for call in plan.decodes for s in call.sequences]
        preempted = [s for s in before.running if s.phase is Phase.WAITING]
        assert len(preempted) == self.scheduler.preemptions - before.preemptions
        assert len(set(decoded)) == len(decoded) and set(decoded) == before.ready - set(preempted)
        if preempted:
            assert max((s.rank for s in decoded), default=(-1, 0)) < min(s.rank for s in preempted)
        assert len({call.tree for call in plan.decodes for s in call.sequences if not s.tree}) <= 1
        for call in plan.decodes:
            assert (call.rows, call.tree) in self.programs.pairs
            assert 0 < len(call.sequences) <= call.rows
            assert {s.tree for s in call.sequences} <= {None, call.tree}
            depth = DEPTHS[call.tree]
            room = depth + 1 if depth else SYNC - 1
            full = [s for s in call.sequences if before.pending[s] > room]
            if full and not depth:  # then everybody who is behind joins in
                full = [s for s in call.sequences if before.pending[s] > 1]
            assert call.catch_up == full
            for sequence in call.sequences:
                if len(sequence.pages) > before.pages[sequence]:
                    assert len(sequence.pages) == _pages(_end(sequence))
        self.events["preemption"] += len(preempted)

    def check_prompts(self, plan: Step, before: Before) -> None:
        line = [*plan.admitted, *sorted(self.scheduler.waiting, key=lambda s: s.rank)]
        if plan.admitted:
            assert line == sorted(line, key=lambda s: s.rank)
            assert self.scheduler.preemptions == before.preemptions
        used = sum(chunk.size for chunk in plan.chunks)
        assert used <= self.budget or len(plan.chunks) == 1
        if any(s.phase is Phase.PREFILL for s in self.scheduler.running):
            assert plan.chunks and used + CHUNKS[0] > self.budget

    def check(self) -> None:
        scheduler = self.scheduler
        self.pool.check(scheduler.held)
        places = Counter(scheduler.waiting + scheduler.running)
        assert places == Counter(self.live)
        slots = [s.slot for s in scheduler.running]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(SLOTS))
        for sequence in scheduler.waiting:
            assert sequence.phase is Phase.WAITING
            assert (sequence.slot, sequence.pages, sequence.in_flight) == (-1, [], 0)
        unread = [result for call in self.calls for result in call]
        for sequence in scheduler.running:
            row = self.device.rows[sequence]
            mine = [r for r in unread if (r.sequence, r.epoch) == (sequence, sequence.epoch)]
            assert list(sequence.growths) == [r.growth for r in mine]
            assert sequence.bound == sequence.length + sum(r.growth for r in mine)
            assert sequence.length <= row.length <= sequence.bound
            assert len(sequence.pages) >= _pages(_end(sequence))
            if sequence.decoding:
                known = [*sequence.prompt, *sequence.output]
                assert row.text[: len(known)] == known
                assert len(sequence.output) <= row.given <= sequence.max_tokens
                assert row.waiting <= sequence.pending <= SYNC
            else:
                assert sequence.phase is Phase.PREFILL and not mine
                assert row.length == sequence.length == sequence.prefilled < len(sequence.context)


def _end(sequence: Sequence) -> int:
    """Behind the last position that the calls under way may write and that anybody reads."""
    return min(sequence.bound, len(sequence.prompt) + sequence.max_tokens)


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE)


# ---- any mix of requests -----------------------------------------------------------------------

# Few different tokens, so that prefixes meet, and prompts on both sides of the ends of pages.
PROMPTS = st.lists(st.sampled_from([0, 0, 0, 0, 0, 1]), min_size=1, max_size=10)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run and go; `Simulation` checks every step."""

    @initialize(
        num_pages=st.integers(6, 12), budget=st.sampled_from([1, 8, 13]), caching=st.booleans()
    )
    def start(self, num_pages, budget, caching):
        self.simulation = Simulation(num_pages, budget, caching)

    @precondition(lambda self: len(self.simulation.live) < 9)
    @rule(
        prompt=PROMPTS,
        choices=st.integers(1, 3),
        max_tokens=st.integers(1, 14),  # with the longest prompt as much as the smallest pool holds
        priority=st.integers(0, 2),
        tree=st.sampled_from([None, None, None, *DEPTHS]),
        salt=st.sampled_from(["", "", "other"]),
    )
    def add(self, prompt, choices, **options):
        for _ in range(choices):
            self.simulation.add(prompt, **options)

    @rule(seed=st.integers(0, 999), late=st.booleans(), times=st.integers(1, 5))
    def step(self, seed, late, times):
        rng = random.Random(seed)
        for _ in range(times):
            self.simulation.step(rng, late=late)

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def abort(self, data):
        self.simulation.end(data.draw(st.sampled_from(self.simulation.live)))

    @precondition(lambda self: len(self.simulation.live) > 2)
    @rule()
    def forget(self):
        self.simulation.pool.forget()

    @invariant()
    def all_is_well(self):
        self.simulation.check()

    def teardown(self):
        self.simulation.finish()


SchedulerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=30)
test_scheduler_in_any_mix_of_requests = SchedulerMachine.TestCase


def test_the_simulation_sees_everything_that_can_happen():
    """What the checks are about does come about: in one long run with too few pages."""
    simulation, rng = Simulation(num_pages=8, budget=8), random.Random(3)
    for i in range(120):
        prompt = [0] * rng.randrange(1, 14) + [i % 2] * rng.randrange(4)
        simulation.add(prompt, rng.randrange(1, 12), priority=i % 2, tree=[None, PLAIN][i % 3 == 2])
        for _ in range(rng.randrange(6)):
            simulation.step(rng)
    simulation.finish()
    events = simulation.events
    for name in ("preemption", "late result", "catch up", "hit"):
        assert events[name] > 5, events


# ---- who comes first ---------------------------------------------------------------------------


def test_admission_is_by_priority_then_by_arrival():
    simulation = Simulation(budget=16)
    last, second, first, third = (
        simulation.add([i] * 3, priority=priority) for i, priority in enumerate([2, 0, -1, 0])
    )
    plan = simulation.step()
    assert plan.admitted == [first, second, third, last]
    assert [chunk.sequence for chunk in plan.chunks[:3]] == [first, second, third]
    simulation.finish()


def test_a_large_prompt_at_the_head_of_the_line_is_not_passed():
    simulation = Simulation(num_pages=8)
    running = simulation.add([1] * 9, 20)
    simulation.step()
    large, small = simulation.add([2] * 25, 2), simulation.add([3], 2)
    while running in simulation.live:
        assert simulation.step().admitted == []
    while not simulation.step().admitted:
        pass
    assert large.slot >= 0
    simulation.finish()
    assert small.phase is Phase.FINISHED


def test_an_urgent_prompt_passes_those_in_prefill():
    simulation = Simulation(budget=4)
    slow = [simulation.add([i] * 30, priority=1) for i in (1, 2)]
    waiting = simulation.add([3] * 30, priority=1)
    simulation.step()
    assert [s.phase for s in slow] == [Phase.PREFILL] * 2 and waiting.slot == -1
    urgent = simulation.add([4] * 3)
    plan = simulation.step()
    assert plan.admitted == [urgent] and plan.chunks[0].sequence is urgent
    while not urgent.decoding:
        simulation.step()
    assert not any(s.decoding for s in slow) and waiting.slot == -1
    simulation.finish()


def test_a_short_prompt_does_not_wait_for_a_long_one():
    simulation = Simulation(budget=8)
    long = simulation.add([1] * 60)
    simulation.step()
    short = simulation.add([2, 3])
    plan = simulation.step()
    assert [chunk.sequence for chunk in plan.chunks if chunk.last] == [short]
    assert long in {chunk.sequence for chunk in plan.chunks}
    simulation.finish()


@pytest.mark.parametrize("budget", [8, 9, 16, 20])
def test_two_long_prompts_use_the_whole_budget(budget):
    simulation = Simulation(budget=budget)
    both = {simulation.add([i] * 60) for i in (1, 2)}
    for _ in range(3):
        plan = simulation.step()
        assert sum(chunk.count for chunk in plan.chunks) == budget // CHUNKS[0] * CHUNKS[0]
        assert {chunk.sequence for chunk in plan.chunks} == both
    simulation.finish()


def test_one_chunk_fits_into_any_budget():
    simulation = Simulation(budget=1)
    for token in (1, 2):
        simulation.add([token] * 5)
    assert [chunk.size for chunk in simulation.step().chunks] == [CHUNKS[0]]
    simulation.finish()


# ---- pages -------------------------------------------------------------------------------------


def prefilled(simulation: Simulation) -> int:
    """Tokens that are prefilled until nobody is left."""
    count = 0
    while simulation.live:
        count += sum(chunk.count for chunk in simulation.step().chunks)
    simulation.finish()
    return count


def test_choices_of_one_prompt_share_its_pages():
    simulation = Simulation(budget=16)
    choices = [simulation.add([1] * 4 * PAGE + [2, 2], 3) for _ in range(4)]
    assert prefilled(simulation) == 4 * PAGE + 2 + 3 * 2
    assert [s.cached for s in choices] == [0] + 3 * [4 * PAGE]


def test_pages_are_shared_as_soon_as_they_are_filled():
    """The beginning of a long prompt is there long before its end."""
    simulation = Simulation(budget=8)
    long = simulation.add([1] * 80)
    simulation.step()
    start = simulation.add([1] * (PAGE + 1))
    simulation.step()
    assert start.cached == PAGE and not long.decoding
    simulation.finish()


@pytest.mark.parametrize("tree", DEPTHS)
@pytest.mark.parametrize("late", [True, False])
def test_growth_reserves_what_the_calls_under_way_may_write(tree, late):
    """Known length + (calls in flight + 1) * A, capped at prompt and limit; never more."""
    simulation, rng = Simulation(), random.Random(5)
    sequence, reserved = simulation.add([1] * 8, 30, tree=tree), _pages(9)
    nodes = DEPTHS[tree] + 1
    while simulation.live:
        rounds = sum(growth > 0 for growth in sequence.growths)
        wanted = min(sequence.length + (rounds + 1) * nodes, 8 + 30)
        if simulation.step(rng, late=late).decodes:
            reserved = max(reserved, _pages(wanted))
        if sequence in simulation.live:
            assert len(sequence.pages) == reserved
    simulation.finish()


def test_the_last_one_loses_its_pages_and_goes_on_where_it_was():
    simulation = Simulation(num_pages=8)
    urgent, late = simulation.add([0] * 8, 20, tree=PLAIN), simulation.add([1] * 8, 20, tree=PLAIN)
    while not late.preemptions:
        simulation.step()
    assert late.phase is Phase.WAITING and not urgent.preemptions
    output = list(late.output)
    while late.phase is not Phase.DECODE:
        simulation.step()
    assert late.output[: len(output)] == output and late.found > 0
    assert late.cached == simulation.scheduler.prefix_hits == 0  # those of the first admission
    assert simulation.scheduler.prefix_queries == 2 * 8
    simulation.finish()
    assert not urgent.preemptions


def test_who_is_about_to_end_keeps_its_pages():
    """The first in line has to wait for a page: the other one's last call is under way."""
    simulation = Simulation(num_pages=8, budget=16)
    growing = simulation.add([0] * 8, 16, tree=PLAIN)
    while growing.bound < 3 * PAGE - 1:  # one more fills its pages
        simulation.step()
    ending = simulation.add([1] * 8, 1, priority=1)
    simulation.step()
    hostages = simulation.pool.allocate(simulation.pool.num_free)
    assert ending.exhausted and hostages
    assert simulation.scheduler.step() == Step()
    assert growing.preemptions == 1 and not ending.preemptions
    simulation.pool.release(hostages)
    simulation.finish()


# ---- coming and going --------------------------------------------------------------------------


def test_nothing_to_do_is_an_empty_step():
    assert Simulation().step() == Step()


@pytest.mark.parametrize("steps", range(5))
def test_an_abort_frees_the_pages_at_once(steps):
    simulation = Simulation()
    sequence = simulation.add([1] * 20, 9)
    for _ in range(steps):
        simulation.step()
    simulation.end(sequence)
    assert simulation.pool.num_held == 0 and sequence.phase is Phase.FINISHED
    simulation.finish()


def test_without_a_draft_nobody_catches_up():
    pool = PagePool(40, PAGE)
    scheduler = Scheduler(
        pool, Programs(((None, PLAIN),), (1,)), {PLAIN: 0}, chunk_sizes=CHUNKS, tokens_per_step=8,
        sync_length=None,
    )  # fmt: skip
    scheduler.add(sequence := Sequence("s", (1, 2), 50))
    scheduler.step()
    scheduler.read(sequence, [0], 2)
    for length in range(3, 52):
        (call,) = scheduler.step().decodes
        assert call.catch_up == []
        scheduler.read(sequence, [0], length)
    assert sequence.exhausted and scheduler.step() == Step()
    scheduler.finish(sequence)
    assert pool.num_held == 0
