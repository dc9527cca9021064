"""K-FAC against EKFAC: steps and seconds to the target of T2 and T4.

    OMP_NUM_THREADS=1 python benchmarks/ekfac.py --data-dir DIR

Nothing is set but the approximation and how rare its decompositions are: with
`basis_every=5` five times rarer than K-FAC's refreshes, every sixth step. Three seeds.
A run ends at its target or at the budget of the task; "-" is one that was not reached.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from runs import Run, machine, write_json
from steps_to_target import spread
from tasks import Task, load_task
from torch import nn

from kfac_torch import KFAC
from kfac_torch.refresh_schedule import Refresh

RESULTS = Path(__file__).parent / "results" / "ekfac.json"
METHODS: dict[str, dict[str, Any]] = {
    "K-FAC": {},
    "EKFAC, basis_every=1": {"approx": "ekfac", "invert_every": Refresh(every=6)},
    "EKFAC, basis_every=5": {
        "approx": "ekfac",
        "invert_every": Refresh(every=6, basis_every=5),
    },
}
TASKS = ("T2", "T4")


def make(task: Task, method: str, seed: int, model: nn.Module) -> KFAC:
    """The optimizer of a method."""
    optimizer = KFAC(model, task.kfac_loss, **METHODS[method])
    optimizer.estimator.seed = seed
    return optimizer


def run_once(task: Task, method: str, seed: int) -> dict[str, Any]:
    """Train to the target."""
    run = Run(task, partial(make, task, method, seed), seed, every=1)
    while run.alive and run.steps < task.kfac_steps and not run.reached(task.target):
        run.train(run.steps + 1)
    hit = run.reached(task.target)
    return {
        "seed": seed,
        "steps": hit and hit[0],
        "seconds": hit and hit[2],
        "ms per step": round(1e3 * run.cpu / run.steps, 1),
        "loss": run.loss,
        "curve": [float(f"{loss:.5g}") for *_, loss in run.curve],
        "failure": run.failure,
    }


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| task | method | steps | seconds | ms per step |", "| --- " * 5 + "|"]
    for name, methods in report["tasks"].items():
        for method, runs in methods.items():
            cells = [
                spread([run[key] for run in runs], digits)
                for key, digits in (("steps", 0), ("seconds", 1), ("ms per step", 0))
            ]
            lines.append(f"| {name} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = arguments.out
    report = json.loads(out.read_text()) if out.exists() else {"tasks": {}}
    report |= {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    for name in arguments.tasks:
        task = load_task(name, arguments.data_dir)
        found = report["tasks"][name] = {method: [] for method in METHODS}
        for seed in arguments.seeds:
            for method in METHODS:
                found[method].append(run_once(task, method, seed))
        write_json(out, report)
    print(table(report))


if __name__ == "__main__":
    main()
