"""Forward mode by rules: what `torch.func.jvp` gives, or nothing."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from kfac_torch.tangents import Dual

pytestmark = pytest.mark.usefixtures("float64")

SQUARE = torch.eye(4).double() + 1  # a constant of the shape of some values
OPERATIONS = {
    "tanh": torch.tanh,
    "sigmoid": lambda x: x.sigmoid() * F.sigmoid(x),
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softmax": lambda x: x.softmax(-1) + F.softmax(x, dim=1),
    "softmax over examples": lambda x: torch.softmax(x, 0),
    "layer norm, plain": lambda x: F.layer_norm(x, (4,)),
    "sums": lambda x: (
        (1 - x) + (x - 2) + (x - SQUARE[0]) + (SQUARE[0] - x) + torch.add(3, x)
    ),
    "sums with a factor": lambda x: torch.add(x, x, alpha=2) - torch.sub(x, x, alpha=3),
    "differences": lambda x: (x - x[:, :1]) + (x[:, 1:2] - x),
    "products": lambda x: 2 * x * x[:, 1:2] * SQUARE[1] + x[:1] * x,
    "quotients": lambda x: x / 3 + x / SQUARE[2] + 1 / (x * x + 1),
    "rounded quotients": lambda x: torch.div(x, 0.3, rounding_mode="floor") + x,
    "minus": lambda x: -x + torch.neg(x) * x,
    "matrices": lambda x: x[:, :, None] @ x[:, None, :],
    "matrices by a constant": lambda x: (
        x.view(3, 1, 4) @ SQUARE.expand(3, 4, 4)
        + (SQUARE.expand(3, 4, 4) @ x.view(3, 4, 1)).mT
    ),
    "a matrix for all": lambda x: x.view(3, 1, 4) @ SQUARE + x[0] @ SQUARE,
    "masks": lambda x: x.masked_fill(SQUARE[:3] > 1, -torch.inf).softmax(-1),
    "masks of more dimensions": lambda x: (
        x.masked_fill(SQUARE > 1, 0.0) if x.dim() == 1 else x
    ),
    "shapes": lambda x: x.reshape(2, 6).flatten() * x.view(-1) + x.unsqueeze(1).flatten(),
    "transposes": lambda x: x.mT @ x.transpose(0, 1).transpose(-1, -2) + x.T @ x,
    "pieces": lambda x: sum(x.chunk(2, dim=-1)) + x.split(2, 1)[0] + x.chunk(2, 1)[1],
    "places": lambda x: x[1] * x[:, 2].sum() + x[..., 1:].sum() + x[[0, 2]].sum(),
    "joined": lambda x: torch.cat([x, 2 * x, SQUARE]) @ torch.stack([x, x])[0].mT,
    "without a rule": lambda x: x.exp().cumsum(1).logsumexp(0) + F.silu(x).mean(),
    "what stays": lambda x: x.contiguous().to(x.dtype).float().double() * x,
    "cut": lambda x: x.detach() * x + torch.where(x > 0, x * x, x),
}


def pushed(f, x, directions):
    pairs = [torch.func.jvp(f, (x,), (d,)) for d in directions]
    return pairs[0][0], torch.stack([along for _, along in pairs])


def check(found, expected):
    value, along = expected
    torch.testing.assert_close(found.value, value)
    torch.testing.assert_close(found.stacked(), along)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_the_derivatives_of_jvp(name, k):
    x, directions = torch.randn(3, 4), torch.randn(k, 3, 4)
    f = OPERATIONS[name]
    check(f(Dual(x, directions)), pushed(f, x, directions))


LAYERS = {
    "linear": (nn.Linear(4, 5), torch.randn(2, 3, 4)),
    "linear without bias": (nn.Linear(4, 5, bias=False), torch.randn(3, 4)),
    "two": (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), torch.randn(4)),
    "norm": (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), torch.randn(3, 4)),
    "norm first": (nn.LayerNorm((3, 4)), torch.randn(2, 3, 4)),
    "embedding": (nn.Embedding(5, 3, padding_idx=1), torch.tensor([[0, 1], [4, 4]])),
    "convolution": (
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d(2)),
        torch.randn(2, 2, 5, 5),
    ),
    "convolutions": (
        nn.Sequential(nn.Conv1d(2, 4, 3, 2), nn.Conv1d(4, 2, 1, groups=2)),
        torch.randn(3, 2, 9),
    ),
    "one example": (nn.Conv2d(2, 3, 2), torch.randn(2, 4, 4)),
    "batch norm": (
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        torch.randn(6, 4),
    ),
}


@pytest.mark.parametrize("some", [("weight", "bias"), ("weight",), ("bias",)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_derivatives_of_jvp(name, some):
    module, x = LAYERS[name]
    module = module.double()
    x = x.double() if x.is_floating_point() else x
    params = {n: p.detach() for n, p in module.named_parameters() if n.endswith(some)}
    if not params:
        pytest.skip("no such parameters")
    directions = [{n: torch.randn_like(p) for n, p in params.items()} for _ in range(2)]
    frozen = {n: t.detach().clone() for n, t in module.state_dict().items()}

    def f(own):
        return functional_call(module, {**frozen, **own}, (x,))

    pairs = [torch.func.jvp(f, (params,), (d,)) for d in directions]
    expected = pairs[0][0], torch.stack([along for _, along in pairs])
    duals = {n: Dual(p, [d[n] for d in directions]) for n, p in params.items()}
    check(f(duals), expected)


class Reversed(torch.autograd.Function):
    """The derivative is not that of the forward."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return -grad


class AsItIs(Reversed):
    @staticmethod
    def forward(ctx, x):
        return x


def added(x):
    x += 1
    return x


def set_part(x):
    y = torch.zeros(3, 4)
    y[0] = x[0]
    return y


@pytest.mark.parametrize(
    "f",
    [
        Reversed.apply,
        AsItIs.apply,
        added,
        set_part,
        lambda x: x.relu_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.hardtanh(x, inplace=True),
        lambda x: torch.exp(x, out=torch.zeros(3, 4)),
        lambda x: x.data,
        lambda x: x.view(torch.int64),
        lambda x: x.sum().item(),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.max(1),
        lambda x: x.unsqueeze(0).T,
    ],
)
@torch.no_grad()
def test_what_cannot_be_followed_is_refused(f):
    x = torch.randn(3, 4)
    before = x.clone()
    with pytest.raises((NotImplementedError, RuntimeError)):
        f(Dual(x, torch.randn(2, 3, 4)))
    assert torch.equal(x, before)
