"""`KFAC`: natural gradient descent in the plain PyTorch loop.

Notation: `g` the gradient of the mean loss, `F̂` the damped block-diagonal Fisher, `F` the
exact one, `λ` the damping, `v` the velocity, `δ` the step and `δ_prev` the last one, `μ`
the momentum, `η` the learning rate, `c` the norm constraint:

    "regular"   p = F̂⁻¹ g,  v ← μ v + κ p,  δ = −η v
    "adam"      v ← μ v + g,  p = F̂⁻¹ v,    δ = −η κ p
    "qmodel"    p = F̂⁻¹ g,  δ = κ η (α p + μ δ_prev)

with `κ = min(1, sqrt(c / (η² pᵀF̂p)))`, so that a step without momentum moves the output
distribution by about `c/2` nats (Martens & Grosse 2015, arXiv 1503.05671, section 6;
Ba et al. 2017 for `c`). With `"qmodel"` α and μ minimise the quadratic model of the loss,
`gᵀδ + ½ δᵀ(F + λI)δ` (section 7 of the former; `"qmodel_fixedmu"`: α alone), and the
constraint is on the exact norm of the whole step, `δᵀ(F + λI)δ <= c`; a trust region is
`δᵀFδ <= fraction · loss`. Weight decay is
decoupled: `δ −= η·decay·θ`; with the model, `p += decay·θ`. Parameters without a block
follow `v ← μ v + g, δ = −η v`. Left out: how λ adapts (`damping.py`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import uncompiled
from .construction import complete, loss_taken_back, param_groups, regroup
from .coverage import CoverageReport
from .damping import LevenbergMarquardt, RelativeDamping
from .damping_search import MAX_ADAPTATIONS, best, settled
from .estimator import FisherEstimator
from .health import Health
from .layer_choice import Key, Layers, names_inside
from .layer_collection import LayerCollection
from .linalg import NotFiniteError
from .loss_collection import Output
from .loss_functions import LossFactory
from .optimizer_state import NamedState
from .options import (
    Chosen,
    Damping,
    Pace,
    QModel,
    Statistics,
    TrustRegion,
    check_count,
    choose,
    damping_at,
    is_automatic,
)
from .preconditioning import Schedule, dense_gradients, mean_curvature
from .recording import Recorder, watch_scale
from .refresh_schedule import Refresh, check_device
from .rejection import Before
from .steps import StepRecord
from .trials import Judgement, Trial
from .updates import UpdateRule

# What the state has of the optimizer's own attributes.
_KEPT = ("_calibrated", "_told", "damping_unit")


class KFAC(NamedState):
    """K-FAC (Martens & Grosse 2015, arXiv 1503.05671) for the layers of a model that have a
    block (`registration.KINDS`), another rule for its other parameters.

    Without an `lr` it is automatic: step size and momentum are those of the quadratic
    model, a trust region limits the step, λ starts relative to the curvature and adapts.

    On a step where statistics are due, targets are drawn from the model's own output, and
    gradients taken to the layer outputs, where the user's backward has just reached that
    output: the true Fisher, without touching any `.grad`.

    A batch with a NaN or an Inf in its statistics or its gradient changes no parameter
    (and no factor, if statistics are due): the step is left out and counted, the first one
    with a RuntimeWarning. A factor that cannot be factorised climbs a ladder of rescues,
    or keeps its last good inverse for a while; `health()` has all counts. The host reads
    one number of the device per step, one more where statistics are due, and one
    where inverses are.

    Args:
        model: the root module, or what `torch.compile` made of it; the loss must be a
            function of what its forward returns.
        loss: `"categorical"`, `"normal"` (`½‖t − y‖²`), `"bernoulli"`, the torch
            criterion in use, or a `LossFunction` class or factory. It says how
            the Fisher is taken; the gradient is whatever the user's backward brings,
            divided by the number of loss terms if the criterion sums over them. At the
            first step that gradient is compared with the declared loss, and a UserWarning
            gives the factor by which it differs; of `"normal"` the factor shows only
            where a closure returns the loss. None where `layer_collection` has losses.
        layer_collection: the layers and their approximations, and maybe the losses;
            every layer of a known kind if None.
        output: where the network output is in what the model returns, if that is not a
            tensor: a key, an index, an attribute name or a callable.
        lr: `η`, in units of the natural gradient (1 is a full Newton-like step); a param
            group option. None is automatic. With the quadratic model a factor on the step
            that it finds; None is 1 (for a scheduler, say 1.0).
        damping: λ, added to the Fisher of the mean loss, in its units: those of the loss
            per squared parameter. 0 is allowed where no factor is singular. A number,
            which may be changed as `param_groups[0]["damping"]` and is read at each
            refresh; a callable of the number of steps taken; or a `LevenbergMarquardt`,
            which adapts it. Any of them in a `RelativeDamping` is in units of the mean
            curvature at the start. None is `RelativeDamping()`, which adapts, with the
            quadratic model, else a constant `RelativeDamping(0.1)`.
        momentum: `μ` in [0, 1); None is 0.9; a param group option. `"qmodel"` finds it.
        weight_decay: decoupled, per unit of `lr`; a param group option.
        norm_constraint: `c`, in nats of squared Fisher norm, or a `TrustRegion`, a part of
            the loss, with the quadratic model, or None for no limit; `"auto"` is
            `TrustRegion(fraction=0.1, final=0.03)` without an `lr` or with a `QModel`,
            None with `"qmodel"` and its kin, else 1e-3. May be changed as
            `param_groups[0]["norm_constraint"]` or `["trust_region"]`: the `fraction`, in
            proportion to which `final` changes too.
        momentum_type: `"regular"` (momentum of preconditioned gradients), `"adam"`
            (momentum of gradients, then preconditioned), `"qmodel"` (step size and
            momentum from the quadratic model) or `"qmodel_fixedmu"` (the step size);
            or a `QModel`, which has options and leaves all else automatic. None is
            `"regular"` with an `lr`, else `QModel()`: of a sixteenth of the batch, with a
            momentum of at most 0.95, on gradients averaged as far as they are noise.
            The model takes one or two forward-mode passes per step, on the inputs of the
            training forwards since the last step.
        estimation_mode: `"gradients"` (the true Fisher by sampled targets),
            `"curvature_prop"` (the same by random signs), `"exact"` (all output
            coordinates in one vectorised pass; the output's first dimension must be that
            of examples) or `"empirical"` (the user's own targets); or a `Statistics`,
            which has options. None is `Statistics()`: of `"gradients"`, a quarter of the
            batch; a name is for all of it.
        cov_ema_decay: of the factors' moving average, in [0, 1]; None is 0.85, or 0.95 with
            an `lr` or a momentum type by name.
        cov_update_every: steps between statistics; None is every one of the first ten,
            then 3, or 10, and more where they cost much (`intervals`).
        invert_every: steps between refreshes of the inverses, or a `Refresh`, which has
            options; the first ten steps refresh them too (three, if `cov_update_every` is
            given). None is 6, or 10, and more where factors are large: a refresh then takes
            a quarter of the rest of a step at most, and the first three steps have one.
        num_burnin_steps: the first steps only gather statistics, all with equal weight,
            and move nothing; they do not count as steps otherwise.
        approx: an approximation for all layers that have it, or for each by name, type or
            module (`{"head": "diagonal", nn.Embedding: "adamw"}`); or a `Layers`, which
            also says what to exclude, what becomes of parameters without a block, and
            from which size on a factor is cut up.

    Parameters without a block follow AdamW (or SGD, if `Layers` says so), a param group of
    their own with an `lr` of its own, 3e-3; a one-time UserWarning names them, and
    `report()` says why.

    Attributes:
        last_step: a `StepRecord` of the last step, or None.
        damping_unit: the mean curvature at the start, where damping is relative.

    Raises:
        ValueError: a value out of range, a loss that is not known, or a model without
            any supported layer. In a forward: a network output that does not fit the
            loss. In the first `step`: no forward in training mode before it.
        NotImplementedError: λ adapts, but an approximation has no product with `F` to
            predict by (a chain over time); the quadratic model needs none. Refreshes in
            the background of a model that is not on the CPU.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> optimizer = KFAC(model, loss="categorical")
    >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     loss.backward()
    ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | nn.Module | LossFactory | None = None,
        layer_collection: LayerCollection | None = None,
        output: Output = None,
        *,
        lr: float | None = None,
        damping: Damping | None = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        norm_constraint: float | str | TrustRegion | None = "auto",
        momentum_type: str | QModel | None = None,
        estimation_mode: str | Statistics | None = None,
        cov_ema_decay: float | None = None,
        cov_update_every: int | None = None,
        invert_every: int | Refresh | None = None,
        num_burnin_steps: int = 0,
        approx: str | Mapping[Any, str] | Layers | None = None,
    ) -> None:
        self._adapts_if_told = damping is None
        chosen = choose(
            lr=lr,
            damping=damping,
            momentum=momentum,
            weight_decay=weight_decay,
            norm_constraint=norm_constraint,
            momentum_type=momentum_type,
        )
        pace = Pace.resolve(
            is_automatic(lr, momentum_type),
            estimation_mode,
            cov_ema_decay,
            cov_update_every,
            invert_every,
        )
        check_count("num_burnin_steps", num_burnin_steps, 0)
        check_device(pace.invert_every, model)
        layers = complete(layer_collection, model, loss, output, approx)
        module = uncompiled(model)
        names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        super().__init__(param_groups(names, layers, lr, momentum), chosen.defaults)
        self.last_step: StepRecord | None = None
        self._model, self._names = model, names
        self._given_damping = self._damping = chosen.damping
        self._statistics = pace.statistics
        self._momentum_type = chosen.kind
        self._calibrated = self._told = False  # λ; that the loss's change is known
        self.damping_unit: float | None = None
        with loss_taken_back(layers, loss):
            self._watch(layers, pace, chosen)
        self._schedule = Schedule(
            self.estimator,
            cov_update_every=pace.cov_update_every,
            invert_every=pace.invert_every,
            num_burnin_steps=num_burnin_steps,
            early_updates=pace.early_updates,
            free=pace.free,
            model=chosen.model,
        )

    def _watch(
        self,
        layers: LayerCollection,
        pace: Pace,
        chosen: Chosen,
    ) -> None:
        """Make what gathers statistics and what makes steps, both or neither."""
        self.estimator = FisherEstimator(
            None,
            pace.cov_ema_decay,
            lambda: self._updates.total_damping(),
            layers,
            estimation_mode=pace.statistics,
        )
        try:
            self._updates = UpdateRule(
                self,
                self._model,
                self.estimator,
                self._names,
                chosen.momentum_type,
                self._damping,
                chosen.trust_region,
            )
        except NotImplementedError:
            self.estimator.release()
            raise
        for block in self.estimator.blocks.values():
            block.damp(functools.partial(self._updates.damping_of, block))
        self._recorder = Recorder(self.estimator)
        if self._updates.modelled or self._updates.rule or self.estimator.is_empirical:
            watch_scale(self.estimator)

    def attach(self, writer: Callable[[StepRecord], Any], every: int = 1) -> None:
        """Call `writer` with the `StepRecord` of every so many steps; see `telemetry`.

        Such a record has the loss, where the gradient tells it, and π of every layer.

        Raises:
            ValueError: `every` is not a positive integer.
        """
        self._recorder.attach(writer, every)

    def close(self) -> None:
        """Remove every hook from the model; end the thread of background refreshes."""
        self.estimator.close()

    def report(self) -> CoverageReport:
        """Return what K-FAC does with every parameter; see `LayerCollection.report`."""
        return self.estimator.layers.report()

    def health(self) -> Health:
        """Return what went wrong so far and was mended, in numbers; see `Health`."""
        return self.estimator.health

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because of a NaN or an Inf."""
        return self.health().skipped_steps

    def group(self, *which: Key, **options: Any) -> list[dict[str, Any]]:
        """Move some parameters to a param group of their own.

        Before a scheduler is constructed, which counts the groups; and before the state of
        an optimizer with the same groups is loaded.

        Args:
            which: names or patterns of modules or parameters (`"*.bias"`), with all that
                is inside them, module types, modules or parameters.
            options: `lr`, `weight_decay`, `momentum`, `damping_scale` (a factor on λ in
                the inverse of a layer whose weight is meant); of parameters without a
                block that follow AdamW `betas` and `eps` too. The rest is as it was. With
                the
                quadratic model there is one momentum, and the ratio of the `lr` of the
                groups scales their parts of the direction, before the model sees it.

        Returns:
            The new groups: one for each group that parameters came from.

        Raises:
            ValueError: nothing is meant, or it is in no group; an unknown option, or a
                value out of range. Nothing is changed then.

        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> optimizer = KFAC(model, loss="categorical", lr=0.1, weight_decay=0.01)
        >>> [new] = optimizer.group("*.bias", weight_decay=0.0)
        >>> len(new["params"]), [group["weight_decay"] for group in optimizer.param_groups]
        (2, [0.01, 0.0])
        """
        model = uncompiled(self._model)
        names = names_inside(model, "KFAC.group()", which)
        params = dict(model.named_parameters(remove_duplicate=False))
        chosen: set[Tensor] = {p for name, p in params.items() if name in names}
        left, new = regroup(self.param_groups, chosen, self._momentum_type, options)
        if not new:
            raise ValueError(
                "KFAC.group(): expected parameters of this optimizer, got none: "
                f"{', '.join(map(str, which)) or 'nothing'}"
            )
        for group, rest in zip(self.param_groups, left, strict=True):
            group["params"] = rest
        for group in new:
            self.add_param_group(group)
        self._schedule.inverses_due |= "damping_scale" in options
        return self.param_groups[-len(new) :]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget the statistics that came with them.

        A step that never came (a `GradScaler` leaves it out after an overflow) then has no
        part in the next one.
        """
        super().zero_grad(set_to_none)
        self.estimator.forget_gradients()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update factors and inverses where due, then the parameters.

        Args:
            closure: re-evaluates the model on this step's batch, calls `backward` and
                returns the loss; optional. Where λ adapts it is called again after the
                step when an adaptation is due, and before the first steps for each trial
                of λ, with the same random numbers; that leaves no trace: gradients,
                buffers and random state are put back. If it raises after a step, that has
                been taken, and λ stays. Without one the gradient at the output tells.

        Returns:
            What the closure returned, at first.

        Raises:
            RuntimeError: on the first step, if there was no forward in training mode.
            ValueError: a `LevenbergMarquardt` was given and there is no closure, nor does
                the gradient tell the loss; a parameter without a block has no `lr`.
            torch.linalg.LinAlgError: a damped factor is singular on every rung of the
                ladder, and has no inverse to keep; parameters and inverses are unchanged.
                A λ that adapts is raised instead, unless the factor has a NaN or an Inf.
        """
        self._stepping = True
        clock = self.estimator.capture.clock
        try:
            with clock.phase("step"):
                adapts = self._updates.rule is not None
                trial = Trial(self._model, self.estimator, closure, adapts)
                with clock.phase("closure"):
                    value = trial.first()
                params, grads = self._gradients()
                self.estimator.check_loss(value)
                written = self._recorder.is_due(self._schedule.num_steps)
                if self._updates.modelled or adapts or written:
                    self.estimator.capture.check_unchanged()
                    trial.batch = self.estimator.batch_loss()
                    self._check_told(trial)
                grads, trial.num_terms = self._schedule.of_mean_loss(grads)
                bad = self._schedule.update_statistics(grads)
                moves = not self._schedule.burning and not bad
                if moves:
                    bad = self._move(params, grads, trial)
                if bad:
                    self.estimator.ledger.skip_step(bad, stacklevel=4)
                self._schedule.advance(not bad)
                moved = bool(moves and params and not bad)
                if moved:
                    self._adapt(trial)  # last: the closure may fail
            self._stepping = False  # a writer may save the state
            if moved and self.last_step is not None:
                self.last_step = self._recorder.finish(self.last_step)
            return value
        except Exception:
            self._stepping = False
            raise
        finally:
            self.estimator.capture.forwards.clear()
            if self.estimator.capture.probe is not None:
                self.estimator.capture.probe.clear()

    def _check_told(self, trial: Trial) -> None:
        """See whether the change of the loss, where λ adapts to it, will be known."""
        if self._updates.rule is None or self._told or not trial.batch.forwards:
            return
        self._told = trial.tells_change
        if self._told:
            return
        what = (
            "the gradient at the network output does not tell how this loss changes: "
            "expected step(closure), with a closure that clears the gradients, calls the "
            "model and backward, and returns the loss; got none"
        )
        if not self._adapts_if_told:
            raise ValueError(f"KFAC.step(): damping=LevenbergMarquardt(...): {what}")
        warnings.warn(f"KFAC.step(): {what}, so that damping stays", stacklevel=5)
        self._updates.rule = None

    def _adapt(self, trial: Trial) -> None:
        """Adapt λ where due, by the loss at the parameters that the step has led to."""
        rule, record, steps = self._updates.rule, self.last_step, self._schedule.num_steps
        if rule is None or record is None or not rule.judges(steps):
            return
        if trial.step is None or not trial.can_judge:
            return
        found = trial.judge(trial.step, rule)
        rho = found.rho
        self.last_step = replace(record, new_loss=found.new_loss, rho=rho)
        if rho is None:
            return
        if trial.before is not None and rule.rejects(rho, found.finite):
            trial.before.restore()
            self._updates.noise = trial.noise
            self.last_step = replace(self.last_step, rejected=True)
            self.estimator.ledger.reject_step(rho)
            self._set_damping(rule.update(record.damping, -1.0))
        elif rule.adapts(steps):
            self._set_damping(rule.update(record.damping, rho))

    def _set_damping(self, damping: float) -> None:
        if damping != self.param_groups[0]["damping"]:
            self.param_groups[0]["damping"] = damping
            self._schedule.inverses_due = True

    def _set_unit(self, unit: float | None) -> None:
        """Bring a relative damping to units of the Fisher, where they are known."""
        self.damping_unit, self._damping = unit, self._given_damping
        if unit is not None and isinstance(self._given_damping, RelativeDamping):
            self._damping = self._given_damping.absolute(unit)
        if isinstance(self._damping, LevenbergMarquardt):
            if self._adapts_if_told:  # nobody has set it
                self._damping = self._schedule.paced(self._damping)
            self._updates.rule = self._updates.rule and self._damping

    def _update_inverses(self, at_once: bool = False) -> None:
        """Refresh the inverses where due; a λ that adapts is raised until it can be."""
        self._schedule.at_once = at_once
        due = self._schedule.refresh_due
        given = self.param_groups[0]["damping"]
        for attempt in range(MAX_ADAPTATIONS):
            if not due:
                return
            try:
                self._schedule.refresh()
                due = False
            except torch.linalg.LinAlgError as error:
                # No damping mends a NaN.
                hopeless = isinstance(error, NotFiniteError)
                last = attempt == MAX_ADAPTATIONS - 1
                if self._updates.rule is None or hopeless or last:
                    self.param_groups[0]["damping"] = given
                    raise
                damping = self.param_groups[0]["damping"]
                self._set_damping(self._updates.rule.update(damping, -1.0))

    def _move(self, params: list[Tensor], grads: list[Tensor], trial: Trial) -> list[str]:
        """Move the parameters; return what is not finite, if anything: nothing moves."""
        self._updates.num_steps = self._schedule.num_steps
        self._schedule.check_statistics("KFAC")
        group = self.param_groups[0]
        if isinstance(self._damping, RelativeDamping):
            self._set_unit(mean_curvature(self.estimator.blocks.values()))
            group["damping"] = damping_at(self._damping, self._schedule.num_steps)
        if callable(self._damping):
            group["damping"] = damping_at(self._damping, self._schedule.num_steps)
        rule = self._updates.rule
        if not params:
            self._update_inverses()
            return []
        if rule is not None:
            self._search(rule, params, grads, trial)
        self._update_inverses()
        due = rule is not None and rule.judges(self._schedule.num_steps + 1)
        if rule and rule.reject_below is not None:
            again = self.last_step is not None and self.last_step.rejected
            trial.before = Before(params, self.state, again)
        step = self._updates.propose(params, grads, due, trial)
        self._updates.announce_others(params)
        if not step.finite:
            return ["the gradient"]
        trial.step, trial.noise = step, self._updates.noise
        self._updates.noise, self._updates.ways = step.noise, step.ways
        torch._foreach_add_(step.params, step.deltas)
        for p, memory in zip(step.params, step.memory, strict=True):
            self.state[p].update(memory)
        self.last_step = StepRecord(
            step=self._schedule.num_steps,
            lr=step.lr,
            momentum=step.momentum,
            damping=group["damping"],
            loss=trial.loss,
            predicted_change=step.predicted_change,
            norm_scale=step.norm_scale,
            region_scale=step.region_scale,
            step_norm=step.norm(),
            gradient_noise=step.noise.fraction,
            skipped_steps=self.skipped_steps,
            **self._schedule.ages(),
        )
        return []

    def _search(
        self,
        rule: LevenbergMarquardt,
        params: list[Tensor],
        grads: list[Tensor],
        trial: Trial,
    ) -> None:
        """Try λs on the batch, where the rule wants that, and take one; nothing moves."""
        group = self.param_groups[0]

        def judged(damping: float) -> tuple[Judgement | None, float]:
            self._set_damping(damping)
            self._update_inverses(at_once=True)
            step = self._updates.propose(params, grads, True, trial)
            if not step.finite:
                return None, group["damping"]
            before = [p.clone() for p in params]
            try:
                torch._foreach_add_(step.params, step.deltas)
                return trial.judge(step, rule), group["damping"]
            finally:
                torch._foreach_copy_(params, before)

        damping = group["damping"]
        if rule.calibrate and not self._calibrated:
            damping, self._calibrated = settled(rule, damping, judged)
        if self._schedule.num_steps < rule.trial_steps and trial.can_judge:
            damping = best(rule, damping, judged)
        self._set_damping(damping)

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and the gradients.

        Raises:
            ValueError: a sparse one.
        """
        params = (p for group in self.param_groups for p in group["params"])
        return dense_gradients(params, self._names)

    # State.

    def _options(self) -> dict[str, Any]:
        number = isinstance(self._given_damping, float | int)
        return {
            **self._updates.options,
            "statistics": self._statistics,
            "damping": "a number" if number else self._given_damping,
            **self._schedule.options,
        }

    def _own_state(self) -> dict[str, Any]:
        return {
            **{name.lstrip("_"): getattr(self, name) for name in _KEPT},
            **self._schedule.state_dict(),
            **self._updates.state_dict(),
            # Seconds are those of a machine, not of a run.
            "last_step": self.last_step and {**vars(self.last_step), "seconds": {}},
        }

    def _load_own_state(self, own: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, own[name.lstrip("_")])
        self._schedule.load_state_dict(own)
        self.last_step = own["last_step"] and StepRecord(**own["last_step"])
        self._updates.load_state_dict(own)
        self._set_unit(own["damping_unit"])
