"""Which way of forward mode the quadratic model's products go, and what is remembered."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from kfac_torch import KFAC, quadratic_model
from kfac_torch.loss_functions import NormalMeanNegativeLogProbLoss
from kfac_torch.ways import Route

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Works in place, which the rules refuse, where the inputs say so."""

    def __init__(self, refusing=True):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.refusing = refusing

    def forward(self, x):
        y = self.inner(x)
        return self.head(y.tanh_() if self.refusing and x[0, 0] > 0 else y.tanh())


class First(nn.Module):
    def forward(self, x):
        return x[0].mean(1)


def recurrent():
    return nn.Sequential(nn.LSTM(4, 3, batch_first=True), First(), nn.Linear(3, 3))


def inputs(refused):
    x = torch.randn(12, 4)
    x[0, 0] = x[0, 0].abs() if refused else -x[0, 0].abs()
    return x


@pytest.fixture
def tried(monkeypatch):
    """At which steps the rules were tried."""
    steps, by_rules = [], quadratic_model._by_rules

    def seen(*args):
        steps.append(seen.step)
        return by_rules(*args)

    monkeypatch.setattr(quadratic_model, "_by_rules", seen)
    seen.steps = steps
    return seen


def train(model, batches, tried=None, **options):
    optimizer = KFAC(model, "categorical", damping=0.1, **options)
    for step, x in enumerate(batches):
        if tried is not None:
            tried.step = step
        optimizer.zero_grad()
        cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()
    return optimizer


def test_a_model_that_is_refused_at_two_steps_is_tried_at_every_hundredth(tried):
    x = torch.randn(6, 3, 4)
    train(recurrent(), [x] * 103, tried)
    assert tried.steps == [0, 1, 100]


def test_inputs_that_are_refused(tried):
    """Now and then they leave the rules to the next step; twice in a row they do not."""
    flags = [1, 0, 1, 0, 0, 1, 1, *[0] * 96]
    model, twin = Net(), Net(refusing=False)
    twin.load_state_dict(model.state_dict())
    batches = [inputs(flag) for flag in flags]
    train(model, batches, tried)
    assert tried.steps == [*range(7), 100, 101, 102]
    train(twin, batches)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_a_step_that_is_left_out_is_not_remembered(tried):
    optimizer = train(recurrent(), [torch.randn(6, 3, 4)], tried)
    known = optimizer.state_dict()["kfac"]["ways"]
    model = optimizer._model
    optimizer.zero_grad()
    cross_entropy(model(torch.randn(6, 3, 4)), torch.arange(6) % 3).backward()
    model[2].weight.grad.fill_(torch.nan)
    with pytest.warns(RuntimeWarning, match="NaN"):
        optimizer.step()
    assert optimizer.state_dict()["kfac"]["ways"] == known == {"last": 1, "steps": 1}


@pytest.mark.parametrize("num_directions", [1, 2])
@pytest.mark.parametrize(
    ("make", "x", "fastest"),
    [(Net, inputs(False), 0), (Net, inputs(True), 1), (recurrent, None, 1)],
)
def test_the_ways_lead_to_the_same(make, x, fastest, num_directions):
    model = make().double()
    x = torch.randn(6, 3, 4) if x is None else x.double()
    params = dict(model.named_parameters())
    directions = [
        {name: torch.randn_like(p) for name, p in params.items()}
        for _ in range(num_directions)
    ]
    found = []
    for first in range(3):
        route = Route(first)
        found.append(
            quadratic_model.fisher_products(
                [lambda q: functional_call(model, q, (x,))],
                lambda z: [(NormalMeanNegativeLogProbLoss(z, var=1.0), 1.0)],
                params,
                directions,
                route=route,
            )
        )
        assert route.way == max(first, fastest)
    for A in found[1:]:
        torch.testing.assert_close(A, found[0], rtol=1e-12, atol=1e-12)
