"""Page pool and prefix cache: hashes, order of use, errors; against a model that knows tokens."""

import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.pages import PagePool, page_hashes

# ---- hashes ------------------------------------------------------------------------------------


def test_only_full_pages_have_hashes():
    assert [len(page_hashes([7] * length, 4)) for length in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert {len(page_hash) for page_hash in page_hashes([7] * 8, 4)} == {16}


def test_hashes_name_the_tokens_of_the_page_and_all_before_it():
    hashes = page_hashes([1, 2, 3, 4, 5, 6], 2)
    assert page_hashes([1, 2, 3, 4, 9, 6], 2)[:2] == hashes[:2]
    for position in range(6):
        tokens = [1, 2, 3, 4, 5, 6]
        tokens[position] = 9
        changed = [a != b for a, b in zip(page_hashes(tokens, 2), hashes, strict=True)]
        assert changed == [page >= position // 2 for page in range(3)]


def test_equal_pages_of_one_sequence_differ():
    assert len(set(page_hashes([1, 2] * 8, 2))) == 8


def test_large_tokens_stay_apart():
    assert len({page_hashes([token], 1)[0] for token in (0, 1, 256, 65536, 2**31, 2**32)}) == 6


def test_salts_share_no_hash():
    salts = ["", "a", "b", "ab", "\ud800", "\N{SNOWMAN}"]
    hashes = [page_hash for salt in salts for page_hash in page_hashes(range(8), 2, salt)]
    assert len(set(hashes)) == 4 * len(salts)


def test_a_salt_cannot_pose_as_a_page():
    tokens = [10406, 7, 8]  # the hash of the first page happens to be valid UTF-8
    salt = (page_hashes(tokens, 1)[0] + tokens[1].to_bytes(8, sys.byteorder)).decode()
    assert page_hashes(tokens[2:], 1, salt)[0] not in page_hashes(tokens, 1)


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_a_chain_that_grows_equals_one_from_scratch(salt):
    tokens, hashes = [], []
    for token in range(20):
        tokens.append(token)
        hashes += page_hashes(tokens, 3, salt, known=hashes)
        assert hashes == page_hashes(tokens, 3, salt)


# ---- allocation --------------------------------------------------------------------------------


def take(pool: PagePool, count: int) -> list[int]:
    """Fresh pages, where the pool has enough."""
    pages = pool.allocate(count)
    assert pages is not None and len(pages) == count
    return pages


def test_every_page_but_the_trash_page_is_given_out_once():
    pool = PagePool(6, 4)
    assert sorted(take(pool, 5)) == [1, 2, 3, 4, 5]
    assert (pool.num_pages, pool.num_held, pool.num_free, pool.usage) == (5, 5, 0, 1.0)
    assert pool.allocate(0) == []
    assert pool.allocate(1) is None


def test_too_few_pages_takes_none():
    pool = PagePool(6, 4)
    pool.allocate(2)
    assert pool.allocate(4) is None
    assert (pool.num_held, pool.num_free, pool.usage) == (2, 3, 0.4)


def test_shared_pages_are_free_after_the_last_release():
    pool = PagePool(3, 4)
    pages = take(pool, 2)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_held == 2
    pool.release(pages)
    assert pool.num_held == 0 and pool.num_free == 2


# ---- prefix cache ------------------------------------------------------------------------------


def run(pool: PagePool, tokens) -> list[int]:
    """The pages of a sequence of full pages that came, registered its pages and is still there."""
    hashes = page_hashes(tokens, pool.page_size)
    pages = pool.match(hashes)
    pages += take(pool, len(hashes) - len(pages))
    for page, page_hash in zip(pages, hashes, strict=True):
        pool.register(page, page_hash)
    return pages


def find(pool: PagePool, tokens) -> list[int]:
    """The pages that the prefix cache has for `tokens`, given back at once."""
    pages = pool.match(page_hashes(tokens, pool.page_size))
    pool.release(pages)
    return pages


def test_pages_are_found_while_held_and_after_release():
    pool = PagePool(8, 2)
    pages = run(pool, [1, 2, 3, 4])
    assert find(pool, [1, 2, 3, 4]) == pages
    pool.release(pages)
    assert pool.num_held == 0 and pool.num_free == 7
    assert find(pool, [1, 2, 3, 4, 5]) == pages
    assert find(pool, [1, 2, 9, 9]) == pages[:1]
    assert find(pool, [9, 9, 3, 4]) == []


def test_a_found_page_is_held():
    pool = PagePool(3, 1)
    pool.release(run(pool, [1, 2]))
    found = pool.match(page_hashes([1], 1))
    assert pool.num_held == 1 and pool.allocate(2) is None
    assert set(take(pool, 1)).isdisjoint(found)


def test_free_pages_are_taken_before_cached_ones():
    pool = PagePool(6, 1)
    cached = run(pool, [1, 2])
    pool.release(cached)
    assert set(take(pool, 3)).isdisjoint(cached)
    assert find(pool, [1, 2]) == cached


def test_least_recently_used_is_evicted_first_and_tails_before_heads():
    pool = PagePool(7, 1)
    first, second = run(pool, [1, 2, 3]), run(pool, [4, 5, 6])
    pool.release(first)
    pool.release(second)
    find(pool, [1])
    order = [take(pool, 1)[0] for _ in range(6)]
    assert order == [first[2], first[1], second[2], second[1], second[0], first[0]]
    assert find(pool, [1, 2, 3]) == find(pool, [4, 5, 6]) == []


def test_an_evicted_tail_leaves_its_head():
    pool = PagePool(4, 1)
    pages = run(pool, [1, 2, 3])
    pool.release(pages)
    pool.allocate(1)
    assert find(pool, [1, 2, 3]) == pages[:2]


def test_a_second_page_of_the_same_content_stays_private():
    pool = PagePool(5, 1)
    page_hash = page_hashes([1], 1)[0]
    first, second = take(pool, 2)
    pool.register(first, page_hash)
    pool.register(second, page_hash)
    pool.register(first, page_hash)
    pool.release([second])
    assert find(pool, [1]) == [first]
    pool.release([first])
    pool.check([])
    assert find(pool, [1]) == [first]


def test_forget_empties_the_cache_and_leaves_what_is_held():
    pool = PagePool(6, 1)
    pool.release(run(pool, [1, 2]))
    pages = run(pool, [3, 4])
    pool.forget()
    assert find(pool, [1, 2]) == find(pool, [3, 4]) == []
    assert pool.num_held == 2 and pool.leaked([pages]) == 0
    pool.release(pages)
    assert find(pool, [3, 4]) == []
    take(pool, 5)


def test_a_tail_is_not_found_without_its_head():
    pool = PagePool(6, 1)
    hashes = page_hashes([1, 2, 3], 1)
    pages = run(pool, [1, 2])
    pool.forget()
    pages += take(pool, 1)
    pool.register(pages[2], hashes[2])
    assert find(pool, [1, 2, 3]) == []
    pool.register(pages[0], hashes[0])
    assert find(pool, [1, 2, 3]) == pages[:1]


def test_without_prefix_caching_nothing_is_found():
    pool = PagePool(6, 1, prefix_caching=False)
    pages = run(pool, [1, 2])
    assert find(pool, [1, 2]) == []
    pool.release(pages)
    assert find(pool, [1, 2]) == []
    pool.check([])


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_pages, page_size", [(1, 4), (0, 4), (4, 0)])
def test_sizes_that_make_no_pool(num_pages, page_size):
    with pytest.raises(ValueError, match="give at least"):
        PagePool(num_pages, page_size)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="-1 pages"):
        PagePool(4, 4).allocate(-1)


@pytest.mark.parametrize("bad", [0, -1, 4, 99])
def test_pages_that_nobody_holds_are_refused(bad):
    pool = PagePool(5, 1)
    pages = take(pool, 2)
    with pytest.raises(ValueError, match=f"page {bad} .* given back"):
        pool.release([*pages, bad])
    with pytest.raises(ValueError, match=f"page {bad} .* shared"):
        pool.share([*pages, bad])
    with pytest.raises(ValueError, match=f"page {bad} is held by nobody"):
        pool.register(bad, b"hash")
    pool.check([pages])


def test_a_page_is_not_given_back_twice():
    pool = PagePool(4, 1)
    pages = run(pool, [1, 2])
    with pytest.raises(ValueError, match="2 times"):
        pool.release([*pages, pages[0]])
    pool.check([pages])
    pool.release(pages)
    with pytest.raises(ValueError, match="0 references"):
        pool.release(pages)  # cached now, so in a state other than free
    pool.check([])


def test_a_full_page_does_not_change():
    pool = PagePool(4, 1)
    [page] = run(pool, [1])
    with pytest.raises(ValueError, match="never changes"):
        pool.register(page, page_hashes([2], 1)[0])
    assert find(pool, [1]) == [page] and find(pool, [2]) == []


def lose_a_free_page(pool):
    pool._free.pop()


def free_a_held_page(pool):
    pool._free.append(next(iter(pool._held)))


def free_the_trash_page(pool):
    pool._free.append(0)


def hold_once_more(pool):
    pool._held[next(iter(pool._held))] += 1


def drop_a_hash(pool):
    pool._page_of.popitem()


def free_a_cached_page(pool):
    pool._free.append(pool._cached.popitem()[0])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lose_a_free_page, "is in 0 of the states"),
        (free_a_held_page, "is in 2 of the states"),
        (free_the_trash_page, "page 0 is the trash page"),
        (hold_once_more, "has 2 references and 1 holders"),
        (drop_a_hash, "is not registered under the hash"),
        (free_a_cached_page, "is registered and free"),
    ],
)
def test_damage_is_named_and_counted(damage, message):
    pool = PagePool(8, 1)
    pages = run(pool, [1, 2])
    pool.release(run(pool, [3, 4]))
    pool.check([pages])
    damage(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check([pages])
    assert pool.leaked([pages]) == 1


def test_pages_of_a_lost_sequence_are_leaked():
    pool = PagePool(8, 1)
    pages, lost = take(pool, 2), take(pool, 3)
    pool.share(pages[:1])
    assert pool.leaked([pages, lost, pages[:1]]) == 0
    assert pool.leaked([pages, pages[:1]]) == 3
    assert pool.leaked([pages, lost]) == 1
    assert pool.leaked([pages, lost, pages[:1], [0]]) == 1


# ---- against a model ---------------------------------------------------------------------------

PAGE_SIZE = 2


class Sequence:
    """A live sequence: what the scheduler would keep."""

    def __init__(self, salt: str, tokens: list[int]):
        self.salt, self.tokens = salt, tokens
        self.pages: list[int] = []
        self.hashes: list[bytes] = []

    @property
    def contents(self) -> list[tuple]:
        """What each full page holds: salt and all tokens up to its end."""
        ends = range(PAGE_SIZE, len(self.tokens) + 1, PAGE_SIZE)
        return [(self.salt, *self.tokens[:end]) for end in ends]


# Two tokens, one of them rare, and a handful of pages: prefixes meet, and the pool is often full.
TOKENS = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=7)


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, grow, fork and go. The model knows contents, counts and the order of use."""

    def __init__(self):
        super().__init__()
        self.live: list[Sequence] = []
        self.memory: dict[int, tuple] = {}  # what is written in each full page
        self.registered: dict[tuple, int] = {}
        self.free: set[int] = set()
        self.order: list[int] = []  # cached pages, first to go first

    @initialize(num_pages=st.integers(4, 10))
    def make_pool(self, num_pages):
        self.pool = PagePool(num_pages + 1, PAGE_SIZE)
        self.free = set(range(1, num_pages + 1))

    def pick(self, data) -> Sequence:
        return self.live[data.draw(st.integers(0, len(self.live) - 1), label="sequence")]

    def allocate(self, sequence: Sequence) -> bool:
        """Pages for all tokens of the sequence; whether there were enough."""
        count = -(-len(sequence.tokens) // PAGE_SIZE) - len(sequence.pages)
        pages = self.pool.allocate(count)
        if count > len(self.free) + len(self.order):
            assert pages is None
            return False
        assert pages is not None and len(pages) == count
        num_evicted = max(count - len(self.free), 0)
        fresh, evicted = pages[: count - num_evicted], pages[count - num_evicted :]
        assert len(set(fresh)) == len(fresh) and set(fresh) <= self.free
        assert evicted == self.order[:num_evicted]
        self.free -= set(fresh)
        self.order = self.order[num_evicted:]
        for page in evicted:
            del self.registered[self.memory[page]]
        for page in pages:
            self.memory.pop(page, None)
        sequence.pages += pages
        self.write(sequence)
        return True

    def write(self, sequence: Sequence) -> None:
        for page, content in zip(sequence.pages, sequence.contents, strict=False):
            assert self.memory.setdefault(page, content) == content  # nobody else wrote there

    def register_pages(self, sequence: Sequence) -> None:
        new = page_hashes(sequence.tokens, PAGE_SIZE, sequence.salt, known=sequence.hashes)
        for page_hash in new:
            index = len(sequence.hashes)
            page = sequence.pages[index]
            self.pool.register(page, page_hash)
            self.registered.setdefault(sequence.contents[index], page)
            sequence.hashes.append(page_hash)

    def give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        still_held = {page for other in self.live for page in other.pages}
        for page in reversed(sequence.pages):
            if page in still_held:
                continue
            if page in self.registered.values():
                self.order.append(page)
            else:
                self.free.add(page)

    @precondition(lambda self: len(self.live) < 4)  # or the pool only ever refuses
    @rule(
        tokens=TOKENS,
        salt=st.sampled_from(["", "", "", "other"]),
        registers=st.sampled_from([True, True, False]),
    )
    def start(self, tokens, salt, registers):
        sequence = Sequence(salt, tokens)
        expected = []
        for content in sequence.contents:
            if content not in self.registered:
                break
            expected.append(self.registered[content])
        hashes = page_hashes(tokens, PAGE_SIZE, salt)
        sequence.pages = self.pool.match(hashes)
        assert sequence.pages == expected
        assert [self.memory[page] for page in expected] == sequence.contents[: len(expected)]
        self.order = [page for page in self.order if page not in expected]
        sequence.hashes = hashes[: len(expected)]
        if self.allocate(sequence):
            self.live.append(sequence)
            if registers:
                self.register_pages(sequence)
        else:
            self.give_back(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=TOKENS)
    def grow(self, data, tokens):
        sequence = self.pick(data)
        before = sequence.tokens
        sequence.tokens = before + tokens
        if not self.allocate(sequence):
            sequence.tokens = before

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def register(self, data):
        self.register_pages(self.pick(data))

    @precondition(lambda self: 0 < len(self.live) < 4)
    @rule(data=st.data())
    def fork(self, data):
        """Another sequence takes the full pages of one that lives."""
        parent = self.pick(data)
        num_full = len(parent.tokens) // PAGE_SIZE
        child = Sequence(parent.salt, parent.tokens[: num_full * PAGE_SIZE])
        child.pages = parent.pages[:num_full]
        self.pool.share(child.pages)
        self.live.append(child)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        sequence = self.pick(data)
        self.live.remove(sequence)
        self.give_back(sequence)
        still_held = {page for other in self.live for page in other.pages}
        if not still_held.issuperset(sequence.pages):
            with pytest.raises(ValueError):
                self.pool.release(sequence.pages)

    @precondition(lambda self: len(self.order) > 3)  # or there is never anything to find
    @rule()
    def forget(self):
        self.pool.forget()
        self.registered.clear()
        self.free |= set(self.order)
        self.order = []

    @invariant()
    def the_pool_agrees(self):
        held = [sequence.pages for sequence in self.live]
        self.pool.check(held)
        assert self.pool.leaked(held) == 0
        distinct = {page for pages in held for page in pages}
        assert self.pool.num_held == len(distinct)
        assert self.pool.num_free == len(self.free) + len(self.order)
        assert self.pool.num_held + self.pool.num_free == self.pool.num_pages
        assert distinct.isdisjoint({0, *self.free, *self.order})
        for sequence in self.live:
            full = sequence.pages[: len(sequence.contents)]
            assert [self.memory[page] for page in full] == sequence.contents


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
test_pool_against_the_model = PoolMachine.TestCase
