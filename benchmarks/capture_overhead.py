"""What a model's forward and backward cost more because K-FAC watches it.

Two copies of a network take the same training passes in turn, one of them watched by a
`KFAC` whose statistics are not due, and one in which they are due at every pass. Printed
are medians of the ratios, pair by pair, and the microseconds that watching adds to the
forward of one small layer: what it costs however large a network is.

    python benchmarks/capture_overhead.py [--json FILE]
"""

import argparse
import copy
import json
import platform
import statistics
import time
import timeit

import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC


def perceptron() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(256, 128), nn.Tanh()]
    for _ in range(8):
        layers += [nn.Linear(128, 128), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


MODELS = {"perceptron, 10 layers": perceptron, "4 layers with convolutions": convolutions}


def one_pass(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.zero_grad()
    start = time.perf_counter()
    functional.cross_entropy(model(x), y).backward()
    return time.perf_counter() - start


def measure(make, batch: int, pairs: int) -> dict[str, list[float]]:
    """Ratios of seconds to an unwatched copy: not due, and due."""
    plain = make()
    x, y = torch.randn(batch, 1, 16, 16), torch.randint(10, (batch,))
    ratios: dict[str, list[float]] = {}
    for name, due in (("not due", False), ("due", True)):
        watched = copy.deepcopy(plain)
        optimizer = KFAC(watched, "categorical", lr=0.1, damping=0.1)
        one_pass(watched, x, y)
        optimizer.step()  # the loss is checked by now
        ratios[name] = []
        for i in range(pairs + 5):
            optimizer.estimator.reset()
            optimizer.estimator.collecting = due
            models = (plain, watched) if i % 2 else (watched, plain)
            seconds = {id(model): one_pass(model, x, y) for model in models}
            if i >= 5:
                ratios[name].append(seconds[id(watched)] / seconds[id(plain)])
        optimizer.close()
    return ratios


def constant() -> float:
    """Microseconds that a forward of one small layer takes more, not due."""
    plain, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    watched = copy.deepcopy(plain)
    optimizer = KFAC(watched, "categorical", lr=0.1, damping=0.1)
    functional.cross_entropy(watched(x), torch.zeros(2, dtype=torch.long)).backward()
    optimizer.step()
    optimizer.estimator.collecting = False
    seconds = [
        min(timeit.repeat(lambda model=model: model(x), number=1000, repeat=20))
        for model in (plain, watched)
    ]
    optimizer.close()
    return 1e3 * (seconds[1] - seconds[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, make in MODELS.items():
        for batch in (32, 512):
            for state, ratios in measure(make, batch, args.pairs).items():
                low, *_, high = statistics.quantiles(ratios, n=20)
                median = statistics.median(ratios)
                rows.append(
                    {"model": name, "batch": batch, "statistics": state, "median": median,
                     "5 %": low, "95 %": high}
                )  # fmt: skip
                print(
                    f"{name:28} batch {batch:4}  statistics {state:8}"
                    f"  {median:.3f}  [{low:.2f}, {high:.2f}]"
                )
    microseconds = constant()
    print(f"a forward of one small layer, not due: {microseconds:.0f} microseconds more")
    rows.append({"model": "one small layer", "microseconds": microseconds})
    if args.json:
        machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        with open(args.json, "w") as file:
            json.dump({**machine, **versions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
