"""`Layers`: what a user wants of each layer, and which rule moves what has no block.

A layer is meant by its name in the model (`"encoder.0"`, with everything inside it, or a
pattern such as `"*.norm?"`), by its type, or as the module or parameter itself. Of several
choices that fit, the innermost counts, and there the name before the type. Left out: which
approximations a layer can have (`approximations.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from .fisher_factors.base import check_choice
from .plain_updates import PLAIN_RULES
from .size_limit import SizeLimit

Key: TypeAlias = "str | type[nn.Module] | nn.Module | nn.Parameter"
"""A name or pattern, a type, a module, or a parameter."""

FALLBACKS = ("error", "diagonal", *PLAIN_RULES)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What to do with each layer, as an option of `KFAC` and `auto_register_layers`.

    Args:
        approx: an approximation for all layers that have it, or one each by name, type,
            module or parameter (see the `register_...` methods of `LayerCollection`);
            `"adamw"` or `"sgd"` in its place moves a layer by that rule.
        exclude: layers or parameters that are left alone: another optimizer's.
        fallback: for trained parameters that no layer type covers: `"adamw"` or `"sgd"`
            moves them by that rule, `"diagonal"` gives them a generic block, `"error"` is
            an error that names them.
        size_limit: what sides above a size become; None for no limit.

    Raises:
        ValueError: an unknown fallback. By `resolve`: a key that means nothing there.

    >>> layers = Layers(approx={nn.Linear: "kron_reduce", "2": "adamw"}, exclude=["0"])
    >>> choices = layers.resolve(nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]))
    >>> choices.excluded == {"0", "0.weight", "0.bias"}, choices.rule("2.bias")
    (True, 'adamw')
    >>> choices.approximation("1", known=("kron", "kron_reduce"))
    'kron_reduce'
    """

    approx: str | Mapping[Any, str] | None = None
    exclude: Sequence[Any] = ()
    fallback: str = "adamw"
    size_limit: SizeLimit | None = None

    def __post_init__(self) -> None:
        check_choice("fallback", self.fallback, FALLBACKS)
        if isinstance(self.exclude, str):
            raise TypeError(
                f"exclude: expected a list of names, types or modules, got {self.exclude!r}"
            )

    def resolve(self, model: nn.Module) -> Choices:
        """Return the choices by the names of a model's modules and parameters.

        Raises:
            ValueError: a key that means nothing in the model.
        """
        names = _Names(model)
        choices = Choices(default=self.approx if isinstance(self.approx, str) else None)
        choices.excluded |= {
            n for key in self.exclude for n in names.inside("exclude", key)
        }
        if isinstance(self.approx, Mapping):
            found = [
                (names.rank(key, name), inner, approx)
                for key, approx in self.approx.items()
                for name in names.meant("approx", key)
                for inner in names.within(name)
            ]
            for _, inner, approx in sorted(found, key=lambda one: one[0]):
                choices.approx[inner] = approx  # the innermost comes last
        return choices


def names_inside(model: nn.Module, argument: str, keys: Sequence[Key]) -> set[str]:
    """Return the names of what the keys mean, and of everything inside it.

    Raises:
        ValueError: a key that means nothing in the model.

    >>> sorted(names_inside(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "which", ["*.bias"]))
    ['0.bias']
    """
    names = _Names(model)
    return {name for key in keys for name in names.inside(argument, key)}


@dataclass
class Choices:
    """`Layers` by name.

    Args:
        default: an approximation for all layers that have it.
        approx: approximations or rules of modules and parameters, by name.
        excluded: names of modules and parameters.
    """

    default: str | None = None
    approx: dict[str, str] = field(default_factory=dict)
    excluded: set[str] = field(default_factory=set)

    def rule(self, name: str) -> str | None:
        """Return the rule chosen for a module or parameter, None for none.

        >>> Choices(approx={"fc": "adamw", "out": "diagonal"}).rule("fc")
        'adamw'
        """
        chosen = self.approx.get(name, self.default)
        return chosen if chosen in PLAIN_RULES else None

    def approximation(self, name: str, known: Sequence[str]) -> str | None:
        """Return the approximation of a layer that can have those `known`; None for its
        default.

        Raises:
            ValueError: one that was chosen for this layer, and that it cannot have.
        """
        chosen = self.approx.get(name)
        if chosen is not None:
            check_choice(f"layer {name}: approx", chosen, (*known, *PLAIN_RULES))
            return chosen
        return self.default if self.default in (*known, *PLAIN_RULES) else None


class _Names:
    """The modules and parameters of a model by name."""

    def __init__(self, model: nn.Module) -> None:
        # Shared ones under every name that they have.
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._params = dict(model.named_parameters(remove_duplicate=False))
        self._all: dict[str, Any] = {**self._modules, **self._params}
        del self._all[""]

    def meant(self, argument: str, key: Key) -> list[str]:
        """Names of what a key means itself."""
        if isinstance(key, str):
            names = [name for name in self._all if fnmatchcase(name, key)]
        elif isinstance(key, type):
            names = [n for n, m in self._modules.items() if n and isinstance(m, key)]
        else:
            names = [name for name, one in self._all.items() if one is key]
        if not names:
            close = (
                difflib.get_close_matches(key, self._all, 1) if isinstance(key, str) else []
            )
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{argument}: expected the name (or a pattern of names), the type, or the "
                f"object of a module or parameter of the model, got {key!r}, which is none "
                f"in it{hint}"
            )
        return names

    def within(self, name: str) -> Iterator[str]:
        """The name and those of everything inside it."""
        for other in self._all:
            if other == name or other.startswith(f"{name}."):
                yield other

    def inside(self, argument: str, key: Key) -> set[str]:
        """Names of what a key means, and of everything inside it."""
        return {inner for name in self.meant(argument, key) for inner in self.within(name)}

    def rank(self, key: Key, name: str) -> tuple[int, bool]:
        """How closely a key means a layer: innermost first, then names before types."""
        return name.count("."), not isinstance(key, type)
