"""Losses against dense matrices and the numbers of the lineage's tests."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    MultiBernoulliNegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
    make_objective,
)

pytestmark = pytest.mark.usefixtures("float64")
LOSSES = {
    "categorical": CategoricalLogitsNegativeLogProbLoss,
    "normal": NormalMeanNegativeLogProbLoss,
    "bernoulli": MultiBernoulliNegativeLogProbLoss,
}


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def random_targets(kind, z):
    if kind == "categorical":
        return torch.randint(z.shape[-1], z.shape[:-1])
    return torch.randn_like(z) if kind == "normal" else torch.rand_like(z)


def test_categorical_values():
    logits = torch.tensor([[0.0, 0, 0], [1, -1, 0]])
    loss = CategoricalLogitsNegativeLogProbLoss(logits, torch.tensor([2, 1]))
    close(loss.evaluate(), 3.5062182531)
    logits = torch.tensor([[1.0, 2], [3, 4]])
    loss = CategoricalLogitsNegativeLogProbLoss(logits, torch.tensor([0, 1]))
    close(loss.evaluate(), 1.6265233, 1e-7)


def test_normal_value():
    loss = NormalMeanNegativeLogProbLoss(
        torch.tensor([[1.0, 2], [3, 4]]), var=4.0, targets=torch.tensor([[3.0, 1], [4, 2]])
    )
    close(loss.evaluate(), 7.6983433, 1e-6)


def test_bernoulli_value():
    z, y = torch.randn(2, 5, 3), torch.rand(2, 5, 3)
    p = z.sigmoid()
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).sum()
    close(MultiBernoulliNegativeLogProbLoss(z, y).evaluate(), expected)


def test_categorical_fisher_products():
    loss = CategoricalLogitsNegativeLogProbLoss(torch.tensor([[1.0, 2, 3], [4, 6, 8]]))
    product = loss.multiply_fisher(torch.tensor([[1.0, 2, 3], [5, 3, 1]]))
    expected = [
        [-0.1418170936, -0.1407703575, 0.2825874511],
        [0.0587718429, 0.1996475887, -0.2584194316],
    ]
    close(product, expected)
    v = torch.tensor([[1.0, 2, 3], [1, 2, 3]])
    close(loss.multiply_fisher_factor(v)[0], [-0.036332158, 0.0750166779, -0.0386845199])
    transposed = loss.multiply_fisher_factor_transpose(v)[0]
    close(transposed, [-0.4726433733, -0.2845567978, 0.3464682023])


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3)])
@pytest.mark.parametrize("kind", LOSSES)
def test_fisher_is_the_hessian_and_its_factors_multiply_to_it(kind, shape):
    z = torch.randn(shape)
    loss = LOSSES[kind](z)
    targets = random_targets(kind, z)
    hessian = torch.autograd.functional.hessian(
        lambda z: LOSSES[kind](z).evaluate_on_targets(targets), z
    ).view(z.numel(), z.numel())

    def dense(multiply):
        columns = [multiply(e.view(shape)).flatten() for e in torch.eye(z.numel())]
        return torch.stack(columns, 1)

    B, Bt = dense(loss.multiply_fisher_factor), dense(loss.multiply_fisher_factor_transpose)
    close(dense(loss.multiply_fisher), hessian)
    close(Bt, B.T)
    close(B @ Bt, hessian)
    for name in ("", "_factor", "_factor_transpose"):
        ours, theirs = (
            getattr(loss, f"multiply_{kind}{name}") for kind in ("hessian", "fisher")
        )
        close(dense(ours), dense(theirs))


@pytest.mark.parametrize("kind", LOSSES)
def test_columns_of_the_factor(kind):
    """All columns of all examples give the Fisher; the replicated one-hots, of each row."""
    z = torch.randn(4, 2, 3)
    loss = LOSSES[kind](z)
    columns = torch.stack(list(loss.fisher_factor_columns()))
    assert columns.shape == (6, 4, 2, 3)
    for n, F in enumerate(torch.einsum("jnab,jncd->nabcd", columns, columns)):
        v = torch.zeros_like(z)
        v[n] = torch.randn(2, 3)
        close(torch.einsum("abcd,cd->ab", F, v[n]), loss.multiply_fisher(v)[n])
    for j in range(3):
        one_hot = torch.zeros_like(z)
        one_hot[..., j] = 1
        close(
            loss.multiply_fisher_factor_replicated_one_hot(j),
            loss.multiply_fisher_factor(one_hot),
        )


@pytest.mark.parametrize("kind", LOSSES)
def test_samples_have_the_fisher_as_second_moment_of_the_gradient(kind):
    """20 000 draws, four standard errors of every entry."""
    row = torch.tensor([0.5, -1.0, 0.3])
    z = row.repeat(20_000, 1).requires_grad_()
    loss = LOSSES[kind](z)
    generator = torch.Generator().manual_seed(1)
    (g,) = torch.autograd.grad(loss.evaluate_on_sample(generator), z)
    products = g[:, :, None] * g[:, None, :]
    expected = torch.stack(
        [LOSSES[kind](row[None]).multiply_fisher(e[None])[0] for e in torch.eye(3)]
    )
    error = products.std(0) / len(g) ** 0.5
    assert ((products.mean(0) - expected).abs() <= 4 * error + 1e-12).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_sampling_is_the_generators_and_leaves_the_global_one_alone(kind):
    loss = LOSSES[kind](torch.randn(6, 3))
    state = torch.get_rng_state()
    a, b = (loss.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert a.shape == ((6,) if kind == "categorical" else (6, 3))


def test_number_of_loss_terms():
    z = torch.zeros(4, 5, 3)
    assert CategoricalLogitsNegativeLogProbLoss(z).num_terms == 20
    assert CategoricalLogitsNegativeLogProbLoss(z, class_dim=1).num_terms == 12
    assert NormalMeanNegativeLogProbLoss(z).num_terms == 4
    assert MultiBernoulliNegativeLogProbLoss(z).num_terms == 4


def test_classes_in_the_second_dimension():
    z, y = torch.randn(4, 5, 2, 3), torch.randint(5, (4, 2, 3))
    first = CategoricalLogitsNegativeLogProbLoss(z, y, class_dim=1)
    last = CategoricalLogitsNegativeLogProbLoss(z.movedim(1, -1), y)
    close(first.evaluate(), functional.cross_entropy(z, y, reduction="sum"))
    v = torch.randn_like(z)
    for name in (
        "multiply_fisher",
        "multiply_fisher_factor",
        "multiply_fisher_factor_transpose",
    ):
        expected = getattr(last, name)(v.movedim(1, -1)).movedim(-1, 1)
        close(getattr(first, name)(v), expected)
    assert first.sample().shape == (4, 2, 3)
    one_hot = last.multiply_fisher_factor_replicated_one_hot(2).movedim(-1, 1)
    close(first.multiply_fisher_factor_replicated_one_hot(2), one_hot)


# The scale of a gradient.


@pytest.mark.parametrize("scale", [1.0, 0.125, 3e-5])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_gradient_scale_is_recovered_from_hard_targets(kind, scale):
    z = (3 * torch.randn(8, 5)).requires_grad_()
    loss = LOSSES[kind](z)
    (g,) = torch.autograd.grad(scale * loss.evaluate_on_sample(), z)
    assert loss.gradient_scale(g).item() == pytest.approx(scale, rel=1e-9)


def test_gradient_scale_of_another_loss_is_nan():
    z = torch.randn(8, 5, requires_grad=True)
    (g,) = torch.autograd.grad(functional.mse_loss(z, torch.randn(8, 5)), z)
    assert CategoricalLogitsNegativeLogProbLoss(z).gradient_scale(g).isnan()


def test_gradient_scale_of_a_normal_loss_needs_its_value():
    z, y = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    loss = NormalMeanNegativeLogProbLoss(z, var=0.5)
    value = 0.3 * (z - y).square().sum()
    (g,) = torch.autograd.grad(value, z)
    assert loss.gradient_scale(g) is None
    assert loss.gradient_scale(g, value.item()).item() == pytest.approx(0.3)


# What a user may pass as loss=.


@pytest.mark.parametrize(
    ("criterion", "loss_of"),
    [
        (nn.CrossEntropyLoss(), None),
        (nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1), None),
        (nn.MSELoss(), None),
        (nn.MSELoss(reduction="sum"), None),
        (nn.BCEWithLogitsLoss(), None),
        (nn.BCEWithLogitsLoss(reduction="sum"), None),
        ("categorical", nn.CrossEntropyLoss()),
        ("bernoulli", lambda z, y: nn.BCEWithLogitsLoss(reduction="sum")(z, y) / len(z)),
        ("normal", lambda z, y: 0.5 * (z - y).square().sum() / len(z)),
    ],
    ids=str,
)
def test_curvature_of_an_objective_is_the_hessian_of_the_mean_loss(criterion, loss_of):
    z = torch.randn(4, 3)
    name = criterion if isinstance(criterion, str) else type(criterion).__name__
    kind = {"CrossEntropyLoss": "categorical", "MSELoss": "normal"}.get(name, name)
    targets = random_targets("bernoulli" if "BCE" in kind else kind, z)
    objective = make_objective(criterion)
    hessian = torch.autograd.functional.hessian(
        lambda z: (loss_of or criterion)(z, targets), z
    ).view(12, 12)
    loss = objective.factory(z)
    scale = objective.coeff(z) / (1 if objective.reduction == "sum" else loss.num_terms)
    columns = [scale * loss.multiply_fisher(e.view(4, 3)).flatten() for e in torch.eye(12)]
    close(torch.stack(columns), hessian)


def test_a_class_or_a_factory():
    z = torch.randn(4, 3)
    objective = make_objective(MultiBernoulliNegativeLogProbLoss)
    assert isinstance(objective.factory(z), MultiBernoulliNegativeLogProbLoss)
    factory = make_objective(lambda z: NormalMeanNegativeLogProbLoss(z, var=2.0)).factory
    close(factory(z).multiply_fisher(z), z / 2)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ("poisson", ValueError, r"loss: expected one of.*got 'poisson'"),
        (nn.L1Loss(), ValueError, r"loss: expected nn\.CrossEntropyLoss.*got L1Loss"),
        (nn.MSELoss(reduction="none"), ValueError, r"reduction in.*'none'"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), ValueError, "with weight= is not"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), ValueError, "with pos_weight="),
        (3, TypeError, r"loss: expected a name.*got 3"),
    ],
)
def test_losses_that_are_not_known(loss, error, message):
    with pytest.raises(error, match=message):
        make_objective(loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CategoricalLogitsNegativeLogProbLoss(torch.zeros(4)), "at least 2 dim"),
        (
            lambda: CategoricalLogitsNegativeLogProbLoss(torch.zeros(4, 1)),
            'use "bernoulli"',
        ),
        (lambda: MultiBernoulliNegativeLogProbLoss(torch.tensor(0.0)), "at least 1 dim"),
        (lambda: MultiBernoulliNegativeLogProbLoss(torch.zeros(0, 2)), r"shape \(0, 2\)"),
        (lambda: NormalMeanNegativeLogProbLoss(torch.zeros(2, dtype=torch.int)), "int32"),
        (lambda: NormalMeanNegativeLogProbLoss([0.0]), "got list"),
        (
            lambda: NormalMeanNegativeLogProbLoss(torch.zeros(2, 2), var=0.0),
            "var: expected",
        ),
        (
            lambda: NormalMeanNegativeLogProbLoss(torch.zeros(2, 2)).evaluate(),
            "needs targets",
        ),
    ],
)
def test_outputs_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_log_density_is_normalised():
    z, grid = torch.tensor([[0.7]]), torch.linspace(-20, 20, 20_001)
    densities = [
        math.exp(-NormalMeanNegativeLogProbLoss(z, 2.0, y.view(1, 1)).evaluate().item())
        for y in grid[::20]
    ]
    assert sum(densities) * 0.04 == pytest.approx(1.0, abs=1e-6)
