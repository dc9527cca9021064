"""Whether what is registered is all that is trained, and as often as it is used.

Left out: how it is registered (`LayerCollection`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .capture import uncompiled
from .fisher_blocks import FisherBlock
from .loss_collection import LossCollection
from .use_count import count_uses


class RegistrationChecks(LossCollection):
    """The blocks of a model by name, and the checks of what has one.

    Args:
        model: the root module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.blocks: dict[str, FisherBlock] = {}
        self._uses: dict[str, int | None] = {}
        # Shared parameters are known by their first name.
        self._param_names = {
            id(p): name for name, p in uncompiled(model).named_parameters()
        }

    @property
    def registered_variables(self) -> list[nn.Parameter]:
        """All parameters that have a block."""
        return [param for block in self.blocks.values() for param in block.params]

    def describe(self, param: Tensor) -> str:
        """Return `parameter` and its name in the model."""
        name = self._param_names.get(id(param))
        return f"parameter {name}" if name else f"a tensor of shape {tuple(param.shape)}"

    # Checks.

    def check_blocks(self) -> None:
        """Raise ValueError unless there is a block."""
        if not self.blocks:
            raise ValueError(
                "no layer is registered: call auto_register_layers() or a register_... "
                "method of the layer collection first"
            )

    def check_variables(self, variables: Iterable[Tensor]) -> None:
        """Raise ValueError unless `variables` are exactly those registered."""
        problems = self._variable_problems(variables)
        if problems:
            raise ValueError("variables: " + "; ".join(problems))

    def _variable_problems(self, variables: Iterable[Tensor]) -> list[str]:
        given = {id(variable): variable for variable in variables}
        ours = {id(variable): variable for variable in self.registered_variables}
        missing = [
            f"{self.describe(variable)} has no block: register its layer, or itself with "
            "register_generic"
            for i, variable in given.items()
            if i not in ours
        ]
        superfluous = [
            f"{self.describe(variable)} is registered, but "
            f"{'not among the variables' if variable.requires_grad else 'is frozen'}"
            for i, variable in ours.items()
            if i not in given
        ]
        return missing + superfluous

    def check_registration(
        self, variables: Iterable[Tensor] | None = None, outputs: Any = None
    ) -> None:
        """Check that every variable is registered, and as often as it is used.

        Args:
            variables: what has to be registered, no more and no less; all trained
                parameters of the model if None.
            outputs: the network outputs of a forward, attached to its graph: a tensor or
                several, or what the model returned, where the losses say what is in it.
                If given, the uses of each parameter in that graph are counted and
                compared with those registered: 1, or `num_uses` of a layer that is used
                several times. Generic blocks may be used any number of times.

        Raises:
            ValueError: all that is wrong, in one message.
        """
        if variables is None:
            variables = [p for p in self.model.parameters() if p.requires_grad]
        problems = self._variable_problems(variables)
        if outputs is not None:
            problems += self._use_problems(outputs)
        if problems:
            raise ValueError("registration: " + "; ".join(problems))

    def _use_problems(self, outputs: Any) -> list[str]:
        tensors = as_list(outputs) if isinstance(outputs, Tensor | list | tuple) else []
        if not tensors or not all(isinstance(z, Tensor) for z in tensors):
            self.check_losses()
            tensors = [z for _, z in self.network_outputs(outputs)]
        counts = count_uses(tensors)
        problems: list[str] = []
        for name, block in self.blocks.items():
            expected = self._uses[name]
            if expected is None or block.needs_param_grads:
                continue
            problems += [
                f"{self.describe(param)} is registered with {expected} use(s), but used "
                f"{counts[param]} time(s) by the outputs"
                for param in block.params
                if param.requires_grad and counts[param] != expected
            ]
        if problems:
            problems.append(
                "register a layer that is called several times with a "
                "register_..._multi method and num_uses=; one whose parameters are used "
                "beside its own calls, or whose derivatives are part of the output (as in "
                "a physics-informed loss), with register_generic"
            )
        return problems


def as_list(value: Any) -> list[Any]:
    """Return one tensor, or several, as a list."""
    return [value] if isinstance(value, Tensor) else list(value)
