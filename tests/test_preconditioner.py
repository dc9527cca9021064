"""`KFACPreconditioner`: natural gradients for other optimizers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC, KFACPreconditioner, LevenbergMarquardt, RelativeDamping


class Net(nn.Module):
    """A layer of every use, and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.shift = nn.Parameter(torch.zeros(48))
        self.head = nn.Linear(48, 5)

    def forward(self, x):
        return self.head(self.conv(x).tanh().flatten(1) + self.shift)


def batches(steps=8, n=16):
    return [(torch.randn(n, 1, 4, 4), torch.randint(5, (n,))) for _ in range(steps)]


def two():
    model = Net()
    return model, copy.deepcopy(model)


def backward(model, batch, scale=1.0):
    x, y = batch
    model.zero_grad()
    (scale * functional.cross_entropy(model(x), y)).backward()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def assert_close(a, b):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("norm_constraint", [None, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "damping", [0.05, RelativeDamping(0.1), lambda step: 0.1 / (1 + step)]
)
def test_sgd_behind_it_is_kfac(norm_constraint, reduction, damping):
    """Velocities, limits, intervals and the learning rate's schedule included."""
    model, twin = two()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    options = {
        "damping": damping,
        "norm_constraint": norm_constraint,
        "cov_update_every": 2,
        "invert_every": 3,
    }
    kfac = KFAC(model, criterion, lr=0.1, momentum=0.9, momentum_type="regular", **options)
    sgd = torch.optim.SGD([*twin.conv.parameters(), *twin.head.parameters()], 0.1, 0.9)
    preconditioner = KFACPreconditioner(twin, criterion, **options)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in (kfac, sgd)]
    model.shift.requires_grad_(False)
    twin.shift.requires_grad_(False)
    for x, y in batches():
        for optimizer, net in ((kfac, model), (sgd, twin)):
            optimizer.zero_grad()
            criterion(net(x), y).backward()
            if optimizer is kfac:
                kfac.step()
            else:
                assert preconditioner.step(lr=sgd.param_groups[0]["lr"])
                sgd.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_close(model.parameters(), twin.parameters())
    assert preconditioner.damping == kfac.param_groups[0]["damping"]


@pytest.mark.usefixtures("float64")
def test_only_parameters_with_a_block_change_their_gradient():
    model = Net()
    preconditioner = KFACPreconditioner(
        model, "categorical", damping=0.1, approx={"head": "diagonal"}
    )
    backward(model, batches()[0])
    before = gradients(model)
    params = [p.detach().clone() for p in model.parameters()]
    kept = [p.grad for p in model.parameters()]
    assert preconditioner.step() is True
    changed = {
        name
        for (name, p), old in zip(model.named_parameters(), before, strict=True)
        if not torch.equal(p.grad, old)
    }
    assert changed == {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    assert_close(params, model.parameters())
    with_block = [p for name, p in model.named_parameters() if name != "shift"]
    named = zip(model.named_parameters(), before, strict=True)
    old = [g for (name, _), g in named if name != "shift"]
    expected = preconditioner.estimator.multiply_inverse(zip(old, with_block, strict=True))
    for product, p in expected:
        torch.testing.assert_close(p.grad, product)


class ScheduleFree(torch.optim.Optimizer):
    """SGD on `z`, gradients between `z` and the mean `x` (Defazio et al. 2024)."""

    def __init__(self, params, lr, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})
        self.t = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.t += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"], state["x"] = p.clone(), p.clone()
                state["z"].sub_(p.grad, alpha=group["lr"])
                state["x"].lerp_(state["z"], 1 / self.t)
                p.copy_(torch.lerp(state["z"], state["x"], group["beta"]))


def muon_and_adamw(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(others, lr=0.01)]


COMPANIONS = {
    "sgd": lambda model: [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)],
    "adamw": lambda model: [torch.optim.AdamW(model.parameters(), lr=0.02)],
    "schedule-free": lambda model: [ScheduleFree(model.parameters(), lr=0.3)],
}
if hasattr(torch.optim, "Muon"):  # torch >= 2.9
    COMPANIONS["muon"] = muon_and_adamw


@pytest.mark.parametrize("name", COMPANIONS)
def test_every_optimizer_trains_behind_it(name):
    """A teacher's labels, in float32: the loss falls to a third in 40 steps."""
    x = torch.randn(128, 1, 4, 4)
    y = Net()(x).argmax(1)
    model = Net()
    optimizers = COMPANIONS[name](model)
    preconditioner = KFACPreconditioner(model, "categorical")
    losses = []
    for _ in range(40):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        assert preconditioner.step()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_bad_batch_changes_nothing_and_is_told(where):
    model = Net()
    preconditioner = KFACPreconditioner(model, "categorical", damping=0.1)
    data = batches(3)
    backward(model, data[0])
    assert preconditioner.step()
    factors = [f.get_cov().clone() for f in preconditioner.estimator.layers.get_factors()]
    if where == "input":
        data[1][0][0, 0, 0, 0] = float("nan")
    backward(model, data[1])
    if where == "gradient":
        model.head.bias.grad[0] = float("inf")
    before = gradients(model)
    with pytest.warns(RuntimeWarning, match=r"step\(\) returns False") as record:
        assert preconditioner.step() is False
    assert record[0].filename == __file__
    assert preconditioner.skipped_steps == 1
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, old, rtol=0, atol=0, equal_nan=True)
    after = [f.get_cov() for f in preconditioner.estimator.layers.get_factors()]
    assert all(torch.equal(a, b) for a, b in zip(factors, after, strict=True))
    backward(model, data[2])
    assert preconditioner.step()


def test_a_bad_gradient_is_seen_where_no_statistics_are_due():
    model = Net()
    preconditioner = KFACPreconditioner(
        model, "categorical", damping=0.1, cov_update_every=10
    )
    data = batches(2)
    backward(model, data[0])
    preconditioner.step()
    backward(model, data[1])
    model.conv.weight.grad[0] = float("nan")
    kept = model.head.weight.grad.clone()
    with pytest.warns(RuntimeWarning, match="the gradient"):
        assert not preconditioner.step()
    assert torch.equal(model.head.weight.grad, kept)


def test_a_gradient_scaler_with_unscaling_changes_nothing():
    model, twin = two()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    options = {"damping": 0.1, "norm_constraint": 1e-3}
    pairs = [
        (
            net,
            KFACPreconditioner(net, "categorical", **options),
            torch.optim.SGD(net.parameters(), 0.1),
        )
        for net in (model, twin)
    ]
    for i, batch in enumerate(batches(5)):
        for net, preconditioner, sgd in pairs:
            scaled = net is model
            backward(net, batch, scaler.get_scale() if scaled else 1.0)
            if scaled:
                if i == 0:
                    scaler.scale(torch.zeros(()))  # makes its tensors
                scaler.unscale_(sgd)
            assert preconditioner.step(lr=0.1)
            if scaled:
                scaler.step(sgd)
                scaler.update()
            else:
                sgd.step()
    assert scaler.get_scale() > 2.0**12
    assert_close(model.parameters(), twin.parameters())


def test_an_overflow_of_a_scaled_gradient_leaves_the_step_out():
    model = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    preconditioner = KFACPreconditioner(model, "categorical", damping=0.1)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    data = batches(2)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(torch.zeros(()))
    backward(model, data[0], scaler.get_scale())
    model.head.weight.grad[0, 0] = float("inf")
    scaler.unscale_(sgd)
    with pytest.warns(RuntimeWarning, match="the gradient"):
        assert not preconditioner.step()
    scaler.step(sgd)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert_close(before, model.parameters())


@pytest.mark.usefixtures("float64")
def test_a_norm_may_be_clipped_before_or_after():
    """Before, the clipped gradient is preconditioned; after, the natural one is clipped."""
    plain, twin = two()
    third = copy.deepcopy(plain)
    batch = batches()[0]
    for net in (plain, twin, third):
        preconditioner = KFACPreconditioner(net, "categorical", damping=0.1)
        backward(net, batch)
        if net is twin:
            ratio = 0.01 / (nn.utils.clip_grad_norm_(net.parameters(), 0.01) + 1e-6)
        preconditioner.step()
        if net is third:
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    natural = gradients(plain)
    assert_close(gradients(twin), [ratio * g for g in natural])
    total = torch.stack([g.norm() for g in natural]).norm()
    assert_close(gradients(third), [0.01 / (total + 1e-6) * g for g in natural])


@pytest.mark.usefixtures("float64")
def test_accumulated_micro_batches_are_one_batch():
    model, twin = two()
    x, y = batches()[0]
    for net, parts in ((model, 1), (twin, 4)):
        preconditioner = KFACPreconditioner(
            net, "categorical", damping=0.1, estimation_mode="exact"
        )
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (functional.cross_entropy(net(xs), ys) / parts).backward()
        preconditioner.step()
    assert_close(gradients(model), gradients(twin))


def test_a_closure_that_is_called_again_finds_the_gradient_of_that_place():
    """The preconditioner's step belongs in it, after `backward`."""
    model = Net()
    preconditioner = KFACPreconditioner(model, "categorical", damping=0.1)
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=2)
    x, y = batches(1, 64)[0]
    values = []

    def closure():
        lbfgs.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        assert preconditioner.step()
        values.append(loss.item())
        return loss

    lbfgs.step(closure)
    assert len(values) >= 3
    assert values[-1] < values[0]
    factor = preconditioner.estimator.layers.get_factors()[0]
    assert factor.num_updates == len(values)


def test_a_batch_that_is_given_up_is_no_part_of_the_next():
    model, twin = two()
    data = batches(2)
    first, second = (
        KFACPreconditioner(net, "categorical", damping=0.1, estimation_mode="exact")
        for net in (model, twin)
    )
    backward(model, data[0])
    first.forget()
    for net, preconditioner in ((model, first), (twin, second)):
        backward(net, data[1])
        preconditioner.step()
    assert_close(gradients(model), gradients(twin))


@pytest.mark.parametrize("damping", [None, 0.1])
def test_resuming_is_bit_for_bit(damping):
    model = Net()
    options = {"damping": damping, "cov_update_every": 2, "invert_every": 4}
    data = batches(9)
    preconditioner = KFACPreconditioner(model, "categorical", **options)
    for batch in data[:5]:
        backward(model, batch)
        preconditioner.step()
    other = Net()
    other.load_state_dict(model.state_dict())
    resumed = KFACPreconditioner(other, "categorical", **options)
    resumed.load_state_dict(copy.deepcopy(preconditioner.state_dict()))
    for batch in data[5:]:
        for net, one in ((model, preconditioner), (other, resumed)):
            backward(net, batch)
            one.step()
        pairs = zip(gradients(model), gradients(other), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_state_of_another_is_refused_and_leaves_all_as_it_was():
    model = Net()
    preconditioner = KFACPreconditioner(model, "categorical")
    backward(model, batches()[0])
    preconditioner.step()
    state = preconditioner.state_dict()
    small = nn.Linear(2, 2)
    other = KFACPreconditioner(small, "categorical")
    with pytest.raises(ValueError, match="another model"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="got version None"):
        other.load_state_dict({})
    assert other.damping is None
    assert other.state_dict()["num_steps"] == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping": LevenbergMarquardt(initial=1.0)}, TypeError, "has to know the step"),
        ({"damping": RelativeDamping()}, TypeError, "has to know the step"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"norm_constraint": 0.0}, ValueError, "a positive number or None"),
        ({"invert_every": 0}, ValueError, "invert_every"),
        ({"cov_update_every": 1.5}, ValueError, "cov_update_every"),
        ({"estimation_mode": "x"}, ValueError, "estimation_mode"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        KFACPreconditioner(Net(), "categorical", **options)


def test_a_limit_needs_the_learning_rate():
    model = Net()
    preconditioner = KFACPreconditioner(model, "categorical", norm_constraint=1e-3)
    backward(model, batches()[0])
    with pytest.raises(ValueError, match=r"expected its learning rate"):
        preconditioner.step()


def test_a_step_before_any_forward():
    model = Net()
    x, y = batches()[0]
    functional.cross_entropy(model(x), y).backward()
    preconditioner = KFACPreconditioner(model, "categorical")
    with pytest.raises(RuntimeError, match="model given to KFACPreconditioner"):
        preconditioner.step()


def test_a_loss_that_is_not_the_declared_one_is_reported_at_the_users_line():
    model = Net()
    preconditioner = KFACPreconditioner(model, "categorical")
    backward(model, batches()[0], 3.0)
    with pytest.warns(UserWarning, match="is 3 times that") as record:
        preconditioner.step()
    assert record[0].filename == __file__


def test_no_hook_remains():
    model = Net()
    preconditioner = KFACPreconditioner(model, "categorical")
    preconditioner.close()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
