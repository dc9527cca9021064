"""Nets with large factors: K-FAC's steps at fixed intervals and at those chosen by cost.

    OMP_NUM_THREADS=1 python benchmarks/intervals.py --data-dir DIR [--nets NAME ...]

On Fashion-MNIST, with nothing set, and with `KFAC(lr=0.03, damping=0.1)`: "fixed" is given
the intervals that small nets have, "chosen" none. AdamW (3e-3) and SGD with Nesterov's
momentum (0.1, 0.9) beside them. All train twins in turn, step by step, from the same
weights and on the same batches; the figures are processor time of one thread, forward and
backward included, per step over all steps after the first ten. K-FAC's parts, of
`StepRecord.seconds`, are per step too. The loss is the mean of the last ten batches.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rivals import make_adamw, make_sgd
from runs import machine, write_json
from tasks.base import Batch, seeded, shuffled_batches
from tasks.data import load_idx
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC

RESULTS = Path(__file__).parent / "results" / "intervals.json"
ADAMW = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99}
SGD = {"reach": 0.1, "momentum": 0.9}
FIRST = 10


def mlp() -> nn.Module:
    """784-2048-2048-10."""
    return nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
        nn.Linear(2048, 10),
    )  # fmt: skip


def wide_conv() -> nn.Module:
    """Convolutions of 64, 256 and 256 channels, on 28 x 28, 7 x 7 and 3 x 3."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(64, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


# Model, batch, steps.
NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "conv, batch 16": (wide_conv, 16, 76),
    "conv": (wide_conv, 64, 70),
    "mlp": (mlp, 128, 58),
}


def runs_of() -> dict[str, Callable[[nn.Module], Any]]:
    """What is compared."""

    def kfac(**options: Any) -> Callable[[nn.Module], Any]:
        return lambda model: KFAC(model, "categorical", **options)

    classic = {"lr": 0.03, "damping": 0.1}
    return {
        "automatic, fixed": kfac(invert_every=6),
        "automatic, chosen": kfac(),
        "automatic EKFAC, fixed": kfac(invert_every=6, approx="ekfac"),
        "automatic EKFAC, chosen": kfac(approx="ekfac"),
        "classic, fixed": kfac(invert_every=10, **classic),
        "classic, chosen": kfac(**classic),
        "AdamW": lambda model: make_adamw(model, ADAMW),
        "SGD": lambda model: make_sgd(model, SGD),
    }


def compare(images: Batch, net: str, only: str, seed: int) -> dict[str, Any]:
    """Train all in turn; milliseconds per step, K-FAC's parts, the loss at the end."""
    build, batch, steps = NETS[net]
    make_model = seeded(build)
    runs = {name: make for name, make in runs_of().items() if only in name}
    models = {name: make_model(seed) for name in runs}
    optimizers = {name: make(models[name]) for name, make in runs.items()}
    spent = dict.fromkeys(runs, 0.0)
    losses: dict[str, list[float]] = {name: [] for name in runs}
    phases: dict[str, dict[str, float]] = {name: {} for name in runs}
    batches = shuffled_batches(*images, batch)(seed)
    for step, (x, y) in enumerate(itertools.islice(batches, steps)):
        for name, optimizer in optimizers.items():
            start = time.process_time()
            optimizer.zero_grad()
            loss = functional.cross_entropy(models[name](x), y)
            loss.backward()
            optimizer.step()
            if step >= FIRST:
                spent[name] += time.process_time() - start
                last = getattr(optimizer, "last_step", None)
                for part, value in last.seconds.items() if last else ():
                    phases[name][part] = phases[name].get(part, 0.0) + value
            losses[name].append(loss.item())
    scale = 1e3 / (steps - FIRST)
    found = {}
    for name, optimizer in optimizers.items():
        row: dict[str, Any] = {"ms": round(scale * spent[name], 2)}
        row["loss"] = round(statistics.mean(losses[name][-10:]), 4)
        if isinstance(optimizer, KFAC):
            row["wall_ms"] = {k: round(scale * v, 2) for k, v in phases[name].items()}
            row["intervals"] = asdict(optimizer.intervals)
        found[name] = row
    return found


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument(
        "--only", default="", help="a part of the names of what is compared"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = load_idx("fashion-mnist", "train", arguments.data_dir, 20_000)
    report: dict[str, Any] = {"machine": machine(), "nets": {}}
    for net in arguments.nets:
        runs = [compare(images, net, arguments.only, seed) for seed in arguments.seeds]
        report["nets"][net] = runs
        write_json(arguments.out, report)
        for name in runs[0]:
            ms = statistics.median(run[name]["ms"] for run in runs)
            loss = statistics.median(run[name]["loss"] for run in runs)
            print(f"{net}  {name}: {ms:.1f} ms, loss {loss:.3f}", runs[0][name], flush=True)


if __name__ == "__main__":
    main()
