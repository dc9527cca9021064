"""The constants of `kfac_torch.cost_model`: times in units of a product of large matrices.

    OMP_NUM_THREADS=1 python benchmarks/cost_model.py [--rounds N] [--out FILE]

The unit is a multiply-add of a product of 1024 x 1024 matrices. By size n, of what the
library itself calls: a damped inverse, per n³; an eigendecomposition, per 9 n³ (as
`refresh_cost` counts); a second moment of 512 rows, per 512 n²; what a matrix takes however
few its rows, a moment of 16, its check and its average, per n²; forward and backward of a
linear layer on 512 rows, per 3 · 512 n². Whatever the sizes, of a step of `KFAC(lr=...)`
without statistics and refreshes, batches of 8 and 8 features: what one more layer makes it
longer, and the rest. The parts take turns in every round; medians of processor time,
float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import machine, write_json
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC
from kfac_torch.fisher_blocks import Moment
from kfac_torch.fisher_factors import FullyConnectedKroneckerFactor
from kfac_torch.gram import gram
from kfac_torch.linalg import psd_eigh, psd_inverse

RESULTS = Path(__file__).parent / "results" / "cost_model.json"
SIZES = (64, 128, 256, 512, 1024, 2048)
UNIT = 1024
ROWS = 512
DEPTHS = (2, 12)


def seconds(run: Callable[[], object], least: float = 0.03) -> float:
    """Processor time of a call, over as many calls as take some hundredths of a second."""
    number, spent, start = 0, 0.0, time.process_time()
    while spent < least:
        run()
        number += 1
        spent = time.process_time() - start
    return spent / number


def parts_of(n: int) -> dict[str, tuple[Callable[[], object], float]]:
    """What is measured at a size, and the multiply-adds that it counts as."""
    torch.manual_seed(n)
    x, C = torch.randn(ROWS, n), gram(torch.randn(2 * n, n)) / (2 * n)
    layer = nn.Linear(n, n)
    factor = FullyConnectedKroneckerFactor([[x]])
    factor.instantiate_cov_variables()
    rows = x.clone().requires_grad_()

    few = x[:16].contiguous()

    def entries() -> None:
        moment = Moment(gram(few), 16.0, 16.0)
        if moment.is_finite():
            factor.accumulate(moment.cov, 0.95)

    return {
        "inverse": (lambda: psd_inverse(C, 0.01), n**3),
        "decomposition": (lambda: psd_eigh(C), 9 * n**3),
        "moment": (lambda: gram(x), ROWS * n**2),
        "entries": (entries, n**2),
        "passes": (lambda: layer(rows).sum().backward(), 3 * ROWS * n**2),
    }


def tiny_step(depth: int) -> Callable[[], object]:
    """A step of K-FAC without statistics and refreshes, of a net with tiny layers."""
    torch.manual_seed(depth)
    layers = [module for _ in range(depth) for module in (nn.Linear(8, 8), nn.Tanh())]
    model = nn.Sequential(*layers[:-1])
    optimizer = KFAC(
        model, "categorical", lr=0.01, damping=0.1, cov_update_every=10**6,
        invert_every=10**6,
    )  # fmt: skip
    x, y = torch.randn(8, 8), torch.randint(8, (8,))

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(5):
        step()
    return step


def measure(rounds: int) -> dict[str, Any]:
    """All constants, medians over the rounds."""
    a, b = torch.randn(2, UNIT, UNIT)
    parts = {n: parts_of(n) for n in SIZES}
    steps = [tiny_step(depth) for depth in DEPTHS]
    units: list[float] = []
    layers: list[float] = []
    alone: list[float] = []
    found: dict[str, dict[int, list[float]]] = {}
    for _ in range(rounds):
        unit = seconds(lambda: a @ b) / UNIT**3
        units.append(unit)
        for n in SIZES:
            for name, (run, number) in parts[n].items():
                values = found.setdefault(name, {}).setdefault(n, [])
                values.append(seconds(run) / number / unit)
        few, many = (seconds(step) / unit for step in steps)
        layers.append((many - few) / (DEPTHS[1] - DEPTHS[0]))
        alone.append(few - DEPTHS[0] * layers[-1])
    return {
        "machine": machine(),
        "multiply_adds_per_second": 1 / statistics.median(units),
        "step": statistics.median(alone),
        "layer": statistics.median(layers),
        "by_size": {
            name: {str(n): round(statistics.median(v), 3) for n, v in values.items()}
            for name, values in found.items()
        },
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.rounds)
    print(f"{result['multiply_adds_per_second']:.3g} multiply-adds per second")
    print(f"a step: {result['step']:.3g}, a layer: {result['layer']:.3g}")
    for name, values in result["by_size"].items():
        print(f"{name:>14}", *(f"{n}: {v:g}" for n, v in values.items()), sep="  ")
    write_json(options.out, result)


if __name__ == "__main__":
    main()
