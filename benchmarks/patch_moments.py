"""Second moment of convolution patches against chunked ``F.unfold`` and a matmul.

    python benchmarks/patch_moments.py [--repeats N] [--quick] [--json FILE]

Baseline: ``F.unfold`` a few examples at a time, then a matmul into one accumulator, in
two ways (one matmul per chunk on the transposed patches, or one per example on the
patches as unfolded) and with 1 to 64 examples per chunk. The fastest three of these on
this machine run in turn with ``patch_second_moment``, and the best median counts.

Peak extra memory: the running sum of every allocation and release that the profiler
reports from the CPU allocator during one call, at its highest, less the bytes of the
result. Workspaces of the matmul and FFT libraries do not pass through that allocator.

Difference: largest deviation from the unfolded patches in float64, over the largest
entry.
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kfac_torch import patch_moments
from kfac_torch.patch_moments import patch_second_moment

# channels, size, kernel, batch; stride 1, SAME
SHAPES = [
    (3, 32, 3, 128),
    (16, 28, 5, 128),
    (32, 28, 3, 128),
    (64, 32, 3, 128),
    (64, 16, 3, 128),
    (128, 16, 3, 128),
    (256, 8, 3, 128),
    (1, 28, 5, 128),
    (16, 56, 3, 64),
    (32, 16, 5, 128),
]
QUICK = [(3, 32, 3, 128), (64, 32, 3, 32), (128, 16, 3, 32), (1, 28, 5, 128)]
CHUNKS = (1, 2, 4, 8, 16, 32, 64)


def unfold_per_chunk(x: Tensor, kernel: int, chunk: int) -> Tensor:
    columns = x.shape[1] * kernel**2
    moment = x.new_zeros(columns, columns)
    for examples in torch.split(x, chunk):
        patches = F.unfold(examples, kernel, padding=kernel // 2)
        patches = patches.transpose(1, 2).reshape(-1, columns)
        moment.addmm_(patches.T, patches)
    return moment.div_(len(x) * x.shape[2] * x.shape[3])


def unfold_per_example(x: Tensor, kernel: int, chunk: int) -> Tensor:
    columns = x.shape[1] * kernel**2
    moment = x.new_zeros(columns, columns)
    for examples in torch.split(x, chunk):
        for patches in F.unfold(examples, kernel, padding=kernel // 2):
            moment.addmm_(patches, patches.T)
    return moment.div_(len(x) * x.shape[2] * x.shape[3])


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Any]:
    """Minimum, median and maximum of each, all of them run in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return {
        name: {"min": min(t), "median": statistics.median(t), "max": max(t)}
        for name, t in times.items()
    }


def peak_extra_bytes(run: Callable[[], Tensor]) -> int:
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = run()
    profiler: Any = trace.profiler
    events = profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes)) - result.nbytes


def largest_difference(x: Tensor, kernel: int) -> float:
    x = x.double()
    expected = unfold_per_example(x, kernel, 1)
    ours = patch_second_moment(x, kernel, padding="SAME")
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def measure(shape: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    channels, size, kernel, batch = shape
    torch.manual_seed(0)
    x = torch.randn(batch, channels, size, size).relu()
    ours = functools.partial(patch_second_moment, x, kernel, padding="SAME")
    baselines: dict[str, Callable[[], object]] = {
        f"{unfold.__name__}[{chunk}]": functools.partial(unfold, x, kernel, chunk)
        for unfold in (unfold_per_chunk, unfold_per_example)
        for chunk in CHUNKS
    }
    rough = in_turn(baselines, 1)
    fastest = sorted(rough, key=lambda name: rough[name]["min"])[:3]
    runs = {"ours": ours} | {name: baselines[name] for name in fastest}
    times = in_turn(runs, repeats)
    best = min(fastest, key=lambda name: times[name]["median"])
    sizes = {"kernel_size": kernel, "stride": 1, "dilation": 1}
    conv = patch_moments._describe(x, sizes, "SAME", 1, "zeros")
    return {
        "shape": shape,
        "method": patch_moments._choose(conv, "auto"),
        "ours": times["ours"],
        "unfold": times[best],
        "unfold_variant": best,
        "ratio": times[best]["median"] / times["ours"]["median"],
        "extra_bytes": peak_extra_bytes(ours),
        "unfolded_bytes": x.nbytes * kernel**2,
        "difference": largest_difference(x, kernel),
    }


def matmul_rate() -> float:
    """Multiply-adds per millisecond of a large matmul into a reused matrix."""
    n = 2048
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    run = functools.partial(torch.mm, a, b, out=out)
    return float(n**3 / in_turn({"mm": run}, 7)["mm"]["median"])


def show(row: dict[str, Any]) -> None:
    def span(times: dict[str, float]) -> str:
        return "/".join(f"{times[key]:.1f}" for key in ("min", "median", "max"))

    channels, size, kernel, batch = row["shape"]
    print(
        f"{f'{batch}x{channels}x{size}x{size} k{kernel}':18} {row['method']:6} "
        f"{span(row['ours']):>22} {span(row['unfold']):>24} {row['ratio']:6.1f}x "
        f"{row['extra_bytes'] / 2**20:7.1f} {row['unfolded_bytes'] / 2**20:8.1f} "
        f"{row['extra_bytes'] / row['unfolded_bytes']:6.3f} {row['difference']:9.1e}  "
        f"{row['unfold_variant']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="four small shapes")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    arguments = parser.parse_args()
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    print(" ".join(f"{key}={value}" for key, value in machine.items()))
    print(
        f"{'shape':18} {'auto':6} {'ms min/median/max':>22} "
        f"{'unfold ms':>24} {'ratio':>7} {'MB':>7} {'unfolded':>8} {'share':>6} "
        f"{'diff f64':>9}  best unfold [examples per chunk]"
    )
    rows = []
    for shape in QUICK if arguments.quick else SHAPES:
        rows.append(measure(shape, 3 if arguments.quick else arguments.repeats))
        show(rows[-1])
    ratio = math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows))
    share = max(row["extra_bytes"] / row["unfolded_bytes"] for row in rows)
    difference = max(row["difference"] for row in rows)
    print(
        f"geometric mean {ratio:.2f}x, memory {share:.3f} of the patches at most, "
        f"difference {difference:.1e} at most"
    )

    rate = matmul_rate()
    row = next(row for row in rows if row["shape"][:3] == (64, 32, 3))
    channels, size, _, batch = row["shape"]
    ours = row["ours"]["median"]
    floor = 13 * channels**2 * batch * size**2 / rate
    print(
        f"{channels} channels {size}x{size} k3 batch {batch}: {ours:.1f} ms, "
        f"{ours / floor:.2f} times the {floor:.1f} ms of 13 C² N H W multiply-adds at "
        f"the {rate / 1e6:.1f} G/s of a matmul"
    )
    if arguments.json:
        report = {
            "command": sys.argv,
            "machine": machine,
            "rows": rows,
            "geometric_mean": ratio,
            "multiply_adds_per_ms": rate,
            "floor_ms": floor,
        }
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
