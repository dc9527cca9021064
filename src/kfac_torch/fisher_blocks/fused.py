"""Blocks of the linear maps inside a fused layer: attention, LSTM, GRU, RNN.

Each map `s = W a + b` has a block `F = T · A ⊗ G` of its own, with `A` and `G` over all
its rows, examples times positions or steps, which are taken as independent uses of the
map (as in Martens, Ba & Johnson 2018, "Kronecker-factored curvature approximations for
recurrent neural networks"; "expand" weight sharing in Eschenhagen et al. 2023, arXiv
2311.00636). `G` is joint over the gates of a recurrent layer.

Notation: `R` the rows of all calls, `T = R/N`. Maps that share a parameter are groups of
one block, `V [groups, in(+1), out]`: the queries', keys' and values' of `in_proj_weight`,
whose `R_g` rows differ where attention is to another sequence. With `A_g = P_gᵀP_g/R_g`
and `G_g = S_gᵀS_g/R`, `R = Σ R_g`, each has its own `T_g A_g ⊗ G_g` and its own damping:
the factor `R_g/R` in `G_g` is made up for by `T` and by π. Left out: how the maps are
seen (`fused.py` of the package); the bias_k and bias_v of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..fisher_factors import FactorOptions, FullyConnectedKroneckerFactor
from ..size_limit import SizeLimit
from .base import FisherBlock, accumulation_dtype, no_data
from .kronecker import KroneckerProductFB
from .layer import layer_to_vector
from .sides import make_side


@dataclass(frozen=True)
class LinearPart:
    """A linear map inside a module, or several with one weight.

    Args:
        name: as the calls of the map are recorded.
        weight: `[groups · out, in]`, trained; `[groups · out]` for a bias that belongs to
            no weight, whose input is a one.
        bias: `[groups · out]`, or None.
        groups: maps that share the weight, whose calls come in turn.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None = None
    groups: int = 1

    @property
    def params(self) -> list[nn.Parameter]:
        """The weight, and the bias if there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class LinearMapFB(KroneckerProductFB):
    """The Kronecker block of a linear map inside a fused layer.

    Args:
        part: the map and its parameters, all of them trained.
        module: the layer it is inside of.
        name: of the block, for messages and checkpoints.
        options: of the factors.
        diagonal_approx_for_input: keep the diagonal of `A` alone.
        diagonal_approx_for_output: keep the diagonal of `G` alone.
        size_limit: what sides above a size become; None for none. With groups they stay
            as they are whatever their size.

    Raises:
        NotImplementedError: a diagonal side with groups.
        RuntimeError: use before `instantiate_factors`.

    >>> cell = nn.RNNCell(2, 1)
    >>> block = LinearMapFB(LinearPart("ih", cell.weight_ih, cell.bias_ih), cell)
    >>> block.instantiate_factors(damping=0.1)
    >>> x, g = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
    >>> block.accumulate(block.moments([x], [[g]], num_terms=1), decay=0.95)
    >>> block.full_fisher_block()
    tensor([[ 9., 18.,  9.],
            [18., 36., 18.],
            [ 9., 18.,  9.]])
    """

    skips_idle_rows = True

    def __init__(
        self,
        part: LinearPart,
        module: nn.Module,
        name: str | None = None,
        options: FactorOptions = FactorOptions(),
        *,
        diagonal_approx_for_input: bool = False,
        diagonal_approx_for_output: bool = False,
        size_limit: SizeLimit | None = None,
    ) -> None:
        name = name or part.name
        FisherBlock.__init__(self, part.params, (module,), name, options)
        self.module = module
        self.size_limit = size_limit
        self.part = part.name
        self.groups = part.groups
        self.has_bias = part.bias is not None
        self._diagonal_sides = (diagonal_approx_for_input, diagonal_approx_for_output)
        if part.groups > 1 and any(self._diagonal_sides):
            raise NotImplementedError(
                f"layer {name}: {part.groups} maps in one weight have no diagonal sides; "
                'register it with approx="kron"'
            )
        self._in_features = part.weight.numel() // len(part.weight)

    def _make_factors(self) -> tuple[Any, Any]:
        sizes = self._in_features, len(self.params[0]) // self.groups
        A, G = (
            self._make_stack(size, has_bias, side)
            if self.groups > 1
            else make_side(diagonal, size, has_bias, self, side)
            for diagonal, size, has_bias, side in zip(
                self._diagonal_sides,
                sizes,
                (self.has_bias, False),
                ("input", "output"),
                strict=True,
            )
        )
        return A, G

    def _make_stack(self, size: int, has_bias: bool, side: str) -> Any:
        name, weight = f"{self.name}.{side}", self.params[0]
        return FullyConnectedKroneckerFactor(
            [[no_data(name)]],
            has_bias,
            size=size,
            groups=self.groups,
            name=name,
            options=self.options,
            dtype=accumulation_dtype(weight),
            device=weight.device,
        )

    # Statistics.

    def _rows(self, calls: Sequence[Tensor], lead: int = 0) -> list[Tensor]:
        """The rows of all calls, one matrix per group, behind `lead` dimensions."""
        rows = [call.flatten(lead, -2) for call in calls]
        return [
            torch.cat(rows[group :: self.groups], lead)
            if len(rows) > self.groups
            else rows[group]
            for group in range(self.groups)
        ]

    def input_moments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the moment of `A`."""
        A, _ = self._sides()
        # A group of which no row counts has no gradients either.
        rows = [a if len(a) else a.new_zeros(1, a.shape[-1]) for a in self._rows(inputs)]
        return [A.new_cov([[tuple(rows)]])]

    def grad_moments(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], num_terms: float
    ) -> list[Tensor]:
        """Return the moment of `G`, summed over the sources `grads[call] [S, ...]`."""
        _, G = self._sides()
        rows = self._rows(grads, lead=1)
        cov = G.summed_cov(*rows)
        if self.groups == 1:
            return [cov]
        total = sum(g.shape[1] for g in rows)
        return [
            torch.stack([C * (g.shape[1] / total) for C, g in zip(cov, rows, strict=True)])
        ]

    # Products.

    def params_to_vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Bring tensors like `params` to `V [in(+1), out]`, the bias last.

        With groups `V [groups, in(+1), out]`, the sizes those of one group.
        """
        weight = tensors[0].reshape(len(tensors[0]), -1)
        return layer_to_vector([weight, *tensors[1:]], self.groups)


def linear_parts(module: nn.Module) -> list[LinearPart]:
    """Return the linear maps inside a fused layer that have a trained weight.

    There are none in any other layer. A bias that is frozen is left out; so is a weight
    that is computed from other parameters (`torch.nn.utils.weight_norm`).

    >>> [part.name for part in linear_parts(nn.GRU(2, 3, bidirectional=True))]
    ['ih_l0', 'hh_l0', 'ih_l0_reverse', 'hh_l0_reverse']
    >>> [part.name for part in linear_parts(nn.MultiheadAttention(4, 2, kdim=3))]
    ['q_proj', 'k_proj', 'v_proj', 'in_proj_bias', 'out_proj']
    """
    if isinstance(module, nn.MultiheadAttention):
        parts = [
            _part(module, "in_proj", "in_proj_weight", "in_proj_bias", groups=3),
            *(_part(module, f"{x}_proj", f"{x}_proj_weight") for x in "qkv"),
            None
            if module.in_proj_weight is not None
            else _part(module, "in_proj_bias", "in_proj_bias", groups=3),
            _part(module.out_proj, "out_proj", "weight", "bias"),
        ]
    elif not isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return []
    else:
        names = [
            name.removeprefix("weight_")
            for name, _ in module.named_parameters(recurse=False)
            if name.startswith("weight_")
        ]
        parts = [_part(module, name, f"weight_{name}", f"bias_{name}") for name in names]
    return [part for part in parts if part is not None]


def _part(
    module: nn.Module, name: str, weight: str, bias: str = "", groups: int = 1
) -> LinearPart | None:
    W, b = (_trained(module, attribute) for attribute in (weight, bias))
    return None if W is None else LinearPart(name, W, b, groups)


def _trained(module: nn.Module, attribute: str) -> nn.Parameter | None:
    param = getattr(module, attribute, None)
    return param if isinstance(param, nn.Parameter) and param.requires_grad else None
