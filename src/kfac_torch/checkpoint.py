"""Checkpoints in files: written whole or not at all, read without running what is in them.

A file is written beside its place, flushed to the disk, and only then given its name, which
is one operation of the file system: whatever is interrupted, the file there is the old one
or the new one. It is read with torch's `weights_only`, or is a `safetensors` file with the
structure as JSON in its metadata. Left out: several processes, each with a part of the
state (`to_tensors` makes it fit for `torch.distributed.checkpoint`).
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FORMAT = "kfac_torch.checkpoint"
_VERSION = 1
_SAFETENSORS = ".safetensors"


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rng: bool = False,
    **extra: Any,
) -> None:
    """Write model, optimizer and whatever else to a file, whole or not at all.

    One process at a time may write to a path. What earlier ones left unfinished there,
    hidden files that end in `.tmp`, is removed.

    Args:
        path: where; one that ends in `.safetensors` has that format, whose package is the
            extra `safetensors`.
        model: any module.
        optimizer: any optimizer, between two steps.
        rng: also torch's global random states.
        extra: what else; tensors, numbers, strings, None, and lists, tuples and dicts.

    Raises:
        TypeError: something else in it; nothing is written.
        OSError: it cannot be written; the old file is as it was.

    >>> import tempfile
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> path = Path(tempfile.mkdtemp()) / "run.pt"
    >>> save_checkpoint(path, model, optimizer, epoch=3)
    >>> load_checkpoint(path, model, optimizer)
    {'epoch': 3}
    """
    contents = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": _random_states() if rng else None,
        "extra": extra,
    }
    tensors, metadata = to_tensors(contents)  # which also sees that it is plain
    # A link stays a link.
    target = Path(os.path.realpath(path))
    if target.suffix == _SAFETENSORS:
        # As bytes: what the package writes itself has temporary files of its own.
        data = _safetensors().save(_unshared(tensors), {_FORMAT: metadata})
        _write(target, lambda file: file.write_bytes(data))
    else:
        _write(target, lambda file: torch.save(contents, file))


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    rng: bool = False,
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote; return what else it was given.

    Args:
        path: of the file.
        model: made as the one that was saved; its parameters may be on another device.
        optimizer: constructed as the one that was saved.
        rng: also torch's global random states.

    Raises:
        ValueError: another kind of file, or a model or an optimizer that does not fit;
            all differences are listed, and model and optimizer are unchanged.
    """
    contents = _read(Path(path))
    if contents.get("format") != _FORMAT or contents.get("version") != _VERSION:
        raise ValueError(
            f"{path}: expected a file of save_checkpoint, of version {_VERSION}, got "
            f"format {contents.get('format')!r}, version {contents.get('version')!r}"
        )
    if rng and contents["rng"] is None:
        raise ValueError(f"{path}: rng: expected random states, got a file without them")
    _check_model(model, contents["model"])
    before = {name: _copied(value) for name, value in model.state_dict().items()}
    try:
        model.load_state_dict(contents["model"])
        optimizer.load_state_dict(contents["optimizer"])
    except BaseException:
        model.load_state_dict(before)
        raise
    if rng:
        _set_random_states(contents["rng"])
    return contents["extra"]


# A nested state as tensors by name, and the rest as text.


def to_tensors(state: Any) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a nested state by their place in it, and the rest as JSON.

    A tensor that is there twice is kept once. Keys of dicts may be of any plain type.

    Raises:
        TypeError: something that is not a tensor, a number, a string, None, or a list,
            tuple or dict of them.

    >>> tensors, metadata = to_tensors({"a": [torch.ones(2), 1.5], "n": None})
    >>> tensors
    {'a/0': tensor([1., 1.])}
    >>> from_tensors(tensors, metadata)
    {'a': [tensor([1., 1.]), 1.5], 'n': None}
    """
    tensors = dict[str, Tensor]()
    return tensors, json.dumps(_packed(state, "", tensors, {}))


def from_tensors(tensors: Mapping[str, Tensor], metadata: str) -> Any:
    """Return the inverse of `to_tensors`."""
    return _unpacked(json.loads(metadata), tensors)


def _packed(
    value: Any, place: str, tensors: dict[str, Tensor], known: dict[Any, str]
) -> Any:
    if isinstance(value, Tensor):
        key = _view_of(value)
        if key not in known:
            name = known[key] = _free(place, tensors)
            tensors[name] = value.detach()
        return {"$tensor": known[key]}
    if type(value) in (type(None), bool, int, float, str):  # a subclass has more in it
        return value
    if isinstance(value, Mapping):
        items = [(k, _packed(v, f"{place}/{k}", tensors, known)) for k, v in value.items()]
        if all(isinstance(k, str) and not k.startswith("$") for k, _ in items):
            return dict(items)
        pairs = [[_packed(k, place, tensors, known), v] for k, v in items]
        return {"$dict": pairs}
    if isinstance(value, list | tuple):
        packed = [_packed(v, f"{place}/{i}", tensors, known) for i, v in enumerate(value)]
        return packed if isinstance(value, list) else {"$tuple": packed}
    raise TypeError(
        f"{place.strip('/')}: expected a tensor, a number, a string, None, or a list, "
        f"tuple or dict of them, got {type(value).__name__}"
    )


def _view_of(tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory, seen in the same way."""
    if not tensor.numel():
        return id(tensor)
    place = (tensor.device, tensor.data_ptr(), tensor.dtype)
    return (*place, tuple(tensor.shape), tensor.stride())


def _free(place: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of a place; keys that contain a slash may make two places alike."""
    name = place.strip("/") or "state"
    while name in tensors:
        name += "'"
    return name


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unpacked(value["$tuple"], tensors))
    if "$dict" in value:
        return dict(_unpacked(pair, tensors) for pair in value["$dict"])
    return {key: _unpacked(item, tensors) for key, item in value.items()}


# Files.


def _write(target: Path, write: Callable[[Path], Any]) -> None:
    for left in target.parent.glob(f".{_escaped(target.name)}.*.tmp"):
        left.unlink(missing_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync_directory(directory: Path) -> None:
    """Let the new name reach the disk, where a directory can be opened for that."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix != _SAFETENSORS:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        return contents if isinstance(contents, dict) else {}
    safetensors = _safetensors()
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = (file.metadata() or {}).get(_FORMAT)
        if metadata is None:
            return {}
        return from_tensors({name: file.get_tensor(name) for name in file.keys()}, metadata)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "a path that ends in .safetensors needs the package safetensors: pip install "
            "'kfac-torch[safetensors]'"
        ) from error
    return safetensors.torch


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, as the format wants it."""
    seen, result = set[Any](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        result[name] = (
            tensor
            if whole and storage.data_ptr() not in seen
            else tensor.clone(memory_format=torch.contiguous_format)
        )
        seen.add(storage.data_ptr())
    return result


# What is restored.


def _check_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise ValueError that lists how a state differs from the model's."""
    own = model.state_dict()
    lines = [f"missing in the file: {name}" for name in own if name not in state]
    lines += [f"unknown to the model: {name}" for name in state if name not in own]
    for name in own.keys() & state.keys():
        ours, theirs = (getattr(s[name], "shape", None) for s in (own, state))
        if ours != theirs:
            lines.append(f"{name}: expected shape {_shown(ours)}, got {_shown(theirs)}")
    if lines:
        raise ValueError(
            "load_checkpoint: the file is of another model; nothing is changed:\n- "
            + "\n- ".join(sorted(lines))
        )


def _shown(shape: Any) -> Any:
    return None if shape is None else list(shape)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _random_states() -> dict[str, Any]:
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    cuda = torch.cuda.get_rng_state_all() if used else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
