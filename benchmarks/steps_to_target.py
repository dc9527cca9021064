"""Steps and seconds to the target of each task: K-FAC, untuned, and the tuned rivals.

    python benchmarks/steps_to_target.py --data-dir DIR [--tasks T1 ...] [--stop]

K-FAC is what `kfac_setup.make_kfac` makes, the same on every task; tuned K-FAC and the
rivals have the settings of `results/trials.json`. Three seeds, not that of the trials, one
thread. Each run takes its whole step budget, and up to half as much again if it has not
reached the target by then; with `--stop` it ends at the target. Seconds are processor time
of the training steps, which is what the wall clock says on an idle machine; both are kept.
Written are `results/steps_to_target.json` and, with the same name, a Markdown table: median
[min-max] over the seeds; a run that does not reach the target has "-" and counts as worse.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kfac_setup import TUNED, UNTUNED, make_kfac, tuned_kfac
from rivals import RIVALS
from runs import Run, machine, write_json
from tasks import TASKS, Task, load_task

SEEDS = (1, 2, 3)
OVERTIME = 1.5  # times the budget, to reach the target
METHODS = (UNTUNED, TUNED, *RIVALS)
RESULTS = Path(__file__).parent / "results"


def run_once(
    task: Task, method: str, settings: Any, seed: int, stop: bool
) -> dict[str, Any]:
    """Train once."""
    if method in (UNTUNED, TUNED):
        make = partial(make_kfac, task)
        if method == TUNED:
            make = partial(tuned_kfac(task).make, settings=settings)
        run = Run(task, make, seed, every=1)
        # The sampled targets follow the seed too.
        run.optimizer.estimator.seed = seed
        budget = task.kfac_steps
    else:
        run = Run(
            task, partial(RIVALS[method].make, settings=settings), seed, task.rival_every
        )
        budget = task.rival_steps
    first = run.every if stop else budget
    for until in range(first, round(OVERTIME * budget) + 1, run.every):
        run.train(until)
        if run.reached(task.target):
            break
    hit = run.reached(task.target)
    return {
        "seed": seed,
        "steps_to_target": hit and hit[0],
        "wall_to_target": hit and hit[1],
        "cpu_to_target": hit and hit[2],
        "steps": run.steps,
        "wall": round(run.wall, 2),
        "cpu": round(run.cpu, 2),
        "loss": run.loss if math.isfinite(run.loss) else None,
        "test": task.test(run.model) if run.alive else None,
        "failure": run.failure or (None if run.alive else "diverged"),
        "curve": [[steps, cpu, float(f"{x:.5g}")] for steps, _, cpu, x in run.curve],
    }


def spread(values: Sequence[float | None], digits: int) -> str:
    """Median [min-max]; None is worse than all numbers."""
    ordered = sorted(math.inf if v is None else v for v in values)
    middle = statistics.median(ordered)
    texts = ["-" if math.isinf(v) else f"{v:.{digits}f}" for v in (middle, *ordered)]
    return texts[0] if texts[1] == texts[-1] else f"{texts[0]} [{texts[1]}-{texts[-1]}]"


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    columns = "task", "target", "method", "steps", "seconds", "ms per step"
    columns += "final loss (steps)", "test"
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for task, entry in found.items():
        head = f"{task}, {entry['title']} | {entry['target']:g}"
        for method, runs in entry["methods"].items():
            column = {key: [run[key] for run in runs] for key in runs[0]}
            ms = [1e3 * run["cpu"] / run["steps"] for run in runs]
            digits = 3 if entry["target"] < 10 else 2
            cells = (
                head,
                method,
                spread(column["steps_to_target"], 0),
                spread(column["cpu_to_target"], 1),
                spread(ms, 1),
                f"{spread(column['loss'], digits)} ({max(column['steps'])})",
                f"{entry['test_metric']} {spread(column['test'], 3)}",
            )
            lines.append("| " + " | ".join(cells) + " |")
            head = " |"
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything, and write the results after each method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--stop", action="store_true", help="end a run at its target")
    parser.add_argument("--out", type=Path, default=RESULTS / "steps_to_target.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trials = json.loads((RESULTS / "trials.json").read_text())["tasks"]
    out: Path = arguments.out
    report = json.loads(out.read_text()) if out.exists() else {"tasks": {}}
    for name in arguments.tasks:
        task = load_task(name, arguments.data_dir)
        entry = report["tasks"].setdefault(name, {"methods": {}})
        entry |= {
            "title": task.title,
            "target": task.target,
            "test_metric": task.test_metric,
        }
        for method in arguments.methods:
            tried = UNTUNED if method == TUNED else method
            settings = trials.get(name, {}).get(tried, {}).get("best")
            if settings is None and method != UNTUNED:
                print(f"{name}: {method} has no trials yet, left out", file=sys.stderr)
                continue
            if method in RIVALS and RIVALS[method].missing:
                package = RIVALS[method].package
                print(f"{method} needs {package}, left out", file=sys.stderr)
                continue
            entry["methods"][method] = [
                run_once(task, method, settings, seed, arguments.stop)
                for seed in arguments.seeds
            ]
            report |= {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
            write_json(out, report)
            out.with_suffix(".md").write_text(table(report["tasks"]), encoding="utf-8")
            print(name, method, "done", file=sys.stderr)
    print(table(report["tasks"]))


if __name__ == "__main__":
    main()
