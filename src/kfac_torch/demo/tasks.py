"""The demo's two tasks, and the settings each optimizer has for them.

A small convolutional net (tanh and average pooling, after LeNet) with cross-entropy, and
a deep autoencoder (Hinton & Salakhutdinov 2006; Martens & Grosse 2015, arXiv 1503.05671,
section 13, at the size of the digits) with a Bernoulli loss: the sum over pixels, the
mean over cases. On the digits every step takes all training cases.

`SETTINGS` are the best trials of `benchmarks/demo_tuning.py`, which tried equally many
for every optimizer; all of its trials are in `benchmarks/demo_trials.json`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import Data

OPTIMIZERS = ("K-FAC", "SGD", "AdamW")
TASKS = ("conv", "autoencoder")

Settings: TypeAlias = Mapping[str, float]


def _frozen(
    table: Mapping[str, Mapping[str, Settings]],
) -> Mapping[str, Mapping[str, Settings]]:
    """Return a copy that nothing can be changed in: a table of a module is a constant."""
    return MappingProxyType(
        {
            task: MappingProxyType({k: MappingProxyType({**v}) for k, v in by.items()})
            for task, by in table.items()
        }
    )


# By task and optimizer. "cosine": the part of the step budget over which the learning
# rate falls to a twentieth, along a cosine; "warm_up": 1 raises it over the first 2 % of
# the budget. K-FAC's damping goes geometrically from "damping" to "damping_end" over the
# budget.
SETTINGS: Mapping[str, Mapping[str, Settings]] = _frozen(
    {
        "conv": {
            "K-FAC": {"lr": 0.3, "momentum": 0.9, "damping": 0.003, "damping_end": 0.001},
            "SGD": {"lr": 0.8, "momentum": 0.95},
            "AdamW": {"lr": 0.04, "beta1": 0.95, "warm_up": 1},
        },
        "autoencoder": {
            "K-FAC": {"lr": 1.0, "momentum": 0.7, "damping": 0.05, "damping_end": 0.015},
            "SGD": {"lr": 0.03, "momentum": 0.9},
            "AdamW": {"lr": 0.01, "beta1": 0.9},
        },
    }
)
# For the 28x28 images of the IDX data: set by hand after one to four runs of each
# optimizer on Fashion-MNIST, not tuned.
IDX_SETTINGS: Mapping[str, Mapping[str, Settings]] = _frozen(
    {
        "conv": {
            "K-FAC": {
                "lr": 0.3,
                "momentum": 0.7,
                "damping": 0.03,
                "damping_end": 0.003,
                "norm_constraint": 0.01,
            },
            "SGD": {"lr": 0.1, "momentum": 0.9},
            "AdamW": {"lr": 0.01, "beta1": 0.9},
        },
        "autoencoder": {
            "K-FAC": SETTINGS["autoencoder"]["K-FAC"],
            "SGD": {"lr": 0.003, "momentum": 0.9},
            "AdamW": {"lr": 0.003, "beta1": 0.9},
        },
    }
)
# Of K-FAC where its settings do not say otherwise; not part of the trials.
KFAC_FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "norm_constraint": 0.1,
        "cov_update_every": 1,
        "invert_every": 5,
    }
)


@dataclass
class Task:
    """What to train, on what, and when it counts as trained.

    Args:
        name: one of `TASKS`.
        title: for people.
        data: images and labels.
        make_model: a new model, initialised from torch's global generator.
        loss: the mean loss of a model on images and labels.
        kfac_loss: the same loss, as `KFAC` calls it.
        target: the training loss to reach.
        budget: steps, by optimizer.
        settings: by optimizer.
        batch_size: cases per step; None for all of them.
    """

    name: str
    title: str
    data: Data
    make_model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    kfac_loss: str
    target: float
    budget: dict[str, int]
    settings: Mapping[str, Settings]
    batch_size: int | None = None

    @property
    def test_metric(self) -> str:
        """What `test` returns."""
        return "accuracy" if self.name == "conv" else "loss"

    @torch.no_grad()
    def test(self, model: nn.Module) -> float:
        """Return the accuracy (conv) or the loss (autoencoder) on the test data."""
        x, y = self.data.x_test, self.data.y_test
        if self.name == "conv":
            return (model(x).argmax(1) == y).float().mean().item()
        return self.loss(model, x, y).item()


def make_tasks(data: Data) -> list[Task]:
    """Return the two tasks for this data."""
    small = data.name == "digits"
    settings = SETTINGS if small else IDX_SETTINGS
    side = data.side
    widths = (100, 50, 25, 10) if small else (250, 100, 50, 30)
    return [
        Task(
            "conv",
            "convolutional net",
            data,
            lambda: conv_net(side),
            cross_entropy,
            "categorical",
            target=0.005 if small else 0.45,
            budget={"K-FAC": 30, "SGD": 200, "AdamW": 130}
            if small
            else {"K-FAC": 30, "SGD": 110, "AdamW": 110},
            settings=settings["conv"],
            batch_size=None if small else 500,
        ),
        Task(
            "autoencoder",
            "deep autoencoder",
            data,
            lambda: autoencoder([side * side, *widths]),
            reconstruction_loss,
            "bernoulli",
            target=16.5 if small else 290.0,
            budget={"K-FAC": 80, "SGD": 1000, "AdamW": 600}
            if small
            else {"K-FAC": 40, "SGD": 300, "AdamW": 300},
            settings=settings["autoencoder"],
            batch_size=None if small else 1000,
        ),
    ]


def conv_net(side: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with tanh and average pooling, and a linear layer."""
    layers = OrderedDict[str, nn.Module](
        image=nn.Unflatten(1, (1, side, side)),
        conv1=nn.Conv2d(1, 16, 3, padding=1),
        tanh1=nn.Tanh(),
        pool1=nn.AvgPool2d(2),
        conv2=nn.Conv2d(16, 32, 3, padding=1),
        tanh2=nn.Tanh(),
        pool2=nn.AvgPool2d(2),
        flat=nn.Flatten(),
        linear=nn.Linear(32 * (side // 4) ** 2, 10),
    )
    return nn.Sequential(layers)


def autoencoder(widths: list[int]) -> nn.Sequential:
    """Tanh layers down to the last width and back, linear at the code and the output.

    Weights are drawn from `N(0, 1/inputs)`, biases are zero.
    """
    sizes = [*widths, *widths[-2::-1]]
    layers = OrderedDict[str, nn.Module]()
    depth = len(widths) - 1
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        layer = nn.Linear(n_in, n_out)
        nn.init.normal_(layer.weight, std=n_in**-0.5)
        nn.init.zeros_(layer.bias)
        half, number = divmod(i, depth)
        layers[f"{('encoder', 'decoder')[half]}{number + 1}"] = layer
        if i not in (depth - 1, 2 * depth - 1):  # the code and the output
            layers[f"tanh{i + 1}"] = nn.Tanh()
    return nn.Sequential(layers)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy."""
    return functional.cross_entropy(model(x), y)


def reconstruction_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The Bernoulli negative log-likelihood: the sum over pixels, the mean over cases."""
    summed = functional.binary_cross_entropy_with_logits(model(x), x, reduction="sum")
    return summed / len(x)
