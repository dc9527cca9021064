"""What `KFAC` is constructed from: a layer collection with layers and losses.

Left out: the options (`options.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layer_choice import Layers
from .layer_collection import LayerCollection
from .loss_collection import Output
from .loss_functions import LossFactory
from .options import MOMENTUM, group_options
from .plain_updates import plain_options


@contextmanager
def loss_taken_back(
    layers: LayerCollection, loss: str | nn.Module | LossFactory | None
) -> Iterator[None]:
    """Leave the user's collection as it was, where a constructor fails."""
    try:
        yield
    except (ValueError, NotImplementedError):
        if loss is not None:
            layers.registered_losses.pop()
        raise


def complete(
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


def param_groups(
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


_OF_GROUPS = ("lr", "weight_decay", "momentum", "betas", "eps", "damping_scale")


def regroup(
    groups: Sequence[Mapping[str, Any]],
    chosen: set[Tensor],
    momentum_type: str,
    options: Mapping[str, Any],
) -> tuple[list[list[Tensor]], list[dict[str, Any]]]:
    """Return what is left in every group, and groups of the chosen with their options.

    Raises:
        ValueError: an option that groups do not have, or a value out of range.
    """
    unknown = sorted(set(options) - set(_OF_GROUPS))
    if unknown or not options:
        raise ValueError(
            f"KFAC.group(): expected some of {', '.join(_OF_GROUPS)}, got "
            f"{', '.join(unknown) or 'none'}; λ and limits are of the step as a whole"
        )
    left: list[list[Tensor]] = []
    new: list[dict[str, Any]] = []
    for group in groups:
        mine = [p for p in group["params"] if p in chosen]
        left.append([p for p in group["params"] if p not in chosen])
        if mine:
            known = {k: v for k, v in group.items() if k in _OF_GROUPS or k == "rule"}
            _check_options(momentum_type, known, options)
            new.append({**known, **options, "params": mine})
    return left, new


def _check_options(
    momentum_type: str, known: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Raise ValueError for options that a group of parameters cannot have."""
    rule = known.get("rule")
    foreign = {
        "adamw": {"momentum", "damping_scale"},
        "sgd": {"betas", "eps", "damping_scale"},
        None: {"betas", "eps"},
    }[rule]
    if rule is None and momentum_type.startswith("qmodel"):
        foreign.add("momentum")  # the model's step has one
    for name in sorted(foreign & set(options)):
        raise ValueError(
            f"KFAC.group(): {name}: expected no such option of parameters that follow "
            f"{rule or momentum_type!r}, got {options[name]!r}"
        )
    scale = options.get("damping_scale", 1.0)
    if not (isinstance(scale, float | int) and 0 < scale < math.inf):
        raise ValueError(
            f"KFAC.group(): damping_scale: expected a positive number, got {scale!r}"
        )
    group_options(
        momentum_type=momentum_type if rule is None else "regular",
        lr=options.get("lr", 0.0),
        damping=0.0,
        momentum=options.get("momentum"),
        weight_decay=options.get("weight_decay", 0.0),
        norm_constraint=None,
    )
