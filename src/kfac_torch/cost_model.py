"""What a step costs, in multiply-adds, and the intervals at which K-FAC's part is small.

Notation: of a layer with the weight `W [n, m]`, used on `R` rows (examples times locations
or tokens): `c_f` the forward, `c_p` the product `F̂⁻¹ g`, `c_s` the statistics of one
example in `k`, `c_r` a refresh of its inverses:

    c_f = R n m,    c_p = n m (n + m),    c_r = ρ(n) n³ + ρ(m) m³
    c_s = (2 c_f + R (n² + m²))/k + u (n² + m²)

with `ρ` the time of a multiply-add of an inverse (of an eigendecomposition) in units of
that of a product of large matrices, and `u` that of an entry of a factor, however few the
rows. Summed over layers, each of which takes `o` in a step whatever its size, and the step
`o₀`, the intervals are the least of

    τ_r >= c_r/(ς_r C),    τ_s >= c_s/(ς_s C),    C = 3 c_f + c_m + c_p + o + o₀

that are not below what suits small nets. Backwards are two forwards; statistics that are
taken as the user's backward comes by (`k = 1`) have no forward of their own. `C` has the
product, since a step cannot do without, and `c_m`, the quadratic model of one example in
`k_m`: `5 c_f/k_m`, of a forward and two for each of two directions.

Decisions are of shapes alone, never of a clock, so that a run can be repeated. `ρ`, `u`,
`o` and `o₀` were measured once, on a processor:

    OMP_NUM_THREADS=1 python benchmarks/cost_model.py

Left out: layers without a block (which only make `C` larger), that
moments of patches take less than `R m²` by `patch_lags.py`, the many sources of the
`"exact"` mode, and accelerators, which factorise slower than `ρ` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .capture import LayerCall
from .fisher_blocks import FisherBlock
from .fisher_blocks.conv_transpose import ConvTransposeFB
from .fisher_factors.eigen_scales import EigenScaleFactor
from .fisher_factors.inverse_providing import InverseProvidingFactor

REFRESH_SHARE = 0.25
STATISTICS_SHARE = 1 / 3
MOST_STEPS = 100

# Sizes, and the time of a multiply-add of `refresh_cost` there, in units of that of a
# product of large matrices.
_SIZES = (64, 128, 256, 512, 1024, 2048)
_INVERSE = (48.0, 14.0, 4.5, 2.3, 1.4, 0.94)
_DECOMPOSITION = (12.0, 4.3, 2.1, 1.1, 0.84, 0.71)
_ENTRY = 200.0  # `u`, of 256 rows and more
_LAYER = 1.2e7  # `o`
_STEP = 6.3e7  # `o₀`
_MODEL = 5.0  # forwards


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """How often statistics are taken and inverses refreshed, after the first steps.

    Args:
        statistics: steps between two of them.
        inverses: steps between refreshes of a layer.
        statistics_share: of the rest of a step that statistics take on average, by the
            cost model; None before the first batch, or where no interval is left to it.
        refresh_share: that refreshes take.
    """

    statistics: int
    inverses: int
    statistics_share: float | None = None
    refresh_share: float | None = None

    def __str__(self) -> str:
        """Say both in words."""
        words = f"statistics every {self.statistics} steps, inverses every {self.inverses}"
        if self.statistics_share is None or self.refresh_share is None:
            return words
        shares = (round(100 * s) for s in (self.statistics_share, self.refresh_share))
        return "{}: about {} % and {} % of the rest of a step".format(words, *shares)


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """What parts of a step take, in multiply-adds of a large product.

    Args:
        rest: `C`: what every step has to do.
        statistics: `c_s`.
        refresh: `c_r`, of all inverses.

    >>> costs = StepCosts(rest=100.0, statistics=90.0, refresh=1000.0)
    >>> costs.amortised(Intervals(statistics=3, inverses=6), {"statistics", "inverses"})
    Intervals(statistics=3, inverses=42, statistics_share=0.3, refresh_share=0.238...)
    """

    rest: float
    statistics: float
    refresh: float

    def amortised(self, least: Intervals, free: Iterable[str]) -> Intervals:
        """Return intervals at which both parts are small.

        Args:
            least: none is shorter.
            free: names of those that may be longer. A longer one of inverses is a multiple
                of that of statistics, so that every refresh is of new ones.
        """
        taus = {"statistics": least.statistics, "inverses": least.inverses}
        if "statistics" in free:
            taus["statistics"] = _steps(
                self.statistics / self.rest / STATISTICS_SHARE, least.statistics
            )
        if "inverses" in free:
            tau = _steps(self.refresh / self.rest / REFRESH_SHARE, least.inverses)
            tau = max(tau, taus["statistics"])
            if tau > least.inverses:
                tau = _multiple(tau, taus["statistics"])
            taus["inverses"] = tau
        return Intervals(
            **taus,
            statistics_share=self.statistics / (taus["statistics"] * self.rest),
            refresh_share=self.refresh / (taus["inverses"] * self.rest),
        )


def _steps(least: float, at_least: int) -> int:
    return max(at_least, min(math.ceil(least), MOST_STEPS))


def _multiple(steps: int, of: int) -> int:
    """The next multiple, or the last one that is not above the limit."""
    up = -(-steps // of) * of
    return up if up <= max(MOST_STEPS, of) else up - of


def step_costs(
    blocks: Iterable[FisherBlock],
    forward: float,
    stride: int | None,
    passes: int = 1,
    model_stride: int | None = None,
    basis_every: int = 1,
) -> StepCosts:
    """Return what the parts of a step take.

    Args:
        blocks: those that have statistics count, with the rows of the last batch.
        forward: `c_f` of all layers: see `forward_cost`.
        stride: `k`.
        passes: of statistics through `1/k` of the batch: a backward to the layers, maybe
            after a forward of their own; none where the user's gradients make them.
        model_stride: `k_m`; None without a quadratic model.
        basis_every: refreshes until a layer of EKFAC decomposes.
    """
    ready = [block for block in blocks if block.last_rows is not None]
    factors = [factor for block in ready for factor in block.factors]
    k = stride or 1
    moments = sum(f.moment_cost(b.last_rows or 0) for b in ready for f in b.factors)
    entries = _ENTRY * sum(math.prod(factor.kept_shapes[0]) for factor in factors)
    model = _MODEL * forward / model_stride if model_stride else 0.0
    return StepCosts(
        rest=3 * forward
        + model
        + sum(map(_product_cost, ready))
        + _LAYER * len(ready)
        + _STEP,
        statistics=(passes * forward + moments) / k + entries,
        refresh=sum(_refresh_cost(factor, basis_every) for factor in factors),
    )


def forward_cost(calls: Sequence[LayerCall], blocks: Mapping[str, FisherBlock]) -> float:
    """Return `c_f`: how many multiply-adds the calls of layers took."""
    return sum(_call_cost(call, blocks[call.layer]) for call in calls)


def _call_cost(call: LayerCall, block: FisherBlock) -> float:
    a, weight = call.input, block.params[0]
    if a.layout != torch.strided or not a.is_floating_point():
        return 0  # rows of a table that are looked up
    # The weight is [out, ...] of most layers, [in, ...] of some.
    by_input = isinstance(block, ConvTransposeFB) or getattr(block, "transposed", False)
    size = a.numel() if by_input else call.output_shape.numel()
    return size * weight.numel() / len(weight)


def _product_cost(block: FisherBlock) -> float:
    """`c_p` of a block: each entry of a gradient meets a row of every factor's matrix."""
    sizes = [f._matrix_shape[-1] for f in block.factors if _has_matrix(f)]
    in_basis = any(isinstance(factor, EigenScaleFactor) for factor in block.factors)
    return (2 if in_basis else 1) * sum(sizes) * sum(p.numel() for p in block.params)


def _has_matrix(factor: Any) -> bool:
    return isinstance(factor, InverseProvidingFactor)


def _refresh_cost(factor: Any, basis_every: int) -> float:
    in_basis = isinstance(factor, EigenScaleFactor)
    decomposed = in_basis or (_has_matrix(factor) and factor.uses_eigendecomp())
    rates = _DECOMPOSITION if decomposed else _INVERSE
    cost = factor.refresh_cost * _at(max(factor.kept_shapes[0][-2:]), rates)
    return cost / basis_every if in_basis else cost


def _at(size: int, rates: Sequence[float]) -> float:
    """A rate at a size: linear in the logarithms, constant beyond the ends.

    >>> _at(1, (8.0, 4.0, 2.0, 1.0, 1.0, 1.0)), _at(256, (8.0, 4.0, 2.0, 1.0, 1.0, 1.0))
    (8.0, 2.0)
    """
    place = math.log2(min(max(size, _SIZES[0]), _SIZES[-1]) / _SIZES[0])
    i = min(int(place), len(_SIZES) - 2)
    return rates[i] * (rates[i + 1] / rates[i]) ** (place - i)
