"""Checks of drawing and verifying on the device at hand, against the same on the CPU in float64.

Noise is the same words everywhere, so tokens must agree, near-ties of float32 logits apart; of a
cut distribution also the number that describes the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rollfuse.bench.card import Result
from rollfuse.kernels.drafts import Draft
from rollfuse.kernels.head import Head
from rollfuse.kernels.linear_sampling import linear_sample
from rollfuse.kernels.noise import NoiseFamily, new_streams
from rollfuse.kernels.rejection import lenient
from rollfuse.kernels.sampling import Sampled, Sampling, sample_tokens
from rollfuse.kernels.target import Target
from rollfuse.kernels.verification import Rule, coupled, coupled_list, one_hot, verify

ROWS, VOCABULARY, WIDTH = 512, 5003, 72
# Tokens or verdicts that may differ: rows in which two tokens are within rounding of each other.
_NEAR_TIES = 4
_BOUND = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 1e-3}  # nats, of the same logits

SAMPLINGS = {
    "plain": Sampling(0.7),
    "top-k": Sampling(0.7, top_k=50),
    "top-p": Sampling(top_p=0.8),
    "min-p": Sampling(min_p=0.02),
    "all cuts": Sampling(0.9, top_k=200, top_p=0.9, min_p=0.01),
    "vLLM's noise": Sampling(noise=NoiseFamily.VLLM),
}


class Inputs(NamedTuple):
    """On the CPU, exactly representable in the dtype under test."""

    logits: Tensor  # (N, V)
    streams: Tensor
    positions: Tensor


def make_inputs(dtype: str) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    logits = 3.0 * torch.randn(ROWS, VOCABULARY, generator=generator)
    return Inputs(logits.to(getattr(torch, dtype)), new_streams(2, ROWS), torch.arange(ROWS) % 7)


def run_checks(device: torch.device) -> Iterator[Result]:
    """All of them, one after the other."""
    for dtype in _BOUND:
        for name, sampling in SAMPLINGS.items():
            yield check_samples(device, dtype, name, sampling)
    yield check_several_streams(device)
    yield check_linear(device)
    for name, rule in RULES.items():
        yield check_rule(device, name, rule)


def check_samples(device: torch.device, dtype: str, name: str, sampling: Sampling) -> Result:
    x = make_inputs(dtype)
    logits, streams, positions = (tensor.to(device) for tensor in x)
    here = sample_tokens(logits, streams, positions, sampling)
    there = sample_tokens(x.logits.double(), x.streams, x.positions, sampling)
    return Result(f"sample_tokens {dtype} {name}", _difference(here, there, _BOUND[dtype]))


def check_several_streams(device: torch.device) -> Result:
    x = make_inputs("float32")
    streams = torch.stack([x.streams, x.streams + 1, x.streams], 1)
    here = sample_tokens(x.logits.to(device), streams.to(device), x.positions.to(device))
    there = sample_tokens(x.logits.double(), streams, x.positions)
    return Result("sample_tokens of three streams", _difference(here, there, _BOUND["float32"]))


def check_linear(device: torch.device) -> Result:
    x, sampling = make_inputs("float32"), Sampling(0.8, top_k=100, top_p=0.95)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) / 3
    bias = torch.randn(VOCABULARY, generator=generator)

    def drawn(device: torch.device, dtype: torch.dtype) -> Sampled:
        head = Head(weight.to(device, dtype), bias.to(device, dtype), scale=1.5, softcap=20.0)
        noise = x.streams.to(device), x.positions.to(device)
        return linear_sample(hidden.to(device, dtype), head, *noise, sampling)

    here, there = drawn(device, torch.float32), drawn(torch.device("cpu"), torch.float64)
    return Result("linear_sample", _difference(here, there, 1e-3))


RULES: dict[str, Rule] = {
    "coupled": coupled,
    "one_hot": one_hot,
    "coupled_list": coupled_list,
    "lenient": lenient(1.2),
}


def check_rule(device: torch.device, name: str, rule: Rule) -> Result:
    """Drafts of seven tokens from logits a little off; two a sequence under coupled_list."""
    x, length = make_inputs("float32"), 7
    n = ROWS // (length + 1)
    generator = torch.Generator().manual_seed(4)
    off = x.logits + 0.3 * torch.randn(x.logits.shape, generator=generator)
    of_token = torch.arange(ROWS).view(n, length + 1)[:, :-1].flatten()
    n_drafts = 2 if rule is coupled_list else 1
    positions = torch.arange(length).repeat(n)
    old = sample_tokens(off[of_token], x.streams[of_token], positions)

    def verdict(move: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        draft = Draft(
            tokens=move(old.ids),
            cu_seqlens=move(torch.arange(n + 1) * length),
            positions=move(torch.zeros(n // n_drafts, dtype=torch.int64)),
            streams=move(new_streams(9, n // n_drafts)),
            drawn_with=move(x.streams[of_token]),
            logp=move(old.logp),
            n_drafts=n_drafts,
        )
        found = verify(rule, draft, Target(move(x.logits.to(dtype))))
        return torch.stack([found.n_accepted, found.next_token]).cpu()

    here = verdict(lambda tensor: tensor.to(device), torch.float32)
    there = verdict(lambda tensor: tensor, torch.float64)
    differ = int((here != there).any(0).sum())
    if differ > _NEAR_TIES:
        return Result(f"verify {name}", f"{differ} of {n // n_drafts} verdicts differ")
    return Result(f"verify {name}", None)


def _difference(here: Sampled, there: Sampled, bound: float) -> str | None:
    """What is wrong with `here`, if anything is."""
    ids, logp, entropy, support = (tensor.cpu() for tensor in here)
    same = ids == there.ids
    differ = int((~same).sum())
    if differ > _NEAR_TIES:
        return f"{differ} of {len(ids)} tokens differ"
    for name, got, true in (("logp", logp, there.logp), ("entropy", entropy, there.entropy)):
        worst = float((got.double() - true)[same].abs().max())
        if not worst <= bound:
            return f"{name} is off by {worst:.1e} (limit {bound:.0e})"
    cut = there.support.isfinite()
    true = there.support[cut & same]
    far = (support[cut & same].double() - true).abs() > bound * (1.0 + true)
    if bool((support.isfinite() != cut).any()) or int(far.sum()) > _NEAR_TIES:
        return f"the support of {int(far.sum())} rows is another one"
    return None
