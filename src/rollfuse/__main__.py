"""The command line: `rollfuse grpo`, `rollfuse info`, `rollfuse bench`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rollfuse.config import LOSSES, Config

if TYPE_CHECKING:
    from rollfuse.session import Session

_KINDS: dict[str, type] = {"int": int, "float": float, "str": str}
# What the fields of Config mean, where the name does not say it all.
_HELP = {
    "task": "built-in task: sort (the demo) or arithmetic",
    "data": 'JSON-lines file of {"question": ..., "answer": "... #### 42"}; needs --model',
    "model": "directory of a transformers causal LM with its tokenizer",
    "heldout": "problems to measure on and never to train on",
    "group_size": "responses per prompt",
    "max_new_tokens": "longest response (default: the task's)",
    "loss": f"one of {', '.join(LOSSES)}",
    "kl_coef": "weight of the KL to the starting policy",
    "reference": "keep a copy of the starting policy to measure the KL to it",
    "invariant": "the head gives a token's log-prob the same bits in every batch, for --rescore",
    "rescore": "old log-probs from a pass of the trainer, not from the sampler",
    "tis_cap": "cap of the weight that corrects the sampler (default: no weight)",
    "decode_sequences": "responses sampled together (default: the whole step's)",
    "minibatches": "optimiser updates per step",
    "micro_sequences": "responses in one forward and backward",
    "lr": "learning rate (default: 2e-4 for the small model, 1e-6 with --model)",
    "lr_warmup": "updates over which the learning rate rises",
    "grad_clip": "largest norm of the gradient",
    "shuffle_advantages": "control: advantages in random order teach nothing",
    "warm_problems": "solved problems shown before GRPO",
    "warm_steps": "supervised steps on them",
    "checkpoint_every": "steps; a kill that cannot be caught goes back to the last checkpoint, "
    "any other end of the run leaves one of its last finished step",
    "device": "cpu, cuda, cuda:1 (default: the backend's)",
    "threads": "CPU threads (default: 1 for the small model, as torch chooses with --model)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (failed), 2 (wrong input), 130 (interrupted).

    Only wrong input is one line. What fails in the middle of a training passes through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        from rollfuse.bench.__main__ import main as bench

        return bench(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.command == "info":
        _info(options.json)
        return 0
    try:
        return _grpo(options)
    except KeyboardInterrupt:
        return 130


def _failed(error: Exception, code: int) -> int:
    print(f"rollfuse: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _info(as_json: bool) -> None:
    from rollfuse.info import as_text, info

    found = info()
    print(json.dumps(found, indent=2) if as_json else as_text(found))


def _grpo(options: argparse.Namespace) -> int:
    try:
        session = _session(options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        return _failed(error, 2)
    from rollfuse.loop import go_on

    try:
        go_on(session)
    except FloatingPointError as error:
        return _failed(error, 1)
    return 0


def _session(options: argparse.Namespace) -> Session:
    """The training that the options ask for, new or reopened."""
    given = {k: v for k, v in vars(options).items() if k not in ("command", "out", "resume")}
    changed = sorted(given.keys() - {"steps"})
    changed += [] if options.out is None else ["out"]
    if options.resume is not None and changed:
        raise ValueError(f"--resume: need no option beside it but --steps, got {changed}")
    config = Config(**given)
    from rollfuse.policy import need_training_extra

    need_training_extra()
    from rollfuse.session import reopen, start

    _quiet_transformers()
    if options.resume is not None:
        return reopen(options.resume, steps=given.get("steps"))
    return start(config, options.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")


def _quiet_transformers() -> None:
    """Its own progress bars, one for each checkpoint, would cut through ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of under a screen full of options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rollfuse: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rollfuse", description="Cheaper RL for language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="backend, versions, abilities, what is missing")
    info.add_argument("--json", action="store_true", help="for bug reports")
    grpo = commands.add_parser(
        "grpo",
        help="train a policy by GRPO; without options the demo",
        # Options that were not given stay out, so that Config's defaults hold in one place.
        argument_default=argparse.SUPPRESS,
    )
    grpo.add_argument("--out", default=None, help="run directory to make (default: runs/TIME)")
    grpo.add_argument("--resume", default=None, metavar="RUN", help="go on with the run in RUN")
    for field in dataclasses.fields(Config):
        _add_option(grpo, field)
    commands.add_parser("bench", help="benchmarks; see rollfuse bench --help")
    return parser


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    flag = "--" + field.name.replace("_", "-")
    shown = "" if field.default is None else f" (default: {field.default})"
    text = f"{_HELP.get(field.name, field.name.replace('_', ' '))}{shown}"
    kind = str(field.type).partition(" | ")[0]
    if kind == "bool":
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    else:
        parser.add_argument(flag, type=_KINDS[kind], help=text)


if __name__ == "__main__":
    sys.exit(main())
