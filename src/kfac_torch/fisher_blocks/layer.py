"""`LayerFB`: blocks that are of a layer, with a weight `[out, ...]` and maybe a bias.

Notation: `V [in(+1), out]` a gradient of the layer, the bias in the last row; with groups
`V [groups, in(+1), out]`, the sizes those of one group. Left out: the factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher_factors import FactorOptions
from .base import FisherBlock, SingleFactorFB


class LayerFB(FisherBlock):
    """The block of a layer, or of several that share all their parameters (abstract).

    The weight must be trained; a frozen bias is left out of the block.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.

    Raises:
        TypeError: a module of another type.
        ValueError: a frozen weight, or modules that do not share their parameters.
    """

    layer_types: tuple[type, ...] = ()
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

    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors like `params` to `V [in(+1), out]`, the bias last.

        With groups `V [groups, in(+1), out]`, the sizes those of one group.
        """
        return layer_to_vector(tensors, self.groups)

    def vector_to_params(self, vector: Tensor) -> list[Tensor]:
        """Undo `params_to_vector`."""
        return vector_to_layer(vector, self.params)

    def check_one_batch_size(self, inputs: Sequence[Tensor]) -> None:
        """Raise ValueError where calls cannot be parts of the same examples."""
        sizes = [tensor.shape[0] for tensor in inputs]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"layer {self.name}: expected all its calls in a forward to have the same "
                f"batch size, got {sizes}; register it with a Kronecker approximation that "
                'takes every row by itself, "kron" or "kron_indep"'
            )


class LayerFactorFB(LayerFB, SingleFactorFB):
    """`F = T · C` of one layer, `C` made of its inputs and output gradients (abstract).

    The rows of the factor are examples, the first dimension of the layer's input.
    """

    def num_rows(self, inputs: Sequence[Tensor], num_terms: float) -> float:
        """`R`: the examples."""
        return inputs[0].shape[0]

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return nothing: the factor needs gradients."""
        return []


def check_modules(
    modules: nn.Module | Sequence[nn.Module], layer_types: tuple[type, ...], name: str
) -> tuple[Any, ...]:
    """Return the layers of a block as a tuple: one, or several that share parameters.

    Raises:
        TypeError: a module of another type.
        ValueError: several modules that do not share their parameters, or differ in their
            settings.
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
    if not same_settings(layers):
        raise ValueError(
            f"layer {name}: expected modules with the same settings, got "
            f"{', '.join(map(str, layers))}; register their parameters with "
            "register_generic"
        )
    return layers


def same_settings(modules: Iterable[nn.Module]) -> bool:
    """Whether layers of one kind compute the same, given the same parameters.

    >>> same_settings([nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3, padding=1)])
    False
    """
    return len({module.extra_repr() for module in modules}) <= 1


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
