"""Large sides as blocks on the diagonal: against the dense matrix with the rest zeroed."""

import pytest
import torch
from test_factor_memory import Largest

from kfac_torch.fisher_factors import (
    ConvInputDiagonalKroneckerFactor,
    ConvInputKroneckerFactor,
    ConvInputSplitKroneckerFactor,
    ConvOutputKroneckerFactor,
    ConvOutputSplitKroneckerFactor,
    FullyConnectedKroneckerFactor,
    SplitKroneckerFactor,
    SubSampling,
    refresh_inverses,
)
from kfac_torch.fisher_factors.base import FactorOptions
from kfac_torch.fisher_factors.conv_split import channel_blocks
from kfac_torch.fisher_factors.split import even_parts

EXPS = (-1, -0.5, 0.5, 2, 1)


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def fed(factor):
    factor.instantiate_cov_variables()
    factor.make_covariance_update_op(0.0)()
    return factor


def registered(factor, damping):
    for exp in EXPS:
        factor.register_matpower(exp, damping)
    factor.register_cholesky(damping)
    factor.register_cholesky_inverse(damping)
    factor.instantiate_inv_variables()
    return factor


def zeroed(C, sizes):
    """`C` with everything outside the blocks on its diagonal set to zero."""
    return C * torch.block_diag(*(C.new_ones(size, size) for size in sizes))


@pytest.mark.parametrize("damping", [0.0, 0.3])  # padding is never why one is singular
@pytest.mark.parametrize(
    ("d", "has_bias", "max_size", "sizes"),
    [
        (6, False, 3, (3, 3)),
        (7, False, 3, (3, 2, 2)),
        (7, True, 3, (3, 3, 2)),
        (6, True, 3, (3, 2, 2)),
        (9, False, 4, (3, 3, 3)),
        (5, False, 1, (1, 1, 1, 1, 1)),
        (4, True, 9, (5,)),
    ],
)
@pytest.mark.usefixtures("float64")
def test_against_the_dense_matrix(d, has_bias, max_size, sizes, damping):
    x = torch.randn(20, 2, d)
    full = fed(FullyConnectedKroneckerFactor([[x]], has_bias))
    factor = fed(SplitKroneckerFactor([[x]], has_bias, max_size=max_size))
    C, n = zeroed(full.get_cov(), sizes), d + has_bias
    close(factor.get_cov(), C)
    assert factor.cov_dim == n
    close(factor.cov_trace(), full.cov_trace())
    registered(factor, damping)
    refresh_inverses([factor])
    e, V = torch.linalg.eigh(C + damping * torch.eye(n))
    left, right = torch.randn(n, 3), torch.randn(2, n)
    for exp in EXPS:
        power = (V * e**exp) @ V.T
        close(factor.get_matpower(exp, damping), power, 1e-8)
        close(factor.left_multiply_matpower(left, exp, damping), power @ left, 1e-8)
        close(factor.right_multiply_matpower(right, exp, damping), right @ power, 1e-8)
    L = torch.linalg.cholesky(C + damping * torch.eye(n))
    close(factor.get_cholesky(damping), L)
    close(factor.get_cholesky_inverse(damping), torch.linalg.inv(L))
    close(factor.left_multiply_cholesky(left, damping, True), L.T @ left)
    close(factor.right_multiply_cholesky(right, damping), right @ L)
    close(factor.right_multiply_cholesky_inverse(right, damping) @ L, right)


@pytest.mark.usefixtures("float64")
def test_a_single_inverse_is_by_cholesky_and_the_same():
    x = torch.randn(20, 7)
    factor = fed(SplitKroneckerFactor([[x]], max_size=3))
    factor.register_inverse(0.0)
    factor.instantiate_inv_variables()
    assert not factor.uses_eigendecomp()
    refresh_inverses([factor])
    close(factor.get_inverse(0.0), torch.linalg.inv(factor.get_cov()))


@pytest.mark.usefixtures("float64")
def test_a_singular_block_is_named():
    x = torch.randn(20, 7)
    x[:, 6] = x[:, 5]  # in the last block, which has padding
    factor = fed(SplitKroneckerFactor([[x]], max_size=3, name="wide"))
    factor.register_inverse(0.0)
    factor.instantiate_inv_variables()
    with pytest.raises(torch.linalg.LinAlgError, match=r"matrix wide .*is singular"):
        refresh_inverses([factor])


@pytest.mark.usefixtures("float64")
def test_sparse_rows_stay_sparse():
    factor = registered(fed(SplitKroneckerFactor([[torch.randn(20, 5)]], max_size=2)), 0.1)
    refresh_inverses([factor])
    rows = torch.randn(2, 5)
    x = torch.sparse_coo_tensor([[3, 1]], rows, (6, 5), check_invariants=False)
    product = factor.right_multiply_matpower(x, -1, 0.1)
    assert product.is_sparse
    close(product.to_dense(), x.to_dense() @ factor.get_inverse(0.1))


CONVS = {  # filter, groups, max_size, channels of each block
    "even": ((3, 3, 4, 6), 1, 18, (2, 2)),
    "uneven": ((3, 3, 5, 7), 1, 27, (3, 2)),
    "groups": ((3, 2, 3, 4), 2, 13, (2, 1)),
    "one channel in each": ((3, 3, 3, 1), 1, 9, (1, 1, 1)),
}


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.usefixtures("float64")
def test_both_sides_of_a_convolution(name, has_bias, data_format):
    filter_shape, groups, max_size, channels = CONVS[name]
    max_size += has_bias
    *kernel, C, K = filter_shape
    last = data_format == "NHWC"
    shape, out = (4, 6, 5, C * groups), (4, 3, 2, K * groups)
    x, g = torch.randn(shape), torch.randn(out)
    x, g = (x, g) if last else (x.movedim(-1, 1), g.movedim(-1, 1))
    args = ([x], filter_shape, "SAME", (2, 1), (1, 2), data_format, None, has_bias)
    full = fed(ConvInputKroneckerFactor(*args, groups=groups))
    factor = fed(ConvInputSplitKroneckerFactor(*args, groups=groups, max_size=max_size))
    # Which block each column is in; the one of a bias is in the last.
    of_channel = torch.arange(len(channels)).repeat_interleave(torch.tensor(channels))
    offsets = kernel[0] * kernel[1]
    owner = of_channel.repeat(offsets) if last else of_channel.repeat_interleave(offsets)
    owner = torch.cat([owner, owner.new_full((int(has_bias),), len(channels) - 1)])
    expected = full.get_cov() * (owner[:, None] == owner)
    close(factor.get_cov(), expected)
    close(factor.cov_trace(), full.cov_trace())
    assert factor.cov_dim == full.cov_dim
    close(
        fed(ConvInputDiagonalKroneckerFactor(*args, groups=groups)).get_cov(),
        full.get_cov().diagonal(dim1=-2, dim2=-1).diag_embed(),
    )
    outputs = {"num_channels": K * groups, "groups": groups}
    full = fed(ConvOutputKroneckerFactor([[g]], data_format, **outputs))
    factor = ConvOutputSplitKroneckerFactor([[g]], data_format, **outputs, max_size=3)
    owner = torch.arange(K) * 0
    for number, size in enumerate(even_parts(K, -(-K // 3))):
        owner[K - sum(even_parts(K, -(-K // 3))[number:]) :] = number
        assert size <= 3
    close(fed(factor).get_cov(), full.get_cov() * (owner[:, None] == owner))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.usefixtures("float64")
def test_the_diagonal_of_every_padding(padding_mode):
    x = torch.randn(3, 2, 5, 6)
    args = ([x], (3, 3, 2, 1), ((1, 1), (1, 0)), (2, 1), None, "NCHW", None, True)
    full = fed(ConvInputKroneckerFactor(*args, padding_mode=padding_mode))
    factor = fed(ConvInputDiagonalKroneckerFactor(*args, padding_mode=padding_mode))
    close(factor.get_cov_var(), full.get_cov().diagonal())


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.usefixtures("float64")
def test_the_same_patches_are_drawn(data_format):
    x = torch.randn(5, 4, 6, 4)
    options = FactorOptions(sub_sampling=SubSampling(inputs=0.8, patches=1.0))
    args = ([x], (3, 3, 4, 1), "SAME", None, None, data_format, None, True)
    full = fed(ConvInputKroneckerFactor(*args, options=options))
    factor = fed(ConvInputSplitKroneckerFactor(*args, options=options, max_size=19))
    assert factor.describe() == "split 2x19 of 37"
    close(factor.get_cov()[factor.get_cov() != 0], full.get_cov()[factor.get_cov() != 0])
    close(factor.cov_trace(), full.cov_trace())


def test_blocks_of_channels():
    assert channel_blocks(8, 9, False, 18) == (2, 2, 2, 2)
    assert channel_blocks(8, 9, True, 18) == (2, 2, 2, 1, 1)  # room for the bias
    assert channel_blocks(2, 9, True, 9) is None
    with pytest.raises(ValueError, match=r"max_size: expected at least 9 .* and a bias"):
        ConvInputSplitKroneckerFactor(
            [torch.ones(1, 4, 4, 2)], (3, 3, 2, 1), "VALID", has_bias=True, max_size=9
        )
    with pytest.raises(ValueError, match="wide: max_size: expected at least 1, got 0"):
        SplitKroneckerFactor([[torch.ones(2, 3)]], max_size=0, name="wide")


def test_what_is_stored_and_formed_is_bounded():
    d, max_size = 1000, 64
    x = torch.randn(32, d)
    factor = SplitKroneckerFactor([[x]], True, max_size=max_size)
    with Largest() as largest:
        fed(factor)
        registered(factor, 0.1)
        refresh_inverses([factor])
        factor.cov_trace()
        factor.left_multiply_matpower(torch.ones(d + 1, 2), -1, 0.1)
    assert factor.get_cov_var().numel() <= (d + 16) * max_size
    assert largest.entries <= (d + 16) * max_size


def test_patches_are_not_formed():
    x = torch.randn(8, 64, 12, 12)  # of 8 * 100 * 576 patch entries
    args = ([x], (3, 3, 64, 1), "VALID", None, None, "NCHW")
    factor = ConvInputDiagonalKroneckerFactor(*args)
    with Largest() as largest:
        fed(factor)
    assert largest.entries <= x.numel()
    # Those of few channels, however they are found, are no more than those of all.
    factor, full = ConvInputSplitKroneckerFactor(*args, max_size=72), Largest()
    with Largest() as largest:
        fed(factor)
    with full:
        fed(ConvInputKroneckerFactor(*args))
    assert largest.entries <= full.entries


def test_float32():
    torch.manual_seed(0)
    x = torch.randn(512, 700) * torch.logspace(0, -2, 700)
    factor = fed(SplitKroneckerFactor([[x]], True, max_size=256))
    factor.register_inverse(1e-3)
    factor.instantiate_inv_variables()
    refresh_inverses([factor])
    assert factor.describe() == "split 3x234 of 701"
    V = torch.randn(701, 16)
    damped = factor.get_cov().double() + 1e-3 * torch.eye(701).double()
    expected = torch.linalg.solve(damped, V.double())
    error = factor.left_multiply_matpower(V, -1, 1e-3) - expected
    assert error.norm() < 1e-4 * expected.norm()


def test_the_state_of_another_split():
    x = torch.randn(20, 8)
    one, two = (fed(SplitKroneckerFactor([[x]], max_size=size)) for size in (4, 2))
    before = two.get_cov()
    with pytest.raises(ValueError, match=r"covariance of shape \(4, 2, 2\).*\(2, 4, 4\)"):
        two.load_state_dict(one.state_dict())
    assert torch.equal(two.get_cov(), before)
