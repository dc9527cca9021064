"""The statistics of the empirical Fisher: from the gradients of the user's own backward.

Notation: `N` the loss terms, `s` the factor of a `GradScaler`, `c` the factor of the
user's loss on the declared one. The user's gradient at a layer's output is that of `c s`
times a mean over terms (or a sum); the statistics are of the sum, so it is multiplied by
`N/(c s)`. Left out: how `c` and `s` are found (`loss_check.py`, `batch_loss.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from .fisher_blocks import FisherBlock, Moment
from .forwards import Forward
from .sources import BatchMoments, fill_missing, unscaled


def empirical_moments(
    forwards: Sequence[Forward],
    blocks: Mapping[str, FisherBlock],
    param_grads: Mapping[Tensor, Tensor],
    *,
    sums: bool,
    averages_all: bool,
    factor: float,
    scale: Tensor | None,
) -> Iterator[dict[str, list[Moment]]]:
    """Yield the moments of all factors by block, of one forward after the other.

    Args:
        forwards: those that a backward has reached.
        blocks: by name.
        param_grads: what it brought to the parameters of generic blocks.
        sums: whether the user's loss is a sum over loss terms, not a mean.
        averages_all: whether the losses of all forwards are parts of one mean.
        factor: `c`.
        scale: `s`, 0-dim; 1 if None. Of a NaN all moments are.
    """
    N = sum(forward.num_terms for forward in forwards)
    for forward in forwards:
        terms = N if averages_all else forward.num_terms
        weight = (1 if sums else terms) / factor * forward.gradient_share
        batch = BatchMoments(
            forward.calls, blocks, forward.num_terms, forward.has_idle_terms
        )
        batch.add_user_grads(weight, scale)
        yield batch.moments()
    # A generic block squares the gradient of all micro-batches together, maybe each a
    # mean over its own loss terms.
    terms = N if averages_all else N / len(forwards)
    weight = (1 if sums else terms) / factor * forwards[0].gradient_share
    for block in blocks.values():
        found = [param_grads.get(param) for param in block.params]
        if block.needs_param_grads and any(grad is not None for grad in found):
            grads = [
                None if grad is None else weight * unscaled(grad, scale)[None]
                for grad in found
            ]
            covs = block.grad_moments([], fill_missing(grads, block.params), N)
            rows = block.num_rows([], N)
            yield {block.name: [Moment(cov, rows, N) for cov in covs]}
