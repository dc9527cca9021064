"""What a loss is here, and what K-FAC needs of it at the network output.

Notation: `z` the network output, `p(y|z)` the distribution it parametrises, `N` the
number of loss terms (rows of `z` that carry one), `F_L` the curvature of one row (the
Fisher `E[∇_z log p ∇_z log pᵀ]` of a negative log-likelihood, the Hessian of a convex
loss), `B Bᵀ = F_L` a factor of it (Martens & Grosse 2015, arXiv 1503.05671, section 2;
Martens 2020, arXiv 1412.1193, section 9).

Every loss is the *sum* over loss terms, targets treated as constants. A loss of one's
own derives from one of

    NaturalParamsNegativeLogProbLoss   gives `sample` and `evaluate_on_targets`
    ConvexLoss                         gives `evaluate_on_targets`; no distribution
    DistributionNegativeLogProbLoss    gives `dist`, with one of the other two
    NegativeLogProbLoss                gives `sample`, `evaluate_on_targets`,
                                       `multiply_fisher_factor` and its transpose

and computes from `self.inputs` afresh every time: products are taken on copies of the
loss with other inputs. Everything else has a default. `gradient_scale` checks a user's
loss without seeing its targets. Left out: reductions, weights and masks.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Iterator
from typing import Self

import torch
from torch import Generator, Tensor


class LossFunction(abc.ABC):
    """A sum over loss terms, as a function of the network output (abstract).

    Args:
        inputs: `z [N, ...]`, the network output; one tensor, whatever it parametrises.
        targets: of the same number of rows; optional.
        name: for messages.

    Raises:
        ValueError: the inputs cannot parametrise the loss.
    """

    _event_dim = -1
    # Whether `F_L` is the Hessian at the output, so that it makes the GGN.
    _curvature_is_the_hessian = False
    # Whether the loss itself, whose minimum is then near 0, is its size for a step.
    size_is_value = False

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

    def check_inputs(self) -> None:
        """Raise ValueError where the network output cannot parametrise the loss."""
        check_output(self, min_dim=1)

    @property
    def num_terms(self) -> int:
        """`N`, the number of loss terms: by default that of examples."""
        return self._inputs.shape[0]

    def term_weights(self, gradient: Tensor) -> tuple[Tensor, float] | None:
        """Return which loss terms count, and how much, as a user's gradient shows it.

        Args:
            gradient: at `z`, of the user's own loss, up to a factor.

        Returns:
            weights that multiply a gradient in the shape of `z`, and `N`, their sum; None
            where all terms weigh 1.
        """
        return None

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
    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return the loss at `targets`, 0-dim."""

    def at(self, z: Tensor) -> Self:
        """Return this loss with other inputs, a shallow copy."""
        other = copy.copy(self)
        other._inputs = z
        return other

    # The curvature at the output.

    def multiply_fisher(self, vector: Tensor) -> Tensor:
        """Return `F_L v`, row by row; `v` and the result have the shape of `z`."""
        return self.multiply_fisher_factor(self.multiply_fisher_factor_transpose(vector))

    @abc.abstractmethod
    def multiply_fisher_factor(self, vector: Tensor) -> Tensor:
        """Return `B v`, row by row; `v` has the inner shape, the result that of `z`."""

    @abc.abstractmethod
    def multiply_fisher_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `Bᵀ v`, row by row; `v` has the shape of `z`, the result the inner one."""

    @property
    def fisher_factor_inner_shape(self) -> torch.Size:
        """The shape of what `multiply_fisher_factor` takes; its first dimension is N's."""
        return self._inputs.shape

    def multiply_fisher_factor_replicated_one_hot(self, index: int) -> Tensor:
        """Return column `index` of `B` for every row, in the shape of `z`."""
        shape, dim = list(self.fisher_factor_inner_shape), self._event_dim
        size, shape[dim] = shape[dim], 1
        ones = self._inputs.new_ones(shape)
        return self.multiply_fisher_factor(insert_slice_in_zeros(ones, dim, size, index))

    def fisher_factor_columns(self) -> Iterator[Tensor]:
        """Yield `B e_j`, in the shape of `z`, for every output coordinate of an example.

        Rows are examples: the first dimension. Loss terms within an example (tokens,
        pixels) interact in the network, so each has coordinates of its own.
        """
        for j in range(self.fisher_factor_inner_shape[1:].numel()):
            yield self.fisher_factor_all_columns(range(j, j + 1))[0]

    def fisher_factor_all_columns(self, columns: range | None = None) -> Tensor:
        """Return what `fisher_factor_columns` yields as one tensor `[J, *z.shape]`.

        Args:
            columns: some of the coordinates only, so as to take them in parts; the
                tensor of all has as many entries as `z` times those of an example.
        """
        inner = self.fisher_factor_inner_shape
        columns = columns or range(inner[1:].numel())
        device = self._inputs.device
        which = torch.arange(columns.start, columns.stop, columns.step, device=device)
        coordinates = torch.arange(inner[1:].numel(), device=device)
        one_hots = (coordinates == which.unsqueeze(-1)).to(self._inputs.dtype)
        one_hots = one_hots.unsqueeze(1).expand(-1, inner[0], -1).reshape(-1, *inner)
        return torch.vmap(self.multiply_fisher_factor, randomness="same")(one_hots)

    def fisher_factor_random_signs(self, generator: Generator | None = None) -> Tensor:
        """Return `B ε`, in the shape of `z`, with `ε` uniform ±1: `E[Bε(Bε)ᵀ] = F_L`."""
        signs = self._inputs.new_empty(self.fisher_factor_inner_shape)
        signs = signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        return self.multiply_fisher_factor(signs)

    def sample_gradient(self, generator: Generator | None = None) -> Tensor:
        """Draw `g` in the shape of `z` with `E[g gᵀ] = F_L`, for one row after another.

        The gradient at a target drawn from the model where there is a distribution;
        `B ε` with random signs where there is none.
        """
        return self.fisher_factor_random_signs(generator)

    # The Hessian at the output: what makes the generalised Gauss-Newton matrix. `hessian`
    # is the word of tf.contrib.kfac for it, `ggn` that of its successors.

    def _with_hessian(self) -> Self:
        if not self._curvature_is_the_hessian:
            raise NotImplementedError(
                f"{self.name}: the Hessian at the output is not the Fisher and may be "
                "indefinite, so there is no generalised Gauss-Newton matrix of it; use "
                "the multiply_fisher methods, or a loss that is convex in its inputs"
            )
        return self

    def multiply_ggn(self, vector: Tensor) -> Tensor:
        """Return the Hessian at the output times `v`.

        Raises:
            NotImplementedError: the Hessian is not known to be positive semi-definite.
        """
        return self._with_hessian().multiply_fisher(vector)

    def multiply_ggn_factor(self, vector: Tensor) -> Tensor:
        """Return `B v`, with `B Bᵀ` the Hessian at the output."""
        return self._with_hessian().multiply_fisher_factor(vector)

    def multiply_ggn_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `Bᵀ v`, with `B Bᵀ` the Hessian at the output."""
        return self._with_hessian().multiply_fisher_factor_transpose(vector)

    def multiply_ggn_factor_replicated_one_hot(self, index: int) -> Tensor:
        """Return column `index` of `B` for every row."""
        return self._with_hessian().multiply_fisher_factor_replicated_one_hot(index)

    @property
    def ggn_factor_inner_shape(self) -> torch.Size:
        """The shape of what `multiply_ggn_factor` takes."""
        return self._with_hessian().fisher_factor_inner_shape

    def multiply_hessian(self, vector: Tensor) -> Tensor:
        """Return the Hessian at the output times `v`: `multiply_ggn`."""
        return self.multiply_ggn(vector)

    def multiply_hessian_factor(self, vector: Tensor) -> Tensor:
        """Return `B v`: `multiply_ggn_factor`."""
        return self.multiply_ggn_factor(vector)

    def multiply_hessian_factor_transpose(self, vector: Tensor) -> Tensor:
        """Return `Bᵀ v`: `multiply_ggn_factor_transpose`."""
        return self.multiply_ggn_factor_transpose(vector)

    def multiply_hessian_factor_replicated_one_hot(self, index: int) -> Tensor:
        """Return column `index` of `B`: `multiply_ggn_factor_replicated_one_hot`."""
        return self.multiply_ggn_factor_replicated_one_hot(index)

    @property
    def hessian_factor_inner_shape(self) -> torch.Size:
        """The shape of what `multiply_hessian_factor` takes."""
        return self.ggn_factor_inner_shape

    def gradient_scale(
        self, gradient: Tensor, value: Tensor | float | None = None
    ) -> Tensor | None:
        """Return the `c` for which `c ∇_z` of this loss is `gradient`, as far as it shows.

        0-dim; NaN if no target in the sample space gives such a gradient; None if the
        gradient, and the user's loss `value` where it is known, cannot tell.
        """
        return None

    # The loss at targets that are not seen, by their gradient. Where targets were given,
    # these are meant.

    def value_from_gradient(
        self, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor | None:
        """Return the loss at the targets that give such a gradient at `z`, 0-dim.

        Constants that a user's criterion leaves out, such as `½ log 2π`, are not in it.

        Args:
            gradient: of this sum over loss terms, weights included, in the shape of `z`.
            weights: what `term_weights` has found.

        Returns:
            None where the gradient cannot tell.
        """
        return None if self._targets is None else self.evaluate()

    def change_from_gradient(
        self, outputs: Tensor, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor | None:
        """Return how much the loss changes from `z` to `outputs`, 0-dim.

        Arguments and None as for `value_from_gradient`.
        """
        if self._targets is None:
            return None
        return self.at(outputs).evaluate_on_targets(self._targets) - self.evaluate()

    def size_from_gradient(
        self, gradient: Tensor, weights: Tensor | None = None
    ) -> Tensor | None:
        """Return what a step's `½ δᵀFδ` may be compared with, 0-dim and not negative.

        The loss itself where its minimum is 0 or near; else something that no constant
        added to the loss changes. Arguments and None as for `value_from_gradient`.
        """
        if self.size_is_value:
            return self.value_from_gradient(gradient, weights)
        return None


class NegativeLogProbLoss(LossFunction):
    """`−Σ_n log p(y_n|z_n)`, with everything the Fisher needs (abstract).

    A subclass gives `sample`, `evaluate_on_targets`, `multiply_fisher_factor` and its
    transpose; `fisher_factor_inner_shape` too if `B` is not square.
    """

    @abc.abstractmethod
    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw targets from `p(y|z)`; with a generator, the global one is not touched."""

    def evaluate_on_sample(self, generator: Generator | None = None) -> Tensor:
        """Return the loss at targets drawn from the model's own distribution, 0-dim."""
        return self.evaluate_on_targets(self.sample(generator))

    def sample_gradient(self, generator: Generator | None = None) -> Tensor:
        """Return the gradient at `z` for targets drawn from the model's distribution."""
        targets = self.sample(generator)
        with torch.enable_grad():
            z = self._inputs.detach().requires_grad_()
            return torch.autograd.grad(self.at(z).evaluate_on_targets(targets), z)[0]


def insert_slice_in_zeros(slice: Tensor, dim: int, size: int, pos: int) -> Tensor:
    """Return `slice` at position `pos` of `size` along `dim`, with zeros elsewhere.

    Args:
        slice: of length 1 along `dim`.
        dim: the dimension.
        size: the length of the result along it.
        pos: where the slice goes, in [0, size).

    Raises:
        ValueError: the slice is longer along `dim`, or `pos` is outside.

    >>> insert_slice_in_zeros(torch.tensor([[1.0], [2.0]]), dim=1, size=3, pos=1)
    tensor([[0., 1., 0.],
            [0., 2., 0.]])
    """
    if slice.shape[dim] != 1:
        raise ValueError(
            f"insert_slice_in_zeros: expected a slice of length 1 along dimension {dim}, "
            f"got shape {tuple(slice.shape)}"
        )
    if not 0 <= pos < size:
        raise ValueError(
            f"insert_slice_in_zeros: expected a position in [0, {size}), got {pos}"
        )
    shape = list(slice.shape)
    shape[dim] = size
    zeros = slice.new_zeros(shape)
    zeros.narrow(dim, pos, 1).copy_(slice)
    return zeros


def attained_scale(gradient: Tensor, limit: Tensor) -> Tensor | None:
    """The `c` with `gradient <= c · limit`, if many entries attain it, else None.

    Small entries are left out: rounding would make them the largest ratios.
    """
    ratio = (gradient / limit)[gradient >= 0.01 * gradient.max()]
    scale = ratio.max()
    attained = (ratio >= 0.98 * scale).sum()
    return scale if attained >= max(2, 0.05 * ratio.numel()) else None


def check_output(loss: LossFunction, min_dim: int) -> None:
    """Raise ValueError unless `z` is floating, not empty, of `min_dim` dimensions."""
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
