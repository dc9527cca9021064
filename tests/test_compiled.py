"""The quadratic model's pass, compiled: the same steps, or a word and the old ones."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfac_torch import KFAC, compile_forward_mode

pytestmark = pytest.mark.usefixtures("float64")


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Middle(nn.Module):
    """Two layers, and some function between them; a dict."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        hidden = self.function(self.first(x))
        return {"logits": self.last(hidden), "hidden": hidden, "input": x}


def with_break(x):
    torch._dynamo.graph_break()
    return x.tanh()


def without_gradient(x):
    with torch.no_grad():
        constant = x.sigmoid()
    return x * constant


def dropped(x):
    return F.dropout(F.gelu(x), 0.5)


def trained(function, backend=None, steps=5, state=None, start=0):
    """Weights after some steps on batches of two shapes, and what made the passes."""
    torch.manual_seed(0)
    model = Middle(function)
    optimizer = KFAC(model, "categorical", output="logits")
    if backend is not None:
        compile_forward_mode(optimizer, backend)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    for step in range(start, steps):
        torch.manual_seed(step)
        x, y = torch.randn(20 + 10 * (step % 2), 4), torch.randint(3, (30,))
        optimizer.zero_grad()
        F.cross_entropy(model(x)["logits"], y[: len(x)]).backward()
        optimizer.step()
    state = (model.state_dict(), optimizer.state_dict())
    optimizer.close()
    return list(model.parameters()), optimizer._updates.rerun, state


BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_steps_are_those_of_the_rules(backend):
    found, passes, _ = trained(dropped, backend)
    assert passes.refusal is None
    assert passes.num_graphs == 3  # of two shapes; the first step has one direction alone
    torch.testing.assert_close(found, trained(dropped)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_resumed_run_goes_on_bit_for_bit(backend):
    expected, _, _ = trained(dropped, backend, steps=7)
    _, _, state = trained(dropped, backend, steps=4)
    found, passes, _ = trained(dropped, backend, steps=7, state=state, start=4)
    assert passes.refusal is None
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (with_break, "Unsupported"),
        (Rounded.apply, "the rules do not follow it: NoRule: .*autograd.Function"),
        (without_gradient, "its derivatives are not those of the rules"),
    ],
)
def test_what_is_not_compiled_goes_on_as_before_with_one_word(function, why):
    with pytest.warns(UserWarning, match=f"goes on as without: {why}") as told:
        found, _, _ = trained(function, "eager")
    assert len(told) == 1
    torch.testing.assert_close(found, trained(function)[0], rtol=0, atol=0)


def test_a_batch_with_nan_decides_nothing():
    model = Middle(torch.tanh)
    optimizer = KFAC(model, "categorical", output="logits", num_burnin_steps=1)
    compile_forward_mode(optimizer, "eager")
    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    for value in (0.0, torch.nan, 0.0):
        optimizer.zero_grad()
        F.cross_entropy(model(x + value)["logits"], y).backward()
        if value != value:
            with pytest.warns(RuntimeWarning, match="NaN"):
                optimizer.step()
        else:
            optimizer.step()
    optimizer.close()
    assert optimizer._updates.rerun.refusal is None
    assert optimizer.skipped_steps == 1


def test_where_it_does_not_work_nothing_is_changed():
    optimizer = KFAC(Middle(torch.tanh), "categorical", output="logits")
    before = optimizer._updates.rerun
    with pytest.raises(
        RuntimeError, match=r"works with 'no_such'.*C\+\+ compiler.*no_such"
    ):
        compile_forward_mode(optimizer, "no_such")
    assert optimizer._updates.rerun is before
    optimizer.close()


def test_without_a_compiler_the_error_says_so(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env={
            **os.environ,
            "CXX": "/no/compiler",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert "it needs a C++ compiler" in found.stdout
    assert "/no/compiler" in found.stdout


WITHOUT_COMPILER = """
from torch import nn
from kfac_torch import KFAC, compile_forward_mode
try:
    compile_forward_mode(KFAC(nn.Linear(2, 2), "categorical"))
except RuntimeError as error:
    print(error)
"""


def test_other_steps_have_no_such_pass():
    optimizer = KFAC(Middle(torch.tanh), "categorical", output="logits", lr=0.1)
    with pytest.raises(ValueError, match=r"quadratic model.*got momentum_type='regular'"):
        compile_forward_mode(optimizer)
    optimizer.close()
