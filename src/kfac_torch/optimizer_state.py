"""The state of an optimizer as plain data: by names, compared, loaded whole or not at all.

A state names parameters and layers, so that it does not depend on their order or their
grouping. It has dicts, lists, tensors, numbers and strings alone. Before anything is loaded
it is compared with the optimizer, and every difference is found, not the first one alone.
Left out: what the state of a block or of the estimator is (their own business), and files
(`checkpoint.py`).
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .cost_model import Intervals
from .estimator import FisherEstimator
from .fisher_blocks import FisherBlock

State: TypeAlias = dict[str, Any]
Groups: TypeAlias = Sequence[Mapping[str, Any]]

STATE_VERSION = 6
_DAMAGE = (KeyError, TypeError, IndexError, AttributeError)


# By name instead of by number.


def names_of(groups: Groups, known: Mapping[Tensor, str]) -> dict[Tensor, str]:
    """Return the names of all parameters; one that is not known is called by its number.

    >>> a, b = torch.zeros(1), torch.zeros(1)
    >>> list(names_of([{"params": [a]}, {"params": [b]}], {a: "bias"}).values())
    ['bias', 'param_groups.1']
    """
    params = [p for group in groups for p in group["params"]]
    return {p: known.get(p, f"param_groups.{n}") for n, p in enumerate(params)}


def by_name(state: State, groups: Groups, names: Mapping[Tensor, str]) -> State:
    """Return what torch's `Optimizer.state_dict` made, names in the place of its numbers.

    Args:
        state: with `state` and `param_groups`.
        groups: the param groups themselves.
        names: of all their parameters, see `names_of`.
    """
    numbered = [
        pair
        for group, packed in zip(groups, state["param_groups"], strict=True)
        for pair in zip(packed["params"], group["params"], strict=True)
    ]
    name = {number: names[p] for number, p in numbered}
    packed = [
        {**group, "params": [name[number] for number in group["params"]]}
        for group in state["param_groups"]
    ]
    # Copies: a state stays what it was while the run goes on.
    memory = {name[number]: dict(memory) for number, memory in state["state"].items()}
    return {**state, "state": memory, "param_groups": packed}


def by_number(state: State, groups: Groups, names: Mapping[Tensor, str]) -> State:
    """Return the inverse of `by_name`, for param groups that may be others by now.

    Each group has the options that its parameters had in the state. That they are all the
    same is for `differences` to say.
    """
    held = {name: group for group in state["param_groups"] for name in group["params"]}
    memory, packed, number = dict[int, Any](), list[State](), 0
    for group in groups:
        found: Mapping[str, Any] = group
        numbers = []
        for p in group["params"]:
            name = names[p]
            found = held[name]
            if name in state["state"]:
                memory[number] = state["state"][name]
            numbers.append(number)
            number += 1
        packed.append({**found, "params": numbers})
    return {"state": memory, "param_groups": packed}


# What the state is of.


def describe(value: Any) -> Any:
    """Return an option as a number, a string or None, alike in every process.

    >>> describe(0.1), describe(abs)
    (0.1, 'a callable')
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        pairs = [(f.name, describe(getattr(value, f.name))) for f in fields(value)]
        return f"{type(value).__name__}({', '.join(f'{n}={v}' for n, v in pairs)})"
    return "a callable" if callable(value) else repr(value)


def describe_block(block: FisherBlock) -> str:
    """Return a block's kind and how its factors are kept."""
    return f"{type(block).__name__} ({', '.join(block.factor_sizes)})"


def subject(
    options: Mapping[str, Any],
    params: Mapping[Tensor, str],
    blocks: Mapping[str, FisherBlock],
) -> State:
    """Return what a state is of, as plain data: options, parameters, layers.

    Args:
        options: what the optimizer was constructed with.
        params: the names of those that it has.
        blocks: by layer.
    """
    return {
        "options": {name: describe(value) for name, value in options.items()},
        "shapes": {name: list(p.shape) for p, name in params.items()},
        "blocks": {name: describe_block(block) for name, block in blocks.items()},
    }


def differences(
    state: State,
    groups: Groups,
    names: Mapping[Tensor, str],
    expected: State,
    blocks: Mapping[str, FisherBlock],
) -> list[str]:
    """Return, in words, all that keeps a state from being loaded; nothing is changed.

    Args:
        state: of `KFAC.state_dict`.
        groups: the param groups of the optimizer.
        names: of its parameters.
        expected: its `subject`.
        blocks: its blocks, by layer.
    """
    own = state.get("kfac")
    version = own.get("version") if isinstance(own, dict) else None
    if not isinstance(own, dict) or version != STATE_VERSION:
        found = "no K-FAC state" if version is None else f"version {version}"
        return [f"expected K-FAC state of version {STATE_VERSION}, got {found}"]
    try:
        found = own["subject"]
        lines = _between("parameter", expected["shapes"], found["shapes"])
        lines += _between("layer", expected["blocks"], found["blocks"])
        lines += _between("", expected["options"], found["options"])
        return lines or [
            *_of_blocks(own["estimator"]["blocks"], blocks),
            *_of_groups(state, groups, names),
        ]
    except _DAMAGE as error:
        return [f"the state is damaged: {type(error).__name__}: {error}"]


def _between(kind: str, ours: State, theirs: State) -> list[str]:
    """What is missing, unknown or different; a shape, an approximation, an option."""
    kind = kind and f"{kind} "
    lines = []
    for word, names in (
        ("missing in the state", sorted(ours.keys() - theirs.keys())),
        ("unknown here", sorted(theirs.keys() - ours.keys())),
    ):
        if names:
            lines.append(f"{kind or 'option '}{word}: {', '.join(names)}")
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            lines.append(f"{kind}{name}: expected {ours[name]!r}, got {theirs[name]!r}")
    return sorted(lines)


def _of_blocks(states: State, blocks: Mapping[str, FisherBlock]) -> Iterator[str]:
    for name, block in blocks.items():
        try:
            block.check_state_dict(states[name])
        except ValueError as error:
            yield str(error)
        except _DAMAGE as error:
            yield f"layer {name}: damaged: {type(error).__name__}: {error}"


def _of_groups(state: State, groups: Groups, names: Mapping[Tensor, str]) -> Iterator[str]:
    held = {name: group for group in state["param_groups"] for name in group["params"]}
    for index, group in enumerate(groups):
        options: State | None = None
        for p in group["params"]:
            name = names[p]
            here = {k: v for k, v in held[name].items() if k != "params"}
            options = here if options is None else options
            if here != options:
                yield (
                    f"param group {index}: expected the same options for all of it, got "
                    f"others for {name}: {here}, beside {options}"
                )
            for key, value in state["state"].get(name, {}).items():
                if isinstance(value, Tensor) and value.shape != p.shape:
                    yield (
                        f"parameter {name}: {key}: expected shape {list(p.shape)}, got "
                        f"{list(value.shape)}"
                    )


# All or nothing.


@contextmanager
def all_or_nothing(*roots: Any) -> Iterator[None]:
    """Put every attribute back where the body fails, of what is given and of its parts.

    The body replaces tensors; it does not write into them.
    """
    before = [(thing, dict(vars(thing))) for thing in _parts(roots, set())]
    states = [
        (value, value.get_state())
        for _, attributes in before
        for value in attributes.values()
        if isinstance(value, torch.Generator)
    ]
    try:
        yield
    except BaseException:
        for thing, attributes in before:
            vars(thing).clear()
            vars(thing).update(attributes)
        for generator, generator_state in states:
            generator.set_state(generator_state)
        raise


def _parts(things: Iterable[Any], seen: set[int]) -> Iterator[Any]:
    """The things, and what loading changes among what they are made of."""
    for thing in things:
        if id(thing) in seen or not hasattr(thing, "__dict__") or isinstance(thing, type):
            continue
        seen.add(id(thing))
        yield thing
        for value in vars(thing).values():
            inner = value.values() if isinstance(value, dict) else value
            inner = inner if isinstance(value, dict | list | tuple) else (value,)
            yield from _parts((v for v in inner if _is_part(v)), seen)


def _is_part(value: Any) -> bool:
    package = __name__.rpartition(".")[0]
    homes = ("fisher_blocks", "fisher_factors", "health", "preconditioning")
    return type(value).__module__.startswith(tuple(f"{package}.{home}" for home in homes))


class NamedState(torch.optim.Optimizer):
    """An optimizer whose state is of this form (abstract).

    It has an `estimator`, `_names` of its parameters, `_updates`, `_schedule`, and sets
    `_stepping` while a step is made; it stays set where one is interrupted half-way.
    """

    estimator: FisherEstimator
    _names: dict[Tensor, str]
    _updates: Any
    _schedule: Any
    _stepping = False

    @property
    def intervals(self) -> Intervals:
        """How often statistics are taken and inverses refreshed, from the first step on."""
        return self._schedule.intervals

    @abc.abstractmethod
    def _options(self) -> dict[str, Any]:
        """What it was constructed with and no param group has."""

    @abc.abstractmethod
    def _own_state(self) -> State:
        """What is neither a param group's nor a parameter's nor the estimator's."""

    @abc.abstractmethod
    def _load_own_state(self, own: State) -> None:
        """Restore that."""

    def _subject(self, names: dict[Tensor, str]) -> State:
        estimator = self.estimator
        options = {
            "estimation_mode": estimator._mode,
            "cov_ema_decay": estimator.cov_ema_decay,
            **self._options(),
        }
        return subject(options, names, estimator.blocks)

    def _check_between_steps(self, method: str, collected: bool) -> None:
        if self._stepping:
            raise RuntimeError(
                f"KFAC.{method}(): expected a call between two steps, got one inside "
                "step(), or after a step that was interrupted half-way; make a step, or "
                "construct the optimizer again and load an earlier state"
            )
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if collected and all(g is None or g.isfinite().all() for g in grads):
            raise RuntimeError(
                f"KFAC.{method}(): expected a call between two steps, got one between a "
                "backward and its step(), whose gradients and statistics are in no state; "
                "call it after step(), or after the zero_grad() that drops them"
            )

    def state_dict(self) -> State:
        """Return what resumes the run bit for bit, by the names of parameters and layers.

        It has tensors, numbers, strings, lists and dicts alone; see docs/checkpoints.md.

        Raises:
            RuntimeError: in the middle of a step: inside `step`, after one that was
                interrupted, or between a backward whose gradient is finite and its step.
        """
        self._check_between_steps("state_dict", self.estimator.num_terms > 0)
        names = names_of(self.param_groups, self._names)
        own = {
            "version": STATE_VERSION,
            "subject": self._subject(names),
            **self._own_state(),
            "collecting": self.estimator.collecting,
            "estimator": self.estimator.state_dict(),
        }
        packed = by_name(super().state_dict(), self.param_groups, names)
        return {**packed, "kfac": own}

    def check_state_dict(self, state_dict: State) -> None:
        """Raise ValueError where `load_state_dict` would not fit; changes nothing.

        All that differs is listed: parameters, shapes, layers, approximations, options.
        """
        names = names_of(self.param_groups, self._names)
        expected, blocks = self._subject(names), self.estimator.blocks
        lines = differences(state_dict, self.param_groups, names, expected, blocks)
        if lines:
            raise ValueError(
                "KFAC.load_state_dict: the state is not one of this model with an "
                "optimizer constructed like this one; nothing is changed:\n- "
                + "\n- ".join(lines)
            )

    def load_state_dict(self, state_dict: State) -> None:
        """Restore what `state_dict` returned, into an optimizer constructed alike.

        What was gathered since the last step is forgotten. Hooks of torch's see the state
        with torch's numbers of parameters.

        Raises:
            ValueError: as `check_state_dict`; nothing is changed.
            RuntimeError: inside `step`.
        """
        self._check_between_steps("load_state_dict", False)
        self.check_state_dict(state_dict)
        names, own = names_of(self.param_groups, self._names), state_dict["kfac"]
        blocks = self.estimator.blocks.values()
        with all_or_nothing(self, self._updates, self.estimator, *blocks):
            numbered = by_number(state_dict, self.param_groups, names)
            super().load_state_dict(numbered)
            self._load_own_state(own)
            device = next(iter(blocks)).params[0].device
            self.estimator.collecting = own["collecting"]
            self.estimator.load_state_dict(own["estimator"], device)  # last: it forgets
