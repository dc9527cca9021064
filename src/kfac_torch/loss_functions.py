"""Output distributions: draw targets, evaluate, multiply by the Fisher at the output.

Notation: `z` the network output, `p(y|z)` the distribution it parametrises, `N` the
number of loss terms (rows of `z` that carry one), `F_L = E[∇_z log p ∇_z log pᵀ]` the
Fisher of one row, `B Bᵀ = F_L` a factor of it (Martens & Grosse 2015, arXiv 1503.05671,
section 2; Martens 2020, arXiv 1412.1193, section 9).

Every loss is the *sum* over loss terms of the negative log-likelihood, targets treated
as constants. The three families here are natural-parameter ones, where the Fisher, the
generalised Gauss-Newton matrix and the Hessian at the output are one matrix. Their
gradient is `∇_z = E[t(y)] − t(target)`, with `t` the sufficient statistic: what lets
`gradient_scale` check a user's loss without seeing its targets. Left out: reductions,
weights and masks of a user's loss.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional


class LossFunction(abc.ABC):
    """A sum over loss terms, as a function of the network output (abstract).

    Args:
        inputs: `z`, the network output.
        targets: of the same number of rows; optional.
        name: for messages.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor | None = None, name: str | None = None
    ) -> None:
        self._inputs = inputs
        self._targets = targets
        self._name = name or type(self).__name__
        self.check_inputs()

    @property
    def name(self) -> str:
        """The name in messages."""
        return self._name

    @property
    def inputs(self) -> Tensor:
        """`z`, the network output."""
        return self._inputs

    @property
    def targets(self) -> Tensor | None:
        """The targets, if given."""
        return self._targets

    def evaluate(self) -> Tensor:
        """Return the loss at the given targets, 0-dim.

        Raises:
            ValueError: no targets were given.
        """
        if self._targets is None:
            raise ValueError(
                f"{self.name}: evaluate() needs targets; pass them to the constructor, or "
                "call evaluate_on_targets(targets)"
            )
        return self.evaluate_on_targets(self._targets)

    @abc.abstractmethod
    def check_inputs(self) -> None:
        """Raise ValueError where the network output cannot parametrise the loss."""

    @property
    @abc.abstractmethod
    def num_terms(self) -> int:
        """`N`, the number of loss terms."""

    @abc.abstractmethod
    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return the loss at `targets`, 0-dim."""


class NegativeLogProbLoss(LossFunction):
    """`−Σ_n log p(y_n|z_n)`, with everything the Fisher needs (abstract)."""

    _event_dim = -1

    @abc.abstractmethod
    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw targets from `p(y|z)`."""

    def evaluate_on_sample(self, generator: Generator | None = None) -> Tensor:
        """Return the loss at targets drawn from the model's own distribution, 0-dim."""
        return self.evaluate_on_targets(self.sample(generator))

    @abc.abstractmethod
    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `F_L v`, row by row; `v` and the result have the shape of `z`."""

    @abc.abstractmethod
    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `B v`, row by row; `v` has the inner shape, the result that of `z`."""

    @abc.abstractmethod
    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `Bᵀ v`, row by row; `v` has the shape of `z`, the result the inner one."""

    @property
    def fisher_factor_inner_shape(self) -> torch.Size:
        """The shape of what `multiply_fisher_factor` takes."""
        return self._inputs.shape

    def multiply_fisher_factor_replicated_one_hot(self, index: int) -> Tensor:
        """Return column `index` of `B` for every row, in the shape of `z`."""
        one_hot = self._inputs.new_zeros(self.fisher_factor_inner_shape)
        one_hot.select(self._event_dim, index).fill_(1)
        return self.multiply_fisher_factor(one_hot)

    def fisher_factor_columns(self) -> Iterator[Tensor]:
        """Yield `B e_j`, in the shape of `z`, for every output coordinate of an example.

        Rows are examples: the first dimension. Loss terms within an example (tokens,
        pixels) interact in the network, so each has coordinates of its own.
        """
        inner = self.fisher_factor_inner_shape
        for j in range(inner[1:].numel()):
            one_hot = self._inputs.new_zeros(inner[0], inner[1:].numel())
            one_hot[:, j] = 1
            yield self.multiply_fisher_factor(one_hot.view(inner))

    def gradient_scale(
        self, gradient: Tensor, value: Tensor | float | None = None
    ) -> Tensor | None:
        """Return the `c` for which `c ∇_z` of this loss is `gradient`, as far as it shows.

        0-dim; NaN if no target in the sample space gives such a gradient; None if the
        gradient, and the user's loss `value` where it is known, cannot tell.
        """
        return None


class NaturalParamsNegativeLogProbLoss(NegativeLogProbLoss):
    """A loss whose `z` is a natural parameter: Hessian and Fisher coincide (abstract)."""

    def multiply_hessian(self, vector: Tensor) -> Tensor:
        """Return the Hessian at the output times `v`: the Fisher's product."""
        return self.multiply_fisher(vector)

    def multiply_hessian_factor(self, vector: Tensor) -> Tensor:
        """Return `B v`; the Fisher's product."""
        return self.multiply_fisher_factor(vector)

    def multiply_hessian_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `Bᵀ v`; the Fisher's product."""
        return self.multiply_fisher_factor_transpose(vector)


class NormalMeanNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
    """`z` is the mean of a normal distribution with variance `var` in every coordinate.

    `var=1` is the loss `½‖y − z‖²` (up to a constant), `var=0.5` is `‖y − z‖²`. An
    example is one loss term: coordinates are summed over all dimensions but the first.

    Args:
        mean: `z [N, ...]`.
        var: the variance, a positive number.
        targets: of the shape of `mean`.
        name: for messages.

    Raises:
        ValueError: `mean` has no batch dimension, or `var` is not positive.

    >>> loss = NormalMeanNegativeLogProbLoss(torch.zeros(1, 2), var=0.5)
    >>> loss.multiply_fisher(torch.tensor([[1.0, 2.0]]))
    tensor([[2., 4.]])
    """

    def __init__(
        self,
        mean: Tensor,
        var: float = 0.5,
        targets: Tensor | None = None,
        name: str | None = None,
    ) -> None:
        if not var > 0:
            raise ValueError(f"normal loss: var: expected a positive number, got {var}")
        self._var = float(var)
        super().__init__(mean, targets, name)

    def check_inputs(self) -> None:
        """Raise ValueError unless `z` is `[N, ...]`."""
        _check_output(self, min_dim=1)

    @property
    def num_terms(self) -> int:
        """`N`, the number of examples."""
        return self._inputs.shape[0]

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw `y ~ N(z, var)`, in the shape of `z`."""
        noise = torch.empty_like(self._inputs).normal_(generator=generator)
        return self._inputs.detach() + self._var**0.5 * noise

    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return `Σ (y − z)²/(2 var) + ½ log(2π var)`."""
        constant = 0.5 * torch.log(
            torch.tensor(2 * torch.pi * self._var, dtype=torch.float64)
        )
        squares = (targets - self._inputs).square().sum() / (2 * self._var)
        return squares + constant.to(squares) * self._inputs.numel()

    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `v/var`."""
        return vector / self._var

    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `v/√var`."""
        return vector / self._var**0.5

    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `v/√var`; `B` is symmetric."""
        return vector / self._var**0.5

    def gradient_scale(
        self, gradient: Tensor, value: Tensor | float | None = None
    ) -> Tensor | None:
        """Return `c = var ‖g‖²/(2 value)`; without the value any scale has its targets."""
        if not value:
            return None
        return self._var * gradient.double().square().sum() / (2 * value)


class CategoricalLogitsNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
    """`z` are the logits of a categorical distribution; the loss is the cross-entropy.

    Args:
        logits: `z [..., classes]`; every row over all leading dimensions is a loss term.
        targets: class indices of the leading shape.
        name: for messages.
        class_dim: where the classes are; 1 for PyTorch's `[N, classes, *space]`.

    Raises:
        ValueError: fewer than two classes, or no batch dimension.

    >>> logits, targets = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
    >>> CategoricalLogitsNegativeLogProbLoss(logits, targets).evaluate()
    tensor(1.6265)
    """

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor | None = None,
        name: str | None = None,
        *,
        class_dim: int = -1,
    ) -> None:
        self._class_dim = self._event_dim = class_dim
        super().__init__(logits, targets, name)

    def check_inputs(self) -> None:
        """Raise ValueError unless `z` is `[..., classes]` with two classes or more."""
        _check_output(self, min_dim=2)
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

    def _p(self) -> Tensor:
        return self._inputs.detach().softmax(self._class_dim)

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw class indices, of the shape of `z` without the classes."""
        p = self._p().movedim(self._class_dim, -1)
        rows = p.reshape(-1, p.shape[-1])
        # multinomial is not written for half precision everywhere
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return torch.multinomial(rows, 1, generator=generator).view(p.shape[:-1])

    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return `−Σ log p_y`."""
        logits = self._inputs.movedim(self._class_dim, -1)
        logits = logits.reshape(-1, logits.shape[-1])
        return functional.cross_entropy(logits, targets.reshape(-1), reduction="sum")

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
        return _attained_scale(g, torch.where(g > 0, p, torch.inf)) or _negative(
            _attained_scale(-g, torch.where(g < 0, p, torch.inf))
        )


class MultiBernoulliNegativeLogProbLoss(NaturalParamsNegativeLogProbLoss):
    """`z` are the logits of independent Bernoulli variables.

    An example is one loss term: coordinates are summed over all dimensions but the first.

    Args:
        logits: `z [N, ...]`.
        targets: of the shape of `logits`, in [0, 1].
        name: for messages.

    Raises:
        ValueError: no batch dimension.

    >>> MultiBernoulliNegativeLogProbLoss(torch.zeros(1, 2)).multiply_fisher(
    ...     torch.tensor([[1.0, 2.0]])
    ... )
    tensor([[0.2500, 0.5000]])
    """

    def __init__(
        self, logits: Tensor, targets: Tensor | None = None, name: str | None = None
    ) -> None:
        super().__init__(logits, targets, name)

    def check_inputs(self) -> None:
        """Raise ValueError unless `z` is `[N, ...]`."""
        _check_output(self, min_dim=1)

    @property
    def num_terms(self) -> int:
        """`N`, the number of examples."""
        return self._inputs.shape[0]

    def _p(self) -> Tensor:
        return self._inputs.detach().sigmoid()

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw zeros and ones, in the shape and dtype of `z`."""
        return torch.bernoulli(self._p(), generator=generator)

    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return `−Σ y log σ(z) + (1 − y) log(1 − σ(z))`."""
        return functional.binary_cross_entropy_with_logits(
            self._inputs, targets.to(self._inputs.dtype), reduction="sum"
        )

    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `σ(1 − σ) v`."""
        p = self._p()
        return p * (1 - p) * vector

    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `√(σ(1 − σ)) v`."""
        p = self._p()
        return (p * (1 - p)).sqrt() * vector

    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `√(σ(1 − σ)) v`; `B` is symmetric."""
        return self.multiply_fisher_factor(vector)

    def gradient_scale(
        self, gradient: Tensor, value: Tensor | float | None = None
    ) -> Tensor | None:
        """Recover `c` from `g = c (σ − y)`, `y` in [0, 1].

        Only hard targets show it: |σ − y| is σ where `y = 0` and 1 − σ where `y = 1`.
        """
        p = self._p().double()
        g = gradient.double()
        return _attained_scale(g.abs(), torch.where(g > 0, p, 1 - p))


def _attained_scale(gradient: Tensor, limit: Tensor) -> Tensor | None:
    """The `c` with `gradient <= c · limit`, if many entries attain it, else None.

    Small entries are left out: rounding would make them the largest ratios.
    """
    ratio = (gradient / limit)[gradient >= 0.01 * gradient.max()]
    scale = ratio.max()
    attained = (ratio >= 0.98 * scale).sum()
    return scale if attained >= max(2, 0.05 * ratio.numel()) else None


def _negative(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else -scale


def _check_output(loss: LossFunction, min_dim: int) -> None:
    z = loss.inputs
    if not isinstance(z, Tensor) or not z.is_floating_point():
        what = z.dtype if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(
            f"loss {loss.name}: expected the network output as a floating-point tensor, "
            f"got {what}; where it is inside a dict or an object, say where with output="
        )
    if z.dim() < min_dim or z.numel() == 0:
        raise ValueError(
            f"loss {loss.name}: expected a network output with at least {min_dim} "
            f"dimensions, the batch first, got shape {tuple(z.shape)}"
        )


LossFactory: TypeAlias = Callable[[Tensor], NegativeLogProbLoss]

_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Objective:
    """What the user minimises: `reduction` over terms of `coeff · −log p(y|z)`.

    Args:
        factory: makes the distribution from the network output.
        reduction: `"mean"` or `"sum"` over loss terms; None is a mean, not yet checked.
        per_output: the criterion also averages over an example's outputs, so that
            `coeff` is divided by their number.
        scale: `coeff` before that.
    """

    factory: LossFactory
    reduction: str | None = None
    per_output: bool = False
    scale: float = 1.0

    def coeff(self, output: Tensor) -> float:
        """The weight of `−log p(y|z)` in one loss term; the Fisher is scaled by it."""
        outputs = output[0].numel() if self.per_output else 1
        return self.scale / outputs


def make_objective(loss: str | nn.Module | LossFactory) -> Objective:
    """Return the `Objective` that a `loss` argument means.

    Args:
        loss: `"categorical"` (classes last), `"normal"` (unit variance: `½‖y − z‖²`) or
            `"bernoulli"`, a mean over loss terms; or the torch criterion in use
            (`nn.CrossEntropyLoss`, `nn.MSELoss`, `nn.BCEWithLogitsLoss`), its reduction
            understood; or a `NegativeLogProbLoss` class or factory.

    Raises:
        ValueError: an unknown name, criterion, or option of one.
        TypeError: something else.

    >>> make_objective(nn.MSELoss()).coeff(torch.zeros(8, 4))  # (2/4) · ½‖y − z‖²
    0.5
    """
    if isinstance(loss, str):
        if loss not in _BY_NAME:
            raise ValueError(f"loss: expected one of {tuple(_BY_NAME)}, got {loss!r}")
        return Objective(_BY_NAME[loss])
    if isinstance(loss, nn.Module):
        return _objective_of_criterion(loss)
    if callable(loss):
        return Objective(loss)
    raise TypeError(
        "loss: expected a name, a torch criterion, or a NegativeLogProbLoss class or "
        f"factory, got {loss!r}"
    )


def _objective_of_criterion(criterion: nn.Module) -> Objective:
    reduction = str(getattr(criterion, "reduction", None))
    mean = reduction == "mean"
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"loss: expected a criterion with a reduction in {_REDUCTIONS}, got "
            f"{criterion} with {reduction!r}"
        )
    for option in ("weight", "pos_weight"):
        if getattr(criterion, option, None) is not None:
            raise ValueError(
                f"loss: {criterion} with {option}= is not the negative log-likelihood of "
                "a distribution known here; pass a NegativeLogProbLoss factory"
            )
    if isinstance(criterion, nn.CrossEntropyLoss):
        return Objective(_categorical_channels_first, reduction)
    if isinstance(criterion, nn.MSELoss):
        return Objective(_unit_normal, reduction, per_output=mean, scale=2.0)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        return Objective(MultiBernoulliNegativeLogProbLoss, reduction, per_output=mean)
    raise ValueError(
        "loss: expected nn.CrossEntropyLoss, nn.MSELoss or nn.BCEWithLogitsLoss, got "
        f"{criterion}; pass a NegativeLogProbLoss class or factory for any other loss"
    )


def _unit_normal(output: Tensor) -> NegativeLogProbLoss:
    return NormalMeanNegativeLogProbLoss(output, var=1.0)


def _categorical_channels_first(output: Tensor) -> NegativeLogProbLoss:
    return CategoricalLogitsNegativeLogProbLoss(output, class_dim=1)


_BY_NAME: Mapping[str, LossFactory] = MappingProxyType(
    {
        "categorical": CategoricalLogitsNegativeLogProbLoss,
        "normal": _unit_normal,
        "bernoulli": MultiBernoulliNegativeLogProbLoss,
    }
)
