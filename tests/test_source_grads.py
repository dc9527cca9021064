"""Gradients at layers' outputs: those that a backward hands on are those it returns."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from kfac_torch.capture import Capture, Layer
from kfac_torch.source_grads import source_grads, visit_source_grads

pytestmark = pytest.mark.usefixtures("float64")


class Residual(nn.Module):
    """Branches that meet again, one layer twice, and one that leads nowhere."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.mix = (nn.Linear(4, 4) for _ in range(3))
        self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        self.idle(x)
        x = x + self.q(x) * self.k(x)
        x = x + self.mix(torch.tanh(self.mix(x)))
        return self.head(x)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = torch.relu_(self.body(x))
        return self.left(x), self.right(x)


class Halves(nn.Module):
    """Two outputs of one operation, each of them a layer's."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(4, 4), nn.Identity(), nn.Identity()

    def forward(self, x):
        left, right = self.first(x).unbind(-1)[:2]
        return self.a(left) * self.b(right)


def chain():
    return nn.Sequential(
        *(layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.Tanh()))
    )


def recorded(model):
    """Network outputs, sources there, and the edges of all layers' outputs."""
    layers = {
        name: Layer((module,))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Identity) and module is not model
    }
    tapes = []
    capture = Capture(model, layers, lambda z, calls: tapes.append((z, calls)))
    model(torch.randn(5, 4))
    capture.close()
    z, calls = tapes[0]
    outputs = z if isinstance(z, tuple) else (z,)
    return outputs, [torch.randn_like(z) for z in outputs], [call.output for call in calls]


@pytest.mark.parametrize("make", [chain, Residual, TwoHeads, Halves])
@pytest.mark.parametrize("with_params", [False, True])
def test_what_is_visited_is_what_is_returned(make, with_params):
    model = make()
    outputs, sources, edges = recorded(model)
    params = list(model.parameters())[:1] if with_params else []
    expected = source_grads(
        outputs, [source[None] for source in sources], [*edges, *params]
    )
    found = dict[int, torch.Tensor]()
    ends = visit_source_grads(outputs, sources, edges, params, found.__setitem__)
    for i, grad in enumerate(expected[: len(edges)]):
        assert (grad is None) == (i not in found)
        if grad is not None:
            assert torch.equal(found[i], grad[0])
    for grad, end in zip(expected[len(edges) :], ends, strict=True):
        assert torch.equal(end, grad[0])
    assert all(param.grad is None for param in model.parameters())


def test_nothing_is_visited_in_a_later_backward():
    """The hooks are gone, also after an error, and the graph is whole."""
    model = Residual()
    outputs, sources, edges = recorded(model)
    seen = []
    visit_source_grads(outputs, sources, edges, [], lambda i, grad: seen.append(i))
    number = len(seen)
    assert sorted(seen) == list(range(1, len(edges)))  # all but the idle one

    def fail(i, grad):
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError, match="no"):
        visit_source_grads(outputs, sources, edges, [], fail)
    torch.autograd.backward(outputs, sources)
    assert len(seen) == number


def test_gradients_are_not_held_at_once():
    """In a chain the gradient at one layer is gone when the one before is visited."""
    outputs, sources, edges = recorded(nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))))
    seen, most = [], [0]

    def visit(i, grad):
        seen.append(StorageWeakRef(grad.untyped_storage()))
        most[0] = max(most[0], sum(not known.expired() for known in seen))

    visit_source_grads(outputs, sources, edges, [], visit)
    assert len(seen) == 6
    assert most[0] <= 2
    kept = source_grads(outputs, [source[None] for source in sources], edges)
    assert len({grad.untyped_storage().data_ptr() for grad in kept}) == 6


def test_without_the_graph_it_can_be_used_once():
    outputs, sources, edges = recorded(chain())
    visit_source_grads(outputs, sources, edges, [], lambda i, grad: None, keep_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(outputs, sources)
