"""The quadratic model of the loss along a few directions: step size and momentum from it.

Notation: `θ` the parameters, `g` the gradient of the mean loss, `D = [d_1, …]` the
directions, `δ = D w` the step, `J` the Jacobian of the network output, `B Bᵀ` the Fisher
at the output, `N` the loss terms, `λ` the damping, `ℓ` the coefficient of a regulariser
`ℓ/2 ‖θ‖²` within the loss:

    M(w) = gᵀD w + ½ wᵀ (A + (ℓ + λ) DᵀD) w,     A = (1/N) (Bᵀ J D)ᵀ (Bᵀ J D)

`A` is the *exact* Fisher of the mini-batch, by forward-mode differentiation: one pass a
direction, no backward. With `D = [p, δ_prev]` the minimiser is the step of Martens &
Grosse 2015 (arXiv 1503.05671), sections 6.4 and 7. The weights are solved for in float64
where the device has it, since the two directions tend to be nearly parallel. Left out:
which directions (the optimizer's business), and how `λ` follows (`damping.py`).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from .loss_functions import LossFunction

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

    def minimize(self, damping: float, momentum: float | None = None) -> Tensor:
        """Return the weights `w [k]` at the minimum.

        Where the second direction is 0 or parallel to the first, its weight is 0; where
        the first has no curvature at all, so is its.

        Args:
            damping: `λ + ℓ`.
            momentum: a fixed weight of the second direction; None to solve for it.
        """
        C, b = self.matrix(damping), self.slopes
        if len(b) == 1:
            return _quotient(-b, C[0])
        if momentum is not None:
            step = _quotient(-(b[0] + C[0, 1] * momentum), C[0, 0])
            return torch.stack([step, torch.full_like(step, momentum)])
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


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """`a/b`, 0 where `b` is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def products(directions: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the inner products `DᵀD [k, k]` of directions, each a list of tensors.

    Accumulated in float32 at least, summed and returned as `solving_dtype`.

    >>> p, q = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    >>> products([[p, q], [2 * p, q]])
    tensor([[14., 19.],
            [19., 29.]], dtype=torch.float64)
    """
    device = directions[0][0].device
    total = torch.zeros((len(directions),) * 2, dtype=solving_dtype(device), device=device)
    for parts in zip(*directions, strict=True):
        parts = [torch.view_as_real(p) if p.is_complex() else p for p in parts]
        rows = torch.stack([_accumulating(part).flatten() for part in parts])
        total += (rows @ rows.mT).to(total)
    return total


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
) -> Tensor:
    """Return `A [k, k]`, the exact Fisher of the mean loss between directions.

    Args:
        forwards: the micro-batches: each runs the network with other parameters. They
            count as one batch.
        losses: what their outputs mean.
        params: the parameters, by name; others than these stay as they are.
        directions: `d_i`, by the same names.
        weights: of the loss terms, by forward and loss, where they do not all weigh 1.

    Raises:
        RuntimeError: an operation in the network has no forward-mode derivative.
        ValueError: there is no forward.

    >>> model = nn.Linear(2, 1, bias=False)
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
    _load_forward_mode()
    sums: list[Tensor] = []  # per loss of a network
    terms: list[Tensor | float] = []
    weights_of = itertools.chain(weights, itertools.repeat(()))
    for forward, some in zip(forwards, weights_of, strict=False):
        passes = [_factor_products(forward, losses, params, d, some) for d in directions]
        for j, columns in enumerate(zip(*passes, strict=True)):
            gram = products([[column] for column, _ in columns])
            if j == len(sums):
                sums.append(gram)
                terms.append(columns[0][1])
            else:
                sums[j] += gram
                terms[j] += columns[0][1]
    if not sums:
        raise ValueError(
            "the quadratic model needs the forward that the gradient is of: expected a "
            "call of the model given to KFAC, in training mode, since the last step"
        )
    return torch.stack([s / n for s, n in zip(sums, terms, strict=True)]).sum(0)


def _load_forward_mode() -> None:
    with warnings.catch_warnings():
        # The first use of forward mode loads parts of PyTorch that PyTorch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _factor_products(
    forward: Callable[[Mapping[str, Tensor]], Any],
    losses: Losses,
    params: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    weights: Sequence[TermWeights],
) -> list[tuple[Tensor, Tensor | float]]:
    """`√coeff Bᵀ J d` and the number of loss terms, for each loss."""
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(p.detach(), direction[name].to(p.dtype))
            for name, p in params.items()
        }
        try:
            output = forward(duals)
        except (NotImplementedError, RuntimeError) as error:
            if not any(sign in str(error) for sign in ("forward AD", "forward mode AD")):
                raise
            raise RuntimeError(
                "the quadratic model differentiates the network in forward mode, which one "
                f"of its operations does not have: {error}. Expected one that has: use "
                'another, or momentum_type="regular"'
            ) from error
        found = [
            (loss, coeff, forward_ad.unpack_dual(loss.inputs).tangent)
            for loss, coeff in losses(output)
        ]
    result = list[tuple[Tensor, Tensor | float]]()
    weights = [*weights, *[None] * (len(found) - len(weights))]
    # Here the losses have no tangents any more.
    for (loss, coeff, tangent), weight in zip(found, weights, strict=True):
        if tangent is None:  # this output depends on none of the parameters
            tangent = torch.zeros_like(loss.inputs)
        column = loss.multiply_fisher_factor_transpose(tangent)
        column = column if coeff == 1 else coeff**0.5 * column
        if weight is None:
            result.append((column, loss.num_terms))
        else:
            result.append((weight[0].sqrt() * column, weight[1]))
    return result


def rerun(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[Mapping[str, Tensor]], Any]:
    """Return what runs a forward again with other parameters, leaving no trace.

    Buffers, the running statistics of a batch norm, are copies that are thrown away.
    """

    # Those that are left out are the model's own, out of reach of the user's graph.
    own = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def forward(params: Mapping[str, Tensor]) -> Any:
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(model, {**own, **copies, **params}, args, dict(kwargs))

    return forward


def every_kth(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], stride: int, start: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a forward with one example in `stride`, from `start` on.

    The batch is the first dimension of the first tensor; every other tensor with that
    first dimension, in lists, tuples and mappings too, is thinned out alike. A batch of
    fewer examples than `stride` stays whole.

    >>> every_kth((torch.arange(6),), {"scale": torch.ones(1)}, 3, 1)
    ((tensor([1, 4]),), {'scale': tensor([1.])})
    """
    leaves = [leaf for leaf in tree_leaves((args, dict(kwargs))) if _has_rows(leaf)]
    size = leaves[0].shape[0] if leaves else 0
    if stride == 1 or size < stride:
        return args, dict(kwargs)

    def thin(leaf: Any) -> Any:
        if _has_rows(leaf) and leaf.shape[0] == size:
            return leaf[start % stride :: stride]
        return leaf

    return tree_map(thin, (args, dict(kwargs)))


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
