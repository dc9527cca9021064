"""The empirical mode under a `GradScaler`: statistics are those without one."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC, KFACPreconditioner
from kfac_torch.gradient_probe import GradientProbe

OPTIONS = {"lr": 0.1, "damping": 0.01, "estimation_mode": "empirical"}


def net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 4)
    )


def batches(n):
    return [(torch.randn(24, 1, 4, 4), torch.randint(4, (24,))) for _ in range(n)]


def covs(optimizer):
    blocks = optimizer.estimator.blocks.values()
    return [factor.get_cov() for block in blocks for factor in block.factors]


def train(model, optimizer, data, scaler, micro=1, criterion=functional.cross_entropy):
    for x, y in data:
        optimizer.zero_grad()
        for part in zip(x.chunk(micro), y.chunk(micro), strict=True):
            loss = criterion(model(part[0]), part[1]) / micro
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()


CASES = {
    "kronecker": {},
    "ekfac": {"approx": "ekfac"},
    "diagonal": {"approx": {nn.Linear: "diagonal"}},
    "generic block": {"approx": {"4": "full"}},
    "reduced": {"approx": {nn.Linear: "kron_reduce"}},
    "automatic": {"lr": None, "damping": None},
    "burn-in": {"num_burnin_steps": 2},
    "rarely": {"cov_update_every": 2},
}


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_factors_are_those_without_a_scaler(case, micro):
    """Bit for bit in float32: the scale is a power of two, and nothing overflows."""
    model, data = net(), batches(6)
    twin = copy.deepcopy(model)
    a, b = (KFAC(m, "categorical", **{**OPTIONS, **CASES[case]}) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
    train(model, a, data, scaler, micro)
    train(twin, b, data, None, micro)
    assert scaler.get_scale() == 2.0**17
    assert all(map(torch.equal, covs(a), covs(b)))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert a.health().unknown_scales == 0
    a.close()
    b.close()


@pytest.mark.parametrize("case", ["kronecker", "generic block"])
def test_clipping_has_no_part_in_the_statistics(case):
    model, [(x, y)] = net(), batches(1)
    twin = copy.deepcopy(model)
    a, b = (KFAC(m, "categorical", **{**OPTIONS, **CASES[case]}) for m in (model, twin))
    for each, optimizer, limit in ((model, a, 1e-3), (twin, b, 1e6)):
        functional.cross_entropy(each(x), y).backward()
        nn.utils.clip_grad_norm_(each.parameters(), limit)
        optimizer.step()
    assert all(map(torch.equal, covs(a), covs(b)))


def test_a_sum_over_terms_under_a_scaler():
    model, data = net(), batches(4)
    twin, criterion = copy.deepcopy(model), nn.CrossEntropyLoss(reduction="sum")
    a, b = (KFAC(m, criterion, **OPTIONS) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    train(model, a, data, scaler, criterion=criterion)
    train(twin, b, data, None, criterion=criterion)
    assert all(map(torch.equal, covs(a), covs(b)))


def test_a_loss_that_is_another_multiple_is_still_found_out():
    """The first gradient is that of three times the loss, and scaled."""
    model, data = net(), batches(1)
    twin = copy.deepcopy(model)
    a, b = (KFAC(m, "categorical", **OPTIONS) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)

    def thrice(z, y):
        return 3 * functional.cross_entropy(z, y)

    with pytest.warns(UserWarning, match="is 3 times that of the mean over 24"):
        train(model, a, data, scaler, criterion=thrice)
    train(twin, b, data, None)
    torch.testing.assert_close(covs(a), covs(b), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("approx", ["kronecker", "ekfac", "diagonal"])
def test_gradients_in_half_precision_are_divided_in_float32(approx, dtype):
    """A scale that half precision cannot hold, of gradients that it can."""
    model, data = net(), batches(1)
    twin = copy.deepcopy(model)
    options = {**OPTIONS, **CASES[approx]}
    a, b = (KFAC(m, "categorical", **options) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17)
    for each, optimizer, scaling in ((model, a, scaler), (twin, b, None)):
        with torch.autocast("cpu", dtype=dtype):
            train(each, optimizer, data, scaling)
    assert all(cov.dtype == torch.float32 for cov in covs(a))
    torch.testing.assert_close(covs(a), covs(b), rtol=0.05, atol=1e-4)


def test_the_preconditioner_sees_the_scale():
    model, data = net(), batches(4)
    twin, ends = copy.deepcopy(model), []
    for each, scaled in ((model, True), (twin, False)):
        sgd = torch.optim.SGD(each.parameters(), lr=0.1)
        options = {k: v for k, v in OPTIONS.items() if k != "lr"}
        preconditioner = KFACPreconditioner(each, "categorical", **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=scaled)
        for x, y in data:
            sgd.zero_grad()
            scaler.scale(functional.cross_entropy(each(x), y)).backward()
            scaler.unscale_(sgd)
            assert preconditioner.step()
            scaler.step(sgd)
            scaler.update()
        ends.append([*covs(preconditioner), *(p.detach() for p in each.parameters())])
    assert all(map(torch.equal, *ends))


def clipped(model, optimizer, x, y, clip):
    """A step scaled by 2^16 and, maybe, clipped to 0.3 of its norm."""
    optimizer.zero_grad()
    (2.0**16 * functional.cross_entropy(model(x), y)).backward()
    for p in model.parameters():
        p.grad *= 2.0**-16 * clip
    optimizer.step()


def test_where_the_scale_is_not_known_the_statistics_are_left_out_and_stay_due():
    model, data = net(), batches(4)
    optimizer = KFAC(model, "categorical", **OPTIONS, cov_update_every=2)
    clipped(model, optimizer, *data[0], 1.0)
    clipped(model, optimizer, *data[1], 0.3)  # none are due
    assert optimizer.health().unknown_scales == 0
    before = [cov.clone() for cov in covs(optimizer)]
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="norm_constraint= in place of cl") as caught:
        clipped(model, optimizer, *data[2], 0.3)
    assert caught[0].filename == __file__  # the caller's own line
    clipped(model, optimizer, *data[2], 0.3)  # without a second warning
    assert optimizer.health().unknown_scales == 2
    assert "2 statistics left out, of unknown scale" in str(optimizer.health())
    assert optimizer.skipped_steps == 0
    assert all(map(torch.equal, before, covs(optimizer)))
    assert not any(map(torch.equal, weights, model.parameters()))
    assert optimizer.last_step.statistics_age == 3
    clipped(model, optimizer, *data[3], 1.0)
    assert optimizer.last_step.statistics_age == 0
    assert not any(map(torch.equal, before, covs(optimizer)))
    state = optimizer.state_dict()
    twin = net()
    resumed = KFAC(twin, "categorical", **OPTIONS, cov_update_every=2)
    resumed.load_state_dict(state)
    assert resumed.health() == optimizer.health()


@pytest.mark.filterwarnings("ignore:.*a GradScaler and a clipped:RuntimeWarning")
def test_without_any_statistics_the_step_is_left_out_too():
    model, [(x, y)] = net(), batches(1)
    optimizer = KFAC(model, "categorical", **OPTIONS)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match="in the scale of the user's gradients; the st"):
        clipped(model, optimizer, x, y, 0.3)
    assert all(map(torch.equal, weights, model.parameters()))
    clipped(model, optimizer, x, y, 1.0)
    assert not any(map(torch.equal, weights, model.parameters()))


@pytest.mark.filterwarnings("ignore:KFAC.step.*the step is left out:RuntimeWarning")
def test_a_bad_batch_is_counted_as_that():
    model, data = net(), batches(2)
    optimizer = KFAC(model, "categorical", **OPTIONS)
    train(model, optimizer, data[:1], None)
    train(model, optimizer, [(data[1][0] * math.nan, data[1][1])], None)
    assert (optimizer.skipped_steps, optimizer.health().unknown_scales) == (1, 0)


def test_a_probe_of_which_one_is_dead_and_one_is_not_reached():
    dead, away, alive = (nn.Parameter(torch.ones(n)) for n in (1, 2, 3))
    probe = GradientProbe([dead, away, alive])
    assert probe.ratio() is None
    (4096 * (alive.sum() + 0 * dead.sum())).backward()
    for p in (dead, alive):
        p.grad /= 4096
    assert probe.scale() == 4096
    probe.clear()
    assert probe.ratio() is None
    probe.close()
    alive.sum().backward()
    assert probe.ratio() is None
