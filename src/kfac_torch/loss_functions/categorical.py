"""Categorical distributions of the output: the cross-entropy."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from .base import attained_scale, check_output
from .convex import NaturalParamsNegativeLogProbLoss

_CERTAIN = 0.999  # a probability at which a term may have no gradient in half precision


class CategoricalLogitsNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
    """`z` are the logits of a categorical distribution; the loss is the cross-entropy.

    Args:
        logits: `z [..., classes]`; every row over all leading dimensions is a loss term.
        targets: class indices of the leading shape.
        name: for messages.
        class_dim: where the classes are; 1 for PyTorch's `[N, classes, *space]`.
        class_weight: of each class, `[classes]`: a term of class `y` weighs `w_y`.
        label_smoothing: the part of a target that is spread over all classes.

    Terms without any gradient, those of an `ignore_index`, do not count.

    Raises:
        ValueError: fewer than two classes, or no batch dimension.

    >>> logits, targets = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
    >>> CategoricalLogitsNegativeLogProbLoss(logits, targets).evaluate()
    tensor(1.6265)
    """

    size_is_value = True

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor | None = None,
        name: str | None = None,
        *,
        class_dim: int = -1,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        self._class_dim = self._event_dim = class_dim
        self._class_weight = class_weight
        self._label_smoothing = label_smoothing
        super().__init__(logits, targets, name)

    def check_inputs(self) -> None:
        """Raise ValueError unless `z` is `[..., classes]` with two classes or more."""
        check_output(self, min_dim=2)
        classes = self._inputs.shape[self._class_dim]
        if classes < 2:
            raise ValueError(
                f"loss {self.name}: expected logits of at least two classes in dimension "
                f"{self._class_dim} of the network output, got shape "
                f'{tuple(self._inputs.shape)}; for one logit per target use "bernoulli"'
            )

    @property
    def num_terms(self) -> int:
        """`N`, the number of rows of logits."""
        return self._inputs.numel() // self._inputs.shape[self._class_dim]

    def term_weights(self, gradient: Tensor) -> tuple[Tensor, float] | None:
        """Return 0 for terms without a gradient, else `w_y`, and the sum over terms.

        The gradient of a term is `w_y (p − q)` with `q` the target, so that a term that
        counts has one, unless the network is certain of its class; `y` is where it is
        most negative. With label smoothing `ε` the curvature of a term weighs
        `(1 − ε) w_y + ε/K Σ_j w_j`.
        """
        dim, w = self._class_dim, self._class_weight
        moved = (gradient != 0).any(dim, keepdim=True)
        # To look costs nothing but on an accelerator.
        if w is None and moved.device.type == "cpu" and moved.all():
            return None
        p = self._p()
        counts = moved | (p.amax(dim, keepdim=True) > _CERTAIN)
        counts = (counts | ~counts.any()).to(gradient.dtype)
        if w is None:
            terms = counts.sum().item()
            return None if terms == counts.numel() else (counts, terms)
        w = w.to(gradient)
        shape = [1] * gradient.dim()
        shape[dim] = -1
        lowest = (gradient / w.view(shape)).nan_to_num(torch.inf).argmin(dim, keepdim=True)
        own = w[torch.where(moved, lowest, p.argmax(dim, keepdim=True))]
        smoothed = own.lerp(w.mean(), self._label_smoothing)
        return counts * smoothed, (counts * own).sum().item()

    def _p(self) -> Tensor:
        return self._inputs.detach().softmax(self._class_dim)

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw class indices, of the shape of `z` without the classes."""
        p = self._p().movedim(self._class_dim, -1)
        rows = p.reshape(-1, p.shape[-1])
        # half precision: too coarse to add up, and multinomial is not there everywhere
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if rows.device.type == "cpu":  # multinomial draws a number for every class there
            return _inverse_cdf(rows, generator).view(p.shape[:-1])
        return torch.multinomial(rows, 1, generator=generator).view(p.shape[:-1])

    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return `−Σ log p_y`, with the weights and the smoothing of the classes."""
        logits = self._inputs.movedim(self._class_dim, -1)
        logits = logits.reshape(-1, logits.shape[-1])
        return functional.cross_entropy(
            logits,
            targets.reshape(-1),
            self._class_weight,
            reduction="sum",
            label_smoothing=self._label_smoothing,
        )

    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `(diag(p) − ppᵀ) v`."""
        p = self._p()
        return p * (vector - (p * vector).sum(self._class_dim, keepdim=True))

    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `B v`, `B = diag(√p) − p√pᵀ`, which is not symmetric."""
        p = self._p()
        root = p.sqrt()
        return root * vector - p * (root * vector).sum(self._class_dim, keepdim=True)

    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `Bᵀ v = √p ∘ (v − pᵀv)`."""
        p = self._p()
        return p.sqrt() * (vector - (p * vector).sum(self._class_dim, keepdim=True))

    def value_from_gradient(
        self, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return `−Σ (w p − g)ᵀ log p`, with `g = w (p − q)` and `q` the targets."""
        log_p = self._inputs.detach().log_softmax(self._class_dim)
        # The gradient at logits has no sum over classes; that at log-probabilities has.
        share = gradient.sum(self._class_dim, keepdim=True) + (
            1 if weights is None else weights
        )
        targets = log_p.exp().mul_(share).sub_(gradient)
        impossible = targets == 0  # with a log p of −Inf, maybe
        return -targets.mul_(log_p).masked_fill_(impossible, 0.0).sum()

    def change_from_gradient(
        self, outputs: Tensor, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return `Σ w (A(z') − A(z) − pᵀ(z' − z)) + gᵀ(z' − z)`, `A` the logsumexp."""
        p, z, dim = self._p(), self._inputs.detach(), self._class_dim
        gradient = self._of_logits(gradient, p)
        fixed = z.isneginf() & outputs.isneginf()  # logits that are masked
        moved = torch.where(fixed, 0.0, outputs - z)
        gap = outputs.logsumexp(dim, keepdim=True) - z.logsumexp(dim, keepdim=True)
        gap = gap - (p * moved).sum(dim, keepdim=True)
        if weights is not None:
            gap = weights * gap
        return gap.sum() + (gradient * moved).sum()

    def _of_logits(self, gradient: Tensor, p: Tensor) -> Tensor:
        """The gradient at logits, where `z` are log-probabilities and the loss is −z_y."""
        return gradient - p * gradient.sum(self._class_dim, keepdim=True)

    def gradient_scale(
        self, gradient: Tensor, value: Tensor | float | None = None
    ) -> Tensor | None:
        """Recover `c` from `g = c (p − q)`, `q` a distribution over the classes.

        Only hard targets show it: where `q_j = 0` the gradient is `c p_j`.
        """
        dim = self._class_dim
        p = self._p().double()
        g = gradient.double()
        if (self._inputs.logsumexp(dim).abs() < 1e-3).all():
            # z are log-probabilities, and the loss may well be −z_y: g = −c q.
            g = g - p * g.sum(dim, keepdim=True)
        tolerance = 1e-3 + 8 * torch.finfo(gradient.dtype).eps
        if g.sum(dim).abs().max() > tolerance * g.abs().max():
            return torch.full((), torch.nan)
        return attained_scale(g, torch.where(g > 0, p, torch.inf)) or _negative(
            attained_scale(-g, torch.where(g < 0, p, torch.inf))
        )


class OnehotCategoricalLogitsNegativeLogProbLoss(CategoricalLogitsNegativeLogProbLoss):
    """`z` are the logits of a categorical distribution over one-hot vectors.

    Args:
        logits: `z [..., classes]`; every row over all leading dimensions is a loss term.
        targets: of the shape of `logits`: one-hot, or probabilities.
        name: for messages.
        class_dim: where the classes are.

    Raises:
        ValueError: fewer than two classes, or no batch dimension.

    >>> logits, targets = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    >>> OnehotCategoricalLogitsNegativeLogProbLoss(logits, targets).evaluate()
    tensor(1.3133)
    """

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw one-hot vectors, in the shape and dtype of `z`."""
        classes = super().sample(generator).unsqueeze(self._class_dim)
        one_hot = torch.zeros_like(self._inputs, requires_grad=False)
        return one_hot.scatter_(self._class_dim, classes, 1.0)

    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return `−Σ y log p`; a class with no probability may have no part in `y`."""
        log_p = self._inputs.log_softmax(self._class_dim)
        return -torch.where(targets == 0, 0.0, targets * log_p).sum()


def _negative(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else -scale


def _inverse_cdf(p: Tensor, generator: Generator | None) -> Tensor:
    """Draw one class of every row of `p [R, classes]`; never one of probability 0."""
    cdf = p.cumsum(-1)
    total = cdf[:, -1:].contiguous()
    u = torch.rand(total.shape, generator=generator, dtype=p.dtype, device=p.device) * total
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))  # rounded up
    # A NaN has its way through the gradient, which is looked at.
    return torch.searchsorted(cdf, u, right=True).clamp_(max=p.shape[-1] - 1)
