"""The benchmark tasks: shapes, seeds, targets, data that are missing; two steps of each."""

import gzip
import itertools
import json
import re
import struct
from pathlib import Path

import pytest
import rivals
import torch
import tune_rivals
from kfac_setup import SPACE, make_kfac, tuned_kfac
from rivals import RIVALS
from runs import Run
from steps_to_target import run_once, spread, table
from tasks import TASKS, DataMissingError, curves_autoencoder, data, load_task
from torch import nn

ROOT = Path(__file__).parent.parent
# name: target, batch, output of a batch
EXPECTED = {
    "T1": (15.10, 1797, (1797, 64)),
    "T2": (143.2, 30, (30, 784)),
    "T3": (curves_autoencoder.TARGET, 40, (40, 784)),
    "T4": (0.30, 30, (30, 10)),
    "T4bn": (0.30, 30, (30, 10)),
    "T6": (1.92, 32, (32, 64, 5)),
    "A": (14.92, 1797, (1797, 64)),
}


def write_idx(path, array):
    head = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    path.write_bytes(gzip.compress(head + bytes(array.flatten().tolist())))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Made-up data of all kinds, 30 images and 6 000 characters; nothing in the cache."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "nothing")
    generator = torch.Generator().manual_seed(0)
    for name in ("mnist", "fashion-mnist"):
        (tmp_path / name).mkdir()
        for part in ("train", "t10k"):
            images = torch.randint(256, (30, 28, 28), generator=generator)
            labels = torch.randint(10, (30,), generator=generator)
            write_idx(tmp_path / name / f"{part}-images-idx3-ubyte.gz", images)
            write_idx(tmp_path / name / f"{part}-labels-idx1-ubyte.gz", labels)
    (tmp_path / "tinyshakespeare.txt").write_text("ab cb\nba" * 750, encoding="utf-8")
    return tmp_path


@pytest.fixture
def make(folder):
    def load(name):
        if name == "T3":
            return curves_autoencoder.make_task(train=40, test=10)
        return load_task(name, folder)

    return load


def test_every_task_is_expected():
    assert set(EXPECTED) == set(TASKS)


@pytest.mark.parametrize("name", EXPECTED)
def test_shapes_seeds_and_targets(name, make):
    task = make(name)
    target, batch, output = EXPECTED[name]
    assert (task.name, task.target) == (name, target)
    before = torch.get_rng_state()
    models = [task.make_model(seed) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    firsts = [list(itertools.islice(task.batches(seed), 3)) for seed in (0, 0, 1)]
    x, y = firsts[0][0]
    assert len(x) == batch
    assert models[0](x).shape == output
    assert task.loss(models[0](x), y).dim() == 0
    same, other = (flat(models[0]).equal(flat(model)) for model in models[1:])
    assert same
    assert other == (name == "A")  # of A all seeds have the same start
    for (x0, y0), (x1, y1) in zip(firsts[0], firsts[1], strict=True):
        assert torch.equal(x0, x1)
        assert torch.equal(y0, y1)
    full = name in ("T1", "A")
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*firsts[1:], strict=True)) == full


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.filterwarnings("ignore:these parameters have no K-FAC block:UserWarning")
@pytest.mark.parametrize("name", EXPECTED)
def test_two_steps_of_kfac_and_of_a_rival(name, make):
    task = make(name)
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99}
    for make_optimizer in (
        lambda model: make_kfac(task, model),
        lambda model: RIVALS["AdamW"].make(model, settings),
    ):
        run = Run(task, make_optimizer, seed=0, every=1)
        run.train(2)
        assert run.failure is None
        assert [row[0] for row in run.curve] == [0, 1, 2]
        assert run.alive
        assert len({row[-1] for row in run.curve}) == 3
        assert run.reached(run.curve[0][-1])[0] == 0
        assert run.model.training
        assert 0 <= task.test(run.model) < 1000


def test_the_start_of_kfac_jax_and_its_l2_term(make):
    task = make("A")
    model = task.make_model(7)
    assert round(task.evaluate(model), 2) == 44.34  # as kfac-jax has it
    x, y = next(task.batches(0))
    l2 = task.training_loss(model, x, y) - task.loss(model(x), y)
    torch.testing.assert_close(l2, 5e-6 * flat(model).square().sum(), rtol=0, atol=1e-5)


def test_evaluation_is_in_evaluation_mode_and_leaves_no_trace(make):
    task = make("T4bn")
    model = task.make_model(0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert task.evaluate(model) == task.evaluate(model)
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_the_transformer_sees_no_future(make):
    task = make("T6")
    model = task.make_model(0)
    x, y = next(task.batches(0))
    assert torch.equal(x[:, 1:], y[:, :-1])
    changed = x.clone()
    changed[:, 40:] = 0
    difference = (model(x) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:40].max() < 1e-5
    assert difference[40:].max() > 1e-3


def test_curves(float64):
    # Through (0, 0), (1, 1), (2, 0): y = 3/2 x - 1/2 x³ up to the middle, and mirrored.
    knots = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    x = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0]])
    y = curves_autoencoder.natural_spline(*knots, x)
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.6875, 1.0, 0.6875, 0.0]]))


def test_images_of_curves():
    few, more = curves_autoencoder.curves(5), curves_autoencoder.curves(600)
    assert torch.equal(few, more[:5])
    assert not torch.equal(few, curves_autoencoder.curves(5, seed=1))
    assert more.shape == (600, 784)
    assert more.min() == 0
    assert more.max() == 1
    assert 0.06 < more.mean() < 0.10


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("T2", "train-images-idx3-ubyte"),
        ("T4", "train-images-idx3-ubyte"),
        ("T6", "tinyshakespeare.txt"),
    ],
)
def test_missing_data(name, file, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    with pytest.raises(DataMissingError, match=f"no file {file} in .*--data-dir DIR"):
        load_task(name, tmp_path)


def test_the_cache_folder(folder, monkeypatch):
    monkeypatch.setattr(data, "CACHE", folder)
    assert load_task("T6").name == "T6"
    with pytest.raises(ValueError, match="expected one of T1"):
        load_task("T5")


@pytest.mark.parametrize("name", ["AdamW", "SGD-NAG", "Muon"])
def test_rivals(name, make):
    task = make("T4")
    rival = RIVALS[name]
    assert rival.draw("categorical", 12, 0) == rival.draw("categorical", 12, 0)
    assert rival.draw("categorical", 12, 0) != rival.draw("categorical", 12, 1)
    settings = rival.draw("categorical", 1, 0)[0]
    run = Run(task, lambda model: rival.make(model, settings), seed=0, every=5)
    before = [p.clone() for p in run.model.parameters()]
    run.train(3)
    assert run.failure is None
    assert run.loss < run.curve[0][-1]
    moved = [
        not torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True)
    ]
    assert all(moved)


def test_halving_keeps_all_trials_and_finishes_the_best(make, monkeypatch, tmp_path):
    task = make("T2")
    object.__setattr__(task, "rival_steps", 9)
    found = tune_rivals.tune(task, "AdamW", trials=5)
    steps = [trial["steps"] for trial in found["trials"]]
    assert steps == [9, 6, 6, 3, 3]
    assert found["best"] == found["trials"][0]["settings"]
    path = tmp_path / "new" / "trials.json"
    tune_rivals.store(path, "T2", "AdamW", found)
    tune_rivals.store(path, "T2", "Muon", {})
    assert json.loads(path.read_text())["tasks"]["T2"] == {"AdamW": found, "Muon": {}}


def test_kfac_is_tuned_as_the_rivals_are_in_its_own_budget(make):
    task = make("T4")
    object.__setattr__(task, "kfac_steps", 16)
    found = tune_rivals.tune(task, "K-FAC", trials=5)
    assert [trial["steps"] for trial in found["trials"]] == [16, 5, 5, 2, 2]
    assert found["budget"] == 16
    assert all(trial["failure"] is None for trial in found["trials"])
    for trial in found["trials"]:
        assert trial["settings"].keys() == SPACE.keys()
        assert all(value in SPACE[key].values for key, value in trial["settings"].items())
    assert len({json.dumps(trial["settings"]) for trial in found["trials"]}) == 5


def options_of(optimizer):
    return optimizer.state_dict()["kfac"]["subject"]["options"]


DEFAULTS = {
    "trust_region": 0.1,
    "final": 0.03,
    "initial_damping": 0.1,
    "cov_ema_decay": 0.85,
    "invert_every": 6,
}


def test_tuned_kfac_with_the_defaults_is_kfac(make):
    task = make("T4")
    plain = make_kfac(task, task.make_model(0))
    tuned = tuned_kfac(task).make(task.make_model(0), DEFAULTS)
    assert plain.state_dict()["param_groups"] == tuned.state_dict()["param_groups"]
    assert options_of(plain) == options_of(tuned)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("trust_region", 0.2, "trust region"),
        ("final", 0.02, "trust region"),
        ("initial_damping", 1.0, "damping"),
        ("cov_ema_decay", 0.9, "cov_ema_decay"),
        ("invert_every", 12, "invert_every"),
    ],
)
def test_a_setting_of_tuned_kfac_reaches_its_place_alone(name, value, found, make):
    task = make("T4")
    base, changed = (
        options_of(tuned_kfac(task).make(task.make_model(0), settings))
        for settings in (DEFAULTS, DEFAULTS | {name: value})
    )
    assert {key for key in base if base[key] != changed[key]} == {found}


def test_tuned_kfac_runs_to_a_target_from_the_table_of_trials(make):
    task = make("T4")
    object.__setattr__(task, "kfac_steps", 4)
    found = run_once(task, "K-FAC, tuned", DEFAULTS, 1, stop=False)
    assert found["failure"] is None
    assert [row[0] for row in found["curve"]] == [0, 1, 2, 3, 4, 5, 6]


def test_a_rival_whose_package_is_missing(monkeypatch):
    assert RIVALS["SOAP"].package == "pytorch-optimizer"
    assert not RIVALS["AdamW"].missing
    monkeypatch.setattr(rivals, "find_spec", {"pytorch_optimizer": None}.__getitem__)
    assert RIVALS["SOAP"].missing
    monkeypatch.setattr(rivals, "find_spec", {"pytorch_optimizer": 1}.__getitem__)
    assert not RIVALS["SOAP"].missing


COMMAND = re.compile(r"python (benchmarks/\w+\.py)((?: [^`#\n;]*)?)")


@pytest.mark.parametrize("file", ["Makefile", "docs/benchmarks.md"])
def test_the_commands_that_are_written_down_exist_with_their_flags(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    commands = COMMAND.findall(re.sub(r"\n(?!\t)", " ", text) if file[0] == "d" else text)
    assert len(commands) > 9
    for script, rest in commands:
        source = (ROOT / script).read_text(encoding="utf-8")
        for flag in re.findall(r"--[a-z-]+", rest):
            assert f'"{flag}"' in source, (script, flag)


def test_the_table():
    run = {"steps_to_target": 8, "cpu_to_target": 0.5, "cpu": 1.0, "steps": 10}
    run |= {"loss": 0.25, "test": 0.9}
    runs = [run, run | {"steps_to_target": 6}, run | {"steps_to_target": None}]
    entry = {
        "title": "net",
        "target": 0.3,
        "test_metric": "accuracy",
        "methods": {"X": runs},
    }
    last = table({"T": entry}).splitlines()[-1]
    assert last == (
        "| T, net | 0.3 | X | 8 [6--] | 0.5 | 100.0 | 0.250 (10) | accuracy 0.900 |"
    )
    assert spread([None, None, 3], 0) == "- [3--]"
