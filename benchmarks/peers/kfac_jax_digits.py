"""The digits autoencoder with kfac-jax, its own recipe, driven through pipes.

    python benchmarks/peers/kfac_jax_digits.py SEED

For kfac-jax 0.0.8 with JAX 0.7.2; it fails in its tracer with JAX 0.10.2. Run by
``benchmarks/digits_autoencoder.py --peer-python``. Each line on the standard input is a
number of steps to run; the answer is a line of JSON: milliseconds of every step and the
loss after the last of them, without the l2 term.
"""

import itertools
import json
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
from sklearn.datasets import load_digits

WIDTHS = (64, 100, 50, 25, 10, 25, 50, 100, 64)
LINEAR = (3, 7)  # the code and the output
L2 = 1e-5


def start():
    generator = np.random.RandomState(0)
    sizes = itertools.pairwise(WIDTHS)
    weights = [generator.randn(n, m) / np.sqrt(n) for n, m in sizes]
    return [(jnp.asarray(w, jnp.float32), jnp.zeros(w.shape[1])) for w in weights]


def network(params, x):
    for i, (w, b) in enumerate(params):
        x = x @ w + b
        x = x if i in LINEAR else jnp.tanh(x)
    return x


def cross_entropy(z, x):
    softplus = jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z)))
    return (softplus - x * z).sum(1).mean()


def objective(params, x):
    z = network(params, x)
    kfac_jax.register_sigmoid_cross_entropy_loss(z, x)
    squares = sum((w**2).sum() + (b**2).sum() for w, b in params)
    return cross_entropy(z, x) + L2 / 2 * squares


def main():
    seed = int(sys.argv[1])
    x = jnp.asarray(load_digits().data / 16, jnp.float32)
    params = start()
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(objective),
        l2_reg=L2,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
        use_initial_damping_calibration=True,
        min_damping=1e-5,
        max_damping=1e3,
        damping_adaptation_interval=5,
        damping_adaptation_decay=0.95,
        num_burnin_steps=5,
        curvature_ema=0.95,
        inverse_update_period=5,
    )
    key = jax.random.PRNGKey(seed)
    state = optimizer.init(params, key, x)
    batches = iter(lambda: x, None)
    evaluate = jax.jit(lambda params: cross_entropy(network(params, x), x))
    versions = {name: version(name) for name in ("kfac-jax", "jax", "numpy")}
    print(json.dumps({"versions": versions}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            key, now = jax.random.split(key)
            begin = time.perf_counter()
            params, state, _ = optimizer.step(params, state, now, data_iterator=batches)
            jax.block_until_ready(params)
            times.append(1e3 * (time.perf_counter() - begin))
        answer = {"ms": times, "loss": float(evaluate(params))}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
