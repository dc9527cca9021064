"""Diagonal Kronecker sides: one second moment per feature, or per word of a vocabulary.

Notation: `X [R, n]` the rows of a layer's side, with an optional column of ones last;
`d = diag(XᵀX)/R [n]`. One-hot rows are given by their ids: then `d` is the count of each
id divided by the number of rows, no row is ever formed, and `XᵀX/R` *is* diagonal, so
that the factor is exact (as for an embedding).

As one side of `A ⊗ G` such a factor scales the rows of a gradient from the left, or its
columns from the right. Left out: stored inverses, as in `diagonal.py`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from ..damping import DampingFunc
from .base import FactorOptions
from .data import Entry, TensorLike, name_of_uses, scope_string_from_params
from .diagonal import DiagonalFactor, scale_rows


class DiagonalSideFactor(DiagonalFactor, abc.ABC):
    """The diagonal of one side of a Kronecker product (abstract).

    Stored as `[n]`, or `[groups, n]` for a layer with groups.
    """

    @property
    def cov_dim(self) -> int:
        """`n`, of one group."""
        return self._cov_shape[-1]

    def cov_trace(self) -> Tensor:
        """Return the sum of the diagonal: 0-dim, or one for each group."""
        return self._diagonal().sum(-1)

    def spectrum(self) -> Tensor:
        """Return the entries of the diagonal, ascending: `[n]`, or `[groups, n]`."""
        return self._stored_cov().sort(-1)[0]

    def get_cov(self) -> Tensor:
        """Return the dense diagonal matrix `[..., n, n]`; `get_cov_var()` is the diagonal.

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
        """
        return self._diagonal().diag_embed()

    def describe(self) -> str:
        """Return how the matrix is kept and its size, as in `"diagonal 50257"`."""
        groups = self._cov_shape[:-1]
        text = super().describe()
        return f"{groups[0]} x {text}" if groups else text

    def _damping_of(self, damping_func: DampingFunc) -> Tensor | float:
        damping = super()._damping_of(damping_func)
        per_group = isinstance(damping, Tensor) and damping.dim() > 0
        return damping.unsqueeze(-1) if per_group else damping

    # A side of a product scales rows or columns.

    def left_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `diag((d + λ)^exp) x`: the rows of `x [n, k]` scaled.

        Sparse rows (a `torch.sparse_coo_tensor` with one sparse dimension) stay sparse.

        Raises:
            ValueError: `x` is not such a matrix.
        """
        self._check_matrix(x, "left_multiply_matpower", 0)
        return scale_rows(x, self.get_matpower(exp, damping_func).unsqueeze(-1))

    def right_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `x diag((d + λ)^exp)`: the columns of `x [k, n]` scaled.

        Sparse rows stay sparse.

        Raises:
            ValueError: `x` is not such a matrix.
        """
        self._check_matrix(x, "right_multiply_matpower", 1)
        scale = self.get_matpower(exp, damping_func).unsqueeze(-2)
        return scale_rows(x, scale.expand(x.shape))

    def _check_matrix(self, x: Tensor, method: str, dim: int) -> None:
        n, groups = self.cov_dim, self._cov_shape[:-1]
        fits = x.dim() == len(groups) + 2 and x.shape[:-2] == groups
        if not fits or x.shape[dim - 2] != n:
            before = "".join(f"{size}, " for size in groups)
            expected = f"[{before}{n}, k]" if dim == 0 else f"[{before}k, {n}]"
            raise ValueError(
                f"{self.name}: {method}: expected x of shape {expected}, got "
                f"{tuple(x.shape)}"
            )


class DiagonalKroneckerFactor(DiagonalSideFactor):
    """The diagonal of `XᵀX/R`, one side of a Kronecker product.

    Args:
        tensors: `[source][tower]`, dense rows `[..., n]`; or integers of any shape, the
            ids of one-hot rows, for which `size` is needed.
        has_bias: append a one, last, to each row.
        size: `n`, without the bias; needed for ids and callables.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: rows without `n` features, or ids outside `[0, n)`. On an accelerator
            such ids make the batch NaN, so that it is left out, without a host read.

    >>> factor = DiagonalKroneckerFactor([[torch.tensor([[1.0, 2.0], [3.0, 4.0]])]])
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)()
    tensor([ 5., 10.])
    """

    _integers = None  # either

    def __init__(
        self,
        tensors: Sequence[Sequence[Entry]],
        has_bias: bool = False,
        *,
        size: int | None = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            flat = [tensor for towers in tensors for tensor in towers]
            name = "ff_diagkron_" + scope_string_from_params([flat, has_bias])
        self._size = self._infer_size(tensors, name) if size is None else size
        self._has_bias = has_bias
        super().__init__(tensors, name, options, dtype, device)

    @staticmethod
    def _infer_size(tensors: Sequence[Sequence[Entry]], name: str) -> int:
        first = tensors[0][0] if tensors and tensors[0] else None
        first = first[0] if isinstance(first, tuple | list) and first else first
        shape = getattr(first, "shape", ())
        if len(shape) == 0 or not _dtype_of(first).is_floating_point:
            raise ValueError(
                f"{name}: expected rows of shape [..., n], or size= for ids and callables, "
                f"got {type(first).__name__}"
            )
        return shape[-1]

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        return (self._size + self._has_bias,)

    def _check_tensor(self, *tensors: Tensor) -> None:
        tensor = self._single(tensors)
        if not tensor.is_floating_point():
            _check_ids(tensor, self._size, self.name)
        elif tensor.dim() < 1 or tensor.shape[-1] != self._size:
            raise ValueError(
                f"{self.name}: expected rows of {self._size} features [..., {self._size}], "
                f"got shape {tuple(tensor.shape)}"
            )

    def num_rows(self, *tensors: Tensor) -> int:
        """`R`: the product of the leading dimensions, or the number of ids."""
        return sum(
            t.numel() // self._size if t.is_floating_point() else t.numel() for t in tensors
        )

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        tensor = self._single(tensors)
        rows = self.num_rows(tensor)
        if tensor.is_floating_point():
            squares = tensor.reshape(-1, self._size).to(self._dtype).square().sum(0)
        else:
            squares = count_ids(tensor, self._size, self._dtype)
        if self._has_bias:
            squares = torch.cat([squares, squares.new_full((1,), rows)])
        return squares.div_(rows)


class UnitTraceDiagonalFactor(DiagonalKroneckerFactor):
    """A diagonal side `d/tr(d)`, whose running moment is that of `d`; 0 where `tr(d)` is.

    The other side of the product has the scale then. Arguments as the base class.

    >>> factor = UnitTraceDiagonalFactor([[torch.tensor([[1.0, 2.0], [3.0, 4.0]])]])
    >>> factor.instantiate_cov_variables()
    >>> _ = factor.make_covariance_update_op(0.0)()
    >>> factor.get_cov().diagonal()
    tensor([0.3333, 0.6667])
    """

    def _diagonal(self) -> Tensor:
        d = self._stored_cov()
        trace = d.sum()
        return d / torch.where(trace > 0, trace, 1)


class EmbeddingInputKroneckerFactor(DiagonalKroneckerFactor):
    """The input side of an embedding: how often each id occurs, divided by B.

    The lineage counts all ids of an example and divides by the number of examples; the
    scale is undone by the `T` that the block takes from `num_rows`.

    Args:
        input_ids: per tower, integers `[B, ...]`. (The lineage takes `[B]` and `[B, 1]`
            or `[B, L]`; here any number of further dimensions is counted alike.)
        vocab_size: `n`; ids are in `[0, n)`.
        dtype: of the moment; torch's default dtype if None.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        device: of the moment; that of the data if None.

    Raises:
        TypeError: ids that are not integers.
        ValueError: ids outside `[0, n)`. On an accelerator such ids make the batch NaN,
            so that it is left out, without a host read.

    >>> factor = EmbeddingInputKroneckerFactor([torch.tensor([0, 1, 1, 4])], 5)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)()
    tensor([0.2500, 0.5000, 0.0000, 0.0000, 0.2500])
    """

    _integers = True

    def __init__(
        self,
        input_ids: Sequence[TensorLike],
        vocab_size: int,
        dtype: torch.dtype | None = None,
        *,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            name = "ff_fcembin_" + scope_string_from_params([input_ids, vocab_size])
        super().__init__(
            [input_ids], size=vocab_size, name=name, options=options, dtype=dtype,
            device=device,
        )  # fmt: skip

    def _nest(self, tensors: Sequence[TensorLike]) -> Sequence[Sequence[TensorLike]]:
        return super()._nest([tensors])  # inputs have one source

    def num_rows(self, *tensors: Tensor) -> int:
        """`B`: the first dimension."""
        tensor = self._single(tensors)
        return tensor.shape[0] if tensor.dim() else 1

    def moment_cost(self, rows: float) -> float:
        """Return about how many additions the counts of `rows` ids take."""
        return rows


class DiagonalMultiKF(DiagonalKroneckerFactor):
    """The diagonal of `C0` of a layer with several uses: dense rows, or ids.

    Args:
        tensors: `[source][tower]`, each `[T·B, n]` (or ids `[T·B]`), use-major, or a list
            of T tensors.
        num_uses: `T`; checked against the data if given.
        has_bias: append a one, last, to each row.
        size: `n`, without the bias; needed for ids and callables.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: data that are not `T` uses, or as `DiagonalKroneckerFactor`.

    >>> x = torch.arange(1.0, 13.0).view(6, 2)
    >>> factor = DiagonalMultiKF([[x]], num_uses=3)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)()
    tensor([47.6667, 60.6667])
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[Entry]],
        num_uses: int | None = None,
        has_bias: bool = False,
        *,
        size: int | None = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            name = name_of_uses("ff_diagmulti_", tensors, [num_uses, has_bias])
        self._num_uses = num_uses
        super().__init__(
            tensors,
            has_bias,
            size=size,
            name=name,
            options=options,
            dtype=dtype,
            device=device,
        )

    def _check_tensor(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            super()._check_tensor(tensor)
        T = self._num_uses
        one = len(tensors) == 1
        if T is not None and (tensors[0].shape[0] % T if one else len(tensors) != T):
            raise ValueError(
                f"{self.name}: expected {T} uses, in the leading dimension or as a list, "
                f"got shapes {[tuple(tensor.shape) for tensor in tensors]}"
            )

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        return super()._new_cov(tensors[0] if len(tensors) == 1 else torch.cat(tensors))

    def _first_source(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[0] for tensor in tensors)

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        num_sources = len(tensors[0])
        return self._new_cov(*(t.flatten(0, 1) for t in tensors)).mul_(num_sources)


def _dtype_of(value: object) -> torch.dtype:
    """The torch dtype of a tensor or an array; float where it has none."""
    dtype = getattr(value, "dtype", torch.float32)
    if isinstance(dtype, torch.dtype):
        return dtype
    return torch.int64 if getattr(dtype, "kind", "f") in "iu" else torch.float32


def _check_ids(ids: Tensor, size: int, name: str) -> None:
    if ids.device.type != "cpu":
        return  # found in `count_ids`, without a host read
    low, high = ids.aminmax()
    if low < 0 or high >= size:
        raise ValueError(
            f"{name}: expected ids in [0, {size}), got ids from {low.item()} to "
            f"{high.item()}"
        )


def count_ids(ids: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return how often each of `[0, size)` occurs; all NaN if any id is outside.

    >>> count_ids(torch.tensor([[0, 2], [2, 2]]), 3, torch.float32)
    tensor([1., 0., 3.])
    """
    ids = ids.flatten().long()
    outside = (ids < 0) | (ids >= size)
    ids = torch.where(outside, size, ids)  # one place more, for those outside
    counts = torch.zeros(size + 1, dtype=dtype, device=ids.device)
    counts.index_add_(0, ids, torch.ones_like(ids, dtype=dtype))
    return torch.where(counts[-1] > 0, torch.nan, counts[:-1])
