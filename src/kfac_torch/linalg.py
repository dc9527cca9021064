"""Inverses, eigendecompositions and powers of positive semi-definite matrices.

Notation: `C [..., n, n]` a symmetric PSD matrix (a running second moment), `λ [...]` a
damping. Everything is batched over the leading dimensions, and nothing runs below
float32.

Factorise rarely, apply often: these functions are the rare half. `DampedCholesky` climbs
a ladder of two rungs (Cholesky in the dtype given, Cholesky in float64 for the members
of the batch that failed) and then says which matrix is singular; there is never a
pseudo-inverse in silence. Left out: what to do about a failure, which is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def symmetrize(C: Tensor) -> Tensor:
    """Return `(C + Cᵀ)/2`."""
    return (C + C.mT) / 2


def add_damping(C: Tensor, damping: Tensor | float) -> Tensor:
    """Return `C + λI`, with `λ` a number or a tensor of the leading shape of `C`.

    >>> add_damping(torch.zeros(2, 2), 0.5)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    damping = torch.as_tensor(damping, dtype=C.dtype, device=C.device)
    damped = C.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    return damped


class DampedCholesky:
    """The Cholesky factorisation of `C + λI`, from which several functions are made.

    Args:
        C: `[..., n, n]`, symmetric PSD.
        damping: `λ >= 0`, a number or a tensor of shape `[...]`, in units of `C`.
        names: one name for each member of the (flattened) batch, for the error.

    Raises:
        torch.linalg.LinAlgError: a member is singular to working precision also in
            float64; the message names it.

    >>> DampedCholesky(torch.tensor([[4.0, 2.0], [2.0, 2.0]])).lower()
    tensor([[2., 0.],
            [1., 1.]])
    """

    def __init__(
        self,
        C: Tensor,
        damping: Tensor | float = 0.0,
        names: Sequence[str] | None = None,
    ) -> None:
        self._shape = C.shape
        damped = add_damping(C, damping).reshape(-1, *C.shape[-2:])
        L, regular = _cholesky(damped)
        self._L = L
        self._rescued: dict[int, Tensor] = {}  # members that needed float64
        # The one host read of a refresh.
        for i in (~regular).nonzero().flatten().tolist():
            L64, regular64 = _cholesky(damped[i].double())
            if not regular64:
                raise torch.linalg.LinAlgError(_describe_singular(damped[i], i, names))
            self._rescued[i] = L64
            L[i] = torch.eye(len(L64))  # so that batched calls do not stumble over it

    def inverse(self) -> Tensor:
        """Return `(C + λI)⁻¹`, `[..., n, n]`."""
        return self._each(torch.cholesky_inverse)

    def lower(self) -> Tensor:
        """Return `L`, lower triangular with `L Lᵀ = C + λI`."""
        return self._each(torch.clone)

    def lower_inverse(self) -> Tensor:
        """Return `L⁻¹`, lower triangular."""
        return self._each(_triangular_inverse)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        result = function(self._L)
        for i, L64 in self._rescued.items():
            result[i] = function(L64)
        return result.view(self._shape)


def _triangular_inverse(L: Tensor) -> Tensor:
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, eye, upper=False)


def psd_inverse(
    C: Tensor, damping: Tensor | float = 0.0, names: Sequence[str] | None = None
) -> Tensor:
    """Return `(C + λI)⁻¹`, `[..., n, n]`, by Cholesky; arguments as `DampedCholesky`.

    Raises:
        torch.linalg.LinAlgError: a member is singular to working precision also in
            float64; the message names it.

    >>> psd_inverse(torch.tensor([[5.0, 2.0], [2.0, 4.0]]))
    tensor([[ 0.2500, -0.1250],
            [-0.1250,  0.3125]])
    """
    return DampedCholesky(C, damping, names).inverse()


def psd_cholesky(
    C: Tensor, damping: Tensor | float = 0.0, names: Sequence[str] | None = None
) -> Tensor:
    """Return the lower triangular `L [..., n, n]` with `L Lᵀ = C + λI`.

    Raises:
        torch.linalg.LinAlgError: as `psd_inverse`.

    >>> psd_cholesky(torch.tensor([[3.0, 2.0], [2.0, 1.0]]), 1.0)
    tensor([[2., 0.],
            [1., 1.]])
    """
    return DampedCholesky(C, damping, names).lower()


def _cholesky(C: Tensor) -> tuple[Tensor, Tensor]:
    """`L` and whether each member is positive definite beyond rounding error."""
    L, info = torch.linalg.cholesky_ex(C)
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    scale = C.diagonal(dim1=-2, dim2=-1).amax(-1)
    # A rank-deficient matrix may slip through with a last pivot of pure rounding error.
    rounding = C.shape[-1] * torch.finfo(C.dtype).eps * scale
    return L, (info == 0) & (pivots.amin(-1) > rounding)


def _describe_singular(C: Tensor, index: int, names: Sequence[str] | None) -> str:
    name = names[index] if names else f"number {index}"
    if not C.isfinite().all():
        return f"matrix {name} has NaN or Inf entries and cannot be inverted"
    smallest = torch.linalg.eigvalsh(C.double())[0].item()
    return (
        f"matrix {name} ({C.shape[-1]}x{C.shape[-1]}) is singular: expected a positive "
        f"definite C + damping·I, its smallest eigenvalue is {smallest:.3g}. Use a "
        "larger damping, or update the statistics with more data first."
    )


def psd_eigh(C: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues, clipped from below at `floor`, and eigenvectors.

    Args:
        C: `[..., n, n]`, symmetric PSD up to rounding.
        floor: eigenvalues below are rounding error of a PSD matrix and are raised to it.

    Returns:
        `e [..., n]` and `V [..., n, n]`, with the eigenvectors as columns.
    """
    e, V = torch.linalg.eigh(C)
    return e.clamp(min=floor), V


def psd_power(
    e: Tensor, V: Tensor, exp: float, damping: Tensor | float, name: str = "C"
) -> Tensor:
    """Return `V diag((e + λ)^exp) Vᵀ`, the power of a damped eigendecomposed matrix.

    Raises:
        torch.linalg.LinAlgError: a negative power of a singular matrix.

    >>> e, V = psd_eigh(torch.tensor([[6.0, 2.0], [2.0, 4.0]]))
    >>> psd_power(e, V, 2, 0.5)
    tensor([[46.2500, 22.0000],
            [22.0000, 24.2500]])
    """
    damping = torch.as_tensor(damping, dtype=e.dtype, device=e.device)
    damped = e + damping.unsqueeze(-1)
    if exp < 0:
        rounding = e.shape[-1] * torch.finfo(e.dtype).eps * e.amax(-1, keepdim=True)
        if not (damped > rounding).all():
            raise torch.linalg.LinAlgError(
                f"matrix {name} is singular: cannot raise C + damping·I to {exp} when "
                f"its smallest eigenvalue is {damped.min().item():.3g}. Use a larger "
                "damping, or update the statistics with more data first."
            )
    return (V * damped.pow(exp).unsqueeze(-2)) @ V.mT
