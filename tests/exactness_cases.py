"""The table of layers and approximations, each in a net where its block is exact.

A layer or an approximation is a row. Rows of `EXACT` hold for every net, batch and loss;
those of `LINEAR` for nets that are linear in their parameters, with the square loss, and
with every loss where all rows of the network output are alike (`alike_rows`); those of
`ONE_ROW` for one datum that uses each weight once, with every loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from kfac_torch import fisher_blocks as fb


class Case(NamedTuple):
    make: Callable  # -> model
    inputs: Callable  # -> what the model is called with
    register: Callable  # (layers, model)
    diagonal: bool = True  # whether the block is the diagonal of the exact one


class Pool(nn.Module):
    """The mean over all dimensions between the first and the last."""

    def forward(self, x):
        return x.flatten(1, -2).mean(1)


class ChannelPool(nn.Module):
    """The mean, or the sum, over all locations."""

    def __init__(self, total=False):
        super().__init__()
        self.total = total

    def forward(self, x):
        return x.flatten(2).sum(2) if self.total else x.flatten(2).mean(2)


class Sized(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self, layer, *size):
        super().__init__()
        self.layer, self.size = layer, list(size)

    def forward(self, x):
        return self.layer(x, output_size=self.size)


class Looped(nn.Module):
    """One layer, called several times, on inputs of several lengths."""

    def __init__(self, layer=None, out=3):
        super().__init__()
        self.layer = layer or nn.Linear(3, 3)
        self.head = nn.Linear(3, out)

    def forward(self, x):
        x = self.layer(torch.tanh(self.layer(x)))
        return self.head(torch.tanh(self.layer(x.mean(1)) + self.layer(x[:, 0])))


class Tied(nn.Module):
    """Two modules that share their parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Functional(nn.Module):
    """Parameters without a layer, used several times."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.randn(3, 3))
        self.scale = nn.Parameter(torch.randn(()))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        scores = self.scale * torch.einsum("nti,ij,nsj->nts", x, self.q, x)
        return self.head((scores.softmax(-1) @ x @ self.q).mean(1))


class Normed(nn.Module):
    """A normalisation layer between two nonlinear maps."""

    def __init__(self, norm, calls=1):
        super().__init__()
        self.norm, self.calls = norm, calls
        for param in norm.parameters():
            nn.init.normal_(param)

    def forward(self, x):
        for _ in range(self.calls):
            x = torch.tanh(self.norm(x)) + 0.1 * x
        return x.flatten(1)[:, :6].reshape(-1, 3, 2).tanh().mean(1)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with its weight `[in, out]`."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Pairs(nn.Module):
    """A layer of two inputs, the parts of one; behind it, maybe, another."""

    def __init__(self, layer, *rest):
        super().__init__()
        self.layer, self.rest = layer, nn.Sequential(*rest)

    def forward(self, x):
        m = self.layer.in1_features
        return self.rest(self.layer(x[..., :m], input2=x[..., m:].tanh()))


class Bags(nn.Module):
    """A bag called with all ids in a row and offsets, and weights of ids."""

    def __init__(self, layer, weighted=False, *rest):
        super().__init__()
        self.layer, self.weighted, self.rest = layer, weighted, nn.Sequential(*rest)

    def forward(self, x):
        N, L = x.shape
        offsets = torch.arange(0, N * L + self.layer.include_last_offset, L)
        w = torch.linspace(0.5, 2, L).repeat(N) if self.weighted else None
        return self.rest(self.layer(x.flatten(), offsets, per_sample_weights=w))


class LoRA(nn.Module):
    """A frozen layer beside two small ones."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(3, 4).requires_grad_(False)
        self.a, self.b = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.b(self.a(x))


def randn(*shape):
    return lambda: torch.randn(shape)


def ids(*shape):
    return lambda: torch.randint(5, shape)


def alike(*shape):
    """Ids of bags with one word each, some of it padding (4)."""

    def make():
        words = torch.randint(4, shape[:1])[:, None].expand(shape).clone()
        padded = torch.rand(shape) < 0.4
        padded[:, 0] = False
        return torch.where(padded, 4, words)

    return make


def tanh_net():
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)
    )


def tokens_net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Pool(), nn.Linear(4, 2))


def conv_net(conv):
    channels = conv.out_channels
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(2), nn.AdaptiveAvgPool1d(2),
                         nn.Flatten(), nn.Tanh(), nn.Linear(2 * channels, 3))  # fmt: skip


def first(method, approx, **kwargs):
    def register(layers, model):
        getattr(layers, f"register_{method}")(model[0], approx=approx, **kwargs)

    return register


def middle(approx):
    return lambda layers, model: layers.register_fully_connected(model[2], approx)


def generic(approx, *names):
    def register(layers, model):
        params = dict(model.named_parameters())
        layers.register_generic([params[name] for name in names], approx)

    return register


def norm(approx):
    return lambda layers, model: layers.register_scale_and_shift(model.norm, approx)


def block(kind, *names):
    def register(layers, model):
        modules = [model.get_submodule(name) for name in names]
        layers.register_block(kind(modules, "layer"))

    return register


LINEAR_DIAGONALS = {
    "linear": Case(tanh_net, randn(6, 3), middle("diagonal")),
    "linear over tokens": Case(
        tokens_net, randn(4, 5, 3), first("fully_connected", "diagonal")
    ),
    "linear over two dimensions": Case(
        tokens_net, randn(3, 2, 2, 3), first("fully_connected", "diagonal")
    ),
    "linear, a loss for each token": Case(tanh_net, randn(4, 5, 3), middle("diagonal")),
    "linear, several calls": Case(
        Looped, randn(4, 5, 3), block(fb.FullyConnectedDiagonalFB, "layer")
    ),
    "linear, tied": Case(
        Tied, randn(5, 3), block(fb.FullyConnectedDiagonalFB, "a", "b")
    ),
    "linear, transposed": Case(
        lambda: nn.Sequential(Conv1D(4, 3), nn.Tanh(), Pool(), nn.Linear(4, 2)),
        randn(4, 5, 3),
        first("fully_connected", "diagonal"),
    ),
    "bilinear": Case(
        lambda: Pairs(nn.Bilinear(2, 3, 4), nn.Tanh(), Pool(), nn.Linear(4, 2)),
        randn(4, 3, 5),
        lambda layers, model: layers.register_bilinear(model.layer, "diagonal"),
    ),
}  # fmt: skip
CONVS = {
    "1d, same": (nn.Conv1d, (2, 3, 4), {"padding": "same", "dilation": 2}, (7,)),
    "2d": (nn.Conv2d, (2, 3, (2, 3)), {"padding": (1, 0), "bias": False}, (4, 5)),
    "2d, strided": (nn.Conv2d, (2, 3, 3), {"stride": (2, 1), "padding": 1}, (6, 5)),
    "2d, dilated": (nn.Conv2d, (2, 3, 2), {"dilation": (2, 3), "padding": 1}, (5, 6)),
    "2d, circular": (nn.Conv2d, (2, 3, 3), {"padding": 1, "padding_mode": "circular"},
                     (4, 4)),
    "2d, groups": (nn.Conv2d, (4, 6, 2), {"groups": 2, "stride": 2, "padding": 1}, (4, 5)),
    "3d, groups": (nn.Conv3d, (2, 4, 2), {"groups": 2}, (3, 2, 3)),
}  # fmt: skip
DEPTHWISE = {
    "depthwise": (nn.Conv2d, (3, 3, 2), {"groups": 3, "bias": False}, (3, 4)),
    "depthwise, multiplier": (nn.Conv2d, (2, 6, 3), {"groups": 2, "padding": 1}, (3, 3)),
}


TRANSPOSED = {
    "1d": (nn.ConvTranspose1d, (2, 3, 4), {"stride": 3, "padding": 1, "bias": False},
           (4,)),
    "1d, cropped": (nn.ConvTranspose1d, (2, 3, 2), {"stride": 2, "padding": 3}, (6,)),
    "1d, nothing left": (nn.ConvTranspose1d, (2, 3, 2), {"stride": 5, "padding": 3}, (2,)),
    "2d": (nn.ConvTranspose2d, (2, 3, (2, 3)), {"padding": (1, 0)}, (3, 4)),
    "2d, strided": (nn.ConvTranspose2d, (2, 3, 3),
                    {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)},
                    (3, 2)),
    "2d, dilated": (nn.ConvTranspose2d, (2, 3, (3, 2)),
                    {"dilation": (2, 3), "stride": (1, 2), "output_padding": (1, 2)},
                    (3, 2)),
    "2d, groups": (nn.ConvTranspose2d, (4, 6, (3, 2)),
                   {"groups": 2, "stride": 2, "padding": 1, "dilation": (1, 2)}, (3, 4)),
    "2d, depthwise": (nn.ConvTranspose2d, (3, 6, 2),
                      {"groups": 3, "stride": 2, "bias": False}, (2, 3)),
    "3d, groups": (nn.ConvTranspose3d, (2, 4, 2), {"groups": 2, "stride": (1, 2, 1)},
                   (2, 2, 2)),
}  # fmt: skip


def conv_cases(table, method, approx, net=conv_net, batch=3, diagonal=True):
    return {
        f"{method} {name}, {approx}": Case(
            lambda kind=kind, args=args, kwargs=kwargs: net(kind(*args, **kwargs)),
            randn(batch, args[0], *space),
            first(method, approx),
            diagonal,
        )
        for name, (kind, args, kwargs, space) in table.items()
    }


NORMS = {
    "layer norm": (lambda: nn.LayerNorm(3), (4, 5, 3)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((2, 3)), (4, 5, 2, 3)),
    "layer norm, no shift": (lambda: nn.LayerNorm(6, bias=False), (4, 6)),
    "RMS norm": (lambda: nn.RMSNorm(3), (4, 5, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 4, 2, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (4, 3, 2, 3)),
    "instance norm, kept statistics": (
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True).eval(),
        (4, 3, 5),
    ),
    "sync batch norm, images": (lambda: nn.SyncBatchNorm(3), (4, 3, 2, 2)),
    "batch norm, rows": (lambda: nn.BatchNorm1d(6), (7, 6)),
    "batch norm, images": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "batch norm, volumes": (lambda: nn.BatchNorm3d(2), (4, 2, 2, 1, 3)),
}


def frozen_batch_norm():
    norm = nn.BatchNorm1d(3, momentum=0.5)
    norm(3 + 2 * torch.randn(10, 3, 4))
    return Normed(norm.eval(), calls=2)


NORM_CASES = {
    f"{name}, {approx}": Case(
        lambda make=make: Normed(make()), randn(*shape), norm(approx), approx == "diagonal"
    )
    for name, (make, shape) in NORMS.items()
    for approx in ("full", "diagonal")
} | {
    "layer norm, called twice": Case(
        lambda: Normed(nn.LayerNorm(3), calls=2), randn(4, 5, 3), norm("full"), False
    ),
    "batch norm in eval mode": Case(
        frozen_batch_norm, randn(4, 3, 4), norm("full"), False
    ),
}  # fmt: skip
GENERIC = {
    f"generic {name}, {approx}": Case(make, inputs, register(approx), approx == "diagonal")
    for approx in ("full", "diagonal")
    for name, make, inputs, register in (
        ("tanh net", tanh_net, randn(5, 3), lambda a: generic(a, "0.weight", "2.bias")),
        ("functional", Functional, randn(4, 3, 3), lambda a: generic(a, "q", "scale")),
        ("linear", tanh_net, randn(5, 3), middle),
        ("tokens", tokens_net, randn(4, 5, 3), lambda a: first("fully_connected", a)),
        ("embedding",
         lambda: nn.Sequential(nn.Embedding(5, 3), Pool(), nn.Tanh(), nn.Linear(3, 2)),
         ids(4, 6), lambda a: first("embedding", a)),
        ("transposed linear", lambda: nn.Sequential(Conv1D(3, 2), nn.Tanh()),
         randn(4, 2), lambda a: first("fully_connected", a)),
        ("bag", lambda: Bags(nn.EmbeddingBag(5, 3), False, nn.Tanh()), ids(4, 6),
         lambda a: lambda layers, model: layers.register_embedding_bag(model.layer, a)),
        ("largest of a bag",
         lambda: nn.Sequential(nn.EmbeddingBag(5, 3, mode="max"), nn.Tanh()), ids(4, 6),
         lambda a: first("embedding_bag", a)),
        ("bilinear", lambda: Pairs(nn.Bilinear(2, 2, 3), nn.Tanh()), randn(4, 4),
         lambda a: lambda layers, model: layers.register_bilinear(model.layer, a)),
        ("conv", lambda: conv_net(nn.Conv1d(2, 3, 2)), randn(3, 2, 4),
         lambda a: first("convolution", a)),
        ("transposed", lambda: conv_net(nn.ConvTranspose1d(2, 3, 2)), randn(3, 2, 4),
         lambda a: first("conv_transpose", a)),
        ("depthwise", lambda: conv_net(nn.Conv1d(2, 4, 2, groups=2)), randn(3, 2, 4),
         lambda a: first("depthwise_conv2d", a)),
    )
}  # fmt: skip
EXACT = {
    **LINEAR_DIAGONALS,
    **conv_cases(CONVS, "convolution", "diagonal"),
    **conv_cases(DEPTHWISE, "depthwise_conv2d", "diagonal"),
    **conv_cases(TRANSPOSED, "conv_transpose", "diagonal"),
    **NORM_CASES,
    **GENERIC,
}


class Repeat(nn.Module):
    """A layer called on every use `x[:, t]`; the sum over uses, or all of them."""

    def __init__(self, layer, total):
        super().__init__()
        self.layer, self.total = layer, total

    def forward(self, x):
        outputs = torch.stack([self.layer(use) for use in x.unbind(1)], dim=1)
        return outputs.sum(1) if self.total else outputs


def unrelated_uses(*shape):
    """`[8, 3, *shape]` whose 3 uses have no correlation over the 8 examples."""

    def make():
        signs = torch.tensor([[1.0, 1, 1], [1, -1, 1], [1, 1, -1], [1, -1, -1]]).repeat(
            2, 1
        )
        x = torch.randn(2, 3, *shape).repeat_interleave(4, 0)
        return x * signs.view(8, 3, *[1] * len(shape))

    return make


def sole(method, approx, attribute="layer"):
    return lambda layers, model: getattr(layers, f"register_{method}")(
        getattr(model, attribute), approx=approx
    )


def pooled(layer, channels, *middle, total=False):
    """A net that is linear, and averages or sums all positions of an example."""
    pool = Pool() if isinstance(layer, nn.Linear) else ChannelPool(total)
    return nn.Sequential(layer, *middle, pool, nn.Linear(channels, 3))


REDUCED = {
    "linear, reduced over tokens": Case(
        lambda: pooled(nn.Linear(3, 4), 2, nn.Linear(4, 2)),
        randn(5, 6, 3),
        first("fully_connected", "kron_reduce"),
        False,
    ),
    "linear without bias, reduced over two dimensions": Case(
        lambda: pooled(nn.Linear(3, 4, bias=False), 4),
        randn(5, 2, 3, 3),
        first("fully_connected", "kron_reduce"),
        False,
    ),
    "linear, reduced with one position": Case(
        tanh_net, randn(1, 3), first("fully_connected", "kron_reduce"), False
    ),
    "linear, reduced over calls": Case(
        lambda: Repeat(nn.Linear(3, 2), total=True),
        randn(6, 3, 3),
        sole("fully_connected_multi", "kron_reduce"),
        False,
    ),
    "linear, reduced over calls and tokens": Case(
        lambda: nn.Sequential(Repeat(nn.Linear(3, 2), total=True), Pool()),
        randn(6, 3, 4, 3),
        lambda layers, model: layers.register_fully_connected_multi(
            model[0].layer, approx="kron_reduce"
        ),
        False,
    ),
    "conv, reduced over calls": Case(
        lambda: nn.Sequential(Repeat(nn.Conv2d(2, 3, 2), total=True), ChannelPool()),
        randn(5, 3, 2, 3, 4),
        lambda layers, model: layers.register_conv2d_multi(model[0].layer, "kron_reduce"),
        False,
    ),
    "conv, reduced, behind it another": Case(
        lambda: pooled(nn.Conv2d(2, 3, 2, padding=1), 2, nn.Conv2d(3, 2, 1), total=True),
        randn(5, 2, 3, 4),
        first("convolution", "kron_reduce"),
        False,
    ),
    **conv_cases(
        CONVS, "convolution", "kron_reduce",
        lambda conv: nn.Sequential(conv, ChannelPool()), diagonal=False,
    ),
    **conv_cases(
        TRANSPOSED, "conv_transpose", "kron_reduce",
        lambda conv: nn.Sequential(conv, ChannelPool()), diagonal=False,
    ),
}  # fmt: skip
LINEAR = {
    **REDUCED,
    **conv_cases(CONVS, "convolution", "kron", nn.Sequential, diagonal=False),
    **conv_cases(CONVS, "convolution", "ekfac", nn.Sequential, diagonal=False),
    **conv_cases(DEPTHWISE, "depthwise_conv2d", "kron", nn.Sequential, diagonal=False),
    **conv_cases(DEPTHWISE, "depthwise_conv2d", "ekfac", nn.Sequential, diagonal=False),
    **conv_cases(TRANSPOSED, "conv_transpose", "kron", nn.Sequential, diagonal=False),
    **conv_cases(TRANSPOSED, "conv_transpose", "ekfac", nn.Sequential, diagonal=False),
    "conv transpose, told its size": Case(
        lambda: Sized(nn.ConvTranspose2d(2, 3, 3, stride=(3, 2), padding=1), 8, 6),
        randn(4, 2, 3, 3),
        sole("conv_transpose", "kron"),
        False,
    ),
    "conv transpose, several calls": Case(
        lambda: Repeat(nn.ConvTranspose1d(2, 3, 2, stride=2), total=False),
        randn(4, 3, 2, 4),
        sole("conv_transpose", "kron"),
        False,
    ),
    "embedding": Case(
        lambda: nn.Sequential(nn.Embedding(5, 3)),
        lambda: torch.tensor([0, 3, 3, 1, 3]),
        first("embedding", "kron"),
        False,
    ),
    "embedding, tokens": Case(
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)),
        ids(4, 6),
        first("embedding", "kron"),
        False,
    ),
    "embedding, padding": Case(
        lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=3), nn.Linear(3, 2)),
        lambda: torch.tensor([0, 3, 3, 1, 3, 1]),
        first("embedding", "kron"),
        False,
    ),
    "embedding, diagonal side": Case(
        lambda: nn.Sequential(nn.Embedding(5, 3)),
        ids(7),
        first("embedding", "kron_both_diag"),
        False,
    ),
    **{
        f"bag, {name}": Case(
            lambda kwargs=kwargs, weighted=weighted: Bags(
                nn.EmbeddingBag(5, 3, padding_idx=4, **kwargs), weighted, nn.Linear(3, 2)
            ),
            alike(6, 4),
            sole("embedding_bag", approx),
            False,
        )
        for name, kwargs, weighted, approx in (
            ("sums", {"mode": "sum"}, False, "kron"),
            ("means", {}, False, "kron_in_diag"),
            ("last offset", {"include_last_offset": True}, False, "kron"),
            ("weighted", {"mode": "sum", "include_last_offset": True}, True, "kron"),
        )
    },
    "bag, one row each": Case(
        lambda: nn.Sequential(nn.EmbeddingBag(5, 3, mode="sum", padding_idx=4)),
        alike(6, 4),
        first("embedding_bag", "kron_both_diag"),
        False,
    ),
    "linear, transposed": Case(
        lambda: nn.Sequential(Conv1D(4, 3), nn.Linear(4, 2)),
        randn(4, 5, 3),
        first("fully_connected", "kron"),
        False,
    ),
    "linear, transposed, uses with a loss each": Case(
        lambda: Repeat(Conv1D(2, 3), total=False),
        randn(6, 3, 3),
        sole("fully_connected_multi", "kron_indep"),
        False,
    ),
    "linear, transposed, reduced": Case(
        lambda: nn.Sequential(Conv1D(4, 3), Pool(), nn.Linear(4, 3)),
        randn(5, 6, 3),
        first("fully_connected", "kron_reduce"),
        False,
    ),
    "bilinear": Case(
        lambda: Pairs(nn.Bilinear(2, 3, 4), nn.Linear(4, 2)),
        randn(6, 5),
        sole("bilinear", "kron"),
        False,
    ),
    "bilinear without bias, over tokens": Case(
        lambda: Pairs(nn.Bilinear(3, 2, 4, bias=False)),
        randn(3, 4, 5),
        sole("bilinear", "kron_out_diag"),
        False,
    ),
    "LoRA, first": Case(LoRA, randn(5, 3), sole("fully_connected", "kron", "a"), False),
    "LoRA, second": Case(LoRA, randn(5, 3), sole("fully_connected", "kron", "b"), False),
    "embedding, one use of several": Case(
        lambda: Repeat(nn.Embedding(5, 3), total=False),
        ids(4, 1),
        sole("embedding_multi", "kron_indep"),
        False,
    ),
    "embedding, several uses": Case(
        lambda: Repeat(nn.Embedding(5, 3), total=False),
        ids(4, 3),
        sole("embedding_multi", "kron_indep"),
        False,
    ),
    "linear, one use": Case(
        lambda: Repeat(nn.Linear(3, 2), total=True),
        randn(6, 1, 3),
        sole("fully_connected_multi", "kron_indep"),
        False,
    ),
    "linear, uses with a loss each": Case(
        lambda: Repeat(nn.Linear(3, 2), total=False),
        randn(6, 3, 3),
        sole("fully_connected_multi", "kron_indep"),
        False,
    ),
    "linear, uncorrelated uses with one loss": Case(
        lambda: Repeat(nn.Linear(3, 2, bias=False), total=True),
        unrelated_uses(3),
        sole("fully_connected_multi", "kron_indep"),
        False,
    ),
    "conv, uncorrelated uses with one loss": Case(
        lambda: Repeat(nn.Conv2d(2, 3, 2, bias=False), total=True),
        unrelated_uses(2, 3, 4),
        sole("conv2d_multi", "kron_indep"),
        False,
    ),
}


DIAGONAL_G = {
    "embedding, diagonal side",
    "bag, one row each",
    "bilinear without bias, over tokens",
}
"""Rows of `LINEAR` with a diagonal for G, which that of a cross-entropy is not."""


class OneStep(nn.Module):
    """A layer that is given one position, behind a nonlinear map; another behind it."""

    def __init__(self, layer, size=4):
        super().__init__()
        self.enter, self.layer, self.head = nn.Linear(3, 4), layer, nn.Linear(size, 2)

    def forward(self, x):
        return self.head(self.call(self.enter(x).tanh()).tanh())

    def call(self, x):
        """From a state that is not zero, so that its map has a gradient."""
        if isinstance(self.layer, nn.MultiheadAttention):
            k, v = x[None, :, : self.layer.kdim], x[None, :, : self.layer.vdim]
            return self.layer(x[None], k, v)[0][0]
        cell = isinstance(self.layer, nn.RNNCellBase)
        two = isinstance(self.layer, nn.LSTM | nn.LSTMCell)
        c = torch.ones(1, self.layer.hidden_size)
        h = torch.ones(1, getattr(self.layer, "proj_size", 0) or self.layer.hidden_size)
        state = (h, c) if two else h
        if cell:
            new = self.layer(x, state)
            return new[0] if two else new
        state = (h[None], c[None]) if two else h[None]
        return self.layer(x[None], state)[0][0]


class Attention(nn.Module):
    """Of linear layers, whose key and value go beside a constant one."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = (layer(x)[:, None] for layer in self.qkv)
        k, v = torch.cat([k, k.detach().sin()], 1), torch.cat([v, v.detach().cos()], 1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


def attention(**options):
    """To one position and to a zero, so that the softmax depends on queries and keys."""
    layer = nn.MultiheadAttention(4, 2, add_zero_attn=True, **options)
    for param in layer.parameters():
        nn.init.normal_(param)
    return OneStep(layer)


def chain(*layers):
    return lambda: nn.Sequential(*(make() for make in layers))


def between(make):
    return chain(lambda: nn.Linear(3, 4), nn.Tanh, make, nn.Tanh, lambda: nn.Linear(4, 2))


ONE_ROW = {  # makes a model, and its one datum
    "linear": (tanh_net, randn(1, 3)),
    "linear, transposed": (between(lambda: Conv1D(4, 4)), randn(1, 3)),
    "bilinear": (
        lambda: Pairs(nn.Bilinear(2, 3, 4), nn.Tanh(), nn.Linear(4, 2)), randn(1, 5)
    ),
    "LoRA": (LoRA, randn(1, 3)),
    "attention of linear layers": (between(Attention), randn(1, 3)),
    "attention": (attention, randn(1, 3)),
    "attention, no bias": (lambda: attention(bias=False), randn(1, 3)),
    "attention, separate": (lambda: attention(bias=False, kdim=2, vdim=3), randn(1, 3)),
    **{
        kind.__name__: (lambda kind=kind: OneStep(kind(4, 4)), randn(1, 3))
        for kind in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    },
    "LSTM, projection": (lambda: OneStep(nn.LSTM(4, 5, proj_size=4)), randn(1, 3)),
    "convolutions": (
        chain(lambda: nn.Conv2d(2, 3, 4), nn.Tanh, lambda: nn.Conv2d(3, 3, 1),
              lambda: nn.ReLU(inplace=True), nn.Flatten, lambda: nn.Linear(3, 2)),
        randn(1, 2, 4, 4),
    ),
    "convolution, groups": (
        chain(lambda: nn.Conv1d(4, 6, 3, groups=2), nn.Tanh, nn.Flatten,
              lambda: nn.Linear(6, 2)),
        randn(1, 4, 3),
    ),
    "transposed convolution": (
        chain(lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=2, dilation=2), nn.Tanh,
              nn.Flatten, lambda: nn.Linear(3, 2)),
        randn(1, 2, 1, 1),
    ),
    "embedding": (
        chain(lambda: nn.Embedding(5, 3), nn.Tanh, lambda: nn.Linear(3, 2)), ids(1)
    ),
    **{
        name: (chain(lambda: nn.Linear(3, 4), make, nn.Tanh, lambda: nn.Linear(4, 2)),
               randn(1, 3))
        for name, make in {
            "layer norm": lambda: nn.LayerNorm(4), "RMS norm": lambda: nn.RMSNorm(4),
            "group norm": lambda: nn.GroupNorm(1, 4),
            "batch norm, kept statistics": lambda: nn.BatchNorm1d(4).eval(),
        }.items()
    },
}  # fmt: skip
