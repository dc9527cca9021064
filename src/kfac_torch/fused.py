"""Layers that compute several linear maps inside one fused function, map by map.

`nn.MultiheadAttention` projects queries, keys, values and the result inside
`F.multi_head_attention_forward`; `nn.LSTM` and its relatives are one call of `torch.lstm`
with all their weights. A hook on the module sees none of these maps. While
`ComputeByParts` is entered, such a function is computed from linear maps `s = W a + b`
that are handed to `record(part, a, s)` one by one; what it returns goes on in place of
`s`. Values, gradients and the random numbers drawn are those of the fused function.

Notation: parts have the names of their parameters: of attention `in_proj` (three calls:
queries, keys, values) or `q_proj`, `k_proj`, `v_proj` and `in_proj_bias`, and `out_proj`;
of a recurrent layer `ih_l0`, `hh_l0`, `hr_l0`, `ih_l0_reverse`, ... (`hh` and `hr`: a call
for each step); of a cell `ih`, `hh`. `B_t` examples are still there at step `t`, `a
[B_t, in]`. Left out: who listens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Record: TypeAlias = "Callable[[str, Tensor, Tensor], Tensor]"
"""Takes a part, its input and its output; returns the output to go on with."""

State: TypeAlias = "tuple[Tensor, ...]"
"""What a recurrent layer carries from step to step: `(h,)` or `(h, c)`, `[B, hidden]`."""


class ComputeByParts(TorchFunctionMode):
    """Compute fused functions from linear maps while entered, and record each map.

    >>> lstm, parts = torch.nn.LSTM(2, 3), []
    >>> def record(part, a, s):
    ...     parts.append((part, tuple(a.shape), tuple(s.shape)))
    ...     return s
    >>> with ComputeByParts(record):
    ...     output, _ = lstm(torch.zeros(2, 5, 2))
    >>> parts
    [('ih_l0', (2, 5, 2), (2, 5, 12)), ('hh_l0', (5, 3), (5, 12)), ('hh_l0', (5, 3), ...)]
    """

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function, or what replaces it; inside, the mode is off."""
        replacement = REPLACEMENTS.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        return replacement(self._record, *args, **(kwargs or {}))


# Attention.


def _attention(record: Record, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Project before and after; in between torch's own function, whose projections are
    by the identity, which changes no number (where TF32 is allowed, it rounds once more).
    """
    call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    out = given["out_proj_weight"], given["out_proj_bias"]
    projected = _in_projections(record, given)
    eye = torch.eye(out[0].shape[1], dtype=projected[0].dtype, device=projected[0].device)
    given.update(zip(("query", "key", "value"), projected, strict=True))
    given.update(use_separate_proj_weight=True, in_proj_bias=None, out_proj_bias=None)
    given.update(dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), eye))
    given.update(out_proj_weight=eye)
    attended, weights = F.multi_head_attention_forward(*call.args, **call.kwargs)
    return record("out_proj", attended, F.linear(attended, *out)), weights


def _in_projections(record: Record, given: Mapping[str, Any]) -> list[Tensor]:
    inputs = [given[name] for name in ("query", "key", "value")]
    bias = given["in_proj_bias"]
    biases = [None] * 3 if bias is None else bias.view(3, -1).unbind()
    if not given["use_separate_proj_weight"]:
        weights = given["in_proj_weight"]
        weights = weights.view(3, -1, weights.shape[1]).unbind()
        parts = ["in_proj"] * 3
    else:
        parts = ["q_proj", "k_proj", "v_proj"]
        weights = [given[f"{part}_weight"] for part in parts]
    projected = []
    for part, a, W, b in zip(parts, inputs, weights, biases, strict=True):
        s = record(part, a, F.linear(a, W, b))
        if part != "in_proj" and b is not None:
            # The one bias of three layers: a map of ones.
            s = record("in_proj_bias", a.new_ones(1).expand(*a.shape[:-1], 1), s)
        projected.append(s)
    return projected


# Recurrent layers. A cell takes what the input brings to the gates, what the state
# brings, and the state, to the next state.


def _rnn_tanh_step(s: Tensor, u: Tensor, state: State) -> State:
    return (torch.tanh(s + u),)


def _rnn_relu_step(s: Tensor, u: Tensor, state: State) -> State:
    return (torch.relu(s + u),)


def _gru_step(s: Tensor, u: Tensor, state: State) -> State:
    (h,) = state
    r_s, z_s, n_s = s.chunk(3, -1)
    r_u, z_u, n_u = u.chunk(3, -1)
    r, z = torch.sigmoid(r_s + r_u), torch.sigmoid(z_s + z_u)
    n = torch.tanh(n_s + r * n_u)
    return (n + z * (h - n),)


def _lstm_step(s: Tensor, u: Tensor, state: State) -> State:
    _, c = state
    i, f, g, o = (s + u).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


Step: TypeAlias = "Callable[[Tensor, Tensor, State], State]"


def _scan(
    steps: Iterable[Tensor], initial: State, advance: Callable[[Tensor, State], State]
) -> tuple[list[Tensor], State]:
    """Return `h` after every step, and the state of every example after its last one.

    Examples are in the order of their lengths, longest first: fewer and fewer as time
    goes on, and more and more backwards in time.
    """
    outputs, ended = list[Tensor](), list[State]()
    state = initial
    for s in steps:
        size, known = len(s), len(state[0]) if outputs else 0
        if not outputs:
            state = tuple(x[:size] for x in initial)
        elif size < known:
            ended.append(tuple(x[size:] for x in state))
            state = tuple(x[:size] for x in state)
        elif size > known:
            state = tuple(
                torch.cat([x, x0[known:size]]) for x, x0 in zip(state, initial, strict=True)
            )
        state = advance(s, state)
        outputs.append(state[0])
    if ended:
        state = tuple(torch.cat(x) for x in zip(state, *reversed(ended), strict=True))
    return outputs, state


def _direction(
    record: Record,
    suffix: str,
    step: Step,
    steps: Sequence[Tensor],
    initial: State,
    weights: Sequence[Tensor | None],
) -> tuple[list[Tensor], State]:
    """One layer in one direction, from what the input brings to the gates."""
    W_hh, b_hh, W_hr = weights

    def advance(s: Tensor, state: State) -> State:
        assert W_hh is not None
        u = record(f"hh_{suffix}", state[0], F.linear(state[0], W_hh, b_hh))
        h, *rest = step(s, u, state)
        if W_hr is not None:
            h = record(f"hr_{suffix}", h, F.linear(h, W_hr))
        return h, *rest

    reverse = suffix.endswith("_reverse")
    outputs, last = _scan(reversed(steps) if reverse else steps, initial, advance)
    return outputs[::-1] if reverse else outputs, last


def _split_weights(
    flat: Sequence[Tensor], bias: bool, directions: int
) -> list[list[Tensor | None]]:
    """`[W_ih, b_ih, W_hh, b_hh, W_hr]` of every layer and direction, None for none."""
    count = len(flat) // directions
    result = list[list[Tensor | None]]()
    for start in range(0, len(flat), count):
        own: list[Tensor | None] = list(flat[start : start + count])
        if not bias:
            own[2:2] = [None, None]
        W_ih, W_hh, b_ih, b_hh, *W_hr = own
        result.append([W_ih, b_ih, W_hh, b_hh, W_hr[0] if W_hr else None])
    return result


def _recurrent(step: Step) -> Callable[..., tuple[Tensor, ...]]:
    """Make the replacement of `torch.lstm` or one of its relatives."""

    def compute(record: Record, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        packed = isinstance(rest[2], list | tuple)
        sizes = rest[0].tolist() if packed else None
        hx, flat, bias, layers, dropout, training, two_ways, *batch_first = rest[packed:]
        if batch_first and batch_first[0]:
            x = x.transpose(0, 1)
        hx = (hx,) if isinstance(hx, Tensor) else hx
        suffixes = ["", "_reverse"] if two_ways else [""]
        weights = _split_weights(flat, bias, layers * len(suffixes))
        states = list[State]()
        for layer in range(layers):
            outputs = list[Tensor]()
            for suffix in suffixes:
                number = len(states)
                W_ih, b_ih, *own = weights[number]
                assert W_ih is not None
                name = f"l{layer}{suffix}"
                s = record(f"ih_{name}", x, F.linear(x, W_ih, b_ih))
                steps = s.split(sizes) if packed else s.unbind(0)
                initial = tuple(h[number] for h in hx)
                hs, last = _direction(record, name, step, steps, initial, own)
                states.append(last)
                outputs.append(torch.cat(hs) if packed else torch.stack(hs))
            x = torch.cat(outputs, -1) if two_ways else outputs[0]
            if dropout and layer < layers - 1:
                x = F.dropout(x, dropout, training)
        if batch_first and batch_first[0]:
            x = x.transpose(0, 1)
        return x, *(torch.stack(last) for last in zip(*states, strict=True))

    return compute


def _cell(step: Step) -> Callable[..., Any]:
    """Make the replacement of `torch.lstm_cell` or one of its relatives."""

    def compute(
        record: Record,
        x: Tensor,
        hx: Any,
        W_ih: Tensor,
        W_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        s = record("ih", x, F.linear(x, W_ih, b_ih))
        u = record("hh", state[0], F.linear(state[0], W_hh, b_hh))
        after = step(s, u, state)
        return after[0] if isinstance(hx, Tensor) else after

    return compute


REPLACEMENTS: Mapping[Any, Callable[..., Any]] = MappingProxyType(
    {
        F.multi_head_attention_forward: _attention,
        torch.rnn_tanh: _recurrent(_rnn_tanh_step),
        torch.rnn_relu: _recurrent(_rnn_relu_step),
        torch.gru: _recurrent(_gru_step),
        torch.lstm: _recurrent(_lstm_step),
        torch.rnn_tanh_cell: _cell(_rnn_tanh_step),
        torch.rnn_relu_cell: _cell(_rnn_relu_step),
        torch.gru_cell: _cell(_gru_step),
        torch.lstm_cell: _cell(_lstm_step),
    }
)
"""By the function that a module calls: what computes it."""
