"""vLLM's noise against what vLLM's own kernel said, and against the hash as it is published."""

import json
from pathlib import Path

import pytest
import torch
from sampling_cases import DEVICE

from rollfuse import NoiseFamily, Sampling, sample_tokens
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.noise import Purpose, gumbels, noise_words, row_keys, uniforms
from rollfuse.kernels.sampling_noise import draw_keys, smallest_words

pytestmark = pytest.mark.kernels

RECORDED = json.loads((Path(__file__).parent / "data" / "vllm_noise.json").read_text())
M32 = 2**32 - 1


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 of whole words, seed 0."""

    def turned(x: int, places: int) -> int:
        return (x << places | x >> (32 - places)) & M32

    h = 0
    for i in range(0, len(data), 4):
        k = int.from_bytes(data[i : i + 4], "little")
        h ^= turned(k * 0xCC9E2D51 & M32, 15) * 0x1B873593 & M32
        h = (turned(h, 13) * 5 + 0xE6546B64) & M32
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & M32
    h = (h ^ h >> 13) * 0xC2B2AE35 & M32
    return h ^ h >> 16


def test_reference_is_murmur3() -> None:
    # Known answers of the published function.
    assert murmur3(b"") == 0
    assert murmur3(b"test") == 0xBA6BD213


def words_of(streams: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    keys = draw_keys(streams.view(-1, 1), positions, NoiseFamily.VLLM)
    return smallest_words(keys, tokens, NoiseFamily.VLLM)


def recorded_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds, and the positions of the tokens to draw: one after the last input token."""
    seeds = torch.tensor([row["seed"] for row in RECORDED["rows"]])
    return seeds, torch.tensor([row["position"] for row in RECORDED["rows"]]) + 1


def test_words_are_murmur3_of_seed_position_and_token() -> None:
    seeds = torch.tensor([0, 1, -1, 0x0123456789ABCDEF, -(2**63), 77])
    positions = torch.tensor([1, 4097, 2**31, 2**33 + 5, 0, 2])
    tokens = torch.tensor([0, 1, 151_935, 2**31 - 1], dtype=torch.int32)
    found = words_of(seeds, positions, tokens).long() & M32
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        key = (seed % 2**64).to_bytes(8, "little") + ((position - 1) & M32).to_bytes(4, "little")
        want = [murmur3(key + token.to_bytes(4, "little")) for token in tokens.tolist()]
        assert found[row].tolist() == want


def test_words_uniforms_and_gumbels_equal_the_recorded_ones() -> None:
    tokens = torch.tensor(RECORDED["tokens"], dtype=torch.int32)
    words = words_of(*recorded_rows(), tokens)
    recorded = {
        name: torch.tensor([row[name] for row in RECORDED["rows"]], dtype=torch.float64)
        for name in ("words", "uniforms", "gumbels")
    }
    assert torch.equal((words.long() & M32).double(), recorded["words"])
    assert torch.allclose(uniforms(words).double(), recorded["uniforms"], rtol=2.0**-23, atol=0)
    # Their logarithm is a series up to u = 1/4, to 6e-7 of it.
    assert torch.allclose(gumbels(words).double(), recorded["gumbels"], rtol=2e-6, atol=3e-6)


def test_tokens_equal_the_recorded_ones() -> None:
    """From the seeds and positions that vLLM was given, over logits that the file describes."""
    n_cols = RECORDED["vocabulary"]
    seeds, positions = (x.to(DEVICE) for x in recorded_rows())
    for case in RECORDED["draws"]:
        logits = (torch.arange(n_cols) * case["multiplier"] % 1009).float() / 128
        logits = logits.expand(len(seeds), -1).to(DEVICE)
        sampling = Sampling(case["temperature"], noise=NoiseFamily.VLLM)
        assert sample_tokens(logits, seeds, positions, sampling).ids.tolist() == case["ids"]
        elsewhere = sample_tokens(logits, seeds, positions + 1, sampling).ids.tolist()
        assert elsewhere != case["ids"]


def test_families_differ_and_ours_is_that_of_the_noise_module() -> None:
    streams, positions = torch.arange(6), torch.arange(6) * 7
    tokens = torch.arange(50, dtype=torch.int32)
    keys = draw_keys(streams.view(-1, 1), positions, NoiseFamily.ROLLFUSE)
    ours = smallest_words(keys, tokens, NoiseFamily.ROLLFUSE)
    assert torch.equal(ours, noise_words(row_keys(streams, positions, Purpose.SAMPLE), tokens))
    assert not (ours == words_of(streams, positions, tokens)).any()


@pytest.mark.parametrize("family", list(NoiseFamily))
def test_smallest_of_several_words(family: NoiseFamily) -> None:
    streams, positions = torch.arange(15).view(5, 3), torch.arange(5, dtype=torch.int32)
    tokens = torch.arange(200, dtype=torch.int32)
    keys = draw_keys(streams, positions, family)
    each = torch.stack([smallest_words(keys[:, k : k + 1], tokens, family) for k in range(3)])
    want = (each.long() & M32).amin(0)
    assert torch.equal(smallest_words(keys, tokens, family).long() & M32, want)
    assert (gumbels(smallest_words(keys, tokens, family)) == gumbels(each).amax(0)).all()


@pytest.mark.skipif(backend.name == "cpu", reason="needs a Triton backend")
@pytest.mark.parametrize("family", list(NoiseFamily))
def test_triton_words_equal_pytorch(family: NoiseFamily) -> None:
    from noise_kernel import draw_kernel

    streams = torch.tensor([0, 1, -1, 0x0123456789ABCDEF, -(2**63)], device=DEVICE)
    positions = torch.tensor([1, 2**31, 2**33 + 5, 0, 77], device=DEVICE)
    n_cols = 1000
    found = torch.zeros(5, n_cols, dtype=torch.int32, device=DEVICE)
    is_vllm = family is NoiseFamily.VLLM
    draw_kernel[(5,)](
        streams, positions, found, n_cols, PURPOSE=int(Purpose.SAMPLE), IS_VLLM=is_vllm, BLOCK=1024
    )
    keys = draw_keys(streams.view(-1, 1), positions, family)
    tokens = torch.arange(n_cols, dtype=torch.int32, device=DEVICE)
    assert torch.equal(found, smallest_words(keys, tokens, family))
