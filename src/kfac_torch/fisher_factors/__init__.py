"""Running second moments of a layer's inputs and output gradients, and their powers.

The classes of `tf.contrib.kfac.fisher_factors`, live: the optimizer runs on them.
"""

from .base import (
    FactorOptions as FactorOptions,
    FisherFactor as FisherFactor,
    SubSampling as SubSampling,
)
from .conv import (
    ConvInputKroneckerFactor as ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor as ConvOutputKroneckerFactor,
)
from .conv_diagonal import ConvDiagonalFactor as ConvDiagonalFactor
from .conv_diagonal_sides import (
    ConvInputDiagonalKroneckerFactor as ConvInputDiagonalKroneckerFactor,
    ConvOutputDiagonalKroneckerFactor as ConvOutputDiagonalKroneckerFactor,
)
from .conv_recurrent import (
    ConvInputMultiKF as ConvInputMultiKF,
    ConvOutputMultiKF as ConvOutputMultiKF,
)
from .conv_split import (
    ConvInputSplitKroneckerFactor as ConvInputSplitKroneckerFactor,
    ConvOutputSplitKroneckerFactor as ConvOutputSplitKroneckerFactor,
)
from .conv_sua import ConvInputSUAKroneckerFactor as ConvInputSUAKroneckerFactor
from .data import (
    append_homog as append_homog,
    compute_cov as compute_cov,
    scope_string_from_params as scope_string_from_params,
)
from .diagonal import (
    DiagonalFactor as DiagonalFactor,
    FullyConnectedDiagonalFactor as FullyConnectedDiagonalFactor,
)
from .diagonal_kronecker import (
    DiagonalKroneckerFactor as DiagonalKroneckerFactor,
    DiagonalMultiKF as DiagonalMultiKF,
    EmbeddingInputKroneckerFactor as EmbeddingInputKroneckerFactor,
    UnitTraceDiagonalFactor as UnitTraceDiagonalFactor,
)
from .inverse_providing import (
    DenseSquareMatrixFactor as DenseSquareMatrixFactor,
    InverseProvidingFactor as InverseProvidingFactor,
)
from .linear import (
    FullyConnectedKroneckerFactor as FullyConnectedKroneckerFactor,
)
from .low_rank import (
    ConvInputLowRankKroneckerFactor as ConvInputLowRankKroneckerFactor,
    ConvOutputLowRankKroneckerFactor as ConvOutputLowRankKroneckerFactor,
    LowRankKroneckerFactor as LowRankKroneckerFactor,
)
from .naive import (
    FullFactor as FullFactor,
    NaiveDiagonalFactor as NaiveDiagonalFactor,
    NaiveFullFactor as NaiveFullFactor,
)
from .normalization import (
    ScaleAndShiftDiagonalFactor as ScaleAndShiftDiagonalFactor,
    ScaleAndShiftFullFactor as ScaleAndShiftFullFactor,
)
from .recurrent import (
    FullyConnectedMultiKF as FullyConnectedMultiKF,
    series_option1_product as series_option1_product,
    series_option2_product as series_option2_product,
)
from .refreshing import refresh_inverses as refresh_inverses
from .split import (
    SplitKroneckerFactor as SplitKroneckerFactor,
)
