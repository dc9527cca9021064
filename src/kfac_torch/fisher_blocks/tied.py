"""`TiedEmbeddingFB`: one weight that is both an embedding and the head of a model.

Notation: `W [V, D]` the weight; each row r of an embedding's output is `e_{id_r}ᵀ W`, with
the gradient `e_{id_r} g_rᵀ`; each row of the head is `W a_r`, with the gradient `g_r a_rᵀ`.
So the Fisher is a sum over two uses of products of a V side and a D side,

    F = Σ_r (U_r ⊗ M_r)/N,   U_r = e eᵀ, M_r = g gᵀ   or   U_r = g gᵀ, M_r = a aᵀ

where products between different rows are left out, as in all blocks, and so are those
between the two uses. It is approximated by *one* product, with the partial traces of it:

    F ≈ P_V ⊗ P_D / t,   P_V = diag Σ_r U_r tr(M_r)/N,   P_D = Σ_r M_r tr(U_r)/N

and `t = tr P_V = tr P_D` the trace of F. The trace, the diagonal of the partial trace over
the D side and the partial trace over the V side are those of F: exact. All of F it is
where `F` is such a product with a diagonal V side. The V side is a diagonal, never a
vocabulary x vocabulary matrix; both are linear in the rows, so that batches add up.

Left out: a bias of the head, which is left to a block of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher_factors import FactorOptions, UnitTraceDiagonalFactor
from ..size_limit import SizeLimit
from .base import FisherBlock, accumulation_dtype, no_data
from .embedding import EmbeddingKFACFB
from .kronecker import weighted_mean
from .layer import check_modules, layer_params
from .sides import make_side


class TiedEmbeddingFB(EmbeddingKFACFB):
    """The block of a weight that `nn.Embedding` and `nn.Linear` modules share.

    `V` is `[vocabulary, out]`. The factors are `P_V/t` and `P_D`.

    Args:
        modules: one or more embeddings with the same settings, and one or more linear
            layers, in any order, all of one weight. A linear layer's bias is no part of
            the block.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        diagonal_approx_for_output: keep the diagonal of `P_D` alone.
        size_limit: what a `P_D` above a size becomes; None for none.

    Raises:
        TypeError: a module of another type.
        ValueError: modules that do not share their weight, a frozen one, or none of
            either type.
        RuntimeError: use before `instantiate_factors`.

    >>> embedding, head = nn.Embedding(5, 2), nn.Linear(2, 5, bias=False)
    >>> head.weight = embedding.weight
    >>> block = TiedEmbeddingFB([embedding, head])
    >>> block.instantiate_factors(damping=0.1)
    >>> inputs = [torch.tensor([0, 3, 3]), torch.randn(3, 2)]
    >>> grads = [torch.randn(3, 2), torch.randn(3, 5)]
    >>> block.accumulate(block.moments(inputs, [grads], num_terms=3), decay=0.95)
    >>> tuple(block.full_fisher_block().shape)
    (10, 10)
    """

    skips_idle_rows = False  # a row without a gradient adds nothing to either factor

    def __init__(
        self,
        modules: Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        diagonal_approx_for_output: bool = False,
        size_limit: SizeLimit | None = None,
    ) -> None:
        layers = [modules] if isinstance(modules, nn.Module) else list(modules)
        name = name or "+".join(type(layer).__name__ for layer in layers)
        check_tied(layers, name)
        embedding = next(m for m in layers if isinstance(m, nn.Embedding))
        params = layer_params(embedding, name)
        FisherBlock.__init__(self, params, layers, name, options)
        self.module = embedding
        self.has_bias = False
        self._diagonal_output = diagonal_approx_for_output
        self.size_limit = size_limit

    def _make_factors(self) -> tuple[Any, Any]:
        weight, name = self.params[0], f"{self.name}.input"
        size, features = weight.shape
        A = UnitTraceDiagonalFactor(
            [[no_data(name)]],
            size=size,
            name=name,
            options=self.options,
            dtype=accumulation_dtype(weight),
            device=weight.device,
        )
        return A, make_side(self._diagonal_output, features, False, self, "output")

    def num_rows(self, inputs: Sequence[Tensor], num_terms: float) -> float:
        """`R`: the rows of all calls, of both uses."""
        return sum(map(self._rows, inputs))

    def _rows(self, tensor: Tensor) -> int:
        if tensor.is_floating_point():
            return tensor.numel() // self.params[0].shape[1]
        return tensor.numel()

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return nothing: both factors need gradients."""
        return []

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return `P_V` and `P_D`, times `N/R`; summed over sources `grads[call]`."""
        sides = [
            self._head_sides(a, g) if a.is_floating_point() else self._embedding_sides(a, g)
            for a, g in zip(inputs, grads, strict=True)
        ]
        rows = [self._rows(tensor) for tensor in inputs]
        # An empty call has no mean.
        kept = [(side, count) for side, count in zip(sides, rows, strict=True) if count]
        counts = [count for _, count in kept]
        return [weighted_mean([side[i] for side, _ in kept], counts) for i in (0, 1)]

    def _embedding_sides(self, ids: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """The means of `e |g|²` and `g gᵀ` over the rows of a call."""
        A, G = self._sides()
        ids, padding = ids.flatten(), self.module.padding_idx
        g = grads.reshape(len(grads), len(ids), -1).to(self.dtype)
        if padding is not None:
            g = g * (ids != padding).unsqueeze(1)
        squares = torch.zeros_like(A.get_cov_var())
        squares.index_add_(0, ids.long(), g.square().sum((0, 2)))
        return squares / len(ids), G.summed_cov(g)

    def _head_sides(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """The means of `g² |a|²` and `a aᵀ |g|²` over the rows of a call."""
        _, G = self._sides()
        a = inputs.reshape(-1, inputs.shape[-1]).to(self.dtype)
        g2 = grads.reshape(len(grads), len(a), -1).to(self.dtype).square().sum(0)
        norms = a.square().sum(1)
        return norms @ g2 / len(a), G.new_cov([[a * g2.sum(1, keepdim=True).sqrt()]])


def check_tied(layers: Sequence[nn.Module], name: str) -> None:
    """Check the modules of a tied weight.

    Raises:
        TypeError: a module that is neither an embedding nor a linear layer.
        ValueError: none of either, more than one weight, or embeddings that differ.
    """
    embeddings = [layer for layer in layers if isinstance(layer, nn.Embedding)]
    heads = [layer for layer in layers if not isinstance(layer, nn.Embedding)]
    for head in heads:
        check_modules(head, (nn.Embedding, nn.Linear), name)
    if not embeddings or not heads:
        raise ValueError(
            f"layer {name}: expected one nn.Embedding or more and one nn.Linear or "
            f"more that share their weight, got {', '.join(map(str, layers))}"
        )
    check_modules(embeddings, (nn.Embedding,), name)
    if len({id(layer.weight) for layer in layers}) > 1:
        raise ValueError(
            f"layer {name}: expected modules that share their weight, got "
            f"{', '.join(map(str, layers))}, which do not; register them one by one"
        )
