"""lenient, exact and block, where no draws are needed to know what they must do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from verification_cases import ragged

from rollfuse import Proposal, Sampling, Target, block, exact, lenient, one_hot, verify
from rollfuse.kernels import residual
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.drafts import ProposalRows
from rollfuse.kernels.noise import Purpose, gumbels, new_streams, noise_words, row_keys, uniforms
from rollfuse.kernels.residual import draw_residual
from rollfuse.kernels.verification import Rule

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if backend.name in ("cuda", "rocm") else "cpu"
VOCABULARY = 23
# The interpreter takes some 20 ms a row.
FEW, MANY = (20, 40) if backend.name == "interpret" else (60, 300)


def self_target(draft, target: Target) -> Target:
    """The target whose rows are the proposal's."""
    rows = target.rows.clone()
    is_token = torch.ones(target.n_rows, dtype=torch.bool, device=DEVICE)
    n = draft.n_sequences
    is_token[draft.cu_seqlens[1:] + torch.arange(n, device=DEVICE)] = False
    rows[is_token] = draft.proposal.logp
    return Target(rows)


@pytest.mark.parametrize("rule", [exact, block, lenient(), lenient(1e30)])
def test_the_policy_that_drew_a_draft_accepts_it(rule: Rule) -> None:
    draft, target = ragged(MANY, VOCABULARY, device=DEVICE)
    found = verify(rule, draft, self_target(draft, target))
    # p / q may be rounded to less than 1: at most one uniform in a million is above it.
    assert torch.equal(found.n_accepted, draft.cu_seqlens.diff())


def test_a_large_lenience_accepts_all_and_a_small_one_nothing() -> None:
    draft, target = ragged(MANY, VOCABULARY, device=DEVICE)
    lengths = draft.cu_seqlens.diff()
    assert torch.equal(verify(lenient(1e30), draft, target).n_accepted, lengths)
    found = verify(lenient(1e-30), draft, target)
    assert (found.n_accepted == 0).all()


def test_acceptance_by_hand() -> None:
    """Each token against its own uniform, in float64 from the words."""
    draft, target = ragged(MANY, VOCABULARY, device=DEVICE)
    keys = row_keys(draft.streams, draft.positions, Purpose.ACCEPT)
    u = uniforms(noise_words(keys, torch.arange(5, device=DEVICE))).double().log().tolist()
    logps = target.rows.double().log_softmax(1).tolist()
    bounds, tokens = draft.cu_seqlens.tolist(), draft.tokens.tolist()
    assert draft.logp is not None
    old = draft.logp.tolist()
    for rule, slack in ((lenient(1.5), torch.tensor(1.5).double().log().item()), (exact, 0.0)):
        found = verify(rule, draft, target).n_accepted.tolist()
        for b in range(MANY):
            n = 0
            for t, i in enumerate(range(bounds[b], bounds[b + 1])):
                if u[b][t] > logps[i + b][tokens[i]] - old[i] + slack:
                    break
                n += 1
            assert found[b] == n


def test_top_k_proposals_are_full_ones() -> None:
    draft, target = ragged(MANY, VOCABULARY, device=DEVICE)
    assert draft.proposal is not None
    # Nine tokens a row, the drawn one among them.
    logp = draft.proposal.logp.scatter(1, draft.tokens.unsqueeze(1), 5.0)
    ids = logp.topk(9, 1).indices.flip(1)
    kept = draft.proposal.logp.gather(1, ids).log_softmax(1)
    full = torch.full_like(logp, -torch.inf).scatter(1, ids, kept)
    for rule in (exact, block):
        few = verify(rule, replace(draft, proposal=Proposal(kept, ids)), target)
        all_ = verify(rule, replace(draft, proposal=Proposal(full)), target)
        assert torch.equal(few.n_accepted, all_.n_accepted)
        assert torch.equal(few.next_token, all_.next_token)
        twice = Proposal(
            torch.cat((kept, torch.full_like(kept[:, :3], -torch.inf)), 1),
            torch.cat((ids, ids[:, -3:]), 1),
        )
        filled = verify(rule, replace(draft, proposal=twice), target)
        assert torch.equal(filled.n_accepted, all_.n_accepted)
        assert torch.equal(filled.next_token, all_.next_token)
        # What replaces a token has room left: it is not one the draft has covered.
        assert (few.n_accepted < draft.cu_seqlens.diff()).any()


def test_a_certain_proposal_never_comes_again() -> None:
    draft, target = ragged(MANY, VOCABULARY, device=DEVICE)
    certain = Proposal(torch.zeros(draft.n_tokens, 1, device=DEVICE), draft.tokens.unsqueeze(1))
    found = verify(exact, replace(draft, proposal=certain), target)
    cut = found.n_accepted < draft.cu_seqlens.diff()
    refused = draft.tokens[(draft.cu_seqlens[:-1] + found.n_accepted)[cut]]
    assert cut.any() and (found.next_token[cut] != refused).all()
    other = verify(one_hot, replace(draft, proposal=None), target)
    mean = [float(v.n_accepted.double().mean()) for v in (found, other)]
    assert abs(mean[0] - mean[1]) < 5.0 / MANY**0.5  # one law; see the tests of the laws


@pytest.mark.parametrize("top", [None, 4])
def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, top: int | None) -> None:
    draft, target = ragged(FEW, VOCABULARY, device=DEVICE)
    temperature = 0.5 + torch.rand(target.n_rows, device=DEVICE)
    target = Target(target.rows, sampling=Sampling(temperature, top_k=top))
    whole = [verify(rule, draft, target) for rule in (exact, block)]
    monkeypatch.setattr(residual, "_BLOCK_ELEMENTS", 7 * VOCABULARY)
    parts = [verify(rule, draft, target) for rule in (exact, block)]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.n_accepted, b.n_accepted)
        assert torch.equal(a.next_token, b.next_token)


def test_only_the_rows_at_the_cuts_are_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, target = ragged(FEW, VOCABULARY, device=DEVICE)
    seen = []
    right = Target.log_probs
    monkeypatch.setattr(
        Target, "log_probs", lambda self, rows: seen.append(len(rows)) or right(self, rows)
    )
    verify(lenient(), draft, target)
    assert seen == []
    found = verify(exact, draft, target)
    assert sum(seen) == int((found.n_accepted < draft.cu_seqlens.diff()).sum())


def test_a_residual_of_nothing_is_a_draw() -> None:
    log_p = torch.randn(50, 7, device=DEVICE).log_softmax(1)
    streams, positions = new_streams(0, 50).to(DEVICE), torch.arange(50, device=DEVICE)
    q = ProposalRows(log_p, None)
    found = draw_residual(log_p, (q, log_p.exp()), streams, positions)
    assert torch.equal(found, draw_residual(log_p, None, streams, positions))
    assert found.unique().numel() > 3


def test_what_replaces_a_token_has_noise_of_its_own() -> None:
    log_p, log_q = torch.randn(2, 50, 7, device=DEVICE).log_softmax(2)
    streams, positions = new_streams(0, 50).to(DEVICE), torch.arange(50, device=DEVICE)
    found = draw_residual(log_p, (ProposalRows(log_q, None), log_q.exp()), streams, positions)
    words = noise_words(
        row_keys(streams, positions, Purpose.RESIDUAL), torch.arange(7, device=DEVICE)
    )
    left = (log_p.exp() - log_q.exp()).clamp_min(0.0)
    assert torch.equal(found, (left.log() + gumbels(words)).argmax(1))


def test_what_a_rule_lacks_is_named() -> None:
    draft, target = ragged(10, VOCABULARY, device=DEVICE)
    for rule in (exact, block):
        with pytest.raises(ValueError, match="need the distributions .* got the drawn tokens' log"):
            verify(rule, replace(draft, proposal=None), target)
        with pytest.raises(ValueError, match="need the distributions .* got None"):
            verify(rule, replace(draft, proposal=None, logp=None), target)
        if DEVICE == "cpu":
            other = Proposal(
                torch.zeros(draft.n_tokens, 1), (draft.tokens.unsqueeze(1) + 1) % VOCABULARY
            )
            with pytest.raises(ValueError, match="need draft tokens that it can draw, got"):
                verify(rule, replace(draft, proposal=other), target)
            outside = Proposal(
                torch.zeros(draft.n_tokens, 1), torch.full((draft.n_tokens, 1), VOCABULARY)
            )
            with pytest.raises(ValueError, match="proposal.ids: need token ids in"):
                verify(rule, replace(draft, proposal=outside), target)
    with pytest.raises(ValueError, match="logp: need the log-probs .* got None"):
        verify(lenient(), replace(draft, logp=None), target)


@pytest.mark.parametrize("lenience", [0.0, -1.0, float("inf"), float("nan")])
def test_lenience_must_be_positive(lenience: float) -> None:
    with pytest.raises(ValueError, match="lenience: need a finite number > 0"):
        lenient(lenience)
