import gc

import pytest
import torch
from torch import nn

from kfac_torch.capture import Capture, Layer
from kfac_torch.source_grads import source_grads


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def linear_layers(model):
    return {n: Layer((m,)) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def num_hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


def grads_at(z, grad_z, calls):
    grads = source_grads([z], [grad_z[None]], [call.output for call in calls])
    return [None if grad is None else grad[0] for grad in grads]


def test_gradients_at_the_outputs_behind_in_place_activations():
    model, x, tapes = net(), torch.randn(5, 3), []
    capture = Capture(
        model, linear_layers(model), lambda z, calls: tapes.append((z, calls))
    )
    model(x)
    ((z, calls),) = tapes
    assert [call.layer for call in calls] == ["0", "2"]
    weight = torch.randn(5, 2)
    grads = grads_at(z, weight, calls)
    s0 = model[0](x).detach().requires_grad_()
    expected = torch.autograd.grad((model[2](s0.relu()) * weight).sum(), s0)[0]
    torch.testing.assert_close(grads[0], expected)
    torch.testing.assert_close(grads[1], weight)
    torch.testing.assert_close(calls[1].input, model[0](x).relu().detach())
    assert all(p.grad is None for p in model.parameters())
    z.sum().backward()  # the graph is still there
    capture.close()


@pytest.mark.parametrize("how", ["eval", "no_grad", "disabled"])
def test_when_nothing_is_recorded(how):
    model, tapes = net(), []
    capture = Capture(
        model,
        linear_layers(model),
        lambda z, calls: tapes.append(calls),
        enabled=lambda: how != "disabled",
    )
    if how == "eval":
        model.eval()
    with torch.set_grad_enabled(how != "no_grad"):
        model(torch.randn(5, 3))
    assert tapes == ([] if how == "no_grad" else [[]])
    capture.close()


def test_the_root_may_be_a_layer():
    model, tapes = nn.Linear(3, 2), []
    capture = Capture(
        model, {"model": Layer((model,))}, lambda z, calls: tapes.append(calls)
    )
    model(torch.randn(5, 3))
    assert [call.layer for call in tapes[0]] == ["model"]
    capture.close()


def test_an_exception_in_a_forward_leaves_no_calls_behind():
    model, tapes = net(), []
    capture = Capture(model, linear_layers(model), lambda z, calls: tapes.append(calls))
    with pytest.raises(RuntimeError):
        model[:2](torch.randn(5, 3)), model(torch.randn(5, 7))
    model(torch.randn(5, 3))
    assert [len(calls) for calls in tapes] == [2]
    capture.close()


def test_an_input_that_was_overwritten_is_reported():
    model, tapes = nn.Linear(3, 2), []
    capture = Capture(model, {"fc": Layer((model,))}, lambda z, calls: tapes.append(calls))
    x = torch.randn(5, 3)
    model(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="layer fc: its input was changed in place"):
        tapes[0][0].check_unchanged()
    capture.close()


@pytest.mark.parametrize("how", ["close", "collect"])
def test_no_hook_remains(how):
    model = net()
    capture = Capture(model, linear_layers(model), lambda z, calls: None)
    assert num_hooks(model) == 2
    if how == "close":
        capture.close()
        capture.close()
    else:
        del capture
        gc.collect()
    assert num_hooks(model) == 0


def test_layers_have_hooks_in_a_recorded_forward_alone():
    model, due, seen = net(), True, []
    model[1].register_forward_hook(lambda *args: seen.append(num_hooks(model) - 1))
    capture = Capture(
        model, linear_layers(model), lambda z, calls: None, enabled=lambda: due
    )
    model(torch.randn(5, 3))
    due = False
    model(torch.randn(5, 3))
    due = True
    model.eval()(torch.randn(5, 3))
    assert seen == [4, 2, 2]
    model.train()
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 4))  # of another size
    assert num_hooks(model) == 3
    capture.close()
    assert num_hooks(model) == 1


def test_layers_that_do_not_reach_the_output_have_no_gradient():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    model, tapes = Branching(), []
    capture = Capture(
        model, linear_layers(model), lambda z, calls: tapes.append((z, calls))
    )
    model(torch.randn(5, 3))
    ((z, calls),) = tapes
    grads = dict(
        zip(
            (c.layer for c in calls),
            grads_at(z, torch.ones_like(z), calls),
            strict=True,
        )
    )
    assert grads["unused"] is None
    assert grads["used"] is not None
    capture.close()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), (5, 2, 3)),
        (nn.Linear(3, 4), (3,)),
        (nn.Conv1d(3, 4, 2), (3, 6)),
        (nn.InstanceNorm1d(3, affine=True), (5, 3, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("watch_grads", [False, True])
def test_an_output_that_is_a_view_behind_an_in_place_activation(layer, shape, watch_grads):
    x = torch.randn(shape, requires_grad=True)  # not the first layer
    assert layer(x)._is_view()
    model, tapes = nn.Sequential(layer, nn.ReLU(inplace=True)), []
    capture = Capture(
        model,
        {"0": Layer((layer,))},
        lambda z, calls: tapes.append((z, calls)),
        watch_grads=watch_grads,
    )
    z = model(x)
    weight = torch.randn_like(z)
    ((_, (call,)),) = tapes
    if watch_grads:
        z.backward(weight)
        (grad,) = call.grads
    else:
        (grad,) = grads_at(z, weight, [call])
    torch.testing.assert_close(grad, weight * (z > 0))
    capture.close()


def test_a_forward_that_fails_is_not_kept():
    def fail(module, args):
        raise ValueError("inside")

    model = net()
    capture = Capture(model, linear_layers(model), lambda z, calls: None)
    capture.keep_forwards = True
    model(torch.randn(5, 3))
    handle = model[2].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="inside"):
        model(torch.randn(5, 3))
    handle.remove()
    assert len(capture.forwards) == 1
    model(torch.randn(5, 3))
    assert len(capture.forwards) == 2
    capture.close()
