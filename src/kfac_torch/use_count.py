"""How often each parameter is used in the graph of some outputs.

A parameter is a leaf of autograd's graph: every operation that reads it holds one edge
to the node that accumulates its gradient. A transpose or a cast is not a use but has
some: autocast makes one cast for all, and a derivative in the graph reads the transpose
that the layer has made. A layer's block knows of the calls of its modules alone: a weight
that is used more often than they are called has uses that its factors miss. Left out:
which uses a module's calls made.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .capture import LayerCall
from .fisher_blocks import FisherBlock

_SAME_NUMBERS = frozenset(
    f"{name}Backward0"
    for name in ("T", "Transpose", "Permute", "View", "Alias", "UnsafeView", "ToCopy")
)


def count_uses(outputs: Sequence[Tensor]) -> Counter[Tensor]:
    """Return the number of operations that read each leaf, as far as outputs depend on it.

    Raises:
        ValueError: an output that is not attached to a graph.

    >>> import torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> count_uses([(w * w).sum()])[w]
    2
    """
    ends = set()
    for output in outputs:
        if output.grad_fn is None:
            raise ValueError(
                "outputs: expected network outputs attached to their graph, got a tensor "
                f"of shape {tuple(output.shape)} without one; run the model with gradients "
                "enabled"
            )
        ends.add(output.grad_fn)
    todo = list(ends)
    readers: defaultdict[Any, list[Any]] = defaultdict(list)  # one for each edge
    while todo:
        reader = todo.pop()
        for node, _ in reader.next_functions:
            if node is None:
                continue
            if node not in readers and node not in ends:
                todo.append(node)
            readers[node].append(reader)
    leaves = [node for node in readers if hasattr(node, "variable")]
    return Counter({node.variable: _uses(node, readers, ends) for node in leaves})


# Not a closure, which would refer to itself: it would keep the graph until a collection.
def _uses(node: Any, readers: Mapping[Any, list[Any]], ends: set[Any]) -> int:
    found = [
        _uses(reader, readers, ends) if reader.name() in _SAME_NUMBERS else 1
        for reader in readers.get(node, ())
    ]
    return sum(found) + (node in ends)


class UseWatch:
    """Uses of parameters against calls of layers: counted once, at the first backward.

    Each of its two findings is a UserWarning, once.

    Args:
        blocks: by name, as the calls name them; read when it counts.
    """

    def __init__(self, blocks: Mapping[str, FisherBlock]) -> None:
        self._blocks = blocks
        self._calls: Counter[str] = Counter()
        self._counts: dict[int, int] | None = None  # by id of the parameter
        self.differentiated = False
        """Whether the network output was differentiated with `create_graph=True`."""

    @property
    def counted(self) -> bool:
        """Whether a backward has been seen."""
        return self._counts is not None

    def uses(self, params: Iterable[Tensor]) -> int | None:
        """Return the uses of the one that is used most; None before a backward."""
        if self._counts is None:
            return None
        return max((self._counts.get(id(param), 0) for param in params), default=0)

    def calls(self, block: FisherBlock) -> int | None:
        """Return the calls that were recorded; None before a backward, and for a block
        of gradients of parameters or of a part of a layer, which has no calls of its own.
        """
        part = getattr(block, "part", None) is not None
        if self._counts is None or block.needs_param_grads or part:
            return None
        return self._calls[block.name]

    def missed(self, block: FisherBlock) -> int:
        """Return how many uses the factors of a block do not see."""
        uses, calls = self.uses(block.params), self.calls(block)
        return 0 if uses is None or calls is None else max(0, uses - calls)

    def see(self, calls: Iterable[LayerCall], outputs: Sequence[Tensor]) -> None:
        """Count, the first time: `outputs` and `calls` of one or several forwards.

        Several may be one graph, so that they are counted together.
        """
        if self.counted or not outputs:
            return
        counts = count_uses([z for z in outputs if z.grad_fn is not None])
        self._counts = {id(param): number for param, number in counts.items()}
        self._calls = Counter(call.layer for call in calls)
        missed = [
            f"{name} ({self.uses(block.params)} uses, {self.calls(block)} recorded calls)"
            for name, block in self._blocks.items()
            if self.missed(block)
        ]
        if missed:
            warnings.warn(
                "the parameters of these layers are used beside the recorded calls of the "
                f"layers: {', '.join(missed)}. Their factors miss those uses, of "
                "F.linear(x, layer.weight) or layer.forward(x) perhaps, or of derivatives "
                "in the network output. Call the layer itself, or register its parameters "
                "with register_generic; modules that share them all are registered "
                "together with a register_..._multi method",
                UserWarning,
                stacklevel=2,
            )

    def see_derivative(self) -> None:
        """The network output is being differentiated with `create_graph=True`."""
        if not self.differentiated:
            self.differentiated = True
            warnings.warn(
                "the network is differentiated inside its own loss (create_graph=True, as "
                "in a physics-informed loss or a gradient penalty): the factors are of the "
                "network output, not of its derivatives. Let the model's forward return "
                "the derivatives too, with a loss of them, and register its layers with "
                "register_generic",
                UserWarning,
                stacklevel=2,
            )
