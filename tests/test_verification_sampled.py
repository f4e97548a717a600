"""The law of what comes out where the target is tempered and cut, and drafts end anyhow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from verification_cases import (
    Policy,
    draft_of_texts,
    draw_with_streams,
    make_policy,
    target_of_texts,
    text_deviation,
)

from rollfuse import Proposal, Sampling, Target, coupled, exact, new_streams, verify
from rollfuse.kernels.verification import Rule

WITHIN, BEYOND = 3.5, 6.0  # standard deviations; a planted bias must be past the second
LENGTH = 2
TARGET = make_policy(14, 3, LENGTH + 1)
DRAFTER = make_policy(27, 3, LENGTH)


def sampled(policy: Policy, temperature: float, top_p: float) -> Policy:
    """The policy under a temperature and top-p, from their definitions."""
    tables = []
    for table in policy.tables:
        law, order = (table.log() / temperature).softmax(1).sort(1, descending=True)
        law = law.where(law.cumsum(1) - law < top_p, 0.0)
        tables.append(torch.zeros_like(table).scatter(1, order, law / law.sum(1, keepdim=True)))
    return Policy(tables)


@pytest.mark.parametrize("rule", [coupled, exact])
def test_ragged_drafts_half_of_them_closed_under_a_cut_target(rule: Rule) -> None:
    """Drafts of 0 to 2 tokens from a policy that is neither tempered nor cut."""
    n = 200_000
    law = sampled(TARGET, 0.7, 0.9)
    assert sum(int((table == 0).sum()) for table in law.tables) > 3
    streams = new_streams(8, n)
    texts = draw_with_streams(DRAFTER, streams, LENGTH)
    whole = draft_of_texts(texts, DRAFTER, drawn_with=streams.repeat_interleave(LENGTH))
    assert whole.proposal is not None and whole.drawn_with is not None
    length, closed = torch.arange(n) % (LENGTH + 1), torch.arange(n) // 3 % 2 == 0
    places = torch.arange(LENGTH + 1)
    has_token = (places[:LENGTH] < length.unsqueeze(1)).flatten()
    has_row = (places < (length + ~closed).unsqueeze(1)).flatten()
    draft = replace(
        whole,
        tokens=whole.tokens[has_token],
        cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.int64), length.cumsum(0))),
        drawn_with=whole.drawn_with[has_token],
        logp=None,
        proposal=Proposal(whole.proposal.logp[has_token]),
        closed=closed,
    )
    for policy, is_it in ((TARGET, True), (TARGET.mixed(0.05), False)):
        rows = target_of_texts(policy, texts).rows[has_row]
        verdict = verify(rule, draft, Target(rows, sampling=Sampling(0.7, top_p=0.9)))
        off = text_deviation(law, texts, verdict)
        assert abs(off) < WITHIN if is_it else off > BEYOND
        assert ((verdict.next_token < 0) == (closed & (verdict.n_accepted == length))).all()
