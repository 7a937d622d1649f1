"""Pages of the KV cache: who holds which, and which of them a later request may find by content.

A page is in one of three states: *held* (by as many sequences as its reference count says),
*cached* (held by nobody, but full and registered, so that a request with the same beginning can
take it up), or *free*. Target and draft use the same ids; page 0 is the trash page and never given
out.

What a full page holds depends on its tokens and those before it, so a hash over both names its
content. Fresh pages are taken from the free ones first, then from the cached ones, least recently
used first. A sequence gives up its tail before its head: a page is found only if those before it
are.

Every operation is O(1) a page, but for the two that look for bugs (`leaked` and `check`).
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain


def page_hashes(
    tokens: Sequence[int], page_size: int, salt: str = "", *, known: Sequence[bytes] = ()
) -> list[bytes]:
    """Hashes of the full pages of `tokens`, each over the one before it and the page's own tokens.

    The first page follows the salt, so sequences of different salts share no hash. `known` are the
    hashes of the first pages, which are neither computed again nor returned: a sequence that grows
    keeps its list current by `hashes += page_hashes(tokens, page_size, salt, known=hashes)`.
    """
    # A client chooses the salt: `person` keeps it from posing as a page, and a string out of JSON
    # may hold half a surrogate pair.
    root = _digest(salt.encode("utf-8", "surrogatepass"), person=b"salt")
    parent, hashes = known[-1] if known else root, []
    for index in range(len(known), len(tokens) // page_size):
        page_tokens = array("q", tokens[index * page_size : (index + 1) * page_size])
        parent = _digest(parent + page_tokens.tobytes())
        hashes.append(parent)
    return hashes


def _digest(data: bytes, person: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=16, person=person).digest()


class PagePool:
    """Reference counts, free pages and prefix cache of one paged KV cache.

    `num_pages` is that of the cache (`init_cache`), trash page included; `page_size` is in tokens.
    Without `prefix_caching` nothing is ever registered, so nothing is found.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool = True):
        if num_pages < 2:
            raise ValueError(f"num_pages is {num_pages}: give at least 2, page 0 is never used")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}: give at least 1 token")
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self._ids = range(1, num_pages)
        self._free = list(reversed(self._ids))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Least recently used first."""
        self._held: Counter[int] = Counter()
        """Reference counts, none of them 0."""
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_pages(self) -> int:
        """Pages that can be given out: the trash page is not among them."""
        return len(self._ids)

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can give now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages that at least one sequence holds."""
        return len(self._held)

    @property
    def usage(self) -> float:
        """Share of the pages that is held, 0 to 1."""
        return self.num_held / self.num_pages

    def allocate(self, count: int) -> list[int] | None:
        """`count` fresh pages with one reference each; None, and nothing taken, if there are fewer.

        Raises ValueError for a negative count.
        """
        if count < 0:
            raise ValueError(f"{count} pages were asked for: ask for 0 or more")
        if count > self.num_free:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        self._held.update(pages)
        return pages

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._hash_of.pop(page)]
        return page

    def share(self, pages: Sequence[int]) -> None:
        """Takes one more reference on each page.

        Raises ValueError, and takes none, if one is neither held nor cached.
        """
        for page in pages:
            if page not in self._held and page not in self._cached:
                raise ValueError(
                    f"page {page} is neither held nor cached: only such pages can be shared, "
                    "`allocate` gives fresh ones"
                )
        for page in pages:
            self._cached.pop(page, None)
            self._held[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Gives back one reference on each page; `pages` in the order of the sequence.

        Pages that nobody holds any more stay in the prefix cache if they are registered, as the
        most recently used ones; the others are free. Raises ValueError, and gives none back, if
        there are fewer references than are given back.
        """
        for page, times in Counter(pages).items():
            if times > self._held[page]:
                raise ValueError(
                    f"page {page} was given back {times} times and has {self._held[page]} "
                    "references: give back each page once for each time it was taken"
                )
        for page in reversed(pages):
            self._held[page] -= 1
            if not self._held[page]:
                del self._held[page]
                if page in self._hash_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The pages of the longest known prefix of `hashes`, with a reference taken on each."""
        pages = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            pages.append(page)
        self.share(pages)
        return pages

    def register(self, page: int, page_hash: bytes) -> None:
        """Lets later requests find a held page that is now full by its hash (of `page_hashes`).

        If another page goes by this hash, this one stays private. Raises ValueError if nobody holds
        the page, or if it goes by another hash.
        """
        if page not in self._held:
            raise ValueError(f"page {page} is held by nobody: register pages before their release")
        if self._hash_of.get(page, page_hash) != page_hash:
            raise ValueError(
                f"page {page} is registered as {self._hash_of[page].hex()}, not {page_hash.hex()}: "
                "a full page never changes"
            )
        if self.prefix_caching and self._page_of.setdefault(page_hash, page) == page:
            self._hash_of[page] = page_hash

    def forget(self) -> None:
        """Empties the prefix cache; pages that are held stay held.

        Their sequences may register pages again. Where what they hold is no longer valid (new
        weights), they have to end first.
        """
        self._free.extend(self._cached)
        self._cached.clear()
        self._page_of.clear()
        self._hash_of.clear()

    def leaked(self, held: Iterable[Sequence[int]]) -> int:
        """Pages with a broken invariant, given all live sequences' pages: 0, or there is a bug."""
        return len(self._faults(held))

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError naming the broken invariants, given all live sequences' pages."""
        faults = self._faults(held)
        if faults:
            raise AssertionError(
                "; ".join(f"page {page} {fault}" for page, fault in sorted(faults.items()))
            )

    def _faults(self, held: Iterable[Sequence[int]]) -> dict[int, str]:
        """The first broken invariant of each page that has one."""
        holders = Counter(chain.from_iterable(held))
        states = Counter(chain(self._free, self._cached, self._held))
        found_as = {(page, page_hash) for page_hash, page in self._page_of.items()}
        astray = {page for page, _ in found_as ^ set(self._hash_of.items())}
        faults = {}
        for page in {*self._ids, *holders, *states, *astray}:
            references, registered = self._held[page], page in self._hash_of
            if page not in self._ids:
                faults[page] = "is the trash page or beyond the pool, and in use"
            elif states[page] != 1:
                faults[page] = f"is in {states[page]} of the states free, cached and held, not in 1"
            elif references != holders[page]:
                faults[page] = f"has {references} references and {holders[page]} holders"
            elif page in astray:
                faults[page] = "is not registered under the hash that finds it"
            elif not references and registered != (page in self._cached):
                faults[page] = "is registered and free, or cached and not registered"
        return faults
