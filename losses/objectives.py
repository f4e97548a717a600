"""Objectives: factories of functions (logp, entropy, batch) -> (P,) losses.

All are token-local but `gspo`, whose tokens share their sequence's ratio.

An objective is a surrogate plus, where asked for, a KL term and an entropy bonus. That is not all
that distinguishes the papers: GRPO, Dr. GRPO and DAPO share the surrogate and differ in reduction
and advantages, which belong to the batch. Each docstring names its partners. `nll` is for
supervised training and has nothing but its log-prob.

Common to all the others:

- `batch.logp_old` is the trainer's policy at the start of the step. Without it the step is taken as
  exactly on-policy: logp.detach() stands in, every ratio is 1 and nothing is clipped. The same
  happens to pairs where `batch.known` is False: a token that nobody drew (forced, foreign) has no
  policy to form a ratio with, so its gradient is REINFORCE's.
- `tis_cap` corrects a sampler that differs from the trainer: the surrogate (not KL and entropy) is
  multiplied by min(exp(logp_old - logp_behaviour), tis_cap), a constant; by 1 where unknown.
- A 0-d tensor in `batch.scalars` under the name of a hyper-parameter replaces its value, so that a
  schedule changes it without a new objective. It cannot switch on what the factory left off (None,
  or an entropy_coef of 0): the ops rely on what was declared, so that raises ValueError.
- A pair is inactive if its advantage is 0 and no KL or entropy term is on.
- Every log-prob up to 0 is allowed, -inf included; see `importance_ratio` for what is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.batch import TokenBatch
from rollfuse.kernels.objective import Objective, TokenLocal, token_local
from rollfuse.losses.sequences import sequence_means
from rollfuse.losses.surrogates import (
    MAX_LOG_RATIO,
    clipped_surrogate,
    importance_ratio,
    log_ratio,
    reinforce_surrogate,
    truncated_weight,
)

# (logp (P,), logp_ref (P,)) -> (P,), nats: `k1`, `k2`, `k3`
KlEstimator = Callable[[Tensor, Tensor], Tensor]


def grpo(
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    *,
    dual_clip: float | None = None,
    kl: KlEstimator | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
) -> TokenLocal:
    """GRPO: PPO's clipped loss, with a KL term and an entropy bonus where asked for.

    clipped_surrogate(r, A) + kl_coef * kl(logp, logp_ref) - entropy_coef * entropy

    Partners: `sequence_mean` and `grpo_advantages`; the paper's KL is `k3`.

    Args:
        eps_low: in [0, 1); the ratio's band is [1 - eps_low, 1 + eps_high].
        eps_high: >= 0.
        dual_clip: > 1; the ratio's upper bound where A < 0. None: no bound.
        kl: `k1`, `k2`, `k3` or another function (logp, logp_ref) -> (P,). None: no KL term.
        kl_coef: >= 0, loss units a nat; 0 leaves the term out.
        entropy_coef: loss units a nat, subtracted times the entropy; 0 leaves the term out.
        tis_cap: > 0; the cap of the sampler's importance weight. None: no weight.

    Returns:
        An objective that reads batch.advantages and, where present, logp_old and known; with a KL
        term logp_ref, with tis_cap logp_behaviour. A missing one raises ValueError when called.

    Raises:
        TypeError, ValueError: a hyper-parameter is out of its range.

    Source: Shao et al., DeepSeekMath, arXiv 2402.03300, equation 3, per token.
    """
    _check_band(eps_low, eps_high, dual_clip)
    terms = _Terms(kl, kl_coef, entropy_coef, tis_cap)

    def surrogate(logp: Tensor, batch: TokenBatch) -> Tensor:
        return clipped_surrogate(
            importance_ratio(logp, _anchor(logp, batch)),
            _required(batch.advantages, "advantages"),
            batch.scalars.get("eps_low", eps_low),
            batch.scalars.get("eps_high", eps_high),
            _optional(batch, "dual_clip", dual_clip),
        )

    return terms.added_to(surrogate)


def dr_grpo(
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    *,
    dual_clip: float | None = None,
    kl: KlEstimator | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
) -> TokenLocal:
    """Dr. GRPO: the objective of `grpo`; the change is in its partners.

    Partners: `constant_length`, which does not favour long wrong answers, and `grpo_advantages`
    with scale_by_std=False, which does not favour prompts that are nearly solved or nearly lost.

    Arguments, result and errors are those of `grpo`.

    Source: Liu et al., Understanding R1-Zero-like training, arXiv 2503.20783.
    """
    return grpo(
        eps_low,
        eps_high,
        dual_clip=dual_clip,
        kl=kl,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        tis_cap=tis_cap,
    )


def dapo(
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    *,
    dual_clip: float | None = None,
    kl: KlEstimator | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
) -> TokenLocal:
    """DAPO: the objective of `grpo` with a higher upper bound, so that rare tokens can grow.

    Partners: `token_mean` and `grpo_advantages`. Dynamic sampling is what inactive pairs do here:
    groups without spread have advantage 0 and cost nothing, and with the step's denominator counted
    over the other groups they do not dilute the loss either.

    Arguments, result and errors are those of `grpo`.

    Source: Yu et al., DAPO, arXiv 2503.14476, equation 8.
    """
    return grpo(
        eps_low,
        eps_high,
        dual_clip=dual_clip,
        kl=kl,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        tis_cap=tis_cap,
    )


def reinforce(
    *,
    kl: KlEstimator | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
) -> TokenLocal:
    """REINFORCE: -A logp, without ratio or clip; batch.logp_old only enters the tis_cap weight.

    -A logp + kl_coef * kl(logp, logp_ref) - entropy_coef * entropy

    A token the policy forbids (logp = -inf) has an infinite loss and the gradient -A; one that may
    occur in a batch is better given the weight 0.

    Partners: `sequence_sum` (the likelihood of whole responses) and `rloo_advantages`.

    Arguments, result and errors are those of `grpo`.

    Source: Williams, Machine Learning 8, 1992; for language models Ahmadian et al., Back to basics,
    arXiv 2402.14740.
    """
    terms = _Terms(kl, kl_coef, entropy_coef, tis_cap)

    def surrogate(logp: Tensor, batch: TokenBatch) -> Tensor:
        return reinforce_surrogate(logp, _required(batch.advantages, "advantages"))

    return terms.added_to(surrogate)


def nll() -> TokenLocal:
    """-logp: the cross-entropy of supervised training.

    A token the model forbids (logp = -inf) has an infinite loss and the gradient -1.

    Partners: `TokenBatch.from_labels` and `token_mean`.

    Returns:
        An objective that reads nothing from the batch.
    """

    @token_local(uses_entropy=False)
    def objective(logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
        return -logp

    return objective


def gspo(
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
    *,
    kl: KlEstimator | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    tis_cap: float | None = None,
) -> Objective:
    """GSPO: one ratio a sequence, the geometric mean of its tokens', clipped as a whole.

    s = exp(mean over the sequence of (logp - logp_old));  clipped_surrogate(s, A) at every token

    Coupled: the tokens of a sequence share s, so the op takes two phases. A sequence outside the
    band has no gradient and is left out of the second.

    Partners: `sequence_mean` and `grpo_advantages`, which give a sequence's tokens one advantage.

    Args:
        eps_low, eps_high: as in `grpo`; the band of a mean of many log-ratios is narrow.
        kl, kl_coef, entropy_coef, tis_cap: as in `grpo`, token by token.

    Returns:
        An objective that reads batch.cu_seqlens and advantages and, where present, logp_old and
        known. A missing one raises ValueError when called. The mean is over the pairs it is given,
        those of weight 0 left out (under torch.compile there must be none). A token the policy
        forbids gives its sequence the ratio 0.

    Raises:
        TypeError, ValueError: a hyper-parameter is out of its range.

    Source: Zheng et al., Group sequence policy optimization, arXiv 2507.18071, equations 5 and 7.
    """
    _check_band(eps_low, eps_high, None)
    terms = _Terms(kl, kl_coef, entropy_coef, tis_cap)

    def surrogate(logp: Tensor, batch: TokenBatch) -> Tensor:
        borders = _required(batch.cu_seqlens, "cu_seqlens")
        # Held high up, so that -inf and inf in one sequence make a ratio of 0 and not of NaN.
        of_token = log_ratio(logp, _anchor(logp, batch)).clamp(max=1e6)
        # float64 until each token has it: backwards the derivatives of a sequence's tokens are
        # added up, and in float32 the error of that sum would be in all of them.
        mean = sequence_means(of_token.double(), borders)
        ratio = mean.clamp(max=MAX_LOG_RATIO).exp()
        of_tokens = ratio.repeat_interleave(borders.diff(), output_size=len(logp))
        return clipped_surrogate(
            of_tokens.to(logp.dtype),
            _required(batch.advantages, "advantages"),
            batch.scalars.get("eps_low", eps_low),
            batch.scalars.get("eps_high", eps_high),
        )

    def objective(logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
        return terms.loss(surrogate, logp, entropy, batch)

    return objective


@dataclass(frozen=True, slots=True)
class _Terms:
    """What every objective shares: the sampler's weight, the KL term, the entropy bonus."""

    kl: KlEstimator | None
    kl_coef: float
    entropy_coef: float
    tis_cap: float | None

    def __post_init__(self) -> None:
        if self.kl is not None and not callable(self.kl):
            raise TypeError(f"kl: need a function such as k3, got {type(self.kl).__name__}")
        good = 0.0 <= self.kl_coef < math.inf
        checks.need(good, "kl_coef", "a finite value >= 0", self.kl_coef)
        good = self.kl is not None or self.kl_coef == 0.0
        checks.need(good, "kl", "an estimator such as k3 (kl_coef is not 0)", None)
        good = -math.inf < self.entropy_coef < math.inf
        checks.need(good, "entropy_coef", "a finite value", self.entropy_coef)
        good = self.tis_cap is None or 0.0 < self.tis_cap < math.inf
        checks.need(good, "tis_cap", "a finite value > 0 or None", self.tis_cap)

    def added_to(self, surrogate: Callable[[Tensor, TokenBatch], Tensor]) -> TokenLocal:
        """The token-local objective of a surrogate (logp, batch) -> (P,) and these terms."""

        def active(batch: TokenBatch) -> Tensor:
            signed = _required(batch.advantages, "advantages") != 0
            has_more = self._kl_is_on(batch) or self.entropy_coef != 0.0
            return torch.ones_like(signed) if has_more else signed

        @token_local(active=active, uses_entropy=self.entropy_coef != 0.0)
        def objective(logp: Tensor, entropy: Tensor, batch: TokenBatch) -> Tensor:
            return self.loss(surrogate, logp, entropy, batch)

        return objective

    def loss(
        self,
        surrogate: Callable[[Tensor, TokenBatch], Tensor],
        logp: Tensor,
        entropy: Tensor,
        batch: TokenBatch,
    ) -> Tensor:
        """(P,) the surrogate with its terms."""
        loss = surrogate(logp, batch)
        tis_cap = _optional(batch, "tis_cap", self.tis_cap)
        if tis_cap is not None:
            weight = _sampler_weight(logp, batch, tis_cap)
            # A weight of 0 is of a token no policy draws, whose loss may be infinite.
            loss = torch.where(weight > 0, weight * loss, 0.0)
        if self.kl is not None and self._kl_is_on(batch):
            coef = batch.scalars.get("kl_coef", self.kl_coef)
            loss = loss + coef * self.kl(logp, _required(batch.logp_ref, "logp_ref"))
        entropy_coef = _optional(batch, "entropy_coef", self.entropy_coef or None)
        return loss if entropy_coef is None else loss - entropy_coef * entropy

    def _kl_is_on(self, batch: TokenBatch) -> bool:
        """Whether the KL term can have a gradient. A coefficient in a tensor is not read: yes."""
        if self.kl is None:
            return _optional(batch, "kl_coef", None) is not None
        return self.kl_coef != 0.0 or "kl_coef" in batch.scalars


def _anchor(logp: Tensor, batch: TokenBatch) -> Tensor:
    """(P,) the log-prob the ratio is formed with: logp itself, detached, where none is known."""
    if batch.logp_old is None:
        return logp.detach()
    if batch.known is None:
        return batch.logp_old
    return torch.where(batch.known, batch.logp_old, logp.detach())


def _sampler_weight(logp: Tensor, batch: TokenBatch, cap: Tensor | float) -> Tensor:
    behaviour = _required(batch.logp_behaviour, "logp_behaviour")
    weight = truncated_weight(_anchor(logp, batch), behaviour, cap)
    return weight if batch.known is None else torch.where(batch.known, weight, 1.0)


def _optional(batch: TokenBatch, name: str, made_with: float | None) -> Tensor | float | None:
    """A hyper-parameter of a part that may be off (None); scalars must not switch it on."""
    value = batch.scalars.get(name)
    if value is None:
        return made_with
    if made_with is None:
        raise ValueError(
            f"scalars[{name!r}]: need an objective made with {name} switched on, got one without"
        )
    return value


def _required(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name}: need batch.{name} for this objective, got None")
    return value


def _check_band(eps_low: float, eps_high: float, dual_clip: float | None) -> None:
    checks.need(0.0 <= eps_low < 1.0, "eps_low", "a value in [0, 1)", eps_low)
    checks.need(0.0 <= eps_high < math.inf, "eps_high", "a finite value >= 0", eps_high)
    good = dual_clip is None or 1.0 < dual_clip < math.inf
    checks.need(good, "dual_clip", "a finite value > 1 or None", dual_clip)
