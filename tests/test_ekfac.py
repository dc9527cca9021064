"""EKFAC against the dense Fisher: the right eigenvalues in K-FAC's eigenbasis.

A layer is a row of `NETS`. With a fresh basis and scales of the same batch the block is
`Q diag(Qᵀ F Q) Qᵀ`, `F` the exact one by Jacobians.
"""

import pytest
import torch
from dense_fisher import dense_fisher
from torch import nn

from kfac_torch import KFAC, fisher_blocks as fb
from kfac_torch.curvature_check import check_curvature
from kfac_torch.estimator import FisherEstimator
from kfac_torch.fisher_blocks.kronecker import KroneckerProductFB
from kfac_torch.fisher_factors import FactorOptions, eigen_scales, refresh_inverses
from kfac_torch.layer_collection import LayerCollection
from kfac_torch.size_limit import SizeLimit

float64 = pytest.mark.usefixtures("float64")


class Pool(nn.Module):
    """The mean over all positions."""

    def forward(self, x):
        return x.flatten(1, -2).mean(1)


class First(nn.Module):
    """A layer that returns a tuple, of which the first is taken; positions averaged."""

    def __init__(self, layer, batch_dim=0):
        super().__init__()
        self.layer, self.batch_dim = layer, batch_dim
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = x if self.batch_dim == 0 else x.transpose(0, 1)
        args = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
        out = self.layer(*args)[0]
        return self.head((out if self.batch_dim == 0 else out.transpose(0, 1)).mean(1))


class Several(nn.Module):
    """One layer, called several times, on inputs of several lengths."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 2)

    def forward(self, x):
        x = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        x = x if x.dim() == 3 else x.flatten(2).mT
        return self.head(x.mean(1))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x.transpose(0, 1))).mean(0))


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with its weight `[in, out]`."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def conv_net(conv):
    return nn.Sequential(
        conv, nn.Tanh(), nn.Flatten(2), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Tanh(),
        nn.Linear(2 * conv.out_channels, 3)
    )  # fmt: skip


def mlp():
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def tokens_net():
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), Pool(), nn.Linear(4, 2)
    )


def deep_conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(),
        nn.Conv2d(3, 4, (2, 3), stride=(2, 1), bias=False), nn.Tanh(),
        nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)
    )  # fmt: skip


def autoencoder():
    return nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6))


CLASSES, REGRESSION, BITS = "categorical", "normal", "bernoulli"
NETS = {  # model, shape of the batch, loss
    "mlp": (mlp, (7, 3), CLASSES),
    "autoencoder": (autoencoder, (8, 6), BITS),
    "tokens, one loss": (tokens_net, (5, 4, 3), CLASSES),
    "tokens, one loss, many positions": (tokens_net, (3, 30, 3), REGRESSION),
    "tokens, a loss each": (mlp, (4, 5, 3), CLASSES),
    "tokens, two dimensions": (tokens_net, (3, 2, 2, 3), REGRESSION),
    "two convolutions": (deep_conv_net, (4, 2, 4, 5), CLASSES),
    "conv 1d, same": (
        lambda: conv_net(nn.Conv1d(2, 3, 4, padding="same", dilation=2)),
        (3, 2, 7), CLASSES,
    ),
    "conv 2d, circular": (
        lambda: conv_net(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
        (3, 2, 4, 4), CLASSES,
    ),
    "conv 2d, groups": (
        lambda: conv_net(nn.Conv2d(4, 6, 2, groups=2, stride=2, padding=1)),
        (3, 4, 4, 5), REGRESSION,
    ),
    "conv 2d, depthwise": (
        lambda: conv_net(nn.Conv2d(3, 6, 2, groups=3, bias=False)), (3, 3, 3, 4), CLASSES,
    ),
    "conv 3d": (lambda: conv_net(nn.Conv3d(2, 4, 2)), (3, 2, 3, 2, 3), CLASSES),
    "conv, several calls": (
        lambda: Several(nn.Conv1d(3, 3, 3)), (4, 3, 7), CLASSES,
    ),
    "conv transpose": (
        lambda: conv_net(nn.ConvTranspose2d(2, 3, (3, 2), stride=2, padding=(1, 0))),
        (3, 2, 3, 2), CLASSES,
    ),
    "conv transpose, groups": (
        lambda: conv_net(nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2)),
        (3, 4, 4), CLASSES,
    ),
    "linear, several calls": (lambda: Several(nn.Linear(3, 3)), (4, 5, 3), CLASSES),
    "linear, transposed": (
        lambda: nn.Sequential(Conv1D(4, 3), nn.Tanh(), Pool(), nn.Linear(4, 2)),
        (4, 5, 3), CLASSES,
    ),
    "attention": (
        lambda: First(nn.MultiheadAttention(3, 1, batch_first=True)), (4, 3, 3), CLASSES,
    ),
    "attention, time first": (
        lambda: First(nn.MultiheadAttention(3, 3, kdim=3), 1), (4, 3, 3), CLASSES,
    ),
    "rnn": (lambda: First(nn.RNN(2, 3, batch_first=True)), (4, 3, 2), CLASSES),
    "lstm, time first": (lambda: First(nn.LSTM(2, 3), 1), (3, 4, 2), REGRESSION),
}  # fmt: skip


def registered(name, approx="ekfac"):
    make, shape, loss = NETS[name]
    torch.manual_seed(1)
    model, x = make(), torch.randn(shape)
    layers = LayerCollection(model)
    kinds = ("fully_connected", "conv2d", "conv_transpose", "depthwise_conv2d")
    for kind in (*kinds, "fully_connected_multi", "conv2d_multi"):
        layers.set_default_approximation(
            kind, approx.replace("kron", "kron_indep") if "multi" in kind else approx
        )
    for kind in ("attention", "recurrent"):
        layers.set_default_approximation(kind, approx)
    layers.auto_register_layers()
    {
        CLASSES: layers.register_categorical_predictive_distribution,
        REGRESSION: layers.register_normal_predictive_distribution,
        BITS: layers.register_multi_bernoulli_predictive_distribution,
    }[loss]()
    return model, x, layers


def gathered(model, x, layers, decay=0.0, damping=0.3):
    """An estimator with a basis of the batch and scales of it."""
    estimator = FisherEstimator(None, decay, damping, layers, estimation_mode="exact")
    for _ in range(2):
        for batch in x if isinstance(x, (list, tuple)) else [x]:
            model(batch)
        assert estimator.update_covariances() == []
        estimator.update_inverses()
    estimator.close()
    return estimator


def close(actual, expected, tol=1e-11):
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol * scale)


def stack(tensor):
    return tensor if tensor.dim() == 3 else tensor[None]


def eigenbasis(block):
    """`Q_A ⊗ Q_G` of every group, from the covariances alone."""
    A, G, _ = block.factors
    pairs = zip(stack(A.get_cov()), stack(G.get_cov()), strict=True)
    bases = [torch.kron(*(torch.linalg.eigh(C)[1] for C in pair)) for pair in pairs]
    return torch.block_diag(*bases)


def kfac_block(block):
    return KroneckerProductFB.full_fisher_block(block)


def added_to_kfac(block, damping):
    """`T (A + π√(λ/T)) ⊗ (G + √(λ/T)/π) − T A ⊗ G`, of every group."""
    A, G, _ = block.factors
    T, added = block.num_locations, []
    for a, g in zip(stack(A.get_cov()), stack(G.get_cov()), strict=True):
        pi = (a.diagonal().mean() / g.diagonal().mean()).sqrt()
        root = (damping / T) ** 0.5
        damped = a + pi * root * torch.eye(len(a)), g + root / pi * torch.eye(len(g))
        added.append(T * (torch.kron(*damped) - torch.kron(a, g)))
    return torch.block_diag(*added)


# The block.


@float64
@pytest.mark.parametrize("name", NETS)
def test_the_nearest_matrix_with_the_eigenvectors_of_kfac(name):
    model, x, layers = registered(name)
    exact = {n: dense_fisher(model, x, layers, b) for n, b in layers.blocks.items()}
    gathered(model, x, layers)
    strictly = 0
    for layer, block in layers.blocks.items():
        F, K = exact[layer], block.full_fisher_block()
        Q = eigenbasis(block)
        close(K, (Q * (Q.T @ F @ Q).diagonal()) @ Q.T)
        # Of groups the products between them are no part of either.
        close(K.trace(), F.trace())
        ours, theirs = (K - F).norm(), (kfac_block(block) - F).norm()
        assert ours <= theirs + 1e-11 * F.norm()
        strictly += bool(ours < 0.999 * theirs)
    assert strictly


@float64
def test_the_formula_for_one_position_by_hand():
    """`S = (a Q_A)²ᵀ (s Q_G)²/N`, its damping, and products with any power."""
    block = fb.FullyConnectedEKFACFB(nn.Linear(3, 2), "layer")
    block.instantiate_factors(0.2)
    a, s = torch.randn(6, 3), torch.randn(6, 2)
    for _ in range(2):
        block.accumulate(block.moments([a], [[s]], 6), 0.0)
        refresh_inverses(block.factors)
    a = torch.cat([a, torch.ones(6, 1)], 1)
    s_A, Q_A = torch.linalg.eigh(a.T @ a / 6)
    s_G, Q_G = torch.linalg.eigh(s.T @ s / 6)
    S = ((a @ Q_A) ** 2).T @ (s @ Q_G) ** 2 / 6
    pi = (s_A.mean() / s_G.mean()).sqrt()
    x, y = pi * 0.2**0.5, 0.2**0.5 / pi
    S_damped = S + torch.outer(s_A + x, s_G + y) - torch.outer(s_A, s_G)
    Q = torch.kron(Q_A, Q_G)
    V = torch.randn(4, 2)
    for exp in (-1, -0.5, 0.3, 1, 2):
        dense = (Q * S_damped.flatten() ** exp) @ Q.T
        close(block.multiply_matpower(V, exp), (dense @ V.flatten()).view(4, 2))
    close(block.full_fisher_block(), (Q * S.flatten()) @ Q.T)


@float64
@pytest.mark.parametrize("name", ["tokens, one loss", "two convolutions", "attention"])
def test_scales_in_pieces_are_those_in_one(name, monkeypatch):
    blocks = []
    for size in (None, 1):
        if size:
            monkeypatch.setattr(eigen_scales, "GRADIENT_BYTES", size)
            monkeypatch.setattr(
                "kfac_torch.fisher_factors.conv_diagonal.GRADIENT_BYTES", size
            )
        model, x, layers = registered(name)
        gathered(model, x, layers)
        blocks.append([b.full_fisher_block() for b in layers.get_blocks()])
    for one, other in zip(*blocks, strict=True):
        close(one, other)


@float64
@pytest.mark.parametrize("P", [1, 2, 40])
def test_rows_first_and_gradients_first_are_the_same(P):
    a, g = torch.randn(3, P, 4), torch.randn(2, 3, P, 3)
    Q_A, Q_G = (torch.linalg.qr(torch.randn(n, n))[0] for n in (5, 3))
    W = torch.cat([a, torch.ones(3, P, 1)], 2).mT @ g
    expected = (Q_A.T @ W @ Q_G).square().sum((0, 1))
    close(eigen_scales.squares_of_rows(a, g, Q_A, Q_G, True), expected)
    W = W.unsqueeze(2)
    close(eigen_scales.squares_of_gradients(W, Q_A[None], Q_G[None])[0], expected)


@float64
def test_the_time_dimension_is_none_of_examples():
    model, x = TimeFirst(), torch.randn(4, 5, 3)
    layers = LayerCollection(model)
    layers.register_fully_connected_multi(model.layer, "ekfac", time_dim=0)
    layers.register_normal_predictive_distribution()
    F = dense_fisher(model, x, layers, layers.blocks["layer"])
    gathered(model, x, layers)
    block = layers.blocks["layer"]
    Q = eigenbasis(block)
    close(block.full_fisher_block(), (Q * (Q.T @ F @ Q).diagonal()) @ Q.T)


@float64
def test_calls_without_examples_in_common_are_independent():
    """Steps of a packed sequence: fewer and fewer examples, each size by itself."""
    cell = nn.RNNCell(2, 3, bias=False)
    block = fb.LinearMapEKFACFB(fb.linear_parts(cell)[0], cell, "layer")
    block.instantiate_factors(0.1)
    calls = [torch.randn(n, 2) for n in (3, 3, 2)]
    grads = [torch.randn(n, 3) for n in (3, 3, 2)]
    for _ in range(2):
        block.accumulate(block.moments(calls, [grads], 3), 0.0)
        refresh_inverses(block.factors)
    Q_A, Q_G = block.factors[2].basis
    a, g = torch.stack(calls[:2], 1), torch.stack(grads[:2], 1)
    W = [*(a.mT @ g), *torch.einsum("ni,no->nio", calls[2], grads[2])]
    expected = sum((Q_A.T @ w @ Q_G) ** 2 for w in W) / 3
    close(block.num_locations * block.factors[2].get_cov_var(), expected)


@float64
def test_one_example_by_itself():
    """A layer called on a vector, as one of a batch of one."""
    x, g = torch.randn(3), torch.randn(2)
    blocks = []
    for lead in ((), (1,)):
        block = fb.FullyConnectedEKFACFB(nn.Linear(3, 2), "layer")
        block.instantiate_factors(0.1)
        for _ in range(2):
            moments = block.moments([x.expand(*lead, 3)], [[g.expand(*lead, 2)]], 1)
            block.accumulate(moments, 0.0)
            refresh_inverses(block.factors)
        blocks.append(block.full_fisher_block())
    close(*blocks)


# Before there is a basis, and from one to the next.


@float64
def test_kfac_until_there_is_a_basis():
    model, x, layers = registered("two convolutions")
    estimator = FisherEstimator(None, 0.9, 0.3, layers, estimation_mode="exact")
    model(x)
    estimator.update_covariances()
    for block in layers.get_blocks():
        K = kfac_block(block)
        V = torch.randn(block.factors[2].get_cov_var().shape)
        expected = ((K + added_to_kfac(block, 0.3)) @ V.flatten()).view(V.shape)
        close(block.full_fisher_block(), K)
        close(block.trace(), K.trace())
        close(block.multiply(V), expected)
        for early in (block.multiply_inverse, block.multiply_cholesky):
            with pytest.raises(RuntimeError, match=r"scales: there is no basis yet; call"):
                early(V)
    assert estimator.has_new_layers()
    estimator.update_inverses()
    assert not estimator.has_new_layers()
    for block in layers.get_blocks():
        close(block.full_fisher_block(), kfac_block(block))
    estimator.close()


def ready(groups=1):
    conv = nn.Conv1d(2 * groups, 3 * groups, 2, groups=groups)
    block = fb.ConvEKFACFB(conv, "layer")
    block.instantiate_factors(0.1)
    for _ in range(2):
        update(block)
        refresh_inverses(block.factors)
    return block


def batch(block, N=4):
    C, K = block.module.in_channels, block.module.out_channels
    return torch.randn(N, C, 5), torch.randn(N, K, 4)


def update(block, decay=0.8):
    x, g = batch(block)
    block.accumulate(block.moments([x], [[g]], len(x)), decay)


@float64
@pytest.mark.parametrize("groups", [1, 2])
def test_a_new_basis_carries_the_scales_over(groups):
    block = ready(groups)
    before = block.full_fisher_block()
    refresh_inverses(block.factors)  # of the same statistics
    close(block.full_fisher_block(), before)
    scales = block.factors[2]
    old = kron_of_bases(scales)
    move_the_factors(block)
    refresh_inverses(block.factors)
    Q, K = eigenbasis(block), kfac_block(block)
    assert (Q.T @ old).abs().amax(1).min() < 0.9
    # The diagonal of the old block in the new basis, beside that of K-FAC's.
    evened = (old * (old.T @ K @ old).diagonal()) @ old.T
    ratio = (Q.T @ before @ Q).diagonal() / (Q.T @ evened @ Q).diagonal()
    close(block.full_fisher_block(), (Q * ratio * (Q.T @ K @ Q).diagonal()) @ Q.T)
    assert scales.get_cov_var().min() >= 0


@float64
@pytest.mark.parametrize("groups", [1, 2])
def test_scales_that_are_those_of_kfac_stay_so_in_a_new_basis(groups):
    block = ready(groups)
    scales = block.factors[2]
    move_the_factors(block)
    diagonals = [
        (Q.mT @ side.get_cov() @ Q).diagonal(dim1=-2, dim2=-1)
        for Q, side in zip(scales.basis, block.factors[:2], strict=True)
    ]
    scales.get_cov_var().copy_(diagonals[0].unsqueeze(-1) * diagonals[1].unsqueeze(-2))
    assert (block.full_fisher_block() - kfac_block(block)).norm() > 0.1
    refresh_inverses(block.factors)
    close(block.full_fisher_block(), kfac_block(block))


@float64
def test_rounding_errors_of_a_singular_factor_are_no_ratio():
    """From refresh to refresh their ratios would multiply."""
    s, r = torch.tensor([0.0, 3e-17, 1.0]), torch.tensor([1e-17, 0.0, 1.0])
    moved = eigen_scales.carrying(torch.eye(3), s, torch.eye(3), r)
    torch.testing.assert_close(moved, torch.eye(3), rtol=0, atol=0.2)
    zero = torch.zeros(3)
    assert torch.equal(
        eigen_scales.carrying(torch.eye(3), zero, torch.eye(3), zero), torch.eye(3)
    )


def kron_of_bases(scales):
    pairs = zip(*map(stack, scales.basis), strict=True)
    return torch.block_diag(*(torch.kron(*pair) for pair in pairs))


def move_the_factors(block):
    """New statistics, but no new scales."""
    for side in block.factors[:2]:
        cov = side.get_cov_var()
        side.accumulate(torch.randn_like(cov) @ torch.randn_like(cov).mT, 0.5)
        cov.copy_(cov @ cov.mT)


def test_the_basis_of_a_layer_whose_units_died():
    """Their part of `G` decays to subnormal numbers, of which LAPACK may make NaN."""
    block = fb.FullyConnectedEKFACFB(nn.Linear(3, 4), "layer")
    block.instantiate_factors(0.1)
    for number in range(500):
        a, s = torch.randn(9, 3), torch.randn(9, 4)
        if number % 50:
            s[:, 2:] = 0
        block.accumulate(block.moments([a], [[s]], 9), 0.1)
        refresh_inverses(block.factors)
        assert block.scales.get_cov_var().isfinite().all()
        Q = block.scales.basis[1]
        torch.testing.assert_close(Q.mT @ Q, torch.eye(4))
    V = torch.cat([torch.zeros(4, 2), torch.randn(4, 2)], 1)
    A, _, scales = block.factors
    s_A, s_G = scales.diagonals
    y = (0.1 * s_G.mean() / s_A.mean()).sqrt()
    dead = y * A.get_cov() + 0.1 * torch.eye(4)
    torch.testing.assert_close(block.multiply_inverse(V), torch.linalg.solve(dead, V))


@float64
def test_the_first_corrected_moment_replaces_those_of_kfac():
    block = fb.FullyConnectedEKFACFB(nn.Linear(3, 2), "layer")
    block.instantiate_factors(0.1)
    scales = block.factors[2]
    for _ in range(3):
        a, s = torch.randn(5, 3), torch.randn(5, 2)
        block.accumulate(block.moments([a], [[s]], 5), 0.9)
        assert not scales.get_cov_var().any()
    for _ in range(2):
        refresh_inverses(block.factors)
        close(block.full_fisher_block(), kfac_block(block))
    (_, _, moment) = block.moments([a], [[s]], 5)
    block.accumulate_factor(2, moment, 0.9)
    assert torch.equal(scales.get_cov_var(), moment.cov)
    assert (scales.num_corrections, scales.num_updates) == (1, 4)


@float64
def test_moments_of_an_older_basis_are_left_out():
    block = ready()
    x, g = batch(block)
    old = block.moments([x], [[g]], 4)
    refresh_inverses(block.factors)
    before = block.factors[2].get_cov_var().clone()
    mixed = block.moments([x], [[g]], 4)
    for one, other in zip(mixed, block.moments([x], [[g]], 4), strict=True):
        one.merge(other)
    new = mixed[2].cov.clone()
    for one, other in zip(old, mixed, strict=True):
        one.merge(other)
    updates = [factor.num_updates for factor in block.factors]
    block.accumulate(old, 0.5)
    assert torch.equal(block.factors[2].get_cov_var(), before)
    assert [factor.num_updates for factor in block.factors] == [n + 1 for n in updates]
    block.accumulate(mixed, 0.0)
    close(block.factors[2].get_cov_var(), new)


@float64
def test_a_refresh_between_a_forward_and_its_update():
    model, x, layers = registered("mlp")
    estimator = FisherEstimator(None, 0.9, 0.3, layers, estimation_mode="exact")
    for _ in range(2):
        model(x)
        estimator.has_statistics()  # takes them
        estimator.update_covariances()
        estimator.update_inverses()
    before = [block.full_fisher_block() for block in layers.get_blocks()]
    model(3 * x)
    assert estimator.has_statistics()
    estimator.update_inverses()
    assert estimator.update_covariances() == []
    estimator.close()
    for block, expected in zip(layers.get_blocks(), before, strict=True):
        close(block.full_fisher_block(), expected)
        assert [f.num_updates for f in block.factors] == [3, 3, 3]
        assert block.scales.num_corrections == 1


@float64
@pytest.mark.parametrize(
    "name", ["mlp", "tokens, one loss", "two convolutions", "attention", "rnn"]
)
def test_micro_batches_are_merged(name):
    model, x, layers = registered(name)
    gathered(model, x, layers)
    whole = [block.full_fisher_block() for block in layers.get_blocks()]
    model, x, layers = registered(name)
    gathered(model, [x[:1], x[1:]], layers)
    for block, expected in zip(layers.get_blocks(), whole, strict=True):
        close(block.full_fisher_block(), expected, 1e-9)


@float64
def test_the_identity_as_initial_value():
    options = FactorOptions(initial="identity")
    block = fb.FullyConnectedEKFACFB(nn.Linear(2, 2, bias=False), "layer", options)
    block.instantiate_factors(0.1)
    close(block.full_fisher_block(), torch.eye(4))
    a, s = torch.randn(5, 2), torch.randn(5, 2)
    block.accumulate(block.moments([a], [[s]], 5), 0.5)
    refresh_inverses(block.factors)
    before = block.full_fisher_block()
    close(before, kfac_block(block))
    new = block.moments([a], [[s]], 5)[2].cov
    S = block.factors[2].get_cov_var().clone()
    block.accumulate_factor(2, block.moments([a], [[s]], 5)[2], 0.5)
    close(block.factors[2].get_cov_var(), (S + new) / 2)


# Damping.


@float64
@pytest.mark.parametrize("name", ["mlp", "two convolutions", "conv 2d, groups"])
def test_a_new_damping_acts_at_once(name):
    """It adds to the block what it adds to K-FAC's."""
    model, x, layers = registered(name)
    damping = [0.3]
    gathered(model, x, layers, damping=lambda: damping[0])
    for block in layers.get_blocks():
        V = torch.randn(block.factors[2].get_cov_var().shape)
        F = block.full_fisher_block()
        for damping[0] in (0.3, 0.01, 5.0):
            damped = F + added_to_kfac(block, damping[0])
            solved = torch.linalg.solve(damped, V.flatten()).view(V.shape)
            close(block.multiply_inverse(V), solved, 1e-9)
            close(block.multiply(V), (damped @ V.flatten()).view(V.shape))


@float64
@pytest.mark.parametrize("name", ["mlp", "conv 2d, groups"])
def test_with_the_scales_of_kfac_it_is_the_block_of_kfac(name):
    """Damped too: before the first update in a basis scales are `s_A s_Gᵀ`."""
    found = []
    for approx in ("ekfac", "kron"):
        model, x, layers = registered(name, approx)
        estimator = FisherEstimator(None, 0.9, 0.3, layers, estimation_mode="exact")
        model(x)
        estimator.update_covariances()
        estimator.update_inverses()
        torch.manual_seed(2)
        blocks = list(layers.get_blocks())
        vectors = [
            torch.randn(*b.factors[0].get_cov().shape[:-1], b.factors[1].cov_dim)
            for b in blocks
        ]
        found.append([b.multiply_inverse(V) for b, V in zip(blocks, vectors, strict=True)])
        estimator.close()
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs, 1e-9)


@float64
def test_without_damping_a_singular_block_is_named():
    block = fb.FullyConnectedEKFACFB(nn.Linear(3, 2), "layer")
    block.instantiate_factors(0.0)
    for _ in range(2):
        block.accumulate(block.moments([torch.zeros(2, 3)], [[torch.zeros(2, 2)]], 2), 0.0)
        refresh_inverses(block.factors)
    with pytest.raises(torch.linalg.LinAlgError, match=r"layer.scales: .* larger damping"):
        block.multiply_inverse(torch.ones(4, 2))


@pytest.mark.parametrize("product", ["multiply", "multiply_inverse", "multiply_cholesky"])
def test_a_vector_of_another_shape(product):
    block = ready()
    with pytest.raises(ValueError, match=r"layer layer: expected a V of shape \(5, 3\)"):
        getattr(block, product)(torch.ones(3, 5))


# Large sides.


@float64
@pytest.mark.parametrize("above", ["split", "diagonal", "low_rank"])
def test_a_side_above_the_limit_makes_it_kfac(above):
    limit = SizeLimit(4, above=above)
    blocks = [
        kind(nn.Linear(6, 3), "layer", size_limit=limit)
        for kind in (fb.FullyConnectedEKFACFB, fb.FullyConnectedKFACBasicFB)
    ]
    a, s, V = torch.randn(5, 6), torch.randn(5, 3), torch.randn(7, 3)
    for block in blocks:
        block.instantiate_factors(0.1)
        block.register_inverse()
        block.accumulate(block.moments([a], [[s]], 5), 0.9)
        refresh_inverses(block.factors)
    one, other = blocks
    assert one.scales is None
    assert one.factor_sizes == other.factor_sizes
    for exp in (-1, 1):
        assert torch.equal(one.multiply_matpower(V, exp), other.multiply_matpower(V, exp))
    assert torch.equal(one.full_fisher_block(), other.full_fisher_block())


def test_the_report_says_which_blocks_are_corrected():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 9))
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1, approx="ekfac")
    row = optimizer.report().layers[0]
    assert row.block == "Kronecker, eigenvalues corrected"
    assert row.factors == ("full 3", "full 3", "eigenvalues 3x3")
    optimizer.close()
    layers = LayerCollection(model, size_limit=SizeLimit(4))
    for i in (0, 2):
        layers.register_fully_connected(model[i], "ekfac")
    small, large = layers.report().layers
    assert small.block == "Kronecker, eigenvalues corrected"
    assert not small.notes
    assert large.block == "Kronecker"
    assert any("above the size limit: the block is that of \"kron\"" in n
               for n in large.notes)  # fmt: skip


# Together.


@float64
def test_the_check_of_the_curvature():
    model, x, layers = registered("tokens, one loss")
    layers.registered_losses.clear()
    dense = check_curvature(model, CLASSES, x, layer_collection=layers)
    model, x, layers = registered("tokens, one loss")
    layers.registered_losses.clear()
    products = check_curvature(model, CLASSES, x, layer_collection=layers, dense_limit=0)
    for one, other in zip(dense.blocks, products.blocks, strict=True):
        assert one.verdict == other.verdict == "approximate"
        assert one.trace_ratio == pytest.approx(1, abs=1e-11)
        assert other.trace_ratio == pytest.approx(1, abs=1e-11)
        assert one.error == pytest.approx(other.error, abs=1e-6)
    # One datum and one use of a layer: there K-FAC is exact, and so is this.
    model, _, layers = registered("mlp")
    layers.registered_losses.clear()
    check = check_curvature(model, CLASSES, torch.randn(1, 3), layer_collection=layers)
    assert [row.verdict for row in check.blocks] == ["equal"] * 3


def trained(steps, optimizer, model, data):
    losses = []
    for step in range(*steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def realistic():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 5)
    )  # fmt: skip
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    x = torch.randn(8, 64, 1, 8, 8)
    data = [(some, teacher(some).argmax(1)) for some in x]
    optimizer = KFAC(
        model, "categorical", lr=0.1, damping=1e-2, approx="ekfac",
        cov_update_every=1, invert_every=5,
    )  # fmt: skip
    return model, optimizer, data


def test_training_in_float32():
    model, optimizer, data = realistic()
    losses = trained((0, 40), optimizer, model, data)
    assert sum(losses[-8:]) < 0.3 * sum(losses[:8])
    corrections = {b.scales.num_corrections for b in optimizer.estimator.blocks.values()}
    assert corrections == {39}  # all but that of the first step, which makes the basis
    optimizer.close()


@pytest.mark.parametrize("at", [1, 7])
def test_a_run_is_resumed_bit_for_bit(at, tmp_path):
    model, optimizer, data = realistic()
    trained((0, at), optimizer, model, data)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    expected = trained((at, 16), optimizer, model, data)
    optimizer.close()
    other, resumed, data = realistic()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    assert trained((at, 16), resumed, other, data) == expected
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    resumed.close()


def test_the_state_of_a_plain_block_is_refused():
    block = ready()
    plain = fb.ConvKFCBasicFB(block.module, "layer")
    plain.instantiate_factors(0.1)
    with pytest.raises(ValueError, match="expected the state of 3 factors, got 2"):
        block.load_state_dict(plain.state_dict())
    state = block.state_dict()
    del state["factors"][2]["basis"]
    with pytest.raises(ValueError, match="expected scales and their basis in the state"):
        block.load_state_dict(state)
