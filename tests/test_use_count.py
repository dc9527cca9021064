import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch.use_count import count_uses


def used(model, *outputs):
    counts = count_uses(outputs)
    return {name: counts[param] for name, param in model.named_parameters()}


LAYERS = {
    "linear": (nn.Linear(2, 3), torch.ones(4, 2)),
    "linear over tokens": (nn.Linear(2, 3), torch.ones(4, 5, 2)),
    "convolution": (nn.Conv2d(2, 3, 2), torch.ones(4, 2, 5, 5)),
    "layer norm": (nn.LayerNorm(2), torch.rand(4, 2)),
    "batch norm": (nn.BatchNorm2d(2), torch.rand(4, 2, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("calls", [1, 3])
def test_every_call_of_a_layer_is_a_use(name, calls):
    layer, x = LAYERS[name]
    z = sum(layer(x + k) for k in range(calls))
    assert used(layer, z) == {"weight": calls, "bias": calls}


def test_an_embedding():
    layer = nn.Embedding(5, 2)
    ids = torch.tensor([0, 3, 3])
    assert used(layer, layer(ids)) == {"weight": 1}
    assert used(layer, layer(ids) + layer(ids.flip(0))) == {"weight": 2}


def test_a_use_beside_the_call():
    layer = nn.Linear(2, 2)
    z = functional.linear(layer(torch.ones(3, 2)), layer.weight)
    assert used(layer, z) == {"weight": 2, "bias": 1}


def test_outputs_are_one_graph():
    """What two outputs have in common counts once; the same output given twice too."""
    trunk, heads = nn.Linear(2, 2), [nn.Linear(2, 1), nn.Linear(2, 3)]
    h = trunk(torch.ones(3, 2))
    z = [head(h) for head in heads]
    assert used(trunk, *z) == used(trunk, *z, *z) == {"weight": 1, "bias": 1}
    assert used(heads[0], z[1]) == {"weight": 0, "bias": 0}


def test_an_output_on_the_way_to_another():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    h = first(torch.ones(3, 2))
    assert used(first, h, second(h)) == {"weight": 1, "bias": 1}
    assert used(first, second(h), h) == {"weight": 1, "bias": 1}


def test_derivatives_of_the_network_are_uses():
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(4, 2, requires_grad=True)
    u = net(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    counts = used(net, du)
    assert counts["0.weight"] > 1
    assert used(net, u)["0.weight"] == 1


def test_autocast_casts_a_weight_once_for_all_its_uses():
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(layer(torch.ones(2, 4)))
    assert used(layer, z) == {"weight": 2, "bias": 2}


def test_an_output_without_a_graph():
    with torch.no_grad():
        z = nn.Linear(2, 2)(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"outputs: expected .* attached to their graph"):
        count_uses([z])
