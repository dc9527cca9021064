"""What a step costs by its shapes, and the intervals that follow: all of it by formulas."""

import copy
import itertools
import json
import logging
import math
import statistics

import pytest
import torch
from cost_model import RESULTS
from tasks import char_transformer, digits_autoencoder, mnist_autoencoder
from tasks.base import autoencoder
from tasks.fashion_conv import conv_net
from test_resume import Tied
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from kfac_torch import (
    KFAC,
    KFACPreconditioner,
    LevenbergMarquardt,
    Refresh,
    RelativeDamping,
)
from kfac_torch.checkpoint import to_tensors
from kfac_torch.cost_model import (
    _DECOMPOSITION,
    _ENTRY,
    _INVERSE,
    _LAYER,
    _SIZES,
    _STEP,
    Intervals,
    StepCosts,
)
from kfac_torch.fisher_blocks import Moment

BOTH = ("statistics", "inverses")


def wide():
    """Factors that are large for the batches below: EKFAC decomposes them."""
    return nn.Sequential(nn.Linear(240, 200), nn.Tanh(), nn.Linear(200, 3))


def batch(size=8, width=240):
    return torch.randn(size, width), torch.randint(3, (size,))


def backward(model, optimizer, data):
    if isinstance(optimizer, KFAC):
        optimizer.zero_grad()
    else:
        model.zero_grad()
    cross_entropy(model(data[0]), data[1]).backward()


def step(model, optimizer, data):
    backward(model, optimizer, data)
    optimizer.step()


def after_a_step(model, data, kind=KFAC, **options):
    optimizer = kind(model, "categorical", **options)
    step(model, optimizer, data)
    return optimizer.intervals


# Costs.


def test_all_costs_of_a_net_by_hand():
    """The rates of inverses are those of the smallest matrices."""
    model, R = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), 8
    optimizer = KFAC(model, "categorical")
    backward(model, optimizer, batch(R, 5))
    estimator = optimizer.estimator
    forward = estimator.forward_cost
    assert forward == R * (5 * 4 + 4 * 3)
    estimator.update_covariances()
    costs = estimator.step_costs(forward)
    entries = 6**2 + 4**2 + 5**2 + 3**2
    assert costs.statistics == forward + R * entries + _ENTRY * entries
    products = 6 * 4 * (6 + 4) + 5 * 3 * (5 + 3)
    assert costs.rest == 3 * forward + products + 2 * _LAYER + _STEP
    assert costs.refresh == 48.0 * (6**3 + 4**3 + 5**3 + 3**3)


def test_statistics_of_part_of_the_batch_have_a_forward_of_their_own():
    model, R = nn.Linear(5, 3), 512
    optimizer = KFAC(model, "categorical")
    step(model, optimizer, batch(R, 5))
    forward, entries = R * 5 * 3, 6**2 + 3**2
    expected = (2 * forward + R * entries) / 4 + _ENTRY * entries
    assert optimizer.estimator.step_costs(forward).statistics == expected


def test_the_users_gradients_need_no_backward():
    model, R = nn.Linear(5, 3), 512
    optimizer = KFAC(model, "categorical", estimation_mode="empirical")
    step(model, optimizer, batch(R, 5))
    expected = (R + _ENTRY) * (6**2 + 3**2)
    assert optimizer.estimator.step_costs(R * 5 * 3).statistics == expected


def test_ekfac_decomposes_and_has_twice_the_products():
    model = nn.Linear(5, 3)
    optimizer = KFAC(model, "categorical", approx="ekfac")
    step(model, optimizer, batch(4, 5))
    costs = optimizer.estimator.step_costs(0.0)
    assert costs.rest == 2 * (6 * 3 * (6 + 3)) + _LAYER + _STEP
    assert costs.refresh == 12.0 * (10 * (6**3 + 3**3) + 6 * 3 * (6 + 3))


def test_the_quadratic_model_is_part_of_every_step():
    model, R = nn.Linear(5, 3), 512
    optimizer = KFAC(model, "categorical")
    step(model, optimizer, batch(R, 5))
    forward = R * 5 * 3
    costs = optimizer.estimator.step_costs(forward)
    modelled = optimizer.estimator.step_costs(forward, model_stride=8)  # 64 terms
    assert modelled.rest == costs.rest + 5 / 8 * forward
    share = costs.refresh / (6 * modelled.rest)
    assert optimizer.intervals.refresh_share == share
    twin = copy.deepcopy(model)
    optimizer = KFAC(twin, "categorical", lr=0.1)
    step(twin, optimizer, batch(R, 5))
    assert optimizer.intervals.refresh_share == costs.refresh / (10 * costs.rest)


def conv(*layers):
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(2), Mean(), nn.Linear(6, 3))


class Mean(nn.Module):
    """Over what comes last."""

    def forward(self, x):
        return x.mean(-1)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x))).mean(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0].mean(1))


IMAGES = (4, 2, 9, 8)
NETS = {
    "linear": (lambda: nn.Linear(5, 3), (8, 5), {}),
    "tokens": (Tokens, (8, 6), {}),
    "tied": (Tied, (8, 6), {}),
    "convolution": (lambda: conv(nn.Conv2d(2, 6, 3, 2, 1)), IMAGES, {}),
    "with groups": (lambda: conv(nn.Conv2d(2, 6, 3, groups=2)), IMAGES, {}),
    "reduced": (lambda: conv(nn.Conv2d(2, 6, 3)), IMAGES, {"approx": "kron_reduce"}),
    "diagonal": (lambda: conv(nn.Conv2d(2, 6, 3)), IMAGES, {"approx": "diagonal"}),
    "transposed": (lambda: conv(nn.ConvTranspose2d(2, 6, 3, 2)), IMAGES, {}),
    "empirical": (lambda: nn.Linear(5, 3), (8, 5), {"estimation_mode": "empirical"}),
}


@pytest.mark.parametrize("name", NETS)
def test_the_forward_costs_what_torch_counts(name):
    """Two operations each; what a normalisation multiplies is not counted there."""
    build, shape, options = NETS[name]
    model = build()
    words = name in ("tokens", "tied")
    x = torch.randint(6, shape) if words else torch.randn(shape)
    optimizer = KFAC(model, "categorical", **options)
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    z = model.train()(x)
    cross_entropy(z, torch.randint(3, x.shape[:1])).backward()
    normalised = x.numel() * 5 if name == "tokens" else 0
    cost = optimizer.estimator.forward_cost - normalised
    assert 2 * cost == counter.get_total_flops() > 0


def test_the_maps_inside_an_lstm():
    """Torch counts none of its own kernel's."""
    model = Recurrent()
    optimizer = KFAC(model, "categorical")
    cross_entropy(model(torch.randn(8, 6, 5)), torch.randint(3, (8,))).backward()
    assert optimizer.estimator.forward_cost == 8 * 6 * 16 * (5 + 4) + 8 * 4 * 3


def test_micro_batches_are_one_step():
    model = nn.Linear(5, 3)
    optimizer = KFAC(model, "categorical")
    for size in (8, 4):
        x, y = batch(size, 5)
        cross_entropy(model(x), y).backward()
    model(batch(8, 5)[0])  # no part of it
    assert optimizer.estimator.forward_cost == 12 * 5 * 3


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_moment_is_checked_by_its_extremes(bad, dtype):
    cov = torch.full((3, 70, 70), torch.finfo(dtype).max, dtype=dtype)
    if bad is not None:
        cov[1, 67, 5] = bad
    assert Moment(cov, 1.0, 1.0).is_finite().item() is (bad is None)


def test_the_constants_are_those_that_were_measured():
    found = json.loads(RESULTS.read_text())
    sizes = found["by_size"]
    for name, rates in (("inverse", _INVERSE), ("decomposition", _DECOMPOSITION)):
        values = [sizes[name][str(n)] for n in _SIZES]
        assert [float(f"{value:.2g}") for value in values] == list(rates)
    entry = statistics.median(sizes["entries"][str(n)] for n in _SIZES[2:])
    measured = found["layer"], found["step"], entry
    assert [float(f"{value:.2g}") for value in measured] == [_LAYER, _STEP, _ENTRY]


# From costs to intervals.


@pytest.mark.parametrize(
    ("statistics", "refresh", "free", "expected"),
    [
        (0, 0, BOTH, (3, 6)),
        (100, 150, BOTH, (3, 6)),  # just so: a third, a quarter
        (101, 150, BOTH, (4, 6)),
        (100, 151, BOTH, (3, 9)),  # a multiple of 3
        (500, 151, BOTH, (15, 15)),  # no refresh without new statistics
        (500, 151, ("inverses",), (3, 9)),
        (500, 151, ("statistics",), (15, 6)),
        (500, 151, (), (3, 6)),
        (100, 1e9, BOTH, (3, 99)),
        (1e9, 1e9, BOTH, (100, 100)),
    ],
)
def test_intervals_by_hand(statistics, refresh, free, expected):
    least = Intervals(statistics=3, inverses=6)
    costs = StepCosts(rest=100, statistics=statistics, refresh=refresh)
    found = costs.amortised(least, free)
    assert (found.statistics, found.inverses) == expected
    assert found.statistics_share == statistics / (100 * found.statistics)
    assert found.refresh_share == refresh / (100 * found.inverses)


def test_an_interval_of_the_user_may_be_longer_than_any_that_is_chosen():
    costs = StepCosts(rest=100, statistics=1, refresh=1)
    found = costs.amortised(Intervals(statistics=150, inverses=6), ("inverses",))
    assert found.inverses == 150


# The intervals of nets.


def test_small_nets_keep_what_suits_them():
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
    data = batch(16, 20)
    for options, expected in (({}, (3, 6)), ({"lr": 0.1}, (10, 10))):
        found = after_a_step(copy.deepcopy(model), data, **options)
        assert (found.statistics, found.inverses) == expected
    found = after_a_step(model, data, KFACPreconditioner)
    assert (found.statistics, found.inverses) == (1, 5)


def tasks():
    widths = digits_autoencoder.WIDTHS, mnist_autoencoder.WIDTHS
    t1, t2 = (autoencoder(*w, init=nn.init.xavier_uniform_) for w in widths)
    yield "T1", t1, torch.rand(1797, 64), "bernoulli"
    yield "T2", t2, torch.rand(1000, 784), "bernoulli"
    yield "T4", conv_net(False), torch.rand(512, 784), "categorical"
    text = torch.randint(65, (32, 64))
    yield "T6", char_transformer.CharTransformer(65), text, "categorical"


@pytest.mark.filterwarnings("ignore:.*have no K-FAC block")
def test_the_tasks_of_the_benchmarks_keep_theirs():
    for name, model, x, loss in tasks():
        optimizer = KFAC(model, loss)
        z = model(x)
        z.square().mean().backward()  # any gradient: costs are of shapes
        optimizer.estimator.loss_checked = True
        optimizer.step()
        found = optimizer.intervals
        assert (name, found.statistics, found.inverses) == (name, 3, 6)


def test_large_factors_are_amortised_and_a_larger_batch_bears_more():
    model = wide()
    found = [
        after_a_step(copy.deepcopy(model), batch(size), approx="ekfac")
        for size in (8, 1000)
    ]
    assert [each.inverses for each in found] == [24, 12]
    for each in found:  # the next lower multiple of 3 would be too dear
        share = each.refresh_share
        assert share <= 0.25 < share * each.inverses / (each.inverses - 3)
    preconditioner = after_a_step(model, batch(8), KFACPreconditioner, approx="ekfac")
    assert (preconditioner.statistics, preconditioner.inverses) == (1, 24)


def test_a_refresh_without_an_interval_leaves_that_to_the_model():
    """And counts decompositions that are rarer than refreshes as what they cost."""
    model = wide()
    for options, inverses in (({"staggered": True}, 24), ({"basis_every": 2}, 12)):
        refresh = Refresh(**options)
        for kind in (KFAC, KFACPreconditioner):
            twin = copy.deepcopy(model)
            found = after_a_step(twin, batch(8), kind, approx="ekfac", invert_every=refresh)
            assert found.inverses == inverses


@pytest.mark.parametrize("given", [6, Refresh(every=6), Refresh(every=6, staggered=True)])
def test_what_the_user_gives_is_taken_as_it_is(given):
    model = wide()
    both = {"cov_update_every": 3, "invert_every": given}
    for kind in (KFAC, KFACPreconditioner):
        found = after_a_step(copy.deepcopy(model), batch(), kind, approx="ekfac", **both)
        assert found == Intervals(statistics=3, inverses=6)
    found = after_a_step(model, batch(), approx="ekfac", cov_update_every=7)
    assert (found.statistics, found.inverses % 7) == (7, 0)


def test_they_are_chosen_once_and_told_in_one_line(caplog):
    model = wide()
    optimizer = KFAC(model, "categorical", approx="ekfac")
    assert optimizer.intervals == Intervals(statistics=3, inverses=6)
    seen = []
    with caplog.at_level(logging.INFO, "kfac_torch"):
        after_a_step(nn.Linear(240, 3), batch())  # no news
        for size in (8, 1000, 8):
            step(model, optimizer, batch(size))
            seen.append(optimizer.intervals)
    assert seen[0].inverses == 24
    assert seen == seen[:1] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "K-FAC: statistics every 3 steps, inverses every 24: about 10 % and 24 % of the "
        "rest of a step"
    ]


def test_a_batch_with_a_nan_chooses_nothing():
    model = wide()
    optimizer = KFAC(model, "categorical", approx="ekfac")
    x, y = batch()
    with pytest.warns(RuntimeWarning, match="NaN"):
        step(model, optimizer, (x * math.nan, y))
    assert optimizer.intervals == Intervals(statistics=3, inverses=6)
    step(model, optimizer, (x, y))
    assert optimizer.intervals.inverses == 24


# What happens at them.


def refreshes(model, optimizer, steps):
    """The steps at which inverses were refreshed, by count of steps taken before."""
    found = []
    for _ in range(steps):
        before = optimizer._schedule.num_steps
        step(model, optimizer, batch())
        if optimizer._schedule.last_refresh == before:
            found.append(before)
    return found


def test_the_default_damping_adapts_when_inverses_are_refreshed():
    """A new λ would refresh all of them: every sixth step, whatever the interval."""
    model = wide()
    optimizer = KFAC(model, "categorical", approx="ekfac")
    assert refreshes(model, optimizer, 75) == [0, 1, 2, 24, 48, 72]
    rule, default = optimizer._updates.rule, RelativeDamping().damping
    assert rule.interval == 24
    assert rule.decay**24 == pytest.approx(default.decay**default.interval, rel=1e-12)


def test_a_damping_that_is_given_adapts_as_it_says():
    options = {"approx": "ekfac", "damping": RelativeDamping()}
    model = wide()
    optimizer = KFAC(model, "categorical", **options)
    found = refreshes(model, optimizer, 40)
    assert optimizer._updates.rule.interval == 6
    assert optimizer.intervals.inverses == 24
    assert {0, 1, 2, 24} < set(found)


def test_an_interval_that_is_given_leaves_the_default_damping_alone():
    model = wide()
    optimizer = KFAC(model, "categorical", approx="ekfac", invert_every=12)
    step(model, optimizer, batch())
    assert optimizer._updates.rule.interval == 6


# State.


def assert_same_bits(some, others):
    (a, plain), (b, other_plain) = (
        to_tensors([thing.state_dict() for thing in things]) for things in (some, others)
    )
    assert plain == other_plain
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
@pytest.mark.parametrize("at", [0, 1, 2, 20, 24])
def test_a_run_is_resumed_bit_for_bit(float64, kind, at):
    """The batch after the interruption is of another size, and would choose others."""
    model = wide()
    sizes = itertools.chain([8] * max(at, 1), itertools.repeat(1000))
    data = [batch(size) for size, _ in zip(sizes, range(at + 4), strict=False)]
    optimizer = kind(model, "categorical", approx="ekfac")
    for each in data[:at]:
        step(model, optimizer, each)
    twin = copy.deepcopy(model)
    other = kind(twin, "categorical", approx="ekfac")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.intervals == optimizer.intervals
    for each in data[at:]:
        step(model, optimizer, each)
        step(twin, other, each)
    assert other.intervals == optimizer.intervals
    assert other.intervals.inverses == 24
    assert_same_bits((model, optimizer), (twin, other))


def test_a_state_from_before_there_were_any_keeps_the_least():
    model = wide()
    optimizer = KFAC(model, "categorical", approx="ekfac")
    step(model, optimizer, batch())
    state = optimizer.state_dict()
    del state["kfac"]["intervals"]
    other = KFAC(copy.deepcopy(model), "categorical", approx="ekfac")
    other.load_state_dict(state)
    step(other._model, other, batch())
    assert other.intervals == Intervals(statistics=3, inverses=6)
    assert other._updates.rule.interval == 6


def test_an_interval_given_at_the_resumption_is_the_users():
    model = wide()
    optimizer = KFAC(model, "categorical", approx="ekfac")
    step(model, optimizer, batch())
    other = KFAC(copy.deepcopy(model), "categorical", approx="ekfac", invert_every=6)
    other.load_state_dict(optimizer.state_dict())
    assert (other.intervals.inverses, other._updates.rule.interval) == (6, 6)


def test_a_load_that_fails_leaves_them(monkeypatch):
    model = wide()
    optimizer = KFAC(model, "categorical", approx="ekfac")
    step(model, optimizer, batch())
    other = KFAC(copy.deepcopy(model), "categorical", approx="ekfac")
    state = optimizer.state_dict()
    state["kfac"]["estimator"]["health"] = None
    before = other._schedule.plan
    with pytest.raises((TypeError, ValueError, AttributeError)):
        other.load_state_dict(state)
    assert other.intervals.inverses == 6
    assert other._schedule.plan is before


@pytest.mark.parametrize("given", [None, 6])
def test_where_a_refresh_is_dear_there_are_no_trials_of_damping(given):
    model = wide()
    optimizer = KFAC(model, "categorical", approx="ekfac", invert_every=given)
    step(model, optimizer, batch())
    assert (optimizer.intervals.inverses > 6) == (given is None)
    assert optimizer._updates.rule.trial_steps == (0 if given is None else 2)


def test_a_rule_at_another_interval_has_the_same_factor():
    rule = LevenbergMarquardt(initial=1.0, decay=0.85, interval=6)
    assert rule.every(6) == rule
    longer = rule.every(60)
    assert longer.interval == 60
    assert longer.update(1.0, 0.9) == pytest.approx(rule.update(1.0, 0.9), rel=1e-13)
