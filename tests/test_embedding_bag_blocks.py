"""Blocks of bags: the rows that a call gives, squared counts, empty bags."""

import pytest
import torch
from torch import nn

from kfac_torch import KFAC
from kfac_torch.fisher_blocks import EmbeddingBagKFACFB
from kfac_torch.layer_collection import LayerCollection

pytestmark = pytest.mark.usefixtures("float64")
IDS = torch.tensor([[1, 4, 1], [2, 2, 2], [0, 3, 1], [4, 4, 4]])
OFFSETS = torch.tensor([0, 2, 2, 7])  # the second bag is empty


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding_idx", [None, 4, -4])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("form", ["rows", "offsets", "last offset", "weights", "int32"])
def test_a_bag_is_the_linear_map_of_its_rows(form, mode, padding_idx):
    last = form == "last offset"
    bag = nn.EmbeddingBag(
        5, 3, mode=mode, padding_idx=padding_idx, include_last_offset=last
    )
    args, kwargs = (IDS,), {}
    if form == "offsets":
        args = (IDS.flatten(), OFFSETS)
    elif last:
        args, kwargs = (), {"input": IDS.flatten(), "offsets": torch.tensor([0, 5, 12])}
    elif form == "weights":
        if mode == "mean":
            return  # PyTorch has none there
        kwargs = {"per_sample_weights": torch.randn(IDS.shape)}
    elif form == "int32":
        args = (IDS.flatten().int(), OFFSETS.int())
    rows = EmbeddingBagKFACFB(bag).call_input(bag, args, kwargs)
    assert rows.is_coalesced()
    assert not rows.requires_grad
    close(rows.to_dense() @ bag.weight, bag(*args, **kwargs))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_the_input_side_is_the_diagonal_of_the_second_moment(mode):
    """Though words occur together, and twice in a bag."""
    bag = nn.EmbeddingBag(5, 3, mode=mode)
    block = EmbeddingBagKFACFB(bag)
    block.instantiate_factors(0.1)
    rows = block.call_input(bag, (IDS,), {})
    A, G = block.moments([rows], [[grads := torch.randn(4, 3)]], 2)
    dense = rows.to_dense()
    close(A.cov, (dense.T @ dense / 4).diagonal())
    close(G.cov, grads.T @ grads / 4)
    assert (A.rows, A.terms) == (4, 2)


def test_empty_bags_are_as_if_they_were_not_there():
    bag = nn.EmbeddingBag(5, 3, padding_idx=4)
    blocks = []
    x, grads = torch.tensor([[1, 4], [4, 4], [2, 4], [2, 2]]), torch.randn(4, 3)
    kept = torch.tensor([True, False, True, True])
    for ids, g in ((x, grads), (x[kept], grads[kept])):
        block = EmbeddingBagKFACFB(bag)
        block.instantiate_factors(0.1)
        rows = block.call_input(bag, (ids,), {})
        block.accumulate(block.moments([rows], [[g]], 4), 0.9)
        blocks.append(block.full_fisher_block())
    close(*blocks)
    block = EmbeddingBagKFACFB(bag)  # and nothing but empty ones
    block.instantiate_factors(0.1)
    rows = block.call_input(bag, (x[1:2],), {})
    close(block.moments([rows], [[grads[:1]]], 1)[0].cov, torch.zeros(5))


def test_the_largest_of_a_bag_has_no_kronecker_block():
    model = nn.Sequential(nn.EmbeddingBag(5, 3, mode="max"), nn.Linear(3, 2))
    layers = LayerCollection(model)
    with pytest.raises(ValueError, match=r'layer 0: expected the mode "sum" or "mean"'):
        layers.register_embedding_bag(model[0])
    layers.auto_register_layers()
    assert list(layers.blocks) == ["1"]
    assert "no linear map" in layers.left_alone["0"]
    layers.register_embedding_bag(model[0], "diagonal")
    layers.check_registration()


@pytest.mark.parametrize("mode", ["gradients", "exact", "empirical"])
def test_training_with_a_bag(mode):
    """A classifier of bags of words, in float32; the class is in the words."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Tanh(), nn.Linear(8, 4))
    optimizer = KFAC(model, "categorical", lr=0.3, damping=1e-2, estimation_mode=mode)
    y = torch.randint(4, (64,))
    x = 5 * y[:, None] + torch.randint(5, (64, 6))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
