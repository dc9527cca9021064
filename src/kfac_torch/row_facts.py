"""Whether theory expects a layer's block to be the exact one, read off its rows.

Notation: `a_r` the inputs of row `r` of a layer, `s_ir` the gradient of source `i` (of
one output coordinate of one example) at its output, `C_rs = Σ_i s_ir s_isᵀ`. The exact
block is `Σ_rs a_r a_sᵀ ⊗ C_rs`, so that `T · A ⊗ G` is exact, whatever the inputs, where
`C_rs = 0` for `r ≠ s` and all `C_rr` are alike (Martens & Grosse 2015, arXiv 1503.05671,
section 3; Grosse & Martens 2016, arXiv 1602.01407, Theorem 1; Eschenhagen et al. 2023,
arXiv 2311.00636, section 3). Blocks of one kind or the other also take for granted that
examples do not interact. All this is tested along random directions, which nothing but
equality passes with a probability above 0. Left out: coincidences of the inputs, which
make a block exact on one batch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .capture import LayerCall
from .fisher_blocks import (
    ConvDiagonalFB,
    ConvKFCBasicFB,
    FisherBlock,
    KroneckerProductFB,
    LinearMapFB,
)
from .fisher_blocks.conv_transpose import ConvTransposeFB
from .fisher_blocks.normalization import ScaleAndShiftFB
from .fisher_blocks.reduce import ReduceFB
from .fisher_blocks.tied import TiedEmbeddingFB
from .fisher_factors import (
    ConvInputKroneckerFactor,
    ConvInputSUAKroneckerFactor,
    DiagonalFactor,
    DiagonalKroneckerFactor,
    EmbeddingInputKroneckerFactor,
)

_CONVOLUTIONS = (ConvKFCBasicFB, ConvDiagonalFB, ConvTransposeFB)
_DIRECTIONS = 2  # random ones; one is enough but for rounding


class RowFacts:
    """What holds for the gradients at a layer's output, row by row.

    Args:
        block: of the layer.
    """

    def __init__(self, block: FisherBlock) -> None:
        self._module: Any = block.modules[0]
        self._channels_first = isinstance(block, _CONVOLUTIONS)
        self._elementwise = isinstance(block, ScaleAndShiftFB)
        self._groups = getattr(block, "groups", 1)
        # The queries, keys and values of attention: a call each.
        self._in_turn = isinstance(block, LinearMapFB) and self._groups > 1
        self._masks: list[Tensor | None] = []
        self._shared = False
        self._generator = torch.Generator().manual_seed(0)
        self.num_rows = 0  # R, without padding
        # Made with the first gradients, whose shape they need.
        self._directions = torch.empty(0)  # u   [groups, size, directions]
        self._weights = torch.empty(0)  # w   [R, groups, directions]
        self._each = torch.empty(0)  # uᵀ C_rr u   [R, groups, directions]
        self._gathered = torch.empty(0)  # the same by sources of all examples
        self._mixed = torch.empty(0)  # Σ_rs w_r w_s uᵀ C_rs u   [directions]

    def set_calls(self, calls: Sequence[LayerCall], num_examples: int) -> None:
        """Say which calls of the layer gradients are going to be added of."""
        # Rows that all examples share are taken example by example.
        self._shared = not all(call.has_examples(num_examples) for call in calls)
        self._masks = [self._mask(call.input) for call in calls]

    def _mask(self, inputs: Tensor) -> Tensor | None:
        padding = getattr(self._module, "padding_idx", None)
        if padding is None or inputs.is_floating_point():  # of bags
            return None
        return inputs.flatten() != padding

    def _rows(self, grad: Tensor, mask: Tensor | None) -> Tensor:
        """Bring `[S, *output.shape]` to `[S, R, groups, size]`."""
        if self._channels_first:
            grad = grad.movedim(2, -1)
        elif self._elementwise:
            grad = grad.unsqueeze(-1)
        rows = grad.flatten(1, -2)
        rows = rows if mask is None else rows[:, mask]
        return rows.unflatten(-1, (self._groups, -1))

    def _rows_of_calls(self, grads: Sequence[Tensor]) -> Tensor:
        """Bring the calls' gradients to `[S, R, groups, size]`."""
        if not self._in_turn:
            pairs = zip(grads, self._masks, strict=True)
            return torch.cat([self._rows(grad, mask) for grad, mask in pairs], 1)
        flat = [grad.flatten(1, -2) for grad in grads]
        each = [torch.cat(flat[g :: self._groups], 1) for g in range(self._groups)]
        most = max(rows.shape[1] for rows in each)  # a group with fewer has zeros
        padded = [pad(rows, (0, 0, 0, most - rows.shape[1])) for rows in each]
        return torch.stack(padded, 2)

    def _random(self, *shape: int, like: Tensor) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(like)

    def _project(self, grads: Sequence[Tensor]) -> Tensor:
        rows = self._rows_of_calls(grads)
        if not self.num_rows:
            self.num_rows = rows.shape[1]
            self._directions = self._random(*rows.shape[2:], _DIRECTIONS, like=rows)
            shape = (*rows.shape[1:3], _DIRECTIONS)
            self._weights = self._random(*shape, like=rows)
            self._each, self._gathered = rows.new_zeros(shape), rows.new_zeros(shape)
            self._mixed = rows.new_zeros(_DIRECTIONS)
        return torch.einsum("srgo,god->srgd", rows, self._directions)

    def add(self, grads: Sequence[Tensor]) -> None:
        """Add sources of one example each: `grads[call] [S, *output.shape]`."""
        p = self._project(grads)
        self._each = self._each + p.square().sum(0)
        self._mixed = self._mixed + (self._weights * p).sum((1, 2)).square().sum(0)

    def add_columns(self, grads: Sequence[Tensor]) -> None:
        """Add sources of all examples at once."""
        self._gathered = self._gathered + self._project(grads).square().sum(0)

    @property
    def alike(self) -> bool:
        """Whether all rows have the same second moment."""
        each = self._each
        mean = each.mean(0, keepdim=True)
        return bool((each - mean).abs().max() <= _resolution(each) * mean.max())

    @property
    def apart(self) -> bool:
        """Whether no two rows (nor two groups) have anything to do with each other."""
        alone = (self._weights.square() * self._each).sum((0, 1))
        return bool(((self._mixed - alone).abs() <= _resolution(alone) * alone).all())

    @property
    def examples_apart(self) -> bool:
        """Whether the output of an example depends on rows of no other, or need not."""
        if self._shared:
            return True
        each = self._each
        return bool((each - self._gathered).abs().max() <= _resolution(each) * each.max())


def _resolution(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps ** 0.5


def has_rows(block: FisherBlock) -> bool:
    """Whether a block is of one layer, whose rows all have the same sizes."""
    return bool(block.modules) and not isinstance(block, TiedEmbeddingFB)


def is_diagonal(block: FisherBlock) -> bool:
    """Whether a block is the diagonal of one."""
    return len(block.factors) == 1 and isinstance(block.factors[0], DiagonalFactor)


def expectation(block: FisherBlock, facts: RowFacts | None) -> tuple[bool, str]:
    """Return whether theory expects the exact block (or diagonal) here, and why."""
    kind = "diagonal" if is_diagonal(block) else "full block"
    if block.needs_param_grads:
        return True, f"the {kind} of every example's gradient"
    if isinstance(block, TiedEmbeddingFB):
        return False, "two uses of a weight are taken as one product"
    if facts is None or not facts.num_rows:
        return False, "nothing is known of this block"
    if not facts.examples_apart:
        return False, "examples interact, through batch statistics perhaps"
    if not isinstance(block, KroneckerProductFB):
        if len(block.factors) == 1:
            return True, f"the {kind}, summed over the rows of every example"
        return False, "nothing is known of this block"
    left, right = block.factors[:2]
    if isinstance(left, ConvInputSUAKroneckerFactor):
        return False, "activations are taken as spatially uncorrelated"
    convolution = isinstance(left, ConvInputKroneckerFactor)
    if convolution and block.options.sub_sampling is not None:
        return False, "statistics are of a sample of the rows"
    if isinstance(block, ReduceFB):
        return False, "inputs are averaged over the positions of an example"
    one_hot = isinstance(left, EmbeddingInputKroneckerFactor)
    if isinstance(right, DiagonalKroneckerFactor) or (
        isinstance(left, DiagonalKroneckerFactor) and not one_hot
    ):
        return False, "a side is a diagonal alone"
    if not facts.apart:
        return False, "gradients of different rows or groups of an example interact"
    if facts.num_rows == 1:
        return True, "there is one row"
    if facts.alike:
        return True, "all rows have the same G and do not interact"
    return False, "rows differ in the second moment of their gradients"
