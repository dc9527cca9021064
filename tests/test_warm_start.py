"""Bases of EKFAC that are turned by a step of orthogonal iteration."""

import copy
import io

import pytest
import torch
from dense_fisher import dense_fisher
from refresh_cases import Tokens
from torch.nn.functional import cross_entropy

from kfac_torch import KFAC, Refresh
from kfac_torch.fisher_blocks.kronecker import KroneckerProductFB
from kfac_torch.linalg import diagonal_in_basis, orthogonal_iteration, psd_eigh

pytestmark = pytest.mark.usefixtures("float64")


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n)).Q


def with_eigenvalues(values):
    V = orthogonal(len(values))
    return (V * values) @ V.mT, V


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# One step.


def test_a_step_by_hand():
    """The span of the first k columns is C times that of the old ones, for every k."""
    C, _ = with_eigenvalues(torch.tensor([0.5, 1.0, 3.0, 7.0]))
    Q = orthogonal(4)
    new = orthogonal_iteration(C, Q).flip(-1)
    order = (Q.mT @ C @ Q).diagonal().argsort(descending=True)
    R = new.mT @ C @ Q[:, order]
    close(R, R.triu())
    assert (R.diagonal() > 0).all()
    close(new @ R, C @ Q[:, order])


def test_it_converges_to_the_eigenvectors():
    C, _ = with_eigenvalues(2.0 ** torch.arange(8))
    Q = orthogonal(8)
    e, V = psd_eigh(C)
    shares = []
    for _ in range(60):
        M = (Q.mT @ V).abs()
        shares.append((M - torch.eye(8)).abs().max())
        Q = orthogonal_iteration(C, Q)
    close((Q.mT @ V).abs(), torch.eye(8), 1e-10)
    close((Q.mT @ C @ Q).diagonal(), e, 1e-10)
    for first, second in ((20, 25), (25, 30)):  # by the ratio of neighbours, 1/2
        assert 2**4 < shares[first] / shares[second] < 2**6


@pytest.mark.parametrize("descending", [False, True])
def test_a_basis_of_eigenvectors_stays(descending):
    C, V = with_eigenvalues(torch.tensor([0.1, 0.7, 2.0, 5.0, 11.0]))
    Q = V.flip(-1) if descending else V
    close(orthogonal_iteration(C, Q), V)
    close(orthogonal_iteration(C, -Q), -V)  # each keeps its sign


@pytest.mark.parametrize("rank", [0, 3, 40])
def test_it_is_orthogonal_and_in_order(rank):
    x = torch.randn(rank, 40)
    C = x.mT @ x
    Q = orthogonal(40)
    for _ in range(5):
        Q = orthogonal_iteration(C, Q)
        close(Q.mT @ Q, torch.eye(40))
    for _ in range(300):
        Q = orthogonal_iteration(C, Q)
    a = (Q.mT @ C @ Q).diagonal()
    assert (a.diff() > -1e-9).all()


def test_of_a_stack_each_by_itself():
    x, Q = torch.randn(3, 9, 6), torch.stack([orthogonal(6) for _ in range(3)])
    C = x.mT @ x
    new = orthogonal_iteration(C, Q)
    for i in range(3):
        close(new[i], orthogonal_iteration(C[i], Q[i]))


def test_a_nan_is_seen():
    C = torch.eye(3)
    C[2, 1] = torch.nan
    assert not orthogonal_iteration(C, torch.eye(3)).isfinite().all()


def test_in_float32():
    C, _ = with_eigenvalues(torch.logspace(-9, 1, 30))
    Q = orthogonal(30).float()
    for _ in range(10):
        Q = orthogonal_iteration(C.float(), Q)
        assert Q.dtype == torch.float32
        close(Q.mT @ Q, torch.eye(30, dtype=torch.float32), 1e-5)


# Inside an optimizer.


def make(model, refresh, **options):
    options = {"lr": 0.05, "damping": 0.1, "cov_update_every": 1, **options}
    return KFAC(model, "categorical", approx="ekfac", invert_every=refresh, **options)


def batches(number, size=30):
    return [(torch.randn(size, 4, 6), torch.randint(3, (size,))) for _ in range(number)]


def step(model, optimizer, batch):
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def test_a_refresh_turns_the_basis_and_brings_the_scales_to_it():
    model, data = Tokens(), batches(4)
    optimizer = make(model, Refresh(every=10, warm_start=True))
    for batch in data:
        step(model, optimizer, batch)
    for block in optimizer.estimator.blocks.values():
        A, G, scales = block.factors
        old_A, old_G = (Q.clone() for Q in scales.basis)
        S = scales.get_cov_var().clone()
        optimizer.estimator.update_inverses([block.name])
        Q_A, Q_G = scales.basis
        assert torch.equal(Q_A, orthogonal_iteration(A.get_cov(), old_A))
        assert torch.equal(Q_G, orthogonal_iteration(G.get_cov(), old_G))
        left, right = (Q_A.mT @ old_A) ** 2, (Q_G.mT @ old_G) ** 2
        s_A, r_A = (diagonal_in_basis(A.get_cov(), Q) for Q in (Q_A, old_A))
        s_G, r_G = (diagonal_in_basis(G.get_cov(), Q) for Q in (Q_G, old_G))
        ratio = torch.outer(s_A, s_G) / torch.outer(left @ r_A, right @ r_G)
        close(scales.get_cov_var(), ratio * (left @ S @ right.mT))
        close(scales.diagonals[0], s_A)
        close(scales.diagonals[1], s_G)
    optimizer.close()


def test_the_first_basis_is_a_decomposition():
    model, data = Tokens(), batches(1)
    optimizer = make(model, Refresh(every=1, warm_start=True))
    step(model, optimizer, data[0])
    for block in optimizer.estimator.blocks.values():
        A, G, scales = block.factors
        for side, Q in zip((A, G), scales.basis, strict=True):
            assert torch.equal(Q, psd_eigh(side.get_cov())[1])
    optimizer.close()


def test_a_tolerance_says_whether_anything_is_done():
    model, data = Tokens(), batches(6)
    optimizer = make(model, Refresh(every=1, warm_start=True, basis_tolerance=10.0))
    step(model, optimizer, data[0])
    scales = [b.factors[2] for b in optimizer.estimator.blocks.values()]
    first = [Q.clone() for s in scales for Q in s.basis]
    for batch in data[1:]:
        step(model, optimizer, batch)
    assert all(map(torch.equal, first, [Q for s in scales for Q in s.basis]))
    for s in scales:
        s.tolerance = 1e-9
    old = [Q.clone() for Q in scales[0].basis]
    optimizer.estimator.update_inverses()
    A, G, _ = optimizer.estimator.blocks["first"].factors
    for side, Q, new in zip((A, G), old, scales[0].basis, strict=True):
        assert torch.equal(new, orthogonal_iteration(side.get_cov(), Q))
    optimizer.close()


def test_on_factors_that_stay_the_bases_become_the_eigenbases():
    """And the blocks those of decompositions: of all in that form the nearest."""
    model, data = Tokens(), batches(5)
    optimizer = make(model, Refresh(every=10**6, warm_start=True), lr=0.0)
    for batch in data:
        step(model, optimizer, batch)
    block = optimizer.estimator.blocks["second"]
    A, G, scales = block.factors
    before = [Q.clone() for Q in scales.basis]
    for _ in range(3000):
        optimizer.estimator.update_inverses(["second"])
    for side, Q, old in zip((A, G), scales.basis, before, strict=True):
        M = Q.mT @ side.get_cov() @ Q
        close(M, torch.diag(M.diagonal()), 1e-12)
        assert (Q - old).abs().max() > 1e-3
    optimizer.close()


def test_nearer_to_the_fisher_than_kfac():
    """In the Frobenius norm, all blocks together, on data that come again and again."""
    model, (x, y) = Tokens(), batches(1)[0]
    refresh = Refresh(every=2, warm_start=True)
    options = {"estimation_mode": "exact", "cov_ema_decay": 0.0}
    optimizer = make(model, refresh, **options)
    for _ in range(21):
        step(model, optimizer, (x, y))
    optimizer.param_groups[0]["lr"] = 0.0  # the statistics are of where the model stays
    step(model, optimizer, (x, y))  # no refresh: the scales are those of this step
    optimizer.close()
    ours, theirs, size = 0.0, 0.0, 0.0
    for block in optimizer.estimator.blocks.values():
        F = dense_fisher(model, x, optimizer.estimator.layers, block)
        size += F.norm() ** 2
        ours += (block.full_fisher_block() - F).norm() ** 2
        theirs += (KroneckerProductFB.full_fisher_block(block) - F).norm() ** 2
    assert ours < 0.9 * theirs < size


@pytest.mark.parametrize("background", [None, 2])
def test_resumed_bit_for_bit(background):
    refresh = Refresh(every=2, warm_start=True, background=background)
    data, start = batches(10), Tokens()
    model = copy.deepcopy(start)
    optimizer = make(model, refresh)
    states, ends = [], []
    for batch in data:
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        states.append(file.getvalue())
        step(model, optimizer, batch)
        ends.append([p.clone() for p in model.parameters()])
    for stop, saved in enumerate(states):
        twin = copy.deepcopy(start)
        resumed = make(twin, refresh)
        weights, state = torch.load(io.BytesIO(saved), weights_only=True)
        twin.load_state_dict(weights)
        resumed.load_state_dict(state)
        for number in range(stop, len(data)):
            step(twin, resumed, data[number])
            assert all(map(torch.equal, twin.parameters(), ends[number]))
        resumed.close()
    optimizer.close()
