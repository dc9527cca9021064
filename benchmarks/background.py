"""Refreshes in the background against refreshes at once: seconds per step.

    OMP_NUM_THREADS=1 python benchmarks/background.py [--widths N ...] [--json FILE]

Nets of three hidden layers, 1024 and 2048 wide, with K-FAC's inverses (by Cholesky) or
EKFAC's bases (by ``eigh``), of random data; statistics and refreshes every ten steps.
Three twins train in turn, ten steps each, from the same weights on the same batch:

    at once, 1     as without the option, on one core
    at once, 2     the same, torch's operations on two cores
    background     ``Refresh(every=10, background=9)``: training on one core, the thread's
                   refresh on the other

The ten steps have all of a refresh in them, from its begin until it has come in. Medians
[min-max] over the rounds: of the clock, the mean step and the longest of the ten; of
processor time, the mean of the training thread and that of all others together, which says
the same on a busy machine. On an idle one of two cores the clock of a step is the training
thread's time, as long as the others have less. float32.

``--digits`` instead: what the staleness costs in progress. A 64-128-64-32-10 net on
scikit-learn's digits, 80 steps of 256, three seeds; training loss of the whole set at the
end, relative to that of refreshes at once: median [min-max].
"""

import argparse
import copy
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from runs import machine, write_json
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from kfac_torch import KFAC, Refresh

EVERY = 10
WIDTHS, APPROXIMATIONS = (1024, 2048), ("kron", "ekfac")
# Cores of torch's operations, staleness.
KINDS = {"at once, 1": (1, None), "at once, 2": (2, None), "background": (1, EVERY - 1)}


def make_net(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    hidden: list[nn.Module] = []
    for _ in range(3):
        hidden += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


class Twin:
    """A net with its optimizer."""

    def __init__(self, net: nn.Module, approx: str, staleness: int | None) -> None:
        self.net = copy.deepcopy(net)
        refresh = Refresh(every=EVERY, background=staleness)
        self.optimizer = KFAC(
            self.net,
            "categorical",
            lr=1e-3,
            damping=0.1,
            invert_every=refresh,
            cov_update_every=EVERY,
            approx=approx,
        )

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Train on a batch; seconds of the clock."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        cross_entropy(self.net(x), y).backward()
        self.optimizer.step()
        return time.perf_counter() - start

    def steps(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        """Train on a batch as often as there is a refresh; seconds per step."""
        thread, process = time.thread_time(), time.process_time()
        seconds = [self.step(x, y) for _ in range(EVERY)]
        assert not self.optimizer.estimator.background.layers
        thread, process = time.thread_time() - thread, time.process_time() - process
        return {
            "mean": statistics.mean(seconds),
            "longest": max(seconds),
            "training thread": thread / EVERY,
            "others": (process - thread) / EVERY,
        }


def measure(width: int, approx: str, rounds: int, size: int = 256) -> dict[str, Any]:
    """Seconds per step of every kind, by round."""
    net = make_net(width)
    x, y = torch.randn(size, width), torch.randint(10, (size,))
    twins = {name: Twin(net, approx, n) for name, (_, n) in KINDS.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in twins}
    for number in range(rounds + 1):
        for name, twin in twins.items():
            torch.set_num_threads(KINDS[name][0])
            seconds = twin.steps(x, y)
            if number:  # the first ten have the early refreshes
                found[name].append(seconds)
    for twin in twins.values():
        twin.optimizer.close()
    return {
        name: {key: spread([r[key] for r in runs]) for key in runs[0]}
        for name, runs in found.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"min": low, "median": middle, "max": high}


def digits_loss(staleness: int | None, seed: int, every: int, options: Any) -> float:
    """The training loss after 80 steps."""
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh()),
        *(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
    )
    refresh = Refresh(every=every, background=staleness)
    optimizer = KFAC(net, "categorical", invert_every=refresh, **options)
    for _ in range(80):
        some = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        cross_entropy(net(x[some]), y[some]).backward()
        optimizer.step()
    optimizer.close()
    with torch.no_grad():
        return cross_entropy(net(x), y).item()


def digits() -> None:
    """Print the loss beside that of refreshes at once."""
    chosen: list[dict[str, Any]] = [{}, {"lr": 0.1}, {"lr": 0.1, "approx": "ekfac"}]
    for options, every, staleness in itertools.product(chosen, (5, 10), (1, None)):
        n = every - 1 if staleness is None else staleness
        ratios = [
            digits_loss(n, seed, every, options) / digits_loss(None, seed, every, options)
            for seed in range(3)
        ]
        found = spread(ratios)
        text = f"{found['median']:.2f} [{found['min']:.2f}-{found['max']:.2f}]"
        print(options, f"every={every}, background={n}:", text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--digits", action="store_true")
    options = parser.parse_args()
    if options.digits:
        digits()
        return
    result: dict[str, Any] = {"machine": machine(), "cases": []}
    for width, approx in itertools.product(options.widths, APPROXIMATIONS):
        found = measure(width, approx, options.rounds)
        result["cases"].append({"width": width, "approx": approx, **found})
        for name, numbers in found.items():
            texts = [
                f"{key} {1e3 * v['median']:.0f} [{1e3 * v['min']:.0f}-{1e3 * v['max']:.0f}]"
                for key, v in numbers.items()
            ]
            print(f"{width} {approx:5s} {name:11s} ms:", *texts, flush=True)
        if options.json:
            write_json(options.json, result)


if __name__ == "__main__":
    main()
