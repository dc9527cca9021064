"""Words for a gradient at the network output that is not the declared loss's.

Notation: `N` the loss terms, `c` the factor between the user's gradient and that of the
declared loss. Left out: how `c` is found (`gradient_scale` of a loss function).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from .loss_functions import LossFunction


@dataclass
class UserLoss:
    """What the gradient at the network output has shown of the user's loss.

    Args:
        summed: whether it is a sum over loss terms, not a mean.
        factor: `c`.
        averages_all: whether the losses of all micro-batches are parts of one mean.
        averages_each: whether each is a mean of its own.
    """

    summed: bool = False
    factor: float = 1.0
    averages_all: bool = False
    averages_each: bool = False

    def see(
        self,
        loss: LossFunction,
        reduction: str | None,
        factor: float,
        share: float,
        empirical: bool,
    ) -> None:
        """Take note of a factor; warn, once, where it is not as declared.

        Args:
            loss: the declared loss.
            reduction: see `describe_mismatch`.
            factor: `c`; NaN where no target could give such a gradient.
            share: of the micro-batch in the loss terms of the step.
            empirical: see `describe_mismatch`.
        """
        if reduction != "sum" and share < 1 and abs(factor / share - 1) < 0.01:
            self.averages_all = True  # gradients are accumulated as one batch's
            return
        self.averages_each = share < 1 and abs(factor - 1) < 0.01
        message, sums = describe_mismatch(loss, reduction, factor, empirical)
        if message is None:
            return
        warnings.warn(message, stacklevel=7)
        if sums:
            self.summed = True
        elif not math.isnan(factor):
            self.factor = factor


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
