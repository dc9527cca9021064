"""The approximations that each kind of layer can have, by name.

The names are those of `tf.contrib.kfac` and of its successor: "kron" a Kronecker
product (with "in", "out" or "both" sides as diagonals), "diagonal", "full"; for layers
that are used several times "kron_indep" (independent uses) and "kron_series_1", "..._2"
(a linear chain over time); "kron_reduce" a product of the mean input and the summed
gradient of each example, over all positions where it uses a layer; "ekfac" a Kronecker
product with its eigenvalues corrected. A one-hot input has a
diagonal second moment to begin with, so of an embedding "kron" is "kron_in_diag" and
"kron_out_diag" is "kron_both_diag".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

from torch import nn

from . import fisher_blocks as fb
from .fisher_blocks.layer import check_modules
from .fisher_blocks.linear import LinearFB
from .fisher_factors import FactorOptions
from .fisher_factors.base import check_choice

BlockFactory: TypeAlias = Callable[..., fb.FisherBlock]


def _sides(kind: BlockFactory, **sides: bool | int) -> BlockFactory:
    return lambda *args, **kwargs: kind(*args, **sides, **kwargs)


def _kronecker(name: str, kind: BlockFactory) -> dict[str, BlockFactory]:
    """A Kronecker block under its name, and with either side or both as diagonals."""
    left, right = "diagonal_approx_for_input", "diagonal_approx_for_output"
    return {
        name: kind,
        f"{name}_in_diag": _sides(kind, **{left: True}),
        f"{name}_out_diag": _sides(kind, **{right: True}),
        f"{name}_both_diag": _sides(kind, **{left: True, right: True}),
    }


def _embedding(name: str, kind: BlockFactory) -> dict[str, BlockFactory]:
    """An embedding's block under its names: the input's side is a diagonal anyway."""
    diagonal = _sides(kind, diagonal_approx_for_output=True)
    return {
        name: kind,
        f"{name}_in_diag": kind,
        f"{name}_out_diag": diagonal,
        f"{name}_both_diag": diagonal,
    }


def _generic(kind: BlockFactory, *layer_types: type) -> BlockFactory:
    """A block of gradients of parameters, made from a layer."""

    def make(module: nn.Module, name: str, options: FactorOptions) -> fb.FisherBlock:
        check_modules(module, layer_types, name)
        return kind([p for p in module.parameters() if p.requires_grad], name, options)

    return make


def _of_part(kind: BlockFactory) -> BlockFactory:
    """A block of gradients of parameters, made from a linear map inside a layer."""

    def make(
        part: fb.LinearPart, module: nn.Module, name: str, options: FactorOptions
    ) -> fb.FisherBlock:
        return kind(part.params, name, options)

    return make


_CONVOLUTION = _generic(fb.FullFB, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = _generic(
    fb.FullFB, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)
APPROXIMATIONS: Mapping[str, Mapping[str, BlockFactory]] = MappingProxyType(
    {
        "generic": MappingProxyType({"full": fb.FullFB, "diagonal": fb.NaiveDiagonalFB}),
        "fully_connected": MappingProxyType(
            {
                **_kronecker("kron", fb.FullyConnectedKFACBasicFB),
                **_kronecker("kron_reduce", fb.FullyConnectedKFACReduceFB),
                "ekfac": fb.FullyConnectedEKFACFB,
                "diagonal": fb.FullyConnectedDiagonalFB,
                "full": _generic(fb.FullFB, *LinearFB.layer_types),
            }
        ),
        "conv2d": MappingProxyType(
            {
                "kron": fb.ConvKFCBasicFB,
                "kron_sua": _sides(fb.ConvKFCBasicFB, sua_approx_for_input=True),
                "kron_reduce": fb.ConvKFCReduceFB,
                "ekfac": fb.ConvEKFACFB,
                "diagonal": fb.ConvDiagonalFB,
                "full": _CONVOLUTION,
            }
        ),
        "conv_transpose": MappingProxyType(
            {
                "kron": fb.ConvTransposeKFCFB,
                "kron_reduce": fb.ConvTransposeKFCReduceFB,
                "ekfac": fb.ConvTransposeEKFACFB,
                "diagonal": fb.ConvTransposeDiagonalFB,
                "full": _TRANSPOSED,
            }
        ),
        "depthwise_conv2d": MappingProxyType(
            {
                "kron": fb.DepthwiseConvKFCBasicFB,
                "ekfac": fb.DepthwiseConvEKFACFB,
                "diagonal": fb.DepthwiseConvDiagonalFB,
                "full": _CONVOLUTION,
            }
        ),
        "embedding": MappingProxyType(
            {
                **_embedding("kron", fb.EmbeddingKFACFB),
                "diagonal": _generic(fb.NaiveDiagonalFB, nn.Embedding),
                "full": _generic(fb.FullFB, nn.Embedding),
            }
        ),
        "embedding_bag": MappingProxyType(
            {
                **_embedding("kron", fb.EmbeddingBagKFACFB),
                "diagonal": _generic(fb.NaiveDiagonalFB, nn.EmbeddingBag),
                "full": _generic(fb.FullFB, nn.EmbeddingBag),
            }
        ),
        "tied_embedding": MappingProxyType(_embedding("kron", fb.TiedEmbeddingFB)),
        "bilinear": MappingProxyType(
            {
                **_kronecker("kron", fb.BilinearKFACFB),
                "diagonal": fb.BilinearDiagonalFB,
                "full": _generic(fb.FullFB, nn.Bilinear),
            }
        ),
        "scale_and_shift": MappingProxyType(
            {"full": fb.ScaleAndShiftFullFB, "diagonal": fb.ScaleAndShiftDiagonalFB}
        ),
        "fully_connected_multi": MappingProxyType(
            {
                **_kronecker("kron_indep", fb.FullyConnectedMultiIndepFB),
                **_kronecker("kron_reduce", fb.FullyConnectedKFACReduceFB),
                "ekfac": fb.FullyConnectedEKFACFB,
                "kron_series_1": _sides(fb.FullyConnectedSeriesFB, option=1),
                "kron_series_2": _sides(fb.FullyConnectedSeriesFB, option=2),
            }
        ),
        "conv2d_multi": MappingProxyType(
            {
                "kron_indep": fb.ConvKFCBasicMultiIndepFB,
                "kron_reduce": fb.ConvKFCReduceFB,
                "ekfac": fb.ConvEKFACFB,
            }
        ),
        "embedding_multi": MappingProxyType(
            _embedding("kron_indep", fb.EmbeddingKFACMultiIndepFB)
        ),
        "attention": MappingProxyType(
            {
                "kron": fb.LinearMapFB,
                "ekfac": fb.LinearMapEKFACFB,
                "diagonal": _of_part(fb.NaiveDiagonalFB),
                "full": _of_part(fb.FullFB),
            }
        ),
        "recurrent": MappingProxyType(
            {
                **_kronecker("kron", fb.LinearMapFB),
                "ekfac": fb.LinearMapEKFACFB,
                "diagonal": _of_part(fb.NaiveDiagonalFB),
                "full": _of_part(fb.FullFB),
            }
        ),
    }
)
"""By kind of layer, the blocks it can have by the name of the approximation."""

DEFAULT_APPROXIMATIONS: Mapping[str, str] = MappingProxyType(
    {
        "generic": "diagonal",
        "fully_connected": "kron",
        "conv2d": "kron",
        "conv_transpose": "kron",
        "depthwise_conv2d": "kron",
        "embedding": "kron",
        "embedding_bag": "kron",
        "tied_embedding": "kron",
        "bilinear": "kron",
        "scale_and_shift": "full",
        "fully_connected_multi": "kron_indep",
        "conv2d_multi": "kron_indep",
        "embedding_multi": "kron_indep",
        "attention": "kron",
        "recurrent": "kron",
    }
)


def takes_size_limit(kind: str, approx: str) -> bool:
    """Whether a block has sides that may be too large.

    Not so of a diagonal, of what is asked for whole by name (but for the default of scale
    and shift), and of a chain over time, which needs whole matrices.
    """
    kronecker = approx.startswith(("kron", "ekfac")) and "series" not in approx
    return kronecker or (kind, approx) == ("scale_and_shift", "full")


class _Default:
    """The default of one kind, to be read."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __get__(self, owner: DefaultApproximations, _: type | None = None) -> str:
        return owner.default_approximation(self._kind)

    def __set__(self, owner: DefaultApproximations, value: str) -> None:
        name = f"set_default_{self._kind}_approximation"
        raise AttributeError(f"expected a call of {name}({value!r})")


class _SetDefault:
    """The method that sets the default of one kind."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __get__(
        self, owner: DefaultApproximations, _: type | None = None
    ) -> Callable[[str], None]:
        return partial(owner.set_default_approximation, self._kind)


class DefaultApproximations:
    """What layers of a kind are registered with where nothing is said.

    Besides `default_approximation(kind)` and `set_default_approximation(kind, approx)`
    there are the names of `tf.contrib.kfac` for every kind, `default_conv2d_approximation`
    (which can be read) and `set_default_conv2d_approximation(approx)`.
    """

    def __init__(self) -> None:
        self._defaults = dict(DEFAULT_APPROXIMATIONS)

    def default_approximation(self, kind: str) -> str:
        """Return the approximation of a kind of layer, a key of `APPROXIMATIONS`."""
        check_choice("kind", kind, tuple(APPROXIMATIONS))
        return self._defaults[kind]

    def set_default_approximation(self, kind: str, approx: str) -> None:
        """Set the approximation of layers of a kind that are registered from now on.

        Raises:
            ValueError: an unknown kind, or an approximation that it does not have.

        >>> defaults = DefaultApproximations()
        >>> defaults.set_default_fully_connected_approximation("diagonal")
        >>> defaults.default_fully_connected_approximation
        'diagonal'
        >>> defaults.set_default_approximation("fully_connected", "tridiagonal")
        Traceback (most recent call last):
        ValueError: fully_connected: approx: expected one of ('kron', ...), got ...
        """
        check_choice("kind", kind, tuple(APPROXIMATIONS))
        check_choice(f"{kind}: approx", approx, tuple(APPROXIMATIONS[kind]))
        self._defaults[kind] = approx

    default_generic_approximation = _Default("generic")
    default_fully_connected_approximation = _Default("fully_connected")
    default_conv2d_approximation = _Default("conv2d")
    default_conv_transpose_approximation = _Default("conv_transpose")
    default_depthwise_conv2d_approximation = _Default("depthwise_conv2d")
    default_embedding_approximation = _Default("embedding")
    default_embedding_bag_approximation = _Default("embedding_bag")
    default_tied_embedding_approximation = _Default("tied_embedding")
    default_bilinear_approximation = _Default("bilinear")
    default_scale_and_shift_approximation = _Default("scale_and_shift")
    default_fully_connected_multi_approximation = _Default("fully_connected_multi")
    default_conv2d_multi_approximation = _Default("conv2d_multi")
    default_embedding_multi_approximation = _Default("embedding_multi")
    default_attention_approximation = _Default("attention")
    default_recurrent_approximation = _Default("recurrent")
    set_default_generic_approximation = _SetDefault("generic")
    set_default_fully_connected_approximation = _SetDefault("fully_connected")
    set_default_conv2d_approximation = _SetDefault("conv2d")
    set_default_conv_transpose_approximation = _SetDefault("conv_transpose")
    set_default_depthwise_conv2d_approximation = _SetDefault("depthwise_conv2d")
    set_default_embedding_approximation = _SetDefault("embedding")
    set_default_embedding_bag_approximation = _SetDefault("embedding_bag")
    set_default_tied_embedding_approximation = _SetDefault("tied_embedding")
    set_default_bilinear_approximation = _SetDefault("bilinear")
    set_default_scale_and_shift_approximation = _SetDefault("scale_and_shift")
    set_default_fully_connected_multi_approximation = _SetDefault("fully_connected_multi")
    set_default_conv2d_multi_approximation = _SetDefault("conv2d_multi")
    set_default_embedding_multi_approximation = _SetDefault("embedding_multi")
    set_default_attention_approximation = _SetDefault("attention")
    set_default_recurrent_approximation = _SetDefault("recurrent")
