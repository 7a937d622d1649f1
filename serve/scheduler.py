"""Who decodes, who is prefilled, who waits: the host's side of continuous batching.

Every step of the engine asks for a `Step`: prompts to prefill in chunks, sequences to decode, and
what has to happen before. Sequences wait by priority, then by arrival. An admitted one holds a slot
and the pages of its prompt; pages for decoding are taken as it grows. Where none are left, the
sequence that would be served last gives up its pages and waits again; it goes on later from the
tokens it had, prefilled anew (or found in the prefix cache).

The engine enqueues call t + 1 before it reads the results of call t, so the scheduler plans with
bounds: a sequence's `length` is what is known, `bound` what it can have become at most. A page is
registered in the prefix cache as soon as the call that fills it is enqueued (prefill) or read
(decoding): calls run in order, so nobody reads a page before it is written.

No jax here: integers and lists.
"""

import dataclasses
import enum
import sys
from collections import defaultdict, deque
from collections.abc import Iterable

from .dispatch import PLAIN, Dispatcher, Programs
from .pages import PagePool, page_hashes


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    PREFILL = enum.auto()
    DECODE = enum.auto()
    FINISHED = enum.auto()


@dataclasses.dataclass(eq=False)
class Sequence:
    """One request on its way through the engine."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    priority: int = 0
    tree: str | None = None
    """None: the dispatcher's choice."""
    salt: str = ""
    order: int = 0
    """Of arrival."""
    output: list[int] = dataclasses.field(default_factory=list)
    phase: Phase = Phase.WAITING
    slot: int = -1
    found: int = 0
    """Tokens found in the prefix cache at the last admission."""
    pages: list[int] = dataclasses.field(default_factory=list)
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    registered: int = 0
    """Pages that are registered, or were found so."""
    boundary_page: int = 0
    """The last page found; 0: none."""
    prefilled: int = 0
    """Prompt tokens whose chunks are enqueued."""
    cached: int = 0
    """Prompt tokens found in the prefix cache at the first admission."""
    length: int = 0
    """Tokens in the target's cache, as far as is known."""
    growths: deque[int] = dataclasses.field(default_factory=deque)
    """What each enqueued call whose result is not read may add to `length`, oldest first."""
    pending: int = 0
    """Pairs that wait for the draft at most, the root's included."""
    epoch: int = 0
    """Counts preemptions: results of calls from before one are not for this life."""
    preemptions: int = 0

    @property
    def context(self) -> list[int]:
        """What prefill has to bring into the cache: all tokens but the root, if there is one."""
        return [*self.prompt, *self.output[:-1]]

    @property
    def root(self) -> int:
        """The token to continue from after a preemption; -1: none, prefill draws it."""
        return self.output[-1] if self.output else -1

    @property
    def rank(self) -> tuple[int, int]:
        """Who is served first: the smallest."""
        return self.priority, self.order

    @property
    def decoding(self) -> bool:
        """Whether the prompt is in the cache, or its last chunk is enqueued."""
        return self.phase is Phase.DECODE

    @property
    def in_flight(self) -> int:
        """Enqueued calls whose results are not read; each gives one token at least."""
        return len(self.growths)

    @property
    def bound(self) -> int:
        """What `length` will be at most, once all enqueued calls are done."""
        return self.length + sum(self.growths)

    @property
    def exhausted(self) -> bool:
        """Whether the calls under way will certainly reach the limit."""
        return len(self.output) + self.in_flight >= self.max_tokens


@dataclasses.dataclass(frozen=True)
class Decode:
    """One decode call."""

    tree: str
    rows: int
    sequences: list[Sequence]
    catch_up: list[Sequence]
    """Those of them whose draft cache has to be brought up to date before."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One prefill call: `count` tokens of a context from `begin` on, padded to `size`."""

    sequence: Sequence
    begin: int
    count: int
    size: int

    @property
    def last(self) -> bool:
        """Whether the prompt ends here, so that the first token follows."""
        return self.begin + self.count == len(self.sequence.context)


@dataclasses.dataclass
class Step:
    """What the engine enqueues next, in this order."""

    decodes: list[Decode] = dataclasses.field(default_factory=list)
    admitted: list[Sequence] = dataclasses.field(default_factory=list)
    chunks: list[Chunk] = dataclasses.field(default_factory=list)


class Scheduler:
    """Slots, pages and the waiting line; changed by the engine's thread alone."""

    def __init__(
        self,
        pool: PagePool,
        programs: Programs,
        depths: dict[str, int],
        *,
        chunk_sizes: tuple[int, ...],
        tokens_per_step: int,
        sync_length: int | None,
    ):
        """
        Args:
          depths: of each tree, the root not counted (0 for plain decoding).
          chunk_sizes: tokens of the prefill programs, ascending.
          tokens_per_step: prompt tokens prefilled in one step at most (one chunk always fits).
          sync_length: pairs that may wait for the draft; None: there is none.
        """
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0
        self._programs, self._depths = programs, depths
        self._dispatcher = Dispatcher(programs.ladder)
        self._chunk_sizes, self._budget = chunk_sizes, tokens_per_step
        self._sync_length = sys.maxsize if sync_length is None else sync_length
        self._slots = list(reversed(range(programs.buckets[-1])))
        self._arrivals = 0

    # ---- coming and going ----------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence into the waiting line; all pages together must hold it."""
        sequence.order = self._arrivals
        self._arrivals += 1
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it stands; its full pages stay in the prefix cache.

        Before that the engine reports what is in both caches (`written`).
        """
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is not Phase.FINISHED:
            self._leave(sequence)
        sequence.phase = Phase.FINISHED

    def read(self, sequence: Sequence, tokens: Iterable[int], length: int) -> None:
        """Takes in the result of a call: new tokens, and the length of the target's cache."""
        sequence.output += tokens
        sequence.length = length
        sequence.growths.popleft()

    def written(self, sequence: Sequence, length: int) -> None:
        """Registers the pages that both caches have filled with known tokens, up to `length`."""
        length = min(length, len(sequence.prompt) + len(sequence.output))
        if length // self.pool.page_size > sequence.registered:
            self._register(sequence, [*sequence.prompt, *sequence.output], length)

    @property
    def held(self) -> list[list[int]]:
        """The pages of all sequences, for `PagePool.check`."""
        return [sequence.pages for sequence in self.running]

    # ---- planning ------------------------------------------------------------------------------

    def step(self) -> Step:
        """Plans the next calls and counts them as enqueued."""
        step = Step()
        preempted = self.preemptions
        self._plan_decodes(step)
        if self.preemptions == preempted:  # or the pages just won would go to newcomers
            self._admit(step)
        self._plan_chunks(step)
        return step

    def _plan_decodes(self, step: Step) -> None:
        ready = [s for s in self.running if s.phase is Phase.DECODE and not s.exhausted]
        ready.sort(key=lambda s: s.rank)
        auto = sum(s.tree is None for s in ready)
        chosen = self._dispatcher.choose(auto) if auto else PLAIN
        groups: defaultdict[str, list[Sequence]] = defaultdict(list)
        for sequence in ready:
            tree = sequence.tree or chosen
            # Served in order, so whoever loses pages has not been given a place yet.
            if sequence.phase is Phase.DECODE and self._reserve(sequence, self._depths[tree] + 1):
                groups[tree].append(sequence)
        for tree, members in groups.items():
            begin = 0
            for rows in self._programs.split(tree, len(members)):
                call = members[begin : begin + rows]
                begin += rows
                step.decodes.append(Decode(tree, rows, call, self._enqueue(tree, call)))

    def _enqueue(self, tree: str, call: list[Sequence]) -> list[Sequence]:
        """Counts a call as enqueued; returns the sequences whose draft has to catch up before."""
        depth = self._depths[tree]
        room = depth + 1 if depth else self._sync_length - 1
        behind = [s for s in call if s.pending > room]
        if behind and not depth:  # one pass for all is as cheap as for one
            behind = [s for s in call if s.pending > 1]
        for sequence in behind:
            sequence.pending = 1
        for sequence in call:
            sequence.pending = depth + 1 if depth else sequence.pending + 1
            sequence.growths.append(depth + 1)
        return behind

    def _admit(self, step: Step) -> None:
        """Lets in whom one step can prefill a bit of; a prefix is looked up no sooner than that."""
        self.waiting.sort(key=lambda s: s.rank)
        most = max(1, self._budget // self._chunk_sizes[0])
        while self.waiting and self._slots:
            sequence = self.waiting[0]
            context = sequence.context
            sequence.hashes += page_hashes(
                context, self.pool.page_size, sequence.salt, known=sequence.hashes
            )
            # At least one token is left to prefill: the last one's output draws the next.
            usable = sequence.hashes[: (len(context) - 1) // self.pool.page_size]
            prefilling = [s for s in self.running if s.phase is Phase.PREFILL]
            if sum(s.rank < sequence.rank for s in prefilling) >= most:
                return
            if any(
                s.registered < len(usable) and s.hashes[: len(usable)] == usable for s in prefilling
            ):
                return  # another choice of the same request: its pages will be there to share
            found = self.pool.match(usable)
            fresh = self._pages_for(len(context) + 1) - len(found)
            # Everybody who runs may soon need a page more: newcomers leave that many.
            if fresh + len(self.running) > self.pool.num_free:
                self.pool.release(found)
                return
            self.waiting.pop(0)
            pages = found + (self.pool.allocate(fresh) or [])
            self._start(sequence, pages, len(found))
            step.admitted.append(sequence)

    def _start(self, sequence: Sequence, pages: list[int], found: int) -> None:
        cached = found * self.pool.page_size
        if not sequence.preemptions:
            sequence.cached = cached
            self.prefix_queries += len(sequence.prompt)
            self.prefix_hits += cached
        sequence.phase, sequence.slot = Phase.PREFILL, self._slots.pop()
        sequence.pages, sequence.registered = pages, found
        sequence.found = sequence.prefilled = sequence.length = cached
        sequence.boundary_page = pages[found - 1] if found else 0
        self.running.append(sequence)

    def _plan_chunks(self, step: Step) -> None:
        """Chunks for the sequences in turn, until the budget is used.

        Each leaves room for the next one's, so a long prompt does not hold up short ones.
        """
        prefilling = [s for s in self.running if s.phase is Phase.PREFILL]
        turn = deque(sorted(prefilling, key=lambda s: s.rank))
        budget, smallest = self._budget, self._chunk_sizes[0]
        while turn and (budget >= smallest or not step.chunks):
            sequence = turn.popleft()
            room = budget - (smallest if turn else 0)
            sizes = [n for n in self._chunk_sizes if n <= room] or [smallest]
            left = len(sequence.context) - sequence.prefilled
            size = next((n for n in sizes if n >= left), sizes[-1])
            budget -= size
            step.chunks.append(Chunk(sequence, sequence.prefilled, min(left, size), size))
            sequence.prefilled += min(left, size)
            sequence.length = sequence.prefilled
            self._register(sequence, sequence.context, sequence.prefilled)
            if left > size:
                turn.append(sequence)
                continue
            sequence.phase, sequence.pending = Phase.DECODE, 1
            sequence.growths.append(0)

    # ---- pages ---------------------------------------------------------------------------------

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.page_size)

    def _reserve(self, sequence: Sequence, growth: int) -> bool:
        """Pages for a call that may add `growth` tokens; preempts others, or the sequence itself.

        Behind prompt and limit nothing is kept: what a last round writes there goes to the trash.
        """
        limit = len(sequence.prompt) + sequence.max_tokens
        wanted = self._pages_for(min(sequence.bound + growth, limit)) - len(sequence.pages)
        while wanted > 0:
            fresh = self.pool.allocate(wanted)
            if fresh is not None:
                sequence.pages += fresh
                break
            # Whoever is about to end anyway keeps what is under way.
            losers = [s for s in self.running if s is sequence or not s.exhausted]
            victim = max(losers, key=lambda s: s.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.phase = Phase.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Gives back slot and pages."""
        self.pool.release(sequence.pages)
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.slot, sequence.pages, sequence.hashes = -1, [], []
        sequence.growths.clear()
        sequence.epoch += 1

    def _register(self, sequence: Sequence, tokens, length: int) -> None:
        full = length // self.pool.page_size
        if full <= sequence.registered:
            return
        sequence.hashes += page_hashes(
            tokens[: full * self.pool.page_size], self.pool.page_size, sequence.salt,
            known=sequence.hashes,
        )  # fmt: skip
        for index in range(sequence.registered, full):
            self.pool.register(sequence.pages[index], sequence.hashes[index])
        sequence.registered = full
