import pytest
from torch import nn

from kfac_torch.layer_collection import LayerCollection


def test_what_is_registered():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 3),
            "conv1": nn.Conv1d(2, 3, 3),
            "conv2": nn.Conv2d(2, 3, 3),
            "conv3": nn.Conv3d(2, 3, 3),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "transposed": nn.ConvTranspose2d(2, 3, 3),
            "norm": nn.LayerNorm(3),
            "embedding": nn.Embedding(5, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        }
    )
    layers = LayerCollection()
    layers.auto_register_layers(model)
    assert list(layers.blocks) == ["linear", "conv1", "conv2", "conv3"]
    assert len(list(layers.registered_parameters())) == 8


def test_a_parameter_has_one_block():
    layers, linear = LayerCollection(), nn.Linear(2, 3)
    layers.register_fully_connected(linear, "a")
    other = nn.Linear(2, 3)
    other.bias = linear.bias
    for module, name in ((nn.Linear(2, 3), "a"), (linear, "b"), (other, "c")):
        with pytest.raises(ValueError, match=f"layer {name}: .*not registered yet"):
            layers.register_fully_connected(module, name)
    layers.register_convolution(nn.Conv2d(1, 1, 1), "d")
    assert list(layers.blocks) == ["a", "d"]


def test_a_shared_bias_is_a_shared_parameter():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[1].bias = model[0].bias
    layers = LayerCollection()
    layers.auto_register_layers(model)
    assert list(layers.blocks) == ["2"]
