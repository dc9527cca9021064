"""Blocks of layers with several uses: chains over time, and what they make of losses."""

import pytest
import torch
from dense_fisher import dense_fisher
from torch import nn

from kfac_torch.estimator import FisherEstimator
from kfac_torch.fisher_blocks import (
    FullyConnectedKFACBasicFB,
    FullyConnectedMultiIndepFB,
    FullyConnectedSeriesFB,
)
from kfac_torch.fisher_factors import refresh_inverses
from kfac_torch.layer_collection import LayerCollection

pytestmark = pytest.mark.usefixtures("float64")


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.view_as(actual), rtol=0, atol=atol)


def chain(A, G, T, option, damping=0.0, split=None):
    """A block whose factors have the moments `A = (A0, A1)` and `G = (G0, G1)`."""
    linear = nn.Linear(A[0].shape[0], G[0].shape[0], bias=False)
    block = FullyConnectedSeriesFB(linear, "rnn", option=option)
    if split is not None:
        block._split_damping = lambda: tuple(torch.tensor(value) for value in split)
    block.instantiate_factors(damping)
    block.register_inverse()
    for factor, moments in zip(block.factors, (A, G), strict=True):
        factor.accumulate(torch.stack(list(moments)), 0.0)
    block.num_locations, block._num_uses = float(T), T
    refresh_inverses(block.factors)
    return block


@pytest.mark.parametrize(("option", "expected"), [(1, 4 / 33), (2, 0.1)])
def test_scalars(option, expected):
    A = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    G = torch.tensor([[1.0]]), torch.tensor([[0.5]])
    close(chain(A, G, 3, option).multiply_inverse(torch.ones(1, 1)), [expected])


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (1, [[0.0091053484, 0.0628073038], [0.3432319259, 0.5921310469]]),
        (2, [[0.0058209739, 0.0599686177], [0.3316951089, 0.5779865158]]),
    ],
)
def test_matrices(option, expected):
    A = torch.tensor([[2, 0.3], [0.3, 1]]), torch.tensor([[0.8, 0.1], [0.2, 0.3]])
    G = torch.tensor([[1.5, -0.2], [-0.2, 1]]), torch.tensor([[0.4, 0], [0.1, 0.2]])
    block = chain(A, G, 5, option, split=(0.1, 0.2))
    close(block.multiply_inverse(torch.tensor([[1.0, 2], [3, 4]])), expected)


def power(S, exp):
    e, V = torch.linalg.eigh(S)
    return (V * e**exp) @ V.T


def stationary(n, damping, symmetric):
    """`C0`, `C1` and the whitened `Ψ` of a chain with `C0 + damping I` as its moment."""
    C0 = torch.randn(n, 3 * n)
    C0 = C0 @ C0.T / n
    Psi = torch.randn(n, n)
    Psi = Psi + Psi.T if symmetric else Psi
    Psi = 0.8 * Psi / torch.linalg.matrix_norm(Psi, 2)
    root = power(C0 + damping * torch.eye(n), 0.5)
    return C0, root @ Psi @ root, Psi


def lags(C0, Psi, damping, number):
    """`C_d = C_λ^½ Ψ^d C_λ^½` for d = 0, 1, ..."""
    root = power(C0 + damping * torch.eye(len(C0)), 0.5)
    return [root @ torch.linalg.matrix_power(Psi, d) @ root for d in range(number)]


def split_of(A0, G0, damping, T):
    """λ/T split by π, written out."""
    pi = ((A0.trace() / len(A0)) / (G0.trace() / len(G0))).sqrt()
    return pi * (damping / T) ** 0.5, (damping / T) ** 0.5 / pi


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_option_1_is_the_inverse_of_a_chain_that_is_the_same_in_both_directions(T, damping):
    """`F = Σ_{s,t<=T} A_{|s-t|} ⊗ G_{|s-t|}` over all pairs of uses; A1, G1 symmetric."""
    A0, _, Psi_A = stationary(3, 0.0, symmetric=True)
    G0, _, Psi_G = stationary(2, 0.0, symmetric=True)
    split = split_of(A0, G0, damping, T)
    A, G = lags(A0, Psi_A, split[0], T + 1), lags(G0, Psi_G, split[1], T + 1)
    dense = sum(torch.kron(A[abs(s - t)], G[abs(s - t)])
                for s in range(T) for t in range(T))  # fmt: skip
    block = chain((A0, A[1]), (G0, G[1]), T, 1, damping)
    V = torch.randn(3, 2)
    close(block.multiply_inverse(V), torch.linalg.solve(dense, V.flatten()))


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_option_2_is_the_inverse_of_a_long_chain(damping):
    """`F = T Σ_d A_d ⊗ G_d` over all lags, `A_{-d} = A_dᵀ`: no ends, any Ψ."""
    T = 40
    A0, _, Psi_A = stationary(3, 0.0, symmetric=False)
    G0, _, Psi_G = stationary(2, 0.0, symmetric=False)
    split = split_of(A0, G0, damping, T)
    number = 150  # 0.64^150 is rounding
    A, G = lags(A0, Psi_A, split[0], number), lags(G0, Psi_G, split[1], number)
    forward = sum(torch.kron(a, g) for a, g in zip(A[1:], G[1:], strict=True))
    dense = T * (torch.kron(A[0], G[0]) + forward + forward.T)
    block = chain((A0, A[1]), (G0, G[1]), T, 2, damping)
    V = torch.randn(3, 2)
    close(block.multiply_inverse(V), torch.linalg.solve(dense, V.flatten()))


@pytest.mark.parametrize("option", [1, 2])
def test_without_correlation_over_time_a_chain_is_independent_uses(option):
    linear = nn.Linear(3, 2)
    x, g = torch.randn(6, 4, 3), torch.randn(6, 4, 2)
    series = FullyConnectedSeriesFB(linear, "s", option=option, time_dim=1)
    indep = FullyConnectedMultiIndepFB(linear, "i")
    for block in (series, indep):
        block.instantiate_factors(0.3)
        block.register_inverse()
        moments = block.moments([x], [[g]], num_terms=8)
        if block is series:
            for moment in moments:
                moment.cov[1] = 0
        block.accumulate(moments, 0.9)
        refresh_inverses(block.factors)
    assert series.num_locations == indep.num_locations == 3
    V = torch.randn(4, 2)
    close(series.multiply_inverse(V), indep.multiply_inverse(V))


class Cell(nn.Module):
    """A layer over time, called for each step or once for all, time first or second."""

    def __init__(self, looped, time_dim=1):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.looped, self.time_dim = looped, time_dim

    def forward(self, x):  # [N, T, 3]
        if self.looped:
            s = torch.stack([self.layer(step) for step in x.unbind(1)], 1)
        elif self.time_dim == 0:
            s = self.layer(x.transpose(0, 1)).transpose(0, 1)
        else:
            s = self.layer(x)
        return self.head(torch.tanh(s.cumsum(1)).mean(1))


def estimated(model, x, approx, mode="exact", **kwargs):
    layers = LayerCollection(model)
    layers.register_fully_connected_multi(model.layer, approx, **kwargs)
    layers.register_categorical_predictive_distribution()
    estimator = FisherEstimator(None, 0.95, 0.2, layers, estimation_mode=mode)
    for part in x.split(3):
        model(part)
    assert estimator.update_covariances() == []
    estimator.update_inverses()
    estimator.close()
    return layers.blocks["layer"]


@pytest.mark.parametrize("mode", ["exact", "gradients"])
@pytest.mark.parametrize("approx", ["kron_series_1", "kron_series_2", "kron_indep"])
@pytest.mark.parametrize("time_dim", [0, 1, -2])
def test_a_loop_and_one_call_over_time_are_the_same(approx, mode, time_dim):
    torch.manual_seed(1)
    looped, whole = Cell(True), Cell(False, time_dim)
    whole.load_state_dict(looped.state_dict())
    x, V = torch.randn(6, 5, 3), torch.randn(4, 4)
    one = estimated(looped, x, approx, mode)
    # A series without a loop has to be told which dimension is time.
    other = estimated(whole, x, approx, mode, time_dim=time_dim)
    assert one.num_locations == other.num_locations == 5
    for a, b in zip(one.factors, other.factors, strict=True):
        close(a.state_dict()["cov"], b.state_dict()["cov"])
    close(one.multiply_inverse(V), other.multiply_inverse(V))


@pytest.mark.parametrize("option", [1, 2])
def test_a_sequence_of_one_step(option):
    """There is no lag, and so no chain."""
    linear, x, g = nn.Linear(3, 2), torch.randn(6, 3), torch.randn(6, 2)
    blocks = [
        FullyConnectedSeriesFB(linear, "s", option=option),
        FullyConnectedSeriesFB(linear, "t", option=option, time_dim=0),
        FullyConnectedKFACBasicFB(linear, "k"),
    ]
    V, products = torch.randn(4, 2), []
    for block in blocks:
        block.instantiate_factors(0.3)
        block.register_inverse()
        batch = (x[None], g[None]) if block.name == "t" else (x, g)
        block.accumulate(block.moments([batch[0]], [[batch[1]]], num_terms=6), 0.9)
        refresh_inverses(block.factors)
        products.append(block.multiply_inverse(V))
    close(products[0], products[2])
    close(products[1], products[2])


def test_calls_that_are_no_sequence():
    block = FullyConnectedSeriesFB(nn.Linear(3, 2), "rnn")
    block.instantiate_factors(0.1)
    with pytest.raises(ValueError, match=r"layer rnn: .*same shape at every time step"):
        block.input_moments([torch.zeros(4, 3), torch.zeros(5, 3)])
    with pytest.raises(ValueError, match=r"layer rnn: .*\(4, 5, 3\); .*time_dim="):
        block.input_moments([torch.zeros(4, 5, 3)])
    with pytest.raises(ValueError, match=r"layer rnn: option: expected one of \(1, 2\)"):
        FullyConnectedSeriesFB(nn.Linear(3, 2), "rnn", option=3)


class Steps(nn.Module):
    """A layer used at every step, with a loss at every step or at the last one."""

    def __init__(self, every):
        super().__init__()
        self.layer, self.every = nn.Linear(3, 2, bias=False), every
        nn.init.zeros_(self.layer.weight)  # logits are 0 whatever comes in

    def forward(self, x):
        s = torch.stack([self.layer(step) for step in x.unbind(1)], 1)
        return s if self.every else s.sum(1)


def unrelated_steps():
    """`[8, 4, 3]`: no correlation between steps over the examples."""
    H = torch.tensor([[1.0, 1], [1, -1]])
    signs = torch.kron(H, H).repeat(2, 1)
    return torch.randn(2, 4, 3).repeat_interleave(4, 0) * signs[:, :, None]


@pytest.mark.parametrize(
    ("loss", "every", "T"),
    [
        ("categorical", True, 1),  # a step is a loss term
        ("categorical", False, 4),
        ("squared_error", True, 4),  # a sequence is
        ("squared_error", False, 4),
    ],
)
def test_the_scale_follows_the_losses(loss, every, T):
    """Uses are unrelated and the curvature at the output is constant: all are exact."""
    model, x = Steps(every), unrelated_steps()
    layers = LayerCollection(model)
    layers.register_fully_connected_multi(model.layer)
    if loss == "categorical":
        layers.register_categorical_predictive_distribution()
    else:
        layers.register_squared_error_loss()
    block = layers.blocks["layer"]
    dense = dense_fisher(model, x, layers, block)
    estimator = FisherEstimator(None, 0.95, 0.2, layers, estimation_mode="exact")
    model(x)
    estimator.update_covariances()
    assert block.num_locations == T
    close(block.full_fisher_block().trace(), dense.trace())
    close(block.full_fisher_block(), dense)


class LossPerStep(nn.Module):
    """Every step has a loss of its own: a loss sees the calls before it alone."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h, outputs = torch.zeros(x.shape[0], 3), {}
        for t in range(3):
            h = torch.tanh(self.layer(h + x[:, t]))
            outputs[str(t)] = self.head(h)
        return outputs


class OneLoss(LossPerStep):
    def forward(self, x):
        return torch.stack(list(super().forward(x).values()), 1)


@pytest.mark.parametrize("approx", ["kron_indep", "kron_series_1", "kron_series_2"])
def test_losses_of_each_step_add_up_to_one_of_all_steps(approx):
    one, many = OneLoss(), LossPerStep()
    many.load_state_dict(one.state_dict())
    x, V, found = torch.randn(5, 3, 3), torch.randn(4, 3), []
    for model in (one, many):
        layers = LayerCollection(model)
        layers.register_fully_connected_multi(model.layer, approx)
        for t in range(3 if model is many else 1):
            where = str(t) if model is many else None
            layers.register_normal_predictive_distribution(where, var=1.0)
        estimator = FisherEstimator(None, 0.95, 0.2, layers, estimation_mode="exact")
        model(x)
        assert estimator.update_covariances() == []
        estimator.update_inverses()
        found.append(layers.blocks["layer"])
    assert found[0].num_locations == found[1].num_locations == 3
    for a, b in zip(found[0].factors, found[1].factors, strict=True):
        close(a.state_dict()["cov"], b.state_dict()["cov"])
    close(found[0].multiply_inverse(V), found[1].multiply_inverse(V))
