"""curvlinops as an oracle: its Gauss-Newton matrix and its Kronecker factors.

Its factors are ours but for the scale. With `N` loss terms, `R` rows of a layer and
`T = R/N`, A is the same, `AᵀA/R`; its gradients are those of the loss as it is reduced, and

    reduction="mean"  G_c = T · G        so that A ⊗ G_c is the block, T · A ⊗ G
    reduction="sum"   G_c = R · G        so that A ⊗ G_c is N times the block

for "expand" weight sharing; of each the bias is part of A (`separate_weight_and_bias` off),
with the one last. Its matrices have a layer's weight in rows `[out, in(+1)]`, ours in
`V [in(+1), out]`.
"""

import curvlinops
import pytest
import torch
from torch import nn

from kfac_torch import CurvatureMatrixVectorProductComputer, LayerCollection
from kfac_torch.estimator import FisherEstimator

pytestmark = pytest.mark.usefixtures("float64")


class Tokens(nn.Module):
    """A transformer's feed-forward part over tokens, each with a loss of its own or not."""

    def __init__(self, pool):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(3, 6), nn.Linear(6, 3), nn.Linear(3, 2)
        self.norm = nn.LayerNorm(3, elementwise_affine=False)
        self.pool = pool

    def forward(self, x):
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        x = self.head(x)
        return x.mean(1) if self.pool else x


def mlp():
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)
    )


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 2, bias=False), nn.Flatten(), nn.Linear(8, 3)
    )  # fmt: skip


# name -> (model, shape of the batch, shape of the output, classes last)
NETS = {
    "MLP": (mlp, (6, 3), (6, 3)),
    "conv net with stride": (conv_net, (4, 2, 5, 6), (4, 3)),
    "tokens, one loss": (lambda: Tokens(True), (4, 5, 3), (4, 2)),
    "tokens, a loss each": (lambda: Tokens(False), (4, 5, 3), (4, 5, 2)),
}
LOSSES = [
    criterion(reduction=reduction)
    for criterion in (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)
    for reduction in ("mean", "sum")
]


class ClassesSecond(nn.Module):
    """A model over tokens as `nn.CrossEntropyLoss` takes its output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).movedim(-1, 1)


def problem(name, loss):
    make, shape, out = NETS[name]
    model, x = make(), torch.randn(shape)
    if isinstance(loss, nn.CrossEntropyLoss):
        y = torch.randint(out[-1], out[:-1])
        model = ClassesSecond(model) if len(out) > 2 else model
    elif isinstance(loss, nn.BCEWithLogitsLoss):
        y = torch.randint(2, out).to(x)
    else:
        y = torch.randn(out)
    return model, x, y


def gather(model, loss, x):
    """Our blocks in exact mode, undamped, and the number of loss terms."""
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_loss_function(loss)
    estimator = FisherEstimator(None, 0.0, 0.0, layers, (), "exact")
    model(x)
    assert estimator.update_covariances() == []
    estimator.close()
    ((distribution, coeff),) = layers.losses(model(x).detach())
    return layers, distribution.num_terms, coeff


def dense(operator, size):
    return operator @ torch.eye(size)


def layer_blocks(matrix, model, layers):
    """The diagonal blocks of a matrix over all parameters, in the order of `V`."""
    offset, where = 0, {}
    for param in model.parameters():
        where[id(param)] = torch.arange(offset, offset + param.numel()).view(param.shape)
        offset += param.numel()
    blocks = {}
    for name, block in layers.blocks.items():
        own = block.params_to_vector([where[id(p)] for p in block.params]).flatten()
        blocks[name] = matrix[own][:, own]
    return blocks


def assert_close(actual, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * scale)


def ggn(model, loss, x, y):
    params = [p for p in model.parameters() if p.requires_grad]
    operator = curvlinops.GGNLinearOperator(model, loss, params, [(x, y)])
    return dense(operator, sum(p.numel() for p in params))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_full_blocks_and_products_are_its_gauss_newton_matrix(name, loss):
    """Full blocks of every layer, and exact products of the whole model."""
    model, x, y = problem(name, loss)
    matrix = ggn(model, loss, x, y)
    layers = LayerCollection(model)
    for module_name, module in model.named_modules():
        if hasattr(module, "weight") and module.weight is not None:
            layers.register_generic(module, "full", name=module_name)
    layers.register_loss_function(loss)
    estimator = FisherEstimator(None, 0.0, 0.0, layers, (), "exact")
    model(x)
    assert estimator.update_covariances() == []
    estimator.close()
    ((distribution, coeff),) = layers.losses(model(x).detach())
    N = distribution.num_terms
    scale = N if loss.reduction == "sum" else 1
    for layer, expected in layer_blocks(matrix, model, layers).items():
        assert_close(layers.blocks[layer].full_fisher_block() * scale, expected)
    # Products are of the sum over loss terms, without the weight of the loss.
    params = list(model.parameters())
    ((attached, _),) = layers.losses(model(x))
    products = CurvatureMatrixVectorProductComputer([attached], params)
    for _ in range(3):
        vectors = [torch.randn_like(param) for param in params]
        product = products.multiply_generalized_gauss_newton(vectors)
        ours = torch.cat([part.flatten() for part in product]) * coeff / N * scale
        assert_close(ours, matrix @ torch.cat([v.flatten() for v in vectors]))


@pytest.mark.parametrize(
    ("name", "make", "shape"),
    [
        ("linear net", lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (6, 3)),
        ("linear net over tokens",
         lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (4, 5, 3)),
        ("convolution with stride",
         lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1)), (4, 2, 5, 6)),
    ],
)  # fmt: skip
def test_exact_kronecker_blocks_are_its_gauss_newton_matrix(name, make, shape):
    model, x = make(), torch.randn(shape)
    loss = nn.MSELoss(reduction="sum")
    matrix = ggn(model, loss, x, torch.randn(model(x).shape))
    layers, N, _ = gather(model, loss, x)
    for layer, expected in layer_blocks(matrix, model, layers).items():
        assert_close(N * layers.blocks[layer].full_fisher_block(), expected)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_kronecker_factors_are_its_factors(name, loss):
    """By the map of scales at the top of this file."""
    model, x, y = problem(name, loss)
    layers, N, _ = gather(model, loss, x)
    params = list(model.parameters())
    operator = curvlinops.KFACLinearOperator(
        model,
        loss,
        params,
        [(x, y)],
        fisher_type="type-2",
        kfac_approx="expand",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    whole = dense(operator, sum(p.numel() for p in params))
    blocks = layer_blocks(whole, model, layers)
    for layer, block in layers.blocks.items():
        A, G = (factor.get_cov() for factor in block.factors)
        T = block.num_locations
        R = T * N
        assert_close(state["input_covariances"][layer], A)
        scale = {"mean": T, "sum": R}[loss.reduction]
        assert_close(state["gradient_covariances"][layer], scale * G)
        total = {"mean": 1, "sum": N}[loss.reduction]
        assert_close(blocks[layer], total * block.full_fisher_block())
