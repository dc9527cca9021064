"""An eigenbasis that follows its matrix, without a decomposition.

Notation: `C [..., n, n]` symmetric, `Q` an orthogonal matrix that was its eigenbasis,
`M = Qᵀ C Q` with the diagonal `a`, `r_i² = Σ_{j≠i} M_ij²`. To first order the eigenvectors
of `M` are `I + X`, `X_ij = M_ij/(a_j − a_i)`; where eigenvalues are too close for that, no
direction among theirs is better than another, and none is taken:

    X_ij = M_ij (a_j − a_i) / ((a_j − a_i)² + r_i² + r_j²)
    Q' = Q (I − X/2)⁻¹ (I + X/2)

(Cayley's transform; `X` is antisymmetric, so that `Q'` is orthogonal). Five products of
`n³`, and one step at a time: how far `M` is from diagonal says whether that will do. Left
out: eigenvalues; several steps on one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_RESIDUAL = 0.1
"""The share of `M` beside its diagonal, by norm, above which a basis is none of `C`."""


def follow(C: Tensor, Q: Tensor) -> Tensor | None:
    """Return `Q'`, or None where `Q` is too far from an eigenbasis; reads the host.

    >>> C, Q = torch.tensor([[2.0, 0.1], [0.1, 1.0]]), torch.eye(2)
    >>> Q = follow(C, Q)
    >>> (Q.mT @ C @ Q).round(decimals=3)
    tensor([[2.0100, -0.0000],
            [-0.0000, 0.9900]])
    >>> follow(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.eye(2)) is None
    True
    """
    M = Q.mT @ C @ Q
    norm, a = torch.linalg.matrix_norm(M), M.diagonal(dim1=-2, dim2=-1).clone()
    M.diagonal(dim1=-2, dim2=-1).zero_()
    # A NaN is not near.
    if not (torch.linalg.matrix_norm(M) <= LARGEST_RESIDUAL * norm).all():
        return None
    gaps = a.unsqueeze(-2) - a.unsqueeze(-1)
    rest = M.square().sum(-1)
    width = gaps.square() + rest.unsqueeze(-1) + rest.unsqueeze(-2)
    half = M.mul_(gaps).div_(width.clamp_(min=torch.finfo(M.dtype).tiny)).div_(2)
    half = (half - half.mT) / 2  # to the last bit
    eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    return Q @ torch.linalg.solve(eye - half, eye + half)
