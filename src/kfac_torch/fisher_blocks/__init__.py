"""Blocks: the share of a layer, or of any parameters, in the Fisher."""

from .base import (
    FisherBlock as FisherBlock,
    Moment as Moment,
)
from .bilinear import (
    BilinearDiagonalFB as BilinearDiagonalFB,
    BilinearKFACFB as BilinearKFACFB,
)
from .conv import (
    ConvDiagonalFB as ConvDiagonalFB,
    ConvKFCBasicFB as ConvKFCBasicFB,
    DepthwiseConvDiagonalFB as DepthwiseConvDiagonalFB,
    DepthwiseConvKFCBasicFB as DepthwiseConvKFCBasicFB,
)
from .conv_transpose import (
    ConvTransposeDiagonalFB as ConvTransposeDiagonalFB,
    ConvTransposeKFCFB as ConvTransposeKFCFB,
)
from .eigen import (
    ConvEKFACFB as ConvEKFACFB,
    ConvTransposeEKFACFB as ConvTransposeEKFACFB,
    DepthwiseConvEKFACFB as DepthwiseConvEKFACFB,
    EigenKroneckerFB as EigenKroneckerFB,
    FullyConnectedEKFACFB as FullyConnectedEKFACFB,
    LinearMapEKFACFB as LinearMapEKFACFB,
)
from .embedding import (
    EmbeddingKFACFB as EmbeddingKFACFB,
    EmbeddingKFACMultiIndepFB as EmbeddingKFACMultiIndepFB,
)
from .embedding_bag import EmbeddingBagKFACFB as EmbeddingBagKFACFB
from .fused import (
    LinearMapFB as LinearMapFB,
    LinearPart as LinearPart,
    linear_parts as linear_parts,
)
from .kronecker import KroneckerProductFB as KroneckerProductFB
from .linear import (
    FullyConnectedDiagonalFB as FullyConnectedDiagonalFB,
    FullyConnectedKFACBasicFB as FullyConnectedKFACBasicFB,
)
from .naive import (
    FullFB as FullFB,
    NaiveDiagonalFB as NaiveDiagonalFB,
)
from .normalization import (
    ScaleAndShiftDiagonalFB as ScaleAndShiftDiagonalFB,
    ScaleAndShiftFullFB as ScaleAndShiftFullFB,
)
from .recurrent import (
    ConvKFCBasicMultiIndepFB as ConvKFCBasicMultiIndepFB,
    FullyConnectedMultiIndepFB as FullyConnectedMultiIndepFB,
    FullyConnectedSeriesFB as FullyConnectedSeriesFB,
)
from .reduce import (
    ConvKFCReduceFB as ConvKFCReduceFB,
    ConvTransposeKFCReduceFB as ConvTransposeKFCReduceFB,
    FullyConnectedKFACReduceFB as FullyConnectedKFACReduceFB,
)
from .tied import TiedEmbeddingFB as TiedEmbeddingFB
