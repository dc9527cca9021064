"""`UpdateThunks`: updates of one factor each, for a queue that spreads them over steps.

The thunks of `tf.contrib.kfac`. Left out: what an update is (the estimator's business).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from functools import partial

from .fisher_blocks import FisherBlock


class UpdateThunks(abc.ABC):
    """What an estimator has for updates of single factors (abstract)."""

    blocks: dict[str, FisherBlock]

    @abc.abstractmethod
    def _update_covariance(self, block: FisherBlock, index: int) -> None:
        """Let what was gathered enter one factor."""

    @abc.abstractmethod
    def _refresh(self, blocks: list[FisherBlock], index: int | None = None) -> None:
        """Refresh the stored powers of some blocks, or of one factor of each."""

    @property
    def cov_update_thunks(self) -> list[Callable[[], None]]:
        """One callable per factor, which lets what was gathered enter that factor alone.

        A batch with a NaN or an Inf is left out, the first one with a RuntimeWarning. In
        the order of `LayerCollection.get_factors()`; `update_covariances` is all or none.
        """
        return [
            partial(self._update_covariance, block, index)
            for block in self.blocks.values()
            for index in range(len(block.factors))
        ]

    @property
    def inv_update_thunks(self) -> list[Callable[[], None]]:
        """One callable per factor, which refreshes its stored powers alone.

        It does nothing while the factor's block has no statistics.
        """
        return [
            partial(self._refresh, [block], index)
            for block in self.blocks.values()
            for index in range(len(block.factors))
        ]

    def make_vars_and_create_op_thunks(
        self,
    ) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        """Return `(cov_update_thunks, inv_update_thunks)`."""
        return self.cov_update_thunks, self.inv_update_thunks

    create_ops_and_vars_thunks = make_vars_and_create_op_thunks
