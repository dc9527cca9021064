"""What comes before a step: the factors, where due their inverses, and `F̂⁻¹ g`.

Notation: `g` the gradient of the mean loss, `F̂` the damped block-diagonal Fisher,
`p = F̂⁻¹ g`, `η` the learning rate, `c` the norm constraint:

    κ = min(1, sqrt(c / Σ η² pᵀg)),  pᵀg = pᵀF̂p

(Ba et al. 2017, section 5, "Distributed second-order optimization using
Kronecker-factored approximations"). `KFAC` makes its own step of `p`, `KFACPreconditioner`
leaves that to another optimizer. Left out: λ, and what a singular factor leads to.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from .cost_model import Intervals
from .damping import LevenbergMarquardt
from .estimator import FisherEstimator
from .fisher_blocks import FisherBlock
from .options import QModel
from .refresh_schedule import Refresh, RefreshPlan, as_refresh, set_bases

_COUNTS = ("num_steps", "num_burnt", "inverses_due", "last_update", "last_refresh")
# The first factors are of few batches: their inverses age fast.
_EARLY_REFRESHES = 3


class Schedule:
    """When statistics and inverses are due, and the factors' part of a step.

    Args:
        estimator: of the Fisher.
        cov_update_every: steps between statistics.
        invert_every: steps between refreshes of the inverses, or a `Refresh`.
        num_burnin_steps: the first steps, which only gather statistics.
        early_updates: of the steps after them, that take statistics whatever the interval;
            they refresh all inverses too.
        free: of `"statistics"` and `"inverses"`, the intervals that the cost model may
            lengthen at the first batch.
        model: the quadratic model that makes the steps, if any.

    Attributes:
        options: what it was made with, by name.
        intervals: in force.
        num_steps: taken, burn-in not counted.
        num_burnt: steps of burn-in taken.
        plan: which layers are refreshed when.
        inverses_due: whether all inverses are to be refreshed; staggered, or those of
            layers with a basis of EKFAC, in their turn.
        layers_due: whose turn has come.
        last_update: the step at which statistics last entered the factors, if known.
        last_refresh: the step of the factors that the last inverses to come are of, if
            known.
        at_once: whether no refresh is left to a thread for now.
    """

    def __init__(
        self,
        estimator: FisherEstimator,
        *,
        cov_update_every: int,
        invert_every: int | Refresh,
        num_burnin_steps: int = 0,
        early_updates: int = 0,
        free: Iterable[str] = (),
        model: QModel | None = None,
    ) -> None:
        self._estimator = estimator
        self._refresh = refresh = as_refresh(invert_every)
        assert refresh.every is not None
        every = refresh.every
        self.plan = RefreshPlan(estimator.blocks, refresh)
        set_bases(estimator.blocks, refresh)
        self.options = {
            "cov_update_every": cov_update_every,
            "invert_every": every if refresh == Refresh(every=every) else refresh,
            "num_burnin_steps": num_burnin_steps,
            "early_updates": early_updates,
        }
        self._least = Intervals(statistics=cov_update_every, inverses=every)
        self.intervals, self._free = self._least, frozenset(free)
        self._settled, self._model = not self._free, model
        self.at_once = False
        self._collected = False
        self.num_steps = 0
        self.num_burnt = 0
        self.inverses_due = True
        self.layers_due: list[str] = []
        self.last_update: int | None = None
        self.last_refresh: int | None = None

    @property
    def burning(self) -> bool:
        """Whether the next step is one of the burn-in."""
        return self.num_burnt < self.options["num_burnin_steps"]

    @property
    def refresh_due(self) -> bool:
        """Whether inverses are due, by their age or as some of the first ones, and are not
        under way; or those that were are to come in.
        """
        background = self._estimator.background
        return background.is_due(self.num_steps) or bool(set(self._due()) - self._held())

    def _held(self) -> set[str]:
        """The layers whose inverses are under way; if due again, once these have come."""
        return set() if self.at_once else self._estimator.background.layers

    @property
    def _early_refreshes(self) -> int:
        """How many first steps refresh all: few, where a refresh is worth many steps."""
        if self._refresh.early is not None:
            return self._refresh.early
        if self.intervals.inverses > self._least.inverses:
            return _EARLY_REFRESHES
        return max(_EARLY_REFRESHES, self.options["early_updates"])

    def _due(self) -> list[str]:
        """The layers whose inverses are due."""
        blocks = self._estimator.blocks
        if self.num_steps < self._early_refreshes:
            return list(blocks)
        due = set(self.layers_due)
        if self._estimator.has_new_layers():
            due.update(name for name, block in blocks.items() if is_new(block))
        if self.inverses_due and not self._refresh.staggered:
            # On a layer whose basis has an interval of its own λ acts at once.
            due.update(n for n in blocks if self.plan.periods[n] == self._refresh.every)
        return [name for name in blocks if name in due]

    def of_mean_loss(self, grads: list[Tensor]) -> tuple[list[Tensor], float]:
        """Return gradients of the mean loss, and what they were divided by for that."""
        if not (self._estimator.sums_gradients and self._estimator.num_terms):
            return grads, 1
        terms = self._estimator.num_terms
        return list(torch._foreach_div(grads, terms)), terms

    def update_statistics(self, grads: list[Tensor]) -> list[str]:
        """Update the factors where due; return where there is a NaN or an Inf."""
        estimator = self._estimator
        self._collected = estimator.collecting and estimator.has_statistics()
        if not self._collected:
            estimator.reset()
            return []
        norms = [norm.to(grads[0].device) for norm in torch._foreach_norm(grads)]
        finite = torch.stack(norms).isfinite().all() if norms else None
        forward_cost = estimator.forward_cost
        with estimator.capture.clock.phase("statistics"):
            decay = 1.0 if self.burning else None
            before = estimator.ledger.unknown_scales
            bad = estimator.update_covariances(finite, decay=decay)
        self._collected = estimator.ledger.unknown_scales == before  # else they stay due
        if not bad and self._collected:
            self.last_update = self.num_steps
            self._settle(forward_cost)
        return bad

    def _settle(self, forward_cost: float) -> None:
        """Choose the intervals that are free, once, by what the first batch has shown."""
        if self._settled:
            return
        self._settled = True
        if not forward_cost:
            return
        calls = [call for call in self._estimator.capture.forwards if call.arrived]
        stride = self._model.stride(calls[0].num_terms) if self._model and calls else None
        costs = self._estimator.step_costs(forward_cost, stride, self._refresh.basis_every)
        self._set_intervals(costs.amortised(self._least, self._free))
        found, least = self.intervals, self._least
        if (found.statistics, found.inverses) != (least.statistics, least.inverses):
            logging.getLogger("kfac_torch").info("K-FAC: %s", found)

    def _set_intervals(self, intervals: Intervals) -> None:
        self.intervals = intervals
        if intervals.inverses != self._refresh.every:
            self._refresh = replace(self._refresh, every=intervals.inverses)
            self.plan = RefreshPlan(self._estimator.blocks, self._refresh)

    def paced(self, rule: LevenbergMarquardt) -> LevenbergMarquardt:
        """Return a rule that adapts λ when inverses are refreshed, if that became rarer.

        Then it has no trials either: each is a refresh, which is what became too dear.
        """
        every = self.intervals.inverses
        if every <= self._least.inverses:
            return rule
        return replace(rule.every(every), trial_steps=0)

    def refresh(self) -> None:
        """Refresh the inverses that are due, or begin to, and let those come in that were
        begun so many steps ago.

        Raises:
            torch.linalg.LinAlgError: a damped factor is singular; nothing that is due is
                changed.
            NotImplementedError: a thread, and a layer on an accelerator.
        """
        estimator, staleness = self._estimator, self._refresh.background
        with estimator.capture.clock.phase("inverses"):
            for due in estimator.finish_inverses(self.num_steps):
                self.last_refresh = due - (staleness or 0)
            all_due, held = self._due(), self._held()
            now = [name for name in all_due if name not in held]
            later = []
            if staleness and not self.at_once and self.num_steps >= self._early_refreshes:
                later = [name for name in now if estimator.may_wait(name)]
                now = [name for name in now if name not in later]
            if now:
                estimator.update_inverses(now)
            if any(estimator.blocks[name].has_statistics for name in now):
                self.last_refresh = self.num_steps
            if later and staleness:
                estimator.start_inverses(later, self.num_steps + staleness)
        self.layers_due = [name for name in all_due if name in held]
        self.inverses_due = False

    def check_statistics(self, caller: str) -> None:
        """Raise RuntimeError where there are none; see that they are where the model is."""
        blocks = self._estimator.blocks.values()
        if not any(block.has_statistics for block in blocks):
            raise RuntimeError(
                f"{caller}.step(): there are no statistics yet. Expected a call of the "
                f"model given to {caller} (model(x), not model.forward(x)), in training "
                "mode and with gradients enabled, and its backward, between constructing "
                f"the {'optimizer' if caller == 'KFAC' else 'preconditioner'} and the "
                "first step(), and of its layers: not under torch.vmap or "
                f"functional_call. Where torch.compile(model) is called, give {caller} the "
                "compiled module; a torch.utils.checkpoint hides its layers unless "
                "use_reentrant=False"
            )
        for block in blocks:
            block.follow_params()

    def ages(self) -> dict[str, Any]:
        """Return the steps since the factors and the inverses were last renewed."""
        known = {"statistics_age": self.last_update, "inverse_age": self.last_refresh}
        return {
            name: None if at is None else self.num_steps - at for name, at in known.items()
        }

    def advance(self, good: bool) -> None:
        """Count a step; statistics of a bad batch stay due."""
        if self.burning:
            self.num_burnt += 1
            return
        self.num_steps += 1
        if self._collected and good:
            self._estimator.collecting = False
        early = self.num_steps < self.options["early_updates"]
        if early or self.num_steps % self.intervals.statistics == 0:
            self._estimator.collecting = True
        if not self.plan.is_uniform:
            # A step that is left out leaves what was due to the next one.
            new = self.plan.due_at(self.num_steps)
            self.layers_due += [name for name in new if name not in self.layers_due]
        elif self.num_steps % self.intervals.inverses == 0:
            self.inverses_due = True

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and what is due, as plain data."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        settled = asdict(self.intervals) if self._settled else None
        return {**counts, "layers_due": list(self.layers_due), "intervals": settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in _COUNTS:
            setattr(self, name, state[name])
        self.layers_due = list(state.get("layers_due", ()))  # older states have none
        # Older states are of runs with the least intervals.
        least: dict[str, Any] = asdict(self._least)
        known = state.get("intervals", least)
        self._settled = known is not None or not self._free
        given = {"statistics", "inverses"} - self._free
        intervals = Intervals(**(known or least))
        self._set_intervals(
            replace(intervals, **{n: getattr(self._least, n) for n in given})
        )


def dense_gradients(
    params: Iterable[Tensor], names: Mapping[Tensor, str]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that have a gradient, and the gradients.

    Raises:
        ValueError: a sparse one.
    """
    present, grads = [], []
    for p in params:
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            raise ValueError(
                f"parameter {names.get(p, '?')}: expected a dense gradient, got "
                f"{p.grad.layout}; construct its layer with sparse=False"
            )
        present.append(p)
        grads.append(p.grad)
    return present, grads


def is_new(block: FisherBlock) -> bool:
    """Whether a block has statistics but no inverse yet: its layer was called late."""
    refreshed = all(factor.is_refreshed for factor in block.factors)
    return block.has_statistics and not refreshed


def ready_blocks(
    blocks: Iterable[FisherBlock], params: Iterable[Tensor]
) -> list[FisherBlock]:
    """Return the blocks that have statistics, and a gradient for every parameter."""
    present = set(params)
    return [b for b in blocks if b.has_statistics and present.issuperset(b.params)]


def mean_curvature(blocks: Iterable[FisherBlock]) -> float:
    """Return `tr F/dim F` of all blocks that have statistics; reads the host."""
    ready = [block for block in blocks if block.has_statistics]
    device = ready[0].params[0].device
    total = torch.stack([block.trace().to(device) for block in ready]).sum()
    return total.item() / sum(p.numel() for block in ready for p in block.params)


def precondition(
    blocks: Iterable[FisherBlock], params: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Return `F̂⁻¹` times tensors on the parameters with a block, the others as they are."""
    result = dict(zip(params, tensors, strict=True))
    for block in blocks:
        parts = [result[p] for p in block.params]
        result.update(zip(block.params, block.multiply_tensors(parts, -1), strict=True))
    return [result[p].to(p.dtype) for p in params]


def limit_norm(
    directions: list[Tensor],
    grads: Sequence[Tensor],
    lrs: Sequence[float],
    constraint: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Scale `p` by `κ` in place.

    Args:
        directions: `p` by parameter.
        grads: `g`, or whatever `p` is `F̂⁻¹` times.
        lrs: `η` by parameter.
        constraint: `c`; None for no limit.

    Returns:
        Whether `pᵀg` is finite, and `κ`, both 0-dim; None where there is no limit.

    >>> p = [torch.tensor([3.0, 4.0])]
    >>> limit_norm(p, [torch.tensor([3.0, 4.0])], [0.5], 1.0)
    (tensor(True), tensor(0.4000))
    >>> p
    [tensor([1.2000, 1.6000])]
    """
    dtype = functools.reduce(torch.promote_types, (d.dtype for d in directions))
    dtype = torch.promote_types(dtype, torch.float32)
    by_lr: dict[float, list[Tensor]] = {}
    for direction, grad, lr in zip(directions, grads, lrs, strict=True):
        dot = torch.dot(direction.flatten().to(dtype), grad.flatten().to(dtype))
        by_lr.setdefault(lr, []).append(dot.to(directions[0].device))
    sums = {lr: torch.stack(dots).sum() for lr, dots in by_lr.items()}
    finite = functools.reduce(torch.add, sums.values()).isfinite()
    if constraint is None or not any(sums):
        return finite, None
    norm = functools.reduce(torch.add, (lr**2 * total for lr, total in sums.items()))
    kappa = (constraint / norm.clamp(min=0)).sqrt().clamp(max=1.0)
    torch._foreach_mul_(directions, kappa)
    return finite, kappa
