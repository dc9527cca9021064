"""Nets and batches of the tests of refreshes."""

import itertools

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def net(widths):
    """Linear layers with tanh between them; their names are "0", "2", "4" and so on."""
    layers = []
    for size, out in itertools.pairwise(widths):
        layers += [nn.Linear(size, out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batches(number, size=12):
    return [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(number)]


def step(model, optimizer, batch):
    model.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


class Tokens(nn.Module):
    """Several positions of an example, with one loss."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(x.mean(1))
