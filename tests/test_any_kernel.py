"""Products with the exact Fisher of networks whose operations have no forward mode."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from kfac_torch import KFAC
from kfac_torch.loss_functions import CategoricalLogitsNegativeLogProbLoss
from kfac_torch.quadratic_model import fisher_products
from kfac_torch.replay import rerun

pytestmark = pytest.mark.usefixtures("float64")


class Softsign(torch.autograd.Function):
    """An operation with a backward alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / (1 + x.abs())

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()) ** 2


class Once(torch.autograd.Function):
    """An operation that can be differentiated once alone."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class First(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


BODIES = {
    "scaled_dot_product_attention": Attention,
    "nn.MultiheadAttention": Multihead,
    "nn.LSTM": lambda: First(nn.LSTM(4, 4, batch_first=True)),
    "nn.GRU": lambda: First(nn.GRU(4, 4, batch_first=True)),
    "nn.RNN": lambda: First(nn.RNN(4, 4, batch_first=True)),
    "a function of the user's": lambda: Apply(Softsign),
}


def net(body):
    return nn.Sequential(nn.Linear(3, 4), body, nn.Linear(4, 5))


@pytest.mark.parametrize("body", BODIES)
def test_products_are_exact(body):
    model, x = net(BODIES[body]()), torch.randn(2, 4, 3)
    params = {name: p.detach() for name, p in model.named_parameters()}
    directions = [{n: torch.randn_like(p) for n, p in params.items()} for _ in range(2)]
    found = fisher_products(
        [rerun(model, (x,), {})],
        lambda z: [(CategoricalLogitsNegativeLogProbLoss(z), 1.0)],
        params,
        directions,
    )
    names = list(params)
    jacobians = torch.autograd.functional.jacobian(
        lambda *values: functional_call(model, dict(zip(names, values, strict=True)), (x,)),
        tuple(params.values()),
    )
    columns = [
        sum((J * d[n]).flatten(3).sum(-1) for n, J in zip(names, jacobians, strict=True))
        for d in directions
    ]
    loss = CategoricalLogitsNegativeLogProbLoss(model(x).detach())
    for i, left in enumerate(columns):
        for j, right in enumerate(columns):
            expected = (left * loss.multiply_fisher(right)).sum() / 8
            torch.testing.assert_close(found[i, j], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("body", BODIES)
def test_the_automatic_step_learns(body):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    model = net(BODIES[body]())
    x, y = torch.randn(8, 4, 3), torch.randint(5, (8, 4))
    optimizer, losses = KFAC(model, "categorical"), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.close()
    assert losses[-1] < 0.7 * losses[0]


def test_an_operation_with_neither_is_named():
    model, x = net(Apply(Once)), torch.randn(2, 4, 3)
    optimizer = KFAC(model, "categorical")
    F.cross_entropy(model(x).flatten(0, 1), torch.zeros(8, dtype=torch.long)).backward()
    with pytest.raises(RuntimeError, match=r"one of its operations has neither.*fixed lr"):
        optimizer.step()
    optimizer.close()
