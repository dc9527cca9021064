"""From sources at the network output to the moment of every factor.

Notation: a *source* is a gradient at the network output `z`, one of those whose second
moments add up to the Fisher there; `s` a layer's output. Sources are carried to every
`s` (or, for generic blocks, to the parameters) and handed to the blocks. One that is alone
is handed on layer by layer, as its backward passes them, so that the gradients of all
layers are never held at once; many go together in one vectorised backward, as many as fit
in a bounded buffer. Left out: which sources (the estimator's business).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .capture import Layer, LayerCall
from .fisher_blocks import FisherBlock, Moment
from .loss_functions import LossFunction
from .source_grads import source_grads, visit_source_grads

_BUFFER_BYTES = 64 * 2**20  # gradients at layer outputs that are held at once
_COLUMN_BYTES = 64 * 2**20  # sources at the network output that are held at once


class BatchMoments:
    """The moments of one forward: add sources, then read `moments()`.

    Args:
        calls: of the layers, in order.
        blocks: by name, as `calls` name them.
        num_terms: `N`, the loss terms, or the sum of their weights.
        idle_rows: whether some rows carry no loss term (padding): of layers over tokens,
            rows that no source reaches are then left out of both factors.
    """

    def __init__(
        self,
        calls: Sequence[LayerCall],
        blocks: Mapping[str, FisherBlock],
        num_terms: float,
        idle_rows: bool = False,
    ) -> None:
        self._num_terms = num_terms
        self._idle_rows = idle_rows
        self._prepared: tuple[int, Tensor] | None = None
        self._reached: dict[int, Tensor] = {}  # rows of a call, where some are idle
        self._calls = list(calls)
        called: dict[str, list[int]] = {}
        for index, call in enumerate(calls):
            call.check_unchanged()
            called.setdefault(call.layer, []).append(index)
        self._layers = {name: (blocks[name], indices) for name, indices in called.items()}
        self._generic = {n: b for n, b in blocks.items() if b.needs_param_grads}
        # Without those that were frozen since, which have no gradients.
        self._params = [
            p for b in self._generic.values() for p in b.params if p.requires_grad
        ]
        # By block, and by the calls that a loss depends on: another loss may depend on
        # others. A moment is a mean over the rows of those calls.
        self._sums: dict[str, dict[tuple[int, ...], list[Tensor]]] = {}
        self._found: dict[str, list[Moment]] = {}

    def add(
        self, outputs: Sequence[Tensor], sources: Sequence[Tensor], *, last: bool = False
    ) -> None:
        """Add one source, which has a part `sources[i] [1, *outputs[i].shape]` at every
        network output.

        Of the `last` one of a forward that is nobody else's the graph and the layers'
        inputs are let go as the backward passes them.
        """
        edges = [call.output for call in self._calls if call.output is not None]
        waiting: dict[str, dict[int, Tensor]] = {}

        def visit(i: int, grad: Tensor) -> None:
            name = self._calls[i].layer
            used = waiting.setdefault(name, {})
            used[i] = grad.detach()[None]
            if len(used) == len(self._layers[name][1]):
                self._add_layer(name, waiting.pop(name))
                if last and self._inputs_are_large(name):
                    self._finish(name)

        alone, params = [source[0] for source in sources], self._params
        grads = visit_source_grads(
            outputs, alone, edges, params, visit, keep_graph=not last
        )
        self._add_params([None if grad is None else grad[None] for grad in grads])
        for name, used in waiting.items():  # some calls have no part in the outputs
            self._add_layer(name, used)

    def add_columns(self, z: Tensor, columns: Tensor) -> None:
        """Add the sources `columns [J, *z.shape]`, the same coordinate of every example."""
        N = z.shape[0]
        edges = {i: e for i, call in enumerate(self._calls) if (e := call.output)}
        apart = {i: e for i, e in edges.items() if self._calls[i].has_examples(N)}
        if apart:
            for chunk in self._chunks(columns, apart, []):
                grads = source_grads([z], [chunk], list(apart.values()))
                self._add_calls(self._of_calls(apart, grads))
        # Gradients of parameters, and of rows that all examples share, mix the examples,
        # so each is a source of its own.
        mixed = {i: e for i, e in edges.items() if i not in apart}
        if self._params or mixed:
            for chunk in self._chunks(columns, mixed, self._params):
                for example in range(N):
                    alone = torch.zeros_like(chunk)
                    alone[:, example] = chunk[:, example]
                    inputs = [*mixed.values(), *self._params]
                    grads = source_grads([z], [alone], inputs)
                    self._add_calls(self._of_calls(mixed, grads[: len(mixed)]))
                    self._add_params(grads[len(mixed) :])

    def _chunks(
        self, columns: Tensor, calls: Iterable[int], params: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Columns in pieces whose gradients fit in the buffer."""
        size = sum(self._calls[i].nbytes for i in calls)
        size += sum(param.nbytes for param in params)
        return columns.split(max(1, _BUFFER_BYTES // max(1, size)))

    def _of_calls(
        self, which: Iterable[int], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of some calls, with None for the others."""
        found = dict(zip(which, grads, strict=True))
        return [found.get(i) for i in range(len(self._calls))]

    def add_user_grads(self, weight: float, scale: Tensor | None = None) -> None:
        """Add what the user's backward brought to the layer outputs, times weight/scale."""
        self._add_calls(
            [
                weight * unscaled(torch.stack(call.grads).sum(0, keepdim=True), scale)
                if call.grads
                else None
                for call in self._calls
            ]
        )

    def _add_calls(self, grads: Sequence[Tensor | None]) -> None:
        for name, (_, indices) in self._layers.items():
            used = {i: grad for i in indices if (grad := grads[i]) is not None}
            if used:
                self._add_layer(name, used)

    @torch.no_grad()
    def _add_layer(self, name: str, used: Mapping[int, Tensor]) -> None:
        """Add the gradients `[S, *s.shape]` of a layer's calls."""
        block, _ = self._layers[name]
        calls = tuple(sorted(used))
        if self._idle_rows and block.skips_idle_rows:
            self._see_rows(used)
        grads = [used[i] for i in calls]
        self._add(name, calls, self._grads(block, self._inputs(calls), grads))

    def _see_rows(self, grads: Mapping[int, Tensor]) -> None:
        for i, grad in grads.items():
            rows = (grad != 0).flatten(1, -2).any(-1).any(0)
            known = self._reached.get(i)
            self._reached[i] = rows if known is None else known | rows

    @torch.no_grad()
    def _add_params(self, grads: Sequence[Tensor | None]) -> None:
        found = {id(p): grad for p, grad in zip(self._params, grads, strict=True)}
        for name, block in self._generic.items():
            own = [found.get(id(param)) for param in block.params]
            if any(grad is not None for grad in own):
                self._add(name, (), self._grads(block, [], fill_missing(own, block.params)))

    def _grads(
        self, block: FisherBlock, inputs: list[Tensor], grads: list[Tensor]
    ) -> list[Tensor]:
        return block.grad_moments(inputs, grads, self._num_terms)

    def _add(self, name: str, used: tuple[int, ...], covs: list[Tensor]) -> None:
        sums = self._sums.setdefault(name, {})
        if used in sums:
            covs = [total + cov for total, cov in zip(sums[used], covs, strict=True)]
        sums[used] = covs

    @torch.no_grad()
    def moments(self) -> dict[str, list[Moment]]:
        """Return the moments of all factors by block; sources are summed."""
        for name in list(self._sums):
            self._finish(name)
        order = [*self._layers, *self._generic]
        return {name: self._found[name] for name in order if name in self._found}

    def _inputs_are_large(self, name: str) -> bool:
        """Whether a layer's inputs take more memory than the moments made of them."""
        block, indices = self._layers[name]
        moments = sum(math.prod(factor.kept_shapes[0]) for factor in block.factors)
        return sum(self._calls[i].input.numel() for i in indices) > moments

    def _finish(self, name: str) -> None:
        """Make the moments of a block, of which no source is to come."""
        sums = self._sums.pop(name)
        block = self._generic.get(name) or self._layers[name][0]
        used = {i for calls in sums for i in calls}
        inputs = self._inputs(used)
        rows = self._num_rows(block, used)
        shares = [self._num_rows(block, calls) / rows for calls in sums]
        grad_covs = [
            torch.stack([cov * share for cov, share in zip(each, shares, strict=True)]).sum(
                0
            )
            if len(shares) > 1
            else each[0]
            for each in zip(*sums.values(), strict=True)
        ]
        if self._reached.keys() >= used and used:
            inputs = [self._reached_rows(i) for i in sorted(used)]
            reached = sum(tensor.shape[0] for tensor in inputs)
            if not reached:
                return
            grad_covs = [cov * (rows / reached) for cov in grad_covs]
            rows = reached
        covs = [*block.input_moments(inputs), *grad_covs]
        about = self._num_terms, block.num_uses(inputs), block.basis_version
        self._found[name] = [Moment(cov, rows, *about) for cov in covs]
        self._prepared = None
        for i in used:
            self._calls[i].release()

    def _num_rows(self, block: FisherBlock, used: set[int] | tuple[int, ...]) -> float:
        return block.num_rows(self._inputs(used), self._num_terms)

    def _reached_rows(self, i: int) -> Tensor:
        """The rows of a call's input that some source has reached, as one dimension."""
        a, rows = self._calls[i].input, self._reached[i]
        features = a.shape[a.dim() - (a.numel() > rows.numel()) :]
        return a.reshape(-1, *features)[rows]

    def _inputs(self, used: set[int] | tuple[int, ...]) -> list[Tensor]:
        return [self._input(i) for i in sorted(used)]

    def _input(self, i: int) -> Tensor:
        call = self._calls[i]
        if (
            self._prepared is None or self._prepared[0] != i
        ):  # one at a time: it may be large
            block, _ = self._layers[call.layer]
            self._prepared = i, block.prepare_input(call.input, call.output_shape)
        return self._prepared[1]


def block_layer(block: FisherBlock) -> Layer:
    """Return what the capture has to record for a block."""
    return Layer(block.modules, block.call_input, block.part)


def fill_missing(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor]:
    """Return `grads [S, *param.shape]` with zeros for those that are None."""
    S = next(grad.shape[0] for grad in grads if grad is not None)
    return [
        p.new_zeros(S, *p.shape) if grad is None else grad
        for grad, p in zip(grads, params, strict=True)
    ]


def unscaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    """Return a gradient divided by a `GradScaler`'s factor, in float32 at least.

    >>> unscaled(torch.tensor([2.0**-20]).half() * 2**14, torch.tensor(2.0**14)) * 2**20
    tensor([1.])
    """
    if scale is None:
        return grad
    return grad.to(torch.promote_types(grad.dtype, torch.float32)) / scale.to(grad.device)


def with_random_signs(columns: Tensor, generator: torch.Generator) -> Tensor:
    """Give every example of a column `[J, N, ...]` a random sign.

    Nothing changes where examples do not interact. Where they do (batch statistics, rows
    that all of them share), their cross terms then have the mean zero.
    """
    shape = (*columns.shape[:2], *[1] * (columns.dim() - 2))
    signs = torch.randint(2, shape, generator=generator, device=columns.device)
    return columns * (2 * signs - 1)


def column_chunks(loss: LossFunction) -> Iterator[range]:
    """Yield the coordinates of an example's output, as many at once as fit in a buffer."""
    total = loss.fisher_factor_inner_shape[1:].numel()
    step = max(1, _COLUMN_BYTES // loss.inputs.nbytes)
    for start in range(0, total, step):
        yield range(start, min(start + step, total))
