"""`check_curvature`: every block of a model beside the exact one, on a small batch.

Notation: `F` the exact block of the Fisher (the Gauss-Newton matrix) of the mean loss,
`K` what a layer's block makes of it, undamped; errors are `|K − F|/|F|`, cosines
`⟨K, F⟩/(|K||F|)`, ratios of traces `tr K/tr F`, all of Frobenius. Whether theory expects
`K = F` is read off the batch (`row_facts`): Martens & Grosse 2015 (arXiv 1503.05671),
section 3; Grosse & Martens 2016 (arXiv 1602.01407), Theorem 1; Eschenhagen et al. 2023
(arXiv 2311.00636). Left out: damping and moving averages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, LayerCall, random_state, set_random_state
from .estimator import FisherEstimator
from .exact_blocks import BlockSums, Comparison, ExactBlocks, Sources
from .fisher_blocks import EigenKroneckerFB, FisherBlock
from .layer_collection import LayerCollection
from .loss_collection import Output
from .loss_functions import LossFactory
from .row_facts import RowFacts, expectation, has_rows
from .sources import block_layer

_SAME_DIRECTION = 1e-3  # of 1 − cosine: what is wrong is the scale alone


@dataclass(frozen=True)
class BlockCheck:
    """One block beside the exact one; None is what cannot be compared.

    Args:
        name: of the layer.
        block: the type of its block.
        parameters: their number.
        error: `|K − F|/|F|`.
        cosine: `⟨K, F⟩/(|K||F|)`.
        trace_ratio: `tr K/tr F`: the scale.
        expected_equal: whether theory says that the two are equal on this batch.
        reason: why, or why not.
        tolerance: the error up to which they are taken as equal: rounding. Larger where
            no matrix could be formed.
        verdict: `"equal"`; `"approximate"`, where nothing else is expected; `"wrong"`, or
            `"wrong scale"` where the two have the same direction; `"not compared"`.
    """

    name: str
    block: str
    parameters: int
    error: float | None
    cosine: float | None
    trace_ratio: float | None
    expected_equal: bool
    reason: str
    tolerance: float
    verdict: str


@dataclass(frozen=True)
class CurvatureCheck:
    """All blocks of a model beside the exact ones; prints as a table.

    Args:
        blocks: in the order of registration.
        num_terms: `N`, the loss terms of the batch.
        num_sources: the gradients that make the exact blocks.
    """

    blocks: tuple[BlockCheck, ...]
    num_terms: int
    num_sources: int

    @property
    def passed(self) -> bool:
        """Whether every block is equal to the exact one where theory says so."""
        return not any(row.verdict.startswith("wrong") for row in self.blocks)

    def __getitem__(self, name: str) -> BlockCheck:
        for row in self.blocks:
            if row.name == name:
                return row
        raise KeyError(f"{name}: expected one of {[row.name for row in self.blocks]}")

    def __str__(self) -> str:
        head = ["layer", "block", "size", "error", "cosine", "trace", "verdict"]
        rows = [[*head, "equal in theory?"]]
        for row in self.blocks:
            rows.append(
                [
                    row.name,
                    row.block,
                    str(row.parameters),
                    _number(row.error, ".1e"),
                    _number(row.cosine, ".4f"),
                    _number(row.trace_ratio, ".4f"),
                    row.verdict,
                    f"{'yes' if row.expected_equal else 'no'}: {row.reason}",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        title = (
            f"{len(self.blocks)} blocks beside the exact ones: {self.num_terms} loss "
            f"terms, {self.num_sources} sources"
        )
        return "\n".join([title, *lines])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def check_curvature(
    model: nn.Module,
    loss: str | nn.Module | LossFactory | None,
    batch: Any,
    *,
    layer_collection: LayerCollection | None = None,
    output: Output = None,
    dense_limit: int = 1500,
) -> CurvatureCheck:
    """Compare every block of a model with the exact one on a small batch.

    The blocks are those of `estimation_mode="exact"` on this batch alone, without damping;
    the exact ones come from the gradients of all outputs of every example, by autograd.
    That is one backward for each of them, vectorised: take a few examples. A model in
    `eval` mode is put in training mode; one in training mode keeps the modes of its
    parts. Modes, gradients, buffers and random state are left as they were.

    Args:
        model: the root module.
        loss: as `KFAC` takes it; None where `layer_collection` has losses.
        batch: what the model is called with: a tensor, a tuple of positional arguments or
            a dict of keyword arguments. Examples first, also in the network output.
        layer_collection: blocks, which no optimizer has yet; every supported layer if
            None. It can be given to an optimizer afterwards.
        output: as `KFAC` takes it.
        dense_limit: parameters of a block up to which matrices are formed. Beyond, norms
            and inner products come from products, which resolves smaller errors less.

    Raises:
        TypeError: a batch of another type.
        ValueError: no supported layer; not exactly one of `loss` and registered losses; a
            model that cannot be called with the batch; an output that is not found, or
            does not fit the loss, or has no gradient; NaN or Inf.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    >>> x = torch.randn(1, 3, dtype=torch.float64)
    >>> check = check_curvature(model, "categorical", x)
    >>> [(row.name, row.verdict, row.reason) for row in check.blocks]
    [('0', 'equal', 'there is one row'), ('2', 'equal', 'there is one row')]
    """
    layers, registered = _complete(layer_collection, model, loss, output)
    try:
        with _untouched(model) as restore:
            _try_call(model, batch, layers)
            restore()
            estimator = FisherEstimator(None, 0.0, 0.0, layers, (), "exact")
            try:
                _gather(estimator, model, batch)
                restore()
                if any(isinstance(b, EigenKroneckerFB) for b in layers.get_blocks()):
                    # A basis first, then the moments in it.
                    estimator.update_inverses()
                    _gather(estimator, model, batch)
                    restore()
                estimator.close()
                return _compare(model, batch, layers, dense_limit)
            finally:
                estimator.release()
    finally:
        if registered:
            layers.registered_losses.pop()


def _complete(
    layers: LayerCollection | None,
    model: nn.Module,
    loss: str | nn.Module | LossFactory | None,
    output: Output,
) -> tuple[LayerCollection, bool]:
    """A collection with layers and losses, and whether the loss is to be taken back."""
    if layers is None:
        layers = LayerCollection(model)
        layers.auto_register_layers()
    elif layers.model is not model:
        raise ValueError(
            "layer_collection: expected a collection of the model to be checked, got one "
            f"of another {type(layers.model).__name__}"
        )
    if not layers.blocks:
        raise ValueError(
            f"{type(model).__name__} has no layer that K-FAC supports: expected an "
            "nn.Linear, a convolution, an embedding, a normalisation or another layer of "
            "registration.KINDS with a trained weight, or blocks registered in "
            "layer_collection"
        )
    if (loss is None) == (not layers.registered_losses):
        given = "neither" if loss is None else "both"
        raise ValueError(
            "loss: expected either loss or losses registered in layer_collection, got "
            f"{given}"
        )
    if loss is not None:
        layers.register_loss_function(loss, output)
    return layers, loss is not None


# Forwards.


@contextmanager
def _untouched(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave a model as it was; yields what puts buffers and random state back."""
    device = next(model.parameters()).device
    modules = list(model.modules())
    modes = [module.training for module in modules]
    grads = [(param, param.grad) for param in model.parameters()]
    before = random_state(device)
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    @torch.no_grad()
    def restore() -> None:
        for module, name, buffer, copy in buffers:
            if module._buffers.get(name) is not buffer or not torch.equal(buffer, copy):
                module._buffers[name] = buffer.copy_(copy)
        set_random_state(before, device)

    try:
        if not model.training:
            model.train()
        with torch.enable_grad():
            yield restore
    finally:
        restore()
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for param, grad in grads:
            param.grad = grad


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _try_call(model: nn.Module, batch: Any, layers: LayerCollection) -> None:
    """Say what is wrong with the batch or the output, before anything else is begun."""
    if not isinstance(batch, Tensor | tuple | Mapping):
        raise TypeError(
            "batch: expected what the model is called with: a tensor, a tuple of "
            f"positional arguments or a dict of keyword arguments, got {_describe(batch)}"
        )
    try:
        returned = _call(model, batch)
    except Exception as error:
        raise ValueError(
            f"batch: the model cannot be called with {_describe(batch)}: {error}; expected "
            "a tensor, a tuple of positional arguments or a dict of keyword arguments "
            "that it can be called with"
        ) from error
    outputs = [z for _, z in layers.network_outputs(returned)]
    if not any(z.requires_grad for z in outputs):
        raise ValueError(
            "the network output does not depend on any trained parameter: expected a "
            "model whose output has a gradient"
        )
    layers.losses(returned)


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        parts = ", ".join(f"{name}={_describe(value)}" for name, value in batch.items())
        return f"a dict of {parts}"
    if isinstance(batch, tuple):
        return f"a tuple of {', '.join(map(_describe, batch))}"
    return f"a {type(batch).__name__}"


def _gather(estimator: FisherEstimator, model: nn.Module, batch: Any) -> None:
    _call(model, batch)
    bad = estimator.update_covariances()
    if bad:
        raise ValueError(f"batch: NaN or Inf in {', '.join(bad)}; expected finite values")


def _compare(
    model: nn.Module, batch: Any, layers: LayerCollection, dense_limit: int
) -> CurvatureCheck:
    sums: dict[str, BlockSums] = {}
    problems: dict[str, str] = {}
    for name, block in layers.blocks.items():
        try:
            if block.has_statistics:
                sums[name] = BlockSums(block, dense_limit)
            else:
                problems[name] = "the layer had no part in the output"
        except NotImplementedError:
            problems[name] = "its inverse alone is known"
    facts = {n: RowFacts(each.block) for n, each in sums.items() if has_rows(each.block)}
    calls: list[LayerCall] = []
    capture = Capture(
        model,
        {name: block_layer(sums[name].block) for name in facts},
        lambda _, of_forward: calls.extend(of_forward),
    )
    try:
        found = layers.network_outputs(_call(model, batch))
    finally:
        capture.close()
    losses = [
        (entry.objective.factory(z.detach()), entry.objective.coeff(z))
        for entry, z in found
    ]
    sources = Sources([z for _, z in found], losses)
    ExactBlocks(sources, sums, calls, facts).run()
    rows = [
        _row(name, block, sums.get(name), facts.get(name), problems.get(name, ""))
        for name, block in layers.blocks.items()
    ]
    return CurvatureCheck(tuple(rows), losses[0][0].num_terms, len(sources))


# Verdicts.


def _row(
    name: str,
    block: FisherBlock,
    sums: BlockSums | None,
    facts: RowFacts | None,
    problem: str,
) -> BlockCheck:
    kind, size = type(block).__name__, sum(param.numel() for param in block.params)
    if sums is None:
        nothing = (None, None, None, False, problem, 0.0, "not compared")
        return BlockCheck(name, kind, size, *nothing)
    comparison = sums.compare()
    error, cosine, ratio = _ratios(comparison)
    expected, reason = expectation(block, facts)
    # Without matrices the error is the root of a difference of squares.
    rounding = torch.finfo(block.params[0].dtype).eps
    tolerance = rounding ** (0.4 if comparison.method == "products" else 0.6)
    if error <= tolerance:
        verdict = "equal"
    elif not expected:
        verdict = "approximate"
    else:
        verdict = "wrong scale" if 1 - cosine < _SAME_DIRECTION else "wrong"
    figures = error, cosine, ratio, expected, reason, tolerance, verdict
    return BlockCheck(name, kind, size, *figures)


def _ratios(comparison: Comparison) -> tuple[float, float, float]:
    """Error, cosine and ratio of traces; of two zeros 0, 1 and 1."""
    K, F = (float(norm) for norm in comparison.norms)
    if K == F == 0:
        return 0.0, 1.0, 1.0
    if F == 0:
        return float("inf"), 0.0, float("inf")
    trace_K, trace_F = (float(trace) for trace in comparison.traces)
    cosine = float(comparison.inner) / (K * F) if K else 0.0
    return float(comparison.difference) / F, cosine, trace_K / trace_F
