"""`CholeskyBatch`: what is stored of same-size factors, from one Cholesky factorisation.

Notation: `C [..., n, n]` a factor's matrices, `λ` its damping; what is stored of it is the
inverse, the triangular `L` or `L⁻¹` of `C + λI`, or several of these. Small matrices share
a call; one of some megabytes is factorised alone, for which batched routines are no faster
and take more memory. Left out: which factors, and when.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..damping import DampingFunc
from ..linalg import DampedCholesky, Rescue, Workspace
from .base import FisherFactor

Function: TypeAlias = float | str
"""What is kept of `C + λI`: its power with an exponent, or a function with a name."""

CHOLESKY = "cholesky"
CHOLESKY_INVERSE = "cholesky_inverse"

FROM_CHOLESKY = MappingProxyType(
    {
        -1.0: DampedCholesky.inverse,
        CHOLESKY: DampedCholesky.lower,
        CHOLESKY_INVERSE: DampedCholesky.lower_inverse,
    }
)

BATCH_BYTES = 2**22
"""Matrices of this many bytes are factorised in one call."""


@dataclass
class Stored:
    """A registered function of `C + λI`; `tensors` is empty until instantiated."""

    function: Function
    damping_func: DampingFunc
    damping_id: Hashable
    tensors: tuple[Tensor, ...] = ()
    refreshed: bool = False


Computed: TypeAlias = tuple[Stored, tuple[Tensor, ...]]
"""A registered function and its new value, before it replaces the old one."""

Failures: TypeAlias = dict[FisherFactor, torch.linalg.LinAlgError]
"""Factors that no rung of the ladder factorises, and why."""


def store(new: Iterable[Computed]) -> None:
    """Let new values replace the old ones."""
    for stored, tensors in new:
        for old, tensor in zip(stored.tensors, tensors, strict=True):
            old.copy_(tensor)
        stored.refreshed = True


@dataclass
class Member:
    """A factor, and what one factorisation of it is to give.

    Args:
        factor: whose `C` it is.
        matrices: returns `C [..., n, n]`.
        shape: of `C`.
        damping: `λ`, or one for each matrix of a stack.
        wanted: what is stored of `C + λI`.
        rescues: where rungs of the ladder are noted.
    """

    factor: FisherFactor
    matrices: Callable[[], Tensor]
    shape: tuple[int, ...]
    damping: Tensor
    wanted: Sequence[Stored]
    rescues: list[Rescue]

    @property
    def kind(self) -> Any:
        """What members of one batch have in common."""
        like = self.wanted[0].tensors[0]
        functions = frozenset(stored.function for stored in self.wanted)
        return self.shape, like.dtype, like.device, functions

    @property
    def nbytes(self) -> int:
        """Bytes of `C`."""
        return math.prod(self.shape) * self.wanted[0].tensors[0].element_size()


class CholeskyBatch:
    """Factorise members of one kind in one call.

    Args:
        members: of one kind.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._cholesky: DampedCholesky | None = None

    @property
    def regular(self) -> Tensor:
        """Which of the matrices need no rescue, `[k]`; after `factorise`."""
        assert self._cholesky is not None
        return self._cholesky.regular

    def factorise(self, workspace: Workspace | None = None) -> Tensor:
        """Factorise all, in the memory of `workspace`, and return `regular`."""
        first = self.members[0]
        stack = first.shape[:-2]  # those of groups and blocks
        self._repeats = math.prod(stack)
        self._cholesky = DampedCholesky(
            [member.matrices() for member in self.members],
            torch.stack([member.damping.expand(stack) for member in self.members]),
            [m.factor.name for m in self.members for _ in range(self._repeats)],
            partial=True,
            workspace=workspace,
            settled=False,
        )
        return self._cholesky.regular

    def settle(self, regular: Sequence[bool], failed: Failures) -> None:
        """Rescue those that need it; add those that have no factorisation to `failed`."""
        cholesky = self._cholesky
        assert cholesky is not None
        cholesky.settle(regular)
        for i, rescue in cholesky.rescues.items():
            self.members[i // self._repeats].rescues.append(rescue)
        for i, error in cholesky.failures.items():
            failed.setdefault(self.members[i // self._repeats].factor, error)

    def write(self, failed: Failures) -> None:
        """Store what is wanted of all that have not failed; forget the factorisation."""
        cholesky = self._cholesky
        assert cholesky is not None
        for number, stored in enumerate(self.members[0].wanted):
            good = [
                None if member.factor in failed else member.wanted[number]
                for member in self.members
            ]
            outs = [None if wanted is None else wanted.tensors[0] for wanted in good]
            if stored.function == -1:
                cholesky.write_inverse(outs)
            else:
                values = FROM_CHOLESKY[stored.function](cholesky)
                for out, value in zip(outs, values, strict=True):
                    if out is not None:
                        out.copy_(value)
            for wanted in good:
                if wanted is not None:
                    wanted.refreshed = True
        self._cholesky = None


def batches_of(members: Iterable[Member]) -> list[CholeskyBatch]:
    """Return batches of at most `BATCH_BYTES`, or of one member, the largest first."""
    by_kind: dict[Any, list[Member]] = {}
    for member in members:
        by_kind.setdefault(member.kind, []).append(member)
    batches = []
    for same in by_kind.values():
        number = max(1, BATCH_BYTES // same[0].nbytes)
        batches += [
            CholeskyBatch(same[i : i + number]) for i in range(0, len(same), number)
        ]
    # The first one takes all the memory that the others use again.
    return sorted(batches, key=lambda b: -len(b.members) * b.members[0].nbytes)
