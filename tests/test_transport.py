"""The transport of several draws to one token against maximum flows and enumeration."""

import itertools
from fractions import Fraction
from math import prod

import networkx
import pytest
import torch
from torch import Tensor

from rollfuse import multi_draft_bound
from rollfuse.kernels import transport as transport_module
from rollfuse.kernels.noise import BELOW_ONE
from rollfuse.kernels.transport import Transport, select, transport

GRID = 40


def random_law(n_tokens: int, generator: torch.Generator, *, zeros: bool = False) -> list[int]:
    """Probabilities in units of 1 / GRID."""
    low = 0 if zeros else 1
    cuts = torch.randint(low, GRID - (n_tokens - 1) * low + 1, (n_tokens - 1,), generator=generator)
    bounds = [0, *sorted(cuts.tolist()), GRID]
    return [b - a for a, b in itertools.pairwise(bounds)]


def most_by_flow(p: list[int], q: list[int], k: int) -> Fraction:
    """The value of the transport problem, in whole numbers: draws are sources, tokens sinks."""
    graph, scale = networkx.DiGraph(), GRID**k
    for draws in itertools.product(range(len(q)), repeat=k):
        graph.add_edge("source", draws, capacity=prod(q[token] for token in draws))
        for token in set(draws):
            graph.add_edge(draws, token)
    for token, mass in enumerate(p):
        graph.add_edge(token, "sink", capacity=mass * GRID ** (k - 1))
    return Fraction(networkx.maximum_flow_value(graph, "source", "sink"), scale)


def most_by_sets(p: Tensor, q: Tensor, k: int) -> float:
    """The bound over all sets of tokens."""
    n = p.shape[0]
    chosen = (torch.arange(2**n).unsqueeze(1) >> torch.arange(n)) & 1
    return float((1.0 + chosen.double() @ p - (chosen.double() @ q) ** k).min())


def units(law: list[int]) -> Tensor:
    return torch.tensor(law, dtype=torch.float64) / GRID


def draws_of(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every tuple of k draws, as counts (n, M), and its probability."""
    tuples = torch.tensor(list(itertools.product(range(q.shape[0]), repeat=k)))
    counts = torch.nn.functional.one_hot(tuples, q.shape[0]).sum(1)
    return counts, q[tuples].prod(1)


def best(p: Tensor, q: Tensor, k: int) -> Transport:
    """Of one sequence."""
    return transport(p[None], q[None], torch.tensor([k]))


def filled_by(p: Tensor, q: Tensor, k: int) -> Tensor:
    return best(p, q, k).filled[0]


def law_of_selection(p: Tensor, q: Tensor, k: int) -> Tensor:
    """(M,) how often each token is selected, before it is accepted, over all draws and groups.

    Uniforms between the lifetimes, and those of each of the draws of a group.
    """
    n_tokens, lives = q.shape[0], best(p, q, k).lifetime[0]
    cuts = torch.cat((lives, torch.zeros(1), torch.ones(1))).clamp(0, 1).sort().values
    counts, chance = draws_of(q, k)
    per_draw = 60  # a multiple of every number of draws
    law = torch.zeros(n_tokens).double()
    for low, high in itertools.pairwise(cuts.unique().tolist()):
        for number in range(per_draw):
            n = counts.shape[0]
            between = min((low + high) / 2, BELOW_ONE)
            uniform = torch.tensor([between, (number + 0.5) / per_draw, 0.0], dtype=torch.float64)
            found = select(p.expand(n, -1), q.expand(n, -1), counts, uniform.expand(n, 3))
            assert (counts.gather(1, found.column.unsqueeze(1)) > 0).all()
            law.index_add_(0, found.column, chance * (high - low) / per_draw)
    return law


@pytest.mark.parametrize("k", [1, 2, 3])
def test_bound_and_transport_are_the_maximum_flow(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for number in range(25):
        n_tokens = 2 + number % 4
        p = random_law(n_tokens, generator, zeros=number % 3 == 0)
        q = random_law(n_tokens, generator, zeros=number % 2 == 0)
        most = float(most_by_flow(p, q, k))
        of_p, of_q = units(p), units(q)
        assert abs(most_by_sets(of_p, of_q, k) - most) < 1e-12
        assert abs(float(multi_draft_bound(of_p, of_q, k)) - most) < 1e-12
        filled = filled_by(of_p, of_q, k)
        assert abs(float(filled.sum()) - most) < 1e-9
        assert (filled <= of_p + 1e-15).all()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_bound_at_larger_vocabularies_and_in_batches(k: int) -> None:
    p, q = (torch.randn(2, 3, 10).double().mul(2).softmax(-1) for _ in range(2))
    found = multi_draft_bound(p, q, k)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    for i, j in itertools.product(range(2), range(3)):
        assert abs(float(found[i, j]) - most_by_sets(p[i, j], q[i, j], k)) < 1e-12
        assert abs(float(filled_by(p[i, j], q[i, j], k).sum()) - float(found[i, j])) < 1e-9
    assert torch.allclose(multi_draft_bound(p, q, 1), torch.minimum(p, q).sum(-1), atol=1e-14)
    assert torch.allclose(multi_draft_bound(p, p, k), torch.ones(2, 3).double(), atol=1e-14)


def test_any_order_of_the_tokens_is_as_good() -> None:
    p, q = (torch.randn(5).double().mul(2).softmax(-1) for _ in range(2))
    most = float(multi_draft_bound(p, q, 3))
    for order in itertools.islice(itertools.permutations(range(5)), 0, None, 7):
        picked = torch.tensor(order)
        assert abs(float(filled_by(p[picked], q[picked], 3).sum()) - most) < 1e-9


@pytest.mark.parametrize("k", [1, 2, 3])
def test_what_is_selected_is_what_the_transport_says(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for n_tokens in (1, 2, 4, 5):
        p, q = torch.randn(2, n_tokens, generator=generator).double().mul(1.5).softmax(-1)
        found, law = best(p, q, k), law_of_selection(p, q, k)
        selected = torch.zeros(n_tokens).double()
        selected[found.order[0]] = found.slope[0] * q[found.order[0]]
        assert float((law - selected).abs().max()) < 1e-12
        assert float((torch.minimum(law, p) - found.filled[0]).abs().max()) < 1e-12


def test_boundaries_of_the_wrong_life_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.tensor([0.5, 0.25, 0.15, 0.1]).double()
    q = torch.tensor([0.3, 0.3, 0.2, 0.2]).double()
    filled = filled_by(p, q, 3)
    right = transport_module._lifetimes
    for change in (torch.zeros_like, torch.ones_like, lambda x: x**1.1):

        def wrong(*arguments, change=change):
            lives = right(*arguments)
            lives[:, 1:-1] = change(lives[:, 1:-1])
            return lives

        monkeypatch.setattr(transport_module, "_lifetimes", wrong)
        law = law_of_selection(p, q, 3)
        assert float((torch.minimum(law, p) - filled).abs().max()) > 1e-3


@pytest.mark.parametrize("k", [1, 3])
def test_a_selected_token_is_accepted_up_to_its_share(k: int) -> None:
    p, q = torch.randn(2, 4).double().mul(1.5).softmax(-1)
    found = best(p, q, k)
    for place, column in enumerate(found.order[0].tolist()):
        copies = torch.zeros(1, 4, dtype=torch.int64)
        copies[0, column] = k
        share = min(1.0, float(found.ratio[0, place] / found.slope[0, place]))
        for uniform, expected in ((0.999 * share, column), (1.001 * share, -1)):
            if uniform < 1.0:
                third = torch.tensor([[0.5, 0.5, uniform]]).double()
                assert select(p[None], q[None], copies, third).column.tolist() == [expected]


def test_proposals_with_rare_and_impossible_tokens() -> None:
    p = torch.tensor([0.3, 1e-9, 0.2, 0.1, 0.3, 0.0], dtype=torch.float64)
    q = torch.tensor([0.5, 1e-15, 0.0, 0.3, 0.2 - 1e-12, 1e-12], dtype=torch.float64)
    for k in (1, 2, 3, 4):
        bound = float(multi_draft_bound(p, q, k))
        filled = filled_by(p, q, k)
        assert abs(float(filled.sum()) - bound) < 1e-9
        assert filled[2] == 0
    for k in (1, 2):
        law = law_of_selection(p, q, k)
        assert float((torch.minimum(law, p) - filled_by(p, q, k)).abs().max()) < 1e-9


def test_sequences_with_different_numbers_of_draws() -> None:
    p, q = (torch.randn(6, 5).double().softmax(-1) for _ in range(2))
    copies = torch.zeros(6, 5, dtype=torch.int64)
    copies[torch.arange(6), torch.arange(6) % 5] = torch.tensor([1, 2, 3, 4, 1, 2])
    uniform = torch.rand(6, 3).double()
    found = select(p, q, copies, uniform)
    for i in range(6):
        alone = select(p[i : i + 1], q[i : i + 1], copies[i : i + 1], uniform[i : i + 1])
        assert torch.equal(alone.column, found.column[i : i + 1])
        assert torch.allclose(alone.filled, found.filled[i : i + 1], atol=1e-15)


def test_proposals_that_do_not_quite_sum_to_one() -> None:
    p, q = (torch.randn(4, 5).double().softmax(-1) for _ in range(2))
    for scale in (0.99, 1.01):
        found, expected = (
            transport(p, scale * q, torch.tensor([1, 2, 3, 4])),
            transport(p, q, torch.tensor([1, 2, 3, 4])),
        )
        for got, truth in zip(found, expected, strict=True):
            assert torch.allclose(got, truth, atol=1e-12)


def test_no_sequences() -> None:
    none = torch.zeros(0, 3).double()
    found = select(none, none, none.long(), none)
    assert found.column.shape == (0,) and found.filled.shape == (0, 3)


def test_bad_input_is_refused() -> None:
    p = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"q: need shape \(2,\)"):
        multi_draft_bound(p, torch.ones(3) / 3, 2)
    with pytest.raises(ValueError, match="k: need a number of draws >= 1, got 0"):
        multi_draft_bound(p, p, 0)
    with pytest.raises(TypeError, match="p: need float32"):
        multi_draft_bound(torch.ones(2, dtype=torch.int64), p, 2)
    with pytest.raises(ValueError, match="V >= 1"):
        multi_draft_bound(p[:0], p[:0], 2)
