"""Factors of layers that are used several times: over time, or at several places.

Notation: `X [T·B, n]` the rows of T uses of a layer on B examples, use-major (all
examples of the first use come first); `X_t [B, n]` those of use t.

    C0 = XᵀX / (T·B)
    C1 = Σ_t X_{t+1}ᵀ X_t / (T·B)

the second of lag 1, the future on the left, divided by T·B although it has B terms
less, so that `[[C0, C1], [C1ᵀ, C0]]` stays positive semi-definite. With `C0_λ = C0 + λI`
and `H = C0_λ^(-1/2)` two things are kept for Martens, Ba & Johnson 2018 ("Kronecker-
factored curvature approximations for recurrent neural networks", ICLR):

    option 1:  H (C1 + C1ᵀ)/2 H = U diag(ψ) Uᵀ;   L = H U and ψ
    option 2:  H C1 H = · diag(σ) Eᵀ;   P = C1ᵀ C0_λ⁻¹,  K = H E,  μ = min(σ², 1)

The eigenvalues ψ keep their sign: that of a negative correlation over time.

`series_option1_product` and `series_option2_product` are the inverses of the Fisher that
these make, applied to a gradient. Left out: damping, and longer memory than lag 1.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from ..damping import DampingFunc, damping_id
from ..linalg import symmetrize
from .base import FactorOptions
from .data import Entry, append_homog, last_size, name_of_uses
from .inverse_providing import Computed, Function, InverseProvidingFactor, Stored
from .linear import rows_moment

_OPTION_1, _OPTION_2 = "option1quants", "option2quants"


class MultiUseFactor(InverseProvidingFactor, abc.ABC):
    """`C0`, and on request `C1`, of a layer with several uses (abstract).

    A tower's entry is one tensor with the uses in its leading dimension, use-major, or a
    list of T tensors, one per use.
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[Entry]],
        num_uses: int | None,
        name: str,
        options: FactorOptions,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        if num_uses is not None and num_uses < 1:
            raise ValueError(f"{name}: num_uses: expected at least 1, got {num_uses}")
        self._num_uses = num_uses
        self._has_lag = False
        super().__init__(tensors, name, options, dtype, device)

    # What a kind of layer is.

    @property
    @abc.abstractmethod
    def _matrix_shape(self) -> tuple[int, ...]:
        """The shape of `C0`."""

    @abc.abstractmethod
    def _check_use(self, tensor: Tensor) -> None:
        """Raise ValueError where a tensor of one or all uses does not fit."""

    @abc.abstractmethod
    def _moment(self, tensor: Tensor) -> Tensor:
        """The second moment over all rows."""

    @abc.abstractmethod
    def _cross_moment(self, future: Tensor, past: Tensor) -> Tensor:
        """`FᵀP / rows` of the rows of two tensors of one shape."""

    @abc.abstractmethod
    def _num_rows(self, tensor: Tensor) -> int:
        """The rows of a tensor of one or all uses."""

    # Statistics.

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        return (2, *self._matrix_shape) if self._has_lag else self._matrix_shape

    @property
    def cov_dim(self) -> int:
        """`n`."""
        return self._matrix_shape[-1]

    def describe(self) -> str:
        """Return how the matrix is kept and its size: `"full 512"`."""
        return f"full {self.cov_dim}"

    @property
    def _keeps_eigendecomp(self) -> bool:
        chain = {_OPTION_1, _OPTION_2} & {s.function for s in self._powers.values()}
        return bool(chain) or super()._keeps_eigendecomp

    @property
    def refresh_cost(self) -> int:
        """About how many multiply-adds a refresh of all that is registered takes."""
        # A second decomposition for a chain.
        return (2 if self._has_lag else 1) * super().refresh_cost

    def _fill_identity(self, cov: Tensor) -> None:
        super()._fill_identity(cov[0] if self._has_lag else cov)

    def register_cov_dt1(self) -> None:
        """Ask for `C1` to be kept beside `C0`; before the first update.

        Raises:
            RuntimeError: statistics were gathered without it.
        """
        if self._has_lag:
            return
        if self.num_updates:
            raise RuntimeError(
                f"{self.name}: the covariance of lag 1 has to be asked for before the "
                "first update; register it after making the factor"
            )
        self._has_lag = True
        if self._cov is not None:
            self._cov = None
            self.instantiate_cov_variables()

    def get_cov_var(self) -> Tensor | None:
        """Return the tensor behind `get_cov()`; None before `instantiate_cov_variables`."""
        return self._cov if self._cov is None or not self._has_lag else self._cov[0]

    def get_cov(self) -> Tensor:
        """Return the running `C0 [n, n]`.

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
        """
        cov = self._stored_cov()
        return cov[0] if self._has_lag else cov

    def get_cov_dt1(self) -> Tensor:
        """Return the running `C1 [n, n]`, the future on the left.

        Raises:
            RuntimeError: not registered, or before `instantiate_cov_variables`.
        """
        if not self._has_lag:
            raise RuntimeError(
                f"{self.name}: no covariance of lag 1 is kept; call register_cov_dt1(), "
                "register_option1quants(damping) or register_option2quants(damping)"
            )
        return self._stored_cov()[1]

    def _check_tensor(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._check_use(tensor)
            if len(tensors) > 1 and tensor.shape != tensors[0].shape:
                raise ValueError(
                    f"{self.name}: uses of different shape: {tuple(tensors[0].shape)} and "
                    f"{tuple(tensor.shape)}"
                )
        T = self._num_uses
        if T is not None and len(tensors) not in (1, T):
            raise ValueError(
                f"{self.name}: expected one tensor with {T} uses in its leading "
                f"dimension, or a list of {T}, got {len(tensors)} tensors"
            )
        if len(tensors) == 1 and T is not None and tensors[0].shape[0] % T:
            raise ValueError(
                f"{self.name}: expected {T} uses in the leading dimension, a multiple of "
                f"{T}, got shape {tuple(tensors[0].shape)}"
            )
        if len(tensors) == 1 and T is None and self._has_lag:
            raise ValueError(
                f"{self.name}: one tensor of all uses: give num_uses=, without which the "
                "covariance of lag 1 is not known"
            )

    def num_rows(self, *tensors: Tensor) -> int:
        """`T·B`: uses times examples (times locations)."""
        return sum(self._num_rows(tensor) for tensor in tensors)

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        T = self._num_uses if len(tensors) == 1 else len(tensors)
        x = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        moment = self._moment(x)
        if not self._has_lag:
            return moment
        assert T is not None
        size = x.shape[0] // T
        if T == 1:
            return torch.stack([moment, torch.zeros_like(moment)])
        lag = self._cross_moment(x[size:], x[:-size])
        return torch.stack([moment, lag.mul_((T - 1) / T)])

    def _first_source(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[0] for tensor in tensors)

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        # Sources are further examples of each use.
        num_sources = tensors[0].shape[0]
        if len(tensors) == 1 and self._num_uses is not None:
            uses = tensors[0].unflatten(1, (self._num_uses, -1))
            tensors = (uses.transpose(0, 1).flatten(0, 2),)
        else:
            tensors = tuple(tensor.flatten(0, 1) for tensor in tensors)
        return self._new_cov(*tensors).mul_(num_sources)

    # What the series blocks need.

    def register_option1quants(self, damping_func: DampingFunc) -> None:
        """Ask for `L` and `ψ` of option 1 to be kept; before the first update."""
        self.register_cov_dt1()
        self._register(_OPTION_1, damping_func, damping_id(damping_func))

    def register_option2quants(self, damping_func: DampingFunc) -> None:
        """Ask for `P`, `K` and `μ` of option 2 to be kept; before the first update."""
        self.register_cov_dt1()
        self._register(_OPTION_2, damping_func, damping_id(damping_func))

    def get_option1quants(self, damping_func: DampingFunc) -> tuple[Tensor, Tensor]:
        """Return `L [n, n]` and `ψ [n]`, as of the last refresh.

        Raises:
            KeyError, RuntimeError: as `get_matpower`.
        """
        register = "register_option1quants(damping_func)"
        L, psi = self._get(_OPTION_1, damping_func, "option 1", register)
        return L, psi

    def get_option2quants(self, damping_func: DampingFunc) -> tuple[Tensor, Tensor, Tensor]:
        """Return `P [n, n]`, `K [n, n]` and `μ [n]`, as of the last refresh.

        Raises:
            KeyError, RuntimeError: as `get_matpower`.
        """
        register = "register_option2quants(damping_func)"
        P, K, mu = self._get(_OPTION_2, damping_func, "option 2", register)
        return P, K, mu

    def _function_shapes(self, function: Function) -> tuple[tuple[int, ...], ...]:
        square, n = self._matrix_shape, self.cov_dim
        shapes = {_OPTION_1: (square, (n,)), _OPTION_2: (square, square, (n,))}
        return shapes.get(str(function), (square,))

    def _compute_others(self) -> list[Computed]:
        others = self._others()
        dampings = self._evaluated(others)
        computed = list[Computed]()
        for stored in others:
            damping = dampings[stored.damping_id]
            computed.append((stored, self._quants(stored, damping)))
        return computed

    def _quants(self, stored: Stored, damping: Tensor | float) -> tuple[Tensor, ...]:
        e, V = self._current_eigendecomp()
        H = symmetrize(self._power_of(e, V, -0.5, damping))
        C1 = self.get_cov_dt1()
        if stored.function == _OPTION_1:
            psi, U = torch.linalg.eigh(H @ symmetrize(C1) @ H)
            return H @ U, psi
        E = torch.linalg.svd(H @ C1 @ H)
        return C1.mT @ H @ H, H @ E.Vh.mT, E.S.square().clamp(max=1)


class FullyConnectedMultiKF(MultiUseFactor):
    """Either side of a fully connected layer with several uses.

    Args:
        tensors: `[source][tower]`, each `[T·B, n]`, use-major (also `[T·B, ..., n]`), or
            a list of T tensors `[B, n]`.
        num_uses: `T`; needed for one tensor per tower if `C1` is kept.
        has_bias: append a one, last, to each row.
        size: `n`; needed only where `tensors` are callables.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: data without `n` features, or that are not `T` uses.

    >>> x = torch.arange(1.0, 13.0).view(6, 2)
    >>> factor = FullyConnectedMultiKF([[x]], num_uses=3)
    >>> factor.register_cov_dt1()
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)()
    tensor([[47.6667, 53.6667],
            [53.6667, 60.6667]])
    >>> factor.get_cov_dt1()
    tensor([[24.6667, 30.0000],
            [27.3333, 33.3333]])
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[Entry]],
        num_uses: int | None = None,
        has_bias: bool = False,
        *,
        size: int | None = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            name = name_of_uses("ff_fcmulti_", tensors, [num_uses, has_bias])
        self._size = last_size(tensors, size, name)
        self._has_bias = has_bias
        super().__init__(tensors, num_uses, name, options, dtype, device)

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        n = self._size + self._has_bias
        return (n, n)

    def _check_use(self, tensor: Tensor) -> None:
        if tensor.dim() < 2 or tensor.shape[-1] != self._size:
            raise ValueError(
                f"{self.name}: expected rows of {self._size} features [T·B, {self._size}], "
                f"got shape {tuple(tensor.shape)}"
            )

    def _num_rows(self, tensor: Tensor) -> int:
        return tensor.numel() // self._size

    def _moment(self, tensor: Tensor) -> Tensor:
        return rows_moment(tensor.reshape(-1, self._size), self._has_bias)

    def _cross_moment(self, future: Tensor, past: Tensor) -> Tensor:
        F, P = (x.reshape(-1, self._size).to(self._dtype) for x in (future, past))
        if self._has_bias:
            F, P = append_homog(F), append_homog(P)
        return (F.mT @ P).div_(len(F))


# The inverse of the Fisher of a chain in time, on a gradient Z [out, in].


def inverse_gamma(x: Tensor, num_uses: int) -> Tensor:
    """Return `1/γ(x) = Σ_{|d|<T} (T - |d|) x^|d|`, for `|x| <= 1`, by doubling.

    The closed form `(T(1 - x²) - 2x(1 - x^T))/(1 - x)²` loses all digits near 1; here
    terms of one sign are added for `x >= 0`, in some `log₂ T` steps.

    >>> inverse_gamma(torch.tensor([0.0, 0.5, 1.0]), 3)
    tensor([3.0000, 5.5000, 9.0000])
    """
    # S = Σ_{d<k} x^d, U = Σ_{j<=k} S_j, power = x^k; then 1/γ = 2 U - T.
    S, U, power, k = torch.ones_like(x), torch.ones_like(x), x, 1
    for bit in bin(num_uses)[3:]:
        U = U * (1 + power) + k * S
        S = S * (1 + power)
        power, k = power * power, 2 * k
        if bit == "1":
            S = 1 + x * S
            U = U + S
            power, k = power * x, k + 1
    return 2 * U - num_uses


def series_option1_product(
    psi_G: Tensor, L_G: Tensor, psi_A: Tensor, L_A: Tensor, Z: Tensor, num_uses: int
) -> Tensor:
    """Return `L_G (γ(ψ_G ψ_Aᵀ) ∘ (L_Gᵀ Z L_A)) L_Aᵀ [out, in]`: option 1's inverse.

    The Fisher of a mode whose correlation is -1 over an even number of uses is 0, which
    has no inverse; such a mode (it needs zero damping) is left as if uncorrelated.

    Args:
        psi_G: `ψ [out]` of the output side.
        L_G: `L [out, out]` of the output side.
        psi_A: `ψ [in]` of the input side.
        L_A: `L [in, in]` of the input side.
        Z: the gradient, `[out, in]`.
        num_uses: `T`.
    """
    inverse = inverse_gamma(psi_G.outer(psi_A).clamp(-1, 1), num_uses)
    rounding = num_uses**2 * torch.finfo(inverse.dtype).eps
    inverse = torch.where(inverse > rounding, inverse, num_uses)
    return L_G @ ((L_G.mT @ Z @ L_A) / inverse) @ L_A.mT


def series_option2_product(
    quants_G: tuple[Tensor, Tensor, Tensor],
    quants_A: tuple[Tensor, Tensor, Tensor],
    Z: Tensor,
    num_uses: int,
) -> Tensor:
    """Return option 2's inverse of the Fisher on a gradient `Z [out, in]`.

    Args:
        quants_G: `(P, K, μ)` of the output side, as `get_option2quants` returns.
        quants_A: `(P, K, μ)` of the input side.
        Z: the gradient, `[out, in]`.
        num_uses: `T`.
    """
    (P_G, K_G, mu_G), (P_A, K_A, mu_A) = quants_G, quants_A
    Z = K_G.mT @ (Z - P_G @ Z @ P_A.mT) @ K_A
    divisor = 1 - mu_G.outer(mu_A)
    Z = K_G @ (Z / torch.where(divisor == 0, 1, divisor)) @ K_A.mT
    return (Z - P_G.mT @ Z @ P_A) / num_uses
