"""Order statistics: against NumPy and exact fractions, over ranks, without looking at a device."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from check import needs_device, no_wait
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_cases import each, imagined_ranks, order_statistics, outsiders
from ranks import on_ranks

from rollfuse import masked_quantile, mean_bounded_mask, top_k_mask

INF, NAN = math.inf, math.nan
ALL_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def every(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def by_definition(scores, mask, bound, removable=None):
    """mean_bounded_mask in exact fractions, one score after the other."""
    kept = mask.clone()
    values = [Fraction(value) for value in scores.double().tolist()]
    loose = mask if removable is None else mask & removable
    largest_first = sorted(loose.nonzero().flatten().tolist(), key=lambda i: (-values[i], i))
    for i in largest_first:
        left = [values[j] for j in kept.nonzero().flatten().tolist()]
        if sum(left) <= Fraction(bound) * len(left) or values[i] <= Fraction(bound):
            break
        kept[i] = False
    return kept


def k_largest(scores, mask, k):
    """The k largest, ties by index, by sorting."""
    values = scores.double().tolist()
    order = sorted(mask.nonzero().flatten().tolist(), key=lambda i: (-values[i], i))
    out = torch.zeros_like(mask)
    out[order[:k]] = True
    return out


def few_values(draw, dtype, values, most=24):
    """Scores out of a few values, so that many are equal, and a mask."""
    pairs = draw(st.lists(st.tuples(values, st.booleans()), max_size=most))
    scores = torch.tensor([value for value, _ in pairs], dtype=dtype)
    return scores, torch.tensor([chosen for _, chosen in pairs], dtype=torch.bool)


def test_quantiles_by_hand():
    scores = torch.tensor([9.0, 1.0, 2.0, NAN, 4.0])
    mask = torch.tensor([False, True, True, False, True])
    for q, want in ((0.0, 1.0), (0.25, 1.5), (0.5, 2.0), (0.75, 3.0), (1.0, 4.0)):
        found = masked_quantile(scores, mask, q)
        assert found.shape == () and found.dtype == torch.float32
        assert found.item() == want
        assert masked_quantile(scores, mask, torch.tensor(q)).item() == want


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_quantiles_are_numpys(data):
    dtype = data.draw(st.sampled_from(ALL_FLOATS))
    width = 64 if dtype == torch.float64 else 16 if dtype == torch.float16 else 32
    most = 6e4 if width == 16 else 2.0**100
    finite = st.floats(-most, most, width=width)
    values = st.one_of(finite, st.sampled_from([0.0, -0.0, 1.0, -1.0]))
    scores, mask = few_values(data.draw, dtype, values)
    q = data.draw(st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.5, 1.0])))
    found = masked_quantile(scores, mask, q)
    assert found.dtype == dtype
    chosen = scores.double().numpy()[mask.numpy()]
    if not len(chosen):
        assert found.isnan()
        return
    rounding = 4 * np.finfo(np.float64).eps * abs(chosen).max()
    want = torch.tensor(np.quantile(chosen, q)).to(dtype)
    torch.testing.assert_close(found, want, rtol=torch.finfo(dtype).eps, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_scores(dtype):
    scores, mask = torch.randn(20_001, dtype=dtype), torch.rand(20_001) < 0.7
    chosen = scores.double().numpy()[mask.numpy()]
    rel = 1e-6 if dtype == torch.float32 else 0
    for q in (0.001, 0.2, 0.5, 0.83, 0.999):
        found = masked_quantile(scores, mask, q).item()
        assert found == pytest.approx(np.quantile(chosen, q), rel=rel)
    for k in (1, 137, 5000, len(chosen) - 1):
        assert torch.equal(top_k_mask(scores, mask, k), k_largest(scores, mask, k))
    squares = scores.square()
    for bound in (0.9, 0.04, 1e-5):
        ascending = np.sort(squares.double().numpy()[mask.numpy()])
        means = ascending.cumsum() / np.arange(1, len(ascending) + 1)
        n_kept = int((means <= bound).sum())
        found = mean_bounded_mask(squares, mask, bound)
        assert torch.equal(mask & ~found, k_largest(squares, mask, len(chosen) - n_kept))


def test_infinities_have_their_place():
    scores = torch.tensor([INF, -INF, 1.0, INF, 3.0])
    assert masked_quantile(scores, every(scores), 0.0).item() == -INF
    assert masked_quantile(scores, every(scores), 0.1).item() == -INF
    assert masked_quantile(scores, every(scores), 0.25).item() == 1.0
    assert masked_quantile(scores, every(scores), 0.375).item() == 2.0
    assert masked_quantile(scores, every(scores), 0.6).item() == INF
    assert masked_quantile(scores, every(scores), 1.0).item() == INF
    assert top_k_mask(scores, every(scores), 3).tolist() == [True, False, False, True, True]


@pytest.mark.parametrize("dtype", ALL_FLOATS)
@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        # At the quantiles 0, 1/4, 1/2, 3/4 and 1.
        ([INF], [INF] * 5),
        ([INF, INF], [INF] * 5),
        ([-INF, -INF], [-INF] * 5),
        ([2.0, INF], [2.0, INF, INF, INF, INF]),
        ([-INF, 2.0], [-INF, -INF, -INF, -INF, 2.0]),
        ([-INF, INF], [-INF, NAN, NAN, NAN, INF]),
        ([-INF, 2.0, INF], [-INF, -INF, 2.0, INF, INF]),
        ([-INF, -INF, INF, INF], [-INF, -INF, NAN, INF, INF]),
    ],
)
def test_quantiles_between_infinities(values, wanted, dtype):
    scores = torch.tensor(values, dtype=dtype).flip(0)
    found = torch.stack([masked_quantile(scores, every(scores), q / 4) for q in range(5)])
    want = torch.tensor(wanted, dtype=dtype)
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def test_zeros_are_equal_whatever_their_sign():
    scores = torch.tensor([-0.0, 0.0, -0.0, -1.0])
    assert top_k_mask(scores, every(scores), 1).tolist() == [True, False, False, False]
    assert top_k_mask(scores.double(), every(scores), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_format_are_in_order(dtype):
    info = torch.finfo(dtype)
    least = torch.nextafter(torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)).item()
    ordered = [-INF, info.min, -1.0, -info.tiny, -least, 0.0, least, info.tiny, 1.0, info.max, INF]
    scores = torch.tensor(ordered, dtype=dtype).flip(0)
    for rank, value in enumerate(ordered):
        assert masked_quantile(scores, every(scores), rank / 10).item() == value
        kept = top_k_mask(scores, every(scores), rank + 1)
        assert kept.tolist() == [True] * (rank + 1) + [False] * (10 - rank)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_exactly_k_with_ties_by_index(data):
    dtype = data.draw(st.sampled_from(ALL_FLOATS))
    values = st.sampled_from([-INF, -2.5, -1.0, -0.0, 0.0, 0.5, 0.75, 3.0, INF])
    scores, mask = few_values(data.draw, dtype, values)
    k = data.draw(st.integers(0, 30))
    found = top_k_mask(scores, mask, torch.tensor(k) if data.draw(st.booleans()) else k)
    assert found.sum() == min(k, int(mask.sum()))
    assert torch.equal(found, k_largest(scores, mask, k))


def test_a_bounded_mean_by_hand():
    scores = torch.tensor([1.0, 9.0, 2.0, 5.0, 3.0])
    # Means of the 5, 4, 3, 2 smallest: 4, 2.75, 2, 1.5.
    for bound, kept in (
        (4.0, [1, 1, 1, 1, 1]),
        (3.9, [1, 0, 1, 1, 1]),
        (2.75, [1, 0, 1, 1, 1]),
        (2.0, [1, 0, 1, 0, 1]),
        (1.6, [1, 0, 1, 0, 0]),
        (1.0, [1, 0, 0, 0, 0]),
        (0.5, [0, 0, 0, 0, 0]),
    ):
        found = mean_bounded_mask(scores, every(scores), bound)
        assert found.tolist() == [bool(one) for one in kept], bound
        assert torch.equal(found, mean_bounded_mask(scores, every(scores), torch.tensor(bound)))


def test_only_what_is_removable_is_removed_but_all_is_in_the_mean():
    scores = torch.tensor([9.0, 4.0, 1.0, 8.0])
    removable = torch.tensor([False, True, True, True])
    # 22 / 4; without the 8, 14 / 3; without the 4 as well, 10 / 2.
    for bound, kept in ((5.5, [1, 1, 1, 1]), (5.0, [1, 1, 1, 0]), (2.0, [1, 0, 1, 0])):
        found = mean_bounded_mask(scores, every(scores), bound, removable=removable)
        assert found.tolist() == [bool(one) for one in kept], bound
    nothing = torch.zeros_like(removable)
    assert mean_bounded_mask(scores, every(scores), 0.1, removable=nothing).all()


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_the_bounded_mean_is_its_definition(data):
    """Multiples of 1/64, whose sums are exact: means that meet the bound exactly do occur."""
    dtype = data.draw(st.sampled_from(ALL_FLOATS))
    numerators = st.one_of(st.integers(-8, 16), st.integers(-1000, 1000))
    scores, mask = few_values(data.draw, dtype, numerators.map(lambda n: n / 64))
    bound = data.draw(st.integers(-70, 400)) / 64
    removable = torch.tensor(data.draw(st.lists(st.booleans(), min_size=24, max_size=24)))
    removable = removable[: len(scores)]
    want = by_definition(scores, mask, bound)
    assert torch.equal(mean_bounded_mask(scores, mask, bound), want)
    want = by_definition(scores, mask, bound, removable)
    assert torch.equal(mean_bounded_mask(scores, mask, bound, removable=removable), want)


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, -149), (torch.float32, 120), (torch.float64, -1074), (torch.float64, 1000)],
)
def test_bounded_means_at_the_ends_of_the_format(dtype, exponent):
    """The least scores are subnormal: they share an exponent with 0 and have no hidden bit."""
    scores = (torch.tensor([1.0, 9.0, -3.0, 5.0, 3.0]).double() * 2.0**exponent).to(dtype)
    for bound, n_kept in ((3.0, 5), (2.9, 4), (1.5, 4), (1.4, 3), (0.0, 2), (-2.0, 1)):
        kept = mean_bounded_mask(scores, every(scores), bound * 2.0**exponent)
        assert torch.equal(kept, by_definition(scores, every(scores), bound * 2.0**exponent))
        # A bound that is no multiple of the least number was rounded to one.
        assert kept.sum() == n_kept or exponent == -1074


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_bounded_mean_of_any_magnitudes(data):
    """What stays satisfies the bound, and no smaller removal would: up to float64's rounding."""
    exponents = st.floats(-40.0, 30.0, width=32)
    scores, mask = few_values(data.draw, torch.float32, exponents.map(math.exp))
    bound = math.exp(data.draw(exponents))
    kept = mean_bounded_mask(scores, mask, bound)
    removed = mask & ~kept
    left, gone = scores[kept].double(), scores[removed].double()
    assert left.sum() <= len(left) * bound * (1 + 1e-12)
    if len(gone):
        assert not len(left) or gone.min() >= left.max()
        back = left.sum() + gone.min()
        assert back >= (len(left) + 1) * bound * (1 - 1e-12)


def test_m2po_leaves_an_on_policy_batch_alone():
    on_policy = torch.zeros(100)
    assert mean_bounded_mask(on_policy, every(on_policy), 0.04).all()
    assert mean_bounded_mask(on_policy + 0.04, every(on_policy), 0.04 + 1e-9).all()


def test_infinite_scores_are_removed_first():
    scores = torch.tensor([0.1, INF, 0.0, -INF, INF])
    finite = torch.tensor([True, False, True, True, False])
    assert torch.equal(mean_bounded_mask(scores, every(scores), 0.04), finite)
    without = finite & torch.tensor([True, True, True, False, True])
    kept = mean_bounded_mask(scores, scores != -INF, 0.06)
    assert torch.equal(kept, without)
    # One that may not be removed makes the bound unreachable.
    removable = torch.tensor([True, False, True, True, True])
    kept = mean_bounded_mask(scores, scores != -INF, 0.04, removable=removable)
    assert kept.tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_selected(n, dtype):
    scores, mask = torch.randn(n, dtype=dtype), torch.zeros(n, dtype=torch.bool)
    quantile = masked_quantile(scores, mask, 0.5)
    assert quantile.isnan() and quantile.dtype == dtype
    assert not top_k_mask(scores, mask, 3).any()
    assert not mean_bounded_mask(scores, mask, 0.0).any()
    assert mean_bounded_mask(scores, mask, 0.0).shape == (n,)


def test_one_score():
    score = torch.tensor([2.5])
    assert masked_quantile(score, every(score), 0.3).item() == 2.5
    assert top_k_mask(score, every(score), 1).all() and not top_k_mask(score, every(score), 0).any()
    assert mean_bounded_mask(score, every(score), 2.5).all()
    assert not mean_bounded_mask(score, every(score), 2.4).any()


def test_strided_scores():
    scores, mask = torch.randn(40)[::2], (torch.rand(40) < 0.5)[::2]
    assert torch.equal(top_k_mask(scores, mask, 4), k_largest(scores, mask, 4))


def test_results_are_constants():
    scores = torch.rand(6, requires_grad=True)
    assert not masked_quantile(scores, every(scores), 0.5).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tensor_on_a_device_is_read(dtype):
    # A meta tensor has no values: reading one, as a host sync would, raises.
    scores = torch.zeros(5, dtype=dtype, device="meta")
    mask = torch.zeros(5, dtype=torch.bool, device="meta")
    for q in (0.5, torch.zeros((), device="meta")):
        assert masked_quantile(scores, mask, q).shape == ()
    for k in (2, torch.zeros((), dtype=torch.int64, device="meta")):
        assert top_k_mask(scores, mask, k).shape == (5,)
    for bound in (0.5, torch.zeros((), device="meta")):
        assert mean_bounded_mask(scores, mask, bound, removable=mask).shape == (5,)


def test_no_tensor_on_a_device_is_read_for_a_group():
    scores, mask = torch.zeros(5, device="meta"), torch.zeros(5, dtype=torch.bool, device="meta")
    with imagined_ranks(4) as group:
        assert masked_quantile(scores, mask, 0.5, group=group).shape == ()
        assert top_k_mask(scores, mask, 2, group=group).shape == (5,)
        found = mean_bounded_mask(scores, mask, 0.5, removable=mask, group=group)
        assert found.shape == (5,)


@needs_device
def test_a_device_is_not_waited_for():
    scores, mask, removable = torch.rand(5000), torch.rand(5000) < 0.7, torch.rand(5000) < 0.5
    numbers = (torch.tensor(0.3), torch.tensor(700), torch.tensor(0.2))

    def found(device, in_python):
        x, chosen, loose = (tensor.to(device) for tensor in (scores, mask, removable))
        # Numbers are taken as they are, and as tensors on the device.
        q, k, bound = (n.item() if in_python else n.to(device) for n in numbers)
        with no_wait():
            return [
                masked_quantile(x, chosen, q),
                top_k_mask(x, chosen, k),
                mean_bounded_mask(x, chosen, bound),
                mean_bounded_mask(x, chosen, bound, removable=loose),
            ]

    for in_python in (True, False):
        for ours, want in zip(found("cuda", in_python), found("cpu", in_python), strict=True):
            torch.testing.assert_close(ours.cpu(), want)
    on_device = scores.cuda()
    with pytest.raises(RuntimeError, match="synchroniz"), no_wait():
        on_device[0].item()


def unread(function, *arguments):
    """The function in one graph, which has no place for a value of a tensor; no NaN is refused."""
    torch._dynamo.reset()
    return torch.compile(
        function, fullgraph=True, backend="aot_eager_decomp_partition", dynamic=True
    )(*arguments)


def test_one_graph_gives_the_same():
    scores, mask = torch.randn(50), torch.rand(50) < 0.5
    half, ten = torch.tensor(0.5), torch.tensor(10)
    for function, argument in (
        (masked_quantile, half),
        (top_k_mask, ten),
        (mean_bounded_mask, -half),
    ):
        found = unread(function, scores, mask, argument)
        assert torch.equal(found, function(scores, mask, argument)), function


def test_a_nan_where_it_cannot_be_refused():
    scores = torch.tensor([1.0, NAN, 3.0, -NAN])
    assert unread(masked_quantile, scores, every(scores), torch.tensor(0.0)).isnan()
    two = unread(top_k_mask, scores, every(scores), torch.tensor(2))
    assert two.tolist() == [False, True, False, True]
    kept = unread(mean_bounded_mask, scores, every(scores), torch.tensor(2.0))
    assert kept.tolist() == [True, False, True, False]
    assert unread(masked_quantile, scores, ~scores.isnan(), torch.tensor(1.5)).isnan()
    assert not unread(top_k_mask, scores, ~scores.isnan(), torch.tensor(-1)).any()


S, M = torch.tensor([0.5, 1.5, 1.0]), torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("scores", "mask", "error", "message"),
    [
        (S.long(), M, TypeError, "scores: need float32"),
        (S[None], M, ValueError, "scores: need shape"),
        (S.tolist(), M, TypeError, "scores: need a torch.Tensor"),
        (S, M.long(), TypeError, "mask: need bool"),
        (S, M[:2], ValueError, "mask: need shape"),
        (S, M.to("meta"), ValueError, "mask: need the device"),
        (torch.tensor([NAN, 0.0, 1.0]), M, ValueError, "scores: need no NaN .*, got 1 of them"),
    ],
)
def test_bad_scores_and_masks(scores, mask, error, message):
    for function, argument in ((masked_quantile, 0.5), (top_k_mask, 1), (mean_bounded_mask, 1.0)):
        with pytest.raises(error, match=message):
            function(scores, mask, argument)


@pytest.mark.parametrize(
    ("function", "argument", "error", "message"),
    [
        (masked_quantile, 1.1, ValueError, r"q: need a value in \[0, 1\], got 1.1"),
        (masked_quantile, NAN, ValueError, "q: need a value in"),
        (masked_quantile, torch.tensor(-0.1), ValueError, "q: need a value in"),
        (masked_quantile, torch.tensor([0.5]), ValueError, "q: need shape"),
        (masked_quantile, torch.tensor(1), TypeError, "q: need float32"),
        (masked_quantile, "median", TypeError, "q: need a number .*, got str"),
        (top_k_mask, -1, ValueError, "k: need a value >= 0, got -1"),
        (top_k_mask, torch.tensor(-1), ValueError, "k: need a value >= 0"),
        (top_k_mask, 2.0, TypeError, "k: need an integer .*, got float"),
        (top_k_mask, True, TypeError, "k: need an integer .*, got bool"),
        (top_k_mask, np.bool_(True), TypeError, "k: need an integer .*, got bool"),
        (top_k_mask, np.float64(2), TypeError, "k: need an integer .*, got float64"),
        (top_k_mask, 1 << 63, ValueError, "k: need a value < 2.63, got 9223372036854775808"),
        (top_k_mask, np.uint64(1 << 63), ValueError, "k: need a value < 2.63, got 9223372036854"),
        (top_k_mask, -(1 << 70), ValueError, "k: need a value >= 0, got -1180"),
        (top_k_mask, torch.tensor(2, device="meta"), ValueError, "k: need the device"),
        (mean_bounded_mask, INF, ValueError, "bound: need a finite value, got inf"),
        (mean_bounded_mask, NAN, ValueError, "bound: need a finite value, got nan"),
    ],
)
def test_bad_keywords(function, argument, error, message):
    with pytest.raises(error, match=message):
        function(S, M, argument)


def test_a_number_of_any_kind_of_integer():
    for k in (2, np.int64(2), np.uint8(2), torch.tensor(2, dtype=torch.int32)):
        assert top_k_mask(S, every(S), k).tolist() == [False, True, True]
    assert top_k_mask(S, every(S), (1 << 63) - 1).all()


def test_a_bad_removable_mask():
    with pytest.raises(ValueError, match="removable: need shape"):
        mean_bounded_mask(S, M, 1.0, removable=M[:1])


def spread(n, n_ranks, where):
    """Where the ranks' parts of n scores end: all with one of the ranks, evenly, or anyhow."""
    if where == "evenly":
        return [n * rank // n_ranks for rank in range(n_ranks + 1)]
    if where == "anyhow":
        return [0, *torch.randint(0, n + 1, (n_ranks - 1,)).sort().values.tolist(), n]
    return [0] * (where % n_ranks + 1) + [n] * (n_ranks - where % n_ranks)


def rank_problems(n_ranks):
    """Scores spread over ranks: ties across borders, empty ranks, and one with a NaN."""
    cases = []
    for n, dtype, where in (
        (60, torch.float32, "evenly"),
        (64, torch.bfloat16, 0),
        (65, torch.float16, 1),
        (66, torch.float64, -1),
        (3001, torch.float32, "anyhow"),
        (3001, torch.float64, "anyhow"),
        (1, torch.float32, -1),
        (0, torch.float64, "anyhow"),
    ):
        scores = torch.randn(n, dtype=torch.float64)
        if n == 60:
            scores = scores.sign() + 1.0  # squares 0 and 4
        borders, mask = spread(n, n_ranks, where), torch.rand(n) < 0.8
        if n == 3001:
            mask[: borders[1]] = False  # rank 0 has scores, of which none is selected
        cases.append(
            {
                "scores": scores.square().to(dtype),
                "mask": mask,
                "removable": torch.rand(n) < 0.5,
                "borders": borders,
                "q": (0.0, 0.37, 0.5, 0.9, 1.0),
                "k": (0, 1, n // 3, int(mask.sum()), n + 5),
                "bound": (-1.0, 0.0, 0.04, 0.25, 0.9, 100.0),
            }
        )
    spoiled = {**cases[4], "scores": cases[4]["scores"].clone(), "mask": cases[4]["mask"].clone()}
    spoiled["scores"][-1], spoiled["mask"][-1] = NAN, True
    return cases, spoiled


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_find_what_one_process_finds(n_ranks, tmp_path):
    cases, spoiled = rank_problems(n_ranks)
    found = on_ranks(each, n_ranks, tmp_path, order_statistics, [*cases, spoiled])
    for number, case in enumerate(cases):
        quantiles, masks = order_statistics(None, 0, case)
        for rank in range(n_ranks):
            ours = found[rank][number][0]
            torch.testing.assert_close(ours, quantiles, rtol=0, atol=0, equal_nan=True)
        for name, whole in masks.items():
            parts = [found[rank][number][1][name] for rank in range(n_ranks)]
            assert torch.equal(torch.cat(parts), whole), (number, name)
    # All refuse the NaN of one of them; otherwise the others would wait for it.
    assert all("scores: need no NaN" in found[rank][-1] for rank in range(n_ranks))


def test_a_process_outside_the_group_is_refused(tmp_path):
    """torch lets it pass with a warning, and each such rank would find something of its own."""
    inside, outside = on_ranks(outsiders, 2, tmp_path)
    assert set(inside) == {"nothing"}
    said = "group: need a process group that this process is in, got one that it is not in"
    assert set(outside) == {said}
