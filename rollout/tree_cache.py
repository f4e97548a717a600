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
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.noise import need_distinct_streams
from rollfuse.kernels.tree_attention import KeyValues, write_key_values
from rollfuse.kernels.tree_plan import TreePlan, plan_of
from rollfuse.rollout.branch import Branch, Stream
from rollfuse.rollout.node import Node
from rollfuse.rollout.token_tree import Ints, Tokens, TokenTree
from rollfuse.rollout.tree_check import Statistics, check_tree, statistics_of
from rollfuse.rollout.tree_step import TreeStep, new_step, next_step
from rollfuse.rollout.twigs import Twigs

# The fewest keys that are worth a program of their own on a device.
_SPLIT = 256
# On the CPU reading so many keys again costs less than one more call.
_SHORT = 32
# Spreads a version over the bits that token and position leave alone.
_VERSION_STEP = 0x1E3779B97F4A7C15


class TreeCache:
    """Keys and values of a tree of texts, in pages.

    Args:
        n_layers, n_kv_heads, head_dim: of the model.
        n_heads: query heads of the model; None: as many as key-value heads.
        n_pages: pages there are, shared by all layers.
        page_size: S, tokens of a page. A frozen node leaves up to S - 1 slots unused: where texts
            part at every few tokens, as in a search, pages of 1 to 4 waste least.
        dtype, device: of the keys and values.
        canary: keep a word of (token, position, version) beside every slot that is written, on the
            device, for `check`: 8 bytes a token.
        checksum: keep a sum of the bits of every key and value, for `check`: 8 bytes a token and
            layer.

    Bytes: 2 * n_layers * n_kv_heads * head_dim * element_size a token of the pool.

    Raises:
        ValueError: a size is below 1 or the heads do not divide.
    """

    def __init__(  # noqa: PLR0913  (the signature is the published API)
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
        n_slots = n_pages * page_size + 1  # the last one for what nobody reads
        shape = (n_slots, n_kv_heads, head_dim)
        self.layers = [
            KeyValues(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))
            for _ in range(n_layers)
        ]
        self.device = self.layers[0].keys.device
        ints = torch.zeros(n_layers if checksum else 1, n_slots, dtype=torch.int64, device=device)
        self._canary = ints[0].clone() if canary else None
        self._checksum = ints if checksum else None
        self._step: TreeStep | None = None
        self._n_texts = 0  # begun by `root` and `match`
        on_cpu = self.device.type == "cpu"
        self._make_plan = partial(
            plan_of,
            group=self.group,
            kv_bytes=dtype.itemsize,
            short=_SHORT if on_cpu else 0,
            split=None if on_cpu else _SPLIT,
        )

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

    def root(self, tokens: Tokens = (), *, stream: int | None = None) -> Branch:
        """A branch of a new text.

        Raises:
            OutOfPages: it has no room.
        """
        ids = _ids(tokens, "tokens")
        branch = self._branch(self.tree.new_root(), stream)
        if len(ids):
            try:
                self.append([branch], [ids])
            except BaseException:
                branch.prune()
                raise
        return branch

    def match(
        self,
        tokens: Tokens,
        *,
        version: int | None = None,
        stream: int | None = None,
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
        return self._branch(self.tree.node_at(node, length), stream)

    def streams(self, branches: Sequence[Branch]) -> Tensor:
        """(B,) int64 on the device, the branches' streams, for `sample_tokens`.

        Raises:
            ValueError: two branches have one stream: they would be the same sample.
        """
        streams = torch.tensor([branch.stream for branch in branches], dtype=torch.int64)
        need_distinct_streams(streams)
        return streams.to(self.device, non_blocking=True)

    def positions(self, branches: Sequence[Branch]) -> Tensor:
        """(B,) int64 on the device, where each branch's next token will stand."""
        lengths = torch.tensor([len(branch) for branch in branches], dtype=torch.int64)
        return lengths.to(self.device, non_blocking=True)

    def append(self, branches: Sequence[Branch], tokens: Sequence[Tokens] | Ints | Tensor) -> None:
        """Append tokens[i] to branches[i]; a forward pass is to compute them.

        Args:
            tokens: a sequence of token ids each; or (B,) integers, one each, as an array or as a
                tensor anywhere.

        Raises:
            ValueError: a pruned branch or one that comes twice, or another number of sequences.
            OutOfPages: too few pages are free, those of retained texts included.
            Either way nothing was changed.
        """
        nodes = self._nodes_of(branches)
        distinct = len({id(branch) for branch in branches}) == len(branches)
        checks.need(distinct, "branches", "each branch once", "one twice")
        checks.need(len(tokens) == len(nodes), "tokens", f"{len(nodes)} sequences", len(tokens))
        if isinstance(tokens, Tensor):
            tokens = tokens.detach().cpu().numpy()
        if isinstance(tokens, np.ndarray) and tokens.ndim == 1:
            tokens = _ids(tokens, "tokens")
        else:
            tokens = [_ids(part, f"tokens[{i}]") for i, part in enumerate(tokens)]
        for branch, node in zip(branches, self.tree.append(nodes, tokens), strict=True):
            branch._node = node

    def plant(self, branches: Sequence[Branch], twigs: Twigs) -> list[Branch]:
        """Continue texts by several continuations each; a forward pass is to compute them.

        Args:
            twigs: one at least for each of `branches`, by their numbers.

        Returns:
            A branch for each twig. The first one of a text is the branch it had, the others are
            forks of that.

        Raises:
            ValueError, OutOfPages: as `append`.
        """
        nodes = self._nodes_of(branches)
        distinct = len({id(branch) for branch in branches}) == len(branches)
        checks.need(distinct, "branches", "each branch once", "one twice")
        found: list[Branch] = []
        begun = -1
        for parent, node in zip(twigs.parent, self.tree.plant(nodes, twigs), strict=True):
            branch = branches[parent]
            if parent > begun:
                begun, branch._node = parent, node
                node.handles += 1
            else:
                branch = branch._fork_on(node)
            found.append(branch)
        return found

    # -- forward passes -----------------------------------------------------------------------

    def plan(self, branches: Sequence[Branch], *, pure: bool = False) -> TreeStep:
        """The forward pass that computes what is not computed of the branches' texts.

        Branches that share tokens share their rows, and those that share an end the row of its
        last token. A branch that is computed whole has its last token pushed through again, without
        being written, so that it too gets logits. The next plan of the same branches, one token
        longer, is this one moved on.

        Args:
            branches: B of them, none empty, in any order; several may share an end.
            pure: refuse texts of which another version than the present one wrote a part.

        Raises:
            ValueError: no branch, an empty or pruned one; a mixed text where a pure one is asked
                for.
        """
        checks.need(len(branches) > 0, "branches", "at least one", "none")
        ends = self._nodes_of(branches)
        if pure:
            _need_pure(branches, self.version)
        step = None
        if self._step is not None:
            step = next_step(self._step, self.tree, [node.number for node in ends])
        if step is None:
            for i, node in enumerate(ends):
                good = self.tree.end(node) > 0
                checks.need(good, f"branches[{i}]", "a text of at least one token", "an empty one")
            step = new_step(self.tree, ends, self._make_plan)
        self._step = step
        return step

    def write(self, layer: int, keys: Tensor, values: Tensor, step: TreeStep) -> None:
        """Store a layer's keys and values (N, n_kv_heads, head_dim) of the rows of `step`."""
        self._need_current(step)
        slots = step.slots_on(self.device)
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
        self._need_current(step)
        self.tree.computed[step.numbers] = step.lengths

    def statistics(self) -> Statistics:
        """What is held now."""
        return statistics_of(self.tree)

    def check(self) -> None:
        """Raise RuntimeError on the first inconsistency of the tree, its pages or what is kept of
        their contents (`canary`: a wrong or stale address; `checksum`: a changed value)."""
        check_tree(self.tree)
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

    def _nodes_of(self, branches: Sequence[Branch]) -> list[Node]:
        nodes = [branch.node for branch in branches]
        ours = all(branch.is_of(self.tree) for branch in branches)
        checks.need(ours, "branches", "branches of this cache", "one of another")
        return nodes

    def _need_current(self, step: TreeStep) -> None:
        ours = step.plan.changes is self.tree.changes
        checks.need(ours, "step", "one of this cache", "one of another")
        is_current = not step.plan.is_stale
        checks.need(is_current, "step", "one of the tree as it is", "one before a change")

    def _branch(self, node: Node, stream: int | None) -> Branch:
        self._n_texts += 1
        return Branch(self.tree, node, Stream(stream, None, self._n_texts - 1))

    def _words(self, ids: Ints, positions: Ints, versions: Ints | int) -> Tensor:
        """(n,) int64 on the device: the canary of these tokens."""
        words = positions << 32 ^ ids ^ np.multiply(versions, _VERSION_STEP)
        return torch.from_numpy(words).to(self.device, non_blocking=True)


def _ids(tokens: Tokens | Tensor, name: str) -> Ints:
    if isinstance(tokens, np.ndarray) and tokens.ndim == 1 and tokens.dtype == np.int64:
        return tokens
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


def _need_all(good: Tensor, slots: Ints, needed: str) -> None:
    if not bool(good.all()):
        slot = int(slots[int((~good).nonzero()[0])])
        raise RuntimeError(f"slot {slot}: need {needed}, got others")
