"""Forward mode along several directions at once, by rules for the operations of most nets.

Notation: `x` a value, `ẋ = [ẋ_1, …, ẋ_k]` its derivatives along `k` directions, stacked.
A `Dual` is both; an operation on one gives another:

    y = W x + b:     ẏ = W ẋ + Ẇ x + ḃ
    y = f(x):        ẏ = f'(x) ẋ
    softmax, x̂ of a layer norm: ẏ = J ẋ with J = Jᵀ, which is their own backward

What has no rule here goes through `torch.func.jvp` by itself. Such a transformation of a
whole net costs more per call, which is most of the time where tensors are small, and takes
the directions as copies in one tensor. Under `torch.no_grad` there is no derivative, as in
a backward. Whatever these rules cannot follow raises a `NoRule`: what changes a value in
place, a custom `autograd.Function` (whose derivative need not be that of its forward),
autocast, tensors of other classes, and what reaches for the numbers; a `Pass` remembers it
even where the model catches it. Left out: what is done then, and models that ask for
`type(x)`, which is not `Tensor` here.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from .fused import REPLACEMENTS


@functools.cache
def load_forward_mode() -> None:
    """Let PyTorch load what it needs for forward mode, once."""
    with warnings.catch_warnings():
        # The first use of forward mode loads parts of PyTorch that PyTorch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class NoRule(NotImplementedError):
    """These rules cannot follow an operation."""


@dataclass(eq=False)
class Pass:
    """One run of a model by these rules.

    Args:
        refused: whether an operation could not be followed.
        over: whether the model has returned.
    """

    refused: bool = False
    over: bool = False


@contextmanager
def one_pass() -> Iterator[Pass]:
    """Follow a model by rules; to what it keeps afterwards a `Dual` is its value alone.

    Gradients are enabled, so that a `no_grad` of the model's is seen. What it has compiled
    runs as written, not to be compiled anew for every pass.

    Raises:
        NoRule: an operation was refused, and the model went on without it.
    """
    compiled = "torch._dynamo" in sys.modules
    eager: Any = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    current = Pass()
    try:
        with torch.enable_grad(), eager:
            yield current
    finally:
        current.over = True
    if current.refused:
        raise NoRule("an operation was refused, and the model caught it")


class Dual(Tensor):
    """A value and its derivatives; has no numbers of its own.

    Args:
        value: `x`.
        tangents: `ẋ [k, *x.shape]`, or one tensor for each direction.
        made_in: the pass that it is of, if any; what follows from it is of the same.

    >>> x = Dual(torch.tensor([1.0, 2.0]), torch.eye(2))
    >>> y = x * x + 1
    >>> y.value, y.stacked()
    (tensor([2., 5.]), tensor([[2., 0.],
            [0., 4.]]))
    """

    value: Tensor
    tangents: Tensor | Sequence[Tensor]
    made_in: Pass | None

    @staticmethod
    def __new__(
        cls,
        value: Tensor,
        tangents: Tensor | Sequence[Tensor],
        made_in: Pass | None = None,
    ) -> Dual:
        """Make a tensor with the shape and the type of `x`, but no storage."""
        make: Any = Tensor._make_wrapper_subclass  # the stubs do not have it
        dual = make(
            cls, value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        dual.value, dual.tangents = value, tangents
        dual.made_in = made_in
        return dual

    def stacked(self) -> Tensor:
        """Return `ẋ [k, *x.shape]`."""
        with torch._C.DisableTorchFunctionSubclass():
            return _stacked(self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Follow an operation by its rule, or by itself."""
        kwargs = kwargs or {}
        duals = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, Dual)]
        if any(map(_is_over, duals)):
            args, kwargs = pytree.tree_map(
                lambda x: x.value if _is_over(x) else x, (args, dict(kwargs))
            )
            return func(*args, **kwargs)
        current = duals[0].made_in if duals else None
        try:
            found = _follow(func, types, args, kwargs)
        except Exception:  # seen here too, for the model may catch it and go another way
            if current is not None:
                current.refused = True
            raise
        if current is not None:
            for x in (found,) if isinstance(found, Tensor) else pytree.tree_leaves(found):
                if isinstance(x, Dual):
                    x.made_in = current
        return found

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse what has not come through `__torch_function__`."""
        leaves = pytree.tree_leaves((args, kwargs or {}))
        duals = [x for x in leaves if isinstance(x, Dual)]
        if all(map(_is_over, duals)):
            args, kwargs = pytree.tree_map(_value, (args, kwargs or {}))
            return func(*args, **kwargs)
        for x in duals:
            if x.made_in is not None:
                x.made_in.refused = True
        raise NoRule(f"{func}: from where its derivative is not known")


def _is_over(x: Any) -> bool:
    """Whether the pass that a `Dual` was made in is over: a model has kept it."""
    return isinstance(x, Dual) and x.made_in is not None and x.made_in.over


def _follow(func: Any, types: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    # Within the forward of an `autograd.Function` forward mode is off.
    if not torch._C._is_fwd_grad_enabled():
        raise NoRule(f"{func}: within an autograd.Function")
    if not all(each in _FOLLOWED for each in types):
        raise NoRule(f"{func}: of {types}")
    if torch._C._is_any_autocast_enabled():
        raise NoRule(f"{func}: within autocast")
    if not torch.is_grad_enabled():
        return _without_derivative(func, args, kwargs)
    rule = _RULES.get(func)
    if rule is not None:
        with torch._C.DisableTorchFunctionSubclass():
            try:
                found = rule(func, *args, **kwargs)
            except TypeError:  # arguments by names that the rule does not have
                found = NotImplemented
        if found is not NotImplemented:
            return found
    return _by_itself(func, args, kwargs)


_FOLLOWED = (Dual, Tensor, torch.nn.Parameter)


def _flat(args: Sequence[Any]) -> Iterator[Any]:
    """The arguments, and those in lists and tuples."""
    for x in args:
        yield from _flat(x) if type(x) in (list, tuple) else (x,)


def _without_derivative(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Compute what is under `no_grad`; others than a `Dual` may change in place."""
    name = getattr(func, "__name__", "")
    own = name == "__set__" or (name == "__get__" and func not in _RULES)
    first = args[:1] if own or _is_in_place(func, kwargs) else ()
    if any(isinstance(x, Dual) for x in _flat((*first, kwargs.get("out")))):
        raise NoRule(f"{name}: in place, or of the tensor itself")
    args, kwargs = pytree.tree_map(_value, (args, dict(kwargs)))
    return func(*args, **kwargs)


def _is_in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    named = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    # An embedding makes the rows that it looks up shorter.
    options = bool(kwargs.get("inplace")) or kwargs.get("max_norm") is not None
    return named or options or name == "__setitem__"


def _stacked(x: Dual) -> Tensor:
    if not isinstance(x.tangents, Tensor):
        x.tangents = torch.stack(list(x.tangents))
    return x.tangents


def _along(x: Any, dims: int) -> Tensor:
    """`ẋ` with as many dimensions behind the first as asked for, to broadcast."""
    stack = _stacked(x)
    missing = dims + 1 - stack.dim()
    return stack if missing <= 0 else stack[(slice(None), *[None] * missing)]


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Dual) else x


def _by_itself(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Differentiate one function by `torch.func`."""
    name = getattr(func, "__name__", "")
    own = name in ("__get__", "__set__") or kwargs.get("out") is not None
    # A gradient within the model is of the values; it has derivatives of its own.
    own = own or func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
    if _is_in_place(func, kwargs) or own or func in REPLACEMENTS:
        raise NoRule(f"{name}: in place, of the tensor itself, or of parts")
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
    values = tuple(leaves[i].value for i in where)
    tangents = tuple(leaves[i].stacked() for i in where)
    versions = [value._version for value in values]

    def function(*inputs: Tensor) -> Any:
        given = list(leaves)
        for i, value in zip(where, inputs, strict=True):
            given[i] = value
        some, named = pytree.tree_unflatten(given, spec)
        return func(*some, **named)

    out_dims: Any = (None, 0)  # the stubs know no None
    jvp: Any = torch.vmap(
        lambda directions: torch.func.jvp(function, values, directions),
        out_dims=out_dims,
        randomness="same",
    )
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
            found, along = jvp(tangents)
    except ValueError as error:  # a value that comes with the directions
        raise NoRule(f"{name}: {error}") from error
    if versions != [value._version for value in values]:
        raise NoRule(f"{name}: in place")
    if not all(value.is_floating_point() for value in pytree.tree_leaves(found)):
        raise NoRule(f"{name}: a value without a derivative")
    return pytree.tree_map(Dual, found, along)


def _getter(name: str) -> Any:
    """The function that reading an attribute of a tensor is to `__torch_function__`."""
    return getattr(Tensor, name).__get__


# The rules: each is given the function too, for those that are of several.


def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Dual:
    a, W, b = _value(x), _value(weight), _value(bias)
    value = F.linear(a, W, b)
    k = next(len(t.tangents) for t in (x, weight, bias) if isinstance(t, Dual))
    rows = a.reshape(-1, a.shape[-1])
    out = value.new_empty(k, len(rows), W.shape[0])
    if isinstance(x, Dual):
        torch.mm(_stacked(x).reshape(-1, a.shape[-1]), W.mT, out=out.view(-1, W.shape[0]))
    for i, each in enumerate(out):
        dW = weight.tangents[i] if isinstance(weight, Dual) else None
        db = bias.tangents[i] if isinstance(bias, Dual) else None
        if not isinstance(x, Dual):
            _first_linear(each, rows, dW, db)
            continue
        if dW is not None:
            each.addmm_(rows, dW.mT)
        if db is not None:
            each += db
    return Dual(value, out.view(k, *value.shape))


def _first_linear(out: Tensor, rows: Tensor, dW: Tensor | None, db: Tensor | None) -> None:
    if dW is None:
        out.copy_(torch.zeros_like(out) if db is None else db.expand_as(out))
    elif db is None:
        torch.mm(rows, dW.mT, out=out)
    else:
        torch.addmm(db, rows, dW.mT, out=out)


def _convolution(func: Any, x: Any, weight: Any, bias: Any = None, *rest: Any) -> Any:
    a, W, b = _value(x), _value(weight), _value(bias)
    if a.dim() != W.dim():  # a single example
        return NotImplemented
    out: Any = None
    if isinstance(x, Dual):
        dx = _stacked(x)
        out = func(dx.flatten(0, 1), W, None, *rest).unflatten(0, dx.shape[:2])
    if isinstance(weight, Dual):
        db = bias.tangents if isinstance(bias, Dual) else [None] * len(weight.tangents)
        pairs = zip(weight.tangents, db, strict=True)
        own = [func(a, part, along, *rest) for part, along in pairs]
        if out is None:
            out = torch.stack(own)
        else:
            torch._foreach_add_(list(out.unbind()), own)
    elif isinstance(bias, Dual):
        return NotImplemented
    return Dual(func(a, W, b, *rest), out)


def _max_pool(func: Any, x: Any, *args: Any, **kwargs: Any) -> Dual:
    a, dims = x.value, int(func.__name__[-2])
    if a.device.type == "cpu" and a.dim() == 4:  # the kernel for this order is far faster
        a = a.contiguous(memory_format=torch.channels_last)
    found = func(a, *args, **{**kwargs, "return_indices": True})
    y, places = found[0].contiguous(), found[1].flatten(-dims)
    along = _stacked(x).flatten(-dims)
    along = along.gather(-1, places.expand(len(along), *places.shape))
    return Dual(y, along.unflatten(-1, y.shape[-dims:]))


def _embedding(func: Any, rows: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(rows, Dual) or len(args) > 1 or kwargs.get("max_norm") is not None:
        return NotImplemented
    along = [F.embedding(rows, part) for part in weight.tangents]
    return Dual(F.embedding(rows, weight.value), torch.stack(along))


def _layer_norm(
    func: Any,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    a, w, b = _value(x), _value(weight), _value(bias)
    if a.dtype in (torch.float16, torch.bfloat16):
        return NotImplemented
    shape = list(normalized_shape)
    unit, mean, rstd = torch.native_layer_norm(a, shape, None, None, eps)
    dims = a.dim()
    along: Any = None
    if isinstance(x, Dual):
        backward, first = torch.ops.aten.native_layer_norm_backward, [True, False, False]
        parts = [
            backward(t.contiguous(), a, shape, mean, rstd, None, None, first)[0]
            for t in x.tangents
        ]
        along = torch.stack(parts)
        along = along if w is None else along.mul_(w)
    if isinstance(weight, Dual):
        own = _along(weight, dims)
        along = unit * own if along is None else along.addcmul_(unit, own)
    if isinstance(bias, Dual):
        own = _along(bias, dims)
        along = own.expand(-1, *a.shape) if along is None else along.add_(own)
    if w is not None:
        return Dual(unit * w if b is None else torch.addcmul(b, unit, w), along)
    return Dual(unit if b is None else unit + b, along)


def _softmax(func: Any, x: Any, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if dim is None or args or kwargs.get("dtype") is not None:
        return NotImplemented
    y = x.value.softmax(dim).contiguous()
    along = torch.empty_like(_stacked(x), memory_format=torch.contiguous_format)
    for dx, out in zip(x.tangents, along, strict=True):
        torch.ops.aten._softmax_backward_data.out(dx, y, dim, y.dtype, grad_input=out)
    return Dual(y, along)


def _tanh(func: Any, x: Any) -> Dual:
    return Dual(y := x.value.tanh(), torch.ops.aten.tanh_backward(_stacked(x), y))


def _sigmoid(func: Any, x: Any) -> Dual:
    return Dual(y := x.value.sigmoid(), torch.ops.aten.sigmoid_backward(_stacked(x), y))


def _relu(func: Any, x: Any, inplace: bool = False) -> Any:
    if inplace:
        raise NoRule("relu: in place")
    y = x.value.relu()
    return Dual(y, torch.ops.aten.threshold_backward(_stacked(x), y, 0))


def _gelu(func: Any, x: Any, approximate: str = "none") -> Dual:
    a = x.value
    slope = torch.ops.aten.gelu_backward(torch.ones_like(a), a, approximate=approximate)
    return Dual(F.gelu(a, approximate=approximate), _stacked(x) * slope)


def _dropout(
    func: Any, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if inplace or not training:
        return NotImplemented
    # By itself it would draw in another order where `x` is not contiguous.
    mask = F.dropout(torch.ones_like(x.value), p, training)
    return Dual(x.value * mask, _stacked(x) * mask)


def _sum(x: Any, y: Any, sign: float) -> Dual:
    value = _value(x) + _value(y) if sign > 0 else _value(x) - _value(y)
    dims = value.dim()
    if isinstance(x, Dual) and isinstance(y, Dual):
        along = torch.add(_along(x, dims), _along(y, dims), alpha=sign)
    elif isinstance(x, Dual):
        along = _along(x, dims)
    else:
        along = _along(y, dims) if sign > 0 else -_along(y, dims)
    return Dual(value, along.to(value.dtype).expand(-1, *value.shape))


def _add(func: Any, x: Any, y: Any, alpha: float = 1) -> Any:
    return _sum(x, y, 1) if alpha == 1 else NotImplemented


def _sub(func: Any, x: Any, y: Any, alpha: float = 1) -> Any:
    return _sum(x, y, -1) if alpha == 1 else NotImplemented


def _rsub(func: Any, x: Any, y: Any, alpha: float = 1) -> Any:
    return _sum(y, x, -1) if alpha == 1 else NotImplemented


def _mul(func: Any, x: Any, y: Any) -> Dual:
    a, b = _value(x), _value(y)
    value = a * b
    dims = value.dim()
    if isinstance(x, Dual) and isinstance(y, Dual):
        along = torch.addcmul(_along(x, dims) * b, _along(y, dims), a)
    else:
        along = _along(x, dims) * b if isinstance(x, Dual) else _along(y, dims) * a
    return Dual(value, along.to(value.dtype))


def _div(func: Any, x: Any, y: Any, **kwargs: Any) -> Any:
    if isinstance(y, Dual) or kwargs.get("rounding_mode") is not None:
        return NotImplemented
    value = x.value / y
    return Dual(value, (_along(x, value.dim()) / y).to(value.dtype))


def _neg(func: Any, x: Any) -> Dual:
    return Dual(-x.value, -_stacked(x))


def _matmul(func: Any, x: Any, y: Any) -> Any:
    a, b = _value(x), _value(y)
    if a.dim() < 3 or a.shape[:-2] != b.shape[:-2]:
        return NotImplemented
    value = a @ b
    k = len(x.tangents if isinstance(x, Dual) else y.tangents)
    A, B = a.flatten(0, -3), b.flatten(0, -3)
    out = value.new_empty(k, len(A), *value.shape[-2:])
    for i, each in enumerate(out):
        if isinstance(x, Dual):
            torch.bmm(x.tangents[i].flatten(0, -3), B, out=each)
        if isinstance(y, Dual):
            right = y.tangents[i].flatten(0, -3)
            if isinstance(x, Dual):
                each.baddbmm_(A, right)
            else:
                torch.bmm(A, right, out=each)
    return Dual(value, out.view(k, *value.shape))


def _masked_fill(func: Any, x: Any, mask: Any, value: Any) -> Any:
    if not isinstance(x, Dual) or isinstance(value, Tensor):
        return NotImplemented
    filled = x.value.masked_fill(mask, value)
    if filled.shape != x.value.shape:
        return NotImplemented
    return Dual(filled, _stacked(x).masked_fill(mask, 0))


def _reshaped(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    value = func(x.value, *args, **kwargs)
    if value.dtype != x.value.dtype:  # a view of the bits
        raise NoRule("view: of another type")
    return Dual(value, _stacked(x).reshape(-1, *value.shape))


def _transpose(func: Any, x: Any, first: int, second: int) -> Dual:
    dims = x.value.dim()
    along = _stacked(x).transpose(first % dims + 1, second % dims + 1)
    return Dual(x.value.transpose(first, second), along)


def _mT(func: Any, x: Any) -> Any:
    if x.value.dim() != 2 and func == _getter("T"):
        return NotImplemented
    return Dual(x.value.mT, _stacked(x).mT)


def _pieces(func: Any, x: Any, size: Any, dim: int = 0) -> tuple[Dual, ...]:
    values = func(x.value, size, dim)
    along = func(_stacked(x), size, dim % x.value.dim() + 1)
    return tuple(Dual(value, part) for value, part in zip(values, along, strict=True))


def _getitem(func: Any, x: Any, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(p, slice | int) and not isinstance(p, bool) for p in parts):
        return NotImplemented
    return Dual(x.value[index], _stacked(x)[(slice(None), *parts)])


def _itself(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Dual):  # to the type of another
        return _of_value(func, x, *args, **kwargs)
    args = tuple(map(_value, args))
    return x if func(x.value, *args, **kwargs) is x.value else NotImplemented


def _of_value(func: Any, *args: Any, **kwargs: Any) -> Any:
    return func(*map(_value, args), **kwargs)


Rule: TypeAlias = Callable[..., Any]

_FACTS = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse")

_RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        F.linear: _linear,
        **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
        **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d), _max_pool),
        F.embedding: _embedding,
        F.layer_norm: _layer_norm,
        **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
        **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh), _tanh),
        **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid), _sigmoid),
        **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
        F.gelu: _gelu,
        F.dropout: _dropout,
        **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
        **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _sub),
        Tensor.__rsub__: _rsub,
        **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _mul),
        **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _div),
        **dict.fromkeys((torch.neg, Tensor.neg, Tensor.__neg__), _neg),
        **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
        **dict.fromkeys((torch.masked_fill, Tensor.masked_fill), _masked_fill),
        **dict.fromkeys((torch.reshape, Tensor.reshape, Tensor.view), _reshaped),
        **dict.fromkeys((torch.flatten, Tensor.flatten), _reshaped),
        **dict.fromkeys((torch.unsqueeze, Tensor.unsqueeze), _reshaped),
        **dict.fromkeys((torch.transpose, Tensor.transpose), _transpose),
        **dict.fromkeys((_getter("mT"), _getter("T")), _mT),
        **dict.fromkeys((torch.chunk, Tensor.chunk, torch.split, Tensor.split), _pieces),
        Tensor.__getitem__: _getitem,
        **dict.fromkeys((Tensor.contiguous, Tensor.to, Tensor.float), _itself),
        **dict.fromkeys(
            (
                *map(_getter, _FACTS),
                *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.stride),
                *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous),
                *(torch.is_floating_point, torch.is_complex, torch.numel),
                *(Tensor.new_zeros, Tensor.new_ones, torch.zeros_like, torch.ones_like),
                *(Tensor.gt, Tensor.lt, Tensor.ge, Tensor.le, torch.gt, torch.lt),
                *(Tensor.__gt__, Tensor.__lt__, Tensor.__ge__, Tensor.__le__),
                *(Tensor.argmax, torch.argmax, torch.isnan, torch.isfinite),
                *(Tensor.detach, torch.detach),
            ),
            _of_value,  # or without a derivative
        ),
    }
)
