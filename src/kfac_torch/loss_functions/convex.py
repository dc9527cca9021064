"""Losses whose curvature at the output is their Hessian, derived where not given.

Notation: `z` the network output, `H = ∇²_z ℓ` the Hessian of the loss at it, block
diagonal over the examples, `B = H^½` its symmetric root. `H` of a convex loss is what
the generalised Gauss-Newton matrix `Jᵀ H J` has in the middle (Schraudolph 2002); of a
natural-parameter negative log-likelihood it does not depend on the targets and is the
Fisher (Martens 2020, arXiv 1412.1193, section 9.2).

`H v` is a double backward, `B` the root of the dense `H` of every example. The concrete
families of this package give closed forms instead. Left out: losses that couple the
examples of a batch, whose `H` is not block diagonal.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..linalg import symmetrize, without_subnormals
from .base import LossFunction, NegativeLogProbLoss


class ConvexLoss(LossFunction):
    """A loss that is convex in `z`, with no distribution behind it (abstract).

    A subclass gives `evaluate_on_targets`. The Hessian at the output depends on the
    targets in general, so the constructor wants them; where `z` is itself a residual
    (of a differential equation, say), they are zeros. The `fisher` methods answer with
    the Hessian, which takes the Fisher's place in K-FAC's statistics.

    `elementwise = True` in a subclass says that the loss is a sum over the entries of
    `z`; `B` is then a diagonal rather than a dense matrix for every example.

    Args:
        inputs: `z [N, ...]`, an example per row.
        targets: of the same number of rows.
        name: for messages.

    >>> class PseudoHuberLoss(ConvexLoss):
    ...     elementwise = True
    ...
    ...     def evaluate_on_targets(self, targets):
    ...         return ((1 + (self.inputs - targets) ** 2).sqrt() - 1).sum()
    >>> loss = PseudoHuberLoss(torch.zeros(1, 2), torch.tensor([[0.0, 3.0**0.5]]))
    >>> loss.multiply_ggn(torch.ones(1, 2))
    tensor([[1.0000, 0.1250]])
    """

    elementwise: ClassVar[bool] = False
    _curvature_is_the_hessian = True

    @functools.cached_property
    def _targets_of_hessian(self) -> Tensor:
        if self._targets is None:
            raise ValueError(
                f"{self.name}: its Hessian at the output depends on the targets; pass "
                "them to the constructor (zeros where the output is itself a residual)"
            )
        return self._targets

    def _multiply_hessian(self, vectors: Tensor, batched: bool = False) -> Tensor:
        targets = self._targets_of_hessian
        gradient = torch.func.grad(lambda z: self.at(z).evaluate_on_targets(targets))
        pullback = torch.func.vjp(gradient, self._inputs.detach())[1]
        multiply = torch.vmap(pullback) if batched else pullback
        return multiply(vectors)[0]

    @functools.cached_property
    def _root(self) -> Tensor:
        """`B`: the diagonals in the shape of `z` if elementwise, else `[N, D, D]`."""
        z = self._inputs
        if self.elementwise:
            diagonal = self._multiply_hessian(torch.ones_like(z))
            self._check_convex(diagonal.flatten(1) if z.dim() > 1 else diagonal[:, None])
            return diagonal.clamp(min=0).sqrt()
        num_outputs = z[0].numel()
        one_hots = torch.eye(num_outputs, dtype=z.dtype, device=z.device)
        one_hots = one_hots.unsqueeze(1).expand(-1, len(z), -1).reshape(-1, *z.shape)
        columns = self._multiply_hessian(one_hots, batched=True)
        H = columns.reshape(num_outputs, len(z), num_outputs).transpose(0, 1)
        return self._symmetric_root(H)

    def _symmetric_root(self, H: Tensor) -> Tensor:
        H32 = symmetrize(H.to(torch.promote_types(H.dtype, torch.float32)))
        # An overflow in one example is a NaN in its root, not a failing decomposition.
        finite = H32.isfinite().all(-1).all(-1)[:, None, None]
        e, V = torch.linalg.eigh(without_subnormals(torch.where(finite, H32, 0.0)))
        self._check_convex(e)
        root = (V * e.clamp(min=0).sqrt().unsqueeze(-2)) @ V.mT
        return torch.where(finite, root, torch.nan).to(H.dtype)

    def _check_convex(self, eigenvalues: Tensor) -> None:
        """`[N, D]`, of every example; raise ValueError where one is truly negative."""
        e = eigenvalues.nan_to_num(0.0, 0.0, 0.0)
        rounding = max(30, 3 * e.shape[-1]) * torch.finfo(self._inputs.dtype).eps
        if (e.amin(-1) < -rounding * e.abs().amax(-1)).any():
            raise ValueError(
                f"{self.name}: expected a loss that is convex in the network output, but "
                f"its Hessian there has an eigenvalue {e.min().item():.3g}. Derive from "
                "NegativeLogProbLoss and give multiply_fisher_factor and its transpose"
            )

    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `H v`, by double backward."""
        return self._multiply_hessian(vector)

    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `B v`, with `B` the symmetric root of `H`."""
        if self.elementwise:
            return self._root * vector
        rows = vector.reshape(len(self._inputs), -1, 1)
        return (self._root @ rows).reshape(self._inputs.shape)

    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `Bᵀ v = B v`."""
        return self.multiply_fisher_factor(vector)

    def size_from_gradient(
        self, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor | None:
        """Return `½ gᵀH⁺g`: what a Newton step of the outputs alone would gain.

        Directions of little curvature count as if they had a hundredth of the mean.
        """
        if self.elementwise:
            H = self._root.square()
            return 0.5 * (gradient.square() / H.clamp(min=0.01 * H.mean())).sum()
        H = self._root @ self._root
        H = H + 0.01 * H.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(len(H[0])).to(H)
        rows = gradient.reshape(len(H), -1, 1).to(H)
        return 0.5 * (rows * torch.linalg.solve_ex(H, rows)[0]).sum()


class NaturalParamsNegativeLogProbLoss(NegativeLogProbLoss, ConvexLoss):
    """A loss whose `z` is a natural parameter: Hessian and Fisher coincide (abstract).

    A subclass gives `sample` and `evaluate_on_targets`, and closed forms of
    `multiply_fisher`, `multiply_fisher_factor` and its transpose where it has them. If
    the Hessian does depend on the targets, `z` is not a natural parameter, and what is
    derived here is the Hessian at one draw of them, not the Fisher.

    >>> class PoissonNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
    ...     elementwise = True
    ...
    ...     def sample(self, generator=None):
    ...         return torch.poisson(self.inputs.detach().exp(), generator=generator)
    ...
    ...     def evaluate_on_targets(self, targets):
    ...         z = self.inputs
    ...         return (z.exp() - targets * z + (targets + 1).lgamma()).sum()
    >>> loss = PoissonNegativeLogProbLoss(torch.tensor([[0.0, 4.0]]).log1p())
    >>> loss.multiply_fisher(torch.ones(1, 2))
    tensor([[1., 5.]])
    """

    @functools.cached_property
    def _targets_of_hessian(self) -> Tensor:
        if self._targets is not None:
            return self._targets
        return self.sample(Generator(self._inputs.device).manual_seed(0))

    def change_from_gradient(
        self, outputs: Tensor, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor | None:
        """Return `D(outputs, z) + gᵀ(outputs − z)`, `D` the divergence that `A` makes.

        Any targets give the `D` of a loss `A(z) − zᵀT(y)`. Without weights.
        """
        y = self._targets_of_hessian
        with torch.enable_grad():
            z = self._inputs.detach().requires_grad_()
            here = self.at(z).evaluate_on_targets(y)
            (slope,) = torch.autograd.grad(here, z)
        there = self.at(outputs).evaluate_on_targets(y)
        return there - here.detach() + ((gradient - slope) * (outputs - z.detach())).sum()
