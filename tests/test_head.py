"""Heads as they are: adapters, padding, accumulation into main_grad, wrapped modules, bad input."""

from dataclasses import replace

import pytest
import torch
from check import assert_close, assert_no_worse, relative_error
from head_cases import coupled, gradients, make_problem, reference, smooth, smooth_local

from rollfuse import Head, Lora, Plan, TokenBatch, explain, linear_head, linear_logp_entropy
from rollfuse import linear_policy_loss as policy
from rollfuse.kernels import gemm, plan

pytestmark = pytest.mark.kernels

KINDS = [("fused", smooth_local), ("hold", coupled), ("recompute", coupled)]


def make_lora(problem, rank=3, dtype=None):
    dtype = dtype or problem.weight.dtype
    vocabulary, width = problem.weight.shape
    a = (torch.randn(rank, width) / width**0.5).to(dtype).requires_grad_()
    b = (torch.randn(vocabulary, rank) * 0.7).to(dtype).requires_grad_()
    return Lora(a, b, 1.7)


def merged(problem, lora):
    """The problem with the adapter in the weight, which plain PyTorch can differentiate."""
    return replace(problem, weight=problem.weight + lora.scale * lora.b @ lora.a)


def leaves(problem, lora):
    return [t for t in (*problem.leaves, lora.a, lora.b) if t.requires_grad]


def cast(problem, lora, dtype):
    a, b = (t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (lora.a, lora.b))
    return problem.cast(dtype), Lora(a, b, lora.scale)


def wanted(problem, lora, objective):
    """(loss, gradients) by plain PyTorch, in the dtype of the tensors."""
    whole = merged(problem, lora)
    logp, entropy = reference(whole)
    keep = whole.batch.weights.nonzero().squeeze(1)
    batch = whole.batch.keep(keep)
    loss = (batch.weights * objective(logp[keep], entropy[keep], batch)).sum()
    return loss, torch.autograd.grad(loss, leaves(problem, lora))


def with_lora(problem, lora):
    return replace(problem.head, lora=lora)


def assert_lora_matches(problem, lora, objective, request, *, floor=1e-6):
    head = with_lora(problem, lora)
    loss = policy(problem.hidden, head, problem.batch, objective, plan=request).loss
    ours = torch.autograd.grad(loss, leaves(problem, lora))
    plain_objective = smooth if objective is smooth_local else objective
    exact_loss, exact = wanted(*cast(problem, lora, torch.float64), plain_objective)
    _, plain = wanted(*cast(problem, lora, torch.float32), plain_objective)
    assert_close("loss", loss, exact_loss, atol=1e-5 if floor < 1e-4 else 0.1)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_no_worse(f"{request.kind} {tuple(a.shape)}", a, b, c, floor=floor)


@pytest.mark.parametrize(("kind", "objective"), KINDS)
@pytest.mark.parametrize("n_pairs", [None, 40])
@pytest.mark.parametrize("softcap", [None, 12.0])
def test_an_adapter_is_exact_in_every_gradient(kind, objective, n_pairs, softcap, monkeypatch):
    monkeypatch.setitem(plan._CHUNK_ROWS, "cpu", 9)
    problem = make_problem(n_pairs=n_pairs, softcap=softcap)
    assert_lora_matches(problem, make_lora(problem), objective, Plan(kind))


def test_an_adapter_on_a_frozen_head():
    problem = make_problem(frozen="weight,bias")
    lora = make_lora(problem)
    assert_lora_matches(problem, lora, smooth_local, Plan())
    with pytest.raises(ValueError, match="'unit' needs a head without gradient"):
        assert_lora_matches(problem, lora, coupled, Plan("unit"))
    frozen = Lora(lora.a.detach(), lora.b.detach(), lora.scale)
    head = with_lora(problem, frozen)
    loss = policy(problem.hidden, head, problem.batch, smooth, plan=Plan("unit")).loss
    (ours,) = torch.autograd.grad(loss, problem.hidden)
    _, (exact,) = wanted(*cast(problem, frozen, torch.float64), smooth)
    assert_no_worse("unit", ours, exact.float(), exact, floor=1e-6)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_adapters_of_half_precision_heads(adapter, on_gpu, monkeypatch):
    """A wide adapter of a narrow head stays wide in the logits, as PEFT keeps it."""
    if on_gpu:
        emulate_half_products(monkeypatch, torch.bfloat16)
    problem = make_problem(dtype=torch.bfloat16, bias=False)
    lora = make_lora(problem, dtype=adapter)
    found = linear_logp_entropy(
        problem.hidden, with_lora(problem, lora), problem.batch.targets,
        temperature=problem.batch.temperature,
    )  # fmt: skip
    exact = reference(merged(*cast(problem, lora, torch.float64)))
    assert_close("logp", found.logp, exact[0], atol=2e-5 if adapter == torch.float32 else 0.1)
    for kind, objective in KINDS:
        assert_lora_matches(problem, lora, objective, Plan(kind), floor=8e-3)


def emulate_half_products(monkeypatch, dtype):
    def mm(a, b, *, out_dtype, out):
        assert a.dtype == b.dtype == dtype
        return out.copy_(a.float() @ b.float())

    def addmm(into, a, b, *, out_dtype, out):
        assert a.dtype == b.dtype == dtype
        return out.copy_(into + a.float() @ b.float())

    monkeypatch.setattr(gemm, "multiplies_into_float32", lambda device, d: d == dtype)
    monkeypatch.setattr(gemm, "half_mm", mm)
    monkeypatch.setattr(gemm, "half_addmm", addmm)


@pytest.mark.parametrize(("kind", "objective"), KINDS)
def test_padding_is_in_no_softmax_and_gets_no_gradient(kind, objective):
    problem = make_problem(softcap=9.0)
    lora = make_lora(problem)
    n, more = problem.weight.shape[0], 19
    pad = lambda t: torch.cat([t.detach(), torch.full((more, *t.shape[1:]), 50.0)])  # noqa: E731
    weight, bias, b = (pad(t).requires_grad_() for t in (problem.weight, problem.bias, lora.b))
    head = Head(weight, bias, problem.scale, problem.softcap, n, Lora(lora.a, b, lora.scale))
    request = Plan(kind)
    padded = policy(problem.hidden, head, problem.batch, objective, plan=request)
    plain = policy(problem.hidden, with_lora(problem, lora), problem.batch, objective, plan=request)
    torch.testing.assert_close(padded.logp, plain.logp, equal_nan=True)
    ours = torch.autograd.grad(padded.loss, [problem.hidden, weight, bias, lora.a, b])
    want = torch.autograd.grad(
        plain.loss, [problem.hidden, problem.weight, problem.bias, lora.a, lora.b]
    )
    for a, c in zip(ours, want, strict=True):
        torch.testing.assert_close(a[: len(c)], c)
        assert not a[len(c) :].any()
    beyond = replace(problem.batch, targets=problem.batch.targets + n)
    with pytest.raises(ValueError, match=rf"token ids in \[0, {n}\)"):
        policy(problem.hidden, head, beyond, objective)


@pytest.mark.parametrize(("kind", "objective"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_collects_what_grad_would(kind, objective, dtype):
    problem = make_problem(dtype=dtype)
    start = torch.randn(problem.weight.shape)
    main_grad = start.clone()
    head = replace(problem.head, main_grad=main_grad)
    both = [problem.hidden, problem.bias]
    for factor in (1.0, 3.0):
        loss = policy(problem.hidden, head, problem.batch, objective, plan=Plan(kind)).loss * factor
        loss.backward()
    assert problem.weight.grad is None
    found = [t.grad.clone() for t in both]
    for t in both:
        t.grad = None
    wide = replace(problem, weight=problem.weight.detach().float().requires_grad_())
    loss = policy(problem.hidden, wide.head, problem.batch, objective, plan=Plan(kind)).loss * 4.0
    loss.backward()
    # Under half operands exponentials are held in bfloat16.
    bound = 3e-3 if kind == "hold" and dtype == torch.bfloat16 else 1e-5
    assert relative_error(main_grad - start, wide.weight.grad) < bound
    for a, t in zip(found, both, strict=True):
        assert relative_error(a, t.grad) < (6e-3 if dtype == torch.bfloat16 else 1e-5)


def test_main_grad_of_a_padded_head_walked_twice():
    problem = make_problem(bias=False)
    weight = torch.cat([problem.weight.detach(), torch.ones(5, 16)]).requires_grad_()
    n = len(problem.weight)
    for kind, objective in KINDS:
        main_grad = torch.zeros_like(weight)
        head = Head(weight, None, 1.3, vocab=n, main_grad=main_grad)
        loss = policy(problem.hidden, head, problem.batch, objective, plan=Plan(kind)).loss
        loss.backward(retain_graph=True)
        once = main_grad.clone()
        loss.backward()
        torch.testing.assert_close(main_grad, 2 * once)
        assert once[:n].any()
        assert not once[n:].any()


def test_main_grad_of_no_rows_is_left_alone():
    problem = make_problem()
    batch = replace(problem.batch, weights=torch.zeros(len(problem.batch)))
    for kind, objective in KINDS:
        main_grad = torch.ones_like(problem.weight)
        head = replace(problem.head, main_grad=main_grad)
        policy(problem.hidden, head, batch, objective, plan=Plan(kind)).loss.backward()
        assert (main_grad == 1).all()


def bad_heads():
    w = torch.ones(6, 4)
    trainable = torch.ones(6, 4, requires_grad=True)
    a, b = torch.ones(2, 4), torch.ones(6, 2)
    return [
        (ValueError, "the rank of a", lambda: Lora(a, torch.ones(6, 3))),
        (ValueError, r"lora.a: need shape \(r, D\)", lambda: Lora(torch.ones(4), b)),
        (ValueError, "r >= 1", lambda: Lora(torch.ones(0, 4), torch.ones(6, 0))),
        (ValueError, "finite", lambda: Lora(a, b, float("nan"))),
        (TypeError, "lora.a: need float", lambda: Lora(a.long(), b)),
        (ValueError, "as wide as the weight", lambda: Head(w, lora=Lora(torch.ones(2, 5), b))),
        (ValueError, "one row a row", lambda: Head(w, lora=Lora(a, torch.ones(7, 2)))),
        (ValueError, "vocab: need a number from 1 to 6", lambda: Head(w, vocab=7)),
        (ValueError, "vocab: need a number from 1 to 6", lambda: Head(w, vocab=0)),
        (ValueError, "as the weight", lambda: Head(trainable, main_grad=torch.ones(5, 4))),
        (ValueError, "torch.float32", lambda: Head(trainable, main_grad=w.double())),
        (ValueError, "contiguous", lambda: Head(trainable, main_grad=torch.ones(4, 6).t())),
        (ValueError, "a weight that requires grad", lambda: Head(w, main_grad=w.clone())),
        (ValueError, "no gradient of its own", lambda: Head(trainable, main_grad=trainable)),
        (ValueError, "a group to scatter over", lambda: Head(w, sequence_parallel=True)),
        (ValueError, "FSDP leaves", lambda: Head(torch.ones(0))),
    ]


@pytest.mark.parametrize(("error", "message", "make"), bad_heads())
def test_bad_heads(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_under_compile_what_cannot_be_traced_is_refused():
    weight = torch.ones(5, 2, requires_grad=True)
    head = Head(weight, main_grad=torch.zeros(5, 2))

    @torch.compile(backend="eager", fullgraph=True)
    def scores(hidden):
        return linear_logp_entropy(hidden, head, torch.tensor([1, 2])).logp

    with pytest.raises(Exception, match="main_grad: need None under torch.compile"):
        scores(torch.ones(2, 2))


def test_compiled_with_adapter_and_padding():
    problem = make_problem()
    lora = make_lora(problem)
    n = len(problem.weight) - 7
    batch = replace(problem.batch, targets=problem.batch.targets.clamp(max=n - 1))
    head = Head(problem.weight, problem.bias, 1.3, None, n, lora)

    def loss(hidden, batch):
        return policy(hidden, head, batch, smooth_local).loss

    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(problem.hidden, batch)
    want = loss(problem.hidden, batch)
    torch.testing.assert_close(ours, want)
    for a, b in zip(
        torch.autograd.grad(ours, leaves(problem, lora)),
        torch.autograd.grad(want, leaves(problem, lora)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_checkpointing_of_the_head_is_correct():
    """It costs a second forward; see Plan."""
    problem = make_problem()
    for reentrant in (False, True):
        for _, objective in KINDS:

            def loss(hidden, objective=objective):
                return policy(hidden, problem.head, problem.batch, objective).loss

            checkpointed = torch.utils.checkpoint.checkpoint(
                loss, problem.hidden, use_reentrant=reentrant
            )
            checkpointed.backward()
            ours = [t.grad for t in problem.leaves]
            for t in problem.leaves:
                t.grad = None
            for a, b in zip(ours, gradients(loss(problem.hidden), problem), strict=True):
                torch.testing.assert_close(a, b)


def peft_head(*, target="lm_head", save=None, **options):
    peft = pytest.importorskip("peft", reason="needs peft")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(4, 8)
            self.lm_head = torch.nn.Linear(8, 30, bias=False)

        def forward(self, x):
            return self.lm_head(self.body(x))

    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[target], modules_to_save=save,
                             init_lora_weights=False, **options)  # fmt: skip
    return peft.get_peft_model(Model(), config)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"save": ["lm_head"]}])
def test_heads_wrapped_by_peft(options):
    save = options.get("save")
    model = peft_head(target="body" if save else "lm_head", **options)
    module = model.base_model.model.lm_head
    head = linear_head(module)
    assert (head.lora is None) == (save is not None)
    hidden, targets = torch.randn(5, 8), torch.randint(30, (5,))
    own = module(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    ours = linear_logp_entropy(hidden, head, targets).logp
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert trained
    for a, b in zip(
        torch.autograd.grad(ours.sum(), trained), torch.autograd.grad(own.sum(), trained),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        own = module(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        ours = linear_logp_entropy(hidden, linear_head(module), targets).logp
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)


def test_adapters_that_are_not_plain_are_refused():
    dora = peft_head(use_dora=True).base_model.model.lm_head
    with pytest.raises(ValueError, match="DoRA"):
        linear_head(dora)
    dropout = peft_head(lora_dropout=0.1).base_model.model.lm_head.train()
    with pytest.raises(ValueError, match="dropout before lora_A"):
        linear_head(dropout)
    assert linear_head(dropout.eval()).lora is not None
    several = peft_head()
    several.add_adapter("second", several.peft_config["default"])
    several.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter, got default, second"):
        linear_head(several.base_model.model.lm_head)


def test_a_head_with_trained_tokens_is_refused_and_its_weight_is_not():
    """What the message advises gives the module's own log-probs and gradients."""
    model = peft_head(target="body", trainable_token_indices={"lm_head": [3, 7]})
    module = model.base_model.model.lm_head
    with pytest.raises(TypeError, match=r"TrainableTokensWrapper, .* Head of its `weight`"):
        linear_head(module)
    (delta,) = (p for p in module.parameters() if p.requires_grad)
    with torch.no_grad():
        delta.normal_()
    hidden, targets = torch.randn(5, 8), torch.tensor([3, 7, 0, 3, 29])
    own = module(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    ours = linear_logp_entropy(hidden, Head(module.weight), targets).logp
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    found, want = (torch.autograd.grad(logp.sum(), delta) for logp in (ours, own))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_a_module_that_is_no_linear_head_is_refused():
    with pytest.raises(TypeError, match="got Embedding"):
        linear_head(torch.nn.Embedding(3, 2))


def test_a_module_that_does_more_than_a_linear_one_is_refused():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(TypeError, match="got one with a forward of its own"):
        linear_head(Scaled(3, 2))
    hooked = torch.nn.Linear(3, 2)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    with pytest.raises(TypeError, match="got one with forward hooks"):
        linear_head(hooked)


@pytest.mark.parametrize("part", ["bias", "a", "b"])
def test_flops_and_gradients_of_partly_frozen_heads(part):
    problem = make_problem(frozen="hidden,weight" if part == "bias" else "hidden,weight,bias")
    lora = make_lora(problem)
    for name in ("a", "b"):
        getattr(lora, name).requires_grad_(name == part)
    arguments = (problem.hidden, with_lora(problem, lora), problem.batch, smooth_local)
    report = explain(*arguments)
    forward, rank = 2 * 301 * report.slots * (16 + 3), 2 * 301 * report.slots * 3
    assert report.flops == forward + (0 if part == "bias" else rank)
    assert_lora_matches(problem, lora, smooth_local, Plan())


def test_a_main_grad_narrower_than_the_sums_is_refused():
    problem = make_problem(dtype=torch.float64)
    weight = problem.weight.detach().float().requires_grad_()
    head = Head(weight, main_grad=torch.zeros_like(weight))
    with pytest.raises(ValueError, match="main_grad: need torch.float64"):
        policy(problem.hidden, head, problem.batch, coupled)


def test_an_empty_batch_with_an_adapter():
    problem = make_problem(n_rows=4)
    lora = make_lora(problem)
    empty = TokenBatch(torch.empty(0).long(), weights=torch.empty(0), rows=torch.empty(0).long())
    loss = policy(problem.hidden, with_lora(problem, lora), empty, smooth_local).loss
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, leaves(problem, lora)))
