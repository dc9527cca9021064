"""`ConvInputSUAKroneckerFactor`: spatially uncorrelated activations.

Notation: `Δ` kernel offsets; `m [C]` the mean and `Σ [C, C]` the covariance (mean removed)
of the input channels over all examples and locations. If the activations at different
locations are uncorrelated (Grosse & Martens 2016, arXiv 1602.01407, Theorem 4)

    A = [[I_Δ ⊗ Σ, 0], [0, 0]] + u uᵀ,    u = (1_Δ ⊗ m, 1)

for offset-major columns (channels last); for channel-major ones (channels first) the
Kronecker products have their sides exchanged. The last row and column are those of a
bias. With `M = (Σ + λI)⁻¹`, `w = M m` and `c` what eliminating the bias leaves of 1,

    (I ⊗ (Σ + λI) + c (1 ⊗ m)(1 ⊗ m)ᵀ)⁻¹ = I ⊗ M - s (1 ⊗ w)(1 ⊗ w)ᵀ
    s = c / (1 + c Δ mᵀw),    c = λ/(1 + λ) with a bias, 1 without

(Sherman-Morrison), so that a `[C, C]` matrix is inverted in place of `[ΔC, ΔC]`.

Left out: padding, which the approximation does not see; groups; powers but 1 and -1.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..damping import DampingFunc, evaluate_damping
from ..linalg import DampedCholesky, symmetrize
from .base import FactorOptions
from .conv_geometry import ConvGeometry, Padding, printable
from .data import TensorLike, scope_string_from_params
from .inverse_providing import Computed, Function, InverseProvidingFactor, Stored
from .linear import rows_moment


class ConvInputSUAKroneckerFactor(InverseProvidingFactor):
    """The second moment of patches, from the moments of single locations.

    What is stored and averaged, `get_cov_var() [C+1, C+1]`, is the second moment of the
    channels with a one appended; `get_cov()` makes the dense `[ΔC(+1), ΔC(+1)]` of it.

    Args:
        inputs: this and the others up to `has_bias` as `ConvInputKroneckerFactor`.
        filter_shape: see there.
        padding: see there; it matters for the number of rows alone.
        strides: see there; likewise.
        dilation_rate: see there; likewise.
        data_format: see there.
        extract_patches_fn: see there.
        has_bias: append a one, last, to each row.
        zero_mean: take `m = 0`, so that `A = I_Δ ⊗ Σ` with `Σ` still the covariance; the
            one of the bias stays.
        padding_mode: as `ConvInputKroneckerFactor`; likewise.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: arguments or data that do not fit together.

    >>> x = torch.tensor([1.0, -1.0, 3.0]).view(3, 1, 1)
    >>> factor = ConvInputSUAKroneckerFactor([x], [2, 1, 1], "SAME")
    >>> factor.instantiate_cov_variables()
    >>> _ = factor.make_covariance_update_op(0.0)()
    >>> factor.get_cov()
    tensor([[3.6667, 1.0000],
            [1.0000, 3.6667]])
    """

    def __init__(
        self,
        inputs: Sequence[TensorLike],
        filter_shape: Sequence[int],
        padding: Padding,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        has_bias: bool = False,
        *,
        zero_mean: bool = False,
        padding_mode: str = "zeros",
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            params = [inputs, filter_shape, strides, printable(padding), dilation_rate]
            params += [data_format, extract_patches_fn, has_bias, zero_mean]
            name = "ff_convinsuakron_" + scope_string_from_params(params)
        self._conv = ConvGeometry.make(
            name,
            filter_shape,
            padding,
            strides,
            dilation_rate,
            data_format,
            extract_patches_fn,
            padding_mode,
        )
        self._has_bias = has_bias
        self._zero_mean = zero_mean
        super().__init__([inputs], name, options, dtype, device)

    # Statistics.

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        n = self._conv.channels + 1
        return (n, n)

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        n = self._conv.columns + self._has_bias
        return (n, n)

    @property
    def cov_dim(self) -> int:
        """`ΔC`, and one for a bias."""
        return self._matrix_shape[-1]

    def describe(self) -> str:
        """Return how the matrix is kept and its size."""
        return f"uncorrelated locations {self._conv.channels} of {self.cov_dim}"

    @property
    def _keeps_eigendecomp(self) -> bool:
        return False

    @property
    def refresh_cost(self) -> int:
        """About how many multiply-adds a refresh of all that is registered takes."""
        return len(self._powers) * self._conv.channels**3

    def _check_tensor(self, *tensors: Tensor) -> None:
        self._conv.check_inputs(self._single(tensors))

    def _nest(self, tensors: Sequence[TensorLike]) -> Sequence[Sequence[TensorLike]]:
        return super()._nest([tensors])  # inputs have one source

    def num_rows(self, *tensors: Tensor) -> int:
        """`N·T`: examples times output locations, as for the exact factor."""
        return self._conv.num_rows(self._single(tensors))

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        x = self._conv.channels_first(self._single(tensors))
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        return rows_moment(rows, has_bias=True)

    def _mean_and_cov(self) -> tuple[Tensor, Tensor]:
        """`m` and `Σ`; with `zero_mean`, 0 and `Σ`."""
        moment = self._stored_cov()
        m = moment[-1, :-1]
        cov = symmetrize(moment[:-1, :-1] - m.outer(m))
        return (torch.zeros_like(m) if self._zero_mean else m), cov

    def get_cov(self) -> Tensor:
        """Return the dense `A [ΔC(+1), ΔC(+1)]`.

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
        """
        eye = torch.eye(self.cov_dim, dtype=self._dtype, device=self._device)
        return self._multiply_cov(eye)

    def cov_trace(self) -> Tensor:
        """Return the trace of `A`, 0-dim, without forming it."""
        m, cov = self._mean_and_cov()
        return self._conv.num_offsets * (cov.trace() + m @ m) + int(self._has_bias)

    # Products. A matrix `[ΔC, k]` is taken as [Δ, C, k] or, channels first, [C, Δ, k].

    def _split(self, x: Tensor) -> Tensor:
        """The rows of patches of `x [ΔC(+1), k]` as `[Δ, C, k]`."""
        conv = self._conv
        x = x[: conv.columns]
        if conv.channels_last:
            return x.unflatten(0, (conv.num_offsets, conv.channels))
        return x.unflatten(0, (conv.channels, conv.num_offsets)).transpose(0, 1)

    def _join(self, patches: Tensor, bias: Tensor) -> Tensor:
        """Undo `_split`, with the row of the bias, if any, below."""
        if not self._conv.channels_last:
            patches = patches.transpose(0, 1)
        patches = patches.flatten(0, 1)
        return torch.cat([patches, bias]) if self._has_bias else patches

    def _multiply_cov(self, x: Tensor) -> Tensor:
        m, cov = self._mean_and_cov()
        patches, bias = self._split(x), x[self._conv.columns :]
        along = (m @ patches.sum(0) + bias.sum(0)).unsqueeze(0)  # uᵀx
        return self._join(cov @ patches + m.unsqueeze(1) * along, along)

    def _multiply_inverse(self, x: Tensor, quants: tuple[Tensor, ...]) -> Tensor:
        M, w, m, scalars = quants
        s, remaining = scalars  # remaining = 1/(1 + λ): what a bias row is divided by
        patches, bias = self._split(x), x[self._conv.columns :]
        if self._has_bias:
            patches = patches - m.unsqueeze(1) * (bias * remaining)
        along = w @ patches.sum(0)
        patches = M @ patches - s * w.unsqueeze(1) * along
        if self._has_bias:
            bias = (bias - m @ patches.sum(0)) * remaining
        return self._join(patches, bias)

    def left_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `(A + λI)^exp x`, for `exp` 1 or -1 and dense `x [ΔC(+1), k]`.

        Raises:
            ValueError: `x` is not a dense matrix with so many rows.
            KeyError, RuntimeError, NotImplementedError: as `get_matpower`.
        """
        self._check_matrix(x, "left_multiply_matpower", 0)
        if exp == 1:
            return self._multiply_cov(x) + evaluate_damping(damping_func, self.name) * x
        return self._multiply_inverse(x, self._quants(exp, damping_func))

    def right_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `x (A + λI)^exp`, for `exp` 1 or -1 and dense `x [k, ΔC(+1)]`.

        Raises:
            ValueError: `x` is not a dense matrix with so many columns.
            KeyError, RuntimeError, NotImplementedError: as `get_matpower`.
        """
        self._check_matrix(x, "right_multiply_matpower", 1, sparse=False)
        return self.left_multiply_matpower(x.mT, exp, damping_func).mT

    def get_matpower(self, exp: float, damping_func: DampingFunc) -> Tensor:
        """Return `(A + λI)^exp`, dense, for `exp` 1 or -1 (as of the last refresh).

        Raises:
            KeyError: not registered.
            RuntimeError: not instantiated, or not refreshed since.
            NotImplementedError: another exponent.
        """
        eye = torch.eye(self.cov_dim, dtype=self._dtype, device=self._device)
        return self.left_multiply_matpower(eye, exp, damping_func)

    # What is kept.

    def register_matpower(self, exp: float, damping_func: DampingFunc) -> None:
        """Ask for `(A + λI)⁻¹` to be kept, as a `[C, C]` matrix and a rank-one term.

        Raises:
            NotImplementedError: an exponent other than 1 and -1.
            ValueError: a negative damping.
        """
        self._check_exp(exp)
        super().register_matpower(exp, damping_func)

    def register_cholesky(self, damping_func: DampingFunc) -> None:
        """Raise NotImplementedError: no Cholesky factor has this structure."""
        raise NotImplementedError(self._only_inverse("Cholesky factors"))

    def register_cholesky_inverse(self, damping_func: DampingFunc) -> None:
        """Raise NotImplementedError, as `register_cholesky`."""
        raise NotImplementedError(self._only_inverse("Cholesky factors"))

    def _check_exp(self, exp: float) -> None:
        if exp not in (1, -1):
            raise NotImplementedError(self._only_inverse(f"the power {exp}"))

    def _only_inverse(self, asked: str) -> str:
        return (
            f"{self.name}: with spatially uncorrelated activations there is the inverse "
            f"alone (exp=-1), got {asked}; use ConvInputKroneckerFactor for others"
        )

    def _quants(self, exp: float, damping_func: DampingFunc) -> tuple[Tensor, ...]:
        self._check_exp(exp)
        register = "register_inverse(damping_func)"
        return self._get(-1.0, damping_func, "the inverse", register)

    def _function_shapes(self, function: Function) -> tuple[tuple[int, ...], ...]:
        C = self._conv.channels
        return (C, C), (C,), (C,), (2,)

    def _exponents(self) -> list[Stored]:
        return []  # none by an eigendecomposition of the dense matrix

    def _by_cholesky(self, eigen: bool) -> dict[Hashable, list[Stored]]:
        return {}

    def _others(self) -> list[Stored]:
        return self._instantiated()

    def _compute_others(self) -> list[Computed]:
        stored = self._others()
        dampings = self._evaluated(stored)
        m, cov = self._mean_and_cov()
        computed = list[Computed]()
        for inverse in stored:
            damping = torch.as_tensor(dampings[inverse.damping_id]).to(cov)
            cholesky = DampedCholesky(cov, damping, [self.name])
            self._rescues += cholesky.rescues.values()
            M = cholesky.inverse()
            w = M @ m
            c = damping / (1 + damping) if self._has_bias else torch.ones_like(damping)
            s = c / (1 + c * self._conv.num_offsets * (m @ w))
            scalars = torch.stack([s, 1 / (1 + damping)])
            computed.append((inverse, (M, w, m, scalars)))
        return computed
