"""`KFACPreconditioner`: `.grad` becomes the natural gradient; any optimizer makes the step.

Notation: `g` the gradient of the mean loss, `F̂` the damped block-diagonal Fisher, `λ` the
damping, `η` the learning rate of the optimizer that follows, `κ` the norm limit:

    g ← κ F̂⁻¹ g

on the parameters with a block (Martens & Grosse 2015, arXiv 1503.05671, section 4); the
others keep theirs. `torch.optim.SGD` with momentum then makes the very steps of `KFAC` with
`momentum_type="regular"`. Left out: all that needs to know the step: a λ that adapts, the
quadratic model, a trust region (`optimizer.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .capture import uncompiled
from .construction import complete, loss_taken_back
from .cost_model import Intervals
from .coverage import CoverageReport
from .damping import LevenbergMarquardt, RelativeDamping
from .estimator import FisherEstimator
from .health import Health
from .layer_choice import Layers
from .layer_collection import LayerCollection
from .loss_collection import Output
from .loss_functions import LossFactory
from .options import Damping, Statistics, check_count, damping_at, with_interval
from .preconditioning import (
    Schedule,
    dense_gradients,
    limit_norm,
    mean_curvature,
    precondition,
    ready_blocks,
)
from .recording import watch_scale
from .refresh_schedule import Refresh, as_refresh, check_device

_STATE_VERSION = 2
_INVERT_EVERY = 5
_LEFT_OUT = (
    "KFACPreconditioner.step(): NaN, Inf or overflow in {}; gradients and factors keep "
    "their values and step() returns False: leave the optimizer's step out (counted in "
    "skipped_steps and health())"
)


class KFACPreconditioner:
    """Precondition gradients in place, between `backward` and another optimizer's step.

    Statistics are taken as by `KFAC`, of the forwards of the model in training mode. A
    batch with a NaN or an Inf in its statistics or its gradient changes no factor and no
    gradient: `step` returns False, the first time with a RuntimeWarning, and counts it. The
    optimizer's own step is then to be left out, for its momentum would move parameters.

    Args:
        model: see `KFAC`, as for all that is not told here.
        loss: see `KFAC`.
        layer_collection: see `KFAC`.
        output: see `KFAC`.
        damping: λ, in units of the Fisher of the mean loss; a number, a callable of the
            number of steps taken, or either in a `RelativeDamping`. None is
            `RelativeDamping(0.1)`.
        estimation_mode: `"gradients"`, `"curvature_prop"`, `"exact"` or `"empirical"`, of
            the whole batch, or a `Statistics`, which has options, of part of it.
        cov_ema_decay: of the factors' moving average, in [0, 1].
        cov_update_every: steps between statistics.
        invert_every: steps between refreshes of the inverses, or a `Refresh`, which has
            options; the first three steps refresh them too. None is 5, and more where
            factors are large, so that it is a quarter of the rest of a step at most.
        norm_constraint: `c`, in nats of squared Fisher norm: a limit on the step that the
            optimizer would make of this gradient alone, `η² κ² pᵀF̂p <= c` (`KFAC` has
            1e-3); each `step` is told `η` then. None is for no limit, as suits optimizers
            that do not know the length of a gradient: Adam and its kin, Muon.
        approx: see `KFAC`; parameters without a block are left as they are.

    Attributes:
        damping: λ as a number, None while relative and its unit not known. A constant one
            may be changed, and is read at each refresh.
        damping_unit: the mean curvature at the start, where damping is relative.
        norm_constraint: may be changed.
        estimator: the `FisherEstimator`.

    Raises:
        ValueError: a value out of range, a loss that is not known, or a model without
            any supported layer.
        TypeError: a damping that adapts.
        NotImplementedError: refreshes in the background of a model not on the CPU.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> preconditioner = KFACPreconditioner(model, "categorical")
    >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.cross_entropy(model(x), y)
    ...     loss.backward()
    ...     if preconditioner.step():
    ...         optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | nn.Module | LossFactory | None = None,
        layer_collection: LayerCollection | None = None,
        output: Output = None,
        *,
        damping: float | Callable[[int], float] | RelativeDamping | None = None,
        estimation_mode: str | Statistics = "gradients",
        cov_ema_decay: float = 0.95,
        cov_update_every: int = 1,
        invert_every: int | Refresh | None = None,
        norm_constraint: float | None = None,
        approx: str | Mapping[Any, str] | Layers | None = None,
    ) -> None:
        given = RelativeDamping(0.1) if damping is None else damping
        inner = given.damping if isinstance(given, RelativeDamping) else given
        if isinstance(inner, LevenbergMarquardt):
            raise TypeError(
                "damping: expected a number, a callable or a RelativeDamping of one, got a "
                "LevenbergMarquardt, which has to know the step; KFAC makes its own"
            )
        if norm_constraint is not None and not norm_constraint > 0:
            raise ValueError(
                "norm_constraint: expected a positive number or None, got "
                f"{norm_constraint!r}"
            )
        check_count("cov_update_every", cov_update_every, 1)
        every, is_free = with_interval(invert_every, _INVERT_EVERY)
        free, invert_every = ("inverses",) if is_free else (), as_refresh(every)
        check_device(invert_every, model)
        self.damping = damping_at(given, 0)
        self.damping_unit: float | None = None
        self.norm_constraint = norm_constraint
        self._given_damping = given
        self._damping: Damping = given
        self._names: dict[Tensor, str] = {
            p: name for name, p in uncompiled(model).named_parameters()
        }
        layers = complete(layer_collection, model, loss, output, approx)
        with loss_taken_back(layers, loss):
            self.estimator = FisherEstimator(
                None,
                cov_ema_decay,
                self._current_damping,
                layers,
                estimation_mode=estimation_mode,
            )
        if self.estimator.is_empirical:
            watch_scale(self.estimator)
        self._schedule = Schedule(
            self.estimator,
            cov_update_every=cov_update_every,
            invert_every=invert_every,
            free=free,
        )

    def _current_damping(self) -> float:
        assert self.damping is not None
        return self.damping

    def close(self) -> None:
        """Remove every hook from the model; end the thread of background refreshes."""
        self.estimator.close()

    @property
    def intervals(self) -> Intervals:
        """How often statistics are taken and inverses refreshed, from the first step on."""
        return self._schedule.intervals

    def report(self) -> CoverageReport:
        """Return what is done with every parameter; see `LayerCollection.report`."""
        return self.estimator.layers.report()

    def health(self) -> Health:
        """Return what went wrong so far and was mended, in numbers; see `Health`."""
        return self.estimator.health

    @property
    def skipped_steps(self) -> int:
        """How many batches were left out because of a NaN or an Inf."""
        return self.health().skipped_steps

    def forget(self) -> None:
        """Forget what was gathered since the last step, of a batch that is given up."""
        self.estimator.forget_gradients()

    def step(self, lr: float | None = None) -> bool:
        """Update factors and inverses where due, then the gradients, in place.

        Gradients of a `GradScaler` are to be unscaled first, `scaler.unscale_(optimizer)`.

        Args:
            lr: `η` of the step that follows, for `norm_constraint`.

        Returns:
            Whether all was finite. If not, nothing has changed.

        Raises:
            RuntimeError: no forward in training mode, and backward, came before.
            ValueError: a sparse gradient, or a norm constraint and no `lr`.
            torch.linalg.LinAlgError: a damped factor is singular on every rung of the
                ladder, and has no inverse to keep; gradients and inverses are unchanged.
        """
        if self.norm_constraint is not None and lr is None:
            raise ValueError(
                "KFACPreconditioner.step(): norm_constraint limits the step that follows: "
                'expected its learning rate, step(lr=optimizer.param_groups[0]["lr"]), '
                "got none"
            )
        return self._step(lr)

    @torch.no_grad()
    def _step(self, lr: float | None) -> bool:
        params, grads = dense_gradients(
            self.estimator.layers.registered_variables, self._names
        )
        self.estimator.check_loss()
        means, _ = self._schedule.of_mean_loss(grads)
        bad = self._schedule.update_statistics(means)
        if not bad:
            bad = self._precondition(params, grads, means, lr)
        if bad:
            self.estimator.ledger.skip_step(bad, stacklevel=4, words=_LEFT_OUT)
        self._schedule.advance(not bad)
        if self.estimator.capture.probe is not None:
            self.estimator.capture.probe.clear()
        return not bad

    def _precondition(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        means: list[Tensor],
        lr: float | None,
    ) -> list[str]:
        """Write `κ F̂⁻¹ g` over the gradients; return what is not finite, if anything."""
        self._schedule.check_statistics("KFACPreconditioner")
        if isinstance(self._damping, RelativeDamping):
            self._set_unit(mean_curvature(self.estimator.blocks.values()))
        if callable(self._damping):
            self.damping = damping_at(self._damping, self._schedule.num_steps)
        if self._schedule.refresh_due:
            self._schedule.refresh()
        blocks = ready_blocks(self.estimator.blocks.values(), params)
        owned = {p for block in blocks for p in block.params}
        mine = [i for i, p in enumerate(params) if p in owned]
        if not mine:
            return []
        right = [means[i] for i in mine]
        directions = precondition(blocks, [params[i] for i in mine], right)
        lrs = [1.0 if lr is None else lr] * len(mine)
        finite, _ = limit_norm(directions, right, lrs, self.norm_constraint)
        if not finite:
            return ["the gradient"]
        torch._foreach_copy_([grads[i] for i in mine], directions)
        return []

    def _set_unit(self, unit: float | None) -> None:
        """Bring a relative damping to units of the Fisher, where they are known."""
        self.damping_unit, self._damping = unit, self._given_damping
        if unit is not None and isinstance(self._given_damping, RelativeDamping):
            self._damping = self._given_damping.absolute(unit)
            self.damping = damping_at(self._damping, self._schedule.num_steps)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes the run bit for bit, taken between two steps."""
        return {
            "version": _STATE_VERSION,
            **self._schedule.state_dict(),
            "collecting": self.estimator.collecting,
            "damping": self.damping,
            "damping_unit": self.damping_unit,
            "estimator": self.estimator.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into one constructed alike.

        Raises:
            ValueError: the state of another model or version; nothing is changed then.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION or "estimator" not in state_dict:
            raise ValueError(
                "KFACPreconditioner.load_state_dict: expected a KFACPreconditioner's state "
                f"of version {_STATE_VERSION}, got version {version}"
            )
        self.estimator.load_state_dict(state_dict["estimator"])
        self._schedule.load_state_dict(state_dict)
        if isinstance(self._given_damping, RelativeDamping):
            self._set_unit(state_dict["damping_unit"])
        self.damping = state_dict["damping"]
        self.estimator.collecting = state_dict["collecting"]
