"""Blocks in micro-batches, and what defines an approximation where a block is not exact.

The tables are those of `exactness_cases`; that their rows are exact under every loss is in
`test_exactness.py`.
"""

import pytest
import torch
from dense_fisher import dense_fisher
from exactness_cases import (
    EXACT,
    LINEAR,
    Case,
    block,
    conv_net,
    first,
    generic,
    middle,
    randn,
    tanh_net,
)
from torch import nn

from kfac_torch import fisher_blocks as fb
from kfac_torch.estimator import FisherEstimator
from kfac_torch.layer_collection import LayerCollection

pytestmark = pytest.mark.usefixtures("float64")

LOSSES = {
    "normal": lambda layers: layers.register_normal_predictive_distribution(var=0.7),
    "categorical": lambda layers: layers.register_categorical_predictive_distribution(),
    "bernoulli": lambda layers: layers.register_multi_bernoulli_predictive_distribution(
        coeff=1.5
    ),
}


def registered(case, loss):
    model = case.make()
    layers = LayerCollection(model)
    case.register(layers, model)
    LOSSES[loss](layers)
    (the_block,) = layers.blocks.values()
    return model, layers, the_block


def gather(model, layers, batches, mode="exact"):
    estimator = FisherEstimator(None, 0.95, 0.1, layers, estimation_mode=mode)
    corrected = any(isinstance(b, fb.EigenKroneckerFB) for b in layers.get_blocks())
    for _ in range(1 + corrected):  # a basis first, then the scales in it
        for x in batches:
            model(x)
        assert estimator.update_covariances() == []
        if corrected:
            estimator.update_inverses()
    estimator.close()


def assert_equal(actual, expected):
    scale = expected.abs().max().item()
    assert scale > 1e-6
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * scale)


def assert_exact(case, loss, split):
    model, layers, the_block = registered(case, loss)
    x = case.inputs()
    dense = dense_fisher(model, x, layers, the_block)
    gather(model, layers, x.split(split) if split else [x])
    actual = the_block.full_fisher_block()
    expected = dense.diagonal().diag() if case.diagonal else dense
    assert_equal(actual, expected)


@pytest.mark.parametrize("name", [n for n in EXACT | LINEAR if "batch norm, " not in n])
def test_micro_batches_are_merged(name):
    """Uneven ones; batch norm sees a batch as a whole."""
    case = (EXACT | LINEAR)[name]
    assert_exact(case, "normal", 2)


class Heads(nn.Module):
    """Two heads, of which one sees an earlier call of the shared layer alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 4)])

    def forward(self, x):
        early = torch.tanh(self.layer(x))
        late = torch.tanh(self.layer(early))
        return {"box": self.heads[0](early), "class": self.heads[1](late.flatten(1, -2))}


@pytest.mark.parametrize(
    "register",
    [
        block(fb.FullyConnectedDiagonalFB, "layer"),
        generic("full", "layer.weight", "layer.bias"),
        generic("diagonal", "layer.weight"),
    ],
)
def test_several_losses_add_up(register):
    model = Heads()
    layers = LayerCollection(model)
    register(layers, model)
    layers.register_categorical_predictive_distribution("class", coeff=0.3)
    layers.register_squared_error_loss("box", coeff=2.0)
    (the_block,) = layers.blocks.values()
    x = torch.randn(5, 1, 3)
    dense = dense_fisher(model, x, layers, the_block)
    gather(model, layers, [x])
    full = isinstance(the_block, fb.FullFB)
    assert_equal(the_block.full_fisher_block(), dense if full else dense.diagonal().diag())


@pytest.mark.parametrize("approx", ["diagonal", "full"])
def test_sources_in_pieces_are_those_in_one(approx, monkeypatch):
    """With room for a single gradient."""
    monkeypatch.setattr("kfac_torch.sources._BUFFER_BYTES", 1)
    assert_exact(Case(tanh_net, randn(4, 3), middle(approx), approx == "diagonal"),
                 "categorical", 0)  # fmt: skip


# Where a block is not exact: what defines the approximation.


@pytest.mark.parametrize("inputs", [randn(6, 3), randn(4, 5, 3)], ids=["rows", "tokens"])
@pytest.mark.parametrize(
    ("method", "full"),
    [
        ("fully_connected", "kron"),
        ("fully_connected", "kron_reduce"),
        ("fully_connected_multi", "kron_indep"),
        ("fully_connected_multi", "kron_reduce"),
    ],
)
def test_diagonal_sides_are_the_diagonals_of_the_full_ones(method, full, inputs):
    model, x = tanh_net(), inputs()
    blocks = {}
    for ending in ("", "_in_diag", "_out_diag", "_both_diag"):
        layers = LayerCollection(model)
        getattr(layers, f"register_{method}")(model[2], approx=full + ending)
        layers.register_categorical_predictive_distribution()
        gather(model, layers, [x])
        blocks[ending] = next(iter(layers.blocks.values()))
    A, G = (factor.get_cov() for factor in blocks[""].factors)
    T = blocks[""].num_locations
    for ending, left, right in (
        ("_in_diag", A.diagonal().diag(), G),
        ("_out_diag", A, G.diagonal().diag()),
        ("_both_diag", A.diagonal().diag(), G.diagonal().diag()),
    ):
        assert_equal(blocks[ending].full_fisher_block(), T * torch.kron(left, right))
        assert_equal(
            blocks[ending].full_fisher_block().trace(),
            blocks[""].full_fisher_block().trace(),
        )


def white_images():
    """`[16, 2, 6]`: no correlation of locations over the batch, channels correlated."""
    hadamard = torch.ones(1, 1)
    for _ in range(4):
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    white = hadamard[:, 1:13].reshape(16, 2, 6)
    mixing, mean = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([0.7, -1.3])
    return torch.einsum("ck,nkt->nct", mixing, white) + mean[:, None]


@pytest.mark.parametrize("bias", [False, True])
def test_spatially_uncorrelated_activations_are_exact_where_they_are(bias):
    conv = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", bias=bias)
    x, blocks = white_images(), []
    for approx in ("kron", "kron_sua"):
        model = nn.Sequential(conv)
        layers = LayerCollection(model)
        layers.register_convolution(conv, approx)
        layers.register_squared_error_loss()
        gather(model, layers, [x])
        blocks.append(layers.blocks["0"].full_fisher_block())
        if approx == "kron":
            assert_equal(blocks[0], dense_fisher(model, x, layers, layers.blocks["0"]))
    assert_equal(blocks[1], blocks[0])


@pytest.mark.parametrize("mode", ["gradients", "curvature_prop"])
@pytest.mark.parametrize(
    "case",
    [
        Case(tanh_net, randn(4, 3), middle("kron"), False),
        Case(lambda: conv_net(nn.Conv2d(1, 2, 2)), randn(2, 1, 3, 3),
             first("convolution", "kron"), False),
        Case(tanh_net, randn(4, 3), generic("full", "0.weight", "2.bias"), False),
    ],
    ids=["linear", "conv", "generic"],
)  # fmt: skip
@pytest.mark.parametrize("loss", ["categorical", "bernoulli"])
def test_random_modes_have_the_exact_mean(case, mode, loss):
    """400 draws, five standard errors of every entry of the mean."""
    model, layers, the_block = registered(case, loss)
    x = case.inputs()
    gather(model, layers, [x])
    exact = the_block.full_fisher_block()
    fresh = LayerCollection(model)
    case.register(fresh, model)
    LOSSES[loss](fresh)
    (the_block,) = fresh.blocks.values()
    estimator = FisherEstimator(None, 0.0, 0.1, fresh, estimation_mode=mode, seed=3)
    draws = []
    for _ in range(400):
        model(x)
        estimator.update_covariances()
        draws.append(the_block.full_fisher_block().clone())
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    assert (error.diagonal() < 0.2 * exact.diagonal().max()).all()


class Positions(nn.Module):
    """Embeddings of positions, which all examples share or each has of its own."""

    def __init__(self, shared):
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 2)
        self.shared = shared

    def forward(self, x):
        places = torch.arange(4)
        places = places if self.shared else places.expand(len(x), -1)
        return self.head(torch.tanh(x + self.embedding(places)))


def positions(shared, x, mode="exact", draws=1):
    torch.manual_seed(1)
    model = Positions(shared)
    layers = LayerCollection(model)
    layers.register_embedding(model.embedding)
    layers.register_categorical_predictive_distribution()
    estimator = FisherEstimator(None, 0.0, 0.1, layers, estimation_mode=mode)
    blocks = []
    for _ in range(draws):
        model(x)
        estimator.update_covariances()
        blocks.append(layers.blocks["embedding"].full_fisher_block().clone())
    return torch.stack(blocks)


@pytest.mark.parametrize("examples", [1, 3, 6])
def test_rows_that_all_examples_share(examples):
    x = torch.randn(examples, 4, 3)
    assert_equal(positions(True, x), positions(False, x))


@pytest.mark.parametrize("mode", ["exact", "gradients", "curvature_prop"])
def test_cross_terms_of_examples_are_zero_in_expectation(mode):
    """As many positions as examples: by the shapes a row might be of one example."""
    x = torch.randn(4, 4, 3)
    (expected,) = positions(False, x)
    draws = positions(True, x, mode, 400)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    assert (error.diagonal() < 0.2 * expected.diagonal().max()).all()


# A weight that is an embedding and a head.


class TwoUses(nn.Module):
    """Both uses of one weight, each with a loss: they do not interact."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.embedding = nn.Embedding(5, 3, padding_idx=padding_idx)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.after = nn.Identity()

    def forward(self, x):
        return {
            "words": self.after(self.embedding(x[:, 0].long())),
            "classes": self.head(x[:, 1:]),
        }


class LanguageModel(nn.Module):
    """The next token by the last alone, so that tokens do not interact."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.middle = nn.Linear(3, 3)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.middle(self.embedding(x)).tanh())


def partial_traces(F):
    """The diagonal of that over the D side, and that over the V side."""
    F = F.view(5, 3, 5, 3)
    return torch.einsum("vdvd->v", F), torch.einsum("vdve->de", F)


def assert_same_traces(actual, expected):
    for one, other in zip(partial_traces(actual), partial_traces(expected), strict=True):
        assert_equal(one, other)
    assert_equal(actual.trace(), expected.trace())


def rows_with_ids(words):
    return torch.cat([words[:, None].double(), torch.randn(len(words), 3)], dim=1)


@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_the_partial_traces_of_a_tied_embedding_are_exact(padding_idx, split):
    model = TwoUses(padding_idx)
    model.after = nn.Tanh()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_normal_predictive_distribution("words", var=0.7)
    layers.register_categorical_predictive_distribution("classes", coeff=1.5)
    (the_block,) = layers.blocks.values()
    x = rows_with_ids(torch.tensor([0, 3, 3, 1, 3, 0]))
    dense = dense_fisher(model, x, layers, the_block)
    gather(model, layers, x.split(split) if split else [x])
    assert type(the_block) is fb.TiedEmbeddingFB
    assert_same_traces(the_block.full_fisher_block(), dense)
    assert not torch.allclose(the_block.full_fisher_block(), dense)


def test_a_tied_embedding_is_exact_where_both_uses_have_the_same_v_side():
    """Every word as often as the others, and the square loss."""
    model = TwoUses()
    layers = LayerCollection(model)
    layers.register_tied_embedding([model.head, model.embedding])
    layers.register_normal_predictive_distribution("words", var=0.7)
    layers.register_squared_error_loss("classes")
    x = rows_with_ids(torch.tensor([2, 0, 1, 4, 3]))
    dense = dense_fisher(model, x, layers, layers.blocks["head"])
    gather(model, layers, [x])
    assert_equal(layers.blocks["head"].full_fisher_block(), dense)


def test_a_language_model_with_a_tied_head():
    """Up to products of both uses, which a model with two weights does not have."""
    model, untied = LanguageModel(tied=True), LanguageModel(tied=False)
    untied.load_state_dict(model.state_dict())
    layers, both = LayerCollection(model), LayerCollection(untied)
    both.register_embedding(untied.embedding)
    both.register_fully_connected(untied.head)
    for each in (layers, both):
        each.register_categorical_predictive_distribution()
    x = torch.randint(5, (4, 6))
    words, head = (dense_fisher(untied, x, both, b) for b in both.get_blocks())
    head = head.view(4, 5, 4, 5)[:3, :, :3].permute(1, 0, 3, 2).reshape(15, 15)
    layers.register_tied_embedding([model.embedding, model.head])
    gather(model, layers, x.split(3))
    assert_same_traces(layers.blocks["embedding"].full_fisher_block(), words + head)
