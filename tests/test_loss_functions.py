"""Losses against dense matrices and the numbers of the lineage's tests."""

import itertools
import math

import numpy
import pytest
import torch
from loss_cases import (
    ALL,
    LOSSES,
    NATURAL,
    NEGATIVE_LOG_PROB,
    WITH_HESSIAN,
    DerivedCategorical,
    Poisson,
    PseudoHuber,
    close,
    dense,
)
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC
from kfac_torch.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    ConvexLoss,
    MultiBernoulliNegativeLogProbLoss,
    NegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
    NormalMeanVarianceNegativeLogProbLoss,
    OnehotCategoricalLogitsNegativeLogProbLoss,
    insert_slice_in_zeros,
    make_objective,
)

pytestmark = pytest.mark.usefixtures("float64")


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


@pytest.mark.parametrize("weighted", [False, True])
def test_the_bernoulli_value_of_a_good_fit(weighted):
    """What cancels is 1e5 times the loss: it has to in each term, not in the sums."""
    y = torch.rand(64, 784).round()
    z = ((2 * y - 1) * (12 + 2 * torch.randn(64, 784))).float()
    w = torch.rand(784) if weighted else torch.ones(784)
    expected = (w * functional.softplus((1 - 2 * y) * z.double())).sum()
    given = w.float() if weighted else None
    gradient = w.float() * (z.sigmoid() - y.float())
    found = MultiBernoulliNegativeLogProbLoss(z).value_from_gradient(gradient, given)
    assert found.dtype == torch.float32
    close(found.double(), expected, 1e-3)


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


SHAPES = [(4, 6), (2, 5, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_factors_multiply_to_the_fisher(kind, shape):
    loss = ALL[kind](torch.randn(shape))
    z, inner = loss.inputs.shape, loss.fisher_factor_inner_shape
    B = dense(loss.multiply_fisher_factor, inner)
    close(dense(loss.multiply_fisher_factor_transpose, z), B.T)
    close(dense(loss.multiply_fisher, z), B @ B.T)
    assert inner[0] == z[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", WITH_HESSIAN)
def test_fisher_is_the_hessian_and_its_factors_multiply_to_it(kind, shape):
    z = torch.randn(shape)
    loss = WITH_HESSIAN[kind](z)
    targets = loss.sample() if kind in NATURAL else torch.ones_like(z)
    hessian = torch.autograd.functional.hessian(
        lambda z: WITH_HESSIAN[kind](z).evaluate_on_targets(targets), z
    ).view(z.numel(), z.numel())
    close(dense(loss.multiply_fisher, z.shape), hessian)
    B = dense(loss.multiply_fisher_factor, z.shape)
    close(B @ B.T, hessian)
    for spelling in ("hessian", "ggn"):
        for name in ("", "_factor", "_factor_transpose"):
            ours, theirs = (
                getattr(loss, f"multiply_{s}{name}") for s in (spelling, "fisher")
            )
            close(dense(ours, z.shape), dense(theirs, z.shape))
        assert getattr(loss, f"{spelling}_factor_inner_shape") == z.shape
        one_hot = getattr(loss, f"multiply_{spelling}_factor_replicated_one_hot")(1)
        close(one_hot, loss.multiply_fisher_factor_replicated_one_hot(1))


@pytest.mark.parametrize("kind", sorted(set(ALL) - set(WITH_HESSIAN)))
def test_the_hessian_of_other_losses_is_not_offered(kind):
    loss = ALL[kind](torch.randn(4, 6))
    for spelling in ("hessian", "ggn"):
        for name in ("", "_factor", "_factor_transpose"):
            with pytest.raises(NotImplementedError, match=r"use the multiply_fisher"):
                getattr(loss, f"multiply_{spelling}{name}")(loss.inputs)
        with pytest.raises(NotImplementedError, match=r"may be indefinite"):
            getattr(loss, f"{spelling}_factor_inner_shape")


def test_fisher_of_a_normal_distribution_of_unknown_variance():
    """`E[∇ log p ∇ log pᵀ]` by Gauss-Hermite quadrature, exact for its quartics."""
    mean, variance = torch.tensor([[0.3, -1.0]]), torch.tensor([[0.5, 2.0]])
    nodes, weights = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(8))
    weights = weights / weights.sum()
    z = torch.cat([mean, variance], -1)
    F = torch.zeros(4, 4)
    for i, j in itertools.product(range(8), repeat=2):
        y = mean + variance.sqrt() * torch.stack([nodes[i], nodes[j]])
        g = torch.func.grad(
            lambda z, y=y: NormalMeanVarianceNegativeLogProbLoss.from_output(
                z
            ).evaluate_on_targets(y)
        )(z)[0]
        F += weights[i] * weights[j] * torch.outer(g, g)
    loss = NormalMeanVarianceNegativeLogProbLoss(mean, variance)
    close(dense(loss.multiply_fisher, loss.inputs.shape), F)
    v = torch.tensor([0.5, 2.0])
    close(F, torch.cat([1 / v, 1 / (2 * v**2)]).diag())


def test_mean_and_variance_are_one_tensor_in_the_graph():
    mean = torch.randn(3, 2, requires_grad=True)
    variance = (torch.rand(3, 2) + 0.1).requires_grad_()
    y = torch.randn(3, 2)
    loss = NormalMeanVarianceNegativeLogProbLoss(mean, variance, y)
    normal = torch.distributions.Normal(mean, variance.sqrt())
    close(loss.evaluate(), -normal.log_prob(y).sum())
    assert loss.inputs.shape == loss.fisher_factor_inner_shape == (3, 4)
    assert loss.params is loss.inputs
    (g,) = torch.autograd.grad(loss.evaluate(), loss.inputs)
    to_both = torch.autograd.grad(loss.inputs, [mean, variance], g, retain_graph=True)
    for grad, expected in zip(
        to_both, torch.autograd.grad(loss.evaluate(), [mean, variance]), strict=True
    ):
        close(grad, expected)


@pytest.mark.parametrize("kind", ALL)
def test_columns_of_the_factor(kind):
    """All columns of all examples give the Fisher; the replicated one-hots, of each row."""
    loss = ALL[kind](torch.randn(4, 2, 6))
    z, inner = loss.inputs.shape, loss.fisher_factor_inner_shape
    columns = loss.fisher_factor_all_columns()
    assert columns.shape == (inner[1:].numel(), *z)
    close(torch.stack(list(loss.fisher_factor_columns())), columns)
    close(loss.fisher_factor_all_columns(range(3, 9, 2)), columns[3:9:2])
    for n, F in enumerate(torch.einsum("jnab,jncd->nabcd", columns, columns)):
        v = torch.zeros(z)
        v[n] = torch.randn(z[1:])
        close(torch.einsum("abcd,cd->ab", F, v[n]), loss.multiply_fisher(v)[n])
    dim = 1 if kind == "categorical, classes second" else -1
    for j in range(inner[dim]):
        one_hot = torch.zeros(inner)
        one_hot.select(dim, j).fill_(1)
        close(
            loss.multiply_fisher_factor_replicated_one_hot(j),
            loss.multiply_fisher_factor(one_hot),
        )


@pytest.mark.parametrize("kind", ALL)
def test_random_signs_are_exact_in_the_mean_over_all_signs(kind):
    """What `E[Bε(Bε)ᵀ] = F` means, with every `ε` of an example's inner shape."""
    z = torch.randn(1, 4)
    loss = ALL[kind](z.clone())
    inner = loss.fisher_factor_inner_shape
    F = dense(loss.multiply_fisher, loss.inputs.shape)
    signs = list(itertools.product((-1.0, 1.0), repeat=inner.numel()))
    products = [loss.multiply_fisher_factor(torch.tensor(s).view(inner)) for s in signs]
    close(sum(torch.outer(p[0], p[0]) for p in products) / len(signs), F)
    # A draw is one of these, the generator's, and every sign comes up.
    generator = torch.Generator().manual_seed(0)
    drawn = {
        next(i for i, p in enumerate(products) if torch.allclose(p, draw, rtol=1e-9))
        for draw in (loss.fisher_factor_random_signs(generator) for _ in range(200))
    }
    assert len(drawn) > min(len(signs), 16) / 2
    a, b = (
        loss.fisher_factor_random_signs(torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ALL)
def test_sampled_gradients_have_the_fisher_as_second_moment(kind):
    """20 000 draws, four and a half standard errors of every entry."""
    row = torch.tensor([0.5, -1.0, 0.3, 0.8])
    loss = ALL[kind](row.repeat(20_000, 1))
    g = loss.sample_gradient(torch.Generator().manual_seed(1))
    products = g[:, :, None] * g[:, None, :]
    one = ALL[kind](row[None])
    expected = dense(one.multiply_fisher, one.inputs.shape)
    error = products.std(0) / len(g) ** 0.5
    assert ((products.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("kind", NEGATIVE_LOG_PROB)
def test_a_sampled_gradient_is_that_of_the_loss_on_a_sample(kind):
    z = torch.randn(6, 4, requires_grad=True)
    loss = NEGATIVE_LOG_PROB[kind](z)
    nll = loss.evaluate_on_sample(torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(nll, loss.inputs)
    close(loss.sample_gradient(torch.Generator().manual_seed(1)), expected)


@pytest.mark.parametrize("kind", NEGATIVE_LOG_PROB)
def test_sampling_is_the_generators_and_leaves_the_global_one_alone(kind):
    z = torch.randn(6, 4, requires_grad=True)
    loss = NEGATIVE_LOG_PROB[kind](z)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    a, b = (loss.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(loss.sample(generator), a)
    assert not torch.equal(torch.stack([loss.sample(generator) for _ in range(20)])[0], a)
    assert torch.equal(torch.get_rng_state(), state)
    assert not a.requires_grad
    columns = {"mean and variance": 2, "categorical": 0, "derived categorical": 0}
    shape = (6, columns.get(kind, 4)) if columns.get(kind, 4) else (6,)
    assert a.shape == ((6,) if "classes second" in kind else shape)


def test_sampling_from_a_distribution_without_a_generator_uses_the_global_one():
    loss = Poisson(torch.randn(6, 4))
    torch.manual_seed(5)
    expected = torch.poisson(loss.inputs.exp())
    torch.manual_seed(5)
    assert torch.equal(loss.sample(), expected)
    assert torch.equal(loss.sample(torch.Generator().manual_seed(5)), expected)


def test_the_global_generator_is_put_back_when_sampling_fails():
    class Broken(Poisson):
        @property
        def dist(self):
            raise RuntimeError("no such distribution")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no such distribution"):
        Broken(torch.zeros(2, 2)).sample(torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_products_leave_the_graph_alone():
    """They are constants in `z`, whatever the graph behind it and the gradient mode."""
    for make in ALL.values():
        w = torch.randn(4, 6, requires_grad=True)
        loss = make(w * 2)
        v = torch.ones_like(loss.inputs)
        product = loss.multiply_fisher(v)
        assert not product.requires_grad
        with torch.no_grad():
            close(make(w * 2).multiply_fisher(v), product)
        assert loss.inputs.requires_grad


@pytest.mark.parametrize("kind", ALL)
def test_products_under_vmap(kind):
    loss = ALL[kind](torch.randn(4, 6))
    V = torch.randn(3, *loss.inputs.shape)
    for name in ("multiply_fisher", "multiply_fisher_factor_transpose"):
        multiply = getattr(loss, name)
        together = torch.vmap(multiply, randomness="same")(V)
        close(together, torch.stack([multiply(v) for v in V]))


# Losses of one's own.


def test_derived_products_are_those_of_the_closed_form():
    z = torch.randn(2, 5, 3)
    ours, closed = DerivedCategorical(z), CategoricalLogitsNegativeLogProbLoss(z)
    v = torch.randn_like(z)
    close(ours.multiply_fisher(v), closed.multiply_fisher(v))
    once, twice = ours.multiply_fisher_factor(v), closed.multiply_fisher(v)
    close(ours.multiply_fisher_factor(once), twice)


def test_the_root_does_not_depend_on_targets_of_a_natural_loss():
    z = torch.randn(4, 3)
    v = torch.randn_like(z)
    close(Poisson(z, torch.full_like(z, 7.0)).multiply_fisher_factor(v), (z / 2).exp() * v)
    close(Poisson(z).multiply_fisher_factor(v), (z / 2).exp() * v)


def test_an_overflow_in_one_example_stays_in_it():
    z = torch.randn(3, 2)
    z[1] = 1e4
    root = Poisson(z).multiply_fisher_factor(torch.ones_like(z))
    assert root[1].isnan().all()
    close(root[::2], (z[::2] / 2).exp())


def test_a_root_where_some_probabilities_are_subnormal():
    z = torch.randn(200, 8, dtype=torch.float32)
    z[:, 4:] -= 100
    v = torch.randn_like(z)
    loss = DerivedCategorical(z)
    root = loss.multiply_fisher_factor_transpose(v)
    exact = DerivedCategorical(z.double()).multiply_fisher(v.double())
    torch.testing.assert_close(loss.multiply_fisher_factor(root), exact.float())


def test_half_precision_takes_its_root_in_single():
    z = torch.randn(3, 4, dtype=torch.bfloat16)
    B = DerivedCategorical(z).multiply_fisher_factor(torch.ones_like(z))
    assert B.dtype == torch.bfloat16
    exact = DerivedCategorical(z.double()).multiply_fisher_factor(torch.ones(3, 4))
    torch.testing.assert_close(B.double(), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("elementwise", [True, False])
def test_a_loss_that_is_not_convex_is_named(elementwise):
    class Cauchy(ConvexLoss):
        def evaluate_on_targets(self, targets):
            return (self.inputs - targets).square().log1p().sum()

    Cauchy.elementwise = elementwise
    loss = Cauchy(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"Cauchy: expected a loss that is convex.*-0\.24"):
        loss.multiply_fisher_factor(torch.ones(1, 2))
    close(loss.multiply_fisher(torch.ones(1, 2)), [[2.0, -0.24]])


def test_a_convex_loss_needs_its_targets():
    loss = PseudoHuber(torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match=r"PseudoHuber: its Hessian.*depends on the targets"
    ):
        loss.multiply_ggn(torch.zeros(2, 3))


@pytest.mark.parametrize("make", [Poisson, DerivedCategorical, ALL["pseudo-Huber"]])
def test_statistics_of_a_loss_of_ones_own(make):
    """One linear layer and one datum: K-FAC's block is the whole curvature."""
    model, x = nn.Linear(3, 4, bias=False), torch.randn(1, 3)
    optimizer = KFAC(model, make, lr=0.1, damping=0.1, estimation_mode="exact")
    z = model(x).detach()
    optimizer.estimator.update_covariances()
    (block,) = (b.full_fisher_block() for b in optimizer.estimator.blocks.values())
    F = dense(make(z).multiply_fisher, z.shape)
    close(block, torch.kron(torch.outer(x[0], x[0]), F))
    optimizer.close()


def test_the_defaults_of_a_loss_of_ones_own():
    loss = Poisson(torch.zeros(4, 5, 3))
    assert loss.num_terms == 4
    assert loss.name == "Poisson"
    assert loss.gradient_scale(torch.ones(4, 5, 3)) is None
    with pytest.raises(ValueError, match=r"loss Poisson: expected.*shape \(0, 2\)"):
        Poisson(torch.zeros(0, 2))
    with pytest.raises(TypeError, match="abstract"):
        NegativeLogProbLoss(torch.zeros(1, 2))


def test_onehot_value_is_the_categorical_one():
    z, y = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    onehot = OnehotCategoricalLogitsNegativeLogProbLoss(z, functional.one_hot(y, 3))
    close(onehot.evaluate(), CategoricalLogitsNegativeLogProbLoss(z, y).evaluate())
    assert onehot.num_terms == 10
    a, b = (loss.sample(torch.Generator().manual_seed(3)) for loss in (onehot, loss_of(z)))
    assert torch.equal(a, functional.one_hot(b, 3).to(z))
    z = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    masked = OnehotCategoricalLogitsNegativeLogProbLoss(z, torch.tensor([[1.0, 0, 0]]))
    close(masked.evaluate().detach(), math.log(2))
    close(torch.autograd.grad(masked.evaluate(), z)[0], [[-0.5, 0.5, 0.0]])


def loss_of(z):
    return CategoricalLogitsNegativeLogProbLoss(z)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_insert_slice_in_zeros(dim):
    slice = torch.randn(2, 3, 4).narrow(dim, 1, 1)
    whole = insert_slice_in_zeros(slice, dim, 5, 3)
    assert whole.shape[dim] == 5
    assert torch.equal(whole.narrow(dim, 3, 1), slice)
    assert whole.count_nonzero() == slice.count_nonzero()


def test_what_cannot_be_inserted():
    with pytest.raises(ValueError, match=r"length 1 along dimension 1, got shape \(2, 3\)"):
        insert_slice_in_zeros(torch.ones(2, 3), 1, 5, 0)
    with pytest.raises(ValueError, match=r"position in \[0, 5\), got 5"):
        insert_slice_in_zeros(torch.ones(2, 1), 1, 5, 5)


@pytest.mark.parametrize("kind", NEGATIVE_LOG_PROB)
def test_shapes_of_samples(kind):
    loss = NEGATIVE_LOG_PROB[kind](torch.randn(4, 6, 2))
    expected = {
        "categorical": (4, 6),
        "derived categorical": (4, 6),
        "categorical, classes second": (4, 2),
        "mean and variance": (4, 6, 1),
    }
    assert loss.sample().shape == expected.get(kind, (4, 6, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_classes_are_drawn_with_their_probabilities(dtype):
    p = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    logits = p.log().to(dtype).repeat(20_000, 1)
    loss = CategoricalLogitsNegativeLogProbLoss(logits)
    counts = loss.sample(torch.Generator().manual_seed(0)).bincount(minlength=6)
    assert ((counts == 0) == (p == 0)).all()
    error = (20_000 * p * (1 - p)).sqrt()
    assert ((counts - 20_000 * p).abs() <= 4.5 * error).all()


@pytest.mark.parametrize("u", [0.0, 1.0])  # 1: the largest that rounding may make of it
def test_the_ends_of_the_unit_interval_draw_classes_that_are_possible(monkeypatch, u):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, u))
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]], dtype=torch.float32)
    expected = [1] if u == 0 else [2]
    assert CategoricalLogitsNegativeLogProbLoss(logits).sample().tolist() == expected


def test_of_a_nan_a_class_is_drawn():
    logits = torch.tensor([[math.nan, 0.0, 1.0]])
    sample = CategoricalLogitsNegativeLogProbLoss(logits).sample()
    assert 0 <= sample.item() < 3


@pytest.mark.parametrize("kind", NEGATIVE_LOG_PROB)
def test_a_loss_without_targets_has_no_value(kind):
    loss = NEGATIVE_LOG_PROB[kind](torch.randn(4, 6))
    assert loss.targets is None
    with pytest.raises(ValueError, match=r"evaluate\(\) needs targets"):
        loss.evaluate()


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
            lambda: NormalMeanNegativeLogProbLoss(torch.zeros(2, 2), torch.zeros(2, 2)),
            r"var: expected a positive number.*\(2, 2\); targets are the third",
        ),
        (
            lambda: NormalMeanNegativeLogProbLoss(torch.zeros(2, 2)).evaluate(),
            "needs targets",
        ),
        (
            lambda: NormalMeanVarianceNegativeLogProbLoss(
                torch.zeros(2, 2), torch.ones(2, 1)
            ),
            r"shape of the mean, \(2, 2\), got \(2, 1\)",
        ),
        (
            lambda: NormalMeanVarianceNegativeLogProbLoss.from_output(torch.ones(2, 3)),
            r"got an odd one: \(2, 3\)",
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
