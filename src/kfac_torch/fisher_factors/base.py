"""`FisherFactor`: a running second moment, fed by towers, with a name and a state.

Notation: a factor's data is `tensors[source][tower]`: a *source* is one way of drawing
gradients (there are several in exact mode; their statistics are summed), a *tower* one
device's share of the batch. An entry is one tensor, or a tuple of those that belong
together (inputs and output gradients, the gradients of several parameters, the uses of a
recurrent layer). `ε` is the decay of the moving average

    v ← ε v + w C_new,   W ← ε W + w,   cov = v / W

of Martens & Grosse 2015 (arXiv 1503.05671), section 5, bias-corrected: `cov` is kept
instead of `v` and moves by `cov ← cov + (w / W)(C_new − cov)`. A batch with a NaN or an
Inf never enters it. Left out: how powers of the moment are made (`inverse_providing.py`,
`diagonal.py`), and when to update (the estimator's business).
"""

from __future__ import annotations

import abc
import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..damping import DampingFunc
from ..health import FactorHealth
from ..linalg import without_subnormals
from .data import (
    INTEGERS,
    Entry,
    TensorLike,
    as_tensor,
    check_choice,
    is_provider,
    parts_of,
)

_TOWER_STRATEGIES = ("concat", "separate")
_INITIALS = ("zeros", "identity")


@dataclass(frozen=True)
class SubSampling:
    """A part of the data for a convolution's input factor, drawn anew at every update.

    Draws are without replacement, from a generator of the factor's own, whose state is
    part of the factor's state.

    Args:
        inputs: the fraction of examples that is kept, rounded up (the lineage's: 0.2);
            None for all.
        patches: how many patches are kept, at most, for each column of the factor (the
            lineage's: 3.0); None for all.
        max_patches: and how many at most altogether.
        seed: of the generator.

    Raises:
        ValueError: a fraction outside (0, 1], or numbers that are not positive.

    >>> SubSampling(inputs=1.5)
    Traceback (most recent call last):
    ValueError: sub-sampling: inputs: expected a fraction in (0, 1], got 1.5
    """

    inputs: float | None = None
    patches: float | None = None
    max_patches: int = 10**7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.inputs is not None and not 0 < self.inputs <= 1:
            raise ValueError(
                f"sub-sampling: inputs: expected a fraction in (0, 1], got {self.inputs}"
            )
        if (self.patches is not None and not self.patches > 0) or self.max_patches < 1:
            raise ValueError(
                "sub-sampling: patches, max_patches: expected positive numbers, got "
                f"{self.patches}, {self.max_patches}"
            )


@dataclass(frozen=True)
class FactorOptions:
    """What tf.contrib.kfac kept in module globals, per factor.

    Args:
        initial: `"zeros"` with a bias-corrected average, or `"identity"`, r1.8's
            `cov ← ε cov + (1 - ε) C_new` from the identity.
        tower_strategy: `"concat"`, every row of every tower has equal weight; or
            `"separate"`, every tower has.
        eigenvalue_decomposition_threshold: from this number of inverses with different
            damping on, they come from one eigendecomposition.
        eigenvalue_clipping_threshold: eigenvalues are raised to it before damping.
        sub_sampling: of the inputs of convolutions; None for none.

    Raises:
        ValueError: an unknown `initial` or `tower_strategy`.

    >>> FactorOptions(tower_strategy="mean")
    Traceback (most recent call last):
    ValueError: tower_strategy: expected one of ('concat', 'separate'), got 'mean'
    """

    initial: str = "zeros"
    tower_strategy: str = "concat"
    eigenvalue_decomposition_threshold: int = 2
    eigenvalue_clipping_threshold: float = 0.0
    sub_sampling: SubSampling | None = None

    def __post_init__(self) -> None:
        check_choice("initial", self.initial, _INITIALS)
        check_choice("tower_strategy", self.tower_strategy, _TOWER_STRATEGIES)


class FisherFactor(abc.ABC):
    """A running second moment `cov` of what a layer sees (abstract).

    Args:
        tensors: the data, `tensors[source][tower]`; each entry a tensor-like, or a tuple
            of them where the factor takes several.
        name: a name for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of `cov`; that of the first tensor, but at least float32, if None.
        device: of `cov`; that of the first tensor if None.
    """

    _integers: bool | None = False  # whether the data are integers; None: either

    def __init__(
        self,
        tensors: Sequence[Sequence[Entry]],
        name: str,
        options: FactorOptions,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        self._name = name
        self._options = options
        self._tensors = [list(towers) for towers in tensors]
        if not self._tensors or not all(self._tensors):
            raise ValueError(f"{name}: expected at least one tensor, got none")
        given = [
            (tower, self._read(entry, tower))
            for towers in self._tensors
            for tower, entry in enumerate(towers)
            if not any(is_provider(tensor) for tensor in parts_of(entry))
        ]
        self._check(given)
        floats = [t for _, e in given for t in e if t.is_floating_point()]
        natural = floats[0].dtype if floats else torch.get_default_dtype()
        self._dtype = dtype or torch.promote_types(natural, torch.float32)
        self._device = torch.device(device or (given[0][1][0].device if given else "cpu"))
        self._cov: Tensor | None = None
        self._weight = 0.0
        self._num_updates = 0
        self._health = FactorHealth()

    # What a kind of factor is.

    @property
    @abc.abstractmethod
    def _cov_shape(self) -> tuple[int, ...]:
        """The shape of the array that is stored and averaged."""

    @abc.abstractmethod
    def _check_tensor(self, *tensors: Tensor) -> None:
        """Raise ValueError where one tower's entry does not fit the arguments."""

    @abc.abstractmethod
    def _new_cov(self, *tensors: Tensor) -> Tensor:
        """The second moment of one tower's entry."""

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        """The sum of `_new_cov` over the sources that lead the last tensor."""
        # A mean over rows: that over the rows of all sources, times their number.
        tensor = self._single(tensors)
        return self._new_cov(tensor.flatten(0, 1)).mul_(len(tensor))

    def _single(self, tensors: Sequence[Tensor]) -> Tensor:
        if len(tensors) != 1:
            raise ValueError(
                f"{self.name}: expected one tensor per tower, got {len(tensors)}"
            )
        return tensors[0]

    def _first_source(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The entry of one source, from one with a leading dimension of sources."""
        return (*tensors[:-1], tensors[-1][0])

    @abc.abstractmethod
    def num_rows(self, *tensors: Tensor) -> int:
        """`R`: the rows of the layer in one tower's entry, the weight of its moment."""

    def _fill_identity(self, cov: Tensor) -> None:
        """Make the stored zeros that of the identity."""
        cov.diagonal(dim1=-2, dim2=-1).fill_(1.0)

    # Statistics.

    @property
    def name(self) -> str:
        """The factor's name."""
        return self._name

    @property
    def num_updates(self) -> int:
        """How many updates have entered the moving average."""
        return self._num_updates

    @property
    def num_rejected_updates(self) -> int:
        """How many updates were left out because of a NaN or an Inf."""
        return self._health.rejected

    @property
    def health(self) -> FactorHealth:
        """What went wrong with this factor and was mended, in numbers."""
        return self._health

    def instantiate_cov_variables(self) -> None:
        """Make `cov`. Raises RuntimeError on a second call."""
        if self._cov is not None:
            raise RuntimeError(
                f"{self.name}: instantiate_cov_variables() was called twice; call it once"
            )
        self._cov = torch.zeros(self._cov_shape, dtype=self._dtype, device=self._device)
        if self._options.initial == "identity":
            self._fill_identity(self._cov)

    def get_cov_var(self) -> Tensor | None:
        """Return the tensor behind `get_cov()`; None before `instantiate_cov_variables`.

        It is updated in place.
        """
        return self._cov

    def get_cov(self) -> Tensor:
        """Return the running second moment (zeros or the identity before any update).

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
        """
        return self._stored_cov()

    def _stored_cov(self) -> Tensor:
        if self._cov is None:
            raise RuntimeError(
                f"{self.name}: there is no covariance yet; call "
                "instantiate_cov_variables() first"
            )
        return self._cov

    @property
    def cov_dim(self) -> int:
        """`n`: the size of the `[n, n]` matrix that the factor stands for."""
        return self._cov_shape[-1]

    def cov_trace(self) -> Tensor:
        """Return the trace of the current matrix: 0-dim, or one for each of a stack."""
        return self.get_cov().diagonal(dim1=-2, dim2=-1).sum(-1)

    def describe(self) -> str:
        """Return how the matrix is kept and its size, as in `"full 512"`."""
        stack = self._cov_shape[:-2]
        return f"{stack[0]} x full {self.cov_dim}" if stack else f"full {self.cov_dim}"

    def spectrum(self) -> Tensor:
        """Return the ascending eigenvalues `[..., n]` of the current matrix."""
        return torch.linalg.eigvalsh(without_subnormals(self.get_cov()))

    # Costs.

    @property
    def kept_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all tensors that are kept, in the dtype of `cov`."""
        return [self._cov_shape]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept once all that is registered has been refreshed.

        Known without making any of it.
        """
        return sum(map(math.prod, self.kept_shapes)) * self._dtype.itemsize

    def moment_cost(self, rows: float) -> float:
        """Return about how many multiply-adds the moment of `rows` rows takes."""
        return rows * math.prod(self._cov_shape)

    @property
    def refresh_cost(self) -> int:
        """About how many multiply-adds a refresh of all that is registered takes."""
        return 0

    # Updates.

    def new_cov(self, tensors: Sequence[Sequence[Entry]]) -> Tensor:
        """Return the second moment of `tensors[source][tower]`; changes nothing.

        Sources are summed, towers averaged as `FactorOptions.tower_strategy` says.

        Raises:
            ValueError: towers or tensors that do not fit the factor.
        """
        total: Tensor | None = None
        for towers in tensors:
            read = [
                self._cast(self._read(entry, tower)) for tower, entry in enumerate(towers)
            ]
            self._check(list(enumerate(read)))
            rows = [self.num_rows(*entry) for entry in read]
            if self._options.tower_strategy == "separate":
                rows = [1] * len(read)
            for entry, weight in zip(read, rows, strict=True):
                cov = self._new_cov(*entry).to(self._dtype)
                share = weight / sum(rows)
                if total is None:
                    total = cov if share == 1 else cov.mul_(share)
                else:
                    total.add_(cov, alpha=share)
        assert total is not None
        return total

    def summed_cov(self, *tensors: TensorLike) -> Tensor:
        """Return the moment of one tower's entry, summed over sources, in one go.

        Equals `new_cov([[source_0], [source_1], ...])`, without a loop over sources and
        without a copy of the inputs for each.

        Args:
            tensors: the entry. The last tensor, the output gradients, has a further
                *leading* dimension of S sources; where the entry is a tuple of one kind
                (gradients of several parameters, several uses), all of them have.

        Raises:
            ValueError: tensors that do not fit the factor.
        """
        entry = self._cast(self._read(tensors, 0))
        if not entry or entry[-1].numel() == 0:
            raise ValueError(f"{self.name}: summed_cov: expected data, got none")
        self._check([(0, self._first_source(*entry))])
        return self._summed_cov(*entry).to(self._dtype)

    def accumulate(self, cov: Tensor, ema_decay: float, weight: float = 1.0) -> None:
        """Let a new second moment enter the moving average, with weight `w`."""
        current = self._stored_cov()
        if self._options.initial == "identity":
            step = 1 - ema_decay
        else:
            self._weight = ema_decay * self._weight + weight
            step = weight / self._weight
        current.lerp_(cov, step)
        self._num_updates += 1

    def make_covariance_update_op(self, ema_decay: float | Tensor) -> Callable[..., Tensor]:
        """Return `op`, which updates the moving average and returns it.

        `op()` reads the tensors given at construction (or calls their providers);
        `op(tensors)` takes new ones, nested as at construction. A batch with a NaN or an
        Inf is left out and counted in `num_rejected_updates`, the first one with a
        RuntimeWarning.

        Args:
            ema_decay: `ε` in [0, 1]; 0 keeps the newest statistic alone.

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
            ValueError: `ema_decay` outside [0, 1]; by `op`: data that does not fit.
        """
        self._stored_cov()
        decay = float(ema_decay)
        if not 0 <= decay <= 1:
            raise ValueError(
                f"{self.name}: ema_decay: expected a number in [0, 1], got {decay}"
            )

        def op(tensors: Sequence[Any] | None = None) -> Tensor:
            data = self._tensors if tensors is None else self._nest(tensors)
            cov = self.new_cov(data)
            if cov.isfinite().all():
                self.accumulate(cov, decay)
            else:
                self.reject()
                if self.num_rejected_updates == 1:
                    warnings.warn(
                        f"{self.name}: the batch has NaN or Inf values; it was left out "
                        "and the last good covariance is kept",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            current = self.get_cov_var()
            assert current is not None
            return current

        return op

    def reject(self) -> None:
        """Count an update that was left out."""
        self._health.rejected += 1

    def _nest(self, tensors: Sequence[Any]) -> Sequence[Sequence[Entry]]:
        """Bring what `op` was given to `tensors[source][tower]`."""
        nested = [list(towers) for towers in tensors]
        expected, got = [[len(towers) for towers in t] for t in (self._tensors, nested)]
        if expected != got:
            raise ValueError(
                f"{self.name}: expected towers per source {expected} as at construction, "
                f"got {got}"
            )
        return nested

    def _read(self, entry: Entry, tower: int) -> tuple[Tensor, ...]:
        what = f"{self.name}, tower {tower}"
        return tuple(
            as_tensor(part, what, integer=self._integers) for part in parts_of(entry)
        )

    def _check(self, towers: Sequence[tuple[int, tuple[Tensor, ...]]]) -> None:
        for tower, entry in towers:
            for tensor in entry:
                if tensor.numel() == 0:
                    raise ValueError(
                        f"{self.name}, tower {tower}: expected data, got an empty tensor "
                        f"of shape {tuple(tensor.shape)}"
                    )
            self._check_tensor(*entry)
            first, expected = towers[0][0], [tuple(t.shape) for t in towers[0][1]]
            shapes = [tuple(tensor.shape) for tensor in entry]
            if [shape[1:] for shape in shapes] != [shape[1:] for shape in expected]:
                one = len(expected) == len(shapes) == 1
                raise ValueError(
                    f"{self.name}: towers of different shape: tower {first} has "
                    f"{expected[0] if one else expected}, tower {tower} has "
                    f"{shapes[0] if one else shapes}; only the batch dimension may differ"
                )

    def _cast(self, entry: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Half precision stays as it is here: the moments accumulate in float32.
        as_is = (torch.float16, torch.bfloat16, *INTEGERS)
        return tuple(
            t.to(self._device, None if t.dtype in as_is else self._dtype) for t in entry
        )

    # Powers; how they are made and kept is a subclass's business.

    def register_inverse(self, damping_func: DampingFunc) -> None:
        """Ask for `(C + λI)⁻¹` to be kept; `register_matpower(-1, damping_func)`."""
        self.register_matpower(-1, damping_func)

    @abc.abstractmethod
    def register_matpower(self, exp: float, damping_func: DampingFunc) -> None:
        """Ask for `(C + λI)^exp` to be kept."""

    @abc.abstractmethod
    def register_cholesky(self, damping_func: DampingFunc) -> None:
        """Ask for `L` with `L Lᵀ = C + λI` to be kept."""

    @abc.abstractmethod
    def register_cholesky_inverse(self, damping_func: DampingFunc) -> None:
        """Ask for `L⁻¹` with `L Lᵀ = C + λI` to be kept."""

    @abc.abstractmethod
    def instantiate_inv_variables(self) -> None:
        """Make the matrices for what is registered."""

    @abc.abstractmethod
    def make_inverse_update_ops(self) -> list[Callable[[], None]]:
        """Return callables that refresh the stored matrices from the current `C`."""

    def compute_stored(self) -> list[Any]:
        """Return what a refresh stores, and in place of what; for factors that keep
        something else than powers (`refresh_inverses` stores all factors' or none).
        """
        return []

    @property
    @abc.abstractmethod
    def is_refreshed(self) -> bool:
        """Whether all that is registered can be read."""

    def get_inverse(self, damping_func: DampingFunc) -> Tensor:
        """Return the stored `(C + λI)⁻¹`; `get_matpower(-1, damping_func)`."""
        return self.get_matpower(-1, damping_func)

    @abc.abstractmethod
    def get_matpower(self, exp: float, damping_func: DampingFunc) -> Tensor:
        """Return `(C + λI)^exp`."""

    @abc.abstractmethod
    def left_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `(C + λI)^exp x`."""

    @abc.abstractmethod
    def right_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `x (C + λI)^exp`."""

    @abc.abstractmethod
    def left_multiply_cholesky(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `L x`, or `Lᵀ x`, with `L Lᵀ = C + λI`."""

    @abc.abstractmethod
    def right_multiply_cholesky(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `x L`, or `x Lᵀ`."""

    @abc.abstractmethod
    def left_multiply_cholesky_inverse(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `L⁻¹ x`, or `L⁻ᵀ x`."""

    @abc.abstractmethod
    def right_multiply_cholesky_inverse(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `x L⁻¹`, or `x L⁻ᵀ`."""

    # Refreshed in a thread.

    def snapshot(
        self, twins: Mapping[FisherFactor, FisherFactor], state: Any = None
    ) -> Self:
        """Return a copy to be refreshed in a thread, while this factor goes on.

        Args:
            twins: the copies of factors that this one is made of.
            state: of an earlier copy, `snapshot_state`, in place of what is current.
        """
        twin = copy.copy(self)
        twin._health = replace(self._health)
        return twin

    def snapshot_state(self) -> dict[str, Any]:
        """Return what makes the same copy again, of a factor whose state is loaded."""
        return {}

    def adopt(self, twin: Self) -> None:
        """Take what a copy of this factor was refreshed to, and count the refresh."""
        self._health.refreshed(twin._health.last_rescues)

    # State.

    def to(self, device: torch.device | str) -> Self:
        """Move the state to a device; data given later is moved there too."""
        self._device = torch.device(device)
        if self._cov is not None:
            self._cov = self._cov.to(self._device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to restore the factor bit for bit."""
        return {
            "cov": None if self._cov is None else self._cov.clone(),
            "weight": self._weight,
            "num_updates": self._num_updates,
            "health": self._health.counts(),
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing."""
        shape = None if state["cov"] is None else tuple(state["cov"].shape)
        if shape not in (None, self._cov_shape):
            raise ValueError(
                f"{self.name}: expected a covariance of shape {self._cov_shape} in the "
                f"state, got {shape}; is this the checkpoint of another model?"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state of another factor; nothing is changed then.
        """
        self.check_state_dict(state)
        cov = state["cov"]
        self._cov = None if cov is None else cov.to(self._device, self._dtype, copy=True)
        self._weight = state["weight"]
        self._num_updates = state["num_updates"]
        self._health = FactorHealth(**state["health"])
