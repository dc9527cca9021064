"""Steps of parameters that no block speaks for: AdamW, or SGD with momentum.

Notation: `g` the gradient, `v` the velocity, `μ` the momentum, `η` the learning rate,
`m`, `s` the running first and second moment of `g`, `t` the number of steps:

    "adamw"   m ← β₁ m + (1 − β₁) g,  s ← β₂ s + (1 − β₂) g²
              δ = −η m̂/(√ŝ + ε),  m̂ = m/(1 − β₁ᵗ),  ŝ = s/(1 − β₂ᵗ)
    "sgd"     v ← μ v + g,  δ = −η v

and with decoupled weight decay `δ −= η·decay·θ` (Loshchilov & Hutter 2019, arXiv
1711.05101). A step is proposed with what to remember of it, and changes nothing, so that
it can be left out as a whole. Left out: which parameters these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PLAIN_RULES = ("adamw", "sgd")
ADAMW_LR = 3e-3


@dataclass
class PlainStep:
    """`δ` by parameter, and what is to be remembered of it."""

    deltas: list[Tensor]
    memory: list[dict[str, Any]]


def plain_options(rule: str, lr: float | None, momentum: float) -> dict[str, Any]:
    """Return the options of a param group that follows a rule.

    Args:
        rule: `"adamw"` or `"sgd"`.
        lr: of SGD; AdamW has one of its own, 3e-3.
        momentum: of SGD.

    >>> plain_options("sgd", 0.1, 0.9)
    {'rule': 'sgd', 'lr': 0.1, 'momentum': 0.9}
    """
    if rule == "sgd":
        return {"rule": rule, "lr": lr, "momentum": momentum}
    return {"rule": rule, "lr": ADAMW_LR, "betas": (0.9, 0.999), "eps": 1e-8}


def propose_plain(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    options: Sequence[Mapping[str, Any]],
    states: Sequence[Mapping[str, Any]],
) -> PlainStep:
    """Return the step of every parameter by the rule of its options; changes nothing.

    >>> p, g = torch.ones(2), torch.tensor([1.0, -2.0])
    >>> propose_plain([p], [g], [plain_options("sgd", 0.5, 0.9)], [{}]).deltas
    [tensor([-0.5000,  1.0000])]
    """
    step = PlainStep([], [])
    for p, g, group, state in zip(params, grads, options, states, strict=True):
        direction, memory = (_adamw if group["rule"] == "adamw" else _sgd)(g, group, state)
        delta = direction.mul_(-group["lr"])
        if group.get("weight_decay"):
            delta.add_(p, alpha=-group["lr"] * group["weight_decay"])
        step.deltas.append(delta)
        step.memory.append(memory)
    return step


def _sgd(
    g: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    known = state.get("momentum_buffer")
    velocity = g.clone() if known is None else known * group["momentum"] + g
    return velocity.clone(), {"momentum_buffer": velocity}


def _adamw(
    g: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    if g.is_complex():  # real and imaginary parts are numbers of their own
        direction, memory = _adamw(torch.view_as_real(g), group, state)
        return torch.view_as_complex(direction), memory
    beta1, beta2 = group["betas"]
    t = state.get("step", 0) + 1
    m = torch.zeros_like(g).lerp(g, 1 - beta1)
    s = g.square() * (1 - beta2)
    if "exp_avg" in state:
        m, s = state["exp_avg"].lerp(g, 1 - beta1), s.add_(state["exp_avg_sq"], alpha=beta2)
    root = (s / (1 - beta2**t)).sqrt_().add_(group["eps"])
    memory = {"step": t, "exp_avg": m, "exp_avg_sq": s}
    return (m / (1 - beta1**t)).div_(root), memory
