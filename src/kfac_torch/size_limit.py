"""`SizeLimit`: up to which size a side of a Kronecker product is kept whole.

A side with d features costs d² numbers and d³ operations at every refresh. Above the
limit it is kept as

    "split"      blocks of consecutive features on the diagonal, the rest taken as zero
    "diagonal"   the diagonal alone
    "low_rank"   its largest eigenvalues, and one number for all others

Left out: how (`fisher_factors`), and which layers have sides (`fisher_blocks`).
"""

from __future__ import annotations

from dataclasses import dataclass

FORMS = ("split", "diagonal", "low_rank")


@dataclass(frozen=True)
class SizeLimit:
    """Up to which size a side of a Kronecker product is a full matrix, and what then.

    Args:
        max_size: the most features of a full matrix, a bias among them.
        above: what larger sides become: `"split"`, blocks of at most `max_size` features,
            as even as possible; `"diagonal"`; or `"low_rank"`.
        rank: of `"low_rank"`: how many eigenvalues are kept; a quarter of `max_size` if
            None.

    Raises:
        ValueError: a size or a rank that is not positive, a rank without `"low_rank"` or
            above `max_size`, or an unknown form.

    >>> limit = SizeLimit(1024, above="diagonal")
    >>> limit.form(512), limit.form(4096)
    ('full', 'diagonal')
    >>> SizeLimit(64, above="low_rank").kept_rank
    16
    """

    max_size: int
    above: str = "split"
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.max_size < 1:
            raise ValueError(
                f"SizeLimit: max_size: expected a positive integer, got {self.max_size}"
            )
        if self.above not in FORMS:
            raise ValueError(
                f"SizeLimit: above: expected one of {FORMS}, got {self.above!r}"
            )
        if self.rank is None:
            return
        if self.above != "low_rank" or not 1 <= self.rank <= self.max_size:
            raise ValueError(
                'SizeLimit: rank: expected 1 to max_size with above="low_rank", and None '
                f"otherwise, got {self.rank} with {self.above!r} and max_size "
                f"{self.max_size}"
            )

    @property
    def kept_rank(self) -> int:
        """How many eigenvalues `"low_rank"` keeps."""
        return max(1, self.max_size // 4) if self.rank is None else self.rank

    def form(self, size: int) -> str:
        """Return how a side with so many features is kept: `"full"`, or `above`."""
        return "full" if size <= self.max_size else self.above


def form_of(limit: SizeLimit | None, size: int) -> str:
    """Return `limit.form(size)`; without a limit `"full"`."""
    return "full" if limit is None else limit.form(size)
