"""10 000 draws for a sampled Fisher against its expectation, the exact mode.

Draws are made in 100 batches, whose scatter gives the standard error of every entry. An
entry's deviation in standard errors is then one of Student's t with 99 degrees of freedom.
Among thousands of entries some lie beyond 3, so two things are asked of all entries
together: the largest deviation is below the quantile that the largest of so many exceeds
with a probability of 1 in 1000 (by Bonferroni, whatever their correlation), and along a
few random directions, which are fixed before the draws, it is below 3. All seeds are
fixed; of right code one in 300 directions would fail with another seed.
"""

import math

import pytest
import torch
from torch import nn

from kfac_torch import LayerCollection
from kfac_torch.estimator import FisherEstimator

pytestmark = pytest.mark.usefixtures("float64")
BATCHES, DRAWS = 100, 100


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 2, 2, stride=2), nn.Tanh(), nn.Conv2d(2, 3, (2, 1)), nn.Tanh(),
        nn.Flatten(), nn.Linear(6, 3)
    )  # fmt: skip


NETS = {"MLP": (mlp, (2, 3)), "conv net": (conv_net, (2, 1, 4, 4))}


def gather(model, loss, mode, batches):
    """The blocks of every batch, one after the other: `[batches, P, P]` by layer."""
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_loss_function(loss)
    estimator = FisherEstimator(None, 0.0, 0.0, layers, (), mode, seed=1)
    blocks = {name: [] for name in layers.blocks}
    for x in batches:
        model(x)
        assert estimator.update_covariances() == []
        for name, block in layers.blocks.items():
            # A is the same in every batch; G is what is drawn.
            blocks[name].append(block.full_fisher_block())
    estimator.close()
    return {name: torch.stack(each) for name, each in blocks.items()}


def students_quantile(probability, degrees):
    """The t beyond which (both sides) a deviation lies with this probability."""
    t = torch.linspace(0, 30, 300_001)
    density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    gammas = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    density *= math.exp(gammas) / math.sqrt(degrees * math.pi)
    beyond = 1 - 2 * torch.cumulative_trapezoid(density, t)
    return t[1:][beyond > probability][-1].item()


def deviations(samples, exact):
    """In standard errors, of `samples [batches, ...]`; 0 where nothing is drawn."""
    error = samples.std(0) / BATCHES**0.5
    scale = exact.abs().max()
    certain = error < 1e-12 * scale
    difference = samples.mean(0) - exact
    assert (difference[certain].abs() <= 1e-10 * scale).all()
    return (difference / error)[~certain].abs()


@pytest.mark.parametrize("mode", ["gradients", "curvature_prop"])
@pytest.mark.parametrize("loss", ["normal", "categorical", "bernoulli"])
@pytest.mark.parametrize("net", NETS)
def test_ten_thousand_draws(net, loss, mode):
    make, shape = NETS[net]
    model, x = make(), torch.randn(shape)
    exact = gather(model, loss, "exact", [x])
    # Every batch is the two examples, over and over.
    repeated = x.repeat(DRAWS // len(x), *[1] * (x.dim() - 1))
    drawn = gather(model, loss, mode, [repeated] * BATCHES)
    for layer, (block,) in exact.items():
        samples = drawn[layer]
        all_entries = deviations(samples, block)
        assert len(all_entries) >= 0.5 * block.numel()  # the others are not drawn
        limit = students_quantile(1e-3 / len(all_entries), BATCHES - 1)
        assert all_entries.max() < limit
        directions = torch.randn(5, len(block))
        along = torch.einsum("ki,bij,kj->bk", directions, samples, directions)
        expected = torch.einsum("ki,ij,kj->k", directions, block, directions)
        assert (deviations(along, expected) < 3).all()
        # The test has the power to tell a scale that is off by 2 per cent of the trace.
        traces = samples.diagonal(dim1=-2, dim2=-1).sum(-1)
        assert traces.std() / BATCHES**0.5 < 0.02 * block.trace()
