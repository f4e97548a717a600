"""multi_draft, where no draws are needed to know what it must do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from verification_cases import ragged

from rollfuse import Proposal, exact, multi_draft, verify
from rollfuse.kernels import residual
from rollfuse.kernels.dispatch import backend

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if backend.name in ("cuda", "rocm") else "cpu"
VOCABULARY = 6
# The interpreter takes some 20 ms a row.
FEW, MANY = (20, 50) if backend.name == "interpret" else (60, 300)


def test_several_drafts_are_used() -> None:
    draft, target = ragged(MANY, VOCABULARY, n_drafts=3, device=DEVICE)
    found = verify(multi_draft, draft, target)
    assert (found.followed % 3).unique().numel() == 3
    one, of_one = ragged(MANY, VOCABULARY, device=DEVICE)
    alone = verify(exact, one, of_one)
    assert found.n_accepted.double().mean() > alone.n_accepted.double().mean() + 0.1


def test_top_k_proposals_are_full_ones() -> None:
    draft, target = ragged(FEW, VOCABULARY, n_drafts=3, seed=1, device=DEVICE)
    assert draft.proposal is not None
    # All six tokens, but two that cannot be drawn fill the rows up.
    ids = torch.arange(VOCABULARY, device=DEVICE).expand(draft.n_tokens, -1)
    ids = torch.cat((ids, ids[:, :2]), 1)
    filler = torch.full((draft.n_tokens, 2), -torch.inf, device=DEVICE)
    few = Proposal(torch.cat((draft.proposal.logp, filler), 1), ids)
    expected = verify(multi_draft, draft, target)
    found = verify(multi_draft, replace(draft, proposal=few), target)
    assert torch.equal(found.n_accepted, expected.n_accepted)
    assert torch.equal(found.next_token, expected.next_token)
    assert torch.equal(found.followed, expected.followed)


def test_blocks_of_sequences_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, target = ragged(FEW, VOCABULARY, n_drafts=2, seed=2, device=DEVICE)
    whole = verify(multi_draft, draft, target)
    monkeypatch.setattr(residual, "_BLOCK_ELEMENTS", 300)
    parts = verify(multi_draft, draft, target)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_drafts_drawn_with_one_stream_are_refused() -> None:
    """In one place; in another it is other noise."""
    draft, target = ragged(10, VOCABULARY, n_drafts=3, device=DEVICE)
    assert draft.drawn_with is not None
    lengths = draft.cu_seqlens.diff()
    verify(multi_draft, draft, target)
    of_first = draft.drawn_with.clone()
    one = int((lengths.view(-1, 3).amin(1) >= 2).nonzero()[0])
    first, second = (int(draft.cu_seqlens[3 * one + k]) for k in (0, 1))
    of_first[second] = of_first[first + 1] = 5
    verify(multi_draft, replace(draft, drawn_with=of_first), target)
    of_first[second + 1] = of_first[first + 1]
    if DEVICE == "cpu":
        needed = f"need a stream of its own for each draft .* twice for sequence {one}, place 1"
        with pytest.raises(ValueError, match=needed):
            verify(multi_draft, replace(draft, drawn_with=of_first), target)


def test_it_needs_the_proposal() -> None:
    draft, target = ragged(10, VOCABULARY, n_drafts=2, device=DEVICE)
    with pytest.raises(ValueError, match="need the distributions the draft was drawn from"):
        verify(multi_draft, replace(draft, proposal=None), target)
