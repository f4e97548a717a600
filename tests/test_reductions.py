"""Reductions: hand-worked weights, and accumulation that equals one big batch."""

import pytest
import torch

from rollfuse.losses.reductions import (
    constant_length,
    sequence_mean,
    sequence_sum,
    token_mean,
)

# Four sequences: two pairs, none, three of which one does not count, one that does not count.
MASK = torch.tensor([True, True, True, False, True, False])
CU = torch.tensor([0, 2, 2, 5, 6])
ALL = (token_mean, sequence_mean, sequence_sum, constant_length)


@pytest.mark.parametrize(
    ("reduction", "denominator", "expected"),
    [
        (token_mean, None, [0.25, 0.25, 0.25, 0, 0.25, 0]),  # 4 pairs count
        (token_mean, 10, [0.1, 0.1, 0.1, 0, 0.1, 0]),
        (sequence_mean, None, [0.25, 0.25, 0.25, 0, 0.25, 0]),  # 2 sequences of 2 each
        (sequence_mean, 5, [0.1, 0.1, 0.1, 0, 0.1, 0]),
        (sequence_sum, None, [0.5, 0.5, 0.5, 0, 0.5, 0]),
        (sequence_sum, 4, [0.25, 0.25, 0.25, 0, 0.25, 0]),
        (constant_length, 4 * 5, [0.05, 0.05, 0.05, 0, 0.05, 0]),
    ],
)
def test_hand_worked_weights(reduction, denominator, expected):
    weights = reduction(MASK, CU, denominator)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-7, atol=0)


def test_sequence_mean_of_uneven_lengths():
    mask = torch.ones(4, dtype=torch.bool)
    weights = sequence_mean(mask, torch.tensor([0, 1, 4]), None)
    third = 1 / 6
    expected = torch.tensor([0.5, third, third, third])
    torch.testing.assert_close(weights, expected, rtol=1e-7, atol=0)


def _random_step(generator):
    """Lengths, mask and values of nine sequences; the fifth is empty."""
    lengths = torch.randint(1, 7, (9,), generator=generator)
    lengths[4] = 0
    n = int(lengths.sum())
    mask = torch.rand(n, generator=generator) < 0.7
    return lengths, mask, 1 + torch.randn(n, generator=generator, dtype=torch.float64)


def _cu(lengths):
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


@pytest.mark.parametrize("reduction", ALL)
def test_micro_batches_with_the_steps_denominator_equal_one_big_batch(reduction):
    lengths, mask, values = _random_step(torch.Generator().manual_seed(3))
    cu = _cu(lengths)
    counted = [int(mask[a:b].sum()) for a, b in zip(cu[:-1], cu[1:], strict=True)]
    n_sequences = sum(c > 0 for c in counted)
    step = {
        token_mean: sum(counted),
        sequence_mean: n_sequences,
        sequence_sum: n_sequences,
        constant_length: n_sequences * 6,
    }[reduction]
    natural = None if reduction is not constant_length else step
    whole = (reduction(mask, cu, natural).double() * values).sum()
    parts = torch.zeros((), dtype=torch.float64)
    # Micro-batches of very different sizes: a mean of means would be far off.
    for first, last in ((0, 1), (1, 5), (5, 9)):
        start, stop = int(cu[first]), int(cu[last])
        weights = reduction(mask[start:stop], _cu(lengths[first:last]), torch.tensor(step))
        parts += (weights.double() * values[start:stop]).sum()
    assert abs(whole) > 1e-2
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", ALL)
@pytest.mark.parametrize("number", [8, 8.0, torch.tensor(8), torch.tensor(8.0)])
def test_a_denominator_is_a_number_or_a_0d_tensor(reduction, number):
    assert torch.equal(reduction(MASK, CU, number), reduction(MASK, CU, 8))


def test_token_mean_does_not_depend_on_where_sequences_end():
    assert torch.equal(token_mean(MASK, CU), token_mean(MASK, torch.tensor([0, 6])))


@pytest.mark.parametrize("reduction", ALL)
@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0]])
def test_an_empty_batch_has_empty_weights(reduction, cu):
    mask = torch.zeros(0, dtype=torch.bool)
    for denominator in (0, 5, torch.tensor(0.0)):
        assert reduction(mask, torch.tensor(cu), denominator).shape == (0,)
    if reduction is not constant_length:
        assert reduction(mask, torch.tensor(cu), None).shape == (0,)


@pytest.mark.parametrize("reduction", ALL)
def test_nothing_that_counts_and_a_denominator_of_zero_give_zeros(reduction):
    nobody = torch.zeros(3, dtype=torch.bool)
    everybody = torch.ones(3, dtype=torch.bool)
    cu = torch.tensor([0, 1, 3])
    assert torch.equal(reduction(nobody, cu, 7), torch.zeros(3))
    for zero in (0, 0.0, torch.tensor(0)):
        assert torch.equal(reduction(nobody, cu, zero), torch.zeros(3))
        assert torch.equal(reduction(everybody, cu, zero), torch.zeros(3))
    if reduction is not constant_length:
        assert torch.equal(reduction(nobody, cu, None), torch.zeros(3))


@pytest.mark.parametrize("reduction", ALL)
def test_no_tensor_on_a_device_is_read(reduction):
    # A meta tensor has no values: reading one, as a host sync would, raises.
    mask, cu = MASK.to("meta"), CU.to("meta")
    for denominator in (12, torch.tensor(12.0), torch.tensor(12.0, device="meta")):
        weights = reduction(mask, cu, denominator)
        assert (weights.device.type, weights.shape) == ("meta", (6,))
    if reduction is not constant_length:
        assert reduction(mask, cu, None).shape == (6,)


def test_constant_length_needs_a_denominator():
    with pytest.raises(ValueError, match=r"denominator: need n_sequences \* max_length.*None"):
        constant_length(MASK, CU, None)


@pytest.mark.parametrize("reduction", ALL)
@pytest.mark.parametrize(
    ("mask", "cu", "denominator", "error", "message"),
    [
        (MASK.float(), CU, 1, TypeError, "mask: need bool"),
        (MASK.view(2, 3), CU, 1, ValueError, "mask: need shape"),
        ([True] * 6, CU, 1, TypeError, "mask: need a torch.Tensor"),
        (MASK, CU.float(), 1, TypeError, "cu_seqlens: need int64"),
        (MASK, CU[None], 1, ValueError, "cu_seqlens: need shape"),
        (MASK, torch.tensor([0, 5]), 1, ValueError, "cu_seqlens: need non-decreasing"),
        (MASK, torch.tensor([1, 6]), 1, ValueError, "cu_seqlens: need non-decreasing"),
        (MASK, torch.tensor([0, 4, 2, 6]), 1, ValueError, "cu_seqlens: need non-decreasing"),
        (MASK, CU, -1, ValueError, "denominator: need a finite value >= 0"),
        (MASK, CU, float("nan"), ValueError, "denominator: need a finite value >= 0"),
        (MASK, CU, torch.tensor(float("inf")), ValueError, "denominator: need a finite value >= 0"),
        (MASK, CU, torch.ones(2), ValueError, "denominator: need shape"),
        (MASK, CU, "tokens", TypeError, "denominator: need a number"),
        (MASK, CU, True, TypeError, "denominator: need a number"),
    ],
)
def test_bad_input(reduction, mask, cu, denominator, error, message):
    with pytest.raises(error, match=message):
        reduction(mask, cu, denominator)


@pytest.mark.parametrize("reduction", ALL)
def test_one_graph_gives_the_same(reduction):
    """A graph has no place for a value of a tensor: there a border cannot be refused."""
    torch._dynamo.reset()
    compiled = torch.compile(
        reduction, fullgraph=True, backend="aot_eager_decomp_partition", dynamic=True
    )
    for denominator in (torch.tensor(12.0), 12):
        assert torch.equal(compiled(MASK, CU, denominator), reduction(MASK, CU, denominator))
