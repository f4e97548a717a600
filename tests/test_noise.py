"""The noise: its exact words, its statistical quality, and streams.

Nothing here is random: seeds are fixed, so a test passes always or never. Bounds lie five to six
standard deviations out.
"""

import math

import pytest
import torch

from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.noise import (
    Purpose,
    fork_streams,
    gumbels,
    need_distinct_streams,
    new_streams,
    noise_words,
    row_keys,
    uniforms,
)

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if backend.name in ("cuda", "rocm") else "cpu"
M32, M64 = 2**32 - 1, 2**64 - 1


def reference_word(stream: int, position: int, purpose: int, token: int) -> int:
    def mix64(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & M64
        return x ^ (x >> 31)

    key = mix64((stream + 0xD1B54A32D192ED03 * purpose) & M64) ^ (position & M64)
    key = mix64(key)
    x = (token * 0x9E3779B9 & M32) ^ (key & M32)
    x = ((x ^ (x >> 16)) * 0x7FEB352D + (key >> 32)) & M32
    x = (x ^ (x >> 15)) * 0x846CA68B & M32
    return x ^ (x >> 16)


def unsigned(words: torch.Tensor) -> torch.Tensor:
    return words.to(torch.int64) & M32


def some_rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    streams = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
    positions = torch.randint(0, 2**20, (n,), generator=generator)
    streams[:3] = torch.tensor([0, -1, 2**63 - 1])
    positions[:3] = torch.tensor([2**31, 2**33, 0])
    return streams, positions


def words_of(streams: torch.Tensor, positions: torch.Tensor, n_tokens: int) -> torch.Tensor:
    keys = row_keys(streams, positions, Purpose.SAMPLE)
    return noise_words(keys, torch.arange(n_tokens))


# ---- the words

RECORDED_SAMPLE = [
    [0x4591F093, 0x887A984C, 0xD6558AD8, 0x26F1AF89],
    [0x90D5C0FD, 0x0F1C09B0, 0xEB324E7D, 0xD0DFD431],
    [0xF435C8CC, 0x9C7ACA8E, 0x16D21227, 0x7AD74966],
    [0x5451B0AE, 0xBAE9AF5D, 0xECB88037, 0x948E5410],
]
RECORDED_FORK = [
    [0x8E626420, 0xB2B7AB0C, 0x47A61530, 0x050BA95C],
    [0xF79434D5, 0x1EB356DA, 0x20A4CF12, 0x4435EFFC],
    [0x230FB5B9, 0x6E0E519B, 0xA91ED2FE, 0x4207EE26],
    [0x1FF409BA, 0xBCB5507A, 0x3B9FDE67, 0xEDE78CC5],
]
RECORDED_SEED = [
    [0x616018BA, 0xD9D29F34, 0x4F3153B5, 0xDC6C6CD4],
    [0x534BD619, 0x94F3504C, 0xE0CCF357, 0xA5F9F30D],
    [0x271B4121, 0x60EDE9AB, 0x5910CD22, 0xDB4E283F],
    [0x4FB9DE3C, 0x774F6F39, 0x2E8811ED, 0xE003FC9F],
]
RECORDED_STREAMS = [-1562567443480964690, 8508787809655029283, 1792300793219659452]
RECORDED_CHILDREN = [7258974366929130294, 5333317107285555456]


def test_recorded_words() -> None:
    # Any change of the function makes recorded rollouts impossible to verify.
    streams = torch.tensor([0, 1, -1, 0x0123456789ABCDEF])
    positions = torch.tensor([0, 1, 2, 4096])
    tokens = torch.tensor([0, 1, 2, 151_935])
    recorded = {
        Purpose.SAMPLE: RECORDED_SAMPLE,
        Purpose.FORK: RECORDED_FORK,
        Purpose.SEED: RECORDED_SEED,
    }
    for purpose, expected in recorded.items():
        words = noise_words(row_keys(streams, positions, purpose), tokens)
        assert unsigned(words).tolist() == expected


def test_recorded_streams() -> None:
    assert (new_streams(7, 3)).tolist() == RECORDED_STREAMS
    assert fork_streams(torch.tensor([5]), 2)[0].tolist() == RECORDED_CHILDREN


def test_words_equal_the_integer_reference() -> None:
    streams, positions = some_rows(20)
    tokens = torch.tensor([0, 1, 2, 77, 151_935, 2**31 - 1])
    for purpose in Purpose:
        keys = row_keys(streams.to(DEVICE), positions.to(DEVICE), purpose)
        words = unsigned(noise_words(keys, tokens.to(DEVICE)))
        expected = [
            [reference_word(s, p, purpose, t) for t in tokens.tolist()]
            for s, p in zip(streams.tolist(), positions.tolist(), strict=True)
        ]
        assert words.tolist() == expected


def test_tokens_may_differ_by_row() -> None:
    keys = row_keys(*some_rows(5), Purpose.SAMPLE)
    tokens = torch.arange(20, dtype=torch.int32).view(5, 4)
    full = noise_words(keys, torch.arange(20))
    assert torch.equal(noise_words(keys, tokens), full.gather(1, tokens.long()))


@pytest.mark.skipif(backend.name == "cpu", reason="needs a Triton backend")
def test_triton_noise_equals_pytorch() -> None:
    from noise_kernel import noise_kernel

    n_rows, n_cols = 12, 1000
    streams, positions = (x.to(DEVICE) for x in some_rows(n_rows))
    for purpose in Purpose:
        words = torch.zeros(n_rows, n_cols, dtype=torch.int32, device=DEVICE)
        u, g = (torch.zeros(n_rows, n_cols, device=DEVICE) for _ in range(2))
        noise_kernel[(n_rows,)](
            streams, positions, words, u, g, n_cols, PURPOSE=int(purpose), BLOCK=1024
        )
        expected = noise_words(
            row_keys(streams, positions, purpose), torch.arange(n_cols, device=DEVICE)
        )
        assert torch.equal(words, expected)
        assert torch.equal(u, uniforms(expected))
        # A few ulp of logarithms whose results are up to 23.
        assert torch.allclose(g, gumbels(expected), rtol=1e-6, atol=1e-6)


# ---- uniforms and Gumbels

EDGE_WORDS = [0, 1, 2, 2**16, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 2**9, 2**32 - 129, 2**32 - 1]


def edge_words() -> torch.Tensor:
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in EDGE_WORDS], dtype=torch.int32)


def test_uniforms_are_the_midpoints_kept_below_one() -> None:
    expected = torch.tensor([(w + 0.5) * 2.0**-32 for w in EDGE_WORDS], dtype=torch.float64)
    u = uniforms(edge_words())
    assert u.dtype == torch.float32
    assert torch.allclose(u.double(), expected, rtol=2.0**-23, atol=0)
    assert u.min() == 2.0**-33
    assert u.max() == 1.0 - 2.0**-24


def test_large_gumbels_come_from_small_words() -> None:
    g = gumbels(edge_words())
    expected = -(-(-uniforms(edge_words()).double()).log1p()).log()
    assert torch.allclose(g.double(), expected, rtol=2e-7, atol=2e-7)
    assert torch.isfinite(g).all()
    assert torch.equal(g, g.sort(descending=True).values)
    assert abs(float(g[0]) - 33 * math.log(2)) < 1e-5  # a 24-bit uniform would stop at 16.6


def test_gumbels_follow_their_law() -> None:
    g = gumbels(words_of(new_streams(3, 1024), torch.arange(1024), 1024)).double()
    assert chi_square((torch.exp(-torch.exp(-g)) * 256).long().clamp(max=255), 256) < bound(255)
    # The tail: P(g > 12) = 1 - exp(-exp(-12)), 6.4 of a million expected.
    assert 1 <= int((g > 12.0).sum()) <= 18


# ---- quality


def chi_square(values: torch.Tensor, n_bins: int) -> float:
    counts = torch.bincount(values.flatten(), minlength=n_bins).double()
    expected = counts.sum() / n_bins
    return float(((counts - expected) ** 2 / expected).sum())


def bound(degrees: int) -> float:
    """Six standard deviations above the mean of a chi-square."""
    return degrees + 6.0 * math.sqrt(2.0 * degrees)


def worst_byte(words: torch.Tensor) -> float:
    return max(chi_square((words >> shift) & 255, 256) for shift in (0, 8, 16, 24))


def layouts() -> dict[str, torch.Tensor]:
    """A million words along each input, 1-d."""
    n, zeros = 1 << 20, torch.zeros(1 << 20, dtype=torch.int64)
    one = torch.zeros(1, dtype=torch.int64)
    steps = torch.arange(n)
    return {
        "tokens": words_of(one, one, n)[0],
        "positions": words_of(zeros, steps, 1)[:, 0],
        "streams": words_of(steps, zeros, 1)[:, 0],
        "high bits of streams": words_of(steps << 40, zeros, 1)[:, 0],
        "children": noise_words(
            row_keys(fork_streams(steps[: n // 8], 8).flatten(), zeros, Purpose.SAMPLE), one
        )[:, 0],
        "positions and tokens": words_of(zeros[:1024], steps[:1024], 1024).flatten(),
    }


def test_bytes_are_uniform_along_every_input() -> None:
    for name, words in layouts().items():
        assert worst_byte(words) < bound(255), name


def test_neighbouring_words_are_independent() -> None:
    for name, words in layouts().items():
        a, b = words[:-1], words[1:]
        # Equal or shifted copies leave a mark on the differences, linear relations on the rest.
        assert worst_byte(a ^ b) < bound(255), name
        assert worst_byte(a - b) < bound(255), name
        pairs = (((a >> 28) & 15) << 4) | ((b >> 28) & 15)
        assert chi_square(pairs, 256) < bound(255), name
        u, v = uniforms(a).double() - 0.5, uniforms(b).double() - 0.5
        correlation = float((u * v).mean()) * 12
        assert abs(correlation) < 5.5 / math.sqrt(a.numel()), name


def test_purposes_are_independent() -> None:
    streams, positions, tokens = new_streams(1, 1024), torch.arange(1024), torch.arange(256)
    words = [noise_words(row_keys(streams, positions, p), tokens) for p in Purpose]
    for i, a in enumerate(words):
        for b in words[:i]:
            assert worst_byte(a ^ b) < bound(255)
            assert int((a == b).sum()) <= 2


def test_every_input_bit_moves_every_output_bit_half_the_time() -> None:
    n = 4096
    streams, positions = some_rows(n)
    tokens = torch.arange(n).unsqueeze(1) * 37

    def words(stream: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        return noise_words(row_keys(stream, position, Purpose.SAMPLE), token)[:, 0]

    base = words(streams, positions, tokens)
    flipped = [words(streams ^ (1 << b), positions, tokens) for b in range(63)]
    flipped += [words(streams, positions ^ (1 << b), tokens) for b in range(63)]
    flipped += [words(streams, positions, tokens ^ (1 << b)) for b in range(31)]
    changed = torch.stack(flipped) ^ base
    share = torch.stack([((changed >> b) & 1).double().mean(1) for b in range(32)])
    # 5,024 cells of 4,096 flips: 6 standard deviations.
    assert float((share - 0.5).abs().max()) < 6 * 0.5 / math.sqrt(n)


def test_no_two_rows_share_words_at_any_shift() -> None:
    words = words_of(new_streams(0, 8), torch.zeros(8, dtype=torch.int64), 1 << 15)
    distinct = words.unique().numel()
    # Birthday: 2**18 words of 32 bits meet about 8 times.
    assert words.numel() - distinct < 30


# ---- what the noise is for


def draws(logits: torch.Tensor, streams: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return (logits + gumbels(words_of(streams, positions, logits.numel()))).argmax(1)


def misfit(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("probabilities", [[0.5, 0.5], [0.5, 0.2, 0.15, 0.1, 0.05]])
def test_gumbel_argmax_follows_softmax_and_one_percent_shows(probabilities: list[float]) -> None:
    n = 2_000_000
    p = torch.tensor(probabilities, dtype=torch.float64)
    ids = draws(p.log().float(), new_streams(11, 1).expand(n), torch.arange(n))
    counts = torch.bincount(ids, minlength=p.numel()).double()
    limit = {2: 10.8, 5: 18.5}[p.numel()]  # passed by chance once in a thousand
    assert misfit(counts, p) < limit
    biased = p.clone()
    biased[0] *= 1.01
    ids = draws(biased.log().float(), new_streams(11, 1).expand(n), torch.arange(n))
    counts = torch.bincount(ids, minlength=p.numel()).double()
    assert misfit(counts, p) > limit


@pytest.mark.parametrize("lag", [1, 2, 1024])
def test_draws_at_different_positions_are_independent(lag: int) -> None:
    n, v = 200_000, 6
    logits = torch.zeros(v)
    ids = draws(logits, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    assert chi_square(ids[:-lag] * v + ids[lag:], v * v) < bound(v * v - 1)


def test_siblings_draw_independently() -> None:
    n, v = 200_000, 6
    children = fork_streams(new_streams(5, n), 2)
    positions = torch.full((n,), 17)
    a, b = (draws(torch.zeros(v), children[:, i], positions) for i in range(2))
    assert chi_square(a * v + b, v * v) < bound(v * v - 1)


# ---- streams


def test_streams_are_distinct_and_can_be_continued() -> None:
    streams = new_streams(123, 10_000)
    assert streams.dtype == torch.int64
    assert streams.unique().numel() == 10_000
    assert torch.equal(new_streams(123, 100, first=900), streams[900:1000])
    assert not torch.isin(new_streams(124, 10_000), streams).any()
    assert torch.equal(new_streams(-1, 3), new_streams(2**64 - 1, 3))
    assert new_streams(0, 0).shape == (0,)


def test_forks_are_fresh() -> None:
    parents = new_streams(9, 100)
    children = fork_streams(parents, 8)
    assert children.shape == (100, 8)
    assert torch.cat([parents, children.flatten()]).unique().numel() == 900
    assert torch.equal(fork_streams(parents, 3, first=5), children[:, 5:])
    # A child's child is not the parent's next child.
    assert not torch.isin(fork_streams(children[:, 0], 8), children).any()


def test_members_of_a_group_need_distinct_streams() -> None:
    streams = torch.tensor([4, 5, 4, 6])
    need_distinct_streams(streams, torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"stream 4 for members 0 and 2 of group 7"):
        need_distinct_streams(streams, torch.tensor([7, 7, 7, 1]))
    with pytest.raises(ValueError, match="members 0 and 2"):
        need_distinct_streams(streams)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="seed: need an integer of 64 bits"):
        new_streams(2**64, 1)
    with pytest.raises(ValueError, match="n: need"):
        new_streams(0, -1)
    with pytest.raises(ValueError, match="first: need"):
        fork_streams(torch.tensor([1]), 1, first=-1)
    with pytest.raises(TypeError, match="streams: need int64"):
        row_keys(torch.zeros(2), torch.zeros(2, dtype=torch.int64), Purpose.SAMPLE)
    with pytest.raises(TypeError, match="positions: need int64"):
        row_keys(torch.zeros(2, dtype=torch.int64), torch.zeros(2), Purpose.SAMPLE)
    with pytest.raises(ValueError, match="groups: need shape"):
        need_distinct_streams(torch.tensor([1, 2]), torch.tensor([1]))
