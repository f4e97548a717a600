"""Head: the LM head as the ops see it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.rows import Transform


@dataclass(frozen=True, slots=True)
class Head:
    """z = softcap(scale * (h W' + b)) / temperature, in this order; softcap(x) = c tanh(x / c).

    Args:
        weight: (V, D), float32, bfloat16, float16 or float64; tied embeddings are welcome.
        bias: (V,) or None.
        scale: factor on the logits, > 0 (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: c > 0 in logit units (Gemma 2's final_logit_softcapping), or None.

    Raises:
        TypeError, ValueError: a shape, dtype, device or value is wrong.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        checks.need_float(self.weight, "weight")
        checks.need(self.weight.dim() == 2, "weight", "shape (V, D)", tuple(self.weight.shape))
        good = min(self.weight.shape) > 0
        checks.need(good, "weight", "V >= 1 and D >= 1", tuple(self.weight.shape))
        if self.bias is not None:
            checks.need_float(self.bias, "bias")
            checks.need_shape(self.bias, (self.weight.shape[0],), "bias", "one a token id")
            checks.need_same_device(self.bias, self.weight, "bias", "weight")
        good = 0.0 < self.scale < math.inf
        checks.need(good, "scale", "a finite value > 0", self.scale)
        if self.softcap is not None:
            good = 0.0 < self.softcap < math.inf
            checks.need(good, "softcap", "a finite value > 0, or None", self.softcap)

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def transform(self, temperature: Tensor, dtype: torch.dtype) -> Transform:
        """The map from a raw product h W' to z for slots at `temperature` (S,)."""
        bias = None if self.bias is None else self.bias.detach().to(dtype).contiguous()
        if self.softcap is None:
            return Transform(self.scale / temperature.to(dtype), bias)
        return Transform(self.softcap / temperature.to(dtype), bias, self.scale / self.softcap)


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
