"""The lineage's own training runs, six steps each, through `KFAC` on PyTorch modules."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC

GOLDEN = np.load(Path(__file__).parent / "golden" / "optimizer.npz")
RUNS = json.loads(bytes(GOLDEN["meta_json"]))[:8]
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
        self.double()
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


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['name']}-{run['net']}")
def test_run(run):
    def array(key):
        return torch.from_numpy(GOLDEN[f"{run['name']}/{key}"])

    model = Net(run)
    kind = run["net"].split("_")[-1]
    optimizer = KFAC(
        model,
        LOSS[kind],
        lr=float(np.float32(run["learning_rate"])),
        damping=float(np.float32(run["damping"])),
        momentum=run["momentum"],
        momentum_type=run["momentum_type"],
        norm_constraint=run.get("norm_constraint"),
        estimation_mode=run["estimation_mode"],
        cov_ema_decay=run["cov_ema_decay"],
        invert_every=1,
    )
    x, y = array("x"), array("y")
    for step in range(run["steps"]):
        optimizer.zero_grad()
        loss = loss_of(kind, model(x), y)
        assert abs(loss.item() / array("losses")[step].item() - 1) < 1e-7
        loss.backward()
        optimizer.step()
        for name, module in (("0", model.first), ("1", model.second)):
            w = model.from_lineage(array(f"step{step}/w{name}"))
            assert (module.weight - w).abs().max() < 1e-7
            assert (module.bias - array(f"step{step}/b{name}")).abs().max() < 1e-7
    final = loss_of(kind, model(x), y).item()
    assert abs(final / array("losses")[run["steps"]].item() - 1) < 1e-7
