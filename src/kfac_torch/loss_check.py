"""Words for a gradient at the network output that is not the declared loss's.

Notation: `N` the loss terms, `c` the factor between the user's gradient and that of the
declared loss. Left out: how `c` is found (`gradient_scale` of a loss function).
"""

from __future__ import annotations

import math

from .loss_functions import LossFunction


def describe_mismatch(
    loss: LossFunction, reduction: str | None, factor: float, empirical: bool
) -> tuple[str | None, bool]:
    """Return a message, None where all is well, and whether the loss is a plain sum.

    Args:
        loss: the declared loss.
        reduction: `"mean"` or `"sum"` over terms; None is a mean, not known for sure.
        factor: `c`; NaN where no target could give such a gradient.
        empirical: whether the user's gradients make the curvature, so that a
            `GradScaler`'s factor matters.
    """
    # Soft targets may show as a factor somewhat below 1.
    if 0.6 < factor < 1.05:
        return None, False
    sums = reduction is None and abs(factor / loss.num_terms - 1) < 0.05
    if not empirical and not sums and _is_gradient_scaler(factor):
        return None, False
    return _message(loss, reduction, factor), sums


def _is_gradient_scaler(factor: float) -> bool:
    """Whether a factor looks like the scale that guards half precision."""
    return factor >= 1024 and abs(math.log2(factor) - round(math.log2(factor))) < 0.01


def _message(loss: LossFunction, reduction: str | None, factor: float) -> str:
    declared = f"the {reduction or 'mean'} over {loss.num_terms} loss terms of {loss.name}"
    if math.isnan(factor):
        return (
            f"the gradient at the network output cannot be that of {declared}, for any "
            "targets. Is loss= the loss you minimise? Classes are expected in the last "
            'dimension by "categorical", in the second by nn.CrossEntropyLoss()'
        )
    outputs = loss.inputs[0].numel()
    return (
        f"the gradient at the network output is {factor:.4g} times that of {declared}. "
        "The curvature is not affected, the step is: scale the loss (or lr), or pass the "
        "criterion itself as loss=, whose reduction is understood. A factor of "
        f"{loss.num_terms} is a sum over loss terms, {1 / outputs:.4g} a "
        "mean over outputs; one over the number of micro-batches, accumulation, is as it "
        "should be"
    )
