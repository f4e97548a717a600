"""The cases of `bench sampling`: hidden states and a head, and what tokens are drawn with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.kernels.noise import new_streams
from rollfuse.kernels.sampling import Sampling

# Standard deviation of the logits: entropies of a few nats over 150,000 tokens.
_SPREAD = 4.0


@dataclass(frozen=True, slots=True)
class Case:
    """One size. `drafts`: verify rows / drafts tokens each of so many drafts; 0: draw from rows."""

    rows: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    top_k: int | None = None
    top_p: float | None = None
    drafts: int = 0

    @property
    def name(self) -> str:
        cuts = f" top-k {self.top_k}" if self.top_k else ""
        cuts += f" top-p {self.top_p}" if self.top_p else ""
        what = f" verify {self.drafts} drafts" if self.drafts else ""
        return f"{self.rows}x{self.hidden}x{self.vocab} {self.dtype}{cuts}{what}"

    @property
    def sampling(self) -> Sampling:
        return Sampling(top_k=self.top_k, top_p=self.top_p)

    def flops(self) -> int:
        return 2 * self.rows * self.hidden * self.vocab


class Inputs(NamedTuple):
    case: Case
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    streams: Tensor  # (N,)
    positions: Tensor  # (N,)


def make_inputs(case: Case, device: torch.device, *, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    randn = partial(torch.randn, generator=generator, device=device)
    hidden = randn(case.rows, case.hidden).to(dtype)
    weight = (randn(case.vocab, case.hidden) * (_SPREAD / case.hidden**0.5)).to(dtype)
    positions = torch.arange(case.rows, device=device)
    return Inputs(case, hidden, weight, new_streams(seed, case.rows).to(device), positions)
