"""Layers with several uses: moments of lag 1, the two options, the series products."""

import pytest
import torch

from kfac_torch.fisher_factors import (
    ConvInputMultiKF,
    ConvOutputMultiKF,
    DiagonalMultiKF,
    FactorOptions,
    FullyConnectedMultiKF,
    refresh_inverses,
    series_option1_product,
    series_option2_product,
)
from kfac_torch.fisher_factors.recurrent import inverse_gamma

pytestmark = pytest.mark.usefixtures("float64")
X = torch.arange(1.0, 13.0, dtype=torch.float64).view(6, 2)
C0 = [[47 + 2 / 3, 53 + 2 / 3], [53 + 2 / 3, 60 + 2 / 3]]
C1 = [[24 + 2 / 3, 30.0], [27 + 1 / 3, 33 + 1 / 3]]


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


def with_covs(lag0, lag1, damping):
    factor = FullyConnectedMultiKF([[torch.zeros(2, len(lag0))]], 2, name="rnn")
    factor.register_option1quants(damping)
    factor.register_option2quants(damping)
    factor.instantiate_cov_variables()
    factor.instantiate_inv_variables()
    factor.accumulate(torch.stack([torch.tensor(lag0), torch.tensor(lag1)]), 0.0)
    refresh_inverses([factor])
    return factor


# Moments.


@pytest.mark.parametrize("tensors", [X, list(X.view(3, 2, 2)), X.view(3, 2, 2)])
def test_lag_oracle(tensors):
    """Use-major rows, a list of uses, or a time-major sequence."""
    factor = FullyConnectedMultiKF([[tensors]], 3)
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    op = factor.make_covariance_update_op(0.0)
    close(op(), C0)
    close(factor.get_cov(), C0)
    close(factor.get_cov_dt1(), C1)
    assert factor.num_rows(X) == 6


def test_without_lag_as_fully_connected():
    """The lineage's numbers, from the identity with decay 1/2."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    options = FactorOptions(initial="identity")
    for has_bias, expected in (
        (False, [[3, 3.5], [3.5, 5.5]]),
        (True, [[3, 3.5, 1], [3.5, 5.5, 1.5], [1, 1.5, 1]]),
    ):
        factor = FullyConnectedMultiKF([[x]], has_bias=has_bias, options=options)
        factor.instantiate_cov_variables()
        assert factor.get_cov_var() is factor.get_cov()
        close(factor.make_covariance_update_op(0.5)(), expected)


def test_the_block_of_both_lags_is_psd():
    factor = FullyConnectedMultiKF([[torch.randn(12, 3)]], 4, True)
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    C = factor.make_covariance_update_op(0.0)()
    lag = factor.get_cov_dt1()
    both = torch.cat([torch.cat([C, lag], 1), torch.cat([lag.T, C], 1)])
    assert torch.linalg.eigvalsh(both)[0] > -1e-12


def test_one_use_has_no_lag():
    factor = FullyConnectedMultiKF([[X]], 1)
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    factor.make_covariance_update_op(0.0)()
    close(factor.get_cov_dt1(), torch.zeros(2, 2))


def test_the_lag_is_asked_for_before_or_after_instantiating():
    factor = FullyConnectedMultiKF([[X]], 3)
    factor.instantiate_cov_variables()
    factor.register_option1quants(0.1)
    factor.register_cov_dt1()
    factor.make_covariance_update_op(0.0)()
    close(factor.get_cov_dt1(), C1)
    assert factor.get_cov_var().data_ptr() == factor.get_cov().data_ptr()


# The two options.


def lower_root(C, damping):
    e, V = torch.linalg.eigh(torch.tensor(C) + damping * torch.eye(len(C)))
    return (V * e**-0.5) @ V.T


def test_quants():
    """Against their definitions, on the non-symmetric oracle."""
    lag0, lag1 = [[2, 0.3], [0.3, 1]], [[0.8, 0.1], [0.2, 0.3]]
    factor = with_covs(lag0, lag1, 0.1)
    H, C = lower_root(lag0, 0.1), torch.tensor(lag1)
    L, psi = factor.get_option1quants(0.1)
    damped = torch.tensor(lag0) + 0.1 * torch.eye(2)
    close(L @ L.T, torch.linalg.inv(damped))
    close(L @ torch.diag(psi) @ L.T, H @ H @ (C + C.T) / 2 @ H @ H)
    P, K, mu = factor.get_option2quants(0.1)
    close(P, C.T @ torch.linalg.inv(damped))
    close(K @ K.T, torch.linalg.inv(damped))
    close(K @ torch.diag(mu) @ K.T, H @ (H @ C @ H).T @ (H @ C @ H) @ H)


def test_a_negative_correlation_keeps_its_sign():
    factor = with_covs([[2.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 0.5]], 0.0)
    close(factor.get_option1quants(0.0)[1], [-0.5, 0.5])
    close(factor.get_option2quants(0.0)[2], [0.25, 0.25])


def test_option_2_does_not_see_the_symmetrised_lag():
    alone = FullyConnectedMultiKF([[X]], 3)
    alone.register_option2quants(0.1)
    both = FullyConnectedMultiKF([[X]], 3)
    both.register_option1quants(0.1)
    both.register_option2quants(0.1)
    for factor in (alone, both):
        factor.instantiate_cov_variables()
        factor.instantiate_inv_variables()
        factor.make_covariance_update_op(0.0)()
        for op in factor.make_inverse_update_ops():
            op()
    for a, b in zip(alone.get_option2quants(0.1), both.get_option2quants(0.1), strict=True):
        assert torch.equal(a, b)
    close(both.get_cov_dt1(), C1)


def test_quants_are_stored_and_saved(tmp_path):
    a, b = (with_covs([[k]], [[0.5]], 0.0) for k in (1.0, 2.0))
    before = a.get_option1quants(0.0)[1].clone()
    a.accumulate(torch.tensor([[[4.0]], [[0.5]]]), 0.0)
    assert torch.equal(a.get_option1quants(0.0)[1], before)
    torch.save(a.state_dict(), tmp_path / "factor.pt")
    b.load_state_dict(torch.load(tmp_path / "factor.pt", weights_only=True))
    assert torch.equal(b.get_option1quants(0.0)[1], before)
    assert torch.equal(b.get_option2quants(0.0)[2], a.get_option2quants(0.0)[2])
    assert torch.equal(a.get_cov_dt1(), b.get_cov_dt1())
    refresh_inverses([b])
    close(b.get_option1quants(0.0)[1], [0.125])


def test_quants_beside_an_inverse_and_in_a_batch():
    factor = FullyConnectedMultiKF([[X]], 3)
    factor.register_inverse(0.1)
    factor.register_option1quants(0.1)
    other = FullyConnectedMultiKF([[X]], 3)
    other.register_inverse(0.1)
    for each in (factor, other):
        each.instantiate_cov_variables()
        each.instantiate_inv_variables()
        each.make_covariance_update_op(0.0)()
    refresh_inverses([factor, other])
    expected = torch.linalg.inv(torch.tensor(C0) + 0.1 * torch.eye(2))
    close(factor.get_inverse(0.1), expected)
    close(other.get_inverse(0.1), expected)
    L, _ = factor.get_option1quants(0.1)
    close(L @ L.T, expected)


# The series products.

ORACLES = [  # input C0, C1, damping; output likewise; T; gradient [in, out]; results
    (
        ([[2.0]], [[1.0]], 0.0),
        ([[1.0]], [[0.5]], 0.0),
        3,
        [[1.0]],
        [[4 / 33]],
        [[0.1]],
    ),
    (
        ([[2, 0.3], [0.3, 1]], [[0.8, 0.1], [0.2, 0.3]], 0.1),
        ([[1.5, -0.2], [-0.2, 1]], [[0.4, 0], [0.1, 0.2]], 0.2),
        5,
        [[1.0, 2.0], [3.0, 4.0]],
        [[0.0091053484, 0.0628073038], [0.3432319259, 0.5921310469]],
        [[0.0058209739, 0.0599686177], [0.3316951089, 0.5779865158]],
    ),
]


@pytest.mark.parametrize(("A", "G", "T", "gradient", "first", "second"), ORACLES)
def test_series_oracles(A, G, T, gradient, first, second):
    a, g, Z = with_covs(*A), with_covs(*G), torch.tensor(gradient).T
    (L_A, psi_A), (L_G, psi_G) = a.get_option1quants(A[2]), g.get_option1quants(G[2])
    product = series_option1_product(psi_G, L_G, psi_A, L_A, Z, T)
    close(product.T, first)
    quants_G, quants_A = g.get_option2quants(G[2]), a.get_option2quants(A[2])
    close(series_option2_product(quants_G, quants_A, Z, T).T, second)


def test_option_1_inverts_the_fisher_of_a_chain():
    """Σ_ts Ω_(t-s) ⊗ Γ_(t-s), with symmetric lags, summed up term by term."""
    T = 4
    A0 = torch.tensor([[2.0, 0.3], [0.3, 1.0]])
    A1 = torch.tensor([[0.8, 0.1], [0.1, -0.3]])
    G0 = torch.tensor([[1.5, -0.2], [-0.2, 1.0]])
    G1 = torch.tensor([[0.4, 0.1], [0.1, 0.2]])

    def at_lag(C, lag, d):
        return torch.linalg.matrix_power(lag @ torch.linalg.inv(C), d) @ C

    lags = [abs(t - s) for t in range(T) for s in range(T)]
    fisher = sum(torch.kron(at_lag(G0, G1, d), at_lag(A0, A1, d)) for d in lags)
    a = with_covs(A0.tolist(), A1.tolist(), 0.0)
    g = with_covs(G0.tolist(), G1.tolist(), 0.0)
    (L_A, psi_A), (L_G, psi_G) = a.get_option1quants(0.0), g.get_option1quants(0.0)
    Z = torch.randn(2, 2)
    product = series_option1_product(psi_G, L_G, psi_A, L_A, Z, T)
    close(product.flatten(), torch.linalg.solve(fisher, Z.flatten()))


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 28])
def test_gamma_is_its_sum(T):
    x = torch.tensor([-1.0, -0.9, -0.5, 0.0, 0.3, 0.999999999, 1.0])
    expected = sum((T - abs(d)) * x ** abs(d) for d in range(1 - T, T))
    close(inverse_gamma(x, T), expected)
    assert inverse_gamma(torch.tensor(1.0), T).item() == T**2
    assert inverse_gamma(torch.tensor(0.0), T).item() == T


def test_full_correlation_does_not_divide_by_zero():
    one, Z = torch.ones(1), torch.ones(1, 1)
    for sign, expected in ((1.0, 1 / 16), (-1.0, 1 / 4)):
        product = series_option1_product(sign * one, Z, one, Z, Z, 4)
        close(product, [[expected]])
    quants = (torch.zeros(1, 1), Z, one)
    close(series_option2_product(quants, quants, Z, 4), [[0.25]])


# Errors.


def registered_late():
    factor = FullyConnectedMultiKF([[X]], 3, name="rnn")
    factor.instantiate_cov_variables()
    factor.make_covariance_update_op(0.0)()
    factor.register_option1quants(0.1)


def without_uses():
    factor = FullyConnectedMultiKF([[X]], name="rnn")
    factor.register_cov_dt1()
    factor.instantiate_cov_variables()
    factor.make_covariance_update_op(0.0)()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (registered_late, RuntimeError, "rnn: .*before the first update"),
        (without_uses, ValueError, "rnn: one tensor of all uses: give num_uses="),
        (
            lambda: FullyConnectedMultiKF([[X]], 3, name="rnn").get_cov_dt1(),
            RuntimeError,
            r"rnn: no covariance of lag 1 is kept; call register_cov_dt1\(\)",
        ),
        (
            lambda: with_covs([[1.0]], [[0.5]], 0.1).get_option1quants(0.2),
            KeyError,
            r"rnn: option 1 with this damping is not registered; call register_option1q",
        ),
        (
            lambda: with_covs([[0.0]], [[0.0]], 0.0),
            torch.linalg.LinAlgError,
            "rnn is singular",
        ),
        (
            lambda: FullyConnectedMultiKF([[X]], 4, name="rnn"),
            ValueError,
            r"rnn: expected 4 uses in the leading dimension.*\(6, 2\)",
        ),
        (
            lambda: FullyConnectedMultiKF([[X]], 0, name="rnn"),
            ValueError,
            "rnn: num_uses: expected at least 1, got 0",
        ),
        (
            lambda: FullyConnectedMultiKF([[[X, X[:4]]]], name="rnn"),
            ValueError,
            r"rnn: uses of different shape: \(6, 2\) and \(4, 2\)",
        ),
        (
            lambda: FullyConnectedMultiKF([[lambda: X]], name="rnn"),
            ValueError,
            "rnn: expected tensors of two dimensions or more, or their size",
        ),
        (
            lambda: DiagonalMultiKF([[X]], 4, name="rnn"),
            ValueError,
            r"rnn: expected 4 uses.*\(6, 2\)",
        ),
        (
            lambda: ConvOutputMultiKF([[X.view(6, 2, 1)]], 3, "CHW", name="rnn"),
            ValueError,
            "rnn: data_format: expected one of",
        ),
        (
            lambda: ConvInputMultiKF([X.view(6, 2, 1)], [3, 1, 1], "VALID", 3, name="rnn"),
            ValueError,
            "rnn: kernel larger than the padded input",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
