"""Who verifies drafts in `bench sampling --verify`: a draft token a row, and a row behind each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollfuse.bench.choice import Wrong
from rollfuse.bench.entrant import Entrant
from rollfuse.bench.sampling_cases import Inputs
from rollfuse.kernels.drafts import Draft
from rollfuse.kernels.linear_sampling import linear_sample
from rollfuse.kernels.noise import new_streams
from rollfuse.kernels.rejection import lenient
from rollfuse.kernels.target import Target
from rollfuse.kernels.verification import coupled, verify

# How far the model moved since the draft was made, relative to its hidden states.
_MOVED = 0.05


class Verified(NamedTuple):
    n_accepted: Tensor  # (B,)
    next_token: Tensor  # (B,)
    logp: Tensor  # (N,) of the draft's tokens where they were accepted; else of what was drawn


def verification_entrants(x: Inputs) -> list[Entrant]:
    """One draft token a row, and a row behind each draft."""
    draft = make_draft(x)
    space = x.hidden.new_empty(x.case.rows, x.case.vocab)
    target = Target(x.hidden, x.weight, x.case.sampling)

    def ours(rule: Any) -> Verified:
        verdict = verify(rule, draft, target)
        return Verified(verdict.n_accepted, verdict.next_token, verdict.logp)

    # lenience 1: the rule that rivals apply.
    rule = lenient(1.0)
    return [
        Entrant("rollfuse, coupled", lambda: {"": partial(ours, coupled)}, ours=True),
        Entrant("rollfuse, SPEC-RL's rule", lambda: {"": partial(ours, rule)}, ours=True),
        Entrant("logits made, SPEC-RL's rule", lambda: _materialising(x, draft, space)),
    ]


def make_draft(x: Inputs) -> Draft:
    """What an earlier model, a little off, drew in these rows."""
    case = x.case
    generator = torch.Generator(x.hidden.device).manual_seed(1)
    noise = torch.randn(x.hidden.shape, generator=generator, device=x.hidden.device)
    before = x.hidden + (_MOVED * noise).to(x.hidden.dtype)
    old = linear_sample(before, x.weight, x.streams, x.positions, case.sampling)
    length = case.rows // case.drafts - 1
    rows = torch.arange(case.rows, device=x.hidden.device).view(case.drafts, length + 1)
    of_token = rows[:, :-1].flatten()
    return Draft(
        tokens=old.ids[of_token],
        cu_seqlens=torch.arange(case.drafts + 1, device=x.hidden.device) * length,
        positions=x.positions[rows[:, 0]],
        streams=new_streams(99, case.drafts).to(x.hidden.device),
        drawn_with=x.streams[of_token],
        logp=old.logp[of_token],
    )


def _materialising(x: Inputs, draft: Draft, space: Tensor) -> Mapping[str, Callable[[], Verified]]:
    """All logits, their log-softmax, uniforms, and a draw where a draft is left."""
    case = x.case
    length = case.rows // case.drafts - 1
    tokens = draft.tokens.view(case.drafts, length)
    assert draft.logp is not None
    old = draft.logp.view(case.drafts, length)

    def step() -> Verified:
        z = torch.mm(x.hidden, x.weight.T, out=space)
        logp = z.float().log_softmax(1).view(case.drafts, length + 1, -1)
        new = logp[:, :-1].gather(2, tokens.unsqueeze(2)).squeeze(2)
        good = torch.rand_like(new).log() <= new - old
        n_accepted = good.long().cumprod(1).sum(1)
        at_cut = logp[torch.arange(case.drafts, device=z.device), n_accepted]
        return Verified(n_accepted, torch.multinomial(at_cut.exp(), 1).squeeze(1), new.flatten())

    return {"": step}


def accept_verdicts(x: Inputs, found: Verified) -> dict[str, Any]:
    """How much was accepted; raises Wrong unless what was drawn and counted can be."""
    case = x.case
    length = case.rows // case.drafts - 1
    good = bool(((found.n_accepted >= 0) & (found.n_accepted <= length)).all())
    good = good and bool(((found.next_token >= 0) & (found.next_token < case.vocab)).all())
    if not good:
        raise Wrong(f"need 0 to {length} accepted tokens and ids below {case.vocab}, got others")
    draft = make_draft(x)
    tokens = draft.tokens.view(case.drafts, length)
    is_whole = len(found.logp) == case.rows
    logp = found.logp.view(case.drafts, -1)[:, :length]
    accepted = torch.arange(length, device=logp.device) < found.n_accepted.unsqueeze(1)
    z = (x.hidden.double() @ x.weight.double().T).view(case.drafts, length + 1, -1)[:, :-1]
    expected = z.log_softmax(2).gather(2, tokens.unsqueeze(2)).squeeze(2)
    which = accepted if is_whole else torch.ones_like(accepted)
    error = float((logp.double() - expected)[which].abs().max()) if bool(which.any()) else 0.0
    bound = 1e-3 if case.dtype == "float32" else 5e-2
    if error > bound:
        raise Wrong(f"need log-probs within {bound} nats of float64's, got {error:.2g} off")
    return {"accepted": float(found.n_accepted.double().mean()), "logp_error": error}
