"""`patches_moments` of kfac-jax, compiled: what its factors of convolutions call."""

import os
from collections.abc import Callable

os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from kfac_jax._src import patches_second_moment
from worker import serve


def prepare(x: np.ndarray, kernel: int, stride: int) -> Callable[[], np.ndarray]:
    held = jax.numpy.asarray(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))
    rows = x.shape[0] * (-(-x.shape[2] // stride)) ** 2

    def moment(y: jax.Array) -> jax.Array:
        second, _ = patches_second_moment.patches_moments(
            y, (kernel, kernel), strides=(stride, stride), padding="SAME"
        )
        size = kernel * kernel * y.shape[-1]
        return second.reshape(size, size) / rows

    compiled = jax.jit(moment)
    return lambda: np.asarray(compiled(held))


serve(prepare, f"kfac-jax 0.0.8, jax {jax.__version__}")
