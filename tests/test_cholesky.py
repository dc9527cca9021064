"""Cholesky factors of a damped factor: values, products, sharing, failures."""

import pytest
import torch

from kfac_torch.fisher_factors import (
    DenseSquareMatrixFactor,
    FullyConnectedKroneckerFactor,
    InverseProvidingFactor,
    compute_cov,
    refresh_inverses,
)

pytestmark = pytest.mark.usefixtures("float64")


def with_cov(cov, name="fc"):
    factor = FullyConnectedKroneckerFactor([[torch.zeros(1, len(cov))]], name=name)
    factor.instantiate_cov_variables()
    factor.accumulate(cov, 0.0)
    return factor


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def registered(cov, damping=0.3, **kwargs):
    factor = with_cov(cov, **kwargs)
    factor.register_cholesky(damping)
    factor.register_cholesky_inverse(damping)
    factor.instantiate_inv_variables()
    return factor


def test_the_later_name():
    assert DenseSquareMatrixFactor is InverseProvidingFactor


@pytest.mark.parametrize("by_ops", [False, True])
@pytest.mark.parametrize("powers", [(), (-1,), (-1, -0.5)])
def test_values(by_ops, powers):
    """Beside an inverse (shared factorisation), and beside an eigendecomposition."""
    C = compute_cov(torch.randn(9, 4))
    factor = with_cov(C)
    factor.register_cholesky(0.3)
    factor.register_cholesky_inverse(0.3)
    for exp in powers:
        factor.register_matpower(exp, 0.3)
    factor.instantiate_inv_variables()
    if by_ops:
        ops = factor.make_inverse_update_ops()
        assert len(ops) == (2 if len(powers) == 2 else 1)
        for op in ops:
            op()
    else:
        refresh_inverses([factor])
    damped = C + 0.3 * torch.eye(4)
    L, inverse = factor.get_cholesky(0.3), factor.get_cholesky_inverse(0.3)
    close(L @ L.T, damped)
    assert torch.equal(L, L.tril())
    close(inverse @ L, torch.eye(4))
    close(inverse.T @ inverse, torch.linalg.inv(damped))
    if powers:
        close(factor.get_inverse(0.3), torch.linalg.inv(damped))


def test_products():
    factor = registered(compute_cov(torch.randn(9, 4)))
    refresh_inverses([factor])
    L, inverse = factor.get_cholesky(0.3), factor.get_cholesky_inverse(0.3)
    x = torch.randn(4, 3)
    for transpose in (False, True):
        for matrix, kind in ((L, "cholesky"), (inverse, "cholesky_inverse")):
            matrix = matrix.T if transpose else matrix
            left = getattr(factor, f"left_multiply_{kind}")
            right = getattr(factor, f"right_multiply_{kind}")
            close(left(x, 0.3, transpose), matrix @ x)
            close(right(x.T, 0.3, transpose), x.T @ matrix)


def test_batches_and_dampings():
    covs = [compute_cov(torch.randn(9, n)) for n in (3, 3, 2, 3)]
    factors = [registered(cov, 0.1 * (i + 1)) for i, cov in enumerate(covs)]
    factors[3].register_inverse(0.1 * 4)
    factors[3].register_cholesky(2.0)
    factors[3].instantiate_inv_variables()
    refresh_inverses(factors)
    for i, (factor, cov) in enumerate(zip(factors, covs, strict=True)):
        damped = cov + 0.1 * (i + 1) * torch.eye(len(cov))
        close(factor.get_cholesky(0.1 * (i + 1)), torch.linalg.cholesky(damped))
    close(factors[3].get_cholesky(2.0), torch.linalg.cholesky(covs[3] + 2 * torch.eye(3)))


def test_state(tmp_path):
    a, b = (registered(torch.eye(2) * k) for k in (2.0, 3.0))
    refresh_inverses([a])
    torch.save(a.state_dict(), tmp_path / "factor.pt")
    b.load_state_dict(torch.load(tmp_path / "factor.pt", weights_only=True))
    assert torch.equal(a.get_cholesky(0.3), b.get_cholesky(0.3))
    assert torch.equal(a.get_cholesky_inverse(0.3), b.get_cholesky_inverse(0.3))
    with pytest.raises(ValueError, match=r"powers \[\].*got \['cholesky', 'cholesky_inv"):
        with_cov(torch.eye(2)).load_state_dict(a.state_dict())


def test_errors():
    factor = with_cov(torch.eye(2))
    with pytest.raises(KeyError, match=r"fc: the Cholesky factor .*register_cholesky\("):
        factor.get_cholesky(0.1)
    with pytest.raises(KeyError, match=r"the inverse Chol.*register_cholesky_inverse\("):
        factor.get_cholesky_inverse(0.1)
    factor.register_cholesky(0.1)
    with pytest.raises(RuntimeError, match=r"fc: the Cholesky factor has not been"):
        factor.left_multiply_cholesky(torch.eye(2), 0.1)
    with pytest.raises(ValueError, match=r"_cholesky: .*\[k, 2\], got \(2, 3\)"):
        factor.right_multiply_cholesky(torch.zeros(2, 3), 0.1)
    sparse = torch.eye(2).to_sparse(1)
    with pytest.raises(ValueError, match=r"_cholesky_inverse: .*dense x, got"):
        factor.right_multiply_cholesky_inverse(sparse, 0.1)


def test_a_singular_factor_is_named_and_keeps_its_old_value():
    good, bad = (registered(torch.eye(2), 0.0, name=name) for name in ("good", "bad"))
    refresh_inverses([good, bad])
    good.get_cov_var().mul_(4)
    bad.get_cov_var().fill_(1.0)
    with pytest.raises(torch.linalg.LinAlgError, match=r"bad.*singular.*larger damping"):
        refresh_inverses([good, bad])
    for factor in (good, bad):
        close(factor.get_cholesky(0.0), torch.eye(2))
