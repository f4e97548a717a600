"""What is drawn: the law, cuts and several streams, for every family of noise; what is refused."""

import pytest
import torch
from sampling_cases import CUTS, DEVICE, FEW, INF, ROWS, check, chi_square, inputs, make_logits

from rollfuse import NoiseFamily, Sampling, new_streams, sample_tokens, score_tokens
from rollfuse.kernels.dispatch import backend

pytestmark = pytest.mark.kernels

LAWS = [(NoiseFamily.VLLM, 3), (NoiseFamily.VLLM, 1), (NoiseFamily.ROLLFUSE, 1)]
LAWS += [(NoiseFamily.ROLLFUSE, 3)]
LAWS = LAWS[:1] if backend.name == "interpret" else LAWS


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 3}, [0.4, 0.3, 0.2, 0.0]),
        ({"top_p": 0.85}, [0.4, 0.3, 0.2, 0.0]),
        ({"min_p": 0.6}, [0.4, 0.3, 0.0, 0.0]),
        ({"top_k": 3, "top_p": 0.7, "min_p": 0.1}, [0.4, 0.3, 0.0, 0.0]),
    ],
)
@pytest.mark.parametrize(("family", "n_streams"), LAWS)
def test_draws_follow_what_is_left(
    options: dict[str, float], left: list[float], family: NoiseFamily, n_streams: int
) -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    logits = (p.log() * 0.5).float().expand(ROWS, -1).to(DEVICE)
    positions = torch.arange(ROWS, device=DEVICE)
    streams = new_streams(2, n_streams).to(DEVICE).expand(ROWS, -1)
    sampling = Sampling(0.5, **options, noise=family)
    ids = sample_tokens(logits, streams, positions, sampling).ids
    expected = torch.tensor(left, dtype=torch.float64)
    assert chi_square(ids, expected / expected.sum()) < 16.3  # chance 1e-3


def test_rows_may_have_distributions_of_their_own() -> None:
    _, streams, positions = inputs(ROWS, 4)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    number = torch.arange(ROWS, device=DEVICE) % 3
    temperature = torch.tensor([1.0, 0.5, 2.0], device=DEVICE)[number]
    logits = p.log().float().to(DEVICE) * temperature.unsqueeze(1)
    sampling = Sampling(
        temperature, number + 2, torch.tensor([1.0, 0.6, 0.95], device=DEVICE)[number]
    )
    ids = sample_tokens(logits, streams, positions, sampling).ids
    for row, left in enumerate(([0.4, 0.3, 0, 0], [0.4, 0.3, 0, 0], [0.4, 0.3, 0.2, 0.1])):
        expected = torch.tensor(left, dtype=torch.float64)
        assert chi_square(ids[number == row], expected / expected.sum()) < 16.3


CUT = [{"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.05}]


@pytest.mark.parametrize("options", CUT)
@pytest.mark.parametrize("n_cols", [3, 300, 2500])
def test_cut_draws_equal_float64(options: dict[str, float], n_cols: int) -> None:
    logits, streams, positions = inputs(FEW // 2, n_cols)
    for family in NoiseFamily:
        sampling = Sampling(0.8, **options, noise=family)
        check(
            sample_tokens(logits, streams, positions, sampling),
            logits,
            streams,
            positions,
            sampling,
        )


@pytest.mark.parametrize("family", list(NoiseFamily))
def test_several_streams_take_the_largest_noise(family: NoiseFamily) -> None:
    logits, _, positions = inputs(FEW, 2500)
    sampling = Sampling(0.8, noise=family)
    streams = new_streams(3, 4 * FEW).view(FEW, 4).to(DEVICE)
    streams[1, 2:] = streams[1, :2]  # equal ones count once
    streams[2] = streams[2, :1]
    got = sample_tokens(logits, streams, positions, sampling)
    check(got, logits, streams, positions, sampling)
    alone = sample_tokens(logits, streams[:, 0], positions, sampling)
    assert got.ids[2] == alone.ids[2]
    assert not torch.equal(got.ids, alone.ids)
    one = sample_tokens(logits, streams[:, :1], positions, sampling)
    assert all(torch.equal(a, b) for a, b in zip(one, alone, strict=True))
    turned = sample_tokens(logits, streams.flip(1), positions, sampling)
    assert torch.equal(turned.ids, got.ids)


@pytest.mark.skipif(DEVICE != "cpu", reason="a device marks its rows instead")
@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_undrawable_rows_are_refused(bad: float) -> None:
    logits = make_logits(70, 6)
    logits[2, 5] = bad
    if bad == -INF:
        logits[2] = bad
    targets = torch.full((6,), 69)
    for options in CUTS[::2]:
        with pytest.raises(ValueError, match="logits: need a finite maximum .* none in row 2"):
            score_tokens(logits, targets, Sampling(**options))
        with pytest.raises(ValueError, match="none in row 2"):
            sample_tokens(logits, new_streams(0, 6), torch.arange(6), Sampling(**options))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("top_k", [0, -3]),
        ("top_p", [0.0, -0.1, 1.01, float("nan")]),
        ("min_p", [-0.1, 1.01, float("nan")]),
    ],
)
def test_bad_values_are_refused(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{name}: need .* got {value}"):
            Sampling(**{name: value})
        with pytest.raises(ValueError, match=f"{name}: need .* got .* in row 1"):
            Sampling(**{name: torch.tensor([1, value])})
    logits = make_logits(9, 6)
    ones = torch.ones(7, dtype=torch.int64 if name == "top_k" else torch.float32)
    with pytest.raises(ValueError, match=rf"{name}: need shape \(6,\)"):
        score_tokens(logits, logits.argmax(1), Sampling(**{name: ones.to(DEVICE)}))
    with pytest.raises(ValueError, match=rf"{name}: need \(N,\)"):
        Sampling(**{name: ones.unsqueeze(0)})


def test_bad_types_are_refused() -> None:
    with pytest.raises(TypeError, match="top_k: need an int or an integer tensor, got float"):
        Sampling(top_k=5.0)
    with pytest.raises(TypeError, match="top_k: need int64 or int32"):
        Sampling(top_k=torch.ones(3))
    with pytest.raises(TypeError, match="top_k: need an int .*, got bool"):
        Sampling(top_k=True)
    with pytest.raises(TypeError, match="top_p: need a float .*, got str"):
        Sampling(top_p="0.9")
    with pytest.raises(TypeError, match="min_p: need float32"):
        Sampling(min_p=torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="noise: need a NoiseFamily, got 'vllm'"):
        Sampling(noise="vllm")
    assert Sampling(noise=NoiseFamily.VLLM).noise is NoiseFamily.VLLM
    logits = make_logits(9, 6)
    with pytest.raises(TypeError, match="sampling: need a Sampling, got float"):
        score_tokens(logits, logits.argmax(1), 0.7)
    with pytest.raises(ValueError, match=r"targets: need token ids in \[0, 9\), got 0 to 9"):
        score_tokens(logits.cpu(), torch.arange(6) % 2 * 9)
    with pytest.raises(ValueError, match=r"targets: need shape"):
        score_tokens(logits, logits.argmax(1)[1:])
