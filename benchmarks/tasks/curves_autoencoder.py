"""T3: a deep autoencoder of curves, made here.

The generator follows the description of CURVES (Hinton & Salakhutdinov 2006, supplement):
a cubic spline through three points, six numbers in all, drawn into 28x28 pixels. The ink is
our own, since the original's is not known, so figures are not comparable with papers.
784-400-200-100-50-25-6 and back, tanh, linear code, Bernoulli loss, Glorot's uniform
weights, batches of 1 000 of 20 000 images; the loss is watched on the first 2 000. The
first plateau is near 188, the loss of the mean image.

Notation: knots `(x_i, y_i)`, i = 0, 1, 2, of the natural spline; with `h_i = x_{i+1} − x_i`
and slopes `d_i`, the second derivative at the middle knot is `3 (d_1 − d_0)/(h_0 + h_1)`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import Task, autoencoder, bernoulli_loss, seeded, shuffled_batches

WIDTHS = (784, 400, 200, 100, 50, 25, 6)
TRAIN, TEST, EVALUATED = 20_000, 4000, 2000
SIDE, POINTS, BLUR, GAIN = 28, 60, 0.6, 1.5
CHUNK = 500  # curves that are drawn at once
TARGET = 115.5  # of the best tuned of AdamW and SGD after nine tenths of its steps
SEED = 0  # of the data; the seed of a run is another


def curves(number: int, seed: int = SEED) -> Tensor:
    """Return images `[number, 784]` in [0, 1]; a curve that leaves the frame is redrawn."""
    generator = torch.Generator().manual_seed(seed)
    parts, found = [], 0
    while found < number:
        x, y = _splines(CHUNK, generator)
        inside = ((y >= 1) & (y <= 26)).all(dim=1)
        parts.append(_ink(x[inside], y[inside]))
        found += int(inside.sum())
    return torch.cat(parts)[:number]


def _splines(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points `[number, POINTS]` evenly spaced along the way of random splines."""
    knots_x = 2 + 20 * torch.rand(number, 3, generator=generator)
    knots_x = knots_x.sort(dim=1).values + torch.tensor([0.0, 2.0, 4.0])
    knots_y = 2 + 24 * torch.rand(number, 3, generator=generator)
    fine = torch.linspace(0, 1, 400)
    x = knots_x[:, :1] + (knots_x[:, 2:] - knots_x[:, :1]) * fine
    y = natural_spline(knots_x, knots_y, x)
    lengths = torch.hypot(x.diff(dim=1), y.diff(dim=1)).cumsum(dim=1)
    lengths = functional.pad(lengths, (1, 0))
    wanted = lengths[:, -1:] * torch.linspace(0, 1, POINTS)
    places = torch.searchsorted(lengths, wanted).clamp(max=len(fine) - 1)
    return x.gather(1, places), y.gather(1, places)


def natural_spline(knots_x: Tensor, knots_y: Tensor, x: Tensor) -> Tensor:
    """Evaluate natural cubic splines through three knots `[N, 3]` at `x [N, points]`."""
    h, d = knots_x.diff(dim=1), knots_y.diff(dim=1) / knots_x.diff(dim=1)
    bend = 3 * (d[:, 1:] - d[:, :1]) / h.sum(dim=1, keepdim=True)
    left = x < knots_x[:, 1:2]
    width = torch.where(left, h[:, :1], h[:, 1:])
    slope = torch.where(left, d[:, :1], d[:, 1:])
    # The distance from the outer knot of the piece, inwards, and the same from that side.
    away = torch.where(left, x - knots_x[:, :1], knots_x[:, 2:] - x)
    outer = torch.where(left, knots_y[:, :1], knots_y[:, 2:])
    line = outer + torch.where(left, slope, -slope) * away
    return line + bend / 6 * away * (away.square() / width - width)


def _ink(x: Tensor, y: Tensor) -> Tensor:
    """Share each point among its four pixels, blur a little, clip at 1."""
    images = torch.zeros(len(x), SIDE * SIDE)
    column, row = x.floor(), y.floor()
    for right in (0, 1):
        for down in (0, 1):
            share = (1 - (x - column - right).abs()) * (1 - (y - row - down).abs())
            places = (row + down) * SIDE + column + right
            images.scatter_add_(1, places.long(), share)
    offsets = torch.arange(-2.0, 3.0)
    taps = torch.exp(-offsets.square() / (2 * BLUR**2))
    taps = taps / taps.sum()
    images = images.view(-1, 1, SIDE, SIDE)
    images = functional.conv2d(images, taps.view(1, 1, 5, 1), padding=(2, 0))
    images = functional.conv2d(images, taps.view(1, 1, 1, 5), padding=(0, 2))
    return (GAIN * images).clamp(max=1).flatten(1)


def make_task(data_dir: Path | None = None, train: int = TRAIN, test: int = TEST) -> Task:
    """Return the task of so many images; the curves need no folder."""
    x = curves(train + test)
    x, x_test = x[:train], x[train:]
    return Task(
        name="T3",
        title="autoencoder of curves",
        make_model=seeded(lambda: autoencoder(*WIDTHS, init=nn.init.xavier_uniform_)),
        batches=shuffled_batches(x, x, min(1000, train)),
        loss=bernoulli_loss,
        kfac_loss="bernoulli",
        train_cases=(x[:EVALUATED], x[:EVALUATED]),
        test_cases=(x_test, x_test),
        test_metric="loss",
        target=TARGET,
        rival_steps=1000,
        kfac_steps=100,
    )
