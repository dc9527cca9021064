"""All inverses of a ResNet-50's Kronecker factors against one ``torch.linalg.eigh`` each.

    OMP_NUM_THREADS=1 python benchmarks/inverses.py [--rounds N] [--quick] [--json FILE]

Ours: ``FisherEstimator.update_inverses()`` on the 54 layers (their shapes are the table
below), 108 factors with statistics of random data, damping split by pi and all: what an
optimizer calls. Of the first call, which also keeps every factorisation until the last one
holds, the time is told apart.

Baseline: ``torch.linalg.eigh`` of one factor of each size, times the number of factors of
that size; nothing for what is then to be made of the eigenvectors. In every round both are
timed, by the processor time of this process; a ratio is that of one round. float32.

``--quick`` leaves out the fourth stage and the classifier.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import machine, write_json
from torch import Tensor, nn

from kfac_torch.estimator import FisherEstimator
from kfac_torch.fisher_blocks import Moment
from kfac_torch.layer_collection import LayerCollection

# Input channels, output channels, kernel, number of such layers.
STEM = [(3, 64, 7, 1)]
STAGES = [
    [(64, 64, 1, 1), (64, 64, 3, 3), (64, 256, 1, 4), (256, 64, 1, 2)],
    [(256, 128, 1, 1), (128, 128, 3, 4), (128, 512, 1, 4), (256, 512, 1, 1),
     (512, 128, 1, 3)],
    [(512, 256, 1, 1), (256, 256, 3, 6), (256, 1024, 1, 6), (512, 1024, 1, 1),
     (1024, 256, 1, 5)],
    [(1024, 512, 1, 1), (512, 512, 3, 3), (512, 2048, 1, 3), (1024, 2048, 1, 1),
     (2048, 512, 1, 2)],
]  # fmt: skip
CLASSIFIER = (2048, 1000)


def make_layers(quick: bool) -> nn.Module:
    stages = STAGES[:-1] if quick else STAGES
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, kernel, bias=False)
        for stage in [STEM, *stages]
        for channels, out, kernel, number in stage
        for _ in range(number)
    ]
    return nn.Sequential(*layers, *([] if quick else [nn.Linear(*CLASSIFIER)]))


def random_moments(sizes: set[int]) -> dict[int, Tensor]:
    """Second moments of rectified random features, mixed to be correlated."""
    moments = {}
    for n in sorted(sizes):
        torch.manual_seed(n)
        rows = torch.randn(n + n // 2, n)
        rows += rows.roll(1, 1) + 0.5 * rows[:, :1]
        rows.relu_()
        moments[n] = rows.mT @ rows / len(rows)
    return moments


def make_estimator(model: nn.Module) -> FisherEstimator:
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution()
    return FisherEstimator(None, 0.95, 1e-3, layers)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def spread(values: list[float]) -> dict[str, float]:
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def measure(rounds: int, quick: bool) -> dict[str, Any]:
    model = make_layers(quick)
    estimator = make_estimator(model)
    counts = Counter(f.cov_dim for b in estimator.blocks.values() for f in b.factors)
    moments = random_moments(set(counts))
    for block in estimator.blocks.values():
        block.accumulate(
            [Moment(moments[f.cov_dim], 1.0, 1.0) for f in block.factors], 0.95
        )
    first = seconds(estimator.update_inverses)
    by_size: dict[int, list[float]] = {n: [] for n in sorted(counts)}
    ours = []
    for number in range(rounds):
        ours.append(seconds(estimator.update_inverses))
        for n, times in by_size.items():
            times.append(seconds(lambda n=n: torch.linalg.eigh(moments[n])))
        total = sum(times[-1] * counts[n] for n, times in by_size.items())
        print(f"round {number}: ours {ours[-1]:.2f} s, eigh {total:.1f} s", flush=True)
    eigh = [sum(t[i] * counts[n] for n, t in by_size.items()) for i in range(rounds)]
    return {
        "machine": machine(),
        "factors": sum(counts.values()),
        "counts": {str(n): counts[n] for n in sorted(counts)},
        "first_seconds": first,
        "seconds": spread(ours),
        "eigh_seconds": spread(eigh),
        "eigh_seconds_by_size": {str(n): spread(t) for n, t in by_size.items()},
        "ratio": spread([b / a for a, b in zip(ours, eigh, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.rounds, options.quick)
    print("size  number  eigh s (min/median/max)")
    for n, times in result["eigh_seconds_by_size"].items():
        row = "/".join(f"{t:.4f}" for t in times.values())
        print(f"{n:>4}  {result['counts'][n]:>6}  {row}")
    print(f"first refresh {result['first_seconds']:.2f} s")
    for name in ("seconds", "eigh_seconds", "ratio"):
        row = " / ".join(f"{value:.2f}" for value in result[name].values())
        print(f"{name}: {row} (min / median / max)")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
