"""`InverseUpdates`: an estimator's refreshes of its inverses, at once or in a thread.

Left out: when they are due (`preconditioning.py`), and how an inverse is computed
(`fisher_factors/refreshing.py`, `fisher_factors/background.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from .fisher_blocks import FisherBlock
from .fisher_factors import refresh_inverses
from .fisher_factors.background import BackgroundRefreshes
from .health import HealthLedger


class InverseUpdates:
    """What an estimator has for its inverses.

    Attributes:
        max_kept_inverses: for how many refreshes a factor that fails keeps its last one.
        background: the refreshes that are under way.
    """

    blocks: dict[str, FisherBlock]
    ledger: HealthLedger
    max_kept_inverses: int
    background: BackgroundRefreshes

    def has_new_layers(self) -> bool:
        """Whether a layer has statistics but no inverse yet: it was called late."""
        return any(
            block.has_statistics and not factor.is_refreshed
            for block in self.blocks.values()
            for factor in block.factors
        )

    def update_inverses(self, layers: Collection[str] | None = None) -> None:
        """Refresh every stored inverse, or those of some layers, from the current factors.

        What is under way for them in a thread is forgotten.

        Raises:
            ValueError: a layer that there is not.
            torch.linalg.LinAlgError: a damped factor is singular on every rung of the
                ladder, and has no inverse to keep (any more); nothing is changed.
        """
        unknown = set(layers or ()) - set(self.blocks)
        if unknown:
            raise ValueError(
                f"update_inverses: expected layers of {', '.join(self.blocks)}; got "
                f"{', '.join(sorted(unknown))}"
            )
        named = self.blocks.items()
        self._refresh(b for name, b in named if layers is None or name in layers)

    def _refresh(self, blocks: Iterable[FisherBlock], index: int | None = None) -> None:
        ready = [block for block in blocks if block.has_statistics]
        which = slice(None) if index is None else slice(index, index + 1)
        factors = [factor for block in ready for factor in block.factors[which]]
        kept = refresh_inverses(factors, self.max_kept_inverses)
        self.background.drop([block.name for block in ready])
        self.ledger.refreshed(factors, kept)

    # In a thread.

    def may_wait(self, layer: str) -> bool:
        """Whether a failure of a layer's refresh would be no error: it has an inverse, and
        may keep it.
        """
        return all(
            factor.is_refreshed and factor.health.kept_in_a_row < self.max_kept_inverses
            for factor in self.blocks[layer].factors
        )

    def start_inverses(self, layers: Collection[str], due: int) -> None:
        """Begin a refresh in a thread, to be finished at the step `due`.

        Args:
            layers: which `may_wait` and have no refresh under way.
            due: the step.

        Raises:
            NotImplementedError: a layer on an accelerator.
        """
        factors = {name: self.blocks[name].factors for name in layers}
        self.background.start(factors, due, self.max_kept_inverses)

    def finish_inverses(self, step: int) -> Sequence[int]:
        """Let the refreshes come in that are due by a step; return when they were."""
        finished = []
        for pending in self.background.take_due(step):
            self.ledger.refreshed(*pending.finish())
            finished.append(pending.due)
        return finished
