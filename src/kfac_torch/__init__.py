"""kfac-torch: K-FAC, Kronecker-factored approximate curvature, for PyTorch."""

from . import (
    curvature_products as curvature_products,
    fisher_blocks as fisher_blocks,
    fisher_factors as fisher_factors,
    loss_functions as loss_functions,
    patch_moments as patch_moments,
    telemetry as telemetry,
)
from .compiled import compile_forward_mode as compile_forward_mode
from .curvature_check import check_curvature as check_curvature
from .curvature_products import (
    CurvatureMatrixVectorProductComputer as CurvatureMatrixVectorProductComputer,
)
from .damping import (
    LevenbergMarquardt as LevenbergMarquardt,
    RelativeDamping as RelativeDamping,
)
from .estimator import FisherEstimator as FisherEstimator
from .health import FactorHealth as FactorHealth, Health as Health
from .layer_choice import Layers as Layers
from .layer_collection import LayerCollection as LayerCollection
from .optimizer import KFAC as KFAC
from .options import (
    QModel as QModel,
    Statistics as Statistics,
    TrustRegion as TrustRegion,
)
from .preconditioner import KFACPreconditioner as KFACPreconditioner
from .refresh_schedule import Refresh as Refresh
from .size_limit import SizeLimit as SizeLimit

__all__ = (
    "KFAC",
    "CurvatureMatrixVectorProductComputer",
    "FactorHealth",
    "FisherEstimator",
    "Health",
    "KFACPreconditioner",
    "LayerCollection",
    "Layers",
    "LevenbergMarquardt",
    "QModel",
    "Refresh",
    "RelativeDamping",
    "SizeLimit",
    "Statistics",
    "TrustRegion",
    "check_curvature",
    "compile_forward_mode",
    "curvature_products",
    "fisher_blocks",
    "fisher_factors",
    "loss_functions",
    "patch_moments",
    "telemetry",
)
