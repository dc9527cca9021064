"""Inverses, eigendecompositions and powers of positive semi-definite matrices.

Notation: `C [..., n, n]` a symmetric PSD matrix (a running second moment), `λ [...]` a
damping. Everything is batched over the leading dimensions, and nothing runs below
float32.

Eigendecompositions are of matrices without their subnormal entries
(`without_subnormals`), which LAPACK does not stand.

Factorise rarely, apply often: these functions are the rare half. Those members of a batch
whose factorisation fails climb a ladder, one by one, the most faithful rung first:

    "float64"  the same in float64
    "jitter"   C + λI + jI in float64, j = 1e-8, then 1e-6, 1e-4 times the mean diagonal
    "clamped"  by an eigendecomposition, eigenvalues raised to the rounding error, plus λ

and every rung that held is on record (`Rescue`). Above the first one it takes `λ > 0`:
with a damping of 0 nobody has asked for the inverse of another matrix, and a singular one
is an error that names it. There is never a pseudo-inverse in silence. Left out: what to do
about a failure (`fisher_factors/inverse_providing.py` keeps the last good inverse).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocked import LEAST_SIZE, cholesky_in_place, inverse_of_cholesky

JITTERS = (1e-8, 1e-6, 1e-4)
"""Multiples of the mean diagonal, tried one after the other."""


def symmetrize(C: Tensor) -> Tensor:
    """Return `(C + Cᵀ)/2`."""
    return (C + C.mT) / 2


def without_subnormals(C: Tensor) -> Tensor:
    """Return `C` with zeros for the entries nearer to zero than the normal numbers.

    A row of the moment of a unit that died decays into them, and of such a matrix LAPACK
    (`syevd`) may return NaN, without an error. They are far below the rounding error of a
    decomposition of anything that is larger.

    >>> without_subnormals(torch.tensor([1.0, -1e-44, 1e-37, torch.nan]))
    tensor([1.0000e+00, 0.0000e+00, 1.0000e-37,        nan])
    """
    return torch.where(C.abs() < torch.finfo(C.dtype).tiny, 0.0, C)


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


class NotFiniteError(torch.linalg.LinAlgError):
    """A matrix has NaN or Inf entries: no damping makes that good."""


@dataclass(frozen=True)
class Rescue:
    """How a factorisation came about that the plain one did not give.

    Args:
        rung: of the ladder: `"float64"`, `"jitter"` or `"clamped"`.
        jitter: what was added to the diagonal beside the damping, in units of `C`.
    """

    rung: str
    jitter: float = 0.0


class Workspace:
    """Memory that one computation after the other uses.

    >>> workspace = Workspace()
    >>> first = workspace.take((2, 3), torch.float32, torch.device("cpu"))
    >>> again = workspace.take((3,), torch.float32, torch.device("cpu"))
    >>> first.data_ptr() == again.data_ptr()
    True
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return a tensor with any content; what was taken before is lost."""
        number, key = math.prod(shape), (dtype, device)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < number:
            memory = torch.empty(number, dtype=dtype, device=device)
            self._memory[key] = memory
        return memory[:number].view(*shape)


class DampedCholesky:
    """The Cholesky factorisation of `C + λI`, from which several functions are made.

    Args:
        C: `[..., n, n]`, symmetric PSD; or a list of such of one shape, which are stacked.
        damping: `λ >= 0`, a number or a tensor of shape `[...]`, in units of `C`.
        names: one name for each member of the (flattened) batch, for the error.
        partial: let the members that no rung rescues be listed in `failures`, with
            meaningless results, rather than raise.
        workspace: whose memory to use, until it is taken for something else.
        settled: False leaves `settle` to the caller.

    Attributes:
        regular: whether each member of the flattened batch needs no rescue.
        rescues: by index in the flattened batch, the members that climbed the ladder.
        failures: by index, the error of each member that cannot be factorised.

    Raises:
        torch.linalg.LinAlgError: a member has no rung that holds; the message names it. A
            `NotFiniteError` where it has a NaN or an Inf.

    >>> DampedCholesky(torch.tensor([[4.0, 2.0], [2.0, 2.0]])).lower()
    tensor([[2., 0.],
            [1., 1.]])
    >>> C = torch.ones(2, 2)  # singular, and λ is below the rounding error of float64
    >>> DampedCholesky(C, 1e-20).rescues[0].rung
    'jitter'
    """

    def __init__(
        self,
        C: Tensor | Sequence[Tensor],
        damping: Tensor | float = 0.0,
        names: Sequence[str] | None = None,
        *,
        partial: bool = False,
        workspace: Workspace | None = None,
        settled: bool = True,
    ) -> None:
        given = [C] if isinstance(C, Tensor) else C
        self._given, self._names, self._partial = given, names, partial
        like = given[0]
        self._shape = like.shape if isinstance(C, Tensor) else (len(C), *like.shape)
        room = (workspace or Workspace()).take(self._shape, like.dtype, like.device)
        if isinstance(C, Tensor):
            room.copy_(C)
        else:
            torch.stack(list(C), out=room)
        self._dampings = torch.as_tensor(damping, dtype=like.dtype, device=like.device)
        self._dampings = self._dampings.expand(self._shape[:-2]).reshape(-1)
        damped = room.view(-1, *like.shape[-2:])
        damped.diagonal(dim1=-2, dim2=-1).add_(self._dampings.unsqueeze(-1))
        # A factorisation reads the lower triangle alone, and sees no NaN in the upper one.
        finite = damped.sum((-2, -1)).isfinite()
        self._L, regular = _cholesky(damped, in_place=True)
        self.regular = regular & finite
        self._rescued: dict[int, Tensor] = {}  # `L` in float64
        self.rescues: dict[int, Rescue] = {}
        self.failures: dict[int, torch.linalg.LinAlgError] = {}
        if settled:
            self.settle(self.regular.tolist())  # the one host read of a factorisation

    def settle(self, regular: Sequence[bool]) -> None:
        """Send those members up the ladder that need it.

        Args:
            regular: the attribute, read by the host.

        Raises:
            torch.linalg.LinAlgError: as the class.
        """
        for i, fine in enumerate(regular):
            if not fine:
                self._rescue(i)

    def _rescue(self, i: int) -> None:
        members = [C.reshape(-1, *C.shape[-2:]) for C in self._given]
        C = members[i // len(members[0])][i % len(members[0])]
        damping = self._dampings[i].item()
        found = _climb(C, damping)
        if found is None:
            name = self._names[i] if self._names else f"number {i}"
            self.failures[i] = _singular(C, damping, name)
            if not self._partial:
                raise self.failures[i]
        else:
            self._rescued[i], self.rescues[i] = found
        # So that batched calls do not stumble over it.
        self._L[i] = torch.eye(len(C), dtype=C.dtype, device=C.device)

    def inverse(self) -> Tensor:
        """Return `(C + λI)⁻¹`, `[..., n, n]`."""
        result = torch.empty(self._shape, dtype=self._L.dtype, device=self._L.device)
        flat = result.view(-1, *self._shape[-2:])
        if len(flat) == 1 and not self._rescued and _is_large(flat):
            inverse_of_cholesky(self._L[0], flat[0])
            return result
        return self._each(torch.cholesky_inverse)

    def write_inverse(self, outs: Sequence[Tensor | None]) -> None:
        """Write the inverse of each of the list `C` over a tensor of its shape, if any."""
        if len(outs) == 1 and outs[0] is not None and outs[0].dim() == 2:
            if _is_large(self._L) and not self._rescued:
                inverse_of_cholesky(self._L[0], outs[0])
                return
        for out, value in zip(outs, self.inverse(), strict=True):
            if out is not None:
                out.copy_(value)

    def lower(self) -> Tensor:
        """Return `L`, lower triangular with `L Lᵀ = C + λI`."""
        return self._each(torch.tril)

    def lower_inverse(self) -> Tensor:
        """Return `L⁻¹`, lower triangular."""
        return self._each(_triangular_inverse)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        result = function(self._L)
        for i, L64 in self._rescued.items():
            result[i] = function(L64)
        return result.reshape(self._shape)


def _climb(C: Tensor, damping: float) -> tuple[Tensor, Rescue] | None:
    """Return `L [n, n]` of `C + λI` in float64, and the rung that gave it, if one did."""
    if not (C.isfinite().all() and math.isfinite(damping)):
        return None
    C64 = symmetrize(C.double())
    mean = C64.diagonal().mean().abs().item()
    # Without a damping nobody has asked for the inverse of another matrix than `C`.
    for multiple in (0.0, *JITTERS) if damping > 0 else (0.0,):
        jitter = multiple * mean
        L, regular = _cholesky(add_damping(C64, damping + jitter))
        if regular and _fits(L, C.dtype):
            return L, Rescue("jitter", jitter) if jitter else Rescue("float64")
    if damping > 0:
        try:
            e, V = torch.linalg.eigh(C64)
        except torch.linalg.LinAlgError:
            return None
        damped = e.clamp(min=_rounding(e).clamp(min=0).item()) + damping
        # L Lᵀ = (V √D)(V √D)ᵀ, by QR, which does not square the condition.
        R = torch.linalg.qr((V * damped.sqrt()).mT).R
        L = R.mT * R.diagonal().sign()
        if _fits(L, C.dtype):
            return L, Rescue("clamped")
    return None


def _fits(L: Tensor, dtype: torch.dtype) -> bool:
    """Whether the inverse of `L Lᵀ` is finite in a dtype too; reads the host."""
    return bool(torch.cholesky_inverse(L).to(dtype).isfinite().all())


def _triangular_inverse(L: Tensor) -> Tensor:
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L, eye, upper=False)


def psd_inverse(
    C: Tensor, damping: Tensor | float = 0.0, names: Sequence[str] | None = None
) -> Tensor:
    """Return `(C + λI)⁻¹`, `[..., n, n]`, by Cholesky; arguments as `DampedCholesky`.

    Raises:
        torch.linalg.LinAlgError: as `DampedCholesky`.

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


def _cholesky(C: Tensor, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """`L`, whose lower triangle counts, and whether each member is positive definite
    beyond rounding error; maybe in the memory of `C`.
    """
    diagonal = C.diagonal(dim1=-2, dim2=-1)
    # A rank-deficient matrix may slip through with a last pivot of pure rounding error.
    rounding = _rounding(diagonal)
    # And the inverse of a subnormal pivot is none.
    rounding = rounding.clamp(min=torch.finfo(C.dtype).tiny)
    try:
        if in_place and len(C) == 1 and _is_large(C):
            L, info = (result.unsqueeze(0) for result in cholesky_in_place(C[0]))
        else:
            L, info = torch.linalg.cholesky_ex(C)
    except torch.linalg.LinAlgError:  # of the whole batch: each member has its own try
        return torch.zeros_like(C), C.new_zeros(C.shape[:-2], dtype=torch.bool)
    pivots = L.diagonal(dim1=-2, dim2=-1).square()
    return L, (info == 0) & (pivots.amin(-1) > rounding) & pivots.isfinite().all(-1)


def _is_large(C: Tensor) -> bool:
    """Whether one matrix is so large that it is done by halves; on accelerators none."""
    return C.shape[-1] >= LEAST_SIZE and C.device.type == "cpu"


def _rounding(values: Tensor) -> Tensor:
    """The rounding error of eigenvalues or a diagonal `[..., n]`: `n ε max`."""
    return values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1)


def _singular(C: Tensor, damping: float, name: str) -> torch.linalg.LinAlgError:
    """The error of a matrix `[n, n]` that cannot be factorised; reads the host."""
    if not C.isfinite().all():
        return NotFiniteError(
            f"matrix {name} has NaN or Inf entries and cannot be inverted: it was changed "
            "from outside, since no batch with a NaN or an Inf enters. Load the state of "
            "before"
        )
    size = f"matrix {name} ({C.shape[-1]}x{C.shape[-1]})"
    try:
        e = torch.linalg.eigvalsh(C.double())
        least, most = e[0].item() + damping, e[-1].item() + damping
        condition = most / least if least > 0 else math.inf
        found = (
            f"its smallest eigenvalue is {least:.3g}, its largest {most:.3g} (condition "
            f"{condition:.3g})"
        )
    except torch.linalg.LinAlgError:
        found = "it has no eigendecomposition either"
    return torch.linalg.LinAlgError(
        f"{size} is singular: expected a positive definite C + damping·I with damping "
        f"{damping:.3g}, {found}. Use a larger damping, or update the statistics with more "
        "data first"
    )


def psd_eigh(C: Tensor, floor: float = 0.0, name: str = "C") -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues, clipped from below at `floor`, and eigenvectors.

    Those of a batch whose decomposition fails, or is not finite though they are, are
    decomposed alone, in float64. Subnormal entries count as 0.

    Args:
        C: `[..., n, n]`, symmetric PSD up to rounding.
        floor: eigenvalues below are rounding error of a PSD matrix and are raised to it.
        name: for the error.

    Returns:
        `e [..., n]` and `V [..., n, n]`, with the eigenvectors as columns; both are NaN
        where `C` has a NaN or an Inf, even if that is in the triangle that is not read.

    Raises:
        torch.linalg.LinAlgError: it fails in float64 too (`NotFiniteError`: of a matrix
            with a NaN or an Inf).
    """
    C = without_subnormals(C)
    finite = _all_finite(C)
    try:
        e, V = torch.linalg.eigh(C)
        failed = finite & ~(e.isfinite().all(-1) & _all_finite(V))
    except torch.linalg.LinAlgError:
        e, V = torch.empty_like(C[..., 0]), torch.empty_like(C)
        failed = torch.ones_like(finite)
    members, n = C.reshape(-1, *C.shape[-2:]), C.shape[-1]
    # The one host read of a decomposition.
    for i in failed.flatten().nonzero().flatten().tolist():
        _eigh_alone(members[i], name, e.view(-1, n)[i], V.view(-1, n, n)[i])
    # Only the lower triangle was read.
    fine = finite[..., None, None]
    e = torch.where(fine.squeeze(-1), e.clamp(min=floor), torch.nan)
    return e, torch.where(fine, V, torch.nan)


def orthogonal_iteration(C: Tensor, Q: Tensor) -> Tensor:
    """Return `Q'` of one step of orthogonal iteration from the columns of `Q`:

        Q' R = C Q P,   R upper triangular with a diagonal >= 0

    `P` brings the columns to the order of `diag(Qᵀ C Q)`, the largest first (Golub & Van
    Loan, section 8.2.4). The space of the first k columns nears that of the k largest
    eigenvalues by the factor `s_{k+1}/s_k`. A `Q` of eigenvectors stays as it is. One
    product and a QR decomposition, where `psd_eigh` is exact.

    Args:
        C: `[..., n, n]`, symmetric PSD.
        Q: orthogonal.

    Returns:
        Orthogonal; its columns are in ascending order of those numbers, as `psd_eigh`'s.
        Not finite where `C` is not.

    >>> C = torch.tensor([[3.0, 0.1], [0.1, 1.0]])
    >>> orthogonal_iteration(C, torch.eye(2))
    tensor([[-0.0333,  0.9994],
            [ 0.9994,  0.0333]])
    """
    Z = C @ Q
    order = (Q * Z).sum(-2).argsort(dim=-1, descending=True, stable=True)
    found, R = torch.linalg.qr(Z.take_along_dim(order.unsqueeze(-2), -1))
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(C.dtype)
    return (found * signs.unsqueeze(-2)).flip(-1)


def diagonal_in_basis(C: Tensor, Q: Tensor) -> Tensor:
    """Return the diagonal of `Qᵀ C Q`, `[..., n]` and none of it below 0, by one product.

    Args:
        C: `[..., n, n]`, symmetric PSD.
        Q: orthogonal.

    >>> diagonal_in_basis(torch.tensor([[3.0, 0.1], [0.1, 4.0]]), torch.eye(2))
    tensor([3., 4.])
    """
    return (Q * (C @ Q)).sum(-2).clamp(min=0)


def off_diagonal_share(C: Tensor, a: Tensor) -> Tensor:
    """Return the share of `M = Qᵀ C Q` beside its diagonal, by the Frobenius norm.

    That is the relative error of `Q diag(a) Qᵀ`, without a product: `‖M‖ = ‖C‖`.

    Args:
        C: `[..., n, n]`, symmetric PSD.
        a: the diagonal of `M`, see `diagonal_in_basis`.

    Returns:
        0-dim; the largest of a stack. Not finite where `C` is not.

    >>> off_diagonal_share(torch.tensor([[3.0, 0.1], [0.1, 4.0]]), torch.tensor([3.0, 4]))
    tensor(0.0283)
    """
    square = torch.linalg.matrix_norm(C).square()
    # Of the zero matrix there is nothing beside the diagonal.
    rest = (square - a.square().sum(-1)).clamp(min=0)
    share = rest / square.clamp(min=torch.finfo(C.dtype).tiny)
    return share.sqrt().amax()


def all_finite(tensor: Tensor) -> Tensor:
    """Return whether a tensor is free of NaN and Inf, 0-dim, in one pass without a mask.

    >>> all_finite(torch.tensor([1.0, 2.0])), all_finite(torch.tensor([1.0, torch.nan]))
    (tensor(True), tensor(False))
    """
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.stack(torch.aminmax(tensor)).isfinite().all()


def _all_finite(C: Tensor) -> Tensor:
    """Whether each matrix `[..., n, n]` is free of NaN and Inf, `[...]`."""
    return C.isfinite().flatten(-2).all(-1)


def _eigh_alone(C: Tensor, name: str, e: Tensor, V: Tensor) -> None:
    """Write the decomposition of one matrix, in float64, to `e` and `V`."""
    if not C.isfinite().all():
        raise _singular(C, 0.0, name)
    try:
        found = torch.linalg.eigh(C.double())
    except torch.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(
            f"matrix {name} ({C.shape[-1]}x{C.shape[-1]}) has no eigendecomposition, in "
            f"float64 either: {error}"
        ) from error
    if not all(tensor.isfinite().all() for tensor in found):
        raise torch.linalg.LinAlgError(
            f"matrix {name} ({C.shape[-1]}x{C.shape[-1]}) is finite, and its "
            "eigendecomposition is not, in float64 either"
        )
    e.copy_(found[0])
    V.copy_(found[1])


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
    damped = e + torch.as_tensor(damping, dtype=e.dtype, device=e.device).unsqueeze(-1)
    if exp < 0 and not (damped > _rounding(e).unsqueeze(-1)).all():
        raise torch.linalg.LinAlgError(
            f"matrix {name} is singular: cannot raise C + damping·I to {exp} when its "
            f"smallest eigenvalue is {damped.min().item():.3g}. Use a larger damping, or "
            "update the statistics with more data first."
        )
    return (V * damped.pow(exp).unsqueeze(-2)) @ V.mT


def rescued_power(
    C: Tensor,
    exp: float,
    damping: Tensor | float,
    name: str = "C",
    floor: float = 0.0,
) -> tuple[Tensor, Rescue]:
    """Return `(C + λI)^exp` where `psd_power` fails, and the rung of the ladder that holds.

    In float64; and if that is singular too, with `e + λ` raised to the rounding error.
    `floor` as in `psd_eigh`.

    Raises:
        torch.linalg.LinAlgError: as `psd_power`, where a `λ` is 0; `NotFiniteError`.

    >>> rescued_power(torch.ones(2, 2), -1, 1e-30)[1].rung
    'clamped'
    """
    e, V = psd_eigh(C.double(), floor, name)
    if not e.isfinite().all():
        raise _singular(C, 0.0, name)
    damping = torch.as_tensor(damping, dtype=e.dtype, device=e.device)
    damped = e + damping.unsqueeze(-1)
    rung = "float64"
    rounding = _rounding(e).unsqueeze(-1)
    if not (damped > rounding).all():
        if not (damping > 0).all():
            psd_power(e, V, exp, damping, name)  # raises
        rung, damped = "clamped", damped.maximum(rounding)
    power = ((V * damped.pow(exp).unsqueeze(-2)) @ V.mT).to(C.dtype)
    if not power.isfinite().all():
        raise torch.linalg.LinAlgError(
            f"matrix {name}: (C + damping·I)^{exp} is beyond the numbers of {C.dtype}. Use "
            "a larger damping"
        )
    return power, Rescue(rung)
