"""Steps and seconds to the target of T2 as the batch grows.

    OMP_NUM_THREADS=1 python benchmarks/batch_growth.py --data-dir DIR

K-FAC with nothing set, at most 60 steps, and AdamW with the settings that its trials at
batches of 1000 gave (`results/trials.json`), unchanged for all sizes, at most 300 steps: it
might gain from a larger step size at larger batches. One seed; a run ends at the target.
AdamW's loss is looked at every five steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kfac_setup import make_kfac
from rivals import RIVALS
from runs import Run, machine, write_json
from tasks import Task, load_task
from tasks.base import shuffled_batches
from tasks.data import load_idx

FOLDER = Path(__file__).parent / "results"
SIZES = (256, 1000, 4000, 16000)
CAPS = {"K-FAC": 60, "AdamW": 300}


def run_once(
    task: Task, make: Callable[..., Any], seed: int, cap: int, every: int
) -> dict[str, Any]:
    """Train to the target or the cap."""
    run = Run(task, make, seed, every)
    if hasattr(run.optimizer, "estimator"):
        run.optimizer.estimator.seed = seed
    while run.alive and run.steps < cap and not run.reached(task.target):
        run.train(run.steps + every)
    hit = run.reached(task.target)
    return {
        "steps": hit and hit[0],
        "seconds": hit and round(hit[2], 1),
        "ms per step": round(1e3 * run.cpu / run.steps, 1),
        "steps taken": run.steps,
        "loss": float(f"{run.loss:.5g}"),
        "failure": run.failure,
    }


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| batch | method | steps | seconds | ms per step | loss (steps) |"]
    lines.append("| --- " * 6 + "|")
    for size, methods in report["sizes"].items():
        for method, run in methods.items():
            cells = [
                "-" if run[key] is None else f"{run[key]:g}"
                for key in ("steps", "seconds", "ms per step")
            ]
            last = f"{run['loss']:.1f} ({run['steps taken']})"
            lines.append(f"| {size} | {method} | {' | '.join(cells)} | {last} |")
    return "\n".join(lines)


def main() -> None:
    """Train, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument(
        "--adamw-up-to", type=int, default=4000, help="the largest batch of AdamW's"
    )
    parser.add_argument("--out", type=Path, default=FOLDER / "batch_growth.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trials = json.loads((FOLDER / "trials.json").read_text())["tasks"]
    adamw = partial(RIVALS["AdamW"].make, settings=trials["T2"]["AdamW"]["best"])
    report: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    report |= {"seed": arguments.seed, "caps": CAPS, "sizes": {}}
    task = load_task("T2", arguments.data_dir)
    x, _ = load_idx("mnist", "train", arguments.data_dir)
    for size in arguments.sizes:
        grown = replace(task, batches=shuffled_batches(x, x, size))
        makers: dict[str, Any] = {"K-FAC": partial(make_kfac, task)}
        if size <= arguments.adamw_up_to:
            makers["AdamW"] = adamw
        found = report["sizes"][str(size)] = {}
        for method, make in makers.items():
            every = 1 if method == "K-FAC" else task.rival_every
            found[method] = run_once(grown, make, arguments.seed, CAPS[method], every)
            write_json(arguments.out, report)
            print(size, method, found[method], flush=True)
    print(table(report))


if __name__ == "__main__":
    main()
