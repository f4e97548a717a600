"""The training forward over rollouts: every distinct piece of text once.

A group's prompt is pushed through the model once, its responses follow on the prompt's keys and
values, and a response that another one contains is not pushed through at all:

    prompt P, responses  abcE  abE  abcE  F        rows (what predicts the next token)
    pass 1               P                         P|
    pass 2               P + abc                   P a|  P ab|  P abc|

The marked positions are the rows, and `Packed.rows` says which row predicts which token: P|
predicts a, a, a and F. Gradients equal those of sequences trained alone, because a shared row is
one function of the weights. That holds for models whose rows depend on nothing but the tokens
before them: no dropout (a shared row has one mask for all its sequences), no batch statistics.

Legend: U distinct prompts of longest length L, S distinct response inputs, R rows, P pairs (row,
target), B sequences of the rollout, T its tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rollfuse.kernels import checks
from rollfuse.kernels.batch import Reduction, TokenBatch
from rollfuse.rollout.causal_lm import (
    cache_argument,
    embedding_weight,
    forward_arguments,
    left_padded,
    need_causal_lm,
    need_filled,
    new_cache,
)
from rollfuse.rollout.record import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packed:
    """What to push through the model, and which row of the result predicts which token.

    Rows are the U prompts' last positions, then the positions of the S inputs, one after another.

    Attributes:
        prompts: U tensors (L_u,) int64, distinct.
        inputs: S tensors (L_s,) int64, L_s >= 1: responses without their last tokens, none the
            beginning of another one to the same prompt.
        input_prompt: (S,) int64 in [0, U), the prompt of each input, ascending.
        rows: (P,) int64 in [0, R).
        targets: (P,) int64, the tokens predicted.
        tokens: (P,) int64, the number of each target among the rollout's tokens.
        sequences: (K,) int64, the rollout's sequences that were kept, ascending.
        cu_seqlens: (K + 1,) int64, where each kept sequence's pairs start and end.
    """

    prompts: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    input_prompt: Tensor
    rows: Tensor
    targets: Tensor
    tokens: Tensor
    sequences: Tensor
    cu_seqlens: Tensor

    @property
    def n_rows(self) -> int:
        """R."""
        return len(self.prompts) + sum(map(len, self.inputs))


def pack_rollout(rollout: Rollout, keep: Tensor | None = None) -> Packed:
    """Find what the sequences of a rollout share. On the host, without the model.

    Args:
        rollout: B sequences.
        keep: (B,) bool, the sequences to train on. None: all of them.

    Returns:
        A Packed of the kept sequences; its order depends on nothing but the tokens.

    Raises:
        ValueError, TypeError: `keep` is not one bool a sequence.
    """
    if keep is not None:
        checks.need_shape(keep, (len(rollout),), "keep", "one bool a sequence")
        if keep.dtype != torch.bool:
            raise TypeError(f"keep: need bool, got {keep.dtype}")
    kept = np.arange(len(rollout)) if keep is None else keep.cpu().numpy().nonzero()[0]
    borders = rollout.cu_seqlens.numpy()
    kept = kept[borders[kept + 1] > borders[kept]]  # an empty response has nothing to predict
    prompts, prompt = _distinct_prompts(rollout, kept)
    tokens = rollout.tokens.numpy()
    texts = [
        (int(p), tokens[borders[b] : borders[b + 1] - 1].tobytes())
        for p, b in zip(prompt, kept, strict=True)
    ]
    inputs, place = _maximal(texts)
    lengths = borders[kept + 1] - borders[kept]
    starts = np.zeros(len(kept) + 1, dtype=np.int64)
    starts[1:] = lengths.cumsum()
    offset = np.arange(starts[-1]) - starts[:-1].repeat(lengths)  # of a token in its response
    input_lengths = np.array([len(text) // tokens.itemsize for _, text in inputs], dtype=np.int64)
    first_row = len(prompts) + input_lengths.cumsum() - input_lengths
    # A response's first token is predicted by the prompt's last row, token j by the input's j - 1.
    # Responses of one token have no input: their place is -1, and its value is not used.
    base = np.append(first_row, 0)[place]
    rows = np.where(offset == 0, prompt.repeat(lengths), base.repeat(lengths) + offset - 1)
    where = borders[kept].repeat(lengths) + offset
    return Packed(
        prompts=prompts,
        inputs=tuple(torch.from_numpy(np.frombuffer(t, dtype=np.int64).copy()) for _, t in inputs),
        input_prompt=torch.tensor([p for p, _ in inputs], dtype=torch.int64),
        rows=torch.from_numpy(rows),
        targets=torch.from_numpy(tokens[where]),
        tokens=torch.from_numpy(where),
        sequences=torch.from_numpy(kept),
        cu_seqlens=torch.from_numpy(starts),
    )


def hidden_rows(model: PreTrainedModel, packed: Packed) -> Tensor:
    """Hidden states of the packed rows, as the LM head takes them; differentiable.

    Two passes: the prompts with a key-value cache that keeps its graph, then the inputs on top of
    their prompts' keys and values. Under gradient checkpointing, which drops the cache of a model
    in training, it is `hidden_rows_padded` instead.

    Args:
        model: the causal language model; its train or eval mode is left as it is.
        packed: from `pack_rollout`.

    Returns:
        (R, D), dtype and device of the model's hidden states.

    Raises:
        TypeError: the model has no LM head or no key-value cache (see `hidden_rows_padded`), or
            does not fill the cache it is given.
    """
    need_causal_lm(model)
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return hidden_rows_padded(model, packed)
    weight = embedding_weight(model)
    if not packed.prompts:
        return weight[:0]  # a graph without rows
    decoder, cache = model.get_decoder(), new_cache(model)
    lengths = torch.tensor([len(prompt) for prompt in packed.prompts])
    ids, mask = left_padded(list(packed.prompts), lengths)
    padding: dict[str, Tensor] = {}
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        padding = {"attention_mask": mask, "position_ids": positions}
    last = _decode(decoder, ids, padding, cache, weight.device)[:, -1]
    need_filled(cache, ids.shape[1], model)
    if not packed.inputs:
        return last
    # Prompts end in one column, so that all inputs begin in the next.
    prompt = packed.input_prompt
    if not torch.equal(prompt, torch.arange(len(packed.prompts))):
        cache.reorder_cache(prompt.to(weight.device))
    response_ids, rows = _right_padded(packed.inputs)
    if mask is not None:
        padding = {
            "attention_mask": nn.functional.pad(
                mask[prompt], (0, response_ids.shape[1]), value=True
            ),
            "position_ids": lengths[prompt].unsqueeze(1) + torch.arange(response_ids.shape[1]),
        }
    hidden = _decode(decoder, response_ids, padding, cache, weight.device)
    # Padding on the right is behind every row that counts, and causal attention never looks there.
    responses = hidden.flatten(0, 1).index_select(0, rows.to(weight.device))
    return torch.cat([last, responses])


def hidden_rows_padded(model: PreTrainedModel, packed: Packed) -> Tensor:
    """`hidden_rows` by one pass over whole sequences, padded on the right, without a cache.

    For gradient checkpointing and for models without a cache that gradients can pass through. A
    prompt is pushed through once for each of its inputs.

    Returns:
        (R, D), as `hidden_rows`, up to rounding.
    """
    weight = embedding_weight(model)
    if not packed.prompts:
        return weight[:0]  # a graph without rows
    n_prompts = len(packed.prompts)
    prompt_of = packed.input_prompt.tolist()
    alone = sorted(set(range(n_prompts)) - set(prompt_of))
    sequences = [
        torch.cat([packed.prompts[u], tokens])
        for u, tokens in zip(prompt_of, packed.inputs, strict=True)
    ] + [packed.prompts[u] for u in alone]
    owner = {u: s for s, u in reversed(list(enumerate([*prompt_of, *alone])))}
    ids, _ = _right_padded(tuple(sequences))
    width = ids.shape[1]
    rows = [torch.tensor([owner[u] * width + len(packed.prompts[u]) - 1 for u in range(n_prompts)])]
    for s, (u, tokens) in enumerate(zip(prompt_of, packed.inputs, strict=True)):
        rows.append(s * width + len(packed.prompts[u]) + torch.arange(len(tokens)))
    hidden = _decode(model.get_decoder(), ids, {}, None, weight.device)
    picked: Tensor = hidden.flatten(0, 1).index_select(0, torch.cat(rows).to(weight.device))
    return picked


def token_batch(
    packed: Packed,
    rollout: Rollout,
    *,
    advantages: Tensor,
    reduction: Reduction,
    denominator: Tensor | float | None = None,
    logp_old: Tensor | None = None,
    logp_ref: Tensor | None = None,
) -> TokenBatch:
    """What a policy loss needs to know about the pairs of `packed`, on the CPU.

    Args:
        packed: from `pack_rollout(rollout, ...)`.
        rollout: the same one.
        advantages: (B,) float32, one a sequence of the rollout.
        reduction: `token_mean`, `sequence_mean`, ...; makes the weights of the kept sequences.
        denominator: the reduction's denominator over the whole step (None: this batch's own).
        logp_old: (T,) float32, nats, under the policy at the start of the step, one a token of the
            rollout. None: the sampler's, right where it is the same policy.
        logp_ref: (T,) float32, nats, under the reference policy.

    Raises:
        ValueError: a shape is wrong.
    """
    n_tokens = len(rollout.tokens)
    checks.need_tensor(advantages, "advantages")
    checks.need_shape(advantages, (len(rollout),), "advantages", "one a sequence, (B,)")
    for name, value in (("logp_old", logp_old), ("logp_ref", logp_ref)):
        if value is not None:
            checks.need_shape(value, (n_tokens,), name, "one a token of the rollout, (T,)")
    behaviour = rollout.logp[packed.tokens].float()
    mask = torch.ones(len(packed.targets), dtype=torch.bool)
    of_sequence = advantages.detach().cpu().float()[packed.sequences]
    return TokenBatch(
        targets=packed.targets,
        weights=reduction(mask, packed.cu_seqlens, denominator),
        advantages=of_sequence.repeat_interleave(packed.cu_seqlens.diff()),
        logp_old=behaviour if logp_old is None else _picked(logp_old, packed),
        logp_behaviour=behaviour,
        logp_ref=None if logp_ref is None else _picked(logp_ref, packed),
        rows=packed.rows,
        temperature=rollout.temperature,
        support=None if rollout.support is None else rollout.support[packed.tokens].float(),
        version=rollout.version[packed.tokens],
        cu_seqlens=packed.cu_seqlens,
    )


def _picked(values: Tensor, packed: Packed) -> Tensor:
    return values.detach().cpu().float()[packed.tokens]


def _distinct_prompts(rollout: Rollout, kept: Ints) -> tuple[tuple[Tensor, ...], Ints]:
    """Distinct prompts of the kept sequences in order of appearance; (K,) the number of each."""
    number: dict[bytes, int] = {}
    prompts: list[Tensor] = []
    of_group: dict[int, int] = {}
    groups = rollout.prompt_index.numpy()[kept]
    for group in groups.tolist():
        if group in of_group:
            continue
        text = rollout.prompts[group].numpy().tobytes()
        if text not in number:
            number[text] = len(prompts)
            prompts.append(rollout.prompts[group])
        of_group[group] = number[text]
    return tuple(prompts), np.array([of_group[g] for g in groups.tolist()], dtype=np.int64)


def _maximal(texts: list[tuple[int, bytes]]) -> tuple[list[tuple[int, bytes]], Ints]:
    """The (prompt, tokens) that no other continues, sorted, and the place there of each text.

    Sorted bytes put a beginning before all that continue it, with nothing else between, so the
    text after it tells. Every token has the same number of bytes: no beginning ends inside one.
    An empty text needs no input: place -1.
    """
    found: list[tuple[int, bytes]] = []
    number: dict[tuple[int, bytes], int] = {}
    for prompt, text in sorted({t for t in texts if t[1]}, reverse=True):
        contained = found and found[-1][0] == prompt and found[-1][1].startswith(text)
        if not contained:
            found.append((prompt, text))
        number[prompt, text] = len(found) - 1
    n = len(found)
    place = [n - 1 - number[t] if t[1] else -1 for t in texts]
    return found[::-1], np.array(place, dtype=np.int64)


def _right_padded(sequences: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """ids (S, L) padded behind, and where the tokens are in its flat view, sequence by sequence."""
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    real = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    return ids, real.flatten().nonzero().squeeze(1)


def _decode(
    decoder: nn.Module,
    ids: Tensor,
    padding: dict[str, Tensor],
    cache: object | None,
    device: torch.device,
) -> Tensor:
    """Last hidden states (rows, length, D); a cache takes part in the graph and is extended."""
    cached: dict[str, object] = {"use_cache": False}
    if cache is not None:
        cached = {cache_argument(forward_arguments(decoder)): cache, "use_cache": True}
    out = decoder(
        input_ids=ids.to(device, non_blocking=True),
        **cached,
        **{name: value.to(device, non_blocking=True) for name, value in padding.items()},
    )
    hidden: Tensor = out.last_hidden_state
    return hidden
