"""`SplitFactor`: a large side as blocks on the diagonal, the rest taken as zero.

Notation: d features (a bias among them, last) in k blocks of at most b consecutive ones,
as even as possible; `C = diag(C_1, ..., C_k)` with `C_i` the second moment of the
features of block i. Everything that K-FAC does with C it does with each block: powers,
triangular factors and products are those of the blocks, one batched call for all.

What is stored is a stack `[k, b, b]`. Shorter blocks are padded with zeros at their end.
Where a stack is decomposed, the mean of its block's diagonal takes the place of a padded
diagonal entry, so that padding is never why a matrix is singular, and it meets only
zeros in a product. Traces and sizes are those of the d features.

Left out: which features belong together. Blocks are consecutive features (of a
convolution: channels, with all their kernel offsets).
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from ..damping import DampingFunc
from ..linalg import without_subnormals
from .base import FactorOptions
from .data import TensorLike, append_homog, compute_cov
from .inverse_providing import InverseProvidingFactor
from .linear import FullyConnectedKroneckerFactor


def even_parts(total: int, number: int) -> tuple[int, ...]:
    """Return `number` sizes that add up to `total` and differ by at most one.

    >>> even_parts(10, 4)
    (3, 3, 2, 2)
    """
    small, larger = divmod(total, number)
    return (small + 1,) * larger + (small,) * (number - larger)


def runs(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield `(first block, number of blocks, their size)` of equal neighbours.

    >>> list(runs((3, 3, 2)))
    [(0, 2, 3), (2, 1, 2)]
    """
    first = 0
    for size, equal in itertools.groupby(sizes):
        number = len(list(equal))
        yield first, number, size
        first += number


class SplitFactor(InverseProvidingFactor, abc.ABC):
    """A factor `C [..., d, d]` of k blocks, stored as `[..., k, b, b]` (abstract).

    `get_cov()` and the other getters make the dense matrix, for tests and small sizes;
    `get_cov_var()` is the stack. `get_eigendecomp()` is of the stack too, padding and all.
    """

    _groups: int = 1

    def _cut(self, sizes: Sequence[int], order: Tensor | None = None) -> None:
        """Say how the features are cut; to be called by the constructor.

        Args:
            sizes: of the blocks.
            order: the features of all blocks, one after the other, where they are not
                consecutive.
        """
        self._sizes = tuple(sizes)
        width = max(sizes)
        places = torch.cat([torch.arange(n) + i * width for i, n in enumerate(sizes)])
        if order is not None:
            places = torch.empty_like(places).index_copy_(0, order, places)
        # Where in the flat stack each feature is, and which entries are padding.
        self._places = places.to(self._device)
        padding = torch.ones(len(sizes) * width, dtype=self._dtype).index_fill_(
            0, places, 0
        )
        self._padding = padding.view(len(sizes), width).to(self._device)
        self._in_place = order is None and len(set(sizes)) == 1  # no padding either

    @property
    def _stack(self) -> tuple[int, ...]:
        return () if self._groups == 1 else (self._groups,)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        width = max(self._sizes)
        return (*self._stack, len(self._sizes), width, width)

    @property
    def cov_dim(self) -> int:
        """`d`: the features, without padding."""
        return sum(self._sizes)

    def cov_trace(self) -> Tensor:
        """Return the trace: 0-dim, or one for each group."""
        return self._stored_cov().diagonal(dim1=-2, dim2=-1).sum((-2, -1))

    def get_cov(self) -> Tensor:
        """Return the dense block-diagonal `C [..., d, d]`; `get_cov_var()` is the stack.

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
        """
        return self._dense(self._stored_cov())

    def describe(self) -> str:
        """Return how the matrix is kept and its size, as in `"split 8x128"`."""
        k, width = len(self._sizes), max(self._sizes)
        text = f"split {k}x{width}"
        text += "" if k * width == self.cov_dim else f" of {self.cov_dim}"
        return text if self._groups == 1 else f"{self._groups} x {text}"

    def spectrum(self) -> Tensor:
        """Return the ascending eigenvalues `[..., d]`: those of all blocks."""
        cov = without_subnormals(self._stored_cov())
        parts = [
            torch.linalg.eigvalsh(cov[..., first : first + number, :size, :size])
            for first, number, size in runs(self._sizes)
        ]
        return torch.cat([part.flatten(-2) for part in parts], -1).sort()[0]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept once all that is registered has been refreshed."""
        return super().nbytes + self._padding.nbytes + self._places.nbytes

    def _fill_identity(self, cov: Tensor) -> None:
        cov.diagonal(dim1=-2, dim2=-1).copy_(1 - self._padding)

    # The stack.

    def _pad(self, x: Tensor) -> Tensor:
        """Bring `x [..., d, n]` to `[..., k, b, n]`, with zeros for padding."""
        shape = self._padding.shape
        if self._in_place:
            return x.unflatten(-2, shape)
        padded = x.new_zeros(*x.shape[:-2], shape.numel(), x.shape[-1])
        return padded.index_copy_(-2, self._places, x).unflatten(-2, shape)

    def _unpad(self, x: Tensor) -> Tensor:
        """Undo `_pad`."""
        flat = x.flatten(-3, -2)
        return flat if self._in_place else flat.index_select(-2, self._places)

    def _moment_of_rows(self, rows: Tensor) -> Tensor:
        """The blocks of the moment of rows `[..., R, d]`."""
        blocks = self._pad(rows.mT).mT  # [..., k, R, b]
        return compute_cov(blocks, normalizer=rows.shape[-2])

    def _matrices(self) -> Tensor:
        cov = self._stored_cov()
        if self._in_place:
            return cov
        cov = cov.clone()
        diagonal = cov.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.sum(-1, keepdim=True) / (1 - self._padding).sum(-1, keepdim=True)
        diagonal += mean * self._padding
        return cov

    def _damping_of(self, damping_func: DampingFunc) -> Tensor | float:
        damping = super()._damping_of(damping_func)
        per_group = isinstance(damping, Tensor) and damping.dim() > 0
        return damping.unsqueeze(-1) if per_group else damping

    def _dense(self, matrices: Tensor) -> Tensor:
        k, width = self._padding.shape
        dense = matrices.new_zeros(*matrices.shape[:-3], k, width, k, width)
        for i in range(k):
            dense[..., i, :, i, :] = matrices[..., i, :, :]
        dense = dense.flatten(-4, -3).flatten(-2)
        return dense.index_select(-2, self._places).index_select(-1, self._places)

    def _left(self, matrices: Tensor, x: Tensor) -> Tensor:
        return self._unpad(matrices @ self._pad(x))

    def _right(self, x: Tensor, matrices: Tensor) -> Tensor:
        return self._left(matrices.mT, x.mT).mT

    def to(self, device: torch.device | str) -> Self:
        """Move the state to a device; data given later is moved there too."""
        super().to(device)
        self._places = self._places.to(self._device)
        self._padding = self._padding.to(self._device)
        return self


class SplitKroneckerFactor(SplitFactor, FullyConnectedKroneckerFactor):
    """The blocks on the diagonal of `XᵀX/R`: either side of a fully connected layer.

    Stored as `[k, b, b]`.

    Args:
        tensors: `[source][tower]`, each `[..., d]`; all leading dimensions are rows.
        has_bias: append a one, last, to each row.
        max_size: the most features of a block, the one of the bias among them.
        size: `d`, without the bias; needed only where `tensors` are callables.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: tensors without a last dimension of size `d`, or `max_size` below 1.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> factor = SplitKroneckerFactor([[x]], has_bias=True, max_size=2)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.95)()
    tensor([[[ 5.,  7.],
             [ 7., 10.]],
    <BLANKLINE>
            [[ 1.,  0.],
             [ 0.,  0.]]])
    >>> factor.get_cov()
    tensor([[ 5.,  7.,  0.],
            [ 7., 10.,  0.],
            [ 0.,  0.,  1.]])
    >>> factor.describe()
    'split 2x2 of 3'
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[TensorLike]],
        has_bias: bool = False,
        *,
        max_size: int,
        size: int | None = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            tensors,
            has_bias,
            size=size,
            name=name,
            options=options,
            dtype=dtype,
            device=device,
        )
        check_max_size(max_size, self.name)
        d = self._size + has_bias
        self._cut(even_parts(d, -(-d // max_size)))

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        rows = self._single(tensors).reshape(-1, self._size).to(self._dtype)
        return self._moment_of_rows(append_homog(rows) if self._has_bias else rows)


def check_max_size(max_size: int, name: str) -> None:
    """Raise ValueError unless blocks may have features at all."""
    if max_size < 1:
        raise ValueError(f"{name}: max_size: expected at least 1, got {max_size}")
