"""The demo: K-FAC beside tuned SGD and AdamW, a table and a report.

`tasks.py` has the two tasks and every optimizer's settings, `training.py` the loop and
the clock, `data.py` the images, `console.py` what is shown on the way.
"""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path

from ..diagnostics import factor_spectra
from ..optimizer import KFAC
from ..report import TaskResult, verdicts, write_report
from .console import Console
from .data import DATA_NAMES as DATA_NAMES, DemoError as DemoError, load_data
from .tasks import KFAC_FIXED, OPTIMIZERS, Task, make_tasks
from .training import Run, race, warm_up


def run_demo(
    data: str = "digits",
    data_dir: Path | None = None,
    out: Path = Path("report.html"),
    seed: int = 0,
    scale: float = 1.0,
) -> list[TaskResult]:
    """Train both tasks with every optimizer, print the table and write the report.

    Args:
        data: one of `DATA_NAMES`.
        data_dir: the folder of the IDX files; the digits need none.
        out: where the report goes.
        seed: of the split, the initial weights and the batches.
        scale: of all step budgets.

    Raises:
        DemoError: something the user has to change.
    """
    _check(out)
    console = Console()
    tasks = make_tasks(load_data(data, data_dir, seed))
    results = [_run_task(task, seed, scale, console) for task in tasks]
    console.line("")
    console.table(results)
    for line in verdicts(results):
        console.line(line)
    notes = _notes(data)
    console.line(notes[0])
    try:
        write_report(out, results, command=_command(data, data_dir, seed), notes=notes)
    except OSError as error:
        raise DemoError(f"{out}: the report cannot be written: {error}") from error
    console.line(f"report: {out.resolve()}")
    return results


def _run_task(task: Task, seed: int, scale: float, console: Console) -> TaskResult:
    runs = [
        Run(
            task,
            name,
            task.settings[name],
            seed,
            max(2, round(scale * task.budget[name])),
        )
        for name in OPTIMIZERS
    ]
    console.line(f"{task.title}, to a training loss of {task.target:g}")
    warm_up(runs)
    with console.progress(runs) as on_step:
        race(runs, on_step)
    kfac = runs[0].optimizer
    assert isinstance(kfac, KFAC)
    return TaskResult(
        task.name,
        task.title,
        _details(task),
        task.target,
        task.test_metric,
        [run.finish() for run in runs],
        factor_spectra(kfac),
    )


def _details(task: Task) -> str:
    data = task.data
    numbers = sum(p.numel() for p in task.make_model().parameters())
    batch = "all of them in every step" if task.batch_size is None else task.batch_size
    loss = "Cross-entropy"
    if task.name == "autoencoder":
        loss = "Bernoulli loss, summed over pixels"
    return (
        f"{loss}, mean over cases; {numbers} parameters; {len(data.x)} training cases of "
        f"{data.name}, batch: {batch}; {len(data.x_test)} test cases; target: a training "
        f"loss of {task.target:g}."
    )


def _notes(data: str) -> list[str]:
    fixed = ", ".join(f"{key} {value}" for key, value in KFAC_FIXED.items())
    tuned = (
        "Settings were tuned on this data with seed 0, 24 counted trials for every "
        "optimizer, but K-FAC had about 150 pilot runs before them and the rivals 50, and "
        "the targets were moved after a first tuning: docs/benchmarks.md of the source "
        "says how, and what the ratios are at other targets."
        if data == "digits"
        else f"Settings were NOT tuned on {data}, for no optimizer: they were set by hand "
        "after one to four runs of each on Fashion-MNIST."
    )
    return [
        tuned,
        "The clock runs during training steps only (batch, schedules, forward, backward, "
        "step); evaluation is off it.",
        "All optimizers start from the same weights and see the same batches. They take "
        "turns: the one that has used the least time steps next.",
        "A cosine takes the learning rate to zero over the step budget, warm_up raises it "
        "over the first 2 % of it; K-FAC's damping goes geometrically to damping_end.",
        f"Of K-FAC, if not stated otherwise: {fixed}. AdamW has no weight decay.",
        "One run per optimizer: seconds vary with the machine, steps hardly.",
    ]


def _command(data: str, data_dir: Path | None, seed: int) -> str:
    command = ["kfac-torch", "demo", "--data", data]
    if data_dir is not None:
        command += ["--data-dir", str(data_dir)]
    return shlex.join([*command, "--seed", str(seed)])


def _check(out: Path) -> None:
    """Find out before the training what would fail after it."""
    if find_spec("matplotlib") is None:
        raise DemoError(
            "the report needs matplotlib, which is not installed: "
            "pip install 'kfac-torch[demo]'"
        )
    if out.is_dir():
        raise DemoError(f"--out {out}: expected the name of a file, got a folder")
