"""The pictures of docs/benchmarks.md, from the figures that are stored in `results/`.

    python benchmarks/pictures.py [--results FOLDER] [--out FOLDER]

Nothing is run. `loss_by_seconds.svg` and `loss_by_steps.svg` have the training loss of
each run of `steps_to_target.json` up to its target, a line for every seed;
`patch_moments.svg` the ratios of `patch_moments_peers.json`; `batch_growth.svg` what
`batch_growth.json` says. Ink, grid and ground follow the colour scheme of the reader: the
file has its own ground, so that it can be read on any page. It also has the digest of what
it was made from, by which a test sees that it is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

RESULTS = Path(__file__).parent / "results"
OUT = Path(__file__).parent.parent / "docs" / "pictures"

GROUND, INK, GRID = "#ffffff", "#24292f", "#d8dee4"
DARK = MappingProxyType({GROUND: "#0d1117", INK: "#e6edf3", GRID: "#373e47"})
# Colours of middling lightness show on both grounds; the dashes tell lines apart without.
STYLES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "K-FAC": {"color": "#e4572e", "linewidth": 2.0, "zorder": 5},
        "K-FAC, tuned": {"color": "#e4572e", "linestyle": (0, (3, 1.5)), "zorder": 4},
        "SOAP": {"color": "#1f9e89", "linestyle": (0, (6, 2))},
        "Muon": {"color": "#9467bd", "linestyle": (0, (6, 2, 1, 2))},
        "AdamW": {"color": "#3a8fd6"},
        "SGD-NAG": {"color": "#a58a1e", "linestyle": (0, (1.5, 1.5))},
    }
)
PEERS: Mapping[str, str] = MappingProxyType(
    {"lineage": "#1f9e89", "kfac_jax": "#9467bd", "curvlinops": "#3a8fd6"}
)
RC: Mapping[str, Any] = MappingProxyType(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "kfac-torch",
        "font.family": "sans-serif",
        "font.size": 9,
        "path.simplify_threshold": 0.5,
        "figure.facecolor": GROUND,
        "axes.facecolor": GROUND,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
        **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    }
)


def plain_numbers(axes: Axes, which: str) -> None:
    """Write the ticks of a logarithmic axis as plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of `[rows, columns]` axes with a quiet grid, size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(color=GRID, linewidth=0.6)
    return figure, grid


def ticks_between(low: float, high: float) -> list[float]:
    """Numbers 1, 2, 3 or 5 times a power of ten within bounds.

    >>> ticks_between(0.25, 3.5)
    [0.3, 0.5, 1.0, 2.0, 3.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 3, 5)]
    return [number for number in numbers if low <= number <= high]


def draw_task(axes: Axes, entry: Mapping[str, Any], column: int) -> None:
    """The curves of a task, `column` of `[steps, seconds, loss]` across."""
    low, high = entry["target"], 0.0
    for method, runs in entry["methods"].items():
        style = {"linewidth": 1.2, **STYLES[method]}
        for run in runs:
            curve = [row for row in run["curve"] if row[column] > 0]
            xs, ys = [row[column] for row in curve], [row[2] for row in curve]
            axes.plot(xs, ys, **style, alpha=0.85)
            if run["steps_to_target"] is not None:
                axes.plot(xs[-1:], ys[-1:], "o", color=style["color"], ms=4, zorder=6)
            low, high = min(low, *ys), max(high, *ys)
    axes.axhline(entry["target"], color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
    axes.annotate(
        f"target {entry['target']:g}",
        (0.02, entry["target"]),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(low / (high / low) ** 0.04, high * (high / low) ** 0.04)
    axes.set_yticks(ticks_between(*axes.get_ylim()), minor=False)
    axes.minorticks_off()
    plain_numbers(axes, "x")
    plain_numbers(axes, "y")


def loss_curves(column: int, across: str, tables: Mapping[str, Any]) -> Figure:
    """The training loss of all runs against steps (column 0) or seconds (column 1)."""
    tasks = {
        name: entry
        for name, entry in tables["steps_to_target"]["tasks"].items()
        if len(entry["methods"]) > 1  # a comparison
    }
    columns = 3
    rows = math.ceil(len(tasks) / columns)
    figure, grid = panels(rows, columns, 9.5, 0.5 + 2.6 * rows)
    for axes in grid.flat[len(tasks) :]:
        axes.remove()
    handles = {}
    for axes, (name, entry) in zip(grid.flat, tasks.items(), strict=False):
        draw_task(axes, entry, column)
        axes.set_title(f"{name}: {entry['title'].replace('convolutional', 'conv.')}")
        axes.set_xlabel(across)
        for method in entry["methods"]:
            style = {"linewidth": 1.2, **STYLES[method]}
            handles[method] = axes.plot([], [], label=method, **style)[0]
    for row in grid:
        row[0].set_ylabel("training loss")
    ordered = [handles[method] for method in STYLES if method in handles]
    figure.legend(handles=ordered, loc="outside upper center", ncols=len(ordered))
    return figure


def patch_bars(tables: Mapping[str, Any]) -> Figure:
    """How many times longer the peers take for the second moment of patches."""
    rows = tables["patch_moments_peers"]["peers"]
    shapes = list(dict.fromkeys(row["name"] for row in rows))
    figure, grid = panels(1, 1, 8.0, 0.8 + 0.62 * len(shapes))
    axes, height = grid[0, 0], 0.8 / len(PEERS)
    for i, (peer, color) in enumerate(PEERS.items()):
        mine = [row for row in rows if row["peer"] == peer]
        places = [shapes.index(row["name"]) + (i - 1) * height for row in mine]
        ratios = [row.get("ratio") for row in mine]
        versions = {row["version"].split(",")[0] for row in mine}
        axes.barh(
            places,
            [ratio or math.nan for ratio in ratios],
            0.9 * height,
            color=color,
            label=", ".join(sorted(versions)),
        )
        for place, ratio in zip(places, ratios, strict=True):
            text = "refuses" if ratio is None else f"{ratio:.{decimals(ratio)}f}"
            axes.annotate(
                text, (ratio or 1.0, place), (4, 0), textcoords="offset points", va="center"
            )
    axes.axvline(1.0, color=INK, linewidth=1.0)
    axes.set_yticks(range(len(shapes)), [shape_name(name) for name in shapes])
    axes.set_ylim(len(shapes) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 5000)
    axes.set_xticks([1, 3, 10, 30, 100, 300, 1000])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.minorticks_off()
    plain_numbers(axes, "x")
    axes.set_xlabel("its time over ours (1: as fast)")
    figure.legend(loc="outside upper center", ncols=len(PEERS))
    return figure


def decimals(ratio: float) -> int:
    """How many decimals a ratio is written with: two digits, or all before the point."""
    return 0 if ratio >= 10 else 1 if ratio >= 1 else 2


def shape_name(name: str) -> str:
    """The words for a shape.

    >>> shape_name("32x16x28x28 k3 s2")
    '16 channels, 28x28, batch 32, 3x3, stride 2'
    """
    size, kernel, *stride = name.split()
    batch, channels, *image = size.split("x")
    words = f"{channels} channels, {'x'.join(image)}, batch {batch}"
    words += f", {kernel[1:]}x{kernel[1:]}"
    return words + "".join(f", stride {part[1:]}" for part in stride)


def batch_growth(tables: Mapping[str, Any]) -> Figure:
    """Steps and seconds to the target of T2 against the batch."""
    report = tables["batch_growth"]
    figure, grid = panels(1, 2, 8.0, 2.9)
    sizes = [int(size) for size in report["sizes"]]
    limits = {"steps": (5, 600), "seconds": (1, 200)}
    for axes, (key, bounds) in zip(grid.flat, limits.items(), strict=True):
        for method in report["caps"]:
            style = {"linewidth": 1.2, **STYLES[method]}
            found = [
                (int(size), runs[method])
                for size, runs in report["sizes"].items()
                if method in runs
            ]
            hits = [(size, run[key]) for size, run in found if run["steps"] is not None]
            missed = [
                (size, spent(run, key)) for size, run in found if run["steps"] is None
            ]
            axes.plot(*columns_of(hits), "o-", label=method, **style)
            axes.plot(
                *columns_of(missed), "^", color=style["color"], fillstyle="none", ms=8
            )
            for size, value in hits:
                axes.annotate(
                    f"{value:g}",
                    (size, value),
                    (0, 7),
                    textcoords="offset points",
                    ha="center",
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(sizes)
        axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
        axes.set_ylim(*bounds)
        axes.set_yticks([n for n in ticks_between(*bounds) if f"{n:e}"[0] in "13"])
        axes.minorticks_off()
        plain_numbers(axes, "x")
        plain_numbers(axes, "y")
        axes.set_xlabel("batch")
        axes.set_ylabel(f"{key} to the target")
    kfac, adamw = grid[0, 0].get_legend_handles_labels()[0]
    adamw.set(marker="^", fillstyle="none", linestyle="none")
    labels = ["K-FAC", f"AdamW: not there after {report['caps']['AdamW']} steps"]
    figure.legend([kfac, adamw], labels, loc="outside upper center", ncols=2)
    return figure


def spent(run: Mapping[str, Any], key: str) -> float:
    """The steps, or the seconds, that a run has taken to its end."""
    steps = run["steps taken"]
    return steps if key == "steps" else steps * run["ms per step"] / 1e3


def columns_of(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Turn pairs into two lists."""
    return [x for x, _ in pairs], [y for _, y in pairs]


# file: what it is drawn from, and the function that draws it
PICTURES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Figure]]] = (
    MappingProxyType(
        {
            "loss_by_seconds.svg": (
                "steps_to_target",
                partial(loss_curves, 1, "processor seconds"),
            ),
            "loss_by_steps.svg": ("steps_to_target", partial(loss_curves, 0, "steps")),
            "patch_moments.svg": ("patch_moments_peers", patch_bars),
            "batch_growth.svg": ("batch_growth", batch_growth),
        }
    )
)


def digest(path: Path) -> str:
    """Some digits that change with a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def dark_rules() -> str:
    """The style sheet that changes ink, grid and ground where the reader wants it dark."""
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    return f"<style>@media(prefers-color-scheme:dark){{{rules}}}</style>"


def svg(figure: Figure, source: str) -> str:
    """The figure as text, with the rules for the dark and the digest of its source."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(
        r"font-family: [^;]*;", "font-family: 'DejaVu Sans', sans-serif;", buffer.getvalue()
    )
    lines = re.sub(r"(\d\.\d)\d{3,}", r"\1", text).splitlines()
    start = next(i for i, line in enumerate(lines) if "viewBox" in line)
    lines.insert(start + 1, f" {dark_rules()}\n <!-- from {source} -->")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def draw(results: Path, out: Path) -> None:
    """Write all pictures."""
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(dict(RC)):
        for file, (table, function) in PICTURES.items():
            path = results / f"{table}.json"
            figure = function({table: json.loads(path.read_text(encoding="utf-8"))})
            text = svg(figure, f"{path.name} {digest(path)}")
            (out / file).write_text(text, encoding="utf-8")


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    draw(arguments.results, arguments.out)


if __name__ == "__main__":
    main()
