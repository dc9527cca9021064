"""Output distributions: draw targets, evaluate, multiply by the Fisher at the output."""

from .base import (
    LossFunction as LossFunction,
    NegativeLogProbLoss as NegativeLogProbLoss,
    insert_slice_in_zeros as insert_slice_in_zeros,
)
from .bernoulli import (
    MultiBernoulliNegativeLogProbLoss as MultiBernoulliNegativeLogProbLoss,
)
from .categorical import (
    CategoricalLogitsNegativeLogProbLoss as CategoricalLogitsNegativeLogProbLoss,
    OnehotCategoricalLogitsNegativeLogProbLoss as OnehotCategoricalLogitsNegativeLogProbLoss,  # noqa: E501
)
from .convex import (
    ConvexLoss as ConvexLoss,
    NaturalParamsNegativeLogProbLoss as NaturalParamsNegativeLogProbLoss,
)
from .distribution import DistributionNegativeLogProbLoss as DistributionNegativeLogProbLoss
from .normal import (
    NormalMeanNegativeLogProbLoss as NormalMeanNegativeLogProbLoss,
    NormalMeanVarianceNegativeLogProbLoss as NormalMeanVarianceNegativeLogProbLoss,
)
from .objective import (
    LossFactory as LossFactory,
    Objective as Objective,
    make_objective as make_objective,
)
