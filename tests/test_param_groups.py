"""Param groups of `KFAC`: options of their own for some parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def backward(model, x, y):
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()


def data(n=32):
    return torch.randn(n, 4), torch.randint(3, (n,))


OWN = {
    "0.weight": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    "0.bias": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
    "2.weight": {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.3},
    "2.bias": {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.0},
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("norm_constraint", [None, 1e-3])
@pytest.mark.parametrize("momentum_type", ["regular", "adam"])
def test_steps_by_hand(momentum_type, norm_constraint):
    """Every parameter has `η`, `μ` and the decay of its group; `κ` is of all together."""
    model = net()
    optimizer = KFAC(
        model,
        "categorical",
        lr=0.1,
        momentum=0.9,
        damping=0.1,
        weight_decay=0.05,
        norm_constraint=norm_constraint,
        momentum_type=momentum_type,
        estimation_mode="exact",
    )
    [last] = optimizer.group("2", lr=0.02, momentum=0.5, weight_decay=0.3)
    both = optimizer.group("*.bias", weight_decay=0.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1, 1]
    assert last is optimizer.param_groups[1]
    assert both == optimizer.param_groups[2:]
    params = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    for _ in range(4):
        backward(model, *data())
        before = {name: p.detach().clone() for name, p in params.items()}
        grads = {name: p.grad.clone() for name, p in params.items()}
        optimizer.step()
        if momentum_type == "adam":
            grads = {n: OWN[n]["momentum"] * velocity[n] + g for n, g in grads.items()}
            velocity = grads
        pairs = [(grads[name], p) for name, p in params.items()]
        products = optimizer.estimator.multiply_inverse(pairs)
        p = {name: v for name, (v, _) in zip(params, products, strict=True)}
        norm = sum(OWN[n]["lr"] ** 2 * (p[n] * grads[n]).sum() for n in params)
        kappa = (
            1.0 if norm_constraint is None else min(1.0, (norm_constraint / norm) ** 0.5)
        )
        step = {name: kappa * p[name] for name in params}
        if momentum_type == "regular":
            step = {n: OWN[n]["momentum"] * velocity[n] + s for n, s in step.items()}
            velocity = step
        for n, own in OWN.items():
            expected = before[n] - own["lr"] * (step[n] + own["weight_decay"] * before[n])
            torch.testing.assert_close(params[n].detach(), expected)


def modelled(model, **options):
    return KFAC(
        model,
        "categorical",
        momentum_type="qmodel",
        damping=0.1,
        estimation_mode="exact",
        **options,
    )


@pytest.mark.usefixtures("float64")
def test_equal_rates_of_groups_are_one_rate_for_the_quadratic_model():
    model = net()
    twin = copy.deepcopy(model)
    a, b = modelled(model, lr=0.5), modelled(twin, lr=0.5)
    b.group("2", lr=0.5)
    for _ in range(4):
        batch = data()
        for one, optimizer in ((model, a), (twin, b)):
            backward(one, *batch)
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.usefixtures("float64")
def test_rates_of_groups_scale_their_part_of_the_models_direction():
    """The first step is along `(p₀, p₂/4)`, as long as the model says."""
    model = net()
    optimizer = modelled(model, lr=1.0)
    optimizer.group("2", lr=0.25)
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    backward(model, *data())
    grads = [p.grad.clone() for p in params]
    optimizer.step()
    products = optimizer.estimator.multiply_inverse(zip(grads, params, strict=True))
    direction = [v * w for (v, _), w in zip(products, (1, 1, 0.25, 0.25), strict=True)]
    alpha = -optimizer.last_step.lr
    for p, old, d in zip(params, before, direction, strict=True):
        torch.testing.assert_close(p.detach(), old + alpha * d)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    # At the minimum of the model along a line the change is half of the linear one, but
    # for the damping, which the prediction leaves out.
    damped = 0.5 * alpha**2 * 0.1 * sum(d.square().sum() for d in direction)
    torch.testing.assert_close(
        optimizer.last_step.predicted_change + damped, 0.5 * alpha * slope
    )


@pytest.mark.usefixtures("float64")
def test_a_rate_of_zero_stops_a_group_whatever_the_step_is():
    for options in ({"lr": 0.1, "damping": 0.1}, {"momentum_type": "qmodel", "lr": 1.0}):
        model = net()
        optimizer = KFAC(model, "categorical", **options)
        [group] = optimizer.group("2", lr=options["lr"])
        for lr in (options["lr"], options["lr"], 0.0, 0.0):
            group["lr"] = lr
            before = [p.detach().clone() for p in model.parameters()]
            backward(model, *data())
            optimizer.step()
            moved = [
                not torch.equal(p, q)
                for p, q in zip(before, model.parameters(), strict=True)
            ]
            assert moved == [True, True, lr > 0, lr > 0]


def test_schedulers_know_groups():
    model = net()
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1)
    optimizer.group(nn.Linear, lr=0.2)
    assert not optimizer.param_groups[0]["params"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step: 1.0, lambda step: 0.5**step]
    )
    for lr in (0.2, 0.1, 0.05):
        assert optimizer.param_groups[1]["lr"] == pytest.approx(lr)
        backward(model, *data())
        optimizer.step()
        scheduler.step()


def test_resuming_with_groups_is_bit_for_bit():
    def make(model):
        optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1)
        optimizer.group("0", "2", lr=0.05)
        optimizer.group("*.bias", weight_decay=0.1)
        return optimizer

    model = net()
    optimizer = make(model)
    for _ in range(3):
        backward(model, *data())
        optimizer.step()
    optimizer.param_groups[1]["lr"] = 0.03
    other = copy.deepcopy(model)
    resumed = make(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        batch = data()
        for one, each in ((model, optimizer), (other, resumed)):
            backward(one, *batch)
            each.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:these parameters have no K-FAC block")
def test_parameters_without_a_block_have_groups_too():
    """AdamW of a bare parameter with a rate and a decay of its own, by torch's own."""
    model = net()
    model.scale, model.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1)
    optimizer.group(model.shift, lr=0.01, betas=(0.8, 0.9), weight_decay=0.2)
    shift = nn.Parameter(model.shift.detach().clone())
    scale = nn.Parameter(model.scale.detach().clone())
    adamw = torch.optim.AdamW(
        [
            {"params": [shift], "lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.2},
            {"params": [scale], "lr": 3e-3, "weight_decay": 0.0},
        ]
    )
    for _ in range(3):
        x, y = data()
        optimizer.zero_grad()
        functional.cross_entropy(model(x) * model.scale + model.shift, y).backward()
        shift.grad, scale.grad = model.shift.grad.clone(), model.scale.grad.clone()
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(model.shift, shift)
        torch.testing.assert_close(model.scale, scale)


@pytest.mark.usefixtures("float64")
def test_a_clipped_norm_is_the_gradient_of_the_step():
    """The check of the loss is of the gradient at the output, and finds nothing wrong."""
    model = net()
    optimizer = KFAC(
        model, "categorical", lr=0.1, momentum=0.0, damping=0.1, norm_constraint=None
    )
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, *data())
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert norm > 0.1
    clipped = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    pairs = zip(clipped, model.parameters(), strict=True)
    for (v, p), old in zip(
        optimizer.estimator.multiply_inverse(pairs), before, strict=True
    ):
        torch.testing.assert_close(p.detach(), old - 0.1 * v)


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        (["tail"], {"lr": 0.1}, r"KFAC.group\(\): expected the name"),
        ([], {"lr": 0.1}, "expected parameters of this optimizer"),
        (["2"], {}, "expected some of lr"),
        (["2"], {"damping": 0.1}, "λ and limits are of the step as a whole"),
        (["2"], {"lr": -0.1}, "lr: expected a number >= 0"),
        (["2"], {"lr": None}, "lr: expected a number >= 0"),
        (["2"], {"momentum": 1.0}, "momentum: expected a number in"),
        (["2"], {"weight_decay": -1.0}, "weight_decay: expected"),
        (["2"], {"betas": (0.9, 0.9)}, "betas: expected no such option"),
        (["2"], {"damping_scale": 0.0}, "damping_scale: expected a positive number"),
    ],
)
def test_bad_groups_change_nothing(which, options, message):
    optimizer = KFAC(net(), "categorical", lr=0.1, damping=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.group(*which, **options)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4]


def test_the_quadratic_model_has_one_momentum():
    optimizer = KFAC(net(), "categorical", momentum_type="qmodel_fixedmu")
    with pytest.raises(ValueError, match="momentum: expected no such option"):
        optimizer.group("2", momentum=0.5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("approx", ["kron", "diagonal", "full", "ekfac"])
@pytest.mark.parametrize("when", ["before the first step", "between steps"])
def test_a_layer_has_a_damping_of_its_own(approx, when):
    """It moves as with that λ everywhere, the other layer as with the common one."""
    start, batch = net().state_dict(), data()
    ends = {}
    for name, damping in {"both": 0.1, "common": 0.1, "own": 1.0}.items():
        model = net()
        model.load_state_dict(start)
        optimizer = KFAC(
            model,
            "categorical",
            approx=approx,
            estimation_mode="exact",
            lr=0.0 if when == "between steps" else 0.1,
            momentum=0.0,
            norm_constraint=None,
            damping=damping,
            cov_update_every=1,
        )
        for step in range(2):
            if name == "both" and step == (when == "between steps"):
                optimizer.group(model[2], damping_scale=10.0)
            if step:
                for group in optimizer.param_groups:
                    group["lr"] = 0.1
            backward(model, *batch)
            if step or when != "between steps":
                before = {k: p.detach().clone() for k, p in model.named_parameters()}
            optimizer.step()
            if when == "before the first step":
                break
        ends[name] = {k: p.detach() - before[k] for k, p in model.named_parameters()}
    for key, moved in ends["both"].items():
        expected = ends["own" if key.startswith("2") else "common"][key]
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-12)
        other = ends["common" if key.startswith("2") else "own"][key]
        assert not torch.allclose(moved, other, rtol=1e-3)
