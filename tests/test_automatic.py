"""`KFAC(model, loss)`: nothing to tune, no closure; losses read off their gradients."""

import copy
import io
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import (
    KFAC,
    LevenbergMarquardt,
    QModel,
    Refresh,
    RelativeDamping,
    Statistics,
    TrustRegion,
)
from kfac_torch.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    ConvexLoss,
    NaturalParamsNegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
    NormalMeanVarianceNegativeLogProbLoss,
    OnehotCategoricalLogitsNegativeLogProbLoss,
)
from kfac_torch.quadratic_model import QuadraticModel

pytestmark = pytest.mark.usefixtures("float64")

N, IN, OUT = 12, 5, 4


def net(out=OUT, dropout=0.0):
    return nn.Sequential(
        nn.Linear(IN, 6),
        nn.BatchNorm1d(6, affine=False),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(6, out),
    )


def plain(out=OUT):
    return nn.Sequential(nn.Linear(IN, 6), nn.Tanh(), nn.Linear(6, out))


def labels(n=N):
    return torch.randint(OUT, (n,))


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# What a gradient tells of the loss.


class Poisson(NaturalParamsNegativeLogProbLoss):
    """A loss of one's own, without closed forms."""

    elementwise = True

    def sample(self, generator=None):
        return torch.poisson(self.inputs.detach().exp(), generator=generator)

    def evaluate_on_targets(self, targets):
        return (self.inputs.exp() - targets * self.inputs).sum()


class PseudoHuber(ConvexLoss):
    elementwise = True
    offset = 0.0

    def evaluate_on_targets(self, targets):
        rest = self.inputs - targets
        return (((1 + rest.square()).sqrt() - 1).sum(1) + self.offset).sum()


class Lowered(PseudoHuber):
    offset = -1000.0


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
SHARES = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
PIXELS = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
RESIDUAL = torch.zeros(N, OUT, dtype=torch.float64)


def some_ignored():
    y = labels()
    y[1::3] = -100
    return y


def bits(soft=False):
    y = torch.rand(N, OUT)
    return y if soft else (y > 0.5).to(y.dtype)


def summed(criterion):
    return lambda z, y: criterion(z, y, reduction="none").flatten(1).sum(1).mean()


def normal_variance(z, y):
    mean, variance = to_variance(z).chunk(2, -1)
    loss = (y - mean).square() / variance + variance.log()
    return 0.5 * loss.sum(1).mean()


def to_variance(z):
    mean, raw = z.chunk(2, -1)
    return torch.cat([mean, functional.softplus(raw) + 0.1], -1)


def masked(z):
    z = z.clone()
    z[:, 0] = -torch.inf
    return z


cross_entropy = functional.cross_entropy
TOLD = {
    "labels": ("categorical", cross_entropy, labels, None),
    "probabilities": ("categorical", cross_entropy, lambda: SHARES.expand(N, OUT), None),
    "smoothed": (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        partial(cross_entropy, label_smoothing=0.2),
        labels,
        None,
    ),
    "smoothed, by name": (
        "categorical",
        partial(cross_entropy, label_smoothing=0.2),
        labels,
        None,
    ),
    "weighted": (
        nn.CrossEntropyLoss(weight=WEIGHT),
        lambda z, y: cross_entropy(z, y, WEIGHT),
        labels,
        None,
    ),
    "weighted and smoothed": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        lambda z, y: cross_entropy(z, y, WEIGHT, label_smoothing=0.2),
        labels,
        None,
    ),
    "ignored": (nn.CrossEntropyLoss(), cross_entropy, some_ignored, None),
    "summed": (
        nn.CrossEntropyLoss(reduction="sum"),
        partial(cross_entropy, reduction="sum"),
        labels,
        None,
    ),
    "pixels": (
        nn.CrossEntropyLoss(),
        cross_entropy,
        lambda: torch.randint(2, (N, 2)),
        lambda z: z.view(N, 2, 2),
    ),
    "log-probabilities": (
        "categorical",
        functional.nll_loss,
        labels,
        lambda z: z.log_softmax(1),
    ),
    "masked": (
        "categorical",
        cross_entropy,
        lambda: 1 + torch.randint(OUT - 1, (N,)),
        masked,
    ),
    "one-hot": (
        OnehotCategoricalLogitsNegativeLogProbLoss,
        lambda z, y: -(y * z.log_softmax(1)).sum(1).mean(),
        lambda: functional.one_hot(labels(), OUT).double(),
        None,
    ),
    "bits": (
        "bernoulli",
        summed(functional.binary_cross_entropy_with_logits),
        bits,
        None,
    ),
    "soft bits": (
        "bernoulli",
        summed(functional.binary_cross_entropy_with_logits),
        partial(bits, True),
        None,
    ),
    "bits, a mean over outputs": (
        nn.BCEWithLogitsLoss(),
        functional.binary_cross_entropy_with_logits,
        bits,
        None,
    ),
    "weighted bits": (
        nn.BCEWithLogitsLoss(weight=PIXELS, pos_weight=WEIGHT, reduction="sum"),
        nn.BCEWithLogitsLoss(weight=PIXELS, pos_weight=WEIGHT, reduction="sum"),
        bits,
        None,
    ),
    "squares": ("normal", lambda z, y: 0.5 * (z - y).square().sum(1).mean(), bits, None),
    "squares of any width": (
        partial(NormalMeanNegativeLogProbLoss, var=0.5),
        lambda z, y: (z - y).square().sum(1).mean(),
        bits,
        None,
    ),
    "mean squares": (nn.MSELoss(), functional.mse_loss, bits, None),
    "sum of squares": (
        nn.MSELoss(reduction="sum"),
        partial(functional.mse_loss, reduction="sum"),
        bits,
        None,
    ),
    "a variance of its own": (
        lambda z: NormalMeanVarianceNegativeLogProbLoss.from_output(z),
        lambda z, y: normal_variance_of(z, y),
        lambda: torch.randn(N, 2),
        to_variance,
    ),
    "Poisson": (
        Poisson,
        lambda z, y: (z.exp() - y * z).sum(1).mean(),
        lambda: torch.randint(5, (N, OUT)).double(),
        None,
    ),
    "targets that are given": (
        partial(PseudoHuber, targets=RESIDUAL),
        lambda z, y: PseudoHuber(z).evaluate_on_targets(y) / N,
        lambda: RESIDUAL,
        None,
    ),
}


def normal_variance_of(z, y):
    mean, variance = z.chunk(2, -1)
    return 0.5 * ((y - mean).square() / variance + variance.log()).sum(1).mean()


class With(nn.Module):
    """A net and what comes behind it."""

    def __init__(self, behind):
        super().__init__()
        self.net, self.behind = plain(), behind

    def forward(self, x):
        z = self.net(x)
        return z if self.behind is None else self.behind(z)


def case(name):
    loss, criterion, targets, behind = TOLD[name]
    return With(behind), loss, criterion, torch.randn(N, IN), targets()


@pytest.mark.parametrize("name", TOLD)
def test_value_and_change_are_those_of_the_loss(name):
    model, loss, criterion, x, y = case(name)
    optimizer = KFAC(model, loss)
    value = criterion(model(x), y)
    value.backward()
    batch = optimizer.estimator.batch_loss()
    terms = optimizer.estimator.num_terms if optimizer.estimator.sums_gradients else 1
    if name != "Poisson":  # which has terms without the network's output
        torch.testing.assert_close(
            batch.value(), value.detach() / terms, rtol=1e-12, atol=1e-12
        )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
        z = model(x)
        change = criterion(z, y) - value
    torch.testing.assert_close(batch.change([[z]]), change / terms, rtol=1e-12, atol=1e-12)
    assert batch.tells_change()
    assert batch.size() >= 0


MICRO = {
    "the mean of means": (lambda n, k: 1 / k, (6, 6, 6)),
    "shares": (lambda n, k: n / 18, (3, 5, 10)),
    "the sum of means": (lambda n, k: 1.0, (3, 5, 10)),
}


@pytest.mark.parametrize("how", MICRO)
def test_micro_batches_are_one_batch(how):
    """Of the sum of means the loss is that sum."""
    share, sizes = MICRO[how]
    model = plain()
    optimizer = KFAC(model, "categorical")
    x, y = torch.randn(18, IN), labels(18)
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))

    def evaluate():
        return [share(len(x), 3) * cross_entropy(model(x), y) for x, y in parts]

    values = evaluate()
    for value in values:
        value.backward()
    value = sum(values)
    optimizer.estimator.check_loss()
    batch = optimizer.estimator.batch_loss()
    torch.testing.assert_close(batch.value(), value.detach(), rtol=1e-12, atol=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
        outputs = [[model(x)] for x, _ in parts]
        change = sum(evaluate()) - value
    torch.testing.assert_close(batch.change(outputs), change, rtol=1e-11, atol=0)


def test_several_losses_add_up():
    model = nn.ModuleDict({"a": nn.Linear(IN, OUT), "b": nn.Linear(IN, 2)})
    model.forward = lambda x: {"class": model["a"](x), "box": model["b"](x)}
    from kfac_torch import LayerCollection

    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution("class")
    layers.register_squared_error_loss("box", coeff=0.5)
    optimizer = KFAC(model, None, layers)
    x, y, t = torch.randn(N, IN), labels(), torch.randn(N, 2)

    def evaluate():
        z = model(x)
        return cross_entropy(z["class"], y) + 0.5 * (z["box"] - t).square().sum(1).mean()

    value = evaluate()
    value.backward()
    batch = optimizer.estimator.batch_loss()
    torch.testing.assert_close(batch.value(), value.detach())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
        z = model(x)
    change = batch.change([[z["class"], z["box"]]])
    torch.testing.assert_close(change, evaluate().detach() - value.detach())


# The plain loop.


def train(model, optimizer, batches, criterion=cross_entropy, l2=0.0):
    records = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss = loss + l2 / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        optimizer.step()
        records.append(optimizer.last_step)
    return records


def train_with_closure(model, optimizer, batches, criterion=cross_entropy, l2=0.0):
    records = []
    for x, y in batches:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss = loss + l2 / 2 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        records.append(optimizer.last_step)
    return records


def batches(count, n=40):
    return [(torch.randn(n, IN), labels(n)) for _ in range(count)]


def rule(**options):
    return LevenbergMarquardt(**{"initial": 0.1, "interval": 2, **options})


OPTIONS = {
    "automatic": {},
    "every step": {"damping": RelativeDamping(rule(interval=1, calibrate=True))},
    "classic": {"lr": 0.3, "damping": rule()},
    "adam": {"lr": 0.3, "damping": rule(), "momentum_type": "adam"},
    "a model without limits": {"momentum_type": "qmodel", "damping": rule()},
    "l2": {"damping": RelativeDamping(rule(l2_reg=0.05))},
    "trials": {"lr": 0.3, "damping": rule(trial_steps=2)},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_plain_loop_is_the_loop_with_a_closure(options):
    """Dropout and batch norm too: the second evaluation is of the same function."""
    options, data = OPTIONS[options], batches(8)
    l2 = 0.05 if options.get("damping") == RelativeDamping(rule(l2_reg=0.05)) else 0.0
    model = net(dropout=0.3)
    twin = copy.deepcopy(model)
    a, b = KFAC(model, "categorical", **options), KFAC(twin, "categorical", **options)
    torch.manual_seed(1)
    ours = train(model, a, data, l2=l2)
    torch.manual_seed(1)
    theirs = train_with_closure(twin, b, data, l2=l2)
    ratios = [record.rho for record in ours if record.rho is not None]
    assert ratios == pytest.approx([r.rho for r in theirs if r.rho is not None], rel=1e-7)
    assert len(ratios) >= 1
    torch.testing.assert_close(vector(model), vector(twin), rtol=1e-9, atol=1e-12)
    assert a.param_groups[0]["damping"] == pytest.approx(b.param_groups[0]["damping"])
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, twin.get_buffer(name))


def test_the_second_evaluation_leaves_no_trace():
    model = net(dropout=0.3)
    twin = copy.deepcopy(model)
    a = KFAC(model, "categorical", damping=RelativeDamping(rule(interval=1)))
    b = KFAC(twin, "categorical", damping=RelativeDamping(0.1))
    for x, y in batches(3):
        for one, optimizer in ((model, a), (twin, b)):
            torch.manual_seed(2)
            optimizer.zero_grad()
            cross_entropy(one(x), y).backward()
            optimizer.step()
            after = torch.get_rng_state()
        torch.manual_seed(2)
        twin_state = twin.state_dict()
        assert all(torch.equal(v, twin_state[k]) for k, v in model.state_dict().items())
        assert torch.equal(after, torch.get_rng_state()) is False  # dropout has drawn
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        b.param_groups[0]["damping"] = a.param_groups[0]["damping"]
        b._schedule.inverses_due = a._schedule.inverses_due
    assert a.last_step.rho is not None


def test_a_gradient_scaler_changes_nothing():
    model, data = plain(), batches(6)
    twin = copy.deepcopy(model)
    a, b = (KFAC(m, "categorical") for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for x, y in data:
        a.zero_grad()
        scaler.scale(cross_entropy(model(x), y)).backward()
        scaler.step(a)
        scaler.update()
    train(twin, b, data)
    torch.testing.assert_close(vector(model), vector(twin), rtol=1e-12, atol=1e-14)
    assert a.last_step.loss == pytest.approx(float(b.last_step.loss), rel=1e-12)
    assert scaler.get_scale() > 2**12


def test_a_clipped_norm_does_not_change_the_loss():
    model, (x, y) = plain(), batches(1)[0]
    optimizer = KFAC(model, "categorical")
    value = cross_entropy(model(x), y)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.testing.assert_close(optimizer.estimator.batch_loss().value(), value.detach())


def test_a_scaler_and_a_clipped_norm_at_once_are_not_told_apart():
    """Then there is no limit, and λ stays: a step is taken all the same."""
    model = plain()
    optimizer = KFAC(model, "categorical", damping=RelativeDamping(rule(interval=1)))
    x, y = batches(1)[0]
    (2.0**16 * cross_entropy(model(x), y)).backward()
    for p in model.parameters():
        p.grad *= 0.3 * 2.0**-16
    before = vector(model)
    optimizer.step()
    assert math.isnan(optimizer.last_step.loss)
    assert not torch.equal(before, vector(model))
    assert optimizer.param_groups[0]["damping"] == optimizer.last_step.damping


@pytest.mark.parametrize("kind", ["sum", "micro-batches"])
def test_steps_do_not_depend_on_reduction_and_micro_batches(kind):
    model, data = plain(), batches(6)
    twin = copy.deepcopy(model)
    options = {"estimation_mode": "exact"}
    a = KFAC(model, nn.CrossEntropyLoss(), **options)
    records = train(model, a, data)
    if kind == "sum":
        criterion = nn.CrossEntropyLoss(reduction="sum")
        b = KFAC(twin, criterion, **options)
        train(twin, b, data, criterion)
    else:
        b = KFAC(twin, nn.CrossEntropyLoss(), **options)
        for x, y in data:
            b.zero_grad()
            for part, target in zip(x.split(10), y.split(10), strict=True):
                (cross_entropy(twin(part), target) / 4).backward()
            b.step()
    torch.testing.assert_close(vector(model), vector(twin), rtol=1e-9, atol=1e-12)
    assert a.damping_unit == pytest.approx(b.damping_unit)
    assert b.last_step.damping == pytest.approx(records[-1].damping)
    assert b.last_step.rho is None or b.last_step.rho == pytest.approx(records[-1].rho)


# The step.


def exact_fisher(model, x, loss):
    """Dense, of the mean loss: `(1/N) Σ Jᵀ F_L J`."""
    model = copy.deepcopy(model)
    params = {n: p.detach() for n, p in model.named_parameters()}
    jac = torch.func.jacrev(lambda q: torch.func.functional_call(model, q, (x,)))(params)
    J = torch.cat([j.flatten(2) for j in jac.values()], 2)
    z = model(x).detach()
    columns = [
        loss(z).multiply_fisher(e)
        for e in torch.eye(z.shape[1])[:, None].expand(-1, *z.shape)
    ]
    F_L = torch.stack(columns, 2)
    return torch.einsum("nki,nkl,nlj->ij", J, F_L, J) / len(x)


REGIONS = {
    "labels": ("categorical", CategoricalLogitsNegativeLogProbLoss, cross_entropy, labels),
    "a variance of its own": (
        lambda z: NormalMeanVarianceNegativeLogProbLoss.from_output(z),
        lambda z: NormalMeanVarianceNegativeLogProbLoss.from_output(z),
        normal_variance_of,
        lambda: 5 * torch.randn(N, 2),
    ),
    "a loss below 0": (
        partial(Lowered, targets=3 + RESIDUAL),
        partial(Lowered, targets=3 + RESIDUAL),
        lambda z, y: Lowered(z).evaluate_on_targets(y) / N,
        lambda: 3 + RESIDUAL,
    ),
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_step_stays_in_the_trust_region(name):
    """`δᵀFδ <= f L` by dense matrices, and at the border where it holds a step back."""
    declared, factory, criterion, targets = REGIONS[name]
    model = With(to_variance) if "variance" in name else plain()
    x, y = torch.randn(N, IN), targets()
    optimizer = KFAC(model, declared, damping=RelativeDamping(1e-6))
    ratios = []
    for step in range(8):
        before, F = vector(model), exact_fisher(model, x, factory)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        size = optimizer.estimator.batch_loss().size()
        optimizer.step()
        delta = vector(model) - before
        fraction = 0.03 + 0.07 * math.exp(-step / 20)
        ratios.append(((delta @ F @ delta) / size).item() / fraction)
        if name == "labels":
            torch.testing.assert_close(size, loss.detach())
    assert max(ratios) == pytest.approx(1, rel=1e-6)
    assert min(ratios) > 0


def test_a_constant_that_is_added_to_a_convex_loss_changes_no_step():
    model, x = plain(), torch.randn(N, IN)
    twin = copy.deepcopy(model)
    for one, kind in ((model, PseudoHuber), (twin, Lowered)):
        optimizer = KFAC(one, partial(kind, targets=3 + RESIDUAL))
        train(
            one,
            optimizer,
            [(x, 3 + RESIDUAL)] * 6,
            lambda z, y, k=kind: k(z).evaluate_on_targets(y) / N,
        )
    torch.testing.assert_close(vector(model), vector(twin))


def test_the_unit_of_the_trust_region_may_be_given():
    model, (x, y) = plain(), batches(1)[0]
    region = TrustRegion(fraction=0.5, unit=1e-4)
    optimizer = KFAC(model, "categorical", norm_constraint=region)
    before, F = vector(model), exact_fisher(model, x, CategoricalLogitsNegativeLogProbLoss)
    train(model, optimizer, [(x, y)])
    delta = vector(model) - before
    assert (delta @ F @ delta).item() == pytest.approx(0.5e-4)
    optimizer.param_groups[0]["trust_region"] = 0.25
    before, F = vector(model), exact_fisher(model, x, CategoricalLogitsNegativeLogProbLoss)
    train(model, optimizer, [(x, y)])
    delta = vector(model) - before
    assert (delta @ F @ delta).item() == pytest.approx(0.25e-4)


def test_a_region_that_shrinks_is_in_proportion_to_the_group():
    model, (x, y) = plain(), batches(1)[0]
    region = TrustRegion(fraction=0.5, final=0.1, decay_steps=2.0, unit=1e-4)
    optimizer = KFAC(model, "categorical", norm_constraint=region)
    optimizer.param_groups[0]["trust_region"] = 0.25
    for step in range(3):
        before = vector(model)
        F = exact_fisher(model, x, CategoricalLogitsNegativeLogProbLoss)
        train(model, optimizer, [(x, y)])
        delta = vector(model) - before
        expected = 1e-4 * (0.05 + 0.2 * math.exp(-step / 2))
        assert (delta @ F @ delta).item() == pytest.approx(expected)


def test_momentum_within_bounds_is_the_best_one_there():
    """Against a fine grid of momenta, each with its own best step size."""
    seen = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(2, 2, generator=generator)
        slopes = torch.randn(2, generator=generator)
        model = QuadraticModel(root @ root.mT, torch.eye(2), slopes)
        w = model.minimize(0.1, max_momentum=0.95)
        assert 0 <= w[1] <= 0.95
        M = torch.linspace(0, 0.95, 2001)
        C = model.matrix(0.1)
        alpha = -(slopes[0] + C[0, 1] * M) / C[0, 0]
        W = torch.stack([alpha, M], 1)
        values = W @ slopes + 0.5 * torch.einsum("ki,ij,kj->k", W, C, W)
        assert model.change(w, 0.1) <= values.min() + 1e-12
        seen.add("low" if w[1] == 0 else "high" if w[1] == 0.95 else "between")
    assert seen == {"low", "high", "between"}


def test_momentum_of_a_step_stays_within_bounds():
    for limit, options in ((0.95, {}), (0.4, {"momentum_type": QModel(max_momentum=0.4)})):
        model = plain()
        records = train(model, KFAC(model, "categorical", **options), batches(1) * 15)
        momenta = [float(record.momentum) for record in records]
        assert all(0 <= m <= limit for m in momenta)
    assert max(momenta) == 0.4


# What setting one thing changes.

RECIPE = {
    "statistics": (3, 0.85, 10),
    "inverses": 6,
    "model": QModel(),
    "samples": Statistics(),
    "region": TrustRegion(fraction=0.1, final=0.03),
    "damping": RelativeDamping(),
    "free": {"statistics", "inverses"},
}


def recipe(**options):
    """All that the options of an optimizer stand for, but for λ and rates of groups."""
    optimizer = KFAC(plain(), "categorical", **options)
    schedule, chosen = optimizer._schedule, optimizer._options()
    optimizer.close()
    return {
        "statistics": (
            chosen["cov_update_every"],
            optimizer.estimator.cov_ema_decay,
            chosen["early_updates"],
        ),
        "inverses": chosen["invert_every"],
        "model": chosen["quadratic_model"],
        "samples": chosen["statistics"],
        "region": chosen["trust region"],
        "damping": chosen["damping"],
        "free": set(schedule._free),
    }


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, {}),
        ({"lr": 1.0, "momentum_type": QModel()}, {}),
        (
            {"momentum_type": QModel(batch_fraction=0.5)},
            {"model": replace(QModel(), batch_fraction=0.5)},
        ),
        (
            {"momentum_type": QModel(fixed_momentum=True), "momentum": 0.5},
            {"model": replace(QModel(), fixed_momentum=True)},
        ),
        (
            {"estimation_mode": Statistics(batch_fraction=0.5)},
            {"samples": replace(Statistics(), batch_fraction=0.5)},
        ),
        ({"estimation_mode": "exact"}, {"samples": Statistics.whole("exact")}),
        (
            {"invert_every": Refresh(staggered=True)},
            {"inverses": Refresh(every=6, staggered=True)},
        ),
        (
            {"invert_every": Refresh(every=4)},
            {"inverses": 4, "free": {"statistics"}},
        ),
        (
            {"cov_update_every": 3},
            {"statistics": (3, 0.85, 0), "free": {"inverses"}},
        ),
        ({"cov_ema_decay": 0.9}, {"statistics": (3, 0.9, 10)}),
        ({"damping": 0.1}, {"damping": "a number"}),
        (
            {"damping": RelativeDamping(LevenbergMarquardt(initial=0.3))},
            {"damping": RelativeDamping(LevenbergMarquardt(initial=0.3))},
        ),
        ({"norm_constraint": None}, {"region": None}),
        (
            {"momentum_type": QModel(min_terms=1), "norm_constraint": None},
            {"model": replace(QModel(), min_terms=1), "region": None},
        ),
        (
            {"norm_constraint": TrustRegion(fraction=0.2)},
            {"region": TrustRegion(fraction=0.2)},
        ),
        (
            {"momentum_type": "qmodel"},
            {
                "statistics": (10, 0.95, 10),
                "inverses": 10,
                "model": QModel.exact(),
                "region": None,
            },
        ),
        (
            {"lr": 0.1},
            {
                "statistics": (10, 0.95, 10),
                "inverses": 10,
                "model": None,
                "region": None,
                "damping": RelativeDamping(0.1),
            },
        ),
    ],
)
def test_what_is_not_set_stays_as_it_is(options, changed):
    assert recipe(**options) == {**RECIPE, **changed}


@pytest.mark.parametrize(
    "options",
    [
        {"momentum_type": QModel()},
        {"momentum_type": QModel(), "lr": 1.0},
        {"estimation_mode": Statistics()},
        {"invert_every": Refresh()},
        {"norm_constraint": TrustRegion(fraction=0.1, final=0.03)},
        {"damping": RelativeDamping()},
        {"cov_ema_decay": 0.85},
    ],
)
def test_saying_a_default_changes_no_step(options):
    models = [plain()]
    models.append(copy.deepcopy(models[0]))
    data = batches(8)
    for model, given in zip(models, ({}, options), strict=True):
        train(model, KFAC(model, "categorical", **given), data)
    assert torch.equal(vector(models[0]), vector(models[1]))


# Damping.


def test_the_unit_of_damping_is_the_mean_curvature_at_the_start():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, groups=1), nn.Tanh(), nn.Flatten(), nn.Linear(16, OUT)
    )
    x, y = torch.randn(9, 1, 4, 4), labels(9)
    optimizer = KFAC(model, "categorical", damping=RelativeDamping(0.3))
    assert optimizer.damping_unit is None
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()
    dense = [b.full_fisher_block() for b in optimizer.estimator.blocks.values()]
    unit = sum(F.trace() for F in dense) / sum(len(F) for F in dense)
    assert optimizer.damping_unit == pytest.approx(unit.item(), rel=1e-12)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.3 * unit.item())
    before = optimizer.damping_unit
    train(model, optimizer, [(x, y)] * 3)
    assert optimizer.damping_unit == before  # whatever the curvature is by now


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (RelativeDamping(0.5), 0.5),
        (RelativeDamping(lambda step: 0.5 / (1 + step)), 0.25),
        (RelativeDamping(rule(initial=0.5, interval=100)), 0.5),
        (None, 0.1),
    ],
)
@pytest.mark.parametrize("lr", [None, 0.1])
def test_relative_damping_has_every_form(given, expected, lr):
    if given is None and lr is None:
        given = RelativeDamping(replace(RelativeDamping().damping, trial_steps=0))
    model = plain()
    optimizer = KFAC(model, "categorical", lr=lr, damping=given)
    train(model, optimizer, batches(2))
    assert optimizer.last_step.damping / optimizer.damping_unit == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_steps_do_not_depend_on_the_unit_of_the_inputs(scale):
    """A layer whose inputs are scaled and whose weights make up for it moves alike."""
    data = batches(5)
    model = nn.Sequential(nn.Linear(IN, 6, bias=False), nn.Tanh(), nn.Linear(6, OUT))
    ratios = []
    for factor in (1.0, scale):
        one = nn.Sequential(nn.Linear(IN, OUT, bias=False))
        with torch.no_grad():
            one[0].weight.copy_(model[0].weight[:OUT] / factor)
        optimizer = KFAC(one, "categorical", damping=RelativeDamping(0.1))
        train(one, optimizer, [(factor * x, y) for x, y in data])
        ratios.append(one[0].weight.detach() * factor)
    torch.testing.assert_close(*ratios, rtol=1e-8, atol=1e-10)


def test_a_loss_that_a_gradient_does_not_tell():
    """By default λ stays, with a warning; the step is limited by what a closure returns."""

    class Untold(CategoricalLogitsNegativeLogProbLoss):
        def change_from_gradient(self, outputs, gradient, weights=None):
            return None

        def size_from_gradient(self, gradient, weights=None):
            return None

    model, data = plain(), batches(1) * 6
    optimizer = KFAC(model, Untold)
    with pytest.warns(UserWarning, match=r"expected step\(closure\).*damping stays"):
        train(model, optimizer, data[:1])
    records = train(model, optimizer, data)  # once is enough
    assert {record.damping for record in records} == {0.1 * optimizer.damping_unit}
    optimizer.close()
    optimizer = KFAC(model, Untold)
    records = train_with_closure(model, optimizer, data)
    assert records[5].rho is not None


# State, bad batches, options.


@pytest.mark.parametrize("how", [train, train_with_closure])
def test_resuming_is_bit_for_bit(how):
    data = batches(8)
    options = {
        "damping": RelativeDamping(rule(calibrate=True, decay=0.5)),
        "num_burnin_steps": 1,
    }

    def make(model):
        return KFAC(model, "categorical", **options)

    model = net()
    start = copy.deepcopy(model)
    reference = [repr(record) for record in how(model, make(model), data)]
    for stop in (1, 3, 6):
        first = copy.deepcopy(start)
        optimizer = make(first)
        how(first, optimizer, data[:stop])
        file = io.BytesIO()
        torch.save([first.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        twin = net()
        resumed = make(twin)
        weights, state = torch.load(file, weights_only=True)
        twin.load_state_dict(weights)
        resumed.load_state_dict(state)
        ahead = how(twin, resumed, data[stop:])
        assert [repr(record) for record in ahead] == reference[stop:]
        assert torch.equal(vector(twin), vector(model))
        assert resumed.damping_unit == optimizer.damping_unit or stop == 1


def test_the_automatic_mode_resumes_with_its_own_defaults():
    data = batches(12)
    model = net()
    twin = copy.deepcopy(model)
    optimizer = KFAC(model, "categorical")
    train(model, optimizer, data[:6])
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    reference = [repr(r) for r in train(model, optimizer, data[6:])]
    resumed = KFAC(twin, "categorical")
    twin.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    assert [repr(r) for r in train(twin, resumed, data[6:])] == reference
    assert torch.equal(vector(twin), vector(model))
    assert resumed._updates.rule.min_damping == 1e-3 * resumed.damping_unit


@pytest.mark.parametrize("where", ["inputs", "loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 4, 5])
def test_a_bad_batch_changes_nothing(where, value, at):
    model, data = plain(), batches(6)
    optimizer = KFAC(model, "categorical")
    train(model, optimizer, data[:at])
    before = vector(model)
    group = optimizer.param_groups[0]
    damping, unit = group["damping"], optimizer.damping_unit
    x, y = data[at]
    if where == "inputs":
        x = x.clone()
        x[0, 0] = value
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    (loss * value if where == "loss" else loss).backward()
    if where == "gradient":
        model[0].weight.grad[0, 0] = value
    with pytest.warns(RuntimeWarning, match="the step is left out"):
        optimizer.step()
    assert torch.equal(vector(model), before)
    assert (group["damping"], optimizer.damping_unit) == (damping, unit)
    train(model, optimizer, data[at:])
    assert vector(model).isfinite().all()


def test_a_fisher_of_zero_leaves_the_unit_open():
    model = plain()
    optimizer = KFAC(model, "normal")
    with torch.no_grad():
        model[2].weight.zero_()
        model[0].weight.zero_()
    x, y = torch.zeros(N, IN), torch.zeros(N, OUT)
    train(model, optimizer, [(x, y)] * 2, lambda z, y: 0 * (z - y).square().sum(1).mean())
    assert vector(model).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrustRegion(fraction=0.0), "fraction: expected a positive, finite number"),
        (lambda: TrustRegion(fraction=math.inf), "positive, finite number, got inf"),
        (
            lambda: TrustRegion(unit=-1.0),
            "unit: expected a positive, finite number, got -1",
        ),
        (
            lambda: TrustRegion(final=0.0),
            "final: expected a positive, finite number, got 0",
        ),
        (lambda: TrustRegion(decay_steps=0), "decay_steps: expected a positive, finite"),
        (lambda: QModel(max_momentum=-0.1), "max_momentum: expected a number >= 0, got -0"),
        (lambda: QModel(min_terms=0), "min_terms: expected an integer >= 1, got 0"),
        (lambda: RelativeDamping(-1.0), "RelativeDamping: expected a finite number >= 0"),
        (
            lambda: KFAC(plain(), "categorical", lr=0.1, norm_constraint=TrustRegion()),
            "norm_constraint: TrustRegion: expected a momentum type with the quadratic",
        ),
        (
            lambda: KFAC(plain(), "categorical", momentum=0.5),
            "momentum: expected None with",
        ),
    ],
)
def test_values_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_defaults():
    automatic = KFAC(plain(), "categorical")
    group = automatic.param_groups[0]
    assert (group["lr"], group["trust_region"], group["damping"]) == (None, 0.1, None)
    assert group["norm_constraint"] is None
    classic = KFAC(plain(), "categorical", lr=0.1)
    group = classic.param_groups[0]
    assert (group["momentum"], group["norm_constraint"]) == (0.9, 1e-3)
    assert group["trust_region"] is None
    with pytest.raises(TypeError, match="a damping that is not relative"):
        RelativeDamping(RelativeDamping())


def test_it_trains_in_float32():
    """A teacher's labels are fitted in a few steps, whatever the units of the problem."""
    torch.manual_seed(3)
    x = torch.randn(512, IN, dtype=torch.float32)
    y = (10 * plain().float()(x)).argmax(1)
    for scale in (0.01, 1.0, 100.0):
        torch.manual_seed(4)
        model = plain().float()
        optimizer = KFAC(model, "categorical")
        records = train(model, optimizer, [(scale * x, y)] * 40)
        assert records[-1].loss < 0.25 * records[0].loss
