"""Blocks of layers that are used several times: independent uses, or a chain over time.

Notation: `T` the uses of a layer in one example, by calls or over time; `A0`, `G0` the
second moments over all uses, `A1`, `G1` those of one use and the one before it. Uses that
are independent give `F = T · A0 ⊗ G0`. Where they follow each other as a linear Gaussian
chain (Martens, Ba & Johnson 2018, "Kronecker-factored curvature approximations for
recurrent neural networks"), option 1 takes the chain to be the same in both directions
of time, `A1` and `G1` symmetric; option 2 takes a long sequence, and leaves out what
happens at its ends. Left out: powers other than -1 of a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..damping import DampingFunc
from ..fisher_factors import (
    FactorOptions,
    FullyConnectedMultiKF,
    series_option1_product,
    series_option2_product,
)
from ..fisher_factors.data import check_choice
from ..fisher_factors.linear import rows_moment
from ..size_limit import SizeLimit
from .base import Moment, accumulation_dtype, no_data
from .conv import ConvKFCBasicFB
from .kronecker import KroneckerProductFB
from .linear import FullyConnectedKFACBasicFB, LinearFB


class FullyConnectedMultiIndepFB(FullyConnectedKFACBasicFB):
    """The block of an `nn.Linear` that is used several times, uses independent.

    Called several times in a forward, or once with further leading dimensions, time
    among them.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        diagonal_approx_for_input: keep the diagonal of `A0` alone.
        diagonal_approx_for_output: keep the diagonal of `G0` alone.
        time_dim: the input's dimension that is time; uses need no order here.
        size_limit: what sides above a size become; None for none.

    Raises:
        TypeError: a module of another type.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        diagonal_approx_for_input: bool = False,
        diagonal_approx_for_output: bool = False,
        time_dim: int | None = None,
        size_limit: SizeLimit | None = None,
    ) -> None:
        super().__init__(
            module,
            name,
            options,
            diagonal_approx_for_input=diagonal_approx_for_input,
            diagonal_approx_for_output=diagonal_approx_for_output,
            size_limit=size_limit,
        )


class ConvKFCBasicMultiIndepFB(ConvKFCBasicFB):
    """The block of a convolution that is called several times, calls independent."""


class FullyConnectedSeriesFB(LinearFB, KroneckerProductFB):
    """The block of an `nn.Linear` whose uses are a linear Gaussian chain over time.

    The layer is called once for every time step, in their order, or once with all of
    them along `time_dim`. Only `F_λ⁻¹` is known.

    Args:
        module: the layer, or several that share all their parameters.
        name: of the layer, for messages and checkpoints.
        options: of the factors.
        option: 1 (the same in both directions of time) or 2 (long sequences).
        time_dim: the input's dimension that is time, where one call has all steps.

    Raises:
        ValueError: another option; by `input_moments`, calls of different shape, or one
            call with several dimensions of which none is `time_dim`.
        TypeError: a module of another type.
        NotImplementedError: an exponent other than -1, or a Cholesky factor.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        option: int = 1,
        time_dim: int | None = None,
    ) -> None:
        super().__init__(module, name, options)
        check_choice(f"layer {self.name}: option", option, (1, 2))
        self._option = option
        self._time_dim = time_dim
        self._num_uses = 1

    def _make_factors(self) -> tuple[Any, Any]:
        weight, (m, n) = self.params[0], self.sizes
        A, G = (
            FullyConnectedMultiKF(
                [[no_data(f"{self.name}.{side}")]],
                None,
                has_bias,
                size=size,
                name=f"{self.name}.{side}",
                options=self.options,
                dtype=accumulation_dtype(weight),
                device=weight.device,
            )
            for side, size, has_bias in (
                ("input", m, self.has_bias),
                ("output", n, False),
            )
        )
        return A, G

    def instantiate_factors(self, damping: DampingFunc) -> None:
        """Make the factors. `damping` is λ, in units of the Fisher of the mean loss."""
        # The chain's moments have to be asked for before there are any moments.
        factors = self._make_factors()
        for factor, split in zip(factors, self._damping_funcs(), strict=True):
            self._register_chain(factor, split)
            factor.instantiate_cov_variables()
        self._damping, self._factors = damping, factors

    def _register_chain(self, factor: Any, damping: DampingFunc) -> None:
        if self._option == 1:
            factor.register_option1quants(damping)
        else:
            factor.register_option2quants(damping)

    def _plan_inverse(self, factor: Any) -> None:
        self._register_chain(factor, 0.0)

    def register_matpower(self, exp: float) -> None:
        """Ask for `F_λ⁻¹` to be kept; after `instantiate_factors`."""
        self._check_exp(exp)
        for factor in self._sides():
            factor.instantiate_inv_variables()

    def _check_exp(self, exp: float) -> None:
        if exp != -1:
            raise NotImplementedError(
                f"layer {self.name}: only the inverse of a chain over time is known, "
                f"expected exp=-1, got {exp}"
            )

    def register_cholesky(self) -> None:
        """Raise NotImplementedError: only the inverse of a chain is known."""
        self._check_exp(0.5)

    def register_cholesky_inverse(self) -> None:
        """Raise NotImplementedError: only the inverse of a chain is known."""
        self._check_exp(-0.5)

    # Statistics.

    def _steps(self, tensors: Sequence[Tensor], sources: int = 0) -> list[Tensor]:
        """One tensor `[..., size]` per time step, behind `sources` leading dimensions."""
        if len(tensors) == 1 and self._time_dim is not None:
            dim = self._time_dim + (sources if self._time_dim >= 0 else 0)
            tensors = tensors[0].unbind(dim)
        elif len(tensors) == 1 and tensors[0].dim() > sources + 2:
            raise ValueError(
                f"layer {self.name}: expected a call for every time step, got one with "
                f"shape {tuple(tensors[0].shape[sources:])}; say which dimension is time "
                "with time_dim="
            )
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(
                f"layer {self.name}: expected the same shape at every time step, got "
                f'{sorted(shapes)}; register it with approx="kron_indep"'
            )
        return list(tensors)

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the moments of the inputs, `A0` and `A1`."""
        A, _ = self._sides()
        steps = self._steps(inputs)
        if len(steps) == 1:
            return [self._single_step(steps[0], self.has_bias)]
        return [A.new_cov([[tuple(steps)]])]

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the moments of the gradients, `G0` and `G1`, summed over sources."""
        _, G = self._sides()
        steps = self._steps(grads, sources=1)
        if len(steps) == 1:
            return [self._single_step(steps[0], False) * len(steps[0])]
        return [G.summed_cov(*steps)]

    def _single_step(self, rows: Tensor, has_bias: bool) -> Tensor:
        """The moment of a sequence of one step, which has no lag."""
        rows = rows.flatten(0, -2).to(self.dtype)
        moment = rows_moment(rows, has_bias)
        return torch.stack([moment, torch.zeros_like(moment)])

    def num_uses(self, inputs: Sequence[Tensor]) -> int:
        """`T`: the steps of an example."""
        return len(self._steps(inputs))

    def accumulate_factor(self, index: int, moment: Moment, decay: float) -> None:
        """Let a batch enter the running moments; the chain is as long as its sequences."""
        super().accumulate_factor(index, moment, decay)
        self._num_uses = moment.uses

    # Products.

    def multiply_matpower(self, vector: Tensor, exp: float) -> Tensor:
        """Return `F_λ⁻¹ V`, as of the last refresh.

        Raises:
            NotImplementedError: another exponent.
            RuntimeError: not refreshed yet.
        """
        self._check_exp(exp)
        A, G = self._sides()
        damping_A, damping_G = self._damping_funcs()
        # The chain is that of an example, which may carry any number of loss terms.
        T = self._num_uses
        if self._option == 1:
            L_A, psi_A = A.get_option1quants(damping_A)
            L_G, psi_G = G.get_option1quants(damping_G)
            Z = series_option1_product(psi_G, L_G, psi_A, L_A, vector.mT, T)
        else:
            quants_A = A.get_option2quants(damping_A)
            quants_G = G.get_option2quants(damping_G)
            Z = series_option2_product(quants_G, quants_A, vector.mT, T)
        return Z.mT * (T / self.num_locations)

    def full_fisher_block(self) -> Tensor:
        """Raise NotImplementedError: only the inverse of a chain is known."""
        raise NotImplementedError(
            f"layer {self.name}: the Fisher of a chain over time is known by its inverse "
            "alone; use multiply_inverse"
        )

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return what restores the block bit for bit."""
        return {**super().state_dict(), "num_uses": self._num_uses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; ValueError for another layer's."""
        super().load_state_dict(state)
        self._num_uses = state["num_uses"]
