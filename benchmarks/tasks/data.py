"""Where the data of the tasks are: a folder that the user names, then a cache folder.

A file is looked for in `--data-dir DIR`, then in `~/.cache/kfac-torch`, each time in the
folder itself and in one by the data set's name (`mnist`, `fashion-mnist`). Nothing is
downloaded: an error says which files are missing and what they are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kfac_torch.demo.data import read_idx

CACHE = Path("~/.cache/kfac-torch")
_SOURCES = {
    "mnist": "MNIST in its usual four files (torchvision.datasets.MNIST downloads them)",
    "fashion-mnist": "Fashion-MNIST in its usual four files "
    "(torchvision.datasets.FashionMNIST downloads them)",
    "tinyshakespeare": "Tiny Shakespeare, the text of Karpathy's char-rnn, as one file",
}


class DataMissingError(Exception):
    """A file that a task needs was not found; the message says what to do."""


def find_file(data: str, file: str, data_dir: Path | None = None) -> Path:
    """Return the path of a file of a data set, gzipped or not.

    Raises:
        DataMissingError: it is in none of the folders.
    """
    folders = [path.expanduser() for path in (data_dir, CACHE) if path is not None]
    for folder in folders:
        for path in (folder / data, folder):
            for name in (f"{file}.gz", file):
                if (path / name).is_file():
                    return path / name
    looked = " and ".join(str(folder) for folder in folders)
    raise DataMissingError(
        f"{data}: no file {file} in {looked} (nor in a folder {data} there). Expected "
        f"{_SOURCES[data]}; put it into {CACHE / data}, or name its folder with "
        "--data-dir DIR"
    )


def load_digits() -> tuple[Tensor, Tensor]:
    """All 1 797 digits of scikit-learn `[N, 64]` in [0, 1], and labels."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def load_idx(
    data: str, part: str, data_dir: Path | None = None, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """The first `limit` images `[N, pixels]` in [0, 1], and labels; `part`: train, t10k."""
    images = read_idx(find_file(data, f"{part}-images-idx3-ubyte", data_dir), 3)[:limit]
    labels = read_idx(find_file(data, f"{part}-labels-idx1-ubyte", data_dir), 1)[:limit]
    if len(images) != len(labels) or not len(images):
        raise DataMissingError(
            f"{data}: expected as many images as labels in the files of {part}, got "
            f"{len(images)} and {len(labels)}"
        )
    return images.flatten(1).float() / 255, labels.long()


def load_text(data_dir: Path | None = None) -> Tensor:
    """Tiny Shakespeare `[characters]`: the number of each among the sorted characters."""
    path = find_file("tinyshakespeare", "tinyshakespeare.txt", data_dir)
    text = path.read_text(encoding="utf-8")
    numbers = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([numbers[character] for character in text])
