"""`torch.optim.swa_utils` beside K-FAC: what docs/weight_averages.md says of it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from kfac_torch import KFAC
from kfac_torch.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("float64")

DECAY = 0.8


def net():
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 4)
    )


def batches(n):
    return [(torch.randn(24, 6), torch.randint(4, (24,))) for _ in range(n)]


def averaged(model, **options):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), **options)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}], ids=["automatic", "regular"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_is_bit_for_bit_the_same_with_an_average_beside_it(when, options):
    start, data = net(), batches(8)
    ends = []
    for beside in (False, True):
        torch.manual_seed(2)
        model = copy.deepcopy(start)
        average = averaged(model) if beside and when == "before" else None
        optimizer = KFAC(model, "categorical", **options)
        for number, (x, y) in enumerate(data):
            if beside and average is None and number == 3:
                average = averaged(model)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            if average is not None:  # where it would do most harm
                with torch.random.fork_rng():
                    update_bn(data, average)
                    functional.cross_entropy(average(x), y).backward()
            loss.backward()
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
        ends.append([*weights(model), *model.buffers()])
        optimizer.close()
    assert all(map(torch.equal, *ends))
    assert average.n_averaged == (8 if when == "before" else 5)


def test_the_average_is_an_exponential_one_and_its_batch_norm_that_of_update_bn():
    model, data = net(), batches(6)
    optimizer = KFAC(model, "categorical")
    average, expected = averaged(model), None
    for x, y in data:
        step(model, optimizer, x, y)
        average.update_parameters(model)
        now = weights(model)
        if expected is None:
            expected = now
        expected = [DECAY * e + (1 - DECAY) * w for e, w in zip(expected, now, strict=True)]
    torch.testing.assert_close(weights(average), expected, rtol=1e-14, atol=1e-15)
    inside = average.module
    assert torch.equal(inside[1].running_mean, model[1].running_mean)  # of other weights
    rows = torch.cat([x for x, _ in data]) @ expected[0].T + expected[1]
    stale = (inside[1].running_mean - rows.mean(0)).abs().max()
    update_bn(data, average)
    torch.testing.assert_close(inside[1].running_mean, rows.mean(0), rtol=1e-12, atol=1e-14)
    assert stale > 0.01
    optimizer.close()


@pytest.mark.filterwarnings("ignore:KFAC.step.*the step is left out:RuntimeWarning")
def test_a_bad_batch_leaves_the_average_finite():
    """But not the running statistics of the model, which update_bn mends in the copy."""
    model, data = net(), batches(3)
    good = list(data)
    optimizer = KFAC(model, "categorical", lr=0.1)
    average = averaged(model)
    for bad in (False, True, False):
        x, y = data.pop()
        before = weights(model)
        step(model, optimizer, x * math.nan if bad else x, y)
        assert bad == all(map(torch.equal, before, weights(model)))
        average.update_parameters(model)
    assert optimizer.skipped_steps == 1
    assert average.n_averaged == 3
    assert all(p.isfinite().all() for p in average.parameters())
    assert average.module[1].running_mean.isnan().any()
    update_bn(good, average)
    average.eval()
    assert average(good[0][0]).isfinite().all()
    optimizer.close()


def test_an_average_in_a_checkpoint(tmp_path):
    model, data = net(), batches(6)
    optimizer, average = KFAC(model, "categorical"), averaged(model)
    twin = net()
    for x, y in data[:3]:
        step(model, optimizer, x, y)
        average.update_parameters(model)
    path = tmp_path / "run.pt"
    save_checkpoint(path, model, optimizer, rng=True, average=average.state_dict())
    resumed, again = KFAC(twin, "categorical"), averaged(twin)
    extra = load_checkpoint(path, twin, resumed, rng=True)
    again.load_state_dict(extra["average"])
    for each, opt, mean in ((model, optimizer, average), (twin, resumed, again)):
        torch.manual_seed(5)
        for x, y in data[3:]:
            step(each, opt, x, y)
            mean.update_parameters(each)
        opt.close()
    assert all(map(torch.equal, weights(average), weights(again)))
    assert average.n_averaged == again.n_averaged == 6
    state = average.state_dict()
    state["module.other"] = state.pop("module.0.weight")
    with pytest.raises(RuntimeError, match=r"Missing.*0\.weight.*\n.*Unexpected.*other"):
        again.load_state_dict(state)
