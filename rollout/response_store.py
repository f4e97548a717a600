"""ResponseStore: what earlier rollouts answered to each prompt, for those who guess from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.rollout.record import Rollout

Ints = npt.NDArray[np.int64]


class Response(NamedTuple):
    """One response and where its tokens came from; (n,) each."""

    tokens: Ints
    streams: Ints  # int64, whose noise drew each token
    logp: npt.NDArray[np.float32]  # nats, under the distribution that drew it
    uses: int  # in how many rollouts in a row it, or what it became, has been a guess


@dataclass(slots=True)
class ResponseStore:
    """The responses of the last rollouts, by prompt.

    Args:
        rollouts: of how many the responses to a prompt are kept, counting those it was in.

    Raises:
        ValueError: `rollouts` is below 1.
    """

    rollouts: int = 1
    # Of each prompt a list for each rollout, the oldest first.
    _of_prompt: dict[bytes, list[list[Response]]] = field(default_factory=dict)
    _highest: int = -1  # of the tokens that were held

    def __post_init__(self) -> None:
        checks.need(self.rollouts >= 1, "rollouts", "a count >= 1", self.rollouts)

    def __len__(self) -> int:
        """Responses held."""
        return sum(len(part) for parts in self._of_prompt.values() for part in parts)

    def of(self, prompt: Ints) -> list[Response]:
        """All that was answered to the prompt, the oldest first."""
        parts = self._of_prompt.get(prompt.astype(np.int64).tobytes(), [])
        return [response for part in parts for response in part]

    def last(self, prompt: Ints) -> list[Response]:
        """What the last rollout with this prompt has answered to it, in its order."""
        parts = self._of_prompt.get(prompt.astype(np.int64).tobytes(), [])
        return list(parts[-1]) if parts else []

    def need_vocabulary(self, vocabulary: int) -> None:
        """Raise ValueError if a response has a token past it: it is of another tokenizer."""
        needed = f"ids below the vocabulary of {vocabulary}"
        checks.need(self._highest < vocabulary, "drafts", needed, self._highest)

    def add(self, rollout: Rollout, uses: Sequence[int] | None = None) -> None:
        """Take in a rollout's responses; uses[b] says how often sequence b's has been reused."""
        assert rollout.token_streams is not None
        if len(rollout.tokens):
            self._highest = max(self._highest, int(rollout.tokens.max()))
        keys = [prompt.numpy().tobytes() for prompt in rollout.prompts]
        borders = rollout.cu_seqlens.tolist()
        tokens, streams = rollout.tokens.numpy(), rollout.token_streams.numpy()
        logp = rollout.logp.float().numpy()
        new: dict[bytes, list[Response]] = {}
        for b, p in enumerate(rollout.prompt_index.tolist()):
            here = slice(borders[b], borders[b + 1])
            n_uses = 0 if uses is None else uses[b]
            response = Response(tokens[here], streams[here], logp[here], n_uses)
            new.setdefault(keys[p], []).append(response)
        for key, responses in new.items():
            held = self._of_prompt.setdefault(key, [])
            held.append(responses)
            del held[: -self.rollouts]

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for a checkpoint."""
        prompts = [np.frombuffer(key, dtype=np.int64) for key in self._of_prompt]
        parts = [part for held in self._of_prompt.values() for part in held]
        flat = [response for part in parts for response in part]
        return {
            "prompts": _joined(prompts, np.int64),
            "prompt_lengths": torch.tensor([len(p) for p in prompts], dtype=torch.int64),
            "rollouts": _counts(list(self._of_prompt.values())),
            "responses": _counts(parts),
            "lengths": _counts([response.tokens for response in flat]),
            "uses": torch.tensor([r.uses for r in flat], dtype=torch.int64),
            "tokens": _joined([r.tokens for r in flat], np.int64),
            "streams": _joined([r.streams for r in flat], np.int64),
            "logp": _joined([r.logp for r in flat], np.float32),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` was; KeyError or ValueError if it is none."""
        lengths = state["lengths"].tolist()
        self._highest = int(state["tokens"].max()) if len(state["tokens"]) else -1
        names = ("tokens", "streams", "logp")
        tokens, streams, logp = (torch.split(state[name], lengths) for name in names)
        columns = zip(tokens, streams, logp, state["uses"].tolist(), strict=True)
        flat = iter([Response(t.numpy(), s.numpy(), p.numpy(), n) for t, s, p, n in columns])
        parts = iter([list(islice(flat, n)) for n in state["responses"].tolist()])
        prompts = torch.split(state["prompts"], state["prompt_lengths"].tolist())
        self._of_prompt = {
            prompt.numpy().tobytes(): list(islice(parts, n))
            for prompt, n in zip(prompts, state["rollouts"].tolist(), strict=True)
        }


def _counts(parts: Sequence[Sized]) -> Tensor:
    return torch.tensor([len(part) for part in parts], dtype=torch.int64)


def _joined(parts: Sequence[npt.NDArray[np.generic]], dtype: npt.DTypeLike) -> Tensor:
    return torch.from_numpy(np.concatenate([*parts, np.empty(0, dtype)]))
