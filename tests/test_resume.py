"""A run interrupted at any step and resumed is the run that was not, bit for bit."""

import copy
import io
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kfac_torch import KFAC, LevenbergMarquardt, RelativeDamping, SizeLimit
from kfac_torch.approximations import APPROXIMATIONS
from kfac_torch.layer_choice import Layers
from kfac_torch.options import QModel, Statistics, TrustRegion

CLASSES, BATCH = 3, 8


def plain(t):
    return torch.randn(BATCH, 4, generator=t)


def images(t):
    return torch.randn(BATCH, 2, 4, 4, generator=t)


def words(t):
    return torch.randint(6, (BATCH, 5), generator=t)


class Mean(nn.Module):
    """Over a sequence; of what an LSTM returns the first."""

    def forward(self, x):
        return (x[0] if isinstance(x, tuple) else x).mean(1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.embedding(x)
        return self.head(self.attention(x, x, x)[0].mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.inner(self.embedding(x)).tanh().mean(1))


def dropout():
    """With a layer whose random numbers are the global ones, and buffers."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, CLASSES)
    )


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES)
    )


def recurrent():
    return nn.Sequential(
        nn.Embedding(6, 4), nn.LSTM(4, 3, batch_first=True), Mean(), nn.Linear(3, CLASSES)
    )


def sequential(*layers):
    return lambda: nn.Sequential(*copy.deepcopy(layers))


# By kind of layer: a net with it, and its inputs. A new approximation needs no row.
KINDS = {
    "fully_connected": (sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), plain),
    "conv2d": (convolutions, images),
    "depthwise_conv2d": (
        sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(8, 3)),
        images,
    ),
    "embedding_bag": (sequential(nn.EmbeddingBag(6, 4), nn.Linear(4, 3)), words),
    "scale_and_shift": (
        sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)),
        plain,
    ),
    "tied_embedding": (Tied, words),
    "attention": (Attention, words),
    "recurrent": (recurrent, words),
}
APPROXIMATED = [(kind, approx) for kind in KINDS for approx in APPROXIMATIONS[kind]]

CLASSIC = {"lr": 0.1, "damping": 0.01}
ADAPTIVE = {"damping": LevenbergMarquardt(initial=0.1, decay=0.8, interval=3), "lr": 0.1}
# Which options make the steps; each on a net with dropout, whatever else it is about.
OPTIONS = {
    "automatic": {},
    "regular": CLASSIC,
    "adam": {**CLASSIC, "momentum_type": "adam", "weight_decay": 0.01},
    "qmodel": {"damping": 0.1, "momentum_type": "qmodel"},
    "qmodel_fixedmu": {"damping": 0.1, "momentum_type": "qmodel_fixedmu", "momentum": 0.5},
    "part of the batch": {
        "momentum_type": QModel(batch_fraction=0.5, min_terms=1, max_momentum=0.9),
        "norm_constraint": TrustRegion(fraction=0.2),
        "damping": RelativeDamping(LevenbergMarquardt(initial=1.0, calibrate=True)),
    },
    "averaged gradients": {
        "momentum_type": QModel(max_momentum=None),
        "damping": RelativeDamping(LevenbergMarquardt(initial=1.0, reject_below=0.25)),
    },
    "statistics of a part": {
        **CLASSIC,
        "estimation_mode": Statistics(batch_fraction=0.5, min_terms=1),
    },
    "statistics in a forward of their own": {
        **CLASSIC,
        "estimation_mode": Statistics(rerun_above=0),
    },
    "a schedule": {"lr": 0.1, "damping": lambda step: 0.1 / (1 + step)},
    "adaptive": ADAPTIVE,
    # With steps on either side: the test sees to that.
    "taken back": {
        "lr": 2.0,
        "norm_constraint": None,
        "approx": {"1": "adamw"},
        "damping": LevenbergMarquardt(initial=1e-3, decay=0.5, reject_below=0.25),
    },
    "taken back, modelled": {
        "momentum_type": replace(QModel.exact(), batch_fraction=0.5),
        "norm_constraint": None,
        "damping": RelativeDamping(
            LevenbergMarquardt(initial=1e-3, decay=0.5, interval=1, reject_below=0.25)
        ),
    },
    "curvature_prop": {**CLASSIC, "estimation_mode": "curvature_prop"},
    "exact": {**CLASSIC, "estimation_mode": "exact"},
    "empirical": {**CLASSIC, "estimation_mode": "empirical"},
    "burn-in": {**CLASSIC, "num_burnin_steps": 4},
    "rarely": {**CLASSIC, "cov_update_every": 3, "invert_every": 7},
    "split": {**CLASSIC, "approx": Layers(size_limit=SizeLimit(3))},
    "low_rank": {**CLASSIC, "approx": Layers(size_limit=SizeLimit(3, above="low_rank"))},
    "diagonal sides": {
        **CLASSIC,
        "approx": Layers(size_limit=SizeLimit(3, above="diagonal")),
    },
    "others by AdamW": {**CLASSIC, "approx": {"0": "adamw"}},
    "others by SGD": {**CLASSIC, "approx": {"0": "sgd"}},
    "accumulation": {**CLASSIC, "num_micro_batches": 2},
}


def run(model, optimizer, data, records, micro=1):
    """Train; tell what each step did, and the parameters behind it."""
    for x, y in data:
        optimizer.zero_grad()
        for part in zip(x.chunk(micro), y.chunk(micro), strict=True):
            (cross_entropy(model(part[0]), part[1]) / micro).backward()
        optimizer.step()
        records.append((repr(optimizer.last_step), [p.clone() for p in model.parameters()]))
        yield


def saved(model, optimizer):
    file = io.BytesIO()
    state = [model.state_dict(), optimizer.state_dict(), torch.get_rng_state()]
    torch.save(state, file)
    return file.getvalue()


def loaded(file):
    return torch.load(io.BytesIO(file), weights_only=True)


def differing(a, b, place=""):
    """Where two states are not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differing(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (u, v) in pairs for d in differing(u, v, f"{place}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [place]


def check_resumed(net, inputs, options, steps, ahead):
    """Interrupt at every step, go on for some, and compare with the whole run."""
    options = {"cov_update_every": 2, "invert_every": 3, **options}
    micro = options.pop("num_micro_batches", 1)
    t = torch.Generator().manual_seed(1)
    data = [(inputs(t), torch.randint(CLASSES, (BATCH,), generator=t)) for _ in range(3)]
    data = [data[n % 3] for n in range(steps)]
    model, records = net(), []
    fresh = copy.deepcopy(model)
    optimizer = KFAC(model, "categorical", **options)
    states = [saved(model, optimizer)]
    for _ in run(model, optimizer, data, records, micro):
        states.append(saved(model, optimizer))
    first = records[0][1]
    assert not all(torch.equal(a, b) for a, b in zip(first, records[-1][1], strict=True))
    for stop in range(steps):
        twin = copy.deepcopy(fresh)
        resumed = KFAC(twin, "categorical", **options)
        weights, state, rng = loaded(states[stop])
        twin.load_state_dict(weights)
        resumed.load_state_dict(state)
        torch.set_rng_state(rng)
        assert not differing(loaded(saved(twin, resumed)), [weights, state, rng])
        again, end = [], min(steps, stop + ahead)
        for _ in run(twin, resumed, data[stop:end], again, micro):
            pass
        assert not differing(again, records[stop:end]), f"interrupted after {stop} steps"
        assert not differing(loaded(saved(twin, resumed)), loaded(states[end]))
        resumed.close()
    return [record for record, _ in records]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "these parameters have no K-FAC block")
        yield


@pytest.mark.parametrize(("name", "ahead"), [("automatic", 8), ("regular", 30)])
def test_a_run_of_thirty_steps_interrupted_anywhere(name, ahead):
    check_resumed(dropout, plain, OPTIONS[name], 30, ahead)


class InPlace(nn.Module):
    """Works in place, which forward mode by rules refuses, where the inputs say so."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        y = self.inner(x)
        return self.head(y.tanh_() if x[0, 0] > 0 else y.tanh())


def test_refusals_of_forward_mode_by_rules():
    """Of a model, and of two of three batches: the third goes the way of those too."""
    check_resumed(recurrent, words, OPTIONS["automatic"], 8, 4)
    signs = iter([1, 1, -1])

    def inputs(t):
        x = plain(t)
        x[0, 0] = next(signs) * x[0, 0].abs()
        return x

    check_resumed(InPlace, inputs, OPTIONS["automatic"], 8, 4)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_step(name):
    records = check_resumed(dropout, plain, OPTIONS[name], 10, 4)
    rejected = {"rejected=True" in record for record in records}
    assert rejected == ({False, True} if name.startswith("taken back") else {False})


@pytest.mark.parametrize(("kind", "approx"), APPROXIMATED)
def test_every_approximation(kind, approx):
    net, inputs = KINDS[kind]
    choice = {"approx": approx}
    if kind != "fully_connected":  # that of the layers in question alone
        types = {
            "conv2d": nn.Conv2d,
            "depthwise_conv2d": nn.Conv2d,
            "embedding_bag": nn.EmbeddingBag,
            "scale_and_shift": nn.LayerNorm,
            "tied_embedding": nn.Embedding,
            "attention": nn.MultiheadAttention,
            "recurrent": nn.LSTM,
        }
        choice = {"approx": {types[kind]: approx}}
    check_resumed(net, inputs, {**CLASSIC, **choice}, 6, 2)
