"""A recurrent net that reads digits row by row: one layer, used at every time step.

    python examples/rnn.py --approx kron_series_2

The task of tf.contrib.kfac's example (an RNN over the rows of an image) on scikit-learn's
digits: eight time steps of eight pixels. `--approx` says how the uses of the recurrent
layer are related: `kron_indep` takes them to be independent, `kron_series_1` and `_2` to
be a linear Gaussian chain (Martens, Ba & Johnson 2018).

    pip install 'kfac-torch[demo]'
"""

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from kfac_torch import KFAC
from kfac_torch.layer_collection import LayerCollection

TRAIN = 1500  # of the 1797 images; the others are for the test
BATCH = 128
APPROX = ("kron_indep", "kron_series_1", "kron_series_2")


class RowReader(nn.Module):
    """h ← tanh(W [h, row] + b) for every row; then the digit from the last h."""

    def __init__(self, num_inputs=8, num_hidden=32, num_classes=10):
        super().__init__()
        self.num_hidden = num_hidden
        # One nn.Linear, called once per time step: nn.RNN hides its uses from K-FAC.
        self.cell = nn.Linear(num_hidden + num_inputs, num_hidden)
        self.readout = nn.Linear(num_hidden, num_classes)

    def forward(self, x):  # [N, rows, pixels]
        h = x.new_zeros(len(x), self.num_hidden)
        for row in x.unbind(1):
            h = torch.tanh(self.cell(torch.cat([h, row], dim=1)))
        return self.readout(h)


def load_data(seed):
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8)[order] / 16
    y = torch.tensor(labels)[order]
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def train(model, optimizer, x, y, steps):
    losses = []
    for step in range(steps):
        batch = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4d}  loss {losses[-1]:.4f}")
    return losses


def run(approx, data, steps):
    x, y, x_test, y_test = data
    model = RowReader()

    layers = LayerCollection(model)
    layers.register_fully_connected_multi(model.cell, approx=approx, num_uses=8)
    layers.register_fully_connected(model.readout)
    layers.register_categorical_predictive_distribution()
    # Counts the uses in a graph: one that K-FAC was not told of is an error.
    layers.check_registration(outputs=model(x[:1]))

    optimizer = KFAC(model, layer_collection=layers, lr=0.1, damping=0.03)
    losses = train(model, optimizer, x, y, steps)
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    last = math.fsum(losses[-10:]) / len(losses[-10:])
    return {"first_loss": losses[0], "loss": last, "accuracy": accuracy}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--approx", nargs="+", choices=APPROX, default=APPROX)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    data = load_data(args.seed)
    results = {}
    for approx in args.approx:
        print(approx)
        torch.manual_seed(args.seed)  # the same start and the same batches for each
        results[approx] = run(approx, data, args.steps)
    accuracies = (f"{name} {r['accuracy']:.1%}" for name, r in results.items())
    print(f"done: test accuracy {', '.join(accuracies)}")
    return results


if __name__ == "__main__":
    main()
