"""T2, T4 and T6 of the tasks with kfac-jax, everything adaptive, driven through pipes.

For kfac-jax 0.0.8 with JAX 0.7.2; it fails in its tracer with JAX 0.10.2. Run by
``benchmarks/kfac_jax_tasks.py``, which sends torch's weights, the batches and the fixed
cases, so that both sides start, go on and are judged alike. The nets are written as the
tracer can match them: no nested ``jit``, weights as ``(in, out)``, an embedding as a
product with one-hot rows. The recipe is that of the package's autoencoder examples, but
for ``initial_damping``.

Standard input has frames, eight bytes of length and an ``.npz``; its entry ``do`` is one of

    start   the net's parameters, the fixed cases, and the batches of the burn-in, which are
            also those of a rehearsal in which everything is compiled
    begin   a run: parameters, `damping`, `seed` and the batches of its burn-in
    step    a batch: one step, answered by its processor seconds (and the burn-in's, in
            the first), the seconds that XLA compiled in it, and the loss after it

Each is answered by a line of JSON.
"""

import io
import json
import logging
import os
import re
import sys
import time
from importlib.metadata import version

os.environ["XLA_FLAGS"] = (
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
from jax import lax

BURN_IN = 5
RECIPE = {
    "l2_reg": 0.0,
    "use_adaptive_learning_rate": True,
    "use_adaptive_momentum": True,
    "use_adaptive_damping": True,
    "min_damping": 1e-5,
    "max_damping": 1e3,
    "damping_adaptation_interval": 5,
    "damping_adaptation_decay": 0.95,
    "num_burnin_steps": BURN_IN,
    "curvature_ema": 0.95,
    "inverse_update_period": 5,
}


def dense(params, name, x):
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def autoencoder(params, x):
    names = ("0", "2", "4", "6", "7", "9", "11", "13")  # of torch's layers
    for name in names:
        x = dense(params, name, x)
        x = x if name in ("6", "13") else jnp.tanh(x)
    return x


def conv_net(params, x):
    x = x.reshape(-1, 28, 28, 1)
    for name in ("1", "4", "7"):
        layout = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, params[f"{name}.weight"], (1, 1), "SAME", dimension_numbers=layout
        )
        x = jnp.maximum(x + params[f"{name}.bias"], 0.0)
        size = (1, 2, 2, 1)
        x = lax.reduce_window(x, -jnp.inf, lax.max, size, size, "VALID")
    return dense(params, "11", x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def layer_norm(params, name, x):
    x = x - x.mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * (params[f"{name}.weight"] * inverse) + params[f"{name}.bias"]


def attention(params, name, x, heads=4):
    b, t, d = x.shape
    parts = dense(params, f"{name}.qkv", x).reshape(b, t, 3, heads, d // heads)
    q, k, v = parts.transpose(2, 0, 3, 1, 4)
    scores = q @ k.transpose(0, 1, 3, 2) / (d // heads) ** 0.5
    scores = scores + jnp.where(np.triu(np.ones((t, t), bool), 1), -jnp.inf, 0.0)
    scores = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = scores / scores.sum(-1, keepdims=True)
    joined = (weights @ v).transpose(0, 2, 1, 3).reshape(b, t, d)
    return dense(params, f"{name}.out", joined)


def transformer(params, x):
    table = params["embedding.weight"]
    one_hot = (x[..., None] == np.arange(len(table))).astype(table.dtype)
    # Without the factor the tracer takes the positions for the bias of the product, fails.
    hidden = 1.0 * (one_hot @ table) + params["position"]
    for block in ("blocks.0", "blocks.1"):
        normal = layer_norm(params, f"{block}.norm1", hidden)
        hidden = hidden + attention(params, f"{block}.attention", normal)
        inner = dense(
            params, f"{block}.mlp.0", layer_norm(params, f"{block}.norm2", hidden)
        )
        inner = inner * (0.5 + 0.5 * lax.erf(inner / 2**0.5))
        hidden = hidden + dense(params, f"{block}.mlp.2", inner)
    return dense(params, "head", layer_norm(params, "norm", hidden))


def bernoulli_loss(z, y):
    softplus = jnp.maximum(z, 0) + jnp.log1p(jnp.exp(-jnp.abs(z)))
    return (softplus - y * z).sum(1).mean()


def categorical_loss(z, y):
    top = lax.stop_gradient(z.max(-1, keepdims=True))
    total = jnp.log(jnp.exp(z - top).sum(-1)) + top[..., 0]
    hit = y[..., None] == np.arange(z.shape[-1])
    return (total - (z * hit).sum(-1)).mean()


def register_bernoulli(z, y):
    kfac_jax.register_sigmoid_cross_entropy_loss(z, y)


def register_categorical(z, y):
    # A batch of sequences has its mean over tokens, the package's is over the first axis.
    terms = y.size // len(y)
    flat = z.reshape(-1, z.shape[-1])
    kfac_jax.register_softmax_cross_entropy_loss(flat, y.reshape(-1), weight=1 / terms)


TASKS = {
    "T2": (autoencoder, bernoulli_loss, register_bernoulli),
    "T4": (conv_net, categorical_loss, register_categorical),
    "T6": (transformer, categorical_loss, register_categorical),
}


def from_torch(name, array):
    """A parameter as JAX has it: matrices `(in, out)`, kernels `(h, w, in, out)`."""
    if name in ("embedding.weight", "position") or array.ndim == 1:
        return jnp.asarray(array)
    return jnp.asarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)


class Side:
    """What answers: a task's optimizer, compiled once, and the run of the moment."""

    def __init__(self, task, frame):
        self.network, self.loss, self.register = TASKS[task]
        self.recipe = {**RECIPE, **json.loads(str(frame["recipe"]))}
        self.cases = jnp.asarray(frame["x"]), jnp.asarray(frame["y"])
        self.compiled = 0.0
        listen = jax.monitoring.register_event_duration_secs_listener
        listen(lambda event, seconds, **_: self.count(event, seconds))
        self.evaluate = jax.jit(
            lambda p: self.loss(self.network(p, self.cases[0]), self.cases[1])
        )
        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(self.objective), initial_damping=1.0, **self.recipe
        )
        self.begin(frame, 1.0, 0)
        begin = time.perf_counter()
        for i in range(BURN_IN + 1):  # λ adapts in the fifth
            self.step((frame[f"x{i % BURN_IN}"], frame[f"y{i % BURN_IN}"]))
        self.rehearsal = time.perf_counter() - begin

    def count(self, event, seconds):
        if "compile" in event:
            self.compiled += seconds

    def objective(self, params, batch):
        x, y = batch
        z = self.network(params, x)
        self.register(z, y)
        return self.loss(z, y)

    def begin(self, frame, damping, seed):
        """Start a run."""
        self.params = {
            name.removeprefix("p:"): from_torch(name.removeprefix("p:"), frame[name])
            for name in frame.files
            if name.startswith("p:")
        }
        pairs = [(frame[f"x{i}"], frame[f"y{i}"]) for i in range(BURN_IN)]
        self.waiting = [tuple(map(jnp.asarray, pair)) for pair in pairs]
        self.key = jax.random.PRNGKey(seed)
        self.state = self.optimizer.init(self.params, self.key, self.waiting[0])
        self.state.damping = jnp.asarray(damping, self.state.damping.dtype)

    def step(self, batch):
        """One step; the first takes the burn-in along."""
        self.waiting.append(tuple(map(jnp.asarray, batch)))
        self.key, now = jax.random.split(self.key)
        self.compiled = 0.0
        data = iter(lambda: self.waiting.pop(0), None)
        begin = time.process_time()
        self.params, self.state, _ = self.optimizer.step(
            self.params, self.state, now, data_iterator=data
        )
        jax.block_until_ready((self.params, self.state))
        seconds = time.process_time() - begin
        compiled = self.compiled
        return {
            "cpu": seconds,
            "compiled": compiled,
            "loss": float(self.evaluate(self.params)),
            "damping": float(self.state.damping),
        }


class Lines(logging.Handler):
    """Keeps the lines of a log."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def registrations():
    """Start to keep what the package logs of the layers that it finds."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.INFO)
    keeper, logger = Lines(), absl_logging.get_absl_logger()
    logger.handlers, logger.propagate = [keeper], False
    return keeper.lines


def blocks(lines):
    """How many parameter tensors are in each kind of block, from the log."""
    text = "\n".join(lines)
    begin = text.index("BlockDiagonalCurvature blocks:")
    kinds = re.findall(r"^(\w+)[(,].*params shapes: (.*)$", text[begin:], re.MULTILINE)
    counts = {}
    for kind, shapes in kinds:
        counts[kind] = counts.get(kind, 0) + len(re.findall(r"\(\d[\d, ]*\)", shapes))
    return counts


def frames():
    while head := sys.stdin.buffer.read(8):
        yield np.load(io.BytesIO(sys.stdin.buffer.read(int.from_bytes(head, "little"))))


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side, lines = None, registrations()
    for frame in frames():
        do = str(frame["do"])
        if do == "start":
            side = Side(str(frame["task"]), frame)
            versions = {name: version(name) for name in ("kfac-jax", "jax", "numpy")}
            answer = {"versions": versions, "recipe": side.recipe}
            answer |= {"rehearsal": side.rehearsal, "registered": blocks(lines)}
        elif do == "begin":
            answer = side.begin(frame, float(frame["damping"]), int(frame["seed"]))
        else:
            answer = side.step((frame["x"], frame["y"]))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
