"""Write the records of a run's steps: to JSON lines, a table, or TensorBoard.

A writer is given to `KFAC.attach`. It turns the tensors of a record into numbers, with one
read of the device for each record that it is given. The names are those of `StepRecord`,
`seconds.PHASE` and `pi.LAYER`. Left out: pictures (`view.py`).
"""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .steps import StepRecord

Number: TypeAlias = "float | int | None"


def numbers(record: StepRecord) -> dict[str, Number]:
    """Return a record as numbers, flat; reads the host once.

    >>> record = StepRecord(3, torch.tensor(0.5), 0.9, 0.1, seconds={"step": 0.25})
    >>> list(numbers(record).items())[:4]
    [('step', 3), ('lr', 0.5), ('momentum', 0.9), ('damping', 0.1)]
    >>> numbers(record)["seconds.step"]
    0.25
    """
    flat: dict[str, Any] = {}
    for one in fields(record):
        value = getattr(record, one.name)
        if isinstance(value, Mapping):
            flat.update({f"{one.name}.{key}": part for key, part in value.items()})
        else:
            flat[one.name] = int(value) if isinstance(value, bool) else value
        if one.name == "new_loss":
            flat["actual_change"] = record.actual_change
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    if tensors:
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors.values()))
        device = next(iter(tensors.values())).device
        parts = [t.detach().to(device, dtype).reshape(()) for t in tensors.values()]
        flat.update(zip(tensors, torch.stack(parts).tolist(), strict=True))
    return flat


class JSONLWriter:
    """A line of JSON for every record; NaN and infinities are strings.

    Args:
        path: of the file.
        append: go on with a file that is there, as a run that is resumed does; else it is
            emptied.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write = JSONLWriter(f"{folder}/run.jsonl")
    ...     write(StepRecord(0, 0.1, 0.9, 0.01, rho=math.inf))
    ...     read_run(f"{folder}/run.jsonl")[0]["rho"]
    inf
    """

    def __init__(self, path: str | PathLike[str], append: bool = False) -> None:
        self._path = Path(path)
        _prepare(self._path, append)

    def __call__(self, record: StepRecord) -> None:
        """Write a record."""
        line = {key: _plain(value) for key, value in numbers(record).items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


class CSVWriter:
    """A row for every record, under the names of the first one; empty is None.

    Args:
        path: of the file.
        append: as of `JSONLWriter`; the rows have to have the names that are there.
    """

    def __init__(self, path: str | PathLike[str], append: bool = False) -> None:
        self._path = Path(path)
        _prepare(self._path, append)
        with self._path.open(encoding="utf-8", newline="") as file:
            self._names = next(csv.reader(file), None)

    def __call__(self, record: StepRecord) -> None:
        """Write a record.

        Raises:
            ValueError: it has other names than the first.
        """
        row = numbers(record)
        names = self._names
        if names is not None and names != list(row):
            raise ValueError(
                f"{self._path}: expected a record with the names of its first line, got "
                f"others: {', '.join(sorted(set(names) ^ set(row))) or 'in another order'}"
            )
        with self._path.open("a", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(row))
            if names is None:
                table.writeheader()
                self._names = list(row)
            table.writerow(row)


class TensorBoardWriter:
    """A scalar for every number of a record, in sections by its first name.

    Args:
        log_dir: for a `torch.utils.tensorboard.SummaryWriter`.
        writer: one to use in its place, with an `add_scalar` like it.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(
        self, log_dir: str | PathLike[str] | None = None, writer: Any = None
    ) -> None:
        if writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoardWriter needs tensorboard, which is not installed: "
                    "pip install 'kfac-torch[tensorboard]'"
                ) from error
            writer = SummaryWriter(log_dir)
        self._writer = writer

    def __call__(self, record: StepRecord) -> None:
        """Write a record."""
        for key, value in numbers(record).items():
            if value is not None and key != "step":
                name = key.replace(".", "/", 1) if "." in key else f"kfac/{key}"
                self._writer.add_scalar(name, value, record.step)


def read_run(path: str | PathLike[str]) -> list[dict[str, Number]]:
    """Return the records that a `JSONLWriter` wrote.

    Raises:
        ValueError: the file is something else, or has no record.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            records.append(
                {k: float(v) if isinstance(v, str) else v for k, v in record.items()}
            )
            good = "step" in record
        except (ValueError, AttributeError):
            good = False
        if not good:
            raise ValueError(
                f"{path}, line {number}: expected a record of a JSONLWriter, got "
                f"{line[:60]!r}"
            )
    if not records:
        raise ValueError(f"{path}: expected records of a JSONLWriter, got an empty file")
    return records


def _prepare(path: Path, append: bool) -> None:
    """Find out now whether the file can be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("a" if append else "w", encoding="utf-8").close()


def _plain(value: Number) -> Number | str:
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite else str(value)
