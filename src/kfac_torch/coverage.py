"""`CoverageReport`: what K-FAC does with every parameter of a model, as a table.

Notation: `R` the rows of a layer in a batch, `n` the size of a factor's matrix. A row has
what is kept (the factors, and what is registered of them: an inverse each) and about how
many multiply-adds the two regular jobs take: the factors' moments of one source of
gradients, some `n²` per row, and a refresh, some `n³` per matrix. All of it is read off
the factors, which know it by their shapes, so that nothing large is made to say that it
would be. Left out: time, what a further backward to the layer outputs costs, and rows of
"exact" statistics, which have one source for each output coordinate.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from .capture import uncompiled
from .fisher_blocks import (
    EigenKroneckerFB,
    FisherBlock,
    FullyConnectedSeriesFB,
    KroneckerProductFB,
)
from .fisher_blocks.reduce import ReduceFB
from .fisher_factors import DiagonalFactor, FisherFactor, InverseProvidingFactor
from .use_count import UseWatch

MAX_SIDE = 4096
"""A whole matrix of more features is called large."""
MAX_RATIO = 8
"""So is a factor that takes more times the memory of the model's parameters..."""
SMALL = 64 * 2**20
"""... unless it has no more bytes than this."""
WIDTH = 110
"""Of the table, in characters."""

_OPTIMIZER = "the optimizer"
_FROZEN = "nothing: frozen"
_HEAD = ("layer", "block", "factors", "share", "memory", "mult-adds", "refresh")
_CAPS = (24, 18, 22, 6, 9, 11, 8)  # the widths of the columns
_NORMS = ("LayerNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "RMSNorm")


@dataclass(frozen=True)
class LayerReport:
    """Parameters that have a block.

    Args:
        name: of the block.
        block: the approximation in words.
        factors: how each is kept, and its size.
        num_params: of the block.
        share: of all of the model's parameters.
        nbytes: of the factors and what is kept of them, once refreshed.
        row_cost: multiply-adds of a row's share in the moments of one source.
        batch_cost: of the last batch; None before there was one.
        refresh_cost: multiply-adds of a refresh of what is kept.
        uses: of its parameters, in the graph that the first backward went through; None
            before.
        calls: of the layer that were recorded there; None before, and for a block that
            needs none.
        notes: what is amiss, and what to do.
    """

    name: str
    block: str
    factors: tuple[str, ...]
    num_params: int
    share: float
    nbytes: int
    row_cost: float
    batch_cost: float | None
    refresh_cost: int
    uses: int | None
    calls: int | None
    notes: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        per_batch = self.batch_cost is not None
        cost = self.batch_cost if self.batch_cost is not None else self.row_cost
        return (
            self.name,
            self.block,
            ", ".join(self.factors),
            f"{self.share:.1%}",
            in_bytes(self.nbytes),
            f"{in_short(cost)}{'/batch' if per_batch else '/row'}",
            in_short(self.refresh_cost),
        )


@dataclass(frozen=True)
class OtherReport:
    """A parameter that has no block.

    Args:
        name: of the parameter.
        shape: of it.
        num_params: its entries.
        share: of all of the model's parameters.
        trained: whether it is not frozen.
        reason: why it has no block.
        updated_by: what updates it.
        notes: what is amiss.
    """

    name: str
    shape: tuple[int, ...]
    num_params: int
    share: float
    trained: bool
    reason: str
    updated_by: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CoverageReport:
    """What K-FAC does with every parameter of a model; prints as a table.

    Args:
        rows: in the model's order.
        num_params: of the model.
        num_trained: of them, those that are not frozen.
        model_nbytes: of the model's parameters.
        adamw_nbytes: two numbers for each that is trained: the state of AdamW.
        notes: what is amiss with all of it.
    """

    rows: tuple[LayerReport | OtherReport, ...]
    num_params: int
    num_trained: int
    model_nbytes: int
    adamw_nbytes: int
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> list[LayerReport]:
        """The rows of parameters that have a block."""
        return [row for row in self.rows if isinstance(row, LayerReport)]

    @property
    def others(self) -> list[OtherReport]:
        """The rows of parameters that have none."""
        return [row for row in self.rows if isinstance(row, OtherReport)]

    @property
    def covered(self) -> float:
        """The share of trained parameters that have a block."""
        return sum(row.num_params for row in self.layers) / max(1, self.num_trained)

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return sum(row.nbytes for row in self.layers)

    @property
    def row_cost(self) -> float:
        """Of all blocks, with one row each."""
        return sum(row.row_cost for row in self.layers)

    @property
    def batch_cost(self) -> float | None:
        """Of all blocks that had a batch; None before there was one."""
        costs = [row.batch_cost for row in self.layers if row.batch_cost is not None]
        return sum(costs) if costs else None

    @property
    def refresh_cost(self) -> int:
        """Of all blocks."""
        return sum(row.refresh_cost for row in self.layers)

    def __getitem__(self, name: str) -> LayerReport | OtherReport:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name}: expected one of {[row.name for row in self.rows]}")

    def __str__(self) -> str:
        lines = [*_table_row(_HEAD)]
        for row in self.rows:
            if isinstance(row, LayerReport):
                lines += _table_row(row.cells())
            else:
                lines += _other_row(row)
            for note in row.notes:
                lines += _wrapped(note, "  ! ")
        return "\n".join([*lines, *self._totals()])

    def _totals(self) -> Iterator[str]:
        yield from _wrapped(
            f"{_share(self.covered)} of {in_short(self.num_trained)} trained parameters "
            f"have a block. Memory: {in_bytes(self.nbytes)} of factors; the model has "
            f"{in_bytes(self.model_nbytes)}, AdamW's state would have "
            f"{in_bytes(self.adamw_nbytes)}."
        )
        batch = self.batch_cost
        moments = (
            f"{in_short(self.row_cost)} with one row for each layer"
            if batch is None
            else f"{in_short(batch)} of the last batch"
        )
        yield from _wrapped(
            f"Multiply-adds, about: the factors' statistics {moments}, besides a backward "
            f"to the layers; a refresh of all inverses {in_short(self.refresh_cost)}."
        )
        for note in self.notes:
            yield from _wrapped(note, "! ")


def coverage_report(
    model: nn.Module,
    blocks: Mapping[str, FisherBlock],
    use_watch: UseWatch,
    others: Mapping[str, str],
    reasons: Mapping[str, str] | None = None,
) -> CoverageReport:
    """Say what becomes of every parameter of `model`.

    Args:
        model: the root module.
        blocks: by name.
        use_watch: what the first backward showed, if there was one.
        others: by name, what updates a parameter without a block.
        reasons: by name of a parameter or of a module, why there is no block for it.
    """
    params = dict(model.named_parameters())
    total = sum(p.numel() for p in params.values())
    nbytes = sum(p.nbytes for p in params.values())
    trained = [p for p in params.values() if p.requires_grad]
    owners = {id(p): block for block in blocks.values() for p in block.params}
    modules = _owners(model)
    rows: list[LayerReport | OtherReport] = []
    done: set[str] = set()
    for name, param in params.items():
        block = owners.get(id(param))
        if block is None:
            reason = _reason(name, param, modules[id(param)], reasons or {})
            by = others.get(name, _OPTIMIZER) if param.requires_grad else _FROZEN
            unused = use_watch.uses([param]) == 0 and param.requires_grad
            rows.append(
                OtherReport(
                    name,
                    tuple(param.shape),
                    param.numel(),
                    param.numel() / total,
                    param.requires_grad,
                    reason,
                    by,
                    (_UNUSED,) if unused else (),
                )
            )
        elif block.name not in done:
            done.add(block.name)
            rows.append(_layer(block, use_watch, total, nbytes))
    notes = (_DIFFERENTIATED,) if use_watch.differentiated else ()
    return CoverageReport(
        tuple(rows),
        total,
        sum(p.numel() for p in trained),
        nbytes,
        2 * sum(p.nbytes for p in trained),
        notes,
    )


class Registered(Protocol):
    """What is known of a model's registration."""

    model: nn.Module
    blocks: dict[str, FisherBlock]
    use_watch: UseWatch
    left_alone: dict[str, str]

    def is_excluded(self, param: Tensor) -> bool:
        """Whether a parameter is another optimizer's."""
        ...

    def plain_rule(self, param: Tensor) -> str:
        """Return the rule that moves a parameter while it has no block."""
        ...


class Reports:
    """The method `report` of a collection of layers."""

    def report(self: Registered) -> CoverageReport:
        """Return what K-FAC does with every parameter of the model; prints as a table.

        Known before any forward, and without making a factor. Once a backward has been
        seen, also where a layer's parameters are used beside its calls.
        """
        model = uncompiled(self.model)
        names = dict(model.named_parameters())
        excluded = [name for name, p in names.items() if self.is_excluded(p)]
        others = {name: _RULES[self.plain_rule(p)] for name, p in names.items()}
        others |= dict.fromkeys(excluded, "another optimizer")
        reasons = self.left_alone | dict.fromkeys(excluded, "excluded")
        return coverage_report(model, self.blocks, self.use_watch, others, reasons)


_RULES = MappingProxyType({"adamw": "AdamW", "sgd": "plain momentum"})
_UNUSED = "the network output of the first backward did not depend on it"
_NOT_CORRECTED = (
    'approx="ekfac" needs whole sides, and one is above the size limit: the block is that '
    'of "kron"; a larger max_size of the SizeLimit makes it EKFAC\'s'
)
_DIFFERENTIATED = (
    "the network is differentiated inside its own loss (create_graph=True): the factors "
    "are of the output, not of its derivatives"
)


def _layer(
    block: FisherBlock, use_watch: UseWatch, total: int, model_nbytes: int
) -> LayerReport:
    factors = block.planned_factors()
    num_params = sum(param.numel() for param in block.params)
    rows = block.last_rows
    uses, calls = use_watch.uses(block.params), use_watch.calls(block)
    missed = use_watch.missed(block)
    notes = [
        note
        for side, factor in enumerate(factors)
        if (note := _advice(block, side, factor, model_nbytes)) is not None
    ]
    if missed and uses is not None and calls is not None:
        notes.append(
            f"used {_times(uses)} in the graph, seen {_times(calls)}: the factors miss "
            f"{missed}; call the layer itself, or register it with register_generic"
        )
    if isinstance(block, EigenKroneckerFB) and len(factors) == 2:
        notes.append(_NOT_CORRECTED)
    if uses == 0:
        notes.append(_UNUSED)
    return LayerReport(
        name=block.name,
        block=_in_words(block, factors),
        factors=tuple(factor.describe() for factor in factors),
        num_params=num_params,
        share=num_params / total,
        nbytes=sum(factor.nbytes for factor in factors),
        row_cost=sum(factor.moment_cost(1) for factor in factors),
        batch_cost=None if rows is None else sum(f.moment_cost(rows) for f in factors),
        refresh_cost=sum(factor.refresh_cost for factor in factors),
        uses=uses,
        calls=calls,
        notes=tuple(notes),
    )


def _in_words(block: FisherBlock, factors: Sequence[FisherFactor]) -> str:
    if isinstance(block, FullyConnectedSeriesFB):
        return "chain over time"
    if isinstance(block, ReduceFB):
        return "Kronecker, reduced"
    if isinstance(block, EigenKroneckerFB) and len(factors) == 3:
        return "Kronecker, eigenvalues corrected"
    if len(factors) > 1:
        return "Kronecker"
    kind = "diagonal" if isinstance(factors[0], DiagonalFactor) else "full"
    # Of the gradient of all examples together, or of each.
    return f"{kind}, generic" if block.needs_param_grads else kind


def _advice(
    block: FisherBlock, side: int, factor: FisherFactor, model_nbytes: int
) -> str | None:
    """What to do about a factor that is too large; None where it is not."""
    if not isinstance(factor, InverseProvidingFactor):
        return None
    shapes = factor.kept_shapes
    widest = max((s[-1] for s in shapes if len(s) > 1 and s[-1] == s[-2]), default=0)
    nbytes = factor.nbytes
    if widest > MAX_SIDE:
        large = f"a matrix of {widest} x {widest}, {in_bytes(nbytes)} in all"
    elif nbytes > max(SMALL, MAX_RATIO * model_nbytes):
        large = f"{in_bytes(nbytes)}, {nbytes / model_nbytes:.0f} times the model"
    else:
        return None
    return f"{factor.name} is large, {large}: {_remedy(block, side)}"


def _remedy(block: FisherBlock, side: int) -> str:
    module: Any = block.modules[0] if block.modules else None
    limit = (
        "LayerCollection(model, size_limit=SizeLimit(1024)) cuts it into blocks, "
        'above="diagonal" or "low_rank" make it smaller still'
    )
    if isinstance(block, FullyConnectedSeriesFB):
        return f'register it with approx="kron_indep", then {limit}'
    if not isinstance(block, KroneckerProductFB):
        return 'register it with approx="diagonal"'
    if block.size_limit is not None:
        return "a smaller max_size (or rank) of its SizeLimit makes it smaller"
    if isinstance(module, nn.Linear | nn.Embedding):
        which = "kron_in_diag" if side == 0 else "kron_out_diag"
        return f'{limit}; approx="{which}" keeps the diagonal of this layer\'s side'
    return limit


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """By id of a parameter, the modules that have it themselves, and their names."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append((name, module))
    return owners


def _reason(
    name: str,
    param: Tensor,
    owners: Sequence[tuple[str, nn.Module]],
    reasons: Mapping[str, str],
) -> str:
    """Why a parameter has no block."""
    if not param.requires_grad:
        return "frozen"
    for known in (name, *(owner for owner, _ in owners)):
        if known in reasons:
            return reasons[known]
    kinds = [type(module).__name__ for _, module in owners]
    if len(owners) > 1:
        sharing = [f"{n or 'model'} ({k})" for (n, _), k in zip(owners, kinds, strict=True)]
        return f"shared by {' and '.join(sharing)}, with no block for both"
    module, kind = owners[0][1], kinds[0]
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return "a bare parameter"
    if not type(module).__module__.startswith("torch.nn."):
        return f"a parameter of {kind} itself"
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and not weight.requires_grad:
        return f"the weight of its {kind} is frozen"
    if kind.startswith(_NORMS):
        return f"{kind}: not registered; see register_scale_and_shift"
    return f"{kind}: not registered"


# The table.


def _table_row(cells: Sequence[str]) -> Iterator[str]:
    """The lines of a row; words and long names go on below."""
    columns = [_cell(cell, width) for cell, width in zip(cells, _CAPS, strict=True)]
    for i in range(max(map(len, columns))):
        line = [column[i] if i < len(column) else "" for column in columns]
        texts = [cell.ljust(w) for cell, w in zip(line[:3], _CAPS[:3], strict=True)]
        numbers = [cell.rjust(w) for cell, w in zip(line[3:], _CAPS[3:], strict=True)]
        yield "  ".join([*texts, *numbers]).rstrip()


def _cell(text: str, width: int) -> list[str]:
    if len(text) > width:
        text = text.replace(", ", ",\n")  # one factor a line
    lines: list[str] = []
    for part in text.split("\n"):
        lines += textwrap.wrap(part, width, break_on_hyphens=False) or [""]
    return lines


def _other_row(row: OtherReport) -> Iterator[str]:
    shape = "x".join(map(str, row.shape)) or "scalar"
    what = f"no block {shape}"
    cells = (row.name, what, "", f"{row.share:.1%}", "", "", "")
    lines = list(_table_row(cells))
    why = f"{row.reason}; updated by {row.updated_by}" if row.trained else row.updated_by
    yield from lines
    yield from _wrapped(why, "    ")


def _wrapped(text: str, first: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
    )


def in_short(number: float) -> str:
    """Return a number in three digits.

    >>> [in_short(n) for n in (950, 1234, 25_600_000, 3e13)]
    ['950', '1.23k', '25.6M', '30.0T']
    """
    return _scaled(number, 1000, ("", "k", "M", "G", "T", "P", "E"))


def in_bytes(number: int) -> str:
    """Return a number of bytes in three digits.

    >>> in_bytes(4096), in_bytes(3 * 2**29)
    ('4.00 KiB', '1.50 GiB')
    """
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / base, power + 1
    digits = 0 if power == 0 else max(0, 2 - int(math.log10(max(number, 1))))
    return f"{number:.{digits}f}{units[power]}"


def _share(part: float) -> str:
    """A share that is 100% only where it is all."""
    return f"{math.floor(1000 * part + 1e-9) / 10}%"


def _times(number: int) -> str:
    return f"{number} time" if number == 1 else f"{number} times"
