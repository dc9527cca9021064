"""Blocks of transposed convolutions: the stuffed input, sizes, errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC, fisher_blocks as fb
from kfac_torch.fisher_blocks.conv_transpose import stuff

pytestmark = pytest.mark.usefixtures("float64")
CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
LAYERS = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def mirrored(x):
    return x.flip(*range(2, x.dim()))


def drawn_layer(generator):
    """A random layer and input; every argument per dimension."""

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    dims = draw(1, 3)
    groups = draw(1, 2)
    each = [
        {"k": draw(1, 3), "s": draw(1, 4), "d": draw(1, 3), "n": draw(1, 4)}
        for _ in range(dims)
    ]
    for dim in each:
        dim["op"] = draw(0, max(dim["s"], dim["d"]) - 1)
        size = (dim["n"] - 1) * dim["s"] + dim["d"] * (dim["k"] - 1) + 1 + dim["op"]
        dim["p"] = draw(0, (size - 1) // 2)  # more than d (k - 1), too
    k, s, d, n, op, p = ([dim[key] for dim in each] for key in each[0])
    layer = LAYERS[dims - 1](
        2 * groups, 3 * groups, k, s, p, op, groups, bias=draw(0, 1) == 1, dilation=d
    )
    return layer, torch.randn(2, 2 * groups, *n)


@pytest.mark.parametrize("seed", range(60))
def test_the_layer_is_a_plain_convolution_of_the_stuffed_input(seed):
    layer, x = drawn_layer(torch.Generator().manual_seed(seed))
    z = layer(x)
    stuffed = stuff(
        x, z.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation
    )
    block = fb.ConvTransposeDiagonalFB(layer, "up")
    assert torch.equal(block.prepare_input(x, z.shape), stuffed)
    # The kernel of the plain convolution [out, in/groups, *kernel], by the block's vec.
    V = block.params_to_vector(block.params)
    rows = V[:-1] if block.has_bias else V
    kernel = rows.mT.reshape(layer.out_channels, -1, *layer.kernel_size)
    plain = CONV[x.dim() - 2](
        stuffed, kernel, layer.bias, dilation=layer.dilation, groups=layer.groups
    )
    torch.testing.assert_close(mirrored(plain), z, rtol=1e-12, atol=1e-12)
    # And unmirrored, with the flipped kernel, as it is usually told.
    plain = CONV[x.dim() - 2](
        mirrored(stuffed), mirrored(kernel), layer.bias, dilation=layer.dilation,
        groups=layer.groups,
    )  # fmt: skip
    torch.testing.assert_close(plain, z, rtol=1e-12, atol=1e-12)


def test_the_vector_is_a_permutation_of_the_weight():
    """Rows by input channel of the group, then kernel offset as PyTorch stores it."""
    layer = nn.ConvTranspose2d(4, 6, (2, 3), groups=2)
    weight, bias = torch.arange(72.0).view(4, 3, 2, 3), torch.arange(6.0)
    V = fb.ConvTransposeKFCFB(layer).params_to_vector([weight, bias])
    assert V.shape == (2, 13, 3)
    assert V[1, 6 * 1 + 3 * 1 + 2, 0] == weight[2 + 1, 0, 1, 2]
    assert V[0, :6, 2].equal(weight[0, 2].flatten())
    assert V[1, -1].equal(bias[3:])
    flat = fb.ConvTransposeDiagonalFB(layer).params_to_vector([weight, bias])
    assert flat.equal(torch.cat([V[0], V[1]], dim=1))


@pytest.mark.parametrize(("size", "T"), [((5, 6), 30), ((6, 6), 36), ((6, 8), 48)])
def test_the_number_of_locations_is_that_of_the_real_output(size, T):
    layer = nn.ConvTranspose2d(2, 3, 3, stride=(2, 3), padding=(1, 0))
    block = fb.ConvTransposeKFCFB(layer, "up")
    block.instantiate_factors(0.1)
    x, g = torch.randn(4, 2, 3, 2), torch.randn(4, 3, *size)
    assert layer(x, output_size=size).shape == g.shape
    block.accumulate(block.moments([x], [[g]], 4), 0.9)
    assert block.num_locations == T
    # Over all locations A holds the second moment of the layer's own output.
    out = layer(x, output_size=size).movedim(1, -1).reshape(-1, 3)
    W = block.params_to_vector(block.params)
    moment = W.mT @ block.factors[0].get_cov() @ W
    torch.testing.assert_close(moment, out.mT @ out / len(out), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [(4, 6), (7, 6), (5, 9)])
def test_an_output_that_is_not_the_layers(size):
    layer = nn.ConvTranspose2d(2, 3, 3, stride=(2, 3), padding=(1, 0))
    block = fb.ConvTransposeKFCFB(layer, "up")
    block.instantiate_factors(0.1)
    with pytest.raises(ValueError, match=r"layer up: expected outputs of this layer.*got"):
        block.moments([torch.randn(4, 2, 3, 2)], [[torch.randn(4, 3, *size)]], 4)


def test_other_errors():
    with pytest.raises(TypeError, match=r"layer c: expected ConvTranspose1d or Conv"):
        fb.ConvTransposeKFCFB(nn.Conv2d(1, 1, 1), "c")
    with pytest.raises(TypeError, match=r"layer c: expected Conv1d or Conv2d or Conv3d"):
        fb.ConvKFCBasicFB(nn.ConvTranspose2d(1, 1, 1), "c")
    for kind in (fb.ConvTransposeKFCFB, fb.ConvTransposeKFCReduceFB):
        block = kind(nn.ConvTranspose2d(2, 3, 2), "up")
        block.instantiate_factors(0.1)
        with pytest.raises(ValueError, match=r"up\.input: .*rank 4"):
            block.moments([torch.randn(2, 3, 3)], [[torch.randn(3, 4, 4)]], 1)
    block = fb.ConvTransposeDiagonalFB(nn.ConvTranspose1d(2, 3, 2), "up")
    block.instantiate_factors(0.1)
    x, g = torch.randn(4, 2, 3), torch.randn(4, 3, 4)
    with pytest.raises(NotImplementedError, match=r'layer up: .*got 2; .*"kron"'):
        block.moments([x, x], [[g, g]], 4)


@pytest.mark.parametrize("mode", ["gradients", "empirical", "curvature_prop", "exact"])
def test_a_decoder_in_float32(mode):
    """Sizes given in the call, several modes, the plain loop: the loss goes down."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 8)
            self.up1 = nn.ConvTranspose2d(2, 4, 3, stride=2)
            self.up2 = nn.ConvTranspose2d(4, 1, 3, stride=2, padding=1, groups=1)

        def forward(self, z):
            x = torch.tanh(self.linear(z)).view(-1, 2, 2, 2)
            x = torch.tanh(self.up1(x))
            return self.up2(x, output_size=[10, 9]).flatten(1)

    model = Decoder()
    z, y = torch.randn(32, 4), torch.rand(32, 90)
    optimizer = KFAC(model, nn.MSELoss(), lr=0.3, damping=0.1, estimation_mode=mode)
    assert set(optimizer.estimator.blocks) == {"linear", "up1", "up2"}
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(z), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.close()
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
