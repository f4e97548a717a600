"""TokenBatch: what a policy loss knows about each token, in one place.

The unit is a *pair*: a hidden row and the target token it predicts. A plain sequence has one pair
per row; in a tree a shared row has several. Legend: B sequences, L padded length, P pairs, R hidden
rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from rollfuse.kernels import checks

# (mask (P,) bool, cu_seqlens (B + 1,) int64, denominator) -> weights (P,) float32
Reduction = Callable[[Tensor, Tensor, "Tensor | float | None"], Tensor]

_PAIR_FLOATS = ("weights", "advantages", "logp_old", "logp_behaviour", "logp_ref")
_PAIR_FIELDS = (*_PAIR_FLOATS, "targets", "known", "rows", "temperature", "support", "version")


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """P pairs in sequence order and everything an objective may ask about them.

    Args:
        targets: (P,) int64, the token predicted by `hidden[rows[p]]`, in [0, V).
        weights: (P,) float32, what a reduction made; the loss is sum(weights * objective).
        advantages: (P,) float32.
        logp_old: (P,) float32, nats, under the policy at the start of the step.
        logp_behaviour: (P,) float32, nats, under the distribution the token was drawn from.
        known: (P,) bool, False where that distribution is unknown (None: known everywhere).
        logp_ref: (P,) float32, nats, under the reference policy.
        rows: (P,) int64, the hidden row of each pair; None means pair p has row p.
        temperature: positive; one float, or (P,) float32.
        support: (P,) float32, nats >= 0: how far below the row's most likely token (after softcap
            and temperature) a token could be when this one was drawn; inf: no cut. The others have
            no probability, the target itself always has. A token within 1e-5 of the border stays:
            a sampler may store how far below the last token was that it kept; for min-p it is
            -log(min_p). Log-probs, entropies and gradients are then those of what is left.
        version: (P,) int64, the policy version that drew the token.
        cu_seqlens: (B + 1,) int64, where each sequence's pairs start and end, from 0 to P.
        scalars: 0-d tensors an objective reads: hyper-parameters that change while training.
        extra: (P,) tensors of the caller's own.
        padded_shape: (B, L) where the batch came from padded tensors; see `to_padded`.

    Raises:
        TypeError, ValueError: a shape, dtype, device or (for tensors on the CPU) value is wrong.
    """

    targets: Tensor
    weights: Tensor
    advantages: Tensor | None = None
    logp_old: Tensor | None = None
    logp_behaviour: Tensor | None = None
    known: Tensor | None = None
    logp_ref: Tensor | None = None
    rows: Tensor | None = None
    temperature: Tensor | float = 1.0
    support: Tensor | None = None
    version: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    padded_shape: tuple[int, int] | None = None
    # The same batch on the CPU where it was built there: spares the ops their one host sync.
    # Only `to` sets it, so that a changed copy cannot carry a stale one.
    host: TokenBatch | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        _check_structure(self)
        # Elsewhere looking at values would wait, or break a graph: the ops flag wrong ones.
        problem = self.value_problem() if checks.may_read(self.targets) else None
        if problem is not None:
            raise ValueError(problem)

    def __len__(self) -> int:
        return self.targets.shape[0]

    @property
    def device(self) -> torch.device:
        return self.targets.device

    # -- building ---------------------------------------------------------------------------

    @classmethod
    def from_padded(
        cls,
        ids: Tensor,
        mask: Tensor,
        *,
        reduction: Reduction,
        denominator: Tensor | float | None = None,
        **per_token: Tensor | float | Mapping[str, Tensor] | None,
    ) -> TokenBatch:
        """Pairs of the tokens that `mask` selects in padded sequences, shifted once, here.

        The hidden states to pass along are the model's output for `ids`, (B, L, D) or (B * L, D):
        row b * L + t - 1 predicts token (b, t).

        Args:
            ids: (B, L) int64, prompt and response with any padding.
            mask: (B, L) bool, True on tokens to learn from (False on prompts and padding). Integers
                of 0 and 1 will do, as trainers have them.
            reduction: `token_mean`, `sequence_mean`, ...; makes the weights.
            denominator: the reduction's denominator over the whole step (None: this batch's own).
            per_token: any other field of TokenBatch. Tensors are (B,), one value a sequence;
                (B, L), aligned with `ids`; or (B, L - 1), where column t belongs to token t + 1.

        Raises:
            TypeError: a dtype is wrong; floats are no mask.
            ValueError: shapes differ, or `mask` selects a first token, which nothing predicts.
        """
        checks.need_int(ids, "ids")
        checks.need(ids.dim() == 2, "ids", "shape (B, L)", tuple(ids.shape))
        checks.need_marks(mask, "mask")
        checks.need_shape(mask, tuple(ids.shape), "mask", "the shape of ids")
        n_sequences, length = ids.shape
        mask = mask.to(device=ids.device, dtype=torch.bool)
        flat = mask.reshape(-1).nonzero().squeeze(1)  # (P,)
        first = mask[:, 0].any() if length else torch.zeros((), dtype=torch.bool)
        checks.need(not bool(first), "mask", "False on first tokens (no row predicts them)", "True")
        cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))

        def pick(name: str, value: Tensor) -> Tensor:
            checks.need_tensor(value, name)
            return _pick_padded(name, value.to(ids.device), n_sequences, length, flat)

        return _assemble(
            ids.reshape(-1)[flat].long(),
            flat - 1,
            cu_seqlens,
            reduction,
            denominator,
            per_token,
            pick,
            (n_sequences, length),
        )

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        *,
        reduction: Reduction,
        denominator: Tensor | float | None = None,
        ignore_index: int = -100,
        **per_token: Tensor | float | Mapping[str, Tensor] | None,
    ) -> TokenBatch:
        """`from_padded` from the labels of a causal language model, aligned with its input ids.

        First labels are left out, as transformers does: no row predicts them. `token_mean` without
        a denominator is then the mean of its loss.

        Args:
            labels: (B, L) int64, `ignore_index` where nothing is learnt.
            reduction, denominator, per_token: as in `from_padded`; `num_items_in_batch` of
                transformers' Trainer is such a denominator.
            ignore_index: no token's id.
        """
        checks.need_int(labels, "labels")
        checks.need(labels.dim() == 2, "labels", "shape (B, L)", tuple(labels.shape))
        mask = labels != ignore_index
        mask[:, :1] = False
        ids = labels.masked_fill(~mask, 0)
        return cls.from_padded(ids, mask, reduction=reduction, denominator=denominator, **per_token)

    @classmethod
    def from_sequences(
        cls,
        ids: Sequence[Tensor],
        mask: Sequence[Tensor],
        *,
        reduction: Reduction,
        denominator: Tensor | float | None = None,
        **per_token: Sequence[Tensor] | Tensor | float | Mapping[str, Tensor] | None,
    ) -> TokenBatch:
        """Pairs of sequences packed end to end, without padding.

        The hidden states to pass along are the model's output for `torch.cat(ids)`, (sum L_b, D).

        Args:
            ids: B tensors (L_b,) int64.
            mask: B tensors (L_b,) bool or integers, as in `from_padded`.
            reduction, denominator: as in `from_padded`.
            per_token: any other field: a list of B tensors (L_b,), aligned with the tokens, or
                one tensor (B,) with a value a sequence.
        """
        checks.need(len(ids) > 0, "ids", "at least one sequence", 0)
        checks.need(len(mask) == len(ids), "mask", f"{len(ids)} sequences", len(mask))
        device = ids[0].device
        for b, (row, row_mask) in enumerate(zip(ids, mask, strict=True)):
            checks.need_int(row, f"ids[{b}]")
            checks.need(row.dim() == 1, f"ids[{b}]", "shape (L_b,)", tuple(row.shape))
            checks.need_marks(row_mask, f"mask[{b}]")
            checks.need_shape(row_mask, tuple(row.shape), f"mask[{b}]", "the shape of its ids")
        lengths = torch.tensor([len(row) for row in ids], device=device)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        packed_mask = torch.cat([m.to(device=device, dtype=torch.bool) for m in mask])
        flat = packed_mask.nonzero().squeeze(1)
        first = packed_mask[starts[:-1][lengths > 0]].any()
        checks.need(not bool(first), "mask", "False on first tokens (no row predicts them)", "True")
        counts = torch.nn.functional.pad(packed_mask.long().cumsum(0), (1, 0))

        def pick(name: str, value: Tensor | Sequence[Tensor]) -> Tensor:
            if isinstance(value, Tensor):
                checks.need_shape(value, (len(ids),), name, "one value a sequence")
                return value.to(device).repeat_interleave(lengths)[flat]
            checks.need(len(value) == len(ids), name, f"{len(ids)} sequences", len(value))
            for b, (row, like) in enumerate(zip(value, ids, strict=True)):
                checks.need_tensor(row, f"{name}[{b}]")
                checks.need_shape(row, tuple(like.shape), f"{name}[{b}]", "the shape of its ids")
            return torch.cat([row.to(device) for row in value])[flat]

        return _assemble(
            torch.cat([row.to(device) for row in ids])[flat].long(),
            flat - 1,
            counts[starts],
            reduction,
            denominator,
            per_token,
            pick,
            None,
        )

    # -- using ------------------------------------------------------------------------------

    def select(self, index: Tensor) -> TokenBatch:
        """The pairs `index` (n,) int64 or (P,) bool, each still on its own hidden row.

        Sequences lose their borders (cu_seqlens); see `keep`.
        """
        picked = {
            name: value[index]
            for name in _PAIR_FIELDS
            if isinstance(value := getattr(self, name), Tensor)
        }
        if self.rows is None:
            picked["rows"] = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        extra = {name: value[index] for name, value in self.extra.items()}
        return _unchecked(
            self, **picked, extra=extra, cu_seqlens=None, padded_shape=None, host=None
        )

    def keep(self, index: Tensor) -> TokenBatch:
        """The pairs `index` (n,) int64, ascending, with the sequences' borders moved along."""
        kept = self.select(index)
        if self.cu_seqlens is None:
            return kept
        return _unchecked(kept, cu_seqlens=torch.searchsorted(index, self.cu_seqlens))

    def to(self, device: torch.device | str) -> TokenBatch:
        """The batch on another device. One that leaves the CPU remembers what it held there."""
        device = torch.device(device)
        if device == self.device:
            return self
        # A copy to the CPU must be there before it is read.
        wait_free = device.type != "cpu"

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=wait_free)

        moved: dict[str, object] = {
            f.name: move(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        moved["scalars"] = {name: move(value) for name, value in self.scalars.items()}
        moved["extra"] = {name: move(value) for name, value in self.extra.items()}
        if device.type == "cpu":
            host = None
        else:
            host = self if self.device.type == "cpu" else self.host
        return _unchecked(self, **moved, host=host)

    def to_padded(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """(P,) values of a `from_padded` batch back at their tokens' places, (B, L)."""
        if self.padded_shape is None or self.rows is None:
            raise ValueError("to_padded: need a batch made by from_padded, got one that was not")
        checks.need_shape(values, (len(self),), "values", "one a pair")
        out = values.new_full((self.padded_shape[0] * self.padded_shape[1],), fill)
        out[self.rows + 1] = values
        return out.view(self.padded_shape)

    def value_problem(self) -> str | None:
        """The first wrong value in words, or None. Reads the data: a host sync on a device."""
        for name, bad, needed in self._value_tests():
            if bool(bad):
                return f"{name}: need {needed}, got a value that is not"
        return None

    def any_bad_value(self) -> Tensor:
        """0-d bool on the batch's device, True if a value is wrong; no host sync."""
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        for _, wrong, _ in self._value_tests():
            bad = bad | wrong
        return bad

    def _value_tests(self) -> list[tuple[str, Tensor, str]]:
        """(field, 0-d bool "something is wrong", what was needed) for each test of values."""
        tests = [("targets", (self.targets < 0).any(), "token ids >= 0")]
        for name in _PAIR_FLOATS:
            value: Tensor | None = getattr(self, name)
            if value is None:
                continue
            if name.startswith("logp"):
                # -inf is a legal log-prob (a token the policy forbids); NaN and +inf are not.
                tests.append((name, ~(value < torch.inf).all(), "log-probs in nats, not NaN"))
            else:
                tests.append((name, ~value.isfinite().all(), "finite values"))
        if isinstance(self.temperature, Tensor):
            good = self.temperature.isfinite() & (self.temperature > 0)
            tests.append(("temperature", ~good.all(), "finite values > 0"))
        if self.support is not None:
            tests.append(("support", ~(self.support >= 0).all(), "nats >= 0, not NaN"))
        if self.rows is not None:
            tests.append(("rows", (self.rows < 0).any(), "row indices >= 0"))
        if self.cu_seqlens is not None:
            rising = (self.cu_seqlens.diff() >= 0).all() & (self.cu_seqlens[0] == 0)
            whole = rising & (self.cu_seqlens[-1] == len(self))
            tests.append(("cu_seqlens", ~whole, "non-decreasing from 0 to P, the number of pairs"))
        return tests


def _check_structure(batch: TokenBatch) -> None:
    checks.need_int(batch.targets, "targets")
    checks.need(batch.targets.dim() == 1, "targets", "shape (P,)", tuple(batch.targets.shape))
    shape = (len(batch),)
    named = [(name, getattr(batch, name)) for name in _PAIR_FIELDS]
    named += [(f"extra[{name!r}]", value) for name, value in batch.extra.items()]
    for name, value in named:
        optional = name not in ("targets", "weights")
        shared = name == "temperature" and isinstance(value, float | int)  # checked below
        if shared or (value is None and optional):
            continue
        checks.need_tensor(value, name)
        checks.need_shape(value, shape, name, "one value a pair")
        checks.need_same_device(value, batch.targets, name, "targets")
        checks.need(not value.requires_grad, name, "a tensor without gradient", "requires_grad")
        if name in (*_PAIR_FLOATS, "temperature", "support"):
            checks.need_float(value, name)
        if name in ("rows", "version"):
            checks.need_int(value, name)
        if name == "known":
            checks.need_bool(value, name)
    if not isinstance(batch.temperature, Tensor):
        good = 0.0 < float(batch.temperature) < float("inf")
        checks.need(good, "temperature", "a finite value > 0", batch.temperature)
    if batch.cu_seqlens is not None:
        checks.need_int(batch.cu_seqlens, "cu_seqlens")
        good = batch.cu_seqlens.dim() == 1 and batch.cu_seqlens.shape[0] >= 1
        checks.need(good, "cu_seqlens", "shape (B + 1,)", tuple(batch.cu_seqlens.shape))
    for name, value in batch.scalars.items():
        checks.need_tensor(value, f"scalars[{name!r}]")
        checks.need_shape(value, (), f"scalars[{name!r}]", "a 0-d tensor")


def _unchecked(batch: TokenBatch, **changes: object) -> TokenBatch:
    """`replace` without the checks: the values were checked when `batch` was built."""
    made = object.__new__(TokenBatch)
    for f in fields(TokenBatch):
        object.__setattr__(made, f.name, changes.get(f.name, getattr(batch, f.name)))
    return made


def _pick_padded(name: str, value: Tensor, n: int, length: int, flat: Tensor) -> Tensor:
    """Values of the tokens `flat` from a (B,), (B, L) or (B, L - 1) tensor."""
    if tuple(value.shape) == (n, length):
        return value.reshape(-1)[flat]
    if tuple(value.shape) == (n, length - 1):
        return value.reshape(-1)[flat - 1 - flat // length]
    need = f"shape {(n, length)}, {(n, length - 1)} or {(n,)}"
    checks.need(tuple(value.shape) == (n,), name, need, tuple(value.shape))
    return value[flat // length]


def _assemble(  # noqa: PLR0913  (one call from each of two constructors)
    targets: Tensor,
    rows: Tensor,
    cu_seqlens: Tensor,
    reduction: Reduction,
    denominator: Tensor | float | None,
    per_token: Mapping[str, object],
    pick: Callable[..., Tensor],
    padded_shape: tuple[int, int] | None,
) -> TokenBatch:
    """The batch of the picked tokens: fields picked, weights made by the reduction."""
    allowed = {f.name for f in fields(TokenBatch)} - {
        "targets", "weights", "rows", "cu_seqlens", "padded_shape", "host",
    }  # fmt: skip
    unknown = set(per_token) - allowed
    if unknown:
        raise TypeError(f"need fields among {sorted(allowed)}, got {sorted(unknown)}")
    picked: dict[str, Any] = {}
    for name, value in per_token.items():
        if name == "extra" and isinstance(value, Mapping):
            picked[name] = {k: pick(f"extra[{k!r}]", v) for k, v in value.items()}
        elif name == "scalars" or value is None or isinstance(value, float | int):
            picked[name] = value
        else:
            picked[name] = pick(name, value)
    if not callable(reduction):
        raise TypeError(f"reduction: need a function such as token_mean, got {reduction!r}")
    everyone = torch.ones_like(targets, dtype=torch.bool)
    weights = reduction(everyone, cu_seqlens, denominator)
    batch = TokenBatch(
        targets=targets,
        weights=weights,
        rows=rows,
        cu_seqlens=cu_seqlens,
        padded_shape=padded_shape,
    )
    return replace(batch, **picked)
