"""Running second moments of a layer's inputs and output gradients, and their powers.

The classes of `tf.contrib.kfac.fisher_factors`, live: the optimizer runs on them.
"""

from .base import (
    FactorOptions as FactorOptions,
    FisherFactor as FisherFactor,
)
from .conv import (
    ConvInputKroneckerFactor as ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor as ConvOutputKroneckerFactor,
)
from .data import (
    append_homog as append_homog,
    compute_cov as compute_cov,
    scope_string_from_params as scope_string_from_params,
)
from .inverse_providing import (
    InverseProvidingFactor as InverseProvidingFactor,
    refresh_inverses as refresh_inverses,
)
from .linear import (
    FullyConnectedKroneckerFactor as FullyConnectedKroneckerFactor,
)
