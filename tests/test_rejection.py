"""Steps that are taken back: bit for bit, with a larger λ, counted and told of once."""

import copy
import logging
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC, LevenbergMarquardt, RelativeDamping
from kfac_torch.trials import Trial

pytestmark = pytest.mark.filterwarnings("ignore:these parameters have no K-FAC block")


def net():
    """With buffers, a layer of random numbers, and a parameter without a block."""
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.PReLU(), nn.Dropout(0.2), nn.Linear(5, 4)
    )


def batches(n):
    return [(torch.randn(24, 6), torch.randint(4, (24,))) for _ in range(n)]


def rule(**options):
    return LevenbergMarquardt(**{"initial": 0.1, "interval": 3, "decay": 0.8, **options})


def step(model, optimizer, x, y, closed, rise=0.0):
    values = iter((0.0, rise))  # what the loss says besides, before and after

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss + next(values)

    if closed:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def snapshot(model, optimizer):
    """Parameters, what steps remember, and the groups: bits, not values."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in g.items() if k != "damping"} for g in state["param_groups"]]
    return copy.deepcopy([list(model.parameters()), state["state"], groups])


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        kind = {4: torch.int32, 8: torch.int64}[a.element_size()]
        return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))
    return type(a) is type(b) and a == b


KINDS = {
    "automatic": {},
    "regular": {"lr": 0.1},
    "adam": {"lr": 0.1, "momentum_type": "adam", "weight_decay": 0.01},
    "qmodel": {"momentum_type": "qmodel"},
    "qmodel_fixedmu": {"momentum_type": "qmodel_fixedmu", "momentum": 0.5},
    "all without a block": {"lr": 0.1, "approx": {"4": "adamw"}},
    "velocities without a block": {"lr": 0.1, "approx": {"4": "sgd"}},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("closed", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("earlier", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_step_is_taken_back_bit_for_bit(kind, earlier, closed, caplog, monkeypatch):
    model, data = net(), batches(earlier + 3)
    # An average of gradients may well lead uphill on a batch of random targets.
    damping = rule(reject_below=-1.0 if kind == "automatic" else 0.0)
    damping = RelativeDamping(damping) if kind == "automatic" else damping
    optimizer = KFAC(
        model, "categorical", damping=damping, norm_constraint=None, **KINDS[kind]
    )
    for x, y in data[:earlier]:
        step(model, optimizer, x, y, closed)
    assert optimizer.health().rejected_steps == 0
    caplog.set_level(logging.DEBUG, "kfac_torch")
    for number, (x, y) in enumerate(data[earlier : earlier + 2], 1):
        before = snapshot(model, optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(Trial, "_told_change", lambda _: torch.tensor(50.0))
            step(model, optimizer, x, y, closed, rise=50.0)
        record = optimizer.last_step
        assert record.rejected
        assert record.rho < 0 < record.step_norm
        if number == 2:  # what no λ can mend is forgotten
            for entries in before[1].values():
                for name in ("momentum_buffer", "previous_update", "average_gradient"):
                    entries.pop(name, None)
        assert same(snapshot(model, optimizer), before)
        raised = record.damping / 0.8**3
        assert optimizer.param_groups[0]["damping"] == pytest.approx(raised, rel=1e-12)
        assert optimizer.health().rejected_steps == number
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING, logging.DEBUG]
    assert "the step is taken back and damping raised" in caplog.text
    step(model, optimizer, *data[-1], closed)
    assert not optimizer.last_step.rejected
    assert optimizer.last_step.inverse_age == 0  # with the λ that was raised
    assert not same(snapshot(model, optimizer), before)
    optimizer.close()


@pytest.mark.parametrize("closed", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("kind", KINDS)
def test_judging_every_step_leaves_no_trace(kind, closed):
    """Random numbers, buffers and λ too: where no step is taken back, all is as without."""
    model, data = net(), batches(7)
    twin, ends = copy.deepcopy(model), []
    for each, limit in ((model, None), (twin, -1e30)):
        torch.manual_seed(3)
        damping = rule(reject_below=limit)
        optimizer = KFAC(each, "categorical", damping=damping, **KINDS[kind])
        for x, y in data:
            step(each, optimizer, x, y, closed)
        judged = optimizer.last_step.rho is not None
        assert judged == (limit is not None)
        options = optimizer.param_groups[0]["damping"], torch.get_rng_state()
        ends.append([snapshot(each, optimizer), list(each.buffers()), list(options[:1])])
        ends[-1].append(options[1].tolist())
        optimizer.close()
    assert same(*ends)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_takes_the_step_back(value):
    model, [(x, y)] = net(), batches(1)
    optimizer = KFAC(model, "categorical", lr=0.1, damping=rule(reject_below=-1e30))
    values = [1.0, value]

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss * 0 + values.pop(0)

    before = snapshot(model, optimizer)
    optimizer.step(closure)
    assert optimizer.last_step.rejected
    assert same(snapshot(model, optimizer), before)
    optimizer.close()


@pytest.mark.usefixtures("float64")
def test_parameters_that_overflow_are_taken_back_without_a_closure():
    model, [(x, y)] = net(), batches(1)
    damping = rule(reject_below=-1e30)
    optimizer = KFAC(model, "categorical", lr=1e308, damping=damping, norm_constraint=None)
    before = snapshot(model, optimizer)
    step(model, optimizer, x, y, False)
    assert optimizer.last_step.rejected
    assert same(snapshot(model, optimizer), before)
    optimizer.close()


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_a_run_that_diverges_trains_where_steps_are_taken_back(momentum):
    """On one batch, where a velocity that is only put back would lead uphill for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(256, 6)
    y = (x @ torch.randn(6, 4)).argmax(1)
    ends = {}
    for limit in (None, 0.25):
        each = copy.deepcopy(model)
        optimizer = KFAC(
            each,
            "categorical",
            lr=1.0,
            momentum=momentum,
            norm_constraint=None,
            damping=LevenbergMarquardt(initial=1e-6, reject_below=limit),
            cov_update_every=1,
            invert_every=5,
        )
        for _ in range(100):
            step(each, optimizer, x, y, False)
        ends[limit] = functional.cross_entropy(each(x), y).item()
        taken_back = optimizer.health().rejected_steps
        assert (taken_back > 0) == (limit is not None)
        optimizer.close()
    first = functional.cross_entropy(model(x), y).item()
    assert ends[0.25] < 0.1 * first
    assert ends[None] > first
