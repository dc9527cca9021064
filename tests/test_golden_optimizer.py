"""Golden runs through `KFAC` on PyTorch modules.

The lineage's own training runs, six steps each, and a trajectory of kfac-jax 0.0.8.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC
from kfac_torch.damping import LevenbergMarquardt

GOLDEN = np.load(Path(__file__).parent / "golden" / "optimizer.npz")
RUNS = json.loads(bytes(GOLDEN["meta_json"]))
LOSS = {"cat": "categorical", "normal": "normal", "bern": "bernoulli"}


def loss_of(kind, z, y):
    if kind == "cat":
        return functional.cross_entropy(z, y)
    if kind == "normal":
        return 0.5 * (y - z).square().sum(1).mean()
    return functional.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1).mean()


class Net(nn.Module):
    """The golden nets, in PyTorch's layout, made from TensorFlow's arrays."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        w0, b0, w1, b1 = (
            torch.from_numpy(GOLDEN[f"{run['name']}/{k}"]) for k in "w0 b0 w1 b1".split()
        )
        self.is_conv = run["net"].startswith("conv")
        if self.is_conv:
            valid = "valid" in run["net"]
            self.first = nn.Conv2d(2, w0.shape[-1], 3, 2 if valid else 1, 0 if valid else 1)
        else:
            self.first = nn.Linear(*w0.shape)
        self.second = nn.Linear(*w1.shape)
        self.to(w0.dtype)
        self.space = None
        if self.is_conv:
            x = torch.from_numpy(GOLDEN[f"{run['name']}/x"])
            self.space = self.first(x.movedim(-1, 1)).shape[2:]
        with torch.no_grad():
            for module, w, b in ((self.first, w0, b0), (self.second, w1, b1)):
                module.weight.copy_(self.from_lineage(w))
                module.bias.copy_(b)

    def from_lineage(self, w):
        if w.dim() == 4:
            return w.permute(3, 2, 0, 1)
        if self.is_conv:  # rows in the order of a flattened [h, w, c]
            h, width = self.space
            return w.view(h, width, -1, w.shape[1]).permute(3, 2, 0, 1).flatten(1)
        return w.T

    def forward(self, x):
        if self.is_conv:
            x = x.movedim(-1, 1)
        return self.second(torch.tanh(self.first(x)).flatten(1))


def agrees(ours, theirs, tolerance):
    """Relative to the largest entry, or absolute where that is below 1."""
    return (ours - theirs).abs().max() < tolerance * max(1, theirs.abs().max())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['name']}-{run['net']}")
def test_run(run):
    """To 1e-7 in float64; in float32 losses to 1e-4 and parameters to 1e-4."""

    def array(key):
        return torch.from_numpy(GOLDEN[f"{run['name']}/{key}"])

    x, y = array("x"), array("y")
    double = array("w0").dtype == torch.float64
    loss_tolerance, tolerance = (1e-7, 1e-7) if double else (1e-4, 1e-4)
    model = Net(run)
    kind = run["net"].split("_")[-1]
    lr = run["learning_rate"]
    optimizer = KFAC(
        model,
        LOSS[kind],
        lr=None if lr is None else float(np.float32(lr)),
        damping=float(np.float32(run["damping"])),
        momentum=run["momentum"],
        momentum_type=run["momentum_type"],
        norm_constraint=run.get("norm_constraint"),
        estimation_mode=run["estimation_mode"],
        cov_ema_decay=run["cov_ema_decay"],
        invert_every=1,
    )
    for step in range(run["steps"]):
        optimizer.zero_grad()
        loss = loss_of(kind, model(x), y)
        assert abs(loss.item() / array("losses")[step].item() - 1) < loss_tolerance
        loss.backward()
        optimizer.step()
        for name, module in (("0", model.first), ("1", model.second)):
            w = model.from_lineage(array(f"step{step}/w{name}"))
            assert agrees(module.weight, w, tolerance)
            assert agrees(module.bias, array(f"step{step}/b{name}"), tolerance)
    final = loss_of(kind, model(x), y).item()
    assert abs(final / array("losses")[run["steps"]].item() - 1) < loss_tolerance


# step: loss, lr, momentum, λ, ρ, norm of p
KFAC_JAX = [
    (1.3930781, 1.6135444, 0.0, 1.0, None, 0.028022087),
    (1.3906721, 2.1329839, -0.23246568, 1.0, 0.9997741, 0.020799589),
    (1.3893318, 1.1010462, 0.29377231, 0.81, None, 0.018252186),
    (1.3884589, 1.3752477, 0.12272722, 0.81, 1.0002005, 0.013580494),
    (1.3879875, 1.1409021, 0.27571969, 0.6561, None, 0.012414899),
]


def test_the_adaptive_trajectory_of_kfac_jax():
    """Every printed digit: exact Fisher, quadratic model, adaptive damping, an l2 term."""
    torch.set_default_dtype(torch.float64)
    i = torch.arange(144.0)
    x, y = torch.sin(0.7 * i + 0.3).view(24, 6), (7 * torch.arange(24)) % 4
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight.copy_(0.5 * torch.cos(1.3 * i[:30]).view(6, 5).T)
        model[2].weight.copy_(0.5 * torch.cos(0.9 * i[:20] + 1).view(5, 4).T)
        model[0].bias.zero_(), model[2].bias.zero_()
    optimizer = KFAC(
        model,
        "categorical",
        damping=LevenbergMarquardt(initial=1.0, decay=0.9, interval=2, l2_reg=1e-3),
        momentum_type="qmodel",
        estimation_mode="exact",
        invert_every=1,
    )

    def closure():
        optimizer.zero_grad()
        squares = sum(p.square().sum() for p in model.parameters())
        loss = functional.cross_entropy(model(x), y) + 1e-3 / 2 * squares
        loss.backward()
        return loss

    def vector():
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    previous = torch.zeros_like(vector())
    for loss, lr, momentum, damping, rho, norm in KFAC_JAX:
        before = vector()
        assert optimizer.step(closure).item() == pytest.approx(loss, abs=6e-8)
        last, update = optimizer.last_step, vector() - before
        assert last.lr.item() == pytest.approx(lr, abs=6e-8)
        assert last.momentum.item() == pytest.approx(momentum, abs=6e-9)
        assert last.damping == pytest.approx(damping, abs=1e-12)
        assert last.rho == (None if rho is None else pytest.approx(rho, abs=6e-8))
        p = (last.momentum * previous - update) / last.lr
        assert p.norm().item() == pytest.approx(norm, abs=6e-10)
        previous = update
