"""What `KFAC` is constructed from: a layer collection with layers and losses.

Left out: the options (`options.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layer_collection import LayerCollection
from .loss_collection import Output
from .loss_functions import LossFactory


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
) -> LayerCollection:
    """Return a collection of the model with layers and losses.

    Raises:
        ValueError: no supported layer, or not exactly one of `loss` and losses that are
            registered, or the collection of another model.
    """
    if layers is None:
        layers = LayerCollection(model)
        layers.auto_register_layers()
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
            "nn.Linear, an nn.Conv1d/2d/3d, an nn.ConvTranspose1d/2d/3d or an nn.Embedding "
            "with a trained weight that no module of another kind shares"
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
