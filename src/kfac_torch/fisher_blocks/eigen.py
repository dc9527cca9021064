"""EKFAC: a Kronecker block with its eigenvalues corrected, `T · Q diag(S) Qᵀ`.

Notation: `Q = Q_A ⊗ Q_G` the eigenvectors of `A ⊗ G`, as of the last refresh, `S [m, n]`
the second moments of the gradient of an example in that basis, `S_λ` the damped ones
(`eigen_scales.py`), `V [m, n]` a gradient of the layer. Then

    F_λ^p V = Q_A ((Q_Aᵀ V Q_G) ∘ (T S_{λ/T})^p) Q_Gᵀ

George et al. 2018 (arXiv 1806.03884), algorithm 1: of all matrices with these
eigenvectors it is the nearest to the block that `S` is of, in the Frobenius norm, so that
it is no further from it than K-FAC's in the same basis; and the trace is the exact one. λ
adds to it what it adds to K-FAC's block, `T (A + x) ⊗ (G + y) − T A ⊗ G`, with `A` and `G`
diagonal in that basis, and is no part of what is stored: a new λ acts at once, and so does
a new `S`, while the basis waits for a refresh. All powers come for free.

What is exact: an example is the first dimension of the layer's input (the batch, of
attention and recurrent layers), and its gradient is summed over all its positions and
calls before it is squared, so `S` has what K-FAC leaves out between positions. Positions
are taken as independent only where they cannot be told which example they are of: calls
with different batch sizes, and the input's map of a packed sequence.

Cost, beside K-FAC's: of an update `m n (P + m + n)` multiply-adds for an example with P
positions (`P (m² + n²) + P m n` where that is less), in buffers of some 16 MB; of a
convolution the same with patches formed piece by piece. To take positions as independent
needs `P (m² + n² + m n)`, which is no less than the cheaper of these, so it is not offered.
Kept are `S` and both bases, in place of two inverses.

Before the first refresh the block is K-FAC's, undamped or for `p = 1`. At it `S`
is `s_A s_Gᵀ`, until the first update that comes after. A side above a size limit has no
whole basis, and the block is K-FAC's with those sides. Left out: moments of micro-batches
across a refresh (they are of two bases, and enter `A` and `G` alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..damping import evaluate_damping
from ..fisher_factors import (
    ConvDiagonalFactor,
    ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor,
    FactorOptions,
    FullyConnectedKroneckerFactor,
)
from ..fisher_factors.eigen_scales import (
    EigenScaleFactor,
    by_batch_size,
    squares_of_gradients,
    squares_of_rows,
)
from ..size_limit import SizeLimit
from .base import Moment, no_data
from .conv import ConvKFCBasicFB, DepthwiseConvKFCBasicFB, conv_factor_kwargs, data_format
from .conv_transpose import ConvTransposeKFCFB
from .fused import LinearMapFB
from .kronecker import KroneckerProductFB
from .linear import FullyConnectedKFACBasicFB

_WHOLE = (
    FullyConnectedKroneckerFactor,
    ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor,
)


class EigenKroneckerFB(KroneckerProductFB):
    """A Kronecker block with the eigenvalues corrected (abstract): in front of its kind."""

    def _with_scales(self, A: Any, G: Any) -> tuple[Any, ...]:
        """The factors: with the scales, where both sides are whole matrices."""
        if type(A) not in _WHOLE or type(G) not in _WHOLE:
            return A, G
        return A, G, EigenScaleFactor(A, G, f"{self.name}.scales", self.options)

    def planned_factors(self) -> Sequence[Any]:
        """Return the factors; before `instantiate_factors` such as it will make."""
        factors = self._factors or self._make_factors()
        if not self._factors and len(factors) == 2:
            for factor in factors:
                self._plan_inverse(factor)
        return factors

    def _sides(self) -> tuple[Any, Any]:
        A, G, *_ = self._instantiated()
        return A, G

    @property
    def scales(self) -> EigenScaleFactor | None:
        """The factor `S`; None where a side is above the size limit.

        Raises:
            RuntimeError: before `instantiate_factors`.
        """
        _, _, *scales = self._instantiated()
        return scales[0] if scales else None

    @property
    def current_factors(self) -> tuple[Any, ...]:
        """What the block is made of now: `A` and `G`, or `S` once there is a basis."""
        scales = self.scales
        return self._sides() if scales is None or not scales.is_refreshed else (scales,)

    # Statistics.

    @property
    def basis_version(self) -> int:
        """A number that changes with the basis of the moments."""
        return 0 if self.scales is None else self.scales.basis_version

    def accumulate_factor(self, index: int, moment: Moment, decay: float) -> None:
        """Let a batch enter the running moment of one factor, by its number.

        Scales in a basis that is no more are left out.
        """
        scales = self.scales
        if index < 2 or scales is None or moment.basis_version == scales.basis_version:
            super().accumulate_factor(index, moment, decay)
        else:
            scales.skip()

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the moments of `G` and `S`, summed over the sources `grads[call]`.

        That of `S` is zero before there is a basis.
        """
        moments = super().grad_moments(inputs, grads, num_terms)
        scales = self.scales
        if scales is None:
            return moments
        if not scales.is_refreshed:
            known = scales.get_cov_var()
            assert known is not None
            return [*moments, torch.zeros_like(known)]
        squares = self._squares(inputs, grads, *scales.basis)
        return [*moments, squares / self.num_rows(inputs, num_terms)]

    def _squares(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], Q_A: Tensor, Q_G: Tensor
    ) -> Tensor:
        """`Σ_i (Q_Aᵀ W_i Q_G)²` over examples and sources."""
        raise NotImplementedError

    # Products.

    def register_matpower(self, exp: float) -> None:
        """Ask for `F_λ^exp`, which needs no keeping; after `instantiate_factors`."""
        if self.scales is None:
            super().register_matpower(exp)

    def register_cholesky(self) -> None:
        """Ask for the square root `L`, which needs no keeping."""
        if self.scales is None:
            super().register_cholesky()

    def register_cholesky_inverse(self) -> None:
        """Ask for `L⁻¹`, which needs no keeping."""
        if self.scales is None:
            super().register_cholesky_inverse()

    def _eigenvalues(self, scales: EigenScaleFactor, exp: float) -> Tensor:
        """`(T S_{λ/T})^exp`."""
        T, damping = self.num_locations, evaluate_damping(self._damping, self.name)
        return scales.get_matpower(exp, lambda: damping / T) * T**exp

    def multiply_matpower(self, vector: Tensor, exp: float) -> Tensor:
        """Return `F_λ^exp V`: the scales and λ current, the basis of the last refresh.

        Raises:
            ValueError: another shape.
            RuntimeError: not refreshed yet, but for `exp = 1`.
        """
        scales = self.scales
        if scales is None:
            return super().multiply_matpower(vector, exp)
        self._check_vector(vector, scales)
        if exp == 1 and not scales.is_refreshed:
            return super().multiply_matpower(vector, exp)
        Q_A, Q_G = scales.basis
        rotated = Q_A.mT @ vector @ Q_G
        return Q_A @ (rotated * self._eigenvalues(scales, exp)) @ Q_G.mT

    def _check_vector(self, vector: Tensor, scales: EigenScaleFactor) -> None:
        if vector.shape != scales._cov_shape:
            raise ValueError(
                f"layer {self.name}: expected a V of shape {scales._cov_shape}, got "
                f"{tuple(vector.shape)}"
            )

    def multiply_cholesky(self, vector: Tensor, transpose: bool = False) -> Tensor:
        """Return `L V`, or `Lᵀ V`, with `L = Q diag(T S_{λ/T})^½`, so that `L Lᵀ = F_λ`.

        A square root, not a triangle: its columns are those of the eigenbasis.
        """
        if self.scales is None:
            return super().multiply_cholesky(vector, transpose)
        return self._multiply_root(vector, 0.5, transpose)

    def multiply_cholesky_inverse(self, vector: Tensor, transpose: bool = False) -> Tensor:
        """Return `L⁻¹ V`, or `L⁻ᵀ V`, with `L` as in `multiply_cholesky`."""
        if self.scales is None:
            return super().multiply_cholesky_inverse(vector, transpose)
        return self._multiply_root(vector, -0.5, not transpose)

    def _multiply_root(self, vector: Tensor, exp: float, into_basis: bool) -> Tensor:
        """`Q diag(T S_{λ/T})^exp V`, or its transpose, which goes into the basis."""
        scales = self.scales
        assert scales is not None
        self._check_vector(vector, scales)
        Q_A, Q_G = scales.basis
        roots = self._eigenvalues(scales, exp)
        if into_basis:
            return (Q_A.mT @ vector @ Q_G) * roots
        return Q_A @ (vector * roots) @ Q_G.mT

    def trace(self) -> Tensor:
        """Return `T Σ S`; before there is a basis `T tr A tr G`."""
        scales = self.scales
        if scales is None or not scales.is_refreshed:
            return super().trace()
        return self.num_locations * scales.cov_trace()

    def full_fisher_block(self) -> Tensor:
        """Return `T · Q diag(S) Qᵀ`, undamped, over the row-major entries of `V`.

        Before there is a basis `T · A ⊗ G`.
        """
        scales = self.scales
        if scales is None or not scales.is_refreshed:
            return super().full_fisher_block()
        S = scales.get_cov_var()
        assert S is not None
        stacks = [x if x.dim() == 3 else x[None] for x in (*scales.basis, S)]
        blocks = []
        for Q_A, Q_G, own in zip(*stacks, strict=True):
            Q = torch.kron(Q_A, Q_G)
            blocks.append((Q * own.flatten()) @ Q.mT)
        return self.num_locations * torch.block_diag(*blocks)


class FullyConnectedEKFACFB(EigenKroneckerFB, FullyConnectedKFACBasicFB):
    """EKFAC's block of an `nn.Linear`, or of a `Conv1D` of transformers.

    All dimensions of the input between the first and the last are positions of an
    example, and so are several calls with one batch size.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        time_dim: the input's dimension that is time; where that is the first, the second
            is that of the examples.
        size_limit: up to which size the block is EKFAC's; a larger side is as this says,
            and the block K-FAC's.

    Raises:
        TypeError: a module of another type.
        RuntimeError: use before `instantiate_factors`.

    >>> from kfac_torch.fisher_factors import refresh_inverses
    >>> block = FullyConnectedEKFACFB(nn.Linear(2, 1, bias=False))
    >>> block.instantiate_factors(damping=0.0)
    >>> x, g = torch.eye(2), torch.tensor([[1.0], [3.0]])
    >>> for _ in range(2):  # the first update is before there is a basis
    ...     block.accumulate(block.moments([x], [[g]], num_terms=2), decay=0.95)
    ...     _ = refresh_inverses(block.factors)
    >>> block.full_fisher_block()  # K-FAC's has 2.5 twice
    tensor([[0.5000, 0.0000],
            [0.0000, 4.5000]])
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        time_dim: int | None = None,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(module, name, options, size_limit=size_limit)
        self._time_dim = time_dim

    def _make_factors(self) -> tuple[Any, ...]:
        return self._with_scales(*super()._make_factors())

    def _squares(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], Q_A: Tensor, Q_G: Tensor
    ) -> Tensor:
        time_first = [x.dim() > 2 and self._time_dim in (0, -x.dim()) for x in inputs]
        return _squares_of_calls(inputs, grads, time_first, Q_A, Q_G, self.has_bias)


class LinearMapEKFACFB(EigenKroneckerFB, LinearMapFB):
    """EKFAC's block of a linear map inside an attention or a recurrent layer.

    Args:
        part: the map and its parameters, all of them trained.
        module: the layer it is inside of.
        name: of the block, for messages and checkpoints.
        options: of the factors.
        size_limit: up to which size the block is EKFAC's; not with groups.

    Raises:
        RuntimeError: use before `instantiate_factors`.
    """

    def __init__(
        self,
        part: Any,
        module: nn.Module,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(part, module, name, options, size_limit=size_limit)

    def _make_factors(self) -> tuple[Any, ...]:
        return self._with_scales(*super()._make_factors())

    def _squares(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], Q_A: Tensor, Q_G: Tensor
    ) -> Tensor:
        alone = self.groups == 1
        if isinstance(self.module, nn.MultiheadAttention):
            # Without a dimension of examples there is one.
            inputs = [x.unsqueeze(1) if x.dim() == 2 else x for x in inputs]
            grads = [g.unsqueeze(2) if g.dim() == 3 else g for g in grads]
        each = [
            _squares_of_calls(
                inputs[group :: self.groups],
                grads[group :: self.groups],
                [x.dim() > 2 for x in inputs[group :: self.groups]],
                Q_A if alone else Q_A[group],
                Q_G if alone else Q_G[group],
                self.has_bias,
            )
            for group in range(self.groups)
        ]
        return each[0] if alone else torch.stack(each)


def _squares_of_calls(
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    time_first: Sequence[bool],
    Q_A: Tensor,
    Q_G: Tensor,
    has_bias: bool,
) -> Tensor:
    """The squares of calls of a linear map on `[N, ..., in]`, or `[T, N, in]`."""
    a = [_examples(x, 0, swap) for x, swap in zip(inputs, time_first, strict=True)]
    g = [_examples(x, 1, swap) for x, swap in zip(grads, time_first, strict=True)]
    total = Q_A.new_zeros(len(Q_A), len(Q_G))
    for calls in by_batch_size(a, g):
        rows, sources = (torch.cat(x, -2) for x in zip(*calls, strict=True))
        total += squares_of_rows(rows, sources, Q_A, Q_G, has_bias)
    return total


def _examples(x: Tensor, lead: int, time_first: bool) -> Tensor:
    """Bring `[*lead, N, ..., d]` to `[*lead, N, P, d]`."""
    if x.dim() == lead + 1:  # one example by itself
        return x.unsqueeze(lead).unsqueeze(lead)
    if x.dim() == lead + 2:
        return x.unsqueeze(-2)
    return (x.transpose(lead, lead + 1) if time_first else x).flatten(lead + 1, -2)


class ConvEKFACFB(EigenKroneckerFB, ConvKFCBasicFB):
    """EKFAC's block of a convolution, with or without a bias and groups.

    `V` as `ConvKFCBasicFB` has it. All locations of an example, and several calls with one
    batch size, are summed before the square.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        size_limit: up to which size the block is EKFAC's.

    Raises:
        TypeError: a module of another type.
        RuntimeError: use before `instantiate_factors`.

    >>> block = ConvEKFACFB(nn.Conv2d(2, 3, 3, padding=1))
    >>> block.instantiate_factors(damping=0.1)
    >>> block.factor_sizes
    ['full 19', 'full 3', 'eigenvalues 19x3']
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(module, name, options, size_limit=size_limit)

    def _make_factors(self) -> tuple[Any, ...]:
        return self._with_scales(*super()._make_factors())

    def _gradients_of(self) -> ConvDiagonalFactor:
        """What makes the gradients of examples."""
        conv, name = self.module, f"{self.name}.weight"
        return ConvDiagonalFactor(
            [no_data(name)],
            [[no_data(name)]],
            self._filter_shape(),
            self._stride(),
            self._padding(),
            data_format(conv),
            conv.dilation,
            has_bias=self.has_bias,
            padding_mode=conv.padding_mode,
            groups=conv.groups,
            name=name,
            **conv_factor_kwargs(conv, self.options),
        )

    def _squares(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], Q_A: Tensor, Q_G: Tensor
    ) -> Tensor:
        factor, stacks = self._gradients_of(), [Q_A, Q_G]
        if self.groups == 1:
            stacks = [Q.unsqueeze(0) for Q in stacks]
        total = torch.zeros_like(stacks[0][:, :, :1] * stacks[1][:, :1])
        for calls in by_batch_size(inputs, grads):
            chunks = [factor.split_examples(a, g) for a, g in calls]
            for parts in zip(*chunks, strict=True):
                W = factor.example_gradients(*parts[0])
                for a, g in parts[1:]:
                    W += factor.example_gradients(a, g)
                total += squares_of_gradients(W.movedim(4, 1), *stacks)
        return total if self.groups > 1 else total[0]


class DepthwiseConvEKFACFB(ConvEKFACFB, DepthwiseConvKFCBasicFB):
    """EKFAC's block of a depthwise convolution: each channel has a basis of its own.

    Arguments and errors as `DepthwiseConvKFCBasicFB`.
    """


class ConvTransposeEKFACFB(ConvEKFACFB, ConvTransposeKFCFB):
    """EKFAC's block of a transposed convolution.

    Arguments and errors as `ConvEKFACFB`; `V` as `ConvTransposeKFCFB` has it.
    """

    def _squares(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], Q_A: Tensor, Q_G: Tensor
    ) -> Tensor:
        # Locations go with those of the mirrored input.
        mirrored = [grad.flip(*range(3, grad.dim())) for grad in grads]
        return super()._squares(inputs, mirrored, Q_A, Q_G)
