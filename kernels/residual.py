"""What rules that accept by chance share: their uniforms, and the draw that ends a draft.

A rejected token is replaced by a draw from what the draft has not covered: (scale * p - taken)+,
p being the target's distribution and `taken` a vector over what the draft could draw.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.drafts import Draft, DraftRows, Proposal, ProposalRows
from rollfuse.kernels.noise import Purpose, gumbels, noise_words, row_keys, uniforms
from rollfuse.kernels.sampling import Sampled, Scored
from rollfuse.kernels.statistics import first_argmax
from rollfuse.kernels.target import Target
from rollfuse.kernels.verification import Verdict, next_rows

# Whole rows of the target are looked at in blocks of about this many elements: 16 MiB of float32,
# of which there are up to six at a time, two of them in float64.
_BLOCK_ELEMENTS = 1 << 22


def need_proposal(draft: Draft) -> Proposal:
    if draft.proposal is None:
        got = "None" if draft.logp is None else "the drawn tokens' log-probs alone"
        raise ValueError(
            "proposal: need the distributions the draft was drawn from (for a deterministic draft "
            f"one id a row with log-prob 0, or the rule one_hot), got {got}"
        )
    return draft.proposal


def drawn_logp(draft: Draft) -> Tensor:
    """(T,) log-probs of the draft's tokens under their proposal; refuses what it cannot draw."""
    logp = need_proposal(draft).of_all().logp_of(draft.tokens)
    if checks.may_read(logp) and bool((logp == -torch.inf).any()):
        token = int((logp == -torch.inf).nonzero()[0])
        got = f"{int(draft.tokens[token])}, which row {token} of it cannot"
        raise ValueError(f"proposal: need draft tokens that it can draw, got {got}")
    return logp


def acceptance_uniforms(draft: Draft, sequence: Tensor, number: Tensor) -> Tensor:
    """(n, m) float64 uniforms, number (n, m) of those that the drafts of sequences (n,) have.

    Keyed by where the draft begins, not by where a token stands: a later draft of the sequence
    begins elsewhere and gets others, even for places that this one has looked at.
    """
    keys = row_keys(draft.streams, draft.positions, Purpose.ACCEPT)[sequence]
    return uniforms(noise_words(keys, number)).double()


def blocks_of(index: Tensor, size: int) -> Iterator[Tensor]:
    """`index` in parts of a block, which holds `size` elements for each entry."""
    step = max(1, _BLOCK_ELEMENTS // size)
    for start in range(0, index.shape[0], step):
        yield index[start : start + step]


def draw_residual(
    log_p: Tensor,
    taken: tuple[ProposalRows, Tensor] | None,
    streams: Tensor,
    positions: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """(n,) a token a row from (scale * p - taken)+.

    log_p: (n, V). taken: values (n, V) or (n, k) beside the rows of the proposal they lie over.
    Where rounding leaves nothing, a draw from p.
    """
    p = log_p.exp()
    left = p if scale is None else p * scale.to(p.dtype).unsqueeze(1)
    if taken is not None:
        left = taken[0].subtracted(taken[1].to(p.dtype), left).clamp_min_(0.0)
    left = torch.where(left.sum(1, keepdim=True) > 0, left, p)
    keys = row_keys(streams, positions, Purpose.RESIDUAL)
    tokens = torch.arange(p.shape[1], dtype=torch.int32, device=p.device)
    return first_argmax(gumbels(noise_words(keys, tokens)) + left.log())


def residual_of_cut(
    draft: Draft, target: Target, rows: DraftRows, n_accepted: Tensor, scale: Tensor | None = None
) -> Tensor:
    """(B,) what replaces the first token that is not accepted, or -1; one draft a sequence.

    scale: (B,), of the target's probabilities at the cut.
    """
    proposal = need_proposal(draft)
    cut = (n_accepted < rows.length).nonzero().squeeze(1)
    ids = torch.full_like(n_accepted, -1)
    for part in blocks_of(cut, target.vocabulary):
        log_p = target.log_probs(rows.start[part] + n_accepted[part])
        q = proposal.of_tokens(draft.cu_seqlens[part] + n_accepted[part])
        ids[part] = draw_residual(
            log_p,
            (q, q.logp.to(log_p.dtype).exp()),
            draft.streams[part],
            draft.positions[part] + n_accepted[part],
            None if scale is None else scale[part],
        )
    return ids


def finish(  # noqa: PLR0913  (what the rules have worked out, each its part)
    draft: Draft,
    target: Target,
    rows: DraftRows,
    walked: tuple[Tensor, Tensor],
    accepted: Scored,
    replaced: Tensor | None,
) -> Verdict:
    """The verdict from what was accepted.

    walked: (n_accepted, followed), both (B,); accepted: of the draft's tokens, (T,); replaced:
    (B,) ids drawn in the place of rejected ones, or -1.

    Where nothing replaces a token, the next one is the sequence's own draw from the target.
    """
    n_accepted, followed = walked
    row, exists = next_rows(draft, rows, n_accepted, followed)
    safe = row.clamp(max=target.n_rows - 1)
    drawn = target.sample(draft.streams, draft.positions + n_accepted, safe)
    if replaced is not None:
        drawn = _replace(drawn, replaced, target, safe)
    at = row.where(exists, target.n_rows)
    return Verdict(
        n_accepted,
        drawn.ids.masked_fill(~exists, -1),
        _spread(rows, target.n_rows, draft.tokens, at, drawn.ids, -1),
        _spread(rows, target.n_rows, accepted.logp, at, drawn.logp, 0),
        _spread(rows, target.n_rows, accepted.entropy, at, drawn.entropy, 0),
        _spread(rows, target.n_rows, accepted.support, at, drawn.support, 0),
        followed,
    )


def _replace(drawn: Sampled, ids: Tensor, target: Target, rows: Tensor) -> Sampled:
    """`drawn` with the tokens that replace it; rows that nothing can be drawn from stay so."""
    which = ((ids >= 0) & (drawn.ids >= 0)).nonzero().squeeze(1)
    ids = ids[which]
    # As every other token is: under an invariant plan its bits do not depend on the batch.
    logp = target.score(ids, rows[which]).logp
    return drawn._replace(
        ids=drawn.ids.index_put((which,), ids), logp=drawn.logp.index_put((which,), logp)
    )


def _spread(  # noqa: PLR0913
    rows: DraftRows, n_rows: int, of_tokens: Tensor, at: Tensor, of_next: Tensor, fill: int
) -> Tensor:
    """(R,) the tokens' values in their rows, the next ones' `at` theirs, `fill` elsewhere."""
    out = torch.full((n_rows + 1,), fill, dtype=of_next.dtype, device=of_next.device)
    out[rows.of_token] = of_tokens.to(out.dtype)
    out[at] = of_next
    return out[:n_rows]
