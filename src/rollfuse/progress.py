"""What a run says while it works: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType

try:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TextColumn, TimeRemainingColumn
except ImportError as error:
    raise ImportError("progress needs rich: pip install rollfuse[grpo]") from error

# In a log file a line each step would bury the rest.
_PLAIN_EVERY = 10


class ProgressLine:
    """Step, reward, loss, entropy, tokens per second, time left; a context manager."""

    def __init__(self, n_steps: int, *, done: int = 0) -> None:
        self._console = Console(highlight=False)
        self._n_steps = n_steps
        self._bar = RichProgress(
            TextColumn("[bold]step {task.completed}/{task.total}"),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            # A pipe or a file gets plain lines.
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=n_steps, completed=done)
        self._seconds: list[float] = []

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        # A terminal that is gone must neither end a run nor hide what ended it.
        with suppress(OSError, ValueError):
            # A path must stay in one piece, whatever the width of the window.
            self._console.print(text, markup=False, soft_wrap=True)

    def step(self, metrics: Mapping[str, float]) -> None:
        """Show a finished step."""
        step = int(metrics["step"])
        self._seconds = [*self._seconds[-19:], metrics["seconds"]]
        text = (
            f"reward {metrics['reward']:.3f} loss {metrics['loss']:+.4f} "
            f"entropy {metrics['entropy']:.3f} {metrics['tokens_per_second']:,.0f} tok/s"
        )
        self._bar.update(self._task, completed=step, description=text)
        is_shown = step % _PLAIN_EVERY == 0 or step == self._n_steps
        if is_shown and not self._console.is_terminal:
            left = sum(self._seconds) / len(self._seconds) * (self._n_steps - step)
            self.say(f"step {step}/{self._n_steps}  {text}  {left:.0f} s left")

    def measured(self, step: int, accuracy: float) -> None:
        """Show a measurement on held-out problems."""
        self.say(f"step {step}: held-out accuracy {accuracy:.3f} (greedy)")
