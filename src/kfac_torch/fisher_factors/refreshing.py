"""`refresh_inverses`: many factors at once, and what becomes of those that fail.

Factors of one size are factorised in one batch; those members that fail climb the ladder
of `linalg.py`. Where no rung holds, a factor keeps its last good matrices for a bounded
number of refreshes, and then it is an error: nothing goes stale for ever in silence.
Left out: when to refresh (the estimator's business).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from ..linalg import NotFiniteError
from .base import FisherFactor
from .inverse_providing import (
    Computed,
    Failures,
    InverseProvidingFactor,
    factorise,
    store,
)


def refresh_inverses(factors: Iterable[FisherFactor], max_kept: int = 0) -> Failures:
    """Refresh all that the factors store; same-size factorisations in one batch.

    Factors that store nothing (diagonal ones) have nothing to compute.

    Args:
        factors: any, several times too.
        max_kept: for how many refreshes in a row a factor without a factorisation may keep
            its last good matrices, while the others are refreshed.

    Returns:
        The factors that kept theirs, and why.

    Raises:
        torch.linalg.LinAlgError: a damped factor is singular on every rung of the ladder,
            and has no last good matrices or has kept them `max_kept` times; the message
            names it, and every stored matrix of every factor keeps its old value.
    """
    new: list[Computed] = []
    failed: Failures = {}
    batches = defaultdict(list)
    known = list(dict.fromkeys(factors))
    for factor in known:
        try:
            new += _of_one(factor)
        except torch.linalg.LinAlgError as error:
            failed[factor] = error
            continue
        if isinstance(factor, InverseProvidingFactor):
            for wanted in factor._by_cholesky(factor.uses_eigendecomp()).values():
                functions = frozenset(stored.function for stored in wanted)
                key = (factor._matrix_shape, factor._dtype, factor._device, functions)
                batches[key].append((factor, wanted))
    for batch in batches.values():
        new += factorise(batch, failed)
    _check_kept(failed, max_kept)
    old = {
        id(stored)
        for factor in failed
        if isinstance(factor, InverseProvidingFactor)
        for stored in factor._powers.values()
    }
    store([pair for pair in new if id(pair[0]) not in old])
    for factor in known:
        if factor in failed:
            factor.health.keep()
        else:
            found = isinstance(factor, InverseProvidingFactor)
            factor.health.refreshed(factor._rescues if found else ())
    return failed


def _of_one(factor: FisherFactor) -> list[Computed]:
    """What is computed of a factor alone.

    Raises:
        torch.linalg.LinAlgError: no rung of the ladder holds.
    """
    if isinstance(factor, InverseProvidingFactor):
        factor._rescues = []
        eigen = factor.uses_eigendecomp()
        powers = factor._powers_by_eigendecomp() if eigen else []
        return powers + factor._compute_others()
    found = factor.compute_stored()
    flags = [tensor.isfinite().all() for _, tensors in found for tensor in tensors]
    if flags and not torch.stack(flags).all():
        raise NotFiniteError(
            f"matrix {factor.name}, or one that it is made of, has NaN or Inf entries"
        )
    return found


def _check_kept(failed: Failures, max_kept: int) -> None:
    """Raise the error of a factor that cannot keep its matrices; of a NaN's before all."""
    for factor, error in sorted(
        failed.items(), key=lambda item: not isinstance(item[1], NotFiniteError)
    ):
        number = factor.health.kept_in_a_row
        if factor.is_refreshed and number < max_kept:
            continue
        named = "" if factor.name in str(error) else f"matrix {factor.name}: "
        kept = f" Its last good inverse was kept for {number} refreshes." if number else ""
        raise type(error)(f"{named}{error}{kept}") from error
