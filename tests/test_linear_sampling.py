"""linear_sample and linear_score against sample_tokens and score_tokens on the same logits."""

from dataclasses import replace

import pytest
import sampling_cases
import torch
from ranks import on_ranks
from sampling_cases import DEVICE, INF, drawn_and_scored, split_head
from test_plan import allocated_peak

from rollfuse import (
    Head,
    Lora,
    NoiseFamily,
    Plan,
    Sampling,
    linear_logp_entropy,
    linear_sample,
    linear_score,
    new_streams,
    sample_tokens,
    score_tokens,
)
from rollfuse.kernels import plan as plans
from rollfuse.kernels.dispatch import backend

pytestmark = pytest.mark.kernels

INTERPRETED = backend.name == "interpret"
ROWS = 20 if INTERPRETED else 60

SAMPLINGS = [
    Sampling(),
    Sampling(0.7, noise=NoiseFamily.VLLM),
    Sampling(0.7, top_k=9, top_p=0.9),
    Sampling(1.3, min_p=0.05),
]
INVARIANT = SAMPLINGS[:1] if INTERPRETED else SAMPLINGS[:3:2]


def make_head(case: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Head]:
    hidden = torch.randn(ROWS, 16).to(dtype).to(DEVICE)
    weight, bias = torch.randn(301, 16).to(dtype).to(DEVICE), torch.randn(301).to(DEVICE)
    heads = {
        "plain": Head(weight),
        "bias": Head(weight, bias, 1.3),
        "softcap": Head(weight, bias, 0.7, 5.0),
        "padded": Head(weight, bias, vocab=250),
        "lora": Head(
            weight,
            lora=Lora(torch.randn(3, 16).to(DEVICE), torch.randn(301, 3).to(DEVICE), 0.4),
        ),
    }
    return hidden, heads[case]


def logits_of(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """(N, V) in float64, from operands as they are."""
    weight = head.weight.double()
    if head.lora is not None:
        weight = weight + head.lora.scale * head.lora.b.double() @ head.lora.a.double()
    z = hidden.double() @ weight.t()
    z = (z if head.bias is None else z + head.bias) * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return z[:, : head.vocab]


def draw_inputs(n_streams: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    streams = new_streams(3, ROWS * n_streams).view(ROWS, -1).squeeze(1)
    return streams.to(DEVICE), torch.arange(ROWS, device=DEVICE) * 3


def own_values(sampling: Sampling) -> Sampling:
    """The same distributions, a row each."""
    fields = ("temperature", "top_k", "top_p", "min_p")
    values = {f: getattr(sampling, f) for f in fields if getattr(sampling, f) is not None}
    kinds = {int: torch.int32, float: torch.float32}
    rows = {
        f: torch.full((ROWS,), v, dtype=kinds[type(v)], device=DEVICE) for f, v in values.items()
    }
    return replace(sampling, **rows)


@pytest.mark.parametrize("case", ["plain", "bias", "softcap", "padded", "lora"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_it_draws_what_sample_tokens_draws(case: str, sampling: Sampling) -> None:
    hidden, head = make_head(case)
    streams, positions = draw_inputs(2)
    want = sample_tokens(logits_of(hidden, head), streams, positions, sampling)
    for given in (sampling, own_values(sampling)):
        got = linear_sample(hidden, head, streams, positions, given)
        assert torch.equal(got.ids, want.ids)
        assert got.logp.dtype == got.entropy.dtype == got.support.dtype == torch.float32
        for a, b in zip(got[1:], want[1:], strict=True):
            assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)
    found = linear_score(hidden, head, want.ids, sampling)
    for a, b in zip(found, got[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    hidden, head = make_head("plain", dtype)
    streams, positions = draw_inputs()
    want = sample_tokens(logits_of(hidden, head), streams, positions, SAMPLINGS[2])
    got = linear_sample(hidden.view(2, -1, 16), head, streams, positions, SAMPLINGS[2])
    assert torch.equal(got.ids, want.ids)
    assert torch.allclose(got.logp.double(), want.logp, rtol=1e-5, atol=1e-5)
    assert got.logp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_score_says_no_to_what_is_cut() -> None:
    hidden, head = make_head("softcap")
    logits = logits_of(hidden, head)
    for sampling in SAMPLINGS:
        for targets in (logits.argmax(1), logits.argmin(1)):
            got = linear_score(hidden, head, targets, sampling)
            want = score_tokens(logits, targets, sampling)
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)
    assert (got.logp == -INF).all()


@pytest.mark.parametrize("is_cut", [False, True], ids=["plain", "cut"])
def test_chunks_change_nothing(is_cut: bool) -> None:
    hidden, head = make_head("bias")
    streams, positions = draw_inputs(2)
    # No two rows are drawn from alike: a chunk must take its own rows' values.
    sampling = Sampling(torch.linspace(0.5, 1.5, ROWS, device=DEVICE))
    if is_cut:
        sampling = replace(
            sampling,
            top_k=1 + torch.arange(ROWS, device=DEVICE) % 7,
            top_p=torch.linspace(0.99, 0.4, ROWS, device=DEVICE),
            min_p=torch.linspace(0.0, 0.5, ROWS, device=DEVICE),
        )
    with pytest.raises(ValueError, match="budget_bytes: need at least") as refused:
        linear_sample(hidden, head, streams, positions, sampling, plan=Plan(budget_bytes=1000))
    least = int(str(refused.value).split("at least ")[1].split()[0])
    whole = linear_sample(hidden, head, streams, positions, sampling)
    parts = linear_sample(hidden, head, streams, positions, sampling, plan=Plan(budget_bytes=least))
    assert torch.equal(parts.ids, whole.ids)
    for a, b in zip(parts[1:], whole[1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(backend.name != "cpu", reason="counts the PyTorch path's bytes")
@pytest.mark.parametrize("sampling", SAMPLINGS[::2], ids=["plain", "cut"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_stays_within_the_budget(sampling: Sampling, dtype: torch.dtype) -> None:
    n_rows, n_cols, width = 300, 20_000, 32
    hidden, weight = torch.randn(n_rows, width).to(dtype), torch.randn(n_cols, width).to(dtype)
    streams, positions = new_streams(0, n_rows), torch.arange(n_rows)
    budget = 14 << 20
    assert budget < n_rows * n_cols * 4 / 1.5
    head, plan = Head(weight, torch.randn(n_cols) * 0.1), Plan(budget_bytes=budget)

    def draw() -> object:
        return linear_sample(hidden, head, streams, positions, sampling, plan=plan)

    assert allocated_peak(draw) <= budget
    peak = allocated_peak(lambda: linear_score(hidden, head, positions, sampling, plan=plan))
    assert peak <= budget


@pytest.mark.parametrize("sampling", INVARIANT, ids=["plain", "cut"][: len(INVARIANT)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invariant_plans_give_a_row_the_same_bits(
    sampling: Sampling, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETED:  # every call fills up a chunk
        monkeypatch.setattr(plans, "_INVARIANT_ROWS", {"cpu": 16})
    n_rows = 20 if INTERPRETED else 140
    hidden = torch.randn(n_rows, 16).to(dtype).to(DEVICE)
    head = Head(torch.randn(301, 16).to(dtype).to(DEVICE), torch.randn(301).to(DEVICE))
    streams, plan = new_streams(0, n_rows).to(DEVICE), Plan(invariant=True)
    positions = torch.arange(n_rows, device=DEVICE)
    temperature = torch.linspace(0.5, 1.5, n_rows, device=DEVICE)
    sampling = replace(sampling, temperature=temperature)
    whole = linear_sample(hidden, head, streams, positions, sampling, plan=plan)
    scored = linear_score(hidden, head, whole.ids, sampling, plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(scored, whole[1:], strict=True))
    for rows in ([7], [n_rows - 1, 3, n_rows // 3], torch.randperm(n_rows).tolist()):
        part = linear_sample(
            hidden[rows],
            head,
            streams[rows],
            positions[rows],
            replace(sampling, temperature=temperature[rows]),
            plan=plan,
        )
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[rows])
    if sampling.top_k is None:
        found = linear_logp_entropy(hidden, head, whole.ids, temperature=temperature, plan=plan)
        assert torch.equal(found.logp, whole.logp)
        assert torch.equal(found.entropy, whole.entropy)


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_a_split_head_draws_the_same_tokens(n_ranks: int, tmp_path) -> None:
    alone = drawn_and_scored(*split_head(1, 0))
    for found in on_ranks(sampling_cases.draw_on_rank, n_ranks, tmp_path):
        assert torch.equal(found[0], alone[0])
        for a, b in zip(found[1:], alone[1:], strict=True):
            assert torch.allclose(a, b, rtol=2e-6, atol=2e-6)


def test_cuts_of_a_split_head_are_refused(tmp_path) -> None:
    found = on_ranks(sampling_cases.refusals_on_rank, 2, tmp_path)
    hint = "; gather the logits and call sample_tokens"
    need = "sampling: need no cuts under a head that is split over a group, got "
    assert found == [[f"{need}top_k{hint}", f"{need}top_p, min_p{hint}"]] * 2


def test_no_rows_and_no_gradient() -> None:
    hidden, head = make_head("bias")
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for plan in (Plan(), Plan(invariant=True)):
        got = linear_sample(hidden[:0], head, nothing, nothing, SAMPLINGS[2], plan=plan)
        assert [x.shape for x in got] == [(0,)] * 4
    streams, positions = draw_inputs()
    head.weight.requires_grad_()
    assert not linear_sample(hidden.requires_grad_(), head, streams, positions).logp.requires_grad


def test_autocast_rounds_the_operands_alone() -> None:
    hidden, head = make_head("plain")
    streams, positions = draw_inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        got = linear_sample(hidden, head, streams, positions)
    rounded = Head(head.weight.bfloat16())
    want = linear_sample(hidden.bfloat16(), rounded, streams, positions)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_bad_input_is_refused() -> None:
    hidden, head = make_head("plain")
    streams, positions = draw_inputs()
    with pytest.raises(ValueError, match="plan: need no kind .*, got 'hold'"):
        linear_sample(hidden, head, streams, positions, plan=Plan("hold"))
    with pytest.raises(TypeError, match="plan: need a Plan"):
        linear_sample(hidden, head, streams, positions, plan="hold")
    with pytest.raises(ValueError, match=r"hidden: need shape \(R, 16\)"):
        linear_sample(hidden[:, 1:], head, streams, positions)
    with pytest.raises(ValueError, match="streams: need shape .* a row of hidden"):
        linear_sample(hidden, head, streams[1:], positions)
    with pytest.raises(ValueError, match="top_k: need shape .* a row of hidden"):
        linear_sample(hidden, head, streams, positions, Sampling(top_k=torch.ones(3).int()))
    with pytest.raises(ValueError, match=r"targets: need token ids in \[0, 301\)"):
        linear_score(hidden, head, positions.cpu() + 301)
    if DEVICE == "cpu":
        hidden[4] = float("nan")
        with pytest.raises(ValueError, match="hidden and head: need a finite maximum .* in row 4"):
            linear_sample(hidden, head, streams, positions)
