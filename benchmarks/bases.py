"""EKFAC's bases by a step of orthogonal iteration: its time, and how near to the Fisher.

    OMP_NUM_THREADS=1 python benchmarks/bases.py [--rounds N] [--json FILE]

Time: ``torch.linalg.eigh``, a step of orthogonal iteration (a product and a QR
decomposition) and the one product that tells how good a basis is, of second moments of
random rectified features, float32, in turn, processor time of this process; medians
[min-max]. The basis that the step starts from is that of another such moment, half mixed
in.

Nearness: a net of 16-32-24-5 on sequences of four positions, whose mean is classified, is
trained by SGD for 200 steps of 64 examples. Beside it go estimators in the mode "exact"
with a decay of 0.95 that refresh every tenth step: K-FAC, EKFAC by decompositions, EKFAC by
turned bases (``warm_start``), and EKFAC that keeps its first three bases. The distance is
that of all blocks to the exact Fishers of the same batches, averaged alike, in the
Frobenius norm, relative to theirs; printed at some steps and as the mean of all steps from
the fourth on. float64, medians [min-max] of five seeds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from background import spread
from inverses import random_moments
from runs import machine, write_json
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from kfac_torch import KFACPreconditioner, Refresh
from kfac_torch.linalg import diagonal_in_basis, orthogonal_iteration

SIZES = (256, 512, 1024, 2048)
EVERY, DECAY, STEPS = 10, 0.95, 200
SHOWN = (10, 19, 50, 100, 190, 199)
KINDS: dict[str, dict[str, Any]] = {
    "K-FAC": {"approx": "kron", "invert_every": EVERY},
    "eigh": {"approx": "ekfac", "invert_every": EVERY},
    "warm start": {
        "approx": "ekfac",
        "invert_every": Refresh(every=EVERY, warm_start=True),
    },
    "old bases": {"approx": "ekfac", "invert_every": 10 * STEPS},
}


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def times(rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds by size and by what is done."""
    result = {}
    for n in SIZES:
        C, other = random_moments({n})[n], torch.randn(2 * n, n)
        mixed = (C + other.relu_().T @ other / len(other)) / 2
        Q = torch.linalg.eigh(mixed).eigenvectors
        found: dict[str, list[float]] = {"eigh": [], "step": [], "product": []}
        for _ in range(rounds):
            found["eigh"].append(seconds(lambda C=C: torch.linalg.eigh(C)))
            found["step"].append(seconds(lambda C=C, Q=Q: orthogonal_iteration(C, Q)))
            found["product"].append(seconds(lambda C=C, Q=Q: diagonal_in_basis(C, Q)))
        result[str(n)] = {name: spread(values) for name, values in found.items()}
    return result


class Positions(nn.Module):
    """Several positions of an example, with one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(x.mean(1))


def exact_fisher(model: nn.Module, x: Tensor, layer: nn.Linear, name: str) -> Tensor:
    """The block of a layer, over the row-major entries of its `[in + 1, out]`."""
    own = {f"{name}.{key}": p.detach() for key, p in layer.named_parameters()}
    jacobian: Any = jacrev(lambda params: functional_call(model, params, (x,)))(own)
    weight, bias = jacobian[f"{name}.weight"], jacobian[f"{name}.bias"]
    J = torch.cat([weight, bias.unsqueeze(-1)], -1).mT.flatten(2)  # [N, classes, ...]
    p = model(x).detach().softmax(-1)
    root = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return torch.einsum("nci,ncd,ndj->ij", J, root, J).detach() / len(x)


def nearness(seed: int) -> dict[str, list[float]]:
    """By kind, the relative distance after every step."""
    torch.manual_seed(seed)
    model, teacher = Positions(), Positions()
    beside = {
        name: KFACPreconditioner(
            model,
            "categorical",
            estimation_mode="exact",
            cov_ema_decay=DECAY,
            damping=0.1,
            **options,
        )
        for name, options in KINDS.items()
    }
    mixing = torch.randn(16, 16) / 4
    fishers: dict[str, Tensor] = {}
    weight, found = 0.0, {name: list[float]() for name in KINDS}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for _ in range(STEPS):
        x = torch.randn(64, 4, 16) @ mixing
        with torch.no_grad():
            y = (4 * teacher(x)).softmax(-1).multinomial(1).flatten()
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        for preconditioner in beside.values():
            preconditioner.step()
        model.eval()  # nothing is gathered
        weight = DECAY * weight + 1
        for name, layer in layers.items():
            F = exact_fisher(model, x, layer, name)
            fishers[name] = fishers[name].lerp(F, 1 / weight) if name in fishers else F
        model.train()
        size = sum(F.norm() ** 2 for F in fishers.values())
        for kind, preconditioner in beside.items():
            blocks = preconditioner.estimator.blocks
            parts = [blocks[n].full_fisher_block() - F for n, F in fishers.items()]
            distance = sum(part.norm() ** 2 for part in parts)
            found[kind].append(float((distance / size) ** 0.5))
        with torch.no_grad():
            for p, grad in zip(model.parameters(), grads, strict=True):
                p -= 0.3 * grad
    for preconditioner in beside.values():
        preconditioner.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    taken = times(options.rounds)
    for n, by_kind in taken.items():
        print(n, *(f"{k} {1e3 * v['median']:.2f} ms" for k, v in by_kind.items()))
    torch.set_default_dtype(torch.float64)
    runs = [nearness(seed) for seed in options.seeds]
    near = {}
    for kind in KINDS:
        near[kind] = {
            str(step): spread([run[kind][step] for run in runs]) for step in SHOWN
        }
        near[kind]["mean"] = spread([statistics.mean(run[kind][3:]) for run in runs])
        texts = [f"{k}: {v['median']:.4f}" for k, v in near[kind].items()]
        print(f"{kind:10s}", *texts)
    if options.json:
        write_json(options.json, {"machine": machine(), "seconds": taken, "near": near})


if __name__ == "__main__":
    main()
