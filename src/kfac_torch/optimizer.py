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
constraint is on the exact norm of the whole step, `δᵀ(F + λI)δ <= c`. Weight decay is
decoupled: `δ −= η·decay·θ`; with the model, `p += decay·θ`. Parameters without a block
follow `v ← μ v + g, δ = −η v`. Left out: how λ adapts (`damping.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import uncompiled
from .coverage import CoverageReport
from .damping import LevenbergMarquardt
from .estimator import FisherEstimator
from .layer_choice import Layers
from .layer_collection import LayerCollection
from .loss_collection import Output
from .loss_functions import LossFactory
from .options import (
    MOMENTUM,
    Damping,
    QModel,
    check_count,
    damping_at,
    group_options,
    name_and_stride,
)
from .plain_updates import plain_options
from .trials import Trial
from .updates import StepRecord, UpdateRule

_STATE_VERSION = 2
_EARLY_REFRESHES = 3  # the first factors are of few batches: their inverses age fast
_MAX_ADAPTATIONS = 100  # of λ within one step: from 1 to 1e-8 at .95⁵ takes 72


class KFAC(torch.optim.Optimizer):
    """K-FAC (Martens & Grosse 2015, arXiv 1503.05671) for the linear layers, convolutions
    and embeddings of a model, momentum for its other parameters.

    On a step where statistics are due, a hook on the model's forward draws targets from
    the model's own output and takes gradients to the layer outputs: the true Fisher,
    before the user's own backward and without touching any `.grad`.

    A batch with a NaN or an Inf in its statistics or its gradient changes no parameter
    (and no factor, if statistics are due): the step is left out, counted in
    `skipped_steps`, with a RuntimeWarning. The host reads one number of the device per
    step, one more where statistics are due, and one for each distinct size of a factor
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
            every linear layer, convolution and embedding if None.
        output: where the network output is in what the model returns, if that is not a
            tensor: a key, an index, an attribute name or a callable.
        lr: `η`, in units of the natural gradient (1 is a full Newton-like step); a param
            group option. With the quadratic model a factor on the step that it finds;
            None is 1 (for a scheduler, say 1.0).
        damping: λ, added to the Fisher of the mean loss, in its units: those of the loss
            per squared parameter. 0 is allowed where no factor is singular. A number,
            which may be changed as `param_groups[0]["damping"]` and is read at each
            refresh; a callable of the number of steps taken; or a `LevenbergMarquardt`,
            which adapts it and needs `step(closure)`.
        momentum: `μ` in [0, 1); None is 0.9; a param group option. `"qmodel"` finds it.
        weight_decay: decoupled, per unit of `lr`; a param group option.
        norm_constraint: `c`, in nats of squared Fisher norm, or None for no limit;
            `"auto"` is 1e-3, and None with the quadratic model. May be changed as
            `param_groups[0]["norm_constraint"]`.
        momentum_type: `"regular"` (momentum of preconditioned gradients), `"adam"`
            (momentum of gradients, then preconditioned), `"qmodel"` (step size and
            momentum from the quadratic model) or `"qmodel_fixedmu"` (the step size);
            or a `QModel`, which has options.
            The model takes one or two forward-mode passes per step, on the inputs of the
            training forwards since the last step.
        estimation_mode: `"gradients"` (the true Fisher by sampled targets),
            `"curvature_prop"` (the same by random signs), `"exact"` (all output
            coordinates in one vectorised pass; the output's first dimension must be that
            of examples) or `"empirical"` (the user's own targets).
        cov_ema_decay: of the factors' moving average, in [0, 1].
        cov_update_every: steps between statistics.
        invert_every: steps between refreshes of the inverses; the first three steps
            refresh them too.
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
        skipped_steps: how many were left out.

    Raises:
        ValueError: a value out of range, a loss that is not known, or a model without
            any supported layer. In a forward: a network output that does not fit the
            loss. In the first `step`: no forward in training mode before it.
        NotImplementedError: λ adapts, but an approximation has no product with `F` to
            predict by (a chain over time); the quadratic model needs none.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> optimizer = KFAC(model, loss="categorical", lr=0.1, damping=1e-2)
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
        damping: Damping,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        norm_constraint: float | str | None = "auto",
        momentum_type: str | QModel = "regular",
        estimation_mode: str = "gradients",
        cov_ema_decay: float = 0.95,
        cov_update_every: int = 1,
        invert_every: int = 5,
        num_burnin_steps: int = 0,
        approx: str | Mapping[Any, str] | Layers | None = None,
    ) -> None:
        kind, stride = name_and_stride(momentum_type)
        defaults = group_options(
            momentum_type=kind,
            lr=lr,
            damping=damping,
            momentum=momentum,
            weight_decay=weight_decay,
            norm_constraint=norm_constraint,
        )
        check_count("cov_update_every", cov_update_every, 1)
        check_count("invert_every", invert_every, 1)
        check_count("num_burnin_steps", num_burnin_steps, 0)
        layers = _complete(layer_collection, model, loss, output, approx)
        module = uncompiled(model)
        names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        super().__init__(_param_groups(names, layers, lr, momentum), defaults)
        self.last_step: StepRecord | None = None
        self.skipped_steps = 0
        self._model = model
        self._names = names
        self._damping = damping
        self._momentum_type = kind
        self._cov_update_every = cov_update_every
        self._invert_every = invert_every
        self._num_burnin_steps = num_burnin_steps
        self._num_steps = 0
        self._num_burnt = 0
        self._inverses_due = True
        self._calibrated = False
        chosen = (name for name in names.values() if layers.is_chosen(name))
        self._announced = set(chosen)
        with _loss_taken_back(layers, loss):
            self._watch(layers, cov_ema_decay, estimation_mode, kind, stride)

    def _watch(
        self,
        layers: LayerCollection,
        cov_ema_decay: float,
        estimation_mode: str,
        kind: str,
        stride: int,
    ) -> None:
        """Make what gathers statistics and what makes steps, both or neither."""
        self.estimator = FisherEstimator(
            None,
            cov_ema_decay,
            lambda: self._updates.total_damping(),
            layers,
            estimation_mode=estimation_mode,
        )
        try:
            self._updates = UpdateRule(
                self, self._model, self.estimator, self._names, kind, self._damping, stride
            )
        except NotImplementedError:
            self.estimator.release()
            raise

    def close(self) -> None:
        """Remove every hook from the model."""
        self.estimator.close()

    def report(self) -> CoverageReport:
        """Return what K-FAC does with every parameter; see `LayerCollection.report`."""
        return self.estimator.layers.report()

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
                returns the loss; optional, unless λ adapts. It is then called again after
                the step where an adaptation is due, with the same random numbers; that
                call leaves no trace: gradients, buffers and random state are put back. If
                it raises, the step has been taken, and λ stays.

        Returns:
            What the closure returned, at first.

        Raises:
            RuntimeError: on the first step, if there was no forward in training mode.
            ValueError: λ adapts and there is no closure; a parameter without a block has
                no `lr`.
            torch.linalg.LinAlgError: a damped factor is singular; parameters and
                inverses are unchanged. A λ that adapts is raised instead.
        """
        try:
            adapts = self._updates.rule is not None
            trial = Trial(self._model, self.estimator, closure, adapts)
            value = trial.first()
            params, grads = self._gradients()
            self.estimator.check_loss(value)
            if self.estimator.sums_gradients and self.estimator.num_terms:
                trial.num_terms = self.estimator.num_terms
                grads = list(torch._foreach_div(grads, trial.num_terms))
            burning = self._num_burnt < self._num_burnin_steps
            collected = self.estimator.collecting and self.estimator.has_statistics()
            bad = self._update_statistics(collected, grads, burning)
            moves = not burning and not bad
            if moves:
                bad = self._move(params, grads, trial)
            if bad:
                self._skip(", ".join(bad))
            if burning:
                self._num_burnt += 1
                return value
            self._num_steps += 1
            if collected and not bad:
                self.estimator.collecting = False  # else it stays due
            if self._num_steps % self._cov_update_every == 0:
                self.estimator.collecting = True
            if self._num_steps % self._invert_every == 0:
                self._inverses_due = True
            if moves and params and not bad:
                self._adapt(trial)  # last: the closure may fail
            return value
        finally:
            self.estimator.capture.forwards.clear()

    def _adapt(self, trial: Trial) -> None:
        """Adapt λ where due, by the loss at the parameters that the step has led to."""
        rule, record = self._updates.rule, self.last_step
        if rule is None or record is None or self._num_steps % rule.interval:
            return
        assert record.predicted_change is not None  # `_move` asked for it
        new_loss, rho = trial.judge(record.predicted_change, rule)
        self.last_step = replace(record, new_loss=new_loss, rho=rho)
        self._set_damping(rule.update(record.damping, rho))

    def _set_damping(self, damping: float) -> None:
        if damping != self.param_groups[0]["damping"]:
            self.param_groups[0]["damping"] = damping
            self._inverses_due = True

    def _update_statistics(
        self, collected: bool, grads: list[Tensor], burning: bool
    ) -> list[str]:
        """Update the factors where due; return where there is a NaN or an Inf."""
        estimator = self.estimator
        if not collected:
            estimator.reset()
            return []
        norms = torch._foreach_norm(grads)
        flags = [norm.isfinite().to(norms[0].device) for norm in norms]
        finite = torch.stack(flags).all() if flags else None
        return estimator.update_covariances(finite, decay=1.0 if burning else None)

    def _update_inverses(self) -> None:
        """Refresh the inverses where due; a λ that adapts is raised until it can be."""
        estimator = self.estimator
        blocks = estimator.blocks.values()
        if not any(block.has_statistics for block in blocks):
            raise RuntimeError(
                "KFAC.step(): there are no statistics yet. Expected a call of the model "
                "given to KFAC (model(x), not model.forward(x)), in training mode and with "
                "gradients enabled, and its backward, between constructing the optimizer "
                "and the first step(), and of its layers: not under torch.vmap or "
                "functional_call. Where torch.compile(model) is called, give KFAC the "
                "compiled module; a torch.utils.checkpoint hides its layers unless "
                "use_reentrant=False"
            )
        for block in blocks:
            block.follow_params()
        early = self._num_steps < _EARLY_REFRESHES or estimator.has_new_layers()
        for attempt in range(_MAX_ADAPTATIONS):
            if not (self._inverses_due or early):
                return
            try:
                estimator.update_inverses()
                self._inverses_due = early = False
            except torch.linalg.LinAlgError:
                if self._updates.rule is None or attempt == _MAX_ADAPTATIONS - 1:
                    raise
                damping = self.param_groups[0]["damping"]
                self._set_damping(self._updates.rule.update(damping, -1.0))

    def _move(self, params: list[Tensor], grads: list[Tensor], trial: Trial) -> list[str]:
        """Move the parameters; return what is not finite, if anything: nothing moves."""
        self._updates.num_steps = self._num_steps
        group, rule = self.param_groups[0], self._updates.rule
        if callable(self._damping):
            group["damping"] = damping_at(self._damping, self._num_steps)
        if not params:
            self._update_inverses()
            return []
        if rule and rule.calibrate and not self._calibrated:
            self._calibrate(rule, params, grads, trial)
        self._update_inverses()
        due = rule is not None and (self._num_steps + 1) % rule.interval == 0
        step = self._updates.propose(params, grads, with_prediction=due)
        self._announce_others(params)
        if not step.finite:
            return ["the gradient"]
        torch._foreach_add_(step.params, step.deltas)
        for p, memory in zip(step.params, step.memory, strict=True):
            self.state[p].update(memory)
        self.last_step = StepRecord(
            step=self._num_steps,
            lr=step.lr,
            momentum=step.momentum,
            damping=group["damping"],
            loss=trial.loss,
            predicted_change=step.predicted_change,
        )
        return []

    def _calibrate(
        self,
        rule: LevenbergMarquardt,
        params: list[Tensor],
        grads: list[Tensor],
        trial: Trial,
    ) -> None:
        """Adapt λ on one batch until it settles or turns round; the larger one is kept."""
        before = [p.clone() for p in params]
        group, last = self.param_groups[0], 0.0
        for _ in range(_MAX_ADAPTATIONS):
            self._update_inverses()
            step = self._updates.propose(params, grads, with_prediction=True)
            if not step.finite:
                return
            try:
                torch._foreach_add_(step.params, step.deltas)
                _, rho = trial.judge(step.prediction(), rule)
            finally:
                torch._foreach_copy_(params, before)
            old = group["damping"]
            new = rule.update(old, rho)
            if (new - old) * last < 0:
                new = max(new, old)
            self._set_damping(new)
            if new == old or (new - old) * last < 0:
                break
            last = new - old
        self._calibrated = True

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and the gradients.

        Raises:
            ValueError: a sparse one.
        """
        params, grads = [], []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise ValueError(
                        f"parameter {self._names.get(p, '?')}: expected a dense gradient, "
                        f"got {p.grad.layout}; construct its layer with sparse=False"
                    )
                params.append(p)
                grads.append(p.grad)
        return params, grads

    # Messages.

    def _skip(self, why: str) -> None:
        self.skipped_steps += 1
        warnings.warn(
            f"KFAC.step(): NaN, Inf or overflow in {why}; the step is left out: "
            "parameters, velocities and factors keep their last good values (counted in "
            "skipped_steps)",
            RuntimeWarning,
            stacklevel=5,
        )

    def _announce_others(self, params: list[Tensor]) -> None:
        by_rule: dict[str, list[str]] = {}
        for p, rule in self._updates.plain_rules(params).items():
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

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes the run bit for bit, taken between two steps."""
        own = {
            "version": _STATE_VERSION,
            "momentum_type": self._momentum_type,
            "num_steps": self._num_steps,
            "num_burnt": self._num_burnt,
            "calibrated": self._calibrated,
            "skipped_steps": self.skipped_steps,
            "collecting": self.estimator.collecting,
            "inverses_due": self._inverses_due,
            "estimator": self.estimator.state_dict(),
        }
        return {**super().state_dict(), "kfac": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into an optimizer constructed alike.

        Raises:
            ValueError: the state of another optimizer or model; nothing is changed then.
        """
        own = state_dict.get("kfac")
        if own is None or own["version"] != _STATE_VERSION:
            found = "no K-FAC state" if own is None else f"version {own['version']}"
            raise ValueError(
                f"KFAC.load_state_dict: expected K-FAC state of version {_STATE_VERSION}, "
                f"got {found}"
            )
        if own["momentum_type"] != self._momentum_type:
            raise ValueError(
                f"KFAC.load_state_dict: expected momentum_type={self._momentum_type!r} in "
                f"the state, got {own['momentum_type']!r}"
            )
        self.estimator.check_state_dict(own["estimator"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "kfac"})
        device = self.param_groups[0]["params"][0].device
        self.estimator.load_state_dict(own["estimator"], device)
        self._num_steps = own["num_steps"]
        self._num_burnt = own["num_burnt"]
        self._calibrated = own["calibrated"]
        self.skipped_steps = own["skipped_steps"]
        self.estimator.collecting = own["collecting"]
        self._inverses_due = own["inverses_due"]


def _param_groups(
    params: Iterable[Tensor],
    layers: LayerCollection,
    lr: float | None,
    momentum: float | None,
) -> list[dict[str, Any]]:
    """Return a group of what has a block, and one for every rule that moves the others.

    Frozen parameters too: they are left alone while they have no gradient. Those that are
    excluded are in none.
    """
    owned = set(layers.registered_variables)
    groups: list[dict[str, Any]] = [{"params": []}]
    by_rule: dict[str, list[Tensor]] = {}
    for p in params:
        if p in owned:
            groups[0]["params"].append(p)
        elif not layers.is_excluded(p):
            by_rule.setdefault(layers.plain_rule(p), []).append(p)
    for rule, others in sorted(by_rule.items()):
        options = plain_options(rule, lr, MOMENTUM if momentum is None else momentum)
        groups.append({"params": others, **options})
    return groups


@contextmanager
def _loss_taken_back(
    layers: LayerCollection, loss: str | nn.Module | LossFactory | None
) -> Iterator[None]:
    """Leave the user's collection as it was, where a constructor fails."""
    try:
        yield
    except (ValueError, NotImplementedError):
        if loss is not None:
            layers.registered_losses.pop()
        raise


def _complete(
    layers: LayerCollection | None,
    model: nn.Module,
    loss: str | nn.Module | LossFactory | None,
    output: Output,
    approx: str | Mapping[Any, str] | Layers | None,
) -> LayerCollection:
    """Return a collection of the model with layers and losses.

    Raises:
        ValueError: no supported layer, or not exactly one of `loss` and losses that are
            registered, or the collection of another model.
    """
    if layers is None:
        layers = LayerCollection(model)
        choices = approx if isinstance(approx, Layers) else Layers(approx=approx)
        layers.auto_register_layers(layers=choices)
    elif approx is not None:
        raise ValueError(
            "approx: expected no layer_collection= beside it, which has the approximations "
            f"already, got approx={approx!r}; use auto_register_layers(layers=...)"
        )
    elif not isinstance(layers, LayerCollection):
        raise TypeError(
            f"layer_collection: expected a LayerCollection, got {type(layers).__name__}"
        )
    elif layers.model is not model:
        raise ValueError(
            "layer_collection: expected a collection of the model given to KFAC, got one "
            f"of another {type(layers.model).__name__}"
        )
    if not layers.blocks:
        raise ValueError(
            f"{type(model).__name__} has no layer that K-FAC supports: expected an "
            "nn.Linear, a convolution, an embedding, a normalisation or another layer of "
            "registration.KINDS with a trained weight; left alone: "
            f"{layers.left_alone or 'nothing'}"
        )
    if (loss is None) == (not layers.registered_losses):
        given = "neither" if loss is None else "both"
        raise ValueError(
            f"loss: expected either loss= or losses registered in layer_collection, got "
            f"{given}"
        )
    if loss is not None:
        layers.register_loss_function(loss, output)
    return layers
