"""`refresh_inverses`: many factors at once, and what becomes of those that fail.

Small factors of one size are factorised in one batch; those members that fail climb the
ladder of `linalg.py`. Where no rung holds, a factor keeps its last good matrices for a
bounded number of refreshes, and then it is an error: nothing goes stale for ever in
silence. An error leaves every factor as it was. So where there may be one (at the first
refresh, above all) the factorisations of all are kept until the last is known to hold; else
each inverse replaces the old one as soon as it is there, and all share the memory of one
factorisation. On accelerators they are always kept, for the host to wait once, not for
every batch. Left out: when to refresh (the estimator's business).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..linalg import NotFiniteError, Workspace, all_finite
from .base import FisherFactor
from .cholesky_batch import CholeskyBatch, Computed, Failures, Member, batches_of, store
from .inverse_providing import InverseProvidingFactor


def refresh_inverses(factors: Iterable[FisherFactor], max_kept: int = 0) -> Failures:
    """Refresh all that the factors store; small same-size factorisations in one batch.

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
    members: list[Member] = []
    known = list(dict.fromkeys(factors))
    may_raise = any(not f.is_refreshed or f.health.kept_in_a_row >= max_kept for f in known)
    for factor in known:
        try:
            new += _of_one(factor)
        except torch.linalg.LinAlgError as error:
            failed[factor] = error
            continue
        if isinstance(factor, InverseProvidingFactor):
            groups = factor._by_cholesky(factor.uses_eigendecomp()).values()
            members += [factor._member(wanted) for wanted in groups]
    _factorise(members, failed, max_kept, may_raise)
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


def _factorise(
    members: Sequence[Member], failed: Failures, max_kept: int, may_raise: bool
) -> None:
    """Renew what the members want, but of those that fail.

    Raises:
        torch.linalg.LinAlgError: as `refresh_inverses`; nothing is renewed.
    """
    number: dict[FisherFactor, int] = {}
    for member in members:
        number[member.factor] = number.get(member.factor, 0) + 1
    kept: list[CholeskyBatch] = []
    workspace = Workspace()
    for batch in batches_of(members):
        # All or nothing of a factor too, where it has several dampings.
        alone = all(number[m.factor] == 1 and _is_simple(m.factor) for m in batch.members)
        if may_raise or not alone or batch.members[0].damping.device.type != "cpu":
            batch.factorise()
            kept.append(batch)
            continue
        batch.settle(batch.factorise(workspace).tolist(), failed)
        batch.write(failed)
    by_device: dict[torch.device, list[CholeskyBatch]] = {}
    for batch in kept:
        by_device.setdefault(batch.regular.device, []).append(batch)
    for batches in by_device.values():
        # The one host read of a refresh.
        flags = torch.cat([batch.regular for batch in batches]).tolist()
        for batch in batches:
            own, flags = flags[: len(batch.regular)], flags[len(batch.regular) :]
            batch.settle(own, failed)
    for factor in number:  # the error is of the first one, not of the largest
        if factor in failed:
            failed[factor] = failed.pop(factor)
    _check_kept(failed, max_kept)
    for batch in kept:
        batch.write(failed)


def _is_simple(factor: FisherFactor) -> bool:
    """Whether a factor stores nothing but what a Cholesky factorisation gives."""
    assert isinstance(factor, InverseProvidingFactor)
    return not factor.uses_eigendecomp() and not factor._others()


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
    flags = [all_finite(tensor) for _, tensors in found for tensor in tensors]
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
        kept = f" (its last good inverse was kept for {number} refreshes)" if number else ""
        raise type(error)(f"{named}{error}{kept}") from error
