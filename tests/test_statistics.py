"""Row statistics, log-probs and entropies from them, against float64."""

import pytest
import torch
from check import assert_close

from rollfuse.kernels.held import n_held_blocks
from rollfuse.kernels.rows import Transform
from rollfuse.kernels.statistics import (
    Exponentials,
    first_argmax,
    row_entropy,
    row_statistics,
    target_logp,
    target_pre,
    target_shift,
)

pytestmark = pytest.mark.kernels

# One column, odd, one past a block of 256, 1024 and 4096, and a multi-block odd size.
WIDTHS = (1, 7, 257, 1025, 4097, 9001)


def logits_of(kind: str, n_rows: int, width: int) -> torch.Tensor:
    z = torch.randn(n_rows, width)
    if kind == "peaked":
        z[:, width // 2] += 25.0
    elif kind == "offset":
        z += 1000.0
    elif kind == "low":
        z -= 110.0
    elif kind == "wide":
        z *= 30.0
    elif kind == "masked":
        z[:, ::2] = -torch.inf
        z[:, 0] = 0.5
    elif kind == "ascending":
        z = z.sort(dim=1).values
    elif kind == "ties":
        z = z.round()
    return z


def ours(logits, transform, rows, slot, targets):
    stats = row_statistics(logits, transform, rows)
    row = slot if rows is None else rows[slot]
    pre = target_pre(logits, transform, row, targets)
    shifted = target_shift(pre, stats, transform, slot)
    return target_logp(stats, shifted, slot, targets), row_entropy(stats)


def truth(logits, transform, rows, slot, targets):
    z = logits.double()
    if transform.bias is not None:
        z = z + transform.bias.double()
    if transform.pre_scale is not None:
        z = torch.tanh(z * transform.pre_scale)
    z = (z if rows is None else z[rows]) * transform.factor.double().unsqueeze(1)
    logp = z.log_softmax(1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(1)
    return logp[slot, targets], entropy


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "kind", ["flat", "peaked", "offset", "low", "wide", "masked", "ascending", "ties"]
)
def test_statistics_of_float32_logits(kind, width):
    logits = logits_of(kind, 5, width)
    transform = Transform(torch.tensor([1.0, 0.7, 1.9, 1.0, 0.25]))
    slot = torch.arange(5).repeat_interleave(3)
    targets = torch.randint(width, (15,))
    targets[::3] = logits.argmax(1)  # the confident target, whose own term must be left out
    logp, entropy = ours(logits, transform, None, slot, targets)
    want_logp, want_entropy = truth(logits, transform, None, slot, targets)
    # A logit difference of x is known to half an ulp of x, and so is the log-prob itself.
    scale = want_logp.where(want_logp.isfinite(), 0.0).abs().max().item()
    assert_close("logp", logp, want_logp, atol=2e-6 * max(1.0, scale / 8))
    assert_close("entropy", entropy, want_entropy, atol=2e-6 * max(1.0, want_entropy.max().item()))


def test_confident_rows_keep_their_digits():
    """1 - p of a target 5 to 25 nats ahead, relative, where float32 log_softmax gives 0."""
    margins = torch.arange(5.0, 26.0, 2.5)
    logits = torch.zeros(len(margins), 50) + 3.0
    logits[:, 20] += margins
    slot = torch.arange(len(margins))
    targets = torch.full_like(slot, 20)
    logp, _ = ours(logits, Transform(torch.ones(len(margins))), None, slot, targets)
    exact = -torch.log1p(49 * torch.exp(-margins.double()))
    # A margin of m nats rounds by up to m * 2^-24, and so does its exponential: 1.5e-6 at 25, and
    # as much again on the PyTorch path, which measures it in bits.
    assert ((logp.double() - exact) / exact).abs().max() < 3e-6


def test_bias_softcap_rows_and_temperature():
    logits = torch.randn(6, 530) * 20
    bias = torch.randn(530)
    rows = torch.tensor([4, 0, 4, 5])
    factor = 30.0 / torch.tensor([1.0, 0.5, 2.0, 1.3])
    transform = Transform(factor, bias, 1.2 / 30.0)
    slot, targets = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([1, 529, 1, 300, 12])
    found = ours(logits, transform, rows, slot, targets)
    want = truth(logits, transform, rows, slot, targets)
    assert_close("logp", found[0], want[0], atol=2e-5)
    assert_close("entropy", found[1], want[1], atol=2e-5)
    plain = ours(logits, Transform(factor), rows, slot, targets)
    assert (plain[0] - want[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_they_are(dtype):
    logits = (torch.randn(4, 700) * 4).to(dtype)
    slot, targets = torch.arange(4), torch.tensor([0, 699, 350, 3])
    transform = Transform(torch.ones(4, dtype=torch.float64 if dtype == torch.float64 else None))
    found = ours(logits, transform, None, slot, targets)
    want = truth(logits, transform, None, slot, targets)
    atol = 1e-13 if dtype == torch.float64 else 4e-6
    assert_close("logp", found[0], want[0], atol=atol)
    assert_close("entropy", found[1], want[1], atol=atol)


def test_dead_and_nan_rows():
    logits = torch.zeros(3, 40)
    logits[0] = -torch.inf
    logits[1, 3] = torch.nan
    logits[2, :39] = -torch.inf  # one column left
    slot = torch.arange(3)
    transform = Transform(torch.ones(3))
    logp, entropy = ours(logits, transform, None, slot, torch.tensor([0, 0, 39]))
    assert logp[0] == -torch.inf and entropy[0] == 0
    assert logp[1].isnan() and entropy[1].isnan()
    assert logp[2] == 0 and entropy[2] == 0
    logp, _ = ours(logits, transform, None, slot, torch.tensor([5, 0, 7]))
    assert logp[0] == -torch.inf and logp[2] == -torch.inf


@pytest.mark.parametrize("width", [*WIDTHS, 2048, 3000])
def test_a_nan_anywhere_spoils_the_whole_row(width):
    """Whether the target is elsewhere, forbidden, the NaN itself or the maximum."""
    logits = torch.randn(9, width)
    places = [slice(None), 0, width - 1, width // 2]
    for row, place in enumerate(places):
        logits[row, place] = torch.nan
        logits[row + 4] = -torch.inf
        logits[row + 4, place] = torch.nan
    for reach in (None, torch.full((9,), 3.0)):
        transform = Transform(torch.rand(9) + 0.5, reach=reach)
        for target in {0, width // 3, width - 1}:
            column = torch.full((9,), target)
            logp, entropy = ours(logits, transform, None, torch.arange(9), column)
            assert logp[:8].isnan().all() and entropy[:8].isnan().all()
            assert logp[8].isfinite() and entropy[8].isfinite()


def test_no_rows():
    stats = row_statistics(torch.randn(3, 9), Transform(torch.ones(0)), torch.empty(0).long())
    assert stats.top.shape == (0,)


@pytest.mark.parametrize("vocabulary", [5, 128, 200, 1000])
def test_the_lowest_of_equal_maxima_and_any_nan(vocabulary):
    """Ties inside a group of columns, between groups, and between the groups and the rest."""
    scores = torch.zeros(40, vocabulary)
    columns = torch.randint(vocabulary, (40, 3))
    scores.scatter_(1, columns, 1.0)
    assert torch.equal(first_argmax(scores), columns.amin(1))
    poisoned = scores.scatter(1, columns[:, :1], torch.nan)
    assert poisoned[torch.arange(40), first_argmax(poisoned)].isnan().all()


@pytest.mark.parametrize("kind", ["peaked", "low", "masked", "ascending"])
def test_exponentials_are_kept_relative_to_block_maxima(kind):
    """To bfloat16's 2^-8, twice that in the interpreter, which truncates where a GPU rounds."""
    width = 9001
    logits = logits_of(kind, 5, width)
    blocks = n_held_blocks(width, logits.device)
    keep = Exponentials(
        torch.full((5, width), torch.nan, dtype=torch.bfloat16), torch.full((5, blocks), torch.nan)
    )
    transform = Transform(torch.rand(5) + 0.5)
    stats = row_statistics(logits, transform, keep=keep)
    plain = row_statistics(logits, transform)
    for one, other in zip(stats, plain, strict=True):
        assert torch.equal(one, other)
    size = -(-width // blocks)
    if blocks > 1:  # the kernels' blocks are powers of two
        size = 1 << (size - 1).bit_length()
    z = logits.double() * transform.factor.double().unsqueeze(1)
    for b in range(blocks):
        part = slice(b * size, (b + 1) * size)
        tops = logits[:, part].amax(1)
        assert torch.equal(keep.tops[:, b], tops)
        want = (z[:, part] - tops.double().unsqueeze(1) * transform.factor.unsqueeze(1)).exp()
        want = want.nan_to_num(0.0)  # a block of -inf
        error = (keep.values[:, part].double() - want).abs()
        assert (error <= want * 2.0**-7 + 1e-38).all()
