"""A forward of the root module once more: with other parameters, or on part of its batch.

Notation: `k` the stride: one example in `k`, from a start that moves on. Statistics of
`N/k` examples cost `1/k` of a forward, of the gradients to the layers and of the moments,
rather than the gradients and moments of all; their mean is the same, and the factors'
moving average makes up for the noise. The random numbers of the first forward are drawn
again, and buffers are put back. Left out: how large `k` is (`options.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from .capture import (
    Capture,
    LayerCall,
    RootCall,
    random_state,
    set_random_state,
)
from .forwards import Forward, Forwards
from .options import Statistics


def rerun(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[Mapping[str, Tensor]], Any]:
    """Return what runs a forward again with other parameters, leaving no trace.

    Buffers, the running statistics of a batch norm, are copies that are thrown away.
    """

    # Those that are left out are the model's own, out of reach of the user's graph.
    own = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def forward(params: Mapping[str, Tensor]) -> Any:
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(model, {**own, **copies, **params}, args, dict(kwargs))

    return forward


def every_kth(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], stride: int, start: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a forward with one example in `stride`, from `start` on.

    The batch is the first dimension of the first tensor; every other tensor with that
    first dimension, in lists, tuples and mappings too, is thinned out alike. A batch of
    fewer examples than `stride` stays whole.

    >>> every_kth((torch.arange(6),), {"scale": torch.ones(1)}, 3, 1)
    ((tensor([1, 4]),), {'scale': tensor([1.])})
    """
    leaves = [leaf for leaf in tree_leaves((args, dict(kwargs))) if _has_rows(leaf)]
    size = leaves[0].shape[0] if leaves else 0
    if stride == 1 or size < stride:
        return args, dict(kwargs)

    def thin(leaf: Any) -> Any:
        if _has_rows(leaf) and leaf.shape[0] == size:
            return leaf[start % stride :: stride]
        return leaf

    return tree_map(thin, (args, dict(kwargs)))


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def thin_weights(
    weights: tuple[Tensor, Tensor | float] | None, stride: int, start: int
) -> tuple[Tensor, Tensor | float] | None:
    """Return weights of loss terms and their number, of one example in `stride`."""
    if weights is None:
        return None
    ((some,), _) = every_kth((weights[0],), {}, stride, start)
    return some, weights[1] * some.sum() / weights[0].sum()


@contextmanager
def recorded_again(
    capture: Capture, model: nn.Module, call: RootCall, stride: int, start: int
) -> Iterator[tuple[Any, list[LayerCall]]]:
    """Yield the output and the layers' calls of a forward on one example in `stride`.

    Buffers and random numbers are put back at the end: a backward may need the former.
    """
    call.check_unchanged()
    args, kwargs = every_kth(call.args, call.kwargs, stride, start)
    device = next(model.parameters()).device
    now, buffers = random_state(device), list(model.buffers())
    copies = [buffer.clone() for buffer in buffers]
    autocast = torch.autocast(
        device.type, dtype=call.autocast, enabled=call.autocast is not None
    )
    try:
        set_random_state(call.random_state, device)
        with torch.enable_grad(), autocast, capture.apart() as calls:
            output = model(*args, **kwargs)
        yield output, calls
    finally:
        set_random_state(now, device)
        for buffer, copy in zip(buffers, copies, strict=True):
            buffer.copy_(copy)


class Replays:
    """Statistics on part of the batch, from forwards that are run again.

    The first forward is recorded as it is: how many loss terms a batch has is seen there,
    and how large the layers' outputs are. From then on nothing is recorded while the
    user's model runs, where either is so large that statistics are put off until the step.
    Those of the first batch are of all of it.

    Args:
        capture: of the model; it keeps the forwards.
        statistics: which part.

    Attributes:
        stride: `k` of the last batch, None before the first.
        large: whether the layers' outputs were too large for a graph that is kept.
        taken: how many times statistics were taken so.
        shared: whether somebody else clears the forwards that are kept.
    """

    def __init__(self, capture: Capture, statistics: Statistics) -> None:
        self._capture = capture
        self._statistics = statistics
        self.stride: int | None = None
        self.taken = 0
        self.large = False
        self.shared = False
        self._done = False
        capture.keep_forwards = statistics.may_rerun

    @property
    def deferring(self) -> bool:
        """Whether statistics are taken when the step comes, not as the model runs."""
        return self.large or (self.stride is not None and self.stride > 1)

    def puts_off(self, forward: Forward, calls: Sequence[LayerCall]) -> bool:
        """See whether statistics of a forward that was recorded have to wait.

        Taken now they need its whole graph until the user's own backward is over; in a
        forward of their own they hold no more than that backward does.
        """
        if forward.root is None:  # it is not kept, or is one that was run again
            return False
        size = sum(call.nbytes for call in calls)
        large = size > self._statistics.rerun_above
        self.large |= large
        forward.root.taken = not large
        return large

    def take(self, model: nn.Module, forwards: Forwards) -> None:
        """Take the statistics that were put off."""
        if self._done or not self.deferring:
            return
        self._done = True
        known = self._capture.forwards
        last = self.stride or 1
        start = self.taken + last // 2  # not where the quadratic model is
        for call in [call for call in known if call.arrived] or known:
            if call.taken:
                continue
            thinned = call.arrived and self.stride is not None
            k = self._statistics.stride(call.num_terms) if thinned else last
            weights = [thin_weights(pair, k, start) for pair in call.weights]
            # A compiled root too: its hooks are what records, and lets it run as written.
            again = recorded_again(self._capture, model, call, k, start)
            with again as (output, calls):
                forwards.take_again(output, calls, weights)
        self.taken += 1

    def end(self) -> None:
        """See what the batch was like, when its statistics are used or forgotten."""
        self._done = False
        if not self._statistics.may_rerun:
            return
        arrived = [call for call in self._capture.forwards if call.arrived]
        if arrived:
            self.stride = self._statistics.stride(arrived[0].num_terms)
        if not self.shared:
            self._capture.forwards.clear()
