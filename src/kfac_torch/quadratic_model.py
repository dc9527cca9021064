"""The quadratic model of the loss along a few directions: step size and momentum from it.

Notation: `θ` the parameters, `g` the gradient of the mean loss, `D = [d_1, …]` the
directions, `δ = D w` the step, `J` the Jacobian of the network output, `B Bᵀ` the Fisher
at the output, `N` the loss terms, `λ` the damping, `ℓ` the coefficient of a regulariser
`ℓ/2 ‖θ‖²` within the loss:

    M(w) = gᵀD w + ½ wᵀ (A + (ℓ + λ) DᵀD) w,     A = (1/N) (Bᵀ J D)ᵀ (Bᵀ J D)

`A` is the *exact* Fisher of the mini-batch, by forward-mode differentiation: one pass for
all directions, by the rules of `tangents.py` or by `torch.func`, or one each where an
operation cannot do that, and no backward; an operation without a forward mode is
differentiated backward twice; `ways.py` remembers which. With `D = [p, δ_prev]` the
minimiser is the step of Martens & Grosse 2015 (arXiv 1503.05671), sections 6.4 and 7. The
weights are solved for in float64 where the device has it, since the two directions tend to
be nearly parallel. Left out: which directions (the optimizer's business), and how `λ`
follows (`damping.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .fused import ComputeByParts
from .loss_functions import LossFunction
from .tangents import Dual, NoRule, load_forward_mode, one_pass
from .ways import RULES, TOGETHER, Route

_WIDE = (torch.float32, torch.float64)
_LONG = 2**14  # elements from which on a copy costs more than a few calls

Losses: TypeAlias = Callable[[Any], list[tuple[LossFunction, float]]]
"""What a network output means: distributions, each with the weight of its loss term."""


TermWeights: TypeAlias = "tuple[Tensor, Tensor | float] | None"
"""Weights that multiply a network output, and the number of loss terms that they make."""


@dataclass(frozen=True)
class QuadraticModel:
    """`M(w)` for one or two directions; on the device of the parameters.

    Args:
        curvature: `A [k, k]`.
        norms: `DᵀD [k, k]`.
        slopes: `gᵀD [k]`.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> model = QuadraticModel(2 * eye, eye, torch.tensor([3.0, 6.0]).double())
    >>> w = model.minimize(damping=1.0)
    >>> w
    tensor([-1., -2.], dtype=torch.float64)
    >>> model.change(w, damping=1.0)  # ½ gᵀD w at the minimum
    tensor(-7.5000, dtype=torch.float64)
    """

    curvature: Tensor
    norms: Tensor
    slopes: Tensor

    def matrix(self, damping: float) -> Tensor:
        """Return `A + damping DᵀD`."""
        return self.curvature + damping * self.norms

    def minimize(
        self,
        damping: float,
        momentum: float | None = None,
        max_momentum: float | None = None,
    ) -> Tensor:
        """Return the weights `w [k]` at the minimum.

        Where the second direction is 0 or parallel to the first, its weight is 0; where
        the first has no curvature at all, so is its.

        Args:
            damping: `λ + ℓ`.
            momentum: a fixed weight of the second direction; None to solve for it.
            max_momentum: the minimum is then that with the second weight from 0 to this;
                None for no bounds.
        """
        C, b = self.matrix(damping), self.slopes
        if len(b) == 1:
            return _quotient(-b, C[0])
        if momentum is not None:
            return _with_second(C, b, torch.full_like(b[0], momentum))
        free = self._free_minimum(C, b)
        if max_momentum is None:
            return free
        return _with_second(C, b, free[1].clamp(0.0, max_momentum))

    @staticmethod
    def _free_minimum(C: Tensor, b: Tensor) -> Tensor:
        determinant = C[0, 0] * C[1, 1] - C[0, 1] ** 2
        # 1 - cos² of the angle between the directions: below, rounding decides.
        regular = determinant > 1e-12 * C[0, 0] * C[1, 1]
        determinant = torch.where(regular, determinant, 1.0)
        both = torch.stack(
            [C[0, 1] * b[1] - C[1, 1] * b[0], C[0, 1] * b[0] - C[0, 0] * b[1]]
        )
        alone = _quotient(-b[0], C[0, 0])
        one = torch.stack([alone, torch.zeros_like(alone)])
        return torch.where(regular, both / determinant, one)

    def change(self, weights: Tensor, damping: float) -> Tensor:
        """Return `M(w)`, 0-dim: the predicted change of the loss."""
        return weights @ self.slopes + 0.5 * self.squared_norm(weights, damping)

    def squared_norm(self, weights: Tensor, damping: float) -> Tensor:
        """Return `δᵀ(F + damping I)δ`, 0-dim, never negative."""
        return (weights @ self.matrix(damping) @ weights).clamp(min=0)


def _with_second(C: Tensor, b: Tensor, second: Tensor) -> Tensor:
    """The minimum over the first weight alone."""
    return torch.stack([_quotient(-(b[0] + C[0, 1] * second), C[0, 0]), second])


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """`a/b`, 0 where `b` is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def products(
    directions: Sequence[Sequence[Tensor]],
    others: Sequence[Sequence[Tensor]] | None = None,
) -> Tensor:
    """Return the inner products `DᵀE [k, m]` of directions, each a list of tensors.

    Accumulated in float32 at least, summed and returned as `solving_dtype`.

    Args:
        directions: `D`.
        others: `E`; `D` if None.

    >>> p, q = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    >>> products([[p, q], [2 * p, q]])
    tensor([[14., 19.],
            [19., 29.]], dtype=torch.float64)
    >>> products([[p, q]], [[2 * p, q]])
    tensor([[19.]], dtype=torch.float64)
    """
    device = directions[0][0].device
    D = [_rows(parts) for parts in directions]
    E = D if others is None else [_rows(parts) for parts in others]
    entries = [
        [
            torch.stack([torch.dot(a, b).to(device) for a, b in zip(d, e, strict=True)])
            for e in (E if others is not None else E[i:])
        ]
        for i, d in enumerate(D)
    ]
    sums = torch.stack([dots for row in entries for dots in row])
    sums = sums.to(solving_dtype(device)).sum(-1)
    if others is not None:
        return sums.view(len(D), len(E))
    upper = torch.triu_indices(len(D), len(D), device=device)
    gram = sums.new_zeros(len(D), len(D)).index_put_(tuple(upper), sums)
    return gram + gram.triu(1).mT


def _rows(parts: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as rows; short ones of a kind are joined, for calls cost more there."""
    long = list[Tensor]()
    short: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for part in parts:
        row = part.flatten() if part.dtype in _WIDE else _real(part).flatten()
        if row.numel() < _LONG:
            short.setdefault((row.device, row.dtype), []).append(row)
        else:
            long.append(row)
    return long + [torch.cat(some) if len(some) > 1 else some[0] for some in short.values()]


def _real(tensor: Tensor) -> Tensor:
    return _accumulating(torch.view_as_real(tensor) if tensor.is_complex() else tensor)


def _accumulating(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def solving_dtype(device: torch.device) -> torch.dtype:
    """Float64, or float32 on a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def fisher_products(
    forwards: Iterable[Callable[[Mapping[str, Tensor]], Any]],
    losses: Losses,
    params: Mapping[str, Tensor],
    directions: Sequence[Mapping[str, Tensor]],
    weights: Sequence[Sequence[TermWeights]] = (),
    route: Route | None = None,
) -> Tensor:
    """Return `A [k, k]`, the exact Fisher of the mean loss between directions.

    Args:
        forwards: the micro-batches: each runs the network with other parameters. They
            count as one batch.
        losses: what their outputs mean.
        params: the parameters, by name; others than these stay as they are.
        directions: `d_i`, by the same names.
        weights: of the loss terms, by forward and loss, where they do not all weigh 1.
        route: says where to begin, and is told which way it went.

    Raises:
        RuntimeError: an operation in the network has no forward-mode derivative.
        ValueError: there is no forward.

    >>> from torch.func import functional_call
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> def normal(z):
    ...     from kfac_torch.loss_functions import NormalMeanNegativeLogProbLoss
    ...     return [(NormalMeanNegativeLogProbLoss(z, var=1.0), 1.0)]
    >>> fisher_products(
    ...     [lambda params: functional_call(model, params, (x,))],
    ...     normal,
    ...     {"weight": model.weight},
    ...     [{"weight": d} for d in torch.eye(2).unsqueeze(1)],
    ... )  # XᵀX/2
    tensor([[1., 1.],
            [1., 2.]], dtype=torch.float64)
    """
    sums: list[Tensor] = []  # per loss of a network
    terms: list[Tensor | float] = []
    route = Route() if route is None else route
    weights_of = itertools.chain(weights, itertools.repeat(()))
    for forward, some in zip(forwards, weights_of, strict=False):
        for j, (columns, count) in enumerate(
            _factor_products(forward, losses, params, directions, some, route)
        ):
            gram = products([[column] for column in columns])
            if j == len(sums):
                sums.append(gram)
                terms.append(count)
            else:
                sums[j] += gram
                terms[j] += count
    if not sums:
        raise ValueError(
            "the quadratic model needs the forward that the gradient is of: expected a "
            "call of the model given to KFAC, in training mode, since the last step"
        )
    return torch.stack([s / n for s, n in zip(sums, terms, strict=True)]).sum(0)


def _factor_products(
    forward: Callable[[Mapping[str, Tensor]], Any],
    losses: Losses,
    params: Mapping[str, Tensor],
    directions: Sequence[Mapping[str, Tensor]],
    weights: Sequence[TermWeights],
    route: Route,
) -> list[tuple[Sequence[Tensor], Tensor | float]]:
    """`√coeff Bᵀ J d` of every direction, and the number of loss terms, for each loss."""
    found = _found(forward, losses, params, directions, route)
    result = list[tuple[Sequence[Tensor], Tensor | float]]()
    weights = [*weights, *[None] * (len(found) - len(weights))]
    # Here the losses have no tangents any more.
    for (loss, coeff, tangents), weight in zip(found, weights, strict=True):
        columns = [coeff**0.5 * loss.multiply_fisher_factor_transpose(t) for t in tangents]
        if weight is not None:
            columns = [weight[0].sqrt() * column for column in columns]
        result.append((columns, loss.num_terms if weight is None else weight[1]))
    return result


def _found(
    forward: Callable[[Mapping[str, Tensor]], Any],
    losses: Losses,
    params: Mapping[str, Tensor],
    directions: Sequence[Mapping[str, Tensor]],
    route: Route,
) -> Tangents:
    """`J d` by the first way that the operations of the network can go."""
    load_forward_mode()
    if route.first <= RULES:
        try:
            return _by_rules(forward, losses, params, directions)
        except Exception:  # a model may stumble over a Dual in any way
            # An error that is the model's own comes again below, and is raised there.
            route.closed(RULES)
    if len(directions) > 1 and route.first <= TOGETHER:
        try:
            return _together(forward, losses, params, directions)
        except (NotImplementedError, RuntimeError):
            route.closed(TOGETHER)  # the last way says which operation
    return _one_by_one(forward, losses, params, directions)


Tangents: TypeAlias = "list[tuple[LossFunction, float, Sequence[Tensor]]]"
"""Every loss at the network output, its weight, and `J d` there for each direction."""


def _by_rules(
    forward: Callable[[Mapping[str, Tensor]], Any],
    losses: Losses,
    params: Mapping[str, Tensor],
    directions: Sequence[Mapping[str, Tensor]],
) -> Tangents:
    """One pass with all directions, most operations by the rules of `tangents.py`."""
    device = next(iter(params.values())).device
    if torch.is_autocast_enabled(device.type):
        raise NoRule("autocast")
    result = list[tuple[LossFunction, float, Sequence[Tensor]]]()
    with one_pass() as current:
        duals = {
            name: Dual(p.detach(), [d[name].to(p.dtype) for d in directions], current)
            for name, p in params.items()
        }
        found = losses(forward(duals))
    for loss, coeff in found:
        z: Any = loss.inputs
        if isinstance(z, Dual):
            result.append((loss.at(z.value.detach()), coeff, list(z.stacked().detach())))
        else:  # it depends on none of the parameters
            nothing = [torch.zeros_like(z) for _ in directions]
            result.append((loss.at(z.detach()), coeff, nothing))
    return result


def _together(
    forward: Callable[[Mapping[str, Tensor]], Any],
    losses: Losses,
    params: Mapping[str, Tensor],
    directions: Sequence[Mapping[str, Tensor]],
) -> Tangents:
    """One pass with all directions: what does not depend on them is computed once."""
    found = list[tuple[LossFunction, float]]()

    def outputs(q: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with _differentiable_kernels():
            found[:] = losses(forward(q))
        return tuple(loss.inputs for loss, _ in found)

    primals = {name: p.detach() for name, p in params.items()}
    stacked = {
        name: torch.stack([d[name].to(p.dtype) for d in directions])
        for name, p in primals.items()
    }
    out_dims: Any = (None, 0)  # the stubs know no None
    jvp: Any = torch.vmap(
        lambda direction: torch.func.jvp(outputs, (primals,), (direction,)),
        out_dims=out_dims,
        randomness="same",
    )
    zs, tangents = jvp(stacked)
    return [
        (loss.at(z), coeff, tangent)
        for (loss, coeff), z, tangent in zip(found, zs, tangents, strict=True)
    ]


def _one_by_one(
    forward: Callable[[Mapping[str, Tensor]], Any],
    losses: Losses,
    params: Mapping[str, Tensor],
    directions: Sequence[Mapping[str, Tensor]],
) -> Tangents:
    passes = [_pass(forward, losses, params, direction) for direction in directions]
    return [
        (columns[0][0], columns[0][1], [tangent for _, _, tangent in columns])
        for columns in zip(*passes, strict=True)
    ]


def _pass(
    forward: Callable[[Mapping[str, Tensor]], Any],
    losses: Losses,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> list[tuple[LossFunction, float, Tensor]]:
    try:
        return _forward_mode(forward, losses, params, direction)
    except (NotImplementedError, RuntimeError) as error:
        if not any(sign in str(error) for sign in ("forward AD", "forward mode AD", "jvp")):
            raise
        try:
            return _twice_backward(forward, losses, params, direction)
        except (NotImplementedError, RuntimeError) as other:
            raise RuntimeError(
                "the quadratic model differentiates the network in forward mode, or twice "
                f"backward, and one of its operations has neither: {error}; {other}. "
                'Expected one that has: use another, or a fixed lr with "regular" momentum'
            ) from error


def _forward_mode(
    forward: Callable[[Mapping[str, Tensor]], Any],
    losses: Losses,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> list[tuple[LossFunction, float, Tensor]]:
    with forward_ad.dual_level(), _differentiable_kernels():
        duals = {
            name: forward_ad.make_dual(p.detach(), direction[name].to(p.dtype))
            for name, p in params.items()
        }
        result = list[tuple[LossFunction, float, Tensor]]()
        for loss, coeff in losses(forward(duals)):
            z, tangent = forward_ad.unpack_dual(loss.inputs)
            assert z is not None
            # An output may depend on none of the parameters.
            tangent = torch.zeros_like(z) if tangent is None else tangent
            result.append((loss.at(z), coeff, tangent))
    return result


def _twice_backward(
    forward: Callable[[Mapping[str, Tensor]], Any],
    losses: Losses,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
) -> list[tuple[LossFunction, float, Tensor]]:
    """`J d`, the derivative by `u` of `uᵀ J d`, where an operation has no forward mode."""
    with torch.enable_grad(), _differentiable_kernels():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        result = list[tuple[LossFunction, float, Tensor]]()
        for loss, coeff in losses(forward(leaves)):
            z, u = loss.inputs, torch.zeros_like(loss.inputs, requires_grad=True)
            tangent = torch.zeros_like(z)
            along = _along(z, leaves, direction, u)
            if along is not None:
                (tangent,) = torch.autograd.grad(along, u, retain_graph=True)
                _check_tangent(z, leaves, direction, tangent)
            result.append((loss.at(z.detach()), coeff, tangent.detach()))
    return result


def _along(
    z: Tensor, leaves: Mapping[str, Tensor], direction: Mapping[str, Tensor], u: Tensor
) -> Tensor | None:
    """`uᵀ J d`, 0-dim; None where `z` depends on none of the leaves."""
    if not z.requires_grad:
        return None
    inputs = list(leaves.values())
    grads = torch.autograd.grad(z, inputs, u, create_graph=True, allow_unused=True)
    terms = [
        (grad * direction[name].to(grad)).sum()
        for name, grad in zip(leaves, grads, strict=True)
        if grad is not None
    ]
    return torch.stack(terms).sum() if terms else None


def _check_tangent(
    z: Tensor,
    leaves: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    tangent: Tensor,
) -> None:
    """Hold `J d` to a single backward: an operation may drop its second in silence."""
    w = torch.arange(z.numel(), dtype=z.dtype, device=z.device).cos().view(z.shape)
    expected = _along(z, leaves, direction, w)
    assert expected is not None
    error = ((w * tangent).sum() - expected).abs()
    if error > torch.finfo(z.dtype).eps ** 0.5 * w.norm() * tangent.norm() + 1e-30:
        raise RuntimeError("an operation cannot be differentiated twice")


@contextmanager
def _differentiable_kernels() -> Iterator[None]:
    """Use kernels that have a forward mode, which fused ones have not."""
    with sdpa_kernel(SDPBackend.MATH), ComputeByParts(lambda part, a, s: s), _Formulas():
        yield


class _Formulas(TorchFunctionMode):
    """Compute otherwise what has a forward mode through Python alone, far slower.

    A layer norm by its formula; arithmetic with a number by the overload that takes one,
    for which no tangent of zeros is made.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is functional.layer_norm:
            return _layer_norm(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _ARITHMETIC and len(args) == 2 and not kwargs:
            tensor, number = args
            own = func in (getattr(torch, name), getattr(Tensor, name))
            if own and isinstance(number, float | int) and isinstance(tensor, Tensor):
                if tensor.is_floating_point():
                    return getattr(torch.ops.aten, name).Scalar(tensor, number)
        return func(*args, **(kwargs or {}))


_ARITHMETIC = ("add", "sub", "mul", "div")


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    wide = _accumulating(input)
    centred = wide - wide.mean(dims, keepdim=True)
    variance = centred.square().mean(dims, keepdim=True)
    unit = centred * torch.ops.aten.add.Scalar(variance, eps).rsqrt()
    unit = unit if weight is None else unit * weight
    return (unit if bias is None else unit + bias).to(input.dtype)
