"""How much the loss after so many steps depends on the initial damping.

    OMP_NUM_THREADS=1 python benchmarks/sensitivity.py --data-dir DIR

K-FAC with nothing set, but for the initial λ of `RelativeDamping`, which is multiplied by
0.01, 1 (the default) and 100, and, since the trials of the first steps go by factors of
10, by 0.03 and 3, from where they end elsewhere; its bounds stay. The loss is that of the
task's fixed cases at equal steps; deviations are relative to the default's. One seed; the
runs train in turn, step by step.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from runs import Run, machine, write_json
from tasks import Task, load_task
from torch import nn

from kfac_torch import KFAC
from kfac_torch.damping import LevenbergMarquardt, RelativeDamping

RESULTS = Path(__file__).parent / "results" / "sensitivity.json"
STEPS = {"T1": (60,), "T2": (20, 60, 100), "T4": (40, 80), "T6": (100,)}
FACTORS = (0.01, 0.03, 1.0, 3.0, 100.0)
BAR = 0.1


def make(task: Task, factor: float, seed: int, model: nn.Module) -> KFAC:
    """K-FAC with another initial λ."""
    rule = RelativeDamping().damping
    assert isinstance(rule, LevenbergMarquardt)
    rule = replace(rule, initial=factor * rule.initial)
    optimizer = KFAC(model, task.kfac_loss, damping=RelativeDamping(rule))
    optimizer.estimator.seed = seed
    return optimizer


def losses(task: Task, steps: tuple[int, ...], seed: int) -> dict[str, Any]:
    """The loss at these steps of a run with each factor."""
    runs = [
        Run(task, partial(make, task, factor, seed), seed, every=max(steps) + 1)
        for factor in FACTORS
    ]
    found: dict[str, Any] = {}
    for until in range(1, max(steps) + 1):
        for run in runs:
            run.optimizer.zero_grad()
            x, y = next(run.batches)
            task.training_loss(run.model, x, y).backward()
            run.optimizer.step()
        if until in steps:
            values = [task.evaluate(run.model) for run in runs]
            base = values[FACTORS.index(1.0)]
            found[str(until)] = {
                "loss": [float(f"{value:.5g}") for value in values],
                "deviation": [round(value / base - 1, 4) for value in values],
                "damping": [float(f"{r.optimizer.last_step.damping:.3g}") for r in runs],
            }
    return found


def table(report: dict[str, Any]) -> str:
    """The results in Markdown."""
    factors = " | ".join(f"{factor:g} λ" for factor in FACTORS)
    lines = [f"| task | steps | loss, {factors} | deviations | within 10 % |"]
    lines.append("| --- " * (len(FACTORS) + 4) + "|")
    for name, found in report["tasks"].items():
        for steps, row in found.items():
            others = [row["deviation"][i] for i, f in enumerate(FACTORS) if f != 1]
            good = "yes" if max(map(abs, others)) <= BAR else "no"
            cells = " | ".join(f"{value:.4g}" for value in row["loss"])
            text = ", ".join(f"{100 * deviation:+.1f} %" for deviation in others)
            lines.append(f"| {name} | {steps} | {cells} | {text} | {good} |")
    return "\n".join(lines)


def main() -> None:
    """Train, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    report |= {"seed": arguments.seed, "factors": FACTORS, "tasks": {}}
    for name, steps in STEPS.items():
        task = load_task(name, arguments.data_dir)
        report["tasks"][name] = losses(task, steps, arguments.seed)
        write_json(arguments.out, report)
    print(table(report))


if __name__ == "__main__":
    main()
