"""Exact products of the Fisher, the Gauss-Newton matrix and the Hessian with vectors.

Notation: `J = ∂z/∂θ` the Jacobian of a network output, `F_L` the curvature of the loss
there, `B Bᵀ = F_L` a factor of it (`loss_functions`). With several losses of weights `c`,

    Fisher, generalised Gauss-Newton   Σ c Jᵀ F_L J = C Cᵀ,   C = [√c Jᵀ B, ...]
    Hessian                            ∇²_θ Σ c ℓ

(Martens 2010; Schraudolph 2002; Martens 2020, arXiv 1412.1193, sections 8 and 9.)
Products are those of *sums* over loss terms, unnormalised and undamped, over the whole
model: no block structure, no factors, no average over batches.

Two doors. `CurvatureMatrixVectorProductComputer` takes losses at the end of a graph that
was built as usual; `J v` is a backward through a backward, so any differentiable
operation will do. The functions take the model as a function of its parameters and use
forward-mode derivatives; they compose with `torch.vmap` and `torch.compile`. Left out:
what is solved with the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .loss_functions import LossFunction, NegativeLogProbLoss

Params: TypeAlias = Any  # a tensor, or dicts, lists and tuples of them
Model: TypeAlias = Callable[[Params], Tensor]
LossOf: TypeAlias = Callable[[Tensor], LossFunction]


class CurvatureMatrixVectorProductComputer:
    """Products with the curvature of some losses in some tensors.

    Vectors are lists of one tensor per tensor of `wrt_tensors`, of its shape ("in
    parameter space"), or of one tensor per loss, of its inner shape ("in factor space").
    The graph behind the losses is kept; a tensor that no loss depends on gets zeros.

    Args:
        losses: their `inputs` in the graph of `wrt_tensors`.
        wrt_tensors: `θ`, parameters as a rule.
        coeffs: the weight `c >= 0` of each loss; 1 by default.

    Raises:
        ValueError: no losses or tensors, a loss outside any graph, a tensor that takes
            no gradient, or coefficients that do not fit.

    >>> from kfac_torch.loss_functions import NormalMeanNegativeLogProbLoss
    >>> w = torch.ones(2, requires_grad=True)
    >>> z = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) @ w
    >>> computer = CurvatureMatrixVectorProductComputer(
    ...     [NormalMeanNegativeLogProbLoss(z, var=1.0)], [w]
    ... )
    >>> computer.multiply_fisher([torch.tensor([1.0, 0.0])])
    [tensor([10., 14.])]
    """

    def __init__(
        self,
        losses: Sequence[LossFunction],
        wrt_tensors: Sequence[Tensor],
        coeffs: Sequence[float] | None = None,
    ) -> None:
        self._losses, self._tensors = list(losses), list(wrt_tensors)
        if not self._losses or not self._tensors:
            raise ValueError(
                "curvature products: expected at least one loss and one tensor, got "
                f"{len(self._losses)} losses and {len(self._tensors)} tensors"
            )
        self._coeffs = [1.0] * len(self._losses) if coeffs is None else list(coeffs)
        if len(self._coeffs) != len(self._losses) or not all(c >= 0 for c in self._coeffs):
            raise ValueError(
                f"coeffs: expected one number >= 0 for each of {len(self._losses)} losses, "
                f"got {self._coeffs}"
            )
        for loss in self._losses:
            if not loss.inputs.requires_grad:
                raise ValueError(
                    f"loss {loss.name}: its inputs are not in a graph; run the model with "
                    "gradients enabled and do not detach its output"
                )
        for i, tensor in enumerate(self._tensors):
            if not tensor.requires_grad:
                raise ValueError(
                    f"wrt_tensors[{i}]: expected a tensor that requires a gradient, got "
                    f"one of shape {tuple(tensor.shape)} that does not"
                )

    # The Fisher.

    def multiply_fisher(self, vecs: Sequence[Tensor]) -> list[Tensor]:
        """Return `Σ c Jᵀ F_L J v`, in parameter space.

        Raises:
            TypeError: a loss has no distribution, so no Fisher.
            ValueError: the vectors do not fit `wrt_tensors`.
        """
        self._check_distributions()
        return self._multiply(vecs, "multiply_fisher")

    def multiply_fisher_factor(self, loss_vecs: Sequence[Tensor]) -> list[Tensor]:
        """Return `Σ √c Jᵀ B u`, in parameter space, for `u` in factor space."""
        return self._multiply_factor(
            loss_vecs, "multiply_fisher_factor", self.fisher_factor_inner_shapes
        )

    def multiply_fisher_factor_transpose(self, vecs: Sequence[Tensor]) -> list[Tensor]:
        """Return `√c Bᵀ J v` of every loss, in factor space."""
        self._check_distributions()
        return self._multiply_factor_transpose(vecs, "multiply_fisher_factor_transpose")

    @property
    def fisher_factor_inner_shapes(self) -> list[torch.Size]:
        """The shapes in factor space."""
        self._check_distributions()
        return [loss.fisher_factor_inner_shape for loss in self._losses]

    # The generalised Gauss-Newton matrix.

    def multiply_generalized_gauss_newton(self, vecs: Sequence[Tensor]) -> list[Tensor]:
        """Return `Σ c Jᵀ H_L J v`, in parameter space, `H_L` the Hessian at the output.

        Raises:
            NotImplementedError: a loss is not known to be convex in its inputs.
            ValueError: the vectors do not fit `wrt_tensors`.
        """
        return self._multiply(vecs, "multiply_ggn")

    def multiply_generalized_gauss_newton_factor(
        self, loss_vecs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return `Σ √c Jᵀ B u`, in parameter space, with `B Bᵀ = H_L`."""
        return self._multiply_factor(
            loss_vecs,
            "multiply_ggn_factor",
            self.generalized_gauss_newton_factor_inner_shapes,
        )

    def multiply_generalized_gauss_newton_factor_transpose(
        self, vecs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return `√c Bᵀ J v` of every loss, in factor space, with `B Bᵀ = H_L`."""
        return self._multiply_factor_transpose(vecs, "multiply_ggn_factor_transpose")

    @property
    def generalized_gauss_newton_factor_inner_shapes(self) -> list[torch.Size]:
        """The shapes in factor space."""
        return [loss.ggn_factor_inner_shape for loss in self._losses]

    # The Hessian.

    def multiply_hessian(self, vecs: Sequence[Tensor]) -> list[Tensor]:
        """Return `∇²_θ (Σ c ℓ) v`, in parameter space, by double backward.

        Raises:
            ValueError: a loss has no targets, or the vectors do not fit `wrt_tensors`.
        """
        self._check(vecs, [t.shape for t in self._tensors], "wrt_tensors")
        with torch.enable_grad():
            values = [loss.evaluate() for loss in self._losses]
            grads = torch.autograd.grad(
                values,
                self._tensors,
                [torch.full_like(v, c) for v, c in zip(values, self._coeffs, strict=True)],
                create_graph=True,
                allow_unused=True,
            )
        return self._pull_back(grads, vecs)

    # What they are made of.

    @torch.no_grad()
    def _multiply(self, vecs: Sequence[Tensor], product: str) -> list[Tensor]:
        tangents = self._jacobian_times(vecs)
        scaled = [
            c * getattr(loss, product)(Jv)
            for loss, c, Jv in zip(self._losses, self._coeffs, tangents, strict=True)
        ]
        return self._pull_back([loss.inputs for loss in self._losses], scaled)

    @torch.no_grad()
    def _multiply_factor(
        self, loss_vecs: Sequence[Tensor], product: str, shapes: list[torch.Size]
    ) -> list[Tensor]:
        self._check(loss_vecs, shapes, "the losses' inner shapes")
        scaled = [
            math.sqrt(c) * getattr(loss, product)(u)
            for loss, c, u in zip(self._losses, self._coeffs, loss_vecs, strict=True)
        ]
        return self._pull_back([loss.inputs for loss in self._losses], scaled)

    @torch.no_grad()
    def _multiply_factor_transpose(
        self, vecs: Sequence[Tensor], product: str
    ) -> list[Tensor]:
        tangents = self._jacobian_times(vecs)
        return [
            math.sqrt(c) * getattr(loss, product)(Jv)
            for loss, c, Jv in zip(self._losses, self._coeffs, tangents, strict=True)
        ]

    def _jacobian_times(self, vecs: Sequence[Tensor]) -> list[Tensor]:
        """`J v` of every loss: the derivative of `Jᵀ u`, linear in `u`, along `u`."""
        self._check(vecs, [t.shape for t in self._tensors], "wrt_tensors")
        outputs = [loss.inputs for loss in self._losses]
        u = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        JTu = torch.autograd.grad(
            outputs, self._tensors, u, create_graph=True, allow_unused=True
        )
        return _transposed_times(JTu, u, vecs)

    def _pull_back(
        self, outputs: Sequence[Tensor | None], vecs: Sequence[Tensor]
    ) -> list[Tensor]:
        """`Jᵀ u` of functions of `wrt_tensors`."""
        return _transposed_times(outputs, self._tensors, vecs)

    def _check_distributions(self) -> None:
        for loss in self._losses:
            if not isinstance(loss, NegativeLogProbLoss):
                raise TypeError(
                    f"loss {loss.name}: expected a NegativeLogProbLoss, since only a "
                    "distribution has a Fisher; use the generalized_gauss_newton products"
                )

    def _check(
        self, vecs: Sequence[Tensor], shapes: Sequence[torch.Size], what: str
    ) -> None:
        got = [getattr(vec, "shape", type(vec).__name__) for vec in vecs]
        if got != list(shapes):
            raise ValueError(
                f"vectors: expected a list of tensors with the shapes of {what}, "
                f"{[tuple(s) for s in shapes]}, got "
                f"{[tuple(s) if isinstance(s, torch.Size) else s for s in got]}"
            )


def _transposed_times(
    outputs: Sequence[Tensor | None], tensors: Sequence[Tensor], vecs: Sequence[Tensor]
) -> list[Tensor]:
    """`(∂outputs/∂tensors)ᵀ vecs`; zeros for what does not depend on what."""
    pairs = [
        (output, vec)
        for output, vec in zip(outputs, vecs, strict=True)
        if output is not None and output.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return list(
        torch.autograd.grad(
            [output for output, _ in pairs],
            list(tensors),
            [vec for _, vec in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


# The model as a function of its parameters.


def fisher_vector_product(f: Model, params: Params, vector: Params, loss: LossOf) -> Params:
    """Return `Jᵀ F_L J v`, like `params`.

    Args:
        f: `params -> z`, for instance `lambda p: functional_call(model, p, (x,))`.
        params: `θ`: a tensor, or dicts, lists and tuples of them.
        vector: `v`, like `params`.
        loss: `z -> loss`, for instance a class of `loss_functions`.

    Raises:
        ValueError: `vector` is not like `params`.

    >>> from kfac_torch.loss_functions import NormalMeanNegativeLogProbLoss
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> fisher_vector_product(
    ...     lambda p: x @ p["w"],
    ...     {"w": torch.ones(2)},
    ...     {"w": torch.tensor([1.0, 0.0])},
    ...     lambda z: NormalMeanNegativeLogProbLoss(z, var=1.0),
    ... )
    {'w': tensor([10., 14.])}
    """
    return _sandwich(f, params, vector, lambda z, Jv: loss(z).multiply_fisher(Jv))


def ggn_vector_product(f: Model, params: Params, vector: Params, loss: LossOf) -> Params:
    """Return `Jᵀ H_L J v`, like `params`, with `H_L` the Hessian at the output.

    Args and errors as of `fisher_vector_product`.

    Raises:
        NotImplementedError: the loss is not known to be convex in `z`.
    """
    return _sandwich(f, params, vector, lambda z, Jv: loss(z).multiply_ggn(Jv))


def hessian_vector_product(
    f: Model, params: Params, vector: Params, loss: LossOf
) -> Params:
    """Return `∇²_θ ℓ(f(θ)) v`, like `params`: forward over backward.

    Args and errors as of `fisher_vector_product`.

    Raises:
        ValueError: the loss has no targets.
    """
    _check_like_params(params, vector)
    gradient = torch.func.grad(lambda params: loss(f(params)).evaluate())
    return torch.func.jvp(gradient, (params,), (vector,))[1]


def fisher_factor_product(f: Model, params: Params, vector: Tensor, loss: LossOf) -> Params:
    """Return `Jᵀ B u`, like `params`, for `u` of the loss's inner shape.

    Args and errors as of `fisher_vector_product`.

    >>> from kfac_torch.loss_functions import NormalMeanNegativeLogProbLoss
    >>> fisher_factor_product(
    ...     lambda w: torch.tensor([[1.0, 2.0], [3.0, 4.0]]) @ w,
    ...     torch.ones(2),
    ...     torch.tensor([1.0, 0.0]),
    ...     lambda z: NormalMeanNegativeLogProbLoss(z, var=0.25),
    ... )
    tensor([2., 4.])
    """
    z, pullback = torch.func.vjp(f, params)[:2]
    Bu = loss(z).multiply_fisher_factor(vector)
    return pullback(Bu)[0]


def fisher_factor_transpose_products(
    f: Model, params: Params, vectors: Sequence[Params], loss: LossOf
) -> list[Tensor]:
    """Return `[Bᵀ J v for v in vectors]` from one forward pass.

    With two directions `p`, `q` these give every entry of the quadratic form that a
    step along them needs, `pᵀFp = ‖BᵀJp‖²` and `pᵀFq = ⟨BᵀJp, BᵀJq⟩`, at half the price
    of products with F. Random numbers (dropout) are the same in every direction.

    Args and errors as of `fisher_vector_product`.

    >>> from kfac_torch.loss_functions import NormalMeanNegativeLogProbLoss
    >>> fisher_factor_transpose_products(
    ...     lambda w: torch.tensor([[1.0, 2.0], [3.0, 4.0]]) @ w,
    ...     torch.ones(2),
    ...     [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])],
    ...     lambda z: NormalMeanNegativeLogProbLoss(z, var=1.0),
    ... )
    [tensor([1., 3.]), tensor([2., 4.])]
    """
    for vector in vectors:
        _check_like_params(params, vector)
    if not vectors:
        return []
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *vectors)

    def push_forward(vector: Params) -> tuple[Tensor, ...]:
        return torch.func.jvp(f, (params,), (vector,))

    out_dims: Any = (None, 0)  # z is one for all directions
    z, JV = torch.vmap(push_forward, out_dims=out_dims, randomness="same")(stacked)
    at_output = loss(z)
    return [at_output.multiply_fisher_factor_transpose(Jv) for Jv in JV]


def _sandwich(
    f: Model,
    params: Params,
    vector: Params,
    multiply: Callable[[Tensor, Tensor], Tensor],
) -> Params:
    """`Jᵀ multiply(z, J v)`, from one forward pass: dropout is drawn once."""
    _check_like_params(params, vector)

    def pairing(params: Params) -> Tensor:
        z, Jv = torch.func.jvp(f, (params,), (vector,))[:2]
        return (z * multiply(z.detach(), Jv.detach())).sum()

    return torch.func.grad(pairing)(params)


def _check_like_params(params: Params, vector: Params) -> None:
    for leaf in pytree.tree_leaves((params, vector)):
        if not isinstance(leaf, Tensor):
            raise ValueError(
                "params, vector: expected tensors, or dicts, lists and tuples of them, got "
                f"a {type(leaf).__name__} among them"
            )
    shapes = pytree.tree_map(lambda leaf: leaf.shape, (params, vector))
    if shapes[0] != shapes[1]:
        raise ValueError(f"vector: expected it like params, {shapes[0]}, got {shapes[1]}")
