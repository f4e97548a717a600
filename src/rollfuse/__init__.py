"""rollfuse: fused kernels that make LLM reinforcement learning cheaper. This page is the API."""

# The head: log-probs, entropies and policy losses over a large vocabulary
from rollfuse.kernels.batch import TokenBatch
from rollfuse.kernels.dispatch import backend
from rollfuse.kernels.drafts import Draft, Proposal
from rollfuse.kernels.from_logits import logp_entropy
from rollfuse.kernels.head import Head, Lora
from rollfuse.kernels.linear import linear_logp_entropy
from rollfuse.kernels.linear_sampling import linear_sample, linear_score
from rollfuse.kernels.multi_drafts import multi_draft
from rollfuse.kernels.noise import (
    NoiseFamily,
    Purpose,
    fork_streams,
    need_distinct_streams,
    new_streams,
    renewed_streams,
)
from rollfuse.kernels.objective import check_objective, token_local
from rollfuse.kernels.order import masked_quantile, mean_bounded_mask, top_k_mask
from rollfuse.kernels.plan import Plan, PlanReport
from rollfuse.kernels.policy import PolicyLoss, explain, linear_policy_loss, policy_loss
from rollfuse.kernels.rejection import block, exact, lenient
from rollfuse.kernels.rows import LogpEntropy
from rollfuse.kernels.sampling import Sampled, Sampling, Scored, sample_tokens, score_tokens
from rollfuse.kernels.segments import (
    discounted_sums,
    leave_one_out_deviations,
    leave_one_out_means,
    number_groups,
    segment_counts,
    segment_deviations,
    segment_means,
    segment_numbers,
    segment_scan,
    segment_std,
    segment_sums,
)
from rollfuse.kernels.target import Target
from rollfuse.kernels.transport import multi_draft_bound
from rollfuse.kernels.tree_attention import tree_decode_attention, write_key_values
from rollfuse.kernels.verification import Verdict, coupled, coupled_list, one_hot, verify
from rollfuse.kernels.wrapped import linear_head
from rollfuse.losses.advantages import grpo_advantages, rloo_advantages
from rollfuse.losses.kl import k1, k2, k3
from rollfuse.losses.objectives import dapo, dr_grpo, grpo, gspo, nll, reinforce
from rollfuse.losses.reductions import (
    constant_length,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from rollfuse.losses.surrogates import clipped_surrogate
from rollfuse.rollout.branch import Branch
from rollfuse.rollout.causal_lm import head_of
from rollfuse.rollout.drafter import Chunk, Drafter
from rollfuse.rollout.engine import Engine
from rollfuse.rollout.fallback import Fallback
from rollfuse.rollout.model_drafts import ModelDrafts
from rollfuse.rollout.packing import hidden_rows, pack_rollout, token_batch
from rollfuse.rollout.pages import OutOfPages
from rollfuse.rollout.past_rollouts import PastRollouts
from rollfuse.rollout.picture import group_picture, tree_picture
from rollfuse.rollout.record import Finish, Rollout, Source
from rollfuse.rollout.suffix_drafts import SuffixDrafts
from rollfuse.rollout.tree_cache import TreeCache
from rollfuse.rollout.tree_model import TreeModel, tree_cache_for
from rollfuse.rollout.tree_walk import Walk, verify_trees

__all__ = [
    # the head
    "Head", "LogpEntropy", "Lora", "Plan", "PlanReport", "PolicyLoss", "TokenBatch", "backend",
    "check_objective", "explain", "head_of", "linear_head", "linear_logp_entropy",
    "linear_policy_loss", "logp_entropy", "policy_loss", "token_local",
    # objectives, KL estimators, reductions, credit
    "clipped_surrogate", "constant_length", "dapo", "dr_grpo", "grpo", "grpo_advantages",
    "gspo", "k1", "k2", "k3", "nll", "reinforce", "rloo_advantages", "sequence_mean",
    "sequence_sum", "token_mean",
    # order statistics, ragged groups
    "discounted_sums", "leave_one_out_deviations", "leave_one_out_means", "masked_quantile",
    "mean_bounded_mask", "number_groups", "segment_counts", "segment_deviations",
    "segment_means", "segment_numbers", "segment_scan", "segment_std", "segment_sums",
    "top_k_mask",
    # noise and sampling
    "NoiseFamily", "Purpose", "Sampled", "Sampling", "Scored", "fork_streams", "linear_sample",
    "linear_score", "need_distinct_streams", "new_streams", "renewed_streams", "sample_tokens",
    "score_tokens",
    # verification
    "Draft", "Proposal", "Target", "Verdict", "block", "coupled", "coupled_list", "exact",
    "lenient", "multi_draft", "multi_draft_bound", "one_hot", "verify",
    # guesses of what a rollout will be
    "Chunk", "Drafter", "Fallback", "ModelDrafts", "PastRollouts", "SuffixDrafts", "Walk",
    "verify_trees",
    # rollouts
    "Engine", "Finish", "Rollout", "Source", "group_picture", "hidden_rows", "pack_rollout",
    "token_batch", "tree_picture",
    # trees of texts
    "Branch", "OutOfPages", "TreeCache", "TreeModel", "tree_cache_for", "tree_decode_attention",
    "write_key_values",
]  # fmt: skip
