"""Fused layers computed by parts: the same numbers, and all parts seen."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from kfac_torch.fused import ComputeByParts

pytestmark = pytest.mark.usefixtures("float64")
L, S, N = 5, 4, 3


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for part in value for t in tensors(part)]
    return []


def run(module, args, kwargs, record=None):
    """What a call returns, its gradients, and the random state after it."""
    torch.manual_seed(5)
    inputs = [t for t in tensors([args, list(kwargs.values())]) if t.is_floating_point()]
    inputs = [t for t in inputs if t.requires_grad]
    if record is None:
        output = module(*args, **kwargs)
    else:
        with ComputeByParts(record):
            output = module(*args, **kwargs)
    state = torch.get_rng_state()
    floating = [t for t in tensors(output) if t.is_floating_point()]
    torch.manual_seed(6)
    sources = [torch.randn(t.shape) for t in floating]
    wanted = [*inputs, *module.parameters()]
    grads = torch.autograd.grad(floating, wanted, sources, allow_unused=True)
    return output, grads, state


def assert_same(actual, expected):
    (out, grads, state), (out0, grads0, state0) = actual, expected
    assert type(out) is type(out0)
    assert len(tensors(out)) == len(tensors(out0))
    for one, two in zip(tensors(out), tensors(out0), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    for one, two in zip(grads, grads0, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert torch.equal(state, state0)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def mask(*shape):
    padding = torch.zeros(shape, dtype=torch.bool)
    padding[..., -1] = True
    return padding


def causal():
    return torch.ones(L, L).triu(1).bool()


ATTENTION = {
    "plain": ({}, {}, {}),
    "no bias": ({"bias": False}, {}, {}),
    "batch first": ({"batch_first": True}, {}, {}),
    "unbatched": ({}, {"unbatched": True}, {}),
    "self": ({}, {"self": True}, {}),
    "self, no weights": ({}, {"self": True}, {"need_weights": False}),
    "self, batch first": ({"batch_first": True}, {"self": True}, {"need_weights": False}),
    "self, unbatched": ({}, {"self": True, "unbatched": True}, {}),
    "self, causal": ({}, {"self": True}, {"attn_mask": causal(), "is_causal": True}),
    "self, causal, no weights": (
        {},
        {"self": True},
        {"attn_mask": causal(), "is_causal": True, "need_weights": False},
    ),
    "masks": (
        {"dropout": 0.3},
        {},
        {"attn_mask": mask(2 * N, L, S), "key_padding_mask": mask(N, S)},
    ),
    "biases of keys and values": ({"add_bias_kv": True}, {}, {}),
    "zero attention": ({"add_zero_attn": True}, {}, {"average_attn_weights": False}),
    "dropout": ({"dropout": 0.5}, {}, {}),
    "dropout, no weights": ({"dropout": 0.5}, {}, {"need_weights": False}),
    "separate": ({"kdim": 2, "vdim": 6}, {}, {}),
    "separate, no bias": ({"kdim": 2, "vdim": 6, "bias": False}, {}, {}),
    "separate, batch first, biases": (
        {"vdim": 6, "batch_first": True, "add_bias_kv": True, "dropout": 0.2},
        {},
        {"need_weights": False, "key_padding_mask": mask(N, S)},
    ),
}


def attention(name):
    options, kind, kwargs = ATTENTION[name]
    module = nn.MultiheadAttention(4, 2, **options)
    for param in module.parameters():
        nn.init.normal_(param)
    sizes = [(L, 4), (S, options.get("kdim", 4)), (S, options.get("vdim", 4))]
    if kind.get("unbatched"):
        inputs = [leaf(*size) for size in sizes]
    elif options.get("batch_first"):
        inputs = [leaf(N, *size) for size in sizes]
    else:
        inputs = [leaf(t, N, d) for t, d in sizes]
    if kind.get("self"):
        inputs = [inputs[0]] * 3
    return module, inputs, kwargs


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_the_same(name):
    module, inputs, kwargs = attention(name)
    calls = []

    def record(part, a, s):
        calls.append((part, a.shape[-1], s.shape[-1]))
        return s

    assert_same(run(module, inputs, kwargs, record), run(module, inputs, kwargs))
    if module.in_proj_weight is not None:
        expected = [("in_proj", 4, 4)] * 3
    else:
        sizes = {"q_proj": 4, "k_proj": module.kdim, "v_proj": module.vdim}
        expected = []
        for part, size in sizes.items():
            expected.append((part, size, 4))
            if module.in_proj_bias is not None:
                expected.append(("in_proj_bias", 1, 4))
    assert calls == [*expected, ("out_proj", 4, 4)]


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_layers_of_a_transformer_are_the_same(kind):
    module = kind(4, 2, 8, dropout=0.3, batch_first=True)
    args = [leaf(N, L, 4)] if "Encoder" in kind.__name__ else [leaf(N, L, 4), leaf(N, S, 4)]

    def record(part, a, s):
        return s

    assert_same(run(module, args, {}, record), run(module, args, {}))


KINDS = {
    "RNN": (nn.RNN, {}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu"}),
    "GRU": (nn.GRU, {}),
    "LSTM": (nn.LSTM, {}),
    "LSTM, projection": (nn.LSTM, {"proj_size": 2}),
}
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True, "bidirectional": True},
    "deep": {"num_layers": 3, "dropout": 0.4},
    "deep, bidirectional, no bias": {
        "num_layers": 2, "dropout": 0.4, "bidirectional": True, "bias": False
    },
}  # fmt: skip


def recurrent(kind, options, state, packed):
    cls, extra = KINDS[kind]
    module = cls(3, 4, **extra, **OPTIONS[options])
    first = module.batch_first
    x = leaf(N, L, 3) if first else leaf(L, N, 3)
    args = [x]
    if packed:
        args = [
            pack_padded_sequence(
                x, torch.tensor([2, 5, 3]), enforce_sorted=False, batch_first=first
            )
        ]
    if state:
        count = module.num_layers * (1 + module.bidirectional)
        h = leaf(count, N, module.proj_size or 4)
        args.append((h, leaf(count, N, 4)) if cls is nn.LSTM else h)
    return module, args


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_are_the_same(kind, options, state, packed):
    module, args = recurrent(kind, options, state, packed)
    rows = dict.fromkeys(
        name.removeprefix("weight_")
        for name, p in module.named_parameters()
        if p.dim() == 2
    )
    rows = dict.fromkeys(rows, 0)

    def record(part, a, s):
        rows[part] += a.shape[:-1].numel()
        assert a.shape[-1] == getattr(module, f"weight_{part}").shape[1]
        return s

    assert_same(run(module, args, {}, record), run(module, args, {}))
    assert set(rows.values()) == {10 if packed else L * N}


def test_a_sequence_without_a_batch():
    module, x = nn.GRU(3, 4, bidirectional=True), leaf(L, 3)

    def record(part, a, s):
        return s

    assert_same(run(module, [x], {}, record), run(module, [x], {}))


CELLS = {
    "RNN": (nn.RNNCell, {}),
    "RNN, relu": (nn.RNNCell, {"nonlinearity": "relu"}),
    "GRU": (nn.GRUCell, {}),
    "LSTM": (nn.LSTMCell, {}),
}


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "no batch"])
@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_the_same(kind, bias, state, batched):
    cls, options = CELLS[kind]
    module = cls(3, 4, bias=bias, **options)
    lead = (N,) if batched else ()
    args = [leaf(*lead, 3)]
    if state:
        h = leaf(*lead, 4)
        args.append((h, leaf(*lead, 4)) if cls is nn.LSTMCell else h)
    parts = []

    def record(part, a, s):
        parts.append((part, a.shape[-1]))
        return s

    assert_same(run(module, args, {}, record), run(module, args, {}))
    assert parts == [("ih", 3), ("hh", 4)]


def test_single_precision_too():
    module = nn.LSTM(8, 16, num_layers=2, dropout=0.2).float()
    x = torch.randn(L, N, 8, dtype=torch.float32, requires_grad=True)
    (out, _), grads, state = run(module, [x], {}, lambda part, a, s: s)
    (out0, _), grads0, state0 = run(module, [x], {})
    torch.testing.assert_close(out, out0, rtol=1e-4, atol=1e-5)
    for one, two in zip(grads, grads0, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert torch.equal(state, state0)
