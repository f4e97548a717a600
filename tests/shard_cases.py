"""What the processes of tests/test_shard.py do; a function here runs on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from head_cases import coupled, make_problem, smooth_local
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rollfuse import (
    Head,
    Lora,
    Plan,
    TokenBatch,
    explain,
    linear_logp_entropy,
    linear_policy_loss,
    logp_entropy,
    masked_quantile,
    new_streams,
    policy_loss,
    sample_tokens,
    segment_sums,
    token_mean,
)

# How many columns each rank has, of 301; unequal, so that no rank can guess the others'.
SPLITS = {1: [301], 2: [120, 181], 4: [1, 99, 121, 80]}
KINDS = {"fused": smooth_local, "hold": coupled, "recompute": coupled}


def make(case: dict[str, Any]) -> tuple[Any, Lora | None]:
    """The problem of a case, the same on every rank, and its adapter."""
    torch.manual_seed(3)
    options = dict(case)
    has_lora, dead, kind = (options.pop(k, None) for k in ("lora", "dead", "kind"))
    is_confident = options.pop("confident", False)
    for name in ("sequence_parallel", "budget_bytes"):
        options.pop(name, None)
    problem = make_problem(**options)
    if dead:  # a whole shard without mass
        with torch.no_grad():
            problem.bias[:120] = -torch.inf
        problem.batch.targets.clamp_(min=121)
    if is_confident:  # every target is its row's maximum, on one rank or another
        with torch.no_grad():
            problem.hidden.copy_(30.0 * problem.weight[problem.batch.targets])
    lora = None
    if has_lora:
        lora = Lora(torch.randn(3, 16).requires_grad_(), torch.randn(301, 3).requires_grad_(), 0.3)
    if kind == "unit":
        for t in (problem.weight, problem.bias):
            t.requires_grad_(False)
    return problem, lora


def part(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.detach()[start:stop].clone().requires_grad_(tensor.requires_grad)


def run(case: dict[str, Any], *, split: bool) -> dict[str, Tensor]:
    """Loss, values and gradients of a case, on this rank's columns if `split`."""
    problem, lora = make(case)
    n_ranks, rank = (dist.get_world_size(), dist.get_rank()) if split else (1, 0)
    sizes = SPLITS[n_ranks]
    start = sum(sizes[:rank])
    stop = start + sizes[rank]
    hidden = problem.hidden
    scattered = split and case.get("sequence_parallel", False)
    if scattered:
        n = len(hidden) // n_ranks
        hidden = part(hidden, rank * n, (rank + 1) * n)
    adapter = None
    if lora is not None:
        adapter = Lora(lora.a, part(lora.b, start, stop), lora.scale)
    head = Head(
        part(problem.weight, start, stop),
        part(problem.bias, start, stop),
        problem.scale,
        problem.softcap,
        lora=adapter,
        group=dist.group.WORLD if split else None,
        sequence_parallel=scattered,
    )
    kind = case.get("kind", "fused")
    objective = KINDS.get(kind, without_entropy)
    plan = Plan(kind, case.get("budget_bytes"))
    result = linear_policy_loss(hidden, head, problem.batch, objective, plan=plan)
    names = ["hidden", "weight", "bias", "lora_a", "lora_b"]
    leaves = dict(zip(names, (hidden, *head.parameters), strict=True))
    leaves = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(result.loss, list(leaves.values()))
    values = {"loss": result.loss.detach(), "logp": result.logp, "entropy": result.entropy}
    return values | dict(zip(leaves, found, strict=True))


def without_entropy(logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
    return -batch.advantages * torch.exp(0.3 * (logp - batch.logp_old)) * (1 + logp.mean())


def run_all(cases: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [run(case, split=True) for case in cases]


def chunks_of_a_plan() -> list[tuple[str, int, int]]:
    """(kind, rows of a chunk, number of chunks) of plans that a budget decides."""
    problem, _ = make({"n_rows": 200})
    sizes, rank = SPLITS[dist.get_world_size()], dist.get_rank()
    start = sum(sizes[:rank])
    weight = part(problem.weight, start, start + sizes[rank])
    head = Head(weight, part(problem.bias, start, start + sizes[rank]), group=dist.group.WORLD)
    reports = [
        explain(problem.hidden, head, problem.batch, objective, Plan(None, budget))
        for objective in (smooth_local, coupled)
        for budget in (150_000, 200_000, 250_000)
    ]
    return [(r.kind, r.chunk_rows, r.n_chunks) for r in reports]


def messages() -> list[str]:
    """What a rank is told about groups and heads that do not fit."""
    rank = dist.get_rank()
    weight = torch.ones(5 + rank, 4)
    alone = dist.new_group([0])

    def message(make_head: Any) -> str:
        try:
            make_head()
        except ValueError as error:
            return str(error)
        return "nothing"

    head = Head(weight, group=dist.group.WORLD)
    rows = torch.ones(1 + rank, 4)
    scattered = Head(weight, group=dist.group.WORLD, sequence_parallel=True)
    batch = TokenBatch(torch.tensor([11]), torch.ones(1), advantages=torch.ones(1))
    fits = replace(batch, targets=torch.tensor([1]), rows=torch.tensor([0]))
    return [
        message(lambda: Head(torch.ones(5, 4 + rank), group=dist.group.WORLD)),
        message(lambda: Head(weight, scale=1.0 + rank, group=dist.group.WORLD)),
        message(lambda: Head(weight, group=alone)) if rank else "",
        message(lambda: linear_policy_loss(torch.ones(1, 4), head, batch, smooth_local)),
        message(lambda: linear_policy_loss(rows, scattered, fits, smooth_local)),
    ]


class Policy(torch.nn.Module):
    """A body and a head; the forward is the loss, so that DDP sees all parameters in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(8, 16)
        self.head = torch.nn.Linear(16, 50)

    def forward(self, x: Tensor, batch: TokenBatch) -> Tensor:
        head = Head(self.head.weight, self.head.bias)
        return linear_policy_loss(self.body(x), head, batch, smooth_local).loss


def data_parallel() -> dict[str, Tensor]:
    """Gradients of a step over two micro-batches a rank; rank 1 has no pair in its second."""
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    policy = DistributedDataParallel(Policy())
    parts = micro_batches()[2 * rank : 2 * rank + 2]
    with policy.no_sync():
        (policy(*parts[0]) * n_ranks).backward()  # DDP averages over ranks
    (policy(*parts[1]) * n_ranks).backward()
    return {name: p.grad for name, p in policy.module.named_parameters() if p.grad is not None}


def micro_batches() -> list[tuple[Tensor, TokenBatch]]:
    """Four micro-batches of one step; their weights have the step's denominator."""
    torch.manual_seed(5)
    found = []
    for n in (6, 3, 5, 0):
        weights = token_mean(torch.ones(n, dtype=torch.bool), torch.tensor([0, n]), 14.0)
        batch = TokenBatch(
            torch.randint(50, (n,)),
            weights,
            advantages=torch.randn(n),
            logp_old=-torch.rand(n) * 5,
        )
        found.append((torch.randn(n, 8), batch))
    return found


def fully_sharded() -> list[Tensor | str]:
    """A head whose weight FSDP2 has split: refused as it is, served when it is gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    policy = Policy()
    fully_shard(policy.head, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    weight, bias = policy.head.weight, policy.head.bias
    x, batch = micro_batches()[0]
    try:
        Head(weight)
        refused = "nothing"
    except TypeError as error:
        refused = str(error)
    summed = {"grad_placements": [Partial()]}
    head = Head(weight.full_tensor(**summed), bias.full_tensor(**summed))
    linear_policy_loss(policy.body(x), head, batch, smooth_local).loss.backward()
    return [refused, weight.grad.full_tensor() / dist.get_world_size()]


def refusals_of_distributed_tensors() -> list[str]:
    """What an op says of a DTensor where it needs a plain tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, batch = micro_batches()[0]
    whole, weight = x.repeat(1, 2), torch.randn(50, 16)
    logits = whole @ weight.t()

    def spread(tensor: Tensor) -> Any:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    calls = [
        lambda: linear_policy_loss(spread(whole), weight, batch, smooth_local),
        lambda: linear_logp_entropy(spread(whole), weight, batch.targets),
        lambda: policy_loss(spread(logits), batch, smooth_local),
        lambda: logp_entropy(spread(logits), batch.targets),
        lambda: sample_tokens(spread(logits), new_streams(0, 6), torch.arange(6)),
        lambda: logp_entropy(logits, spread(batch.targets)),
        lambda: replace(batch, advantages=spread(batch.advantages)),
        lambda: masked_quantile(spread(batch.advantages), batch.weights > 0, 0.5),
        lambda: segment_sums(spread(batch.advantages), batch.targets, 50),
    ]
    found = []
    for call in calls:
        try:
            call()
            found.append("nothing")
        except TypeError as error:
            found.append(str(error))
    return found


def one_process() -> dict[str, Tensor]:
    policy = Policy()
    for x, batch in micro_batches():
        policy(x, batch).backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def of_first_batch() -> Tensor:
    policy = Policy()
    policy(*micro_batches()[0]).backward()
    return policy.head.weight.grad
