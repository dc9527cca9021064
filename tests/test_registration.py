"""Which layers are found, shared ones among them, and why others are left alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC, check_curvature, fisher_blocks as fb
from kfac_torch.estimator import FisherEstimator
from kfac_torch.layer_collection import LayerCollection
from kfac_torch.registration import KINDS, MAX_FULL_SCALES, find_layers, kind_of


def found(model):
    layers = LayerCollection(model)
    layers.auto_register_layers()
    return {name: type(block) for name, block in layers.blocks.items()}, layers


def subclass(base, **methods):
    return type(f"My{base.__name__}", (base,), methods)


class Conv1D(nn.Module):
    """The linear layer of GPT-2, as in transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(0.3 * torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


LAYERS = {
    nn.Linear: (2, 3),
    nn.Bilinear: (2, 3, 4),
    nn.Conv2d: (2, 3, 1),
    nn.ConvTranspose1d: (2, 3, 1),
    nn.Embedding: (4, 2),
    nn.EmbeddingBag: (4, 2),
    nn.LayerNorm: (3,),
    nn.RMSNorm: (3,),
    nn.GroupNorm: (1, 3),
    nn.BatchNorm2d: (3,),
    nn.SyncBatchNorm: (3,),
}


@pytest.mark.parametrize("base", LAYERS)
def test_a_subclass_that_computes_the_same_is_of_its_base_s_kind(base):
    args = LAYERS[base]
    own = subclass(base, forward=lambda self, *x: 2 * base.forward(self, *x))
    assert kind_of(base(*args)) == kind_of(subclass(base)(*args)) == KINDS[base]
    assert kind_of(own(*args)) is None
    blocks, layers = found(nn.Sequential(subclass(base)(*args), own(*args)))
    assert list(blocks) == ["0"]
    assert f"no block for My{base.__name__}" in layers.left_alone["1"]


def test_a_convolution_with_its_own_inner_step_is_not_of_its_kind():
    own = subclass(nn.Conv1d, _conv_forward=lambda self, x, w, b: 2 * x)
    assert kind_of(own(1, 1, 1)) is None


def test_the_projection_of_attention_is_registered_once():
    out = nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)
    model = nn.Sequential(nn.MultiheadAttention(4, 2, add_bias_kv=True), out)
    blocks, layers = found(model)
    assert blocks == {
        "0.in_proj": fb.LinearMapFB,
        "0.out_proj": fb.LinearMapFB,
        "1": fb.FullyConnectedKFACBasicFB,
    }
    assert layers.left_alone == {"0": "some of its parameters are of no linear map inside"}


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(2, 3), "weight is frozen"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), "not a parameter"),
        (nn.LazyLinear(3), "no shape yet"),
        (nn.Embedding(4, 2, sparse=True), "sparse"),
        (nn.EmbeddingBag(4, 2, sparse=True, mode="sum"), "sparse"),
        (nn.PReLU(), "no block for PReLU"),
    ],
)
def test_why_a_layer_is_left_alone(module, reason):
    if reason == "weight is frozen":
        module.weight.requires_grad_(False)
    blocks, layers = found(nn.Sequential(module))
    assert not blocks
    assert reason in layers.left_alone["0"]


def test_nothing_to_train_is_no_reason():
    model = nn.Sequential(
        nn.LayerNorm(3, elementwise_affine=False), nn.Linear(2, 3).requires_grad_(False)
    )
    _, layers = found(model)
    assert not layers.left_alone


def test_by_structure_alone():
    assert kind_of(Conv1D(3, 2)) == "fully_connected"
    for changed in ("nf", "weight", "name"):
        module = Conv1D(3, 2)
        if changed == "nf":
            module.nf = 2
        elif changed == "weight":
            module.weight = nn.Parameter(torch.zeros(3, 2, 1))
        else:
            module = subclass(Conv1D)(3, 2)
        assert kind_of(module) is None, changed


def test_lora_beside_a_frozen_layer():
    class LoraLinear(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            m, n = base.in_features, base.out_features
            self.lora_A = nn.ModuleDict({"default": nn.Linear(m, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, n, bias=False)})
            nn.init.zeros_(self.lora_B["default"].weight)

        def forward(self, x):
            lora = self.lora_B["default"](self.lora_A["default"](x))
            return self.base_layer(x) + 0.5 * lora

    torch.manual_seed(0)
    model = nn.Sequential(
        LoraLinear(nn.Linear(6, 8)), nn.Tanh(), LoraLinear(nn.Linear(8, 3))
    )
    optimizer = KFAC(model, "categorical", lr=0.5, damping=1e-2)
    kinds = dict.fromkeys(
        [f"{i}.lora_{c}.default" for i in (0, 2) for c in "AB"],
        fb.FullyConnectedKFACBasicFB,
    )
    assert {n: type(b) for n, b in optimizer.estimator.blocks.items()} == kinds
    before = model[0].base_layer.weight.clone()
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    losses = train(model, optimizer, x, y, 20)
    assert torch.equal(model[0].base_layer.weight, before)
    assert losses[-1] < 0.5 * losses[0]


def train(model, optimizer, x, y, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Norms.


@pytest.mark.parametrize("size", [MAX_FULL_SCALES, MAX_FULL_SCALES + 1])
def test_a_large_norm_is_a_diagonal_unless_said_otherwise(size):
    model = nn.Sequential(nn.LayerNorm(size))
    small = size == MAX_FULL_SCALES
    blocks, _ = found(model)
    expected = fb.ScaleAndShiftFullFB if small else fb.ScaleAndShiftDiagonalFB
    assert blocks == {"0": expected}
    linked = LayerCollection(model)
    linked.define_linked_parameters(list(model.parameters()), "full")
    linked.auto_register_layers()
    assert type(linked.blocks["0"]) is fb.ScaleAndShiftFullFB
    own = LayerCollection(model)
    own.register_scale_and_shift(model[0])
    assert type(own.blocks["0"]) is fb.ScaleAndShiftFullFB
    other = LayerCollection(model)
    other.set_default_scale_and_shift_approximation("diagonal")
    other.auto_register_layers()
    assert type(other.blocks["0"]) is fb.ScaleAndShiftDiagonalFB


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_norm_of_which_a_part_is_trained(frozen):
    model = nn.Sequential(nn.LayerNorm(3))
    getattr(model[0], frozen).requires_grad_(False)
    blocks, layers = found(model)
    if frozen == "weight":
        assert layers.left_alone == {"0": "its weight is frozen"}
    else:
        assert blocks == {"0": fb.ScaleAndShiftFullFB}
        assert layers.registered_variables == [model[0].weight]


def test_a_norm_that_is_called_several_times():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.norm(self.norm(x).tanh()))

    model = Twice()
    _, layers = found(model)
    layers.check_registration(outputs=model(torch.randn(4, 3)))


# Shared parameters.


class Chain(nn.ModuleList):
    def forward(self, x):
        for module in self:
            x = module(x)
        return x


def share(first, *others):
    for other in others:
        for name, param in first.named_parameters():
            setattr(other, name, param)
    return [first, *others]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: nn.Linear(3, 3), fb.FullyConnectedMultiIndepFB),
        (lambda: nn.Linear(3, 3, bias=False), fb.FullyConnectedMultiIndepFB),
        (lambda: Conv1D(3, 3), fb.FullyConnectedMultiIndepFB),
        (lambda: nn.Conv2d(2, 2, 3, padding=1), fb.ConvKFCBasicMultiIndepFB),
        (lambda: nn.Embedding(5, 2), fb.EmbeddingKFACMultiIndepFB),
    ],
)
def test_modules_that_share_all_are_one_block(make, kind):
    modules = share(make(), make(), make())
    blocks, layers = found(nn.ModuleList(modules))
    assert blocks == {"0": kind}
    assert layers.blocks["0"].modules == tuple(modules)
    assert not layers.left_alone


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        (share(nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3, padding=1)), "other settings"),
        (share(nn.Embedding(3, 2), nn.Embedding(3, 2, padding_idx=1)), "other settings"),
        (share(nn.LayerNorm(3), nn.LayerNorm(3)), "without such a block"),
        (share(nn.Linear(3, 3, bias=False), nn.Linear(3, 3)), "shares a part"),
        (share(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 3)), "sparse"),
        (share(nn.Embedding(3, 2), nn.EmbeddingBag(3, 2)), "another kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value[0]).__name__,
)
def test_modules_that_share_but_differ_are_left_alone(modules, reason):
    blocks, layers = found(nn.ModuleList(modules))
    assert not blocks
    assert reason in layers.left_alone["0"]
    assert "1" in layers.left_alone


def test_modules_of_other_settings_are_no_block_either():
    convs = share(nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3, padding=1))
    layers = LayerCollection(nn.ModuleList(convs))
    with pytest.raises(ValueError, match="layer 0: expected modules with the same sett"):
        layers.register_conv2d_multi(convs)


def test_a_weight_shared_outside_the_part_that_is_searched():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)))
    share(model[0][0], model[1][0])
    (only,) = find_layers(model[0], model, ())
    assert only.modules == (model[0][0], model[1][0])


# Tied embeddings.


def tied(*modules):
    for module in modules[1:]:
        module.weight = modules[0].weight
    return nn.ModuleList(modules)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2), (2, 1, 0)])
def test_embeddings_and_heads_of_one_weight(order):
    kinds = [nn.Embedding(5, 2), nn.Linear(2, 5, bias=False), nn.Embedding(5, 2)]
    model = tied(*(kinds[i] for i in order))
    blocks, layers = found(model)
    assert blocks == {"0": fb.TiedEmbeddingFB}
    assert layers.blocks["0"].modules == tuple(model)
    assert not layers.left_alone
    layers.check_registration()


def test_the_bias_of_a_head_is_told_to_have_no_block():
    model = tied(nn.Embedding(5, 2), nn.Linear(2, 5))
    blocks, layers = found(model)
    assert blocks == {"0": fb.TiedEmbeddingFB}
    assert "bias" in layers.left_alone["1"]
    layers.register_generic(model[1].bias)
    layers.check_registration()


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ([nn.Embedding(5, 2), nn.Linear(2, 5)], ValueError, "share their weight, got"),
        ([nn.Embedding(5, 2)], ValueError, "one nn.Embedding or more and one nn.Linear"),
        ([nn.Linear(2, 5)], ValueError, "one nn.Embedding or more and one nn.Linear"),
        (
            [nn.Embedding(5, 2), nn.Conv1d(2, 5, 1)],
            TypeError,
            "expected Embedding or Linear, got Conv1d",
        ),
    ],
)
def test_what_is_no_tied_embedding(modules, error, message):
    layers = LayerCollection(nn.ModuleList(modules))
    with pytest.raises(error, match=f"layer 0: .*{message}"):
        layers.register_tied_embedding(modules)
    assert not layers.blocks


def test_embeddings_with_other_padding_are_not_one_use():
    modules = tied(nn.Embedding(5, 2), nn.Embedding(5, 2, padding_idx=0), nn.Linear(2, 5))
    blocks, layers = found(modules)
    assert not blocks
    with pytest.raises(ValueError, match="same settings"):
        layers.register_tied_embedding(list(modules))


class GPT(nn.Module):
    """GPT-2's parts: tied tokens, positions, `Conv1D`, pre-norm, an MLP, no attention."""

    def __init__(self, vocabulary=11, size=8):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, size), nn.Embedding(6, size)
        self.ln_1, self.ln_f = nn.LayerNorm(size), nn.LayerNorm(size)
        self.c_fc, self.c_proj = Conv1D(4 * size, size), Conv1D(size, 4 * size)
        self.lm_head = nn.Linear(size, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids):
        h = self.wte(ids) + self.wpe(torch.arange(ids.shape[1])[None].expand_as(ids))
        h = h + self.c_proj(functional.gelu(self.c_fc(self.ln_1(h))))
        return self.lm_head(self.ln_f(h))


@pytest.mark.parametrize("mode", ["gradients", "empirical"])
def test_every_parameter_of_a_gpt_has_a_block_and_it_learns(mode):
    torch.manual_seed(0)
    model = GPT()
    optimizer = KFAC(model, "categorical", lr=0.3, damping=1e-2, estimation_mode=mode)
    blocks = optimizer.estimator.blocks
    assert {name: type(block) for name, block in blocks.items()} == {
        "wte": fb.TiedEmbeddingFB,
        "wpe": fb.EmbeddingKFACFB,
        "ln_1": fb.ScaleAndShiftFullFB,
        "ln_f": fb.ScaleAndShiftFullFB,
        "c_fc": fb.FullyConnectedKFACBasicFB,
        "c_proj": fb.FullyConnectedKFACBasicFB,
    }
    optimizer.estimator.layers.check_registration()
    x = torch.randint(11, (32, 6))
    losses = train(model, optimizer, x, (x * 3 + 1) % 11, 20)
    assert losses[-1] < 0.3 * losses[0]


def test_ignored_tokens_do_not_count_in_a_tied_embedding():
    """Beside a batch without them: the rest of the model does not mix tokens."""
    torch.manual_seed(0)
    model = GPT().double()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution()
    x = torch.randint(11, (5, 3))
    blocks = []
    for ignored in (False, True):
        estimator = FisherEstimator(None, 0.0, 0.1, layers, estimation_mode="exact")
        ids, y = x, x.clone()
        if ignored:
            ids = torch.cat([x, torch.randint(11, (5, 3))], 1)
            y = torch.cat([x, torch.full((5, 3), -100)], 1)
        functional.cross_entropy(model(ids).flatten(0, 1), y.flatten()).backward()
        assert estimator.update_covariances() == []
        blocks.append(layers.blocks["wte"].full_fisher_block())
        estimator.release()
    torch.testing.assert_close(*blocks, rtol=0, atol=1e-12)


# Beside the exact blocks.


class Words(nn.Module):
    """Bags of words, one word each (4 is padding), and a bilinear layer: linear."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 3, mode="sum", padding_idx=4)
        self.pairs = nn.Bilinear(3, 2, 4)
        self.register_buffer("other", torch.randn(6, 2))

    def forward(self, ids):
        return self.pairs(self.bag(ids), self.other)


def test_the_check_of_the_curvature_knows_the_new_blocks():
    torch.manual_seed(0)
    check = check_curvature(GPT().double(), "categorical", torch.randint(11, (2, 3)))
    assert check.passed
    assert (check["wte"].verdict, check["ln_f"].verdict) == ("approximate", "equal")
    assert check["wte"].reason == "two uses of a weight are taken as one product"
    ids = torch.tensor([[0, 4], [1, 1], [2, 4], [3, 3], [0, 0], [1, 4]])
    check = check_curvature(Words().double(), "normal", ids)
    assert check.passed
    assert (check["pairs"].verdict, check["pairs"].expected_equal) == ("equal", True)
    assert check["bag"].reason == "a side is a diagonal alone"
