"""Policies to train: a small Qwen3 made on the spot, or any causal LM of transformers.

The small model reads and writes characters. `warm_start` teaches it what an answer looks like on a
handful of solved problems; how to solve the rest is left to reinforcement learning.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollfuse.kernels import checks
from rollfuse.kernels.head import Head
from rollfuse.rollout.causal_lm import head_difference, head_of, head_tolerance
from rollfuse.rollout.tasks import Problem, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
_MAX_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class SmallModel:
    """The shape of a Qwen3 with tied embeddings."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads"):
            checks.need(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        good = self.hidden % (2 * self.heads) == 0
        checks.need(good, "hidden", f"a multiple of 2 * heads = {2 * self.heads}", self.hidden)
        good = self.heads % self.kv_heads == 0
        checks.need(good, "heads", f"a multiple of kv_heads = {self.kv_heads}", self.heads)


@dataclass(frozen=True, slots=True)
class WarmStart:
    """Supervised training on a few solved problems; the units are problems, steps, problems."""

    problems: int
    steps: int
    batch_size: int
    lr: float

    def __post_init__(self) -> None:
        checks.need(self.steps >= 0, "warm_steps", "0 or more", self.steps)
        checks.need(self.problems >= 1, "warm_problems", "at least 1", self.problems)
        checks.need(self.batch_size >= 1, "warm_batch_size", "at least 1", self.batch_size)
        checks.need(0.0 <= self.lr < 1.0, "warm_lr", "a number in [0, 1)", self.lr)


@dataclass(slots=True)
class Policy:
    """A model with its tokenizer, and the words between text and tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def head(self) -> Head:
        """The LM head as the fused ops take it."""
        return head_of(self.model)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's end token, the model config's own."""
        generation = getattr(self.model, "generation_config", None)
        configured = getattr(generation, "eos_token_id", None)
        several = configured if isinstance(configured, list) else [configured]
        return tuple(sorted({i for i in (self.tokenizer.eos_token_id, *several) if i is not None}))

    def encode(self, problem: Problem, *, is_chat: bool = False) -> list[int]:
        """Token ids of the prompt; a chat question goes through the template if there is one."""
        return self.encode_all([problem], is_chat=is_chat)[0]

    def encode_all(self, problems: Sequence[Problem], *, is_chat: bool = False) -> list[list[int]]:
        """`encode` of many prompts by one call of the tokenizer."""
        texts = [problem.prompt for problem in problems]
        has_template = is_chat and self.tokenizer.chat_template is not None
        if has_template:
            messages = [[{"role": "user", "content": text}] for text in texts]
            texts = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        elif is_chat:
            texts = [f"Question: {text}\nAnswer:" for text in texts]
        # The template writes the special tokens itself. How long a prompt may be is our check.
        encoded = self.tokenizer(texts, add_special_tokens=not has_template, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without its special tokens."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def save(self, folder: Path) -> None:
        """Write a directory that `load_policy` and transformers read."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def need_training_extra(*, is_text: bool = False) -> None:
    """Raise ImportError naming the extra if what training needs beyond torch is not installed.

    Args:
        is_text: whether answers are free text, which only math-verify can grade.
    """
    wanted = ["transformers", "safetensors", "rich", "tensorboard"]
    wanted += ["math_verify"] if is_text else []
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"training needs {', '.join(missing)}: pip install rollfuse[grpo]")


def need_same_head(policy: Policy, prompt: list[int]) -> None:
    """Raise ValueError unless the head on the hidden states gives the model's own log-probs.

    The trainer would optimise another policy than the one that samples.
    """
    worst = head_difference(policy.model, torch.tensor(prompt))
    bound = head_tolerance(policy.model)
    needed = f"log-probs within {bound} nats of its linear head's"
    checks.need(worst <= bound, "model", needed, f"a difference of {worst:.3g}")


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerBase:
    """A tokenizer of single characters, with ids in the order of `alphabet`.

    `<eos>`, `<pad>` and `<unk>` follow. It saves and loads like any tokenizer of transformers.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    good = len(set(alphabet)) == len(alphabet) > 0
    checks.need(good, "alphabet", "different characters", repr(alphabet))
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<eos>", "<pad>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def small_policy(task: Task, shape: SmallModel, *, seed: int) -> Policy:
    """A small Qwen3 over the task's characters, with random weights, float32, on the CPU.

    Raises:
        ValueError: the task has no alphabet.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if task.alphabet is None:
        raise ValueError(f"task {task.name}: need --model, a small character model cannot read it")
    tokenizer = character_tokenizer(task.alphabet)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return Policy(model.eval(), tokenizer)


def load_policy(folder: str | Path) -> Policy:
    """The causal LM, in float32, and tokenizer in a directory that `save_pretrained` wrote.

    Never downloads. In a half dtype without a float32 master copy small updates would round away.

    Raises:
        ValueError: there is no such directory, it holds no causal LM with a tokenizer, or the
            tokenizer has no end token.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    good = (Path(folder) / "config.json").is_file()
    checks.need(good, "model", "a directory with a config.json", str(folder))
    for path in Path(folder).glob("*.json"):  # the tokenizer's own reader only panics
        try:
            json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: need JSON, got a file with {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
    # RuntimeError: weights of other shapes than the config's.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        need = "a causal LM with its tokenizer, as save_pretrained writes them"
        raise ValueError(f"model {folder}: need {need}, got: {error}") from error
    has_end = tokenizer.eos_token_id is not None
    checks.need(has_end, f"model {folder}", "a tokenizer with an end token", "one without")
    # Dropout would make the trainer's log-probs differ from the sampler's.
    return Policy(model.eval(), tokenizer)


def warm_start(policy: Policy, task: Task, plan: WarmStart, *, seed: int) -> list[float]:
    """Supervised training on `plan.problems` solved training problems; returns the losses, nats.

    Cross-entropy of the answer and the end token. Batches are drawn with replacement.
    """
    solved = task.train[: plan.problems]
    ids, mask = _solved_batch(policy, solved)
    ids, mask = ids.to(policy.model.device), mask.to(policy.model.device)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=plan.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(plan.steps):
        rows = torch.randint(len(solved), (plan.batch_size,), generator=generator).to(ids.device)
        logits = policy.model(ids[rows, :-1]).logits
        chosen = mask[rows, 1:]
        loss = torch.nn.functional.cross_entropy(logits[chosen].float(), ids[rows, 1:][chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    return losses


def _solved_batch(policy: Policy, problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """(N, L) ids padded on the right, and (N, L) bool, True on the answer and the end token."""
    end = policy.tokenizer.eos_token_id
    prompts = [policy.encode(problem) for problem in problems]
    answers = [[*policy.tokenizer.encode(problem.answer), end] for problem in problems]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(problems), length), end)
    mask = torch.zeros(len(problems), length, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        mask[i, len(prompt) : len(prompt) + len(answer)] = True
    return ids, mask
