"""`Layers`: what a user wants of each layer, and what becomes of the rest."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfac_torch import KFAC, LayerCollection, Layers, SizeLimit


class Net(nn.Module):
    """Layers of several kinds, a bare parameter, and a module that has no block."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.PReLU(6))
        self.head = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.head(self.body(self.embedding(x)) * self.scale)


def batch():
    return torch.randint(7, (32,)), torch.randint(3, (32,))


def kinds(optimizer):
    return {n: type(b).__name__ for n, b in optimizer.estimator.blocks.items()}


def make(model, **kwargs):
    return KFAC(model, "categorical", lr=0.1, damping=0.1, **kwargs)


def train(model, optimizer, steps=1):
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


ALL = {
    "embedding": "EmbeddingKFACFB",
    "body.0": "FullyConnectedKFACBasicFB",
    "body.1": "ScaleAndShiftFullFB",
    "head": "FullyConnectedKFACBasicFB",
}


@pytest.mark.parametrize(
    ("approx", "changed"),
    [
        (None, {}),
        ("diagonal", dict.fromkeys(ALL, "Diagonal")),
        ("kron_reduce", {"body.0": "Reduce", "head": "Reduce"}),
        ({"head": "diagonal"}, {"head": "Diagonal"}),
        ({nn.Linear: "diagonal"}, {"body.0": "Diagonal", "head": "Diagonal"}),
        ({"body": "diagonal"}, {"body.0": "Diagonal", "body.1": "Diagonal"}),
        ({"b*.0": "full"}, {"body.0": "FullFB"}),
        # The innermost counts, and there the name before the type.
        ({"body.0": "kron", "body": "diagonal"}, {"body.1": "Diagonal"}),
        ({"head": "kron", nn.Linear: "diagonal"}, {"body.0": "Diagonal"}),
    ],
    ids=str,
)
def test_approximations(approx, changed):
    found = kinds(make(Net(), approx=approx))
    assert found.keys() == ALL.keys()
    for name, expected in ALL.items():
        if name in changed:
            assert changed[name] in found[name]
        else:
            assert found[name] == expected


def test_a_layer_as_the_key():
    model = Net()
    found = kinds(make(model, approx={model.head: "diagonal", model.body: "adamw"}))
    assert "Diagonal" in found["head"]
    assert found.keys() == {"embedding", "head"}


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_a_rule_in_place_of_an_approximation(rule, recwarn):
    model = Net()
    choice = Layers(approx={nn.Embedding: rule, "scale": rule, "body.2": rule})
    optimizer = make(model, approx=choice)
    assert kinds(optimizer).keys() == ALL.keys() - {"embedding"}
    group = optimizer.param_groups[1]
    assert group["rule"] == rule
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in group["params"]} == {
        "embedding.weight",
        "scale",
        "body.2.weight",
    }
    before = model.embedding.weight.detach().clone()
    train(model, optimizer)
    assert not torch.equal(model.embedding.weight, before)
    assert not recwarn  # who chooses a rule need not be told of it


def test_excluded_layers_are_another_optimizers():
    model = Net()
    mine = make(model, approx=Layers(exclude=["head", nn.PReLU], fallback="sgd"))
    others = [*model.head.parameters(), *model.body[2].parameters()]
    theirs = torch.optim.SGD(others, lr=0.1)
    owned = {id(p) for group in mine.param_groups for p in group["params"]}
    assert not owned.intersection(map(id, others))
    x, y = batch()
    before = [p.detach().clone() for p in others]
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    with pytest.warns(UserWarning, match="momentum: scale$"):
        mine.step()
    for p, q in zip(others, before, strict=True):
        assert torch.equal(p, q)
    theirs.step()
    assert not torch.equal(others[0], before[0])
    assert "another optimizer" in str(mine.report())


@pytest.mark.parametrize("mode", ["gradients", "exact", "empirical"])
def test_two_kfacs_over_parts_of_one_model(mode):
    """Neither takes the other's drawn gradients for the user's."""
    model = Net()
    parts = [
        make(
            model,
            approx=Layers(exclude=exclude, fallback="error"),
            estimation_mode=mode,
        )
        for exclude in (["body", "scale"], ["embedding", "head", "scale", "body.2"])
    ]
    assert [kinds(part).keys() for part in parts] == [
        {"embedding", "head"},
        {"body.0", "body.1"},
    ]
    x, y = batch()
    losses = []
    for _ in range(10):
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for part in parts:
            part.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    (_, G), (_, H) = (
        part.estimator.blocks[n].factors
        for part, n in zip(parts, ("head", "body.0"), strict=True)
    )
    alone = Net()
    alone.load_state_dict(model.state_dict())
    if mode != "gradients":
        one = make(
            alone,
            cov_ema_decay=0.0,
            estimation_mode=mode,
            approx=Layers(fallback="diagonal"),
        )
        F.cross_entropy(alone(x), y).backward()
        one.step()
        for part in parts:
            part.estimator.cov_ema_decay = 0.0
            part.estimator.collecting = True
        alone.load_state_dict(model.state_dict())
        F.cross_entropy(model(x), y).backward()
        for part in parts:
            part.step()
        for factor, name in ((G, "head"), (H, "body.0")):
            other = one.estimator.blocks[name].factors[1]
            torch.testing.assert_close(factor.get_cov(), other.get_cov())


def test_fallbacks():
    with pytest.raises(
        ValueError, match=r"no K-FAC block: scale, body\.2\.weight; .*adamw"
    ):
        make(Net(), approx=Layers(fallback="error"))
    optimizer = make(Net(), approx=Layers(fallback="diagonal"))
    assert kinds(optimizer).keys() == ALL.keys() | {"scale", "body.2.weight"}
    assert kinds(optimizer)["scale"] == "NaiveDiagonalFB"
    assert len(optimizer.param_groups) == 1
    optimizer = make(Net())
    assert [g.get("rule") for g in optimizer.param_groups] == [None, "adamw"]
    with pytest.warns(UserWarning, match=r"by AdamW: body\.2\.weight, scale$"):
        model = Net()
        train(model, make(model))


def test_a_size_limit():
    optimizer = make(Net(), approx=Layers(size_limit=SizeLimit(4)))
    assert "split" in str(optimizer.report())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"approx": {"haed": "diagonal"}}, r"approx: .*'haed'.*did you mean 'head'"),
        ({"exclude": [nn.Conv2d]}, r"exclude: expected the name.*Conv2d"),
        (
            {"approx": {"head": "kron_sua"}},
            r"layer head: approx: .*got 'kron_sua'",
        ),
        ({"approx": {"head.bias": "adamw"}}, r"head\.bias: .*choose for head"),
        ({"exclude": ["head.bias"]}, r"head\.bias: .*choose for head"),
        ({"fallback": "adam"}, "fallback: expected one of.*'adam'"),
    ],
)
def test_choices_that_mean_nothing(choice, message):
    model = Net()
    with pytest.raises(ValueError, match=message):
        make(model, approx=Layers(**choice))
    assert not any(m._forward_hooks for m in model.modules())


def test_choices_beside_a_collection():
    model = Net()
    layers = LayerCollection(model)
    layers.auto_register_layers()
    with pytest.raises(ValueError, match="approx: expected no layer_collection"):
        make(model, layer_collection=layers, approx="diagonal")
    with pytest.raises(TypeError, match="exclude: expected a list"):
        Layers(exclude="head")


def test_layers_of_a_collection():
    model = Net()
    layers = LayerCollection(model)
    layers.register_fully_connected(model.head, approx="full")
    layers.auto_register_layers(layers=Layers(approx="diagonal", fallback="diagonal"))
    assert type(layers.blocks["head"]).__name__ == "FullFB"
    assert set(map(id, layers.registered_variables)) == set(map(id, model.parameters()))
