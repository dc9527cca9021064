"""The examples learn, from a fixed seed, in a fraction of their default steps.

The bounds leave room for other machines and versions: over four seeds the classifiers'
losses and error rates stayed at least a third below.
"""

import importlib.util
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples' data are in the extra `demo`")

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
NAMES = ("autoencoder", "convnet", "mlp", "rnn")
UNIFORM = math.log(10)  # the loss of a classifier that knows nothing
MAX_LINES = 120


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_these_are_the_examples():
    assert tuple(path.stem for path in EXAMPLES) == NAMES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_as_a_script(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", "10", "--threads", "2"])
    runpy.run_path(str(path), run_name="__main__")
    assert torch.get_num_threads() == 2
    out = capsys.readouterr().out
    assert len(out.splitlines()) > 2  # it shows progress
    assert out.splitlines()[-1].startswith("done: ")


@pytest.mark.parametrize(
    ("name", "steps", "loss", "accuracy"),
    [("mlp", 80, 0.1, 0.92), ("convnet", 60, 0.15, 0.92)],
)
def test_classifiers(name, steps, loss, accuracy):
    figures = load(name).main(["--steps", str(steps)])
    assert figures["first_loss"] == pytest.approx(UNIFORM, abs=0.1)
    assert figures["loss"] < loss
    assert figures["accuracy"] > accuracy


def test_convnet_has_the_blocks_that_it_asks_for():
    convnet = load("convnet")
    blocks = convnet.register(convnet.make_model()).blocks
    assert [type(block).__name__ for block in blocks.values()] == [
        "ConvDiagonalFB",
        "ConvKFCBasicFB",
        "FullyConnectedKFACBasicFB",
    ]


def test_autoencoder():
    figures = load("autoencoder").main(["--steps", "30"])
    last = figures["last_step"]
    assert 40 < figures["first_loss"] < 50
    assert figures["loss"] < 19
    assert figures["error"] < 1.8
    # Step size, momentum and damping have left their start, and the model is right.
    assert last.step == 29
    assert last.damping < 0.1
    assert 0 < last.lr < 1
    assert 0 < last.momentum < 1.5
    assert last.rho == pytest.approx(1, abs=0.25)


def test_rnn_with_every_approximation():
    results = load("rnn").main(["--steps", "80"])
    assert tuple(results) == ("kron_indep", "kron_series_1", "kron_series_2")
    for figures in results.values():
        assert figures["first_loss"] == pytest.approx(UNIFORM, abs=0.1)
        assert figures["loss"] < 0.15
        assert figures["accuracy"] > 0.88
    # One start for all of them, and three different ways from there.
    assert len({figures["first_loss"] for figures in results.values()}) == 1
    assert len({figures["loss"] for figures in results.values()}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_is_all_there_is_to_chance(name):
    main = load(name).main
    one, same, other = (main(["--steps", "2", "--seed", s]) for s in ("3", "3", "4"))
    if name == "rnn":
        one, same, other = (run["kron_indep"] for run in (one, same, other))
    assert one["loss"] == same["loss"] != other["loss"]
