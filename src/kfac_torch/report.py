"""What a comparison of optimizers found: the table, the figures, the HTML page.

The page needs nothing but itself: the figures are SVG in data URIs. Left out: training.
"""

from __future__ import annotations

import base64
import html
import io
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .diagnostics import effective_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("task", "optimizer", "steps", "seconds", "ms/step", "final loss", "test")
_COLORS = MappingProxyType({"K-FAC": "#c8102e", "SGD": "#4878a8", "AdamW": "#3a9a5f"})


@dataclass
class RunResult:
    """The training loss of one optimizer over steps and seconds.

    Args:
        optimizer: its name.
        settings: of the optimizer.
        steps: taken when the loss was noted; `seconds` of training, and `losses`.
        step_ms: the median of all steps, in milliseconds.
        test: the task's test metric at the end.
    """

    optimizer: str
    settings: Mapping[str, Any]
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_ms: float = float("nan")
    test: float = float("nan")

    def reached(self, target: float) -> tuple[int, float] | None:
        """Return steps and seconds at the first loss of at most `target`."""
        for step, second, loss in zip(self.steps, self.seconds, self.losses, strict=True):
            if loss <= target:
                return step, second
        return None


@dataclass
class TaskResult:
    """All runs of one task.

    Args:
        name: of the task; `title` for people, `details` in a sentence.
        target: the training loss to reach.
        test_metric: what the runs' `test` is.
        runs: one per optimizer, K-FAC's first.
        spectra: of K-FAC's factors at the end, from `diagnostics.factor_spectra`.
    """

    name: str
    title: str
    details: str
    target: float
    test_metric: str
    runs: list[RunResult]
    spectra: dict[str, dict[str, Tensor]]


# The table.


def table_rows(results: list[TaskResult]) -> list[list[str]]:
    """Return the cells of the table, one row per task and optimizer, by `COLUMNS`."""
    rows = []
    for task in results:
        for run in task.runs:
            hit = run.reached(task.target)
            test = (
                f"{run.test:.1%}" if task.test_metric == "accuracy" else f"{run.test:.4g}"
            )
            rows.append(
                [
                    task.name,
                    run.optimizer,
                    str(hit[0]) if hit else "-",
                    f"{hit[1]:.2f}" if hit else "-",
                    f"{run.step_ms:.1f}",
                    f"{run.losses[-1]:.4g}",
                    f"{task.test_metric} {test}",
                ]
            )
    return rows


def table_caption(results: list[TaskResult]) -> str:
    """Say what the columns of the table are."""
    targets = ", ".join(f"{task.name} {task.target:g}" for task in results)
    return (
        f"Steps and seconds of training to a training loss of: {targets} (- if not "
        "reached); median ms per step; loss and test metric at the end."
    )


def format_table(results: list[TaskResult]) -> str:
    """Return the table as aligned plain text."""
    cells = [list(COLUMNS), *table_rows(results)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def verdicts(results: list[TaskResult]) -> list[str]:
    """Say, per task, how the first run compares with each of the others."""
    return [
        f"{task.title}: {_verdict(task.runs[0], rival, task.target)}"
        for task in results
        for rival in task.runs[1:]
    ]


def _verdict(ours: RunResult, rival: RunResult, target: float) -> str:
    a, b = ours.reached(target), rival.reached(target)
    if a is None:
        return f"{ours.optimizer} did not reach the target"
    if b is None:
        return f"{rival.optimizer} did not reach the target in {rival.steps[-1]} steps"
    steps, seconds = b[0] / max(a[0], 1), b[1] / max(a[1], 1e-9)
    return (
        f"{rival.optimizer} took {steps:.1f} times the steps and {seconds:.1f} times the "
        f"seconds of {ours.optimizer}"
    )


# Figures.


def curves_figure(task: TaskResult) -> Figure:
    """Draw the training loss over steps and over seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, label in ((left, "steps"), (right, "seconds of training")):
        for run in reversed(task.runs):  # the first on top
            across = run.steps if axes is left else run.seconds
            # A logarithmic axis has no place for the start; the first step stands for it.
            color = _COLORS.get(run.optimizer)
            axes.plot(across[1:], run.losses[1:], color=color, label=run.optimizer, lw=1.8)
            if hit := run.reached(task.target):
                x = hit[0] if axes is left else hit[1]
                axes.plot(x, task.target, "o", color=color, ms=6, mec="white", zorder=5)
        axes.axhline(task.target, color="#555", ls="--", lw=1, zorder=0)
        axes.set(yscale="log", xlabel=label)
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xscale("log")
    right.set_xlim(left=0)
    _plain_ticks(left, right)
    left.set_ylabel("training loss")
    left.text(
        0.01,
        task.target,
        f"target {task.target:g}",
        transform=left.get_yaxis_transform(),
        va="bottom",
    )
    handles, labels = left.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], frameon=False)
    return figure


def spectra_figure(task: TaskResult) -> Figure:
    """Draw the eigenvalues of every factor, each divided by its largest."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = colormaps["viridis"].resampled(len(task.spectra) + 1)
    for axes, side in zip(panels, ("input", "output"), strict=True):
        for i, (layer, factors) in enumerate(task.spectra.items()):
            e = factors[side].flip(0).double()
            e = (e / e[0]).clamp(min=1e-9).tolist()
            index = range(1, len(e) + 1)
            axes.plot(index, e, ".-", ms=3, lw=1.2, color=colors(i), label=layer)
        axes.set(xscale="log", yscale="log", xlabel="eigenvalue number", ylim=(0.5e-9, 2))
        axes.set_title(f"{side} factors", fontsize=11)
        axes.grid(alpha=0.25, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("eigenvalue / largest")
    panels[1].legend(frameon=False, fontsize=8, ncols=1 + len(task.spectra) // 5)
    return figure


def _plain_ticks(*panels: Any) -> None:
    """Write 20 and 0.5 on a logarithmic axis, not powers of ten."""
    from matplotlib.ticker import LogFormatter, LogLocator, StrMethodFormatter

    for axes in panels:
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        low, high = axes.get_ylim()
        if high / low < 30:  # less than two decades: label also between powers of ten
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(0, 0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def image(figure: Figure, description: str) -> str:
    """Return an `<img>` with the figure as SVG in a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    alt = html.escape(description)
    return f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">'


# The page.

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0; width: 100%; }
th, td { text-align: left; padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; }
td.number { font-variant-numeric: tabular-nums; }
tr.first td { background: #fdf1f2; font-weight: 600; }
img { width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption, .note { color: #555; font-size: 0.9rem; }
code, pre { background: #f4f4f4; padding: 0.1rem 0.3rem; border-radius: 3px; }
pre { padding: 0.7rem; overflow-x: auto; }
"""


def write_report(
    path: Path, results: list[TaskResult], *, command: str, notes: list[str]
) -> None:
    """Write the self-contained HTML page.

    Args:
        path: of the page.
        results: one per task.
        command: that makes the same page again.
        notes: sentences on how the numbers were measured.
    """
    sections = "".join(_task_section(task) for task in results)
    comparison = "".join(f"<li>{html.escape(line)}</li>" for line in verdicts(results))
    remarks = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>K-FAC beside SGD and AdamW</title><style>{STYLE}</style></head><body>
<h1>K-FAC beside SGD and AdamW</h1>
<p class="note">{html.escape(machine())}</p>
{_html_table(results)}
<p class="note">{html.escape(table_caption(results))}</p>
<ul>{comparison}</ul>
{sections}
<h2>How this was measured</h2>
<ul>{remarks}</ul>
<p>The command that makes this page:</p>
<pre>{html.escape(command)}</pre>
</body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def machine() -> str:
    """Name the machine and the versions, for a reader of the numbers."""
    return (
        f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _html_table(results: list[TaskResult]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    firsts = {task.runs[0].optimizer for task in results}
    body = "".join(
        f'<tr class="{"first" if row[1] in firsts else ""}">'
        + "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in row)
        + "</tr>"
        for row in table_rows(results)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _task_section(task: TaskResult) -> str:
    settings = "".join(
        f"<tr><td>{html.escape(run.optimizer)}</td><td>{html.escape(_settings(run))}</td></tr>"
        for run in task.runs
    )
    curves = image(curves_figure(task), f"{task.title}: training loss")
    spectra = image(spectra_figure(task), f"{task.title}: spectra of K-FAC's factors")
    return f"""<h2>{html.escape(task.title.capitalize())}</h2>
<p>{html.escape(task.details)}</p>
<figure>{curves}<figcaption>Training loss over steps and over seconds of training, the
latter on a linear axis. A dot marks where the target is reached.</figcaption></figure>
<figure>{spectra}<figcaption>Eigenvalues of K-FAC's factors at the end of its run, each
spectrum divided by its largest (those below 1e-9 are drawn there). {_ranks(task)}
</figcaption></figure>
<table><thead><tr><th>optimizer</th><th>settings</th></tr></thead>
<tbody>{settings}</tbody></table>
"""


def _settings(run: RunResult) -> str:
    return ", ".join(f"{key} {value}" for key, value in run.settings.items())


def _ranks(task: TaskResult) -> str:
    """The range of the factors' effective ranks, in a sentence."""
    sentences = []
    for side in ("input", "output"):
        ranks = [effective_rank(factors[side]) for factors in task.spectra.values()]
        if ranks:
            sentences.append(f"{side} factors {min(ranks):.1f} to {max(ranks):.1f}")
    return f"Effective rank (trace over largest): {', '.join(sentences)}." if ranks else ""
