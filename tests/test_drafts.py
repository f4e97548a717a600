"""Draft, Proposal and where a target's rows lie; and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rollfuse import Draft, Proposal
from rollfuse.kernels.drafts import rows_of


def some(**changed: Any) -> Draft:
    """Three drafts of 2, 0 and 3 tokens."""
    fields: dict[str, Any] = {
        "tokens": torch.tensor([5, 6, 7, 8, 9]),
        "cu_seqlens": torch.tensor([0, 2, 2, 5]),
        "positions": torch.tensor([10, 20, 30]),
        "streams": torch.tensor([1, 2, 3]),
    }
    return Draft(**(fields | changed))


def log_of(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows).log()


def test_rows_with_one_after_each_draft() -> None:
    rows = rows_of(some(), 8)
    assert rows.draft.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert rows.offset.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert rows.of_token.tolist() == [0, 1, 4, 5, 6]
    assert rows.start.tolist() == [0, 3, 4]
    assert rows.length.tolist() == [2, 0, 3]
    assert rows.token_draft.tolist() == [0, 0, 2, 2, 2]
    assert rows.token_offset.tolist() == [0, 1, 0, 1, 2]


def test_rows_without_those() -> None:
    rows = rows_of(some(cu_seqlens=torch.tensor([0, 2, 2, 5], dtype=torch.int32)), 5)
    assert rows.draft.tolist() == [0, 0, 2, 2, 2]
    assert rows.offset.tolist() == [0, 1, 0, 1, 2]
    assert rows.of_token.tolist() == [0, 1, 2, 3, 4]
    assert rows.start.tolist() == [0, 2, 2]


def test_rows_with_some_of_them() -> None:
    rows = rows_of(some(closed=torch.tensor([True, False, True])), 6)
    assert rows.draft.tolist() == [0, 0, 1, 2, 2, 2]
    assert rows.offset.tolist() == [0, 1, 0, 0, 1, 2]
    assert rows.of_token.tolist() == [0, 1, 3, 4, 5]
    assert rows.start.tolist() == [0, 2, 3]
    assert rows.has_last.tolist() == [False, True, False]
    with pytest.raises(TypeError, match="closed: need bool, got torch.int64"):
        some(closed=torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match=r"closed: need shape \(3,\)"):
        some(closed=torch.tensor([True]))


@pytest.mark.parametrize(
    ("good", "leading"),
    [
        ([1, 1, 1, 1, 1], [2, 0, 3]),
        ([0, 1, 1, 0, 1], [0, 0, 1]),
        ([1, 0, 1, 1, 0], [1, 0, 2]),
        ([0, 0, 0, 0, 0], [0, 0, 0]),
    ],
)
def test_leading_tokens(good: list[int], leading: list[int]) -> None:
    for n_rows in (5, 8):
        rows = rows_of(some(), n_rows)
        assert rows.leading(torch.tensor(good).bool()).tolist() == leading


def test_no_drafts_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    draft = Draft(none, torch.zeros(1, dtype=torch.int64), none, none)
    rows = rows_of(draft, 0)
    assert rows.draft.shape == rows.start.shape == (0,)
    assert rows.leading(none.bool()).shape == (0,)


def test_rows_of_a_proposal() -> None:
    ids = torch.tensor([[4, 2], [0, 3]])
    proposal = Proposal(log_of([[0.25, 0.75], [1.0, 0.0]]), ids)
    found = proposal.of_tokens(torch.tensor([1, 0])).logp_of(torch.tensor([3, 4]))
    assert found.tolist() == [-math.inf, pytest.approx(math.log(0.25))]
    assert proposal.of_all().logp_of(torch.tensor([1, 0])).tolist() == [-math.inf, 0.0]
    values = torch.arange(10.0).view(2, 5)
    assert proposal.of_all().columns_of(values).tolist() == [[4.0, 2.0], [5.0, 8.0]]
    left = proposal.of_all().subtracted(torch.ones(2, 2), values)
    assert (values - left).tolist() == [[0, 0, 1, 0, 1], [1, 0, 0, 1, 0]]
    full = Proposal(log_of([[0.25, 0.75], [0.5, 0.5]])).of_all()
    assert full.logp_of(torch.tensor([1, 0])).exp().tolist() == pytest.approx([0.75, 0.5])
    assert full.columns_of(values) is values


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, r"cu_seqlens: need shape \(4,\)"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, "numbers that do not fall"),
        ({"cu_seqlens": torch.tensor([0, 2, 2, 4])}, r"cu_seqlens: need 0 ... 5, got \(0, 4\)"),
        ({"tokens": torch.tensor([5, 6, -7, 8, 9])}, "tokens: need token ids >= 0, got -7"),
        ({"positions": torch.tensor([1, 2])}, "positions: need shape"),
        ({"positions": torch.tensor([1, -2, 3])}, "positions: need positions >= 0, got -2"),
        ({"streams": torch.tensor([1, 2, 1])}, "streams: need a stream of its own"),
        ({"drawn_with": torch.tensor([1])}, "drawn_with: need shape"),
        ({"logp": torch.zeros(3)}, "logp: need shape"),
        ({"logp": torch.tensor([0, 0, math.nan, 0, 0])}, "got nan for token 2"),
        ({"logp": torch.tensor([0, 0, -1, 0.5, 0])}, "finite log-probs <= 0, got 0.5 for token 3"),
        ({"logp": torch.tensor([0, 0, -1, 0, -math.inf])}, "got -inf for token 4"),
        ({"proposal": Proposal(torch.zeros(2, 1))}, "proposal: need 5 rows, one a token, got 2"),
        ({"n_drafts": 0}, "n_drafts: need a number >= 1"),
        ({"n_drafts": 2}, r"cu_seqlens: need shape \(7,\)"),
        ({"max_length": 32}, "max_length: need at most 32 tokens, got 33 tokens with draft 2"),
    ],
)
def test_bad_drafts_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        some(**changed)
    assert some(max_length=33).n_tokens == 5


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": torch.zeros(5, dtype=torch.int32)},
        {"streams": torch.zeros(3)},
        {"positions": torch.zeros(3)},
        {"cu_seqlens": torch.zeros(4)},
        {"drawn_with": torch.zeros(5, dtype=torch.int32)},
        {"logp": torch.zeros(5, dtype=torch.int64)},
        {"tokens": [5, 6, 7, 8, 9]},
        {"n_drafts": True},
        {"n_drafts": 1.0},
        {"max_length": 40.0},
        {"max_length": False},
        {"max_length": torch.tensor(40)},
        {"proposal": torch.zeros(5, 1)},
    ],
)
def test_wrong_types_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="need"):
        some(**changed)


def test_bad_proposals_are_refused() -> None:
    half = log_of([[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"sum to 1, got 0.89.* in row 1"):
        Proposal(log_of([[0.5, 0.5], [0.5, 0.4]]))
    with pytest.raises(ValueError, match="distinct ids in a row, got one twice in row 0"):
        Proposal(half, torch.tensor([[3, 3]]))
    with pytest.raises(ValueError, match=r"proposal.ids: need shape \(1, 2\)"):
        Proposal(half, torch.tensor([[3]]))
    with pytest.raises(TypeError, match="proposal.ids: need int64"):
        Proposal(half, torch.tensor([[3, 4]], dtype=torch.int32))
    with pytest.raises(ValueError, match="proposal.logp: need shape"):
        Proposal(half[0])
    with pytest.raises(TypeError, match="proposal.logp: need float32"):
        Proposal(half.long())
    # Ids that cannot be drawn may fill a row up.
    Proposal(log_of([[1.0, 0.0, 0.0]]), torch.tensor([[3, 3, 3]]))
