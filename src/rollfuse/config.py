"""Config: everything a run depends on, flat, in one frozen record that the run directory keeps."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollfuse.kernels import checks

LOSSES = ("grpo", "dr_grpo", "dapo", "rloo")
REUSES = ("none", "coupled", "lenient", "suffix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Hyper-parameters of `rollfuse grpo`; the defaults are the demo. Units stand behind the names.

    Raises:
        ValueError, TypeError: a value is out of its range; the message names it as on the command
            line, says what is needed and what came.
    """

    task: str = "sort"  # built-in task; --data replaces it
    data: str | None = None  # JSON-lines file of questions and answers
    model: str | None = None  # directory of a causal LM; None makes a small one
    heldout: int = 512  # problems
    problems: int | None = None  # to train on; None: all there are
    seed: int = 0

    layers: int = 2  # of the small model, as the four below
    hidden: int = 64
    intermediate: int = 256
    heads: int = 4
    kv_heads: int = 2
    warm_steps: int = 70  # supervised steps before GRPO; 0 with --model
    warm_problems: int = 90
    warm_batch_size: int = 64  # problems
    warm_lr: float = 1e-3

    steps: int = 800  # GRPO steps
    prompts_per_step: int = 64
    group_size: int = 8  # responses per prompt
    max_new_tokens: int | None = None  # None: the task's own limit
    temperature: float = 1.0
    loss: str = "grpo"
    eps_low: float = 0.2
    eps_high: float = 0.2
    kl_coef: float = 0.0  # of the k3 estimate of the KL to the starting policy
    entropy_coef: float = 0.0
    tis_cap: float | None = None  # cap of the weight that corrects the sampler; None: no weight
    reference: bool = True  # keep the starting policy, to measure the distance from it
    rescore: bool = False  # old log-probs by a pass of the trainer, not from the sampler
    invariant: bool = False  # the head gives a token the same bits in every batch
    reuse: str = "none"  # of earlier rollouts: none, coupled, lenient or suffix
    lenience: float = 0.5  # nats that --reuse lenient forgives a token
    reuse_cap: int = 8  # epochs in a row a response may be reused
    reuse_break_even: float = 1 / 6  # share of guesses that must stay, else they are seldom made
    refresh: float = 0.0  # share of the responses that are drawn afresh in any case
    minibatches: int = 1  # optimiser updates per step
    decode_sequences: int | None = None  # responses sampled together; None: the whole step's
    micro_sequences: int = 256  # responses in one forward and backward
    lr: float | None = None  # None: 2e-4 for the small model, 1e-6 for --model
    lr_warmup: int = 10  # updates
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # largest norm of the gradient
    shuffle_advantages: bool = False  # a control: nothing can be learned from shuffled advantages

    eval_every: int = 25  # steps
    checkpoint_every: int = 50  # steps; how far back SIGKILL throws a run
    sample_every: int = 25
    keep_checkpoints: int = 2
    threads: int | None = None  # None: 1 for the small model, as torch chooses for --model
    device: str | None = None  # None: the backend's

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)

    @property
    def learning_rate(self) -> float:
        if self.lr is not None:
            return self.lr
        return 2e-4 if self.model is None else 1e-6

    @property
    def cpu_threads(self) -> int | None:
        """One for the small model: its matrices are too small to share, and waiting costs."""
        return 1 if self.threads is None and self.model is None else self.threads

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, path: Path) -> Config:
        """Read what `to_json` wrote; ValueError if the file is not that."""
        try:
            values: Any = json.loads(path.read_text("utf-8"))
            return cls(**values)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}: need a config of rollfuse, got one with {error}") from error


def _check_types(config: Config) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kinds: dict[str, tuple[type, ...]] = {
            "int": (int,),
            "float": (int, float),
            "str": (str,),
            "bool": (bool,),
        }
        base, _, optional = str(field.type).partition(" | ")
        if value is None and optional:
            continue
        good = isinstance(value, kinds[base]) and (base == "bool" or not isinstance(value, bool))
        if not good:
            raise TypeError(f"{_flag(field.name)}: need {field.type}, got {value!r}")
        if isinstance(value, float):
            checks.need(math.isfinite(value), _flag(field.name), "a finite number", value)


def _check_ranges(config: Config) -> None:
    at_least_one = (
        "heldout steps prompts_per_step minibatches micro_sequences eval_every checkpoint_every "
        "sample_every keep_checkpoints warm_problems warm_batch_size reuse_cap"
    )
    needs: list[tuple[str, bool, str]] = [
        (name, getattr(config, name) >= 1, "at least 1") for name in at_least_one.split()
    ]
    for name in ("max_new_tokens", "threads", "problems"):
        value = getattr(config, name)
        needs.append((name, value is None or value >= 1, "at least 1"))
    needs += [(name, getattr(config, name) >= 0, "0 or more") for name in _NOT_NEGATIVE]
    needs += [
        ("seed", 0 <= config.seed < 2**62, "an integer in [0, 2^62)"),
        ("group_size", config.group_size >= 2, "at least 2 (advantages compare a group)"),
        ("temperature", config.temperature > 0, "a number > 0"),
        ("grad_clip", config.grad_clip > 0, "a number > 0"),
        ("eps_low", config.eps_low < 1, "a number in [0, 1)"),
        ("lr", 0 <= config.learning_rate < 1, "a number in [0, 1)"),
        ("reuse", config.reuse in REUSES, f"one of {', '.join(REUSES)}"),
        ("refresh", 0 <= config.refresh <= 1, "a share in [0, 1]"),
        ("reuse_break_even", 0 <= config.reuse_break_even <= 1, "a share in [0, 1]"),
        ("loss", config.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
        (
            "decode_sequences",
            config.decode_sequences is None or config.decode_sequences >= config.group_size,
            f"at least --group-size = {config.group_size}",
        ),
        ("tis_cap", config.tis_cap is None or config.tis_cap > 0, "a number > 0"),
        ("reference", config.reference or config.kl_coef == 0, "a reference policy for --kl-coef"),
        ("data", config.data is None or config.model is not None, "--model beside --data"),
        (
            "minibatches",
            config.minibatches <= config.prompts_per_step,
            f"at most --prompts-per-step = {config.prompts_per_step}",
        ),
    ]
    for name, good, needed in needs:
        checks.need(good, _flag(name), needed, repr(getattr(config, name)))


_NOT_NEGATIVE = (
    "eps_low", "eps_high", "kl_coef", "warm_steps", "warm_lr", "lr_warmup", "weight_decay",
    "lenience",
)  # fmt: skip


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
