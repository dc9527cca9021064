"""A deep autoencoder, with step size, momentum and damping that set themselves.

    python examples/autoencoder.py

The task of the K-FAC paper (Martens & Grosse 2015, arXiv 1503.05671, section 13) at the
size of scikit-learn's 8x8 digits: all images in every step, tanh units, a linear code,
cross-entropy of sigmoids summed over pixels.

    pip install 'kfac-torch[demo]'
"""

import argparse
import itertools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from kfac_torch import KFAC
from kfac_torch.damping import LevenbergMarquardt

WIDTHS = (64, 100, 50, 25, 10, 25, 50, 100, 64)
CODE = 10
L2 = 1e-5  # the loss has a term ½ L2 ‖θ‖²
BURN_IN = 5  # calls of step() that gather statistics and move nothing


def make_model():
    layers = []
    for n, m in itertools.pairwise(WIDTHS):
        linear = nn.Linear(n, m)
        nn.init.normal_(linear.weight, std=n**-0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if m == CODE else [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])  # the output is linear: logits of the pixels


def cross_entropy(model, x):
    """Summed over pixels, averaged over images: -log p of an image, as KFAC expects."""
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = make_model()

    # "qmodel" minimises the exact local quadratic model over the step size and the
    # momentum; λ rises where that model promises more than the loss delivers, and falls
    # where it keeps its word. Where λ starts matters little, since it is calibrated on the
    # first batch. The rule has to know of the l2 term, which is curvature too.
    damping = LevenbergMarquardt(
        initial=1.0, decay=0.8, min_damping=1e-5, l2_reg=L2, calibrate=True
    )
    optimizer = KFAC(
        model,
        "bernoulli",
        momentum_type="qmodel",
        damping=damping,
        num_burnin_steps=BURN_IN,
    )

    def closure():  # called again after a step, to see what it did to the loss
        optimizer.zero_grad()
        squares = sum(p.square().sum() for p in model.parameters())
        loss = cross_entropy(model, x) + L2 / 2 * squares
        loss.backward()
        return loss

    for _ in range(BURN_IN):
        first = optimizer.step(closure).item()

    print(" step      loss      lr  momentum   damping    rho")
    for step in range(args.steps):
        optimizer.step(closure)
        last = optimizer.last_step
        # λ adapts on every fifth step; on the others ρ, the change of the loss over the
        # predicted one, is None.
        if (step + 1) % 10 == 0:
            print(
                f"{last.step:5d} {last.loss:9.3f} {last.lr:7.3f} {last.momentum:9.3f} "
                f"{last.damping:9.2e} {last.rho:6.2f}"
            )

    with torch.no_grad():
        loss = cross_entropy(model, x).item()
        error = (model(x).sigmoid() - x).square().sum(1).mean().item()
    print(f"done: cross-entropy {loss:.2f}, squared error of an image {error:.2f}")
    return {"first_loss": first, "loss": loss, "error": error, "last_step": last}


if __name__ == "__main__":
    main()
