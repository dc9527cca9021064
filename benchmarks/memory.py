"""Memory over five thousand steps: does it stay flat?

A small convolutional network on random batches, each method in a process of its own. Every
so many steps: the resident memory of the process, and the number and bytes of all tensors
that Python's collector finds alive (a storage that several share counts once). AdamW is
there for what the allocator and PyTorch do by themselves.

    python benchmarks/memory.py [--steps 5000] [--every 500]
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from runs import machine, write_json
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC

METHODS = {
    "automatic": lambda model: KFAC(model, "categorical"),
    "lr=0.01": lambda model: KFAC(model, "categorical", lr=0.01, damping=0.01),
    "EKFAC": lambda model: KFAC(model, "categorical", approx="ekfac"),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
}
RESULTS = Path(__file__).parent / "results" / "memory.json"


def resident() -> int:
    """Return the resident memory of this process, in bytes; of Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def tensors() -> tuple[int, int]:
    """Return how many tensors are alive, and the bytes of their storages."""
    gc.collect()
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in alive}
    return len(alive), sum(storage.nbytes() for storage in storages.values())


def train(method: str, steps: int, every: int) -> Iterator[tuple[int, float, int, float]]:
    """Train; return rows of step, resident MiB, tensors, and their KiB."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 5),
    )  # fmt: skip
    optimizer = METHODS[method](model)
    for step in range(1, steps + 1):
        x, y = torch.randn(64, 1, 8, 8), torch.randint(5, (64,))
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step % every == 0:
            rss, (number, size) = resident(), tensors()
            yield step, round(rss / 2**20, 2), number, round(size / 2**10, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--method", choices=METHODS, help="this one alone, as lines of JSON"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.method:
        for row in train(args.method, args.steps, args.every):
            print(json.dumps(row), flush=True)
        return
    curves = {}
    print(f"{'method':10} {'steps':>6} {'resident MiB':>13} {'tensors':>8} {'KiB':>8}")
    for method in METHODS:
        command = [sys.executable, __file__, "--method", method]
        command += ["--steps", str(args.steps), "--every", str(args.every)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        curves[method] = [json.loads(line) for line in run.stdout.splitlines()]
        for step, rss, number, size in curves[method]:
            print(f"{method:10} {step:6} {rss:13.2f} {number:8} {size:8.1f}", flush=True)
        if run.returncode:
            print(f"{method:10} failed")
    columns = ["step", "resident MiB", "tensors", "their KiB"]
    write_json(args.out, {"machine": machine(), "columns": columns, "curves": curves})


if __name__ == "__main__":
    main()
