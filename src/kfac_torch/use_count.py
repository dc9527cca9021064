"""How often each parameter is used in the graph of some outputs.

A parameter is a leaf of autograd's graph: every operation that reads it holds one edge
to the node that accumulates its gradient. Left out: which uses a module's calls made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor


def count_uses(outputs: Sequence[Tensor]) -> Counter[Tensor]:
    """Return the number of operations that read each leaf, as far as outputs depend on it.

    Raises:
        ValueError: an output that is not attached to a graph.

    >>> import torch
    >>> w = torch.ones(2, requires_grad=True)
    >>> count_uses([(w * w).sum()])[w]
    2
    """
    uses: Counter[Tensor] = Counter()
    todo = []
    for output in outputs:
        if output.grad_fn is None:
            raise ValueError(
                "outputs: expected network outputs attached to their graph, got a tensor "
                f"of shape {tuple(output.shape)} without one; run the model with gradients "
                "enabled"
            )
        todo.append(output.grad_fn)
    seen = set(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is None:
                continue
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                uses[leaf] += 1
            elif node not in seen:
                seen.add(node)
                todo.append(node)
    return uses
