"""`check_curvature`: its figures against dense matrices, its verdicts, what it leaves."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch
from dense_fisher import dense_fisher
from torch import nn
from torch.nn import functional

import kfac_torch.exact_blocks
from kfac_torch import KFAC, LayerCollection, check_curvature
from kfac_torch.estimator import FisherEstimator
from kfac_torch.fisher_blocks import FullyConnectedKFACBasicFB
from kfac_torch.fisher_factors import FactorOptions, SubSampling

float64 = pytest.mark.usefixtures("float64")


def tanh_net():
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)
    )


def linear_net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 2))


def conv_net(groups=1):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=groups), nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    )  # fmt: skip


class Tokens(nn.Module):
    """An embedding, a norm and a linear layer over tokens; one output per example."""

    def __init__(self, padding=None):
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=padding)
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids):
        hidden = torch.tanh(self.linear(self.norm(self.embedding(ids))))
        return self.head(hidden.mean(1))


class Sequences(nn.Module):
    """A recurrent layer, and attention to all positions but the first of several."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x, _ = self.gru(x, torch.ones(1, len(x), 4))
        keys = x[:, -max(1, x.shape[1] - 1) :]
        return self.head(self.mix(x, keys, keys)[0].mean(1))


IN_SEQUENCES = ("gru.ih_l0", "gru.hh_l0", "mix.in_proj", "mix.out_proj")


def everything(model):
    layers = LayerCollection(model)
    layers.auto_register_layers()
    return layers


def of_tokens(linear, norm, embedding="kron"):
    def register(model):
        layers = LayerCollection(model)
        layers.register_embedding(model.embedding, embedding)
        layers.register_scale_and_shift(model.norm, norm)
        layers.register_fully_connected(model.linear, linear)
        layers.register_generic(model.head, "full")
        return layers

    return register


def of_sequences(model):
    layers = LayerCollection(model)
    layers.register_recurrent(model.gru)
    layers.register_multihead_attention(model.mix)
    return layers


def of_middle(approx):
    def register(model):
        layers = LayerCollection(model)
        layers.register_fully_connected(model[2], approx)
        return layers

    return register


def ids(*shape):
    return torch.randint(5, shape)


# What theory expects: name -> (model, batch, loss, registration, {layer: expected, why})
ONE, ALL = "there is one row", "all rows have the same G and do not interact"
CASES = {
    "one datum": (
        tanh_net, lambda: torch.randn(1, 3), "categorical", everything,
        {"0": (True, ONE), "2": (True, ONE), "4": (True, ONE)},
    ),
    "linear net": (
        linear_net, lambda: torch.randn(6, 3), nn.MSELoss(), everything,
        {"0": (True, ALL), "1": (True, ALL), "2": (True, ALL)},
    ),
    "linear net over tokens": (
        linear_net, lambda: torch.randn(3, 4, 3), "normal", everything,
        {"0": (True, ALL), "1": (True, ALL), "2": (True, ALL)},
    ),
    "one convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1)),
        lambda: torch.randn(4, 2, 5, 6), nn.MSELoss(), everything, {"0": (True, ALL)},
    ),
    "one convolution, groups": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2)),
        lambda: torch.randn(4, 4, 5), nn.MSELoss(), everything, {"0": (True, ALL)},
    ),
    "groups that are mixed": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Conv1d(6, 3, 1)),
        lambda: torch.randn(4, 4, 5), nn.MSELoss(), everything,
        {"0": (False, "rows or groups"), "1": (True, ALL)},
    ),
    "padding": (
        lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=3), nn.Linear(3, 2)),
        lambda: torch.tensor([0, 3, 3, 1, 3, 1]), "normal", everything,
        {"0": (True, ALL), "1": (True, ALL)},
    ),
    "classifier": (
        tanh_net, lambda: torch.randn(6, 3), "categorical", everything,
        dict.fromkeys("024", (False, "rows differ")),
    ),
    "conv net": (
        conv_net, lambda: torch.randn(4, 2, 5, 5), nn.CrossEntropyLoss(), everything,
        {"0": (False, "interact"), "2": (False, "interact"), "5": (False, "rows differ")},
    ),
    "tokens, full": (
        Tokens, lambda: ids(4, 3), "bernoulli", of_tokens("full", "full"),
        {
            "embedding": (False, "interact"), "norm": (True, "the full block, summed"),
            "linear": (True, "the full block of"), "head": (True, "the full block of"),
        },
    ),
    "tokens, diagonal": (
        Tokens, lambda: ids(4, 3), "categorical",
        of_tokens("diagonal", "diagonal", "diagonal"),
        {
            "embedding": (True, "the diagonal of"), "norm": (True, "the diagonal, summed"),
            "linear": (True, "the diagonal, summed"), "head": (True, "the full block of"),
        },
    ),
    "attention and a recurrent layer, one position": (
        Sequences, lambda: torch.randn(1, 1, 4), "categorical", of_sequences,
        dict.fromkeys(IN_SEQUENCES, (True, ONE)),
    ),
    "attention and a recurrent layer": (
        Sequences, lambda: torch.randn(3, 4, 4), "categorical", of_sequences,
        dict.fromkeys(IN_SEQUENCES, (False, "interact")),
    ),
    "diagonal sides": (
        tanh_net, lambda: torch.randn(1, 3), "normal", of_middle("kron_both_diag"),
        {"2": (False, "a side is a diagonal")},
    ),
}  # fmt: skip


def losses_of(layers, loss):
    layers.register_loss_function(loss)
    return layers


def own_figures(block, dense):
    """Error, cosine and ratio of traces of two dense matrices."""
    K = block.full_fisher_block()
    if torch.equal(K, K.diagonal().diag()) and len(block.factors) == 1:
        dense = dense.diagonal().diag()
    cosine = (K * dense).sum() / (K.norm() * dense.norm())
    return (K - dense).norm() / dense.norm(), cosine, K.trace() / dense.trace()


@float64
@pytest.mark.parametrize("dense_limit", [1500, 0], ids=["matrices", "products"])
@pytest.mark.parametrize("name", CASES)
def test_figures_and_verdicts(name, dense_limit):
    make, inputs, loss, register, expected = CASES[name]
    model, x = make(), inputs()
    layers = losses_of(register(model), loss)
    dense = {n: dense_fisher(model, x, layers, b) for n, b in layers.blocks.items()}
    check = check_curvature(
        model, None, x, layer_collection=layers, dense_limit=dense_limit
    )
    estimator = FisherEstimator(None, 0.0, 0.0, layers, (), "exact")
    model(x)
    assert estimator.update_covariances() == []
    estimator.close()
    assert check.passed
    assert {row.name for row in check.blocks} == expected.keys()
    for row in check.blocks:
        equal, why = expected[row.name]
        assert (row.expected_equal, why in row.reason) == (equal, True), row
        figures = own_figures(layers.blocks[row.name], dense[row.name])
        # The error without matrices is the root of a difference of squares.
        by_products = dense_limit == 0 and "diagonal" not in row.reason[:12]
        atol = 1e-7 if by_products else 1e-12
        got = torch.tensor([row.error, row.cosine, row.trace_ratio])
        torch.testing.assert_close(got, torch.stack(figures), rtol=0, atol=atol)
        if equal:
            assert row.verdict == "equal"
            assert row.error < (1e-7 if by_products else 1e-12)
        else:
            assert row.verdict == "approximate"
            assert row.error > 1e-2


@float64
def test_sources_in_pieces_and_pairs_computed_again(monkeypatch):
    """With room for a single gradient, and none to keep."""
    model, x = conv_net(groups=2), torch.randn(3, 2, 5, 5)
    whole = check_curvature(model, "categorical", x, dense_limit=0)
    monkeypatch.setattr(kfac_torch.exact_blocks, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(kfac_torch.exact_blocks, "_KEPT_BYTES", 0)
    pieces = check_curvature(model, "categorical", x, dense_limit=0)
    assert whole.num_sources == pieces.num_sources == 9
    for one, other in zip(whole.blocks, pieces.blocks, strict=True):
        for field in ("error", "cosine", "trace_ratio"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), abs=1e-9)


# Blocks that are wrong.


class TwiceG(FullyConnectedKFACBasicFB):
    def grad_moments(self, inputs, grads, num_terms):
        return [2 * cov for cov in super().grad_moments(inputs, grads, num_terms)]


class Swapped(FullyConnectedKFACBasicFB):
    def _sides(self):
        A, G = super()._sides()
        return G, A


class NoT(FullyConnectedKFACBasicFB):
    def accumulate_factor(self, index, moment, decay):
        super().accumulate_factor(index, moment, decay)
        self.num_locations = 1.0


class MeanOfLocations(FullyConnectedKFACBasicFB):
    """The gradients of the mean over rows in place of the sum over loss terms."""

    def grad_moments(self, inputs, grads, num_terms):
        rows = inputs[0].shape[:-1].numel()
        return super().grad_moments(inputs, [g / rows for g in grads], num_terms)


class Rows(nn.Module):
    """A square layer over five rows that share a loss term without interacting."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.layer(x).flatten(1)


WRONG = {
    TwiceG: ("wrong scale", 2.0),
    NoT: ("wrong scale", 1 / 5),
    MeanOfLocations: ("wrong scale", 1 / 400),
    Swapped: ("wrong", 1.0),
    FullyConnectedKFACBasicFB: ("equal", 1.0),
}


@float64
@pytest.mark.parametrize("dense_limit", [1500, 0], ids=["matrices", "products"])
@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_wrong_block_is_caught(kind, dense_limit):
    model = Rows()
    layers = losses_of(LayerCollection(model), "normal")
    layers.register_block(kind(model.layer, "layer"))
    x = torch.randn(4, 5, 3) * torch.tensor([1.0, 2.0, 3.0])
    check = check_curvature(
        model, None, x, layer_collection=layers, dense_limit=dense_limit
    )
    verdict, ratio = WRONG[kind]
    row = check["layer"]
    assert row.expected_equal
    assert row.verdict == verdict
    assert row.trace_ratio == pytest.approx(ratio, abs=1e-12)
    assert check.passed == (verdict == "equal")
    if verdict == "wrong scale":
        assert row.cosine == pytest.approx(1, abs=1e-12)
        assert row.error == pytest.approx(abs(ratio - 1), abs=1e-7)


# Batch statistics, several losses, what cannot be compared.


def normed(mode):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model[1].train(mode)
    return model


@float64
def test_batch_statistics_make_examples_interact():
    model, x = normed(True), torch.randn(6, 3)
    layers = losses_of(everything(model), "normal")
    dense = {n: dense_fisher(model, x, layers, b) for n, b in layers.blocks.items()}
    before = [buffer.clone() for buffer in model.buffers()]
    check = check_curvature(model, None, x, layer_collection=layers)
    assert "examples interact" in check["0"].reason
    assert check["0"].verdict == "approximate"
    assert (check["3"].verdict, check["3"].reason) == ("equal", ALL)
    estimator = FisherEstimator(None, 0.0, 0.0, layers, (), "exact")
    model(x)
    estimator.update_covariances()
    figures = own_figures(layers.blocks["0"], dense["0"])
    got = torch.tensor([check["0"].error, check["0"].cosine, check["0"].trace_ratio])
    torch.testing.assert_close(got, torch.stack(figures), rtol=0, atol=1e-12)
    estimator.close()
    assert not any(
        torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True)
    )  # the estimator's forward, not the check


@float64
def test_frozen_batch_norm_keeps_its_mode():
    model = normed(False)
    check = check_curvature(model, "normal", torch.randn(6, 3))
    assert "rows differ" in check["0"].reason  # a Tanh behind it, no examples
    assert not model[1].training


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.box, self.kind = nn.Linear(3, 2), nn.Linear(3, 4)

    def forward(self, x, scale=1.0):
        hidden = torch.tanh(self.layer(x)) * scale
        return {"box": self.box(hidden), "class": self.kind(hidden.detach())}


@float64
def test_several_losses_and_keyword_arguments():
    model, x = TwoHeads(), torch.randn(1, 3)
    layers = everything(model)
    layers.register_categorical_predictive_distribution("class", coeff=0.3)
    layers.register_squared_error_loss("box", coeff=2.0)
    check = check_curvature(
        model, None, {"x": x, "scale": 1.0}, layer_collection=layers, dense_limit=0
    )
    assert [row.verdict for row in check.blocks] == ["equal"] * 3
    assert check.num_sources == 6
    again = check_curvature(model, None, (x, 1.0), layer_collection=layers, dense_limit=0)
    assert again == check


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head, self.unused = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        hidden = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            hidden = torch.tanh(self.cell(hidden + step))
        return self.head(hidden)


@float64
def test_what_cannot_be_compared_is_listed():
    model = Loop()
    layers = LayerCollection(model)
    layers.register_fully_connected_multi(model.cell, "kron_series_1")
    layers.register_fully_connected(model.head)
    layers.register_fully_connected(model.unused)
    check = check_curvature(model, "normal", torch.randn(5, 4, 3), layer_collection=layers)
    assert check.passed
    assert [(row.verdict, row.error) for row in check.blocks[::2]] == [
        ("not compared", None)
    ] * 2
    assert check["cell"].reason == "its inverse alone is known"
    assert check["unused"].reason == "the layer had no part in the output"
    assert check["head"].verdict == "equal"


@float64
def test_approximations_that_no_net_makes_exact():
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    x = torch.randn(4, 2, 6, 6)
    layers = LayerCollection(model)
    layers.register_convolution(model[0], "kron_sua")
    check = check_curvature(model, "normal", x, layer_collection=layers, dense_limit=0)
    assert "spatially uncorrelated" in check["0"].reason
    sampling = SubSampling(inputs=0.5)
    layers = LayerCollection(model, FactorOptions(sub_sampling=sampling))
    layers.auto_register_layers()
    check = check_curvature(model, "normal", x, layer_collection=layers)
    assert "sample of the rows" in check["0"].reason


# What it leaves, prints and refuses.


def test_a_realistic_net_in_float32():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10)
    )  # fmt: skip
    model[1].eval()
    layers = LayerCollection(model)
    layers.register_convolution(model[0], "full")
    layers.register_scale_and_shift(model[1])
    layers.register_convolution(model[3], "diagonal")
    layers.register_fully_connected(model[7])
    x = torch.randn(8, 1, 8, 8)
    check = check_curvature(model, "categorical", x, layer_collection=layers)
    assert [row.verdict for row in check.blocks] == ["equal"] * 3 + ["approximate"]
    assert all(row.error < 1e-5 for row in check.blocks[:3])
    assert check["7"].error < 0.5
    one = check_curvature(
        model, "categorical", x[:1], layer_collection=layers, dense_limit=0
    )
    assert one["7"].verdict == "equal"  # by products, in float32


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    )
    model.eval()
    model[1].train()
    x = torch.randn(6, 3)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    params = list(model.parameters())
    tensors = [*params, *(p.grad for p in params), *model.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    layers = everything(model)
    check_curvature(model, "categorical", x, layer_collection=layers)
    after = [*params, *(p.grad for p in params), *model.buffers()]
    for tensor, copy, now in zip(tensors, copies, after, strict=True):
        assert now is tensor
        assert torch.equal(now, copy)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not layers.registered_losses
    # The collection is free for an optimizer, whatever was checked.
    optimizer = KFAC(model, "categorical", layers, lr=0.1, damping=0.1)
    model.train()
    functional.cross_entropy(model(x), torch.randint(2, (6,))).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 0


def test_the_number_of_locations_of_a_check_is_forgotten():
    model = Rows()
    layers = losses_of(everything(model), "normal")
    check_curvature(model, None, torch.randn(4, 5, 3), layer_collection=layers)
    assert layers.blocks["layer"].num_locations == 1


@float64
def test_the_table():
    check = check_curvature(linear_net(), "normal", torch.randn(6, 3))
    lines = str(check).splitlines()
    assert lines[0] == "3 blocks beside the exact ones: 6 loss terms, 12 sources"
    assert lines[1].split()[:4] == ["layer", "block", "size", "error"]
    assert lines[3].endswith(f"equal    yes: {ALL}")
    assert len(lines) == 5
    with pytest.raises(KeyError, match="3: expected one of \\['0', '1', '2'\\]"):
        check["3"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        check.blocks[0].error = 0.0


@pytest.mark.parametrize(
    ("make", "batch", "options", "error", "message"),
    [
        (nn.Tanh, torch.ones(2, 3), {}, ValueError, "Tanh has no layer that K-FAC"),
        (tanh_net, [torch.ones(2, 3)], {}, TypeError, "batch: expected .* got a list"),
        (tanh_net, torch.ones(2, 7), {}, ValueError,
         r"batch: the model cannot be called with a tensor of shape \(2, 7\): mat1"),
        (tanh_net, {"y": torch.ones(2, 3)}, {}, ValueError,
         r"cannot be called with a dict of y=a tensor of shape \(2, 3\): .*argument 'y'"),
        (tanh_net, torch.ones(2, 3), {"output": "logits"}, ValueError,
         "output='logits' does not fit what the model returned, a Tensor"),
        (TwoHeads, torch.ones(2, 3), {}, ValueError, "output as a tensor, got dict"),
        (tanh_net, torch.full((2, 3), torch.nan), {}, ValueError,
         "batch: NaN or Inf in .*the network output"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Flatten(0)), torch.ones(2, 3), {},
         ValueError, "expected a network output with at least 2 dimensions"),
    ],
)  # fmt: skip
def test_errors_name_what_came(make, batch, options, error, message):
    model = make()
    if isinstance(model, nn.Tanh):
        model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(error, match=message):
        check_curvature(model, "categorical", batch, **options)
    assert not any(module._forward_hooks for module in model.modules())


def test_losses_and_collections_that_do_not_fit():
    model, x = tanh_net(), torch.randn(2, 3)
    with pytest.raises(ValueError, match="in layer_collection, got neither"):
        check_curvature(model, None, x)
    layers = losses_of(everything(model), "normal")
    with pytest.raises(ValueError, match="got both"):
        check_curvature(model, "normal", x, layer_collection=layers)
    with pytest.raises(ValueError, match="of the model to be checked, got one of another"):
        check_curvature(tanh_net(), None, x, layer_collection=layers)
    optimizer = KFAC(model, None, layers, lr=0.1, damping=0.1)
    with pytest.raises(ValueError, match="a collection of its own"):
        check_curvature(model, None, x, layer_collection=layers)
    optimizer.close()


def test_an_output_without_a_gradient():
    model = tanh_net()
    layers = everything(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="does not depend on any trained parameter"):
        check_curvature(model, "normal", torch.randn(2, 3), layer_collection=layers)


def test_the_tables_on_the_page_are_what_its_code_prints():
    """Up to the digits of what is rounding."""
    page = Path(__file__).parent.parent / "docs" / "check_curvature.md"
    code, shown = re.search(
        r"```python\n(.*?)```.*?```text\n(.*?)```", page.read_text(), re.DOTALL
    ).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    without_rounding = [
        re.sub(r"\d\.\de-1\d|0\.0e\+00", "rounding", text)
        for text in (printed.getvalue(), shown)
    ]
    assert without_rounding[0] == without_rounding[1]
