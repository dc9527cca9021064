"""`KFAC`: natural gradient descent in the plain PyTorch loop.

Notation: `g` the gradient of the mean loss, `F̂` the damped block-diagonal Fisher, `v`
the velocity, `μ` the momentum, `η` the learning rate, `c` the norm constraint:

    "regular"   p = F̂⁻¹ g,  v ← μ v + κ p,  θ ← θ − η v
    "adam"      v ← μ v + g,  p = F̂⁻¹ v,    θ ← θ − η κ p

with `κ = min(1, sqrt(c / (η² pᵀF̂p)))`, so that a step without momentum moves the output
distribution by about `c/2` nats (Martens & Grosse 2015, arXiv 1503.05671, section 6;
Ba et al. 2017 for `c`). Weight decay is decoupled: `θ ← (1 − η·decay) θ` first.
Parameters without a block follow `v ← μ v + g, θ ← θ − η v`. Left out: learning rate and
momentum from the quadratic model, adaptive damping.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .damping import check_damping
from .estimator import FisherEstimator
from .fisher_blocks import KroneckerProductFB
from .fisher_factors.base import check_choice
from .layer_collection import LayerCollection
from .loss_functions import LossFactory, make_objective

MOMENTUM_TYPES = ("regular", "adam")
_STATE_VERSION = 1
_EARLY_REFRESHES = 3  # the first factors are of few batches: their inverses age fast


class KFAC(torch.optim.Optimizer):
    """K-FAC (Martens & Grosse 2015, arXiv 1503.05671) for the linear layers and
    convolutions of a model, momentum for its other parameters.

    On a step where statistics are due, a hook on the model's forward draws targets from
    the model's own output and takes gradients to the layer outputs: the true Fisher,
    before the user's own backward and without touching any `.grad`.

    A batch with a NaN or an Inf in its statistics or its gradient changes no parameter
    (and no factor, if statistics are due): the step is left out, counted in
    `skipped_steps`, with a RuntimeWarning. The host reads one number of the device per
    step, one more where statistics are due, and one for each distinct size of a factor
    where inverses are.

    Args:
        model: the root module; the loss must be a function of what its forward returns.
        loss: `"categorical"`, `"normal"` (`½‖t − y‖²`), `"bernoulli"`, the torch
            criterion in use, or a `NegativeLogProbLoss` class or factory. It says how
            the Fisher is taken; the gradient is whatever the user's backward brings,
            divided by the number of loss terms if the criterion sums over them. At the
            first step that gradient is compared with the declared loss, and a UserWarning
            gives the factor by which it differs; of `"normal"` the factor shows only
            where a closure returns the loss.
        lr: `η`, in units of the natural gradient (1 is a full Newton-like step); a param
            group option.
        damping: λ, added to the Fisher of the mean loss, in its units: those of the loss
            per squared parameter. 0 is allowed where no factor is singular. May be
            changed as `param_groups[0]["damping"]`; read at each refresh.
        momentum: `μ` in [0, 1); a param group option.
        weight_decay: decoupled, per unit of `lr`; a param group option.
        norm_constraint: `c`, in nats of squared Fisher norm, or None for no limit. May be
            changed as `param_groups[0]["norm_constraint"]`.
        momentum_type: `"regular"` (momentum of preconditioned gradients) or `"adam"`
            (momentum of gradients, then preconditioned).
        estimation_mode: `"gradients"` (the true Fisher by sampled targets),
            `"empirical"`, or `"exact"` (one pass per output coordinate).
        cov_ema_decay: of the factors' moving average, in [0, 1].
        cov_update_every: steps between statistics.
        invert_every: steps between refreshes of the inverses; the first three steps
            refresh them too.
        output: where the network output is in what the model returns, if that is not a
            tensor: a key, an index, an attribute name or a callable.

    Raises:
        ValueError: a value out of range, a loss that is not known, or a model without
            any supported layer. In a forward: a network output that does not fit the
            loss. In the first `step`: no forward in training mode before it.

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
        loss: str | nn.Module | LossFactory,
        *,
        lr: float,
        damping: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        norm_constraint: float | None = 1e-3,
        momentum_type: str = "regular",
        estimation_mode: str = "gradients",
        cov_ema_decay: float = 0.95,
        cov_update_every: int = 1,
        invert_every: int = 5,
        output: str | int | Callable[[Any], Tensor] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "norm_constraint": norm_constraint,
        }
        _check_options(**defaults)
        check_choice("momentum_type", momentum_type, MOMENTUM_TYPES)
        _check_interval("cov_update_every", cov_update_every)
        _check_interval("invert_every", invert_every)
        layers = LayerCollection()
        layers.auto_register_layers(model)
        if not layers.blocks:
            raise ValueError(
                f"{type(model).__name__} has no layer that K-FAC supports: expected an "
                "nn.Linear or an nn.Conv1d/2d/3d (groups=1) with a trained weight that no "
                "other module shares"
            )
        # Frozen ones too: they are left alone while they have no gradient.
        named = list(model.named_parameters())
        super().__init__([param for _, param in named], defaults)
        self.skipped_steps = 0
        self._momentum_type = momentum_type
        self._cov_update_every = cov_update_every
        self._invert_every = invert_every
        self._names: dict[Tensor, str] = {param: name for name, param in named}
        self._num_steps = 0
        self._inverses_due = True
        self._announced: set[str] = set()
        self.estimator = FisherEstimator(
            model,
            layers,
            make_objective(loss),
            lambda: self.param_groups[0]["damping"],
            cov_ema_decay=cov_ema_decay,
            estimation_mode=estimation_mode,
            output=output,
        )

    def close(self) -> None:
        """Remove every hook from the model."""
        self.estimator.close()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update factors and inverses where due, then the parameters.

        Args:
            closure: re-evaluates the model and returns the loss; optional.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: on the first step, if there was no forward in training mode.
            torch.linalg.LinAlgError: a damped factor is singular; parameters and
                inverses are unchanged.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        params, grads = self._gradients()
        self.estimator.check_loss(value)
        num_terms = self.estimator.num_terms
        if self.estimator.objective.reduction == "sum" and num_terms:
            grads = list(torch._foreach_div(grads, num_terms))
        collected = self.estimator.collecting and self.estimator.has_statistics()
        bad = self._refresh(collected, grads)
        if not bad and not self._update(params, grads):
            bad = ["the gradient"]
        if bad:
            self._skip(", ".join(bad))
        self._num_steps += 1
        if collected and not bad:
            self.estimator.collecting = False  # else it stays due
        if self._num_steps % self._cov_update_every == 0:
            self.estimator.collecting = True
        if self._num_steps % self._invert_every == 0:
            self._inverses_due = True
        return value

    def _refresh(self, collected: bool, grads: list[Tensor]) -> list[str]:
        """Update factors and inverses where due; return where there is a NaN or an Inf."""
        estimator = self.estimator
        if collected:
            norms = torch._foreach_norm(grads)
            flags = [norm.isfinite().to(norms[0].device) for norm in norms]
            bad = estimator.update_covariances(torch.stack(flags).all() if flags else None)
            if bad:
                return bad
        else:
            estimator.reset()
        blocks = estimator.blocks.values()
        if not any(block.has_statistics for block in blocks):
            raise RuntimeError(
                "KFAC.step(): there are no statistics yet. Expected a call of the model "
                "given to KFAC (model(x), not model.forward(x)), in training mode and with "
                "gradients enabled, and its backward, between constructing the optimizer "
                "and the first step()"
            )
        for block in blocks:
            block.follow_params()
        early = self._num_steps < _EARLY_REFRESHES or estimator.has_new_layers()
        if self._inverses_due or early:
            estimator.update_inverses()
            self._inverses_due = False
        return []

    def _update(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        """Move the parameters; return False, changing nothing, if `g` is not finite."""
        if not params:
            return True
        present = set(params)
        blocks = [
            block
            for block in self.estimator.blocks.values()
            if block.has_statistics and present.issuperset(block.params)
        ]
        owned = {p for block in blocks for p in block.params}
        self._announce(p for p in params if p not in owned)
        options = {p: group for group in self.param_groups for p in group["params"]}
        # Parameters without a block are not part of the norm and are not scaled.
        lr2 = [options[p]["lr"] ** 2 if p in owned else 0.0 for p in params]
        momenta = [options[p]["momentum"] for p in params]
        velocities = [self._velocity(p) for p in params]
        if self._momentum_type == "adam":
            velocities = list(torch._foreach_mul(velocities, momenta))
            torch._foreach_add_(velocities, grads)
            updates = self._precondition(blocks, params, velocities)
            finite = self._limit(updates, velocities, lr2)
        else:
            directions = self._precondition(blocks, params, grads)
            finite = self._limit(directions, grads, lr2)
            velocities = list(torch._foreach_mul(velocities, momenta))
            torch._foreach_add_(velocities, directions)
            updates = velocities
        if not finite:
            return False
        for p, velocity, update in zip(params, velocities, updates, strict=True):
            lr = options[p]["lr"]
            if options[p]["weight_decay"]:
                p.mul_(1 - lr * options[p]["weight_decay"])
            p.add_(update, alpha=-lr)
            self.state[p]["momentum_buffer"] = velocity
        return True

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

    def _velocity(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]

    def _precondition(
        self,
        blocks: list[KroneckerProductFB],
        params: list[Tensor],
        tensors: list[Tensor],
    ) -> list[Tensor]:
        """`F̂⁻¹` on the parameters with a block; the others as they are."""
        result = dict(zip(params, tensors, strict=True))
        for block in blocks:
            parts = [result[p] for p in block.params]
            matrix = block.params_to_matrix(parts).to(block.dtype)
            update = block.multiply_inverse(matrix.mT).mT
            result.update(zip(block.params, block.matrix_to_params(update), strict=True))
        return [result[p].to(p.dtype) for p in params]

    def _limit(
        self, directions: list[Tensor], grads: list[Tensor], lr2: list[float]
    ) -> bool:
        """Scale `p` by `κ` in place; return whether it is finite: the step's host read."""
        dtype = functools.reduce(torch.promote_types, (d.dtype for d in directions))
        dtype = torch.promote_types(dtype, torch.float32)
        pairs = zip(directions, grads, strict=True)
        dots = [torch.dot(d.flatten().to(dtype), g.flatten().to(dtype)) for d, g in pairs]
        products = torch.stack([dot.to(dots[0].device) for dot in dots])
        constraint = self.param_groups[0]["norm_constraint"]
        inside = [d for d, weight in zip(directions, lr2, strict=True) if weight]
        if constraint is not None and inside:
            norm = torch.dot(products, products.new_tensor(lr2)).clamp(min=0)
            torch._foreach_mul_(inside, (constraint / norm).sqrt().clamp(max=1.0))
        return bool(products.isfinite().all())

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

    def _announce(self, params: Iterable[Tensor]) -> None:
        names = {self._names.get(p, "?") for p in params} - self._announced
        if names:
            self._announced |= names
            warnings.warn(
                "these parameters have no K-FAC block and are updated by plain momentum: "
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
        self.skipped_steps = own["skipped_steps"]
        self.estimator.collecting = own["collecting"]
        self._inverses_due = own["inverses_due"]


def _check_options(
    lr: float,
    damping: float,
    momentum: float,
    weight_decay: float,
    norm_constraint: float | None,
) -> None:
    check_damping(damping)
    limited = norm_constraint is not None
    for name, value, good, expected in (
        ("lr", lr, lr >= 0, "a number >= 0"),
        ("momentum", momentum, 0 <= momentum < 1, "a number in [0, 1)"),
        ("weight_decay", weight_decay, weight_decay >= 0, "a number >= 0"),
        (
            "norm_constraint",
            norm_constraint,
            not limited or norm_constraint > 0,
            "a positive number or None",
        ),
    ):
        if not good:
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_interval(name: str, steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {steps!r}")
