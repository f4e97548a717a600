"""TreeCache: keys and values of texts that share their beginnings, each beginning stored once.

    cache = TreeCache(...)
    prompt = cache.root(tokens)             a branch: the handle of one text
    branches = prompt.fork(8)               at any token, nothing is copied
    cache.append(branches, new_tokens)
    step = cache.plan(branches)             what a forward pass has to compute, and to read
    cache.commit(step)                      it has been computed

A forward pass between the last two lines writes keys and values to `step.slots` and attends by
`step.plan`; `TreeModel` does that inside an unmodified transformers model.

Legend: B branches, N query rows, S slots of a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.noise import fork_streams
from rollfuse.kernels.tree_attention import KeyValues, write_key_values
from rollfuse.kernels.tree_plan import Spans, TreePlan, plan_of
from rollfuse.rollout.token_tree import Ints, Node, Tokens, TokenTree, path

# Steps of plain decoding that one plan serves before it is made anew.
_ROOM = 64
# The fewest keys that are worth a program of their own on a device.
_SPLIT = 256
# On the CPU reading so many keys again costs less than one more call.
_SHORT = 32
# Spreads a version over the bits that token and position leave alone.
_VERSION_STEP = 0x1E3779B97F4A7C15


class Branch:
    """The handle of one text in a TreeCache. A branch ends by `prune`, not by being forgotten.

    Attributes:
        stream: whose noise samples this text, see `rollfuse.new_streams`. A fork has a fresh one.
    """

    __slots__ = ("_cache", "_lineage", "_n_forks", "_node", "_stream")

    def __init__(self, cache: TreeCache, node: Node, stream: int | None) -> None:
        self._cache, self._node, self._stream = cache, node, stream
        self._lineage: tuple[Branch, int] | None = None
        self._n_forks = 0
        node.handles += 1

    @property
    def node(self) -> Node:
        checks.need(self._node is not _GONE, "branch", "a live branch", "one that was pruned")
        return self._node

    def __len__(self) -> int:
        """Tokens of the text."""
        return self._cache.tree.end(self.node)

    @property
    def tokens(self) -> Ints:
        """(len,) int64, the text."""
        tree = self._cache.tree
        return np.concatenate([tree.token[tree.slots(node)] for node in path(self.node)])

    @property
    def n_computed(self) -> int:
        """Tokens whose keys and values are there, from the first on."""
        tree = self._cache.tree
        return sum(int(tree.computed[node.number]) for node in path(self.node))

    @property
    def versions(self) -> list[tuple[int, int]]:
        """(end, version): up to which position which policy version writes the text."""
        found: list[tuple[int, int]] = []
        for node in path(self.node):
            if found and found[-1][1] == node.version:
                found.pop()
            if self._cache.tree.length[node.number]:
                found.append((self._cache.tree.end(node), node.version))
        return found

    @property
    def stream(self) -> int:
        if self._stream is None:
            assert self._lineage is not None
            parent, number = self._lineage
            self._stream = int(fork_streams(torch.tensor([parent.stream]), 1, first=number))
        return self._stream

    def fork(self, n: int = 1, *, at: int | None = None) -> list[Branch]:
        """`n` new branches with this one's first `at` tokens (None: all). Copies nothing.

        Raises:
            ValueError: `at` is past the end or negative, `n` is negative, the branch was pruned.
        """
        checks.need(n >= 0, "n", "a number of branches >= 0", n)
        node = self._cache.tree.node_at(self.node, len(self) if at is None else at)
        children = [Branch(self._cache, node, None) for _ in range(n)]
        for number, child in enumerate(children, self._n_forks):
            child._lineage = (self, number)
        self._n_forks += n
        if not n:
            self._cache.tree.release(node)
        return children

    def truncate(self, at: int) -> None:
        """Drop the tokens from position `at` on; what others share of them stays theirs."""
        old = self.node
        node = self._cache.tree.cut(old, at)
        if node is not old:
            node.handles += 1
            self._leave(old)
            self._node = node

    def prune(self, *, retain: bool = False) -> None:
        """End the branch. What nobody else holds is freed or, if `retain`, kept for `match` until
        its pages are needed."""
        node = self.node
        self._node = _GONE
        if retain:
            self._cache.tree.retain(node)
        self._leave(node)

    def pin(self) -> Pin:
        """Keep the text as it is now, whatever becomes of its branches, until the pin's release."""
        return Pin(self._cache, self.node)

    def _leave(self, node: Node) -> None:
        node.handles -= 1
        self._cache.tree.release(node)


class Pin:
    """Holds a text in a TreeCache until `release`."""

    __slots__ = ("_cache", "_node")

    def __init__(self, cache: TreeCache, node: Node) -> None:
        self._cache, self._node = cache, node
        node.pins += 1

    def release(self) -> None:
        """Let go of the text; raises ValueError the second time."""
        checks.need(self._node is not _GONE, "pin", "one that holds", "one that was released")
        self._node.pins -= 1
        self._cache.tree.release(self._node)
        self._node = _GONE


_GONE = Node(-1, None, 0, 0)


@dataclass(slots=True, eq=False)
class TreeStep:
    """What one forward pass computes, of `TreeCache.plan`.

    Attributes:
        plan: which row reads which keys.
        ids: (N,) int64, the rows' tokens.
        slots: (N,) int64, where their keys and values go; for a row that is computed again, a slot
            that nobody reads.
        last: (B,) int64, the row after which each branch goes on.
    """

    plan: TreePlan
    ids: Ints
    slots: Ints
    last: Ints
    _numbers: Ints  # of the nodes that are computed by it, their lengths, and the tree's shape then
    _lengths: Ints
    _shape: int
    _ends: list[int]  # the numbers of the branches' nodes
    _on_device: Tensor | None = None  # slots


class TreeCache:
    """Keys and values of a tree of texts, in pages.

    Args:
        n_layers, n_kv_heads, head_dim: of the model.
        n_heads: query heads of the model; None: as many as key-value heads.
        n_pages: pages there are, shared by all layers.
        page_size: S, tokens of a page. A frozen node leaves up to S - 1 slots unused.
        dtype, device: of the keys and values.
        canary: keep a word of (token, position, version) beside every slot that is written, on the
            device, for `check`: 8 bytes a token.
        checksum: keep a sum of the bits of every key and value, for `check`: 8 bytes a token and
            layer.

    Bytes: 2 * n_layers * n_kv_heads * head_dim * element_size a token of the pool.

    Raises:
        ValueError: a size is below 1 or the heads do not divide.
    """

    def __init__(
        self,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        n_pages: int,
        page_size: int = 16,
        n_heads: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        canary: bool = True,
        checksum: bool = False,
    ) -> None:
        for name, size in (
            ("n_layers", n_layers), ("n_kv_heads", n_kv_heads), ("head_dim", head_dim)
        ):  # fmt: skip
            checks.need(size >= 1, name, "a count >= 1", size)
        self.group = (n_kv_heads if n_heads is None else n_heads) // n_kv_heads
        good = n_heads is None or (n_heads >= 1 and n_heads % n_kv_heads == 0)
        checks.need(good, "n_heads", f"a multiple of n_kv_heads = {n_kv_heads}", n_heads)
        self.tree = TokenTree(n_pages, page_size)
        self.device = torch.device(device)
        n_slots = n_pages * page_size + 1  # the last one for what nobody reads
        shape = (n_slots, n_kv_heads, head_dim)
        self.layers = [
            KeyValues(*(torch.empty(shape, dtype=dtype, device=self.device) for _ in range(2)))
            for _ in range(n_layers)
        ]
        ints = torch.zeros(n_layers if checksum else 1, n_slots, dtype=torch.int64, device=device)
        self._canary = ints[0].clone() if canary else None
        self._checksum = ints if checksum else None
        self._step: TreeStep | None = None

    # -- texts --------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The policy version that writes from now on. Setting it leaves what is there as it is."""
        return self.tree.version

    @version.setter
    def version(self, version: int) -> None:
        self.tree.set_version(version)

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of a page in all layers."""
        slot = sum(x[0].numel() * x.element_size() for layer in self.layers for x in layer)
        return slot * self.tree.page_size

    @property
    def has_self_checks(self) -> bool:
        """Whether `check` looks at contents too."""
        return self._canary is not None or self._checksum is not None

    def root(self, tokens: Tokens = (), *, stream: int = 0) -> Branch:
        """A branch of a new text.

        Raises:
            OutOfPages: it has no room.
        """
        ids = _ids(tokens, "tokens")
        branch = Branch(self, self.tree.new_root(), stream)
        if len(ids):
            try:
                self.append([branch], [ids])
            except BaseException:
                branch.prune()
                raise
        return branch

    def match(
        self, tokens: Tokens, *, version: int | None = None, stream: int = 0
    ) -> Branch | None:
        """A new branch with the longest known beginning of `tokens`; None if nothing is known.

        Args:
            version: the policy version that must have written all of it, None: the present one. An
                older one's keys are found only if they are asked for.
        """
        wanted = self.version if version is None else version
        node, length = self.tree.match(_ids(tokens, "tokens"), wanted)
        if node is None:
            return None
        return Branch(self, self.tree.node_at(node, length), stream)

    def append(self, branches: Sequence[Branch], tokens: Sequence[Tokens] | Ints) -> None:
        """Append tokens[i] to branches[i]; a forward pass is to compute them.

        Args:
            tokens: a sequence of token ids each, or (B,) int64, one each.

        Raises:
            ValueError: a pruned branch or one that comes twice, or another number of sequences.
            OutOfPages: too few pages are free, those of retained texts included.
            Either way nothing was changed.
        """
        nodes = [branch.node for branch in branches]
        distinct = len({id(branch) for branch in branches}) == len(branches)
        checks.need(distinct, "branches", "each branch once", "one twice")
        checks.need(len(tokens) == len(nodes), "tokens", f"{len(nodes)} sequences", len(tokens))
        if not (isinstance(tokens, np.ndarray) and tokens.ndim == 1):
            tokens = [_ids(part, f"tokens[{i}]") for i, part in enumerate(tokens)]
        for branch, node in zip(branches, self.tree.append(nodes, tokens), strict=True):
            branch._node = node

    # -- forward passes -----------------------------------------------------------------------

    def plan(self, branches: Sequence[Branch], *, pure: bool = False) -> TreeStep:
        """The forward pass that computes what is not computed of the branches' texts.

        A branch that is computed whole has its last token pushed through again, without being
        written, so that it too gets logits. The next plan of the same branches, one token longer,
        is this one moved on.

        Args:
            branches: B of them, none empty, in any order; several may share an end.
            pure: refuse texts of which another version than the present one wrote a part.

        Raises:
            ValueError: an empty or pruned branch; a mixed text where a pure one is asked for.
        """
        ends = [branch.node for branch in branches]
        if pure:
            _need_pure(branches, self.version)
        step = self._moved_on([node.number for node in ends])
        if step is None:
            for i, node in enumerate(ends):
                good = self.tree.end(node) > 0
                checks.need(good, f"branches[{i}]", "a text of at least one token", "an empty one")
            step = self._planned(ends)
        self._step = step
        return step

    def write(self, layer: int, keys: Tensor, values: Tensor, step: TreeStep) -> None:
        """Store a layer's keys and values (N, n_kv_heads, head_dim) of the rows of `step`."""
        _need_current(step)
        if step._on_device is None:
            step._on_device = torch.from_numpy(step.slots).to(self.device, non_blocking=True)
        slots = step._on_device
        write_key_values(self.layers[layer], keys, values, slots)
        if self._canary is not None and layer == 0:
            self._canary[slots] = self._words(step.ids, step.plan.positions, self.version)
        if self._checksum is not None:
            self._checksum[layer, slots] = _bit_sums(keys, values)

    @property
    def last_plan(self) -> TreePlan:
        """Of the last step that was planned."""
        assert self._step is not None, "no step has been planned"
        return self._step.plan

    def commit(self, step: TreeStep) -> None:
        """The pass has been made: all layers hold the keys and values of its rows."""
        _need_current(step)
        self.tree.computed[step._numbers] = step._lengths

    def check(self) -> None:
        """Raise RuntimeError on the first inconsistency of the tree, its pages or what is kept of
        their contents (`canary`: a wrong or stale address; `checksum`: a changed value)."""
        self.tree.check()
        where, positions, versions = self.tree.computed_slots()
        index = torch.from_numpy(where).to(self.device)
        if self._canary is not None:
            words = self._words(self.tree.token[where], positions, versions)
            good = self._canary[index] == words
            _need_all(good, where, "the token, position and version of the tree")
        if self._checksum is not None:
            for layer, (keys, values) in enumerate(self.layers):
                sums = _bit_sums(keys[index], values[index])
                good = self._checksum[layer, index] == sums
                _need_all(good, where, f"the keys and values written in layer {layer}")

    # -- inside -------------------------------------------------------------------------------

    def _words(self, ids: Ints, positions: Ints, versions: Ints | int) -> Tensor:
        """(n,) int64 on the device: the canary of these tokens."""
        words = positions << 32 ^ ids ^ np.multiply(versions, _VERSION_STEP)
        return torch.from_numpy(words).to(self.device, non_blocking=True)

    def _moved_on(self, ends: list[int]) -> TreeStep | None:
        """The last step, if these are its branches and each has got one token since."""
        old, tree = self._step, self.tree
        if old is None or old._shape != tree.shape.count or old.plan.room < 1:
            return None
        if ends != old._ends or len(old.ids) != len(ends):
            return None
        numbers = old._numbers
        length = tree.length[numbers]
        one_more = (length == old._lengths + 1) & (tree.computed[numbers] == old._lengths)
        if not one_more.all():
            return None
        slots = tree.last_slots(numbers)
        plan = old.plan.advanced(slots)
        return TreeStep(plan, tree.token[slots], slots, old.last, numbers, length, old._shape, ends)

    def _planned(self, ends: list[Node]) -> TreeStep:
        tree = self.tree
        nodes, parent, below = _paths(ends)
        numbers = np.array([node.number for node in nodes], dtype=np.int64)
        length = tree.length[numbers]
        todo = length - tree.computed[numbers]
        place = np.zeros(len(tree.length), dtype=np.int64)
        place[numbers] = np.arange(len(numbers))
        end = place[np.array([node.number for node in ends], dtype=np.int64)]
        again = np.zeros(len(nodes), dtype=bool)
        again[end] = todo[end] == 0
        rows = np.where(again, 1, todo)
        # Plain decoding: each branch has an end of its own that grows, by one token.
        is_plain = int(rows.sum()) == len(ends) and bool((rows[end] == 1).all())
        is_plain = is_plain and not again.any() and all(node.is_open for node in ends)
        slots = tree.slots_of(nodes)
        spans = Spans(
            parent=parent,
            below=below,
            start=np.array([node.start for node in nodes], dtype=np.int64),
            length=length,
            rows=rows,
            slots=slots,
            room=_ROOM if is_plain else 0,
        )
        size = self.layers[0].keys.element_size()
        on_cpu = self.device.type == "cpu"
        short, split = (_SHORT, None) if on_cpu else (0, _SPLIT)
        plan = plan_of(spans, group=self.group, kv_bytes=size, short=short, split=split)
        plan.changes, plan.made_at = tree.changes, tree.changes.count
        # The rows of a node are its last tokens.
        first = np.repeat(length.cumsum() - rows, rows)
        where = slots[first + np.arange(len(first)) - np.repeat(rows.cumsum() - rows, rows)]
        return TreeStep(
            plan,
            ids=tree.token[where],
            slots=np.where(np.repeat(again, rows), len(tree.token), where),
            last=rows.cumsum()[end] - 1,
            _numbers=numbers[rows > 0],
            _lengths=length[rows > 0],
            _shape=tree.shape.count,
            _ends=[node.number for node in ends],
        )


def _paths(ends: Sequence[Node]) -> tuple[list[Node], Ints, Ints]:
    """The nodes on the ways to `ends`, depth first; the place of each one's parent, -1 for none;
    the place behind the last one below each."""
    roots: list[Node] = []
    below: dict[int, list[Node]] = {}
    for end in ends:
        node: Node | None = end
        child: Node | None = None
        while node is not None:
            children = below.get(node.number)
            is_new = children is None
            if children is None:
                below[node.number] = children = []
            if child is not None:
                children.append(child)
            if not is_new:
                break
            child, node = node, node.parent
        else:
            assert child is not None
            roots.append(child)
    nodes: list[Node] = []
    parent: list[int] = []
    todo = [(root, -1) for root in reversed(roots)]
    while todo:
        node, above = todo.pop()
        children = below[node.number]
        if children:
            here = len(nodes)
            todo.extend([(child, here) for child in reversed(children)])
        nodes.append(node)
        parent.append(above)
    behind = list(range(1, len(nodes) + 1))
    for i in range(len(nodes) - 1, -1, -1):
        above = parent[i]
        if above >= 0 and behind[i] > behind[above]:
            behind[above] = behind[i]
    return nodes, np.array(parent, dtype=np.int64), np.array(behind, dtype=np.int64)


def _ids(tokens: Tokens | Tensor, name: str) -> Ints:
    ids = np.asarray(tokens)
    good = ids.ndim == 1 and (not len(ids) or np.issubdtype(ids.dtype, np.integer))
    checks.need(good, name, "a sequence of token ids", f"{ids.dtype} of shape {ids.shape}")
    return ids.astype(np.int64)


def _bit_sums(keys: Tensor, values: Tensor) -> Tensor:
    """(n,) int64, a sum over each token's bits in which keys and values count differently."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[keys.element_size()]
    parts = (x.contiguous().view(kind).flatten(1).long().sum(1) for x in (keys, values))
    first, second = parts
    return first + 3 * second


def _need_pure(branches: Sequence[Branch], version: int) -> None:
    for i, branch in enumerate(branches):
        written = sorted({v for _, v in branch.versions})
        good = written in ([], [version])
        checks.need(good, f"branches[{i}]", f"a text of version {version} alone", written)


def _need_current(step: TreeStep) -> None:
    checks.need(not step.plan.is_stale, "step", "one of the tree as it is", "one before a change")


def _need_all(good: Tensor, slots: Ints, needed: str) -> None:
    if not bool(good.all()):
        slot = int(slots[int((~good).nonzero()[0])])
        raise RuntimeError(f"slot {slot}: need {needed}, got others")
