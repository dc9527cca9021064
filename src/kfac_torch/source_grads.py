"""Gradients of sources at the network output, at layers' outputs and parameters.

Notation: `z` a network output, `s` a layer's output, held as its edge in the graph; `S`
the number of sources. No weight gradient is computed and no `.grad` touched, and as a rule
the graph is kept for the user's own backward. `source_grads` returns all gradients, which
are held at once then; `visit_source_grads` hands each on where the backward passes it. Left
out: what a source is (`loss_functions`), what becomes of the gradients (`sources.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


def source_grads(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
) -> list[Tensor | None]:
    """Return `Σ_i sources[i]ᵀ ∂outputs[i]/∂input` for every input, `[S, ...]`.

    None where no output depends on an input. `sources[i] [S, *outputs[i].shape]` go
    through the graph together; one by one where an operation in it cannot do that. The
    graph is kept for the user's own backward.
    """
    if not inputs:
        return []
    if len(sources[0]) == 1:
        grads = _grad(outputs, [source[0] for source in sources], inputs)
        return [None if grad is None else grad.unsqueeze(0) for grad in grads]
    try:
        return _grad(outputs, sources, inputs, batched=True)
    except RuntimeError:  # an operation without a batching rule for its backward
        each = [
            _grad(outputs, [source[s] for source in sources], inputs)
            for s in range(len(sources[0]))
        ]
        return [
            None if grads[0] is None else torch.stack(grads)
            for grads in zip(*each, strict=True)
        ]


def visit_source_grads(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    params: Sequence[Tensor],
    visit: Callable[[int, Tensor], None],
    *,
    keep_graph: bool = True,
) -> list[Tensor | None]:
    """Call `visit(i, gradient)` with that at every edge; return those of `params`.

    One source, `sources[i] [*outputs[i].shape]`. A gradient lives no longer than it would
    in a plain backward, unless `visit` keeps it; those at edges behind which there is no
    other are visited last, together. Edges on which no output depends are not visited.
    Without `keep_graph` the graph, too, is let go as it would be there.

    >>> x = torch.ones(2, requires_grad=True)
    >>> s = 3 * x
    >>> z = s.exp().sum()
    >>> ends = [torch.autograd.graph.get_gradient_edge(t) for t in (s, z)]
    >>> seen = []
    >>> visit_source_grads([z], [torch.ones(())], ends, [], lambda i, g: seen.append(i))
    []
    >>> seen
    [1, 0]
    """
    passed = _passed(edges)
    stops = [i for i in range(len(edges)) if i not in passed]
    by_node: dict[Any, dict[int, int]] = {}
    for i, edge in passed.items():
        by_node.setdefault(edge.node, {})[i] = edge.output_nr
    handles = [
        node.register_prehook(_visitor(places, visit)) for node, places in by_node.items()
    ]
    try:
        ends = [*(edges[i] for i in stops), *params]
        grads = _grad(outputs, sources, ends, keep_graph=keep_graph) if ends else []
    finally:
        for handle in handles:
            handle.remove()
    for i, grad in zip(stops, grads, strict=False):
        if grad is not None:
            visit(i, grad)
    return grads[len(stops) :]


def _visitor(
    places: dict[int, int], visit: Callable[[int, Tensor], None]
) -> Callable[[tuple[Tensor | None, ...]], None]:
    def hook(grads: tuple[Tensor | None, ...]) -> None:
        for i, place in places.items():
            grad = grads[place]
            if grad is not None:
                visit(i, grad)

    return hook


def _passed(edges: Sequence[GradientEdge]) -> dict[int, GradientEdge]:
    """The edges that a backward to all of them passes on its way to another one."""
    ends = {edge.node for edge in edges}
    leads: dict[Any, bool] = {}  # whether an edge lies behind a node
    todo: list[Any] = list(ends)
    while todo:
        node = todo[-1]
        behind = [other for other, _ in node.next_functions if other is not None]
        unknown = [other for other in behind if other not in leads]
        if unknown and node not in leads:
            todo.extend(unknown)
            continue
        leads[node] = any(other in ends or leads[other] for other in behind)
        todo.pop()
    return {i: edge for i, edge in enumerate(edges) if leads[edge.node]}


def _grad(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    batched: bool = False,
    keep_graph: bool = True,
) -> list[Tensor | None]:
    mixed: Any = list(inputs)  # tensors and edges together, which the stubs do not know
    try:
        grads = torch.autograd.grad(
            list(outputs),
            mixed,
            list(sources),
            retain_graph=keep_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "K-FAC takes gradients to the layers' outputs, which a torch.utils.checkpoint "
            f"with use_reentrant=True does not give; use use_reentrant=False: {error}"
        ) from error
    return list(grads)
