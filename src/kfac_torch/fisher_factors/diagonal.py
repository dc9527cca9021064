"""Diagonal factors: one second moment per parameter, powers applied afresh.

Notation: `D` the mean over N examples of the squared gradient, in the shape of the
parameters; `a [N, m]` a layer's inputs and `g [N, n]` the gradients of the summed loss
at its outputs, so that the gradient of one example is `a_n g_nᵀ`, and

    D = (1/N) Σ_n (a_n g_nᵀ)² = (a²)ᵀ (g²) / N

with elementwise squares: exact per-example squares, unlike the square of the batch's
gradient in `NaiveDiagonalFactor`, which has the same mean under the model's own
distribution and more variance. Where an example has several rows (tokens), its gradient
is the sum over them, and is squared after.

Left out: stored inverses. `(D + λ)^exp` is elementwise and as cheap as reading it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..damping import DampingFunc, damping_id, evaluate_damping
from .base import FactorOptions, FisherFactor
from .data import TensorLike, append_homog, scope_string_from_params

GRADIENT_BYTES = 16 * 2**20  # per-example gradients that are held at once


class DiagonalFactor(FisherFactor, abc.ABC):
    """A factor that stores the diagonal of its matrix (abstract).

    Nothing is kept beside it: registering is allowed and has no effect, so that a block
    can treat all factors alike. The stored array, `get_cov_var()`, has the shape of what
    it multiplies; `get_cov()` is the dense diagonal matrix.
    """

    def _fill_identity(self, cov: Tensor) -> None:
        cov.fill_(1.0)

    @property
    def cov_dim(self) -> int:
        """The number of entries on the diagonal."""
        return torch.Size(self._cov_shape).numel()

    def _diagonal(self) -> Tensor:
        """The diagonal, made of what is stored, in its shape."""
        return self._stored_cov()

    def describe(self) -> str:
        """Return how the matrix is kept and its size, as in `"diagonal 50257"`."""
        return f"diagonal {self.cov_dim}"

    def cov_trace(self) -> Tensor:
        """Return the sum of the diagonal, 0-dim."""
        return self._diagonal().sum()

    def spectrum(self) -> Tensor:
        """Return the entries of the diagonal, ascending."""
        return self._stored_cov().flatten().sort()[0]

    def get_cov(self) -> Tensor:
        """Return the dense diagonal matrix; `get_cov_var()` is the diagonal alone.

        Raises:
            RuntimeError: before `instantiate_cov_variables`.
        """
        return self._diagonal().flatten().diag()

    def register_matpower(self, exp: float, damping_func: DampingFunc) -> None:
        """Do nothing but check the damping: powers are computed when they are used."""
        damping_id(damping_func)

    def register_cholesky(self, damping_func: DampingFunc) -> None:
        """Do nothing but check the damping, as `register_matpower`."""
        damping_id(damping_func)

    def register_cholesky_inverse(self, damping_func: DampingFunc) -> None:
        """Do nothing but check the damping, as `register_matpower`."""
        damping_id(damping_func)

    def instantiate_inv_variables(self) -> None:
        """Do nothing: there are none."""

    def make_inverse_update_ops(self) -> list[Callable[[], None]]:
        """Return no callables: there is nothing to refresh."""
        return []

    @property
    def is_refreshed(self) -> bool:
        """True: products always use the current diagonal."""
        return True

    def get_matpower(self, exp: float, damping_func: DampingFunc) -> Tensor:
        """Return `(d + λ)^exp` of the current diagonal, in its shape.

        Raises:
            torch.linalg.LinAlgError: a negative power of an entry that is not positive
                (found where looking is free: on the CPU).
        """
        damped = self._diagonal() + self._damping_of(damping_func)
        if exp < 0 and damped.device.type == "cpu" and not (damped > 0).all():
            raise torch.linalg.LinAlgError(
                f"{self.name}: cannot raise the damped diagonal to {exp}: its smallest "
                f"entry is {damped.min().item():.3g}. Use a larger damping."
            )
        return damped.pow(exp)

    def _damping_of(self, damping_func: DampingFunc) -> Tensor | float:
        return evaluate_damping(damping_func, self.name)

    def left_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Return `(d + λ)^exp · x`, elementwise; `x` has the shape of the diagonal.

        Sparse rows (a `torch.sparse_coo_tensor` with one sparse dimension) stay sparse.

        Raises:
            ValueError: `x` of another shape.
        """
        if x.shape != self._cov_shape:
            raise ValueError(
                f"{self.name}: left_multiply_matpower: expected x of shape "
                f"{self._cov_shape}, got {tuple(x.shape)}"
            )
        return scale_rows(x, self.get_matpower(exp, damping_func))

    def right_multiply_matpower(
        self, x: Tensor, exp: float, damping_func: DampingFunc
    ) -> Tensor:
        """Raise NotImplementedError: an elementwise product has no right side."""
        raise NotImplementedError(
            f"{self.name}: a diagonal factor of all parameters multiplies elementwise; "
            "use left_multiply_matpower"
        )

    def left_multiply_cholesky(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `√(d + λ) · x`; `L` is diagonal, its own transpose."""
        return self.left_multiply_matpower(x, 0.5, damping_func)

    def right_multiply_cholesky(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Multiply by `√(d + λ)`, as `right_multiply_matpower`."""
        return self.right_multiply_matpower(x, 0.5, damping_func)

    def left_multiply_cholesky_inverse(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Return `x / √(d + λ)`."""
        return self.left_multiply_matpower(x, -0.5, damping_func)

    def right_multiply_cholesky_inverse(
        self, x: Tensor, damping_func: DampingFunc, transpose: bool = False
    ) -> Tensor:
        """Divide by `√(d + λ)`, as `right_multiply_matpower`."""
        return self.right_multiply_matpower(x, -0.5, damping_func)


def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """Return `scale · x`, for dense `x` or one with sparse rows.

    `scale` has the shape of `x`, or 1 where it is broadcast, but for the first dimension.

    Raises:
        ValueError: a sparse `x` with more than one sparse dimension.
    """
    if x.layout == torch.strided:
        return scale * x
    if x.layout != torch.sparse_coo or x.sparse_dim() != 1:
        raise ValueError(
            "expected a dense x or one with sparse rows (one sparse dimension), got "
            f"{x.layout}"
        )
    x = x.coalesce()
    values = scale[x.indices()[0]] * x.values()
    return torch.sparse_coo_tensor(
        x.indices(), values, x.shape, is_coalesced=True, check_invariants=False
    )


class FullyConnectedDiagonalFactor(DiagonalFactor):
    """The mean over examples of the squared gradient of a fully connected layer.

    Stored as `[in(+1), out]`, the bias in the last row.

    Args:
        inputs: per tower, `[N, ..., in]`. Dimensions between the first and the last are
            rows of one example, over which its gradient is summed before it is squared.
        outputs_grads: `[source][tower]`, gradients of the summed loss with respect to the
            outputs, `[N, ..., out]`.
        has_bias: append a one, last, to each row of the inputs.
        sizes: `(in, out)`; needed only where the data are callables.
        name: for messages and checkpoints; built from the arguments if None.
        options: see `FactorOptions`.
        dtype: of the moment; that of the data, but at least float32, if None.
        device: of the moment; that of the data if None.

    Raises:
        ValueError: inputs and gradients that do not fit together.

    >>> x, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
    >>> factor = FullyConnectedDiagonalFactor([x], [[g]], has_bias=True)
    >>> factor.instantiate_cov_variables()
    >>> factor.make_covariance_update_op(0.0)()
    tensor([[18.5000],
            [34.0000],
            [ 2.5000]])
    """

    def __init__(
        self,
        inputs: Sequence[TensorLike],
        outputs_grads: Sequence[Sequence[TensorLike]],
        has_bias: bool = False,
        *,
        sizes: tuple[int, int] | None = None,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if name is None:
            name = "ff_fcdiag_" + name_of_pair(inputs, outputs_grads, [has_bias])
        tensors = pair_towers(inputs, outputs_grads, name)
        if sizes is None:
            first = tensors[0][0]
            if not all(hasattr(part, "shape") and len(part.shape) for part in first):
                raise ValueError(
                    f"{name}: expected tensors of shapes [N, ..., in] and [N, ..., out], "
                    "or sizes=(in, out) where they are callables"
                )
            sizes = (first[0].shape[-1], first[1].shape[-1])
        self._sizes = sizes
        self._has_bias = has_bias
        super().__init__(tensors, name, options, dtype, device)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        return (self._sizes[0] + self._has_bias, self._sizes[1])

    def _check_tensor(self, *tensors: Tensor) -> None:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        d_in, d_out = self._sizes
        if len(shapes) != 2 or (
            len(shapes[0]) < 2
            or shapes[0][-1] != d_in
            or shapes[1] != (*shapes[0][:-1], d_out)
        ):
            raise ValueError(
                f"{self.name}: expected inputs [N, ..., {d_in}] and outputs_grads "
                f"[N, ..., {d_out}] with equal leading dimensions, got shapes {shapes}"
            )

    def num_rows(self, *tensors: Tensor) -> int:
        """`N`: the examples."""
        return tensors[0].shape[0]

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        inputs, grads = tensors
        return self._summed_cov(inputs, grads.unsqueeze(0))

    def _summed_cov(self, *tensors: Tensor) -> Tensor:
        a, g = (tensor.to(self._dtype) for tensor in tensors)
        if self._has_bias:
            a = append_homog(a)
        if a.dim() == 2:
            return (a.square().mT @ g.square().sum(0)).div_(len(a))
        a = a.flatten(1, -2)  # [N, T, in]
        g = g.flatten(2, -2).permute(1, 2, 0, 3)  # [N, T, S, out]
        return mean_squared_products(a, g)


def mean_squared_products(a: Tensor, g: Tensor) -> Tensor:
    """Return `(1/N) Σ_n Σ_s (Σ_t a_nt g_ntsᵀ)²` with a bounded number of examples at once.

    Args:
        a: `[N, T, m]`.
        g: `[N, T, S, n]`.
    """
    num_sources = g.shape[2]
    width = a.shape[-1] * g.shape[2:].numel() * a.element_size()
    total = a.new_zeros(a.shape[-1], g.shape[-1])
    step = max(1, GRADIENT_BYTES // width)
    for some_a, some_g in zip(a.split(step), g.split(step), strict=True):
        gradients = some_a.mT @ some_g.flatten(2)
        squares = gradients.square_().sum(0)
        total += squares.unflatten(1, (num_sources, -1)).sum(1)
    return total.div_(len(a))


def pair_towers(
    inputs: Sequence[TensorLike], outputs_grads: Sequence[Sequence[TensorLike]], name: str
) -> list[list[tuple[TensorLike, TensorLike]]]:
    """Return `[source][tower]` pairs of a tower's inputs and its output gradients.

    Raises:
        ValueError: a source without as many towers as the inputs.
    """
    towers = [len(grads) for grads in outputs_grads]
    if not towers or set(towers) != {len(inputs)}:
        raise ValueError(
            f"{name}: expected output gradients of {len(inputs)} tower(s) in each source, "
            f"as there are inputs, got {towers}"
        )
    return [list(zip(inputs, grads, strict=True)) for grads in outputs_grads]


def name_of_pair(
    inputs: Sequence[TensorLike],
    outputs_grads: Sequence[Sequence[TensorLike]],
    options: Sequence[object],
) -> str:
    """Return a name from the data of both sides and from plain arguments."""
    flat = [grad for grads in outputs_grads for grad in grads]
    return scope_string_from_params([[*inputs], flat, *options])
