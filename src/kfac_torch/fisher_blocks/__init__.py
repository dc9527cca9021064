"""Blocks: one layer's share of the Fisher, as a Kronecker product of two factors."""

from .base import (
    FisherBlock as FisherBlock,
    KroneckerProductFB as KroneckerProductFB,
)
from .conv import (
    ConvKFCBasicFB as ConvKFCBasicFB,
)
from .linear import (
    FullyConnectedKFACBasicFB as FullyConnectedKFACBasicFB,
)
