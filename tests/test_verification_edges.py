"""`verify` at its edges: no tokens, shared noise, rows without a draw, borders, room in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_plan import allocated_peak
from verification_cases import ragged

from rollfuse import (
    Draft,
    Proposal,
    Sampling,
    Target,
    TokenBatch,
    block,
    coupled,
    coupled_list,
    exact,
    lenient,
    multi_draft,
    new_streams,
    one_hot,
    policy_loss,
    sample_tokens,
    token_local,
    verify,
)
from rollfuse.kernels.drafts import ProposalRows
from rollfuse.kernels.verification import Rule

RULES = [coupled, one_hot, lenient(), exact, block, coupled_list, multi_draft]
NONE = torch.zeros(0, dtype=torch.int64)
INF = torch.inf


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("closed", [[True, False, False], [False] * 3, None])
def test_drafts_without_tokens_are_plain_sampling_if_some_are_closed(
    rule: Rule, closed: list[bool] | None
) -> None:
    streams, positions = new_streams(1, 3), torch.tensor([4, 5, 6])
    flags = None if closed is None else torch.tensor(closed)
    draft = Draft(NONE, torch.zeros(4, dtype=torch.int64), positions, streams, closed=flags)
    has_row = ~(flags if flags is not None else torch.zeros(3, dtype=torch.bool))
    rows = torch.randn(int(has_row.sum()), 30)
    found = verify(rule, draft, Target(rows))
    drawn = sample_tokens(rows, streams[has_row], positions[has_row])
    assert (found.n_accepted == 0).all() and torch.equal(found.ids, drawn.ids)
    assert torch.equal(found.next_token[has_row], drawn.ids)
    assert (found.next_token[~has_row] == -1).all()


@pytest.mark.parametrize("rule", [coupled_list, multi_draft], ids=lambda rule: rule.__name__)
def test_several_drafts_without_tokens_are_plain_sampling(rule: Rule) -> None:
    streams, positions = new_streams(1, 2), torch.tensor([4, 5])
    bounds = torch.zeros(5, dtype=torch.int64)
    rows = torch.randn(2, 30).repeat_interleave(2, 0)
    found = verify(rule, Draft(NONE, bounds, positions, streams, n_drafts=2), Target(rows))
    assert torch.equal(found.next_token, sample_tokens(rows[::2], streams, positions).ids)
    assert found.followed.tolist() == [0, 2]


def test_one_noise_judges_one_sequence() -> None:
    draft, target = ragged(6, 20, seed=3)
    drawn_with = draft.drawn_with
    assert drawn_with is not None
    length = draft.cu_seqlens.diff().tolist()
    first = draft.cu_seqlens[:-1]
    one, two = [i for i, n in enumerate(length) if n > 1][:2]
    # Two sequences that would draw the same tokens ...
    same = drawn_with.clone()
    same[first[two]] = same[first[one]]
    positions = draft.positions.clone()
    positions[two] = positions[one]
    for rule in (coupled, coupled_list):
        with pytest.raises(
            ValueError, match="drawn_with: need noise that judges no other sequence"
        ):
            verify(rule, replace(draft, drawn_with=same, positions=positions), target)
        # ... but not at different positions, where the noise is another one.
        positions[two] = positions[one] + 100
        verify(rule, replace(draft, drawn_with=same, positions=positions), target)
        positions[two] = positions[one]
    # A sequence may have drawn its own draft, but no other one.
    own = drawn_with.clone()
    own[first[one]] = draft.streams[one]
    verify(coupled, replace(draft, drawn_with=own), target)
    own[first[one]] = draft.streams[two]
    with pytest.raises(ValueError, match=f"got stream {int(draft.streams[two])} for token"):
        verify(coupled, replace(draft, drawn_with=own), target)


def test_drafts_of_one_sequence_may_share_their_beginning() -> None:
    streams = new_streams(0, 1)
    old = new_streams(1, 2)
    draft = Draft(
        torch.tensor([3, 4, 3, 5]),
        torch.tensor([0, 2, 4]),
        torch.tensor([7]),
        streams,
        drawn_with=old[[0, 0, 0, 1]],
        n_drafts=2,
    )
    verify(coupled_list, draft, Target(torch.randn(1, 9).expand(6, 9).contiguous()))


@pytest.mark.parametrize("rule", [exact, block, lenient(), coupled], ids=lambda r: r.__name__)
def test_a_row_without_a_draw_is_named(rule: Rule) -> None:
    draft, target = ragged(6, 20, seed=3)
    third = [i for i, n in enumerate(draft.cu_seqlens.diff().tolist()) if n][2]
    row = int(draft.cu_seqlens[third]) + third  # that of its first token
    rows = target.rows.clone()
    rows[row] = torch.nan
    with pytest.raises(ValueError, match=rf"target\.rows: need a finite .* none in row {row} "):
        verify(rule, draft, Target(rows))


@pytest.mark.parametrize(
    ("rule", "share"),
    [(coupled, 0.2), (one_hot, 0.2), (lenient(), 0.5), (exact, 0.5)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_no_rule_holds_the_logits_again_that_does_not_need_them(rule: Rule, share: float) -> None:
    n, length, vocabulary = 64, 15, 20_000
    tokens = torch.randint(vocabulary, (n * length,))
    draft = Draft(
        tokens,
        torch.arange(0, n * length + 1, length),
        torch.zeros(n, dtype=torch.int64),
        new_streams(0, n),
        logp=torch.full((n * length,), -9.0),
        proposal=Proposal(torch.zeros(n * length, 1), tokens.unsqueeze(1)),
        drawn_with=new_streams(1, n * length),
    )
    draft = draft if rule in (coupled, one_hot) else replace(draft, drawn_with=None)
    draft = replace(draft, drawn_with=None) if rule is one_hot else draft
    target = Target(torch.randn(n * (length + 1), vocabulary))
    assert allocated_peak(lambda: verify(rule, draft, target)) < share * target.rows.nbytes


def test_a_row_of_which_nothing_is_cut_has_no_border() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.4, 0.3, 0.2, 0.1]]).log()
    cuts = (Sampling(top_p=0.85), Sampling(top_k=3), Sampling(min_p=0.3))
    moved = logits.clone()
    moved[0, 2] -= 1e-3  # the last one kept, as a trainer's rounding might have it
    for sampling in cuts:
        drawn = sample_tokens(logits, new_streams(0, 2), torch.zeros(2).long(), sampling)
        assert drawn.support[0] == INF and drawn.support[1] < INF
        batch = TokenBatch(torch.tensor([0, 0]), torch.ones(2), support=drawn.support)
        objective = token_local()(lambda logp, entropy, batch: logp)
        out = policy_loss(moved.clone().requires_grad_(), batch, objective)
        assert abs(float(out.logp[0].exp()) - 0.5) < 2e-4


def test_far_positions_are_past_the_end() -> None:
    with pytest.raises(ValueError, match="max_length: need at most 100 tokens"):
        Draft(
            torch.tensor([1]),
            torch.tensor([0, 1]),
            torch.tensor([2**63 - 1]),
            new_streams(0, 1),
            max_length=100,
        )


def test_ids_of_no_token_are_never_drawn() -> None:
    """On a device they are not looked at beforehand."""
    all_of_it = ProposalRows(torch.full((2, 4), 0.25).log(), None)
    assert all_of_it.logp_of(torch.tensor([3, 4])).tolist()[1] == -INF
    some = ProposalRows(torch.zeros(1, 2), torch.tensor([[1, 9]]))
    assert some.columns_of(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[2.0, 0.0]]
    left = some.subtracted(torch.tensor([[0.5, 0.5]]), torch.ones(1, 3))
    assert left.tolist() == [[1.0, 0.5, 1.0]]
