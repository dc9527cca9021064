"""Blocks of an `nn.EmbeddingBag`: a Kronecker product with a diagonal of squared counts.

Notation: a bag n holds the ids `id_j` with weights `w_j` (1 where there are none given); it
is the linear map `y_n = Wᵀ a_n` of the multi-hot row `a_n = Σ_j w_j e_{id_j}`, in mode
"mean" divided by the number of its ids. So `F = T · A ⊗ G` with the rows `a_n`, of which
the diagonal `diag(A) = Σ_n a_n²/R` alone is kept: as many numbers as words, never a
vocabulary x vocabulary matrix. It is all of `A` where each bag has one word (any number
of times); otherwise what is left out is how words occur together.

A `padding_idx` is in no bag. Of `r` bags that are not empty `A = Σ a_n²/r`, while `G` is
still divided by all `R`: as if the empty ones were not there. Left out: the mode "max",
which is no linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher_factors import FactorOptions
from ..size_limit import SizeLimit
from .base import accumulation_dtype
from .embedding import EmbeddingKFACFB
from .sides import make_side


class EmbeddingBagKFACFB(EmbeddingKFACFB):
    """The Kronecker block of an `nn.EmbeddingBag`; `V` is `[vocabulary, out]`.

    Inputs `[N, L]`, or `[total]` with offsets, with weights per id or without.

    Args:
        module: the layer, or several that share their weight.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        diagonal_approx_for_output: keep the diagonal of `G` alone.
        size_limit: what an output side above a size becomes; None for none.

    Raises:
        TypeError: a module of another type.
        ValueError: the mode "max".
        RuntimeError: use before `instantiate_factors`.

    >>> bag = nn.EmbeddingBag(4, 2, mode="sum")
    >>> block = EmbeddingBagKFACFB(bag)
    >>> block.instantiate_factors(damping=0.1)
    >>> a = block.call_input(bag, (torch.tensor([[0, 2], [2, 2]]),), {})
    >>> block.accumulate(block.moments([a], [[torch.ones(2, 2)]], num_terms=2), decay=0.95)
    >>> block.factors[0].get_cov_var()
    tensor([0.5000, 0.0000, 2.5000, 0.0000])
    """

    layer_types = (nn.EmbeddingBag,)
    skips_idle_rows = False  # its rows are bags

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        diagonal_approx_for_output: bool = False,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(
            module,
            name,
            options,
            diagonal_approx_for_output=diagonal_approx_for_output,
            size_limit=size_limit,
        )
        problem = unsupported_bag(self.module)
        if problem is not None:
            raise ValueError(
                f'layer {self.name}: expected the mode "sum" or "mean", got {self.module}: '
                f"{problem}; register its weight with register_generic"
            )

    def _make_factors(self) -> tuple[Any, Any]:
        size, features = self.params[0].shape
        A = make_side(True, size, False, self, "input")
        return A, make_side(self._diagonal_output, features, False, self, "output")

    def call_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Return the rows `a_n`, sparse and coalesced, `[N, vocabulary]`."""
        names = ("input", "offsets", "per_sample_weights")
        given = dict(zip(names, args, strict=False)) | kwargs
        return multi_hot(module, given["input"], *map(given.get, names[1:]))

    def num_rows(self, inputs: Sequence[Tensor], num_terms: float) -> float:
        """`R`: the bags of all calls."""
        return sum(rows.shape[0] for rows in inputs)

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return `Σ a_n²/r`, over the bags that are not empty."""
        total = torch.zeros(
            self.params[0].shape[0], dtype=self.dtype, device=self.params[0].device
        )
        filled = total.new_zeros(())
        for rows in inputs:
            squares = rows.values().to(self.dtype).square()
            total.index_add_(0, rows.indices()[1], squares)
            filled += _is_filled(rows).sum()
        return [total / filled.clamp(min=1)]

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the moment of `G`; an empty bag has no gradient."""
        _, G = self._sides()
        kept = [
            grad * _is_filled(rows).to(grad.dtype).unsqueeze(1)
            for rows, grad in zip(inputs, grads, strict=True)
        ]
        return [G.summed_cov(torch.cat(kept, dim=1))]


def unsupported_bag(bag: nn.EmbeddingBag) -> str | None:
    """Return why a bag has no Kronecker block; None where it has one."""
    return "the largest of a bag is no linear map of it" if bag.mode == "max" else None


def multi_hot(
    bag: Any,
    ids: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Return the rows that an `nn.EmbeddingBag` multiplies its weight by, sparse.

    Ids that are twice in a bag are added up; those of padding have an entry of 0.

    Args:
        bag: the layer.
        ids: `[N, L]`, or `[total]` with `offsets`.
        offsets: `[N]`, or `[N + 1]` where the bag includes the last.
        per_sample_weights: like `ids`.

    Returns:
        `[N, vocabulary]`, `torch.sparse_coo`, coalesced.

    >>> bag = nn.EmbeddingBag(3, 1, mode="mean", padding_idx=1)
    >>> multi_hot(bag, torch.tensor([2, 1, 2, 0, 2]), torch.tensor([0, 3])).to_dense()
    tensor([[0.0000, 0.0000, 1.0000],
            [0.5000, 0.0000, 0.5000]])
    """
    flat = ids.flatten().long()
    places = torch.arange(flat.numel(), device=flat.device)
    if offsets is None:
        size, which = ids.shape[0], places // max(1, ids.shape[1])
    else:
        starts = offsets[:-1] if bag.include_last_offset else offsets
        size = starts.numel()
        which = torch.searchsorted(starts.to(places), places, right=True) - 1
    dtype = accumulation_dtype(bag.weight)
    w = torch.ones(flat.shape, dtype=dtype, device=flat.device)
    if per_sample_weights is not None:
        w = per_sample_weights.detach().flatten().to(dtype)
    if bag.padding_idx is not None:
        w = w * (flat != bag.padding_idx)
    if bag.mode == "mean":  # which has no weights per id
        counts = w.new_zeros(size).index_add_(0, which, w)
        w = w / counts.clamp(min=1)[which]
    rows = torch.sparse_coo_tensor(
        torch.stack([which, flat]), w, (size, bag.num_embeddings), check_invariants=False
    )
    return rows.coalesce()


def _is_filled(rows: Tensor) -> Tensor:
    """Which rows have an entry that is not 0."""
    number = torch.zeros(rows.shape[0], device=rows.device)
    number.index_add_(0, rows.indices()[0], (rows.values() != 0).to(number.dtype))
    return number > 0
