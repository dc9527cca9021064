"""The tasks that K-FAC and its rivals are judged on; see `base.Task` for their interface.

from tasks import load_task
task = load_task("T2", Path("folder"))
model, batches = task.make_model(seed), task.batches(seed)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

from . import (
    char_transformer,
    curves_autoencoder,
    digits_autoencoder,
    fashion_conv,
    kfac_jax_digits,
    mnist_autoencoder,
)
from .base import Task as Task
from .data import DataMissingError as DataMissingError

_MAKERS: Mapping[str, Callable[[Path | None], Task]] = MappingProxyType(
    {
        "T1": digits_autoencoder.make_task,
        "T2": mnist_autoencoder.make_task,
        "T3": curves_autoencoder.make_task,
        "T4": fashion_conv.make_task,
        "T4bn": partial(fashion_conv.make_task, batch_norm=True),
        "T6": char_transformer.make_task,
        "A": kfac_jax_digits.make_task,
    }
)
TASKS = tuple(_MAKERS)


def load_task(name: str, data_dir: Path | None = None) -> Task:
    """Return one of `TASKS`, its data read from a folder or from the cache.

    Raises:
        ValueError: there is no such task.
        DataMissingError: its data are not at hand.
    """
    if name not in _MAKERS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return _MAKERS[name](data_dir)
