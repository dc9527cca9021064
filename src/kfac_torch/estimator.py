"""`FisherEstimator`: gather statistics during forwards, refresh factors, multiply.

Notation: `z` the network output, `N` its loss terms, `s` a layer's output, `g` the
gradient at `s` of the *sum* over loss terms, `B Bᵀ` the Fisher at `z`. Which gradients
are taken is the mode:

    "gradients"       targets drawn from the model's own distribution: the true Fisher
    "curvature_prop"  B ζ with ζ uniform ±1: the same in expectation, without sampling
    "exact"           one source B e_j for every output coordinate: its expectation
    "empirical"       the user's own targets, through the user's own backward

(Martens & Grosse 2015, arXiv 1503.05671, sections 2 and 5; Martens, Sutskever & Swersky
2012, arXiv 1206.6464, for curvature propagation; Kunstner et al. 2019, arXiv 1905.12558,
on why the empirical one is a different matrix.)

They are taken where the user's backward has just brought the gradient to `z`, before it
goes on: that gradient shows which loss terms count (an `ignore_index`, padded tokens,
class weights), with no target in sight. Forwards that no backward has reached when the
factors are updated are taken then, if no other was; else they are left out. Micro-batches
since the last update are merged as if they had been one batch. Left out: when to call
`update_covariances` and `update_inverses` (the optimizer's business).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch_loss import BatchLoss
from .block_products import BlockProducts
from .capture import Capture, LayerCall
from .cost_model import StepCosts, forward_cost, step_costs
from .damping import DampingFunc, check_damping
from .empirical import empirical_moments
from .fisher_blocks import FisherBlock, Moment
from .fisher_factors.background import BackgroundRefreshes
from .fisher_factors.base import check_choice
from .forwards import Forward, Forwards, LossPart, without_nan
from .health import SCALE, Health, HealthLedger
from .inverse_updates import InverseUpdates
from .layer_collection import LayerCollection
from .loss_check import UserLoss
from .loss_functions import LossFunction
from .options import ESTIMATION_MODES, Statistics
from .replay import Replays
from .sources import (
    BatchMoments,
    block_layer,
    column_chunks,
    unscaled,
    with_random_signs,
)
from .update_thunks import UpdateThunks


class FisherEstimator(BlockProducts, InverseUpdates, UpdateThunks):
    """Keep the factors of a model's blocks up to date; multiply by them.

    Forwards of the collection's model in training mode are watched from construction on.

    Args:
        variables: the parameters to estimate the Fisher of: exactly those registered in
            `layer_collection`; None for those.
        cov_ema_decay: `ε` of the factors' moving average, in [0, 1].
        damping: λ, in units of the Fisher of the mean loss; a number or a callable.
        layer_collection: the blocks and the losses; of one estimator alone, since the
            blocks hold its factors.
        exps: the exponents that `multiply_matpower` is to serve (1 always is).
        estimation_mode: `"gradients"`, `"empirical"`, `"curvature_prop"` or `"exact"`. The
            weights of several losses enter the empirical statistics squared, as they do
            the user's gradient. `"exact"` takes one coordinate of all examples at once,
            so the first dimension of the network output must be that of examples:
            `[N, T, classes]` of a sequence model, not `[N T, classes]`. Where examples
            interact (batch statistics), it is right in expectation only: every example
            has a random sign.
        seed: of the generator that draws targets; the global one is not touched.

    Attributes:
        max_kept_inverses: for how many refreshes a factor that fails keeps its last one.
        background: the refreshes that are under way in a thread.

    Raises:
        ValueError: an unknown mode, `cov_ema_decay` outside [0, 1], a negative `damping`,
            other variables than those registered, no layer or no loss registered, or a
            collection that another estimator has.
        NotImplementedError: an exponent that an approximation does not have.

    >>> model = torch.nn.Linear(2, 3)
    >>> layers = LayerCollection(model)
    >>> layers.auto_register_layers()
    >>> layers.register_categorical_predictive_distribution()
    >>> estimator = FisherEstimator(None, 0.95, 0.1, layers, estimation_mode="exact")
    >>> _ = model(torch.randn(8, 2))
    >>> estimator.update_covariances()
    []
    >>> estimator.update_inverses()
    >>> products = estimator.multiply_inverse([(p, p) for p in model.parameters()])
    >>> [tuple(product.shape) for product, _ in products]
    [(3, 2), (3,)]
    """

    def __init__(
        self,
        variables: Iterable[Tensor] | None,
        cov_ema_decay: float,
        damping: DampingFunc,
        layer_collection: LayerCollection,
        exps: Sequence[float] = (-1,),
        estimation_mode: str | Statistics = "gradients",
        *,
        seed: int = 0,
    ) -> None:
        if not isinstance(estimation_mode, Statistics):
            check_choice("estimation_mode", estimation_mode, ESTIMATION_MODES)
            estimation_mode = Statistics.whole(estimation_mode)
        if not 0 <= cov_ema_decay <= 1:
            raise ValueError(
                f"cov_ema_decay: expected a number in [0, 1], got {cov_ema_decay}"
            )
        layer_collection.check_losses()
        layer_collection.check_blocks()
        if not callable(damping):
            check_damping(damping)
        if variables is not None:
            layer_collection.check_variables(variables)
        taken = [name for name, b in layer_collection.blocks.items() if b.factors]
        if taken:
            raise ValueError(
                "layer_collection: expected a collection of its own for every estimator "
                f"and optimizer, got one whose blocks have factors already: {taken[0]}; or "
                "release() the estimator that has them"
            )
        super().__init__(layer_collection)
        self.cov_ema_decay = cov_ema_decay
        self.collecting = True
        self.loss_checked = False
        self.ledger = HealthLedger()
        self.max_kept_inverses = 3
        self.background = BackgroundRefreshes()
        self._mode = estimation_mode.mode
        self.seed = seed
        self._generator: torch.Generator | None = None
        self._user_loss = UserLoss(summed=self.sums_gradients)
        try:
            for block in self.blocks.values():
                block.instantiate_factors(damping)
            for exp in exps:
                self.register_matpower(exp)
        except (NotImplementedError, ValueError):
            for block in self.blocks.values():
                block.release_factors()
            raise
        self._capture = self._watch()
        self._replays = Replays(self._capture, estimation_mode)
        self.reset()

    def _watch(self) -> Capture:
        empirical = self._mode == "empirical"
        return Capture(
            self.layers.model,
            {name: block_layer(block) for name, block in self.blocks.items()},
            self._on_forward,
            lambda: self.collecting and not self._replays.deferring,
            watch_grads=empirical,
            watch_params=self._generic_params() if empirical else (),
        )

    def close(self) -> None:
        """Remove every hook from the model, and end a thread that refreshes inverses."""
        self._capture.close()
        self.background.close()

    def release(self) -> None:
        """Remove every hook, and leave the collection to another estimator."""
        self.close()
        self.background.drop(list(self.blocks))
        for block in self.blocks.values():
            block.release_factors()

    def reset(self) -> None:
        """Forget what was gathered and not yet used."""
        self._replays.end()
        self._pending: dict[str, list[Moment | None]] = {}
        self._finite: Tensor | None = None
        self._scale: Tensor | None = None
        self._forwards = Forwards(
            self.layers, self._gather, self.layers.use_watch, self._capture
        )
        self._capture.param_grads.clear()

    def forget_gradients(self) -> None:
        """Forget what came with the gradients so far, which are cleared too."""
        if self._forwards.arrived:
            self.ledger.forget_step()
        self._pending.clear()
        self._finite = None
        self._forwards.arrived.clear()
        self._capture.param_grads.clear()
        self._capture.forwards = [f for f in self._capture.forwards if not f.arrived]
        if self._capture.probe is not None:
            self._capture.probe.clear()

    def batch_loss(self) -> BatchLoss:
        """Return the loss of the forwards whose backward has run since `reset`."""
        undeclared = self._user_loss.summed and not self.sums_gradients
        return BatchLoss(
            self._forwards.arrived,
            sums=self.sums_gradients,
            factor=self.num_terms if undeclared else self._user_loss.factor,
            means_each=self._user_loss.averages_each,
            scale=self._capture.gradient_scale(),
        )

    @property
    def is_empirical(self) -> bool:
        """Whether the user's own gradients make the statistics."""
        return self._mode == "empirical"

    @property
    def sums_gradients(self) -> bool:
        """Whether the user's loss is a sum over loss terms, not a mean."""
        return self.layers.reduction == "sum"

    @property
    def num_terms(self) -> float:
        """The loss terms of all forwards whose backward has run since `reset`."""
        return sum(forward.num_terms for forward in self._forwards.arrived)

    @property
    def forward_cost(self) -> float:
        """The multiply-adds of these forwards in the layers, where they were recorded."""
        return sum(forward.cost for forward in self._forwards.arrived)

    def step_costs(
        self, forward: float, model_stride: int | None = None, basis_every: int = 1
    ) -> StepCosts:
        """Return what a step takes like the last one that had statistics."""
        blocks, replays = self.blocks.values(), self._replays
        passes = 0 if self.is_empirical else 2 if replays.deferring else 1
        k = replays.stride
        return step_costs(blocks, forward, k, passes, model_stride, basis_every)

    def losses(self, output: Any) -> list[tuple[LossFunction, float]]:
        """Return `LayerCollection.losses` of what the model returned."""
        return self.layers.losses(output)

    def keep_forwards(self) -> None:
        """Keep what the model is called with, for a caller who clears that himself."""
        self._capture.keep_forwards = self._replays.shared = True

    @property
    def capture(self) -> Capture:
        """What watches the model's forwards."""
        return self._capture

    # During a forward, and when its backward begins.

    def _on_forward(self, output: Any, calls: list[LayerCall]) -> None:
        recorded = self._capture.recorded and (bool(calls) or self._has_generic_params())
        for call in calls:
            call.check_unchanged()
        root = self._capture.last_forward
        wanted = self._capture.keep_losses or self.sums_gradients or not self.loss_checked
        if recorded or root is not None or wanted:
            self._forwards.add(output, calls if recorded else None, root)

    def _gather(
        self, forward: Forward, calls: list[LayerCall], outputs: list[Tensor]
    ) -> None:
        """Take the statistics of a forward, unless the user's gradients make them."""
        forward.cost = forward_cost(calls, self.blocks)
        if self._mode == "empirical":
            forward.calls = calls  # until the backward has been through the layers
            return
        if self._replays.puts_off(forward, calls):
            return
        flags = [~(z.detach().isnan() | z.detach().isposinf()).any() for z in outputs]
        finite = torch.stack([flag.to(flags[0].device) for flag in flags]).all()
        self._finite = finite if self._finite is None else self._finite & finite
        self._collect(forward, calls, outputs)

    def _collect(
        self, forward: Forward, calls: list[LayerCall], outputs: list[Tensor]
    ) -> None:
        """Take gradients from the network outputs to the layers, and their moments."""
        batch = BatchMoments(calls, self.blocks, forward.num_terms, forward.has_idle_terms)
        attached = [
            (z, part)
            for z, part in zip(outputs, forward.parts, strict=True)
            if z.requires_grad and part.terms > 0
        ]
        if self._mode == "exact":
            for z, part in attached:
                loss = part.factory(without_nan(z))
                for some in column_chunks(loss):
                    columns = loss.fisher_factor_all_columns(some)
                    columns = with_random_signs(columns, self._generator_on(z.device))
                    sources = part.source(columns, forward.num_terms).to(z.dtype)
                    batch.add_columns(z, sources)
        else:
            sources = [
                part.source(self._draw(part.factory(without_nan(z))), forward.num_terms).to(
                    z.dtype
                )[None]
                for z, part in attached
            ]
            batch.add([z for z, _ in attached], sources, last=forward.rerun)
        self._add_moments(batch.moments())

    def _draw(self, loss: LossFunction) -> Tensor:
        """One random source at the network output, whose second moment is the Fisher."""
        generator = self._generator_on(loss.inputs.device)
        if self._mode == "gradients":
            return loss.sample_gradient(generator)
        return loss.fisher_factor_random_signs(generator)

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator

    def _generic_params(self) -> list[Tensor]:
        return [
            param
            for block in self.blocks.values()
            if block.needs_param_grads
            for param in block.params
        ]

    def _has_generic_params(self) -> bool:
        """Whether the model has any that are its own, not those of `functional_call`."""
        generic = {id(param) for param in self._generic_params()}
        return bool(generic) and any(
            id(p) in generic for p in self.layers.model.parameters()
        )

    def _add_moments(self, new: dict[str, list[Moment]]) -> None:
        for name, moments in new.items():
            nothing: list[Moment | None] = [None] * len(moments)
            pending = self._pending.setdefault(name, nothing)
            for index, moment in enumerate(moments):
                current = pending[index]
                if current is None:
                    pending[index] = moment
                else:
                    current.merge(moment)

    # At a step.

    def check_loss(self, value: Any = None) -> None:
        """Compare the gradient at the network output with the declared loss, once.

        A difference is a UserWarning that gives the factor. `value` is the user's loss,
        where a closure returned it: a normal loss cannot be checked without.
        """
        if self.loss_checked:
            return
        known = None
        alone = (
            len(self._forwards.arrived) == 1 and len(self._forwards.arrived[0].parts) == 1
        )
        if alone and isinstance(value, float | Tensor):
            known = float(value) if torch.as_tensor(value).numel() == 1 else None
        for index, part in (
            pair for forward in self._forwards.arrived for pair in enumerate(forward.parts)
        ):
            g = part.gradient
            if g is not None and self._mode == "empirical":
                g = unscaled(g, self._capture.gradient_scale()).to(g.dtype)
            if g is not None and g.isfinite().all() and g.any():
                self.loss_checked = True
                terms = sum(f.parts[index].terms for f in self._forwards.arrived)
                if part.weights is not None:
                    g = torch.where(part.weights > 0, g / part.weights, 0)
                self._report_loss(part, part.loss.gradient_scale(g, known), terms)
                if alone or self.layers.reduction is not None:
                    return

    def _report_loss(self, part: LossPart, scale: Tensor | None, all_terms: float) -> None:
        if scale is None:
            return
        reduction = self.layers.reduction
        factor = scale.item() * (1 if reduction == "sum" else part.terms) / part.coeff
        share, empirical = part.terms / all_terms, self._mode == "empirical"
        self._user_loss.see(part.loss, reduction, factor, share, empirical)

    def has_statistics(self) -> bool:
        """Whether anything was gathered since the last update."""
        self._take_rest()
        if self._mode == "empirical":
            calls = [call for forward in self._forwards.arrived for call in forward.calls]
            return any(call.grads for call in calls) or bool(self._capture.param_grads)
        return any(moment for moments in self._pending.values() for moment in moments)

    def _take_rest(self) -> None:
        """Take what was put off: forwards without a backward, or to be run again."""
        self._forwards.take_rest()
        if self.collecting:
            with self._capture.clock.phase("statistics"):
                self._replays.take(self.layers.model, self._forwards)

    def update_covariances(
        self, gradient_is_finite: Tensor | None = None, decay: float | None = None
    ) -> list[str]:
        """Let what was gathered enter the factors, all of it or nothing.

        Args:
            gradient_is_finite: a flag of the caller's that has to hold too.
            decay: in place of `cov_ema_decay`, for this update; 1 weighs all batches
                alike.

        Returns:
            Where there is a NaN or an Inf: layers, `"the network output"` or `"the
            gradient"`. If there is one, every factor keeps its last good value; also where
            the scale of the user's gradients is not known, which is no fault of theirs.
        """
        try:
            self._take_rest()
            self._add_empirical()
            flags = {
                name: torch.stack([m.is_finite() for m in moments if m]).all()
                for name, moments in self._pending.items()
                if any(moments)
            }
            if self._finite is not None:
                flags["the network output"] = self._finite
            if gradient_is_finite is not None:
                flags["the gradient"] = gradient_is_finite
            if self._scale is not None:
                flags[SCALE] = ~self._scale.isnan()
            if not flags:
                return []
            device = next(iter(flags.values())).device
            # The one host read of an update.
            good = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
            bad = [name for name, fine in zip(flags, good, strict=True) if not fine]
            if SCALE in bad and "the gradient" not in bad:
                self.ledger.leave_out_statistics(stacklevel=6)
                known = any(block.has_statistics for block in self.blocks.values())
                return [] if known else [SCALE]
            bad = [name for name in bad if name != SCALE]
            for block, index, moment in self._gathered():
                if bad:
                    block.factors[index].reject()
                else:
                    used = self.cov_ema_decay if decay is None else decay
                    block.accumulate_factor(index, moment, used)
            return bad
        finally:
            self.reset()

    def _gathered(self) -> Iterable[tuple[FisherBlock, int, Moment]]:
        for name, moments in self._pending.items():
            for index, moment in enumerate(moments):
                if moment is not None:
                    yield self.blocks[name], index, moment

    def _add_empirical(self) -> None:
        """The user's gradients, brought to those of the summed loss; used up by this."""
        if self._mode != "empirical" or not self._forwards.arrived:
            return
        self.check_loss()
        self._scale = self._capture.gradient_scale()
        for moments in empirical_moments(
            self._forwards.take_arrived(),
            self.blocks,
            self._capture.param_grads,
            sums=self._user_loss.summed,
            averages_all=self._user_loss.averages_all,
            factor=self._user_loss.factor,
            scale=self._scale,
        ):
            self._add_moments(moments)
        self._capture.param_grads.clear()

    @property
    def health(self) -> Health:
        """What went wrong so far and was mended, in numbers."""
        factors = {f.name: f.health for b in self.blocks.values() for f in b.factors}
        return self.ledger.health(factors)

    def _update_covariance(self, block: FisherBlock, index: int) -> None:
        self._take_rest()
        self._add_empirical()
        self._forwards.take_arrived()  # they hold outputs, and are of no further use
        moments = self._pending.get(block.name)
        moment = moments[index] if moments else None
        if moments is None or moment is None:
            return
        moments[index] = None
        good = moment.is_finite()
        if self._finite is not None:
            good = good & self._finite.to(good.device)
        if not any(any(left) for left in self._pending.values()):
            self._finite = None  # the last of what was gathered with it
        factor = block.factors[index]
        if good:
            block.accumulate_factor(index, moment, self.cov_ema_decay)
            return
        factor.reject()
        self.ledger.reject(factor.name, stacklevel=3)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return what restores the estimator bit for bit, between two steps."""
        return {
            "blocks": {name: block.state_dict() for name, block in self.blocks.items()},
            "mode": self._mode,
            "stride": self._replays.stride,
            "replays": self._replays.taken,
            "large": self._replays.large,
            "generator": self._generator and self._generator.get_state(),
            "generator_device": self._generator and self._generator.device.type,
            "loss_checked": self.loss_checked,
            "user_loss": vars(self._user_loss).copy(),
            "health": self.ledger.state_dict(),
            "background": self.background.state_dict(),
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing."""
        ours, theirs = set(self.blocks), set(state["blocks"])
        if ours != theirs:
            raise ValueError(
                "the state is of another model: expected exactly this model's layers; "
                f"missing in the state: {sorted(ours - theirs)}, unknown to the model: "
                f"{sorted(theirs - ours)}"
            )
        if state["mode"] != self._mode:
            raise ValueError(
                f"the state is of an optimizer with estimation_mode={state['mode']!r}, "
                f"expected {self._mode!r}"
            )
        for name, block in self.blocks.items():
            block.check_state_dict(state["blocks"][name])

    def load_state_dict(
        self, state: dict[str, Any], device: torch.device | None = None
    ) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: of an estimator that was constructed alike.
            device: where targets are drawn; that of the first parameter if None.

        Raises:
            ValueError: the state of another model; nothing is changed then.
        """
        self.check_state_dict(state)
        if device is None:
            device = next(iter(self.blocks.values())).params[0].device
        for name, block in self.blocks.items():
            block.load_state_dict(state["blocks"][name])
        self._replays.stride = state["stride"]
        self._replays.taken = state["replays"]
        self._replays.large = state.get("large", False)  # older states have none
        self.loss_checked = state["loss_checked"]
        self._user_loss = UserLoss(**state["user_loss"])
        self.ledger.load_state_dict(state["health"])
        self._generator = None
        if state["generator"] is None:
            pass
        elif state["generator_device"] != device.type:
            warnings.warn(
                f"the state's generator is one of {state['generator_device']}; on "
                f"{device.type} the targets are drawn from a new one, so the run is not "
                "resumed bit for bit",
                stacklevel=4,
            )
        else:
            self._generator_on(device).set_state(state["generator"].cpu())
        layers = {name: block.factors for name, block in self.blocks.items()}
        pending = state.get("background", ())  # older states have none
        self.background.load_state_dict(pending, layers, self.max_kept_inverses)
        self.reset()
