"""Target: what it says of some of its rows, as logits and as hidden states under a head."""

from __future__ import annotations

import pytest
import torch
from check import assert_close
from sampling_cases import at_temperature, kept
from torch import Tensor
from verification_cases import ragged

from rollfuse import Head, Lora, Sampling, Target, exact, new_streams, verify
from rollfuse.kernels.dispatch import backend

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if backend.name in ("cuda", "rocm") else "cpu"
ROWS, WIDTH, VOCABULARY = 24, 16, 61


def make_head(kind: str) -> Head:
    weight = torch.randn(VOCABULARY + 3, WIDTH, device=DEVICE)
    bias = torch.randn(VOCABULARY + 3, device=DEVICE)
    a, b = torch.randn(4, WIDTH, device=DEVICE), torch.randn(VOCABULARY + 3, 4, device=DEVICE)
    return {
        "plain": Head(weight[:VOCABULARY]),
        "bias, scale and cap": Head(weight[:VOCABULARY], bias[:VOCABULARY], 0.7, 5.0),
        "padding and adapter": Head(weight, bias, 1.3, None, VOCABULARY, Lora(a, b, 0.5)),
    }[kind]


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """(R, V) float64."""
    z = hidden.double() @ head.weight.double().t()
    if head.lora is not None:
        adapted = hidden.double() @ head.lora.a.double().t()
        z = z + head.lora.scale * adapted @ head.lora.b.double().t()
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * (z / head.softcap).tanh()
    return z[:, :VOCABULARY]


KINDS = ["plain", "bias, scale and cap", "padding and adapter"]


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_of_some_rows(kind: str) -> None:
    hidden, head = torch.randn(ROWS, WIDTH, device=DEVICE), make_head(kind)
    temperature = 0.5 + torch.rand(ROWS, device=DEVICE)
    rows = torch.tensor([7, 0, 7, 23], device=DEVICE)
    logits = logits_of(hidden, head)
    for value in (1.7, temperature):
        of_rows = value if isinstance(value, float) else value[rows].double().unsqueeze(1)
        truth = (logits[rows] / of_rows).log_softmax(1)
        target = Target(hidden, head, Sampling(value))
        assert target.vocabulary == VOCABULARY and target.n_rows == ROWS
        found = target.log_probs(rows)
        assert found.dtype == target.dtype == torch.float32
        assert_close(kind, found, truth, atol=3e-5)
        found = Target(logits, sampling=Sampling(value)).log_probs(rows)
        assert found.dtype == torch.float64
        assert_close(kind, found, truth, atol=1e-6)


# The values of three rows, and so on in turn.
ROW_CUTS = {
    "top_k": torch.tensor([2, 5, 9]),
    "top_p": torch.tensor([0.5, 0.95, 0.8]),
    "min_p": torch.tensor([0.3, 0.05, 0.01]),
}


def cut_rows(name: str, n_rows: int) -> Sampling:
    """A temperature and one cut, each with a value of its own for every row."""
    values = ROW_CUTS[name].repeat(n_rows // 3 + 1)[:n_rows].to(DEVICE)
    return Sampling(torch.linspace(0.5, 1.5, n_rows, device=DEVICE), **{name: values})


def log_probs_of_kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """(R, V) float64 on the CPU, of all rows, each cut by a sort."""
    z = at_temperature(logits, sampling)
    return z.where(kept(z, sampling), -torch.inf).log_softmax(1)


@pytest.mark.parametrize("name", ROW_CUTS)
def test_log_probs_of_some_rows_that_are_cut_each_by_its_own_value(name: str) -> None:
    n_rows = 6 if backend.name == "interpret" else ROWS
    hidden, head = torch.randn(n_rows, WIDTH, device=DEVICE), make_head("bias, scale and cap")
    logits, sampling = logits_of(hidden, head), cut_rows(name, n_rows)
    # As many as there are: values of other rows would not be refused for their shape.
    rows = torch.arange(n_rows, device=DEVICE).flip(0)
    truth = log_probs_of_kept(logits, sampling)[rows.cpu()]
    of_hidden, of_logits = Target(hidden, head, sampling), Target(logits, sampling=sampling)
    for target, atol in ((of_hidden, 3e-5), (of_logits, 1e-6)):
        for some in (slice(None), slice(1, 4)):
            found = target.log_probs(rows[some]).cpu()
            assert torch.equal(found.isfinite(), truth[some].isfinite())
            assert_close(name, found.exp(), truth[some].exp(), atol=atol)


@pytest.mark.parametrize("name", ROW_CUTS)
def test_a_draft_is_judged_by_rows_that_are_cut_each_by_its_own_value(name: str) -> None:
    n_sequences = 12 if backend.name == "interpret" else 40
    draft, target = ragged(n_sequences, VOCABULARY, seed=2, device=DEVICE)
    sampling = cut_rows(name, target.n_rows)
    found = verify(exact, draft, Target(target.rows, sampling=sampling))
    by_hand = log_probs_of_kept(target.rows, sampling).float().to(DEVICE)
    expected = verify(exact, draft, Target(by_hand))
    assert torch.equal(found.n_accepted, expected.n_accepted)
    assert torch.equal(found.ids, expected.ids)
    assert_close("logp", found.logp, expected.logp, atol=1e-5)
    cut = found.n_accepted < draft.cu_seqlens.diff()
    assert cut.any() and (found.n_accepted > 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_say_what_their_logits_say(kind: str) -> None:
    hidden, head = torch.randn(ROWS, WIDTH, device=DEVICE), make_head(kind)
    sampling = Sampling(0.5 + torch.rand(ROWS, device=DEVICE))
    of_hidden = Target(hidden, head, sampling)
    of_logits = Target(logits_of(hidden, head).float(), sampling=sampling)
    rows = torch.tensor([3, 20, 11], device=DEVICE)
    streams, positions = new_streams(1, 3).to(DEVICE), torch.arange(3, device=DEVICE)
    tokens = torch.tensor([0, VOCABULARY - 1, 17], device=DEVICE)
    drawn, expected = (t.sample(streams, positions, rows) for t in (of_hidden, of_logits))
    assert torch.equal(drawn.ids, expected.ids)
    scored, of_scored = (t.score(tokens, rows) for t in (of_hidden, of_logits))
    for got, truth in ((drawn[1:], expected[1:]), (scored, of_scored)):
        assert_close("logp", got[0], truth[0], atol=3e-5)
        assert_close("entropy", got[1], truth[1], atol=3e-5)
    log_probs = of_hidden.log_probs(rows)
    assert_close(
        "logp", scored.logp, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1), atol=1e-5
    )


def test_log_probs_under_a_cut_are_those_of_the_samples() -> None:
    logits = torch.randn(ROWS, VOCABULARY, device=DEVICE) * 3
    rows = torch.arange(ROWS, device=DEVICE)
    target = Target(logits, sampling=Sampling(0.8, top_k=5))
    log_probs = target.log_probs(rows)
    assert ((log_probs > -torch.inf).sum(1) == 5).all()
    assert_close("sum", log_probs.exp().sum(1), torch.ones(ROWS), atol=1e-6)
    kept = logits.topk(5, 1).indices
    for column in kept.unbind(1):
        scored = target.score(column)
        found = log_probs.gather(1, column.unsqueeze(1)).squeeze(1)
        assert_close("logp", scored.logp, found, atol=5e-6)


CUTS = {
    "top_k": Sampling(0.3, top_k=4),
    "top_p": Sampling(0.6, top_p=0.9),
    "min_p": Sampling(0.7, min_p=0.2),
    "all": Sampling(0.05, top_k=9, top_p=0.95, min_p=0.01),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("level", [0.0, 40.0, 1000.0])
@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_log_probs_leave_what_the_samples_leave(name: str, level: float, kind: str) -> None:
    """Bit for bit: near the border, with pairs of logits that nearly tie."""
    # The interpreter takes long to find where top-k and top-p cut.
    n, width = (6, 12) if backend.name == "interpret" and name != "min_p" else (12, 18)
    half = level + CUTS[name].temperature * torch.randn(n, width // 2, device=DEVICE)
    near = (
        torch.randn(n, width // 2, device=DEVICE)
        * torch.logspace(-6, -1, n, device=DEVICE)[:, None]
    )
    logits = torch.cat((half, half + near), 1)
    head = None if kind == "logits" else Head(torch.eye(width, device=DEVICE), scale=0.5)
    target = Target(logits if head is None else 2.0 * logits, head, CUTS[name])
    kept = target.log_probs(torch.arange(n, device=DEVICE)) > -torch.inf
    columns = [torch.full((n,), v, device=DEVICE) for v in range(width)]
    scored = torch.stack([target.score(column).logp > -torch.inf for column in columns], 1)
    assert torch.equal(kept, scored)
    assert kept.any(1).all() and not kept.all()


def test_a_border_that_rounding_moves() -> None:
    """Token 1 is 1e-5 inside of top-p where its distance is taken before the temperature."""
    row = [39.970664978027344, 39.932491302490234] + [19.970664978027344] * 4
    for least in (0.9, None):
        sampling = Sampling(0.6, top_p=least, min_p=None if least else 0.9383)
        target = Target(torch.tensor([row], device=DEVICE), sampling=sampling)
        scored = target.score(torch.tensor([1], device=DEVICE)).logp
        found = target.log_probs(torch.tensor([0], device=DEVICE))[0]
        assert_close("logp", found[1:2], scored, atol=1e-5)
        assert (found[:2] > -torch.inf).all() and (found[2:] == -torch.inf).all()


def test_half_rows_are_judged_in_float32() -> None:
    rows = torch.arange(4, device=DEVICE)
    logits = torch.randn(4, VOCABULARY, device=DEVICE).bfloat16()
    found = Target(logits).log_probs(rows)
    assert found.dtype == torch.float32
    assert_close("logp", found, logits.double().log_softmax(1), atol=2e-6)


def test_bad_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target.rows: need shape \(R, V\) with V >= 1"):
        Target(torch.zeros(3))
    with pytest.raises(ValueError, match="V >= 1"):
        Target(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"shape \(R, 4\), the head's width, got \(3, 5\)"):
        Target(torch.zeros(3, 5), torch.zeros(7, 4))
    with pytest.raises(TypeError, match="target.rows: need float32"):
        Target(torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"temperature: need shape \(3,\) .* a row of target.rows"):
        Target(torch.zeros(3, 5), sampling=Sampling(torch.ones(2)))
    with pytest.raises(ValueError, match=r"top_k: need shape \(3,\)"):
        Target(torch.zeros(3, 5), torch.zeros(7, 5), Sampling(top_k=torch.ones(4).long()))
    with pytest.raises(TypeError, match="sampling: need a Sampling, got float"):
        Target(torch.zeros(3, 5), sampling=0.5)
    with pytest.raises(ValueError, match="need finite values > 0"):
        Target(torch.zeros(3, 5), sampling=Sampling(0.0))
