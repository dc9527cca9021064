"""Blocks against the numbers of the lineage's tests."""

import pytest
import torch
from torch import nn

from kfac_torch.damping import compute_pi_tracenorm
from kfac_torch.fisher_blocks import ConvKFCBasicFB, FullyConnectedKFACBasicFB
from kfac_torch.fisher_blocks.conv import explicit_padding
from kfac_torch.fisher_factors import refresh_inverses

pytestmark = pytest.mark.usefixtures("float64")


def psd(n):
    return torch.ones(n, n) + torch.diag(torch.arange(1.0, n + 1))


def block_with(module, covs, damping, num_locations=1.0):
    kind = FullyConnectedKFACBasicFB if isinstance(module, nn.Linear) else ConvKFCBasicFB
    block = kind(module, "layer")
    block.instantiate_factors(damping)
    block.register_inverse()
    for factor, cov in zip(block.factors, covs, strict=True):
        factor.accumulate(cov, 0.0)
    block.num_locations = num_locations
    refresh_inverses(block.factors)
    return block


def close(actual, expected, atol=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.view_as(actual), rtol=0, atol=atol)


def test_fully_connected_identity_factors():
    block = block_with(nn.Linear(2, 2), [torch.eye(3), torch.eye(2)], 0.5)
    product = block.multiply_inverse(torch.tensor([[2.0, 3], [4, 5], [1, 2]]))
    expected = [[0.686291, 1.029437], [1.372583, 1.715729], [0.343146, 0.686291]]
    close(product, expected, 1e-6)


def test_fully_connected_psd_factors():
    block = block_with(nn.Linear(3, 2, bias=False), [psd(3), psd(2)], 0.0)
    product = block.multiply_inverse(torch.arange(6.0).view(3, 2))
    close(product, [-0.4, -0.0235294118, 0.2, 0.1882352941, 0.4, 0.2588235294])


@pytest.mark.parametrize("bias", [False, True])
def test_conv_identity_factors(bias):
    conv = nn.Conv2d(2, 2, 2, bias=bias)
    block = block_with(conv, [torch.eye(8 + bias), torch.eye(2)], 0.5, num_locations=4)
    vector = torch.arange(1.0, 17.0).view(8, 2)
    if bias:
        vector = torch.cat([vector, torch.tensor([[2.0, 3.0]])])
    product = block.multiply_inverse(vector)
    close(product, vector / (4 * (1 + 0.125**0.5) ** 2))
    close(product[0], [0.136455, 0.27291], 1e-6)
    if bias:
        close(product[-1], [0.27291, 0.409365], 1e-6)


def test_conv_psd_factors():
    conv = nn.Conv2d(2, 2, 2, bias=False)
    block = block_with(conv, [psd(8), psd(2)], 0.0, num_locations=4)
    product = block.multiply_inverse(torch.arange(16.0).view(8, 2))
    close(
        product.flatten()[:4], [-0.297598463, -0.1151777137, -0.0487992315, -0.0075888569]
    )
    dense = torch.linalg.inv(torch.kron(psd(8), psd(2))) / 4
    close(product, dense @ torch.arange(16.0))


def test_conv_end_to_end():
    """3x3 image, 2x2 kernel: T is 4, the outputs, not 9, the pixels."""
    conv = nn.Conv2d(1, 1, 2)
    block = ConvKFCBasicFB(conv, "conv1")
    block.instantiate_factors(0.1)
    block.register_inverse()
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    grads = torch.tensor([1.0, -1.0, 2.0, 0.5]).view(1, 1, 2, 2)
    block.accumulate(block.moments([x], [[grads]], num_terms=1), decay=0.95)
    refresh_inverses(block.factors)
    assert block.num_locations == 4
    assert block.factors[1].get_cov().item() == 1.5625
    A, G = (factor.get_cov() for factor in block.factors)
    close(compute_pi_tracenorm(A, G), 3.9354796404)
    gradient = torch.tensor([9.5, 12, 17, 19.5, 2.5]).view(5, 1)
    close(
        block.multiply_inverse(gradient),
        [0.0486511745, 0.0373566106, 0.0147674828, 0.0034729189, -0.0112945639],
    )
    close(
        block.multiply(gradient),
        [
            7073.6462593971,
            9119.0181601444,
            13209.7619616392,
            15255.1338623866,
            2045.3719007474,
        ],
        1e-6,
    )


def test_conv_end_to_end_with_the_pixels_for_locations():
    """r1.8 took T = 9, the pixels over the stride: its result, by its T."""
    conv = nn.Conv2d(1, 1, 2)
    block = ConvKFCBasicFB(conv, "conv1")
    block.instantiate_factors(0.1)
    block.register_inverse()
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    grads = torch.tensor([1.0, -1.0, 2.0, 0.5]).view(1, 1, 2, 2)
    block.accumulate(block.moments([x], [[grads]], num_terms=1), decay=0.95)
    block.num_locations = 9.0
    refresh_inverses(block.factors)
    close(
        block.multiply_inverse(torch.tensor([9.5, 12, 17, 19.5, 2.5]).view(5, 1)),
        [0.0243876524, 0.0183004722, 0.0061261116, 0.0000389313, -0.0060871803],
    )


@pytest.mark.parametrize("sua", [False, True])
@pytest.mark.parametrize(
    ("conv", "space", "T"),
    [
        (nn.Conv2d(2, 3, 3), (7, 8), 30),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1), (7, 8), 16),
        (nn.Conv2d(2, 3, 3, dilation=2), (7, 8), 12),
        (nn.Conv1d(2, 3, 2, stride=3), (8,), 3),
        (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (3, 4, 3), 8),
    ],
)
def test_the_number_of_locations_is_that_of_the_output(conv, space, T, sua):
    """Not the pixels over the stride: padding, dilation, every number of dimensions."""
    block = ConvKFCBasicFB(conv, "conv", sua_approx_for_input=sua)
    block.instantiate_factors(0.1)
    x = torch.randn(4, 2, *space)
    z = conv.double()(x).detach()
    block.accumulate(block.moments([x], [[torch.randn_like(z)]], 4), 0.9)
    assert block.num_locations == z[0, 0].numel() == T


def test_damping_is_lambda_whatever_the_number_of_locations():
    for T in (1.0, 9.0):
        block = block_with(
            nn.Linear(2, 2, bias=False), [torch.zeros(2, 2), torch.zeros(2, 2)], 0.25, T
        )
        close(block.multiply(torch.eye(2)), 0.25 * torch.eye(2))
        close(block.multiply_inverse(torch.eye(2)), 4 * torch.eye(2))


@pytest.mark.parametrize("exp", [-1, -0.5, 1, 2])
def test_matpower_is_that_of_the_dense_block(exp):
    block = FullyConnectedKFACBasicFB(nn.Linear(2, 3), "fc")
    block.instantiate_factors(0.3)
    block.register_matpower(exp)
    for factor, cov in zip(block.factors, (psd(3), 2 * psd(3)), strict=True):
        factor.accumulate(cov, 0.0)
    block.num_locations = 5.0
    refresh_inverses(block.factors)
    A, G = (factor.get_cov() for factor in block.factors)
    pi = (A.trace() / G.trace()).sqrt()
    root = (0.3 / 5) ** 0.5
    left, right = A + pi * root * torch.eye(3), G + root / pi * torch.eye(3)
    e, V = torch.linalg.eigh(5 * torch.kron(left, right))
    vector = torch.randn(3, 3)
    expected = (V * e**exp) @ V.T @ vector.flatten()
    close(block.multiply_matpower(vector, exp), expected, 1e-8)


def test_full_fisher_block():
    block = block_with(nn.Linear(2, 2), [psd(3), psd(2)], 0.1, num_locations=3)
    close(block.full_fisher_block(), 3 * torch.kron(psd(3), psd(2)))


@pytest.mark.parametrize(
    "conv", [nn.Conv1d(2, 3, 4), nn.Conv3d(1, 2, (1, 2, 3), bias=False)]
)
def test_parameters_to_vector_and_back(conv):
    block = ConvKFCBasicFB(conv, "conv")
    parts = [torch.randn_like(param) for param in block.params]
    vector = block.params_to_vector(parts)
    assert vector.shape == (conv.weight[0].numel() + block.has_bias, conv.out_channels)
    assert torch.equal(vector[: conv.weight[0].numel()].mT, parts[0].flatten(1))
    for part, back in zip(parts, block.vector_to_params(vector), strict=True):
        assert torch.equal(part, back)


def test_several_calls_are_rows_of_one():
    conv = nn.Conv2d(2, 3, 3, padding=1)
    block = ConvKFCBasicFB(conv, "conv")
    block.instantiate_factors(0.1)
    x, g = torch.randn(6, 2, 5, 5), torch.randn(6, 3, 5, 5)
    whole = block.moments([x], [[g]], 6)
    parts = block.moments([x[:1], x[1:]], [[g[:1], g[1:]]], 6)
    for a, b in zip(whole, parts, strict=True):
        assert a.rows == b.rows == 150
        close(a.cov, b.cov)
    small = torch.randn(2, 2, 4, 7), torch.randn(2, 3, 4, 7)
    mixed = block.moments([x, small[0]], [[g, small[1]]], 6)
    assert mixed[1].rows == 150 + 56
    other = block.moments([small[0]], [[small[1]]], 6)
    close(mixed[1].cov, (150 * whole[1].cov + 56 * other[1].cov) / 206)
    whole[1].merge(other[1])
    close(whole[1].cov, mixed[1].cov)


def test_a_frozen_bias_is_left_out():
    linear = nn.Linear(2, 3)
    linear.bias.requires_grad_(False)
    block = FullyConnectedKFACBasicFB(linear, "fc")
    assert not block.has_bias
    assert block.params == [linear.weight]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid", 1, (0, 2)])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_every_padding_of_a_convolution(padding, mode):
    conv = nn.Conv2d(2, 3, (2, 3), padding=padding, padding_mode=mode, dilation=(1, 2))
    block = ConvKFCBasicFB(conv, "conv")
    block.instantiate_factors(0.1)
    x = torch.randn(4, 2, 6, 5)
    rows = conv(x).movedim(1, -1).reshape(-1, 3)
    A = block.moments([x], [[conv(x).detach()]], 4)[0].cov
    matrix = block.params_to_vector(block.params).mT
    close(matrix @ A @ matrix.T, (rows.T @ rows / len(rows)).detach())


def test_explicit_padding():
    assert explicit_padding(nn.Conv1d(1, 1, 4, padding="same", dilation=3)) == [(4, 5)]
    assert explicit_padding(nn.Conv2d(1, 1, 4, padding="valid")) == [(0, 0), (0, 0)]
    assert explicit_padding(nn.Conv2d(1, 1, 4, padding=(1, 2))) == [(1, 1), (2, 2)]


def test_errors():
    with pytest.raises(
        TypeError, match=r"layer fc: expected Linear or TransposedLinear, got Conv2d"
    ):
        FullyConnectedKFACBasicFB(nn.Conv2d(1, 1, 1), "fc")
    with pytest.raises(TypeError, match=r"layer c: expected Conv1d or Conv2d or Conv3d"):
        ConvKFCBasicFB(nn.Linear(1, 1), "c")
    block = FullyConnectedKFACBasicFB(nn.Linear(2, 3), "fc")
    for early in (block.register_inverse, lambda: block.multiply(torch.zeros(3, 3))):
        with pytest.raises(RuntimeError, match=r"layer fc.*instantiate_factors"):
            early()
    block.instantiate_factors(0.1)
    block.register_inverse()
    with pytest.raises(KeyError, match=r"fc\.input.*power -0\.5.*not registered"):
        block.multiply_matpower(torch.zeros(3, 3), -0.5)
    with pytest.raises(RuntimeError, match=r"fc\.input.*has not been computed"):
        block.multiply_inverse(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"fc\.input: left_multiply.*\[3, k\]"):
        block.multiply(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match=r"fc\.input: the factor keeps no data"):
        block.factors[0].make_covariance_update_op(0.9)()
