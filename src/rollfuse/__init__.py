"""rollfuse: fused kernels that make LLM reinforcement learning cheaper. This page is the API."""

from rollfuse.kernels.batch import TokenBatch
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.from_logits import logp_entropy
from rollfuse.kernels.head import Head
from rollfuse.kernels.linear import LogpEntropy, linear_logp_entropy
from rollfuse.kernels.objective import check_objective, token_local
from rollfuse.kernels.plan import Plan, PlanReport
from rollfuse.kernels.policy import PolicyLoss, explain, linear_policy_loss, policy_loss

__all__ = [
    "Head", "LogpEntropy", "Plan", "PlanReport", "PolicyLoss", "TokenBatch", "backend",
    "check_objective", "explain", "linear_logp_entropy", "linear_policy_loss", "logp_entropy",
    "policy_loss", "token_local",
]  # fmt: skip
