import math

import pytest
import torch

from kfac_torch.linalg import (
    JITTERS,
    DampedCholesky,
    NotFiniteError,
    Rescue,
    psd_cholesky,
    psd_eigh,
    psd_inverse,
    psd_power,
    rescued_power,
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


# The ladder.


def indefinite(least):
    V = torch.linalg.qr(torch.randn(4, 4)).Q
    return V, symmetrize(V @ torch.diag(torch.tensor([least, 1.0, 2.0, 3.0])) @ V.T)


@pytest.mark.parametrize(
    ("least", "multiple"), [(-1e-9, 1e-8), (-1e-7, 1e-6), (-1e-5, 1e-4)]
)
def test_jitter_is_the_smallest_that_holds(least, multiple):
    assert multiple in JITTERS
    _, C = indefinite(least)
    jitter = multiple * C.diagonal().mean()
    cholesky = DampedCholesky(torch.stack([torch.eye(4), C]), 1e-12)
    rescue = cholesky.rescues[1]
    assert set(cholesky.rescues) == {1}
    assert rescue == Rescue("jitter", pytest.approx(jitter.item(), rel=1e-12))
    expected = torch.linalg.inv(C + (1e-12 + jitter) * torch.eye(4))
    torch.testing.assert_close(cholesky.inverse()[1], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(cholesky.inverse()[0], torch.eye(4) / (1 + 1e-12))


def test_eigenvalues_are_clamped_where_no_jitter_holds():
    V, C = indefinite(-0.1)
    cholesky = DampedCholesky(C, 0.01)
    assert cholesky.rescues == {0: Rescue("clamped")}
    e = torch.tensor([0.01, 1.01, 2.01, 3.01])
    torch.testing.assert_close(cholesky.inverse(), V @ torch.diag(1 / e) @ V.T)
    L = cholesky.lower()
    assert torch.equal(L, L.tril())
    assert (L.diagonal() > 0).all()
    torch.testing.assert_close(L @ L.T, V @ torch.diag(e) @ V.T)


def test_one_bad_matrix_does_not_fail_its_batch():
    C = random_psd(4)
    C[2, 0, 3] = math.nan  # above the diagonal, where no factorisation looks
    C[3].fill_(math.inf)
    cholesky = DampedCholesky(C, 0.1, list("abcd"), partial=True)
    expected = torch.linalg.inv(C[:2] + 0.1 * torch.eye(5))
    torch.testing.assert_close(cholesky.inverse()[:2], expected)
    assert sorted(cholesky.failures) == [2, 3]
    assert isinstance(cholesky.failures[2], NotFiniteError)
    with pytest.raises(NotFiniteError, match="matrix c has NaN or Inf"):
        DampedCholesky(C, 0.1, list("abcd"))


def test_an_inverse_beyond_float32_is_no_inverse():
    C = torch.zeros(2, 2, dtype=torch.float32)
    with pytest.raises(torch.linalg.LinAlgError, match=r"singular.*damping 1e-39"):
        DampedCholesky(C, 1e-39)


def test_without_a_damping_there_is_no_rescue_but_float64():
    for least in (-1e-9, -0.1, 0.0):
        with pytest.raises(torch.linalg.LinAlgError, match=r"singular.*condition"):
            DampedCholesky(indefinite(least)[1], 0.0)


@pytest.mark.parametrize(("damping", "rung"), [(1e-9, "float64"), (1e-30, "clamped")])
def test_a_power_of_a_singular_matrix(damping, rung):
    C = torch.ones(2, 2, dtype=torch.float32)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        psd_power(*psd_eigh(C), -1, damping)
    power, rescue = rescued_power(C, -1, damping)
    assert rescue == Rescue(rung)
    assert power.dtype == torch.float32
    floor = max(damping, 2 * torch.finfo(torch.float64).eps * 2)
    trace = torch.tensor(1 / floor, dtype=torch.float32)
    torch.testing.assert_close(power.trace(), trace, rtol=1e-5, atol=0)


@pytest.mark.parametrize("raises", [True, False], ids=["an error", "NaN"])
def test_an_eigendecomposition_that_fails_is_done_matrix_by_matrix(raises, monkeypatch):
    C, eigh = random_psd(3).float(), torch.linalg.eigh

    def fail(M):
        e, V = eigh(M)
        if M.dtype == torch.float32:
            if raises:
                raise torch.linalg.LinAlgError("no")
            V[..., 1] = math.nan
        return e, V

    expected = eigh(C)[0]
    monkeypatch.setattr("torch.linalg.eigh", fail)
    e, V = psd_eigh(C)
    torch.testing.assert_close(e, expected)
    torch.testing.assert_close((V * e.unsqueeze(-2)) @ V.mT, C)
    C[1, 0, 2] = math.nan
    if raises:
        with pytest.raises(NotFiniteError, match="fc has NaN"):
            psd_eigh(C, name="fc")
    else:
        assert psd_eigh(C)[1].isfinite().flatten(1).all(1).tolist() == [True, False, True]


def test_an_eigendecomposition_that_float64_does_not_give_either(monkeypatch):
    nans = (torch.full((2,), math.nan), torch.full((2, 2), math.nan))
    monkeypatch.setattr("torch.linalg.eigh", lambda M: tuple(x.clone() for x in nans))
    with pytest.raises(torch.linalg.LinAlgError, match=r"fc \(2x2\) is finite") as caught:
        psd_eigh(torch.eye(2), name="fc")
    assert not isinstance(caught.value, NotFiniteError)


def test_an_eigendecomposition_with_subnormal_rows():
    """Of one that a running moment decays to when units die, LAPACK may make NaN."""
    C = random_psd(100, n=4).float()
    C[:, 2:] *= 1e-44
    C = C.tril() + C.tril(-1).mT
    e, V = psd_eigh(C)
    torch.testing.assert_close(e, torch.linalg.eigvalsh(C.double()).float())
    eye = torch.eye(4, dtype=torch.float32).expand(100, 4, 4)
    torch.testing.assert_close(V.mT @ V, eye)
    torch.testing.assert_close((V * e.unsqueeze(-2)) @ V.mT, C)
