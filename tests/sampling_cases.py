"""What the tests of sampling share: float64 references by sorting, and what runs on ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rollfuse import Head, Lora, Sampled, Sampling, linear_sample, linear_score, new_streams
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.noise import NoiseFamily
from rollfuse.kernels.sampling_noise import draw_keys, smallest_words

DEVICE = "cuda" if backend.name in ("cuda", "rocm") else "cpu"
INF = float("inf")
# The interpreter takes some 10 ms a row.
ROWS, FEW = (150, 8) if backend.name == "interpret" else (5000, 40)

CUTS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.05},
    {"top_p": 0.7},
    {"top_p": 0.999},
    {"min_p": 0.03},
    {"min_p": 1.0},
    {"top_k": 6, "top_p": 0.8},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.02},
]


def make_logits(n_cols: int, n_rows: int, *, ties: bool = True) -> Tensor:
    """Every other row in steps of a half, every third with a few -inf."""
    logits = torch.randn(n_rows, n_cols) * 2.5
    if ties:
        logits[::2] = (logits[::2] * 2).round() / 2
    logits[::3, : n_cols // 4] = -INF
    return logits.to(DEVICE)


def value_of(value: Any, row: int) -> Any:
    """A row's own of a field of Sampling."""
    return value[row].item() if isinstance(value, Tensor) else value


def border_of(z: list[float], sampling: Sampling, row: int, *, slack: float = 0.0) -> float:
    """How far below the largest of z (V) the last kept one is, by a sort; +inf: nothing is cut.

    The slack makes the share of top-p larger.
    """
    k, p, m = (value_of(v, row) for v in (sampling.top_k, sampling.top_p, sampling.min_p))
    ranked = sorted(z, reverse=True)
    top, border = ranked[0], -INF
    if k is not None and k < len(ranked):
        border = ranked[k - 1]
        ranked = [x for x in ranked if x >= border]
    if p is not None and p < 1.0:
        masses = torch.tensor(ranked, dtype=torch.float64).sub(top).exp()
        share = float(torch.tensor(p, dtype=torch.float32)) * (1.0 + slack)
        before = masses.cumsum(0) - masses
        last = int((before < share * masses.sum()).sum()) - 1
        border = max(border, ranked[last])
    distance = top - border
    if m is not None and m > 0:
        distance = min(distance, -float(torch.tensor(m, dtype=torch.float32).double().log()))
    return distance


def kept(z: Tensor, sampling: Sampling) -> Tensor:
    """(N, V) bool, what is left of rows z (N, V) float64, at their temperatures."""
    rows = []
    for row, values in enumerate(z.tolist()):
        top, border = max(values), border_of(values, sampling, row) * (1 + 1e-5) + 1e-6
        rows.append([top - value <= border for value in values])
    return torch.tensor(rows)


def at_temperature(logits: Tensor, sampling: Sampling) -> Tensor:
    """(N, V) float64 on the CPU."""
    temperature = sampling.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.double().unsqueeze(1).cpu()
    return logits.double().cpu() / temperature


def noised(
    z: Tensor, streams: Tensor, positions: Tensor, family: NoiseFamily = NoiseFamily.ROLLFUSE
) -> Tensor:
    """z (N, V) + the largest Gumbels in float64, from the words alone."""
    keys = draw_keys(streams.view(len(z), -1), positions, family)
    tokens = torch.arange(z.shape[1], dtype=torch.int32)
    each = [
        smallest_words(keys[:, k : k + 1], tokens, family).long() & (2**32 - 1)
        for k in range(keys.shape[1])
    ]
    u = (torch.stack(each).double() + 0.5) * 2.0**-32
    return z + (-(-(-u).log1p()).log()).amax(0)


def inputs(n_rows: int, n_cols: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_rows * n_cols)
    logits = torch.randn(n_rows, n_cols, generator=generator) * scale
    positions = torch.randint(0, 40_000, (n_rows,), generator=generator)
    return logits.to(DEVICE), new_streams(n_cols, n_rows).to(DEVICE), positions.to(DEVICE)


def check(
    got: Sampled,
    logits: Tensor,
    streams: Tensor,
    positions: Tensor,
    sampling: Sampling | None = None,
) -> None:
    sampling = sampling or Sampling()
    got = Sampled(*(values.cpu() for values in got))
    z = at_temperature(logits, sampling)
    if (sampling.top_k, sampling.top_p, sampling.min_p) != (None, None, None):
        z = z.where(kept(z, sampling), -INF)
    score = noised(z, streams.cpu(), positions.cpu(), sampling.noise)
    # Rounded scores may swap two tokens closer than a few ulp of the largest: near-ties.
    drawn = score.gather(1, got.ids.unsqueeze(1)).squeeze(1)
    swapped = got.ids != score.argmax(1)
    assert (score.amax(1) - drawn).max() <= 4e-6
    assert int(swapped.sum()) <= 1 + logits.shape[0] // 1000
    logps = z.log_softmax(1)
    logp = logps.gather(1, got.ids.unsqueeze(1)).squeeze(1)
    entropy = -torch.where(z == -INF, 0.0, logps.exp() * logps).sum(1)
    assert got.ids.dtype == torch.int64
    assert got.logp.dtype == got.entropy.dtype == got.support.dtype
    assert torch.allclose(got.logp.double(), logp, rtol=2e-6, atol=2e-6)
    assert torch.allclose(got.entropy.double(), entropy, rtol=2e-6, atol=2e-6)


def chi_square(ids: Tensor, p: Tensor) -> float:
    """Of counts of ids against probabilities (V,); infinite if what cannot be was drawn."""
    counts = torch.bincount(ids.cpu(), minlength=len(p)).double()
    if bool((counts[p == 0] > 0).any()):
        return INF
    counts, expected = counts[p > 0], p[p > 0] * len(ids)
    return float(((counts - expected) ** 2 / expected).sum())


# ---- on ranks

SPLITS = {1: [301], 2: [120, 181], 3: [1, 99, 201]}


def split_head(
    n_ranks: int, rank: int, *, group: Any = None, **options: Any
) -> tuple[Tensor, Head]:
    """Hidden rows (20, 16) and this rank's columns of one head of 301."""
    torch.manual_seed(5)
    hidden, weight, bias = torch.randn(20, 16), torch.randn(301, 16), torch.randn(301)
    lora = Lora(torch.randn(3, 16), torch.randn(301, 3), 0.3)
    start = sum(SPLITS[n_ranks][:rank])
    mine = slice(start, start + SPLITS[n_ranks][rank])
    lora = Lora(lora.a, lora.b[mine], lora.scale)
    return hidden, Head(weight[mine], bias[mine], 0.7, 9.0, lora=lora, group=group)


def draw_on_rank() -> list[Tensor]:
    """What a rank draws, and what it says of given tokens."""
    hidden, head = split_head(dist.get_world_size(), dist.get_rank(), group=dist.group.WORLD)
    return drawn_and_scored(hidden, head)


def drawn_and_scored(hidden: Tensor, head: Head) -> list[Tensor]:
    streams = new_streams(1, 40).view(20, 2)
    sampling = Sampling(torch.linspace(0.5, 1.5, 20))
    drawn = linear_sample(hidden, head, streams, torch.arange(20), sampling)
    return [*drawn, *linear_score(hidden, head, torch.arange(20) * 15, sampling)]


def refusals_on_rank() -> list[str]:
    hidden, head = split_head(dist.get_world_size(), dist.get_rank(), group=dist.group.WORLD)
    found = []
    for options in ({"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}):
        try:
            linear_sample(hidden, head, new_streams(1, 20), torch.arange(20), Sampling(**options))
        except ValueError as error:
            found.append(str(error))
    return found
