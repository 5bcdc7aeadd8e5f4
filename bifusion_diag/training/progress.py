"""What the user sees while a run is under way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

#: Seconds between lines where the output is a file or a pipe.
PLAIN_INTERVAL = 10.0


class _TwoLines(Progress):
    """The bar, and the numbers below it, where they fit into narrow terminals too."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["numbers"])


class ProgressDisplay:
    """Two live lines in a terminal; a plain line every few seconds where the output is not one."""

    def __init__(self, console: Console, title: str, total: int, done: int = 0) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._first = done
        self._began = self._last_line = time.monotonic()
        self._incidents = 0
        self._live = _TwoLines(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task(title, total=total, completed=done, numbers="")

    def __enter__(self) -> ProgressDisplay:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar: a stage has begun, a signal came."""
        self._console.print(f"{self._title}: {text}", highlight=False, markup=False, soft_wrap=True)

    def incident(self, text: str) -> None:
        """Count an incident, and print it."""
        self._incidents += 1
        self.note(text)

    def step(self, done: int, loss: float, grad_norm: float) -> None:
        """Show the numbers of the step that has just been done.

        Args:
            done: steps done so far.
            loss: total loss.
            grad_norm: total gradient norm before clipping.
        """
        numbers = f"loss {_number(loss)} · pre-clip grad norm {_number(grad_norm)} · incidents {self._incidents}"
        self._live.update(self._task, completed=done, numbers=numbers)
        now = time.monotonic()
        due = done == self._total or now - self._last_line >= PLAIN_INTERVAL
        if not self._console.is_terminal and due:
            self._last_line = now
            left = (now - self._began) / max(done - self._first, 1) * (self._total - done)
            self.note(f"step {done}/{self._total} · {numbers} · {left:.0f} s left")


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
