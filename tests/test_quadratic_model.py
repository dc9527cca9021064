"""The quadratic model: its products, its minimum, and the steps it makes."""

import copy
import io
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from kfac_torch import KFAC, LayerCollection, QModel
from kfac_torch.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    MultiBernoulliNegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
)
from kfac_torch.preconditioning import limit_norm
from kfac_torch.quadratic_model import (
    QuadraticModel,
    fisher_products,
    products,
)
from kfac_torch.replay import every_kth, rerun

pytestmark = pytest.mark.usefixtures("float64")
MODELLED = ["qmodel", "qmodel_fixedmu"]


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def batch(n=24):
    return torch.randn(n, 6), torch.randint(4, (n,))


def make(model, loss="categorical", **kwargs):
    options = {"damping": 0.1, "momentum_type": "qmodel", "estimation_mode": "exact"}
    return KFAC(model, loss, **{**options, **kwargs})


def train(model, optimizer, batches, loss=functional.cross_entropy):
    for x, y in batches:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def random_model(k=2):
    root, D = torch.randn(4, k), torch.randn(6, k)
    return QuadraticModel(root.T @ root, D.T @ D, torch.randn(k))


# The minimum.


def test_the_minimum_is_that_of_the_damped_system():
    model, damping = random_model(), 0.3
    w = model.minimize(damping)
    M = model.curvature + damping * model.norms
    torch.testing.assert_close(w, -torch.linalg.solve(M, model.slopes))
    torch.testing.assert_close(model.change(w, damping), 0.5 * w @ model.slopes)
    torch.testing.assert_close(model.squared_norm(w, damping), w @ M @ w)


def test_the_minimum_for_a_fixed_momentum():
    model, damping = random_model(), 0.3
    w = model.minimize(damping, momentum=0.7)
    assert w[1] == 0.7
    values = [model.change(w + torch.tensor([e, 0.0]), damping) for e in (-1e-3, 0, 1e-3)]
    assert min(values) == values[1]


def test_the_minimum_along_one_direction():
    model = random_model(1)
    M = model.curvature + 0.3 * model.norms
    torch.testing.assert_close(model.minimize(0.3), -model.slopes / M[0])


@pytest.mark.parametrize("second", [torch.zeros(3), torch.tensor([2.0, 4.0, 6.0])])
def test_a_second_direction_that_adds_nothing_has_no_weight(second):
    D = torch.stack([torch.tensor([1.0, 2.0, 3.0]), second], 1)
    model = QuadraticModel(2 * D.T @ D, D.T @ D, D.T @ torch.ones(3))
    w = model.minimize(0.5)
    assert w[1] == 0
    torch.testing.assert_close(w[0], -torch.tensor(6 / (14 * 2.5)))


def test_without_any_curvature_nothing_moves():
    zero = torch.zeros(2, 2)
    assert (QuadraticModel(zero, zero, torch.zeros(2)).minimize(0.1) == 0).all()


def test_nearly_parallel_directions():
    """In float64, whatever the parameters are: the system is solved to 1e-5."""
    d = torch.tensor([1.0, 1.0, 1.0])
    D = torch.stack([d, d + 1e-4 * torch.tensor([1.0, -1.0, 0.0])], 1)
    g = torch.tensor([1.0, 2.0, 3.0])
    model = QuadraticModel(D.T @ D, D.T @ D, D.T @ g)
    step = D @ model.minimize(0.5)
    basis = torch.linalg.qr(D).Q
    torch.testing.assert_close(step, -basis @ basis.T @ g / 1.5, rtol=1e-5, atol=1e-6)


def test_products_of_directions():
    directions = [[torch.randn(2, 3), torch.randn(4)] for _ in range(3)]
    flat = torch.stack([torch.cat([t.flatten() for t in d]) for d in directions])
    torch.testing.assert_close(products(directions), flat @ flat.T)
    single = products([[t.float() for t in d] for d in directions])
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, flat @ flat.T, rtol=1e-5, atol=1e-5)


# The exact Fisher.

LOSSES = {
    "categorical": lambda z: CategoricalLogitsNegativeLogProbLoss(z),
    "normal": lambda z: NormalMeanNegativeLogProbLoss(z, var=0.7),
    "bernoulli": lambda z: MultiBernoulliNegativeLogProbLoss(z),
}


def dense_fisher(model, x, make_loss, coeff=1.0):
    """`(coeff/N) Σ_n J_nᵀ F_L J_n`, with `F_L` column by column."""
    params = {n: p.detach() for n, p in model.named_parameters()}
    jac = torch.func.jacrev(lambda q: functional_call(model, q, (x,)))(params)
    J = torch.cat([j.flatten(2) for j in jac.values()], 2)
    loss = make_loss(model(x).detach())
    eye = torch.eye(J.shape[1])
    F_L = torch.stack([loss.multiply_fisher(e.expand(len(x), -1)) for e in eye], 2)
    return coeff * torch.einsum("nki,nkl,nlj->ij", J, F_L, J) / len(x)


def split(model, flat):
    sizes = [p.numel() for p in model.parameters()]
    parts = zip(model.named_parameters(), flat.split(sizes), strict=True)
    return {name: part.view_as(p) for (name, p), part in parts}


@pytest.mark.parametrize("num_batches", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_products_with_the_exact_fisher(loss, num_batches):
    model, (x, _) = net(), batch()
    D = torch.randn(len(vector(model)), 2)
    ours = fisher_products(
        [rerun(model, (part,), {}) for part in x.chunk(num_batches)],
        lambda z: [(LOSSES[loss](z), 0.25)],
        dict(model.named_parameters()),
        [split(model, d) for d in D.T],
    )
    F = dense_fisher(model, x, LOSSES[loss], 0.25)
    torch.testing.assert_close(ours, D.T @ F @ D)


def test_several_losses_add_up():
    model, (x, _) = net(), batch()
    D = torch.randn(len(vector(model)), 2)
    pairs = [(LOSSES["normal"], 2.0), (LOSSES["categorical"], 0.5)]
    ours = fisher_products(
        [rerun(model, (x,), {})],
        lambda z: [(make_loss(z), coeff) for make_loss, coeff in pairs],
        dict(model.named_parameters()),
        [split(model, d) for d in D.T],
    )
    F = sum(dense_fisher(model, x, make_loss, coeff) for make_loss, coeff in pairs)
    torch.testing.assert_close(ours, D.T @ F @ D)


def test_some_parameters_alone():
    model, (x, _) = net(), batch()
    some = {n: p for n, p in model.named_parameters() if n.startswith("0")}
    d = torch.zeros(len(vector(model)))
    d[: sum(p.numel() for p in some.values())].normal_()
    ours = fisher_products(
        [rerun(model, (x,), {})],
        lambda z: [(LOSSES["categorical"](z), 1.0)],
        some,
        [{n: t for n, t in split(model, d).items() if n in some}],
    )
    F = dense_fisher(model, x, LOSSES["categorical"])
    torch.testing.assert_close(ours, (d @ F @ d).view(1, 1))


def test_no_forward_is_an_error():
    with pytest.raises(ValueError, match="expected a call of the model given to KFAC"):
        fisher_products([], lambda z: [], {}, [{}])


def test_an_operation_that_is_differentiable_once_is_named():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    class Odd(nn.Module):
        def forward(self, x):
            return Backward.apply(x)

    model = nn.Sequential(nn.Linear(6, 4), Odd())
    optimizer, before = make(model), vector(model)
    with pytest.raises(RuntimeError, match=r"in forward mode.*has neither.*a fixed lr"):
        train(model, optimizer, [batch()])
    assert torch.equal(vector(model), before)


# The steps.


@pytest.mark.parametrize("momentum_type", MODELLED)
def test_three_steps_against_dense_matrices(momentum_type):
    model, (x, y), damping = net(), batch(), 0.1
    optimizer = make(model, momentum_type=momentum_type, invert_every=1)
    previous = torch.zeros(len(vector(model)))
    for step in range(3):
        before = vector(model)
        C = dense_fisher(copy.deepcopy(model), x, LOSSES["categorical"])
        C += damping * torch.eye(len(before))
        train(model, optimizer, [(x, y)])
        g, delta = gradient(model), vector(model) - before
        p = preconditioned(optimizer, model)
        if step == 0:
            weights = -(g @ p) / (p @ C @ p), torch.tensor(0.0)
        elif momentum_type == "qmodel":
            D = torch.stack([p, previous], 1)
            weights = -torch.linalg.solve(D.T @ C @ D, D.T @ g)
        else:
            momentum = torch.tensor(0.9)
            weights = -(g @ p + momentum * p @ C @ previous) / (p @ C @ p), momentum
        torch.testing.assert_close(delta, weights[0] * p + weights[1] * previous)
        torch.testing.assert_close(optimizer.last_step.lr, -weights[0])
        last = torch.as_tensor(optimizer.last_step.momentum)
        if step or momentum_type == "qmodel":
            torch.testing.assert_close(last, weights[1])
        previous = delta


def preconditioned(optimizer, model):
    result = {}
    for block in optimizer.estimator.blocks.values():
        parts = block.multiply_tensors([p.grad for p in block.params], -1)
        result.update(zip(block.params, parts, strict=True))
    return torch.cat([result[p].flatten() for p in model.parameters()])


@pytest.mark.parametrize("momentum_type", MODELLED)
def test_the_limit_is_on_the_exact_norm_of_the_whole_step(momentum_type):
    model, (x, y) = net(), batch()
    optimizer = make(model, norm_constraint=1e-4, momentum_type=momentum_type)
    for _ in range(3):
        before = vector(model)
        C = dense_fisher(copy.deepcopy(model), x, LOSSES["categorical"])
        C += 0.1 * torch.eye(len(before))
        train(model, optimizer, [(x, y)])
        delta = vector(model) - before
        assert (delta @ C @ delta).item() == pytest.approx(1e-4)


def test_a_limit_out_of_reach_changes_nothing():
    model, data = net(), [batch()] * 3
    twin = copy.deepcopy(model)
    train(model, make(model, norm_constraint=1e9), data)
    train(twin, make(twin), data)
    assert same(model, twin)


def test_lr_is_a_factor_on_the_step_of_the_model():
    model, data = net(), [batch()]
    twin, start = copy.deepcopy(model), vector(model)
    train(model, make(model), data)
    train(twin, make(twin, lr=0.25), data)
    torch.testing.assert_close(vector(twin) - start, 0.25 * (vector(model) - start))


def test_weight_decay_is_part_of_the_direction():
    model, (x, y) = net(), batch()
    start = vector(model)
    optimizer = make(model, weight_decay=0.3)
    train(model, optimizer, [(x, y)])
    direction = preconditioned(optimizer, model) + 0.3 * start
    lr = optimizer.last_step.lr
    torch.testing.assert_close(vector(model), start - lr * direction)


def test_the_fixed_momentum_may_be_none_at_all():
    model, data = net(), [batch()] * 3
    optimizer = make(model, momentum_type="qmodel_fixedmu", momentum=0.0)
    train(model, optimizer, data)
    assert optimizer.last_step.momentum == 0


@pytest.mark.parametrize("momentum_type", MODELLED)
def test_a_linear_model_with_a_normal_loss_is_solved_in_a_few_steps(momentum_type):
    """The quadratic model is the loss itself, so that its prediction is exact."""
    model, x = nn.Linear(6, 4), torch.randn(50, 6)
    y = torch.randn(50, 4)
    optimizer = make(model, "normal", damping=1e-9, momentum_type=momentum_type)

    def loss(z, y):
        return 0.5 * (z - y).square().sum(1).mean()

    before = loss(model(x), y).item()
    train(model, optimizer, [(x, y)], loss)
    after = loss(model(x), y).item()
    assert optimizer.last_step.predicted_change.item() == pytest.approx(after - before)
    a = torch.cat([x, torch.ones(50, 1)], 1)
    best = loss(a @ torch.linalg.lstsq(a, y).solution, y).item()
    assert after - best < 1e-6 * (before - best)


def test_micro_batches_are_one_batch():
    model, (x, y) = net(), batch()
    twin = copy.deepcopy(model)
    whole, parts = make(model), make(twin)
    train(model, whole, [(x, y)] * 3)
    for _ in range(3):
        parts.zero_grad()
        for xs, ys in zip(x.split(8), y.split(8), strict=True):
            (functional.cross_entropy(twin(xs), ys) / 3).backward()
        parts.step()  # gradients that are accumulated as one batch's are no mistake
    torch.testing.assert_close(vector(model), vector(twin))


def test_a_sum_makes_the_steps_of_a_mean():
    model, data = net(), [batch(n) for n in (16, 9, 3)]
    twin = copy.deepcopy(model)
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    train(model, make(model, mean), data, mean)
    train(twin, make(twin, total), data, total)
    torch.testing.assert_close(vector(model), vector(twin))


class Noisy(nn.Module):
    """Keyword arguments, a batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False)
        self.dropout, self.second = nn.Dropout(0.5), nn.Linear(5, 4)

    def forward(self, x, *, scale=1.0):
        h = functional.relu(self.norm(self.first(x)), inplace=True)
        return {"logits": scale * self.second(self.dropout(h))}


def test_the_passes_leave_no_trace():
    """Buffers move once a step, the global generator by the forward alone."""
    model, (x, y) = Noisy(), batch()
    optimizer = make(model, output="logits")
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(1))
    for step in range(1, 4):
        twin, state = copy.deepcopy(model), torch.get_rng_state()
        twin(x, scale=2.0)
        expected = torch.get_rng_state()
        torch.set_rng_state(state)
        optimizer.zero_grad()
        functional.cross_entropy(model(x, scale=2.0)["logits"], y).backward()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), expected)
        assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
        assert model.norm.num_batches_tracked == step
        assert optimizer.estimator.blocks["first"].factors[0].num_updates == step


class OneByOne(torch.autograd.Function):
    """The identity, with a forward-mode derivative but no rule for several at once."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.view_as(tangent)


class Identity(nn.Module):
    def forward(self, x):
        return OneByOne.apply(x)


@pytest.mark.parametrize("layers", [[], [Identity()]])
def test_the_passes_have_the_dropout_mask_of_the_forward(layers):
    """A linear network with a normal loss is its own model, mask by mask.

    In the second step there are two directions, in one pass where that can be.
    """
    model = nn.Sequential(nn.Linear(6, 4), *layers, nn.Dropout(0.5))
    optimizer = make(model, "normal")
    for _ in range(3):
        x, y = torch.randn(30, 6), torch.randn(30, 4)
        state = torch.get_rng_state()
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum(1).mean()
        loss.backward()
        torch.rand(7)  # the user draws on
        optimizer.step()
        torch.set_rng_state(state)
        change = 0.5 * (model(x) - y).square().sum(1).mean() - loss
        last = optimizer.last_step
        damped = last.predicted_change.item()
        assert change.item() == pytest.approx(damped, rel=1e-9)
    assert last.momentum != 0


def test_inputs_do_not_outlive_a_step():
    model, (x, y) = net(), batch()
    optimizer = make(model)
    forwards = optimizer.estimator.capture.forwards
    model(x)
    assert len(forwards) == 1
    model.eval(), model(x), model.train()
    with torch.no_grad():
        model(x)
    functional_call(model, {n: 2 * p for n, p in model.named_parameters()}, (x,))
    assert len(forwards) == 1
    forwards.clear()
    train(model, optimizer, [(x, y)])
    assert not forwards
    regular = make(model, momentum_type="regular", lr=0.1)
    model(x)
    assert not regular.estimator.capture.forwards


@pytest.mark.parametrize("momentum_type", MODELLED)
def test_resuming_is_bit_for_bit(momentum_type):
    model, batches = net(), [batch() for _ in range(8)]
    start = copy.deepcopy(model)
    options = {"momentum_type": momentum_type, "estimation_mode": "gradients"}
    train(model, make(model, **options), batches)
    for stop in (1, 2, 5):
        part = copy.deepcopy(start)
        optimizer = make(part, **options)
        train(part, optimizer, batches[:stop])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer.close()
        resumed = make(part, **options)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        train(part, resumed, batches[stop:])
        assert same(part, model)


def test_a_bad_gradient_changes_nothing():
    model, data = net(), [batch()]
    optimizer = make(model)
    train(model, optimizer, data * 2)
    before, previous = (
        vector(model),
        [s["previous_update"] for s in optimizer.state.values()],
    )
    with pytest.warns(RuntimeWarning, match="in the gradient; the step is left out"):
        train(
            model, optimizer, data, lambda z, y: torch.nan * functional.cross_entropy(z, y)
        )
    assert torch.equal(vector(model), before)
    kept = [s["previous_update"] for s in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(previous, kept, strict=True))
    train(model, optimizer, data)
    assert not torch.equal(vector(model), before)


def test_a_gradient_of_zero_moves_nothing():
    model, data = net(), [batch()]
    optimizer, before = make(model), vector(model)
    train(model, optimizer, data, lambda z, y: 0 * functional.cross_entropy(z, y))
    assert torch.equal(vector(model), before)
    assert optimizer.skipped_steps == 0


# Parameters without a block.


def mixed():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.net = net()

        def forward(self, x):
            return self.scale * self.net(x)

    return Scaled()


def sgd(model):
    """Layers whose others are moved by SGD."""
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.fallback = "sgd"
    return layers


def test_parameters_without_a_block_need_an_lr_with_the_model():
    model = mixed()
    optimizer, before = make(model, layer_collection=sgd(model)), vector(model)
    with pytest.raises(
        ValueError, match=r'scale: expected an lr.*param_groups\[1\]\["lr"\]'
    ):
        train(model, optimizer, [batch()])
    assert torch.equal(vector(model), before)
    assert not optimizer.estimator.capture.forwards  # nor of the step that failed
    optimizer.param_groups[1]["lr"] = 0.1
    with pytest.warns(UserWarning, match="plain momentum: scale$"):
        train(model, optimizer, [batch()])


def test_parameters_without_a_block_keep_their_own_options():
    model, data = mixed(), [batch()] * 3
    optimizer = make(model, layer_collection=sgd(model))
    optimizer.param_groups[1].update(lr=0.1, momentum=0.5)
    expected, velocity = model.scale.detach().clone(), 0.0
    for i, (x, y) in enumerate(data):
        if i == 0:
            with pytest.warns(UserWarning, match="plain momentum: scale$"):
                train(model, optimizer, [(x, y)])
        else:
            train(model, optimizer, [(x, y)])
        velocity = 0.5 * velocity + model.scale.grad
        expected = expected - 0.1 * velocity
        torch.testing.assert_close(model.scale.detach(), expected)
    assert optimizer.last_step.predicted_change < 0


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"momentum_type": "qmodel", "momentum": 0.9},
            r'momentum: expected None with momentum_type="qmodel".*got 0\.9',
        ),
        ({"momentum_type": "regular"}, "lr: expected a number >= 0.*got None"),
        ({"momentum_type": "adam"}, "lr: expected a number >= 0.*got None"),
        ({"momentum_type": "qmodel", "lr": -1.0}, "lr: expected a number >= 0 or None"),
        (
            {"norm_constraint": "none"},
            "norm_constraint: expected a positive number or None",
        ),
        ({"num_burnin_steps": -1}, "num_burnin_steps: expected an integer >= 0, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(net(), **options)


@pytest.mark.parametrize(
    ("momentum_type", "momentum", "norm_constraint"),
    [
        ("regular", 0.9, 1e-3),
        ("adam", 0.9, 1e-3),
        ("qmodel", 0.0, None),
        ("qmodel_fixedmu", 0.9, None),
    ],
)
def test_defaults_depend_on_the_momentum_type(momentum_type, momentum, norm_constraint):
    group = make(net(), momentum_type=momentum_type, lr=1.0).param_groups[0]
    assert group["momentum"] == momentum
    assert group["norm_constraint"] == norm_constraint


# Burn-in, schedules, records.

TYPES = ["regular", "adam", *MODELLED]


@pytest.mark.parametrize("momentum_type", TYPES)
def test_burn_in_gathers_statistics_with_equal_weights_and_moves_nothing(momentum_type):
    model, batches = net(), [batch() for _ in range(4)]
    optimizer = make(
        model, momentum_type=momentum_type, lr=1.0, num_burnin_steps=3, cov_update_every=2
    )
    factor = optimizer.estimator.blocks["0"].factors[0]
    before, a = vector(model), []
    for i, (x, y) in enumerate(batches[:3]):
        train(model, optimizer, [(x, y)])
        a.append(torch.cat([x, torch.ones(len(x), 1)], 1))
        rows = torch.cat(a)
        torch.testing.assert_close(factor.get_cov(), rows.T @ rows / len(rows))
        assert factor.num_updates == i + 1
    assert torch.equal(vector(model), before)
    assert optimizer.last_step is None
    train(model, optimizer, batches[3:])
    assert not torch.equal(vector(model), before)
    assert optimizer.last_step.step == 0
    rows = torch.cat([batches[3][0], torch.ones(24, 1)], 1)
    covs = [r.T @ r / 24 for r in (*a, rows)]
    weight = 0.95 * 3 + 1  # from here on the average decays
    expected = (0.95 * sum(covs[:3]) + covs[3]) / weight
    torch.testing.assert_close(factor.get_cov(), expected)


@pytest.mark.parametrize("momentum_type", TYPES)
def test_lr_schedulers(momentum_type):
    model, data = net(), [batch()]
    optimizer = make(model, momentum_type=momentum_type, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.0)
    train(model, optimizer, data)
    scheduler.step()
    before = vector(model)
    train(model, optimizer, data)
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("momentum_type", TYPES)
def test_damping_may_be_a_schedule(momentum_type):
    model, data = net(), [batch()] * 4
    twin = copy.deepcopy(model)
    options = {"momentum_type": momentum_type, "lr": 1.0, "invert_every": 1}
    a = make(model, damping=lambda step: 0.1 / (step + 1), **options)
    b = make(twin, **options)
    for step, (x, y) in enumerate(data):
        b.param_groups[0]["damping"] = 0.1 / (step + 1)
        train(model, a, [(x, y)])
        train(twin, b, [(x, y)])
        assert a.last_step.damping == b.last_step.damping == 0.1 / (step + 1)
    assert same(model, twin)


def test_a_schedule_that_goes_wrong():
    with pytest.raises(ValueError, match="damping: expected a finite number >= 0, got -1"):
        make(net(), damping=lambda step: -1.0)


def test_the_record_of_a_step():
    model, (x, y) = net(), batch()
    optimizer = make(model)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for step in itertools.count():
        value = optimizer.step(closure)
        last = optimizer.last_step
        assert (last.step, last.damping) == (step, 0.1)
        assert torch.equal(last.loss, value.detach())
        assert not last.loss.requires_grad
        assert last.rho is None
        assert last.new_loss is None
        assert last.predicted_change < 0
        if step == 2:
            break


@pytest.mark.parametrize(("limit", "expected"), [(10.0, 1.0), (0.5, 0.5360562674)])
def test_the_norm_limit_of_the_lineage(limit, expected):
    """Its own numbers: squared Fisher norm 174, learning rate 0.1."""
    g = [torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[2.0, 3], [4, 5]])]
    p = [torch.tensor([[3.0, 4], [5, 6]]), torch.tensor([[7.0, 8], [9, 10]])]
    assert products([g, p])[0, 1] == 174
    limited = [t.clone() for t in p]
    _, kappa = limit_norm(limited, g, [0.1, 0.1], limit)
    assert kappa.item() == pytest.approx(expected, rel=1e-6)
    for ours, whole in zip(limited, p, strict=True):
        torch.testing.assert_close(ours, expected * whole, rtol=1e-9, atol=0)


def test_state_of_an_older_version_is_refused():
    optimizer = make(net())
    state = optimizer.state_dict()
    state["kfac"]["version"] = 1
    with pytest.raises(
        ValueError, match="expected K-FAC state of version 6, got version 1"
    ):
        optimizer.load_state_dict(state)


def test_part_of_the_batch():
    """Of a batch that holds every example four times in a row, a quarter is the same."""
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    steps = []
    for batch, fraction in (
        ((x, y), 1.0),
        ((x.repeat_interleave(4, 0), y.repeat_interleave(4)), 0.25),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        optimizer = KFAC(
            model,
            "categorical",
            damping=0.1,
            momentum_type=replace(QModel.exact(), batch_fraction=fraction),
            estimation_mode="exact",
        )
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=1e-12)


def test_which_examples_are_kept():
    x, scale = torch.arange(10.0).view(5, 2), torch.ones(3)
    mask = torch.arange(5)
    (thin, same), kwargs = every_kth((x, scale), {"masks": [mask, None]}, 2, 3)
    assert torch.equal(thin, x[1::2])
    assert same is scale
    assert torch.equal(kwargs["masks"][0], mask[1::2])
    assert every_kth((x,), {}, 6, 0)[0][0] is x  # fewer than six: all of them


def test_the_model_with_options_is_known_by_its_name():
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = KFAC(
        model, "normal", damping=0.1, momentum_type=QModel(fixed_momentum=True)
    )
    assert (
        optimizer.state_dict()["kfac"]["subject"]["options"]["momentum_type"]
        == "qmodel_fixedmu"
    )
    for fraction in (0.0, 1.5, -1.0):
        with pytest.raises(
            ValueError, match=r"batch_fraction: expected a number in \(0, 1\]"
        ):
            QModel(batch_fraction=fraction)
