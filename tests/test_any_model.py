"""What people do around a model: statistics are those of the plain one, or a word is said.

A row of `SAME` is a model, and the plain one it must be like: after three steps their
factors and parameters are equal. A row of `TOLD` is one that K-FAC cannot follow, and what
it says. Rows that other files have are left out: compiled and checkpointed models
(`test_real_training`), frozen parameters, evaluation between steps, copies
(`test_optimizer`), fused layers (`test_fused_layers`).
"""

import gc
import tracemalloc
import warnings
from dataclasses import dataclass

import pytest
import torch
from dense_fisher import dense_fisher
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from kfac_torch import KFAC, FisherEstimator, LayerCollection
from kfac_torch.estimator import ESTIMATION_MODES

float64 = pytest.mark.usefixtures("float64")


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Inside(nn.Module):
    """A plain net inside another module, called in its own way."""

    def __init__(self, call, inner=None):
        super().__init__()
        self.inner, self.call = inner or net(), call

    def forward(self, x, labels=None):
        return self.call(self.inner, x, labels)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


def loop(layers, x, _):
    for layer in layers:
        x = layer(x)
    return x


def beside_no_grad(inner, x, _):
    with torch.no_grad():
        inner(x + 1)
        inner[0](2 * x)
    with torch.inference_mode():
        inner(3 * x)
    return inner(x)


def with_evaluation(inner, x, _):
    inner.eval()
    with torch.no_grad():
        inner(2 * x)
    inner.train()
    return inner(x)


def in_place(inner, x, _):
    s = inner[0](x)
    s.tanh_()
    z = inner[2](s)
    z += 0
    return z


def conditional(inner, x, _):
    return inner(x) if x.shape[0] else x


def with_loss(kind):
    def call(inner, x, labels):
        z = inner(x)
        loss = F.cross_entropy(z, labels)
        return {"dict": {"logits": z, "loss": loss}, "tuple": (loss, [z]),
                "dataclass": Output(z, loss)}[kind]  # fmt: skip

    return call


def plain(model, x, y):
    F.cross_entropy(model(x), y).backward()


def in_parts(model, x, y):
    parts = zip(x.split(4), y.split(4), strict=True)
    losses = [F.cross_entropy(model(a), b, reduction="sum") for a, b in parts]
    (sum(losses) / len(x)).backward()


def loss_of(get):
    def backward(model, x, y):
        get(model(x, labels=y)).backward()

    return backward


SAME = {  # makes the model; how it is run; options
    "a list of modules in a loop": (
        lambda: Inside(loop, nn.ModuleList(net())), plain, {}
    ),
    "calls without gradients beside": (lambda: Inside(beside_no_grad), plain, {}),
    "evaluation in the forward": (lambda: Inside(with_evaluation), plain, {}),
    "in-place activations": (lambda: Inside(in_place), plain, {}),
    "a branch": (lambda: Inside(conditional), plain, {}),
    "data parallel, without devices": (lambda: nn.DataParallel(net()), plain, {}),
    "several forwards, one backward": (net, in_parts, {}),
    "loss inside, a dict": (
        lambda: Inside(with_loss("dict")), loss_of(lambda out: out["loss"]),
        {"output": "logits"}
    ),
    "loss inside, a tuple": (
        lambda: Inside(with_loss("tuple")), loss_of(lambda out: out[0]),
        {"output": lambda out: out[1][0]}
    ),
    "loss inside, a dataclass": (
        lambda: Inside(with_loss("dataclass")), loss_of(lambda out: out.loss),
        {"output": "logits"}
    ),
}  # fmt: skip


def covs(optimizer):
    blocks = optimizer.estimator.blocks.values()
    return [factor.get_cov() for block in blocks for factor in block.factors]


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@float64
@pytest.mark.parametrize("mode", ["exact", "empirical"])
@pytest.mark.parametrize("name", SAME)
def test_statistics_and_steps_are_those_of_the_plain_model(name, mode):
    make, backward, options = SAME[name]
    x, y, start = torch.randn(8, 3), torch.randint(2, (8,)), net()
    found = []
    for each, run, more in ((net, plain, {}), (make, backward, options)):
        model = each()
        for p, q in zip(model.parameters(), start.parameters(), strict=True):
            p.data.copy_(q)
        optimizer = KFAC(
            model, "categorical", lr=0.1, damping=0.1, estimation_mode=mode, **more
        )
        for _ in range(3):
            optimizer.zero_grad()
            run(model, x, y)
            optimizer.step()
        optimizer.close()
        assert len(optimizer.estimator.blocks) == 2
        found.append([*model.parameters(), *covs(optimizer)])
    close(*found)


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = torch.jit.script(nn.Linear(3, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(x))


class OutputMajor(nn.Module):
    """A bare parameter, used as the weight of a linear layer."""

    def __init__(self):
        super().__init__()
        self.W, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(F.linear(x, self.W).tanh())


class Cond(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))
        return self.head(x.tanh())


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(3, 4, dtype=torch.complex64), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.mix(x.to(torch.complex64)).abs())


def normed():
    model = net()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


TOLD = {  # makes the model; the words; why its parameters have no block
    "torch.jit.script inside": (Scripted, r"by AdamW: inner\.bias, inner\.weight$",
                                "inner.weight", "torch.jit has compiled it"),
    "a weight that is a bare parameter": (OutputMajor, "by AdamW: W$", "W",
                                          "a parameter of OutputMajor itself"),
    "weight norm": (normed, r"by AdamW: 0\.bias, 0\.parametrizations", "0.bias",
                    "its weight is not a parameter"),
    "complex parameters": (Complex, r"by AdamW: mix\.bias, mix\.weight$", "mix.weight",
                           "its parameters are complex"),
}  # fmt: skip


def train(model, x, y, steps=20, **options):
    optimizer = KFAC(
        model, options.pop("loss", "categorical"), lr=0.3, damping=0.03, **options
    )
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.close()
    return optimizer, losses


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", TOLD)
def test_what_has_no_block_is_named_and_learns_by_another_rule(name):
    make, words, param, reason = TOLD[name]
    x = torch.randn(16, 3)
    with pytest.warns(UserWarning, match=words):
        optimizer, losses = train(make(), x, (x[:, 0] > 0).long())
    row = optimizer.report()[param]
    assert reason in row.reason
    assert row.updated_by == "AdamW"
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(ValueError, match=r"torch\.jit has compiled it.*torch\.compile"):
        KFAC(torch.jit.script(net()), "categorical", lr=0.1, damping=0.1)


def test_layers_inside_a_cond_are_told_to_be_missed():
    """Their calls are not seen by hooks, in the branch that was taken neither."""
    x = torch.randn(8, 3)
    with (
        pytest.warns(UserWarning, match="used beside the recorded calls"),
        pytest.warns(UserWarning, match=r"plain momentum: a\.bias, a\.weight, b\.bias"),
    ):
        optimizer, _ = train(Cond(), x, torch.randint(2, (8,)), steps=1)
    for name in ("a", "b"):
        assert "the factors miss 1" in optimizer.report()[name].notes[0]


def per_example(model, x):
    params = dict(model.named_parameters())
    return vmap(lambda one: functional_call(model, params, (one,)))(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (net(), per_example),
        lambda: (Inside(lambda inner, x, _: vmap(inner)(x)), lambda model, x: model(x)),
        lambda: (net(), lambda model, x: model.forward(x)),
    ],
    ids=["vmap of a functional call", "vmap inside", "forward"],
)
def test_calls_that_cannot_be_watched_are_an_error(make):
    (model, call), before = make(), None
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1)
    F.cross_entropy(call(model, torch.randn(8, 3)), torch.randint(2, (8,))).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"no statistics yet.*not under torch\.vmap"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.close()


def test_a_model_that_returns_its_loss_alone_is_an_error():
    model = Inside(lambda inner, x, labels: F.cross_entropy(inner(x), labels))
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1)
    with pytest.raises(ValueError, match="at least 2 dimensions, the batch first"):
        model(torch.randn(8, 3), torch.randint(2, (8,)))
    optimizer.close()


@float64
def test_a_bare_weight_can_have_its_exact_block():
    model, x = OutputMajor(), torch.randn(6, 3)
    layers = LayerCollection(model)
    layers.register_generic(model.W, "full")
    layers.register_categorical_predictive_distribution()
    (block,) = layers.get_blocks()
    dense = dense_fisher(model, x, layers, block)
    estimator = FisherEstimator(None, 0.0, 0.1, layers, estimation_mode="exact")
    model(x)
    estimator.update_covariances()
    estimator.close()
    close(block.full_fisher_block(), dense)


class Words(nn.Module):
    def __init__(self, one_hot):
        super().__init__()
        self.one_hot = one_hot
        self.embed = nn.Linear(5, 3, bias=False) if one_hot else nn.Embedding(5, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, ids):
        x = F.one_hot(ids, 5).to(torch.get_default_dtype()) if self.one_hot else ids
        return self.head(self.embed(x).tanh())


@float64
def test_an_embedding_by_one_hot_rows_has_the_block_of_one_by_index():
    blocks, ids = [], torch.randint(5, (8,))
    for one_hot in (False, True):
        torch.manual_seed(1)
        model = Words(one_hot)
        weight = torch.linspace(-1, 1, 15).view(5, 3)
        model.embed.weight.data = weight.T.contiguous() if one_hot else weight
        optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1, estimation_mode="exact")
        model.head.load_state_dict({"weight": weight[:2], "bias": weight[0, :2]})
        F.cross_entropy(model(ids), ids % 2).backward()
        optimizer.step()
        optimizer.close()
        blocks.append(optimizer.estimator.blocks["embed"].full_fisher_block())
    close(*blocks)


class Taking(nn.Module):
    """Turns between two layers."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head, self.turn = nn.Linear(3, 2), 0

    def forward(self, x):
        self.turn += 1
        return self.head(self.ways[self.turn % 2](x).tanh())


@float64
def test_a_layer_that_is_called_in_some_steps_only():
    """Its factors are of those steps, and it moves in no other."""
    model = Taking()
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1, estimation_mode="exact")
    rows = []
    for step in range(4):
        x = torch.randn(6, 3)
        rows.append(torch.cat([x, torch.ones(6, 1)], 1))
        before = [p.detach().clone() for p in model.ways[step % 2].parameters()]
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(2, (6,))).backward()
        optimizer.step()
        assert all(map(torch.equal, before, model.ways[step % 2].parameters()))
    optimizer.close()
    for way, (old, new) in enumerate([(rows[1], rows[3]), (rows[0], rows[2])]):
        A = optimizer.estimator.blocks[f"ways.{way}"].factors[0].get_cov()
        mean = (0.95 * old.T @ old + new.T @ new) / (6 * 1.95)
        close(A, mean)


@float64
def test_a_cell_in_a_loop_has_the_blocks_of_the_whole_layer():
    class Unrolled(nn.Module):
        def __init__(self, cell):
            super().__init__()
            self.cell = nn.GRUCell(3, 4) if cell else nn.GRU(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            if isinstance(self.cell, nn.GRU):
                return self.head(self.cell(x.transpose(0, 1))[0][-1])
            h = x.new_zeros(len(x), 4)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return self.head(h)

    x, y, found = torch.randn(6, 5, 3), torch.randint(2, (6,)), []
    start = [torch.randn_like(p) for p in Unrolled(True).parameters()]
    for cell in (True, False):
        model = Unrolled(cell)
        for p, q in zip(model.parameters(), start, strict=True):
            p.data.copy_(q)
        optimizer = KFAC(model, "categorical", lr=0.1, damping=0.1, estimation_mode="exact")
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.close()
        found.append([*covs(optimizer), *model.parameters()])
    close(*found)


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision(dtype):
    """Factors in float32, near those of the same net in float32."""
    x, start, found = torch.randn(32, 3), net(), []
    y = (x[:, 0] > 0).long()
    for each in (torch.float32, dtype):
        model = net().to(each)
        model.load_state_dict(start.state_dict())
        optimizer, losses = train(model, x.to(each), y, estimation_mode="exact")
        assert losses[-1] < 0.5 * losses[0]
        assert all(p.dtype == each for p in model.parameters())
        assert all(cov.dtype == torch.float32 for cov in covs(optimizer))
        found.append(covs(optimizer)[0])
    close(found[1], found[0], atol=0.02)


def test_a_tied_head_under_autocast():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.head(self.words(ids).tanh())

    ids = torch.randint(5, (32,))
    optimizer, losses = train(Tied(), ids, (ids + 1) % 5)
    assert list(optimizer.estimator.blocks) == ["words"]
    assert losses[-1] < 0.6 * losses[0]
    assert all(cov.dtype == torch.float32 for cov in covs(optimizer))


# What remains.


class Everything(nn.Module):
    """Layers of many kinds, so that every kind of hook is set."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scan, self.scale = nn.GRU(4, 4, batch_first=True), nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        x = self.norm(self.words(ids))
        x = x + self.conv(x.mT).mT.tanh()
        x = self.scan(x + self.mix(x, x, x)[0])[0] * self.scale
        return self.head(x[:, -1])


def watched(mode, model=None, **options):
    model = model or Everything()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_generic(model.scale)
    layers.register_categorical_predictive_distribution()
    options = {"lr": 0.01, "damping": 1.0} | options
    return model, KFAC(model, layer_collection=layers, estimation_mode=mode, **options)


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
             "_backward_pre_hooks")  # fmt: skip
    of_modules = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    return of_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("end", ["close", "collection", "failed forward"])
@pytest.mark.parametrize("lr", [0.01, None])
@pytest.mark.parametrize("mode", [None, *ESTIMATION_MODES])
def test_no_hook_of_any_kind_remains(mode, lr, end):
    """None is what is chosen where nothing is given."""
    model, optimizer = watched(mode, lr=lr)
    ids = torch.randint(5, (4, 3))
    F.cross_entropy(model(ids), ids[:, 0] % 3).backward()
    optimizer.step()
    assert hooks(model) > 0
    if end == "failed forward":
        with pytest.raises(IndexError):
            model(ids + 5)
    if end == "collection":
        del optimizer
        gc.collect()
    else:
        optimizer.close()
    assert hooks(model) == 0
    model(ids)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.layer(x) * self.scale


def live_tensors():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what looking at some objects says
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize(
    ("mode", "idle"), [("gradients", True), ("empirical", False)],
    ids=["forwards without backward", "plain"],
)  # fmt: skip
def test_memory_is_flat_over_a_thousand_steps(mode, idle):
    """Statistics and inverses due every step; Python's objects and live tensors."""
    model, optimizer = watched(mode, Scaled(), invert_every=1)
    x, y = torch.randn(4, 3), torch.randint(2, (4,))

    def steps(number):
        for _ in range(number):
            optimizer.zero_grad()
            if idle:
                model(x)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    steps(500)
    tensors = live_tensors()
    tracemalloc.start()
    try:
        steps(150)  # what was there before is replaced by what is traced
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        steps(350)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert live_tensors() <= tensors
    assert after - before < 350 * 48  # less than the smallest object for each step
    optimizer.close()
