"""Head: the LM head as its owner describes it, and as a pass reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.rows import Transform, compute_dtype
from rollfuse.kernels.shard import Shard, join_shards

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Lora:
    """A low-rank adapter of the head: h W' becomes h W' + scale * (h A') B', never merged.

    Args:
        a: (r, D), PEFT's lora_A.weight.
        b: (V, r), PEFT's lora_B.weight; as many rows as the head's weight.
        scale: finite, lora_alpha / r (lora_alpha / sqrt(r) for rsLoRA).

    Raises:
        TypeError, ValueError: a shape, dtype, device or value is wrong.

    Source: Hu et al., LoRA, arXiv 2106.09685.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        checks.need_float(self.a, "lora.a")
        checks.need_float(self.b, "lora.b")
        checks.need(self.a.dim() == 2, "lora.a", "shape (r, D)", tuple(self.a.shape))
        rank = self.a.shape[0]
        good = self.b.dim() == 2 and self.b.shape[1] == rank
        checks.need(good, "lora.b", f"shape (V, {rank}), the rank of a", tuple(self.b.shape))
        checks.need(rank >= 1, "lora.a", "r >= 1", rank)
        checks.need_same_device(self.b, self.a, "lora.b", "lora.a")
        good = -math.inf < self.scale < math.inf
        checks.need(good, "lora.scale", "a finite value", self.scale)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def filled_up(self, multiple: int) -> Lora:
        """The same with rows of 0 in `a` and columns of 0 in `b` up to a multiple of the rank."""
        missing = -self.rank % multiple
        if not missing:
            return self
        pad = torch.nn.functional.pad
        return Lora(pad(self.a, (0, 0, 0, missing)), pad(self.b, (0, missing)), self.scale)


@dataclass(frozen=True, slots=True)
class Head:
    """z = softcap(scale * (h W' + b)) / temperature, in this order; softcap(x) = c tanh(x / c).

    Args:
        weight: (V, D), float32, bfloat16, float16 or float64; tied embeddings are welcome.
        bias: (V,) or None.
        scale: factor on the logits, > 0 (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: c > 0 in logit units (Gemma 2's final_logit_softcapping), or None.
        vocab: how many rows of the weight are tokens, if the last ones only pad it to a round
            number: padding is in no softmax and gets gradients of 0. None: all.
        lora: an adapter beside the weight, or None.
        main_grad: (V, D) contiguous, float32 (float64 beside a float64 weight), or None. The
            weight's gradient is added to it in the backward, whatever that was asked for, and the
            weight's own `grad` stays as it is, as in Megatron's fused gradient accumulation.
        group: the weight is this rank's rows of a vocabulary split over the group's ranks, in their
            order. All ranks make the Head together (it is a collective; make it once and keep it)
            and call an op with the same hidden states, batch and plan; targets are ids of the whole
            vocabulary. Either on all of them `hidden` requires grad or on none: it is not checked,
            and ranks would wait for a sum that the others skip. They all get the same values and
            the whole gradient of `hidden`; weight, bias and lora.b keep to the shard, lora.a is
            whole on every rank.
        sequence_parallel: with a group, `hidden` holds this rank's (R / ranks, D) rows, as many as
            every other's: they are gathered, and the gradient is scattered back.

    Raises:
        TypeError, ValueError: a shape, dtype, device or value is wrong, or ranks disagree.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None
    lora: Lora | None = None
    main_grad: Tensor | None = None
    group: ProcessGroup | None = None
    sequence_parallel: bool = False
    shard: Shard | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        weight = self.weight
        named = zip(("weight", "bias", "lora.a", "lora.b"), self.parameters, strict=True)
        for name, parameter in named:
            if parameter is not None:
                _need_whole(parameter, name)
        checks.need_float(weight, "weight")
        checks.need(weight.dim() == 2, "weight", "shape (V, D)", tuple(weight.shape))
        good = min(weight.shape) > 0
        checks.need(good, "weight", "V >= 1 and D >= 1", tuple(weight.shape))
        if self.bias is not None:
            checks.need_float(self.bias, "bias")
            checks.need_shape(self.bias, (weight.shape[0],), "bias", "one a token id")
            checks.need_same_device(self.bias, weight, "bias", "weight")
        good = 0.0 < self.scale < math.inf
        checks.need(good, "scale", "a finite value > 0", self.scale)
        if self.softcap is not None:
            good = 0.0 < self.softcap < math.inf
            checks.need(good, "softcap", "a finite value > 0, or None", self.softcap)
        if self.vocab is not None:
            good = 0 < self.vocab <= weight.shape[0]
            checks.need(good, "vocab", f"a number from 1 to {weight.shape[0]}", self.vocab)
        if self.lora is not None:
            _check_lora(self.lora, weight)
        if self.main_grad is not None:
            _check_main_grad(self.main_grad, weight)
        if self.group is not None:
            object.__setattr__(self, "shard", _join(self, self.group))
        else:
            checks.need(
                not self.sequence_parallel, "sequence_parallel", "a group to scatter over", "none"
            )

    @property
    def vocabulary(self) -> int:
        """Token ids there are, on all ranks of the group."""
        return self.shard.total if self.shard is not None else self.local_vocabulary

    @property
    def local_vocabulary(self) -> int:
        """Token ids this rank has."""
        return self.weight.shape[0] if self.vocab is None else self.vocab

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(weight, bias, lora.a, lora.b), which may need gradients."""
        a, b = (None, None) if self.lora is None else (self.lora.a, self.lora.b)
        return self.weight, self.bias, a, b

    def n_rows(self, hidden: Tensor) -> int:
        """R, over all ranks that hold rows of `hidden`."""
        scattered = self.shard is not None and self.sequence_parallel
        return hidden.shape[0] * (self.shard.n_ranks if scattered and self.shard else 1)


@dataclass(frozen=True, slots=True)
class BareHead:
    """A head as a pass reads it: detached, without padding."""

    weight: Tensor  # (V, D), V of this rank
    bias: Tensor | None
    lora: Lora | None
    scale: float
    softcap: float | None
    padding: int  # rows of the parameters that are no tokens
    main_grad: Tensor | None  # (V, D)
    shard: Shard | None
    scattered: bool  # this rank has 1 / ranks of the hidden rows

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def transform(
        self,
        temperature: Tensor,
        dtype: torch.dtype,
        support: Tensor | None = None,
        *,
        invariant: bool = False,
    ) -> Transform:
        """The map from a raw product h W' to z for slots at `temperature` (S,).

        support: (S,) nats below the maximum past which there is no probability.
        """
        bias = None if self.bias is None else self.bias.to(dtype).contiguous()
        pre_scale = None if self.softcap is None else self.scale / self.softcap
        factor = (self.scale if self.softcap is None else self.softcap) / temperature.to(dtype)
        reach = None if support is None else support / factor
        return Transform(factor, bias, pre_scale, reach, invariant)

    def all_rows(self, hidden: Tensor) -> Tensor:
        """(R, D) hidden rows of all ranks."""
        if self.shard is None or not self.scattered:
            return hidden
        return self.shard.gather_rows(hidden)

    def sum_of_rows(self, dhidden: Tensor) -> Tensor:
        """The gradient of `hidden` from this rank's part (R, D) of it."""
        if self.shard is None:
            return dhidden
        if self.scattered:
            return self.shard.scatter_rows(dhidden)
        return self.shard.sum_over_ranks(dhidden)


def bare(head: Head) -> BareHead:
    n = head.local_vocabulary
    lora = head.lora
    if lora is not None:
        lora = Lora(lora.a.detach(), lora.b.detach()[:n], lora.scale)
    return BareHead(
        head.weight.detach()[:n],
        None if head.bias is None else head.bias.detach()[:n],
        lora,
        head.scale,
        head.softcap,
        head.weight.shape[0] - n,
        None if head.main_grad is None else head.main_grad[:n],
        head.shard,
        head.sequence_parallel,
    )


def as_head(head: Head | Tensor) -> Head:
    return head if isinstance(head, Head) else Head(head)


def flatten_hidden(hidden: Tensor, head: Head) -> Tensor:
    """`hidden` as (R, D), checked against the head."""
    checks.need_float(hidden, "hidden")
    good = hidden.dim() >= 2 and hidden.shape[-1] == head.width
    checks.need(
        good, "hidden", f"shape (R, {head.width}) or (B, L, {head.width})", tuple(hidden.shape)
    )
    checks.need_same_device(head.weight, hidden, "weight", "hidden")
    return hidden.flatten(0, -2)


def operand_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """The dtype the operands of the products are rounded to.

    Inside an autocast region what `torch.nn.functional.linear` would use there; elsewhere the wider
    of the two. Logits, statistics and weight gradients are float32 (float64) either way.
    """
    promoted = torch.promote_types(hidden.dtype, head.weight.dtype)
    device = hidden.device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return promoted


def lora_operand_dtype(lora: Lora, operand: torch.dtype) -> torch.dtype:
    """The dtype the operands of an adapter's products are rounded to: wide if it has wide ones."""
    promoted = torch.promote_types(lora.a.dtype, lora.b.dtype)
    return operand if torch.promote_types(operand, promoted) == operand else compute_dtype(operand)


def _need_whole(parameter: Tensor, name: str) -> None:
    """Refuse the shards FSDP leaves in a module, and say how to get at the parameter."""
    if hasattr(parameter, "full_tensor"):
        raise TypeError(
            f"{name}: need a plain tensor, got a DTensor (FSDP2 or tensor parallelism); pass its "
            "full_tensor(grad_placements=[Partial()]), whose gradient is summed over the ranks and "
            "goes back to the shards, or, if it is split over the vocabulary and every rank has "
            "the same tokens, its to_local() with group="
        )
    is_empty = isinstance(parameter, Tensor) and parameter.dim() == 1 and parameter.numel() == 0
    if name == "weight" and is_empty:
        raise ValueError(
            "weight: need shape (V, D), got the empty rest FSDP leaves of a sharded parameter; "
            "gather it first (FSDP.summon_full_params, or compute the loss inside the wrapped "
            "module's forward)"
        )


def _check_lora(lora: Lora, weight: Tensor) -> None:
    n_rows, width = weight.shape
    checks.need_shape(lora.a, (lora.rank, width), "lora.a", "as wide as the weight")
    checks.need_shape(lora.b, (n_rows, lora.rank), "lora.b", "one row a row of the weight")
    checks.need_same_device(lora.a, weight, "lora.a", "weight")


def _check_main_grad(main_grad: Tensor, weight: Tensor) -> None:
    checks.need_float(main_grad, "main_grad")
    checks.need_shape(main_grad, tuple(weight.shape), "main_grad", "as the weight")
    checks.need_same_device(main_grad, weight, "main_grad", "weight")
    wide = compute_dtype(weight.dtype)
    checks.need(main_grad.dtype == wide, "main_grad", str(wide), main_grad.dtype)
    checks.need(main_grad.is_contiguous(), "main_grad", "a contiguous tensor", "a strided one")
    checks.need(not main_grad.requires_grad, "main_grad", "no gradient of its own", "requires_grad")
    checks.need(weight.requires_grad, "main_grad", "a weight that requires grad", "a frozen one")


def _join(head: Head, group: ProcessGroup) -> Shard:
    traits = {
        "width": float(head.width),
        "scale": head.scale,
        "softcap": head.softcap or 0.0,
        "bias": float(head.bias is not None),
        "rank of lora": 0.0 if head.lora is None else float(head.lora.rank),
        "scale of lora": 0.0 if head.lora is None else head.lora.scale,
        "sequence_parallel": float(head.sequence_parallel),
        # These steer the plan, which must be one.
        "main_grad": float(head.main_grad is not None),
    }
    names = ("weight", "bias", "lora.a", "lora.b")
    for name, parameter in zip(names, head.parameters, strict=True):
        if parameter is not None:
            traits[f"dtype of {name}"] = float(checks.FLOATS.index(parameter.dtype))
            traits[f"requires_grad of {name}"] = float(parameter.requires_grad)
        else:
            traits |= {f"dtype of {name}": -1.0, f"requires_grad of {name}": 0.0}
    return join_shards(group, head.local_vocabulary, traits, head.weight.device)
