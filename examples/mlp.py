"""A classifier of digits, trained with the natural gradient in the plain PyTorch loop.

    python examples/mlp.py

The multilayer perceptron of tf.contrib.kfac's examples (three tanh layers, mini-batches of
64), made smaller for the 8x8 digits of scikit-learn:

    pip install 'kfac-torch[demo]'
"""

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from kfac_torch import KFAC

TRAIN = 1500  # of the 1797 images; the others are for the test
BATCH = 64


def load_data(seed):
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
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
        if step % max(1, steps // 10) == 0:
            print(f"step {step:4d}  loss {losses[-1]:.4f}")
    return losses


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    x, y, x_test, y_test = load_data(args.seed)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(),
        nn.Linear(64, 32), nn.Tanh(),
        nn.Linear(32, 10),
    )  # fmt: skip

    # "categorical" says what the logits mean. The Fisher is taken of targets that are drawn
    # from the model itself: it is the true one, not that of the labels. The default
    # norm_constraint keeps every step small in the model's output, so lr can be large.
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.03)

    losses = train(model, optimizer, x, y, args.steps)

    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    last = math.fsum(losses[-10:]) / len(losses[-10:])
    print(f"done: training loss {last:.4f}, test accuracy {accuracy:.1%}")
    return {"first_loss": losses[0], "loss": last, "accuracy": accuracy}


if __name__ == "__main__":
    main()
