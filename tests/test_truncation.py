"""top-k, top-p and min-p against sorts in float64; under ROLLFUSE_BACKEND=interpret, the kernels.

Vocabularies as in test_sampling.py. Logits come with ties, which have to be kept, and with -inf.
"""

import math
from dataclasses import replace

import pytest
import torch
from check import assert_no_worse
from sampling_cases import CUTS, DEVICE, INF, at_temperature, border_of, kept, make_logits

from rollfuse import (
    Sampling,
    TokenBatch,
    new_streams,
    policy_loss,
    sample_tokens,
    score_tokens,
    token_local,
)
from rollfuse.kernels import truncation
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.rows import Transform
from rollfuse.kernels.truncation import Cuts, cut_rows_torch, support_of

pytestmark = pytest.mark.kernels

INTERPRETED = backend.name == "interpret"
# The interpreter takes some 10 ms a row.
ROWS = 4 if INTERPRETED else 40
LONGER = [(300, torch.bfloat16), (2500, torch.float32)]
if not INTERPRETED:
    LONGER += [(300, torch.float64), (5000, torch.float32), (5000, torch.float16)]


def per_row(options: dict[str, float], n_rows: int = ROWS) -> Sampling:
    """Values that change from row to row, from those of `options` on."""
    steps = torch.arange(n_rows) % 4
    values: dict[str, torch.Tensor] = {"temperature": 0.5 + 0.4 * steps}
    if "top_k" in options:
        values["top_k"] = options["top_k"] + 3 * steps.to(torch.int32)
    if "top_p" in options:
        values["top_p"] = options["top_p"] ** (1.0 + steps)
    if "min_p" in options:
        values["min_p"] = options["min_p"] ** (1.0 + steps)
    return Sampling(**{name: value.to(DEVICE) for name, value in values.items()})


def every_logp(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(N, V) log-probs of all tokens, by score_tokens."""
    n_rows, n_cols = logits.shape
    each = torch.arange(n_rows, device=DEVICE).repeat_interleave(n_cols)
    fields = ("temperature", "top_k", "top_p", "min_p")
    tensors = {name: getattr(sampling, name) for name in fields}
    picked = {n: v[each] for n, v in tensors.items() if isinstance(v, torch.Tensor)}
    targets = torch.arange(n_cols, device=DEVICE).repeat(n_rows)
    return score_tokens(logits[each], targets, replace(sampling, **picked)).logp.view(n_rows, -1)


@pytest.mark.parametrize("n_cols", [1, 7, 20] if INTERPRETED else [1, 2, 7, 40, 130])
@pytest.mark.parametrize("options", CUTS)
def test_sets_equal_sorting(options: dict[str, float], n_cols: int) -> None:
    logits = make_logits(n_cols, 1 if INTERPRETED else 12)
    n_rows = len(logits)
    for sampling in (per_row(options, n_rows), Sampling(0.8, **options))[: 1 + (n_cols != 20)]:
        z = at_temperature(logits, sampling)
        logp = every_logp(logits, sampling).cpu()
        want = kept(z, sampling) & (z > -INF)
        assert torch.equal(logp > -INF, want)
        truth = z.where(want, -INF).log_softmax(1)
        assert torch.allclose(logp.double(), truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("options", CUTS)
@pytest.mark.parametrize(("n_cols", "dtype"), LONGER)
def test_supports_of_longer_rows(
    options: dict[str, float], n_cols: int, dtype: torch.dtype
) -> None:
    n_rows = 2 if INTERPRETED else 12
    logits = make_logits(n_cols, n_rows, ties=False).to(dtype)
    for sampling in (Sampling(0.8, **options), per_row(options, n_rows)):
        z = at_temperature(logits, sampling)
        found = sample_tokens(logits, new_streams(0, n_rows).to(DEVICE), steps(n_rows), sampling)
        for row, values in enumerate(z.tolist()):
            # Masses are sums in float32 in the kernel: the share may be off by so much.
            low, high = (border_of(values, sampling, row, slack=s) for s in (-4e-6, 4e-6))
            support = float(found.support[row])
            distance = max(values) - z[row]
            left = float(distance[(distance <= support) & (distance < INF)].max())
            within = float(distance[distance <= max(0.0, low * (1 - 1e-6) - 1e-6)].max())
            # What is within rounding of the border counts as a tie with it.
            assert within <= left <= high * (1 + 1.1e-5) + 2e-6
            # As far from the last one left as from the first one cut.
            cut = distance[(distance > support) & (distance < INF)]
            if len(cut):
                assert support == pytest.approx((left + float(cut.min())) / 2, abs=1e-5, rel=1e-5)
            else:  # a border on the last one would cut it where logits have moved a little
                assert support == INF
        assert found.support.dtype == found.logp.dtype
        check_values(found, z)


def check_values(found, z: torch.Tensor) -> None:
    """logp and entropy are those over what the support leaves, and as good as PyTorch's."""
    distance = z.amax(1, keepdim=True) - z
    support = found.support.double().cpu()
    is_out = distance > (support * (1 + 1e-5) + 1e-6).unsqueeze(1)
    cut = z.masked_fill(is_out, -INF)
    assert (cut.gather(1, found.ids.cpu().unsqueeze(1)) > -INF).all()

    def values(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logps = rows.log_softmax(1)
        entropy = -(logps.exp() * logps).masked_fill(rows == -INF, 0.0).sum(1)
        return logps.gather(1, found.ids.cpu().unsqueeze(1)).squeeze(1), entropy

    plain = values(cut.to(found.logp.dtype))
    for name, truth, ref in zip(("logp", "entropy"), values(cut), plain, strict=True):
        assert_no_worse(name, getattr(found, name).cpu(), ref, truth, floor=1e-6)


def steps(n_rows: int) -> torch.Tensor:
    return torch.arange(n_rows, device=DEVICE)


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log().float().to(DEVICE)


@pytest.mark.parametrize(
    ("probabilities", "options", "left"),
    [
        ((0.5, 0.25, 0.125, 0.125), {"top_k": 2}, [0, 1]),
        ((0.5, 0.25, 0.125, 0.125), {"top_k": 3}, [0, 1, 2, 3]),  # a tie
        ((0.125, 0.25, 0.125, 0.5), {"top_k": 3}, [0, 1, 2, 3]),
        ((0.5, 0.25, 0.15, 0.1), {"top_p": 0.6}, [0, 1]),
        ((0.5, 0.25, 0.15, 0.1), {"top_p": 0.49}, [0]),
        ((0.5, 0.25, 0.15, 0.1), {"top_p": 0.91}, [0, 1, 2, 3]),
        ((0.5, 0.25, 0.15, 0.1), {"min_p": 0.4}, [0, 1]),
        ((0.5, 0.25, 0.15, 0.1), {"min_p": 0.5}, [0, 1]),  # just as much as asked for
        ((0.5, 0.25, 0.15, 0.1), {"min_p": 0.0}, [0, 1, 2, 3]),
        # A share of what top-k left: 0.5 is two thirds of it.
        ((0.5, 0.25, 0.15, 0.1), {"top_k": 2, "top_p": 0.6}, [0]),
        # min-p after top-p: 0.4 alone would be more than 0.55 of what min-p leaves.
        ((0.4, 0.3, 0.2, 0.1), {"top_p": 0.55, "min_p": 0.7}, [0, 1]),
        ((0.4, 0.3, 0.2, 0.1), {"top_k": 3, "min_p": 0.6}, [0, 1]),
    ],
)
def test_worked_by_hand(
    probabilities: tuple[float, ...], options: dict[str, float], left: list[int]
) -> None:
    logits = logits_of(*probabilities)
    sampling = Sampling(**options)
    logp = every_logp(logits, sampling)[0].cpu()
    assert (logp > -INF).nonzero().flatten().tolist() == left
    mass = sum(probabilities[i] for i in left)
    expected = torch.tensor([probabilities[i] / mass for i in left])
    assert torch.allclose(logp[left].exp(), expected, rtol=1e-6)
    found = score_tokens(logits, torch.zeros(1, dtype=torch.int64, device=DEVICE), sampling)
    entropy = -(expected * expected.log()).sum()
    assert torch.allclose(found.entropy.cpu(), entropy.expand(1), rtol=1e-6, atol=1e-7)
    distance = [math.log(max(probabilities) / p) for p in probabilities]
    cut = [d for i, d in enumerate(distance) if i not in left]
    if cut:
        expected_support = (max(distance[i] for i in left) + min(cut)) / 2
        assert abs(float(found.support[0]) - expected_support) < 1e-5


def test_support_is_infinite_where_nothing_is_cut() -> None:
    logits = make_logits(50, ROWS)
    streams = new_streams(0, ROWS).to(DEVICE)
    plain = sample_tokens(logits, streams, steps(ROWS))
    assert (plain.support == INF).all()
    for sampling in (
        Sampling(top_k=50),
        Sampling(top_k=10**30),
        Sampling(top_p=1.0),
        Sampling(min_p=0.0),
        Sampling(top_k=torch.full((ROWS,), 51, device=DEVICE), top_p=1, min_p=0),
    ):
        found = sample_tokens(logits, streams, steps(ROWS), sampling)
        assert torch.equal(found.ids, plain.ids)
        assert torch.equal(found.support, plain.support)
        assert torch.allclose(found.logp, plain.logp, rtol=1e-6, atol=1e-6)
        assert torch.allclose(found.entropy, plain.entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_replay_the_support(options: dict[str, float], dtype: torch.dtype) -> None:
    logits = make_logits(300, ROWS).to(dtype)
    sampling = per_row(options)
    drawn = sample_tokens(logits, new_streams(2, ROWS).to(DEVICE), steps(ROWS), sampling)
    batch = TokenBatch(
        drawn.ids,
        torch.ones(ROWS, device=DEVICE),
        temperature=sampling.temperature,
        support=drawn.support,
    )
    objective = token_local()(lambda logp, entropy, batch: logp + entropy)
    replayed = policy_loss(logits.requires_grad_(), batch, objective)
    assert torch.allclose(replayed.logp, drawn.logp, rtol=1e-6, atol=1e-6)
    assert torch.allclose(replayed.entropy, drawn.entropy, rtol=1e-6, atol=1e-6)


def test_logits_that_differ_by_less_than_the_margin_are_ties() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0 - 1e-5, 0.9]], device=DEVICE)
    logp = every_logp(logits, Sampling(top_k=2))[0]
    assert (logp > -INF).tolist() == [True, True, True, False]


def test_strided_logits() -> None:
    logits = make_logits(300, ROWS)
    wide = torch.full((2 * ROWS, 900), 7.0, device=DEVICE)
    wide[::2, 1::3] = logits
    targets = logits.argmax(1)
    for options in CUTS[::3]:
        want = score_tokens(logits, targets, Sampling(**options))
        for view in (wide[::2, 1::3], logits.t().contiguous().t()):
            got = score_tokens(view, targets, Sampling(**options))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_few_flat_and_peaked_rows() -> None:
    """Rows all of whose tokens are within reach, and such as have one."""
    logits = torch.zeros(4, 3000, device=DEVICE)
    logits[1, 5] = 50.0
    logits[2] = torch.linspace(0, 1e-3, 3000)
    logits[3, 1500:] = -80.0
    support = score_tokens(logits, logits.argmax(1), Sampling(top_p=0.5)).support.cpu()
    # In the middle of the gap, if there is one.
    assert support[[0, 1, 3]].tolist() == [INF, 25.0, 40.0]
    assert abs(float(support[2]) - 0.5e-3) < 2e-6
    support = score_tokens(logits, logits.argmax(1), Sampling(top_k=1501)).support.cpu()
    assert support[[0, 1, 3]].tolist() == [INF] * 3
    assert abs(float(support[2]) - 1e-3 * 1500.5 / 2999) < 2e-6


def test_pytorch_path_equals_itself_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(300, 40).cpu()
    transform = Transform(torch.linspace(0.5, 2.0, 40), torch.randn(300), 0.2)
    top_k, top_p = torch.arange(40) % 9 + 1, torch.linspace(0.01, 1.0, 40)
    for cuts in ((top_k, None), (None, top_p), (top_k, top_p)):
        whole = cut_rows_torch(logits, transform, *cuts)
        with monkeypatch.context() as patch:
            patch.setattr(truncation, "_BLOCK_ELEMENTS", 7 * 300)
            assert torch.equal(cut_rows_torch(logits, transform, *cuts), whole)


@pytest.mark.skipif(backend.name == "cpu", reason="needs a Triton backend")
@pytest.mark.parametrize("n_cols", [3, 300, 2500])
def test_kernel_equals_pytorch(n_cols: int) -> None:
    logits = make_logits(n_cols, ROWS)
    numbers = steps(ROWS)
    factor = torch.linspace(0.5, 2.0, ROWS, device=DEVICE)
    bias = torch.randn(n_cols, device=DEVICE)
    for transform in (Transform(factor), Transform(factor, bias), Transform(factor, bias, 0.2)):
        for cuts in (
            Cuts(numbers + 1),
            Cuts(None, 0.3 + 0.1 * numbers / ROWS),
            Cuts(7 * numbers + 1, 0.9 - 0.1 * numbers / ROWS),
        ):
            want = cut_rows_torch(logits, transform, *cuts[:2])
            found = support_of(logits, transform, cuts)
            assert torch.allclose(found, want, rtol=1e-6, atol=1e-6)


def test_bad_values_on_a_device_are_marked() -> None:
    """The host cannot look at them: their rows have no support, and are refused later."""
    logits = torch.randn(5, 20)
    good = torch.ones(5)
    for name, bad in (
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 2.0),
    ):
        values = torch.full((5,), 1)
        values = values if name == "top_k" else values.float()
        values[3] = bad
        support = support_of(logits, Transform(good), Cuts(**{name: values}))
        assert support.isnan().nonzero().flatten().tolist() == [3]
