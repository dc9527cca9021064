"""`LayerCollection`: which module gets which block.

Left out: losses, linked parameters, and every layer but linear ones and convolutions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from .fisher_blocks import (
    ConvKFCBasicFB,
    FullyConnectedKFACBasicFB,
    KroneckerProductFB,
)
from .fisher_factors import FactorOptions

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LayerCollection:
    """The blocks of a model, by layer name.

    >>> layers = LayerCollection()
    >>> layers.auto_register_layers(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    >>> list(layers.blocks)
    ['0']
    """

    def __init__(
        self,
        options: FactorOptions = FactorOptions(),
    ) -> None:
        self.blocks: dict[str, KroneckerProductFB] = {}
        self._options = options

    def register_fully_connected(self, module: nn.Linear, name: str) -> None:
        """Give an `nn.Linear` a `FullyConnectedKFACBasicFB`.

        Raises:
            ValueError: the module or a parameter of it is registered already.
        """
        self._register(FullyConnectedKFACBasicFB(module, name, self._options))

    def register_convolution(
        self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, name: str
    ) -> None:
        """Give a convolution without groups a `ConvKFCBasicFB`.

        Raises:
            ValueError: a parameter of the module is registered already.
        """
        self._register(ConvKFCBasicFB(module, name, self._options))

    def auto_register_layers(self, model: nn.Module) -> None:
        """Register every linear layer and ungrouped convolution with a trained weight.

        Left alone are subclasses, since they may compute something else, and layers that
        share a parameter with another module, since their calls alone do not make up
        the curvature of the shared parameter.
        """
        owners = Counter(
            id(param)
            for module in model.modules()
            for param in module.parameters(recurse=False)
        )
        for name, module in model.named_modules():
            params = list(module.parameters(recurse=False))
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
                continue
            if any(owners[id(param)] > 1 for param in params):
                continue
            if type(module) is nn.Linear:
                self.register_fully_connected(module, name or "model")
            elif type(module) in _CONVOLUTIONS and module.groups == 1:
                self.register_convolution(module, name or "model")

    def registered_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that have a block."""
        for block in self.blocks.values():
            yield from block.params

    def _register(self, block: KroneckerProductFB) -> None:
        taken = {id(param) for param in self.registered_parameters()}
        if block.name in self.blocks or any(id(p) in taken for p in block.params):
            raise ValueError(
                f"layer {block.name}: expected a layer whose name and parameters are not "
                "registered yet, got one that is"
            )
        self.blocks[block.name] = block
