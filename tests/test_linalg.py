import pytest
import torch

from kfac_torch.linalg import (
    DampedCholesky,
    psd_cholesky,
    psd_eigh,
    psd_inverse,
    psd_power,
    symmetrize,
)

pytestmark = pytest.mark.usefixtures("float64")


def random_psd(*shape, n=5):
    x = torch.randn(*shape, 2 * n, n)
    return x.mT @ x / (2 * n)


def test_symmetrize():
    C = torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    assert symmetrize(C).tolist() == [[1.0, 3.0], [3.0, 3.0]]


def test_inverse_in_a_batch_with_a_damping_each():
    C, damping = random_psd(3), torch.tensor([0.1, 0.0, 2.0])
    for i in range(3):
        expected = torch.linalg.inv(C[i] + damping[i] * torch.eye(5))
        torch.testing.assert_close(psd_inverse(C, damping)[i], expected)


@pytest.mark.parametrize("exp", [-1.0, -0.5, 0.5, 2.0])
def test_power(exp):
    C = random_psd()
    e, V = torch.linalg.eigh(C + 0.3 * torch.eye(5))
    expected = V @ torch.diag(e**exp) @ V.T
    torch.testing.assert_close(psd_power(*psd_eigh(C), exp, 0.3), expected)


def test_power_oracle():
    e, V = psd_eigh(torch.tensor([[6.0, 2.0], [2.0, 4.0]]))
    expected = torch.tensor([[0.4131489854, -0.0867510095], [-0.0867510095, 0.4998999949]])
    torch.testing.assert_close(psd_power(e, V, -0.5, 0.5), expected, rtol=0, atol=1e-10)


def test_eigenvalues_are_clipped_before_damping():
    e, V = psd_eigh(torch.diag(torch.tensor([-0.5, 2.0])), floor=0.0)
    assert e.tolist() == [0.0, 2.0]
    expected = torch.diag(torch.tensor([10.0, 1 / 2.1]))
    torch.testing.assert_close(psd_power(e, V, -1, 0.1), expected)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_singular_matrix_is_named(rank):
    x = torch.randn(rank, 4)
    with pytest.raises(torch.linalg.LinAlgError, match=r"conv1\.input.*singular.*damping"):
        psd_inverse(torch.stack([torch.eye(4), x.T @ x]), 0.0, ["fc", "conv1.input"])


def test_a_negative_power_of_a_singular_matrix_is_named():
    with pytest.raises(torch.linalg.LinAlgError, match="fc is singular"):
        psd_power(*psd_eigh(torch.zeros(2, 2)), -0.5, 0.0, "fc")


def test_nan_is_told_from_singular():
    C = torch.full((2, 2), torch.nan)
    with pytest.raises(torch.linalg.LinAlgError, match="NaN or Inf"):
        psd_inverse(C)


def test_float32_failures_are_retried_in_float64():
    V = torch.linalg.qr(torch.randn(4, 4)).Q.float()
    C = torch.eye(4, dtype=torch.float32)
    C[:2, :2] = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-23]])  # pivot 2^-23 at index 1
    batch = torch.stack([C, symmetrize(V @ V.T)])
    inverse = psd_inverse(batch)
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse, torch.linalg.inv(batch.double()).float())


def test_cholesky_in_a_batch():
    C, damping = random_psd(3), torch.tensor([0.1, 0.0, 2.0])
    L = psd_cholesky(C, damping)
    assert torch.equal(L, L.tril())
    torch.testing.assert_close(L @ L.mT, C + damping[:, None, None] * torch.eye(5))
    torch.testing.assert_close(
        DampedCholesky(C, damping).lower_inverse(), torch.linalg.inv(L)
    )
    with pytest.raises(torch.linalg.LinAlgError, match=r"b .*singular"):
        psd_cholesky(torch.stack([torch.eye(2), torch.ones(2, 2)]), 0.0, ["a", "b"])


def test_cholesky_factors_that_need_float64():
    C = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-23]], dtype=torch.float32)
    batch = torch.stack([C, torch.eye(2, dtype=torch.float32)])
    exact = torch.linalg.cholesky(batch.double())
    factors = DampedCholesky(batch)
    assert torch.equal(factors.lower(), exact.float())
    torch.testing.assert_close(factors.lower_inverse(), torch.linalg.inv(exact).float())
    assert factors.lower().dtype == torch.float32
