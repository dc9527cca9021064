"""What factors are given: tensors and their relatives, names, rows and their moments.

Left out: the running average of the moments (`base.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..gram import gram
from ..linalg import symmetrize

TensorLike: TypeAlias = Any
"""A tensor, a NumPy array, anything with DLPack, or a callable that returns one."""

Entry: TypeAlias = Any
"""What one tower gives: a `TensorLike`, or a tuple or list of them."""

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
    if tensor_right is None and tensor.dim() == 2:
        return gram(tensor).div_(rows)
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


def is_provider(value: object) -> bool:
    """Whether the data come from a callable, at each update anew."""
    return callable(value) and not isinstance(value, Tensor)


def parts_of(entry: Entry) -> Sequence[TensorLike]:
    """Return the tensor-likes of an entry: one, or those of a tuple or list."""
    return entry if isinstance(entry, tuple | list) else (entry,)


def _is_tensor_like(value: object) -> bool:
    return callable(value) or hasattr(value, "__dlpack__")


def as_tensor(value: TensorLike, what: str, *, integer: bool | None = False) -> Tensor:
    """Read a tensor, an array, DLPack, or the callable that provides one; detached.

    Raises:
        TypeError: it is none of these, or not floating point (with `integer`: not of
            integers; with None: neither).
    """
    if is_provider(value):
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
    is_integer = tensor.dtype in INTEGERS
    if integer is not False and is_integer:
        return tensor
    if integer or not tensor.is_floating_point():
        kind = "integers" if integer else "a floating-point dtype"
        raise TypeError(f"{what}: expected {kind}, got {tensor.dtype}")
    return tensor


def name_of_uses(
    prefix: str, tensors: Sequence[Sequence[Entry]], options: Sequence[Any]
) -> str:
    """Return a name from entries, single tensors or lists of uses, and plain arguments."""
    flat = list[Any]()
    for towers in tensors:
        for entry in towers:
            flat += entry if isinstance(entry, list | tuple) else [entry]
    return prefix + scope_string_from_params([flat, *options])


def last_size(
    tensors: Sequence[Sequence[Entry]], size: int | None, name: str, dim: int = -1
) -> int:
    """Return `size`, or that of the first tensor in dimension `dim`.

    Raises:
        ValueError: there is neither.
    """
    if size is not None:
        return size
    first = tensors[0][0] if tensors and tensors[0] else None
    first = first[0] if isinstance(first, list | tuple) and first else first
    if not hasattr(first, "shape") or len(first.shape) < 2:
        raise ValueError(
            f"{name}: expected tensors of two dimensions or more, or their size where they "
            f"are callables, got {type(first).__name__}"
        )
    return first.shape[dim]
