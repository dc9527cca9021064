"""Registration of layers that compute several linear maps in one: all maps, or none.

A module becomes a block for each map inside it that has a trained weight, named after
the module and the part: `encoder.in_proj`, `lstm.hh_l0`. Left out: parameters of no map
(`bias_k`, `bias_v`), and a bias whose weight is frozen; `register_generic` is for them.
"""

from __future__ import annotations

import abc

from torch import nn

from .approximations import APPROXIMATIONS, takes_size_limit
from .fisher_blocks import FisherBlock, linear_parts
from .fisher_factors import FactorOptions
from .fisher_factors.base import check_choice
from .registration import FUSED
from .size_limit import SizeLimit


class FusedRegistration(abc.ABC):
    """What a layer collection has for attention and recurrent layers (abstract)."""

    model: nn.Module
    blocks: dict[str, FisherBlock]
    _options: FactorOptions
    _size_limit: SizeLimit | None
    _module_names: dict[int, str]
    _uses: dict[str, int | None]
    _linked: dict[frozenset[int], str | None]

    @abc.abstractmethod
    def register_block(self, block: FisherBlock, num_uses: int | None = None) -> None:
        """Register any block."""

    @abc.abstractmethod
    def _choose(
        self, kind: str, approx: str | None, params: frozenset[int], name: str
    ) -> str:
        """Return the name of an approximation that the kind has."""

    def register_multihead_attention(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register the projections of an `nn.MultiheadAttention`, called once or more.

        The blocks are `name.in_proj` (or `name.q_proj`, `.k_proj`, `.v_proj` and
        `.in_proj_bias`, where keys or values have a size of their own) and
        `name.out_proj`. Not among them: the `bias_k` and `bias_v` of `add_bias_kv`.

        Args:
            module: the layer.
            approx: of each, `"kron"` or `"ekfac"`; or as of generic blocks `"diagonal"` or
                `"full"`.
            name: of the layer; that in the model if None.

        Raises:
            TypeError: another module.
            ValueError: as `register_block`, or an unknown approximation; then no block is
                registered.
        """
        self._register_fused("attention", module, approx, name)

    def register_recurrent(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register an `nn.RNN`, `nn.LSTM`, `nn.GRU` or a cell, called once or more.

        The blocks are `name.ih_l0` and `name.hh_l0` (and `name.hr_l0` with `proj_size`)
        for every layer and direction, of a cell `name.ih` and `name.hh`: each with its
        bias, over all gates.

        Args:
            module: the layer.
            approx: of each, `"kron"`, with diagonal sides `"kron_in_diag"`,
                `"kron_out_diag"`, `"kron_both_diag"`, `"ekfac"`; or as of generic blocks
                `"diagonal"` or `"full"`.
            name: of the layer; that in the model if None.

        Raises:
            TypeError: another module.
            ValueError: as `register_block`, or an unknown approximation; then no block is
                registered.
        """
        self._register_fused("recurrent", module, approx, name)

    def _register_fused(
        self, kind: str, module: nn.Module, approx: str | None, name: str | None
    ) -> None:
        known = self._module_names.get(id(module))
        name = name or known or ("model" if known == "" else kind)
        if not isinstance(module, FUSED[kind]):
            names = " or ".join(cls.__name__ for cls in FUSED[kind])
            raise TypeError(f"layer {name}: expected {names}, got {module}")
        if known is None:
            raise ValueError(
                f"{name}: expected a module of {type(self.model).__name__}, the model of "
                f"this collection, got {module!r}"
            )
        if approx is not None:
            check_choice(f"layer {name}: approx", approx, tuple(APPROXIMATIONS[kind]))
        parts = linear_parts(module)
        if not parts:
            raise ValueError(f"layer {name}: expected a trained weight, got none: {module}")
        before = dict(self.blocks)
        try:
            for part in parts:
                own = f"{name}.{part.name}"
                chosen = self._choose(kind, approx, frozenset(map(id, part.params)), own)
                limited = self._size_limit is not None and takes_size_limit(kind, chosen)
                kwargs = {"size_limit": self._size_limit} if limited else {}
                make = APPROXIMATIONS[kind][chosen]
                self.register_block(make(part, module, own, self._options, **kwargs))
        except (TypeError, ValueError):
            for added in self.blocks.keys() - before.keys():
                del self.blocks[added], self._uses[added]
            raise
