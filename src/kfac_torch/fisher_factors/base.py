"""`FisherFactor`: a running second moment, fed by towers, with a name and a state.

Notation: a factor's data is `tensors[source][tower]`: a *source* is one way of drawing
gradients (there are several in exact mode; their statistics are summed), a *tower* one
device's share of the batch. `ε` is the decay of the moving average

    v ← ε v + w C_new,   W ← ε W + w,   cov = v / W

of Martens & Grosse 2015 (arXiv 1503.05671), section 5, bias-corrected: `cov` is kept
instead of `v` and moves by `cov ← cov + (w / W)(C_new − cov)`. A batch with a NaN or an
Inf never enters it. Left out: powers of the moment (`inverse_providing.py`), and when
to update (the estimator's business).
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from ..linalg import symmetrize

TensorLike: TypeAlias = Any
"""A tensor, a NumPy array, anything with DLPack, or a callable that returns one."""

_TOWER_STRATEGIES = ("concat", "separate")
_INITIALS = ("zeros", "identity")


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

    def __post_init__(self) -> None:
        check_choice("initial", self.initial, _INITIALS)
        check_choice("tower_strategy", self.tower_strategy, _TOWER_STRATEGIES)


def check_choice(argument: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError, naming the argument, unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument}: expected one of {choices}, got {value!r}")


def compute_cov(
    tensor: Tensor,
    tensor_right: Tensor | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """Return `XᵀX/n` symmetrised, or `XᵀY/n`; `n` is the number of rows unless given.

    Args:
        tensor: `X [n, d]`.
        tensor_right: `Y [n, e]`.
        normalizer: replaces the number of rows.

    >>> compute_cov(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[ 5.,  7.],
            [ 7., 10.]])
    """
    rows = tensor.shape[0] if normalizer is None else normalizer
    right = tensor if tensor_right is None else tensor_right
    moment = tensor.mT @ right
    moment /= rows  # rather than the rows themselves: there are more of them
    return symmetrize(moment) if tensor_right is None else moment


def append_homog(tensor: Tensor) -> Tensor:
    """Append the homogeneous coordinate, a one, to the last dimension.

    >>> append_homog(torch.zeros(2, 1))
    tensor([[0., 1.],
            [0., 1.]])
    """
    return torch.cat([tensor, tensor.new_ones(*tensor.shape[:-1], 1)], dim=-1)


def scope_string_from_params(params: Sequence[Any]) -> str:
    """Return a name for a factor from its arguments, joined by `_`.

    Integer sequences are joined by `-`. Torch tensors carry no name, so they are
    numbered within the call, in order of appearance: `Tensor`, `Tensor_1`, ...

    Raises:
        ValueError: an argument that is no tensor, bool, int, string, None or sequence of
            ints or of tensors (a float is none of these).

    >>> x, y = torch.zeros(1), torch.zeros(2)
    >>> scope_string_from_params([[1, 2, 3], "foo", True, 4, (x, y)])
    '1-2-3_foo_True_4_Tensor__Tensor_1'
    """
    seen: dict[int, str] = {}

    def tensor_name(tensor: object) -> str:
        number = len(seen)
        return seen.setdefault(id(tensor), f"Tensor_{number}" if number else "Tensor")

    def part(param: Any) -> str:
        if isinstance(param, str | bool | int) or param is None:
            return str(param)
        if _is_tensor_like(param):
            return tensor_name(param)
        if isinstance(param, list | tuple):
            if all(isinstance(entry, int) for entry in param):
                return "-".join(map(str, param))
            return "__".join(part(entry) for entry in param)
        raise ValueError(
            "name of a factor: expected tensors, bools, ints, strings, None or "
            f"sequences of them, got {param!r}"
        )

    return "_".join(part(param) for param in params)


def _is_tensor_like(value: object) -> bool:
    return callable(value) or hasattr(value, "__dlpack__")


def as_tensor(value: TensorLike, what: str) -> Tensor:
    """Read a tensor, an array, DLPack, or the callable that provides one; detached.

    Raises:
        TypeError: it is none of these, or not floating point.
    """
    if callable(value) and not isinstance(value, Tensor):
        value = value()
    if isinstance(value, Tensor):
        tensor = value.detach()
    elif hasattr(value, "__array_interface__"):
        # A read-only or reversed array cannot be shared, so it is copied.
        layout = value.__array_interface__
        strides = layout["strides"] or ()
        shareable = not layout["data"][1] and all(stride >= 0 for stride in strides)
        tensor = torch.as_tensor(value if shareable else value.copy())
    elif hasattr(value, "__dlpack__"):
        tensor = torch.from_dlpack(value)
    else:
        raise TypeError(
            f"{what}: expected a tensor, a NumPy array or an object with __dlpack__, "
            f"got {type(value).__name__}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{what}: expected a floating-point dtype, got {tensor.dtype}")
    return tensor


class FisherFactor(abc.ABC):
    """A running second moment `cov` of what a layer sees (abstract).

    Args:
        tensors: the data, `tensors[source][tower]`.
        name: a name for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of `cov`; that of the first tensor, but at least float32, if None.
        device: of `cov`; that of the first tensor if None.
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[TensorLike]],
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
            as_tensor(tensor, f"{name}, tower {tower}")
            for towers in self._tensors
            for tower, tensor in enumerate(towers)
            if not callable(tensor) or isinstance(tensor, Tensor)
        ]
        self._check(given)
        natural = given[0].dtype if given else torch.get_default_dtype()
        self._dtype = dtype or torch.promote_types(natural, torch.float32)
        self._device = torch.device(device or (given[0].device if given else "cpu"))
        self._cov: Tensor | None = None
        self._weight = 0.0
        self._num_updates = 0
        self._num_rejected_updates = 0

    # What a kind of factor is.

    @property
    @abc.abstractmethod
    def _cov_shape(self) -> tuple[int, ...]:
        """The shape of `cov`."""

    @abc.abstractmethod
    def _check_tensor(self, tensor: Tensor) -> None:
        """Raise ValueError where one tower's tensor does not fit the arguments."""

    @abc.abstractmethod
    def _new_cov(self, tensor: Tensor) -> Tensor:
        """The second moment of one tower's tensor."""

    @abc.abstractmethod
    def num_rows(self, tensor: Tensor) -> int:
        """`R`: the rows of the layer in one tower's tensor, the weight of its moment."""

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
        return self._num_rejected_updates

    def instantiate_cov_variables(self) -> None:
        """Make `cov`. Raises RuntimeError on a second call."""
        if self._cov is not None:
            raise RuntimeError(
                f"{self.name}: instantiate_cov_variables() was called twice; call it once"
            )
        self._cov = torch.zeros(self._cov_shape, dtype=self._dtype, device=self._device)
        if self._options.initial == "identity":
            self._cov.diagonal(dim1=-2, dim2=-1).fill_(1.0)

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
        if self._cov is None:
            raise RuntimeError(
                f"{self.name}: there is no covariance yet; call "
                "instantiate_cov_variables() first"
            )
        return self._cov

    def new_cov(self, tensors: Sequence[Sequence[TensorLike]]) -> Tensor:
        """Return the second moment of `tensors[source][tower]`; changes nothing.

        Sources are summed, towers averaged as `FactorOptions.tower_strategy` says.

        Raises:
            ValueError: towers or tensors that do not fit the factor.
        """
        total: Tensor | None = None
        for towers in tensors:
            read = [
                self._cast(as_tensor(tensor, f"{self.name}, tower {tower}"))
                for tower, tensor in enumerate(towers)
            ]
            self._check(read)
            rows = [self.num_rows(tensor) for tensor in read]
            if self._options.tower_strategy == "separate":
                rows = [1] * len(read)
            for tensor, weight in zip(read, rows, strict=True):
                cov = self._new_cov(tensor).to(self._dtype)
                share = weight / sum(rows)
                if total is None:
                    total = cov if share == 1 else cov.mul_(share)
                else:
                    total.add_(cov, alpha=share)
        assert total is not None
        return total

    def accumulate(self, cov: Tensor, ema_decay: float, weight: float = 1.0) -> None:
        """Let a new second moment enter the moving average, with weight `w`."""
        current = self.get_cov()
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
        Inf is left out, with a RuntimeWarning, and counted in `num_rejected_updates`.

        Args:
            ema_decay: `ε` in [0, 1]; 0 keeps the newest statistic alone.

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
            ValueError: `ema_decay` outside [0, 1]; by `op`: data that does not fit.
        """
        self.get_cov()
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
                warnings.warn(
                    f"{self.name}: the batch has NaN or Inf values; it was left out and "
                    "the last good covariance is kept",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return self.get_cov()

        return op

    def reject(self) -> None:
        """Count an update that was left out."""
        self._num_rejected_updates += 1

    def _nest(self, tensors: Sequence[Any]) -> Sequence[Sequence[TensorLike]]:
        """Bring what `op` was given to `tensors[source][tower]`."""
        nested = [list(towers) for towers in tensors]
        expected, got = [[len(towers) for towers in t] for t in (self._tensors, nested)]
        if expected != got:
            raise ValueError(
                f"{self.name}: expected towers per source {expected} as at construction, "
                f"got {got}"
            )
        return nested

    def _check(self, towers: Sequence[Tensor]) -> None:
        for tower, tensor in enumerate(towers):
            if tensor.numel() == 0:
                raise ValueError(
                    f"{self.name}, tower {tower}: expected data, got an empty tensor of "
                    f"shape {tuple(tensor.shape)}"
                )
            self._check_tensor(tensor)
            if tensor.shape[1:] != towers[0].shape[1:]:
                raise ValueError(
                    f"{self.name}: towers of different shape: tower 0 has "
                    f"{tuple(towers[0].shape)}, tower {tower} has {tuple(tensor.shape)}; "
                    "only the batch dimension may differ"
                )

    def _cast(self, tensor: Tensor) -> Tensor:
        # Half precision stays as it is here: the moments accumulate in float32.
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(self._device, None if half else self._dtype)

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
            "num_rejected_updates": self._num_rejected_updates,
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
        self._num_rejected_updates = state["num_rejected_updates"]
