"""Tune every optimizer of the demo on the digits, equally many trials for each.

    python benchmarks/demo_tuning.py [--out FILE] [--task NAME] [--threads N]

Per task and optimizer: 18 trials on a grid, then 6 around the best of them: learning
rate, damping or momentum up and down, schedules, warm-up. A trial ends at the target, at
the demo's step budget, or when it diverges. The rule that chooses: fewest steps to the
target (they do not depend on how busy the machine is); of none that reaches it, the
lowest loss at the end. `SETTINGS` in `kfac_torch/demo/tasks.py` are the winners; a test
compares them with the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from kfac_torch.demo.data import load_data
from kfac_torch.demo.tasks import KFAC_FIXED, OPTIMIZERS, TASKS, Settings, Task, make_tasks
from kfac_torch.demo.training import Run, warm_up
from kfac_torch.report import machine

SEED = 0
OUT = Path(__file__).with_name("demo_trials.json")

# SGD's grid is over lr / (1 - momentum), the length of a step in a steady direction.
SGD_REACH = {"conv": (3, 4, 6, 8, 12, 16), "autoencoder": (0.1, 0.15, 0.2, 0.3, 0.4, 0.6)}
ADAMW_LR = {
    "conv": (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1),
    "autoencoder": (0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03),
}
KFAC_DAMPING = {
    "conv": ((1e-2, 1e-3), (3e-3, 1e-3), (3e-3, 3e-4)),
    "autoencoder": ((1.0, 0.03), (0.3, 0.03), (0.1, 0.03)),
}


def grid(task: str, optimizer: str) -> list[Settings]:
    """The first 18 trials."""
    if optimizer == "SGD":
        return [
            {"lr": round(reach * (1 - m), 6), "momentum": m}
            for m, reach in itertools.product((0.9, 0.95, 0.99), SGD_REACH[task])
        ]
    if optimizer == "AdamW":
        return [
            {"lr": lr, "beta1": b}
            for b, lr in itertools.product((0.9, 0.95), ADAMW_LR[task])
        ]
    return [
        {"lr": lr, "momentum": m, "damping": start, "damping_end": end}
        for lr, m, (start, end) in itertools.product(
            (0.3, 1.0), (0.7, 0.8, 0.9), KFAC_DAMPING[task]
        )
    ]


def around(best: Settings) -> list[Settings]:
    """The last 6 trials."""
    if "damping" in best:  # a warm-up is what the norm constraint does already
        keys = ("damping", "damping_end")
        changes: list[Settings] = [
            {key: float(f"{factor * best[key]:.3g}") for key in keys} for factor in (0.5, 2)
        ]
        changes.append({"damping_end": float(f"{0.3 * best['damping_end']:.3g}")})
        changes += [{"momentum": round(best["momentum"] + by, 6)} for by in (-0.05, 0.05)]
        changes.append({"cosine": 1})
    else:
        changes = [{"lr": factor * best["lr"]} for factor in (0.8, 1.25)]
        changes += [{"warm_up": 1}, {"warm_up": 1, "lr": 1.5 * best["lr"]}]
        changes += [{"cosine": 0.6}, {"cosine": 0.6, "warm_up": 1, "lr": 1.5 * best["lr"]}]
    changes = [{key: round(v, 6) for key, v in change.items()} for change in changes]
    return [best | change for change in changes]


def run_trial(task: Task, optimizer: str, settings: Settings) -> dict[str, Any]:
    """Train to the target, to the end of the budget or to divergence."""
    run = Run(task, optimizer, settings, SEED, task.budget[optimizer])
    why = None
    try:
        while not run.done and not run.result.reached(task.target):
            run.step()
    except torch.linalg.LinAlgError as error:
        why = f"diverged: {error}"
    result = run.finish()
    hit = result.reached(task.target)
    # The target shows in the forward of the step after it.
    loss = result.losses[result.steps.index(hit[0]) if hit else -1]
    if not hit and not math.isfinite(loss):
        why = why or "diverged"
    return {
        "settings": settings,
        "steps_to_target": hit[0] if hit else None,
        "seconds_to_target": round(hit[1], 3) if hit else None,
        "steps": run.steps,
        "seconds": round(run.seconds, 3),
        "step_ms": round(result.step_ms, 2),
        "final_loss": loss if math.isfinite(loss) else None,
        "test": result.test if math.isfinite(result.test) else None,
        "ended": "target" if hit else why or "budget",
    }


def best_trial(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The rule: fewest steps to the target, then the lowest loss; first of equals."""

    def rank(trial: dict[str, Any]) -> tuple[float, float]:
        steps, loss = trial["steps_to_target"], trial["final_loss"]
        return (
            math.inf if steps is None else steps,
            math.inf if loss is None else loss,
        )

    return min(trials, key=rank)


def tune(task: Task, optimizer: str) -> dict[str, Any]:
    """All trials of one optimizer on one task."""
    trials: list[dict[str, Any]] = []

    def attempt(settings: Settings) -> None:
        trials.append(run_trial(task, optimizer, settings))
        last = trials[-1]
        print(
            f"{task.name} {optimizer} {settings}: {last['steps_to_target']} steps, "
            f"{last['seconds_to_target']} s, loss {last['final_loss']}",
            flush=True,
        )

    warm_up([Run(task, optimizer, grid(task.name, optimizer)[0], SEED, 1)])
    for settings in grid(task.name, optimizer):
        attempt(settings)
    for settings in around(best_trial(trials)["settings"]):
        attempt(settings)
    best = best_trial(trials)
    return {"budget": task.budget[optimizer], "best": best, "trials": trials}


def main() -> None:
    """Run all trials and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--task", choices=TASKS, help="only this one")
    parser.add_argument("--threads", type=int, default=1, help="steps hardly depend on it")
    arguments = parser.parse_args()
    # A diverging trial says so in the table.
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {}
    for task in make_tasks(load_data("digits", seed=SEED)):
        if arguments.task in (None, task.name):
            optimizers = {name: tune(task, name) for name in OPTIMIZERS}
            found[task.name] = {"target": task.target, "optimizers": optimizers}
    if arguments.task and arguments.out.exists():  # keep the other task's trials
        found = json.loads(arguments.out.read_text())["tasks"] | found
    table = {
        "rule": "fewest steps to the target, then the lowest final loss; 18 trials on a "
        "grid and 6 around its best for every optimizer; the grids of all three were "
        "placed after pilot runs on the same tasks",
        "command": f"python benchmarks/demo_tuning.py --threads {arguments.threads}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "seed": SEED,
        "kfac_fixed": dict(KFAC_FIXED),
        "tasks": found,
    }
    arguments.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
