"""The exact block of the Fisher that a layer's block stands for, by autograd alone.

Notation: `N` the loss terms, `B e_j` column `j` of the Fisher's factor at the output of
*one* example: a source. `g_i` is its gradient at the parameters of a block, in the form
`V`, with the weight of its loss and `1/√N` in it, so that

    F = Σ_i g_i g_iᵀ,  tr F = Σ |g_i|²,  |F|² = Σ_ij (g_i·g_j)²,  ⟨K, F⟩ = Σ_i g_iᵀ K g_i

for the block `K` that is compared with it (all norms those of Frobenius). A small block is
compared entry by entry. Of a large one no matrix is formed; gradients that do not fit in
a bounded buffer are computed again where pairs of them are needed.
Left out: verdicts (`curvature_check`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .capture import LayerCall
from .fisher_blocks import EigenKroneckerFB, FisherBlock, KroneckerProductFB
from .fisher_factors import DiagonalFactor
from .loss_functions import LossFunction
from .row_facts import RowFacts, is_diagonal
from .source_grads import source_grads

_CHUNK_BYTES = 64 * 2**20  # gradients of a chunk of sources
_KEPT_BYTES = 256 * 2**20  # gradients of large blocks that are kept for the pairs


@dataclass
class Comparison:
    """What tells a block `K` from the exact `F`; 0-dim float64.

    Args:
        method: `"dense"`, `"diagonal"` or `"products"`.
        norms: `|K|` and `|F|`.
        traces: of `K` and `F`.
        inner: `⟨K, F⟩`.
        difference: `|K − F|`.
    """

    method: str
    norms: tuple[Tensor, Tensor]
    traces: tuple[Tensor, Tensor]
    inner: Tensor
    difference: Tensor


class Sources:
    """All `B e_j` of every example and loss, a chunk at a time.

    Args:
        outputs: the network outputs, attached to their graph, examples first.
        losses: of each output, and its weight.
    """

    def __init__(
        self, outputs: Sequence[Tensor], losses: Sequence[tuple[LossFunction, float]]
    ) -> None:
        self._parts = [
            (z, loss, (coeff / loss.num_terms) ** 0.5)
            for z, (loss, coeff) in zip(outputs, losses, strict=True)
            if z.requires_grad
        ]

    def __len__(self) -> int:
        return sum(len(z) * self._columns(loss) for z, loss, _ in self._parts)

    @property
    def num_examples(self) -> int:
        """The first dimension of the network output."""
        return len(self._parts[0][0])

    @staticmethod
    def _columns(loss: LossFunction) -> int:
        return loss.fisher_factor_inner_shape[1:].numel()

    def chunks(self, size: int) -> list[tuple[int, range]]:
        """Return which sources go together: a loss and a range of its own, `size` long."""
        result = []
        for part, (z, loss, _) in enumerate(self._parts):
            total = len(z) * self._columns(loss)
            starts = range(0, total, size)
            result += [(part, range(s, min(s + size, total))) for s in starts]
        return result

    def chunk(self, part: int, which: range) -> tuple[Tensor, Tensor]:
        """Return an output `z` and sources `[S, *z.shape]`, each of one example."""
        z, loss, scale = self._parts[part]
        index = torch.arange(which.start, which.stop, device=z.device)
        first, last = which.start // len(z), (which.stop - 1) // len(z)
        columns = scale * loss.fisher_factor_all_columns(range(first, last + 1))
        sources = torch.zeros(len(which), *z.shape, dtype=columns.dtype, device=z.device)
        example = index % len(z)
        each = torch.arange(len(which), device=z.device)
        sources[each, example] = columns[index // len(z) - first, example]
        return z, sources.to(z.dtype)

    def total_grads(self, edges: Sequence[GradientEdge]) -> list[Tensor | None]:
        """Return some gradient at every edge, `[1, ...]`; None where there is none."""
        outputs = [z for z, _, _ in self._parts]
        return source_grads(outputs, [torch.ones_like(z)[None] for z in outputs], edges)

    def columns(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an output `z` and sources `[S, *z.shape]` of all its examples at once."""
        for z, loss, scale in self._parts:
            total = self._columns(loss)
            for start in range(0, total, size):
                some = range(start, min(start + size, total))
                yield z, (scale * loss.fisher_factor_all_columns(some)).to(z.dtype)


class BlockSums:
    """The sums over sources that compare one block with the exact one.

    Args:
        block: with statistics and without damping.
        dense_limit: parameters up to which matrices are formed.

    Raises:
        NotImplementedError: the block has no product.
    """

    def __init__(self, block: FisherBlock, dense_limit: int) -> None:
        self.block = block
        self.size = sum(param.numel() for param in block.params)
        block.register_matpower(1)
        if is_diagonal(block):
            self.method = "diagonal"
        else:
            self.method = "dense" if self.size <= dense_limit else "products"
        if self.method == "products" and not isinstance(block, KroneckerProductFB):
            _single_factor(block)
        wide = _wide(block.params[0])
        shape = {"dense": (self.size, self.size), "diagonal": (self.size,)}
        self._exact = wide.new_zeros(shape.get(self.method, ()))  # F, or tr F
        self._inner, self._squares = wide.new_zeros(()), wide.new_zeros(())

    def add(self, vectors: Tensor) -> None:
        """Add `V [S, ...]` of different sources."""
        g = _wide(vectors).flatten(1)
        if self.method == "dense":
            self._exact += g.mT @ g
        elif self.method == "diagonal":
            self._exact += g.square().sum(0)
        else:
            self._exact += g.square().sum()
            self._inner += (g * _wide(self._products(vectors)).flatten(1)).sum()

    def add_pairs(self, left: Tensor, right: Tensor, times: int) -> None:
        """Add the squared inner products of two chunks, `times` over."""
        gram = _wide(left).flatten(1) @ _wide(right).flatten(1).mT
        self._squares += times * gram.square().sum()

    def _products(self, vectors: Tensor) -> Tensor:
        return torch.vmap(self.block.multiply)(vectors.to(self.block.dtype))

    def compare(self) -> Comparison:
        """Return the comparison, after all sources."""
        if self.method == "products":
            norm, trace = _norm_and_trace(self.block)
            F = self._squares.sqrt()
            square = norm.square() - 2 * self._inner + self._squares
            difference = square.clamp(min=0).sqrt()
            traces = trace, self._exact
            return Comparison(self.method, (norm, F), traces, self._inner, difference)
        F = self._exact
        if self.method == "dense":
            K = _wide(self.block.full_fisher_block())
            traces = K.trace(), F.trace()
        else:
            tensors = [torch.ones_like(param) for param in self.block.params]
            V = self.block.params_to_vector(tensors).to(self.block.dtype)
            K = _wide(self.block.multiply(V)).flatten()
            traces = K.sum(), F.sum()
        norms = K.norm(), F.norm()
        return Comparison(self.method, norms, traces, (K * F).sum(), (K - F).norm())


def _wide(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where an accelerator has none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def _single_factor(block: FisherBlock) -> Any:
    if len(block.factors) != 1:
        raise NotImplementedError(
            f"layer {block.name}: the norm of a {type(block).__name__} is not known"
        )
    return block.factors[0]


def _norm_and_trace(block: FisherBlock) -> tuple[Tensor, Tensor]:
    """`|K|` and `tr K` of `T · A ⊗ G` or `T · C`, from the factors."""
    T = block.num_locations
    kronecker = isinstance(block, KroneckerProductFB)
    norms, traces = [], []
    factors: Sequence[Any] = block.factors
    if isinstance(block, EigenKroneckerFB):
        factors = block.current_factors
    for factor in factors if kronecker else [_single_factor(block)]:
        if isinstance(factor, DiagonalFactor):
            diagonal = factor.get_cov_var()
            assert diagonal is not None  # there are statistics
            cov = _wide(diagonal)
            norms.append(cov.norm())
            traces.append(cov.sum())
        else:
            cov = _wide(factor.get_cov())  # [groups, n, n], or [n, n]
            norms.append(torch.linalg.matrix_norm(cov))
            traces.append(cov.diagonal(dim1=-2, dim2=-1).sum(-1))
    norm, trace = norms[0], traces[0]
    for other_norm, other_trace in zip(norms[1:], traces[1:], strict=True):
        norm, trace = norm * other_norm, trace * other_trace
    return T * norm.square().sum().sqrt(), T * trace.sum()


class ExactBlocks:
    """Sum over all sources, for all blocks together.

    Args:
        sources: of a forward of the model.
        sums: what to add to, by block.
        calls: of the layers in that forward.
        facts: what to find out of layers, by block.
    """

    def __init__(
        self,
        sources: Sources,
        sums: dict[str, BlockSums],
        calls: Sequence[LayerCall],
        facts: dict[str, RowFacts],
    ) -> None:
        self._sources, self._sums, self._facts = sources, sums, facts
        calls = [call for call in calls if call.layer in facts]
        edges = [call.output for call in calls if call.output is not None]
        # What no output depends on is no row; of the rest the shapes are needed.
        grads = sources.total_grads(edges)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        self._calls, self._edges = [calls[i] for i in used], [edges[i] for i in used]
        self._shapes = [grad.shape[1:] for grad in grads if grad is not None]
        for name, each in facts.items():
            own = [call for call in self._calls if call.layer == name]
            each.set_calls(own, sources.num_examples)
        self._params = [
            p for each in sums.values() for p in each.block.params if p.requires_grad
        ]
        self._bytes = max(1, sum(call.nbytes for call in self._calls))
        self._large = [n for n, each in sums.items() if each.method == "products"]
        self._kept: dict[int, dict[str, Tensor]] = {}

    def run(self) -> None:
        """Add every source."""
        size = self._bytes + sum(param.nbytes for param in self._params)
        chunks = self._sources.chunks(max(1, _CHUNK_BYTES // size))
        kept = 0
        for i, chunk in enumerate(chunks):
            vectors = self._vectors(*chunk, with_rows=True)
            for name, V in vectors.items():
                self._sums[name].add(V)
            large = {name: vectors[name] for name in self._large}
            for j in range(i if large else 0):
                other = self._kept.get(j) or self._vectors(*chunks[j], with_rows=False)
                self._pair(large, other, times=2)
            self._pair(large, large, times=1)
            kept += sum(V.nbytes for V in large.values())
            if large and kept <= _KEPT_BYTES:
                self._kept[i] = large
        self._kept.clear()
        if self._edges:
            for z, columns in self._sources.columns(max(1, _CHUNK_BYTES // self._bytes)):
                self._add_rows(source_grads([z], [columns], self._edges), columns, True)

    def _pair(self, left: dict[str, Tensor], right: dict[str, Tensor], times: int) -> None:
        for name in self._large:
            self._sums[name].add_pairs(left[name], right[name], times)

    def _vectors(self, part: int, which: range, with_rows: bool) -> dict[str, Tensor]:
        """The gradients of a chunk of sources, by block; those at layer outputs added."""
        z, sources = self._sources.chunk(part, which)
        edges = self._edges if with_rows else []
        grads = source_grads([z], [sources], [*edges, *self._params])
        if edges:
            self._add_rows(grads[: len(edges)], sources, False)
        found = zip(self._params, grads[len(edges) :], strict=True)
        by_param = {param: grad for param, grad in found if grad is not None}
        result = {}
        for name, each in self._sums.items():
            parts = [
                _dense(by_param[p]) if p in by_param else p.new_zeros(len(which), *p.shape)
                for p in each.block.params
            ]
            result[name] = _to_vectors(each.block, parts)
        return result

    def _add_rows(
        self, grads: Sequence[Tensor | None], sources: Tensor, all_examples: bool
    ) -> None:
        by_layer: dict[str, list[Tensor]] = {}
        for call, shape, grad in zip(self._calls, self._shapes, grads, strict=True):
            if grad is None:  # of another loss
                grad = sources.new_zeros(len(sources), *shape)
            by_layer.setdefault(call.layer, []).append(grad)
        for name, each in by_layer.items():
            facts = self._facts[name]
            (facts.add_columns if all_examples else facts.add)(each)


def _to_vectors(block: FisherBlock, parts: Sequence[Tensor]) -> Tensor:
    """Bring `parts[param] [S, *param.shape]` to `V [S, ...]`."""
    return torch.vmap(lambda *tensors: block.params_to_vector(tensors))(*parts)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.layout != torch.strided else tensor
