"""What `torch.compile` gains in a step of K-FAC with nothing set: part by part, and whole.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py --data-dir DIR

Parts: the calls of each hot part in six steps of a run, a whole period, are taken down with
their arguments, and made again as they are and compiled (`torch.compile(dynamic=False)`,
inductor, one function for each shape), in turn. Medians of processor time, summed over the
calls, per step; the gain is beside the processor time of the step itself. Compilation is of
the wall clock, with an empty cache on the disk.

Steps: twins train in turn on the same batches, as in `step_cost.py`, one of them after
`compile_forward_mode` ("forward mode"), as `KFAC(torch.compile(model), loss)`, whose passes
that are the user's are then compiled ("model"), or both. The ratio is that of the sums of
processor time after the first steps, those left out in which something is compiled;
compilation is what the twin takes longer in all of these, by the wall clock. Medians
[min-max] of the seeds.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from runs import machine, write_json
from step_cost import middle
from tasks import Task, load_task
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from kfac_torch import KFAC, compile_forward_mode, quadratic_model, updates
from kfac_torch.compiled import CompiledRerun
from kfac_torch.fisher_blocks import FisherBlock
from kfac_torch.fisher_blocks.kronecker import KroneckerProductFB
from kfac_torch.fisher_factors import FisherFactor, conv, linear
from kfac_torch.fisher_factors.linear import rows_moment
from kfac_torch.gradient_noise import GradientNoise
from kfac_torch.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    MultiBernoulliNegativeLogProbLoss,
)
from kfac_torch.patch_moments import patch_second_moment
from kfac_torch.quadratic_model import products
from kfac_torch.replay import rerun
from kfac_torch.tangents import Dual, one_pass

RESULTS = Path(__file__).parent / "results" / "compiled.json"
TASKS = ("T1", "T2", "T4", "T6")
KINDS = ("forward mode", "model", "both")
FIRST, PERIOD = 16, 6  # steps that are not counted; those whose calls are taken down
LAST = FIRST + 2 * PERIOD
STEPS = 76
REPEATS = 25
PASS, PRODUCTS, PATCHES = "forward mode", "inner products", "moments of patches"

Call = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""A part, a function of tensors that does the same, and its arguments."""


# The parts: what is called, and the same as a function of tensors.


def of_loss(part: str, method: str) -> Callable[..., Call]:
    """A method of the loss, at its inputs."""

    def call(loss: Any, *tensors: Any) -> Call:
        kind = type(loss)

        def function(z: Tensor, *given: Any) -> Any:
            return getattr(kind(z), method)(*given)

        return part, function, (loss.inputs.detach(), *tensors)

    return call


def average(noise: GradientNoise, grads: list[Tensor], known: list[Tensor]) -> Call:
    """The average of gradients."""

    def function(fraction: Tensor, grads: list[Tensor], known: list[Tensor]) -> Any:
        return GradientNoise(fraction).averaged(grads, known)

    return "average of gradients", function, (noise.fraction, grads, known)


def inner_products(directions: Any, others: Any = None) -> Call:
    """The inner products of directions and gradients."""
    return PRODUCTS, products, (directions, others)


def products_by_formula(directions: Any, others: Any = None) -> Tensor:
    """What `products` returns, in operations that `torch.compile` knows."""
    rows = [
        torch.stack(
            [
                sum(((a * b).sum() for a, b in zip(d, e, strict=True)), torch.zeros(()))
                for e in (directions if others is None else others)
            ]
        )
        for d in directions
    ]
    return torch.stack(rows).double()


def natural_gradient(block: FisherBlock, tensors: Any, exp: float) -> Call | None:
    """`A⁻¹ V G⁻¹` of one layer."""
    if not isinstance(block, KroneckerProductFB):
        return None
    sides = zip(block._sides(), block._damping_funcs(), strict=True)
    inverses = [factor.get_matpower(exp, damping) for factor, damping in sides]
    if any(inverse.dim() != 2 for inverse in inverses):
        return None

    def function(A: Tensor, G: Tensor, tensors: Sequence[Tensor]) -> Any:
        parts = block.vector_to_params(A @ block.params_to_vector(tensors) @ G)
        return [part.contiguous() for part in parts]

    return "natural gradient", function, (*inverses, list(tensors))


def moment(rows: Tensor, has_bias: bool) -> Call:
    """The second moment of a linear layer's rows."""
    return "moments of rows", rows_moment, (rows, has_bias)


def patches(*args: Any, **options: Any) -> Call:
    """The second moment of a convolution's patches."""

    def function(x: Tensor) -> Any:
        return patch_second_moment(x, *args[1:], **options)

    return PATCHES, function, args[:1]


def running_average(factor: FisherFactor, cov: Tensor, *_: Any) -> Call:
    """The moving average of a factor."""
    return "averages of factors", torch.lerp, (factor._stored_cov(), cov, 0.15)


LOSSES = {
    "bernoulli": MultiBernoulliNegativeLogProbLoss,
    "categorical": CategoricalLogitsNegativeLogProbLoss,
}


def targets(task: Task) -> list[tuple[Any, str, Callable[..., Call | None]]]:
    """Where the parts are."""
    loss, transpose = LOSSES[task.kfac_loss], "multiply_fisher_factor_transpose"
    return [
        (loss, "value_from_gradient", of_loss("value of the loss", "value_from_gradient")),
        (loss, "change_from_gradient", of_loss("its change", "change_from_gradient")),
        (loss, transpose, of_loss("Fisher at the output", transpose)),
        (GradientNoise, "averaged", average),
        (updates, "products", inner_products),
        (quadratic_model, "products", inner_products),
        (FisherBlock, "multiply_tensors", natural_gradient),
        (FisherFactor, "accumulate", running_average),
        (linear, "rows_moment", moment),
        (conv, "patch_second_moment", patches),
    ]


def noting(calls: list[Call], function: Any, make: Callable[..., Call | None]) -> Any:
    """The function, which notes its calls."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        call = make(*args, **kwargs)
        if call is not None:
            calls.append((*call[:2], kept(call[2])))
        return function(*args, **kwargs)

    return noted


def noting_passes(calls: list[Call]) -> Any:
    """`rerun`, which notes the passes of the quadratic model."""

    def noted(model: nn.Module, args: Any, kwargs: Any) -> Any:
        def forward(params: Any) -> Any:
            values = {name: dual.value for name, dual in params.items()}
            along = {name: list(dual.tangents) for name, dual in params.items()}
            given = kept((args, dict(kwargs), values, along))
            calls.append((PASS, functools.partial(pushed, rerun, model), given))
            return rerun(model, args, kwargs)(params)

        return forward

    return noted


def pushed(
    way: Any, model: nn.Module, args: Any, kwargs: Any, values: Any, along: Any
) -> Any:
    """The tangents of what the network returns."""
    with one_pass() as current:
        duals = {name: Dual(v, along[name], current) for name, v in values.items()}
        return way(model, args, kwargs)(duals).stacked()


def kept(args: Any) -> Any:
    """The arguments as they are now; what lies in memory in another order stays there."""

    def keep(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone() if x.is_contiguous() else x.detach()

    return pytree.tree_map(keep, args)


# Measuring.


def shapes(call: Call) -> tuple[Any, ...]:
    """What a compiled function is made for."""
    part, _, args = call
    leaves = pytree.tree_leaves(args)
    return part, *((x.shape, x.stride()) if isinstance(x, Tensor) else x for x in leaves)


def compiled(call: Call) -> Callable[..., Any]:
    """The same, compiled."""
    part, function, args = call
    torch.compiler.reset()
    if part == PASS:
        return functools.partial(pushed, CompiledRerun("inductor"), *function.args[1:])
    if part == PATCHES:  # what dynamo does not follow, traced
        function = make_fx(function)(*args)
    function = products_by_formula if part == PRODUCTS else function
    return torch.compile(function, dynamic=False, fullgraph=True)


def in_turn(functions: Sequence[Callable[..., Any]], args: Any) -> list[float]:
    """Median milliseconds of processor time of each."""
    spent: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for times, function in zip(spent, functions, strict=True):
            start = time.process_time()
            function(*args)
            times.append(time.process_time() - start)
    return [1e3 * statistics.median(times) for times in spent]


@torch.no_grad()
def measure(calls: list[Call]) -> dict[str, dict[str, float]]:
    """Milliseconds per step of every part, eager and compiled."""
    groups: dict[Any, list[Call]] = {}
    for call in calls:
        groups.setdefault(shapes(call), []).append(call)
    rows: dict[str, dict[str, float]] = {}
    for same in groups.values():
        part, function, args = same[0]
        names = ("calls", "eager", "compiled", "seconds", "functions", "error")
        row = rows.setdefault(part, dict.fromkeys(names, 0.0))
        other = compiled(same[0])
        start = time.perf_counter()
        found = other(*args)
        row["seconds"] += time.perf_counter() - start
        row["error"] = max(row["error"], difference(found, function(*args)))
        share = len(same) / PERIOD
        for name, ms in zip(names[1:3], in_turn([function, other], args), strict=True):
            row[name] += share * ms
        row["calls"] += share
        row["functions"] += 1
    return {
        part: {k: float(f"{v:.3g}") for k, v in row.items()} for part, row in rows.items()
    }


def difference(found: Any, expected: Any) -> float:
    """The largest, relative to the largest number."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
    return max(float((a - b).abs().max() / (b.abs().max() + 1e-30)) for a, b in pairs)


def parts(task: Task) -> dict[str, Any]:
    """All parts of a task's steps, and the processor time of a step."""
    model = task.make_model(1)
    optimizer = KFAC(model, task.kfac_loss)
    calls, spent = list[Call](), list[float]()
    with ExitStack() as stack:
        for step, (x, y) in enumerate(itertools.islice(task.batches(1), LAST)):
            if step == FIRST + PERIOD:
                for owner, name, make in targets(task):
                    noted = noting(calls, getattr(owner, name), make)
                    stack.enter_context(mock.patch.object(owner, name, noted))
                optimizer._updates.rerun = noting_passes(calls)
            start = time.process_time()
            optimizer.zero_grad()
            task.training_loss(model, x, y).backward()
            optimizer.step()
            if FIRST <= step < FIRST + PERIOD:
                spent.append(time.process_time() - start)
    optimizer.close()
    return {
        "step_ms": round(1e3 * sum(spent) / len(spent), 2),
        "parts": measure(calls),
    }


def steps(task: Task, kind: str, seed: int) -> dict[str, Any]:
    """Train twins in turn, one compiled; milliseconds per step, seconds of compilation."""
    torch.compiler.reset()
    models: list[Any] = [task.make_model(seed) for _ in range(2)]
    if kind in ("model", "both"):
        models[1] = torch.compile(models[1])
    optimizers = [KFAC(model, task.kfac_loss) for model in models]
    first = [0.0, 0.0]
    if kind in ("forward mode", "both"):
        start = time.perf_counter()
        compile_forward_mode(optimizers[1])
        first[1] += time.perf_counter() - start
    passes: Any = optimizers[1]._updates.rerun
    spent, losses, counted, known = [0.0, 0.0], [0.0, 0.0], 0, 0
    for step, (x, y) in enumerate(itertools.islice(task.batches(seed), STEPS)):
        cpu, wall = [0.0, 0.0], [0.0, 0.0]
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            cpu[i], wall[i] = -time.process_time(), -time.perf_counter()
            optimizer.zero_grad()
            loss = task.training_loss(model, x, y)
            loss.backward()
            optimizer.step()
            losses[i] = loss.item()
            cpu[i] += time.process_time()
            wall[i] += time.perf_counter()
        # Where the noise of the gradient is negligible the passes have a new shape.
        number = getattr(passes, "num_graphs", 0)
        compiles, known = number > known, number
        if step < FIRST or compiles:
            first = [a + b for a, b in zip(first, wall, strict=True)]
        else:
            spent = [a + b for a, b in zip(spent, cpu, strict=True)]
            counted += 1
    for optimizer in optimizers:
        optimizer.close()
    return {
        "seed": seed,
        "ratio": round(spent[1] / spent[0], 3),
        "ms": [round(1e3 * seconds / counted, 2) for seconds in spent],
        "seconds": round(first[1] - first[0], 1),
        "functions": known,
        "refusal": getattr(passes, "refusal", None),
        "losses": losses,
    }


def print_tables(report: dict[str, Any]) -> None:
    """Both tables in Markdown."""
    print("| task | part | calls | eager ms | compiled ms | gain | compilation, s |")
    print("| --- " * 7 + "|")
    for name, found in report["parts"].items():
        for part, row in found["parts"].items():
            gain = 100 * (row["eager"] - row["compiled"]) / found["step_ms"]
            print(f"| {name} | {part} | {row['calls']:.1f} | {row['eager']:.2f} ", end="")
            print(f"| {row['compiled']:.2f} | {gain:+.1f} % | {row['seconds']:.0f} |")
    print("\n| task | compiled | ms | compiled ms | ratio | compilation, s |")
    print("| --- " * 6 + "|")
    for name, runs in report["steps"].items():
        task, _, kind = name.partition(" ")
        ms = [statistics.median(run["ms"][i] for run in runs) for i in range(2)]
        print(f"| {task} | {kind} | {ms[0]:.1f} | {ms[1]:.1f} ", end="")
        seconds = middle([run["seconds"] for run in runs], 0)
        print(f"| {middle([run['ratio'] for run in runs])} | {seconds} |")


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--parts", nargs="+", choices=["parts", "steps"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = arguments.out
    report = json.loads(out.read_text()) if out.exists() else {"parts": {}, "steps": {}}
    report |= {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
    todo = arguments.parts or ["parts", "steps"]
    for name in arguments.tasks if "parts" in todo else ():
        with empty_cache():
            report["parts"][name] = parts(load_task(name, arguments.data_dir))
        write_json(out, report)
    for kind, name in itertools.product(arguments.kinds, arguments.tasks):
        if "steps" in todo:
            task, runs = load_task(name, arguments.data_dir), list[Any]()
            report["steps"][f"{name} {kind}"] = runs
            for seed in arguments.seeds:
                with empty_cache():
                    runs.append(steps(task, kind, seed))
                write_json(out, report)
    print_tables(report)


@contextmanager
def empty_cache() -> Iterator[None]:
    """Let nothing that was compiled before be found on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": folder}):
            yield


if __name__ == "__main__":
    main()
