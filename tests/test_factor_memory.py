"""What is never formed: the largest tensor that an update makes, counted in entries."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kfac_torch.fisher_factors import (
    ConvDiagonalFactor,
    ConvInputKroneckerFactor,
    ConvInputSUAKroneckerFactor,
    EmbeddingInputKroneckerFactor,
    FullyConnectedDiagonalFactor,
    conv_diagonal,
    conv_geometry,
    diagonal,
)


class Largest(TorchDispatchMode):
    """The most entries of a storage that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.entries = max(self.entries, size)
        return result


def embedding():
    ids = torch.randint(1000, (100, 3))
    return EmbeddingInputKroneckerFactor([ids], 1000), 1001


def fully_connected_rows():
    x, g = torch.randn(512, 32), torch.randn(512, 64)
    return FullyConnectedDiagonalFactor([x], [[g]], True), 512 * 64


def fully_connected_tokens():  # 64 * 8 * 33 * 32 in one piece
    x, g = torch.randn(64, 8, 32), torch.randn(64, 8, 32)
    return FullyConnectedDiagonalFactor([x], [[g]], True), 64 * 8 * 33


def conv_per_example():  # 32 * 72 * 16 gradients, 32 * 144 * 72 patches
    x, g = torch.randn(32, 8, 12, 12), torch.randn(32, 16, 12, 12)
    factor = ConvDiagonalFactor([x], [[g]], [3, 3, 8, 16], None, "SAME", "NCHW")
    return factor, 32 * 16 * 144


def some_patches():  # 32 * 144 * 72 patches
    x = torch.randn(32, 8, 12, 12)
    factor = ConvInputKroneckerFactor(
        [x], [3, 3, 8, 1], "SAME", None, None, "NCHW", sub_sample_patches=1.0
    )
    return factor, 32 * 8 * 14 * 14


def uncorrelated():  # a factor of 73 * 73
    x = torch.randn(4, 8, 4, 4)
    factor = ConvInputSUAKroneckerFactor(
        [x], [3, 3, 8, 1], "SAME", None, None, "NCHW", None, True
    )
    return factor, 4 * 8 * 16


@pytest.mark.parametrize(
    "make",
    [
        embedding,
        fully_connected_rows,
        fully_connected_tokens,
        conv_per_example,
        some_patches,
        uncorrelated,
    ],
)
def test_the_largest_tensor(make, monkeypatch):
    monkeypatch.setattr(diagonal, "GRADIENT_BYTES", 2**16)
    monkeypatch.setattr(conv_diagonal, "GRADIENT_BYTES", 2**16)
    monkeypatch.setattr(conv_geometry, "_PATCH_BYTES", 2**16)
    factor, entries = make()
    factor.instantiate_cov_variables()
    op = factor.make_covariance_update_op(0.0)
    with Largest() as largest:
        op()
        factor.cov_trace()
    assert largest.entries <= entries


def test_trace_and_inverse_of_uncorrelated_locations_stay_small():
    factor, _ = uncorrelated()
    factor.instantiate_cov_variables()
    factor.make_covariance_update_op(0.0)()
    factor.register_inverse(0.1)
    with Largest() as largest:
        factor.instantiate_inv_variables()
        for op in factor.make_inverse_update_ops():
            op()
        factor.cov_trace()
        factor.left_multiply_matpower(torch.ones(73, 2), -1, 0.1)
    assert largest.entries <= 73 * 2
