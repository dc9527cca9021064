"""Full and diagonal blocks against the lineage's numbers and explicit squares."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch.fisher_blocks import (
    ConvDiagonalFB,
    ConvKFCBasicFB,
    DepthwiseConvDiagonalFB,
    DepthwiseConvKFCBasicFB,
    FullFB,
    FullyConnectedDiagonalFB,
    NaiveDiagonalFB,
    ScaleAndShiftDiagonalFB,
    ScaleAndShiftFullFB,
)
from kfac_torch.fisher_blocks.normalization import normalize
from kfac_torch.fisher_factors import refresh_inverses

pytestmark = pytest.mark.usefixtures("float64")


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.view_as(actual), rtol=0, atol=atol)


def psd(n):
    return torch.ones(n, n) + torch.diag(torch.arange(1.0, n + 1))


def generic(kind, cov, damping):
    block = kind([nn.Parameter(torch.zeros(len(cov)))])
    block.instantiate_factors(damping)
    block.register_inverse()
    block.factors[0].accumulate(cov, 0.0)
    refresh_inverses(block.factors)
    return block


def test_full_and_naive_diagonal_at_the_identity():
    for kind, cov in ((FullFB, torch.eye(3)), (NaiveDiagonalFB, torch.ones(3, 1))):
        block = generic(kind, cov, 0.5)
        close(block.multiply_inverse(torch.full((3, 1), 2.0)), [4 / 3] * 3)


def test_full_psd():
    product = generic(FullFB, psd(3), 0.5).multiply_inverse(torch.tensor([[4.0], [5], [6]]))
    close(
        product, torch.linalg.solve(psd(3) + 0.5 * torch.eye(3), torch.tensor([4.0, 5, 6]))
    )
    close(product, [0.8582995951, 0.9149797571, 0.9392712551])


def test_naive_diagonal_psd():
    diagonal = psd(3).diagonal()[:, None]
    product = generic(NaiveDiagonalFB, diagonal, 0.5).multiply_inverse(
        torch.tensor([[4.0], [5], [6]])
    )
    close(product, [1.6, 1.4285714286, 1.3333333333])


def gathered(block, batches):
    """With λ = 0, the moments of micro-batches merged; a loss term per example."""
    block.instantiate_factors(0.0)
    block.register_inverse()
    (moment,) = block.moments(batches[0][0], [batches[0][1]], len(batches[0][0][0]))
    for inputs, grads in batches[1:]:
        moment.merge(block.moments(inputs, [grads], len(inputs[0]))[0])
    block.accumulate([moment], 0.95)
    return block


def check_against_squares(make, inputs, grads, squares):
    """One batch and two halves; `squares` are `[in(+1), out]`, per example."""
    expected = sum(squares) / len(squares)
    half = len(inputs) // 2
    halves = [([inputs[part]], [grads[part]]) for part in (slice(half), slice(half, None))]
    for batches in ([([inputs], [grads])], halves):
        block = gathered(make(), batches)
        close(block.full_fisher_block().diagonal(), expected.flatten())
        V = torch.randn_like(expected)
        close(block.multiply(V), expected * V)
        close(block.multiply_inverse(V), V / expected)


@pytest.mark.parametrize("bias", [False, True])
def test_fully_connected_diagonal_against_explicit_squares(bias):
    inputs, grads = torch.randn(6, 3), torch.randn(6, 2)
    squares = []
    for a, g in zip(inputs, grads, strict=True):
        a = torch.cat([a, torch.ones(1)]) if bias else a
        squares.append(torch.outer(a, g) ** 2)

    def make():
        return FullyConnectedDiagonalFB(nn.Linear(3, 2, bias=bias))

    check_against_squares(make, inputs, grads, squares)


def gradients_of(conv, inputs, grads):
    """Each example's gradient `[in(+1), out]`, by autograd."""
    for x, g in zip(inputs, grads, strict=True):
        parts = torch.autograd.grad(
            (conv(x[None]) * g[None]).sum(), list(conv.parameters())
        )
        rows = [parts[0].flatten(1).T, *(part[None] for part in parts[1:])]
        yield torch.cat(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("channels", "kwargs"),
    [((2, 3), {}), ((4, 4), {"groups": 2})],
    ids=["plain", "groups"],
)
def test_conv_diagonal_against_explicit_squares(channels, kwargs, bias):
    """A 1x1 kernel on 8x4 images, as in the lineage's test."""
    conv = nn.Conv2d(*channels, 1, bias=bias, **kwargs)
    inputs, grads = torch.randn(6, channels[0], 8, 4), torch.randn(6, channels[1], 8, 4)
    squares = [each**2 for each in gradients_of(conv, inputs, grads)]
    check_against_squares(lambda: ConvDiagonalFB(conv), inputs, grads, squares)


def test_conv_diagonal_end_to_end():
    conv = nn.Conv2d(1, 1, 2)
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    grads = torch.tensor([1.0, -1.0, 2.0, 0.5]).view(1, 1, 2, 2)
    block = gathered(ConvDiagonalFB(conv), [([x], [grads])])
    assert block.num_locations == 1  # an example is one row
    close(block.factors[0].get_cov_var(), [90.25, 144, 289, 380.25, 6.25])
    gradient = torch.tensor([9.5, 12, 17, 19.5, 2.5]).view(5, 1)
    close(block.multiply_inverse(gradient), 1 / gradient)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_diagonal_against_explicit_squares(multiplier, bias):
    conv = nn.Conv2d(3, 3 * multiplier, 2, groups=3, bias=bias)
    inputs, grads = torch.randn(6, 3, 4, 3), torch.randn(6, 3 * multiplier, 3, 2)
    squares = [each**2 for each in gradients_of(conv, inputs, grads)]
    check_against_squares(lambda: DepthwiseConvDiagonalFB(conv), inputs, grads, squares)


def test_depthwise_kronecker_is_a_convolution_of_each_channel():
    conv = nn.Conv2d(3, 6, 2, groups=3)
    inputs, grads = torch.randn(5, 3, 4, 3), torch.randn(5, 6, 3, 2)
    block = DepthwiseConvKFCBasicFB(conv)
    block.instantiate_factors(0.1)
    block.register_inverse()
    block.accumulate(block.moments([inputs], [[grads]], 5), 0.9)
    refresh_inverses(block.factors)
    gradient = torch.randn_like(conv.weight), torch.randn_like(conv.bias)
    product = block.multiply_tensors(gradient, -1)
    assert [part.shape for part in product] == [part.shape for part in gradient]
    for channel in range(3):
        out = slice(2 * channel, 2 * channel + 2)
        alone = ConvKFCBasicFB(nn.Conv2d(1, 2, 2))
        alone.instantiate_factors(0.1)
        alone.register_inverse()
        x, g = inputs[:, channel : channel + 1], grads[:, out]
        alone.accumulate(alone.moments([x], [[g]], 5), 0.9)
        refresh_inverses(alone.factors)
        for part, whole in zip(
            alone.multiply_tensors([part[out] for part in gradient], -1),
            product,
            strict=True,
        ):
            close(part, whole[out])


def test_a_convolution_that_is_not_depthwise():
    for kind in (DepthwiseConvDiagonalFB, DepthwiseConvKFCBasicFB):
        with pytest.raises(ValueError, match=r"layer c: expected a depthwise.*groups=2"):
            kind(nn.Conv2d(4, 4, 1, groups=2), "c")


def test_calls_that_cannot_be_of_the_same_examples():
    block = FullyConnectedDiagonalFB(nn.Linear(2, 1), "fc")
    block.instantiate_factors(0.1)
    inputs, grads = [torch.zeros(3, 2), torch.zeros(6, 2)], [torch.zeros(3, 1)] * 2
    with pytest.raises(ValueError, match=r"layer fc: .*same batch size, got \[3, 6\]"):
        block.moments(inputs, [grads], 3)
    conv = ConvDiagonalFB(nn.Conv1d(2, 1, 1), "conv")
    conv.instantiate_factors(0.1)
    with pytest.raises(NotImplementedError, match=r'layer conv: .*got 2;.*"kron_indep"'):
        conv.moments([torch.zeros(3, 2, 4)] * 2, [[torch.zeros(3, 1, 4)] * 2], 3)


@pytest.mark.parametrize("kind", [ScaleAndShiftFullFB, ScaleAndShiftDiagonalFB])
def test_calls_of_a_norm_without_examples_in_common_are_independent(kind):
    """A call with one example alone among them, without a dimension for it."""
    block = kind(nn.LayerNorm(3))
    block.instantiate_factors(0.1)
    inputs = [torch.randn(5, 3), torch.randn(3), torch.randn(2, 4, 3)]
    grads = [torch.randn_like(a) for a in inputs]
    dense = 0
    for a, g in zip(inputs, grads, strict=True):
        normed = functional.layer_norm(a, (3,))
        v = torch.cat([normed * g, g], -1).view(a.shape[0] if a.dim() > 1 else 1, -1, 6)
        v = v.sum(1)
        dense = dense + v.T @ v / 4
    block.accumulate(block.moments(inputs, [grads], 4), 0.9)
    diagonal = kind is ScaleAndShiftDiagonalFB
    close(block.full_fisher_block(), dense.diagonal().diag() if diagonal else dense)


NORMS = [
    (nn.LayerNorm(3), (4, 3)),
    (nn.RMSNorm(3), (4, 3)),
    (nn.GroupNorm(2, 4), (4, 4, 3)),
    (nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (4, 3, 5)),
    (nn.InstanceNorm2d(3, affine=True), (4, 3, 5, 2)),
    (nn.BatchNorm1d(3), (4, 3)),
    (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 2)),
    (nn.BatchNorm3d(3), (4, 3, 2, 1, 2)),
    (nn.SyncBatchNorm(3), (4, 3, 2)),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "shape"), NORMS, ids=lambda value: str(value)[:13])
def test_what_a_normalisation_layer_scales(norm, shape, training):
    norm = norm.double().train(training)
    if getattr(norm, "running_mean", None) is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(1, 2)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    x = torch.randn(shape)
    normalized = normalize(norm, x)
    assert all(torch.equal(buffer, before[n]) for n, buffer in norm.named_buffers())
    close(normalized, norm(x).detach())  # the scale is one and the shift zero


def test_normalisation_is_computed_in_the_precision_of_the_factor():
    norm = nn.LayerNorm(64).bfloat16()
    block = ScaleAndShiftFullFB(norm)
    block.instantiate_factors(0.1)
    x = (100 + torch.randn(5, 64)).bfloat16()
    (moment,) = block.moments([x], [[torch.ones(5, 64).bfloat16()]], 5)
    v = functional.layer_norm(x.float(), (64,))
    expected = torch.cat([v, torch.ones(5, 64)], 1).float()
    assert moment.cov.dtype == torch.float32
    torch.testing.assert_close(moment.cov, expected.T @ expected / 5)
