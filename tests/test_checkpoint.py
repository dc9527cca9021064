"""States of an optimizer in other hands, states of others, and checkpoints in files."""

import copy
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kfac_torch import KFAC, LayerCollection, LevenbergMarquardt
from kfac_torch.checkpoint import (
    from_tensors,
    load_checkpoint,
    save_checkpoint,
    to_tensors,
)

OPTIONS = {"lr": 0.1, "damping": 0.01, "invert_every": 3}
ENDINGS = ["run.pt", "run.safetensors"]


def net(width=5):
    return nn.Sequential(
        nn.Linear(4, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 3)
    )


def make(model, **options):
    return KFAC(model, "categorical", **{**OPTIONS, **options})


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        t = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 4, generator=t), torch.randint(3, (8,), generator=t)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def trained(steps=4, **options):
    model = net()
    optimizer = make(model, **options)
    train(model, optimizer, steps)
    return model, optimizer


def other(**options):
    """Another one, with a history of its own."""
    torch.manual_seed(1)
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    optimizer = make(model, **options)
    train(model, optimizer, 2, start=50)
    return model, optimizer


def bits(*things):
    """All that is in states, as text, each number with all of its digits."""
    tensors, metadata = to_tensors([thing.state_dict() for thing in things])
    return metadata, {name: t.flatten().tolist() for name, t in tensors.items()}


def same(a, b):
    return repr(a) == repr(b)  # a NaN is the same as a NaN


# What a state is.


def test_a_state_is_plain_and_by_names():
    model, optimizer = trained()
    state = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    assert sorted(state["state"]) == sorted(names)
    assert sorted(n for g in state["param_groups"] for n in g["params"]) == sorted(names)
    assert list(state["kfac"]["estimator"]["blocks"]) == ["0", "1", "3"]

    def check(value):
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            value = list(value.values())
        if isinstance(value, list | tuple):
            return [check(item) for item in value]
        assert isinstance(value, torch.Tensor) or type(value) in {
            type(None), bool, int, float, str,
        }  # fmt: skip

    check(state)


def test_parameters_may_be_grouped_and_ordered_otherwise():
    model, optimizer = trained()
    twin = copy.deepcopy(model)
    resumed = make(twin)
    group = resumed.param_groups[0]
    group["params"].reverse()
    rest = {k: v for k, v in group.items() if k != "params"}
    resumed.param_groups.append({**rest, "params": [group["params"].pop()]})
    optimizer.param_groups[0]["lr"] = 0.05
    resumed.load_state_dict(optimizer.state_dict())
    assert [g["lr"] for g in resumed.param_groups] == [0.05, 0.05]
    for (_, p), (name, q) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        for key, value in optimizer.state[p].items():
            assert torch.equal(resumed.state[q][key], value), name
    train(model, optimizer, 2, 4)
    train(twin, resumed, 2, 4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)  # other sums
    state = resumed.state_dict()
    state["param_groups"][1]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"param group 0: expected the same options"):
        optimizer.load_state_dict(state)


def test_hooks_of_torch_are_called():
    model, optimizer = trained()
    seen = []
    resumed = make(copy.deepcopy(model))
    optimizer.register_state_dict_post_hook(lambda _, s: seen.append(list(s["state"])))
    resumed.register_load_state_dict_pre_hook(lambda _, s: seen.append(list(s["state"])))
    resumed.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    resumed.load_state_dict(optimizer.state_dict())
    assert sorted(seen[0]) == sorted(seen[1]) == [0, 1, 2, 3, 4, 5]
    assert seen[2:] == ["post"]


# In the middle of a step.


def test_no_state_between_a_backward_and_its_step():
    model, optimizer = trained()
    before = bits(optimizer)
    cross_entropy(model(torch.randn(8, 4)), torch.zeros(8).long()).backward()
    with pytest.raises(RuntimeError, match=r"state_dict\(\).*between a backward and its"):
        optimizer.state_dict()
    model[0].weight.grad[0, 0] = torch.inf  # no step takes that: a scaler leaves it out
    optimizer.state_dict()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    # The draw of targets has gone on: nothing else has changed.
    changed = {name for name, t in bits(optimizer)[1].items() if t != before[1][name]}
    assert changed <= {"0/kfac/estimator/generator"}


def test_no_state_inside_a_step():
    model, optimizer = trained()
    state = optimizer.state_dict()

    def closure():
        optimizer.zero_grad()
        value = cross_entropy(model(torch.ones(8, 4)), torch.zeros(8).long())
        value.backward()
        for call in (optimizer.state_dict, lambda: optimizer.load_state_dict(state)):
            with pytest.raises(RuntimeError, match=r"expected a call between two steps"):
                call()
        return value

    optimizer.step(closure)
    assert optimizer.state_dict()["kfac"]["num_steps"] == 5

    def fails():
        raise failure

    failure = ValueError("inside")
    with pytest.raises(ValueError, match="inside"):
        optimizer.step(fails)
    optimizer.state_dict()  # nothing had begun
    failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    with pytest.raises(RuntimeError, match="interrupted half-way"):
        optimizer.state_dict()
    train(model, optimizer, 1)
    optimizer.state_dict()


# States of others.


def foreign():
    """By name: a state that does not fit, and what the message says, line by line."""
    wide = net(6)
    deep = nn.Sequential(*net(), nn.Linear(3, 3))
    layers = LayerCollection(wide)
    layers.auto_register_layers()
    rule = LevenbergMarquardt(initial=0.1)
    return {
        "another width": (
            make(wide),
            [
                r"parameter 0\.weight: expected \[5, 4\], got \[6, 4\]",
                r"layer 0: expected 'FullyConnected\w+ \(full 5, full 5\)', got "
                r"'FullyConnected\w+ \(full 5, full 6\)'",
            ],
        ),
        "more layers": (
            make(deep),
            ["parameter unknown here: 4.bias, 4.weight", "layer unknown here: 4"],
        ),
        "fewer layers": (
            make(net()[:3]),
            ["parameter missing in the state: 3.bias, 3.weight", "layer missing.*: 3"],
        ),
        "another approximation": (
            make(net(), approx={"0": "diagonal", "3": "kron_in_diag"}),
            [
                "layer 0: expected '.*', got 'FullyConnectedDiagonal.*'",
                r"layer 3: expected '.*\(full 6, full 3\)', got '.*\(diagonal 6, full 3\)'",
            ],
        ),
        "no block": (
            make(net(), approx={"0": "adamw"}),
            ["layer missing in the state: 0"],
        ),
        "other options": (
            make(
                net(),
                momentum_type="qmodel",
                damping=rule,
                invert_every=7,
                estimation_mode="exact",
                cov_ema_decay=0.9,
                num_burnin_steps=1,
                cov_update_every=2,
            ),
            [
                "momentum_type: expected 'regular', got 'qmodel'",
                r"damping: expected 'a number', got 'LevenbergMarquardt\(initial=0\.1",
                "invert_every: expected 3, got 7",
                "estimation_mode: expected 'gradients', got 'exact'",
                r"cov_ema_decay: expected 0\.95, got 0\.9",
                "num_burnin_steps: expected 0, got 1",
                "cov_update_every: expected 10, got 2",
                "early_updates: expected 10, got 0",
            ],
        ),
    }


@pytest.mark.parametrize(
    "name",
    ["another width", "more layers", "fewer layers", "another approximation", "no block",
     "other options"],
)  # fmt: skip
def test_all_that_differs_is_listed_and_nothing_changes(name):
    _, optimizer = trained()
    state, lines = foreign()[name]
    before = bits(optimizer)
    with pytest.raises(ValueError, match="nothing is changed:") as caught:
        optimizer.load_state_dict(state.state_dict())
    message = str(caught.value)
    for line in lines:
        assert re.search(line, message), line
    assert message.count("\n- ") >= len(lines)
    assert same(before, bits(optimizer))


def damages():
    """By name: what is done to a state, and what is said of it."""

    def power(state):
        stored = state["kfac"]["estimator"]["blocks"]["0"]["factors"][0]["powers"][0]
        stored["tensors"][0] = torch.zeros(2, 2)

    def cov(state):
        state["kfac"]["estimator"]["blocks"]["3"]["factors"][1]["cov"] = torch.zeros(4, 4)

    def velocity(state):
        state["state"]["0.weight"]["momentum_buffer"] = torch.zeros(3)

    return {
        "power": (power, "expected tensors of shapes"),
        "cov": (cov, "expected a covariance of shape"),
        "velocity": (velocity, r"0\.weight: momentum_buffer: expected shape \[5, 4\]"),
        "no layer": (
            lambda state: state["kfac"]["estimator"]["blocks"].pop("1"),
            "layer 1: damaged: KeyError",
        ),
        "no estimator": (
            lambda state: state["kfac"].pop("estimator"), "damaged: KeyError: 'estimator'",
        ),
        "no groups": (lambda state: state["param_groups"].clear(), "damaged: KeyError"),
        "version 3": (
            lambda state: state["kfac"].update(version=3),
            "expected K-FAC state of version 6, got version 3",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", damages())
def test_a_damaged_state_changes_nothing(name):
    damage, message = damages()[name]
    _, source = trained()
    _, optimizer = other()
    before, state = bits(optimizer), copy.deepcopy(source.state_dict())
    damage(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same(before, bits(optimizer))


# What fails, and at which of its calls.
FAULTS = [
    ("fisher_factors.base.FisherFactor.load_state_dict", 2),
    ("fisher_blocks.base.FisherBlock.load_state_dict", 2),
    ("estimator.FisherEstimator._generator_on", 1),
    ("updates.UpdateRule.load_state_dict", 1),
    ("optimizer.KFAC._load_own_state", 1),
    ("preconditioning.Schedule.load_state_dict", 1),
    ("health.HealthLedger.load_state_dict", 1),
]


@pytest.mark.parametrize(("where", "last"), FAULTS)
def test_a_fault_in_the_middle_of_loading_changes_nothing(where, last, monkeypatch):
    module, owner, method = where.rsplit(".", 2)
    owner = getattr(importlib.import_module(f"kfac_torch.{module}"), owner)
    original, calls = getattr(owner, method), []
    _, source = trained()
    model, optimizer = other()
    twin, reference = other()
    state, before = copy.deepcopy(source.state_dict()), bits(optimizer)

    def faulty(*args, **kwargs):
        calls.append(None)
        result = original(*args, **kwargs)
        if len(calls) == last:
            raise MemoryError("injected")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, faulty)
        with pytest.raises(MemoryError, match="injected"):
            optimizer.load_state_dict(state)
    assert same(before, bits(optimizer))
    train(model, optimizer, 3, 60)
    train(twin, reference, 3, 60)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    optimizer.load_state_dict(state)
    assert same(bits(optimizer), bits(source))


# As tensors and text.


def test_tensors_and_text_and_back():
    shared = torch.arange(6.0).view(2, 3)
    state = {
        "list": [1, 2.5, float("inf"), True, None, "text"],
        "tuple": (0.9, (1, [2])),
        "a/b": {"c": shared},
        "a": {"b/c": torch.ones(2, dtype=torch.int64), 3: shared},
        "$tensor": {"empty": torch.zeros(0), "none": {}, "list": []},
        "scalar": torch.tensor(1.5, dtype=torch.float64),
    }
    tensors, metadata = to_tensors(state)
    assert len(tensors) == 4  # one is there twice
    again = from_tensors({name: t.clone() for name, t in tensors.items()}, metadata)
    assert repr(again) == repr(state)
    assert again["a"][3] is again["a/b"]["c"]
    with pytest.raises(TypeError, match=r"a/1: expected a tensor, a number.*got set"):
        to_tensors({"a": [0, {1}]})


def test_a_state_goes_through_tensors_and_text():
    model, optimizer = trained(momentum_type="adam")
    resumed = make(copy.deepcopy(model), momentum_type="adam")
    tensors, metadata = to_tensors(optimizer.state_dict())
    resumed.load_state_dict(from_tensors(tensors, metadata))
    assert same(bits(resumed), bits(optimizer))


def test_distributed_checkpoints(tmp_path):
    """Those of a single process; the reader says which tensors there are."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    model, optimizer = trained()
    twin, resumed = other()
    tensors, metadata = to_tensors(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a single process
        dcp.save(
            {
                "model": model.state_dict(),
                "optimizer": {"tensors": tensors, "metadata": metadata},
            },
            checkpoint_id=tmp_path,
        )
        prefix = "optimizer.tensors."
        found = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
        tensors = {
            name.removeprefix(prefix): torch.empty(held.size, dtype=held.properties.dtype)
            for name, held in found.items()
            if name.startswith(prefix) and isinstance(held, TensorStorageMetadata)
        }
        state = {
            "model": twin.state_dict(),
            "optimizer": {"tensors": tensors, "metadata": ""},
        }
        dcp.load(state, checkpoint_id=tmp_path)
    twin.load_state_dict(state["model"])
    resumed.load_state_dict(from_tensors(tensors, state["optimizer"]["metadata"]))
    assert same(bits(twin, resumed), bits(model, optimizer))


def test_torchs_helpers_lose_a_part_and_that_is_refused():
    """`get_state_dict` keeps torch's own two entries alone."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = trained()
    twin, resumed = other()
    weights, state = get_state_dict(model, optimizer)
    before = bits(resumed)
    with pytest.raises(ValueError, match="got no K-FAC state"):
        set_state_dict(twin, resumed, model_state_dict=weights, optim_state_dict=state)
    assert same(before, bits(resumed))


# Files.


@pytest.mark.parametrize("name", ENDINGS)
def test_a_file_resumes_the_run(name, tmp_path):
    model, optimizer = trained()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    rng = torch.get_rng_state()
    save_checkpoint(
        tmp_path / name, model, optimizer, rng=True, epoch=3, betas=(1, 0.5),
        schedule=schedule.state_dict(), best=torch.tensor(2.5),
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [name]
    twin, resumed = other()
    extra = load_checkpoint(tmp_path / name, twin, resumed, rng=True)
    assert extra.pop("schedule") == schedule.state_dict()
    assert extra == {"epoch": 3, "betas": (1, 0.5), "best": torch.tensor(2.5)}
    assert torch.equal(torch.get_rng_state(), rng)
    assert same(bits(twin, resumed), bits(model, optimizer))
    train(model, optimizer, 3, 4)
    train(twin, resumed, 3, 4)
    assert same(bits(twin, resumed), bits(model, optimizer))


@pytest.mark.parametrize("name", ENDINGS)
def test_shared_weights_in_a_file(name, tmp_path):
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())  # any optimizer
    model(torch.arange(6)).sum().backward()
    optimizer.step()
    before = bits(model, optimizer)
    save_checkpoint(tmp_path / name, model, optimizer)
    with torch.no_grad():
        model[0].weight.zero_()
    load_checkpoint(tmp_path / name, model, optimizer)
    assert same(before, bits(model, optimizer))


@pytest.mark.parametrize("name", ENDINGS)
def test_a_file_that_does_not_fit_changes_neither_model_nor_optimizer(name, tmp_path):
    model, optimizer = trained()
    twin, resumed = other()
    before = bits(twin, resumed)
    path = tmp_path / name
    for saved, message in (
        ((net(6), make(net(6))), r"0\.bias: expected shape \[5\], got \[6\]"),
        ((net()[:3], optimizer), "(?s)missing in the file: 3.bias.*3.weight"),
        ((model, make(net(), invert_every=9)), "invert_every: expected 3, got 9"),
        ((model, torch.optim.SGD(model.parameters(), 0.1)), "got no K-FAC state"),
    ):
        save_checkpoint(path, *saved)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, twin, resumed)
        assert same(before, bits(twin, resumed))
    save_checkpoint(path, model, optimizer)
    with pytest.raises(ValueError, match="rng: expected random states"):
        load_checkpoint(path, twin, resumed, rng=True)
    if name.endswith("pt"):
        torch.save({"model": model.state_dict()}, path)
    else:
        from safetensors.torch import save_file

        save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="expected a file of save_checkpoint"):
        load_checkpoint(path, twin, resumed)
    assert same(before, bits(twin, resumed))


@pytest.mark.parametrize("name", ENDINGS)
def test_a_save_that_fails_leaves_the_old_file(name, tmp_path, monkeypatch):
    model, optimizer = trained()
    path = tmp_path / name
    save_checkpoint(path, model, optimizer, epoch=1)
    with pytest.raises(TypeError, match=r"extra/what: expected .*got object"):
        save_checkpoint(path, model, optimizer, what=object())

    def fails(*_):
        raise OSError("no space left")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fails)
            with pytest.raises(OSError, match="no space left"):
                save_checkpoint(path, model, optimizer, epoch=2)
        assert [left.name for left in tmp_path.iterdir()] == [name]
        assert load_checkpoint(path, model, optimizer) == {"epoch": 1}


def test_a_link_stays_a_link_and_rights_are_the_usual_ones(tmp_path):
    model, optimizer = trained()
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run.pt"
    link.symlink_to(tmp_path / "disk" / "real.pt")
    save_checkpoint(link, model, optimizer)
    assert link.is_symlink()
    usual = tmp_path / "usual"
    usual.touch()
    assert (tmp_path / "disk" / "real.pt").stat().st_mode == usual.stat().st_mode


SAVER = """
    import sys, torch
    from kfac_torch import KFAC
    from kfac_torch.checkpoint import save_checkpoint

    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.Linear(200, 3))
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.01)
    print("ready", flush=True)
    for line in sys.stdin:
        for number in range(int(line), 10**9):
            with torch.no_grad():
                model[0].weight.fill_(number)
            save_checkpoint(sys.argv[1], model, optimizer, number=number)
            if number == int(line):
                print("saved", flush=True)
"""


@pytest.mark.parametrize("name", ENDINGS)
def test_a_killed_process_leaves_the_old_file_or_the_new_one(name, tmp_path):
    """Processes forked from one that is warm, each killed while it saves in a loop."""
    script = textwrap.dedent(SAVER).replace(
        "for line in sys.stdin:\n",
        "import os\nfor line in sys.stdin:\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        print(child, flush=True)\n"
        "        print(os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)\n"
        "        continue\n",
    )
    path, last, left = tmp_path / name, -1, 0
    moments = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 3))
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.01)
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert parent.stdout.readline() == "ready\n"
        for moment in moments:
            parent.stdin.write(f"{last + 1}\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            assert parent.stdout.readline() == "saved\n"
            time.sleep(0.05 * moment)
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == f"{signal.SIGKILL.value}\n"
            others = [p for p in tmp_path.iterdir() if p != path]
            left += len(others)
            assert len(others) <= 1  # the next save has removed what was left
            number = load_checkpoint(path, model, optimizer)["number"]
            assert number > last
            assert (model[0].weight == number).all()
            last = number
    finally:
        parent.kill()
        parent.communicate()
    assert left > 0  # some were killed in the middle of a file
    save_checkpoint(path, model, optimizer)
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_is_not_tied_to_the_run_that_goes_on():
    model, optimizer = trained()
    state = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    train(model, optimizer, 2, 4)
    again = io.BytesIO(file.getvalue())
    assert same(to_tensors(torch.load(again, weights_only=True)), to_tensors(state))
