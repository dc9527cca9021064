"""Tune the rivals, or K-FAC: twelve trials for each on each task, by successive halving.

    python benchmarks/tune_rivals.py --data-dir DIR [--tasks T1 ...] [--rivals AdamW ...]

Twelve random settings of the rival's space (`rivals.py`), drawn with a seed, train for a
part of the task's step budget; the best three go on, the best of these goes on to the end.
Best is the lowest training loss on the fixed cases. The parts are an eighth and a third of
the budget; on the tasks with a plateau, where early losses say little, a third and two.
Steps decide, not seconds, so that a busy machine changes nothing; `--seconds` ends a trial
that takes longer in processor time all the same, and the table shows it. `--rivals K-FAC`
tunes K-FAC in the same way, in the space of `kfac_setup.py` and its own step budget. Every
trial is written to `results/trials.json`; those of other tasks and rivals are kept there.
`steps_to_target.py` takes its settings from the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kfac_setup import UNTUNED as KFAC, tuned_kfac
from rivals import RIVALS, Rival, Settings
from runs import Run, machine, write_json
from tasks import TASKS, Task, load_task

TRIALS, SEED = 12, 0
EVERY = 10  # steps between evaluations
EVERY_OF_KFAC = 5
# A part of the budget, and how many trials are kept after it.
RUNGS = ((1 / 8, 3), (1 / 3, 1), (1.0, 1))
PLATEAU_RUNGS = ((1 / 3, 3), (2 / 3, 1), (1.0, 1))
PLATEAU = ("T2", "T3")
OUT = Path(__file__).parent / "results" / "trials.json"


def tune(
    task: Task, name: str, trials: int = TRIALS, seconds: float = math.inf
) -> dict[str, Any]:
    """Try settings of a rival on a task; the first entry of "trials" is the best."""
    rival = tuned_kfac(task) if name == KFAC else RIVALS[name]
    budget = task.kfac_steps if name == KFAC else task.rival_steps
    every = EVERY_OF_KFAC if name == KFAC else EVERY
    drawn = rival.draw(task.kfac_loss, trials, SEED)
    racing = [
        (settings, Run(task, partial(_make, rival, settings), SEED, every))
        for settings in drawn
    ]
    ended = []
    for part, kept in PLATEAU_RUNGS if task.name in PLATEAU else RUNGS:
        for settings, run in racing:
            run.train(round(part * budget), seconds)
            print(task.name, name, dict(settings), run.steps, run.loss, file=sys.stderr)
        racing.sort(key=lambda pair: final_loss(pair[1]))
        ended = racing[kept:] + ended
        racing = racing[:kept]
    best = racing[0][1]
    rows = [row(settings, run, task) for settings, run in racing + ended]
    return {
        "budget": budget,
        "target": task.target,
        "best_curve": [[steps, float(f"{x:.5g}")] for steps, *_, x in best.curve],
        "best": rows[0]["settings"],
        "trials": rows,
    }


def final_loss(run: Run) -> float:
    """What sorts the better trial first."""
    return run.loss if run.alive else math.inf


def row(settings: Settings, run: Run, task: Task) -> dict[str, Any]:
    """A trial as it is written."""
    hit = run.reached(task.target)
    return {
        "settings": dict(settings),
        "steps": run.steps,
        "loss": run.loss if math.isfinite(run.loss) else None,
        "diverged": not run.alive,
        "failure": run.failure,
        "steps_to_target": hit and hit[0],
        "wall": round(run.wall, 2),
        "cpu": round(run.cpu, 2),
        "curve": thinned(run.curve),
    }


def thinned(curve: list[tuple[int, float, float, float]], number: int = 12) -> list[Any]:
    """Some rows of a curve, `[steps, loss]`, the last among them."""
    every = max(1, math.ceil(len(curve) / number))
    rows = curve[::-1][::every][::-1]
    return [[steps, float(f"{loss:.5g}")] for steps, *_, loss in rows if loss < math.inf]


def _make(rival: Rival, settings: Settings, model: torch.nn.Module) -> Any:
    return rival.make(model, settings)


def main() -> None:
    """Run the trials and write the table, rival by rival."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--rivals", nargs="+", choices=(*RIVALS, KFAC), default=list(RIVALS)
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for task_name in arguments.tasks:
        task = load_task(task_name, arguments.data_dir)
        for name in arguments.rivals:
            found = tune(task, name, arguments.trials, arguments.seconds)
            found |= {"machine": machine(), "date": time.strftime("%Y-%m-%d")}
            store(arguments.out, task_name, name, found)


def store(path: Path, task: str, rival: str, found: dict[str, Any]) -> None:
    """Put a result into the table, which keeps the others."""
    table = json.loads(path.read_text()) if path.exists() else {"seed": SEED, "tasks": {}}
    table["tasks"].setdefault(task, {})[rival] = found
    write_json(path, table)


if __name__ == "__main__":
    main()
