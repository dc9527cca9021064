"""Output distributions: draw targets, evaluate, multiply by the Fisher at the output."""

from .base import (
    LossFunction as LossFunction,
    NaturalParamsNegativeLogProbLoss as NaturalParamsNegativeLogProbLoss,
    NegativeLogProbLoss as NegativeLogProbLoss,
)
from .bernoulli import (
    MultiBernoulliNegativeLogProbLoss as MultiBernoulliNegativeLogProbLoss,
)
from .categorical import (
    CategoricalLogitsNegativeLogProbLoss as CategoricalLogitsNegativeLogProbLoss,
)
from .normal import NormalMeanNegativeLogProbLoss as NormalMeanNegativeLogProbLoss
from .objective import (
    LossFactory as LossFactory,
    Objective as Objective,
    make_objective as make_objective,
)
