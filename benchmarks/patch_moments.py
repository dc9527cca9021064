"""Second moment of convolution patches against unfolding, and against other libraries.

    OMP_NUM_THREADS=1 python benchmarks/patch_moments.py [--repeats N] [--quick]
        [--parts PART ...] [--json FILE] [--peer-python NAME=PATH ...]

Baseline: the patches unfolded, whole or a few examples at a time, then a matmul into one
accumulator, in two ways (one matmul per chunk on the transposed patches, or one per
example on the patches as unfolded). The fastest two of them on this machine run in turn
with every method of `patch_second_moment`, and the best median counts.

Times are processor time of one thread, which other processes that wait for the same core
hardly touch. Peers (`lineage`, `kfac_jax`, `curvlinops`; `benchmarks/peers`) are processes
with a Python of their own, in turn with ours on the same numbers; the traces must agree.

Peak extra memory: the running sum of every allocation and release that the profiler
reports from the CPU allocator during one call, at its highest, less the bytes of the
result. Workspaces of the matmul and FFT libraries do not pass through that allocator.

Difference: largest deviation from the unfolded patches in float64, over the largest
entry.

A JSON file that is there already keeps the parts that are not measured.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers.worker import inputs as peer_inputs
from runs import machine, write_json
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kfac_torch import patch_moments
from kfac_torch.patch_geometry import describe
from kfac_torch.patch_moments import patch_second_moment, patch_view

METHODS = ("chunks", "strips", "lags", "slices")
CHUNKS = (1, 4, 16, 64)
PEERS = ("lineage", "kfac_jax", "curvlinops")


class Shape(NamedTuple):
    """A convolution of square inputs, padded so that a kernel of odd size is centred."""

    channels: int
    size: int
    kernel: int
    batch: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    dims: int = 2

    def __str__(self) -> str:
        sizes = "x".join([str(self.size)] * self.dims)
        text = f"{self.batch}x{self.channels}x{sizes} k{self.kernel}"
        named = {"s": self.stride, "d": self.dilation, "g": self.groups}
        return " ".join([text, *(f"{k}{v}" for k, v in named.items() if v > 1)])

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel // 2)


STRIDE_1 = [
    Shape(3, 32, 3, 128),
    Shape(3, 32, 5, 128),
    Shape(16, 14, 3, 128),
    Shape(16, 28, 5, 128),
    Shape(32, 28, 3, 128),
    Shape(64, 32, 3, 128),
    Shape(64, 16, 3, 128),
    Shape(128, 16, 3, 128),
    Shape(256, 8, 3, 128),
    Shape(16, 56, 3, 64),
    Shape(32, 16, 5, 128),
    Shape(64, 8, 5, 128),
]
SMALL = [
    Shape(1, 28, 5, 128),
    Shape(32, 7, 3, 128),
    Shape(16, 4, 5, 512),
    Shape(64, 4, 3, 512),
]
OTHERS = [
    Shape(16, 28, 3, 128, stride=2),
    Shape(64, 32, 3, 32, stride=2),
    Shape(64, 16, 1, 128),
    Shape(256, 8, 1, 128),
    Shape(64, 16, 1, 128, stride=2),
    Shape(3, 224, 7, 8, stride=2),
    Shape(3, 112, 7, 16, stride=2),
    Shape(64, 16, 3, 128, groups=4),
    Shape(64, 16, 3, 128, groups=64),
    Shape(32, 16, 3, 128, dilation=2),
    Shape(16, 256, 5, 64, dims=1),
    Shape(64, 64, 3, 128, dims=1),
    Shape(8, 12, 3, 16, dims=3),
]
QUICK = [STRIDE_1[0], Shape(64, 32, 3, 32), SMALL[0], OTHERS[0]]
FOR_PEERS = [
    Shape(3, 32, 3, 128),
    Shape(16, 14, 3, 128),
    Shape(32, 28, 3, 32),
    Shape(64, 16, 3, 32),
    Shape(16, 28, 3, 32, stride=2),
    Shape(64, 32, 3, 32, stride=2),
    Shape(3, 224, 7, 8, stride=2),
    Shape(256, 56, 1, 4, stride=2),
]


def unfold(x: Tensor, shape: Shape) -> Tensor:
    """Patches `[N, columns, T]`."""
    k, p, d, s = shape.kernel, shape.padding, shape.dilation, shape.stride
    if shape.dims == 2:
        return F.unfold(x, k, d, p, s)
    if shape.dims == 1:
        return F.unfold(x.unsqueeze(2), (1, k), (1, d), (0, p), (1, s))
    return patch_view(x, k, s, p, d).flatten(1 + shape.dims + 1).flatten(1, 4)


def unfold_per_chunk(x: Tensor, shape: Shape, chunk: int) -> Tensor:
    g, columns, rows = shape.groups, x.shape[1] * shape.kernel**shape.dims, 0
    moment = x.new_zeros(g, columns // g, columns // g)
    for examples in torch.split(x, chunk):
        patches = unfold(examples, shape).transpose(1, 2).reshape(-1, columns)
        patches = patches.view(-1, g, columns // g).movedim(1, 0)
        rows += patches.shape[1]
        moment.baddbmm_(patches.mT, patches)
    return moment.div_(rows)


def unfold_per_example(x: Tensor, shape: Shape, chunk: int) -> Tensor:
    g, columns, rows = shape.groups, x.shape[1] * shape.kernel**shape.dims, 0
    moment = x.new_zeros(g, columns // g, columns // g)
    for examples in torch.split(x, chunk):
        for patches in unfold(examples, shape):
            rows += patches.shape[1]
            patches = patches.view(g, columns // g, -1)
            moment.baddbmm_(patches, patches.mT)
    return moment.div_(rows)


def milliseconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def in_turn(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, Any]:
    """Minimum, median and maximum of each, all run in every round, there or back."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    order = list(runs)
    for _ in range(repeats):
        for name in order:
            times[name].append(runs[name]())
        order.reverse()  # what comes after a large unfold finds other caches
    return {
        name: {"min": min(t), "median": statistics.median(t), "max": max(t)}
        for name, t in times.items()
    }


def timed(run: Callable[..., object], *args: Any, **named: Any) -> Callable[[], float]:
    return functools.partial(milliseconds, functools.partial(run, *args, **named))


def peak_extra_bytes(run: Callable[[], Tensor]) -> int:
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = run()
    profiler: Any = trace.profiler
    events = profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes)) - result.nbytes


def moment_of(x: Tensor, shape: Shape, method: str = "auto") -> Tensor:
    sizes = (shape.kernel, shape.stride, shape.padding, shape.dilation)
    return patch_second_moment(x, *sizes, groups=shape.groups, method=method)


def chosen(x: Tensor, shape: Shape) -> str:
    sizes = {"kernel_size": shape.kernel, "stride": shape.stride}
    sizes["dilation"] = shape.dilation
    conv = describe(x, sizes, shape.padding, shape.groups, "zeros")
    return patch_moments._choose(conv, "auto")


def measure(shape: Shape, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.channels, *[shape.size] * shape.dims).relu()
    baselines = {
        f"{way.__name__}[{chunk}]": timed(way, x, shape, chunk)
        for way in (unfold_per_chunk, unfold_per_example)
        for chunk in (*CHUNKS, shape.batch)
        if chunk <= shape.batch
    }
    rough = in_turn(baselines, 1)
    fastest = sorted(rough, key=lambda name: rough[name]["min"])[:2]
    auto = chosen(x, shape)
    # A method that takes many times as long is timed once, and not in turn.
    once = {m: timed(moment_of, x, shape, m) for m in METHODS if m != auto}
    once = {m: run for m, run in once.items() if run() < 1e4}
    slow = in_turn(once, 1)
    bound = 3 * rough[fastest[0]]["min"]
    runs = {"auto": timed(moment_of, x, shape)}
    runs |= {m: once[m] for m in once if slow[m]["min"] < bound}
    times = in_turn(runs | {name: baselines[name] for name in fastest}, repeats)
    best = min(fastest, key=lambda name: times[name]["median"])
    extra = peak_extra_bytes(functools.partial(moment_of, x, shape))
    patches = unfold(x[:1], shape).numel() * len(x) * x.element_size()
    exact = moment_of(x.double(), shape)
    expected = unfold_per_example(x.double(), shape, 1).view_as(exact)
    others = {m: times.get(m, slow.get(m)) for m in METHODS if m != auto}
    return {
        "shape": shape._asdict(),
        "name": str(shape),
        "method": auto,
        "ours": times["auto"],
        "others": {m: t for m, t in others.items() if t},
        "unfold": times[best],
        "unfold_variant": best,
        "ratio": times[best]["median"] / times["auto"]["median"],
        "extra_bytes": extra,
        "unfolded_bytes": patches,
        "result_bytes": exact.nbytes // 2,
        "difference": ((exact - expected).abs().max() / expected.abs().max()).item(),
    }


def matmul_rate() -> float:
    """Multiply-adds per millisecond of a large matmul into a reused matrix."""
    n = 2048
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    times = in_turn({"mm": timed(torch.mm, a, b, out=out)}, 7)
    return float(n**3 / times["mm"]["median"])


def span(times: dict[str, float]) -> str:
    return "/".join(f"{times[key]:.1f}" for key in ("min", "median", "max"))


def show(row: dict[str, Any]) -> None:
    others = " ".join(f"{m} {t['median']:.1f}" for m, t in row["others"].items())
    print(
        f"{row['name']:22} {row['method']:6} {span(row['ours']):>22} "
        f"{span(row['unfold']):>24} {row['ratio']:6.1f}x "
        f"{row['extra_bytes'] / 2**20:7.1f} {row['unfolded_bytes'] / 2**20:8.1f} "
        f"{row['extra_bytes'] / row['unfolded_bytes']:6.3f} {row['difference']:9.1e}  "
        f"{others}  {row['unfold_variant']}",
        flush=True,
    )


class Peer:
    """A process that times another library, one turn at a time."""

    def __init__(self, name: str, python: str) -> None:
        script = Path(__file__).parent / "peers" / f"patches_{name}.py"
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(
            [python, str(script)], stderr=subprocess.DEVNULL, text=True, **pipes
        )
        self.name, self.version = name, self._answer()

    def ask(self, question: object) -> Any:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return "stopped"
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        return json.loads(line) if line else "stopped"

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def against_peers(peers: list[Peer], repeats: int) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    for shape in FOR_PEERS:
        x = torch.from_numpy(peer_inputs(shape.batch, shape.channels, shape.size))

        def ours(x: Tensor = x, shape: Shape = shape) -> Tensor:
            same = {"padding": "SAME"}
            return patch_second_moment(x, shape.kernel, shape.stride, **same)

        trace = ours().trace().item()
        for peer in peers:
            told = peer.ask(shape[:5])
            row = {"name": str(shape), "peer": peer.name, "version": peer.version}
            if isinstance(told, str):
                print(f"{shape!s:22} {peer.name}: {told}", flush=True)
                rows.append(row | {"error": told})
                continue
            if abs(told - trace) > 1e-3 * trace:
                raise SystemExit(f"{peer.name}: trace {told}, ours {trace}: {shape}")
            runs = {"ours": timed(ours), "theirs": functools.partial(peer.ask, "run")}
            row |= in_turn(runs, 1)  # a peer that takes many seconds is timed once
            if row["theirs"]["median"] < 3e3:
                row |= in_turn(runs, repeats)
            row["ratio"] = row["theirs"]["median"] / row["ours"]["median"]
            rows.append(row)
            print(
                f"{shape!s:22} {peer.name:10} {span(row['ours']):>18} "
                f"{span(row['theirs']):>26} {row['ratio']:7.1f}x  {peer.version}",
                flush=True,
            )
    return rows


def mean(ratios: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


def tables(groups: dict[str, list[Shape]], repeats: int) -> dict[str, Any]:
    """Measure and print our own shapes, by title."""
    print(
        f"{'shape':22} {'auto':6} {'ms min/median/max':>22} "
        f"{'unfold ms':>24} {'ratio':>7} {'MB':>7} {'unfolded':>8} {'share':>6} "
        f"{'diff f64':>9}  the other methods, ms; best unfold [examples per chunk]"
    )
    report = dict[str, Any]()
    for title, shapes in groups.items():
        rows = []
        for shape in shapes:
            rows.append(measure(shape, repeats))
            show(rows[-1])
        report[title] = rows
        ratios = [row["ratio"] for row in rows]
        share = max(row["extra_bytes"] / row["unfolded_bytes"] for row in rows)
        print(
            f"{title}: geometric mean {mean(ratios):.2f}x, least {min(ratios):.2f}x, "
            f"memory {share:.3f} of the patches at most, difference "
            f"{max(row['difference'] for row in rows):.1e} at most"
        )
    return report


def floor(report: dict[str, Any]) -> dict[str, float]:
    """Compare one shape with its multiply-adds at the speed of a large matmul."""
    rows = [row for title in ("stride 1", "quick") for row in report.get(title, [])]
    row = next(row for row in rows if _is_floor(Shape(**row["shape"])))
    shape, rate = Shape(**row["shape"]), matmul_rate()
    least = 13 * shape.channels**2 * shape.batch * shape.size**2 / rate
    print(
        f"{shape}: {row['ours']['median']:.1f} ms, {row['ours']['median'] / least:.2f} "
        f"times the {least:.1f} ms of 13 C² N H W multiply-adds at the {rate / 1e6:.1f} "
        "G/s of a matmul"
    )
    return {"multiply_adds_per_ms": rate, "floor_ms": least}


def beside_peers(pythons: dict[str, str], repeats: int) -> list[dict[str, Any]]:
    """Measure and print every shape with every peer that there is a Python for."""
    for name in PEERS:
        if name not in pythons:
            print(f"{name}: left out; give --peer-python {name}=PATH")
    peers = [Peer(name, python) for name, python in pythons.items()]
    rows = against_peers(peers, repeats)
    for peer in peers:
        peer.close()
        ratios = [r["ratio"] for r in rows if r["peer"] == peer.name and "ratio" in r]
        if ratios:
            print(f"{peer.name}: {min(ratios):.1f}x to {max(ratios):.1f}x")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="four small shapes")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH")
    parts = ["stride 1", "small images", "others", "peers"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    print(" ".join(f"{key}={value}" for key, value in about.items()))
    shapes = dict(zip(parts, (STRIDE_1, SMALL, OTHERS), strict=False))
    groups = {part: shapes[part] for part in arguments.parts if part in shapes}
    repeats = arguments.repeats
    if arguments.quick:
        groups, repeats = {"quick": QUICK}, 3
    out = Path(arguments.json) if arguments.json else None
    report = json.loads(out.read_text()) if out and out.exists() else {}
    report |= {"machine": about, **tables(groups, repeats)}
    if any(_is_floor(shape) for shapes in groups.values() for shape in shapes):
        report |= floor(report)
    if "peers" in arguments.parts:
        pythons = dict(text.split("=", 1) for text in arguments.peer_python)
        report["peers"] = beside_peers(pythons, min(5, arguments.repeats))
    if out:
        write_json(out, report)


def _is_floor(shape: Shape) -> bool:
    return shape[:3] == (64, 32, 3) and shape.stride == 1


if __name__ == "__main__":
    main()
