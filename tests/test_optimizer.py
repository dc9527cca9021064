"""`KFAC` in the loop: its step, its options, its messages, its state."""

import copy
import gc
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC, LayerCollection


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5)
    )


def batch(n=16):
    return torch.randn(n, 1, 4, 4), torch.randint(5, (n,))


def train(model, optimizer, batches, loss=functional.cross_entropy):
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def make(model, loss="categorical", **kwargs):
    return KFAC(model, loss, **{"lr": 0.1, "damping": 0.01, **kwargs})


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# The step.


@pytest.mark.parametrize("momentum_type", ["regular", "adam"])
def test_it_trains_in_float32(momentum_type):
    """A teacher's labels are fitted to a fraction of the first loss in 40 steps."""
    x = torch.randn(256, 1, 4, 4)
    y = net()(x).argmax(1)
    model = net()
    optimizer = make(model, lr=0.3, norm_constraint=0.1, momentum_type=momentum_type)
    losses = train(model, optimizer, [(x, y)] * 40)
    assert losses[-1] < 0.1 * losses[0]


def test_one_step_by_hand():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    before, lr, damping = model.weight.detach().clone(), 0.1, 0.05
    optimizer = KFAC(
        model,
        "categorical",
        lr=lr,
        damping=damping,
        norm_constraint=None,
        estimation_mode="exact",
        weight_decay=0.3,
    )
    train(model, optimizer, [(x, y)])
    a = torch.cat([x, torch.ones(8, 1)], 1)
    block = optimizer.estimator.blocks["model"]
    A, G = (factor.get_cov() for factor in block.factors)
    torch.testing.assert_close(A, a.T @ a / 8)
    pi = ((A.trace() / 4) / (G.trace() / 2)).sqrt()
    gradient = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
    step = (
        torch.linalg.inv(G + damping**0.5 / pi * torch.eye(2))
        @ gradient
        @ torch.linalg.inv(A + pi * damping**0.5 * torch.eye(4))
    )
    expected = (1 - lr * 0.3) * before - lr * step[:, :3]
    torch.testing.assert_close(model.weight.detach(), expected)


@pytest.mark.parametrize("momentum_type", ["regular", "adam"])
def test_norm_constraint_bounds_the_fisher_norm_of_a_step(momentum_type):
    model, (x, y) = net().double(), batch()
    optimizer = make(
        model, lr=1.0, momentum=0.0, norm_constraint=1e-4, momentum_type=momentum_type,
        damping=1e-6,
    )  # fmt: skip
    before = parameters(model)
    train(model, optimizer, [(x.double(), y)])
    squared = 0.0
    for block in optimizer.estimator.blocks.values():
        index = [
            i for i, p in enumerate(model.parameters()) if any(p is q for q in block.params)
        ]
        moved = [before[i] - list(model.parameters())[i].detach() for i in index]
        V = block.params_to_vector(moved)
        squared += (V * block.multiply(V)).sum().item()
    assert squared == pytest.approx(1e-4, rel=1e-6)


def test_statistics_leave_gradients_and_the_global_generator_alone():
    model, (x, y) = net(), batch()
    functional.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    make(model)  # collected at once
    optimizer = make(model)
    state = torch.get_rng_state()
    loss = functional.cross_entropy(model(x), y)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert same([p.grad for p in model.parameters()], expected)
    optimizer.close()


class Scaled(nn.Module):
    """A scale and a shift that are bare parameters, between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.last(self.first(x) * self.scale + self.shift)


@pytest.mark.parametrize("momentum_type", ["regular", "adam"])
@pytest.mark.parametrize(
    ("fallback", "words"), [("adamw", "AdamW"), ("sgd", "plain momentum")]
)
def test_parameters_without_a_block_follow_a_plain_rule_and_are_named(
    momentum_type, fallback, words
):
    """The steps are those of torch's own AdamW and SGD."""
    torch.manual_seed(1)
    model, (x, y) = Scaled(), (torch.randn(6, 3), torch.randint(2, (6,)))
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.fallback = fallback
    optimizer = make(
        model,
        layer_collection=layers,
        momentum=0.5,
        momentum_type=momentum_type,
        weight_decay=0.1,
    )
    twins = [p.detach().clone().requires_grad_() for p in (model.scale, model.shift)]
    theirs = {
        "adamw": torch.optim.AdamW(twins, lr=3e-3, weight_decay=0.1),
        "sgd": torch.optim.SGD(twins, lr=0.1, momentum=0.5),
    }[fallback]
    for step in range(5):
        expected = pytest.warns(UserWarning, match=rf"by {words}: scale, shift$")
        with expected if step == 0 else nullcontext():  # later warnings are errors
            train(model, optimizer, [(x, y)])
        for twin, p in zip(twins, (model.scale, model.shift), strict=True):
            twin.grad = p.grad.clone()
            decay = 0.0 if fallback == "adamw" else 0.1 * 0.1
            twin.data.mul_(1 - decay) if decay else None
        theirs.step()
        for twin, p in zip(twins, (model.scale, model.shift), strict=True):
            torch.testing.assert_close(twin, p, rtol=0, atol=1e-6)


def test_the_rule_of_a_layer_is_for_a_user_to_choose():
    model = Scaled()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.fallback = "sgd"
    optimizer = make(model, layer_collection=layers)
    assert [group.get("rule") for group in optimizer.param_groups] == [None, "sgd"]
    assert optimizer.param_groups[1]["lr"] == 0.1


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(self.first(x)).tanh())


def test_tied_weights_have_no_block_and_are_named():
    model = Tied()
    optimizer = make(model, "normal")
    assert list(optimizer.estimator.blocks) == ["first"]
    x = torch.randn(6, 3)
    with pytest.warns(UserWarning, match=r"AdamW: a\.bias, a\.weight, b\.bias$"):
        train(model, optimizer, [(x, torch.randn(6, 4))], functional.mse_loss)


def test_a_layer_that_is_never_called_as_a_module_is_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return functional.linear(self.a(x), self.b.weight, self.b.bias)

    model = Functional()
    before = parameters(model)
    with (
        pytest.warns(UserWarning, match=r"plain momentum: b\.bias, b\.weight$"),
        pytest.warns(UserWarning, match=r"b \(1 uses, 0 recorded calls\)"),
    ):
        train(model, make(model), [(torch.randn(6, 3), torch.randint(2, (6,)))])
    assert not any(
        torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)
    )


def test_frozen_and_unused_parameters_stay():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.bias_only = nn.Linear(3, 3), nn.Linear(3, 4)
            self.bias_only.bias.requires_grad_(False)
            self.frozen.requires_grad_(False)
            self.unused, self.head = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.bias_only(self.frozen(x)))

    model = Branches()
    optimizer = make(model)
    assert list(optimizer.estimator.blocks) == ["bias_only", "unused", "head"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, [(torch.randn(6, 3), torch.randint(2, (6,)))] * 2)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"bias_only.weight", "head.weight", "head.bias"}


def test_a_layer_that_is_first_called_late():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.grown = nn.Linear(3, 3), nn.Linear(3, 2), False

        def forward(self, x):
            return self.b(self.a(x) if self.grown else x)

    model, data = Growing(), [(torch.randn(6, 3), torch.randint(2, (6,)))]
    optimizer = make(model, invert_every=100)
    train(model, optimizer, data * 5)
    before = model.a.weight.detach().clone()
    model.grown = True
    train(model, optimizer, data)
    assert optimizer.estimator.blocks["a"].factors[0].num_updates == 1
    assert not torch.equal(model.a.weight, before)


def test_shared_module_counts_every_use():
    shared = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(shared, nn.Tanh(), shared).double()
    optimizer = make(model, "normal", estimation_mode="exact")
    x = torch.randn(5, 3).double()
    h = shared(x).tanh().detach()
    model(x)
    optimizer.estimator.update_covariances()
    block = optimizer.estimator.blocks["0"]
    rows = torch.cat([x, h])
    assert block.num_locations == 2
    torch.testing.assert_close(block.factors[0].get_cov(), rows.T @ rows / 10)


def small(n=6):
    return torch.randn(n, 3), torch.randint(4, (n,))


def test_locations_are_averaged_like_the_factors():
    """Inputs of another length: T is 5 for three batches, then 2, at decay 1/2."""
    conv = nn.Sequential(nn.Conv1d(2, 3, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    optimizer = make(conv, cov_ema_decay=0.5)
    block = optimizer.estimator.blocks["0"]
    for length, expected in ((5, 5.0), (5, 5.0), (5, 5.0), (2, (5 * 0.875 + 2) / 1.875)):
        train(conv, optimizer, [(torch.randn(4, 2, length), torch.randint(3, (4,)))])
        assert block.num_locations == pytest.approx(expected)


def test_keyword_calls_and_hooks_of_the_user_are_seen_as_the_layer_computes():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(input=x)

    model, (x, y) = Keywords(), small()
    model.fc.register_forward_hook(lambda module, args, output: 2 * output)
    optimizer = make(model, estimation_mode="exact")
    train(model, optimizer, [(x, y)])
    A = optimizer.estimator.blocks["fc"].factors[0].get_cov()
    torch.testing.assert_close(A[:3, :3], x.T @ x / 6)
    plain = nn.Linear(3, 4)
    with torch.no_grad():
        plain.weight.zero_(), plain.bias.zero_()
        model.fc.weight.zero_(), model.fc.bias.zero_()
    a, b = make(model, estimation_mode="exact"), make(plain, estimation_mode="exact")
    model(x), plain(x)
    grams = []
    for optimizer in (a, b):
        optimizer.estimator.update_covariances()
        (block,) = optimizer.estimator.blocks.values()
        grams.append(block.factors[1].get_cov())
    torch.testing.assert_close(grams[0], 4 * grams[1])  # through the doubling, squared


def test_copies_of_the_model_are_not_watched(tmp_path):
    model, (x, y) = nn.Linear(3, 4), small()
    optimizer = make(model)
    twin = copy.deepcopy(model)
    twin(x)
    torch.func.functional_call(model, {"weight": torch.randn(4, 3)}, (x,))
    assert not optimizer.estimator.has_statistics()
    torch.save(model, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)(x)
    assert not optimizer.estimator.has_statistics()
    train(model, optimizer, [(x, y)])


def test_a_layer_unfrozen_later_is_trained():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    model[0].requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer, [small()])
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"AdamW: 0\.bias, 0\.weight$"):
        train(model, optimizer, [small()])
    assert not torch.equal(model[0].weight, before)


def test_half_a_block_follows_plain_momentum():
    model, (x, y) = nn.Linear(3, 4), small()
    optimizer = make(model)
    train(model, optimizer, [(x, y)])
    model.weight.requires_grad_(False)
    start, velocity = model.bias.detach().clone(), optimizer.state[model.bias]
    velocity = 0.9 * velocity["momentum_buffer"]
    with pytest.warns(UserWarning, match="plain momentum: bias$"):
        train(model, optimizer, [(x, y)])
    expected = start - 0.1 * (velocity + model.bias.grad)
    torch.testing.assert_close(model.bias.detach(), expected)


def test_a_model_converted_after_construction():
    model, (x, y) = net(), batch()
    optimizer = make(model)
    model.double()
    train(model, optimizer, [(x.double(), y)])
    assert all(p.dtype == torch.float64 and p.isfinite().all() for p in model.parameters())


def test_looking_at_a_factor_changes_nothing():
    model, (x, y) = net(), batch()
    twin = copy.deepcopy(model)
    a, b = make(model), make(twin)
    for _ in range(3):
        train(model, a, [(x, y)])
        train(twin, b, [(x, y)])
        b.estimator.blocks["0"].factors[0].get_eigendecomp()
    assert same(parameters(model), parameters(twin))


# Intervals, schedules, closures.


def test_intervals():
    model, (x, y) = net(), batch()
    optimizer = make(model, cov_update_every=3, invert_every=4)
    factor = optimizer.estimator.blocks["0"].factors[0]
    damping = next(iter(factor._powers.values())).damping_func
    updates, inverses = [], []
    previous = None
    for _ in range(9):
        train(model, optimizer, [(x, y)])
        updates.append(factor.num_updates)
        inverse = factor.get_inverse(damping).clone()
        inverses.append(previous is None or not torch.equal(inverse, previous))
        previous = inverse
        optimizer.param_groups[0]["damping"] *= 1.1  # so that every refresh shows
    assert updates == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert inverses == [True, True, True, False, True, False, False, False, True]


def test_schedulers_and_scheduled_damping():
    model, (x, y) = net(), batch()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, [(x, y)])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    optimizer.param_groups[0]["damping"] = -1.0
    with pytest.raises(
        ValueError, match=r"damping of .*expected a finite number >= 0, got -1"
    ):
        train(model, optimizer, [(x, y)])


def test_closure():
    model, (x, y) = net(), batch()
    twin = copy.deepcopy(model)
    optimizer, plain = make(model), make(twin)

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == train(twin, plain, [(x, y)])[0]
    assert same(parameters(model), parameters(twin))


def test_accumulated_micro_batches_are_one_batch():
    model, (x, y) = net().double(), batch(12)
    twin, x = copy.deepcopy(model), x.double()
    whole, parts = (make(m, estimation_mode="exact", invert_every=1) for m in (model, twin))
    train(model, whole, [(x, y)] * 3)
    for _ in range(3):
        parts.zero_grad()
        for xs, ys in zip(x.split(4), y.split(4), strict=True):
            loss = functional.cross_entropy(twin(xs), ys) / 3
            loss.backward()
        parts.step()  # gradients that are accumulated as one batch's are no mistake
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_evaluation_between_steps_changes_nothing():
    model, (x, y) = net(), batch()
    twin = copy.deepcopy(model)
    a, b = make(model), make(twin)
    for _ in range(3):
        train(model, a, [(x, y)])
        model.eval()
        model(torch.randn(64, 1, 4, 4))
        model.train()
        with torch.no_grad():
            model(torch.randn(64, 1, 4, 4))
        train(twin, b, [(x, y)])
    assert same(parameters(model), parameters(twin))


@pytest.mark.parametrize("output", ["scores", lambda out: out["scores"]])
def test_models_that_return_a_dict(output):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return {"scores": self.net(x), "other": x}

    model, (x, y) = Wrapped(), batch()
    train(
        model,
        make(model, output=output),
        [(x, y)],
        lambda out, y: functional.cross_entropy(out["scores"], y),
    )
    optimizer = make(model)
    with pytest.raises(ValueError, match=r"network output as a tensor, got dict.*output="):
        train(model, optimizer, [(x, y)])


def test_autocast():
    model, (x, y) = net(), batch()
    optimizer = make(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    for block in optimizer.estimator.blocks.values():
        assert all(f.get_cov().dtype == torch.float32 for f in block.factors)
    assert all(p.isfinite().all() for p in model.parameters())


def test_statistics_under_autocast_are_in_float32():
    model, x = nn.Linear(3, 4), torch.randn(64, 3)
    optimizer = make(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    optimizer.estimator.update_covariances()
    A = optimizer.estimator.blocks["model"].factors[0].get_cov()
    torch.testing.assert_close(A[:3, :3], x.T @ x / 64)


def test_a_layer_input_that_is_overwritten_in_the_forward_is_named():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            h = 2 * x
            z = self.fc(h)
            h.zero_()
            return z

    model = Overwriting()
    optimizer = make(model)
    with pytest.raises(RuntimeError, match=r"layer fc: its input was changed in place"):
        model(torch.randn(5, 3))
    optimizer.close()


def test_a_group_of_further_parameters_has_options_of_its_own():
    model, scale = nn.Linear(3, 4), nn.Parameter(torch.ones(()))
    optimizer = make(model)
    optimizer.add_param_group({"params": [scale], "lr": 0.5, "momentum": 0.25})
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    expected, velocity = 1.0, 0.0
    with pytest.warns(UserWarning, match="plain momentum"):
        for _ in range(3):
            train(
                model,
                optimizer,
                [(x, y)],
                lambda z, y: functional.cross_entropy(scale * z, y),
            )
            velocity = 0.25 * velocity + scale.grad.item()
            expected -= 0.5 * velocity
            assert scale.item() == pytest.approx(expected)


# The check of the loss.


SUMMED_BCE = nn.BCEWithLogitsLoss(reduction="sum")


def mismatch(loss, criterion, targets=None, n=8):
    model = nn.Linear(3, 4).double()
    x = torch.randn(n, 3).double()
    y = torch.randint(4, (n,)) if targets is None else targets
    optimizer = make(model, loss)
    train(model, optimizer, [(x, y)], criterion)


@pytest.mark.parametrize(
    ("loss", "criterion", "targets", "message"),
    [
        (
            "categorical",
            nn.CrossEntropyLoss(reduction="sum"),
            None,
            r"is 8 times that of the mean over 8 loss terms of Categorical",
        ),
        (
            "categorical",
            lambda z, y: 0.1 * functional.cross_entropy(z, y),
            None,
            r"is 0\.1 times",
        ),
        (
            "categorical",
            nn.MSELoss(),
            torch.randn(8, 4).double(),
            "cannot be that of the mean over 8 loss terms of Categorical",
        ),
        (
            "bernoulli",
            nn.BCEWithLogitsLoss(),
            torch.eye(4).repeat(2, 1).double(),
            r"is 0\.25 times",
        ),
        (
            nn.CrossEntropyLoss(reduction="sum"),
            nn.CrossEntropyLoss(),
            None,
            r"is 0\.125 times that of the sum over 8 loss terms",
        ),
    ],
)
def test_a_loss_that_is_not_the_declared_one_is_reported(loss, criterion, targets, message):
    with pytest.warns(UserWarning, match=message):
        mismatch(loss, criterion, targets)


@pytest.mark.parametrize(
    ("loss", "criterion", "targets"),
    [
        ("categorical", nn.CrossEntropyLoss(), None),
        ("categorical", nn.CrossEntropyLoss(label_smoothing=0.1), None),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), None),
        ("bernoulli", lambda z, y: SUMMED_BCE(z, y) / 8, torch.rand(8, 4).double()),
        ("categorical", lambda z, y: 2.0**16 * functional.cross_entropy(z, y), None),
        (nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum"), None),
        (
            nn.BCEWithLogitsLoss(),
            nn.BCEWithLogitsLoss(),
            torch.eye(4).repeat(2, 1).double(),
        ),
        (nn.MSELoss(), nn.MSELoss(), torch.randn(8, 4).double()),
    ],
)
def test_a_loss_that_is_the_declared_one_is_not(loss, criterion, targets):
    mismatch(loss, criterion, targets)  # warnings are errors here


def test_log_probabilities_and_their_loss_are_the_declared_one():
    model = nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(1))
    train(model, make(model), [small(8)], functional.nll_loss)


def test_masked_logits():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(x).masked_fill(
                torch.tensor([False, True, False, False]), -torch.inf
            )

    model, x = Masked(), torch.randn(8, 3)
    optimizer = make(model)
    train(model, optimizer, [(x, torch.tensor([0, 2, 3, 0, 2, 3, 0, 2]))])
    assert optimizer.skipped_steps == 0
    G = optimizer.estimator.blocks["fc"].factors[1].get_cov()
    assert (G[1] == 0).all()
    assert (G.diagonal()[[0, 2, 3]] > 0).all()


def test_messages_point_at_the_users_line():
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4))
    optimizer = make(model)
    x, y = small(8)
    with pytest.warns() as caught:
        train(model, optimizer, [(x, y)], lambda z, y: 0.1 * functional.cross_entropy(z, y))
        train(
            model,
            optimizer,
            [(x, y)],
            lambda z, y: torch.nan * functional.cross_entropy(z, y),
        )
    assert [w.filename for w in caught] == [__file__] * 3


def test_a_normal_loss_is_checked_where_a_closure_tells_its_value():
    model, x, y = nn.Linear(3, 4), torch.randn(8, 3), torch.randn(8, 4)
    for loss in (nn.MSELoss(), "normal"):
        optimizer = make(model, loss)

        def closure():
            value = functional.mse_loss(model(x), y)
            value.backward()
            return value

        if loss == "normal":  # (2/4) · ½‖t − y‖²
            with pytest.warns(UserWarning, match=r"is 0\.5 times that of the mean over 8"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        optimizer.close()


def test_the_loss_is_checked_once():
    model = nn.Linear(3, 4)
    optimizer = make(model)
    batches = [(torch.randn(8, 3), torch.randint(4, (8,)))]
    train(model, optimizer, batches)
    train(model, optimizer, batches, lambda z, y: 7 * functional.cross_entropy(z, y))


def test_a_criterion_that_sums_makes_the_same_steps_as_one_that_averages():
    model, batches = net().double(), [batch(n) for n in (16, 9, 3)]
    batches = [(x.double(), y) for x, y in batches]
    twin = copy.deepcopy(model)
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    train(model, make(model, mean, cov_update_every=2), batches, mean)
    train(twin, make(twin, total, cov_update_every=2), batches, total)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("how", ["another forward", "eval"])
def test_a_summed_gradient_is_divided_by_the_terms_that_reached_it(how):
    model, (x, y) = net().double(), batch()
    x, twin = x.double(), copy.deepcopy(model)
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    a, b = make(model, mean, cov_update_every=2), make(twin, total, cov_update_every=2)
    train(model, a, [(x, y)], mean)
    train(twin, b, [(x, y)], total)
    if how == "eval":
        model.eval(), twin.eval()
    else:
        twin(x)
    train(model, a, [(x, y)], mean)
    train(twin, b, [(x, y)], total)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_forward_without_a_backward_is_no_data_in_empirical_mode():
    model, (x, y) = net().double(), batch()
    twin = copy.deepcopy(model)
    a, b = (make(m, estimation_mode="empirical") for m in (model, twin))
    train(model, a, [(x.double(), y)])
    twin(x.double())
    train(twin, b, [(x.double(), y)])
    assert same(parameters(model), parameters(twin))


def test_a_gradient_penalty_is_no_data():
    model, (x, y) = net().double(), batch()
    twin = copy.deepcopy(model)
    x.requires_grad_()

    def penalised(z, y):
        loss = functional.cross_entropy(z, y)
        (g,) = torch.autograd.grad(loss, double, create_graph=True)
        return loss + 0.0 * g.square().sum()

    for mode in ("empirical", "gradients"):
        a, b = (make(m, estimation_mode=mode) for m in (model, twin))
        double = x.detach().double().requires_grad_()
        train(model, a, [(double, y)])
        with pytest.warns(UserWarning, match="differentiated inside its own loss"):
            train(twin, b, [(double, y)], penalised)
        a.close(), b.close()
        for block, other in zip(
            a.estimator.blocks.values(), b.estimator.blocks.values(), strict=True
        ):
            for f, g in zip(block.factors, other.factors, strict=True):
                torch.testing.assert_close(f.get_cov(), g.get_cov())


def test_empirical_mode_understands_a_sum_it_was_not_told_of():
    model, (x, y) = net().double(), batch()
    twin = copy.deepcopy(model)
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    a, b = (make(m, estimation_mode="empirical") for m in (model, twin))
    train(model, a, [(x.double(), y)], mean)
    with pytest.warns(UserWarning, match="is 16 times"):
        train(twin, b, [(x.double(), y)], total)
    resumed = make(twin, estimation_mode="empirical")
    resumed.load_state_dict(b.state_dict())
    train(model, a, [(x.double(), y)], mean)
    b.close()
    train(twin, resumed, [(x.double(), y)], total)
    for name, block in a.estimator.blocks.items():
        for f, g in zip(block.factors, resumed.estimator.blocks[name].factors, strict=True):
            assert g.num_updates == 2
            assert 0.2 < (g.get_cov().trace() / f.get_cov().trace()).item() < 5


def test_two_backwards_through_one_graph_add_up_in_empirical_mode():
    model, (x, y) = net().double(), batch()
    twin = copy.deepcopy(model)
    a, b = (make(m, estimation_mode="empirical") for m in (model, twin))
    train(model, a, [(x.double(), y)])
    loss = functional.cross_entropy(twin(x.double()), y)
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()
    b.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# A bad batch.


@pytest.mark.parametrize("mode", ["gradients", "exact", "empirical"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("loss", ["categorical", "bernoulli"])
def test_a_bad_batch_changes_nothing(loss, bad, mode):
    model = net()
    optimizer = make(model, loss, estimation_mode=mode)
    x, y = torch.randn(8, 1, 4, 4), torch.randint(2, (8, 5)).float()
    criterion = functional.cross_entropy
    if loss == "categorical":
        y = y.argmax(1)
    else:

        def criterion(z, y):
            return functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / 8

    train(model, optimizer, [(x, y)] * 2, criterion)
    factors = [f for b in optimizer.estimator.blocks.values() for f in b.factors]
    before = parameters(model) + [f.get_cov().clone() for f in factors]
    poisoned = x.clone()
    poisoned[3, 0, 1, 2] = bad
    with pytest.warns(RuntimeWarning, match=r"in (0|the network output), .*left out"):
        train(model, optimizer, [(poisoned, y)], criterion)
    assert same(before, parameters(model) + [f.get_cov() for f in factors])
    assert optimizer.skipped_steps == 1
    assert {f.num_rejected_updates for f in factors} == {1}
    train(model, optimizer, [(x, y)], criterion)
    assert optimizer.skipped_steps == 1
    assert {f.num_updates for f in factors} == {3}


@pytest.mark.parametrize("momentum_type", ["regular", "adam"])
def test_a_bad_gradient_changes_no_parameter_and_no_velocity(momentum_type):
    model, (x, y) = net(), batch()
    optimizer = make(model, momentum_type=momentum_type)
    train(model, optimizer, [(x, y)])
    before = parameters(model)
    velocities = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    with pytest.warns(RuntimeWarning, match="in the gradient; the step is left out"):
        train(
            model,
            optimizer,
            [(x, y)],
            lambda z, y: functional.cross_entropy(z, y) * torch.nan,
        )
    assert same(before, parameters(model))
    assert {
        f.num_updates for b in optimizer.estimator.blocks.values() for f in b.factors
    } == {1}
    assert same(velocities, [s["momentum_buffer"] for s in optimizer.state.values()])
    assert optimizer.skipped_steps == 1


def test_statistics_that_were_left_out_are_taken_at_the_next_step():
    model, (x, y) = net(), batch()
    optimizer = make(model, cov_update_every=4)
    train(model, optimizer, [(x, y)] * 4)
    with pytest.warns(RuntimeWarning, match="left out"):
        train(model, optimizer, [(torch.full_like(x, torch.nan), y)])
    train(model, optimizer, [(x, y)])
    assert optimizer.estimator.blocks["0"].factors[0].num_updates == 2


def test_a_bad_output_over_good_layers_is_left_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.broken = nn.Linear(3, 4), False

        def forward(self, x):
            keep = torch.rand(len(x), 4) > 0.5 if self.broken else torch.tensor(True)
            return torch.where(keep, self.fc(x), torch.nan)

    model, data = Masked(), [(torch.randn(6, 3), torch.randint(4, (6,)))]
    optimizer = make(model)
    train(model, optimizer, data)
    model.broken = True
    with pytest.warns(RuntimeWarning, match="in the network output"):
        train(model, optimizer, data)
    assert optimizer.estimator.blocks["fc"].factors[0].num_updates == 1


def test_a_bad_first_batch():
    model, (x, y) = net(), batch()
    optimizer = make(model)
    with pytest.warns(RuntimeWarning, match="left out"):
        train(model, optimizer, [(torch.full_like(x, torch.nan), y)])
    train(model, optimizer, [(x, y)])
    assert all(p.isfinite().all() for p in model.parameters())


# State.


@pytest.mark.parametrize("mode", ["gradients", "empirical", "exact"])
@pytest.mark.parametrize("momentum_type", ["regular", "adam"])
def test_resuming_is_bit_for_bit(momentum_type, mode):
    batches = [batch() for _ in range(12)]
    kwargs = {
        "momentum_type": momentum_type,
        "estimation_mode": mode,
        "cov_update_every": 2,
        "invert_every": 3,
        "weight_decay": 0.01,
    }
    model = net()
    optimizer = make(model, **kwargs)
    for stop in range(1, 8):
        train(model, optimizer, batches[stop - 1 : stop])
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        twin = net()
        resumed = make(twin, **kwargs)
        weights, state = torch.load(file, weights_only=True)
        twin.load_state_dict(weights)
        resumed.load_state_dict(state)
        ahead = train(twin, resumed, batches[stop:])
        if stop == 1:
            reference, final = ahead, parameters(twin)
        assert ahead == reference[stop - 1 :]
        assert same(parameters(twin), final)
    train(model, optimizer, batches[7:])
    assert same(parameters(model), final)


def test_state_of_another_model_is_refused_and_leaves_all_as_it_was():
    model, other, (x, y) = net(), nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), batch()
    optimizer, foreign = make(model), make(other)
    train(model, optimizer, [(x, y)])
    train(other, foreign, [(x, y)])
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"(?s)missing.*: 0, 3\n.*unknown.*: 1$"):
        optimizer.load_state_dict(foreign.state_dict())
    with pytest.raises(
        ValueError, match="expected K-FAC state of version 6, got no K-FAC state"
    ):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())
    after = optimizer.state_dict()
    assert str(before) == str(after)
    state = copy.deepcopy(after)
    state["kfac"]["version"] = 99
    with pytest.raises(ValueError, match="got version 99"):
        optimizer.load_state_dict(state)


def test_loading_forgets_what_was_gathered_before():
    model, (x, y) = net(), batch()
    optimizer = make(model)
    train(model, optimizer, [(x, y)])
    with pytest.warns(RuntimeWarning, match="left out"):
        train(model, optimizer, [(torch.full_like(x, torch.nan), y)])
    twin = net()
    resumed = make(twin)
    twin(100 * x)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.skipped_steps == 1
    assert not resumed.estimator.has_statistics()


def test_no_hook_remains():
    model = net()
    optimizer = make(model)
    optimizer.close()
    second = make(model)
    del optimizer, second
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Errors.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, r"lr: expected a number >= 0.*got -1\.0"),
        ({"damping": -1.0}, r"damping: expected a finite number >= 0, got -1\.0"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1\.0"),
        ({"momentum_type": "nesterov"}, "momentum_type: expected one of.*'nesterov'"),
        ({"estimation_mode": "fisher"}, "estimation_mode: expected one of.*'fisher'"),
        ({"norm_constraint": 0.0}, "norm_constraint: expected a positive number or None"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
        ({"cov_ema_decay": 1.5}, r"cov_ema_decay: expected a number in \[0, 1\]"),
        ({"cov_update_every": 0}, "cov_update_every: expected an integer >= 1"),
        ({"invert_every": 2.5}, "invert_every: expected an integer >= 1"),
        ({"loss": "poisson"}, "loss: expected one of.*'poisson'"),
        ({"loss": functional.cross_entropy}, r"cross_entropy.*pass the criterion's module"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(net(), **kwargs)


@pytest.mark.parametrize("model", [nn.PReLU(3), nn.Softmax(-1), nn.ReLU()])
def test_a_model_without_a_supported_layer(model):
    with pytest.raises(
        ValueError, match=r"has no layer that K-FAC supports: expected an nn\.L"
    ):
        make(model)


def test_a_loss_that_does_not_fit_the_output():
    model = nn.Linear(3, 1)
    make_one = make(model)
    with pytest.raises(ValueError, match=r"at least two classes.*got shape \(8, 1\)"):
        model(torch.randn(8, 3))
    make_one.close()


def test_a_constructor_that_fails_leaves_the_collection_as_it_was():
    model = net()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    with pytest.raises(ValueError, match="estimation_mode"):
        make(model, layer_collection=layers, estimation_mode="sampled")
    assert layers.registered_losses == []
    make(model, layer_collection=layers)
    assert len(layers.registered_losses) == 1


def test_a_closure_that_fails_leaves_nothing_behind():
    x, y = batch()
    after = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = net()
        optimizer = make(model, lr=None, momentum_type="qmodel", estimation_mode="exact")
        train(model, optimizer, [(x, y)])

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            value = functional.cross_entropy(model(x), y)
            value.backward()
            return value

        def failing(model=model):
            model(10 * x)
            raise ValueError("inside")

        if fails:
            with pytest.raises(ValueError, match="inside"):
                optimizer.step(failing)
        optimizer.step(closure)
        after.append(parameters(model))
    assert same(*after)


def test_a_step_before_any_forward():
    model, (x, y) = net(), batch()
    functional.cross_entropy(model(x), y).backward()
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"no statistics yet.*training mode.*first step"):
        make(model).step()
    assert same(before, parameters(model))


def test_a_singular_factor_is_named_and_more_data_help():
    model = nn.Linear(3, 4, bias=False).double()
    optimizer = make(model, "normal", damping=0.0, cov_update_every=3)
    few, many = torch.randn(2, 3).double(), torch.randn(64, 3).double()
    before = parameters(model)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"model\.input.*singular.*more data"
    ):
        train(model, optimizer, [(few, torch.randn(2, 4))], functional.mse_loss)
    assert same(before, parameters(model))
    train(model, optimizer, [(many, torch.randn(64, 4).double())], functional.mse_loss)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("output", ["logit", 3, "missing"])
def test_an_output_that_is_not_there(output):
    class Wrapped(nn.Linear):
        def forward(self, x):
            z = super().forward(x)
            return (z, z) if output == 3 else {"logits": z}

    model = nn.Sequential(nn.Linear(3, 3), Wrapped(3, 4))
    optimizer = make(model, output=output)
    with pytest.raises(
        ValueError, match=rf"output={output!r} does not fit what the model ret"
    ):
        model(torch.randn(5, 3))
    optimizer.close()


def test_state_of_other_options_is_refused():
    model = net()
    optimizer = make(model)
    train(model, optimizer, [batch()])
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"momentum_type: expected 'adam', got 'regular'"):
        make(model, momentum_type="adam").load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"estimation_mode: expected 'exact', got 'gradients'"
    ):
        make(model, estimation_mode="exact").load_state_dict(state)


def test_activations_do_not_outlive_a_step():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 4))
    for mode in ("gradients", "empirical"):
        optimizer = make(model, estimation_mode=mode)
        x, y = small(77)
        gc.collect()
        gc.disable()
        try:
            train(model, optimizer, [(x, y)] * 3)
            tensors = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.dim())
            alive = [tuple(t.shape) for t in tensors if len(t) == 77]
            assert sorted(alive) == [(77,), (77, 3)]  # y and x
        finally:
            gc.enable()
        optimizer.close()


def test_a_sparse_gradient():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 4))
    optimizer = make(model)
    with pytest.raises(ValueError, match=r"parameter 0\.weight: expected a dense gradient"):
        train(model, optimizer, [(torch.tensor([1, 2]), torch.tensor([0, 3]))])
    assert optimizer.estimator.blocks["1"].factors[0].num_updates == 0
