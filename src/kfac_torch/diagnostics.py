"""Look at a run: the spectra of the factors.

Notation: `A` the second moment of a layer's inputs, `G` that of its output gradients.
The curvature of a layer is `A ⊗ G`, whose eigenvalues are all products of one of `A`
and one of `G`: the spread of the two spectra is what a first-order step has to cope
with and a K-FAC step divides out, down to the damping. A factor that is no whole matrix
has the eigenvalues of what it keeps, which is never made dense. Left out: plotting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fisher_blocks import FisherBlock
from .optimizer import KFAC


@torch.no_grad()
def factor_spectra(optimizer: KFAC) -> dict[str, dict[str, Tensor]]:
    """Return the ascending eigenvalues of the factors, without damping, by layer name.

    A layer has an `"input"` and an `"output"`, each `[n]`, with groups `[groups, n]`; a
    block of one factor, `"block"`. Layers without statistics are left out.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> optimizer = KFAC(model, loss="normal", lr=0.1, damping=1e-2)
    >>> model(torch.ones(4, 3)).sum().backward()
    >>> optimizer.estimator.update_covariances()
    []
    >>> {k: tuple(e.shape) for k, e in factor_spectra(optimizer)["0"].items()}
    {'input': (4,), 'output': (2,)}
    """
    spectra = {}
    for name, block in optimizer.estimator.blocks.items():
        if block.has_statistics:
            spectra[name] = {
                side: factor.spectrum()
                for side, factor in zip(_sides(block), block.factors, strict=True)
            }
    return spectra


def _sides(block: FisherBlock) -> list[str]:
    if len(block.factors) == 1:
        return ["block"]
    if len(block.factors) == 2:
        return ["input", "output"]
    return [factor.name.removeprefix(f"{block.name}.") for factor in block.factors]


def effective_rank(eigenvalues: Tensor) -> float:
    """Return `tr C / λ_max`: how many directions share the curvature.

    >>> effective_rank(torch.tensor([1.0, 1.0, 2.0]))
    2.0
    """
    largest = eigenvalues.max().item()
    return eigenvalues.sum().item() / largest if largest > 0 else 0.0
