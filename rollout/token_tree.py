"""TokenTree: where the tokens of texts that share their beginnings lie. Numbers only, no tensors.

A node is a span of tokens over pages of slots, a text is the path from a root to a node, a branch
is the handle of one text. Only a node without children and with a single handle grows; all others
are frozen. So no slot has two writers, nothing is ever copied, and a fork in the middle of a node
splits it in two that share its pages. The price is the rest of a frozen node's last page.

Legend: S slots of a page, B branches.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from rollfuse.kernels import checks
from rollfuse.kernels.tree_plan import Changes, counted
from rollfuse.rollout.node import Node, path
from rollfuse.rollout.pages import OutOfPages, PagePool
from rollfuse.rollout.twigs import Twigs, segments_of

Ints = npt.NDArray[np.int64]
Tokens = Sequence[int] | Ints


# The version, the last use and the number of a retained node.
Retained = tuple[int, int, int, Node]


def _is_valid(entry: Retained) -> bool:
    _, last_use, _, node = entry
    return node.is_retained and node.last_use == last_use


class TokenTree:
    """Nodes and pages of all texts.

    Args:
        n_pages: pages there are, >= 1.
        page_size: S, >= 1.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, n_pages: int, page_size: int = 16) -> None:
        checks.need(page_size >= 1, "page_size", "a count >= 1", page_size)
        self.pool = PagePool(n_pages)
        self.page_size = page_size
        self.token = np.zeros(n_pages * page_size, dtype=np.int64)  # by slot
        self.roots: dict[int, Node] = {}
        self.changes = Changes()  # of where tokens lie
        self.shape = Changes()  # of which nodes there are, and of a node that gets shorter
        self._version = 0
        self._retained: list[Retained] = []  # a heap, some entries outdated
        self._clock = 0
        # Columns, by the number of a node.
        self.length = np.zeros(16, dtype=np.int64)
        self.computed = np.zeros(16, dtype=np.int64)  # of its first tokens, see `commit`
        self._first = np.zeros(16, dtype=np.int64)  # token
        self._offset = np.zeros(16, dtype=np.int64)
        self._last_page = np.zeros(16, dtype=np.int64)
        self.free_numbers: list[int] = list(range(15, -1, -1))

    # -- nodes and texts ----------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Of the policy that writes from now on; nodes of an older one are not matched."""
        return self._version

    def end(self, node: Node) -> int:
        return node.start + int(self.length[node.number])

    def slots(self, node: Node) -> Ints:
        """(length,) int64, where the node's tokens lie."""
        return self._slots(node, 0, int(self.length[node.number]))

    def slots_of(self, nodes: Sequence[Node]) -> Ints:
        """(sum of lengths,) int64, where the tokens of several nodes lie, node by node."""
        numbers = np.array([node.number for node in nodes], dtype=np.int64)
        length, offset = self.length[numbers], self._offset[numbers]
        counts = np.array([len(node.pages) for node in nodes], dtype=np.int64)
        pages = np.fromiter(chain.from_iterable(node.pages for node in nodes), dtype=np.int64)
        first_page = counts.cumsum() - counts
        shift = offset - (length.cumsum() - length)
        place = np.arange(int(length.sum())) + np.repeat(shift, length)
        page: Ints = pages[np.repeat(first_page, length) + place // self.page_size]
        return page * self.page_size + place % self.page_size

    def last_slots(self, numbers: Ints) -> Ints:
        """(n,) int64, where the last tokens of the nodes with these numbers lie."""
        in_page = (self._offset[numbers] + self.length[numbers] - 1) % self.page_size
        return self._last_page[numbers] * self.page_size + in_page

    def computed_slots(self) -> tuple[Ints, Ints, Ints]:
        """Of every token that is computed: its slot, position and version."""
        rows = [np.empty((3, 0), np.int64)]
        for node in self.nodes():
            slots = self.slots(node)[: self.computed[node.number]]
            position = np.arange(node.start, node.start + len(slots))
            rows.append(np.stack([slots, position, np.full_like(slots, node.version)]))
        slots, positions, versions = np.concatenate(rows, axis=1)
        return slots, positions, versions

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents before children."""
        todo = list(self.roots.values())[::-1]
        while todo:
            node = todo.pop()
            yield node
            todo.extend(list(node.children.values())[::-1])

    def new_root(self) -> Node:
        return self._new_node(None, 0)

    def set_version(self, version: int) -> None:
        """A new policy writes from now on; what an older one has written stays, and stays its own.

        Tokens that are not computed yet will be the new one's. Retained texts are the first to go.
        """
        checks.need(version >= self._version, "version", f"at least {self._version}", version)
        if version == self._version:
            return
        self._version = version
        for node in list(self.nodes()):
            computed = int(self.computed[node.number])
            if computed == int(self.length[node.number]):
                continue
            if computed:
                self._split(node, computed)
            node.version = version
        self._reshaped()

    def append(self, nodes: Sequence[Node], tokens: Sequence[Tokens] | Ints) -> list[Node]:
        """Append tokens[i] to the text of nodes[i]; the nodes the texts end in then.

        Args:
            nodes: distinct ends of texts with a handle each, which moves to the node returned.
            tokens: token ids of each, or (B,) int64, one each.

        Raises:
            OutOfPages: too few are free, retained texts' included; nothing was changed.
        """
        self.changes.count += 1
        grows = [self.grows(node) for node in nodes]
        if isinstance(tokens, np.ndarray) and tokens.ndim == 1:
            return self._append_each(nodes, tokens, grows)
        parts = [np.asarray(part, dtype=np.int64).reshape(-1) for part in tokens]
        wanted = zip(nodes, parts, grows, strict=True)
        self.make_room(sum(self.pages_wanted(node, len(part), g) for node, part, g in wanted))
        ends = list(nodes)
        for i, (node, part) in enumerate(zip(nodes, parts, strict=True)):
            if len(part):
                ends[i] = node if grows[i] else self._child(node)
                self._grow(ends[i], part)
        return ends

    def plant(self, nodes: Sequence[Node], twigs: Twigs) -> list[Node]:
        """Continue the texts of `nodes` by twigs, one at least each; the nodes these end in.

        A handle leaves each of `nodes`; the caller puts one on every node returned.

        Raises:
            OutOfPages: see `append`.
        """
        firsts = [p for p, shared in zip(twigs.parent, twigs.shared, strict=True) if not shared]
        is_one = np.bincount(firsts) == 1
        grows = [self.grows(node) and bool(one) for node, one in zip(nodes, is_one, strict=True)]
        beds = self._beds(nodes, twigs, grows)
        self.changes.count += 1
        for node in nodes:
            node.handles -= 1
        pieces, found = segments_of(twigs), list[Node]()
        for above, twig, begin, end in zip(*pieces[:4], strict=True):
            text, (pages, base) = twigs.parent[twig], beds[twig]
            page, offset = divmod(base + begin, self.page_size)
            if above < 0 and grows[text]:
                node, page = nodes[text], 0
            else:
                node = self._new_node(nodes[text] if above < 0 else found[above], 0)
                node.offset = self._offset[node.number] = offset
                if offset:  # the rest of a page
                    self.pool.share(pages[page])
            node.pages = pages[page : (base + end - 1) // self.page_size + 1]
            self._set_last_page(node)
            if not self.length[node.number]:
                self._first[node.number] = twigs.tokens[twig][begin]
            self.length[node.number] += end - begin
            found.append(node)
        return [found[piece] for piece in pieces.last]

    def match(self, tokens: Ints, version: int) -> tuple[Node | None, int]:
        """The longest known beginning of `tokens` of that version: its last node, its length."""
        best: tuple[Node | None, int] = (None, 0)
        todo = self._beginning_with(self.roots, tokens[:1])
        while todo:
            node = todo.pop()
            if node.version != version and self.length[node.number]:
                continue
            agreed = self._agreement(node, tokens[node.start : self.end(node)])
            if node.start + agreed > best[1]:
                best = node, node.start + agreed
            if agreed == self.length[node.number]:
                end = node.start + agreed
                todo.extend(self._beginning_with(node.children, tokens[end : end + 1]))
        return best

    # -- forks and ends -----------------------------------------------------------------------

    def node_at(self, node: Node, at: int) -> Node:
        """The node that ends after `at` tokens of the text of `node`; splits one if need be."""
        checks.need(0 <= at <= self.end(node), "at", f"a position in 0..{self.end(node)}", at)
        while node.start >= at and node.parent is not None:
            node = node.parent
        if at == 0 and self.end(node):
            return self.new_root()
        return node if at == self.end(node) else self._split(node, at - node.start)

    def cut(self, node: Node, at: int) -> Node:
        """Where the only branch on `node`, or one of several, stands without its tokens from `at`.

        The caller moves the handle and releases `node` if it is another one.
        """
        checks.need(0 <= at <= self.end(node), "at", f"a position in 0..{self.end(node)}", at)
        if not node.is_open or (at <= node.start and node.parent is not None):
            return self.node_at(node, at)
        length = at - node.start
        if length < self.length[node.number]:
            self.length[node.number] = length
            self.computed[node.number] = min(length, int(self.computed[node.number]))
            kept = -(-(node.offset + length) // self.page_size) if length else 0
            self.pool.give_back(node.pages[kept:])
            del node.pages[kept:]
            self._set_last_page(node)
            self._reshaped()
        return node

    def retain(self, node: Node) -> None:
        """Keep the text of `node` for `match` until its pages are needed."""
        self._clock += 1
        node.is_retained, node.last_use = True, self._clock
        heapq.heappush(self._retained, (node.version, self._clock, node.number, node))
        if len(self._retained) > 2 * len(self.length):  # most are outdated
            self._retained = [entry for entry in self._retained if _is_valid(entry)]
            heapq.heapify(self._retained)

    def release(self, node: Node | None) -> None:
        """Free `node`, and above it what it alone has held, unless something holds it."""
        while node is not None and not node.is_held:
            del self.siblings(node)[node.number]
            self.pool.give_back(node.pages)
            self.free_numbers.append(node.number)
            self.length[node.number] = self.computed[node.number] = 0
            self._reshaped()
            node.number, node = -1, node.parent

    # -- pages --------------------------------------------------------------------------------

    def grows(self, node: Node) -> bool:
        """Whether what is appended to its text goes into `node` itself, not into one below."""
        return node.is_open and node.version == self._version

    def pages_wanted(self, node: Node, count: int, grows: bool) -> int:
        """Pages that `count` more tokens take, in `node` itself or, unless it grows, below it."""
        if not count:
            return 0
        used = node.offset + int(self.length[node.number]) if grows and node.pages else 0
        return -(-(used + count) // self.page_size) - (len(node.pages) if grows else 0)

    def make_room(self, n_pages: int) -> None:
        """Evict retained texts, the least recently used of the oldest version first, until
        `n_pages` are free; raises OutOfPages, before it evicts any, if that cannot be had."""
        if n_pages > self.pool.n_free:
            n_evictable = self.n_evictable()
            if n_pages > self.pool.n_free + n_evictable:
                raise OutOfPages(
                    f"pages: need {n_pages} free ones of {self.pool.n_pages}, got "
                    f"{self.pool.n_free} and {n_evictable} of retained texts"
                )
        while n_pages > self.pool.n_free:
            evicted = self.evict_one()
            assert evicted, "pages of retained texts were counted, and there is no such text"

    def evict_one(self) -> bool:
        """Give up a retained text; False if there is none."""
        while self._retained:
            entry = heapq.heappop(self._retained)
            if _is_valid(entry):
                node = entry[-1]
                node.is_retained = False
                self.release(node)
                return True
        return False

    def n_evictable(self) -> int:
        """Pages that only retained texts use."""
        needed: set[int] = set()
        used: set[int] = set()
        for node in self.nodes():
            used.update(node.pages)
        seen: set[int] = set()
        for node in self.nodes():
            if node.handles or node.pins:
                for held in reversed(path(node)):
                    if held.number in seen:
                        break
                    seen.add(held.number)
                    needed.update(held.pages)
        return len(used - needed)

    def _reshaped(self) -> None:
        self.shape.count += 1
        self.changes.count += 1

    # -- inside -------------------------------------------------------------------------------

    def siblings(self, node: Node) -> dict[int, Node]:
        return self.roots if node.parent is None else node.parent.children

    def _new_node(self, parent: Node | None, handles: int) -> Node:
        if not self.free_numbers:
            n = len(self.length)
            for name in ("length", "computed", "_first", "_offset", "_last_page"):
                column = getattr(self, name)
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
            self.free_numbers = list(range(2 * n - 1, n - 1, -1))
        start = 0 if parent is None else self.end(parent)
        node = Node(self.free_numbers.pop(), parent, start, self._version, handles=handles)
        self._offset[node.number] = 0
        self.siblings(node)[node.number] = node
        self._reshaped()
        return node

    def _split(self, node: Node, n: int) -> Node:
        """The new upper node of the first `n` tokens; `node` keeps the others and its handles."""
        border = node.offset + n
        upper = self._new_node(node.parent, 0)
        upper.version, upper.offset, upper.children = node.version, node.offset, {node.number: node}
        upper.pages = node.pages[: -(-border // self.page_size)]
        del self.siblings(node)[node.number]
        computed = int(self.computed[node.number])
        self.length[upper.number], self.computed[upper.number] = n, min(n, computed)
        node.parent, node.start = upper, node.start + n
        self.length[node.number] -= n
        self.computed[node.number] = max(0, computed - n)
        node.pages = node.pages[border // self.page_size :]
        node.offset = border % self.page_size
        if node.offset:
            self.pool.share(node.pages[0])
        for half in (upper, node):
            self._offset[half.number] = half.offset
            first = half.pages[0] * self.page_size + half.offset
            self._first[half.number] = self.token[first]
            self._set_last_page(half)
        return upper

    def _slots(self, node: Node, first: int, last: int) -> Ints:
        place = np.arange(node.offset + first, node.offset + last)
        pages = np.asarray(node.pages, dtype=np.int64)
        return pages[place // self.page_size] * self.page_size + place % self.page_size

    def _grow(self, node: Node, tokens: Ints) -> None:
        first = int(self.length[node.number])
        if not node.pages:
            node.offset = self._offset[node.number] = 0
        wanted = -(-(node.offset + first + len(tokens)) // self.page_size)
        node.pages.extend(self.pool.take(wanted - len(node.pages)))
        self._set_last_page(node)
        self.length[node.number] = first + len(tokens)
        self.token[self._slots(node, first, first + len(tokens))] = tokens
        if not first:
            self._first[node.number] = tokens[0]

    def _beds(
        self, nodes: Sequence[Node], twigs: Twigs, grows: list[bool]
    ) -> list[tuple[list[int], int]]:
        """For each twig its pages, and which of their slots is that of its first token, if it lay
        there: those of its tokens that are not shared do."""
        count = [len(part) - n for part, n in zip(twigs.tokens, twigs.shared, strict=True)]
        in_place = [grows[p] and not n for p, n in zip(twigs.parent, twigs.shared, strict=True)]
        texts = [nodes[parent] for parent in twigs.parent]
        wanted = [self.pages_wanted(*of) for of in zip(texts, count, in_place, strict=True)]
        self.make_room(sum(wanted))
        taken = iter(self.pool.take(sum(wanted)))
        beds: list[tuple[list[int], int]] = []
        for node, n_pages, shared, is_more in zip(
            texts, wanted, twigs.shared, in_place, strict=True
        ):
            pages = list(islice(taken, n_pages))
            if is_more and node.pages:
                beds.append((node.pages + pages, node.offset + int(self.length[node.number])))
            else:
                beds.append((pages, -shared))
                if is_more:
                    node.offset = self._offset[node.number] = 0
        self._fill(beds, twigs, np.array(count))
        return beds

    def _fill(self, beds: list[tuple[list[int], int]], twigs: Twigs, count: Ints) -> None:
        """Write the tokens of twigs that are not shared."""
        begin = np.array(twigs.shared) + [base for _, base in beds]
        place = np.repeat(begin, count) + counted(count)
        n_pages = np.array([len(pages) for pages, _ in beds])
        page = np.array([page for pages, _ in beds for page in pages])
        page = page[np.repeat(n_pages.cumsum() - n_pages, count) + place // self.page_size]
        tokens = [part[n:] for part, n in zip(twigs.tokens, twigs.shared, strict=True)]
        self.token[page * self.page_size + place % self.page_size] = np.concatenate(tokens)

    def _append_each(self, nodes: Sequence[Node], tokens: Ints, grows: list[bool]) -> list[Node]:
        """One token for each of several texts, with no more work per text than a new node is."""
        index = np.array([node.number for node in nodes], dtype=np.int64)
        in_page = (self._offset[index] + self.length[index]) % self.page_size
        # A node that was cut to nothing has no page and may have an offset left.
        starts = (in_page == 0) | (self.length[index] == 0) | ~np.array(grows, dtype=bool)
        where = np.flatnonzero(starts)
        self.make_room(len(where))
        ends = list(nodes)
        for i, page in zip(where.tolist(), self.pool.take(len(where)), strict=True):
            if not grows[i]:
                # A node that all but one of its branches have left since is open by now; a child
                # all the same, as room was made for it.
                ends[i] = self._child(nodes[i])
                index[i] = ends[i].number
            node = ends[i]
            if not node.pages:
                node.offset = 0
            node.pages.append(page)
            self._last_page[index[i]] = page
        begun = where[self.length[index[where]] == 0]
        in_page[begun] = self._offset[index[begun]] = 0
        self._first[index[begun]] = tokens[begun]
        self.token[self._last_page[index] * self.page_size + in_page] = tokens
        self.length[index] += 1
        return ends

    def _child(self, node: Node) -> Node:
        """A new node below `node` to which one handle has moved."""
        child = self._new_node(node, 1)
        node.handles -= 1
        return child

    def _set_last_page(self, node: Node) -> None:
        self._last_page[node.number] = node.pages[-1] if node.pages else -1

    def _beginning_with(self, nodes: dict[int, Node], token: Ints) -> list[Node]:
        """Those whose first token is the one in `token`, if it holds one; and empty ones."""
        numbers = np.fromiter(nodes, dtype=np.int64, count=len(nodes))
        is_empty = self.length[numbers] == 0
        begins = self._first[numbers] == token[0] if len(token) else np.zeros_like(is_empty)
        return [nodes[number] for number in numbers[is_empty | begins].tolist()]

    def _agreement(self, node: Node, tokens: Ints) -> int:
        """How many of the node's first tokens are `tokens`, of which there may be fewer."""
        if not len(tokens):
            return 0
        differs = self.token[self._slots(node, 0, len(tokens))] != tokens
        return int(differs.argmax()) if differs.any() else len(tokens)
