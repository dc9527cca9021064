"""`FisherBlock`: one layer's share of the Fisher; `KroneckerProductFB`: `T · A ⊗ G`.

Notation: `A [m, m]` the factor of the layer's inputs, `G [n, n]` that of its output
gradients, `V [m, n]` a gradient of the layer, inputs (and the bias, last) in rows, `T`
the rows of the layer per loss term: output locations of a convolution in an image
classifier, 1 for a linear layer. With λ split by π (see `damping.py`)

    F_λ V = T · (A + π√(λ/T) I) V (G + √(λ/T)/π I)

Martens & Grosse 2015 (arXiv 1503.05671), sections 3 and 6.3; Grosse & Martens 2016
(arXiv 1602.01407), section 3. `T` is a ratio of real tensors' sizes, never computed
from strides. Left out: when anything is refreshed (the estimator's business).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..damping import (
    DampingFunc,
    PackagedFunc,
    compute_pi_adjusted_damping,
    evaluate_damping,
    normalize_damping,
)
from ..fisher_factors import FactorOptions, InverseProvidingFactor


@dataclass
class LayerMoments:
    """Second moments of one or more batches, before they enter the running ones.

    Args:
        rows: `R`, the rows of the layer they are a mean over.
        covs: one per factor.
    """

    rows: int
    covs: list[Tensor]

    def merge(self, other: LayerMoments) -> None:
        """Take in another batch: as if both had been one."""
        rows = self.rows + other.rows
        for cov, new in zip(self.covs, other.covs, strict=True):
            cov.lerp_(new, other.rows / rows)
        self.rows = rows


class FisherBlock(abc.ABC):
    """One layer's block of the Fisher of the mean loss (abstract).

    Args:
        module: the layer.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
    ) -> None:
        self.module = module
        self.name = name or type(module).__name__
        self._options = options

    @property
    @abc.abstractmethod
    def params(self) -> list[nn.Parameter]:
        """The parameters of the block: the weight, and the bias if it is trained."""

    @property
    @abc.abstractmethod
    def factors(self) -> Sequence[InverseProvidingFactor]:
        """The factors; empty before `instantiate_factors`."""

    @abc.abstractmethod
    def instantiate_factors(self, damping: DampingFunc) -> None:
        """Make the factors. `damping` is λ, in units of the Fisher of the mean loss."""

    @abc.abstractmethod
    def register_matpower(self, exp: float) -> None:
        """Ask for `F_λ^exp` to be kept."""

    def register_inverse(self) -> None:
        """Ask for `F_λ⁻¹` to be kept."""
        self.register_matpower(-1)

    @abc.abstractmethod
    def moments(
        self, inputs: Sequence[Tensor], outputs_grads: Sequence[Sequence[Tensor]]
    ) -> LayerMoments:
        """Return the second moments of a batch: `inputs[call]`, `grads[source][call]`."""

    @abc.abstractmethod
    def accumulate(self, moments: LayerMoments, num_terms: int, decay: float) -> None:
        """Let the moments of `num_terms` loss terms enter the running ones."""

    @abc.abstractmethod
    def multiply_matpower(self, vector: Tensor, exp: float) -> Tensor:
        """Return `F_λ^exp V`, as of the last refresh; `vector` is `V [in(+1), out]`."""

    def multiply_inverse(self, vector: Tensor) -> Tensor:
        """Return `F_λ⁻¹ V`, as of the last refresh; `vector` is `V [in(+1), out]`."""
        return self.multiply_matpower(vector, -1)

    def multiply(self, vector: Tensor) -> Tensor:
        """Return `F_λ V` with the current factors; `vector` is `V [in(+1), out]`."""
        return self.multiply_matpower(vector, 1)

    @abc.abstractmethod
    def full_fisher_block(self) -> Tensor:
        """Return the undamped block, dense, over the row-major entries of `V`."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what restores the block bit for bit."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; ValueError for another layer's."""


class KroneckerProductFB(FisherBlock):
    """`T · A ⊗ G` for a layer with a weight `[out, ...]` and maybe a bias (abstract).

    The weight must be trained; a frozen bias is left out of the block.

    Raises:
        TypeError: a module of another type.
        RuntimeError: use before `instantiate_factors`.
    """

    layer_types: tuple[type[nn.Module], ...] = ()

    def __init__(
        self,
        module: nn.Module,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
    ) -> None:
        super().__init__(module, name, options)
        if not isinstance(module, self.layer_types):
            known = " or ".join(kind.__name__ for kind in self.layer_types)
            raise TypeError(f"layer {self.name}: expected {known}, got {module}")
        bias = module.bias
        self.has_bias = isinstance(bias, nn.Parameter) and bias.requires_grad
        self.num_locations = 1.0
        self._weight = 0.0
        self._factors: tuple[InverseProvidingFactor, ...] = ()
        self._damping: DampingFunc = 0.0

    @abc.abstractmethod
    def _make_factors(self) -> tuple[InverseProvidingFactor, InverseProvidingFactor]:
        """Make the input's and the output's factor."""

    @property
    def params(self) -> list[nn.Parameter]:
        """The weight, and the bias if it is trained."""
        module: Any = self.module
        return [module.weight, module.bias] if self.has_bias else [module.weight]

    @property
    def factors(self) -> Sequence[InverseProvidingFactor]:
        """The input's factor `A` and the output's factor `G`."""
        return self._factors

    @property
    def has_statistics(self) -> bool:
        """Whether any batch has entered the factors."""
        return all(factor.num_updates > 0 for factor in self._sides())

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors and their products."""
        return self._sides()[0].get_cov().dtype

    def follow_params(self) -> None:
        """Move the factors to where the parameters are by now."""
        device = self.params[0].device
        for factor in self._factors:
            if factor.get_cov().device != device:
                factor.to(device)

    def _sides(self) -> tuple[InverseProvidingFactor, InverseProvidingFactor]:
        if not self._factors:
            raise RuntimeError(
                f"layer {self.name}: there are no factors yet; call "
                "instantiate_factors(damping) first"
            )
        return self._factors[0], self._factors[1]

    def instantiate_factors(self, damping: DampingFunc) -> None:
        """Make `A` and `G`. `damping` is λ, in units of the Fisher of the mean loss."""
        self._damping = damping
        self._factors = self._make_factors()
        for factor in self._factors:
            factor.instantiate_cov_variables()

    # Damping.

    def _split_damping(self) -> tuple[Tensor, Tensor]:
        """`(π√(λ/T), √(λ/T)/π)`, from the current factors."""
        A, G = self._sides()
        damping = float(evaluate_damping(self._damping, self.name))
        return compute_pi_adjusted_damping(
            A.get_cov(), G.get_cov(), normalize_damping(damping, self.num_locations)
        )

    def _damping_funcs(self) -> tuple[PackagedFunc, PackagedFunc]:
        """One per side; known by layer and side, so that every exponent shares them."""
        return self._side_damping(0), self._side_damping(1)

    def _side_damping(self, side: int) -> PackagedFunc:
        return PackagedFunc(lambda: self._split_damping()[side], (self.name, side))

    def register_matpower(self, exp: float) -> None:
        """Ask for `F_λ^exp` to be kept; call once, after `instantiate_factors`."""
        for factor, damping in zip(self._sides(), self._damping_funcs(), strict=True):
            factor.register_matpower(exp, damping)
            if exp != 1:
                factor.instantiate_inv_variables()

    # Statistics.

    def moments(
        self, inputs: Sequence[Tensor], outputs_grads: Sequence[Sequence[Tensor]]
    ) -> LayerMoments:
        """Return the second moments of a batch: `inputs[call]`, `grads[source][call]`.

        Several calls of one layer are rows of one matrix, like locations.
        """
        A, G = self._sides()
        first, *others = (
            LayerMoments(
                A.num_rows(tensor),
                [
                    A.new_cov([[tensor]]),
                    G.new_cov([[grad[call]] for grad in outputs_grads]),
                ],
            )
            for call, tensor in enumerate(inputs)
        )
        for moments in others:
            first.merge(moments)
        return first

    def accumulate(self, moments: LayerMoments, num_terms: int, decay: float) -> None:
        """Let the moments of `num_terms` loss terms enter the running ones."""
        for factor, cov in zip(self._sides(), moments.covs, strict=True):
            factor.accumulate(cov, decay)
        # T may differ from batch to batch (images or texts of another size): it has the
        # same average as the factors that it belongs to.
        self._weight = decay * self._weight + 1
        self.num_locations += (moments.rows / num_terms - self.num_locations) / self._weight

    # Products.

    def multiply_matpower(self, vector: Tensor, exp: float) -> Tensor:
        """Return `F_λ^exp V = T^exp A_λ^exp V G_λ^exp`; `vector` is `V [in(+1), out]`.

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

    def full_fisher_block(self) -> Tensor:
        """Return `T · A ⊗ G`, undamped, over the row-major entries of `V [in(+1), out]`."""
        A, G = self._sides()
        return self.num_locations * torch.kron(A.get_cov(), G.get_cov())

    def params_to_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors like `params` to one matrix `[out, in(+1)]`, the bias last."""
        weight = tensors[0].flatten(1)
        if not self.has_bias:
            return weight
        return torch.cat([weight, tensors[1].unsqueeze(1)], dim=1)

    def matrix_to_params(self, matrix: Tensor) -> list[Tensor]:
        """Undo `params_to_matrix`."""
        weight = self.params[0]
        if not self.has_bias:
            return [matrix.view(weight.shape)]
        return [matrix[:, :-1].reshape(weight.shape), matrix[:, -1]]

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return what restores the block bit for bit."""
        factors = [factor.state_dict() for factor in self._sides()]
        return {
            "num_locations": self.num_locations,
            "weight": self._weight,
            "factors": factors,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing."""
        for factor, stored in zip(self._sides(), state["factors"], strict=True):
            factor.check_state_dict(stored)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; ValueError for another layer's."""
        self.check_state_dict(state)
        for factor, stored in zip(self._sides(), state["factors"], strict=True):
            factor.load_state_dict(stored)
        self.num_locations = state["num_locations"]
        self._weight = state["weight"]


def no_data(name: str) -> Callable[[], Tensor]:
    """Stand in for a factor's data where each update brings its own."""

    def provider() -> Tensor:
        raise RuntimeError(
            f"{name}: the factor keeps no data; give the tensors to the op: op(tensors)"
        )

    return provider


def accumulation_dtype(weight: Tensor) -> torch.dtype:
    """The weight's dtype, but at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)
