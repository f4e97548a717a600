"""Segments: against loops in NumPy's float64, by finite differences, over ranks, unread."""

import math

import numpy as np
import pytest
import torch
from check import needs_device, no_wait
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_cases import each, imagined_ranks, segment_statistics
from ranks import on_ranks

from rollfuse import (
    discounted_sums,
    leave_one_out_deviations,
    leave_one_out_means,
    number_groups,
    segment_counts,
    segment_deviations,
    segment_means,
    segment_numbers,
    segment_scan,
    segment_std,
    segment_sums,
)

INF, NAN = math.inf, math.nan
OF_SEGMENTS = (segment_sums, segment_means, segment_std)
OF_VALUES = (segment_deviations, leave_one_out_deviations, leave_one_out_means)
STATISTICS = (*OF_SEGMENTS, *OF_VALUES)
# Three segments, not in order; the second is empty, the third of one.
X, NUMBERS = torch.tensor([1.0, 2.0, -5.0, 6.0]), torch.tensor([0, 0, 2, 0])


def test_statistics_by_hand():
    assert segment_counts(NUMBERS, 3).tolist() == [3, 0, 1]
    assert segment_sums(X, NUMBERS, 3).tolist() == [9.0, 0.0, -5.0]
    assert segment_means(X, NUMBERS, 3).tolist() == [3.0, 0.0, -5.0]
    # Squares of the deviations: 4 + 1 + 9.
    assert segment_std(X, NUMBERS, 3).tolist() == pytest.approx([math.sqrt(7), 0.0, 0.0])
    population = segment_std(X, NUMBERS, 3, ddof=0).tolist()
    assert population == pytest.approx([math.sqrt(14 / 3), 0.0, 0.0])
    assert segment_deviations(X, NUMBERS, 3).tolist() == [-2.0, -1.0, 0.0, 3.0]
    assert leave_one_out_means(X, NUMBERS, 3).tolist() == [4.0, 3.5, -5.0, 1.5]
    assert leave_one_out_deviations(X, NUMBERS, 3).tolist() == [-3.0, -1.5, 0.0, 4.5]


def test_scans_by_hand():
    values, numbers = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0, 0, 0, 2, 2])
    assert segment_scan(values, numbers).tolist() == [1.0, 3.0, 6.0, 4.0, 9.0]
    exclusive = segment_scan(values, numbers, exclusive=True)
    assert exclusive.tolist() == [0.0, 1.0, 3.0, 0.0, 4.0]
    # 3; 2 + 1.5; 1 + 1.75. 5; 4 + 2.5.
    assert discounted_sums(values, numbers, 0.5).tolist() == [2.75, 3.5, 3.0, 6.5, 5.0]
    each = torch.tensor([0.0, 1.0, 9.0, 2.0, 9.0])  # the last of a segment has nothing to discount
    assert discounted_sums(values, numbers, each).tolist() == [1.0, 5.0, 3.0, 14.0, 5.0]


def test_advantages_of_gae():
    """By its definition, backwards through two episodes."""
    rewards, values = torch.randn(9), torch.randn(9)
    numbers, gamma, decay = torch.tensor([0] * 4 + [1] * 5), 0.9, 0.8
    following = torch.where(numbers.roll(-1) == numbers, values.roll(-1), 0.0)
    following[-1] = 0.0
    want, carried = [0.0] * 9, 0.0
    for t in reversed(range(9)):
        carried = 0.0 if t in (3, 8) else carried
        carried = (rewards + gamma * following - values)[t].item() + gamma * decay * carried
        want[t] = carried
    residuals = rewards + gamma * following - values
    found = discounted_sums(residuals, numbers, gamma * decay)
    torch.testing.assert_close(found, torch.tensor(want))


@st.composite
def ragged(draw):
    """Values and numbers in any order; some segments are empty, some of one."""
    n_segments = draw(st.integers(1, 6))
    pair = st.tuples(st.floats(-100.0, 100.0, width=32), st.integers(0, n_segments - 1))
    pairs = draw(st.lists(pair, max_size=20))
    values = torch.tensor([value for value, _ in pairs])
    return values, torch.tensor([number for _, number in pairs], dtype=torch.int64), n_segments


@given(ragged(), st.sampled_from([torch.int64, torch.int32]))
@settings(max_examples=150, deadline=None)
def test_statistics_are_numpys(problem, dtype):
    values, numbers, n_segments = problem
    numbers = numbers.to(dtype)
    x, owner = values.double().numpy(), numbers.numpy()
    found = {f: f(values, numbers, n_segments).double().numpy() for f in STATISTICS}
    population = segment_std(values, numbers, n_segments, ddof=0).double().numpy()
    close = {"rtol": 1e-6, "atol": 1e-5}  # values up to 100 in float32
    for s in range(n_segments):
        mine = x[owner == s]
        sum_, mean = mine.sum(), mine.mean() if len(mine) else 0.0
        sample = mine.std(ddof=1) if len(mine) > 1 else 0.0
        np.testing.assert_allclose(found[segment_sums][s], sum_, **close)
        np.testing.assert_allclose(found[segment_means][s], mean, **close)
        np.testing.assert_allclose(found[segment_std][s], sample, **close)
        np.testing.assert_allclose(population[s], mine.std() if len(mine) else 0.0, **close)
        np.testing.assert_allclose(found[segment_deviations][owner == s], mine - mean, **close)
        others = (sum_ - mine) / (len(mine) - 1) if len(mine) > 1 else mine
        np.testing.assert_allclose(found[leave_one_out_means][owner == s], others, **close)
        left = found[leave_one_out_deviations][owner == s]
        np.testing.assert_allclose(left, mine - others, **close)


@given(ragged(), st.floats(0.0, 1.5))
@settings(max_examples=150, deadline=None)
def test_scans_are_loops(problem, discount):
    values, numbers, _ = problem
    numbers, order = numbers.sort()
    x, owner = values[order].double(), numbers.tolist()
    inclusive, exclusive, reverse = [], [], [0.0] * len(x)
    for t, value in enumerate(x.tolist()):
        before = inclusive[-1] if t and owner[t] == owner[t - 1] else 0.0
        exclusive.append(before)
        inclusive.append(before + value)
    for t in reversed(range(len(x))):
        is_last = t + 1 == len(x) or owner[t] != owner[t + 1]
        reverse[t] = x[t].item() + (0.0 if is_last else discount * reverse[t + 1])
    each = torch.full_like(x, discount)
    for found, want in (
        (segment_scan(x, numbers), inclusive),
        (segment_scan(x, numbers, exclusive=True), exclusive),
        (discounted_sums(x, numbers, discount), reverse),
        (discounted_sums(x, numbers, torch.tensor(discount, dtype=torch.float64)), reverse),
        (discounted_sums(x, numbers, each), reverse),
    ):
        torch.testing.assert_close(found, x.new_tensor(want), rtol=1e-12, atol=1e-10)


@given(st.lists(st.sampled_from([-(2**63), -3, 0, 5, 2**63 - 1]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_groups_are_numbered_in_ascending_order(ids):
    numbers = number_groups(torch.tensor(ids, dtype=torch.int64))
    rank = {one: place for place, one in enumerate(sorted(set(ids)))}
    assert numbers.tolist() == [rank[one] for one in ids] and numbers.dtype == torch.int64


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 3], [0, 2, 2, 2, 5], [0, 0, 4, 4]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_numbers_from_offsets(offsets, dtype):
    numbers = segment_numbers(torch.tensor(offsets, dtype=dtype), offsets[-1])
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)).tolist()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 3e8 + 32.0, -0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_values_have_no_spread_and_no_gradient(value, dtype):
    values = torch.full((10,), value, dtype=dtype)
    values[7:] += 1e9
    values.requires_grad_()
    numbers = torch.tensor([0] * 7 + [1] * 3)
    for function in (segment_deviations, leave_one_out_deviations):
        assert not function(values, numbers, 2).any()
    std = segment_std(values, numbers, 3)
    assert not std.any()
    std.sum().backward()
    assert not values.grad.any()


def test_an_exclusive_scan_is_not_a_difference():
    values, numbers = torch.tensor([1.0, 1e30, 2.0]), torch.tensor([0, 0, 0])
    assert segment_scan(values, numbers, exclusive=True)[1].item() == 1.0


def test_a_spread_far_from_zero_keeps_its_digits():
    noise = torch.randn(1000, dtype=torch.float64)
    far, numbers = noise + 1e8, torch.zeros(1000, dtype=torch.int64)
    exact = (far - 1e8).std().item()
    assert segment_std(far, numbers, 1).item() == pytest.approx(exact, rel=1e-13)


def test_one_huge_segment():
    n = 1_000_000
    values, numbers = torch.rand(n) + 100.0, torch.zeros(n, dtype=torch.int64)
    exact = values.double().numpy()
    assert segment_counts(numbers, 1).item() == n
    rounding = torch.finfo(torch.float32).eps / 2 + 1e-9
    assert segment_sums(values, numbers, 1).item() == pytest.approx(exact.sum(), rounding)
    assert segment_means(values, numbers, 1).item() == pytest.approx(exact.mean(), rounding)
    std = segment_std(values, numbers, 1, ddof=0).item()
    assert std == pytest.approx(exact.std(), rounding)
    np.testing.assert_allclose(segment_scan(values, numbers), exact.cumsum(), rtol=rounding)
    returns = discounted_sums(values, numbers, 0.999)
    tail = (exact[-20_000:] * 0.999 ** np.arange(20_000)).sum()
    assert returns[-20_000].item() == pytest.approx(tail, rounding)


def test_many_segments():
    lengths = torch.randint(0, 6, (100_000,))
    values = torch.randn(int(lengths.sum()), dtype=torch.float64)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    numbers = segment_numbers(offsets, len(values))
    before = torch.nn.functional.pad(values.cumsum(0), (1, 0))
    sums = before[offsets].diff()
    torch.testing.assert_close(segment_sums(values, numbers, 100_000), sums, rtol=0, atol=1e-9)
    assert torch.equal(segment_counts(numbers, 100_000), lengths)
    last = segment_scan(values, numbers)[(offsets[1:] - 1)[lengths > 0]]
    torch.testing.assert_close(last, sums[lengths > 0], rtol=0, atol=1e-9)


def test_sums_of_short_floats_do_not_stop_growing():
    ones, numbers = torch.ones(5000, dtype=torch.bfloat16), torch.zeros(5000, dtype=torch.int64)
    assert segment_sums(ones, numbers, 1).item() == 4992.0  # 5000 in bfloat16
    assert segment_means(ones, numbers, 1).item() == 1.0
    assert segment_scan(ones, numbers)[-1].item() == 4992.0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nothing_leaks_into_another_segment(bad):
    values = torch.tensor([1.0, bad, 2.0, 3.0, bad])
    numbers = torch.tensor([0, 1, 2, 2, 3])
    fine = torch.tensor([True, False, True, True, False])
    for found in (
        segment_scan(values, numbers),
        segment_scan(values, numbers, exclusive=True),
        discounted_sums(values, numbers, 0.5),
        *(function(values, numbers, 4) for function in OF_VALUES),
    ):
        assert found[fine].isfinite().all()
    assert not segment_scan(values, numbers)[~fine].isfinite().any()
    for function in OF_SEGMENTS:
        found = function(values, numbers, 4)
        assert found[[0, 2]].isfinite().all() and not found[[1, 3]].isfinite().any()


@pytest.mark.parametrize("function", STATISTICS)
@pytest.mark.parametrize("n_segments", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_values(function, n_segments, dtype):
    found = function(torch.zeros(0, dtype=dtype), torch.zeros(0, dtype=torch.int64), n_segments)
    assert found.dtype == dtype
    assert found.shape == (n_segments if function in OF_SEGMENTS else 0,) and not found.any()


def test_scans_of_no_values():
    values, numbers = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for found in (
        segment_scan(values, numbers),
        segment_scan(values, numbers, exclusive=True),
        discounted_sums(values, numbers, 0.9),
    ):
        assert found.shape == (0,)
    assert number_groups(numbers).shape == segment_numbers(torch.tensor([0]), 0).shape == (0,)


@pytest.mark.parametrize("function", STATISTICS)
def test_gradients_of_statistics(function):
    numbers = torch.tensor([1, 0, 1, 3, 1, 0, 4])
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)

    if function is segment_std:
        numbers = torch.tensor([1, 0, 1, 0, 1, 0, 1])  # at no spread there is a kink
    assert torch.autograd.gradcheck(lambda x: function(x, numbers, 5), values)
    assert torch.autograd.gradgradcheck(lambda x: function(x, numbers, 5), values)


def test_gradients_of_scans():
    numbers = torch.tensor([0, 0, 0, 2, 3, 3])
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    each = torch.rand(6)
    for function in (
        lambda x: segment_scan(x, numbers),
        lambda x: segment_scan(x, numbers, exclusive=True),
        lambda x: discounted_sums(x, numbers, 0.7),
        lambda x: discounted_sums(x, numbers, each),
    ):
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values)


def test_repeats_are_bitwise_equal():
    values, numbers = torch.randn(50_000), torch.randint(0, 40, (50_000,))
    for function in STATISTICS:
        once = function(values, numbers, 40)
        assert torch.equal(once, function(values, numbers, 40)), function
    ordered = numbers.sort().values
    assert torch.equal(segment_scan(values, ordered), segment_scan(values, ordered))


def all_of_them(values, numbers, ids, offsets, discount):
    return [
        *(function(values, numbers, 4) for function in STATISTICS),
        segment_counts(numbers, 4),
        segment_scan(values, numbers),
        segment_scan(values, numbers, exclusive=True),
        discounted_sums(values, numbers, discount),
        number_groups(ids),
        segment_numbers(offsets, values.shape[0]),
    ]


def test_no_tensor_on_a_device_is_read():
    # A meta tensor has no values: reading one, as a host sync would, raises.
    values, numbers = torch.zeros(5, device="meta"), torch.zeros(5, dtype=torch.int64).to("meta")
    shapes = [found.shape for found in all_of_them(values, numbers, numbers, numbers, 0.5)]
    assert shapes == [(4,)] * 3 + [(5,)] * 3 + [(4,)] + [(5,)] * 5


@needs_device
@pytest.mark.parametrize("n_values", [1, 9, 5000])
def test_a_device_is_not_waited_for(n_values):
    numbers = torch.randint(4, (n_values,)).sort().values
    borders = torch.nn.functional.pad(segment_counts(numbers, 4).cumsum(0), (1, 0))
    arguments = (torch.randn(n_values), numbers, torch.randint(-5, 5, (n_values,)), borders)
    on_device = [tensor.cuda() for tensor in arguments]
    for discount in (0.5, torch.tensor(0.5).cuda()):
        with no_wait():
            found = all_of_them(*on_device, discount)
        for ours, want in zip(found, all_of_them(*arguments, 0.5), strict=True):
            torch.testing.assert_close(ours.cpu(), want, rtol=1e-5, atol=1e-5)


def test_no_tensor_on_a_device_is_read_for_a_group():
    values, numbers = torch.zeros(5, device="meta"), torch.zeros(5, dtype=torch.int64).to("meta")
    values.requires_grad_()
    with imagined_ranks(4) as group:
        found = [function(values, numbers, 4, group=group) for function in STATISTICS]
        assert segment_counts(numbers, 4, group=group).shape == (4,)
        (gradient,) = torch.autograd.grad(sum(one.sum() for one in found), values)
    assert [one.shape for one in (*found, gradient)] == [(4,)] * 3 + [(5,)] * 4


def test_one_graph_gives_the_same():
    torch._dynamo.reset()
    arguments = (
        torch.randn(9),
        torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3]),
        torch.randint(-5, 5, (9,)),
        torch.tensor([0, 4, 4, 9]),
        torch.tensor(0.5),
    )
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager_decomp_partition")
    for found, want in zip(compiled(*arguments), all_of_them(*arguments), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("function", STATISTICS)
@pytest.mark.parametrize(
    ("values", "numbers", "n_segments", "error", "message"),
    [
        (X.long(), NUMBERS, 3, TypeError, "values: need float32"),
        (X.tolist(), NUMBERS, 3, TypeError, "values: need a torch.Tensor"),
        (X[:3], NUMBERS, 3, ValueError, "values: need shape"),
        (X.to("meta"), NUMBERS, 3, ValueError, "values: need the device"),
        (X, NUMBERS.float(), 3, TypeError, "numbers: need int64"),
        (X[None], NUMBERS[None], 3, ValueError, "numbers: need shape"),
        (X, NUMBERS, 2, ValueError, r"numbers: need values in \[0, 2\), got 0 to 2"),
        (X, NUMBERS - 1, 3, ValueError, r"numbers: need values in \[0, 3\), got -1 to 1"),
        (X, NUMBERS, -1, ValueError, "n_segments: need a value >= 0, got -1"),
    ],
)
def test_bad_arguments(function, values, numbers, n_segments, error, message):
    with pytest.raises(error, match=message):
        function(values, numbers, n_segments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: segment_std(X, NUMBERS, 3, ddof=2), ValueError, "ddof: need 0 or 1, got 2"),
        (lambda: segment_scan(X, NUMBERS), ValueError, "numbers: need non-decreasing"),
        (lambda: segment_scan(X.long(), NUMBERS), TypeError, "values: need float32"),
        (lambda: segment_scan(X[:2], NUMBERS), ValueError, "values: need shape"),
        (lambda: discounted_sums(X, NUMBERS, 0.5), ValueError, "numbers: need non-decreasing"),
        (lambda: discounted_sums(X, NUMBERS.sort()[0], NAN), ValueError, "discount: need a finite"),
        (lambda: discounted_sums(X, NUMBERS.sort()[0], X[:2]), ValueError, "discount: need a num"),
        (lambda: segment_numbers(NUMBERS.float(), 4), TypeError, "offsets: need int64"),
        (lambda: segment_numbers(NUMBERS[:0], 0), ValueError, "offsets: need shape"),
        (lambda: segment_numbers(torch.tensor([0, 3]), 4), ValueError, "offsets: need non-decr"),
        (lambda: segment_numbers(torch.tensor([1, 4]), 4), ValueError, "offsets: need non-decr"),
        (lambda: segment_numbers(torch.tensor([0, 3, 2, 4]), 4), ValueError, "offsets: need non"),
        (lambda: number_groups(X), TypeError, "ids: need int64"),
        (lambda: number_groups(NUMBERS[None]), ValueError, "ids: need shape"),
        (lambda: segment_counts(NUMBERS, 2), ValueError, "numbers: need values"),
    ],
)
def test_other_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def rank_problems(n_ranks):
    """Values spread over ranks: segments across borders, empty ranks, equal values far from 0."""
    cases = []
    for n, n_segments in ((12, 4), (500, 7), (0, 2)):
        values = torch.randn(n, dtype=torch.float64) + 1e6
        numbers = torch.randint(0, max(n_segments - 1, 1), (n,))  # the last segment is empty
        values[numbers == 0] = 0.1
        borders = torch.randint(0, n + 1, (n_ranks - 1,)).sort().values.tolist()
        borders = [n] * (n_ranks - 1) if n == 12 else borders  # rank 0 has all
        cases.append(
            {
                "values": values,
                "numbers": numbers,
                "n_segments": n_segments,
                "borders": [0, *borders, n],
                "weights": torch.randn(n_segments, dtype=torch.float64),
            }
        )
    return cases


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_find_what_one_process_finds(n_ranks, tmp_path):
    cases = rank_problems(n_ranks)
    found = on_ranks(each, n_ranks, tmp_path, segment_statistics, cases)
    for number, case in enumerate(cases):
        want = segment_statistics(None, 0, case)
        of_rank = [found[rank][number] for rank in range(n_ranks)]
        for which, whole in enumerate(want):
            parts = [results[which] for results in of_rank]
            if which < 5:  # of segments: all ranks know them, to the bit
                assert all(torch.equal(part, parts[0]) for part in parts)
            together = parts[0] if which < 5 else torch.cat(parts)
            torch.testing.assert_close(together, whole, rtol=1e-12, atol=1e-9)
        of_equal = torch.cat([results[5] for results in of_rank])[case["numbers"] == 0]
        assert not of_equal.any()


def test_a_discount_that_overflows_stays_in_its_segment():
    numbers = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    values = torch.ones(8, dtype=torch.float64)
    discount = torch.full((8,), 0.5, dtype=torch.float64)
    discount[2:4] = 1e200  # their product is infinite, and 0 times that is not 0
    found = discounted_sums(values, numbers, discount)
    assert found[:2].tolist() == [1.5, 1.0]
    assert found[4:].tolist() == [1.875, 1.75, 1.5, 1.0]
    with pytest.raises(ValueError, match="discount: need finite values"):
        discounted_sums(values, numbers, torch.tensor(torch.nan))
