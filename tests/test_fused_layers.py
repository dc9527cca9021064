"""Attention and recurrent layers, against the same nets written with linear layers.

A layer is a row of `PAIRS`: the fused one and its twin, whose linear layers have the
parts' names and whose blocks are known to be right.
"""

import copy

import pytest
import torch
import torch.utils.checkpoint
from dense_fisher import dense_fisher
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kfac_torch import KFAC, FisherEstimator, LayerCollection, fisher_blocks as fb

N, L, S = 3, 5, 4


def linear_of(part):
    """The linear layer, or one for each group, with a part's parameters."""
    rows = part.weight.shape[0] // part.groups
    weights = part.weight.detach().split(rows)
    biases = [None] * part.groups if part.bias is None else part.bias.detach().split(rows)
    layers = []
    for W, b in zip(weights, biases, strict=True):
        layer = nn.Linear(W.shape[1], rows, bias=b is not None)
        layer.load_state_dict({"weight": W} if b is None else {"weight": W, "bias": b})
        layers.append(layer)
    return layers


class Twin(nn.Module):
    """The linear layers of a fused module, as a dictionary."""

    def __init__(self, module):
        super().__init__()
        self.maps = nn.ModuleDict()
        self.like = (module,)  # for its sizes; not a submodule
        for part in fb.linear_parts(module):
            for group, layer in enumerate(linear_of(part)):
                name = part.name if part.groups == 1 else f"{part.name}_{group}"
                self.maps[name] = layer


class AttentionTwin(Twin):
    def forward(self, query, key, value, **_):
        q, k, v = (
            self.maps[f"in_proj_{group}"](x) for group, x in enumerate((query, key, value))
        )
        (like,) = self.like
        heads = [
            x.unflatten(-1, (like.num_heads, like.head_dim)).permute(1, 2, 0, 3)
            for x in (q, k, v)
        ]
        scores = heads[0] @ heads[1].mT / like.head_dim**0.5
        mixed = scores.softmax(-1) @ heads[2]
        return self.maps["out_proj"](mixed.permute(2, 0, 1, 3).flatten(2)), None


class SeparateTwin(AttentionTwin):
    """Without the bias, which three layers share."""

    def forward(self, query, key, value, **_):
        for group, name in enumerate(("q_proj", "k_proj", "v_proj")):
            self.maps[f"in_proj_{group}"] = self.maps[name]
        try:
            return super().forward(query, key, value)
        finally:
            for group in range(3):
                del self.maps[f"in_proj_{group}"]


def cell(kind, s, u, h, c):
    if isinstance(kind, nn.GRU | nn.GRUCell):
        (r0, z0, n0), (r1, z1, n1) = s.chunk(3, -1), u.chunk(3, -1)
        r, z = (r0 + r1).sigmoid(), (z0 + z1).sigmoid()
        return (1 - z) * (n0 + r * n1).tanh() + z * h, None
    if isinstance(kind, nn.LSTM | nn.LSTMCell):
        i, f, g, o = (s + u).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    return (s + u).tanh() if kind.nonlinearity == "tanh" else (s + u).relu(), None


class RecurrentTwin(Twin):
    """Sequences one by one, each of its own length."""

    def forward(self, x):
        (like,) = self.like
        packed = not isinstance(x, torch.Tensor)
        if packed:
            x, lengths = pad_packed_sequence(x)
        else:
            lengths = torch.full((x.shape[1],), x.shape[0])
        results = [self.sequence(x[:t, n], like) for n, t in enumerate(lengths.tolist())]
        return nn.utils.rnn.pad_sequence(results), None

    def sequence(self, x, like):
        for layer in range(like.num_layers):
            ways = [self.one_way(x, f"l{layer}", like)]
            if like.bidirectional:
                back = self.one_way(x.flip(0), f"l{layer}_reverse", like)
                ways.append(back.flip(0))
            x = torch.cat(ways, -1)
        return x

    def one_way(self, x, name, like):
        h = x.new_zeros(like.proj_size or like.hidden_size)
        c, outputs = x.new_zeros(like.hidden_size), []
        for step in x:
            s, u = self.maps[f"ih_{name}"](step), self.maps[f"hh_{name}"](h)
            h, c = cell(like, s, u, h, c)
            if like.proj_size:
                h = self.maps[f"hr_{name}"](h)
            outputs.append(h)
        return torch.stack(outputs)


class CellTwin(Twin):
    def forward(self, x, state):
        (like,) = self.like
        h, c = state if isinstance(like, nn.LSTMCell) else (state, None)
        h, c = cell(like, self.maps["ih"](x), self.maps["hh"](h), h, c)
        return h if c is None else (h, c)


class Net(nn.Module):
    """A layer between others, given its arguments by `call`."""

    def __init__(self, layer, call, size=4):
        super().__init__()
        self.enter, self.layer, self.head = nn.Linear(3, size), layer, nn.Linear(size, 2)
        self.call = call

    def forward(self, x):
        return self.head(self.call(self.layer, self.enter(x).tanh()).tanh())


# How a layer is called with `x [N, L, features]`: -> [N, L, features].


def attend(layer, x):
    x = x.transpose(0, 1)
    return layer(x, x, x)[0].transpose(0, 1)


def cross(layer, x):
    """Queries at all positions, keys and values at fewer, which differ."""
    x = x.transpose(0, 1)
    return layer(x, x[:S], x[1:].cos()[:S])[0].transpose(0, 1)


def narrow(layer, x):
    x = x.transpose(0, 1)
    return layer(x, x[..., :2], x[..., 1:])[0].transpose(0, 1)


def twice(layer, x):
    return attend(layer, cross(layer, x).tanh())


def scan(layer, x):
    return layer(x.transpose(0, 1))[0].transpose(0, 1)


def scan_twice(layer, x):
    return scan(layer, scan(layer, x).tanh() + x.flip(1))


def scan_packed(layer, x):
    lengths = torch.tensor([5, 3, 2, 5, 1, 4])[: len(x)]
    packed = pack_padded_sequence(x.transpose(0, 1), lengths, enforce_sorted=False)
    output, _ = layer(packed)
    if not isinstance(output, torch.Tensor):
        output, _ = pad_packed_sequence(output)
    return output.transpose(0, 1)


def loop(layer, x):
    state, outputs = x.new_zeros(len(x), 4), []
    lstm = isinstance(layer, nn.LSTMCell) or isinstance(
        getattr(layer, "like", [None])[0], nn.LSTMCell
    )
    state = (state, state) if lstm else state
    for step in x.unbind(1):
        state = layer(step, state)
        outputs.append(state[0] if lstm else state)
    return torch.stack(outputs, 1)


PAIRS = {
    "self-attention": (lambda: nn.MultiheadAttention(4, 2), AttentionTwin, attend, 4),
    "attention, no bias": (
        lambda: nn.MultiheadAttention(4, 2, bias=False), AttentionTwin, attend, 4
    ),
    "cross-attention": (lambda: nn.MultiheadAttention(4, 2), AttentionTwin, cross, 4),
    "attention, two calls": (lambda: nn.MultiheadAttention(4, 2), AttentionTwin, twice, 4),
    "separate projections": (
        lambda: nn.MultiheadAttention(4, 2, bias=False, kdim=2, vdim=3),
        SeparateTwin, narrow, 4,
    ),
    "RNN": (lambda: nn.RNN(4, 4), RecurrentTwin, scan, 4),
    "RNN, relu": (
        lambda: nn.RNN(4, 4, nonlinearity="relu", bias=False), RecurrentTwin, scan, 4
    ),
    "GRU": (lambda: nn.GRU(4, 4, num_layers=2), RecurrentTwin, scan, 4),
    "GRU, packed": (
        lambda: nn.GRU(4, 2, bidirectional=True), RecurrentTwin, scan_packed, 4
    ),
    "GRU, two calls": (lambda: nn.GRU(4, 4), RecurrentTwin, scan_twice, 4),
    "LSTM": (
        lambda: nn.LSTM(4, 2, num_layers=2, bidirectional=True), RecurrentTwin, scan, 4
    ),
    "LSTM, projection": (lambda: nn.LSTM(4, 5, proj_size=4), RecurrentTwin, scan, 4),
    "LSTM, packed": (lambda: nn.LSTM(4, 4, bias=False), RecurrentTwin, scan_packed, 4),
    "RNN cell": (lambda: nn.RNNCell(4, 4), CellTwin, loop, 4),
    "GRU cell": (lambda: nn.GRUCell(4, 4), CellTwin, loop, 4),
    "LSTM cell": (lambda: nn.LSTMCell(4, 4, bias=False), CellTwin, loop, 4),
}  # fmt: skip


def pair(name):
    make, twin, call, size = PAIRS[name]
    layer = make()
    for param in layer.parameters():
        nn.init.normal_(param, std=0.7)
    net = Net(layer, call, size)
    other = copy.deepcopy(net)
    other.layer = twin(layer)
    return net, other


def register(layers, model):
    for module in model.modules():
        if type(module) is nn.Linear:
            layers.register_fully_connected_multi(module)
    layers.register_squared_error_loss()


def close(actual, expected):
    scale = expected.abs().max().item()
    assert scale > 1e-6
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * scale)


def gather(model, layers, batches, mode="exact"):
    estimator = FisherEstimator(None, 0.95, 0.1, layers, estimation_mode=mode)
    for x, y in batches:
        loss = functional.mse_loss(model(x), y) * y.shape[-1] / 2
        loss.backward()
    assert estimator.update_covariances() == []
    estimator.close()


def twin_block(blocks, part):
    """`[groups, ...]` dense blocks of the linear layers that are one part."""
    names = [n for n in blocks if n.removeprefix("layer.maps.").rpartition("_")[0] == part]
    names = [f"layer.maps.{part}"] if f"layer.maps.{part}" in blocks else sorted(names)
    return torch.block_diag(*(blocks[name].full_fisher_block() for name in names))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mode", ["exact", "empirical"])
@pytest.mark.parametrize("name", PAIRS)
def test_blocks_are_those_of_linear_layers(name, mode):
    """With two micro-batches of different size."""
    net, other = pair(name)
    x, y = torch.randn(6, L, 3), torch.randn(6, L, 2)
    torch.testing.assert_close(net(x), other(x), rtol=1e-12, atol=1e-12)
    ours, theirs = LayerCollection(net), LayerCollection(other)
    ours.auto_register_layers()
    ours.register_squared_error_loss()
    register(theirs, other)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    if "packed" in name:
        batches = [(x, y)]  # whose lengths are those of whole batches
    gather(net, ours, batches, mode)
    gather(other, theirs, batches, mode)
    ours.check_registration()
    for key, block in ours.blocks.items():
        if key.startswith("layer."):
            expected = twin_block(theirs.blocks, key.removeprefix("layer."))
        else:
            expected = theirs.blocks[key].full_fisher_block()
        close(block.full_fisher_block(), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", ["self-attention", "cross-attention", "separate projections", "GRU cell"]
)
def test_rows_that_no_loss_term_reaches_do_not_count(name):
    """The last tokens of most examples are padding, and queries of nothing."""
    blocks, x = [], torch.randn(6, L, 3)
    y = torch.randint(2, (6, L))
    y[1:, 2:] = -100
    nets = pair(name)
    for net in nets:
        layers = LayerCollection(net)
        if net is nets[0]:
            layers.auto_register_layers(net.layer)
            layers.register_categorical_predictive_distribution()
        else:
            for module in net.layer.maps.values():
                layers.register_fully_connected_multi(module)
            layers.register_categorical_predictive_distribution()
        estimator = FisherEstimator(None, 0.95, 0.1, layers, estimation_mode="exact")
        z = net(x)
        functional.cross_entropy(z.flatten(0, 1), y.flatten()).backward()
        assert estimator.update_covariances() == []
        blocks.append(layers.blocks)
        estimator.close()
    for key, block in blocks[0].items():
        theirs = twin_block(blocks[1], key.removeprefix("layer."))
        close(block.full_fisher_block(), theirs)
    reached = {"self-attention": "layer.out_proj", "GRU cell": "layer.hh"}
    if name in reached:  # 5 of 1 example, 2 of the other 5
        rows = blocks[0][reached[name]].num_locations
        assert rows == pytest.approx(1)


@pytest.mark.usefixtures("float64")
def test_the_bias_of_separate_projections():
    """`T G_g`, with the rows of each: those of the packed weight's bias rows."""
    x, y = torch.randn(6, L, 3), torch.randn(6, L, 2)
    packed = nn.MultiheadAttention(4, 2)
    for param in packed.parameters():
        nn.init.normal_(param)
    separate = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
    weights = packed.in_proj_weight.detach().split(4)
    weights = [weights[0], weights[1][:, :3], weights[2][:, :3]]
    state = {f"{n}_proj_weight": W for n, W in zip("qkv", weights, strict=True)}
    rest = {k: v for k, v in packed.state_dict().items() if k != "in_proj_weight"}
    separate.load_state_dict(state | rest)
    with torch.no_grad():  # so that both compute the same
        packed.in_proj_weight[4:, 3] = 0
    blocks = []
    for layer in (packed, separate):

        def call(layer, x):
            x, y = x.transpose(0, 1), x.transpose(0, 1)[:S, :, : layer.kdim]
            return layer(x, y, y)[0].transpose(0, 1)

        torch.manual_seed(3)
        net = Net(layer, call)
        layers = LayerCollection(net)
        layers.register_multihead_attention(layer)
        layers.register_squared_error_loss()
        gather(net, layers, [(x, y)])
        blocks.append(layers.blocks)
    V = torch.arange(15 * 4).view(3, 5, 4)[:, -1].flatten()  # the bias rows
    expected = blocks[0]["layer.in_proj"].full_fisher_block()[V][:, V]
    close(blocks[1]["layer.in_proj_bias"].full_fisher_block(), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("name", ["cross-attention", "LSTM"])
def test_generic_blocks_of_parts_are_exact(name, kind):
    net, _ = pair(name)
    layers = LayerCollection(net)
    register_it = {
        "LSTM": layers.register_recurrent,
        "cross-attention": layers.register_multihead_attention,
    }[name]
    register_it(net.layer, kind)
    layers.register_squared_error_loss()
    x, y = torch.randn(2, L, 3), torch.randn(2, L, 2)
    dense = [dense_fisher(net, x, layers, block) for block in layers.get_blocks()]
    gather(net, layers, [(x, y)])
    for block, F in zip(layers.get_blocks(), dense, strict=True):
        expected = F if kind == "full" else F.diagonal().diag()
        close(block.full_fisher_block(), expected)


# Where a Kronecker product is exact: one datum, one position.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.RNN(4, 4),
        lambda: nn.GRU(4, 4),
        lambda: nn.LSTM(4, 5, proj_size=4),
    ],
    ids=["attention", "RNN", "GRU", "LSTM"],
)
def test_exact_for_one_datum_with_one_position(make):
    net = Net(make(), lambda layer, x: start(layer, x.transpose(0, 1)).transpose(0, 1))
    layers = LayerCollection(net)
    layers.auto_register_layers(net.layer)
    layers.register_squared_error_loss()
    x = torch.randn(1, 1, 3)
    dense = [dense_fisher(net, x, layers, block) for block in layers.get_blocks()]
    gather(net, layers, [(x, torch.randn(1, 1, 2))])
    for block, F in zip(layers.get_blocks(), dense, strict=True):
        close(block.full_fisher_block(), F)
        if block.part == "in_proj":  # a softmax over one position is constant
            assert F[:40].count_nonzero() == 0
            assert F[40:].count_nonzero() > 0


def start(layer, x):
    """A call from a state that is not zero, so that its map has a gradient."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer(x, x, x)[0]
    h = torch.ones(1, 1, 4, dtype=x.dtype)
    c = torch.ones(1, 1, 5, dtype=x.dtype)
    return layer(x, (h, c) if isinstance(layer, nn.LSTM) else h)[0]


# What is registered.


def names_of(model, module=None):
    layers = LayerCollection(model)
    layers.auto_register_layers(module)
    return list(layers.blocks)


def test_names_and_parameters():
    lstm = nn.LSTM(2, 4, 2, bidirectional=True, proj_size=3)
    parts = [
        f"{part}_l{layer}{way}"
        for layer in (0, 1)
        for way in ("", "_reverse")
        for part in ("ih", "hh", "hr")
    ]
    assert names_of(lstm) == [f"model.{part}" for part in parts]
    net = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2, vdim=3), "b": nn.GRUCell(2, 3)})
    attention = ["q_proj", "k_proj", "v_proj", "in_proj_bias", "out_proj"]
    assert names_of(net) == [*(f"a.{part}" for part in attention), "b.ih", "b.hh"]
    layers = LayerCollection(net)
    layers.auto_register_layers()
    assert set(layers.registered_variables) == set(net.parameters())
    decoder = nn.TransformerDecoderLayer(4, 2, 8)
    assert names_of(decoder) == [
        "self_attn.in_proj", "self_attn.out_proj", "multihead_attn.in_proj",
        "multihead_attn.out_proj", "linear1", "linear2", "norm1", "norm2", "norm3",
    ]  # fmt: skip


def test_what_is_frozen_or_of_no_map_has_no_block():
    net = nn.ModuleList([nn.MultiheadAttention(4, 2, add_bias_kv=True), nn.LSTM(2, 3)])
    net[0].in_proj_weight.requires_grad_(False)
    net[1].weight_ih_l0.requires_grad_(False)
    net[1].bias_hh_l0.requires_grad_(False)
    layers = LayerCollection(net)
    layers.auto_register_layers()
    assert list(layers.blocks) == ["0.out_proj", "1.hh_l0"]
    assert [p is net[1].weight_hh_l0 for p in layers.blocks["1.hh_l0"].params] == [True]
    net.requires_grad_(False)
    net[0].out_proj.weight.requires_grad_(True)
    assert names_of(net) == ["0.out_proj"]
    net.requires_grad_(False)
    assert names_of(net) == []
    with pytest.raises(ValueError, match="layer 1: expected a trained weight, got none"):
        LayerCollection(net).register_recurrent(net[1])


class Doubled(nn.LSTM):
    def forward(self, x):
        return super().forward(2 * x)


def test_what_is_left_alone():
    model = nn.ModuleDict({"subclass": Doubled(2, 3)})
    assert names_of(model) == []
    layers = LayerCollection(model)
    layers.register_recurrent(model["subclass"])  # where one knows what it computes
    assert list(layers.blocks) == ["subclass.ih_l0", "subclass.hh_l0"]
    model = nn.ModuleDict({"a": nn.GRUCell(3, 3), "b": nn.GRUCell(3, 3)})
    model["b"].weight_hh = model["a"].weight_hh
    assert names_of(model) == []
    model = nn.ModuleDict({"a": nn.GRUCell(3, 3)})
    layers = LayerCollection(model)
    layers.define_linked_parameters([model["a"].weight_ih, model["a"].weight_hh])
    layers.auto_register_layers()
    assert not layers.blocks
    layers = LayerCollection(model)
    layers.define_linked_parameters([model["a"].weight_ih, model["a"].bias_ih], "full")
    layers.auto_register_layers()
    assert [type(b) for b in layers.get_blocks()] == [fb.FullFB, fb.LinearMapFB]


def test_all_parts_or_none():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Linear(2, 2)})
    layers = LayerCollection(model)
    layers.register_fully_connected(model["b"])
    layers.register_generic(model["a"].out_proj.bias)
    before = dict(layers.blocks)
    with pytest.raises(ValueError, match=r"layer a\.out_proj: .*not registered yet"):
        layers.register_multihead_attention(model["a"])
    assert layers.blocks == before
    with pytest.raises(ValueError, match="expected a module of ModuleDict"):
        layers.register_recurrent(nn.GRU(2, 2))
    with pytest.raises(
        TypeError, match=r"layer b: expected MultiheadAttention, got Linear"
    ):
        layers.register_multihead_attention(model["b"])


def test_maps_in_one_weight_have_no_diagonal_sides():
    layer = nn.MultiheadAttention(4, 2)
    with pytest.raises(NotImplementedError, match=r"layer x: 3 maps .* approx=\"kron\""):
        fb.LinearMapFB(
            fb.linear_parts(layer)[0], layer, "x", diagonal_approx_for_input=True
        )


# When it is recorded.


def watched(model):
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_squared_error_loss()
    return FisherEstimator(None, 0.95, 0.1, layers)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(2, 3)

    def forward(self, x, wrong=False):
        return self.layer(x[..., :1] if wrong else x)[0]


def test_a_failed_forward_leaves_no_mode_behind():
    model = Fails()
    estimator = watched(model)
    before = hooks(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 2, 2), wrong=True)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert hooks(model) == before
    model(torch.randn(4, 2, 2)).square().mean().backward()
    assert estimator.update_covariances() == []


def test_forwards_that_are_not_recorded_are_the_fused_ones(monkeypatch):
    model = Fails()
    estimator = watched(model)
    x = torch.randn(4, 2, 2)
    calls = []
    monkeypatch.setattr(
        "kfac_torch.capture.ComputeByParts",
        lambda record: calls.append(1) or torch.autograd.profiler.record_function("x"),
    )
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    functional_call(model, {n: 2 * p for n, p in model.named_parameters()}, (x,))
    estimator.collecting = False
    model(x)
    assert calls == []
    estimator.collecting = True
    model(x)
    assert calls == [1]


class Checkpointed(Fails):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(3, 1)

    def part(self, x):
        x, _ = self.layer(x)
        return self.mix(x, x, x)[0]

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)


@pytest.mark.usefixtures("float64")
def test_checkpoints_compute_by_parts_again():
    """In a recorded forward, and in one that is not."""
    torch.manual_seed(1)
    model = Checkpointed()
    plain = copy.deepcopy(model)
    plain.forward = plain.part
    blocks, x = [], torch.randn(4, 2, 2)
    for each in (model, plain):
        estimator = watched(each)
        for collecting in (True, False):
            estimator.collecting = collecting
            each(x).square().mean().backward()
            if collecting:
                assert estimator.update_covariances() == []
        blocks.append(estimator.blocks)
        estimator.close()
        assert hooks(each) == 0
    for name, block in blocks[0].items():
        close(block.full_fisher_block(), blocks[1][name].full_fisher_block())
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        close(one.grad, two.grad)


def test_the_root_may_be_fused():
    model = nn.LSTM(2, 3)
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_squared_error_loss(0)
    estimator = FisherEstimator(None, 0.95, 0.1, layers)
    output, _ = model(torch.randn(4, 2, 2))
    output.square().mean().backward()
    assert estimator.update_covariances() == []
    # 8 rows of 4 loss terms: each part is seen once.
    assert [block.num_locations for block in layers.get_blocks()] == [2, 2]


# Training.


class LanguageModel(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        if kind == "attention":
            self.mix = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        else:
            self.mix = getattr(nn, kind)(8, 8, batch_first=True)

    def forward(self, ids):
        x = self.embed(ids)
        if isinstance(self.mix, nn.TransformerEncoderLayer):
            mask = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
            return self.head(self.mix(x, src_mask=mask, is_causal=True))
        return self.head(self.mix(x)[0])


def train(model, optimizer, steps, padding=False):
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(11, (16, 1), generator=generator)
        ids = (ids + 3 * torch.arange(9)) % 11
        targets = ids[:, 1:].clone()
        if padding:
            targets[::2, 5:] = -100
        optimizer.zero_grad()
        z = model(ids[:, :-1])
        loss = functional.cross_entropy(z.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("padding", [False, True], ids=["all tokens", "padding"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "attention"])
def test_a_language_model_learns(kind, padding):
    model = LanguageModel(kind)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)
    optimizer = KFAC(model, lr=0.3, damping=0.03, loss="categorical")
    losses = train(model, optimizer, 20, padding)
    assert losses[-1] < 0.3 * losses[0]
    assert all(later < earlier for earlier, later in zip(losses, losses[5:], strict=False))


def test_a_restored_optimizer_makes_the_same_steps(tmp_path):
    runs = []
    for restored in (False, True):
        torch.manual_seed(0)
        model = LanguageModel("LSTM")
        optimizer = KFAC(model, lr=0.1, damping=0.1, loss="categorical")
        train(model, optimizer, 3)
        if restored:
            torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
            state, optimizer_state = torch.load(tmp_path / "run.pt", weights_only=True)
            model = LanguageModel("LSTM")
            model.load_state_dict(state)
            optimizer = KFAC(model, lr=0.1, damping=0.1, loss="categorical")
            optimizer.load_state_dict(optimizer_state)
        runs.append(train(model, optimizer, 3))
    assert runs[0] == runs[1]
