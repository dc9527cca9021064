"""`UpdateRule`: what a step of K-FAC is, for every momentum type; nothing is changed yet.

Notation and the rules: `optimizer.py`. A step is proposed as a whole, with what to
remember of it and, where asked for, the change of the loss that is predicted for exactly
this step: by the exact quadratic model where that makes the step, else with the
Kronecker-factored `F̂` in its place. Parameters without a block follow a plain rule
(`plain_updates.py`); their part of the prediction is of first order. Left out: when to
take a step, and whether (the optimizer's business).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import RootCall, random_state, set_random_state, uncompiled
from .damping import LevenbergMarquardt, RelativeDamping
from .estimator import FisherEstimator
from .fisher_blocks import FisherBlock
from .gradient_noise import GradientNoise, fingerprint
from .loss_functions import LossFunction
from .options import Damping, QModel, TrustRegion
from .plain_updates import plain_options, propose_plain
from .preconditioning import limit_norm, precondition, ready_blocks
from .quadratic_model import (
    QuadraticModel,
    fisher_products,
    products,
)
from .replay import every_kth, rerun, thin_weights
from .steps import Step
from .trials import Trial
from .ways import Route, Ways

_MAX_MOMENTUM_WITHOUT_NOISE = 0.99


class UpdateRule:
    """Propose steps for the parameters of an optimizer.

    Args:
        optimizer: its param groups and state are read.
        model: the root module.
        estimator: of the Fisher.
        names: of the parameters.
        momentum_type: one of `MOMENTUM_TYPES`, or a `QModel`.
        damping: as `KFAC` was given it, or what stands for None.
        trust_region: if any; its fraction is a param group option.

    Raises:
        NotImplementedError: λ adapts, and an approximation has no product with `F̂`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        estimator: FisherEstimator,
        names: Mapping[Tensor, str],
        momentum_type: str | QModel,
        damping: Damping,
        trust_region: TrustRegion | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._model = model
        self._estimator = estimator
        self._names = names
        self._qmodel = momentum_type if isinstance(momentum_type, QModel) else None
        self._momentum_type = self._qmodel.name if self._qmodel else momentum_type
        self._trust_region = trust_region
        self.num_steps = 0
        self.noise = GradientNoise()  # of the steps so far
        self.ways = Ways()
        chosen = estimator.layers.is_chosen
        self._announced = {name for name in names.values() if chosen(name)}
        rule = damping.damping if isinstance(damping, RelativeDamping) else damping
        self.rule = rule if isinstance(rule, LevenbergMarquardt) else None
        self._first_rule = self.rule
        self._undamped = False
        self.rerun: Callable[..., Any] = rerun  # the network's forward, in the model
        if self.modelled or self.rule is not None:
            estimator.keep_forwards()
        if self.rule and not self.modelled:
            self._ask_for_products()

    def _ask_for_products(self) -> None:
        try:
            self._estimator.register_matpower(1)
        except NotImplementedError as error:
            raise NotImplementedError(
                "damping=LevenbergMarquardt(...) predicts the change of the loss, here by "
                f"products with the factors: {error}. Expected an approximation that has "
                'them; use another, or momentum_type="qmodel", which predicts without'
            ) from error

    @property
    def options(self) -> dict[str, Any]:
        """What was chosen at construction and stays."""
        return {
            "momentum_type": self._momentum_type,
            "quadratic_model": self._qmodel,
            "trust region": self._trust_region,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is known from the steps so far, as plain data and tensors."""
        return {
            "adapts": self.rule is not None,
            "noise": self.noise.state_dict(),
            "ways": vars(self.ways).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; older states have no `ways`.

        λ adapts as at the start, or not at all, where nothing told the loss.
        """
        self.rule = self._first_rule if state["adapts"] else None
        self.noise = GradientNoise(**state["noise"])
        self.ways = Ways(**state.get("ways", {}))

    @property
    def modelled(self) -> bool:
        """Whether the quadratic model makes the step."""
        return self._qmodel is not None

    @property
    def _group(self) -> dict[str, Any]:
        return self._optimizer.param_groups[0]

    def total_damping(self) -> float:
        """Return `λ + ℓ`, which damps the factors; 0 while `F̂` itself is asked for."""
        return 0.0 if self._undamped else self._group["damping"] + self._l2_reg()

    def damping_of(self, block: FisherBlock) -> float:
        """Return what damps the factors of a block: that of its first parameter's group."""
        groups = self._optimizer.param_groups
        first = block.params[0]
        own = (g for g in groups[1:] if any(p is first for p in g["params"]))
        return self.total_damping() * next(own, groups[0]).get("damping_scale", 1.0)

    def _l2_reg(self) -> float:
        return self.rule.l2_reg if self.rule else 0.0

    def _included(self) -> float:
        """What the predicted change counts as curvature, of `λ + ℓ`."""
        include = self.rule is not None and self.rule.include_damping
        return self.total_damping() if include else self._l2_reg()

    def plain_rules(self, params: list[Tensor]) -> dict[Tensor, str]:
        """Return the rules of those whose step no block makes."""
        owned = {p for block in self._ready_blocks(params) for p in block.params}
        groups = self._groups()
        others = [p for p in params if p not in owned]
        return {p: self._plain_options(p, groups[p])["rule"] for p in others}

    def announce_others(self, params: list[Tensor]) -> None:
        """Name parameters without a block and their rules in a UserWarning, once."""
        by_rule: dict[str, list[str]] = {}
        for p, rule in self.plain_rules(params).items():
            name = self._names.get(p, "?")
            if name not in self._announced:
                self._announced.add(name)
                by_rule.setdefault(rule, []).append(name)
        for rule, names in by_rule.items():
            words = {"adamw": "AdamW", "sgd": "plain momentum"}[rule]
            warnings.warn(
                f"these parameters have no K-FAC block and are updated by {words}: "
                f"{', '.join(sorted(names))}",
                UserWarning,
                stacklevel=6,
            )

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        groups = self._optimizer.param_groups
        return {p: group for group in groups for p in group["params"]}

    def _ready_blocks(self, params: list[Tensor]) -> list[FisherBlock]:
        return ready_blocks(self._estimator.blocks.values(), params)

    def propose(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        with_prediction: bool,
        trial: Trial,
    ) -> Step:
        """Return the step from here; changes nothing."""
        blocks = self._ready_blocks(params)
        owned: set[Tensor] = {p for block in blocks for p in block.params}
        inside = [p in owned for p in params]
        if not owned:
            return self._propose_plain(params, grads)
        mine = _select(inside, params, grads)
        if self.modelled:
            step = self._propose_modelled(blocks, trial, *mine)
        else:
            step = self._propose_fixed(blocks, *mine)
            if with_prediction:
                step.predicted_change = self._kronecker_change(blocks, step, mine[1])
        if len(owned) == len(params):
            return step
        rest = _select([not flag for flag in inside], params, grads)
        plain = self._propose_plain(*rest)
        if step.predicted_change is not None:
            step.predicted_change = step.predicted_change + plain.prediction()
        return replace(
            step,
            params=step.params + plain.params,
            deltas=step.deltas + plain.deltas,
            memory=step.memory + plain.memory,
            finite=step.finite & plain.finite.to(step.finite.device),
        )

    def _propose_plain(self, params: list[Tensor], grads: list[Tensor]) -> Step:
        """The step of parameters without a block, to first order in the loss."""
        groups = self._groups()
        options = [self._plain_options(p, groups[p]) for p in params]
        states = [self._optimizer.state.get(p, {}) for p in params]
        step = propose_plain(params, grads, options, states)
        change = _dot(grads, step.deltas)
        group = self._group
        return Step(
            params,
            step.deltas,
            step.memory,
            change.isfinite() & _finite_memory(step.memory).to(change.device),
            group["lr"],
            group["momentum"],
            change,
        )

    def _plain_options(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if "rule" not in group:  # its block has no statistics, or the group is the user's
            rule = "adamw" if group["lr"] is None else "sgd"
            return {**group, **plain_options(rule, group["lr"], group["momentum"])}
        if group["lr"] is None:
            raise ValueError(
                f"KFAC.step(): {self._names.get(p, '?')}: expected an lr for parameters "
                "without a K-FAC block, which the quadratic model leaves out, got None; "
                'set optimizer.param_groups[1]["lr"], or use fallback="adamw"'
            )
        return group

    def _propose_fixed(
        self, blocks: list[FisherBlock], params: list[Tensor], grads: list[Tensor]
    ) -> Step:
        """`η` and `μ` are given: `"regular"` and `"adam"`."""
        lrs, momenta = self._options(params, "lr"), self._options(params, "momentum")
        limit = self._group["norm_constraint"]
        velocities = self._remembered(params, "momentum_buffer")
        if self._momentum_type == "adam":
            velocities = list(torch._foreach_mul(velocities, momenta))
            torch._foreach_add_(velocities, grads)
            updates = precondition(blocks, params, velocities)
            finite, kappa = limit_norm(updates, velocities, lrs, limit)
        else:
            directions = precondition(blocks, params, grads)
            finite, kappa = limit_norm(directions, grads, lrs, limit)
            velocities = list(torch._foreach_mul(velocities, momenta))
            torch._foreach_add_(velocities, directions)
            updates = velocities
        deltas = list(torch._foreach_mul(updates, [-lr for lr in lrs]))
        self._add_decay(deltas, params, [-lr for lr in lrs])
        memory = [{"momentum_buffer": velocity} for velocity in velocities]
        lr, momentum = self._group["lr"], self._group["momentum"]
        return Step(params, deltas, memory, finite, lr, momentum, norm_scale=kappa)

    def _options(self, params: list[Tensor], name: str) -> list[Any]:
        """An option of every parameter's own group."""
        groups = self._groups()
        return [groups[p][name] for p in params]

    def _add_decay(
        self, tensors: list[Tensor], params: list[Tensor], factors: list[float]
    ) -> None:
        """Add `factor · decay · θ`, in place."""
        decays = self._options(params, "weight_decay")
        if any(decays):
            weights = [f * decay for f, decay in zip(factors, decays, strict=True)]
            torch._foreach_add_(tensors, torch._foreach_mul(params, weights))

    def _propose_modelled(
        self,
        blocks: list[FisherBlock],
        trial: Trial,
        params: list[Tensor],
        grads: list[Tensor],
    ) -> Step:
        """Step size, and maybe momentum, from the exact quadratic model."""
        group, total = self._group, self.total_damping()
        assert self._qmodel is not None
        noise, averaged = self._averaged(params, grads)
        direction = precondition(blocks, params, averaged)
        self._add_decay(direction, params, [1.0] * len(params))
        lr, shares = self._shares(params)
        if min(shares) < 1:
            torch._foreach_mul_(direction, shares)
        directions = [direction]
        fixed = None if self._momentum_type == "qmodel" else group["momentum"]
        if fixed != 0 and any(
            "previous_update" in self._optimizer.state[p] for p in params
        ):
            previous = self._remembered(params, "previous_update")
            if min(shares) <= 0:
                moves = [float(share > 0) for share in shares]
                previous = list(torch._foreach_mul(previous, moves))
            directions.append(previous)
        route = Route(self.ways.first(self.num_steps))
        model = self._quadratic_model(params, grads, directions, route)
        weights = model.minimize(total, fixed, self._max_momentum())
        weights = weights if lr is None else lr * weights
        weights, scales = self._limited(model, weights, total, trial)
        deltas = list(torch._foreach_mul(directions[0], weights[0]))
        for previous, weight in zip(directions[1:], weights[1:], strict=True):
            torch._foreach_addcmul_(deltas, previous, [weight] * len(previous))
        memory = [{"previous_update": delta} for delta in deltas]
        if self._qmodel.average_gradients:
            noise = noise.after(weights @ model.slopes, model.squared_norm(weights, 0.0))
            for entry, average in zip(memory, averaged, strict=True):
                entry["average_gradient"] = average
        return Step(
            params,
            deltas,
            memory,
            torch.cat([weights, model.slopes]).isfinite().all(),
            -weights[0],
            weights[1] if len(weights) > 1 else torch.zeros_like(weights[0]),
            model.change(weights, self._included()),
            *scales,
            noise=noise,
            ways=self.ways.after(route.way),
        )

    def _averaged(
        self, params: list[Tensor], grads: list[Tensor]
    ) -> tuple[GradientNoise, list[Tensor]]:
        """What is known of the gradient's noise, and the average that it asks for."""
        assert self._qmodel is not None
        state = self._optimizer.state
        if not self._qmodel.average_gradients:
            return self.noise, grads
        if not any("previous_update" in state[p] for p in params):
            noise = self.noise.restarted()
            return noise, noise.averaged(grads, grads)
        slope = _dot(grads, self._remembered(params, "previous_update"))
        noise = self.noise.seen(slope).looked_at(self.num_steps, self._fingerprint)
        average = [
            state[p].get("average_gradient", g) for p, g in zip(params, grads, strict=True)
        ]
        return noise, noise.averaged(grads, average)

    def _shares(self, params: list[Tensor]) -> tuple[float | None, list[float]]:
        """The largest `lr` of all groups, and that of every parameter as a part of it."""
        lrs = self._options(params, "lr")
        if all(lr is None for lr in lrs):
            return None, [1.0] * len(lrs)
        known = [1.0 if lr is None else lr for lr in lrs]
        largest = max(known)
        return largest, [lr / largest if largest else 1.0 for lr in known]

    def _limited(
        self, model: QuadraticModel, weights: Tensor, total: float, trial: Trial
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Scale the step as a whole: to the norm limit, into the trust region."""
        group = self._group
        scales: list[Tensor | None] = []
        for name, damping in (("norm_constraint", total), ("trust_region", 0.0)):
            limit, scale = group[name], None
            if limit is not None and name == "trust_region":
                limit = self._region(trial, weights)
            if limit is not None:
                norm = model.squared_norm(weights, damping)
                scale = (limit / norm).sqrt().clamp(max=1.0)
                weights = weights * scale
            scales.append(scale)
        return weights, scales

    def _region(self, trial: Trial, like: Tensor) -> Tensor | None:
        """`f · L`; where nothing tells `L`, no limit."""
        region = self._trust_region or TrustRegion()
        unit = trial.batch.size() if region.unit is None else region.unit
        unit = trial.loss if unit is None else unit
        if unit is None:
            return None
        size = torch.as_tensor(unit).to(like).abs().nan_to_num(torch.inf)
        shape = region.fraction_at(self.num_steps) / region.fraction
        return self._group["trust_region"] * shape * size

    def _quadratic_model(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        directions: list[list[Tensor]],
        route: Route,
    ) -> QuadraticModel:
        names = [self._names[p] for p in params]
        calls, device = self._calls(), params[0].device
        now = random_state(device) if calls else None

        def forwards() -> Iterable[Callable[..., Any]]:
            for call in calls:
                args, kwargs = every_kth(
                    call.args, call.kwargs, self._stride(call), self.num_steps
                )
                run = self.rerun(uncompiled(self._model), args, kwargs)

                def forward(
                    params: Mapping[str, Tensor], call: RootCall = call, run: Any = run
                ) -> Any:
                    set_random_state(call.random_state, device)
                    return run(params)

                yield forward

        try:
            curvature = fisher_products(
                forwards(),
                self._losses,
                dict(zip(names, params, strict=True)),
                [dict(zip(names, parts, strict=True)) for parts in directions],
                [
                    [
                        thin_weights(pair, self._stride(call), self.num_steps)
                        for pair in call.weights
                    ]
                    for call in calls
                ],
                route,
            )
        finally:
            if now is not None:
                set_random_state(now, device)
        gram = products([*directions, grads])
        return QuadraticModel(curvature.to(gram), gram[:-1, :-1], gram[-1, :-1])

    def _calls(self) -> Sequence[RootCall]:
        """The micro-batches: forwards that no backward has reached are no part of it."""
        known = self._estimator.capture.forwards
        return [call for call in known if call.arrived] or known

    def _fingerprint(self) -> Tensor | None:
        return fingerprint([(call.args, call.kwargs) for call in self._calls()])

    def _stride(self, call: RootCall) -> int:
        """One example in so many makes the model; all where only its noise is left."""
        assert self._qmodel is not None
        return 1 if self.noise.own else self._qmodel.stride(call.num_terms)

    def _max_momentum(self) -> float | None:
        assert self._qmodel is not None
        largest = self._qmodel.max_momentum
        if largest is None or not self.noise.negligible:
            return largest
        return max(largest, _MAX_MOMENTUM_WITHOUT_NOISE)

    def _losses(self, output: Any) -> list[tuple[LossFunction, float]]:
        """What the model returned means: distributions, each with its weight."""
        return self._estimator.losses(output)

    def _kronecker_change(
        self, blocks: list[FisherBlock], step: Step, grads: list[Tensor]
    ) -> Tensor:
        """`gᵀδ + ½ δᵀF̂δ`, `F̂` without damping, of a step with given `η` and `μ`."""
        deltas = dict(zip(step.params, step.deltas, strict=True))
        linear = _dot(grads, step.deltas)
        quadratic = torch.zeros_like(linear)
        self._undamped = True
        try:
            for block in blocks:
                parts = [deltas[p] for p in block.params]
                V = block.params_to_vector(parts).to(block.dtype)
                quadratic += (V * block.multiply(V)).sum().to(quadratic)
        finally:
            self._undamped = False
        included = self._included()
        if included:
            quadratic += included * _dot(step.deltas, step.deltas)
        return linear + 0.5 * quadratic

    def _remembered(self, params: list[Tensor], key: str) -> list[Tensor]:
        """What earlier steps left, 0 where there is nothing."""
        return [
            self._optimizer.state[p][key]
            if key in self._optimizer.state[p]
            else torch.zeros_like(p)
            for p in params
        ]


def _select(which: Sequence[bool], *lists: list[Tensor]) -> list[list[Tensor]]:
    return [list(itertools.compress(tensors, which)) for tensors in lists]


def _finite_memory(memory: Sequence[Mapping[str, Any]]) -> Tensor:
    """Whether what is to be remembered is finite: the square of a gradient may not be."""
    tensors = [v for each in memory for v in each.values() if isinstance(v, Tensor)]
    largest = torch._foreach_norm(tensors, math.inf)
    return torch.stack([norm.to(largest[0].device) for norm in largest]).isfinite().all()


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors, 0-dim."""
    return products([list(left)], [list(right)])[0, 0]
