"""Forward mode by rules: what `torch.func.jvp` gives, or nothing."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from kfac_torch.loss_functions import NormalMeanNegativeLogProbLoss
from kfac_torch.quadratic_model import fisher_products
from kfac_torch.tangents import Dual, NoRule, one_pass

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
    "to the type of another": lambda x: (SQUARE > 1).to(x)[0] * x + SQUARE.float().to(x)[1],
    "layer norm, bias alone": lambda x: F.layer_norm(x, (4,), None, SQUARE[0]),
    "numbers of another type": lambda x: (
        x.sum() * SQUARE.float() + x.sum() / SQUARE.float()
    ),
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
    "pooling": (
        nn.Sequential(
            nn.Conv2d(2, 3, 2),
            nn.ReLU(),  # whose zeros are equal
            nn.MaxPool2d((3, 2), stride=1, padding=1),
            nn.MaxPool2d(2, dilation=2, ceil_mode=True),
        ),
        torch.randn(2, 2, 8, 7),
    ),
    "pooling of one dimension": (
        nn.Sequential(nn.Conv1d(2, 3, 2), nn.MaxPool1d(3, 2)),
        torch.randn(2, 2, 9),
    ),
    "pooling of three": (
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.MaxPool3d(2, padding=1)),
        torch.randn(2, 1, 4, 5, 4),
    ),
    "pooling of one example": (
        nn.Sequential(nn.Linear(5, 4), nn.MaxPool2d(2)),
        torch.randn(2, 4, 5),
    ),
    "one example": (nn.Conv2d(2, 3, 2), torch.randn(2, 4, 4)),
    "batch norm": (
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        torch.randn(6, 4),
    ),
}


SOME = [("weight", "bias"), ("weight",), ("bias",)]


@pytest.mark.parametrize(
    ("name", "some"),
    [
        (name, some)
        for name, (module, _) in LAYERS.items()
        for some in SOME
        if any(n.endswith(some) for n, _ in module.named_parameters())
    ],
)
def test_a_layer_has_the_derivatives_of_jvp(name, some):
    module, x = LAYERS[name]
    module = module.double()
    x = x.double() if x.is_floating_point() else x
    params = {n: p.detach() for n, p in module.named_parameters() if n.endswith(some)}
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
def test_what_cannot_be_followed_is_refused(f):
    x = torch.randn(3, 4)
    before = x.clone()
    with pytest.raises((NotImplementedError, RuntimeError)):
        f(Dual(x, torch.randn(2, 3, 4)))
    assert torch.equal(x, before)


class Another(torch.Tensor):
    """Its own class may mean anything."""


def in_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x * 2


def of_a_gradient(x):
    t = torch.ones(3, 4, requires_grad=True)
    return torch.autograd.grad((x.tanh() * t.tanh()).sum(), t, allow_unused=True)[0]


def changed_without_gradient(x):
    with torch.no_grad():
        x.mul_(2)
    return x


@pytest.mark.parametrize(
    "f",
    [
        in_autocast,
        of_a_gradient,
        changed_without_gradient,
        lambda x: F.embedding(torch.tensor([0, 1]), x, max_norm=0.1),
        lambda x: x * torch.ones(4).as_subclass(Another),
    ],
)
def test_what_would_be_followed_wrongly_is_refused(f):
    x = torch.randn(3, 4)
    before = x.clone()
    with pytest.raises(NoRule), one_pass() as current:
        f(Dual(x, torch.randn(2, 3, 4), current))
    assert torch.equal(x, before)


def test_a_refusal_is_remembered_where_the_model_catches_it():
    with pytest.raises(NoRule, match="caught"), one_pass() as current:
        x = Dual(torch.ones(2), torch.ones(1, 2), current)
        try:
            x.sum().item()
        except (NotImplementedError, RuntimeError):
            x = x * 3


def test_there_is_no_derivative_without_gradients():
    x, d, buffer = torch.randn(3, 4), torch.randn(2, 3, 4), torch.ones(4)
    with one_pass() as current:
        dual = Dual(x, d, current)
        with torch.no_grad():
            cut = dual * dual
            buffer.mul_(0.5).add_(dual.mean(0))
        y = dual * cut + buffer
    torch.testing.assert_close(y.value, x**3 + 0.5 + x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.stacked(), d * x**2, rtol=1e-12, atol=1e-12)
    assert type(cut) is torch.Tensor


def test_what_is_kept_of_a_pass_is_its_value():
    with one_pass() as current:
        kept = Dual(torch.ones(2), torch.ones(1, 2), current) * 2
    assert kept.tolist() == [2.0, 2.0]
    assert torch.equal(kept + torch.cat([kept]), torch.full((2,), 4.0))
    assert type(torch.stack([kept])) is torch.Tensor
    with one_pass() as current:
        x = Dual(torch.ones(2), torch.ones(3, 2), current)
        assert torch.equal((x * kept).stacked(), torch.full((3, 2), 2.0))


@pytest.mark.parametrize("transposed", [False, True])
def test_dropout_draws_as_it_does_without_derivatives(transposed):
    x, d = torch.randn(6, 4), torch.randn(2, 6, 4)
    before = torch.get_rng_state()
    expected = F.dropout(x.T if transposed else x, 0.5)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    dual = Dual(x, d)
    y = F.dropout(dual.T if transposed else dual, 0.5)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(y.value, expected)
    kept = expected != 0
    along = (d.mT if transposed else d) * kept * 2
    torch.testing.assert_close(y.stacked(), along, rtol=0, atol=0)


class Stumbling(nn.Linear):
    """Raises what no operation of PyTorch's would where its weight is not a tensor."""

    def forward(self, x):
        assert type(self.weight) in (torch.Tensor, nn.Parameter)
        return super().forward(x)


def test_any_error_of_the_rules_leaves_it_to_the_other_ways():
    model, x = Stumbling(2, 1, bias=False).double(), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    A = fisher_products(
        [lambda params: functional_call(model, params, (x,))],
        lambda z: [(NormalMeanNegativeLogProbLoss(z, var=1.0), 1.0)],
        {"weight": model.weight},
        [{"weight": d} for d in torch.eye(2).unsqueeze(1)],
    )
    torch.testing.assert_close(A, x.T @ x / 2, rtol=1e-12, atol=1e-12)
