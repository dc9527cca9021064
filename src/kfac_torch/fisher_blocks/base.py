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


@dataclass
class Moment:
    """A factor's second moment over one or more batches, before it enters the running one.

    Args:
        cov: a mean over rows.
        rows: `R`.
        terms: `N`, the loss terms of the same batches.
        uses: of the layer in an example, where that matters.
    """

    cov: Tensor
    rows: int
    terms: int
    uses: int = 1

    def merge(self, other: Moment) -> None:
        """Take in another batch: as if both had been one."""
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

    @property
    def factors(self) -> Sequence[Any]:
        """The factors; empty before `instantiate_factors`."""
        return self._factors

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

    @abc.abstractmethod
    def num_rows(self, inputs: Sequence[Tensor], num_terms: int) -> int:
        """`R`: the rows of the factors' data in a batch of `num_terms` loss terms."""

    def num_uses(self, inputs: Sequence[Tensor]) -> int:
        """The uses of the layer in an example, where the block depends on them; else 1."""
        return 1

    @abc.abstractmethod
    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the moments of the factors that need no gradients, from `inputs[call]`."""

    @abc.abstractmethod
    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: int
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
        num_terms: int,
    ) -> list[Moment]:
        """Return the moments of a batch, one per factor: `inputs[call]`,
        `grads[source][call]`.
        """
        stacked = [torch.stack(calls) for calls in zip(*grads, strict=True)]
        covs = self.input_moments(inputs) + self.grad_moments(inputs, stacked, num_terms)
        rows, uses = self.num_rows(inputs, num_terms), self.num_uses(inputs)
        return [Moment(cov, rows, num_terms, uses) for cov in covs]

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
    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors like `params` to the form `V`."""

    @abc.abstractmethod
    def vector_to_params(self, vector: Tensor) -> list[Tensor]:
        """Undo `params_to_vector`."""

    def multiply_tensors(self, tensors: Sequence[Tensor], exp: float) -> list[Tensor]:
        """Return `F_λ^exp` times tensors like `params`, in their shapes and dtype."""
        vector = self.params_to_vector(tensors).to(self.dtype)
        parts = self.vector_to_params(self.multiply_matpower(vector, exp))
        return [part.to(like.dtype) for part, like in zip(parts, tensors, strict=True)]

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


class LayerFactorFB(SingleFactorFB):
    """`F = T · C` of one layer, `C` made of its inputs and output gradients (abstract).

    The rows of the factor are examples, the first dimension of the layer's input.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.

    Raises:
        TypeError: a module of another type.
        ValueError: a frozen weight, or modules that do not share their parameters.
    """

    layer_types: tuple[type[nn.Module], ...] = ()
    groups = 1

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
    ) -> None:
        first = module if isinstance(module, nn.Module) else module[0]
        name = name or type(first).__name__
        layers = check_modules(module, self.layer_types, name)
        super().__init__(layer_params(first, name), layers, name, options)
        self.module: Any = first
        self.has_bias = len(self.params) > 1

    def num_rows(self, inputs: Sequence[Tensor], num_terms: int) -> int:
        """`R`: the examples."""
        return inputs[0].shape[0]

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return nothing: the factor needs gradients."""
        return []

    def check_one_batch_size(self, inputs: Sequence[Tensor]) -> None:
        """Raise ValueError where calls cannot be parts of the same examples."""
        sizes = [tensor.shape[0] for tensor in inputs]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"layer {self.name}: expected all its calls in a forward to have the same "
                f"batch size, got {sizes}; register it with a Kronecker approximation"
            )

    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors like `params` to `V [in(+1), out]`, the bias last.

        With groups `V [groups, in(+1), out]`, the sizes those of one group.
        """
        return layer_to_vector(tensors, self.groups)

    def vector_to_params(self, vector: Tensor) -> list[Tensor]:
        """Undo `params_to_vector`."""
        return vector_to_layer(vector, self.params)


def check_modules(
    modules: nn.Module | Sequence[nn.Module], layer_types: tuple[type, ...], name: str
) -> tuple[Any, ...]:
    """Return the layers of a block as a tuple: one, or several that share parameters.

    Raises:
        TypeError: a module of another type.
        ValueError: several modules that do not share their parameters.
    """
    layers = (modules,) if isinstance(modules, nn.Module) else tuple(modules)
    for layer in layers:
        if not isinstance(layer, layer_types):
            known = " or ".join(kind.__name__ for kind in layer_types)
            raise TypeError(f"layer {name}: expected {known}, got {layer}")
    shared = [[id(p) for p in layer.parameters(recurse=False)] for layer in layers]
    if any(ids != shared[0] for ids in shared):
        raise ValueError(
            f"layer {name}: expected modules that share all their parameters, got "
            f"{len(layers)} that do not; register them one by one"
        )
    return layers


def layer_params(module: Any, name: str) -> list[nn.Parameter]:
    """Return the weight, and the bias if there is one and it is trained.

    Raises:
        ValueError: there is no weight, or it is frozen.
    """
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.requires_grad:
        what = "none" if weight is None else "a frozen one"
        raise ValueError(
            f"layer {name}: expected a layer with a trained weight, got {what}: {module}; "
            "register the parameters that are trained with register_generic"
        )
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter) and bias.requires_grad:
        return [module.weight, bias]
    return [module.weight]


def layer_to_vector(tensors: Sequence[Tensor], groups: int = 1) -> Tensor:
    """Bring `(weight [out, ...], bias [out])` to `V [in(+1), out]`, the bias last.

    With groups `V [groups, in(+1), out/groups]`.
    """
    weight = tensors[0].flatten(1)
    shape = weight.shape[:1] if groups == 1 else (groups, weight.shape[0] // groups)
    V = weight.view(*shape, -1).mT
    if len(tensors) == 1:
        return V
    return torch.cat([V, tensors[1].view(shape).unsqueeze(-2)], dim=-2)


def vector_to_layer(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Undo `layer_to_vector`, for tensors of the shapes of `params`."""
    if len(params) == 1:
        return [vector.mT.reshape(params[0].shape)]
    weight, bias = vector[..., :-1, :], vector[..., -1, :]
    return [weight.mT.reshape(params[0].shape), bias.reshape(params[1].shape)]


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
