"""Where theory says that K-FAC is exact, it must equal the dense GGN.

The GGN of the mean loss is `(1/N) Jᵀ F_L J`, with `J` from `torch.func`. K-FAC is exact
for a linear network with the square loss, with any number of shared uses of a weight,
and for one datum with one use of each weight under every loss; the table below holds
both, and a layer is a row.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from kfac_torch import KFAC
from kfac_torch.loss_functions import make_objective

pytestmark = pytest.mark.usefixtures("float64")


@dataclass
class Case:
    name: str
    make: Any
    shape: tuple
    targets: str = "like"

    def __str__(self):
        return self.name


def linear_net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2))


def tanh_net():
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)
    )


def pixelwise_conv_net():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1, bias=False))


LINEAR = [  # square loss, any batch
    Case("one linear layer", lambda: nn.Sequential(nn.Linear(3, 2)), (6, 3)),
    Case("linear net", linear_net, (6, 3)),
    Case("linear net over tokens", linear_net, (4, 5, 3)),
    Case("linear net over two dimensions", linear_net, (3, 2, 2, 3)),
    Case("1x1 convolutions", pixelwise_conv_net, (4, 2, 3, 3)),
    Case(
        "conv 3x3, padded",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)),
        (4, 2, 5, 5),
    ),
    Case(
        "conv strided, valid",
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2)),
        (4, 2, 7, 8),
    ),
    Case(
        "conv dilated, circular",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=(2, 1), dilation=2, padding_mode="circular")
        ),
        (4, 2, 5, 7),
    ),
    Case("conv 1-D", lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding="same")), (4, 2, 6)),
    Case(
        "conv transposed",
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)),
        (4, 2, 3, 3),
    ),
    Case(
        "conv 3-D", lambda: nn.Sequential(nn.Conv3d(2, 2, 2, bias=False)), (3, 2, 3, 3, 3)
    ),
]
ONE_DATUM = [  # any loss
    Case("tanh net", tanh_net, (1, 3)),
    Case(
        "convolutions with one location",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 4), nn.Tanh(), nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(3, 2)
        ),
        (1, 2, 4, 4),
    ),
    Case(
        "transposed convolution with one location",
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 3, stride=2, padding=2, dilation=2), nn.Tanh(),
            nn.Flatten(), nn.Linear(3, 2)
        ),
        (1, 2, 1, 1),
    ),
]  # fmt: skip


def dense_blocks(model, x, loss):
    """The GGN of the mean loss, one diagonal block per layer, in K-FAC's order."""
    params = {name: param.detach() for name, param in model.named_parameters()}
    z = model(x).detach()
    jacobians = jacrev(lambda p: functional_call(model, p, (x,)))(params)
    objective = make_objective(loss)
    out = objective.factory(z)
    blocks = {}
    for layer, module in model.named_modules():
        if not hasattr(module, "weight"):
            continue
        J = jacobians[f"{layer}.weight"]
        if getattr(module, "transposed", False):
            J = J.transpose(z.dim(), z.dim() + 1)
        J = J.flatten(z.dim() + 1)  # [*z, out, in]
        if module.bias is not None:
            J = torch.cat([J, jacobians[f"{layer}.bias"].unsqueeze(-1)], -1)
        J = J.transpose(-1, -2).reshape(*z.shape, -1).movedim(-1, 0)
        FJ = torch.stack([out.multiply_fisher(column) for column in J])
        scale = objective.coeff(z) / out.num_terms
        blocks[layer] = scale * J.flatten(1) @ FJ.flatten(1).T
    return blocks


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


@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize("loss", ["normal", nn.MSELoss()], ids=str)
def test_linear_networks_with_the_square_loss(case, loss):
    model, x = case.make(), torch.randn(case.shape)
    assert_equal(kfac_blocks(model, loss, [x]), dense_blocks(model, x, loss))


@pytest.mark.parametrize("case", ONE_DATUM, ids=str)
@pytest.mark.parametrize(
    "loss",
    ["normal", "categorical", "bernoulli", nn.MSELoss(), nn.BCEWithLogitsLoss()],
    ids=str,
)
def test_one_datum(case, loss):
    model, x = case.make(), torch.randn(case.shape)
    assert_equal(kfac_blocks(model, loss, [x]), dense_blocks(model, x, loss))


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
