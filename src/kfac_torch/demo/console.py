"""What the demo shows while it trains: live bars on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..report import COLUMNS, TaskResult, format_table, table_caption, table_rows
from .data import DemoError
from .training import Run


class Console:
    """Show progress and results; rich is used on a terminal only."""

    def __init__(self) -> None:
        self._rich: Any = _rich_console() if sys.stdout.isatty() else None

    def line(self, text: str) -> None:
        """Print a line."""
        if self._rich:
            self._rich.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def table(self, results: list[TaskResult]) -> None:
        """Print the table of results."""
        if not self._rich:
            print(format_table(results), flush=True)
        else:
            from rich import box
            from rich.table import Table

            table = Table(*COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
            for row in table_rows(results):
                ours = row[1] == results[0].runs[0].optimizer
                table.add_row(*row, style="bold" if ours else "")
            self._rich.print(table)
        self.line(table_caption(results))

    @contextmanager
    def progress(self, runs: list[Run]) -> Iterator[Any]:
        """Give a function to call after each step of a run."""
        if not self._rich:
            yield _Lines()
            return
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description:>6}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
        )
        with Progress(*columns, console=self._rich, refresh_per_second=10) as bars:
            yield _Bars(bars, runs)


def state(run: Run) -> str:
    """Say where a run stands."""
    text = f"step {run.steps:4d}  {run.seconds:5.1f} s  loss {run.result.losses[-1]:.4g}"
    hit = run.result.reached(run.task.target)
    return text + (f"  target at step {hit[0]}, {hit[1]:.2f} s" if hit else "")


class _Bars:
    def __init__(self, bars: Any, runs: list[Run]) -> None:
        self._bars = bars
        self._ids = {
            id(run): bars.add_task(run.result.optimizer, total=run.budget, state="")
            for run in runs
        }

    def __call__(self, run: Run) -> None:
        self._bars.update(self._ids[id(run)], completed=run.steps, state=state(run))


class _Lines:
    """A line at every quarter of a budget."""

    def __call__(self, run: Run) -> None:
        quarter = max(1, run.budget // 4)
        if run.steps % quarter == 0 or run.done:
            print(f"  {run.result.optimizer:6} {state(run)}", flush=True)


def _rich_console() -> Any:
    try:
        from rich.console import Console as RichConsole
    except ImportError as error:
        raise DemoError(
            "the demo's progress needs rich, which is not installed: "
            "pip install 'kfac-torch[demo]'"
        ) from error
    return RichConsole(force_terminal=True)
