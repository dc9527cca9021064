"""Networks that people train, at small widths: what each parameter gets, and how it learns.

A network is a row of `NETWORKS`. Its `blocks` say which parameters have which kind of
block, in the words of `LayerReport.block`, and `others` which have none, and why.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfac_torch import KFAC

# Vision.


class BasicBlock(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    def __init__(self, width=4, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
        channels, layers = width, []
        for i in range(4):
            out, stride = width * 2**i, 1 if i == 0 else 2
            layers.append(
                nn.Sequential(BasicBlock(channels, out, stride), BasicBlock(out, out, 1))
            )
            channels = out
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act = nn.Linear(dim, 4 * dim), nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, dim=6, classes=4):
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(ConvNeXtBlock(dim), ConvNeXtBlock(dim))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class InvertedResidual(nn.Module):
    def __init__(self, channels, expansion=3):
        super().__init__()
        hidden = channels * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x)


def mobile_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(),
        InvertedResidual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(4, 4),
    )  # fmt: skip


class UNet(nn.Module):
    """A class for each pixel, classes in the second dimension."""

    def __init__(self, width=4, classes=2):
        super().__init__()
        self.down1 = self.double(3, width)
        self.down2 = self.double(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up1 = self.double(2 * width, width)
        self.out = nn.Conv2d(width, classes, 1)

    def double(self, channels, out):
        return nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(2, out), nn.ReLU(True),
            nn.Conv2d(out, out, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        skip = self.down1(x)
        x = self.up(self.down2(F.max_pool2d(skip, 2)))
        return self.out(self.up1(torch.cat([skip, x], 1)))


class ViT(nn.Module):
    def __init__(self, dim=8, classes=4):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, 5, dim))
        self.blocks = nn.ModuleList([ViTBlock(dim) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embedding
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ViTBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


# Language.


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with its weight `[in, out]`."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(nx**-0.5 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class GPT2Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = Conv1D(3 * dim, dim), Conv1D(dim, dim)
        self.mlp = nn.ModuleDict(
            {"c_fc": Conv1D(2 * dim, dim), "c_proj": Conv1D(dim, 2 * dim)}
        )

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden)


class GPT2(nn.Module):
    """Returns a dictionary with the loss, as Hugging Face's do."""

    def __init__(self, dim=8, words=11, length=8):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, dim), nn.Embedding(length, dim)
        self.h = nn.ModuleList([GPT2Block(dim, 2) for _ in range(2)])
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, words, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids, labels=None):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        output = {"logits": logits}
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            output["loss"] = F.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        return output


class LSTMLanguageModel(nn.Module):
    def __init__(self, dim=8, words=11):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(words, dim), nn.Dropout(0.1)
        self.lstm = nn.LSTM(dim, dim, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(dim, words)

    def forward(self, ids):
        return self.head(self.drop(self.lstm(self.drop(self.embedding(ids)))[0]))


class Tagger(nn.Module):
    """A class for each token of sequences that are padded with 0."""

    def __init__(self, dim=8, words=11, classes=3):
        super().__init__()
        self.embedding = nn.Embedding(words, dim, padding_idx=0)
        layer = nn.TransformerEncoderLayer(dim, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, ids):
        x = self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0)
        return self.head(x)


# Batches, and the losses that the plain loop has.


def images(size=16, classes=4):
    def make(generator):
        y = torch.randint(classes, (24,), generator=generator)
        x = 0.3 * torch.randn(24, 3, size, size, generator=generator)
        ramp = torch.linspace(-1, 1, size)
        patterns = torch.stack([ramp[:, None].expand(size, size), ramp.expand(size, size)])
        x[:, 0] += patterns[y % 2] * (1 - 2 * (y // 2))[:, None, None]
        return x, y

    return make


def segments(generator):
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return x, (F.avg_pool2d(x[:, :1], 3, 1, padding=1)[:, 0] > 0).long()


def text(generator):
    ids = torch.randint(11, (16, 1), generator=generator)
    ids = (ids + 3 * torch.arange(9)) % 11
    return ids[:, :-1], ids[:, 1:]


def tags(generator):
    ids = torch.randint(1, 11, (16, 8), generator=generator)
    lengths = torch.randint(2, 9, (16, 1), generator=generator)
    real = torch.arange(8) < lengths
    return ids * real, torch.where(real, ids % 3, -100)


def of_rows(model, x, y):
    z = model(x)
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def of_pixels(model, x, y):
    return F.cross_entropy(model(x), y)


def of_the_model(model, x, y):
    return model(x, labels=x)["loss"]


def of_derivatives(model, x):
    """`u' = -u`, and `u(0) = 1`."""
    x = x.requires_grad_()
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (du + u).square().mean() / 2 + (model(x[:1] * 0) - 1).square().mean() / 2


class Network(NamedTuple):
    make: Callable
    batch: Callable
    blocks: dict  # patterns of names -> the kind of block
    falls_to: float  # of the first loss, in 20 steps
    others: tuple = ()  # (pattern of names, the reason) of what has no block
    loss: Callable = of_rows
    options: dict = MappingProxyType({})


KRON, FULL = "Kronecker", "full"
NETWORKS = {
    "ResNet-18": Network(
        ResNet18,
        images(32),
        {"*conv?": KRON, "*downsample.0": KRON, "*bn?": FULL, "*downsample.1": FULL,
         "fc": KRON},
        0.2,
    ),
    "ConvNeXt": Network(
        ConvNeXt,
        images(),
        {"stem": KRON, "blocks.?.*conv*": KRON, "*norm": FULL, "head": KRON},
        0.1,
        others=(("blocks.?.gamma", "there is no block for ConvNeXtBlock"),),
    ),
    "MobileNet": Network(
        mobile_net,
        images(),
        {"[07]": KRON, "1": FULL, "3.conv.[036]": KRON, "3.conv.[147]": FULL},
        0.4,
    ),
    "U-Net": Network(
        UNet,
        segments,
        {"*.[03]": KRON, "*.1": FULL, "up": KRON, "out": KRON},
        0.7,
        loss=of_pixels,
        options={"loss": nn.CrossEntropyLoss()},
    ),
    "ViT": Network(
        ViT,
        images(8),
        {"patch": KRON, "*_proj": KRON, "*.mlp.[02]": KRON, "head": KRON, "*ln_?": FULL,
         "norm": FULL},
        0.2,
        others=(("[cp]*", "a parameter of ViT itself"),),
    ),
    "GPT-2": Network(
        GPT2,
        text,
        {"w[tp]e": KRON, "h.?.c_*": KRON, "h.?.mlp.*": KRON, "*ln_*": FULL},
        0.5,
        loss=of_the_model,
        options={"output": "logits"},
    ),
    "LSTM": Network(
        LSTMLanguageModel,
        text,
        {"embedding": KRON, "lstm.[ih]h_l?": KRON, "head": KRON},
        0.7,
    ),
    "transformer encoder, padded": Network(
        Tagger,
        tags,
        {"embedding": KRON, "*_proj": KRON, "*linear?": KRON, "*norm?": FULL,
         "head": KRON},
        0.1,
    ),
}  # fmt: skip


def trained(name, steps=20):
    """The model, its optimizer and the losses."""
    network = NETWORKS[name]
    model = network.make()
    options = {"loss": "categorical", **network.options}
    optimizer = KFAC(model, lr=0.3, damping=0.03, **options)
    losses = []
    for step in range(steps):
        batch = network.batch(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = network.loss(model, *batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.close()
    return model, optimizer, losses


def check_table(report, network):
    """Every block and other parameter is expected, and nothing expected is missing."""
    found = {pattern: set() for pattern in network.blocks}
    for row in report.layers:
        (pattern,) = [each for each in found if fnmatchcase(row.name, each)]
        found[pattern].add(row.block)
        assert row.notes == ()
        assert row.calls is None or row.uses == row.calls
    assert found == {pattern: {kind} for pattern, kind in network.blocks.items()}
    for row in report.others:
        (reason,) = [why for each, why in network.others if fnmatchcase(row.name, each)]
        assert reason == row.reason
        assert row.updated_by == "AdamW"
    assert bool(report.others) == bool(network.others)
    assert report.notes == ()
    counted = sum(row.num_params for row in report.rows)
    assert counted == report.num_params == report.num_trained


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:these parameters have no K-FAC block")
def test_every_parameter_is_accounted_for_and_the_network_learns(name):
    model, optimizer, losses = trained(name)
    check_table(optimizer.report(), NETWORKS[name])
    assert sum(losses[-5:]) / 5 < NETWORKS[name].falls_to * losses[0]
    assert optimizer.skipped_steps == 0
    state = [optimizer.state[p] for p in model.parameters()]
    assert all(len(each) > 0 for each in state)  # each was moved by its rule


@pytest.mark.parametrize("name", [n for n in NETWORKS if NETWORKS[n].others])
def test_what_has_no_block_is_named_once(name):
    with pytest.warns(UserWarning, match="these parameters have no K-FAC block") as record:
        _, optimizer, _ = trained(name, steps=2)
    (message,) = [str(each.message) for each in record]
    names = message.rpartition(": ")[2].split(", ")
    assert sorted(names) == sorted(row.name for row in optimizer.report().others)


def test_a_network_that_is_differentiated_inside_its_loss_says_what_is_missed():
    """It learns, with factors of the network output alone."""
    model = nn.Sequential(
        nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)
    )
    optimizer = KFAC(model, "normal", lr=0.3, damping=0.03)
    losses = []
    with pytest.warns(UserWarning, match="differentiated inside its own loss") as record:
        for step in range(20):
            x = torch.rand(32, 1, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = of_derivatives(model, x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    optimizer.close()
    assert len(record) == 1
    assert losses[-1] < 0.4 * losses[0]
    report = optimizer.report()
    assert [row.block for row in report.layers] == [KRON] * 3
    (note,) = report.notes
    assert "the factors are of the output, not of its derivatives" in note
