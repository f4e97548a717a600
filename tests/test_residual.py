"""The draw that ends a draft, and the verdict that is made of it: values, bits and noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from verification_cases import ragged, used_rows

from rollfuse import (
    Draft,
    Plan,
    Proposal,
    Sampling,
    Target,
    Verdict,
    block,
    coupled_list,
    exact,
    lenient,
    multi_draft,
    new_streams,
    one_hot,
    sample_tokens,
    verify,
)
from rollfuse.kernels import plan as plans
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.noise import Purpose, gumbels, noise_words, row_keys
from rollfuse.kernels.verification import Rule

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if backend.name in ("cuda", "rocm") else "cpu"
VOCABULARY = 23
# The interpreter takes some 20 ms a row.
FEW = 12 if backend.name == "interpret" else 60
BY_CHANCE = {"exact": (exact, 1), "block": (block, 1), "multi_draft": (multi_draft, 3)}


def of_sequence(draft: Draft, b: int) -> tuple[Draft, slice]:
    """One sequence's drafts, and the rows of a target with last rows that are theirs."""
    k = draft.n_drafts
    bounds = draft.cu_seqlens[b * k : (b + 1) * k + 1]
    first, end = int(bounds[0]), int(bounds[-1])
    assert draft.proposal is not None and draft.drawn_with is not None
    alone = replace(
        draft,
        tokens=draft.tokens[first:end],
        cu_seqlens=bounds - first,
        positions=draft.positions[b : b + 1],
        streams=draft.streams[b : b + 1],
        drawn_with=draft.drawn_with[first:end],
        logp=None,
        proposal=Proposal(draft.proposal.logp[first:end]),
    )
    return alone, slice(first + b * k, end + (b + 1) * k)


@pytest.mark.parametrize("name", BY_CHANCE)
def test_under_an_invariant_plan_a_sequence_alone_has_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend.name == "interpret":  # every call fills up a chunk
        monkeypatch.setattr(plans, "_INVARIANT_ROWS", {"cpu": 16})
    rule, n_drafts = BY_CHANCE[name]
    draft, target = ragged(FEW, VOCABULARY, n_drafts=n_drafts, seed=3, device=DEVICE)
    weight = torch.randn(VOCABULARY, 48, device=DEVICE)
    hidden = target.rows @ torch.linalg.pinv(weight).T
    plan, sampling = Plan(invariant=True), Sampling(0.7, top_p=0.95)
    found = verify(rule, draft, Target(hidden, weight, sampling, plan))
    cut = 0
    for b in range(0, FEW, 4 if backend.name == "interpret" else 1):
        alone, rows = of_sequence(draft, b)
        of_alone = Target(hidden[rows], weight, sampling, plan)
        other = verify(rule, alone, of_alone)
        n = int(other.n_accepted)
        assert n == found.n_accepted[b] and other.next_token == found.next_token[b]
        start = int(alone.cu_seqlens[other.followed]) + int(other.followed)
        used = slice(start, start + n + 1)
        assert torch.equal(other.logp[used], found.logp[rows][used])
        scored = of_alone.score(other.ids.clamp_min(0)).logp
        assert torch.equal(other.logp[used], scored[used])
        cut += int(alone.cu_seqlens.diff()[other.followed]) > n
    assert cut > (0 if backend.name == "interpret" else 3)


@pytest.mark.parametrize("name", BY_CHANCE)
@pytest.mark.parametrize("level", [0.0, 1000.0])
@pytest.mark.parametrize("sampling", [Sampling(0.6, top_p=0.9), Sampling(0.4, min_p=0.1)])
def test_what_is_drawn_has_the_value_that_the_target_says(
    name: str, level: float, sampling: Sampling
) -> None:
    rule, n_drafts = BY_CHANCE[name]
    draft, target = ragged(FEW, VOCABULARY, n_drafts=n_drafts, seed=4, device=DEVICE)
    target = Target(target.rows + level, sampling=sampling)
    found = verify(rule, draft, target)
    used = used_rows(draft, found, target.n_rows).to(DEVICE)
    scored = target.score(found.ids.clamp_min(0))
    for name, values in scored._asdict().items():
        assert torch.allclose(getattr(found, name)[used], values[used], atol=1e-5), name
    assert (found.logp[used] > -torch.inf).all()
    assert (found.n_accepted < draft.cu_seqlens.diff()[found.followed]).any()


def next_row(draft: Draft, verdict: Verdict) -> Tensor:
    """(B,) of a target with last rows."""
    return draft.cu_seqlens[verdict.followed] + verdict.followed + verdict.n_accepted


@pytest.mark.parametrize("rule", [exact, block, multi_draft, lenient(1.3)])
def test_after_a_draft_the_sequence_draws_with_its_own_noise_in_its_place(rule: Rule) -> None:
    """After a whole draft, and under lenient after a cut as well."""
    n_drafts = 3 if rule is multi_draft else 1
    draft, target = ragged(2 * FEW, VOCABULARY, n_drafts=n_drafts, seed=5, device=DEVICE)
    found = verify(rule, draft, target)
    rows = next_row(draft, found)
    drawn = sample_tokens(target.rows[rows], draft.streams, draft.positions + found.n_accepted)
    whole = found.n_accepted == draft.cu_seqlens.diff()[found.followed]
    assert ((found.n_accepted > 0) & whole).any() and not whole.all()
    same = found.next_token == drawn.ids
    assert same[whole].all()
    assert bool(same.all()) == (rule not in (exact, block, multi_draft))


@pytest.mark.parametrize("rule", [exact, block, multi_draft])
def test_what_replaces_a_token_has_the_noise_of_its_place(rule: Rule) -> None:
    """The draw from what is left, by hand, at the position of the cut; in each of five places."""
    k = 2 if rule is multi_draft else 1
    n, length = 20 if backend.name == "interpret" else 120, 5
    sequence = torch.arange(n, device=DEVICE)
    place = sequence % length
    # The proposal is sure of another token in each place. p is the same but at the cut, where it
    # never has that token, and likes those of the other places.
    texts = (sequence.unsqueeze(1) + 4 * torch.arange(length, device=DEVICE)) % VOCABULARY
    sure = torch.zeros(n, length, VOCABULARY, device=DEVICE)
    sure = sure.scatter(2, texts.unsqueeze(2), 1.0).log()
    left = torch.randn(n, VOCABULARY, device=DEVICE)
    left = left.scatter_add(1, texts, torch.full_like(left[:, :length], 2.0))
    left = left.masked_fill(sure[sequence, place].isfinite(), -torch.inf).log_softmax(1)
    rows = torch.cat((sure, torch.zeros_like(sure[:, :1])), 1)
    rows[sequence, place] = left
    draft = Draft(
        texts.repeat_interleave(k, 0).flatten(),
        torch.arange(n * k + 1, device=DEVICE) * length,
        sequence + 50,
        new_streams(3, n).to(DEVICE),
        proposal=Proposal(sure.repeat_interleave(k, 0).flatten(0, 1)),
        n_drafts=k,
    )
    found = verify(rule, draft, Target(rows.repeat_interleave(k, 0).flatten(0, 1)))
    assert torch.equal(found.n_accepted, place)
    keys = row_keys(draft.streams, draft.positions + place, Purpose.RESIDUAL)
    noise = gumbels(noise_words(keys, torch.arange(VOCABULARY, device=DEVICE)))
    assert torch.equal(found.next_token, (left + noise).argmax(1))


@pytest.mark.parametrize("rule", [coupled_list, multi_draft])
def test_of_equal_drafts_one_with_a_next_row_is_followed(rule: Rule) -> None:
    """Two drafts of one token, the first closed; and a draft without tokens beside them."""
    cases = (([1, 0], [1, 1]), ([1, 0], [0, 0]), ([0, 1], [1, 1]), ([1, 1, 0], [0, 1, 1]))
    for closed, lengths in cases:
        n = sum(lengths)
        n_rows = n + len(closed) - sum(closed)
        rows = torch.zeros(n_rows, 6, device=DEVICE)
        rows[:, 2] = 90.0
        draft = Draft(
            torch.full((n,), 2, device=DEVICE),
            torch.tensor([0, *lengths], device=DEVICE).cumsum(0),
            torch.zeros(1, dtype=torch.int64, device=DEVICE),
            new_streams(0, 1).to(DEVICE),
            drawn_with=new_streams(1, n).to(DEVICE),
            proposal=Proposal(torch.full((n, 6), 1 / 6, device=DEVICE).log()),
            closed=torch.tensor(closed, device=DEVICE).bool(),
            n_drafts=len(closed),
        )
        found = verify(rule, draft, Target(rows))
        assert found.n_accepted.tolist() == [max(lengths)]
        assert found.followed.tolist() == [closed.index(0)]
        assert found.next_token.tolist() == [2]


@pytest.mark.parametrize("rule", [one_hot, exact, lenient()])
def test_a_row_past_the_end_stands_for_no_token(rule: Rule) -> None:
    draft, target = ragged(FEW, VOCABULARY, seed=4, device=DEVICE)
    ends = draft.positions + draft.cu_seqlens.diff()
    draft = replace(draft, max_length=int(ends.max()))
    last = draft.cu_seqlens[1:] + torch.arange(FEW, device=DEVICE)
    found = verify(rule, draft, target)
    assert (found.ids[last[ends == draft.max_length]] == -1).all()
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    empty = Draft(
        none,
        torch.zeros(3, dtype=torch.int64, device=DEVICE),
        torch.tensor([4, 5], device=DEVICE),
        draft.streams[:2],
        max_length=5,
    )
    found = verify(rule, empty, Target(target.rows[:2]))
    assert found.ids[1] == found.next_token[1] == -1
    assert found.ids[0] == found.next_token[0] >= 0
