"""How often each parameter is used in the graph of some outputs.

A parameter is a leaf of autograd's graph: every operation that reads it holds one edge
to the node that accumulates its gradient. A transpose or a cast is not a use but has
some: autocast makes one cast for all, and a derivative in the graph reads the transpose
that the layer has made. Left out: which uses a module's calls made.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

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

    def uses(node: Any) -> int:
        found = [
            uses(reader) if reader.name() in _SAME_NUMBERS else 1
            for reader in readers.get(node, ())
        ]
        return sum(found) + (node in ends)

    leaves = [node for node in readers if hasattr(node, "variable")]
    return Counter({node.variable: uses(node) for node in leaves})
