import copy
import gc
import math
import weakref

import pytest
import torch
from loss_cases import ElementwisePoisson, ElementwisePseudoHuber, PseudoHuber, close
from torch import nn

from kfac_torch import KFAC, FisherEstimator, LayerCollection
from kfac_torch.curvature_products import CurvatureMatrixVectorProductComputer
from kfac_torch.estimator import ESTIMATION_MODES

pytestmark = pytest.mark.usefixtures("float64")


def net():
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))


def make(model, mode="gradients", loss="categorical", damping=0.1, **kwargs):
    """An estimator of everything that a model has."""
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_loss_function(loss)
    exps = kwargs.pop("exps", (-1,))
    return FisherEstimator(None, 0.9, damping, layers, exps, mode, **kwargs)


def feed(estimator, x, y=None):
    """One forward, with the user's backward, and the statistics of it."""
    z = estimator.layers.model(x)
    y = torch.zeros(len(x), dtype=torch.long) if y is None else y
    nn.functional.cross_entropy(z, y).backward()
    assert estimator.update_covariances() == []


def covs(estimator):
    return [factor.get_cov().clone() for factor in estimator.layers.get_factors()]


def vectors(estimator):
    return [(torch.randn_like(p), p) for p in estimator.layers.registered_variables]


def dense_ggn(losses, params):
    """The Gauss-Newton matrix of `[(loss, weight), ...]`, each a mean over its terms."""
    coeffs = [weight / loss.num_terms for loss, weight in losses]
    computer = CurvatureMatrixVectorProductComputer(
        [loss for loss, _ in losses], params, coeffs
    )
    sizes = [p.numel() for p in params]
    rows = []
    for e in torch.eye(sum(sizes)):
        parts = [v.view(p.shape) for v, p in zip(e.split(sizes), params, strict=True)]
        product = computer.multiply_generalized_gauss_newton(parts)
        rows.append(torch.cat([v.flatten() for v in product]))
    return torch.stack(rows)


def dense_block(block):
    """A block over the entries of its parameters, one after the other."""
    F = block.full_fisher_block()
    sizes = [p.numel() for p in block.params]
    columns = []
    for e in torch.eye(sum(sizes)):
        parts = [v.view(p.shape) for v, p in zip(e.split(sizes), block.params, strict=True)]
        V = block.params_to_vector(parts)
        product = block.vector_to_params((F @ V.flatten()).view(V.shape))
        columns.append(torch.cat([part.flatten() for part in product]))
    return torch.stack(columns, 1)


# The signature.


def test_arguments():
    model = net()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution()
    variables = list(model.parameters())
    estimator = FisherEstimator(variables, 0.95, 0.1, layers, (-1, -0.5), "exact", seed=3)
    assert estimator.blocks is layers.blocks
    for wrong, message in (
        (variables[1:], r"variables: parameter 0\.weight is registered, but not among"),
        (
            [*variables, nn.Parameter(torch.ones(2))],
            r"a tensor of shape \(2,\) has no block",
        ),
        ([], "is registered, but not among the variables"),
    ):
        with pytest.raises(ValueError, match=message):
            FisherEstimator(wrong, 0.95, 0.1, layers)
    for mode in ("curvature_propagation", "fisher", None):
        with pytest.raises(ValueError, match="estimation_mode: expected one of"):
            FisherEstimator(None, 0.95, 0.1, layers, estimation_mode=mode)
    for decay in (-0.1, 1.5, math.nan):
        with pytest.raises(
            ValueError, match=r"cov_ema_decay: expected a number in \[0, 1\]"
        ):
            FisherEstimator(None, decay, 0.1, layers)
    with pytest.raises(ValueError, match="no loss is registered"):
        FisherEstimator(None, 0.95, 0.1, LayerCollection(model))
    with pytest.raises(ValueError, match="damping: expected a finite number >= 0, got -1"):
        FisherEstimator(None, 0.95, -1.0, layers)
    empty = LayerCollection(model)
    empty.register_categorical_predictive_distribution()
    with pytest.raises(ValueError, match="no layer is registered"):
        FisherEstimator(None, 0.95, 0.1, empty)


def test_an_exponent_that_an_approximation_does_not_have():
    model = nn.Sequential(nn.Linear(2, 3))
    layers = LayerCollection(model)
    layers.register_fully_connected_multi(model[0], "kron_series_1")
    layers.register_squared_error_loss()
    with pytest.raises(NotImplementedError, match=r"layer 0: .*expected exp=-1, got -0\.5"):
        FisherEstimator(None, 0.95, 0.1, layers, exps=(-1, -0.5))
    estimator = FisherEstimator(None, 0.95, 0.1, layers)  # nothing stands in the way
    for register in (estimator.register_cholesky, estimator.register_cholesky_inverse):
        with pytest.raises(NotImplementedError, match="only the inverse of a chain"):
            register()


# What the modes estimate.


@pytest.mark.parametrize("mode", ESTIMATION_MODES)
def test_every_mode_runs(mode):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 3)
    )
    layers = LayerCollection(model)
    layers.register_generic(model[3], "full")
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution()
    estimator = FisherEstimator(model.parameters(), 0.9, 0.1, layers, (-1, 0.5), mode)
    for _ in range(2):
        feed(estimator, torch.randn(6, 1, 3, 3), torch.randint(3, (6,)))
        estimator.update_inverses()
    pairs = vectors(estimator)
    there = estimator.multiply(estimator.multiply_inverse(pairs))
    assert len(pairs) == 8
    for (v, p), (w, q) in zip(pairs, there, strict=True):
        assert p is q
        close(w, v)


class Tokens(nn.Module):
    """Two heads on one trunk; the second sees the first half of the batch alone."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.all, self.some = nn.Linear(4, 2), nn.Linear(4, 5, bias=False)

    def forward(self, x):
        h = self.trunk(x)
        return {"all": self.all(h), "some": self.some(h[: len(h) // 2])}


def test_losses_of_different_weight_and_number_of_terms():
    """A linear network with square losses: K-FAC's blocks are those of the exact GGN."""
    model = Tokens()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_squared_error_loss("all", coeff=0.7)
    layers.register_normal_predictive_distribution("some", var=3.0, coeff=2.5)
    estimator = FisherEstimator(None, 0.9, 0.1, layers, estimation_mode="exact")
    # Both halves are the same examples: the inputs of the trunk are then independent of
    # what depends on it.
    x = torch.randn(5, 3).repeat(2, 1)
    z = model(x)
    assert [loss.num_terms for loss, _ in layers.losses(z)] == [10, 5]
    assert estimator.update_covariances() == []
    assert list(layers.blocks) == ["trunk", "all", "some"]
    for block in layers.get_blocks():
        close(dense_block(block), dense_ggn(layers.losses(z), block.params))
    assert layers.blocks["some"].num_locations == 0.5  # rows per term of the first loss


@pytest.mark.parametrize("mode", ["gradients", "curvature_prop"])
def test_random_sources_have_the_exact_statistics_in_expectation(mode):
    model, x = Tokens(), torch.randn(4, 3).repeat(2, 1)
    exact, found = [], []
    for way in ("exact", mode):
        layers = LayerCollection(model)
        layers.auto_register_layers()
        layers.register_squared_error_loss("all", coeff=0.7)
        layers.register_categorical_predictive_distribution("some", coeff=2.5)
        estimator = FisherEstimator(None, 1.0, 0.1, layers, estimation_mode=way)
        for _ in range(1 if way == "exact" else 1500):
            model(x)
            estimator.update_covariances()
        estimator.close()
        (exact if way == "exact" else found).extend(covs(estimator))
    for a, b in zip(exact, found, strict=True):
        assert (a - b).norm() < 0.06 * a.norm()


OWN = {
    "poisson": ElementwisePoisson,
    "convex": lambda z: PseudoHuber(z, torch.ones_like(z)),
    "elementwise convex": lambda z: ElementwisePseudoHuber(z, torch.ones_like(z)),
}


@pytest.mark.parametrize("loss", OWN)
def test_losses_of_ones_own_in_exact_mode(loss):
    """Of the last layer, generic: K-FAC's block is the exact GGN."""
    model = net()
    layers = LayerCollection(model)
    layers.register_fully_connected(model[0])
    layers.register_generic(model[2], "full")
    layers.register_loss_function(OWN[loss], coeff=0.3)
    estimator = FisherEstimator(None, 0.9, 0.1, layers, estimation_mode="exact")
    z = model(torch.randn(6, 2))
    assert estimator.update_covariances() == []
    block = layers.blocks["2"]
    close(dense_block(block), dense_ggn(layers.losses(z), block.params))


@pytest.mark.parametrize("mode", ["gradients", "exact", "curvature_prop"])
@pytest.mark.parametrize("loss", OWN)
def test_losses_of_ones_own_train(loss, mode):
    model = net()
    optimizer = KFAC(
        model, OWN[loss], lr=0.3, damping=0.1, norm_constraint=None, estimation_mode=mode
    )
    x, y, values = torch.randn(16, 2), torch.ones(16, 3), []
    best = 3.0 if loss == "poisson" else 0.0  # at z = 0 and z = y
    for _ in range(15):
        optimizer.zero_grad()
        loss_of = OWN[loss](model(x))
        value = loss_of.evaluate_on_targets(y) / 16
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert optimizer.skipped_steps == 0
    assert values[-1] - best < 0.1 * (values[0] - best)


# Exact mode.


class Counted(torch.autograd.Function):
    """The identity, which counts its backwards."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.calls += 1
        return grad


class WithoutBatchingRule(torch.autograd.Function):
    """Twice, with a backward that no vectorised backward gets through."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(2 * grad.numpy())


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_all_classes_go_through_one_backward():
    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(2, 3), Through(Counted.apply), nn.Linear(3, 1000))
    estimator = make(model, "exact")
    Counted.calls = 0
    z = model(torch.randn(4, 2))
    assert estimator.update_covariances() == []
    assert Counted.calls == 1
    # The sources add up to the Fisher at the output.
    p = z.detach().softmax(-1)
    G = torch.diag(p.mean(0)) - p.T @ p / len(p)
    close(estimator.layers.get_factors()[3].get_cov(), G, atol=1e-7)


def test_classes_that_do_not_fit_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr("kfac_torch.sources._COLUMN_BYTES", 4 * 3 * 8 * 2)
    x, found = torch.randn(4, 2), []
    for parts in (2, 1):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), Through(Counted.apply), nn.Linear(3, 3))
        estimator = make(model, "exact")
        Counted.calls = 0
        model(x)
        estimator.update_covariances()
        assert Counted.calls == parts
        found.append(covs(estimator))
        monkeypatch.undo()
    for a, b in zip(*found, strict=True):
        close(a, b, atol=1e-14)


def test_an_operation_without_a_batching_rule():
    x, found = torch.randn(4, 2), []
    for function in (lambda z: 2 * z, WithoutBatchingRule.apply):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), Through(function), nn.Linear(3, 3))
        layers = LayerCollection(model)
        layers.register_fully_connected(model[0])
        layers.register_generic(model[2])
        layers.register_categorical_predictive_distribution()
        estimator = FisherEstimator(None, 0.9, 0.1, layers, estimation_mode="exact")
        model(x)
        assert estimator.update_covariances() == []
        found.append(covs(estimator))
    for a, b in zip(*found, strict=True):
        close(a, b, atol=1e-14)


# Products.


def damped(block):
    """`F_λ`, dense, from what it does to the identity."""
    columns = [
        block.multiply(e.view(V.shape)).flatten()
        for V in [block.params_to_vector(block.params)]
        for e in torch.eye(V.numel())
    ]
    return torch.stack(columns, 1)


@pytest.fixture
def estimator():
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.Linear(6, 3))
    layers = LayerCollection(model)
    layers.register_convolution(model[0])
    layers.register_generic(model[2].bias)
    layers.register_generic(model[2].weight, "full")
    layers.register_categorical_predictive_distribution()
    made = FisherEstimator(None, 0.9, 0.1, layers, (-1, -0.5, 0.5), "exact")
    made.register_cholesky()
    made.register_cholesky_inverse()
    feed(made, torch.randn(9, 1, 4))
    made.update_inverses()
    return made


@pytest.mark.parametrize("exp", [1, -1, -0.5, 0.5])
def test_powers(estimator, exp):
    pairs = vectors(estimator)
    product = {id(p): w for w, p in estimator.multiply_matpower(exp, pairs)}
    for block in estimator.layers.get_blocks():
        own = {id(p): v for v, p in pairs}
        V = block.params_to_vector([own[id(p)] for p in block.params])
        W = block.params_to_vector([product[id(p)] for p in block.params])
        e, Q = torch.linalg.eigh(damped(block))
        close(W.flatten(), Q @ (e**exp * (Q.T @ V.flatten())))


def test_multiply_and_its_inverse_are_powers(estimator):
    pairs = vectors(estimator)
    for product, exp in ((estimator.multiply, 1), (estimator.multiply_inverse, -1)):
        for (a, p), (b, q) in zip(
            product(pairs), estimator.multiply_matpower(exp, pairs), strict=True
        ):
            assert p is q
            assert a.equal(b)


def test_cholesky_products(estimator):
    pairs = vectors(estimator)

    def values(products):
        return [w for w, _ in products]

    L, inverse = estimator.multiply_cholesky, estimator.multiply_cholesky_inverse
    for there, expected in (
        (L(L(pairs, transpose=True)), estimator.multiply(pairs)),
        (inverse(inverse(pairs), transpose=True), estimator.multiply_inverse(pairs)),
        (inverse(L(pairs)), pairs),
        (L(inverse(pairs, transpose=True), transpose=True), pairs),
    ):
        for a, b in zip(values(there), values(expected), strict=True):
            close(a, b)
    other = make(net(), exps=())
    feed(other, torch.randn(5, 2))
    for product in (other.multiply_cholesky, other.multiply_cholesky_inverse):
        with pytest.raises(KeyError, match="register"):
            product(vectors(other))


def test_the_order_of_pairs_is_kept(estimator):
    pairs = vectors(estimator)
    expected = {id(p): w for w, p in estimator.multiply_inverse(pairs)}
    for order in (pairs[::-1], [pairs[2], pairs[1], pairs[3], pairs[0]], iter(pairs)):
        given = list(order)
        products = estimator.multiply_inverse(iter(given))
        assert [id(p) for _, p in products] == [id(p) for _, p in given]
        assert all(w.equal(expected[id(p)]) for w, p in products)
    # Some of the blocks are enough, and none.
    ((w, p),) = estimator.multiply_inverse(pairs[2:3])
    assert p is pairs[2][1]
    assert w.equal(expected[id(p)])
    assert estimator.multiply_inverse([]) == []


def test_pairs_that_do_not_fit(estimator):
    pairs = vectors(estimator)
    (v, weight), stranger = pairs[0], torch.ones(2)
    for wrong, message in (
        (pairs[:1], r"block 0: expected vectors for all .* none for parameter 0\.bias"),
        (pairs[1:], r"block 0: .* none for parameter 0\.weight"),
        ([(stranger, stranger)], r"a tensor of shape \(2,\) has no block"),
        ([(v[0], weight), *pairs[1:]], r"parameter 0\.weight has another shape"),
        ([*pairs, (v, weight)], r"parameter 0\.weight is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.multiply_inverse(wrong)


def test_a_product_that_is_not_there_yet():
    estimator = make(net(), exps=())
    pairs = vectors(estimator)
    feed(estimator, torch.randn(5, 2))
    estimator.multiply(pairs)  # 1 is never registered
    with pytest.raises(KeyError, match="register"):
        estimator.multiply_inverse(pairs)
    estimator.register_matpower(-1)
    with pytest.raises(RuntimeError, match=r"refresh|update"):
        estimator.multiply_inverse(pairs)
    estimator.update_inverses()
    estimator.multiply_inverse(pairs)


def test_stored_powers_wait_for_a_refresh(estimator):
    pairs = vectors(estimator)
    old = [w for w, _ in estimator.multiply_inverse(pairs)]
    feed(estimator, 3 * torch.randn(9, 1, 4))
    # All but the diagonal, which is never stored.
    now = [w for w, _ in estimator.multiply_inverse(pairs)]
    assert [a.equal(b) for a, b in zip(old, now, strict=True)] == [True, True, False, True]
    estimator.update_inverses()
    now = [w for w, _ in estimator.multiply_inverse(pairs)]
    assert not any(a.equal(b) for a, b in zip(old, now, strict=True))


# One factor at a time.


def scaled(model, args, z):
    return model.scale * z


@pytest.mark.parametrize("mode", ESTIMATION_MODES)
def test_every_thunk_changes_exactly_one_factor(mode):
    model, xs, y = net(), torch.randn(2, 6, 2), torch.randint(3, (6,))
    model.scale = nn.Parameter(torch.ones(3))
    model.register_forward_hook(scaled)
    one, all_at_once = (copy.deepcopy(model) for _ in range(2))
    estimators = []
    for own in (one, all_at_once):
        layers = LayerCollection(own)
        layers.auto_register_layers()
        layers.register_generic(own.scale)
        layers.register_categorical_predictive_distribution()
        estimators.append(FisherEstimator(None, 0.9, 0.1, layers, estimation_mode=mode))
    thunked, whole = estimators
    for update, x in enumerate(xs):
        nn.functional.cross_entropy(one(x), y).backward()
        thunks, refreshes = thunked.make_vars_and_create_op_thunks()
        assert len(thunks) == len(refreshes) == len(thunked.layers.get_factors()) == 5
        for index, thunk in enumerate(thunks):
            before = covs(thunked)
            thunk()
            changed = [not a.equal(b) for a, b in zip(before, covs(thunked), strict=True)]
            assert changed == [i == index for i in range(5)]
            thunk()  # there is nothing left
            assert thunked.layers.get_factors()[index].num_updates == update + 1
        feed(whole, x, y)
        for a, b in zip(covs(thunked), covs(whole), strict=True):
            close(a, b, atol=1e-14)


def test_every_refresh_is_of_one_factor():
    estimator = make(net())
    _, refreshes = estimator.create_ops_and_vars_thunks()
    for refresh in refreshes:
        refresh()  # nothing to refresh yet
    factors = estimator.layers.get_factors()
    assert not any(factor.is_refreshed for factor in factors)
    feed(estimator, torch.randn(6, 2))
    for index, refresh in enumerate(estimator.inv_update_thunks):
        refresh()
        assert [f.is_refreshed for f in factors] == [i <= index for i in range(4)]
    pairs = vectors(estimator)
    one_by_one = [w for w, _ in estimator.multiply_inverse(pairs)]
    estimator.update_inverses()
    for a, (b, _) in zip(one_by_one, estimator.multiply_inverse(pairs), strict=True):
        close(a, b, atol=1e-13)


def test_what_was_gathered_is_a_mean_and_starts_anew():
    """The lineage's accumulators: 3, 7, 11 are 7; then 3, 7 are 5."""
    model = nn.Linear(1, 1, bias=False)
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_squared_error_loss()
    estimator = FisherEstimator(None, 0.0, 0.1, layers)
    for values, mean in (((3.0, 7.0, 11.0), 7.0), ((3.0, 7.0), 5.0)):
        for value in values:
            model(torch.full((2, 1), value**0.5))
        assert estimator.update_covariances() == []
        close(layers.get_factors()[0].get_cov(), [[mean]])
    assert estimator.update_covariances() == []  # nothing is left
    assert layers.get_factors()[0].num_updates == 2


# Batches that do not count.


def bad_input(x):
    x = x.clone()
    x[0, 0] = math.nan
    return x


def bad_output(model, args, z):
    return z.index_fill(0, torch.tensor(1), math.nan)


@pytest.mark.parametrize("where", ["input", "output"])
@pytest.mark.parametrize("mode", ["gradients", "exact", "curvature_prop"])
def test_a_bad_batch_changes_no_factor(mode, where):
    model, x = net(), torch.randn(6, 2)
    estimator = make(model, mode)
    feed(estimator, x)
    before = covs(estimator)
    handle = None
    if where == "output":
        handle = model[2].register_forward_hook(bad_output)
    given = bad_input(x) if where == "input" else x
    model(given)
    assert "the network output" in estimator.update_covariances()
    model(given)
    first, *others = estimator.cov_update_thunks
    with pytest.warns(RuntimeWarning, match="NaN or Inf .* last good covariance is kept"):
        first()
    for thunk in others:  # one warning is enough
        thunk()
    assert all(a.equal(b) for a, b in zip(before, covs(estimator), strict=True))
    rejected = [f.num_rejected_updates for f in estimator.layers.get_factors()]
    assert rejected == [2] * 4
    if handle is not None:
        handle.remove()
    feed(estimator, 2 * x)
    assert not any(a.equal(b) for a, b in zip(before, covs(estimator), strict=True))


@pytest.mark.parametrize("mode", ESTIMATION_MODES)
def test_a_generic_block_of_which_a_part_is_frozen_later(mode):
    model = net()
    layers = LayerCollection(model)
    layers.register_generic(model[0], "full")
    layers.register_generic(model[2].bias, "full")
    layers.register_categorical_predictive_distribution()
    estimator = FisherEstimator(None, 0.9, 0.1, layers, estimation_mode=mode)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    feed(estimator, torch.randn(5, 2))
    cov = covs(estimator)[0]
    size = model[0].weight.numel()
    assert cov[size:, size:].any()
    assert not cov[:size].any()
    assert not estimator.blocks["2.bias"].has_statistics


def test_what_is_not_training_is_no_data():
    model, x = net(), torch.randn(6, 2)
    estimator = make(model)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    model.train()
    estimator.collecting = False
    model(x)
    estimator.collecting = True
    assert not estimator.has_statistics()
    model(x)
    assert estimator.has_statistics()
    estimator.reset()
    assert not estimator.has_statistics()
    assert estimator.update_covariances() == []
    assert [f.num_updates for f in estimator.layers.get_factors()] == [0] * 4


def test_a_functional_call_is_no_data():
    """Of generic blocks either, and no target is drawn for it."""
    model, x = net(), torch.randn(6, 2)
    layers = LayerCollection(model)
    layers.register_generic(model)
    layers.register_categorical_predictive_distribution()
    estimator = FisherEstimator(None, 0.9, 0.1, layers)
    model(x)
    estimator.update_covariances()
    before = estimator.state_dict()["generator"]
    others = {name: p.detach().clone().requires_grad_() for name, p in named(model)}
    torch.func.functional_call(model, others, (x,))
    assert not estimator.has_statistics()
    assert estimator.state_dict()["generator"].equal(before)


def named(model):
    return dict(model.named_parameters()).items()


def test_generic_blocks_alone_serve_the_quadratic_model():
    model, x, y = net(), torch.randn(6, 2), torch.randint(3, (6,))
    layers = LayerCollection(model)
    layers.register_generic(model, "full")
    layers.register_categorical_predictive_distribution()
    optimizer = KFAC(model, None, layers, damping=0.1, momentum_type="qmodel")
    values = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values == sorted(values, reverse=True)


# The empirical mode.


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("coeff", [1.0, 0.25])
def test_generic_blocks_in_the_empirical_mode(coeff, micro_batches):
    """The square of the gradient of the summed loss, over its terms."""
    model, x, y = net(), torch.randn(6, 2), torch.randint(3, (6,))
    layers = LayerCollection(model)
    layers.register_fully_connected(model[0])
    layers.register_generic(model[2], "full")
    layers.register_categorical_predictive_distribution(coeff=coeff)
    estimator = FisherEstimator(None, 0.9, 0.1, layers, estimation_mode="empirical")
    assert list(layers.blocks) == ["0", "2"]
    for xs, ys in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
        (coeff * nn.functional.cross_entropy(model(xs), ys)).backward()
    assert estimator.update_covariances() == []
    estimator.close()
    summed = nn.functional.cross_entropy(model(x), y, reduction="sum")
    grads = torch.autograd.grad(summed, list(model[2].parameters()))
    g = torch.cat([grad.flatten() for grad in grads])
    close(layers.get_factors()[2].get_cov(), coeff * g.outer(g) / 6, atol=1e-8)
    # And the other layer's, whose rows are examples.
    s = model[0](x).detach().requires_grad_()
    summed = nn.functional.cross_entropy(model[2](torch.tanh(s)), y, reduction="sum")
    (g,) = torch.autograd.grad(summed, s)
    close(layers.get_factors()[1].get_cov(), coeff * g.T @ g / 6, atol=1e-8)


@pytest.mark.parametrize("approx", ["kron", "diagonal", "full"])
@pytest.mark.parametrize("how", ["weighted", "one backward"])
def test_uneven_micro_batches_in_the_empirical_mode(how, approx):
    """Gradients accumulated to that of the mean over all loss terms."""
    x, y = torch.randn(8, 2), torch.randint(3, (8,))
    expected, model = None, net()
    for sizes in ([8], [3, 4, 1]):
        layers = LayerCollection(model)
        for module in (model[0], model[2]):
            layers.register_fully_connected(module, approx)
        layers.register_categorical_predictive_distribution()
        estimator = FisherEstimator(None, 0.9, 0.1, layers, estimation_mode="empirical")
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        if how == "weighted":
            for xs, ys in parts:
                loss = nn.functional.cross_entropy(model(xs), ys)
                (loss * len(xs) / len(x)).backward()
        else:
            z = torch.cat([model(xs) for xs, _ in parts])
            nn.functional.cross_entropy(z, y).backward()
        assert estimator.update_covariances() == []
        expected = covs(estimator) if expected is None else expected
        for cov, want in zip(covs(estimator), expected, strict=True):
            close(cov, want)
        estimator.close()


def test_the_empirical_mode_understands_a_sum():
    model, x, y = net(), torch.randn(6, 2), torch.randint(3, (6,))
    estimator = make(model, "empirical")
    nn.functional.cross_entropy(model(x), y).backward()
    estimator.update_covariances()
    mean = covs(estimator)
    estimator = make(model, "empirical")
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    with pytest.warns(UserWarning, match="6 times that of the mean over 6 loss terms"):
        estimator.update_covariances()
    for a, b in zip(mean, covs(estimator), strict=True):
        close(a, b, atol=1e-8)


# Random numbers.


@pytest.mark.parametrize("mode", ["gradients", "curvature_prop"])
def test_draws_are_of_the_estimators_own_generator(mode):
    model, x, found = net(), torch.randn(6, 2), []
    for seed, noise in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(noise)
        estimator = make(model, mode, seed=seed)
        before = torch.get_rng_state()
        model(x)
        assert torch.get_rng_state().equal(before)
        estimator.update_covariances()
        estimator.close()
        found.append(covs(estimator)[1])
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


# State.


@pytest.mark.parametrize("mode", ESTIMATION_MODES)
def test_a_state_is_restored_bit_for_bit(mode):
    model, xs = net(), torch.randn(5, 6, 2)
    estimator = make(model, mode)
    for x in xs[:3]:
        feed(estimator, x)
    estimator.update_inverses()
    state = estimator.state_dict()
    pairs = vectors(estimator)

    def go_on(estimator):
        stale = estimator.multiply_inverse(pairs)
        for x in xs[3:]:
            feed(estimator, x)
        estimator.update_inverses()
        fresh = estimator.multiply_inverse(pairs)
        return [w for w, _ in [*stale, *fresh]] + covs(estimator)

    expected = go_on(estimator)
    estimator.load_state_dict(state)  # which going on has not changed
    again = go_on(estimator)
    estimator.close()
    other = make(model, mode, seed=9)
    other.load_state_dict(copy.deepcopy(state))
    resumed = go_on(other)
    for values in (again, resumed):
        assert all(a.equal(b) for a, b in zip(values, expected, strict=True))


def test_a_state_that_does_not_fit_changes_nothing():
    estimator = make(net())
    feed(estimator, torch.randn(6, 2))
    before = covs(estimator)
    wider = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    for other, message in (
        (make(nn.Sequential(nn.Linear(2, 4))), "another model: expected exactly"),
        (make(net(), "exact"), "estimation_mode='exact', expected 'gradients'"),
        (make(wider), "checkpoint of another model"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.load_state_dict(other.state_dict())
        assert all(a.equal(b) for a, b in zip(before, covs(estimator), strict=True))


# Hooks and memory.


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    ) + sum(len(p._backward_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("mode", ESTIMATION_MODES)
def test_no_hook_outlives_an_estimator(mode):
    model, x = net(), torch.randn(6, 2)
    estimator = make(model, mode)
    assert hooks(model) > 0
    feed(estimator, x)
    estimator.close()
    assert hooks(model) == 0
    model(x)
    assert not estimator.has_statistics()
    estimator.close()  # once more does no harm
    estimator = make(model, mode)
    gone = weakref.ref(estimator)
    del estimator
    gc.collect()
    assert gone() is None
    assert hooks(model) == 0


@pytest.mark.parametrize("mode", ESTIMATION_MODES)
def test_no_activation_outlives_an_update(mode):
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    layers = LayerCollection(model)
    layers.auto_register_layers(model[0])
    layers.register_fully_connected(model[1], "diagonal")
    layers.register_generic(model[2])
    layers.register_categorical_predictive_distribution()
    estimator = FisherEstimator(None, 0.9, 0.1, layers, estimation_mode=mode)
    x, y = torch.randn(77, 3), torch.randint(3, (77,))
    gc.collect()
    gc.disable()
    try:
        feed(estimator, x, y)
        feed(estimator, x, y)
        nn.functional.cross_entropy(model(x), y).backward()
        for thunk in estimator.cov_update_thunks:
            thunk()
        tensors = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.dim())
        alive = [tuple(t.shape) for t in tensors if 77 in t.shape]
        assert sorted(alive) == [(77,), (77, 3)]  # y and x
    finally:
        gc.enable()


def test_a_collection_is_of_one_estimator():
    model = nn.Linear(3, 2)
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution()
    first = FisherEstimator(None, 0.9, 0.1, layers)
    with pytest.raises(ValueError, match="a collection of its own for every estimator"):
        FisherEstimator(None, 0.9, 0.1, layers)
    first.release()
    FisherEstimator(None, 0.9, 0.1, layers)
