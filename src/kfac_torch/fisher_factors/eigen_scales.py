"""`EigenScaleFactor`: second moments of a layer's gradient in the eigenbasis of K-FAC.

Notation: `A = Q_A diag(s_A) Q_Aᵀ [m, m]` and `G = Q_G diag(s_G) Q_Gᵀ [n, n]` the factors
of a Kronecker block, `W_i = Σ_p a_ip g_ipᵀ [m, n]` the gradient of example `i`, summed
over its positions, `R` the rows of the layer. The scales are

    S = (1/R) Σ_i (Q_Aᵀ W_i Q_G)²        (elementwise square)

summed over sources (George et al. 2018, arXiv 1806.03884, equation 9): the diagonal of
the exact block in this basis, up to `T = R/N`. With one position it is `(a Q_A)²ᵀ (g
Q_G)² / R` and no gradient of an example is formed; else those of some examples at a time
are, and rotated, or are formed of rotated rows, whichever is cheaper.

Damping is K-FAC's, with the eigenvalues corrected: with π of `s_A`, `s_G` and λ split as in
`damping.py`, `x = π√λ` and `y = √λ/π`,

    S_λ = S + (s_A + x)(s_G + y)ᵀ − s_A s_Gᵀ = S + y s_A + x s_G + λ

So where `S = s_A s_Gᵀ` it is K-FAC's damped block, and λ = 0 leaves `S`. George et al. have
`S + λ`, which holds back far less the directions in which one side is large and the other
small; with it runs took a fifth to a quarter more steps (`docs/benchmarks.md`).

The basis, `s_A` and `s_G` (the diagonals of the factors in it) move at a refresh alone, the
scales at every update. Before the first update in a basis they are `s_A s_Gᵀ`, K-FAC's own.
From a basis to the next they go as

    S' = s_A' s_G'ᵀ ∘ (R_A S R_Gᵀ) / (R_A r_A)(R_G r_G)ᵀ,   R_A = (Q_A'ᵀ Q_A)²

with `r_A`, `r_G` the diagonals in the old basis of the factors of now, the same that `s_A'`
and `s_G'` are of. `R_A S R_Gᵀ` is the diagonal, in the new basis, of the matrix that `S` is
in the old. The squares of a rotation are doubly stochastic, so by itself it would even the
scales out from refresh to refresh, in a basis that wanders; over the same of K-FAC's own it
is what was learned beside K-FAC, and that is kept. Scales stay non-negative, an unchanged
basis leaves them as they are, and scales that are K-FAC's become K-FAC's. Diagonals count
as no less than their rounding errors, `ε tr A` and `ε tr G`, in these ratios.

A basis in which its factor is still near enough to diagonal may be kept (`tolerance`): a
product says how near it is, where a decomposition is the work of six or more. One that is
not may be turned in place of a new one (`warm_start`), by a step of orthogonal iteration
(Vyas et al. 2024, arXiv 2409.11321, algorithm 4): it nears the eigenbasis from refresh to
refresh, and in whatever basis the scales are the exact diagonal.

Left out: sides that are not whole matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from ..damping import DampingFunc, compute_pi
from ..linalg import (
    diagonal_in_basis,
    off_diagonal_share,
    orthogonal_iteration,
    psd_eigh,
)
from .base import FactorOptions, FisherFactor
from .cholesky_batch import store
from .data import append_homog
from .diagonal import GRADIENT_BYTES, DiagonalFactor
from .inverse_providing import Computed, InverseProvidingFactor, Stored
from .refreshing import refresh_inverses


class EigenScaleFactor(DiagonalFactor):
    """The scales of a Kronecker product `A ⊗ G`, and the basis they belong to.

    Stored as `[m, n]`, or `[groups, m, n]` where `A` and `G` are stacks of matrices.

    Args:
        A: the factor of the inputs, a whole matrix.
        G: the factor of the output gradients.
        name: for messages and checkpoints.
        options: see `FactorOptions`.

    Attributes:
        tolerance: the share of a factor beside its diagonal, by norm, up to which a refresh
            keeps its basis; None keeps none.
        warm_start: turn the old basis by one step of orthogonal iteration in place of a
            decomposition, once there is one that scales have entered.

    >>> from kfac_torch.fisher_factors import FullyConnectedKroneckerFactor
    >>> A, G = (FullyConnectedKroneckerFactor([[torch.eye(2)]]) for _ in range(2))
    >>> EigenScaleFactor(A, G, "layer.scales").describe()
    'eigenvalues 2x2'
    """

    def __init__(
        self,
        A: InverseProvidingFactor,
        G: InverseProvidingFactor,
        name: str,
        options: FactorOptions = FactorOptions(),
    ) -> None:
        self._sides = (A, G)
        self._basis = Stored("eigenbasis", 0.0, 0.0)
        self._diagonals = Stored("diagonals", 0.0, 0.0)
        self._num_corrections = 0
        self.tolerance: float | None = None
        self.warm_start = False
        # Of a copy that a thread refreshes: how scales go from the old basis to its own.
        self._moves: list[tuple[Tensor, Tensor]] | None = None
        super().__init__([[_no_data]], name, options, A._dtype, A._device)

    @property
    def _cov_shape(self) -> tuple[int, ...]:
        A, G = self._sides
        return (*A._matrix_shape[:-1], G._matrix_shape[-1])

    def _check_tensor(self, *tensors: Tensor) -> None:
        raise RuntimeError(f"{self.name}: the moment is the block's to make")

    def _new_cov(self, *tensors: Tensor) -> Tensor:
        raise RuntimeError(f"{self.name}: the moment is the block's to make")

    def num_rows(self, *tensors: Tensor) -> int:
        """`R`: the rows of the layer."""
        return self._sides[0].num_rows(*tensors)

    def describe(self) -> str:
        """Return how many scales there are, as in `"eigenvalues 513x256"`."""
        *stack, m, n = self._cov_shape
        return "".join(f"{size} x " for size in stack) + f"eigenvalues {m}x{n}"

    # The basis.

    @property
    def basis(self) -> tuple[Tensor, Tensor]:
        """`Q_A [..., m, m]` and `Q_G [..., n, n]`, eigenvectors as columns.

        Raises:
            RuntimeError: before the first refresh.
        """
        if not self._basis.refreshed:
            raise RuntimeError(
                f"{self.name}: there is no basis yet; call refresh_inverses(factors), or "
                "update_inverses() of the estimator, after an update of the statistics"
            )
        Q_A, Q_G = self._basis.tensors
        return Q_A, Q_G

    @property
    def diagonals(self) -> tuple[Tensor, Tensor]:
        """`s_A [..., m]` and `s_G [..., n]`: those of `Qᵀ A Q` and `Qᵀ G Q`, as of the last
        refresh; zeros before the first.
        """
        s_A, s_G = self._diagonals.tensors
        return s_A, s_G

    @property
    def basis_version(self) -> int:
        """A number that changes with the basis; 0 before there is one."""
        return 1 + self._basis.tensors[0]._version if self._basis.refreshed else 0

    @property
    def is_refreshed(self) -> bool:
        """Whether there is a basis."""
        return self._basis.refreshed

    @property
    def num_corrections(self) -> int:
        """How many updates have entered the scales; those before there was a basis, and
        those of an older one, have not.
        """
        return self._num_corrections

    def instantiate_cov_variables(self) -> None:
        """Make the scales and the basis. Raises RuntimeError on a second call."""
        super().instantiate_cov_variables()
        shapes = [side._matrix_shape for side in self._sides]
        like = {"dtype": self._dtype, "device": self._device}
        self._basis.tensors = tuple(torch.zeros(shape, **like) for shape in shapes)
        self._diagonals.tensors = tuple(torch.zeros(s[:-1], **like) for s in shapes)

    def accumulate(self, cov: Tensor, ema_decay: float, weight: float = 1.0) -> None:
        """Let new scales, in the current basis, enter the moving average.

        Before there is a basis the update is counted alone.
        """
        if not self.is_refreshed:
            self.skip()
            return
        super().accumulate(cov, ema_decay, weight)
        self._num_corrections += 1

    def skip(self) -> None:
        """Count an update that says nothing of the scales in the current basis."""
        self._num_updates += 1

    def compute_stored(self) -> list[Computed]:
        """Return the next basis for the current `A` and `G`, and the scales in it."""
        if not self._num_corrections:
            new = [self._decomposed(side) for side in self._sides]
            s_A, s_G = (s for s, _ in new)
            return self._moved(new, s_A.unsqueeze(-1) * s_G.unsqueeze(-2))
        pairs = list(zip(self._sides, self.basis, strict=True))
        if self.tolerance is None and not self.warm_start:
            new = [self._decomposed(side) for side in self._sides]
            return self._carried(new, [None, None])
        old = [diagonal_in_basis(side.get_cov(), Q) for side, Q in pairs]
        kept = self._kept(old)
        if all(kept):
            return [(self._diagonals, tuple(old))]
        new = [
            (r, Q) if good else self._next(side, Q)
            for (side, Q), r, good in zip(pairs, old, kept, strict=True)
        ]
        return self._carried(new, old)

    def _carried(
        self, new: Sequence[tuple[Tensor, Tensor]], old: Sequence[Tensor | None]
    ) -> list[Computed]:
        """The next diagonals and bases, and the scales brought to them."""
        left, right = (
            carrying(Q, s, Q_old, r)
            for (s, Q), Q_old, r in zip(new, self.basis, old, strict=True)
        )
        if self._moves is not None:
            self._moves.append((left, right))
        return self._moved(new, left @ self._stored_cov() @ right.mT)

    def _decomposed(self, side: InverseProvidingFactor) -> tuple[Tensor, Tensor]:
        floor = self._options.eigenvalue_clipping_threshold
        return psd_eigh(side.get_cov(), floor, side.name)

    def _next(self, side: InverseProvidingFactor, Q: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonal of a side in its next basis, and that."""
        if not self.warm_start:
            return self._decomposed(side)
        Q = orthogonal_iteration(side.get_cov(), Q)
        return diagonal_in_basis(side.get_cov(), Q), Q

    def _moved(
        self, sides: Sequence[tuple[Tensor, Tensor]], scales: Tensor
    ) -> list[Computed]:
        (s_A, Q_A), (s_G, Q_G) = sides
        return [
            (self._basis, (Q_A, Q_G)),
            (self._diagonals, (s_A, s_G)),
            (Stored("scales", 0.0, 0.0, (self._stored_cov(),)), (scales,)),
        ]

    def _kept(self, diagonals: Sequence[Tensor]) -> list[bool]:
        """Whether the basis of each side is good enough; reads the host."""
        if self.tolerance is None:
            return [False, False]
        pairs = zip(self._sides, diagonals, strict=True)
        shares = torch.stack([off_diagonal_share(s.get_cov(), r) for s, r in pairs])
        # A NaN is above any tolerance.
        return (shares <= self.tolerance).tolist()

    def make_inverse_update_ops(self) -> list[Callable[[], None]]:
        """Return a callable that brings the scales to the basis of the current factors."""

        def op() -> None:
            refresh_inverses([self])

        return [op]

    # Refreshed in a thread.

    def snapshot(
        self, twins: Mapping[FisherFactor, FisherFactor], state: Any = None
    ) -> Self:
        """Return a copy to be refreshed in a thread, of the copies of `A` and `G`."""
        twin = super().snapshot(twins, state)
        A, G = (twins[side] for side in self._sides)
        assert isinstance(A, InverseProvidingFactor)
        assert isinstance(G, InverseProvidingFactor)
        twin._sides = A, G
        twin._cov = self._stored_cov().clone()
        for name in ("_basis", "_diagonals"):
            own = getattr(self, name)
            tensors = tuple(tensor.clone() for tensor in own.tensors)
            setattr(twin, name, replace(own, tensors=tensors))
        twin._moves = []
        if state is not None:
            twin._num_corrections = state["num_corrections"]
        return twin

    def snapshot_state(self) -> dict[str, Any]:
        """Return what makes the same copy again: the basis has not moved since."""
        return {"num_corrections": self._num_corrections}

    def adopt(self, twin: Self) -> None:
        """Take the basis of a copy, and bring to it what the scales are by now."""
        super().adopt(twin)
        if all(map(torch.equal, twin.basis, self.basis)):  # it was good enough
            store([(self._diagonals, twin.diagonals)])
            return
        scales = twin._stored_cov()  # without corrections they are `s_A s_Gᵀ`
        if self._num_corrections:
            left, right = twin._moves[0] if twin._moves else self._to_decomposed(twin)
            scales = left @ self._stored_cov() @ right.mT
        store(self._moved(list(zip(twin.diagonals, twin.basis, strict=True)), scales))

    def _to_decomposed(self, twin: Self) -> tuple[Tensor, Tensor]:
        """From the current basis to that of a copy, which had no corrections to bring."""
        left, right = (
            carrying(Q, s, Q_old)
            for Q, s, Q_old in zip(twin.basis, twin.diagonals, self.basis, strict=True)
        )
        return left, right

    # Costs.

    @property
    def kept_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the scales, of the basis and of the diagonals in it."""
        shapes = [side._matrix_shape for side in self._sides]
        return [self._cov_shape, *shapes, *(shape[:-1] for shape in shapes)]

    @property
    def refresh_cost(self) -> int:
        """About how many multiply-adds a refresh takes."""
        # An eigendecomposition is some 9 n³ (Golub & Van Loan), a rotation one more.
        *stack, m, n = self._cov_shape
        return torch.Size(stack).numel() * (10 * (m**3 + n**3) + m * n * (m + n))

    # Damping.

    def _damping_of(self, damping_func: DampingFunc) -> Tensor:
        """`y s_A + x s_G + λ`, what λ adds to each scale."""
        s_A, s_G = self.diagonals
        damping = super()._damping_of(damping_func)
        pi = compute_pi(s_A.mean(-1), s_G.mean(-1))[..., None, None]
        x, y = pi * damping**0.5, damping**0.5 / pi
        return y * s_A.unsqueeze(-1) + x * s_G.unsqueeze(-2) + damping

    # State.

    def to(self, device: torch.device | str) -> Self:
        """Move the state to a device."""
        super().to(device)
        for kept in (self._basis, self._diagonals):
            kept.tensors = tuple(tensor.to(self._device) for tensor in kept.tensors)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return all that `load_state_dict` needs to restore the factor bit for bit."""
        return {
            **super().state_dict(),
            "basis": [q.clone() for q in self._basis.tensors],
            "diagonals": [s.clone() for s in self._diagonals.tensors],
            "refreshed": self._basis.refreshed,
            "num_corrections": self._num_corrections,
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing."""
        if "basis" not in state:
            raise ValueError(
                f"{self.name}: expected scales and their basis in the state, got those of "
                "another factor; was the layer registered with another approximation?"
            )
        super().check_state_dict(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state of another factor; nothing is changed then.
        """
        super().load_state_dict(state)
        for kept, name in ((self._basis, "basis"), (self._diagonals, "diagonals")):
            kept.tensors = tuple(
                tensor.to(self._device, self._dtype, copy=True) for tensor in state[name]
            )
        self._basis.refreshed = state["refreshed"]
        self._num_corrections = state["num_corrections"]


def _diagonal_moved(R: Tensor, s: Tensor) -> Tensor:
    return (R @ s.unsqueeze(-1)).squeeze(-1)


def carrying(Q_new: Tensor, s: Tensor, Q: Tensor, r: Tensor | None = None) -> Tensor:
    """Return one side's part of `S'`: `R` with its rows scaled by `s' / R r`.

    Args:
        Q_new: the new basis, `[..., n, n]`.
        s: the diagonal of the factor in it, `[..., n]`.
        Q: the old basis.
        r: the diagonal in that, of the same factor; `Rᵀ s'` if None, which it is where the
            new basis is an eigenbasis.

    >>> Q = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    >>> s, r = torch.tensor([3.0, 1.0]), torch.tensor([1.72, 2.28])
    >>> torch.allclose(carrying(Q, s, torch.eye(2), r) @ r, s)
    True
    """
    R = (Q_new.mT @ Q).square_()
    if r is None:
        r = _diagonal_moved(R.mT, s)
    # What is below is rounding error in both, whose ratios would pile up.
    floor = torch.finfo(s.dtype).eps * s.sum(-1, keepdim=True)
    evened = _diagonal_moved(R, r) + floor
    ratio = torch.where(floor > 0, (s + floor) / torch.where(floor > 0, evened, 1), 1)
    return ratio.unsqueeze(-1) * R


def _no_data() -> Tensor:
    raise RuntimeError("scales keep no data: the moment is the block's to make")


def squares_of_gradients(W: Tensor, Q_A: Tensor, Q_G: Tensor) -> Tensor:
    """Return `Σ_i (Q_Aᵀ W_i Q_G)²`, `[groups, m, n]`.

    Args:
        W: gradients of examples and sources, `[..., groups, m, n]`.
        Q_A: `[groups, m, m]`.
        Q_G: `[groups, n, n]`.

    >>> W = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 0.0]]]])
    >>> squares_of_gradients(W, torch.ones(1, 1, 1), torch.eye(2)[None])
    tensor([[[10.,  4.]]])
    """
    W = W.flatten(0, -4)
    rotated = torch.einsum("xgmn,gmi->xgin", W, Q_A)
    rotated = torch.einsum("xgin,gno->xgio", rotated, Q_G)
    return rotated.square_().sum(0)


def squares_of_rows(
    a: Tensor, g: Tensor, Q_A: Tensor, Q_G: Tensor, has_bias: bool
) -> Tensor:
    """Return `Σ_i (Q_Aᵀ (Σ_p a_ip g_ipᵀ) Q_G)²`, `[m, n]`, some examples at a time.

    Args:
        a: `[N, P, in]`.
        g: `[S, N, P, n]`, of S sources.
        Q_A: `[m, m]`; with a bias `m` is `in + 1`.
        Q_G: `[n, n]`.
        has_bias: append a one, last, to each row of `a`.

    >>> a, g = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[[3.0], [-1.0]]]])
    >>> squares_of_rows(a, g, torch.ones(1, 1), torch.ones(1, 1), has_bias=False)
    tensor([[1.]])
    """
    S, _, P, n = g.shape
    m = len(Q_A)
    rows_first = P == 1 or P * (m * m + S * n * n) < S * m * n * (m + n)
    widest = max(P * (m + S * n), 0 if P == 1 else S * m * n)
    step = max(1, GRADIENT_BYTES // (widest * Q_A.element_size()))
    total = Q_A.new_zeros(m, n)
    for some_a, some_g in zip(a.split(step), g.split(step, 1), strict=True):
        x, y = some_a.to(Q_A.dtype), some_g.to(Q_G.dtype)
        x = append_homog(x) if has_bias else x
        if rows_first:
            x, y = x @ Q_A, y @ Q_G
        if P == 1:
            total += x.square_().squeeze(1).mT @ y.square_().sum(0).squeeze(1)
        elif rows_first:
            total += (x.mT @ y).square_().sum((0, 1))
        else:
            W = (x.mT @ y).unsqueeze(2)
            total += squares_of_gradients(W, Q_A[None], Q_G[None])[0]
    return total


def by_batch_size(
    inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Return calls that may have examples in common together: those of one batch size.

    Args:
        inputs: `[N, ...]`, one per call.
        grads: `[S, N, ...]`.
    """
    groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for a, g in zip(inputs, grads, strict=True):
        groups.setdefault(len(a), []).append((a, g))
    return list(groups.values())
