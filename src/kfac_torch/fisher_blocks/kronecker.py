"""`KroneckerProductFB`: `T · A ⊗ G`, the block of a layer with a weight and a bias.

Notation: `A [m, m]` the factor of the layer's inputs, `G [n, n]` that of its output
gradients, `V [m, n]` a gradient of the layer, inputs (and the bias, last) in rows, `T`
the rows of the layer per loss term: output locations of a convolution in an image
classifier, 1 for a linear layer. With λ split by π (see `damping.py`)

    F_λ V = T · (A + π√(λ/T) I) V (G + √(λ/T)/π I)

Either side may be a diagonal; of a layer with groups each is a stack, one matrix per
group. Martens & Grosse 2015 (arXiv 1503.05671), sections 3 and 6.3; Grosse & Martens
2016 (arXiv 1602.01407), section 3. `T` is a ratio of real tensors' sizes, never computed
from strides.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..damping import PackagedFunc, compute_pi, evaluate_damping, normalize_damping
from ..size_limit import SizeLimit
from .layer import LayerFB


class KroneckerProductFB(LayerFB):
    """`T · A ⊗ G` for a layer with a weight `[out, ...]` and maybe a bias (abstract).

    Several calls of the layer (or of modules that share its parameters) are rows of one
    matrix. Arguments as `LayerFB`.

    Raises:
        RuntimeError: use before `instantiate_factors`.
    """

    size_limit: SizeLimit | None = None
    """Up to which size a side is a full matrix, and what then; None for any size."""

    @abc.abstractmethod
    def _make_factors(self) -> tuple[Any, Any]:
        """Make the input's and the output's factor."""

    def _sides(self) -> tuple[Any, Any]:
        A, G = self._instantiated()
        return A, G

    # Damping.

    def _split_damping(self) -> tuple[Tensor, Tensor]:
        """`(π√(λ/T), √(λ/T)/π)`, from the current factors."""
        damping = float(evaluate_damping(self._damping, self.name))
        root = math.sqrt(normalize_damping(damping, self.num_locations))
        pi = self.pi()
        return pi * root, root / pi

    def pi(self) -> Tensor:
        """Return `π` by the current factors, one for each group."""
        A, G = self._sides()
        return compute_pi(A.cov_trace() / A.cov_dim, G.cov_trace() / G.cov_dim)

    def _damping_funcs(self) -> tuple[PackagedFunc, PackagedFunc]:
        """One per side; known by layer and side, so that every exponent shares them."""
        return self._side_damping(0), self._side_damping(1)

    def _side_damping(self, side: int) -> PackagedFunc:
        return PackagedFunc(lambda: self._split_damping()[side], (self.name, side))

    def register_matpower(self, exp: float) -> None:
        """Ask for `F_λ^exp` to be kept; after `instantiate_factors`."""
        for factor, damping in zip(self._sides(), self._damping_funcs(), strict=True):
            factor.register_matpower(exp, damping)
            if exp != 1:
                factor.instantiate_inv_variables()

    def register_cholesky(self) -> None:
        """Ask for `L`, `L Lᵀ = F_λ`, to be kept; after `instantiate_factors`."""
        for factor, damping in zip(self._sides(), self._damping_funcs(), strict=True):
            factor.register_cholesky(damping)
            factor.instantiate_inv_variables()

    def register_cholesky_inverse(self) -> None:
        """Ask for `L⁻¹`, `L Lᵀ = F_λ`, to be kept; after `instantiate_factors`."""
        for factor, damping in zip(self._sides(), self._damping_funcs(), strict=True):
            factor.register_cholesky_inverse(damping)
            factor.instantiate_inv_variables()

    # Statistics.

    def num_rows(self, inputs: Sequence[Tensor], num_terms: float) -> float:
        """`R`: the rows of all calls."""
        A, _ = self._sides()
        return sum(A.num_rows(tensor) for tensor in inputs)

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the moment of `A`."""
        A, _ = self._sides()
        rows = [A.num_rows(tensor) for tensor in inputs]
        return [weighted_mean([A.new_cov([[tensor]]) for tensor in inputs], rows)]

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the moment of `G`, summed over the sources `grads[call] [S, ...]`."""
        A, G = self._sides()
        rows = [A.num_rows(tensor) for tensor in inputs]
        return [weighted_mean([G.summed_cov(grad) for grad in grads], rows)]

    # Products.

    def multiply_matpower(self, vector: Tensor, exp: float) -> Tensor:
        """Return `F_λ^exp V = T^exp A_λ^exp V G_λ^exp`.

        The factors' powers are those of the last refresh; for `exp = 1` the current.

        Raises:
            ValueError: another shape.
            KeyError: this exponent is not registered.
            RuntimeError: not refreshed since it was registered.
        """
        A, G = self._sides()
        damping_A, damping_G = self._damping_funcs()
        left = A.left_multiply_matpower(vector, exp, damping_A)
        product = G.right_multiply_matpower(left, exp, damping_G)
        return product if self.num_locations == 1 else product * self.num_locations**exp

    def multiply_cholesky(self, vector: Tensor, transpose: bool = False) -> Tensor:
        """Return `√T L_A V L_Gᵀ` (transposed: `√T L_Aᵀ V L_G`), as of the last refresh."""
        A, G = self._sides()
        damping_A, damping_G = self._damping_funcs()
        left = A.left_multiply_cholesky(vector, damping_A, transpose)
        product = G.right_multiply_cholesky(left, damping_G, not transpose)
        return product * self.num_locations**0.5

    def multiply_cholesky_inverse(self, vector: Tensor, transpose: bool = False) -> Tensor:
        """Return `L_A⁻¹ V L_G⁻ᵀ/√T` (transposed: `L_A⁻ᵀ V L_G⁻¹/√T`)."""
        A, G = self._sides()
        damping_A, damping_G = self._damping_funcs()
        left = A.left_multiply_cholesky_inverse(vector, damping_A, transpose)
        product = G.right_multiply_cholesky_inverse(left, damping_G, not transpose)
        return product * self.num_locations**-0.5

    def full_fisher_block(self) -> Tensor:
        """Return `T · A ⊗ G`, undamped, over the row-major entries of `V`."""
        A, G = (factor.get_cov() for factor in self._sides())
        if self.groups == 1:
            return self.num_locations * torch.kron(A, G)
        return self.num_locations * torch.block_diag(*map(torch.kron, A, G))

    def trace(self) -> Tensor:
        """Return `T tr A tr G`, summed over groups."""
        A, G = self._sides()
        return self.num_locations * (A.cov_trace() * G.cov_trace()).sum()


def weighted_mean(covs: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Return the mean over the rows of all calls."""
    total = sum(rows)
    mean = covs[0] if len(covs) == 1 else covs[0] * (rows[0] / total)
    for cov, count in zip(covs[1:], rows[1:], strict=True):
        mean += cov * (count / total)
    return mean
