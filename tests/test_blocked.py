"""Large matrices by halves: the same factor and inverse as torch's, in less memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kfac_torch import blocked, linalg
from kfac_torch.fisher_factors import FullyConnectedKroneckerFactor, refresh_inverses
from kfac_torch.linalg import DampedCholesky, Rescue


def psd(n):
    x = torch.randn(n + 3, n)
    return x.mT @ x / n


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("n", [1, 5, 256, 257, 600, 1030])
def test_exact(n):
    C = psd(n) + 0.1 * torch.eye(n)
    L, info = blocked.cholesky_in_place(C.clone())
    assert info == 0
    torch.testing.assert_close(L.tril(), torch.linalg.cholesky(C), rtol=0, atol=1e-13)
    out = torch.full((n, n), math.nan)
    blocked.inverse_of_cholesky(L, out)
    assert torch.equal(out, out.mT)
    torch.testing.assert_close(out @ C, torch.eye(n), rtol=0, atol=1e-10)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_as_accurate_as_torch_in_float32(condition):
    n = 520
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    e = torch.logspace(-math.log10(condition), 0, n, dtype=torch.float64)
    exact = ((Q / e) @ Q.mT).float()
    C = ((Q * e) @ Q.mT).float()
    C = (C + C.mT) / 2
    L, _ = blocked.cholesky_in_place(C.clone())
    out = torch.empty_like(C)
    blocked.inverse_of_cholesky(L, out)
    theirs = torch.cholesky_inverse(torch.linalg.cholesky(C))
    assert (out - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("at", [0, 300, 599])
def test_what_is_not_positive_definite_is_told(at):
    C = torch.eye(600)
    C[at, at] = -1.0
    assert blocked.cholesky_in_place(C)[1] > 0


@pytest.fixture
def everything_large(monkeypatch):
    monkeypatch.setattr(linalg, "LEAST_SIZE", 2)
    monkeypatch.setattr("kfac_torch.fisher_factors.cholesky_batch.BATCH_BYTES", 1)


@pytest.mark.usefixtures("float64", "everything_large")
def test_the_ladder_of_a_large_matrix():
    C = torch.stack([torch.ones(4, 4)])
    cholesky = DampedCholesky(C, 1e-20)
    assert cholesky.rescues[0].rung == "jitter"
    out = torch.empty(4, 4)
    DampedCholesky([C[0]], 1e-20).write_inverse([out])
    assert torch.equal(out, cholesky.inverse()[0])
    C[0, 0, 3] = math.nan
    assert set(DampedCholesky(C, 0.1, partial=True).failures) == {0}


def factor_of(cov, damping=0.1, name="fc"):
    factor = FullyConnectedKroneckerFactor([[torch.eye(len(cov))]], name=name)
    factor.instantiate_cov_variables()
    factor.get_cov_var().copy_(cov)
    factor.register_inverse(damping)
    factor.instantiate_inv_variables()
    return factor


def inverse_of(factor, damping=0.1):
    return torch.linalg.inv(factor.get_cov() + damping * torch.eye(factor.cov_dim))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("large", [False, True])
def test_refreshes_in_place_and_at_once_are_the_same(large, request):
    """The first refresh keeps all factorisations, the next ones none."""
    if large:
        request.getfixturevalue("everything_large")
    factors = [factor_of(psd(n)) for n in (3, 3, 2, 6, 3)]
    several = factor_of(psd(3), 0.3)
    several.register_inverse(0.1)
    several.register_cholesky(0.1)
    several.instantiate_inv_variables()
    for _ in range(2):
        refresh_inverses([*factors, several], max_kept=1)
        for factor in [*factors, several]:
            torch.testing.assert_close(factor.get_inverse(0.1), inverse_of(factor))
            factor.get_cov_var().add_(psd(factor.cov_dim))
        L = several.get_cholesky(0.1)
        assert torch.equal(L, L.tril())


@pytest.mark.usefixtures("float64", "everything_large")
def test_in_place_one_that_fails_keeps_its_own():
    good, bad, rescued = (factor_of(psd(3), 1e-18, name) for name in ("a", "b", "c"))
    refresh_inverses([good, bad, rescued], max_kept=2)
    old = bad.get_inverse(1e-18).clone()
    bad.get_cov_var()[0, 2] = math.nan
    rescued.get_cov_var().fill_(1.0)
    good.get_cov_var().copy_(2 * torch.eye(3))
    for number in (1, 2):
        failed = refresh_inverses([good, bad, rescued], max_kept=2)
        assert list(failed) == [bad]
        assert torch.equal(bad.get_inverse(1e-18), old)
        torch.testing.assert_close(good.get_inverse(1e-18), torch.eye(3) / 2)
        assert bad.health.kept_in_a_row == number
        [rescue] = rescued.health.last_rescues
        assert rescue == Rescue("jitter", pytest.approx(1e-8))
    good.get_cov_var().mul_(2)
    with pytest.raises(torch.linalg.LinAlgError, match=r"b has NaN.*kept for 2 refreshes"):
        refresh_inverses([good, bad, rescued], max_kept=2)
    torch.testing.assert_close(good.get_inverse(1e-18), torch.eye(3) / 2)


class Large(TorchDispatchMode):
    """The storages of at least so many entries that operations return."""

    def __init__(self, entries):
        super().__init__()
        self.entries, self.seen = entries, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.entries * tensor.element_size():
                    self.seen[storage._cdata] = storage  # kept alive: no number twice
        return result


@pytest.mark.usefixtures("everything_large")
def test_a_refresh_makes_one_matrix_for_all_factors():
    n = 300
    factors = [factor_of(psd(n)) for _ in range(6)]
    refresh_inverses(factors, max_kept=1)
    known = [t for f in factors for t in (f.get_cov_var(), f.get_inverse(0.1))]
    with Large(n * n) as large:
        refresh_inverses(factors, max_kept=1)
    own = {tensor.untyped_storage()._cdata for tensor in known}
    assert len(large.seen.keys() - own) == 1
