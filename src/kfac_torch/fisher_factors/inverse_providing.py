"""`InverseProvidingFactor`: a factor that keeps powers `(C + λI)^exp` of its moment.

Factorise rarely, apply often: powers are registered, stored, refreshed on demand and
served stale in between, as in `tf.contrib.kfac`. Several inverses with different
damping, or any power but -1, come from one eigendecomposition; a single inverse from a
Cholesky factorisation, which it shares with the triangular `L` and `L⁻¹` where these are
registered for the same damping. Matrices that no factorisation takes climb the ladder of
`linalg.py`, each alone. Left out: when to refresh (the estimator's business), which
damping (the block's), and what becomes of a failure (`refreshing.py`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ..damping import DampingFunc, damping_id, evaluate_damping
from ..linalg import Rescue, add_damping, psd_eigh, psd_power, rescued_power
from .base import FisherFactor
from .cholesky_batch import (
    CHOLESKY as _CHOLESKY,
    CHOLESKY_INVERSE as _CHOLESKY_INVERSE,
    FROM_CHOLESKY,
    CholeskyBatch,
    Computed,
    Failures,
    Function,
    Member,
    Stored,
    store,
)


class InverseProvidingFactor(FisherFactor):
    """A factor `C [..., n, n]` with cached functions of `C + λI` (abstract).

    The units of every damping are those of `C`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._powers: dict[tuple[Function, Hashable], Stored] = {}
        self._eigendecomp: tuple[int, tuple[Tensor, Tensor]] | None = None
        self._eigendecomp_requested = False
        self._rescues: list[Rescue] = []  # of the refresh that is running

    # Registration.

    def register_matpower(self, exp: float, damping_func: DampingFunc) -> None:
        """Ask for `(C + λI)^exp` to be kept; `exp = 1` needs no keeping.

        Args:
            exp: any real exponent.
            damping_func: a number, or a callable that returns one. Two registrations
                share one matrix if the callables have an equal `func_id`, are the same
                object, or are equal numbers; the first one registered is called.

        Raises:
            ValueError: a negative damping.
        """
        identity = damping_id(damping_func)
        if exp != 1:
            self._register(float(exp), damping_func, identity)

    def register_cholesky(self, damping_func: DampingFunc) -> None:
        """Ask for the lower triangular `L` with `L Lᵀ = C + λI` to be kept."""
        self._register(_CHOLESKY, damping_func, damping_id(damping_func))

    def register_cholesky_inverse(self, damping_func: DampingFunc) -> None:
        """Ask for `L⁻¹` to be kept, with `L Lᵀ = C + λI`."""
        self._register(_CHOLESKY_INVERSE, damping_func, damping_id(damping_func))

    def _register(self, function: Function, damping: DampingFunc, key: Hashable) -> None:
        self._powers.setdefault((function, key), Stored(function, damping, key))

    def instantiate_inv_variables(self) -> None:
        """Make the matrices for what is registered.

        Raises:
            RuntimeError: there is nothing new to instantiate since the last call.
        """
        new = [stored for stored in self._powers.values() if not stored.tensors]
        if self._powers and not new:
            raise RuntimeError(
                f"{self.name}: instantiate_inv_variables() was called twice; call it once "
                "after registering"
            )
        for stored in new:
            stored.tensors = tuple(
                torch.zeros(shape, dtype=self._dtype, device=self._device)
                for shape in self._function_shapes(stored.function)
            )

    def _function_shapes(self, function: Function) -> tuple[tuple[int, ...], ...]:
        """The shapes of the tensors that are kept for a function."""
        return (self._matrix_shape,)

    @property
    def _matrix_shape(self) -> tuple[int, ...]:
        """The shape of `C`: `[..., n, n]`."""
        return self._cov_shape

    # How a matrix is stored; `_matrix_shape` is the shape of what is stored.

    @property
    def _stack(self) -> tuple[int, ...]:
        """The leading dimensions of what the factor multiplies: one matrix for each."""
        return self._matrix_shape[:-2]

    def _matrices(self) -> Tensor:
        """The current `C`, as it is decomposed."""
        return self.get_cov()

    def _dense(self, matrices: Tensor) -> Tensor:
        """A function of `C` as the getters return it."""
        return matrices

    def _left(self, matrices: Tensor, x: Tensor) -> Tensor:
        """A function of `C`, times `x`."""
        return matrices @ x

    def _right(self, x: Tensor, matrices: Tensor) -> Tensor:
        """`x` times a function of `C`."""
        return x @ matrices

    def _damping_of(self, damping_func: DampingFunc) -> Tensor | float:
        """The damping of each matrix that is decomposed."""
        return evaluate_damping(damping_func, self.name)

    # Costs.

    @property
    def _keeps_eigendecomp(self) -> bool:
        """Whether what is registered comes from an eigendecomposition, which is kept."""
        functions = [stored.function for stored in self._powers.values()]
        return self._needs_eigendecomp([f for f in functions if isinstance(f, float)])

    @property
    def kept_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all tensors that are kept, in the dtype of `cov`."""
        shapes = super().kept_shapes
        for stored in self._powers.values():
            shapes += self._function_shapes(stored.function)
        if self._keeps_eigendecomp:
            shapes += [self._matrix_shape[:-1], self._matrix_shape]
        return shapes

    @property
    def refresh_cost(self) -> int:
        """About how many multiply-adds a refresh of all that is registered takes."""
        # n³ for each function; an eigendecomposition is some 9 n³ (Golub & Van Loan).
        number = len(self._powers) + 9 * self._keeps_eigendecomp
        return number * math.prod(self._matrix_shape) * self._matrix_shape[-1]

    # Refreshing.

    def uses_eigendecomp(self) -> bool:
        """Whether a refresh decomposes `C`, or inverts each `C + λI` directly.

        `make_inverse_update_ops` also decomposes where `get_eigendecomp` has been called
        since its last call.
        """
        return self._needs_eigendecomp([stored.function for stored in self._exponents()])

    def _needs_eigendecomp(self, exps: Sequence[Function]) -> bool:
        threshold = self._options.eigenvalue_decomposition_threshold
        return any(exp != -1 for exp in exps) or exps.count(-1) >= threshold

    def make_inverse_update_ops(self) -> list[Callable[[], None]]:
        """Return callables that refresh the stored matrices from the current `C`.

        One for all powers where an eigendecomposition is shared, else one for each
        damping; none where nothing is instantiated.

        Raises (by the callables):
            torch.linalg.LinAlgError: `C + λI` is singular; the old matrices are kept.
        """
        eigen = self._eigendecomp_requested or self.uses_eigendecomp()
        self._eigendecomp_requested = False
        ops = list[Callable[[], None]]()
        if eigen and self._exponents():
            ops.append(lambda: self._renew(self._powers_by_eigendecomp))
        for wanted in self._by_cholesky(eigen).values():
            ops.append(lambda wanted=wanted: self._factorise(wanted))
        if self._others():
            ops.append(lambda: self._renew(self._compute_others))
        return ops

    def _renew(self, compute: Callable[[], list[Computed]]) -> None:
        self._rescues = []
        store(compute())
        self._health.refreshed(self._rescues)

    def _member(self, wanted: Sequence[Stored]) -> Member:
        """What a Cholesky factorisation takes, for functions of one damping."""
        damping = self._damping_of(wanted[0].damping_func)
        damping = torch.as_tensor(damping, dtype=self._dtype, device=self._device)
        shape = self._matrix_shape
        return Member(self, self._matrices, shape, damping, wanted, self._rescues)

    def _factorise(self, wanted: Sequence[Stored]) -> None:
        """Renew functions of one damping by a Cholesky factorisation."""
        self._rescues = []
        batch, failed = CholeskyBatch([self._member(wanted)]), Failures()
        batch.settle(batch.factorise().tolist(), failed)
        for error in failed.values():
            raise error
        batch.write(failed)
        self._health.refreshed(self._rescues)

    @property
    def is_refreshed(self) -> bool:
        """Whether all that is registered has been computed at least once."""
        return all(stored.refreshed for stored in self._powers.values())

    def get_eigendecomp(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues `[..., n]` and eigenvectors `[..., n, n]` of the current `C`.

        Undamped; ascending; clipped from below at `eigenvalue_clipping_threshold`; the
        eigenvectors are columns. Cached until `C` changes.

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
        """
        self._eigendecomp_requested = True
        return self._current_eigendecomp()

    def _current_eigendecomp(self) -> tuple[Tensor, Tensor]:
        version = self._stored_cov()._version
        if self._eigendecomp is None or self._eigendecomp[0] != version:
            floor = self._options.eigenvalue_clipping_threshold
            self._eigendecomp = version, psd_eigh(self._matrices(), floor, self.name)
        return self._eigendecomp[1]

    def _instantiated(self) -> list[Stored]:
        return [stored for stored in self._powers.values() if stored.tensors]

    def _exponents(self) -> list[Stored]:
        return [s for s in self._instantiated() if isinstance(s.function, float)]

    def _by_cholesky(self, eigen: bool) -> dict[Hashable, list[Stored]]:
        """By damping: what one Cholesky factorisation of `C + λI` gives."""
        direct = (_CHOLESKY, _CHOLESKY_INVERSE) if eigen else tuple(FROM_CHOLESKY)
        groups = defaultdict(list)
        for stored in self._instantiated():
            if stored.function in direct:
                groups[stored.damping_id].append(stored)
        return groups

    def _others(self) -> list[Stored]:
        """What neither an eigendecomposition nor a Cholesky factorisation gives."""
        return [
            stored
            for stored in self._instantiated()
            if isinstance(stored.function, str) and stored.function not in FROM_CHOLESKY
        ]

    def _compute_others(self) -> list[Computed]:
        """New values of `_others`."""
        return []

    def _evaluated(self, wanted: Sequence[Stored]) -> dict[Hashable, Tensor | float]:
        """The damping of each identity; each function is called once, the first wins."""
        funcs = {stored.damping_id: stored.damping_func for stored in reversed(wanted)}
        return {key: self._damping_of(func) for key, func in funcs.items()}

    def _powers_by_eigendecomp(self) -> list[Computed]:
        powers = self._exponents()
        values = self._evaluated(powers)
        e, V = self._current_eigendecomp()
        computed = list[Computed]()
        for power in powers:
            exp, damping = power.function, values[power.damping_id]
            assert isinstance(exp, float)
            computed.append((power, (self._power_of(e, V, exp, damping),)))
        return computed

    def _power_of(
        self, e: Tensor, V: Tensor, exp: float, damping: Tensor | float
    ) -> Tensor:
        """`V diag((e + λ)^exp) Vᵀ`, or what the ladder gives in its place."""
        try:
            return psd_power(e, V, exp, damping, self.name)
        except torch.linalg.LinAlgError:
            floor = self._options.eigenvalue_clipping_threshold
            power, rescue = rescued_power(self._matrices(), exp, damping, self.name, floor)
            self._rescues.append(rescue)
            return power

    # Serving.

    def get_matpower(self, exp: float, damping_func: DampingFunc) -> Tensor:
        """Return `(C + λI)^exp` as of the last refresh; for `exp = 1` of the current `C`.

        Raises:
            KeyError: not registered.
            RuntimeError: not instantiated, or not refreshed since.
        """
        return self._dense(self._matpower(exp, damping_func))

    def _matpower(self, exp: float, damping_func: DampingFunc) -> Tensor:
        if exp == 1:
            return add_damping(self._matrices(), self._damping_of(damping_func))
        register = f"register_matpower({exp}, damping_func)"
        return self._get(float(exp), damping_func, f"the power {exp}", register)[0]

    def get_cholesky(self, damping_func: DampingFunc) -> Tensor:
        """Return `L` with `L Lᵀ = C + λI`, as of the last refresh.

        Raises:
            KeyError, RuntimeError: as `get_matpower`.
        """
        return self._dense(self._cholesky(damping_func))

    def _cholesky(self, damping_func: DampingFunc) -> Tensor:
        register = "register_cholesky(damping_func)"
        return self._get(_CHOLESKY, damping_func, "the Cholesky factor", register)[0]

    def get_cholesky_inverse(self, damping_func: DampingFunc) -> Tensor:
        """Return `L⁻¹` with `L Lᵀ = C + λI`, as of the last refresh.

        Raises:
            KeyError, RuntimeError: as `get_matpower`.
        """
        return self._dense(self._cholesky_inverse(damping_func))

    def _cholesky_inverse(self, damping_func: DampingFunc) -> Tensor:
        what, register = "the inverse Cholesky factor", "register_cholesky_inverse"
        return self._get(
            _CHOLESKY_INVERSE, damping_func, what, f"{register}(damping_func)"
        )[0]

    def _get(
        self, function: Function, damping_func: DampingFunc, what: str, register: str
    ) -> tuple[Tensor, ...]:
        stored = self._powers.get((function, damping_id(damping_func)))
        if stored is None:
            raise KeyError(
                f"{self.name}: {what} with this damping is not registered; call "
                f"{register} with the same damping first"
            )
        if not stored.tensors or not stored.refreshed:
            raise RuntimeError(
                f"{self.name}: {what} has not been computed yet; call "
                "instantiate_inv_variables(), then every op of make_inverse_update_ops()"
            )
        return stored.tensors

    def left_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `(C + λI)^exp x`, for dense `x [n, k]`.

        Raises:
            ValueError: `x` is not a dense matrix with `n` rows.
            KeyError, RuntimeError: as `get_matpower`.
        """
        self._check_matrix(x, "left_multiply_matpower", 0)
        return self._left(self._matpower(exp, damping_func), x)

    def right_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `x (C + λI)^exp`, for `x [k, n]`, dense or with sparse rows.

        Sparse rows are a `torch.sparse_coo_tensor` with one sparse dimension; so is the
        result, at the same rows.

        Raises:
            ValueError: `x` is not such a matrix with `n` columns.
            KeyError, RuntimeError: as `get_matpower`.
        """
        self._check_matrix(x, "right_multiply_matpower", 1)
        if x.layout == torch.sparse_coo:
            return of_sparse_rows(
                x, lambda rows: self.right_multiply_matpower(rows, exp, damping_func)
            )
        return self._right(x, self._matpower(exp, damping_func))

    def left_multiply_cholesky(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `L x`, or `Lᵀ x`, for dense `x [n, k]`; raises as `get_cholesky`."""
        self._check_matrix(x, "left_multiply_cholesky", 0)
        return self._left(_maybe_transposed(self._cholesky(damping_func), transpose), x)

    def right_multiply_cholesky(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `x L`, or `x Lᵀ`, for dense `x [k, n]`; raises as `get_cholesky`."""
        self._check_matrix(x, "right_multiply_cholesky", 1, sparse=False)
        return self._right(x, _maybe_transposed(self._cholesky(damping_func), transpose))

    def left_multiply_cholesky_inverse(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `L⁻¹ x`, or `L⁻ᵀ x`, for dense `x [n, k]`."""
        self._check_matrix(x, "left_multiply_cholesky_inverse", 0)
        L = self._cholesky_inverse(damping_func)
        return self._left(_maybe_transposed(L, transpose), x)

    def right_multiply_cholesky_inverse(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `x L⁻¹`, or `x L⁻ᵀ`, for dense `x [k, n]`."""
        self._check_matrix(x, "right_multiply_cholesky_inverse", 1, sparse=False)
        L = self._cholesky_inverse(damping_func)
        return self._right(x, _maybe_transposed(L, transpose))

    def _check_matrix(
        self, x: Tensor, method: str, dim: int, sparse: bool | None = None
    ) -> None:
        rows = sparse is not False and dim == 1
        if x.layout != torch.strided and not (
            rows and x.layout == torch.sparse_coo and x.sparse_dim() == 1
        ):
            also = " or one with sparse rows (one sparse dimension)" if rows else ""
            raise ValueError(
                f"{self.name}: {method}: expected a dense x{also}, got {x.layout}"
            )
        n, stack = self.cov_dim, self._stack
        if x.dim() != len(stack) + 2 or x.shape[dim - 2] != n or x.shape[:-2] != stack:
            lead = "".join(f"{size}, " for size in stack)
            expected = f"[{lead}{n}, k]" if dim == 0 else f"[{lead}k, {n}]"
            raise ValueError(
                f"{self.name}: {method}: expected x of shape {expected}, got "
                f"{tuple(x.shape)}"
            )

    # Refreshed in a thread.

    def snapshot(
        self, twins: Mapping[FisherFactor, FisherFactor], state: Any = None
    ) -> Self:
        """Return a copy to be refreshed in a thread, by the dampings that there are now."""
        twin, cov = super().snapshot(twins, state), self._stored_cov()
        if state is None:
            state = {"cov": cov, "dampings": self._dampings()}
        twin._cov = state["cov"].to(cov, copy=True)
        twin._powers = {
            key: replace(
                stored,
                damping_func=lambda damping=damping: damping,
                tensors=tuple(map(torch.empty_like, stored.tensors)),
            )
            for (key, stored), damping in zip(
                self._powers.items(), state["dampings"], strict=True
            )
        }
        twin._eigendecomp, twin._rescues = None, []
        return twin

    def _dampings(self) -> list[Tensor | float]:
        """The damping of all that is registered; each function is called once."""
        known = dict[Hashable, Tensor | float]()
        for stored in self._powers.values():
            if stored.damping_id not in known:
                damping = evaluate_damping(stored.damping_func, self.name)
                known[stored.damping_id] = damping
        return [known[stored.damping_id] for stored in self._powers.values()]

    def snapshot_state(self) -> dict[str, Any]:
        """Return what makes the same copy again: the moment and the dampings."""
        return {"cov": self._stored_cov().clone(), "dampings": self._dampings()}

    def adopt(self, twin: Self) -> None:
        """Store the matrices that a copy was refreshed to, and count the refresh."""
        super().adopt(twin)
        new = twin._powers.items()
        store((self._powers[key], stored.tensors) for key, stored in new if stored.tensors)

    # State.

    def to(self, device: torch.device | str) -> Self:
        """Move the state to a device; data given later is moved there too."""
        super().to(device)
        self._eigendecomp = None
        for stored in self._powers.values():
            stored.tensors = tuple(tensor.to(self._device) for tensor in stored.tensors)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to restore the factor bit for bit.

        Powers are kept in order of registration: a damping function has no name that
        outlives the process.
        """
        powers = [
            {
                "exp": stored.function,
                "tensors": [tensor.clone() for tensor in stored.tensors],
                "refreshed": stored.refreshed,
            }
            for stored in self._powers.values()
        ]
        return {
            **super().state_dict(),
            "powers": powers,
            "eigendecomp_requested": self._eigendecomp_requested,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing."""
        super().check_state_dict(state)
        registered = [stored.function for stored in self._powers.values()]
        found = [power["exp"] for power in state["powers"]]
        if registered != found:
            raise ValueError(
                f"{self.name}: expected the powers {registered} in the state, in order of "
                f"registration, got {found}; register the same powers before loading"
            )
        for power in state["powers"]:
            shapes = tuple(tuple(tensor.shape) for tensor in power["tensors"])
            expected = self._function_shapes(power["exp"])
            if shapes not in ((), expected):
                raise ValueError(
                    f"{self.name}: expected tensors of shapes {expected} for "
                    f"{power['exp']!r} in the state, got {shapes}"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, after the same registrations.

        Raises:
            ValueError: the state of another factor; nothing is changed then.
        """
        super().load_state_dict(state)
        self._eigendecomp = None
        self._eigendecomp_requested = state["eigendecomp_requested"]
        for stored, power in zip(self._powers.values(), state["powers"], strict=True):
            stored.tensors = tuple(
                tensor.to(self._device, self._dtype, copy=True)
                for tensor in power["tensors"]
            )
            stored.refreshed = power["refreshed"]


DenseSquareMatrixFactor = InverseProvidingFactor  # its name after r1.8


def of_sparse_rows(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a function of the rows of `x` that are there, at the same rows, sparse."""
    x = x.coalesce()
    values = function(x.values())
    return torch.sparse_coo_tensor(
        x.indices(), values, x.shape, is_coalesced=True, check_invariants=False
    )


def _maybe_transposed(L: Tensor, transpose: bool) -> Tensor:
    return L.mT if transpose else L
