"""The report: its figures against what the factors hold, its words against the model."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from test_layer_collection import REGISTER, Zoo
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kfac_torch import KFAC, FisherEstimator, LayerCollection, SizeLimit, coverage
from kfac_torch.approximations import APPROXIMATIONS
from kfac_torch.fisher_factors import FactorOptions
from kfac_torch.layer_choice import Layers

ROOT = Path(__file__).parent.parent
INPUTS = {
    "linear": lambda: torch.randn(6, 2),
    "conv2": lambda: torch.randn(6, 2, 5, 5),
    "transposed": lambda: torch.randn(6, 2, 3, 3),
    "depthwise": lambda: torch.randn(6, 4, 5, 5),
    "embedding": lambda: torch.randint(5, (6,)),
    "norm": lambda: torch.randn(6, 3),
    "bag": lambda: torch.randint(5, (6, 3)),
    "bilinear": lambda: torch.randn(6, 2),
    "tied.0": lambda: torch.randint(5, (6,)),
    "attention": lambda: torch.randn(6, 3, 4),
    "gru": lambda: torch.randn(6, 3, 2),
}
EVERY = [
    (kind, approx, above)
    for kind in REGISTER
    for approx in APPROXIMATIONS[kind]
    for above in (None, "split", "diagonal", "low_rank")
]


class Alone(nn.Module):
    """One layer, and rows for its output."""

    def __init__(self, name, calls=1):
        super().__init__()
        layer = Zoo().layer(name)
        self.layer = nn.ModuleList(layer) if isinstance(layer, list) else layer
        self.calls = calls

    def forward(self, x):
        return sum(self.call(x) for _ in range(self.calls)).flatten(1)

    def call(self, x):
        if isinstance(self.layer, nn.ModuleList):
            return self.layer[1](self.layer[0](x))
        if isinstance(self.layer, nn.Bilinear):
            return self.layer(x, x)
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x)[0]
        return self.layer(x)[0] if isinstance(self.layer, nn.GRU) else self.layer(x)


def held_bytes(factor):
    """Of the tensors that a factor holds, wherever they are in it."""
    found, todo, seen = 0, [vars(factor)], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found += value.numel() * value.element_size()
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif hasattr(value, "tensors"):
            todo.append(value.tensors)
    return found


def trained(layers, x, exps=(-1,)):
    estimator = FisherEstimator(None, 0.9, 0.1, layers, exps=exps)
    layers.model(x).sum().backward()
    assert estimator.update_covariances() == []
    estimator.update_inverses()
    return estimator


def registered(kind, approx, above=None, calls=1, options=FactorOptions()):
    method, name = REGISTER[kind]
    model = Alone(name, calls)
    limit = above and SizeLimit(2, above=above)
    layers = LayerCollection(model, options, size_limit=limit)
    layer = list(model.layer) if kind == "tied_embedding" else model.layer
    getattr(layers, method)(layer, approx)
    layers.register_normal_predictive_distribution()
    return layers, INPUTS[name]()


# Figures.


@pytest.mark.parametrize(("kind", "approx", "above"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_known_before_it_is_taken(kind, approx, above, dtype):
    torch.set_default_dtype(dtype)
    layers, x = registered(kind, approx, above, calls=2 if "series" in approx else 1)
    planned = layers.report().layers
    assert not layers.get_factors()
    estimator = trained(layers, x)
    rows = layers.report().layers
    for before, row in zip(planned, rows, strict=True):
        held = sum(held_bytes(factor) for factor in layers.blocks[row.name].factors)
        assert before.nbytes == row.nbytes == held > 0
        assert before.factors == row.factors
        assert before.refresh_cost == row.refresh_cost
        assert before.batch_cost is None
        assert row.batch_cost >= row.row_cost > 0
    estimator.close()


@pytest.mark.parametrize("exps", [(-1, -0.5), (-0.5, 0.5), (1, -1)])
@pytest.mark.parametrize("above", [None, "split", "low_rank"])
def test_memory_of_other_powers(exps, above):
    layers, x = registered("fully_connected", "kron", above)
    before = layers.report().nbytes
    trained(layers, x, exps)
    held = sum(held_bytes(factor) for factor in layers.get_factors())
    assert layers.report().nbytes == held
    assert (held > before) == (exps != (1, -1))


def test_memory_of_cholesky_factors():
    layers, x = registered("fully_connected", "kron")
    estimator = FisherEstimator(None, 0.9, 0.1, layers)
    estimator.register_cholesky()
    layers.model(x).sum().backward()
    estimator.update_covariances()
    estimator.update_inverses()
    held = sum(held_bytes(factor) for factor in layers.get_factors())
    assert layers.report().nbytes == held == 4 * 3 * (9 + 9)


def test_half_precision_accumulates_in_float32():
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    layers = LayerCollection(model)
    layers.auto_register_layers()
    report = layers.report()
    assert (report.nbytes, report.model_nbytes) == (4 * 2 * (16 + 4), 2 * 8)


def test_costs_by_hand():
    """Linear 3 -> 2 and a grouped convolution: n² a row, n³ an inverse, per matrix."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 2))
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_normal_predictive_distribution()
    conv, linear = layers.report().layers
    assert conv.factors == ("2 x full 19", "2 x full 3")
    assert conv.row_cost == 2 * (19**2 + 3**2)
    assert conv.refresh_cost == 2 * (19**3 + 3**3)
    assert conv.nbytes == 4 * 2 * 2 * (19**2 + 3**2)
    assert (linear.row_cost, linear.refresh_cost) == (7**2 + 2**2, 7**3 + 2**3)
    assert linear.share == 14 / (14 + 6 * 18 + 6)
    FisherEstimator(None, 0.9, 0.1, layers)  # a batch has one location for each of 8
    optimizer = KFAC(model, "normal", lr=0.1, damping=0.1)
    for part in torch.randn(8, 4, 3, 3).split(4):
        model(part).sum().backward()
    optimizer.step()
    report = optimizer.report()
    assert [row.batch_cost for row in report.layers] == [8 * conv.row_cost, 8 * 53]
    assert report.batch_cost == 8 * (conv.row_cost + 53)


def test_a_generic_block_costs_the_same_whatever_the_rows():
    layers, x = registered("generic", "full")
    trained(layers, x)
    (row,) = layers.report().layers
    assert row.batch_cost == row.row_cost == row.num_params**2


def test_low_rank_and_uncorrelated_locations_refresh_small_matrices():
    layers = LayerCollection(
        nn.Linear(999, 9), size_limit=SizeLimit(64, above="low_rank", rank=4)
    )
    layers.auto_register_layers()
    (row,) = layers.report().layers
    assert row.refresh_cost == 3 * 1000 * 9**2 + 18 * 9**3 + 9**3
    assert row.row_cost == 2 * 1001 * 9 + 9**2
    layers = LayerCollection(nn.Conv2d(8, 2, 5))
    layers.register_convolution(layers.model, "kron_sua")
    assert layers.report().layers[0].refresh_cost == 8**3 + 2**3


def test_a_report_makes_nothing_large():
    """A side of a million features has a report, and advice."""
    with torch.device("meta"):
        model = nn.Linear(10**6, 4)
    layers = LayerCollection(model)
    layers.register_fully_connected(model)
    (row,) = layers.report().layers
    assert row.nbytes == 4 * 2 * (1000001**2 + 16)
    assert "a matrix of 1000001 x 1000001" in row.notes[0]


# Advice.


class Large(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, 2, bias=False)
        self.embedding = nn.Embedding(9, size)
        self.conv = nn.Conv1d(size // 4, 2, 4, bias=False)
        self.norm = nn.LayerNorm(size // 2)
        self.scale = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        raise NotImplementedError


def large(size, limit=None):
    layers = LayerCollection(Large(size), size_limit=limit)
    layers.register_scale_and_shift(layers.model.norm, "full")
    layers.auto_register_layers()
    layers.register_generic(layers.model.scale, "full")
    layers.auto_register_layers()
    return layers.report()


@pytest.fixture
def small_sides(monkeypatch):
    monkeypatch.setattr(coverage, "MAX_SIDE", 16)


def test_advice_from_a_size_on(small_sides):
    assert not [row.name for row in large(16).layers if row.notes]
    notes = {row.name: "".join(row.notes) for row in large(20).layers}
    assert set(notes) == {"linear", "embedding", "conv", "norm", "scale"}
    for name, text in notes.items():
        assert re.match(rf"{name}[\w.]* is large, a matrix of 20 x 20, 3.12 KiB", text)
    for name in ("linear", "embedding", "conv", "norm"):
        assert ("size_limit=SizeLimit(1024)" in notes[name]) == (name != "norm")
    assert 'approx="kron_in_diag"' in notes["linear"]
    assert 'approx="kron_out_diag"' in notes["embedding"]
    assert 'approx="diagonal"' in notes["norm"]
    assert 'approx="diagonal"' in notes["scale"]


@pytest.mark.parametrize("above", ["split", "diagonal", "low_rank"])
def test_advice_that_is_taken_is_not_given_again(small_sides, above):
    limited = large(20, SizeLimit(16, above=above))
    assert [row.name for row in limited.layers if row.notes] == ["scale"]


def test_a_limit_that_is_too_large(small_sides):
    (note,) = large(20, SizeLimit(30))["linear"].notes
    assert "a smaller max_size" in note


def test_the_advice_of_a_side_names_an_approximation_that_helps(small_sides):
    model = nn.Sequential(nn.Linear(20, 2), nn.Linear(2, 20))
    for approx, row in (("kron_in_diag", 0), ("kron_out_diag", 1)):
        layers = LayerCollection(model)
        layers.register_fully_connected(model[row], approx)
        assert not layers.report().layers[0].notes


def test_advice_by_memory(monkeypatch):
    """8 times the model, but not if that is little."""
    layers = LayerCollection(nn.Linear(400, 1))
    layers.auto_register_layers()
    assert not layers.report().layers[0].notes
    monkeypatch.setattr(coverage, "SMALL", 0)
    (note,) = layers.report().layers[0].notes
    assert "1.23 MiB, 802 times the model" in note
    layers = LayerCollection(nn.Linear(400, 400))
    layers.auto_register_layers()
    assert not layers.report().layers[0].notes


def test_advice_for_a_chain(small_sides):
    layers = LayerCollection(nn.Linear(20, 2))
    layers.register_fully_connected_multi(layers.model, "kron_series_1")
    assert 'approx="kron_indep"' in layers.report().layers[0].notes[0]


# What has no block.


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(3))
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.rnn = nn.GRU(3, 2)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.partly = nn.Linear(3, 3)
        self.partly.weight.requires_grad_(False)
        self.left = nn.Linear(3, 3)
        self.bare = nn.ParameterList([nn.Parameter(torch.ones(()))])
        self.a, self.b = nn.Linear(3, 5), nn.Bilinear(3, 3, 5)
        self.b.bias = self.a.bias
        self.unused = nn.Linear(3, 3)

    def forward(self, ids):
        x = self.norm(self.embedding(ids)) + self.offset * self.bare[0]
        y, _ = self.rnn(x[:, None])
        x = self.left(self.partly(self.frozen(x))) + y.sum()
        return self.a(x) + self.b(x, x)


def mixed():
    model = Mixed()
    layers = LayerCollection(model)
    layers.register_embedding(model.embedding)
    layers.register_fully_connected(model.left)
    layers.register_fully_connected(model.unused)
    layers.register_categorical_predictive_distribution()
    return model, layers


def test_rows_are_in_the_models_order_and_have_all_of_it():
    model, layers = mixed()
    report = layers.report()
    names = [name for name, _ in model.named_parameters()]
    found = []
    for row in report.rows:
        own = names if isinstance(row, coverage.OtherReport) else []
        found += [name for name in own if name == row.name]
        if isinstance(row, coverage.LayerReport):
            found += [name for name in names if name.startswith(row.name + ".")]
    assert found == names
    assert sum(row.num_params for row in report.rows) == report.num_params
    assert sum(row.share for row in report.rows) == pytest.approx(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert report.num_trained == sum(p.numel() for p in trained)
    assert report.adamw_nbytes == 8 * report.num_trained
    assert report.covered == (15 + 12 + 12) / report.num_trained


def test_why_there_is_no_block():
    model, layers = mixed()
    layers._choices = Layers(exclude=["a"], approx={"offset": "sgd"}).resolve(model)
    report = layers.report()
    for name, reason, by in (
        ("offset", "a parameter of Mixed itself", "plain momentum"),
        ("norm.weight", "BatchNorm1d: .* register_scale_and_shift", "AdamW"),
        ("rnn.weight_ih_l0", "GRU: not registered", "AdamW"),
        ("frozen.weight", "frozen", "nothing: frozen"),
        ("partly.weight", "frozen", "nothing: frozen"),
        ("partly.bias", "the weight of its Linear is frozen", "AdamW"),
        ("bare.0", "a bare parameter", "AdamW"),
        ("a.bias", "excluded", "another optimizer"),
        ("a.weight", "excluded", "another optimizer"),
        ("b.weight", "Bilinear: not registered", "AdamW"),
    ):
        row = report[name]
        assert re.match(reason, row.reason), (name, row.reason)
        assert row.updated_by == by
    with pytest.raises(KeyError, match="nothing: expected one of"):
        report["nothing"]


def test_reasons_that_are_known():
    model, layers = mixed()
    report = coverage.coverage_report(
        model, layers.blocks, layers.use_watch, {}, {"rnn": "fused", "offset": "so"}
    )
    assert (report["rnn.bias_ih_l0"].reason, report["offset"].reason) == ("fused", "so")
    assert report["offset"].updated_by == "the optimizer"
    shared = r"shared by a \(Linear\) and b \(Bilinear\), with no block for both"
    assert re.match(shared, report["a.bias"].reason)


def test_unused_parameters():
    model, layers = mixed()
    optimizer = KFAC(model, layer_collection=layers, lr=0.1, damping=0.1)
    assert not layers.use_watch.counted
    model(torch.randint(5, (4,))).sum().backward()
    report = optimizer.report()
    unused = [row.name for row in report.rows if "did not depend" in "".join(row.notes)]
    assert unused == ["unused"]
    assert (report["left"].uses, report["left"].calls) == (1, 1)
    assert report["offset"].updated_by == "AdamW"


# Uses against calls.


def backward(model, x, loss="normal", register=LayerCollection.auto_register_layers):
    layers = LayerCollection(model)
    register(layers)
    optimizer = KFAC(model, loss, layers, lr=0.1, damping=0.1)
    model(x).square().sum().mul(0.5 / len(x)).backward()
    return optimizer


class Reused(nn.Module):
    """A layer that is called once, and used twice more beside."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = functional.linear(self.other(self.layer(x)), self.layer.weight)
        return self.layer.forward(torch.tanh(x))


def test_uses_beside_the_calls_are_said_once():
    model, x = Reused(), torch.randn(4, 3)
    said = r"layers: layer \(3 uses, 1 recorded calls\)\. .* register_generic.*_multi"
    with pytest.warns(UserWarning, match=said) as caught:
        optimizer = backward(model, x)
    assert len(caught) == 1
    report = optimizer.report()
    (note,) = report["layer"].notes
    assert "used 3 times in the graph, seen 1 time: the factors miss 2" in note
    assert not report["other"].notes
    optimizer.step()
    model(x).sum().backward()  # not again
    assert "the factors miss 2" in " ".join(str(optimizer.report()).split())


def test_the_remedy_helps():
    def register(layers):
        layers.register_generic(layers.model.layer)
        layers.auto_register_layers()

    optimizer = backward(Reused(), torch.randn(4, 3), register=register)
    row = optimizer.report()["layer"]
    assert (row.uses, row.calls, row.notes) == (3, None, ())


def test_a_layer_that_is_never_called():
    class Bypassed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a.forward(x))

    with pytest.warns(UserWarning, match=r"a \(1 uses, 0 recorded calls\)"):
        backward(Bypassed(), torch.randn(4, 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.a(x))))


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1, padding_mode="circular", padding=1)
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        h = self.linear(x)
        h += x
        h.relu_()
        return self.conv(h.mT).relu_().flatten(1)


class Cast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


ALL_SEEN = {
    "tied": (Tied, (4, 3), {"a": 3}),
    "checkpointed": (lambda: Checkpointed(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
                     (4, 3), {"0": 1, "2": 1}),
    "in place": (InPlace, (4, 5, 3), {"conv": 1, "linear": 1}),
    "autocast": (lambda: Cast(nn.Linear(3, 3), nn.Linear(3, 3)), (4, 3), {"0": 1, "1": 1}),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 2)),
                (4, 3), {"0": 1, "2": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_SEEN)
def test_all_uses_are_seen(name):
    make, shape, uses = ALL_SEEN[name]
    report = backward(make(), torch.randn(shape)).report()
    assert {row.name: row.uses for row in report.layers} == uses
    assert {row.name: row.calls for row in report.layers} == uses
    assert not any(row.notes for row in report.rows)


def test_forwards_of_one_step_are_counted_together():
    """The second one's graph has the first in it."""
    model = nn.Linear(3, 3)
    optimizer = KFAC(model, "normal", lr=0.1, damping=0.1)
    z = model(torch.randn(4, 3))
    model(torch.tanh(z)).sum().backward()
    row = optimizer.report()["model"]
    assert (row.uses, row.calls) == (2, 2)


def test_a_step_without_its_own_calls_is_not_counted():
    model = nn.Linear(3, 3)
    optimizer = KFAC(model, "normal", lr=0.1, damping=0.1)
    model.eval()
    model(torch.randn(4, 3)).sum().backward()
    assert not optimizer.estimator.layers.use_watch.counted
    model.train()
    model(torch.randn(4, 3)).sum().backward()
    assert optimizer.report()["model"].calls == 1


def test_counting_is_done_once(monkeypatch):
    from kfac_torch import use_count

    calls = []
    original = use_count.count_uses
    monkeypatch.setattr(
        use_count, "count_uses", lambda outputs: calls.append(1) or original(outputs)
    )
    model = nn.Linear(3, 3)
    optimizer = KFAC(model, "normal", lr=0.1, damping=0.1)
    for _ in range(3):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    assert calls == [1]


def pinn_step(optimizer, net, x):
    u = net(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    ((du - 1).square().mean() + u.square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["gradients", "empirical"])
def test_a_network_that_is_differentiated_inside_its_loss(mode):
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = KFAC(net, "normal", lr=0.1, damping=0.1, estimation_mode=mode)
    x = torch.randn(6, 1, requires_grad=True)
    said = "differentiated inside its own loss .*not of its derivatives"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pinn_step(optimizer, net, x)
        pinn_step(optimizer, net, x)
    found = [w for w in caught if re.search(said, str(w.message))]
    assert len(found) == 1
    report = optimizer.report()
    assert "factors are of the output, not of its derivatives" in report.notes[0]
    assert "! the network is differentiated inside its own loss" in str(report)
    assert (report["0"].uses, report["0"].calls) == (1, 1)


def test_derivatives_in_the_output_are_uses():
    class WithDerivative(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x):
            u = self.net(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            return torch.cat([u, du], 1)

    x = torch.randn(6, 1, requires_grad=True)
    with pytest.warns(UserWarning, match="beside the recorded calls"):
        report = backward(WithDerivative(), x).report()
    row = report["net.0"]
    assert row.uses > row.calls == 1
    assert not report.notes


# The text.


def test_the_text_fits_and_names_every_row():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_module_whose_name_is_very_long_indeed = nn.Conv2d(4, 8, 3, groups=2)
            self.norm = nn.LayerNorm(3000)

    layers = LayerCollection(Long(), size_limit=SizeLimit(10, above="split"))
    layers.auto_register_layers()
    lines = str(layers.report()).splitlines()
    assert max(map(len, lines)) <= coverage.WIDTH
    assert "split" in str(layers.report())
    text = str(large(8192))
    assert max(map(len, text.splitlines())) <= coverage.WIDTH
    assert text.count("  ! ") == 5
    text = str(mixed()[1].report())
    for row in mixed()[1].report().rows:
        assert row.name in text
    assert "nothing: frozen" in text
    assert "GRU: not registered; updated by AdamW" in text


def test_the_share_is_not_rounded_up_to_all():
    model = nn.Sequential(nn.Linear(100, 100), nn.PReLU())
    layers = LayerCollection(model)
    layers.auto_register_layers()
    assert "99.9% of" in str(layers.report())


def test_the_report_in_the_docs_is_the_one_that_is_printed(capsys):
    page = (ROOT / "docs" / "report.md").read_text()
    pairs = re.findall(r"```python\n(.*?)```\s+```text\n(.*?)```", page, flags=re.DOTALL)
    assert len(pairs) >= 2
    namespace = {}
    for code, expected in pairs:
        exec(code, namespace)
        assert capsys.readouterr().out == expected
