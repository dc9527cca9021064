"""Blocks of an `nn.Embedding`: a Kronecker product with a diagonal of counts.

A one-hot input has the second moment `A = diag(counts)/R`: as many numbers as words,
never a vocabulary x vocabulary matrix. `F = T · A ⊗ G` with `G` the second moment of the
gradients at the outputs and `R` the ids. Sparse gradients stay sparse.

A `padding_idx` has no gradient: it is not counted, and its rows of `G` are zero. Of `r`
other ids `A = diag(counts)/r`, while `G` is still divided by all `R`, so that `T · A ⊗ G`
is as if the padding were not there (of several micro-batches up to how their shares of
padding differ).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher_factors import EmbeddingInputKroneckerFactor, FactorOptions
from ..size_limit import SizeLimit
from .base import accumulation_dtype, no_data
from .kronecker import KroneckerProductFB
from .sides import make_side


class EmbeddingKFACFB(KroneckerProductFB):
    """The Kronecker block of an `nn.Embedding`; `V` is `[vocabulary, out]`.

    Args:
        module: the layer, or several that share their weight.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        diagonal_approx_for_output: keep the diagonal of `G` alone.
        size_limit: what an output side above a size becomes; None for none.

    Raises:
        TypeError: a module of another type.
        RuntimeError: use before `instantiate_factors`.

    >>> block = EmbeddingKFACFB(nn.Embedding(4, 2))
    >>> block.instantiate_factors(damping=0.1)
    >>> ids, g = torch.tensor([0, 2, 2]), torch.ones(3, 2)
    >>> block.accumulate(block.moments([ids], [[g]], num_terms=3), decay=0.95)
    >>> block.factors[0].get_cov_var()
    tensor([0.3333, 0.0000, 0.6667, 0.0000])
    """

    layer_types = (nn.Embedding,)
    skips_idle_rows = True

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        diagonal_approx_for_output: bool = False,
        size_limit: SizeLimit | None = None,
    ) -> None:
        self._diagonal_output = diagonal_approx_for_output
        self.size_limit = size_limit
        super().__init__(module, name, options)

    def _make_factors(self) -> tuple[Any, Any]:
        embedding, name = self.module, f"{self.name}.input"
        A = EmbeddingInputKroneckerFactor(
            [no_data(name)],
            embedding.num_embeddings,
            accumulation_dtype(embedding.weight),
            name=name,
            options=self.options,
            device=embedding.weight.device,
        )
        size = embedding.embedding_dim
        return A, make_side(self._diagonal_output, size, False, self, "output")

    def num_rows(self, inputs: Sequence[Tensor], num_terms: float) -> float:
        """`R`: the ids of all calls."""
        return sum(ids.numel() for ids in inputs)

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the counts of all ids, over their number."""
        A, _ = self._sides()
        padding = self.module.padding_idx
        counts = A.new_cov([[torch.cat([ids.flatten() for ids in inputs])]])
        if padding is None:
            return [counts]
        # The share of padding is known on the device alone; all of it is no reason to
        # divide by 0.
        share = counts[padding].clone()
        counts[padding] = 0
        return [counts / torch.where(share < 1, 1 - share, 1)]

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the moment of `G`; the padding id has no gradient."""
        _, G = self._sides()
        padding = self.module.padding_idx
        if padding is not None:
            kept = [(ids != padding).unsqueeze(-1) for ids in inputs]
            grads = [grad * some for grad, some in zip(grads, kept, strict=True)]
        return [G.summed_cov(torch.cat([grad.flatten(1, -2) for grad in grads], dim=1))]

    def multiply_matpower(self, vector: Tensor, exp: float) -> Tensor:
        """Return `F_λ^exp V`; of `V` with sparse rows the same rows, sparse.

        Raises:
            ValueError: another shape.
            KeyError: this exponent is not registered.
            RuntimeError: not refreshed since it was registered.
        """
        if vector.layout == torch.strided:
            return super().multiply_matpower(vector, exp)
        A, G = self._sides()
        damping_A, damping_G = self._damping_funcs()
        # The output's side first: it keeps the rows sparse and needs no other ones.
        right = G.right_multiply_matpower(vector, exp, damping_G)
        return A.left_multiply_matpower(right, exp, damping_A) * self.num_locations**exp

    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the weight's tensor, which is `V [vocabulary, out]`."""
        return tensors[0]

    def vector_to_params(self, vector: Tensor) -> list[Tensor]:
        """Return `V`, which is like the weight."""
        return [vector]


class EmbeddingKFACMultiIndepFB(EmbeddingKFACFB):
    """The block of an `nn.Embedding` that is called several times, calls independent."""
