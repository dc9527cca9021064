"""Faults of every kind in training runs: none poisons, none leaves a trace."""

import copy
import importlib.util
import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfac_torch import KFAC, FactorHealth, FisherEstimator, Health, LayerCollection

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "faults.py"
spec = importlib.util.spec_from_file_location("faults", BENCHMARK)
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)

PLAN = list(faults.KINDS) * 2


@pytest.mark.filterwarnings("ignore:KFAC.step.*the step is left out:RuntimeWarning")
@pytest.mark.parametrize("task", faults.TASKS.values(), ids=faults.TASKS)
@pytest.mark.parametrize("mode", faults.MODES)
def test_a_run_with_faults(task, mode):
    """`Run` asserts after every fault; and then it is on with the training."""
    run = faults.train(task, faults.MODES[mode], 0, PLAN, steps=20)
    skips = sum(kind in faults.SKIPS for kind in PLAN)
    health = run.optimizer.health()
    assert run.optimizer.skipped_steps == health.skipped_steps == skips
    assert run.raised["exceptions"] == 6
    assert sum(run.left_out.values()) == len([k for k in PLAN if "factor" not in k])
    assert sum(counts.kept for counts in health.factors.values()) >= PLAN.count("factor")
    early = faults.train(task, faults.MODES[mode], 0, [], steps=10)
    assert run.end_loss() < early.end_loss()


def net():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def batch(n=16):
    return torch.randn(n, 3), torch.randint(4, (n,))


def make(model, **kwargs):
    return KFAC(model, "categorical", **{"lr": 0.1, "damping": 0.01, **kwargs})


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


# Messages.


def test_a_hundred_bad_batches_give_one_warning_and_a_count(caplog):
    model, (x, y) = net(), batch()
    optimizer = make(model)
    step(model, optimizer, x, y)
    caplog.set_level(logging.DEBUG, "kfac_torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(100):
            step(model, optimizer, torch.full_like(x, math.nan), y)
    assert [w.category for w in caught] == [RuntimeWarning]
    assert caught[0].filename == __file__  # the caller's own line
    levels = [record.levelno for record in caplog.records]
    assert levels == [logging.WARNING] + [logging.DEBUG] * 99
    assert optimizer.health().bad_statistics == optimizer.skipped_steps == 100
    with pytest.warns(RuntimeWarning, match="in the gradient; the step is left out"):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        model[0].weight.grad[0, 0] = math.inf
        optimizer.step()
    assert optimizer.health().bad_gradients == 1
    optimizer.close()


# Where no rung of the ladder holds.


def corrupted():
    model, data = net(), batch()
    optimizer = make(model, invert_every=1)
    for _ in range(2):
        step(model, optimizer, *data)
    factor = optimizer.estimator.blocks["2"].factors[1]
    factor.get_cov_var()[0, 1] = math.nan
    return model, optimizer, data, factor


def test_a_corrupted_factor_keeps_its_inverse_three_times_and_is_then_named(caplog):
    model, optimizer, data, factor = corrupted()
    old = factor.state_dict()["powers"][0]["tensors"][0]
    others = optimizer.estimator.blocks["2"].factors[0]
    for number in range(1, 4):
        before = others.state_dict()["powers"][0]["tensors"][0]
        step(model, optimizer, *data)
        assert torch.equal(old, factor.state_dict()["powers"][0]["tensors"][0])
        assert not torch.equal(before, others.state_dict()["powers"][0]["tensors"][0])
        kept = FactorHealth(kept=number, kept_in_a_row=number)
        assert optimizer.health() == Health(factors={"2.output": kept})
        assert all(p.isfinite().all() for p in model.parameters())
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    assert "the last good inverse of 2.output is kept" in caplog.text
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"2\.output has NaN or Inf.*kept for 3 refreshes"
    ):
        step(model, optimizer, *data)
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.close()


def test_a_factor_that_heals_may_be_kept_again():
    model, optimizer, data, factor = corrupted()
    step(model, optimizer, *data)
    factor.get_cov_var().copy_(torch.eye(4))
    step(model, optimizer, *data)
    counts = optimizer.health().factors["2.output"]
    assert (counts.kept, counts.kept_in_a_row) == (1, 0)
    optimizer.close()


def test_without_an_inverse_to_keep_the_first_refresh_raises():
    model = nn.Linear(3, 4)
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution()
    estimator = FisherEstimator(None, 0.95, 0.1, layers)
    model(batch()[0])
    estimator.update_covariances()
    estimator.blocks["model"].factors[0].get_cov_var()[2, 0] = math.inf
    with pytest.raises(torch.linalg.LinAlgError, match=r"model\.input has NaN or Inf"):
        estimator.update_inverses()
    assert not estimator.blocks["model"].factors[1].is_refreshed
    assert estimator.health == Health()
    estimator.close()


def test_a_power_of_a_corrupted_factor_is_kept_too():
    model, (x, _) = nn.Linear(3, 4), batch()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution()
    estimator = FisherEstimator(None, 0.95, 0.1, layers, exps=(-1, -0.5))
    model(x)
    estimator.update_covariances()
    estimator.update_inverses()
    factor = estimator.blocks["model"].factors[0]
    factor.get_cov_var()[0, 2] = math.nan
    estimator.update_inverses()
    assert estimator.health.factors["model.input"].kept == 1
    estimator.max_kept_inverses = 1
    with pytest.raises(torch.linalg.LinAlgError, match=r"model\.input has NaN or Inf"):
        estimator.update_inverses()
    estimator.close()


def test_a_corrupted_factor_of_ekfac_keeps_its_basis():
    model, data = net(), batch()
    optimizer = make(model, invert_every=1, approx="ekfac")
    step(model, optimizer, *data)
    A, _, scales = optimizer.estimator.blocks["0"].factors
    step(model, optimizer, *data)
    old = [q.clone() for q in scales.basis]
    A.get_cov_var()[0, 3] = math.nan
    step(model, optimizer, *data)
    assert all(map(torch.equal, old, scales.basis))
    assert optimizer.health().factors[scales.name].kept == 1
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer.estimator.max_kept_inverses = 1
    with pytest.raises(torch.linalg.LinAlgError, match=r"matrix 0\..* has NaN or Inf"):
        step(model, optimizer, *data)
    optimizer.close()


# State, and steps that never came.


def test_counts_are_resumed():
    model, optimizer, (x, y), _ = corrupted()
    with pytest.warns(RuntimeWarning, match="left out"):
        step(model, optimizer, torch.full_like(x, math.nan), y)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    step(model, optimizer, x, y)
    twin = copy.deepcopy(model)
    resumed = make(twin, invert_every=1)
    resumed.load_state_dict(optimizer.state_dict())
    health = resumed.health()
    assert health == optimizer.health()
    assert (health.skipped_steps, health.forgotten_steps) == (1, 1)
    assert health.factors["2.output"].kept == 1
    assert health.factors["0.input"].rejected == 1
    step(twin, resumed, torch.full_like(x, math.nan), y)  # of a kind that was told of
    assert resumed.skipped_steps == 2
    for one in (optimizer, resumed):
        one.close()


def test_a_first_batch_that_is_bad_does_not_stop_the_automatic_mode():
    model, (x, y) = net(), batch(64)
    optimizer = KFAC(model, "categorical")
    with pytest.warns(RuntimeWarning, match="left out"):
        step(model, optimizer, torch.full_like(x, math.nan), y)
    dampings = set()
    for _ in range(11):
        step(model, optimizer, x, y)
        dampings.add(optimizer.param_groups[0]["damping"])
    assert len(dampings) > 1  # λ adapts
    optimizer.close()


def test_a_gradient_that_overflows_a_second_moment():
    """The square of a finite gradient of a parameter without a block may be infinite."""
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU())
    optimizer = make(model)
    x, y = batch()
    with pytest.warns(UserWarning, match="no K-FAC block"):
        step(model, optimizer, x, y)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    model[1].weight.grad.fill_(1e30)
    with pytest.warns(RuntimeWarning, match="in the gradient"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert all(v.isfinite().all() for s in optimizer.state.values()
               for v in s.values() if isinstance(v, torch.Tensor))  # fmt: skip
    step(model, optimizer, x, y)
    optimizer.close()
