"""`LowRankFactor`: a large side by its largest eigenvalues, and one number for the rest.

Notation: `C [d, d]` the running second moment of rows X, never formed; `Ω [d, q]` a fixed
matrix with random orthonormal columns, `q = min(2r + 1, d)` for a rank r. What is stored
and averaged is the *sketch*

    Y = CΩ = Xᵀ(XΩ)/R,   tr C

which is linear in C: sums over sources, merged batches and the moving average of sketches
are the sketch of what they would be of C, exactly. From it comes the Nyström
approximation, cut to its r largest eigenvalues s (Tropp, Yurtsever, Udell & Cevher 2017,
arXiv 1706.05736, algorithm 3, with their shift ν against rounding):

    C ≈ Y (ΩᵀY)⁺ Yᵀ,   cut to U diag(s) Uᵀ
    Ĉ = U diag(s) Uᵀ + ρ (I − UUᵀ),   ρ = (tr C − Σs)/(d − r)

It is exact where C has no more than rank r; else the cut-off eigenvalues τ bound what
`U diag(s) Uᵀ` misses, in expectation over Ω by 2 Σ τ in nuclear norm. The trace is always
that of C. Powers are those of Ĉ, exactly:

    (Ĉ + λI)^p = (ρ + λ)^p I + U [(s + λ)^p − (ρ + λ)^p] Uᵀ

Left out: Cholesky factors, which have no such form; the powers ½ and −½ do for them.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ..damping import DampingFunc
from ..linalg import Rescue, symmetrize
from .base import FactorOptions, FisherFactor
from .conv import ConvInputKroneckerFactor, ConvOutputKroneckerFactor
from .data import TensorLike
from .inverse_providing import (
    Computed,
    Function,
    InverseProvidingFactor,
    Stored,
    of_sparse_rows,
)
from .linear import FullyConnectedKroneckerFactor

_SEED = 0  # of Ω; the state of a factor has Ω itself


def sketch_matrix(d: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Return `Ω [d, q]`, always the same for the same arguments.

    >>> sketch_matrix(10, 2, torch.float32).shape
    torch.Size([10, 5])
    """
    generator = torch.Generator().manual_seed(_SEED)
    q = min(2 * rank + 1, d)
    gaussian = torch.randn(d, q, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.to(dtype)


def nystrom(Y: Tensor, omega: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the r largest eigenvalues `s [..., r]`, and `U [..., d, r]`, from `Y = CΩ`.

    >>> C = torch.diag(torch.tensor([1.0, 5.0, 0.0, 0.0]))
    >>> s, U = nystrom(C[:, :3], torch.eye(4)[:, :3], 2)
    >>> s.round(decimals=3)
    tensor([1., 5.])
    """
    norm = torch.linalg.matrix_norm(Y)[..., None, None]
    shift = norm * torch.finfo(Y.dtype).eps  # ν
    Y = Y + shift * omega
    e, V = torch.linalg.eigh(symmetrize(omega.mT @ Y))
    # None is below ν but by rounding; of C = 0 all are 0, and so is Y.
    e = e.clamp(min=torch.finfo(Y.dtype).tiny).maximum(shift.squeeze(-1))
    Q, R = torch.linalg.qr((Y @ V) * e.rsqrt().unsqueeze(-2))
    s, W = torch.linalg.eigh(symmetrize(R @ R.mT))
    s, W = s[..., -rank:], W[..., -rank:]
    return (s - shift.squeeze(-1)).clamp(min=0), Q @ W


class LowRankFactor(InverseProvidingFactor, abc.ABC):
    """A factor that stores a sketch of its matrix, `[..., d + 1, q]` (abstract).

    The last row has the trace, in its first entry. `get_cov()` and `get_matpower` make
    the dense matrix, for tests and small sizes.
    """

    _groups: int = 1

    def _approximate(self, size: int, rank: int) -> None:
        """Say of what size and rank; to be called by the constructor."""
        if rank < 1:
            raise ValueError(f"{self.name}: rank: expected at least 1, got {rank}")
        self._num_features = size
        self._num_kept = min(rank, size)
        self._omega = sketch_matrix(size, self._num_kept, self._dtype).to(self._device)
        self._eigen: tuple[int, tuple[Tensor, Tensor, Tensor]] | None = None

    # Shapes.

    @property
    def _stack(self) -> tuple[int, ...]:
        return () if self._groups == 1 else (self._groups,)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        return (*self._stack, self._num_features + 1, self._omega.shape[1])

    @property
    def cov_dim(self) -> int:
        """`d`."""
        return self._num_features

    def cov_trace(self) -> Tensor:
        """Return the trace of `C`, exact: 0-dim, or one for each group."""
        return self._stored_cov()[..., -1, 0].clone()

    def describe(self) -> str:
        """Return how the matrix is kept and its size, as in `"low rank 64 of 4096"`."""
        text = f"low rank {self._num_kept} of {self.cov_dim}"
        return text if self._groups == 1 else f"{self._groups} x {text}"

    def spectrum(self) -> Tensor:
        """Return the ascending eigenvalues `[..., d]` of the current `Ĉ`."""
        s, _, rho = self._decomposed()
        rest = self.cov_dim - self._num_kept
        return torch.cat([rho.unsqueeze(-1).expand(*s.shape[:-1], rest), s], -1).sort()[0]

    # Costs.

    @property
    def _keeps_eigendecomp(self) -> bool:
        return False

    @property
    def kept_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all tensors that are kept, in the dtype of `cov`."""
        stack, d, r = self._stack, self.cov_dim, self._num_kept
        omega, decomposed = tuple(self._omega.shape), [(*stack, r), (*stack, d, r), stack]
        return [*super().kept_shapes, omega, *decomposed]

    def moment_cost(self, rows: float) -> float:
        """Return about how many multiply-adds the sketch of `rows` rows takes."""
        return 2 * super().moment_cost(rows)

    @property
    def refresh_cost(self) -> int:
        """About how many multiply-adds a refresh of all that is registered takes."""
        d, q = self._omega.shape
        return math.prod(self._stack) * (3 * d * q**2 + 2 * 9 * q**3)

    # Statistics.

    def _fill_identity(self, cov: Tensor) -> None:
        cov[..., :-1, :] = self._omega
        cov[..., -1, 0] = self.cov_dim

    def _sums_of_rows(self, rows: Tensor, has_bias: bool) -> Tensor:
        """The sketch of `[X, 1]ᵀ[X, 1]`, not divided by the rows `X [..., R, ·]`."""
        omega, R = self._omega.to(rows.dtype), rows.shape[-2]
        projected = rows @ omega[: rows.shape[-1]]
        trace = torch.linalg.vector_norm(rows, dim=(-2, -1)).square()
        parts = [rows.mT @ projected]
        if has_bias:  # without a copy of the rows
            projected = projected + omega[-1]
            parts = [rows.mT @ projected, projected.sum(-2, keepdim=True)]
            trace = trace + R
        last = torch.zeros_like(projected[..., :1, :])
        last[..., 0, 0] = trace
        return torch.cat([*parts, last], dim=-2)

    # What is made of it.

    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """`s [..., r]`, `U [..., d, r]` and `ρ [...]` of the current `Ĉ`."""
        cov = self._stored_cov()
        if self._eigen is None or self._eigen[0] != cov._version:
            s, U = nystrom(cov[..., :-1, :], self._omega, self._num_kept)
            rest = self.cov_dim - self._num_kept
            rho = (self.cov_trace() - s.sum(-1)).clamp(min=0) / max(rest, 1)
            rho = rho if rest else s[..., 0]  # of no direction, then
            self._eigen = cov._version, (s, U, rho)
        return self._eigen[1]

    def get_cov(self) -> Tensor:
        """Return the dense `Ĉ [..., d, d]`; `get_cov_var()` is the sketch.

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
        """
        return self._times(self._identity(), 1, 0.0)

    def get_matpower(self, exp: float, damping_func: DampingFunc) -> Tensor:
        """Return `(Ĉ + λI)^exp`, dense, as of the last refresh; for `exp = 1` current.

        Raises:
            KeyError: not registered.
            RuntimeError: not instantiated, or not refreshed since.
        """
        return self._times(self._identity(), exp, damping_func)

    def _identity(self) -> Tensor:
        eye = torch.eye(self.cov_dim, dtype=self._dtype, device=self._device)
        return eye.expand(*self._stack, -1, -1)

    def _times(self, x: Tensor, exp: float, damping_func: DampingFunc) -> Tensor:
        if exp == 1:
            U, changes = self._power(1, self._damping_of(damping_func))
        else:
            register = f"register_matpower({exp}, damping_func)"
            what = f"the power {exp}"
            U, changes = self._get(float(exp), damping_func, what, register)
        tail, top = changes[..., :1, None], changes[..., 1:, None]
        return tail * x + U @ (top * (U.mT @ x))

    def left_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `(Ĉ + λI)^exp x`, for dense `x [..., d, k]`.

        Raises:
            ValueError: `x` is not a dense matrix with `d` rows.
            KeyError, RuntimeError: as `get_matpower`.
        """
        self._check_matrix(x, "left_multiply_matpower", 0)
        return self._times(x, exp, damping_func)

    def right_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `x (Ĉ + λI)^exp`, for `x [..., k, d]`, dense or with sparse rows.

        Raises:
            ValueError: `x` is not such a matrix with `d` columns.
            KeyError, RuntimeError: as `get_matpower`.
        """
        self._check_matrix(x, "right_multiply_matpower", 1)
        if x.layout == torch.sparse_coo:
            return of_sparse_rows(
                x, lambda rows: self._times(rows.mT, exp, damping_func).mT
            )
        return self._times(x.mT, exp, damping_func).mT

    def register_cholesky(self, damping_func: DampingFunc) -> None:
        """Raise NotImplementedError: no Cholesky factor has this structure."""
        raise NotImplementedError(
            f"{self.name}: a factor of low rank has no Cholesky factor of that form; "
            "register the powers 0.5 and -0.5, or keep the side full or split"
        )

    def register_cholesky_inverse(self, damping_func: DampingFunc) -> None:
        """Raise NotImplementedError, as `register_cholesky`."""
        self.register_cholesky(damping_func)

    def _power(self, exp: float, damping: Tensor | float) -> tuple[Tensor, Tensor]:
        """`U`, and `(ρ + λ)^p` before `(s + λ)^p − (ρ + λ)^p` in one tensor."""
        s, U, rho = self._decomposed()
        damping = torch.as_tensor(damping, dtype=s.dtype, device=s.device)
        damped = torch.cat([rho.unsqueeze(-1), s], -1) + damping.unsqueeze(-1)
        if exp < 0:
            rounding = self.cov_dim * torch.finfo(s.dtype).eps * s.amax(-1, keepdim=True)
            if not (damped > rounding).all():
                if not (s.isfinite().all() and (damping > 0).all()):
                    raise torch.linalg.LinAlgError(
                        f"matrix {self.name} is singular: cannot raise C + damping·I to "
                        f"{exp} when its smallest eigenvalue is {damped.min().item():.3g}. "
                        "Use a larger damping, or update the statistics with more data "
                        "first."
                    )
                damped = damped.maximum(rounding)
                self._rescues.append(Rescue("clamped"))
        powers = damped.pow(exp)
        tail = powers[..., :1]
        return U, torch.cat([tail, powers[..., 1:] - tail], -1)

    # What is kept: for every power U and the coefficients.

    def _function_shapes(self, function: Function) -> tuple[tuple[int, ...], ...]:
        stack, r = self._stack, self._num_kept
        return (*stack, self.cov_dim, r), (*stack, r + 1)

    def _exponents(self) -> list[Stored]:
        return []  # none by an eigendecomposition of a dense matrix

    def _by_cholesky(self, eigen: bool) -> dict[Hashable, list[Stored]]:
        return {}

    def _others(self) -> list[Stored]:
        return self._instantiated()

    def _compute_others(self) -> list[Computed]:
        stored = self._others()
        dampings = self._evaluated(stored)
        computed = list[Computed]()
        for power in stored:
            assert isinstance(power.function, float)
            damping = dampings[power.damping_id]
            computed.append((power, self._power(power.function, damping)))
        return computed

    # Refreshed in a thread.

    def snapshot(
        self, twins: Mapping[FisherFactor, FisherFactor], state: Any = None
    ) -> Self:
        """Return a copy to be refreshed in a thread, with a sketch of its own."""
        twin = super().snapshot(twins, state)
        twin._eigen = None  # by the version of another tensor
        return twin

    # State.

    def to(self, device: torch.device | str) -> Self:
        """Move the state to a device; data given later is moved there too."""
        super().to(device)
        self._omega = self._omega.to(self._device)
        self._eigen = None
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to restore the factor bit for bit."""
        return {**super().state_dict(), "sketch_matrix": self._omega.clone()}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing."""
        super().check_state_dict(state)
        shape = tuple(state["sketch_matrix"].shape)
        if shape != tuple(self._omega.shape):
            raise ValueError(
                f"{self.name}: expected a sketch matrix of shape "
                f"{tuple(self._omega.shape)} in the state, got {shape}"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, after the same registrations.

        Raises:
            ValueError: the state of another factor; nothing is changed then.
        """
        super().load_state_dict(state)
        self._omega = state["sketch_matrix"].to(self._device, self._dtype, copy=True)
        self._eigen = None


class LowRankKroneckerFactor(LowRankFactor, FullyConnectedKroneckerFactor):
    """The second moment `XᵀX/R` by r eigenvalues: either side of a fully connected layer.

    Stored as a sketch `[d + 1, 2r + 1]`.

    Args:
        tensors: `[source][tower]`, each `[..., d]`; all leading dimensions are rows.
        has_bias: append a one, last, to each row.
        rank: `r`.
        size: `d`, without the bias; needed only where `tensors` are callables.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: tensors without a last dimension of size `d`, or `rank` below 1.

    >>> x = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    >>> factor = LowRankKroneckerFactor([[x]], rank=1)
    >>> factor.instantiate_cov_variables()
    >>> _ = factor.make_covariance_update_op(0.95)()
    >>> factor.get_cov().diagonal(), factor.cov_trace()
    (tensor([2.0000, 0.1667, 0.1667, 0.1667]), tensor(2.5000))
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[TensorLike]],
        has_bias: bool = False,
        *,
        rank: int,
        size: int | None = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            tensors,
            has_bias,
            size=size,
            name=name,
            options=options,
            dtype=dtype,
            device=device,
        )
        self._approximate(self._size + has_bias, rank)

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        rows = self._single(tensors).reshape(-1, self._size).to(self._dtype)
        return self._sums_of_rows(rows, self._has_bias).div_(len(rows))


class ConvInputLowRankKroneckerFactor(LowRankFactor, ConvInputKroneckerFactor):
    """A convolution's input factor by r eigenvalues; patches are formed piece by piece.

    Stored as a sketch `[ΔC(+1) + 1, 2r + 1]`, with groups a stack of them.

    Args:
        args: as `ConvInputKroneckerFactor`; so are `kwargs`, but for `patch_mask`.
        rank: `r`.
        kwargs: see above.

    Raises:
        ValueError: as `ConvInputKroneckerFactor`, `rank` below 1, or a mask.

    >>> x = torch.ones(1, 5, 5, 4)
    >>> factor = ConvInputLowRankKroneckerFactor([x], [3, 3, 4, 1], "VALID", rank=2)
    >>> factor.describe()
    'low rank 2 of 36'
    """

    def __init__(self, *args: Any, rank: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._mask is not None:
            raise ValueError(f"{self.name}: patch_mask: expected None, got a mask")
        self._groups = self._conv.groups
        self._approximate(self._conv.columns + self._has_bias, rank)

    def _moment(self, inputs: Tensor) -> Tensor:
        conv = self._conv
        patches, total = conv.patches(inputs), None
        for n, o in conv.pieces(inputs):
            rows = conv.rows(patches, n, o, self._dtype)
            rows = rows.unflatten(1, (conv.groups, conv.columns)).transpose(0, 1)
            part = self._sums_of_rows(conv.in_order(rows, (-1,)), self._has_bias)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.div_(conv.num_rows(inputs)).view(self._cov_shape)

    def _moment_of_rows(self, rows: Tensor) -> Tensor:
        return self._sums_of_rows(rows, False).div_(rows.shape[-2])


class ConvOutputLowRankKroneckerFactor(LowRankFactor, ConvOutputKroneckerFactor):
    """A convolution's output factor by r eigenvalues.

    Stored as a sketch `[K + 1, 2r + 1]`, with groups a stack of them.

    Args:
        args: as `ConvOutputKroneckerFactor`; so are `kwargs`.
        rank: `r`.
        kwargs: see above.

    Raises:
        ValueError: as `ConvOutputKroneckerFactor`, or `rank` below 1.

    >>> factor = ConvOutputLowRankKroneckerFactor([[torch.ones(1, 2, 2, 9)]], rank=2)
    >>> factor.describe()
    'low rank 2 of 9'
    """

    def __init__(self, *args: Any, rank: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._approximate(self._num_channels // self._groups, rank)

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        rows = self._single(tensors).movedim(self._channel_dim, -1).to(self._dtype)
        rows = rows.reshape(-1, self._groups, self.cov_dim).transpose(0, 1)
        sums = self._sums_of_rows(rows, False)
        return sums.div_(rows.shape[-2]).view(self._cov_shape)
