"""The law of what every rule puts out: a million verdicts against exact enumeration.

An outcome is (number of accepted tokens, those tokens, next token). What the enumeration gives an
exact rule completes to the target's law of texts; that is checked first, without any draw. Seeds
are fixed: a test passes always or never. `chi_square` counts standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from verification_cases import (
    Place,
    Policy,
    chi_square,
    completed,
    draft_of_texts,
    draw_texts,
    draw_with_streams,
    law_of_block,
    law_of_outcomes,
    make_policy,
    outcomes,
    rows_of_texts,
    target_of_texts,
    text_deviation,
)

from rollfuse import (
    Draft,
    Proposal,
    block,
    coupled,
    coupled_list,
    exact,
    fork_streams,
    lenient,
    multi_draft,
    multi_draft_bound,
    new_streams,
    one_hot,
    sample_tokens,
    verify,
)
from rollfuse.kernels import multi_drafts, rejection, verification
from rollfuse.kernels.transport import select
from rollfuse.kernels.verification import Rule

N = 1_000_000
WITHIN, BEYOND = 3.5, 6.0  # standard deviations; a planted bias must be past the second
LENGTH = 2
TARGET = make_policy(14, 3, LENGTH + 1)
DRAFTER = make_policy(27, 3, LENGTH)
TEXTS = draw_texts(DRAFTER, N, LENGTH, seed=3)


def of_exact(p: Tensor, q: Tensor) -> Place:
    return torch.minimum(p, q), (p - q).clamp_min(0.0)


def of_lenient(lenience: float) -> Callable[[Tensor, Tensor], Place]:
    def place(p: Tensor, q: Tensor) -> Place:
        accepts = torch.minimum(q, lenience * p)
        return accepts, (1.0 - accepts.sum()) * p

    return place


def of_coupled(p: Tensor, q: Tensor) -> Place:
    """Both exponential races are won by v with chance 1 / sum over w of max(p_w/p_v, q_w/q_v)."""
    ratios = torch.maximum(p.unsqueeze(0) / p.unsqueeze(1), q.unsqueeze(0) / q.unsqueeze(1))
    accepts = 1.0 / ratios.sum(1)
    return accepts, p - accepts


def deviation(rule: Rule, law: Tensor, target: Policy = TARGET) -> float:
    """Standard deviations between the law and a million verdicts on drafts from DRAFTER."""
    draft = draft_of_texts(TEXTS, DRAFTER)
    verdict = verify(rule, draft, target_of_texts(target, TEXTS))
    return chi_square(outcomes(verdict, TEXTS, TARGET.vocabulary), law)


def off_by(law: Tensor) -> float:
    """How far the texts that a law of outcomes completes to are from the target's."""
    return float((completed(law, TARGET, LENGTH) - TARGET.texts()).abs().max())


def scale_ratios(patch: pytest.MonkeyPatch, by: float) -> None:
    """Plant a factor in every p / q."""
    right = rejection._ratios

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(log_ratio=found.log_ratio + math.log(by))

    patch.setattr(rejection, "_ratios", wrong)


def test_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    law = law_of_outcomes(TARGET, DRAFTER, LENGTH, of_exact)
    assert off_by(law) < 1e-15
    assert abs(deviation(exact, law)) < WITHIN
    scale_ratios(monkeypatch, 1.01)
    assert deviation(exact, law) > BEYOND


@pytest.mark.parametrize("rule", [exact, block])
def test_three_places_of_four_tokens(rule: Rule) -> None:
    """Cut at the third, what is left is not that of the second, nor is its scale."""
    target, drafter = make_policy(4, 4, 4), make_policy(5, 4, 3)
    if rule is exact:
        law = law_of_outcomes(target, drafter, 3, of_exact)
    else:
        law = law_of_block(target, drafter, 3)
    assert float((completed(law, target, 3) - target.texts()).abs().max()) < 1e-15
    texts = draw_texts(drafter, N, 3, seed=6)
    verdict = verify(rule, draft_of_texts(texts, drafter), target_of_texts(target, texts))
    assert abs(chi_square(outcomes(verdict, texts, 4), law)) < WITHIN


def test_exact_with_a_residual_that_is_not_one() -> None:
    law = law_of_outcomes(TARGET, DRAFTER, LENGTH, of_exact)
    assert deviation(lenient(1.0), law) > 10 * BEYOND


@pytest.mark.parametrize("lenience", [0.7, 1.0, math.exp(0.5)])
def test_lenient_has_the_law_of_its_formula(lenience: float) -> None:
    law = law_of_outcomes(TARGET, DRAFTER, LENGTH, of_lenient(lenience))
    assert off_by(law) > 0.005  # biased
    assert abs(deviation(lenient(lenience), law)) < WITHIN
    assert deviation(lenient(1.01 * lenience), law) > BEYOND


def test_block(monkeypatch: pytest.MonkeyPatch) -> None:
    law = law_of_block(TARGET, DRAFTER, LENGTH)
    assert off_by(law) < 1e-15
    assert abs(deviation(block, law)) < WITHIN
    scale_ratios(monkeypatch, 1.01)
    assert deviation(block, law) > BEYOND


@pytest.mark.parametrize("is_filled", [False, True])
def test_block_of_three_tokens_and_a_top_k_proposal(is_filled: bool) -> None:
    """Tokens 0 and 1 of three are proposed; a fourth row follows."""
    target = make_policy(4, 3, 4)
    full = make_policy(5, 3, 3)
    tables = [x * torch.tensor([1.0, 1.0, 0.0]) for x in full.tables]
    drafter = Policy([x / x.sum(1, keepdim=True) for x in tables])
    texts = draw_texts(drafter, N, 3, seed=6)
    rows = rows_of_texts(drafter, texts, 3)
    ids = torch.tensor([1, 0]).expand(3 * N, 2)
    logp = rows.gather(1, ids)
    if is_filled:
        ids = torch.tensor([1, 0, 1]).expand(3 * N, 3)
        logp = torch.cat((logp, torch.full_like(logp[:, :1], -torch.inf)), 1)
    draft = draft_of_texts(texts, drafter)
    draft = Draft(
        draft.tokens,
        draft.cu_seqlens,
        draft.positions,
        draft.streams,
        proposal=Proposal(logp, ids),
    )
    law = law_of_block(target, drafter, 3)
    assert float((completed(law, target, 3) - target.texts()).abs().max()) < 1e-15
    verdict = verify(block, draft, target_of_texts(target, texts))
    assert abs(chi_square(outcomes(verdict, texts, 3), law)) < WITHIN


def test_block_accepts_more_than_exact() -> None:
    def expected(law: Tensor) -> float:
        cells = [3 ** (n + 1) for n in range(LENGTH + 1)]
        return sum(n * float(part.sum()) for n, part in enumerate(law.split(cells)))

    sequential = law_of_outcomes(TARGET, DRAFTER, LENGTH, of_exact)
    assert expected(law_of_block(TARGET, DRAFTER, LENGTH)) > expected(sequential) + 0.01


def coupled_draft(n_drafts: int) -> tuple[Draft, Tensor]:
    streams = fork_streams(new_streams(8, N), n_drafts).flatten()
    texts = draw_with_streams(DRAFTER, streams, LENGTH)
    drawn_with = streams.repeat_interleave(LENGTH)
    return draft_of_texts(texts, DRAFTER, n_drafts=n_drafts, drawn_with=drawn_with), texts


def test_coupled() -> None:
    law = law_of_outcomes(TARGET, DRAFTER, LENGTH, of_coupled)
    assert off_by(law) < 1e-15
    draft, texts = coupled_draft(1)
    verdict = verify(coupled, draft, target_of_texts(TARGET, texts))
    assert abs(chi_square(outcomes(verdict, texts, 3), law)) < WITHIN
    verdict = verify(coupled, draft, target_of_texts(TARGET.mixed(0.01), texts))
    assert chi_square(outcomes(verdict, texts, 3), law) > BEYOND


def test_one_hot() -> None:
    """The draft is 0, 2 everywhere: accepted with its probability, else a draw without it."""
    texts = torch.tensor([[0, 2]]).expand(N, 2)
    certain = Policy([torch.zeros(3**t, 3, dtype=torch.float64) for t in range(LENGTH)])
    for table, token in zip(certain.tables, (0, 2), strict=True):
        table[:, token] = 1.0
    law = law_of_outcomes(TARGET, certain, LENGTH, of_exact)
    assert off_by(law) < 1e-15
    draft = draft_of_texts(texts, certain)
    for rule in (one_hot, exact, block):
        verdict = verify(rule, draft, target_of_texts(TARGET, texts))
        cells = outcomes(verdict, texts, 3)
        if rule is block:  # judges both together: another law of outcomes, one of texts
            assert abs(text_deviation(TARGET, texts[verdict.followed], verdict)) < WITHIN
            continue
        assert abs(chi_square(cells, law)) < WITHIN
    verdict = verify(one_hot, draft, target_of_texts(TARGET.mixed(0.01), texts))
    assert chi_square(outcomes(verdict, texts, 3), law) > BEYOND


@pytest.mark.parametrize("n_drafts", [2, 3])
def test_coupled_list(n_drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, texts = coupled_draft(n_drafts)
    verdict = verify(coupled_list, draft, target_of_texts(TARGET, texts))
    assert abs(text_deviation(TARGET, texts[verdict.followed], verdict)) < WITHIN
    alone = law_of_outcomes(TARGET, DRAFTER, LENGTH, of_coupled)[:3].sum()
    assert float((verdict.n_accepted > 0).double().mean()) > 1.0 - float(alone) + 0.03
    verdict = verify(coupled_list, draft, target_of_texts(TARGET.mixed(0.01), texts))
    assert text_deviation(TARGET, texts[verdict.followed], verdict) > BEYOND
    # The noise of the draft that was followed, alone, has been chosen by what it draws.
    monkeypatch.setattr(verification, "_streams_of_matches", lambda draft, rows: own(draft, rows))
    verdict = verify(coupled_list, draft, target_of_texts(TARGET, texts))
    assert text_deviation(TARGET, texts[verdict.followed], verdict) > BEYOND


def own(draft: Draft, rows) -> Tensor:
    assert draft.drawn_with is not None
    streams = draft.streams[rows.draft // draft.n_drafts]
    return streams.index_put((rows.of_token,), draft.drawn_with)


def several(n_drafts: int) -> tuple[Draft, Tensor]:
    texts = draw_texts(DRAFTER, N * n_drafts, LENGTH, seed=13)
    return draft_of_texts(texts, DRAFTER, n_drafts=n_drafts), texts


@pytest.mark.parametrize("n_drafts", [2, 3])
def test_multi_draft(n_drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, texts = several(n_drafts)
    verdict = verify(multi_draft, draft, target_of_texts(TARGET, texts))
    assert abs(text_deviation(TARGET, texts[verdict.followed], verdict)) < WITHIN
    bound = float(multi_draft_bound(TARGET.tables[0][0], DRAFTER.tables[0][0], n_drafts))
    rate = (verdict.n_accepted > 0).double()
    spread = (bound * (1 - bound) / rate.shape[0]) ** 0.5
    assert abs(float(rate.mean()) - bound) < 4 * spread
    right = select
    monkeypatch.setattr(multi_drafts, "select", lambda p, *rest: right(1.01 * p, *rest))
    rate = (verify(multi_draft, draft, target_of_texts(TARGET, texts)).n_accepted > 0).double()
    assert float(rate.mean()) - bound > 4 * spread
    monkeypatch.setattr(multi_drafts, "select", right)
    verdict = verify(multi_draft, draft, target_of_texts(TARGET.mixed(0.01), texts))
    assert text_deviation(TARGET, texts[verdict.followed], verdict) > BEYOND


def test_what_multi_draft_leaves_is_not_what_exact_does() -> None:
    """Two drafts cover token 0, which one has too seldom: it must not come as a replacement."""
    p, q = [0.45, 0.45, 0.1], [0.3, 0.1, 0.6]
    first = torch.tensor([p], dtype=torch.float64)
    target = Policy([first, make_policy(6, 3, 2).tables[1]])
    drafter = Policy([torch.tensor([q], dtype=torch.float64)])
    texts = draw_texts(drafter, 2 * N, 1, seed=15)
    draft = draft_of_texts(texts, drafter, n_drafts=2)
    verdict = verify(multi_draft, draft, target_of_texts(target, texts))
    assert abs(text_deviation(target, texts[verdict.followed], verdict)) < WITHIN


def test_one_draft_of_several_is_the_exact_rule() -> None:
    law = law_of_outcomes(TARGET, DRAFTER, LENGTH, of_exact)
    assert abs(deviation(multi_draft, law)) < WITHIN


@pytest.mark.parametrize("rule", [exact, block, multi_draft])
def test_what_follows_a_verdict_is_independent_of_it(rule: Rule) -> None:
    """With the sequence's own stream, as an engine goes on; a second verdict as well."""
    draft, others = draft_of_texts(TEXTS, DRAFTER), TEXTS.flip(0)
    n_first = verify(rule, draft, target_of_texts(TARGET, TEXTS)).n_accepted
    then = draft_of_texts(others, DRAFTER)
    alone = verify(rule, then, target_of_texts(TARGET, others)).n_accepted
    law = torch.bincount(alone, minlength=LENGTH + 1).double() / N
    then = replace(then, positions=n_first + 1)
    second = verify(rule, then, target_of_texts(TARGET, others))
    for n in range(LENGTH + 1):
        given = second.n_accepted[n_first == n]
        seen = torch.bincount(given, minlength=LENGTH + 1).double() / given.shape[0]
        assert float((seen - law).abs().max()) < 5 * (0.5 / given.shape[0] ** 0.5 + 0.5 / N**0.5)
    plain = sample_tokens(torch.zeros(N, 3), draft.streams, n_first + 1).ids
    seen = torch.bincount(plain * 3 + n_first).double() / N
    both = torch.bincount(n_first).double() / N
    assert float((seen.view(3, 3) - both / 3).abs().max()) < 5 * 0.5 / N**0.5
