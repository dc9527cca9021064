"""`FisherEstimator`: gather statistics during forwards, refresh factors and inverses.

Notation: `z` the network output, `N` its loss terms, `s` a layer's output, `g` the
gradient at `s` of the *sum* over loss terms. Which gradients are taken is the mode:

    "gradients"   targets drawn from the model's own distribution: the true Fisher
    "exact"       one source B e_j for every output coordinate: its expectation
    "empirical"   the user's own targets, through the user's own backward

(Martens & Grosse 2015, arXiv 1503.05671, sections 2 and 5; Kunstner et al. 2019,
arXiv 1905.12558, on why the empirical one is a different matrix.) Micro-batches since
the last update are merged as if they had been one batch. Left out: when to call
`update_covariances` and `update_inverses` (the optimizer's business).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, LayerCall, output_grads, watch_gradient
from .damping import DampingFunc
from .fisher_blocks.base import LayerMoments
from .fisher_factors.base import check_choice
from .fisher_factors.inverse_providing import refresh_inverses
from .layer_collection import LayerCollection
from .loss_functions import NegativeLogProbLoss, Objective

ESTIMATION_MODES = ("gradients", "empirical", "exact")


@dataclass
class _Forward:
    """What is kept of a forward until the user's backward has run."""

    loss: NegativeLogProbLoss
    coeff: float
    calls: list[LayerCall]
    gradient: Tensor | None = None  # at z: all that has arrived


class FisherEstimator:
    """Keep the factors of a model's blocks up to date; multiply by them.

    Args:
        model: the root module; its forwards in training mode are watched.
        layers: the blocks.
        objective: what the user minimises.
        damping: λ, in units of the Fisher of the mean loss; a number or a callable.
        cov_ema_decay: `ε` of the factors' moving average, in [0, 1].
        estimation_mode: `"gradients"`, `"empirical"` or `"exact"`.
        output: where the network output is in what the model returns: a key, an
            attribute name or a callable; not needed if the model returns a tensor.
        seed: of the generator that draws targets; the global one is not touched.

    Raises:
        ValueError: an unknown mode, or `cov_ema_decay` outside [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerCollection,
        objective: Objective,
        damping: DampingFunc,
        *,
        cov_ema_decay: float = 0.95,
        estimation_mode: str = "gradients",
        output: str | int | Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("estimation_mode", estimation_mode, ESTIMATION_MODES)
        if not 0 <= cov_ema_decay <= 1:
            raise ValueError(
                f"cov_ema_decay: expected a number in [0, 1], got {cov_ema_decay}"
            )
        self.blocks = layers.blocks
        self.objective = objective
        self.cov_ema_decay = cov_ema_decay
        self.collecting = True
        self.loss_checked = False
        self._mode = estimation_mode
        self._find = output
        self._seed = seed
        self._generator: torch.Generator | None = None
        # What the check of the loss found, for the empirical mode.
        self._summed = objective.reduction == "sum"
        self._gradient_factor = 1.0
        self.reset()
        for block in self.blocks.values():
            block.instantiate_factors(damping)
            block.register_inverse()
        self._capture = Capture(
            model,
            {name: block.module for name, block in self.blocks.items()},
            self._on_forward,
            lambda: self.collecting,
            watch_grads=estimation_mode == "empirical",
        )

    def close(self) -> None:
        """Remove every hook from the model."""
        self._capture.close()

    def reset(self) -> None:
        """Forget what was gathered and not yet used."""
        self._pending: dict[str, LayerMoments] = {}
        self._pending_terms = 0
        self._finite: Tensor | None = None
        self._arrived: list[_Forward] = []

    @property
    def num_terms(self) -> int:
        """The loss terms of all forwards whose backward has run since `reset`."""
        return sum(forward.loss.num_terms for forward in self._arrived)

    @property
    def capture(self) -> Capture:
        """What watches the model's forwards."""
        return self._capture

    def losses(self, output: Any) -> list[tuple[NegativeLogProbLoss, float]]:
        """What the model returned means: distributions, each with its weight."""
        z = self._network_output(output)
        return [(self.objective.factory(z), self.objective.coeff(z))]

    # During a forward.

    def _on_forward(self, output: Any, calls: list[LayerCall]) -> None:
        watched = not self.loss_checked or self.objective.reduction == "sum"
        if not calls and not watched:
            return
        z = self._network_output(output)
        if not z.requires_grad:
            return
        with torch.autocast(z.device.type, enabled=False):
            # A NaN must not stop the sampling; it is remembered instead. -Inf is a mask.
            safe = z.detach().to(torch.promote_types(z.dtype, torch.float32))
            safe = safe.nan_to_num(0.0, 0.0, torch.finfo(safe.dtype).min)
            loss = self.objective.factory(safe.requires_grad_())
            coeff = self.objective.coeff(z)
            if calls:
                finite = ~(z.detach().isnan() | z.detach().isposinf()).any()
                self._finite = finite if self._finite is None else self._finite & finite
            if calls and self._mode != "empirical":
                self._collect(z, loss, coeff, calls)
                calls = []  # they hold the graph, which is about to hold a hook of ours
        if watched or self._mode == "empirical":
            self._watch(z, _Forward(loss, coeff, calls))

    def _watch(self, z: Tensor, forward: _Forward) -> None:
        arrived = self._arrived  # of this step: a later one has a list of its own

        def keep(gradient: Tensor) -> None:
            if forward.gradient is None:
                arrived.append(forward)
                forward.gradient = gradient
            else:  # several backwards through one graph add up, as they do in .grad
                forward.gradient = forward.gradient + gradient

        watch_gradient(z, keep)

    def _network_output(self, output: Any) -> Tensor:
        try:
            if self._find is None:
                z = output
            elif callable(self._find):
                z = self._find(output)
            elif isinstance(self._find, str) and not isinstance(output, Mapping):
                z = getattr(output, self._find)
            else:
                z = output[self._find]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"output={self._find!r} does not fit what the model returned, a "
                f"{type(output).__name__}: {error}"
            ) from error
        if not isinstance(z, Tensor):
            raise ValueError(
                f"expected the model to return its network output as a tensor, got "
                f"{type(z).__name__}; say where it is with output=, a key, an index, an "
                "attribute name or a callable"
            )
        return z

    def _collect(
        self, z: Tensor, loss: NegativeLogProbLoss, coeff: float, calls: list[LayerCall]
    ) -> None:
        if self._mode == "gradients":
            nll = loss.evaluate_on_sample(self._generator_on(z.device))
            sources = [torch.autograd.grad(nll, loss.inputs)[0]]
        else:
            sources = loss.fisher_factor_columns()
        for source in sources:
            grads = output_grads(z, (coeff**0.5 * source).to(z.dtype), calls)
            for call, grad in zip(calls, grads, strict=True):
                if grad is not None:
                    call.grads.append(grad)
        self._add_moments(calls, loss.num_terms)

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return self._generator

    @torch.no_grad()
    def _add_moments(self, calls: list[LayerCall], num_terms: int) -> None:
        self._pending_terms += num_terms
        for name, block in self.blocks.items():
            used = [call for call in calls if call.layer == name and call.grads]
            if not used:
                continue
            for call in used:
                call.check_unchanged()
            sources = zip(*(call.grads for call in used), strict=True)
            moments = block.moments([call.input for call in used], list(sources))
            if name in self._pending:
                self._pending[name].merge(moments)
            else:
                self._pending[name] = moments

    # At a step.

    def check_loss(self, value: Any = None) -> None:
        """Compare the gradient at the network output with the declared loss, once.

        A difference is a UserWarning that gives the factor. `value` is the user's loss,
        where a closure returned it: a normal loss cannot be checked without.
        """
        if self.loss_checked:
            return
        known = None
        if len(self._arrived) == 1 and isinstance(value, float | Tensor):
            known = float(value) if torch.as_tensor(value).numel() == 1 else None
        for forward in self._arrived:
            g = forward.gradient
            if g is not None and g.isfinite().all() and g.any():
                self.loss_checked = True
                self._report_loss(forward, forward.loss.gradient_scale(g, known))
                return

    def _report_loss(self, forward: _Forward, scale: Tensor | None) -> None:
        if scale is None:
            return
        num_terms = forward.loss.num_terms
        terms = 1 if self.objective.reduction == "sum" else num_terms
        factor = scale.item() * terms / forward.coeff
        # Soft targets may show as a factor somewhat below 1.
        if 0.6 < factor < 1.05:
            return
        sums = self.objective.reduction is None and abs(factor / num_terms - 1) < 0.05
        if self._mode != "empirical" and not sums and _is_gradient_scaler(factor):
            return
        warnings.warn(_loss_mismatch(forward.loss, self.objective, factor), stacklevel=6)
        if sums:
            self._summed = True
        elif not math.isnan(factor):
            self._gradient_factor = factor

    def has_statistics(self) -> bool:
        """Whether anything was gathered since the last update."""
        if self._mode == "empirical":
            return any(call.grads for forward in self._arrived for call in forward.calls)
        return bool(self._pending)

    def update_covariances(self, gradient_is_finite: Tensor | None = None) -> list[str]:
        """Let what was gathered enter the factors, all of it or nothing.

        Args:
            gradient_is_finite: a flag of the caller's that has to hold too.

        Returns:
            Where there is a NaN or an Inf: layers, `"the network output"` or `"the
            gradient"`. If there is one, every factor keeps its last good value.
        """
        try:
            if self._mode == "empirical":
                for forward in self._arrived:
                    self._add_empirical(forward)
            flags = {
                name: torch.stack([cov.isfinite().all() for cov in moments.covs]).all()
                for name, moments in self._pending.items()
            }
            if self._finite is not None:
                flags["the network output"] = self._finite
            if gradient_is_finite is not None:
                flags["the gradient"] = gradient_is_finite
            device = next(iter(flags.values())).device
            # The one host read of an update.
            good = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
            bad = [name for name, fine in zip(flags, good, strict=True) if not fine]
            self._commit(accept=not bad)
            return bad
        finally:
            self.reset()

    def _commit(self, accept: bool) -> None:
        for name, moments in self._pending.items():
            block = self.blocks[name]
            if accept:
                block.accumulate(moments, self._pending_terms, self.cov_ema_decay)
            else:
                for factor in block.factors:
                    factor.reject()

    def _add_empirical(self, forward: _Forward) -> None:
        """The user's gradients, brought to those of the summed loss."""
        num_terms = forward.loss.num_terms
        terms = 1 if self._summed else num_terms
        scale = terms / (self._gradient_factor * forward.coeff**0.5)
        for call in forward.calls:
            if call.grads:
                call.grads = [scale * torch.stack(call.grads).sum(0)]
        self._add_moments(forward.calls, num_terms)

    def has_new_layers(self) -> bool:
        """Whether a layer has statistics but no inverse yet: it was called late."""
        return any(
            block.has_statistics and not factor.is_refreshed
            for block in self.blocks.values()
            for factor in block.factors
        )

    def update_inverses(self) -> None:
        """Refresh every stored inverse from the current factors.

        Raises:
            torch.linalg.LinAlgError: a damped factor is singular; nothing is changed.
        """
        ready = [block for block in self.blocks.values() if block.has_statistics]
        refresh_inverses(factor for block in ready for factor in block.factors)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return what restores the estimator bit for bit, between two steps."""
        return {
            "blocks": {name: block.state_dict() for name, block in self.blocks.items()},
            "mode": self._mode,
            "generator": self._generator and self._generator.get_state(),
            "generator_device": self._generator and self._generator.device.type,
            "loss_checked": self.loss_checked,
            "summed": self._summed,
            "gradient_factor": self._gradient_factor,
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

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state of another model; nothing is changed then.
        """
        self.check_state_dict(state)
        self.reset()
        for name, block in self.blocks.items():
            block.load_state_dict(state["blocks"][name])
        self.loss_checked = state["loss_checked"]
        self._summed = state["summed"]
        self._gradient_factor = state["gradient_factor"]
        self._generator = None
        if state["generator"] is None:
            return
        if state["generator_device"] != device.type:
            warnings.warn(
                f"the state's generator is one of {state['generator_device']}; on "
                f"{device.type} the targets are drawn from a new one, so the run is not "
                "resumed bit for bit",
                stacklevel=4,
            )
        else:
            self._generator_on(device).set_state(state["generator"].cpu())


def _is_gradient_scaler(factor: float) -> bool:
    """Whether a factor looks like the scale that guards half precision."""
    return factor >= 1024 and abs(math.log2(factor) - round(math.log2(factor))) < 0.01


def _loss_mismatch(loss: NegativeLogProbLoss, objective: Objective, factor: float) -> str:
    """Say how the gradient at the network output differs from the declared loss's."""
    kind = objective.reduction or "mean"
    declared = f"the {kind} over {loss.num_terms} loss terms of {loss.name}"
    if math.isnan(factor):
        return (
            f"the gradient at the network output cannot be that of {declared}, for any "
            "targets. Is loss= the loss you minimise? Classes are expected in the last "
            'dimension by "categorical", in the second by nn.CrossEntropyLoss()'
        )
    return (
        f"the gradient at the network output is {factor:.4g} times that of {declared}. "
        "The curvature is not affected, the step is: scale the loss (or lr), or pass the "
        "criterion itself as loss=, whose reduction is understood. A factor of "
        f"{loss.num_terms} is a sum over loss terms, {1 / loss.inputs[0].numel():.4g} a "
        "mean over outputs; one over the number of micro-batches, accumulation, is as it "
        "should be"
    )
