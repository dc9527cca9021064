"""The data, the tasks and the clock of the demo; its settings are the best trials."""

import gzip
import json
import struct
from pathlib import Path

import pytest
import torch

from kfac_torch.demo import run_demo
from kfac_torch.demo.data import Data, DemoError, load_data, read_idx
from kfac_torch.demo.tasks import KFAC_FIXED, OPTIMIZERS, SETTINGS, TASKS, make_tasks
from kfac_torch.demo.training import Run, batches, race

TRIALS = Path(__file__).parents[1] / "benchmarks" / "demo_trials.json"


def idx(array):
    sizes = struct.pack(f">{array.dim()}I", *array.shape)
    return bytes((0, 0, 8, array.dim())) + sizes + bytes(array.flatten().tolist())


@pytest.fixture
def folder(tmp_path):
    """Forty images of 8x8 pixels in the four files, two of them gzipped."""
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", 40), ("t10k", 10)):
        images = torch.randint(256, (n, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.arange(n, dtype=torch.uint8) % 10
        zipped = gzip.compress(idx(images))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(zipped)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def some_data(cases=12, name="digits"):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(cases, 64, generator=generator), torch.arange(cases) % 10
    return Data(name, x, y, x, y)


# IDX files.


def test_idx_round_trip(tmp_path):
    array = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "zipped").write_bytes(gzip.compress(idx(array)))
    for name in ("plain", "zipped"):
        assert torch.equal(read_idx(tmp_path / name, 3), array)


def test_idx_folder(folder):
    data = load_data("mnist", folder)
    assert data.side == 8
    assert data.x.shape == (40, 64)
    assert data.x_test.shape == (10, 64)
    assert 0 <= data.x.min() <= data.x.max() <= 1
    assert data.y[:3].tolist() == [0, 1, 2]


ZIPPED = gzip.compress(idx(torch.zeros(2, 2, 2, dtype=torch.uint8)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an IDX file"),
        (b"not an IDX file at all", "expected an IDX file of bytes with 3 dimensions"),
        (idx(torch.zeros(3, dtype=torch.uint8)), "expected an IDX file"),
        (idx(torch.zeros(2, 2, 2, dtype=torch.uint8))[:-1], "got 7"),
        (idx(torch.zeros(2, 2, 2, dtype=torch.uint8)) + b"x", "got 9"),
        (ZIPPED[:-12], "cannot be read"),
        (ZIPPED[:12] + b"\xff\xff\xff" + ZIPPED[15:], "cannot be read"),
    ],
)
def test_corrupt_idx(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DemoError, match=message) as raised:
        read_idx(path, 3)
    assert path.name in str(raised.value)


def test_missing_file_is_named(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DemoError, match="no file t10k-labels-idx1-ubyte"):
        load_data("mnist", folder)


def test_labels_of_other_images(folder):
    labels = torch.zeros(39, dtype=torch.uint8)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DemoError, match=r"40 in .* and 39 in train-labels"):
        load_data("mnist", folder)


def test_labels_beyond_nine(folder):
    labels = torch.full((40,), 10, dtype=torch.uint8)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DemoError, match="labels 0 to 9"):
        load_data("mnist", folder)


# The runs.


def test_all_optimizers_start_alike():
    for task in make_tasks(some_data()):
        runs = [Run(task, name, SETTINGS[task.name][name], 3, 2) for name in OPTIMIZERS]
        for params in zip(*(run.model.parameters() for run in runs), strict=True):
            assert torch.equal(params[0], params[1])
            assert torch.equal(params[0], params[2])
        race(runs, lambda run: None)
        assert len({run.result.losses[0] for run in runs}) == 1
        assert all(run.finish().steps == [0, 1, 2] for run in runs)


def test_runs_are_deterministic_and_keep_the_global_generator():
    task = make_tasks(some_data())[0]
    before = torch.get_rng_state()
    losses = []
    for _ in range(2):
        run = Run(task, "K-FAC", SETTINGS["conv"]["K-FAC"], 0, 3)
        race([run], lambda run: None)
        losses.append(run.finish().losses)
    assert losses[0] == losses[1]
    assert torch.equal(before, torch.get_rng_state())


def test_batches_cover_every_epoch():
    order = batches(10, 3, seed=0)
    epoch = torch.cat([next(order) for _ in range(3)])
    assert len(set(epoch.tolist())) == 9
    again = batches(10, 3, seed=0)
    assert torch.equal(next(again), epoch[:3])


def test_race_steps_the_run_that_has_used_the_least_time():
    task = make_tasks(some_data())[1]
    runs = [Run(task, name, SETTINGS[task.name][name], 0, 4) for name in OPTIMIZERS]
    others = []
    race(runs, lambda run: others.append(run.result.optimizer))
    assert sorted(others[:3]) == sorted(OPTIMIZERS)
    assert len(others) == 12


def test_schedules_end_where_they_should():
    task = make_tasks(some_data())[0]
    settings = {"lr": 1.0, "momentum": 0.5, "cosine": 0.5, "warm_up": 1}
    run = Run(task, "SGD", settings, 0, 100)
    rates = []
    while not run.done:
        run.step()
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.5, rel=1e-3)
    assert max(rates) == rates[1]
    assert rates[50:] == pytest.approx([0.05] * 50)


def test_damping_schedule():
    task = make_tasks(some_data())[0]
    settings = SETTINGS["conv"]["K-FAC"] | {"damping": 1.0, "damping_end": 0.01}
    run = Run(task, "K-FAC", settings, 0, 2)
    run.step()
    assert run.optimizer.param_groups[0]["damping"] == 1.0
    run.step()
    assert run.optimizer.param_groups[0]["damping"] == pytest.approx(0.1)


def test_demo_on_idx_files_says_that_it_is_not_tuned_there(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report = tmp_path / "report.html"
    results = run_demo("mnist", folder, report, scale=0.01)
    out = capsys.readouterr().out
    assert "NOT tuned on mnist" in out
    assert out.splitlines()[-1] == f"report: {report}"
    assert "NOT tuned on mnist" in report.read_text(encoding="utf-8")
    assert [task.name for task in results] == list(TASKS)


def test_demo_on_a_terminal(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    report = tmp_path / "report.html"
    run_demo("mnist", folder, report, scale=0.01)
    out = capsys.readouterr().out
    assert "\x1b" in out
    assert all(name in out for name in ("K-FAC", "SGD", "AdamW", "ms/step"))
    assert out.splitlines()[-1] == f"report: {report}"


# The trials.


def best(trials):
    def rank(trial):
        steps, loss = trial["steps_to_target"], trial["final_loss"]
        return (steps is None, steps or 0, loss is None, loss or 0)

    return min(trials, key=rank)


@pytest.mark.skipif(not TRIALS.exists(), reason="an installed package has no trials")
@pytest.mark.parametrize("task", make_tasks(some_data()), ids=lambda task: task.name)
def test_settings_are_the_best_trials(task):
    table = json.loads(TRIALS.read_text(encoding="utf-8"))
    entry = table["tasks"][task.name]
    assert entry["target"] == task.target
    assert table["kfac_fixed"] == KFAC_FIXED
    assert len({len(entry["optimizers"][name]["trials"]) for name in OPTIMIZERS}) == 1
    for name in OPTIMIZERS:
        tuned = entry["optimizers"][name]
        assert SETTINGS[task.name][name] == best(tuned["trials"])["settings"]
        assert task.budget[name] == tuned["budget"]
        assert best(tuned["trials"])["steps_to_target"] is not None
