import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import fisher_blocks as fb
from kfac_torch.approximations import APPROXIMATIONS, DEFAULT_APPROXIMATIONS
from kfac_torch.fisher_factors import (
    ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor,
    FactorOptions,
)
from kfac_torch.layer_collection import LayerCollection


class Zoo(nn.Module):
    """One of everything; the calls do not matter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.conv1 = nn.Conv1d(2, 3, 3)
        self.conv2 = nn.Conv2d(2, 3, 3)
        self.conv3 = nn.Conv3d(2, 3, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4)
        self.pointwise = nn.Conv2d(8, 2, 1)
        self.transposed = nn.ConvTranspose2d(2, 3, 3)
        self.norm = nn.LayerNorm(3)
        self.batch_norm = nn.BatchNorm2d(3)
        self.embedding = nn.Embedding(5, 3)
        self.bag = nn.EmbeddingBag(5, 3)
        self.bilinear = nn.Bilinear(2, 2, 3)
        self.tied = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)])
        self.tied[1].weight = self.tied[0].weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.gru = nn.GRU(2, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.scale = nn.Parameter(torch.ones(2))
        self.offset = nn.Parameter(torch.zeros(2, 2))

    def layer(self, name):
        """What a layer is registered by: a module, or all that share its weight."""
        return list(self.tied) if name == "tied.0" else self.get_submodule(name)


class Subclass(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def kinds(layers):
    return {name: type(block) for name, block in layers.blocks.items()}


# Registration.

REGISTER = {
    "fully_connected": ("register_fully_connected", "linear"),
    "conv2d": ("register_conv2d", "conv2"),
    "conv_transpose": ("register_conv_transpose", "transposed"),
    "depthwise_conv2d": ("register_depthwise_conv2d", "depthwise"),
    "embedding": ("register_embedding", "embedding"),
    "embedding_bag": ("register_embedding_bag", "bag"),
    "tied_embedding": ("register_tied_embedding", "tied.0"),
    "bilinear": ("register_bilinear", "bilinear"),
    "scale_and_shift": ("register_scale_and_shift", "norm"),
    "fully_connected_multi": ("register_fully_connected_multi", "linear"),
    "conv2d_multi": ("register_conv2d_multi", "conv2"),
    "embedding_multi": ("register_embedding_multi", "embedding"),
    "generic": ("register_generic", "linear"),
    "attention": ("register_multihead_attention", "attention"),
    "recurrent": ("register_recurrent", "gru"),
}
PARTS = {"attention": ["in_proj", "out_proj"], "recurrent": ["ih_l0", "hh_l0"]}
KRON = ("kron", "kron_in_diag", "kron_out_diag", "kron_both_diag")
INDEP = ("kron_indep", "kron_indep_in_diag", "kron_indep_out_diag", "kron_indep_both_diag")
REDUCE = (
    "kron_reduce", "kron_reduce_in_diag", "kron_reduce_out_diag", "kron_reduce_both_diag"
)  # fmt: skip
SERIES = ("kron_series_1", "kron_series_2")
EXPECTED = {
    "generic": {"full": fb.FullFB, "diagonal": fb.NaiveDiagonalFB},
    "fully_connected": dict.fromkeys(KRON, fb.FullyConnectedKFACBasicFB)
    | dict.fromkeys(REDUCE, fb.FullyConnectedKFACReduceFB)
    | {"ekfac": fb.FullyConnectedEKFACFB}
    | {"diagonal": fb.FullyConnectedDiagonalFB, "full": fb.FullFB},
    "conv2d": dict.fromkeys(("kron", "kron_sua"), fb.ConvKFCBasicFB)
    | {
        "kron_reduce": fb.ConvKFCReduceFB,
        "ekfac": fb.ConvEKFACFB,
        "diagonal": fb.ConvDiagonalFB,
        "full": fb.FullFB,
    },
    "conv_transpose": {
        "kron": fb.ConvTransposeKFCFB,
        "ekfac": fb.ConvTransposeEKFACFB,
        "kron_reduce": fb.ConvTransposeKFCReduceFB,
        "diagonal": fb.ConvTransposeDiagonalFB,
        "full": fb.FullFB,
    },
    "depthwise_conv2d": {
        "kron": fb.DepthwiseConvKFCBasicFB,
        "ekfac": fb.DepthwiseConvEKFACFB,
        "diagonal": fb.DepthwiseConvDiagonalFB,
        "full": fb.FullFB,
    },
    "embedding": dict.fromkeys(KRON, fb.EmbeddingKFACFB)
    | {"diagonal": fb.NaiveDiagonalFB, "full": fb.FullFB},
    "embedding_bag": dict.fromkeys(KRON, fb.EmbeddingBagKFACFB)
    | {"diagonal": fb.NaiveDiagonalFB, "full": fb.FullFB},
    "tied_embedding": dict.fromkeys(KRON, fb.TiedEmbeddingFB),
    "bilinear": dict.fromkeys(KRON, fb.BilinearKFACFB)
    | {"diagonal": fb.BilinearDiagonalFB, "full": fb.FullFB},
    "scale_and_shift": {
        "full": fb.ScaleAndShiftFullFB,
        "diagonal": fb.ScaleAndShiftDiagonalFB,
    },
    "fully_connected_multi": dict.fromkeys(INDEP, fb.FullyConnectedMultiIndepFB)
    | dict.fromkeys(REDUCE, fb.FullyConnectedKFACReduceFB)
    | dict.fromkeys(SERIES, fb.FullyConnectedSeriesFB)
    | {"ekfac": fb.FullyConnectedEKFACFB},
    "conv2d_multi": {
        "kron_indep": fb.ConvKFCBasicMultiIndepFB,
        "kron_reduce": fb.ConvKFCReduceFB,
        "ekfac": fb.ConvEKFACFB,
    },
    "embedding_multi": dict.fromkeys(INDEP, fb.EmbeddingKFACMultiIndepFB),
    "attention": {
        "kron": fb.LinearMapFB, "ekfac": fb.LinearMapEKFACFB,
        "diagonal": fb.NaiveDiagonalFB, "full": fb.FullFB
    },
    "recurrent": dict.fromkeys(KRON, fb.LinearMapFB)
    | {"ekfac": fb.LinearMapEKFACFB, "diagonal": fb.NaiveDiagonalFB, "full": fb.FullFB},
}  # fmt: skip
CASES = [(kind, approx) for kind, known in EXPECTED.items() for approx in known]


def expected_kinds(kind, approx):
    """By name of the blocks of a layer of some kind."""
    name, block = REGISTER[kind][1], EXPECTED[kind][approx]
    if kind not in PARTS:
        return {name: block}
    return {f"{name}.{part}": block for part in PARTS[kind]}


def test_the_table_of_approximations():
    assert {kind: set(known) for kind, known in APPROXIMATIONS.items()} == {
        kind: set(known) for kind, known in EXPECTED.items()
    }
    assert set(REGISTER) == set(EXPECTED) == set(DEFAULT_APPROXIMATIONS)


@pytest.mark.parametrize(("kind", "approx"), CASES)
def test_every_approximation_of_every_kind_can_be_registered(kind, approx):
    model = Zoo()
    layers = LayerCollection(model)
    method, name = REGISTER[kind]
    getattr(layers, method)(model.layer(name), approx)
    blocks = layers.get_blocks()
    assert kinds(layers) == expected_kinds(kind, approx)
    assert {id(p) for block in blocks for p in block.params} == {
        id(p) for p in model.get_submodule(name).parameters()
    }
    for block in blocks:
        block.instantiate_factors(0.1)
        block.register_inverse()
    assert layers.get_factors() == [f for block in blocks for f in block.factors]


SIDES = [
    ("fully_connected", "kron", (False, False)),
    ("fully_connected", "kron_in_diag", (True, False)),
    ("fully_connected", "kron_out_diag", (False, True)),
    ("fully_connected", "kron_both_diag", (True, True)),
    ("fully_connected_multi", "kron_indep_in_diag", (True, False)),
    ("fully_connected_multi", "kron_indep_out_diag", (False, True)),
    ("fully_connected_multi", "kron_indep_both_diag", (True, True)),
    ("fully_connected", "kron_reduce_in_diag", (True, False)),
    ("fully_connected_multi", "kron_reduce_both_diag", (True, True)),
    ("recurrent", "kron_in_diag", (True, False) * 2),
    ("recurrent", "kron_out_diag", (False, True) * 2),
    ("embedding", "kron", (True, False)),
    ("embedding", "kron_in_diag", (True, False)),
    ("embedding", "kron_out_diag", (True, True)),
    ("embedding", "kron_both_diag", (True, True)),
    ("embedding_multi", "kron_indep_in_diag", (True, False)),
    ("embedding_multi", "kron_indep_both_diag", (True, True)),
]


@pytest.mark.parametrize(("kind", "approx", "diagonal"), SIDES)
def test_which_sides_are_diagonal(kind, approx, diagonal):
    model = Zoo()
    layers = LayerCollection(model)
    method, name = REGISTER[kind]
    getattr(layers, method)(model.layer(name), approx)
    for block in layers.get_blocks():
        block.instantiate_factors(0.1)
    stored = [factor.get_cov_var().dim() == 1 for factor in layers.get_factors()]
    assert tuple(stored) == diagonal


@pytest.mark.parametrize("kind", REGISTER)
def test_an_unknown_approximation(kind):
    model = Zoo()
    layers = LayerCollection(model)
    method, name = REGISTER[kind]
    with pytest.raises(ValueError, match=f"layer {name}: approx: expected one of .*'tri'"):
        getattr(layers, method)(model.layer(name), "tri")
    assert not layers.blocks


@pytest.mark.parametrize("approx", [None, "full", "diagonal"])
@pytest.mark.parametrize(
    ("method", "name"), [m for kind, m in REGISTER.items() if kind != "generic"]
)
def test_a_layer_of_another_kind(method, name, approx):
    if "multi" in method or "tied" in method:
        approx = None
    model = Zoo()
    layers = LayerCollection(model)
    other = "conv2" if name == "transposed" else "transposed"
    with pytest.raises(
        TypeError, match=rf"layer {other}: expected .* got Conv(Transpose)?2d"
    ):
        getattr(layers, method)(model.get_submodule(other), approx)
    assert not layers.blocks


def test_a_depthwise_convolution_has_one_group_per_channel():
    model = Zoo()
    layers = LayerCollection(model)
    with pytest.raises(ValueError, match="layer grouped: expected a depthwise"):
        layers.register_depthwise_conv2d(model.grouped)


def test_a_separable_convolution_is_registered_whole_or_not_at_all():
    model = Zoo()
    layers = LayerCollection(model)
    layers.register_conv2d(model.pointwise)
    with pytest.raises(ValueError, match=r"layer pointwise: .*not registered yet"):
        layers.register_separable_conv2d(model.depthwise, model.pointwise)
    assert list(layers.blocks) == ["pointwise"]
    layers = LayerCollection(model)
    layers.register_separable_conv2d(model.depthwise, model.pointwise, approx="diagonal")
    assert kinds(layers) == {
        "depthwise": fb.DepthwiseConvDiagonalFB,
        "pointwise": fb.ConvDiagonalFB,
    }


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3", "grouped", "depthwise"])
def test_convolutions_of_any_kind(name):
    model = Zoo()
    layers = LayerCollection(model)
    layers.register_convolution(model.get_submodule(name))
    assert kinds(layers) == {name: fb.ConvKFCBasicFB}


def test_options_reach_the_factors():
    model = nn.Linear(2, 3)
    layers = LayerCollection(model, FactorOptions(initial="identity"))
    layers.auto_register_layers()
    layers.blocks["model"].instantiate_factors(0.1)
    assert layers.get_factors()[1].get_cov().equal(torch.eye(3))


def test_generic():
    model = Zoo()
    layers = LayerCollection(model)
    layers.register_generic(model.scale)
    layers.register_generic([model.offset, model.linear.bias], "full")
    layers.register_generic(model.attention, name="mixing")
    layers.register_generic(p for p in model.batch_norm.parameters())
    assert kinds(layers) == {
        "scale": fb.NaiveDiagonalFB,
        "offset+linear.bias": fb.FullFB,
        "mixing": fb.NaiveDiagonalFB,
        "batch_norm.weight+batch_norm.bias": fb.NaiveDiagonalFB,
    }
    params = layers.blocks["mixing"].params
    assert [id(p) for p in params] == [id(p) for p in model.attention.parameters()]
    with pytest.raises(ValueError, match="expected trained parameters, got none"):
        layers.register_generic(nn.Tanh())
    with pytest.raises(TypeError, match="register_generic: expected a module or param"):
        layers.register_generic("scale")
    fresh = LayerCollection(model)
    with pytest.raises(ValueError, match="expected every parameter once"):
        fresh.register_generic([model.offset, model.offset])
    assert fresh.blocks == {}


def test_what_is_no_module_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        TypeError, match=r"got generator; pass model rather than model\.par"
    ):
        LayerCollection(model.parameters())
    for wrong in ([], "0", nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="expected a module of Sequential"):
            LayerCollection(model).register_fully_connected(wrong)


def test_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers = LayerCollection(model)
    layers.register_fully_connected(model[0], name="first")
    with pytest.raises(ValueError, match="layer first: expected a layer whose name"):
        layers.register_fully_connected(model[1], name="first")
    layers.register_fully_connected(model[1])
    assert list(layers.blocks) == ["first", "1"]
    root = nn.Linear(2, 2)
    layers = LayerCollection(root)
    layers.register_fully_connected(root)
    assert list(layers.blocks) == ["model"]


def test_a_parameter_has_one_block():
    linear, other = nn.Linear(2, 3), nn.Linear(2, 3)
    other.bias = linear.bias
    model = nn.ModuleList([linear, other, nn.Conv2d(1, 1, 1)])
    layers = LayerCollection(model)
    layers.register_fully_connected(linear, name="a")
    for attempt in (
        lambda: layers.register_fully_connected(linear, name="b"),
        lambda: layers.register_fully_connected(other, name="b"),
        lambda: layers.register_generic(other, name="b"),
    ):
        with pytest.raises(ValueError, match=r"layer b: .*not registered yet"):
            attempt()
    layers.register_convolution(model[2])
    assert list(layers.blocks) == ["a", "2"]


def test_modules_and_parameters_of_another_model():
    layers = LayerCollection(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="expected a module of Linear, the model of this"):
        layers.register_fully_connected(nn.Linear(2, 3))
    with pytest.raises(
        ValueError, match="expected parameters of Linear, the model of this"
    ):
        layers.register_generic(nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="expected a module of Linear"):
        layers.auto_register_layers(nn.Sequential(nn.Linear(2, 3)))
    assert not layers.blocks


def test_frozen_parameters():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    layers = LayerCollection(model)
    with pytest.raises(ValueError, match=r"layer 0: .*trained"):
        layers.register_fully_connected(model[0])
    with pytest.raises(ValueError, match=r"frozen ones: parameter 0\.weight"):
        layers.register_generic([model[0].weight, model[0].bias])
    layers.register_generic(model[0].bias)
    layers.register_fully_connected(model[1])  # without its bias
    layers.check_registration()
    assert [tuple(p.shape) for p in layers.registered_variables] == [(3,), (3, 3)]


def test_a_block_of_ones_own():
    model = Zoo()
    layers = LayerCollection(model)
    layers.register_block(fb.FullFB([model.scale], "own"), num_uses=2)
    assert layers.get_blocks() == [layers.blocks["own"]]
    with pytest.raises(ValueError, match=r"layer own: .*not registered yet"):
        layers.register_block(fb.FullFB([model.offset], "own"))


def test_order_of_blocks_factors_and_variables():
    model = Zoo()
    layers = LayerCollection(model)
    layers.register_embedding(model.embedding)
    layers.register_generic(model.scale)
    layers.register_fully_connected(model.linear)
    for block in layers.get_blocks():
        block.instantiate_factors(0.1)
    assert [block.name for block in layers.get_blocks()] == ["embedding", "scale", "linear"]
    assert [factor.name for factor in layers.get_factors()] == [
        "embedding.input",
        "embedding.output",
        "scale",
        "linear.input",
        "linear.output",
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in layers.registered_variables] == [
        "embedding.weight",
        "scale",
        "linear.weight",
        "linear.bias",
    ]


# Automatic registration.


def test_what_is_registered_automatically():
    model = Zoo()
    model.subclass = Subclass(2, 2)
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    model.sparse = nn.Embedding(3, 2, sparse=True)
    layers = LayerCollection(model)
    layers.auto_register_layers()
    assert kinds(layers) == {
        "linear": fb.FullyConnectedKFACBasicFB,
        "conv1": fb.ConvKFCBasicFB,
        "conv2": fb.ConvKFCBasicFB,
        "conv3": fb.ConvKFCBasicFB,
        "grouped": fb.ConvKFCBasicFB,
        "depthwise": fb.ConvKFCBasicFB,
        "pointwise": fb.ConvKFCBasicFB,
        "transposed": fb.ConvTransposeKFCFB,
        "norm": fb.ScaleAndShiftFullFB,
        "batch_norm": fb.ScaleAndShiftFullFB,
        "embedding": fb.EmbeddingKFACFB,
        "bag": fb.EmbeddingBagKFACFB,
        "bilinear": fb.BilinearKFACFB,
        "tied.0": fb.TiedEmbeddingFB,
        **expected_kinds("attention", "kron"),
        **expected_kinds("recurrent", "kron"),
    }
    layers.auto_register_layers()  # nothing is left
    assert len(layers.blocks) == 18
    layers.register_fully_connected(model.subclass)  # where one knows what it computes
    assert layers.blocks["subclass"].params[0] is model.subclass.weight


def test_a_part_of_the_model():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    layers = LayerCollection(model)
    layers.register_fully_connected(model[0][1], approx="diagonal")
    layers.auto_register_layers(model[0])
    assert kinds(layers) == {
        "0.1": fb.FullyConnectedDiagonalFB,
        "0.0": fb.FullyConnectedKFACBasicFB,
    }


def test_tied_linear_layers_are_one_block():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    layers = LayerCollection(model)
    layers.auto_register_layers()
    assert kinds(layers) == {
        "0": fb.FullyConnectedMultiIndepFB,
        "3": fb.FullyConnectedKFACBasicFB,
    }
    assert layers.blocks["0"].modules == (model[0], model[2])
    layers.check_registration(outputs=model(torch.ones(4, 2)))


def test_layers_that_share_a_part_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[1].bias = model[0].bias
    layers = LayerCollection(model)
    layers.auto_register_layers()
    assert list(layers.blocks) == ["2"]
    with pytest.raises(
        ValueError, match="expected modules that share all their parameters"
    ):
        layers.register_fully_connected_multi([model[0], model[1]])
    assert layers.left_alone.keys() == {"0", "1"}
    mixed = nn.ModuleDict({"in": nn.Conv1d(2, 5, 1), "out": nn.Bilinear(2, 1, 5)})
    mixed["out"].weight = mixed["in"].weight
    layers = LayerCollection(mixed)
    layers.auto_register_layers()
    assert not layers.blocks
    assert "another kind of layer" in layers.left_alone["in"]


# Defaults.


@pytest.mark.parametrize(("kind", "approx"), CASES)
def test_default_approximations(kind, approx):
    model = Zoo()
    layers = LayerCollection(model)
    spelled_out = f"default_{kind}_approximation"
    assert getattr(layers, spelled_out) == DEFAULT_APPROXIMATIONS[kind]
    getattr(layers, f"set_{spelled_out}")(approx)
    assert layers.default_approximation(kind) == getattr(layers, spelled_out) == approx
    method, name = REGISTER[kind]
    getattr(layers, method)(model.layer(name))
    assert kinds(layers) == expected_kinds(kind, approx)
    # A collection's defaults are its own.
    other = LayerCollection(model)
    assert other.default_approximation(kind) == DEFAULT_APPROXIMATIONS[kind]


@pytest.mark.parametrize("kind", REGISTER)
def test_unknown_defaults(kind):
    layers = LayerCollection(Zoo())
    for attempt in (
        lambda: layers.set_default_approximation(kind, "tri"),
        lambda: getattr(layers, f"set_default_{kind}_approximation")("tri"),
    ):
        with pytest.raises(ValueError, match=f"{kind}: approx: expected one of .*'tri'"):
            attempt()
    assert layers.default_approximation(kind) == DEFAULT_APPROXIMATIONS[kind]
    with pytest.raises(AttributeError, match=f"expected a call of set_default_{kind}_"):
        setattr(layers, f"default_{kind}_approximation", "full")


def test_an_unknown_kind():
    layers = LayerCollection(Zoo())
    for attempt in (
        lambda: layers.default_approximation("dense"),
        lambda: layers.set_default_approximation("dense", "kron"),
    ):
        with pytest.raises(ValueError, match=r"kind: expected one of .*'dense'"):
            attempt()


# Linked parameters.


def test_linked_parameters_fix_a_grouping():
    model = Zoo()
    layers = LayerCollection(model)
    weight, bias = model.linear.weight, model.linear.bias
    layers.define_linked_parameters([weight, model.scale])
    assert layers.linked_parameters == {frozenset({"linear.weight", "scale"}): None}
    for attempt in (
        lambda: layers.register_fully_connected(model.linear),
        lambda: layers.register_generic(model.scale, name="linear"),
        lambda: layers.register_generic([weight, bias], name="linear"),
        lambda: layers.register_block(fb.FullFB([weight], "linear")),
    ):
        with pytest.raises(
            ValueError, match=r"layer linear: .*exactly linear\.weight, scale to be"
        ):
            attempt()
    layers.auto_register_layers()
    assert "linear" not in layers.blocks
    layers.register_generic([model.scale, weight])
    assert kinds(layers)["scale+linear.weight"] is fb.NaiveDiagonalFB


def test_linked_parameters_fix_an_approximation():
    model = Zoo()
    layers = LayerCollection(model)
    layers.define_linked_parameters(model.linear.parameters(), "diagonal")
    layers.define_linked_parameters(model.scale, "full")
    for approx in ("kron", "full"):
        with pytest.raises(ValueError, match=f"linked with .*'diagonal', got '{approx}'"):
            layers.register_fully_connected(model.linear, approx)
    layers.register_generic(model.scale)
    layers.auto_register_layers(model.linear)
    assert kinds(layers) == {"scale": fb.FullFB, "linear": fb.FullyConnectedDiagonalFB}


def test_linked_parameters_that_overlap():
    model = Zoo()
    layers = LayerCollection(model)
    layers.register_embedding(model.embedding)
    layers.define_linked_parameters([model.scale, model.offset])
    stranger = nn.Parameter(torch.ones(7))
    for params, message in (
        ([model.linear.weight, model.scale], "parameter scale: .*neither linked nor"),
        ([model.offset, model.scale], "parameter offset: .*neither linked nor"),
        (model.embedding.weight, r"parameter embedding\.weight: .*nor registered yet"),
        (stranger, r"a tensor of shape \(7,\): .*not of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            layers.define_linked_parameters(params)
    with pytest.raises(ValueError, match=r"approximation: expected one of .*'tri'"):
        layers.define_linked_parameters(model.linear.weight, "tri")
    assert layers.linked_parameters == {frozenset({"scale", "offset"}): None}


# Factors.


def test_factors_are_shared_by_class_and_arguments():
    layers = LayerCollection(nn.Linear(2, 2))
    x, g = torch.randn(2, 4, 4, 1), torch.randn(2, 3, 3, 1)
    args = ((x,), (2, 2, 1, 1), "VALID")
    first = layers.make_or_get_factor(ConvInputKroneckerFactor, args)
    assert isinstance(first, ConvInputKroneckerFactor)
    assert layers.make_or_get_factor(ConvInputKroneckerFactor, args) is first
    others = [
        layers.make_or_get_factor(ConvInputKroneckerFactor, ((x,), (2, 2, 1, 1), "SAME")),
        layers.make_or_get_factor(ConvInputKroneckerFactor, ((x + 0,), *args[1:])),
        layers.make_or_get_factor(ConvOutputKroneckerFactor, (((g,),),)),
    ]
    assert len({id(factor) for factor in [first, *others]}) == 4
    other = LayerCollection(nn.Linear(2, 2))
    assert other.make_or_get_factor(ConvInputKroneckerFactor, args) is not first
    with pytest.raises(
        TypeError, match="arguments of ConvInputKroneckerFactor that can be"
    ):
        layers.make_or_get_factor(ConvInputKroneckerFactor, ([x], *args[1:]))


# Checks.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x, twice=False, beside=False):
        h = self.second(torch.tanh(self.first(x)))
        if twice:
            h = self.second(h)
        if beside:
            h = functional.linear(h, self.second.weight)
        return {"z": self.scale * h}


def registered(model, num_uses=None, **kwargs):
    layers = LayerCollection(model)
    layers.register_fully_connected(model.first)
    if num_uses is None:
        layers.register_fully_connected(model.second, **kwargs)
    else:
        layers.register_fully_connected_multi(model.second, num_uses=num_uses)
    layers.register_generic(model.scale)
    layers.register_squared_error_loss("z")
    return layers


def test_a_registration_that_is_right():
    model, x = Net(), torch.ones(4, 2)
    registered(model).check_registration()
    registered(model).check_registration(model.parameters(), model(x)["z"])
    registered(model).check_registration(outputs=model(x))  # the losses know what is in it
    registered(model, num_uses=2).check_registration(outputs=model(x, twice=True))
    # Generic blocks may be used any number of times.
    generic = registered(model, approx="full")
    generic.check_registration(outputs=model(x, twice=True, beside=True))
    exempt = LayerCollection(model)
    exempt.register_fully_connected_multi(model.second)  # any number
    exempt.register_fully_connected(model.first)
    exempt.register_generic(model.scale)
    exempt.check_registration(outputs=[model(x, twice=True)["z"]])


@pytest.mark.parametrize(
    ("num_uses", "call", "weight", "bias"),
    [
        (None, {"twice": True}, "1 use(s), but used 2", "1 use(s), but used 2"),
        (None, {"beside": True}, "1 use(s), but used 2", None),
        (3, {"twice": True}, "3 use(s), but used 2", "3 use(s), but used 2"),
        (2, {}, "2 use(s), but used 1", "2 use(s), but used 1"),
        (2, {"twice": True, "beside": True}, "2 use(s), but used 3", None),
    ],
)
def test_a_wrong_number_of_uses(num_uses, call, weight, bias):
    model = Net()
    layers = registered(model, num_uses)
    with pytest.raises(ValueError, match="registration: ") as error:
        layers.check_registration(outputs=model(torch.ones(4, 2), **call))
    message = str(error.value)
    assert f"parameter second.weight is registered with {weight} time(s)" in message
    assert ("second.bias" in message) == (bias is not None)
    assert "register_..._multi method and num_uses=" in message
    assert "first" not in message
    assert "scale" not in message


def test_all_that_is_wrong_is_in_one_message():
    model = Net()
    layers = LayerCollection(model)
    layers.register_fully_connected(model.first)
    layers.register_fully_connected(model.second)
    model.first.bias.requires_grad_(False)
    left_out = {"first.bias", "second.bias"}
    variables = [p for name, p in model.named_parameters() if name not in left_out]
    with pytest.raises(ValueError, match="registration: ") as error:
        layers.check_registration(variables, model(torch.ones(4, 2), twice=True)["z"])
    problems = str(error.value).removeprefix("registration: ").split("; ")
    assert problems[0].startswith("parameter scale has no block: register its layer")
    assert problems[1:5] == [
        "parameter first.bias is registered, but is frozen",
        "parameter second.bias is registered, but not among the variables",
        "parameter second.weight is registered with 1 use(s), but used 2 time(s) by the "
        "outputs",
        "parameter second.bias is registered with 1 use(s), but used 2 time(s) by the "
        "outputs",
    ]
    with pytest.raises(
        ValueError, match=r"variables: .*scale has no block.*second\.bias is"
    ):
        layers.check_variables(variables)


def test_a_layer_that_the_outputs_do_not_depend_on():
    model = Net()
    layers = registered(model)
    with pytest.raises(ValueError, match=r"second\.weight .* used 0 time\(s\)"):
        layers.check_registration(outputs=model.first(torch.ones(4, 2)))


def test_a_network_whose_output_has_its_own_derivatives():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x):
            u = self.net(x.requires_grad_())
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            return du - u

    model = Residual()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    z = model(torch.randn(5, 1))
    layers.check_registration()
    with pytest.raises(ValueError, match=r"used 2 time.*physics-informed .*_generic"):
        layers.check_registration(outputs=z)
    generic = LayerCollection(model)
    generic.register_generic(model.net, "full")
    generic.check_registration(outputs=z)


def test_what_the_model_returned_needs_losses_to_be_understood():
    model = Net()
    layers = LayerCollection(model)
    layers.register_fully_connected(model.first)
    with pytest.raises(ValueError, match="no loss is registered"):
        layers.check_registration(model.first.parameters(), model(torch.ones(4, 2)))
