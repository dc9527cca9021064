"""The spectra are those of the factors."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC
from kfac_torch.diagnostics import effective_rank, factor_spectra


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


def test_layers_without_statistics_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2))
    assert factor_spectra(KFAC(model, "normal", lr=0.1, damping=0.1)) == {}


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([0.0, 0.0, 3.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
