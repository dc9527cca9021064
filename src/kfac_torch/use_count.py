"""How often each parameter is used in the graph of some outputs.

A parameter is a leaf of autograd's graph: every operation that reads it holds one edge
to the node that accumulates its gradient. A cast, which autocast makes once for all uses,
is not a use but has some. Left out: which uses a module's calls made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_CAST = "ToCopyBackward0"


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
    ends: set[Any] = set()
    for output in outputs:
        if output.grad_fn is None:
            raise ValueError(
                "outputs: expected network outputs attached to their graph, got a tensor "
                f"of shape {tuple(output.shape)} without one; run the model with gradients "
                "enabled"
            )
        ends.add(output.grad_fn)
    todo = list(ends)
    edges: Counter[Any] = Counter()  # into every node that has been seen
    leaves = []
    while todo:
        reader = todo.pop()
        for node, _ in reader.next_functions:
            if node is None:
                continue
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves.append((leaf, reader))
            else:
                edges[node] += 1
                if edges[node] == 1 and node not in ends:
                    todo.append(node)
    for leaf, reader in leaves:
        # Autocast reads a parameter once and hands the copy to all that use it.
        uses[leaf] += edges[reader] if reader.name() == _CAST else 1
    return uses
