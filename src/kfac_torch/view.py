"""A page of pictures of a run: the loss, λ, the reduction ratio, step sizes, π, the time.

The run is what `telemetry.JSONLWriter` wrote. The page needs nothing but itself. Left out:
runs beside each other (`report.py`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import STYLE, image
from .steps import PHASES
from .telemetry import Number, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Title, the names of its curves, and whether the axis is logarithmic.
_PANELS = (
    ("loss per term", ("loss", "new_loss"), True),
    ("damping λ", ("damping",), True),
    ("reduction ratio ρ", ("rho",), False),
    ("change of the loss", ("actual_change", "predicted_change"), False),
    ("step size, momentum, noise", ("lr", "momentum", "gradient_noise"), False),
    ("scale of limits", ("norm_scale", "region_scale"), True),
    ("norm of the step", ("step_norm",), True),
    ("age in steps", ("statistics_age", "inverse_age"), False),
)


class ViewError(Exception):
    """Something that the user has to change; the message says what."""


def write_view(run: Path, out: Path) -> None:
    """Write the page of a run.

    Args:
        run: a file of JSON lines.
        out: the page.

    Raises:
        ViewError: the file is no run, or cannot be read, nor the page written; matplotlib
            is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ViewError(
            "the pictures need matplotlib, which is not installed: "
            "pip install 'kfac-torch[demo]'"
        )
    try:
        records = read_run(run)
    except (OSError, ValueError) as error:
        raise ViewError(f"the run cannot be read: {error}") from error
    pairs = [_PANELS[i : i + 2] for i in range(0, len(_PANELS), 2)]
    figures = [(_curves(records, pair), _caption(pair)) for pair in pairs]
    text = "π of every layer, and the time of a step."
    figures.append((_layers_and_time(records), text))
    pictures = "".join(
        f"<figure>{image(figure, text)}"
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
        for figure, text in figures
    )
    name = html.escape(run.name)
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: a run of K-FAC</title><style>{STYLE}</style></head><body>
<h1>A run of K-FAC</h1>
<p class="note">{name}</p>
{_table(records)}
{pictures}
</body></html>
"""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ViewError(f"the page cannot be written: {error}") from error


def summary(records: Sequence[dict[str, Number]]) -> list[tuple[str, str]]:
    """Return what the page's table says, names and values.

    >>> rows = summary([{"step": 0, "loss": 2.0}, {"step": 5, "loss": 1.0}])
    >>> rows[0], rows[1]
    (('records', '2, steps 0 to 5'), ('loss, first and last', '2, 1'))
    """
    losses = _series(records, "loss")[1]
    shown = f"{losses[0]:.5g}, {losses[-1]:.5g}" if losses else "not recorded"
    rows = [
        ("records", f"{len(records)}, steps {records[0]['step']} to {records[-1]['step']}"),
        ("loss, first and last", shown),
        ("steps left out", str(records[-1].get("skipped_steps", 0))),
    ]
    taken_back = sum(record.get("rejected") or 0 for record in records)
    if taken_back:
        rows.append(("steps taken back", str(taken_back)))
    for key, title in (("damping", "λ, first and last"), ("rho", "ρ, first and last")):
        values = _series(records, key)[1]
        if values:
            rows.append((title, f"{values[0]:.4g}, {values[-1]:.4g}"))
    seconds = {phase: _total(records, phase) for phase in PHASES}
    total = sum(seconds.values())
    if total > 0:
        shares = ", ".join(f"{phase} {s / total:.0%}" for phase, s in seconds.items())
        rows.append(("time of K-FAC", f"{total:.4g} s: {shares}"))
    return rows


def _total(records: Sequence[dict[str, Number]], phase: str) -> float:
    return sum(record.get(f"seconds.{phase}") or 0.0 for record in records)


def _table(records: Sequence[dict[str, Number]]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in summary(records)
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _series(
    records: Sequence[dict[str, Number]], key: str
) -> tuple[list[Number], list[float]]:
    """Steps and values, where there is one and it is finite."""
    pairs = [(record["step"], record.get(key)) for record in records]
    known = [(step, v) for step, v in pairs if v is not None and math.isfinite(v)]
    return [step for step, _ in known], [value for _, value in known]


def _caption(pair: Sequence[tuple[str, Sequence[str], bool]]) -> str:
    return "; ".join(f"{title} ({', '.join(keys)})" for title, keys, _ in pair) + "."


def _curves(
    records: Sequence[dict[str, Number]], pair: Sequence[tuple[str, Sequence[str], bool]]
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (title, keys, logarithmic) in zip(figure.subplots(1, 2), pair, strict=True):
        _draw(axes, records, {key: key for key in keys}, logarithmic)
        axes.set_title(title, fontsize=11)
        if title.startswith("reduction"):
            axes.axhspan(0.25, 0.75, color="#ddd", zorder=0)
    return figure


def _draw(
    axes: Any,
    records: Sequence[dict[str, Number]],
    keys: dict[str, str],
    logarithmic: bool,
) -> None:
    """Draw a curve for every name that was recorded."""
    drawn, lowest = 0, math.inf
    for key, label in keys.items():
        steps, values = _series(records, key)
        if values:
            axes.plot(steps, values, ".-", ms=3, lw=1.2, label=label)
            drawn, lowest = drawn + 1, min(lowest, *values)
    if not drawn:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center")
        return
    if logarithmic and lowest > 0:
        axes.set_yscale("log")
    if drawn > 1:
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)


def _layers_and_time(records: Sequence[dict[str, Number]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = {key: key[3:] for record in records for key in record if key.startswith("pi.")}
    _draw(left, records, layers, True)
    left.set_title("π of every layer", fontsize=11)
    steps = [record["step"] for record in records]
    parts = [
        [1e3 * (record.get(f"seconds.{phase}") or 0.0) for record in records]
        for phase in PHASES
    ]
    right.stackplot(steps, parts, labels=PHASES)
    right.set_title("milliseconds of K-FAC since the record before", fontsize=11)
    right.set_xlabel("step")
    right.legend(frameon=False, fontsize=8)
    right.spines[["top", "right"]].set_visible(False)
    return figure
