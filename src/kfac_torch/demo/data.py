"""The demo's images: scikit-learn's digits, or IDX files from a folder of the user's.

Notation: images `x [N, side·side]` in [0, 1], labels `y [N]`. IDX (LeCun's format): two
zero bytes, a type code (8 is uint8), the rank, the sizes as big-endian uint32, the data.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

DATA_NAMES = ("digits", "mnist", "fashion-mnist")
_IDX_FILES = MappingProxyType(
    {
        "x": "train-images-idx3-ubyte",
        "y": "train-labels-idx1-ubyte",
        "x_test": "t10k-images-idx3-ubyte",
        "y_test": "t10k-labels-idx1-ubyte",
    }
)
_MAX_TRAIN, _MAX_TEST = 5000, 2000  # of the IDX data, so that the demo stays short
_DIGITS_TRAIN = 1500


class DemoError(Exception):
    """What the user has to change, in one sentence."""


@dataclass
class Data:
    """Images `[N, side·side]` in [0, 1] and labels, to train on and to test with."""

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def side(self) -> int:
        """The height and width of an image."""
        return math.isqrt(self.x.shape[1])


def load_data(name: str, folder: Path | None = None, seed: int = 0) -> Data:
    """Load one of `DATA_NAMES`; `seed` draws the digits' split into train and test.

    Raises:
        DemoError: a missing folder, file or package, or a file that is not IDX.
    """
    if name == "digits":
        return _load_digits(seed)
    if folder is None:
        files = ", ".join(_IDX_FILES.values())
        raise DemoError(
            f"--data {name} needs --data-dir DIR, a folder with the files {files} (or .gz)"
        )
    return _load_idx_folder(name, folder)


def _load_digits(seed: int) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DemoError(
            "the digits come with scikit-learn, which is not installed: "
            "pip install 'kfac-torch[demo]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:_DIGITS_TRAIN], order[_DIGITS_TRAIN:]
    return Data("digits", x[train], y[train], x[test], y[test])


def _load_idx_folder(name: str, folder: Path) -> Data:
    tensors = {}
    for key, file in _IDX_FILES.items():
        limit = _MAX_TEST if "test" in key else _MAX_TRAIN
        found = read_idx(_find(folder, file), 1 if "labels" in file else 3)[:limit]
        tensors[key] = found.long() if "labels" in file else found.flatten(1).float() / 255
    for part in ("", "_test"):
        images, labels = len(tensors["x" + part]), len(tensors["y" + part])
        if images != labels or images == 0:
            raise DemoError(
                f"{folder}: expected as many images as labels, got {images} in "
                f"{_IDX_FILES['x' + part]} and {labels} in {_IDX_FILES['y' + part]}"
            )
    side = math.isqrt(tensors["x"].shape[1])
    if side * side != tensors["x"].shape[1] or side < 4:
        raise DemoError(f"{folder}: expected square images of at least 4x4 pixels")
    if tensors["x_test"].shape[1] != side * side:
        raise DemoError(f"{folder}: expected test images of {side}x{side} pixels")
    if max(int(tensors[key].max()) for key in ("y", "y_test")) > 9:
        raise DemoError(f"{folder}: expected labels 0 to 9")
    return Data(name, **tensors)


def _find(folder: Path, file: str) -> Path:
    for path in (folder / f"{file}.gz", folder / file):
        if path.is_file():
            return path
    raise DemoError(f"no file {file} or {file}.gz in {folder}")


def read_idx(path: Path, rank: int) -> Tensor:
    """Read an IDX file of bytes, gzipped or plain, of the given rank.

    Raises:
        DemoError: the file cannot be read or is not such a file; the message names it.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DemoError(f"{path}: cannot be read: {error}") from error
    start = 4 + 4 * rank
    if len(content) < start or content[:4] != bytes((0, 0, 8, rank)):
        raise DemoError(f"{path}: expected an IDX file of bytes with {rank} dimensions")
    sizes = struct.unpack(f">{rank}I", content[4:start])
    if len(content) - start != math.prod(sizes):
        raise DemoError(
            f"{path}: expected {math.prod(sizes)} bytes of data for the sizes {sizes}, "
            f"got {len(content) - start}"
        )
    if not math.prod(sizes):
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(sizes)
