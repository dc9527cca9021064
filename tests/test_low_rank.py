"""A large side by its largest eigenvalues, from a sketch."""

import pytest
import torch
from test_factor_memory import Largest

from kfac_torch.fisher_factors import (
    ConvInputKroneckerFactor,
    ConvInputLowRankKroneckerFactor,
    FactorOptions,
    FullyConnectedKroneckerFactor,
    LowRankKroneckerFactor,
    SubSampling,
    refresh_inverses,
)
from kfac_torch.fisher_factors.low_rank import nystrom, sketch_matrix


def close(actual, expected, tol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def fed(factor):
    factor.instantiate_cov_variables()
    factor.make_covariance_update_op(0.0)()
    return factor


def inverted(factor, damping, *exps):
    for exp in exps:
        factor.register_matpower(exp, damping)
    factor.instantiate_inv_variables()
    refresh_inverses([factor])
    return factor


SPECTRA = {
    "geometric": 0.8 ** torch.arange(60).double(),
    "polynomial": (1 + torch.arange(60).double()) ** -2,
    "a step": torch.cat([torch.ones(10).double(), torch.full((50,), 1e-3).double()]),
    "flat": torch.ones(60).double(),
}


def with_spectrum(e):
    U = torch.linalg.qr(torch.randn(len(e), len(e), dtype=torch.float64)).Q
    return (U * e) @ U.T


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.usefixtures("float64")
def test_it_is_the_full_one_where_the_rank_suffices(has_bias):
    x = torch.randn(30, 5) @ torch.randn(5, 40)
    full = fed(FullyConnectedKroneckerFactor([[x]], has_bias))
    factor = fed(LowRankKroneckerFactor([[x]], has_bias, rank=6))
    n = 40 + has_bias
    close(factor.get_cov(), full.get_cov())
    exps = (-1, -0.5, 0.5, 2)
    inverted(full, 0.1, *exps)
    inverted(factor, 0.1, *exps)
    left, right = torch.randn(n, 3), torch.randn(2, n)
    for exp in (*exps, 1):
        power = full.get_matpower(exp, 0.1)
        close(factor.get_matpower(exp, 0.1), power, 1e-7)
        close(factor.left_multiply_matpower(left, exp, 0.1), power @ left, 1e-7)
        close(factor.right_multiply_matpower(right, exp, 0.1), right @ power, 1e-7)


@pytest.mark.usefixtures("float64")
def test_a_full_rank_is_exact_without_damping():
    x = torch.randn(30, 6)
    factor = inverted(fed(LowRankKroneckerFactor([[x]], rank=9)), 0.0, -1)
    assert factor.describe() == "low rank 6 of 6"
    close(factor.get_inverse(0.0), torch.linalg.inv(x.T @ x / 30))


@pytest.mark.parametrize("rank", [1, 5, 10, 20])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.usefixtures("float64")
def test_the_error_is_bounded_by_the_eigenvalues_cut_off(name, rank):
    """Twice their sum bounds the expectation in nuclear norm; never less than once."""
    e = SPECTRA[name]
    omega, errors = sketch_matrix(60, rank, torch.float64), []
    tail = e[rank:].sum()
    for _ in range(10):
        C = with_spectrum(e)
        s, U = nystrom(C @ omega, omega, rank)
        close(U.T @ U, torch.eye(rank))
        missed = C - (U * s) @ U.T
        assert torch.linalg.eigvalsh(missed).min() > -1e-9  # it only takes away
        errors.append(torch.linalg.matrix_norm(missed, "nuc"))
        assert errors[-1] >= tail * (1 - 1e-9)
    assert torch.stack(errors).mean() <= 2 * tail


@pytest.mark.usefixtures("float64")
def test_the_trace_is_kept_and_averages_are_those_of_the_matrices():
    full = FullyConnectedKroneckerFactor([[torch.zeros(8, 20)]], True)
    factor = LowRankKroneckerFactor([[torch.zeros(8, 20)]], True, rank=3)
    for each in (full, factor):
        each.instantiate_cov_variables()
    for _ in range(20):
        x = torch.randn(8, 20) * torch.rand(20)
        for each in (full, factor):
            each.accumulate(each.new_cov([[x]]), 0.9)
        close(factor.cov_trace(), full.cov_trace())
        close(factor.get_cov().trace(), full.cov_trace())
    # Nothing is lost from update to update: the sketch is that of the full average.
    omega = sketch_matrix(21, 3, torch.float64)
    close(factor.get_cov_var()[:-1], full.get_cov() @ omega)


@pytest.mark.usefixtures("float64")
def test_a_multiple_of_the_identity_is_exact():
    options = FactorOptions(initial="identity")
    factor = LowRankKroneckerFactor([[torch.zeros(2, 9)]], rank=2, options=options)
    factor.instantiate_cov_variables()
    close(factor.get_cov(), torch.eye(9))


@pytest.mark.usefixtures("float64")
def test_without_data_it_is_zero():
    factor = LowRankKroneckerFactor([[torch.zeros(2, 9)]], rank=2)
    close(fed(factor).get_cov(), torch.zeros(9, 9))
    close(inverted(factor, 0.5, -1).get_inverse(0.5), 2 * torch.eye(9))


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("sub_sampling", [None, SubSampling(inputs=0.8, patches=1.0)])
@pytest.mark.usefixtures("float64")
def test_a_convolution_of_low_rank(data_format, sub_sampling):
    x = torch.randn(6, 5, 4, 1) * torch.randn(4)  # channels in proportion: rank 9
    x = x if data_format == "NHWC" else x.movedim(-1, 1)
    args = ([x], (3, 3, 4, 1), "SAME", None, None, data_format, None, True)
    options = FactorOptions(sub_sampling=sub_sampling)
    full = fed(ConvInputKroneckerFactor(*args, options=options))
    factor = fed(ConvInputLowRankKroneckerFactor(*args, rank=10, options=options))
    close(factor.get_cov(), full.get_cov())
    with pytest.raises(ValueError, match="conv: patch_mask: expected None"):
        ConvInputLowRankKroneckerFactor(
            *args, rank=1, patch_mask=torch.ones(3, 3, 4), name="conv"
        )


@pytest.mark.usefixtures("float64")
def test_sparse_rows_stay_sparse():
    factor = fed(LowRankKroneckerFactor([[torch.randn(20, 7)]], rank=2))
    inverted(factor, 0.1, -1)
    x = torch.sparse_coo_tensor([[3, 1]], torch.randn(2, 7), (6, 7), check_invariants=False)
    product = factor.right_multiply_matpower(x, -1, 0.1)
    assert product.is_sparse
    close(product.to_dense(), x.to_dense() @ factor.get_inverse(0.1))


def test_a_matrix_of_size_d_by_d_is_never_formed():
    d, rank = 1000, 8
    factor = LowRankKroneckerFactor([[torch.randn(32, d)]], True, rank=rank)
    with Largest() as largest:
        fed(factor)
        inverted(factor, 0.1, -1)
        factor.cov_trace()
        factor.left_multiply_matpower(torch.ones(d + 1, 2), -1, 0.1)
    assert largest.entries <= 32 * (d + 1)
    state = factor.state_dict()
    stored = [state["cov"], state["sketch_matrix"], *state["powers"][0]["tensors"]]
    assert sum(tensor.numel() for tensor in stored) <= (5 * rank + 2) * (d + 2) + rank + 1


@pytest.mark.usefixtures("float64")
def test_a_singular_factor_and_what_there_is_not():
    x = torch.randn(30, 2) @ torch.randn(2, 9)
    factor = fed(LowRankKroneckerFactor([[x]], rank=3, name="wide"))
    with pytest.raises(NotImplementedError, match=r"wide: .* the powers 0.5 and -0.5"):
        factor.register_cholesky(0.1)
    with pytest.raises(torch.linalg.LinAlgError, match="matrix wide is singular"):
        inverted(factor, 0.0, -1)
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        LowRankKroneckerFactor([[x]], rank=0)


def test_float32():
    """Against float64, and against what the true eigenvectors would give."""
    torch.manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(500, 500)).Q
    x = torch.randn(2000, 500) * torch.logspace(0, -3, 500) @ mixing
    products = []
    V = torch.randn(500, 8)
    for dtype in (torch.float32, torch.float64):
        factor = fed(LowRankKroneckerFactor([[x.to(dtype)]], rank=150))
        inverted(factor, 1e-3, -1)
        products.append(factor.left_multiply_matpower(V.to(dtype), -1, 1e-3).double())
    single, double = products
    assert (single - double).norm() < 2e-3 * double.norm()
    C, V = x.double().T @ x.double() / 2000, V.double()
    e, U = torch.linalg.eigh(C)
    exact = U @ ((U.T @ V) / (e + 1e-3)[:, None])
    e[:350] = e[:350].mean()
    best = U @ ((U.T @ V) / (e + 1e-3)[:, None])
    assert (double - exact).norm() < 1.1 * (best - exact).norm()
