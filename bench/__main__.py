"""Measurements from the command line: `python -m rollfuse.bench COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import sys

# A module of this folder each, imported only when asked for: their rivals and plots are extras.
COMMANDS = {
    "head": "the fused head against its rivals and the bare GEMMs",
    "logits": "the policy loss from logits that exist against its rivals and a copy of them",
    "tree": "the tree cache: attention, forks, the engine, counted bytes",
    "table": "stored results of head, logits, gpu and tree as tables",
    "demo": "does the demo learn, how fast, and do its controls not",
    "loop": "the GRPO loop against TRL's trainer",
    "sampling": "drawing and verifying tokens from hidden states, against torch",
    "reuse": "the loop with and without reuse of earlier rollouts",
    "gpu": "check every kernel on this GPU, then benchmark, in one go",
    "portability": "every Triton kernel compiled for GPUs that are not here",
}


def main(argv: list[str] | None = None) -> int:
    """Run one measurement; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rollfuse.bench",
        description="Measure rollfuse. Each command has its own --help.",
        epilog="\n".join(f"{name:12} {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command")
    options = parser.parse_args(argv)
    status: int = importlib.import_module(f"rollfuse.bench.{options.command}").main(
        options.arguments
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
