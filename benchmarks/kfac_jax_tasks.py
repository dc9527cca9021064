"""Steps and seconds to the targets of T2, T4 and T6: ours with nothing set, and kfac-jax.

    OMP_NUM_THREADS=1 python benchmarks/kfac_jax_tasks.py --data-dir DIR --peer-python PATH

`PATH` is an interpreter that has kfac-jax 0.0.8 and JAX 0.7.2; `peers/kfac_jax_tasks.py` is
what it runs, with torch's weights, batches and fixed cases, so that both start and go on
alike. *Untuned* is the package's adaptive recipe with the initial damping of its README, 1;
*tuned* the same with the best of `--dampings` on one other seed: the fewest steps to the
target, or the lowest loss. Its burn-in, five batches, counts in seconds and not in steps.
All is compiled in a rehearsal before any run, and is not counted. Steps are taken in turn,
one of each; a run ends at its target or after twice K-FAC's budget. Seconds are processor
time on one thread. On T4 a step of its recipe takes a hundred times ours, so T4 has to be
asked for, best with `--statistics-every 5 --seeds 1 --dampings`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kfac_setup import make_kfac
from runs import Run, machine, write_json
from steps_to_target import spread
from tasks import Task, load_task

TASKS = ("T2", "T4", "T6")
README_DAMPING = 1.0
DAMPINGS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 150.0)
BURN_IN = 5  # as in the recipe
OURS, UNTUNED, TUNED = "K-FAC", "kfac-jax, untuned", "kfac-jax, tuned"
HERE = Path(__file__).parent
PEER = HERE / "peers" / "kfac_jax_tasks.py"


def start_of(task: Task, seed: int) -> dict[str, np.ndarray]:
    """A seed's parameters, as `p:name`, and its first batches, as `x0`, `y0`, `x1`."""
    model = task.make_model(seed)
    entries = {f"p:{name}": p.detach().numpy() for name, p in model.named_parameters()}
    batches = task.batches(seed)
    for i in range(BURN_IN):
        x, y = next(batches)
        entries |= {f"x{i}": x.numpy(), f"y{i}": y.numpy()}
    return entries


class Peer:
    """kfac-jax on a task in an interpreter of its own, compiled."""

    def __init__(self, task: Task, python: str, recipe: dict[str, Any]) -> None:
        hidden = ("PYTHONPATH", "VIRTUAL_ENV")
        environment = {k: v for k, v in os.environ.items() if k not in hidden}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, str(PEER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        x, y = (tensor.numpy() for tensor in task.train_cases)
        given = {"task": task.name, "recipe": json.dumps(recipe), "x": x, "y": y}
        self.about = self.ask("start", **given, **start_of(task, 0))

    def ask(self, do: str, **entries: Any) -> Any:
        """Send a frame and wait for its answer."""
        assert self.process.stdin
        assert self.process.stdout
        frame = io.BytesIO()
        np.savez(frame, do=do, **entries)
        data = frame.getvalue()
        self.process.stdin.write(len(data).to_bytes(8, "little") + data)
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self.process.communicate(b"")


class PeerRun:
    """A run of the peer, with what `Run` has of a run: `train`, `reached`, `curve`."""

    def __init__(self, task: Task, peer: Peer, damping: float, seed: int) -> None:
        self.task, self.peer = task, peer
        peer.ask("begin", damping=damping, seed=seed, **start_of(task, seed))
        self.batches = task.batches(seed)
        self.steps, self.cpu, self.compiled = 0, 0.0, 0.0
        self.curve: list[tuple[int, float, float]] = []
        self.damping = damping

    @property
    def loss(self) -> float:
        """The last one."""
        return self.curve[-1][-1]

    @property
    def alive(self) -> bool:
        """Whether it has not diverged."""
        return not self.curve or self.loss < 10 * self.curve[0][-1]

    def train(self, until: int) -> None:
        """Go on until so many steps."""
        while self.alive and self.steps < until:
            x, y = next(self.batches)
            answer = self.peer.ask("step", x=x.numpy(), y=y.numpy())
            self.steps += 1
            self.cpu += answer["cpu"]
            self.compiled += answer["compiled"]
            self.damping = answer["damping"]
            self.curve.append((self.steps, round(self.cpu, 3), answer["loss"]))

    def reached(self, target: float) -> tuple[int, float] | None:
        """Steps and seconds at the first loss at or under a target."""
        for steps, cpu, loss in self.curve:
            if loss <= target:
                return steps, cpu
        return None


def row(run: Any, seed: int) -> dict[str, Any]:
    """A run as it is written."""
    hit = run.reached(run.task.target)
    finite = run.loss < float("inf")
    found = {
        "seed": seed,
        "steps_to_target": hit and hit[0],
        "cpu_to_target": hit and round(hit[-1], 2),
        "steps": run.steps,
        "cpu": round(run.cpu, 2),
        "loss": float(f"{run.loss:.5g}") if finite else None,
        "curve": [[row[0], row[-2], float(f"{row[-1]:.5g}")] for row in run.curve],
    }
    if isinstance(run, PeerRun):
        found |= {"end_damping": run.damping, "compiled": round(run.compiled, 2)}
    return found


def race(runs: list[Any], cap: int) -> None:
    """Take steps in turn, until each run is at its target, ended or at the cap."""
    for until in range(1, cap + 1):
        for run in runs:
            if run.reached(run.task.target) is None:
                run.train(until)


def trial(task: Task, peer: Peer, damping: float, seed: int) -> dict[str, Any]:
    """Try an initial damping for K-FAC's budget."""
    run = PeerRun(task, peer, damping, seed)
    race([run], task.kfac_steps)
    found = row(run, seed)
    del found["curve"]
    print(task.name, "initial damping", damping, found, file=sys.stderr)
    return {"initial_damping": damping, **found}


def better(found: dict[str, Any]) -> tuple[float, float]:
    """What sorts the better trial first."""
    steps, loss = found["steps_to_target"], found["loss"]
    infinite = float("inf")
    return infinite if steps is None else steps, infinite if loss is None else loss


def ours(task: Task, seed: int) -> Run:
    """K-FAC with nothing set."""
    run = Run(task, partial(make_kfac, task), seed, every=1)
    run.optimizer.estimator.seed = seed
    return run


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| task | method | initial damping | steps | seconds | ms per step | loss |"]
    lines.append("| --- " * 7 + "|")
    for name, entry in found.items():
        head = f"{name}, {entry['target']:g}"
        for method, runs in entry["methods"].items():
            column = {key: [run[key] for run in runs] for key in runs[0]}
            damping = entry["dampings"].get(method)
            # The first step has the burn-in, or the first statistics of the whole batch.
            later = [
                1e3 * (run["cpu"] - first(run)) / max(run["steps"] - 1, 1) for run in runs
            ]
            cells = (
                head,
                method,
                "" if damping is None else f"{damping:g}",
                spread(column["steps_to_target"], 0),
                spread(column["cpu_to_target"], 1),
                spread(later, 0),
                spread(column["loss"], 3 if entry["target"] < 10 else 1),
            )
            lines.append("| " + " | ".join(cells) + " |")
            head = ""
    return "\n".join(lines) + "\n"


def first(run: dict[str, Any]) -> float:
    """The seconds of a run's first step."""
    return next(cpu for steps, cpu, _ in run["curve"] if steps == 1)


def compare(task: Task, peer: Peer, arguments: argparse.Namespace) -> dict[str, Any]:
    """The trials and the runs of a task."""
    trials = [
        trial(task, peer, damping, arguments.trial_seed) for damping in arguments.dampings
    ]
    dampings = {UNTUNED: README_DAMPING}
    if trials:
        dampings[TUNED] = min(trials, key=better)["initial_damping"]
    methods: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, *dampings)}
    for seed in arguments.seeds:
        for name, damping in dampings.items():
            if name == TUNED and damping == README_DAMPING:
                methods[TUNED].append(methods[UNTUNED][-1])
                continue
            runs: list[Any] = [PeerRun(task, peer, damping, seed)]
            runs += [ours(task, seed)] if name == UNTUNED else []
            race(runs, arguments.cap or 2 * task.kfac_steps)
            for method, run in zip((name, OURS), runs, strict=False):
                methods[method].append(row(run, seed))
        print(task.name, "seed", seed, "done", file=sys.stderr)
    return {
        "title": task.title,
        "target": task.target,
        "rehearsal seconds": round(peer.about["rehearsal"], 1),
        "registered": peer.about["registered"],
        "trials": trials,
        "dampings": dampings,
        "methods": methods,
    }


def main() -> None:
    """Run, write after each task, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--peer-python", required=True, help="one that has kfac-jax")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["T2", "T6"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--dampings", nargs="*", type=float, default=list(DAMPINGS))
    parser.add_argument("--trial-seed", type=int, default=0)
    parser.add_argument("--cap", type=int, help="steps of a run at most")
    parser.add_argument(
        "--statistics-every",
        type=int,
        default=1,
        help="the peer's curvature_update_period, 1 in its recipe",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "kfac_jax_tasks.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out: Path = arguments.out
    report = json.loads(out.read_text()) if out.exists() else {"tasks": {}}
    for name in arguments.tasks:
        task = load_task(name, arguments.data_dir)
        every = arguments.statistics_every
        peer = Peer(task, arguments.peer_python, {"curvature_update_period": every})
        key = name if every == 1 else f"{name}, its statistics every {every}th step"
        report["tasks"][key] = compare(task, peer, arguments)
        peer.close()
        report |= {
            "machine": machine(),
            "versions": peer.about["versions"],
            "recipe": peer.about["recipe"],
            "date": time.strftime("%Y-%m-%d"),
        }
        write_json(out, report)
    print(table(report["tasks"]))


if __name__ == "__main__":
    main()
