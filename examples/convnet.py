"""A convolutional net for digits: blocks chosen by hand, and a learning rate schedule.

    python examples/convnet.py

The net of tf.contrib.kfac's examples (two convolutions with pooling, one linear layer,
mini-batches of 128) on the 8x8 digits of scikit-learn:

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


def load_data(seed):
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(labels)[order]
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 2 * 2, 10),
    )  # fmt: skip


def register(model):
    """Say which layer gets which block of the Fisher; KFAC does this by itself if let."""
    layers = LayerCollection(model)
    # To show another approximation: of the first layer the diagonal of the Fisher alone,
    # a mean of squared gradients of every example, without correlations between weights.
    layers.register_conv2d(model[0], approx="diagonal")
    # Every other layer gets the default, a Kronecker product.
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution()
    # A forgotten layer would be left to plain momentum: better an error here.
    layers.check_registration()
    return layers


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    x, y, x_test, y_test = load_data(args.seed)
    model = make_model()
    layers = register(model)
    for name, block in layers.blocks.items():
        print(f"layer {name}: {type(block).__name__}")

    # The factors are running averages: taking them every other step, and inverting them
    # every tenth, changes little but the cost.
    optimizer = KFAC(
        model,
        layer_collection=layers,
        lr=0.1,
        damping=0.03,
        cov_update_every=2,
        invert_every=10,
    )
    # Mini-batches are noisy, and noise is averaged out by a step size that goes to 0.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    losses = []
    for step in range(args.steps):
        batch = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, args.steps // 10) == 0:
            lr = scheduler.get_last_lr()[0]
            print(f"step {step:4d}  lr {lr:.4f}  loss {losses[-1]:.4f}")
        scheduler.step()

    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    last = math.fsum(losses[-10:]) / len(losses[-10:])
    print(f"done: training loss {last:.4f}, test accuracy {accuracy:.1%}")
    return {"first_loss": losses[0], "loss": last, "accuracy": accuracy}


if __name__ == "__main__":
    main()
