"""A size limit: which side becomes what, from the collection down to a training run."""

import pytest
import torch
from test_layer_collection import REGISTER, Zoo
from torch import nn

from kfac_torch import KFAC, LayerCollection, SizeLimit
from kfac_torch.approximations import APPROXIMATIONS
from kfac_torch.fisher_blocks import ConvKFCBasicFB, FullyConnectedKFACBasicFB


def sizes(model, limit, register=LayerCollection.auto_register_layers):
    layers = LayerCollection(model, size_limit=limit)
    register(layers)
    for block in layers.get_blocks():
        block.instantiate_factors(0.1)
    return [block.factor_sizes for block in layers.get_blocks()]


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 20, 3, groups=2),
        nn.Flatten(),
        nn.Linear(40, 7),
        nn.Unflatten(1, (7,)),
    )


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (
            None,
            [["full 28", "full 8"], ["2 x full 37", "2 x full 10"], ["full 41", "full 7"]],
        ),
        (
            SizeLimit(10),
            [
                ["split 3x10 of 28", "full 8"],
                ["2 x split 4x10 of 37", "2 x full 10"],
                ["split 5x9 of 41", "full 7"],
            ],
        ),
        (
            SizeLimit(7),
            [
                ["diagonal 28", "split 2x4"],  # 9 kernel offsets are more than 7
                ["2 x diagonal 37", "2 x split 2x5"],
                ["split 6x7 of 41", "full 7"],
            ],
        ),
        (
            SizeLimit(8, above="diagonal"),
            [
                ["diagonal 28", "full 8"],
                ["2 x diagonal 37", "2 x diagonal 10"],
                ["diagonal 41", "full 7"],
            ],
        ),
        (
            SizeLimit(8, above="low_rank"),
            [
                ["low rank 2 of 28", "full 8"],
                ["2 x low rank 2 of 37", "2 x low rank 2 of 10"],
                ["low rank 2 of 41", "full 7"],
            ],
        ),
    ],
)
def test_each_side_by_its_size(limit, expected):
    assert sizes(net(), limit) == expected


def test_other_layers():
    assert sizes(nn.Embedding(50, 9), SizeLimit(4)) == [["diagonal 50", "split 3x3"]]

    def norm(layers):
        layers.register_scale_and_shift(layers.model)

    def sua(layers):
        layers.register_convolution(layers.model, "kron_sua")

    for size, expected in ((16, "full 16"), (15, "diagonal 16")):
        assert sizes(nn.LayerNorm(8), SizeLimit(size), norm) == [[expected]]
    expected = ["uncorrelated locations 3 of 28", "split 2x4"]
    assert sizes(nn.Conv2d(3, 8, 3), SizeLimit(4), sua) == [expected]


EVERY = [(kind, approx) for kind in REGISTER for approx in APPROXIMATIONS[kind]]


@pytest.mark.parametrize(("kind", "approx"), EVERY)
def test_every_approximation_can_be_registered_with_a_limit(kind, approx):
    method, name = REGISTER[kind]
    model = Zoo()

    def register(layers):
        getattr(layers, method)(model.layer(name), approx)

    found = sizes(model, SizeLimit(2, above="diagonal"), register)
    whole = "series" in approx or (approx == "full" and kind != "scale_and_shift")
    for size in [size for block in found for size in block]:
        _, _, full = size.partition("full ")
        stack = kind == "attention" and size.startswith("3 x ")  # stays as it is
        assert whole or stack or not full or int(full) <= 2, size


def test_sizes_before_there_are_factors():
    with pytest.raises(RuntimeError, match="layer fc: there are no factors yet"):
        _ = FullyConnectedKFACBasicFB(nn.Linear(2, 3), "fc").factor_sizes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_size": 0}, "max_size: expected a positive integer, got 0"),
        (
            {"max_size": 4, "above": "sparse"},
            r"above: expected one of \('split', .*'sparse'",
        ),
        ({"max_size": 4, "rank": 2}, "rank: expected .* got 2 with 'split'"),
        ({"max_size": 4, "above": "low_rank", "rank": 5}, "rank: .* got 5 .* max_size 4"),
        ({"max_size": 4, "above": "low_rank", "rank": 0}, "rank: .* got 0"),
    ],
)
def test_limits_that_make_no_sense(kwargs, message):
    with pytest.raises(ValueError, match="SizeLimit: " + message):
        SizeLimit(**kwargs)


def test_no_limit_and_a_large_one_are_the_same():
    x, g = torch.randn(4, 3, 6, 6), torch.randn(4, 8, 4, 4)
    module = nn.Conv2d(3, 8, 3)
    products = []
    for limit in (None, SizeLimit(28)):
        block = ConvKFCBasicFB(module, "conv", size_limit=limit)
        block.instantiate_factors(0.1)
        block.accumulate(block.moments([x], [[g]], 4), 0.9)
        products.append(block.full_fisher_block())
    assert torch.equal(*products)


@pytest.mark.parametrize("above", ["split", "diagonal", "low_rank"])
@pytest.mark.parametrize("mode", ["gradients", "exact", "empirical"])
def test_training_and_its_state(above, mode, tmp_path):
    """Losses fall, and a run goes on from its state as if it had not stopped."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 1, 6, 6), torch.randint(3, (32,))

    def start():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3))
        layers = LayerCollection(model, size_limit=SizeLimit(12, above=above))
        layers.auto_register_layers()
        layers.register_categorical_predictive_distribution()
        optimizer = KFAC(
            model, layer_collection=layers, lr=0.1, damping=1e-2, estimation_mode=mode,
            momentum=0.0, invert_every=2,
        )  # fmt: skip
        return model, optimizer

    def steps(model, optimizer, number):
        losses = []
        for _ in range(number):
            for part in (slice(0, 20), slice(20, None)):  # micro-batches
                loss = nn.functional.cross_entropy(model(x[part]), y[part])
                (loss * len(y[part]) / 32).backward()
            losses.append(nn.functional.cross_entropy(model.eval()(x), y).item())
            model.train()
            optimizer.step()
            optimizer.zero_grad()
        return losses

    model, optimizer = start()
    before = steps(model, optimizer, 7)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
    after = steps(model, optimizer, 5)
    assert after[-1] < 0.7 * before[0]
    model, optimizer = start()
    weights, state = torch.load(tmp_path / "run.pt", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert steps(model, optimizer, 5) == after
