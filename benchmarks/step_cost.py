"""What a step of K-FAC costs: time against AdamW and SGD, and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/step_cost.py --data-dir DIR

Time: K-FAC and a first-order optimizer train twins in turn, step by step, from the same
weights and on the same batches, batch, forward and backward included. The ratio is that of
the sums of processor time over a whole number of K-FAC's periods, after the first steps,
in which all is taken more often. With nothing set (`automatic`) it is against AdamW; with
`KFAC(lr=..., damping=...)` and the default intervals (`classic`) against SGD with
Nesterov's momentum. K-FAC's own time is split by `StepRecord.seconds`, which is of the wall
clock, so shares are printed; the products of the quadratic model are in "step". Medians
[min-max] of the seeds.

Memory: the peak of a step of the classic kind, with statistics (and inverses) or without,
and of one of SGD: the tensors alive before the step (weights, velocities, factors, batch)
and the highest running sum of what the profiler sees of the CPU allocator. Scratch space of
MKL and oneDNN is not seen. Random images; deeper nets beside that of T4.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kfac_setup import make_kfac
from memory import tensors
from rivals import make_adamw, make_sgd
from runs import machine, write_json
from tasks import Task, load_task
from tasks.fashion_conv import conv_net
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from kfac_torch import KFAC
from kfac_torch.steps import PHASES

RESULTS = Path(__file__).parent / "results" / "step_cost.json"
ADAMW = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99}
SGD = {"reach": 0.1, "momentum": 0.9}
# Task, kind, steps before and after which it is not counted.
CASES = [
    *((task, "automatic", 10, 40) for task in ("T1", "T2", "T4", "T6")),
    *((task, "classic", 10, 50) for task in ("T4", "T2")),
]


def make_classic(loss: str, model: nn.Module) -> KFAC:
    """K-FAC with a fixed step size and damping, all else as it comes."""
    return KFAC(model, loss, lr=0.03, damping=0.1)


def compare(task: Task, kind: str, first: int, last: int, seed: int) -> dict[str, Any]:
    """Train twins in turn; milliseconds per step of both, and of K-FAC by phase."""
    models = [task.make_model(seed) for _ in range(2)]
    if kind == "automatic":
        ours: Any = make_kfac(task, models[0])
        other = make_adamw(models[1], ADAMW)
    else:
        ours, other = make_classic(task.kfac_loss, models[0]), make_sgd(models[1], SGD)
    spent, wall = [0.0, 0.0], 0.0
    phases = dict.fromkeys(PHASES, 0.0)
    for step, (x, y) in enumerate(itertools.islice(task.batches(seed), last)):
        for i, (model, optimizer) in enumerate(zip(models, (ours, other), strict=True)):
            cpu, start = time.process_time(), time.perf_counter()
            optimizer.zero_grad()
            task.training_loss(model, x, y).backward()
            optimizer.step()
            if step >= first:
                spent[i] += time.process_time() - cpu
                wall += (time.perf_counter() - start) * (not i)
        if step >= first:
            for name, seconds in ours.last_step.seconds.items():
                phases[name] += seconds
    phases = {"user's passes": wall - sum(phases.values()), **phases}
    scale = 1e3 / (last - first)
    return {
        "seed": seed,
        "ratio": round(spent[0] / spent[1], 3),
        "ms": [round(scale * seconds, 2) for seconds in spent],
        "wall_ms_by_phase": {k: round(scale * v, 2) for k, v in phases.items() if v},
    }


def deep_net(averaged: bool) -> nn.Sequential:
    """Six 3x3 convolutions on images of 3x32x32, 32 to 128 channels.

    The last images of 4x4 are averaged before the linear layer, or flattened.
    """
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise((3, 32, 32, 64, 64, 128, 128))):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (i % 2)
    layers += [nn.AvgPool2d(4)] * averaged
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 if averaged else 2048, 10))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "net of T4, batch 512": (partial(conv_net, False), (512, 784)),
    "six convolutions, averaged, batch 128": (partial(deep_net, True), (128, 3, 32, 32)),
    "six convolutions, flattened, batch 128": (partial(deep_net, False), (128, 3, 32, 32)),
}


def peak(step: Callable[[], None]) -> int:
    """Bytes alive at most during a step."""
    before = tensors()[1]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    profiler: Any = trace.profiler
    events = profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return before + max(itertools.accumulate(sizes))


def memory_of(net: str) -> dict[str, float]:
    """Peak MiB of steps of SGD, and of K-FAC with and without statistics and inverses."""
    build, shape = NETS[net]

    def peaks(make: Callable[[nn.Module], Any], steps: dict[int, str]) -> dict[str, float]:
        torch.manual_seed(0)
        model, x, y = build(), torch.rand(shape), torch.randint(10, shape[:1])
        optimizer = make(model)

        def step() -> None:
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        found = {}
        for i in range(max(steps) + 1):
            if i in steps:
                found[steps[i]] = round(peak(step) / 2**20, 2)
            else:
                step()
            optimizer.zero_grad()
        return found

    kfac = {0: "first", 5: "statistics", 10: "statistics and inverses", 11: "neither"}
    return peaks(partial(make_sgd, settings=SGD), {3: "SGD"}) | peaks(
        partial(make_classic, "categorical"), kfac
    )


def middle(values: list[float], digits: int = 2) -> str:
    """Median [min-max]."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def print_tables(report: dict[str, Any]) -> None:
    """Both tables in Markdown."""
    print("| task | K-FAC against | K-FAC ms | other ms | ratio | K-FAC's time |")
    print("| --- " * 6 + "|")
    for name, runs in report["time"].items():
        task, kind = name.split()
        against = "automatic, AdamW" if kind == "automatic" else "classic, SGD"
        ms = [statistics.median(run["ms"][i] for run in runs) for i in range(2)]
        phases: dict[str, float] = {}
        for run in runs:
            whole = sum(run["wall_ms_by_phase"].values())
            for phase, value in run["wall_ms_by_phase"].items():
                phases[phase] = phases.get(phase, 0.0) + 100 * value / whole / len(runs)
        where = ", ".join(f"{k} {v:.0f} %" for k, v in phases.items() if v >= 0.5)
        ratio = middle([run["ratio"] for run in runs])
        print(f"| {task} | {against} | {ms[0]:.1f} | {ms[1]:.1f} | {ratio} | {where} |")
    if not report["memory"]:
        return
    print("\n| peak MiB | SGD | neither | statistics | first | over SGD | neither |")
    print("| --- " * 7 + "|")
    for net, found in report["memory"].items():
        columns = "SGD", "neither", "statistics", "first"
        ratios = [max(found.values()) / found[name] for name in columns[:2]]
        cells = " | ".join(f"{found[name]:.1f}" for name in columns)
        print(f"| {net} | {cells} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parts = ["memory", "time"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = arguments.out
    report = json.loads(out.read_text()) if out.exists() else {"time": {}, "memory": {}}
    report |= {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    if "memory" in arguments.parts:
        report["memory"] = {net: memory_of(net) for net in NETS}
        write_json(out, report)
    for name, kind, first, last in CASES if "time" in arguments.parts else ():
        task = load_task(name, arguments.data_dir)
        report["time"][f"{name} {kind}"] = [
            compare(task, kind, first, last, seed) for seed in arguments.seeds
        ]
        write_json(out, report)
    print_tables(report)


if __name__ == "__main__":
    main()
