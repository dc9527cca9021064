"""Cholesky factor and inverse of one large symmetric matrix, by halves.

Notation: `C [n, n]` symmetric positive definite, `L` lower triangular with `L Lᵀ = C`, in
halves `L = [[L₁, 0], [B, L₂]]`:

    L₁ = chol(C₁₁),  B = C₂₁ L₁⁻ᵀ,  L₂ = chol(C₂₂ − B Bᵀ)
    X = B L₁⁻¹,  C⁻¹ = [[(L₁ L₁ᵀ)⁻¹ + Xᵀ D X, −(D X)ᵀ], [−D X, D]],  D = (L₂ L₂ᵀ)⁻¹

(Golub & Van Loan, Matrix Computations, sections 4.2 and 4.3). Nearly all the work is in
products of large matrices, which run at twice the speed of LAPACK's `potrf` and `potri`
from some thousand rows on, and all of it in the memory of `C` and of the result. Left out:
small matrices and batches, which torch does as well; what becomes of a matrix that is not
positive definite.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SIZE = 1024
"""The size from which on this is faster than torch."""

_LEAF = 256  # up to which a block is torch's
_SOLVED = 640  # up to which a triangular system is torch's
_STRIP = 128  # rows of a symmetric product, of which half would be work for nothing
_MIRRORED = 64  # rows that are mirrored at once


def cholesky_in_place(C: Tensor) -> tuple[Tensor, Tensor]:
    """Return `L` in the memory of `C`, and 0 if it is one.

    Args:
        C: contiguous; it is overwritten.

    Returns:
        `L`, of which the lower triangle alone is to be read, and a 0-dim integer that is
        0 where every pivot was positive.

    >>> C = torch.tensor([[4.0, 2.0], [2.0, 2.0]])
    >>> L, info = cholesky_in_place(C)
    >>> L.tril(), info
    (tensor([[2., 0.],
            [1., 1.]]), tensor(0, dtype=torch.int32))
    """
    L = C.mT  # LAPACK's order: columns
    infos: list[Tensor] = []
    _factorise(L, infos)
    return L, torch.stack(infos).amax()


def _factorise(L: Tensor, infos: list[Tensor]) -> None:
    """Turn the lower triangle of a matrix into that of its factor."""
    n = len(L)
    if n <= _LEAF:
        factor, info = torch.linalg.cholesky_ex(L)
        L.copy_(factor)
        infos.append(info)
        return
    h = n // 2
    first, B, second = L[:h, :h], L[h:, :h], L[h:, h:]
    _factorise(first, infos)
    _solve_upper(first.mT, B)
    _subtract_product(second, B, B.mT)
    _factorise(second, infos)


def inverse_of_cholesky(L: Tensor, out: Tensor) -> None:
    """Write `(L Lᵀ)⁻¹`, exactly symmetric, to a matrix of its own.

    Args:
        L: its lower triangle alone is read.
        out: where to.

    >>> out = torch.empty(2, 2)
    >>> inverse_of_cholesky(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), out)
    >>> out
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  1.0000]])
    """
    _invert(L, out)
    _mirror(out)


def _invert(L: Tensor, out: Tensor) -> None:
    """Write the lower triangle of the inverse; what is above it is of no meaning."""
    n = len(L)
    if n <= _LEAF:
        out.copy_(torch.cholesky_inverse(L))
        return
    h = n // 2
    D = out[h:, h:]
    _invert(L[h:, h:], D)
    _mirror(D)
    X = out[:h, h:].mT  # in the triangle that is free until the end
    _solve_lower(L[:h, :h], L[h:, :h], X)
    off = out[h:, :h]
    torch.addmm(off, D, X, beta=0, alpha=-1, out=off)
    _invert(L[:h, :h], out[:h, :h])
    # `off` is −D X.
    _subtract_product(out[:h, :h], X.mT, off)


def _solve_upper(U: Tensor, B: Tensor) -> None:
    """Replace `B` by `B U⁻¹`, `U` upper triangular."""
    n = len(U)
    if n <= _SOLVED:
        # Much faster of a matrix without gaps between its columns.
        U = U.contiguous()
        torch.linalg.solve_triangular(U, B, upper=True, left=False, out=B)
        return
    h = n // 2
    _solve_upper(U[:h, :h], B[:, :h])
    B[:, h:].addmm_(B[:, :h], U[:h, h:], alpha=-1)
    _solve_upper(U[h:, h:], B[:, h:])


def _solve_lower(L: Tensor, B: Tensor, out: Tensor) -> None:
    """Write `B L⁻¹`, `L` lower triangular; `out` may be `B`."""
    n = len(L)
    if n <= _SOLVED:
        L = L.mT.contiguous().mT
        torch.linalg.solve_triangular(L, B, upper=False, left=False, out=out)
        return
    h = n // 2
    _solve_lower(L[h:, h:], B[:, h:], out[:, h:])
    torch.addmm(B[:, :h], out[:, h:], L[h:, :h], alpha=-1, out=out[:, :h])
    _solve_lower(L[:h, :h], out[:, :h], out[:, :h])


def _subtract_product(C: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract a symmetric product from the lower triangle, in strips up to their end."""
    for start in range(0, len(C), _STRIP):
        end = min(start + _STRIP, len(C))
        C[start:end, :end].addmm_(left[start:end], right[:, :end], alpha=-1)


def _mirror(C: Tensor) -> None:
    """Copy the lower triangle to the upper one."""
    for i in range(0, len(C), _MIRRORED):
        rows = slice(i, i + _MIRRORED)
        C[:i, rows].copy_(C[rows, :i].mT)
        C[rows, rows].copy_(C[rows, rows].tril() + C[rows, rows].tril(-1).mT)
