"""Where theory says that K-FAC is exact, it must equal the dense GGN: one matrix of tests.

The rows are those of `exactness_cases`, the columns loss and reduction. The GGN is
`Jᵀ H J`, with `J` and `H`, the Hessian of torch's own criterion, from `torch.func`: of
the mean loss, or the N-th part of the summed one. Blocks with groups are the blocks of the
dense one on its diagonal.
"""

import warnings

import pytest
import torch
from dense_fisher import dense_fisher
from exactness_cases import DIAGONAL_G, EXACT, LINEAR, ONE_ROW, tanh_net
from torch import nn
from torch.func import functional_call, hessian, jacrev

from kfac_torch import KFAC, fisher_blocks as fb
from kfac_torch.estimator import FisherEstimator
from kfac_torch.layer_collection import LayerCollection

pytestmark = pytest.mark.usefixtures("float64")

CRITERIA = {
    "square": nn.MSELoss, "cross-entropy": nn.CrossEntropyLoss,
    "Bernoulli": nn.BCEWithLogitsLoss,
}  # fmt: skip


class ClassesSecond(nn.Module):
    """A model whose output is brought to `[N, classes, ...]`, as torch has it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        last = [module for module in inner.modules() if not list(module.children())][-1]
        self.dim = -1
        if isinstance(last, nn.modules.conv._ConvNd):
            # Behind the uses of a layer that is called several times.
            self.dim = 1 + (getattr(inner, "total", None) is False)

    def forward(self, x):
        return self.inner(x).movedim(self.dim, 1)


def targets(loss, z):
    if loss == "cross-entropy":
        return torch.randint(z.shape[1], (len(z), *z.shape[2:]))
    return torch.randn_like(z) if loss == "square" else torch.rand_like(z).round()


def dense_ggn(model, x, y, criterion, block, num_terms):
    """Of the mean over loss terms, in the order of the block's `V`."""
    names = {id(param): name for name, param in model.named_parameters()}
    own = {names[id(param)]: param.detach() for param in block.params}
    z = model(x).detach()
    with warnings.catch_warnings():
        # Of a bag and a bilinear layer it goes one by one.
        warnings.filterwarnings("ignore", "There is a performance drop because")
        jacobian = jacrev(lambda p: functional_call(model, p, (x,)))(own)
    parts = [jacobian[name].flatten(0, z.dim() - 1) for name in own]
    J = torch.stack(
        [
            block.params_to_vector([part[i] for part in parts]).flatten()
            for i in range(z.numel())
        ]
    )
    H = hessian(lambda flat: criterion(flat.view_as(z), y))(z.flatten())
    scale = 1 if criterion.reduction == "mean" else 1 / num_terms
    return scale * J.T @ H @ J


def own_groups(dense, block):
    """Without products of groups, which no Kronecker product has."""
    groups = getattr(block, "groups", 1)
    if groups == 1:
        return dense
    size = len(dense) // groups
    return torch.block_diag(
        *(
            dense[i * size : (i + 1) * size, i * size : (i + 1) * size]
            for i in range(groups)
        )
    )


def check(model, x, loss, reduction, register):
    """Every block beside the dense one; returns how many are not zero, of how many."""
    criterion = CRITERIA[loss](reduction=reduction)
    layers = LayerCollection(model)
    register(layers)
    layers.register_loss_function(criterion)
    with torch.no_grad():
        z = model(x)
    y, N = targets(loss, z), layers.losses(z)[0][0].num_terms
    blocks = layers.get_blocks()
    dense = [own_groups(dense_ggn(model, x, y, criterion, b, N), b) for b in blocks]
    estimator = FisherEstimator(None, 0.95, 0.1, layers, estimation_mode="exact")
    corrected = any(isinstance(block, fb.EigenKroneckerFB) for block in blocks)
    for _ in range(1 + corrected):  # a basis first, then the scales in it
        criterion(model(x), y).backward()
        assert estimator.update_covariances() == []
        if corrected:
            estimator.update_inverses()
    estimator.close()
    for block, expected in zip(blocks, dense, strict=True):
        scale = expected.abs().max().item()
        actual = block.full_fisher_block()
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=1e-11 * max(scale, 1e-3),
            msg=lambda m, n=block.name: f"{n}: {m}",
        )  # fmt: skip
    return sum(bool(expected.abs().max() > 1e-6) for expected in dense), len(dense)


def make_rows_alike(model, block):
    """So that every row of the output is the same, whatever the inputs."""
    with torch.no_grad():
        block.params[0].zero_()
        for param in model.parameters():
            if not param.requires_grad:
                param.zero_()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        (name, loss)
        for name in LINEAR
        for loss in CRITERIA
        if loss != "cross-entropy" or name not in DIAGONAL_G
    ],
)
def test_linear_networks(name, loss, reduction):
    """The square loss as it is; the others where all rows of the output are alike."""
    case = LINEAR[name]
    inner, x = case.make(), case.inputs()
    model = ClassesSecond(inner)

    def register(layers):
        case.register(layers, inner)
        if loss != "square":
            make_rows_alike(model, layers.get_blocks()[0])

    assert check(model, x, loss, reduction, register) == (1, 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("name", ONE_ROW)
def test_one_datum(name, loss, reduction):
    make, inputs = ONE_ROW[name]
    model, x = make(), inputs()
    found = check(model, x, loss, reduction, lambda each: each.auto_register_layers())
    assert found[0] == found[1]


def diagonal_or_all(case, layers, model, x):
    (block,) = layers.get_blocks()
    dense = dense_fisher(model, x, layers, block)
    return block, dense.diagonal().diag() if case.diagonal else dense


DISTRIBUTIONS = {
    "normal": lambda layers: layers.register_normal_predictive_distribution(var=0.7),
    "categorical": lambda layers: layers.register_categorical_predictive_distribution(),
    "bernoulli": lambda layers: layers.register_multi_bernoulli_predictive_distribution(
        coeff=1.5
    ),
}


@pytest.mark.parametrize("loss", DISTRIBUTIONS)
@pytest.mark.parametrize("name", EXACT)
def test_full_and_diagonal_blocks_for_every_net(name, loss):
    """Every batch, whatever is nonlinear; batch norm in training mode for its own scale."""
    case = EXACT[name]
    model, x = case.make(), case.inputs()
    layers = LayerCollection(model)
    case.register(layers, model)
    DISTRIBUTIONS[loss](layers)
    block, expected = diagonal_or_all(case, layers, model, x)
    estimator = FisherEstimator(None, 0.95, 0.1, layers, estimation_mode="exact")
    model(x)
    assert estimator.update_covariances() == []
    estimator.close()
    assert_equal({"": block.full_fisher_block()}, {"": expected})


def kfac_blocks(model, loss, batches, mode="exact", reduction=None, targets=None):
    optimizer = KFAC(model, loss, lr=0.1, damping=0.1, estimation_mode=mode)
    for i, x in enumerate(batches):
        z = model(x)
        if targets is not None:
            reduction(z, targets[i]).backward()
    optimizer.estimator.update_covariances()
    blocks = {n: b.full_fisher_block() for n, b in optimizer.estimator.blocks.items()}
    optimizer.close()
    return blocks


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for layer, dense in expected.items():
        scale = dense.abs().max().item()
        torch.testing.assert_close(
            actual[layer],
            dense,
            rtol=0,
            atol=1e-11 * scale,
            msg=lambda m, n=layer: f"{n}: {m}",
        )


@pytest.mark.parametrize("mode", ["exact", "empirical"])
def test_scale_does_not_depend_on_micro_batches_or_reduction(mode):
    model, x = tanh_net(), torch.randn(12, 3)
    y = torch.randint(2, (12,))
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    whole = kfac_blocks(model, mean, [x], mode, mean, [y])
    for split in (3, 4):
        parts, targets = x.split(split), y.split(split)
        assert_equal(kfac_blocks(model, mean, parts, mode, mean, targets), whole)
        assert_equal(kfac_blocks(model, total, parts, mode, total, targets), whole)
    uneven = [x[:1], x[1:6], x[6:]], [y[:1], y[1:6], y[6:]]
    assert_equal(kfac_blocks(model, total, uneven[0], mode, total, uneven[1]), whole)


def test_scale_with_tokens_does_not_depend_on_how_they_are_folded():
    """Tokens that carry a loss term each: `[N, T, d]` and `[N·T, d]` are the same."""
    model, x = tanh_net(), torch.randn(4, 5, 3)
    folded = kfac_blocks(model, "categorical", [x.flatten(0, 1)])
    assert_equal(kfac_blocks(model, "categorical", [x]), folded)


def test_empirical_mode_is_the_mean_of_squared_gradients():
    """One use of each weight, one datum: the block is the gradient's outer product."""
    model, x, y = tanh_net(), torch.randn(1, 3), torch.tensor([1])
    loss = nn.CrossEntropyLoss()
    blocks = kfac_blocks(model, loss, [x], "empirical", loss, [y])
    model.zero_grad()
    loss(model(x), y).backward()
    for layer, block in blocks.items():
        module = model.get_submodule(layer)
        g = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1).T.flatten()
        torch.testing.assert_close(block, torch.outer(g, g), rtol=0, atol=1e-12)


def test_empirical_mode_has_the_scale_of_the_fisher():
    """A criterion that also averages over outputs: `coeff` scales the block once."""
    model, x, y = tanh_net(), torch.randn(1, 3), torch.tensor([[1.0, 0.0]])
    mean, total = nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(reduction="sum")
    averaged = kfac_blocks(model, mean, [x], "empirical", mean, [y])
    summed = kfac_blocks(model, total, [x], "empirical", total, [y])
    assert_equal(averaged, {layer: block / 2 for layer, block in summed.items()})
