"""The spectra are those of the factors."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC, LayerCollection, SizeLimit
from kfac_torch.diagnostics import effective_rank, factor_spectra
from kfac_torch.fisher_factors import FullyConnectedKroneckerFactor
from kfac_torch.fisher_factors.split import SplitKroneckerFactor


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)
    )
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.randn(16, 1, 4, 4)
        functional.cross_entropy(model(x), torch.randint(4, (16,))).backward()
        optimizer.step()
    return optimizer


def test_spectra_are_those_of_the_factors():
    optimizer = trained()
    spectra = factor_spectra(optimizer)
    assert list(spectra) == ["0", "3"]
    for name, block in optimizer.estimator.blocks.items():
        for side, factor in zip(("input", "output"), block.factors, strict=True):
            expected = torch.linalg.eigvalsh(factor.get_cov())
            torch.testing.assert_close(spectra[name][side], expected, rtol=0, atol=0)


def spectra_of(model, x, register, limit=None):
    layers = LayerCollection(model, size_limit=limit)
    register(layers)
    optimizer = KFAC(model, "normal", layers, lr=0.1, damping=0.1)
    model(x).sum().backward()
    assert optimizer.estimator.update_covariances() == []
    return optimizer.estimator.blocks, factor_spectra(optimizer)


@pytest.mark.parametrize("above", ["split", "diagonal", "low_rank"])
@pytest.mark.parametrize("groups", [1, 2])
def test_spectra_of_large_sides_are_those_of_the_dense_matrices(above, groups, float64):
    model = nn.Sequential(nn.Conv1d(10, 14, 2, groups=groups), nn.Flatten())
    blocks, spectra = spectra_of(
        model, torch.randn(8, 10, 6), LayerCollection.auto_register_layers,
        SizeLimit(3, above=above),
    )  # fmt: skip
    for side, factor in zip(("input", "output"), blocks["0"].factors, strict=True):
        dense = factor.get_cov()
        expected = torch.linalg.eigvalsh(dense)
        assert spectra["0"][side].shape == dense.shape[:-1]
        torch.testing.assert_close(spectra["0"][side], expected, rtol=1e-9, atol=1e-9)


def test_a_block_of_one_factor_has_one_spectrum():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    def register(layers):
        layers.register_fully_connected(model[0], "diagonal")
        layers.register_scale_and_shift(model[1])
        layers.register_generic(model[2])

    _, spectra = spectra_of(model, torch.randn(6, 3), register)
    shapes = {
        name: {k: len(e) for k, e in found.items()} for name, found in spectra.items()
    }
    assert shapes == {"0": {"block": 16}, "1": {"block": 8}, "2": {"block": 10}}
    assert all((e["block"].diff() >= 0).all() for e in spectra.values())


def test_a_vocabulary_is_not_made_dense():
    model = nn.Embedding(200_000, 2)
    _, spectra = spectra_of(
        model, torch.randint(200_000, (6,)), LayerCollection.auto_register_layers
    )
    assert spectra["model"]["input"].shape == (200_000,)
    torch.testing.assert_close(spectra["model"]["input"].sum(), torch.tensor(1.0))


def test_layers_without_statistics_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2))
    assert factor_spectra(KFAC(model, "normal", lr=0.1, damping=0.1)) == {}


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([0.0, 0.0, 3.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize("max_size", [None, 8], ids=["whole", "split"])
def test_the_spectrum_of_a_matrix_with_subnormal_rows(max_size):
    """Of one that a running moment decays to when units die, LAPACK may find none."""
    data = [[torch.zeros(1, 8)]]
    if max_size is None:
        factor = FullyConnectedKroneckerFactor(data)
    else:
        factor = SplitKroneckerFactor(data, max_size=max_size)
    factor.instantiate_cov_variables()
    for _ in range(50):
        x = torch.randn(20, 8)
        C = x.T @ x
        C[4:] *= 1e-44
        C = C.tril() + C.tril(-1).T
        factor.get_cov_var().copy_(C)
        expected = torch.linalg.eigvalsh(C.double()).float()
        torch.testing.assert_close(factor.spectrum(), expected)
