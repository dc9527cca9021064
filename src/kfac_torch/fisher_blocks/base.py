"""`FisherBlock`: the share of some parameters in the Fisher, and what all blocks have.

Notation: `F` the block of the Fisher of the mean loss, `λ` the damping, `V` a gradient
of the block's parameters in the form the block multiplies by (for a layer a matrix
`[in(+1), out]`, the bias last), `R` the rows of a factor's data (examples, or examples
times locations), `N` the loss terms of the batch, `T = R/N`. A block is `T` times what
its factors make of their second moments, and `F_λ = F + λI` up to the Kronecker split.

A factor's moment of a batch is either of the layer's inputs alone or has to do with
gradients at its outputs; several *sources* of gradients are summed. Left out: when
anything is refreshed (the estimator's business).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..damping import DampingFunc, PackagedFunc, evaluate_damping, normalize_damping
from ..fisher_factors import DiagonalFactor, FactorOptions, FisherFactor
from ..fisher_factors.inverse_providing import InverseProvidingFactor
from ..linalg import all_finite


@dataclass
class Moment:
    """A factor's second moment over one or more batches, before it enters the running one.

    Args:
        cov: a mean over rows.
        rows: `R`.
        terms: `N`, the loss terms of the same batches.
        uses: of the layer in an example, where that matters.
        basis_version: of the block's, where there is one; -1 of moments in several.
    """

    cov: Tensor
    rows: float
    terms: float
    uses: int = 1
    basis_version: int = 0

    def is_finite(self) -> Tensor:
        """Whether it is free of NaN and Inf, 0-dim."""
        return all_finite(self.cov)

    def merge(self, other: Moment) -> None:
        """Take in another batch: as if both had been one."""
        if self.basis_version != other.basis_version:
            self.basis_version = -1
        self.rows += other.rows
        self.terms += other.terms
        self.cov = self.cov.lerp(other.cov, other.rows / self.rows)


class FisherBlock(abc.ABC):
    """A diagonal block of the Fisher of the mean loss (abstract).

    Args:
        params: the parameters it is for.
        modules: the layers whose calls it has to see; none for a generic block.
        name: for messages and checkpoints.
        options: of the factors.
    """

    needs_param_grads = False
    """Whether the block works on gradients of its parameters, not of layer outputs."""

    part: str | None = None
    """The linear map inside the modules that the block is of, where they are fused."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        modules: Sequence[nn.Module],
        name: str,
        options: FactorOptions = FactorOptions(),
    ) -> None:
        self.params = list(params)
        self.modules = tuple(modules)
        self.name = name
        self.num_locations = 1.0
        self.last_rows: float | None = None  # `R` of the last batch
        self.options = options
        self._weight = 0.0
        self._factors: tuple[FisherFactor, ...] = ()
        self._damping: DampingFunc = 0.0

    # Factors.

    @abc.abstractmethod
    def _make_factors(self) -> tuple[FisherFactor, ...]:
        """Make the factors: those of inputs alone first."""

    def instantiate_factors(self, damping: DampingFunc) -> None:
        """Make the factors. `damping` is λ, in units of the Fisher of the mean loss."""
        factors = self._make_factors()
        for factor in factors:
            factor.instantiate_cov_variables()
        self._damping, self._factors = damping, factors

    def damp(self, damping: DampingFunc) -> None:
        """Take another λ, in units of the Fisher of the mean loss, from now on."""
        self._damping = damping

    def planned_factors(self) -> Sequence[Any]:
        """Return the factors; before `instantiate_factors` such as it will make, with the
        inverse registered and no matrix made.
        """
        if self._factors:
            return self._factors
        factors = self._make_factors()
        for factor in factors:
            self._plan_inverse(factor)
        return factors

    def _plan_inverse(self, factor: Any) -> None:
        """Register what `F_λ⁻¹` needs of a factor."""
        factor.register_matpower(-1, 0.0)

    def release_factors(self) -> None:
        """Undo `instantiate_factors`."""
        self._factors = ()
        self.num_locations, self._weight, self.last_rows = 1.0, 0.0, None

    @property
    def factors(self) -> Sequence[Any]:
        """The factors; empty before `instantiate_factors`."""
        return self._factors

    @property
    def factor_sizes(self) -> list[str]:
        """How each factor is kept and its size, as in `["full 513", "split 8x128"]`.

        Raises:
            RuntimeError: before `instantiate_factors`.
        """
        return [factor.describe() for factor in self._instantiated()]

    def _instantiated(self) -> tuple[Any, ...]:
        if not self._factors:
            raise RuntimeError(
                f"layer {self.name}: there are no factors yet; call "
                "instantiate_factors(damping) first"
            )
        return self._factors

    @property
    def has_statistics(self) -> bool:
        """Whether any batch has entered the factors."""
        return all(factor.num_updates > 0 for factor in self._instantiated())

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors and their products."""
        return self._instantiated()[0].get_cov_var().dtype

    def follow_params(self) -> None:
        """Move the factors to where the parameters are by now."""
        device = self.params[0].device
        for factor in self._factors:
            cov = factor.get_cov_var()
            if cov is not None and cov.device != device:
                factor.to(device)

    # Statistics.

    @property
    def basis_version(self) -> int:
        """A number that changes with the basis of the moments, where that moves."""
        return 0

    skips_idle_rows = False
    """Whether rows are tokens, some of which may be padding: without any gradient."""

    def call_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Return what a call of a layer gives to the block: by default the first argument;
        None for nothing.
        """
        return args[0] if args else kwargs.get("input")

    def prepare_input(self, tensor: Tensor, output_shape: torch.Size) -> Tensor:
        """Return what the methods below take as the input of a call: `tensor` itself.

        A block whose statistics depend on more of the call than its input, as those of a
        transposed convolution depend on the output's size, brings it in here.
        """
        return tensor

    @abc.abstractmethod
    def num_rows(self, inputs: Sequence[Tensor], num_terms: float) -> float:
        """`R`: the rows of the factors' data in a batch of `num_terms` loss terms."""

    def num_uses(self, inputs: Sequence[Tensor]) -> int:
        """The uses of the layer in an example, where the block depends on them; else 1."""
        return 1

    @abc.abstractmethod
    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the moments of the factors that need no gradients, from `inputs[call]`."""

    @abc.abstractmethod
    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the other factors' moments, summed over sources.

        `grads[call]` are gradients of the summed loss at the layer's outputs, `[S, ...]`
        with one leading dimension of sources; of a generic block `grads[param]`, `[S,
        ...]` at the parameters. `num_terms` is `N`.
        """

    def moments(
        self,
        inputs: Sequence[Tensor],
        grads: Sequence[Sequence[Tensor]],
        num_terms: float,
    ) -> list[Moment]:
        """Return the moments of a batch, one per factor: `inputs[call]`,
        `grads[source][call]`.
        """
        stacked = [torch.stack(calls) for calls in zip(*grads, strict=True)]
        shapes = [grad.shape[1:] for grad in stacked[: len(inputs)]]
        inputs = list(map(self.prepare_input, inputs, shapes))
        covs = self.input_moments(inputs) + self.grad_moments(inputs, stacked, num_terms)
        rows, uses = self.num_rows(inputs, num_terms), self.num_uses(inputs)
        version = self.basis_version
        return [Moment(cov, rows, num_terms, uses, version) for cov in covs]

    def accumulate(self, moments: Sequence[Moment], decay: float) -> None:
        """Let a batch enter the running moments of all factors."""
        for index, moment in enumerate(moments):
            self.accumulate_factor(index, moment, decay)

    def accumulate_factor(self, index: int, moment: Moment, decay: float) -> None:
        """Let a batch enter the running moment of one factor, by its number."""
        self._instantiated()[index].accumulate(moment.cov, decay)
        if index == 0:
            # T may differ from batch to batch (images or texts of another size): it has
            # the same average as the factors that it belongs to.
            self._weight = decay * self._weight + 1
            T = moment.rows / moment.terms
            self.last_rows = moment.rows
            self.num_locations += (T - self.num_locations) / self._weight

    # Products.

    @abc.abstractmethod
    def register_matpower(self, exp: float) -> None:
        """Ask for `F_λ^exp` to be kept; after `instantiate_factors`."""

    def register_inverse(self) -> None:
        """Ask for `F_λ⁻¹` to be kept."""
        self.register_matpower(-1)

    @abc.abstractmethod
    def register_cholesky(self) -> None:
        """Ask for `L`, `L Lᵀ = F_λ`, to be kept; after `instantiate_factors`."""

    @abc.abstractmethod
    def register_cholesky_inverse(self) -> None:
        """Ask for `L⁻¹`, `L Lᵀ = F_λ`, to be kept; after `instantiate_factors`."""

    @abc.abstractmethod
    def multiply_matpower(self, vector: Tensor, exp: float) -> Tensor:
        """Return `F_λ^exp V`, as of the last refresh; for `exp = 1` the current."""

    def multiply_inverse(self, vector: Tensor) -> Tensor:
        """Return `F_λ⁻¹ V`, as of the last refresh."""
        return self.multiply_matpower(vector, -1)

    def multiply(self, vector: Tensor) -> Tensor:
        """Return `F_λ V` with the current factors."""
        return self.multiply_matpower(vector, 1)

    @abc.abstractmethod
    def multiply_cholesky(self, vector: Tensor, transpose: bool = False) -> Tensor:
        """Return `L V`, or `Lᵀ V`, with `L Lᵀ = F_λ`, as of the last refresh."""

    @abc.abstractmethod
    def multiply_cholesky_inverse(self, vector: Tensor, transpose: bool = False) -> Tensor:
        """Return `L⁻¹ V`, or `L⁻ᵀ V`, with `L Lᵀ = F_λ`, as of the last refresh."""

    @abc.abstractmethod
    def full_fisher_block(self) -> Tensor:
        """Return the undamped block, dense, over the row-major entries of `V`."""

    @abc.abstractmethod
    def trace(self) -> Tensor:
        """Return the trace of the undamped block, 0-dim."""

    @abc.abstractmethod
    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors like `params` to the form `V`."""

    @abc.abstractmethod
    def vector_to_params(self, vector: Tensor) -> list[Tensor]:
        """Undo `params_to_vector`."""

    def multiply_tensors(self, tensors: Sequence[Tensor], exp: float) -> list[Tensor]:
        """Return `F_λ^exp` times tensors like `params`, in their shapes and dtype."""
        vector = self.params_to_vector(tensors).to(self.dtype)
        parts = self.vector_to_params(self.multiply_matpower(vector, exp))
        parts = [part.to(like.dtype) for part, like in zip(parts, tensors, strict=True)]
        # Each is read several times: a copy in order is cheaper than a strided view.
        return [p.contiguous() if p.layout == torch.strided else p for p in parts]

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return what restores the block bit for bit."""
        return {
            "num_locations": self.num_locations,
            "weight": self._weight,
            "factors": [factor.state_dict() for factor in self._instantiated()],
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing."""
        factors, stored = self._instantiated(), state["factors"]
        if len(factors) != len(stored):
            raise ValueError(
                f"layer {self.name}: expected the state of {len(factors)} factors, got "
                f"{len(stored)}; was it registered with another approximation?"
            )
        for factor, part in zip(factors, stored, strict=True):
            factor.check_state_dict(part)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; ValueError for another layer's."""
        self.check_state_dict(state)
        for factor, stored in zip(self._instantiated(), state["factors"], strict=True):
            factor.load_state_dict(stored)
        self.num_locations = state["num_locations"]
        self._weight = state["weight"]


class SingleFactorFB(FisherBlock):
    """`F = T · C` with one factor `C`, a full matrix or a diagonal (abstract).

    λ is added to `F`: the factor's damping is `λ/T`.
    """

    def _factor(self) -> InverseProvidingFactor | DiagonalFactor:
        return self._instantiated()[0]

    def _factor_damping(self) -> PackagedFunc:
        def damping() -> Tensor | float:
            value = float(evaluate_damping(self._damping, self.name))
            return normalize_damping(value, self.num_locations)

        return PackagedFunc(damping, self.name)

    def register_matpower(self, exp: float) -> None:
        """Ask for `F_λ^exp` to be kept; after `instantiate_factors`."""
        self._factor().register_matpower(exp, self._factor_damping())
        if exp != 1:
            self._factor().instantiate_inv_variables()

    def register_cholesky(self) -> None:
        """Ask for `L`, `L Lᵀ = F_λ`, to be kept; after `instantiate_factors`."""
        self._factor().register_cholesky(self._factor_damping())
        self._factor().instantiate_inv_variables()

    def register_cholesky_inverse(self) -> None:
        """Ask for `L⁻¹`, `L Lᵀ = F_λ`, to be kept; after `instantiate_factors`."""
        self._factor().register_cholesky_inverse(self._factor_damping())
        self._factor().instantiate_inv_variables()

    def multiply_matpower(self, vector: Tensor, exp: float) -> Tensor:
        """Return `F_λ^exp V = T^exp (C + λ/T I)^exp V`, as of the last refresh.

        Raises:
            ValueError: another shape.
            KeyError: this exponent is not registered.
            RuntimeError: not refreshed since it was registered.
        """
        damping = self._factor_damping()
        product = self._factor().left_multiply_matpower(vector, exp, damping)
        return product * self.num_locations**exp

    def multiply_cholesky(self, vector: Tensor, transpose: bool = False) -> Tensor:
        """Return `L V`, or `Lᵀ V`, with `L Lᵀ = F_λ`, as of the last refresh."""
        damping = self._factor_damping()
        product = self._factor().left_multiply_cholesky(vector, damping, transpose)
        return product * self.num_locations**0.5

    def multiply_cholesky_inverse(self, vector: Tensor, transpose: bool = False) -> Tensor:
        """Return `L⁻¹ V`, or `L⁻ᵀ V`, with `L Lᵀ = F_λ`, as of the last refresh."""
        damping = self._factor_damping()
        product = self._factor().left_multiply_cholesky_inverse(vector, damping, transpose)
        return product * self.num_locations**-0.5

    def full_fisher_block(self) -> Tensor:
        """Return `T · C`, undamped, over the row-major entries of `V`."""
        return self.num_locations * self._factor().get_cov()

    def trace(self) -> Tensor:
        """Return `T tr C`."""
        return self.num_locations * self._factor().cov_trace().sum()


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
