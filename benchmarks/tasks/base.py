"""What a task is: a net, its data, its loss, and when it counts as trained.

A seed sets the initial weights (`make_model`) and, apart from them, the order of the
batches (`batches`), so that every optimizer starts and goes on alike. Losses are means
over loss terms: images, or tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

_CHUNK = 1000  # cases of an evaluation that are in memory at once


@dataclass(frozen=True, kw_only=True)
class Task:
    """A training problem.

    Args:
        name: what `load_task` calls it.
        title: for people.
        make_model: the model as a seed initialises it; the global generator is kept.
        batches: of a seed, an endless iterator of `(x, y)`; `y` is `x` where the target is
            the input.
        loss: of the model's output and `y`, a mean over loss terms.
        kfac_loss: the same, as `KFAC` calls it.
        train_cases: the fixed part of the training data that `evaluate` takes.
        test_cases: what no optimizer sees.
        test_metric: "loss" or "accuracy".
        target: the training loss, without l2, that a run has to reach.
        rival_steps: the budget of a first-order optimizer.
        kfac_steps: that of K-FAC.
        l2: `l2/2 · ‖θ‖²` is added to the loss in training, not in `evaluate`.
        rival_every: steps between two evaluations of a rival (K-FAC: every step).
    """

    name: str
    title: str
    make_model: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Loss
    kfac_loss: str
    train_cases: Batch
    test_cases: Batch
    test_metric: str
    target: float
    rival_steps: int
    kfac_steps: int
    l2: float = 0.0
    rival_every: int = 5

    def evaluate(self, model: nn.Module) -> float:
        """The mean loss on the fixed part of the training data, in evaluation mode."""
        return self._mean(model, self.train_cases, self.loss)

    def test(self, model: nn.Module) -> float:
        """The test metric on all test cases, in evaluation mode."""
        metric = self.loss if self.test_metric == "loss" else accuracy
        return self._mean(model, self.test_cases, metric)

    def training_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What a step minimises: the loss of a batch, and the l2 term if any."""
        loss = self.loss(model(x), y)
        if self.l2:
            theta = nn.utils.parameters_to_vector(model.parameters())
            loss = loss + self.l2 / 2 * theta.square().sum()
        return loss

    @torch.no_grad()
    def _mean(self, model: nn.Module, cases: Batch, metric: Loss) -> float:
        training = model.training
        model.eval()
        try:
            parts = zip(*(tensor.split(_CHUNK) for tensor in cases), strict=True)
            total = sum(metric(model(x), y).item() * len(x) for x, y in parts)
        finally:
            model.train(training)
        return total / len(cases[0])


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """Give `make_model` of a function that draws from torch's global generator."""

    def make_model(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make_model


def full_batches(x: Tensor, y: Tensor) -> Callable[[int], Iterator[Batch]]:
    """All cases in every step, whatever the seed."""
    return lambda seed: itertools.repeat((x, y))


def shuffled_batches(x: Tensor, y: Tensor, size: int) -> Callable[[int], Iterator[Batch]]:
    """Without replacement, epoch after epoch; what is left of an epoch is dropped."""

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            for batch in order[: len(x) - len(x) % size].split(size):
                yield x[batch], y[batch]

    return batches


def bernoulli_loss(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of sigmoids: the sum over pixels, the mean over images."""
    total = functional.binary_cross_entropy_with_logits(output, y, reduction="sum")
    return total / len(y)


def categorical_loss(output: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy; classes are the last dimension of the output."""
    return functional.cross_entropy(output.flatten(0, -2), y.flatten())


def accuracy(output: Tensor, y: Tensor) -> Tensor:
    """The part of the classes that are guessed."""
    return (output.argmax(-1) == y).float().mean()


def fan_in_normal(weight: Tensor) -> None:
    """Draw a weight from `N(0, 1/inputs)`, as kfac-jax does."""
    nn.init.normal_(weight, std=weight.shape[1] ** -0.5)


def autoencoder(*widths: int, init: Callable[[Tensor], object]) -> nn.Sequential:
    """Tanh layers down to the last width and back; the code and the output are linear.

    `init` draws the weights; biases are zero.
    """
    sizes = [*widths, *widths[-2::-1]]
    linear = (len(widths) - 2, len(sizes) - 2)
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        layer = nn.Linear(n_in, n_out)
        init(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer] if i in linear else [layer, nn.Tanh()]
    return nn.Sequential(*layers)
