"""The optimizers that K-FAC is compared with, and the space each is tuned in.

AdamW and SGD with Nesterov's momentum are torch's. Muon is `torch.optim.Muon` on the hidden
weights, those of convolutions flattened to `(out, in·kernel)`, and AdamW on the rest: the
first and the last layer, embeddings, biases, norms. SOAP is that of `pytorch-optimizer`
(4.1.0 was used), an optional package. Weight decay is 0 throughout and learning rates are
constant: runs are short and a target, not an end of the training, is what is timed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

Settings = Mapping[str, float]


class Together:
    """Several optimizers, each of a part of the parameters, as one."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class FlatMuon:
    """`torch.optim.Muon`, of weights of any rank as matrices that share their memory."""

    def __init__(self, weights: list[nn.Parameter], **options: Any) -> None:
        self.weights = weights
        self.matrices = [nn.Parameter(w.detach().flatten(1)) for w in weights]
        self.muon = torch.optim.Muon(self.matrices, **options)

    def zero_grad(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def step(self) -> None:
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.muon.step()


@dataclass(frozen=True)
class LogUniform:
    """A number whose logarithm is uniform."""

    low: float
    high: float

    def draw(self, generator: random.Random) -> float:
        x = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        return float(f"{x:.3g}")


@dataclass(frozen=True)
class Choice:
    """One of these numbers."""

    values: tuple[float, ...]

    def draw(self, generator: random.Random) -> float:
        return generator.choice(self.values)


@dataclass(frozen=True)
class Rival:
    """An optimizer and the space of its settings, by the loss of the task.

    `package` is what it needs beside torch, as it is installed.
    """

    make: Callable[[nn.Module, Settings], Any]
    space: Callable[[str], Mapping[str, LogUniform | Choice]]
    package: str = ""

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        return bool(self.package) and find_spec(self.package.replace("-", "_")) is None

    def draw(self, kfac_loss: str, number: int, seed: int) -> list[Settings]:
        """Draw settings."""
        generator, space = random.Random(seed), self.space(kfac_loss)
        return [
            {name: axis.draw(generator) for name, axis in space.items()}
            for _ in range(number)
        ]


def _adamw(parameters: Any, lr: float, settings: Settings) -> torch.optim.AdamW:
    betas = (settings["beta1"], settings["beta2"])
    return torch.optim.AdamW(parameters, lr, betas=betas, weight_decay=0.0)


def make_adamw(model: nn.Module, settings: Settings) -> Any:
    return _adamw(model.parameters(), settings["lr"], settings)


def make_sgd(model: nn.Module, settings: Settings) -> Any:
    momentum = settings["momentum"]
    lr = settings["reach"] * (1 - momentum)
    return torch.optim.SGD(model.parameters(), lr, momentum=momentum, nesterov=True)


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers and convolutions but for the first and the last layer.

    The first layer is an embedding where there is one.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    return [m.weight for m in layers[1:-1] if not isinstance(m, nn.Embedding)]


def make_muon(model: nn.Module, settings: Settings) -> Any:
    hidden = hidden_weights(model)
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    muon = FlatMuon(
        hidden, lr=settings["lr"], momentum=settings["momentum"], weight_decay=0.0
    )
    return Together(muon, _adamw(rest, settings["adamw_lr"], settings))


def make_soap(model: nn.Module, settings: Settings) -> Any:
    from pytorch_optimizer import SOAP

    return SOAP(
        model.parameters(),
        lr=settings["lr"],
        betas=(settings["beta1"], settings["beta2"]),
        weight_decay=0.0,
        precondition_frequency=int(settings["frequency"]),
    )


def _adam_space(loss: str) -> Mapping[str, LogUniform | Choice]:
    return {
        "lr": LogUniform(5e-4, 3e-2),
        "beta1": Choice((0.9, 0.95)),
        "beta2": Choice((0.99, 0.999)),
    }


def _sgd_space(loss: str) -> Mapping[str, LogUniform | Choice]:
    # The reach is lr / (1 - momentum), the step in a steady direction. A Bernoulli loss,
    # summed over pixels, has gradients some ten times larger.
    low, high = (0.02, 1.0) if loss == "bernoulli" else (0.3, 10.0)
    return {"reach": LogUniform(low, high), "momentum": Choice((0.9, 0.95, 0.99))}


def _muon_space(loss: str) -> Mapping[str, LogUniform | Choice]:
    return {
        "lr": LogUniform(3e-3, 0.1),
        "momentum": Choice((0.9, 0.95)),
        "adamw_lr": LogUniform(1e-3, 2e-2),
        "beta1": Choice((0.9,)),
        "beta2": Choice((0.99, 0.999)),
    }


def _soap_space(loss: str) -> Mapping[str, LogUniform | Choice]:
    return {
        "lr": LogUniform(1e-3, 3e-2),
        "beta1": Choice((0.9, 0.95)),
        "beta2": Choice((0.95, 0.99)),
        "frequency": Choice((5, 10)),
    }


RIVALS: Mapping[str, Rival] = MappingProxyType(
    {
        "AdamW": Rival(make_adamw, _adam_space),
        "SGD-NAG": Rival(make_sgd, _sgd_space),
        "Muon": Rival(make_muon, _muon_space),
        "SOAP": Rival(make_soap, _soap_space, "pytorch-optimizer"),
    }
)
