"""kfac-torch: K-FAC, Kronecker-factored approximate curvature, for PyTorch."""

from . import (
    fisher_blocks as fisher_blocks,
    fisher_factors as fisher_factors,
    loss_functions as loss_functions,
    patch_moments as patch_moments,
)
from .damping import LevenbergMarquardt as LevenbergMarquardt
from .optimizer import KFAC as KFAC
