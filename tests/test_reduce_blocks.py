"""Reduced blocks: their factors spelled out, positions of several calls, errors."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import fisher_blocks as fb
from kfac_torch.patch_moments import mean_patch, patch_view

pytestmark = pytest.mark.usefixtures("float64")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def moments(block, inputs, grads, num_terms):
    block.instantiate_factors(0.1)
    return block.moments(inputs, [grads], num_terms)


def homogeneous(rows):
    return torch.cat([rows, torch.ones(len(rows), 1)], 1)


def test_the_factors_of_a_linear_layer():
    """Means of inputs, sums of gradients; one row per example, all calls together."""
    linear = nn.Linear(3, 2)
    inputs = [torch.randn(4, 5, 3), torch.randn(4, 2, 2, 3)]
    grads = [torch.randn(4, 5, 2), torch.randn(4, 2, 2, 2)]
    A, G = moments(fb.FullyConnectedKFACReduceFB(linear), inputs, grads, num_terms=8)
    a = homogeneous(torch.cat([x.reshape(4, -1, 3) for x in inputs], 1).mean(1))
    g = torch.cat([x.reshape(4, -1, 2) for x in grads], 1).sum(1)
    close(A.cov, a.mT @ a / 4)
    close(G.cov, g.mT @ g / 4)
    assert (A.rows, A.terms, G.rows, G.terms) == (4, 8, 4, 8)


@pytest.mark.parametrize("time_dim", [0, -3, 1, None])
def test_time_may_be_the_first_dimension(time_dim):
    x, g = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    expected = moments(fb.FullyConnectedKFACReduceFB(nn.Linear(3, 2)), [x], [g], 4)
    block = fb.FullyConnectedKFACReduceFB(nn.Linear(3, 2), time_dim=time_dim)
    if time_dim in (0, -3):
        x, g = x.transpose(0, 1), g.transpose(0, 1)
    for one, other in zip(moments(block, [x], [g], 4), expected, strict=True):
        assert one.rows == other.rows == 4
        close(one.cov, other.cov)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "space"),
    [
        ((3,), 2, (1,), 2, (8,)),
        ((2, 3), (1, 2), (1, 2), (2, 1), (5, 6)),
        ((2, 1, 3), 1, (1, 0, 2), 1, (3, 2, 4)),
    ],
)
def test_mean_patches(kernel, stride, padding, dilation, space, mode):
    x = torch.randn(3, 4, *space)
    args = (x, kernel, stride, padding, dilation)
    patches = patch_view(*args, padding_mode=mode)
    expected = patches.flatten(2 + len(kernel)).mean(-1)
    close(mean_patch(*args, padding_mode=mode), expected)


def test_mean_patches_of_half_precision_are_taken_in_float32():
    x = torch.full((1, 1, 100), 0.1, dtype=torch.float16)
    mean = mean_patch(x, 3)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, x[:, :, :3].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_factors_of_a_convolution(mode, bias):
    """Against `F.unfold`; several calls, of several sizes, with groups."""
    conv = nn.Conv2d(4, 6, (2, 3), (1, 2), (1, 2), groups=2, padding_mode=mode, bias=bias)
    inputs = [torch.randn(3, 4, 4, 5), torch.randn(3, 4, 3, 7)]
    outputs = [conv(x).detach() for x in inputs]
    grads = [torch.randn_like(z) for z in outputs]
    A, G = moments(fb.ConvKFCReduceFB(conv, "conv"), inputs, grads, num_terms=6)
    name = "constant" if mode == "zeros" else mode
    patches = torch.cat(
        [
            functional.unfold(
                functional.pad(x, (2, 2, 1, 1), mode=name), (2, 3), stride=(1, 2)
            )
            for x in inputs
        ],
        dim=2,
    )
    assert patches.shape[2] == sum(math.prod(z.shape[2:]) for z in outputs)
    g = sum(grad.flatten(2).sum(2) for grad in grads)
    for group in range(2):
        rows = patches.mean(2).view(3, 2, 12)[:, group]
        rows = homogeneous(rows) if bias else rows
        close(A.cov[group], rows.mT @ rows / 3)
        part = g[:, 3 * group : 3 * group + 3]
        close(G.cov[group], part.mT @ part / 3)
    assert (A.rows, A.terms) == (3, 6)


@pytest.mark.parametrize(
    ("reduced", "expanded", "layer", "shape"),
    [
        (fb.FullyConnectedKFACReduceFB, fb.FullyConnectedKFACBasicFB,
         nn.Linear(3, 2), (4, 3)),
        (fb.ConvKFCReduceFB, fb.ConvKFCBasicFB, nn.Conv2d(2, 3, 3), (4, 2, 3, 3)),
        (fb.ConvTransposeKFCReduceFB, fb.ConvTransposeKFCFB,
         nn.ConvTranspose1d(2, 3, 1), (4, 2, 1)),
    ],
)  # fmt: skip
def test_with_one_position_it_is_the_expanded_block(reduced, expanded, layer, shape):
    layer, x = layer.double(), torch.randn(shape)
    g = torch.randn_like(layer(x))
    pairs = zip(*(moments(b(layer), [x], [g], 4) for b in (reduced, expanded)), strict=True)
    for one, other in pairs:
        assert one.rows == other.rows
        close(one.cov, other.cov)


def test_errors():
    block = fb.FullyConnectedKFACReduceFB(nn.Linear(3, 2), "fc")
    with pytest.raises(ValueError, match=r"layer fc: .*examples first, got shape \(3,\)"):
        moments(block, [torch.randn(3)], [torch.randn(2)], 1)
    inputs, grads = [torch.randn(4, 3), torch.randn(5, 3)], [torch.randn(4, 2)] * 2
    with pytest.raises(ValueError, match=r"layer fc: .*same batch size.*\[4, 5\].*kron"):
        block.moments(inputs, [[grads[0], torch.randn(5, 2)]], 4)
    block = fb.ConvKFCReduceFB(nn.Conv2d(2, 3, 2), "conv")
    with pytest.raises(ValueError, match=r"conv\.input: .*rank 4"):
        moments(block, [torch.randn(2, 3, 3)], [torch.randn(3, 2, 2)], 1)
    with pytest.raises(ValueError, match=r"conv\.input: kernel larger"):
        block.moments([torch.randn(4, 2, 1, 3)], [[torch.randn(4, 3, 1, 2)]], 4)
