"""`InverseProvidingFactor`: a factor that keeps powers `(C + λI)^exp` of its moment.

Factorise rarely, apply often: powers are registered, stored, refreshed on demand and
served stale in between, as in `tf.contrib.kfac`. Several inverses with different
damping, or any power but -1, come from one eigendecomposition; a single inverse from a
Cholesky factorisation. Left out: when to refresh (the estimator's business), and which
damping (the block's).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..damping import DampingFunc, damping_id, evaluate_damping
from ..linalg import psd_eigh, psd_inverse, psd_power
from .base import FisherFactor


@dataclass
class _Power:
    """A registered `(C + λI)^exp`; `matrix` is None until it is instantiated."""

    exp: float
    damping_func: DampingFunc
    damping_id: Hashable
    matrix: Tensor | None = None
    refreshed: bool = False


class InverseProvidingFactor(FisherFactor):
    """A factor `C [..., n, n]` with cached powers of `C + λI` (abstract).

    The units of every damping are those of `C`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._powers: dict[tuple[float, Hashable], _Power] = {}
        self._eigendecomp: tuple[int, tuple[Tensor, Tensor]] | None = None
        self._eigendecomp_requested = False

    # Registration.

    def register_inverse(self, damping_func: DampingFunc) -> None:
        """Ask for `(C + λI)⁻¹` to be kept; `register_matpower(-1, damping_func)`."""
        self.register_matpower(-1, damping_func)

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
            power = _Power(float(exp), damping_func, identity)
            self._powers.setdefault((float(exp), identity), power)

    def instantiate_inv_variables(self) -> None:
        """Make the matrices for what is registered.

        Raises:
            RuntimeError: there is nothing new to instantiate since the last call.
        """
        new = [power for power in self._powers.values() if power.matrix is None]
        if self._powers and not new:
            raise RuntimeError(
                f"{self.name}: instantiate_inv_variables() was called twice; call it once "
                "after registering"
            )
        for power in new:
            power.matrix = torch.zeros(
                self._cov_shape, dtype=self._dtype, device=self._device
            )

    # Refreshing.

    def uses_eigendecomp(self) -> bool:
        """Whether a refresh decomposes `C`, or inverts each `C + λI` directly.

        `make_inverse_update_ops` also decomposes where `get_eigendecomp` has been called
        since its last call.
        """
        exps = [power.exp for power in self._instantiated()]
        threshold = self._options.eigenvalue_decomposition_threshold
        return any(exp != -1 for exp in exps) or exps.count(-1) >= threshold

    def make_inverse_update_ops(self) -> list[Callable[[], None]]:
        """Return callables that refresh the stored matrices from the current `C`.

        One for all of them where an eigendecomposition is shared, else one each; none
        where nothing is instantiated.

        Raises (by the callables):
            torch.linalg.LinAlgError: `C + λI` is singular; the old matrices are kept.
        """
        powers = self._instantiated()
        use_eigendecomp = self._eigendecomp_requested or self.uses_eigendecomp()
        self._eigendecomp_requested = False
        if not powers:
            return []
        if use_eigendecomp:
            return [lambda: _store(self._powers_by_eigendecomp())]
        return [lambda power=power: _store(_inverses([(self, power)])) for power in powers]

    @property
    def is_refreshed(self) -> bool:
        """Whether every registered power has been computed at least once."""
        return all(power.refreshed for power in self._powers.values())

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
        cov = self.get_cov()
        if self._eigendecomp is None or self._eigendecomp[0] != cov._version:
            floor = self._options.eigenvalue_clipping_threshold
            self._eigendecomp = cov._version, psd_eigh(cov, floor)
        return self._eigendecomp[1]

    def _instantiated(self) -> list[_Power]:
        return [power for power in self._powers.values() if power.matrix is not None]

    def _powers_by_eigendecomp(self) -> list[tuple[_Power, Tensor]]:
        powers = self._instantiated()
        dampings = {  # each damping function is called once
            power.damping_id: power.damping_func for power in reversed(powers)
        }
        values = {key: evaluate_damping(func, self.name) for key, func in dampings.items()}
        e, V = self._current_eigendecomp()
        return [
            (power, psd_power(e, V, power.exp, values[power.damping_id], self.name))
            for power in powers
        ]

    # Serving.

    def get_inverse(self, damping_func: DampingFunc) -> Tensor:
        """Return the stored `(C + λI)⁻¹`; `get_matpower(-1, damping_func)`."""
        return self.get_matpower(-1, damping_func)

    def get_matpower(self, exp: float, damping_func: DampingFunc) -> Tensor:
        """Return `(C + λI)^exp` as of the last refresh; for `exp = 1` of the current `C`.

        Raises:
            KeyError: not registered.
            RuntimeError: not instantiated, or not refreshed since.
        """
        if exp == 1:
            eye = torch.eye(self._cov_shape[-1], dtype=self._dtype, device=self._device)
            return self.get_cov() + evaluate_damping(damping_func, self.name) * eye
        power = self._powers.get((float(exp), damping_id(damping_func)))
        if power is None:
            raise KeyError(
                f"{self.name}: the power {exp} with this damping is not registered; call "
                f"register_matpower({exp}, damping_func) with the same damping first"
            )
        if power.matrix is None or not power.refreshed:
            raise RuntimeError(
                f"{self.name}: the power {exp} has not been computed yet; call "
                "instantiate_inv_variables(), then every op of make_inverse_update_ops()"
            )
        return power.matrix

    def left_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `(C + λI)^exp x`, for dense `x [n, k]`.

        Raises:
            ValueError: `x` is not a dense matrix with `n` rows.
            KeyError, RuntimeError: as `get_matpower`.
        """
        if x.layout != torch.strided:
            raise ValueError(
                f"{self.name}: left_multiply_matpower: expected a dense x, got {x.layout}"
            )
        self._check_matrix(x, "left_multiply_matpower", 0)
        if exp == 1:
            return self.get_cov() @ x + evaluate_damping(damping_func, self.name) * x
        return self.get_matpower(exp, damping_func) @ x

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
        if x.layout == torch.sparse_coo and x.sparse_dim() == 1:
            x = x.coalesce()
            values = self.right_multiply_matpower(x.values(), exp, damping_func)
            return torch.sparse_coo_tensor(
                x.indices(), values, x.shape, is_coalesced=True, check_invariants=False
            )
        if x.layout != torch.strided:
            raise ValueError(
                f"{self.name}: right_multiply_matpower: expected a dense x or one with "
                f"sparse rows (one sparse dimension), got {x.layout}"
            )
        if exp == 1:
            return x @ self.get_cov() + evaluate_damping(damping_func, self.name) * x
        return x @ self.get_matpower(exp, damping_func)

    def _check_matrix(self, x: Tensor, method: str, dim: int) -> None:
        n = self._cov_shape[-1]
        if x.dim() != 2 or x.shape[dim] != n:
            expected = f"[{n}, k]" if dim == 0 else f"[k, {n}]"
            raise ValueError(
                f"{self.name}: {method}: expected x of shape {expected}, got "
                f"{tuple(x.shape)}"
            )

    # State.

    def to(self, device: torch.device | str) -> Self:
        """Move the state to a device; data given later is moved there too."""
        super().to(device)
        self._eigendecomp = None
        for power in self._instantiated():
            assert power.matrix is not None
            power.matrix = power.matrix.to(self._device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to restore the factor bit for bit.

        Powers are kept in order of registration: a damping function has no name that
        outlives the process.
        """
        powers = [
            {
                "exp": power.exp,
                "matrix": None if power.matrix is None else power.matrix.clone(),
                "refreshed": power.refreshed,
            }
            for power in self._powers.values()
        ]
        return {
            **super().state_dict(),
            "powers": powers,
            "eigendecomp_requested": self._eigendecomp_requested,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing."""
        super().check_state_dict(state)
        registered = [power.exp for power in self._powers.values()]
        stored = [power["exp"] for power in state["powers"]]
        if registered != stored:
            raise ValueError(
                f"{self.name}: expected the powers {registered} in the state, in order of "
                f"registration, got {stored}; register the same powers before loading"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, after the same registrations.

        Raises:
            ValueError: the state of another factor; nothing is changed then.
        """
        super().load_state_dict(state)
        self._eigendecomp = None
        self._eigendecomp_requested = state["eigendecomp_requested"]
        for power, stored in zip(self._powers.values(), state["powers"], strict=True):
            matrix = stored["matrix"]
            power.matrix = (
                None if matrix is None else matrix.to(self._device, self._dtype, copy=True)
            )
            power.refreshed = stored["refreshed"]


def refresh_inverses(factors: Iterable[InverseProvidingFactor]) -> None:
    """Refresh all stored powers of all factors; same-size inverses in one batch.

    Raises:
        torch.linalg.LinAlgError: a damped factor is singular; the message names it and
            every stored matrix of every factor keeps its old value.
    """
    new: list[tuple[_Power, Tensor]] = []
    batches = defaultdict(list)
    for factor in dict.fromkeys(factors):
        if factor.uses_eigendecomp():
            new += factor._powers_by_eigendecomp()
        else:
            key = (factor._cov_shape, factor._dtype, factor._device)
            batches[key] += [(factor, power) for power in factor._instantiated()]
    for batch in batches.values():
        new += _inverses(batch)
    _store(new)


def _inverses(
    batch: list[tuple[InverseProvidingFactor, _Power]],
) -> list[tuple[_Power, Tensor]]:
    """Invert same-size factors in one call."""
    if not batch:
        return []
    dampings = [
        torch.as_tensor(
            evaluate_damping(power.damping_func, factor.name),
            dtype=factor._dtype,
            device=factor._device,
        )
        for factor, power in batch
    ]
    covs = torch.stack([factor.get_cov() for factor, _ in batch])
    batch_shape = covs.shape[:-2]  # grouped factors have a further leading dimension
    damping = torch.stack(dampings).view(-1, *[1] * (len(batch_shape) - 1))
    repeats = batch_shape[1:].numel()
    names = [factor.name for factor, _ in batch for _ in range(repeats)]
    inverses = psd_inverse(covs, damping.expand(batch_shape), names)
    return [(power, inv) for (_, power), inv in zip(batch, inverses, strict=True)]


def _store(new: list[tuple[_Power, Tensor]]) -> None:
    for power, matrix in new:
        assert power.matrix is not None
        power.matrix.copy_(matrix)
        power.refreshed = True
