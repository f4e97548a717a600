"""sample_tokens against float64 on the same words; under ROLLFUSE_BACKEND=interpret, the kernel.

Vocabularies of 1, 2 and 7 are less than any block, 300 no power of two, 5,000 more than two of the
kernel's blocks with a part left over.
"""

import contextlib

import pytest
import torch
from sampling_cases import DEVICE, FEW, INF, ROWS, check, inputs
from torch.overrides import TorchFunctionMode

from rollfuse.kernels import drawing, truncation
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.drawing import Noise, draw_tokens_torch
from rollfuse.kernels.noise import (
    NoiseFamily,
    Purpose,
    fork_streams,
    gumbels,
    new_streams,
    noise_words,
    row_keys,
)
from rollfuse.kernels.rows import RowStatistics, Transform
from rollfuse.kernels.sampling import Sampling, sample_tokens

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("n_cols", [1, 2, 7, 300, 5000])
def test_draws_equal_float64(n_cols: int) -> None:
    logits, streams, positions = inputs(FEW, n_cols)
    temperature = torch.linspace(0.3, 2.0, FEW, device=DEVICE)
    for value in (1.0, 0.7, temperature):
        got = sample_tokens(logits, streams, positions, Sampling(value))
        check(got, logits, streams, positions, Sampling(value))
    shared = sample_tokens(logits, streams, positions, Sampling(0.7))
    each = sample_tokens(
        logits, streams, positions, Sampling(torch.full((FEW,), 0.7, device=DEVICE))
    )
    assert all(torch.equal(a, b) for a, b in zip(shared, each, strict=True))


def test_many_rows_of_a_small_vocabulary() -> None:
    logits, streams, positions = inputs(ROWS, 16)
    check(sample_tokens(logits, streams, positions), logits, streams, positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    logits, streams, positions = inputs(FEW, 300)
    logits = logits.to(dtype)
    got = sample_tokens(logits, streams, positions, Sampling(0.8))
    check(got, logits, streams, positions, Sampling(0.8))
    assert got.logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_float64_keeps_float64_statistics() -> None:
    logits, streams, positions = inputs(30, 50)
    logits = logits.double() + 1e-9
    got = sample_tokens(logits, streams, positions)
    logps = logits.log_softmax(1)
    assert torch.allclose(got.logp, logps.gather(1, got.ids.unsqueeze(1))[:, 0], rtol=1e-13)
    assert torch.allclose(got.entropy, -(logps.exp() * logps).sum(1), rtol=1e-13)


@pytest.mark.parametrize("margin", [5.0, 16.0, 25.0])
def test_confident_rows_keep_their_digits(margin: float) -> None:
    logits, streams, positions = inputs(20, 40, scale=0.5)
    logits -= 1000.0
    logits[:, 11] = logits.amax(1) + margin
    got = sample_tokens(logits, streams, positions)
    z = logits.double()
    logps = z.log_softmax(1)
    entropy = -(logps.exp() * logps).sum(1)
    logp = torch.where(got.ids == 11, 0.0, logps.gather(1, got.ids.unsqueeze(1))[:, 0])
    others = z.scatter(1, torch.full((20, 1), 11, device=DEVICE), -INF).logsumexp(1)
    exact = -torch.log1p((others - z[:, 11]).exp())  # 1e-11 at 25 nats: log_softmax gives noise
    logp = torch.where(got.ids == 11, exact, logp)
    assert torch.allclose(got.logp.double(), logp, rtol=2e-6, atol=0)
    assert torch.allclose(got.entropy.double(), entropy, rtol=1e-5, atol=1e-14)


def test_forbidden_columns_are_never_drawn() -> None:
    logits, streams, positions = inputs(ROWS // 4, 9)
    logits[:, ::2] = -INF
    check(sample_tokens(logits, streams, positions), logits, streams, positions)
    assert (sample_tokens(logits, streams, positions).ids % 2 == 1).all()
    # Masks made of the smallest float overflow when divided by a temperature below 1.
    low = logits.clamp(min=torch.finfo(torch.float32).min)
    got = sample_tokens(low, streams, positions, Sampling(0.5))
    expected = sample_tokens(logits, streams, positions, Sampling(0.5))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_column_left_is_certain() -> None:
    logits, streams, positions = inputs(6, 5000)
    logits[:] = -INF
    logits[:, 4321] = 3.0
    got = sample_tokens(logits, streams, positions)
    assert (got.ids == 4321).all()
    assert (got.logp == 0).all()
    assert (got.entropy == 0).all()


def test_a_row_draws_the_same_in_any_company() -> None:
    logits, streams, positions = inputs(FEW, 300)
    whole = sample_tokens(logits, streams, positions)
    order = torch.tensor([6, 1, 7, 3], device=DEVICE)
    part = sample_tokens(logits[order], streams[order], positions[order])
    assert torch.equal(part.ids, whole.ids[order])
    assert torch.allclose(part.logp, whole.logp[order], rtol=1e-6, atol=1e-6)
    assert torch.allclose(part.entropy, whole.entropy[order], rtol=1e-6, atol=1e-6)


def test_stream_and_position_both_matter() -> None:
    logits = torch.zeros(FEW, 1000, device=DEVICE)
    streams = new_streams(0, 1).to(DEVICE).expand(FEW)
    positions = torch.arange(FEW, device=DEVICE)
    first = sample_tokens(logits, streams, positions).ids
    assert first.unique().numel() > FEW - 4
    later = sample_tokens(logits, streams, positions + FEW).ids
    others = sample_tokens(logits, fork_streams(streams[:1], FEW)[0], positions).ids
    assert int((first == later).sum()) <= 1
    assert int((first == others).sum()) <= 1
    assert torch.equal(first, sample_tokens(logits, streams, positions.int()).ids)


def test_equal_scores_go_to_the_lowest_id() -> None:
    # At 1e9 a float32 has steps of 64: the noise vanishes.
    logits, streams, positions = inputs(8, 5000)
    logits[:] = 1e9
    assert (sample_tokens(logits, streams, positions).ids == 0).all()
    logits[:, :2500] = 0.0
    assert (sample_tokens(logits, streams, positions).ids == 2500).all()
    # At 1e7 the steps are 1: ties that the noise decides, within blocks and between them.
    logits[:] = 1e7
    words = noise_words(
        row_keys(streams, positions, Purpose.SAMPLE), torch.arange(5000, device=DEVICE)
    )
    rounded = (logits + gumbels(words)).cpu()
    expected = [row.index(max(row)) for row in rounded.tolist()]
    assert sample_tokens(logits, streams, positions).ids.tolist() == expected


def test_strided_logits() -> None:
    logits, streams, positions = inputs(12, 300)
    expected = sample_tokens(logits, streams, positions)
    wide = torch.full((24, 900), 7.0, device=DEVICE)
    wide[::2, 1::3] = logits
    for view in (wide[::2, 1::3], logits.t().contiguous().t()):
        assert not view.is_contiguous()
        got = sample_tokens(view, streams, positions)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    one = sample_tokens(logits[:1].expand(12, -1), streams, positions)
    check(one, logits[:1].expand(12, -1), streams, positions)


@pytest.mark.skipif(backend.name == "cpu", reason="needs a Triton backend")
@pytest.mark.parametrize("family", list(NoiseFamily))
def test_kernel_draws_what_pytorch_draws(family: NoiseFamily) -> None:
    n_rows, n_cols = 200, 64
    logits, _, positions = inputs(n_rows, n_cols)
    factor = torch.linspace(0.5, 2.0, n_rows, device=DEVICE)
    bias = torch.randn(n_cols, device=DEVICE)
    noise = Noise(new_streams(1, 2 * n_rows).view(-1, 2).to(DEVICE), positions, family)
    for transform in (
        Transform(factor),
        Transform(factor, bias, 0.2).cut(torch.full((n_rows,), 2.0, device=DEVICE)),
    ):
        found = drawing.draw_tokens_triton(logits, transform, noise, 7)
        want = draw_tokens_torch(logits, transform, noise, 7)
        assert int((found[0] != want[0]).sum()) <= 1
        assert torch.allclose(found[1], want[1], rtol=2e-6, atol=2e-6)
        for a, b in zip(found[2], want[2], strict=True):
            assert torch.allclose(a, b, rtol=2e-6, atol=2e-6)


def test_no_rows() -> None:
    got = sample_tokens(*inputs(0, 10))
    assert [x.shape for x in got] == [(0,)] * 4


def test_no_gradient() -> None:
    logits, streams, positions = inputs(3, 10)
    got = sample_tokens(logits.requires_grad_(), streams, positions)
    assert not got.logp.requires_grad
    assert not got.entropy.requires_grad


class LargestResult(TorchFunctionMode):
    """Remembers the most bytes that any call of torch made, apart from views of `given`."""

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.n_bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != self.given:
                self.n_bytes = max(self.n_bytes, out.untyped_storage().nbytes())
        return out


def test_memory_is_bounded_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, streams, positions = (x.cpu() for x in inputs(1200, 1000))
    transform = Transform(torch.ones(1200))
    noise = Noise(streams.unsqueeze(1), positions, NoiseFamily.ROLLFUSE)
    with LargestResult(logits) as largest:
        torch.softmax(logits, 1)
        assert largest.n_bytes == 4 * logits.numel()  # the watch works
    with LargestResult(logits) as largest:
        whole = draw_tokens_torch(logits, transform, noise, 0)
    assert 4 * 100_000 < largest.n_bytes <= 4 << 19
    monkeypatch.setattr(drawing, "_BLOCK_ELEMENTS", 7 * 1000)
    parts = draw_tokens_torch(logits, transform, noise, 0)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf", "nan before a finite block"])
def test_undrawable_rows(bad: str) -> None:
    logits, streams, positions = inputs(5, 5000)
    if bad == "nan":
        logits[3, 4000] = float("nan")
    elif bad == "inf":
        logits[3, 17] = INF
    elif bad == "all -inf":
        logits[3] = -INF
    else:
        logits[3, :4096] = -INF
        logits[3, 0] = float("nan")
    if DEVICE == "cpu":
        with pytest.raises(
            ValueError, match="need a finite maximum in every row, got none in row 3"
        ):
            sample_tokens(logits, streams, positions)
        return
    got = sample_tokens(logits, streams, positions)
    assert ((got.ids == -1).nonzero().flatten()).tolist() == [3]
    assert got.logp.isnan().nonzero().flatten().tolist() == [3]
    assert got.entropy.isnan().nonzero().flatten().tolist() == [3]


def test_a_device_is_not_read(monkeypatch):
    """So that a CUDA graph may capture it: nothing beside the kernel looks at a value.

    Meta tensors have none to read, nor autocast.
    """

    def kernel(logits, transform, noise, first_token):
        statistics = (torch.empty(4, device="meta") for _ in range(4))
        scores = torch.empty(4, device="meta")
        return torch.empty_like(noise.positions), scores, RowStatistics(*statistics)

    def cut(logits, transform, top_k, top_p):
        return torch.empty_like(transform.factor)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(drawing, "draw_tokens_torch", kernel)
    monkeypatch.setattr(drawing, "draw_tokens_triton", kernel, raising=False)
    monkeypatch.setattr(truncation, "cut_rows_torch", cut)
    monkeypatch.setattr(truncation, "cut_rows_triton", cut, raising=False)
    rows = torch.zeros(4, dtype=torch.int64, device="meta")
    values = torch.ones(4, device="meta")
    for sampling in (
        Sampling(0.7),
        Sampling(values),
        Sampling(1.0, 3, 0.5, 0.1),
        Sampling(values, rows, values, values),
    ):
        found = sample_tokens(torch.zeros(4, 50, device="meta"), rows, rows, sampling)
        assert found.logp.shape == found.support.shape == (4,)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), INF])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"need finite values > 0 \(for greedy decoding"):
        Sampling(temperature)
    with pytest.raises(ValueError, match=r"got .* in row 1"):
        Sampling(torch.tensor([1.0, temperature]))


def test_bad_input_is_refused() -> None:
    logits, streams, positions = inputs(4, 6)
    with pytest.raises(ValueError, match=r"logits: need shape \(N, V\)"):
        sample_tokens(logits[0], streams, positions)
    with pytest.raises(ValueError, match="V >= 1"):
        sample_tokens(logits[:, :0], streams, positions)
    with pytest.raises(TypeError, match="logits: need float32"):
        sample_tokens(logits.long(), streams, positions)
    with pytest.raises(TypeError, match="streams: need int64"):
        sample_tokens(logits, streams.int(), positions)
    with pytest.raises(TypeError, match="positions: need int64"):
        sample_tokens(logits, streams, positions.float())
    with pytest.raises(ValueError, match=r"streams: need shape \(4,\)"):
        sample_tokens(logits, streams[:3], positions)
    for wrong in (streams.view(4, 1, 1), streams.view(4, 1)[:, :0], streams.view(2, 2)):
        with pytest.raises(ValueError, match=r"streams: need shape \(4,\) or \(4, K\) with K >= 1"):
            sample_tokens(logits, wrong, positions)
    with pytest.raises(ValueError, match=r"positions: need shape \(4,\)"):
        sample_tokens(logits, streams, positions[:1])
    with pytest.raises(ValueError, match=r"temperature: need shape \(4,\)"):
        sample_tokens(logits, streams, positions, Sampling(torch.ones(3, device=DEVICE)))
    for value in (1e39, 1e300, 1e-40, torch.tensor([1.0, 1e-40]), torch.tensor([1e39]).double()):
        with pytest.raises(ValueError, match="temperature: need finite values > 0"):
            Sampling(value)
    with pytest.raises(ValueError, match=r"top_p: need values in \(0, 1\] .* got 1e-50"):
        Sampling(top_p=1e-50)
    with pytest.raises(ValueError, match=r"top_p: need values in \(0, 1\] .* in row 0"):
        Sampling(top_p=torch.tensor([1e-50], dtype=torch.float64))
    Sampling(torch.tensor([0.5, 1.0], dtype=torch.float16), top_p=torch.ones(2).half())
    with pytest.raises(TypeError, match="temperature: need float32"):
        Sampling(torch.ones(3, dtype=torch.int64))
