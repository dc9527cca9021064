"""`compile_forward_mode`: the pass of the quadratic model by `torch.compile`.

Notation: `z` the output of the network, `J` its Jacobian, `d_1, …, d_k` directions in the
parameters. The pass gives `z` and `J d_1, …, J d_k`. By the rules of `tangents.py` it is
some dozens of operations a layer, which cost more to call than to compute where tensors are
small; here it is `torch.func.jvp` of the whole network, one compiled function for each
shape of its inputs. Losses go by the rules still.

`torch.compile` may see another derivative than the rules: of a custom `autograd.Function`
that of its forward, say. So the first result of each compiled function is held to that of
the rules, with the same random numbers. Whatever does not compile, or differs, is left to
the rules from then on. Left out: the user's own passes (`torch.compile(model)` is the
user's), and all else in a step, where compiling gains little (docs/benchmarks.md).
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from .capture import random_state, set_random_state
from .optimizer import KFAC
from .replay import rerun
from .tangents import Dual


def compile_forward_mode(optimizer: KFAC, backend: str = "inductor") -> None:
    """Let `torch.compile` make the quadratic model's pass through the network.

    It takes seconds to a minute at each of the first two steps, and once more for every new
    shape of the network's inputs; results are within rounding of those without. It gains
    where layers are small and the network is many operations (docs/benchmarks.md). A
    network that does not compile, or whose derivatives then differ, goes on as before, with
    one UserWarning that says why; so do, without a word, passes under autocast. It is no
    part of the state: call it again in a run that is resumed, which then goes on bit for
    bit.

    Args:
        optimizer: one whose steps the quadratic model makes.
        backend: of `torch.compile`.

    Raises:
        ValueError: no quadratic model makes the steps.
        RuntimeError: `torch.compile` does not work here; nothing is changed.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> optimizer = KFAC(model, loss="categorical")
    >>> compile_forward_mode(optimizer, backend="eager")
    """
    updates = optimizer._updates
    if not updates.modelled:
        raise ValueError(
            "compile_forward_mode: expected an optimizer whose steps the quadratic model "
            'makes, such as KFAC(model, loss) or one with momentum_type="qmodel", got '
            f"momentum_type={updates.options['momentum_type']!r}, which has no such pass"
        )
    _check_works(backend, optimizer.param_groups[0]["params"][0].device)
    updates.rerun = CompiledRerun(backend)


def _check_works(backend: str, device: torch.device) -> None:
    try:
        with warnings.catch_warnings():
            # The first use loads parts of PyTorch that PyTorch deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.compile(lambda x: x.sin() + 1, backend=backend)(
                torch.zeros(8, device=device)
            )
    except Exception as error:  # of the compiler, of what calls it, or of no such backend
        raise RuntimeError(
            f"compile_forward_mode: expected a torch.compile that works with {backend!r}; "
            "on a CPU it needs a C++ compiler, g++ or clang++ on the PATH or what CXX "
            f"names. Got {_in_short(error)}"
        ) from error


def _in_short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"


class CompiledRerun:
    """`rerun`, whose forwards push a `Dual` of every parameter through compiled code.

    Args:
        backend: of `torch.compile`.

    Attributes:
        refusal: why it goes by the rules, if it does.
        num_graphs: how many functions were compiled.
    """

    def __init__(self, backend: str) -> None:
        self.refusal: str | None = None
        self.num_graphs = 0
        self._num_checked = 0
        self._name = backend
        # A function for each shape, whatever came before: a resumed run has the same.
        self._push: Any = torch.compile(
            _another(_push), backend=self._compile, fullgraph=True, dynamic=False
        )

    def _compile(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.num_graphs += 1
        if self._name == "inductor":
            # Its own random numbers are others than those of the forward.
            options = {"fallback_random": True}
            return torch._inductor.compile(graph, inputs, options=options)
        return torch._dynamo.lookup_backend(self._name)(graph, inputs)

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Mapping[str, Tensor]], Any]:
        """Return what runs a forward again with other parameters, leaving no trace."""

        def by_rules(params: Mapping[str, Tensor]) -> Any:
            return rerun(model, args, kwargs)(params)

        def forward(params: Mapping[str, Tensor]) -> Any:
            duals = {name: p for name, p in params.items() if isinstance(p, Dual)}
            if self.refusal is not None or len(duals) < len(params):
                return by_rules(params)
            device = next(iter(duals.values())).device
            state = random_state(device)
            try:
                found = self._pushed(model, duals, args, kwargs)
            except Exception as error:
                self._refuse(_in_short(error))
                set_random_state(state, device)
                return by_rules(params)
            if self._num_checked == self.num_graphs:
                return found
            set_random_state(state, device)
            return self._checked(found, duals, by_rules)

        return forward

    def _pushed(
        self,
        model: nn.Module,
        duals: Mapping[str, Dual],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What the model returns, a `Dual` for each tensor."""
        fixed = {n: p.detach() for n, p in model.named_parameters() if n not in duals}
        fixed.update((name, buffer.clone()) for name, buffer in model.named_buffers())
        values = {name: dual.value for name, dual in duals.items()}
        along = {name: list(dual.tangents) for name, dual in duals.items()}
        current = next(iter(duals.values())).made_in
        # A pass by rules runs what is compiled as written.
        with torch.compiler.set_stance("default"):
            z, Jd = self._push(model, fixed, values, along, args, dict(kwargs))
        return pytree.tree_map(lambda x, dx: Dual(x, dx, current), z, Jd)

    def _checked(self, found: Any, duals: Mapping[str, Dual], by_rules: Any) -> Any:
        """The result, if it is that of the rules; else theirs, from now on."""
        current = next(iter(duals.values())).made_in
        try:
            expected = by_rules(duals)
        except Exception as error:  # they refuse what has another derivative
            self._refuse(f"the rules do not follow it: {_in_short(error)}")
            raise
        here, there = _numbers(found), _numbers(expected)
        if current is not None and current.refused:
            self._refuse("the rules do not follow it")
        elif not all(bool(tensor.isfinite().all()) for tensor in there):
            return expected  # nothing to hold it to, this time
        elif len(here) == len(there) and all(map(_close, here, there)):
            self._num_checked = self.num_graphs
            return found
        else:
            self._refuse("its derivatives are not those of the rules")
        return expected

    def _refuse(self, reason: str) -> None:
        self.refusal = reason
        warnings.warn(
            "compile_forward_mode: this network's pass is not compiled, and goes on as "
            f"without: {reason}",
            stacklevel=2,
        )


def _another(function: types.FunctionType) -> Callable[..., Any]:
    """The same function of its own: of each only so many compiled versions are kept."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__)


def _push(
    model: nn.Module,
    fixed: Mapping[str, Tensor],
    values: dict[str, Tensor],
    directions: Mapping[str, Sequence[Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`z`, and `J d` of all directions, stacked."""

    def outputs(params: dict[str, Tensor]) -> Any:
        with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
            return functional_call(model, {**fixed, **params}, args, kwargs)

    out_dims: Any = (None, 0)  # the stubs know no None
    jvp: Any = torch.vmap(
        lambda along: torch.func.jvp(outputs, (values,), (along,)),
        out_dims=out_dims,
        randomness="same",
    )
    return jvp({name: torch.stack(list(parts)) for name, parts in directions.items()})


def _numbers(output: Any) -> list[Tensor]:
    """What a model returned: values, and the derivatives of those that have some."""
    numbers = list[Tensor]()
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Dual):
            numbers += [leaf.value, leaf.stacked()]
        else:  # it depends on no parameter
            numbers += [leaf, torch.zeros_like(leaf)[None]]
    return numbers


def _close(here: Tensor, there: Tensor) -> bool:
    """Whether they are equal but for rounding."""
    error = (here - there).norm()
    return bool(error <= torch.finfo(here.dtype).eps ** 0.5 * there.norm() + 1e-30)
