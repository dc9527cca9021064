"""Every loss of the package, and losses as a user writes them, by what holds for them."""

import torch
from torch.nn import functional

from kfac_torch.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    ConvexLoss,
    DistributionNegativeLogProbLoss,
    MultiBernoulliNegativeLogProbLoss,
    NaturalParamsNegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
    NormalMeanVarianceNegativeLogProbLoss,
    OnehotCategoricalLogitsNegativeLogProbLoss,
)


class Poisson(DistributionNegativeLogProbLoss, NaturalParamsNegativeLogProbLoss):
    """`z` is the logarithm of the rate; the minimum a user writes."""

    @property
    def dist(self):
        return torch.distributions.Poisson(self.inputs.exp(), validate_args=False)


class ElementwisePoisson(NaturalParamsNegativeLogProbLoss):
    elementwise = True

    def sample(self, generator=None):
        return torch.poisson(self.inputs.detach().exp(), generator=generator)

    def evaluate_on_targets(self, targets):
        z = self.inputs
        return (z.exp() - targets * z + (targets + 1).lgamma()).sum()


class DerivedCategorical(NaturalParamsNegativeLogProbLoss):
    """The cross-entropy once more, with nothing but its definition."""

    def sample(self, generator=None):
        return CategoricalLogitsNegativeLogProbLoss(self.inputs).sample(generator)

    def evaluate_on_targets(self, targets):
        return functional.cross_entropy(
            self.inputs.flatten(0, -2), targets.flatten(), reduction="sum"
        )


class Exponential(DistributionNegativeLogProbLoss):
    """`z` is the logarithm of the rate, not a natural parameter; `F = 1`, `B` of `√½`s."""

    @property
    def dist(self):
        return torch.distributions.Exponential(self.inputs.exp(), validate_args=False)

    @property
    def fisher_factor_inner_shape(self):
        return torch.Size([*self.inputs.shape, 2])

    def multiply_fisher_factor(self, vector):
        return 0.5**0.5 * vector.sum(-1)

    def multiply_fisher_factor_transpose(self, vector):
        return 0.5**0.5 * torch.stack([vector, vector], -1)


class PseudoHuber(ConvexLoss):
    """Of the norm of an example's residual, so that its coordinates interact."""

    def evaluate_on_targets(self, targets):
        residuals = (self.inputs - targets).flatten(1)
        return ((1 + residuals.square().sum(1)).sqrt() - 1).sum()


class ElementwisePseudoHuber(ConvexLoss):
    elementwise = True

    def evaluate_on_targets(self, targets):
        return ((1 + (self.inputs - targets).square()).sqrt() - 1).sum()


def classes_in_the_second_dimension(z, targets=None):
    return CategoricalLogitsNegativeLogProbLoss(z, targets, class_dim=1)


def positive_variance(z):
    mean, raw = z.chunk(2, -1)
    return torch.cat([mean, raw.square() + 0.1], -1)


def mean_and_variance(z, targets=None):
    output = positive_variance(z)
    return NormalMeanVarianceNegativeLogProbLoss.from_output(output, targets)


def normal(z, targets=None):
    return NormalMeanNegativeLogProbLoss(z, var=0.5, targets=targets)


LOSSES = {
    "categorical": CategoricalLogitsNegativeLogProbLoss,
    "normal": normal,
    "bernoulli": MultiBernoulliNegativeLogProbLoss,
}
NATURAL = LOSSES | {
    "categorical, classes second": classes_in_the_second_dimension,
    "one-hot": OnehotCategoricalLogitsNegativeLogProbLoss,
    "derived categorical": DerivedCategorical,
    "poisson": Poisson,
    "elementwise poisson": ElementwisePoisson,
}
NEGATIVE_LOG_PROB = NATURAL | {
    "mean and variance": mean_and_variance,
    "exponential": Exponential,
}
CONVEX = {
    "pseudo-Huber": lambda z, y=None: PseudoHuber(
        z, torch.ones_like(z) if y is None else y
    ),
    "elementwise pseudo-Huber": lambda z, y=None: ElementwisePseudoHuber(
        z, torch.ones_like(z) if y is None else y
    ),
}
WITH_HESSIAN, ALL = NATURAL | CONVEX, NEGATIVE_LOG_PROB | CONVEX


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def dense(multiply, shape):
    """The matrix of a linear map from tensors of this shape, by columns."""
    one_hots = torch.eye(shape.numel()).view(-1, *shape)
    return torch.stack([multiply(e).flatten() for e in one_hots], 1)
