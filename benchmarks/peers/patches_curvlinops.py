"""`extract_patches` of curvlinops and a product, as its K-FAC computes an input factor."""

from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from curvlinops.kfac_utils import extract_patches
from worker import serve

torch.set_num_threads(1)


def prepare(x: np.ndarray, kernel: int, stride: int) -> Callable[[], np.ndarray]:
    held = torch.from_numpy(x)
    if stride == 1 and kernel % 2:
        before = kernel // 2
    else:
        raise NotImplementedError("unequal padding")

    def run() -> np.ndarray:
        patches = extract_patches(held, kernel, stride, before, 1, 1).flatten(0, 1)
        return (patches.T @ patches).div_(len(patches)).numpy()

    return run


serve(
    prepare,
    f"curvlinops {version('curvlinops-for-pytorch')}, torch {torch.__version__}",
)
