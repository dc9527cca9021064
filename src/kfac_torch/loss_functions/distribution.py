"""Negative log-likelihoods of `torch.distributions`."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from .base import NegativeLogProbLoss


class DistributionNegativeLogProbLoss(NegativeLogProbLoss):
    """`−Σ log p(y|z)` with `p` a `torch.distributions.Distribution` (abstract).

    A subclass gives `dist`, and the Fisher: with NaturalParamsNegativeLogProbLoss as a
    second base where `z` is a natural parameter, else with `multiply_fisher_factor` and
    its transpose.

    >>> from kfac_torch.loss_functions import NaturalParamsNegativeLogProbLoss
    >>> class Poisson(DistributionNegativeLogProbLoss, NaturalParamsNegativeLogProbLoss):
    ...     @property
    ...     def dist(self):
    ...         return torch.distributions.Poisson(self.inputs.exp(), validate_args=False)
    >>> Poisson(torch.zeros(1, 2)).evaluate_on_targets(torch.ones(1, 2))
    tensor(2.)
    """

    @property
    @abc.abstractmethod
    def dist(self) -> torch.distributions.Distribution:
        """The distribution that `self.inputs` parametrises, made afresh."""

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draw from `dist`.

        `torch.distributions` knows the global generator only: it works through the
        state of the one given, and its own is put back.

        Raises:
            ValueError: the generator is of another kind of device than `z`.
        """
        if generator is None:
            return self.dist.sample()
        if generator.device.type != self._inputs.device.type:
            raise ValueError(
                f"{self.name}: expected a generator on {self._inputs.device}, where the "
                f"network output is, got one on {generator.device}"
            )
        with _global_state_of(generator):
            return self.dist.sample()

    def evaluate_on_targets(self, targets: Tensor) -> Tensor:
        """Return `−Σ log p(y|z)`."""
        return -self.dist.log_prob(targets).sum()


@contextlib.contextmanager
def _global_state_of(generator: Generator) -> Iterator[None]:
    """Let the global generator of a device continue the stream of another one."""
    kind = generator.device.type
    module = torch if kind == "cpu" else torch.get_device_module(generator.device)
    device = () if kind in ("cpu", "mps") else (generator.device,)
    saved = module.get_rng_state(*device)
    module.set_rng_state(generator.get_state(), *device)
    try:
        yield
    finally:
        generator.set_state(module.get_rng_state(*device))
        module.set_rng_state(saved, *device)
