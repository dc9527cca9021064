"""Run a model and hand back (input, output) of every layer call; owns every hook.

Notation: `a` a layer call's input, `s` its output, `z` the network output. The root
module's forward starts a tape, each layer's forward writes a call on it, the root's end
hands the tape on; gradients with respect to every `s` are then one backward
(`source_grads.py`). An output is held as its edge in the graph, which survives an
in-place activation behind it (of a view, the output of a linear layer over tokens, by
handing on another tensor).

The root alone is hooked for good; layers are for the one forward that is recorded, so
that other forwards cost nothing, and a compiled root runs that one uncompiled. Attention
or an LSTM computes by its parts then (`fused.py`), whose calls are recorded. Where
`keep_forwards` is set, what the root was called with is kept in `forwards` until
their reader clears it. Nothing is recorded in `eval` mode, under `torch.no_grad`, while
`enabled()` is false, or under `functional_call`. The hooks hold the capture weakly: they
leave with it, or with `close()`, and do nothing on a copy of the model.
Left out: what is done with the tape.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from .fused import ComputeByParts
from .gradient_probe import GradientProbe
from .steps import Clock

Reader: TypeAlias = "Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]"
"""What a layer is taken to be given, of the arguments of its call: `a`, a tensor; None
for a call that is not to be recorded."""


def first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a call: what most layers are given."""
    return args[0] if args else kwargs.get("input")


@dataclass(frozen=True)
class Layer:
    """What to record under one name.

    Args:
        modules: one, or several that share their parameters.
        read: what the layer is given, of the arguments of a call.
        part: the linear map inside the modules that is meant, of those that `fused.py`
            knows; the modules' calls themselves if None.
    """

    modules: tuple[nn.Module, ...]
    read: Reader = first_input
    part: str | None = None


@dataclass(eq=False)
class _Fused:
    """A module that is recorded by parts: their names, and what its call has entered."""

    param: nn.Parameter | None
    names: dict[str | None, str] = field(default_factory=dict)
    running: ExitStack = field(default_factory=ExitStack)


@dataclass(eq=False)
class RootCall:
    """What one forward of the root module was given, so that it can be run again.

    Args:
        args: as called.
        kwargs: as called.
        random_state: of the global generators when it began (`random_state`).
        weights: of the loss terms, by loss, and their number, as far as the backward has
            shown them; None where all weigh 1.
        arrived: whether a backward has reached the network output.
        num_terms: the loss terms, once it has.
        autocast: the dtype of autocast, if it was on.
        taken: whether its statistics were taken as it ran, not put off.
        versions: of all tensors among the arguments, to see whether one is overwritten.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random_state: RandomState
    weights: list[tuple[Tensor, float] | None] = field(default_factory=list)
    arrived: bool = False
    num_terms: float = 0
    autocast: torch.dtype | None = None
    taken: bool = False
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.versions = self._versions()

    def _versions(self) -> tuple[int, ...]:
        leaves = tree_leaves((self.args, self.kwargs))
        return tuple(
            leaf._version
            for leaf in leaves
            if isinstance(leaf, Tensor) and not leaf.is_inference()
        )

    def check_unchanged(self) -> None:
        """Raise RuntimeError if an argument was overwritten since the forward began."""
        if self._versions() != self.versions:
            raise RuntimeError(
                "KFAC.step(): what the model was called with has been changed in place, by "
                "the model itself or before the step; expected it as it was, for the model "
                "runs again on part of it. Call the model with a copy, or overwrite its "
                "input after the step"
            )


@dataclass(eq=False)
class LayerCall:
    """One call of one layer.

    Args:
        layer: its name.
        input: `a`, detached.
        output: the place of `s` in the graph; None where the user's backward is watched.
        version: of the input, to see whether it is overwritten later.
        nbytes: of `s`.
        output_shape: of `s`.
        grads: gradients at `s` that the user's backward brought.
    """

    layer: str
    input: Tensor
    output: GradientEdge | None
    version: int
    nbytes: int
    output_shape: torch.Size
    grads: list[Tensor] = field(default_factory=list)

    def has_examples(self, num_examples: int) -> bool:
        """Whether its rows may be of one example each, by the shapes.

        Not so of position embeddings, `[T, d]`, to which all examples add up.
        """
        shape = self.output_shape  # features last, or second
        rows = shape[:-1].numel(), shape[:1].numel() * shape[2:].numel()
        return num_examples in (*shape[:-1], *rows)

    def release(self) -> None:
        """Let go of the input, which nobody needs any more."""
        self.input = self.input.new_empty(0)

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the input was overwritten after the call."""
        if self.input._version != self.version:
            raise RuntimeError(
                f"layer {self.layer}: its input was changed in place after the call; "
                "expected it to be as the layer saw it. Use an out-of-place operation"
            )


class _Hook:
    """A hook that holds its capture and module weakly, and is inert on a copy of them."""

    def __init__(self, capture: Capture, module: nn.Module, method: str) -> None:
        self._capture = weakref.ref(capture)
        self._module = weakref.ref(module)
        self._method = method

    @property
    def capture(self) -> Capture | None:
        """What the hook is of, if that is still there."""
        return self._capture()

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return None  # the compiled root is to be watched, from outside
        capture = self._capture()
        if capture is not None and module is self._module():
            return getattr(capture, self._method)(module, *args)
        return None

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()  # for copy and pickle


def _inert_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    pass


class Capture:
    """Record the calls of some layers during a forward of the root module.

    Args:
        model: the root module; a compiled one as `torch.compile` returned it.
        layers: what to record, by name.
        on_forward: called at the end of every forward with gradients enabled, with the
            root's output and the calls (none in `eval` mode or while `enabled()` is
            false).
        enabled: whether calls are to be recorded.
        watch_grads: keep the gradients that the user's own backward brings, rather than
            the places of the outputs in the graph.
        watch_params: parameters whose gradients are to be kept in `param_grads` too,
            summed until that is cleared.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    >>> tapes = []
    >>> layers = {"0": Layer((model[0],))}
    >>> capture = Capture(model, layers, lambda z, calls: tapes.append(calls))
    >>> _ = model(torch.ones(4, 2))
    >>> tapes[0][0].layer, tuple(tapes[0][0].input.shape)
    ('0', (4, 2))
    >>> capture.close()
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        on_forward: Callable[[Any, list[LayerCall]], None],
        enabled: Callable[[], bool] = lambda: True,
        watch_grads: bool = False,
        watch_params: Iterable[Tensor] = (),
    ) -> None:
        self._root = weakref.ref(model)
        self.busy = False
        self._on_forward = on_forward
        self._enabled = enabled
        self._watch_grads = watch_grads
        self._tape: list[LayerCall] | None = None
        self._apart: list[LayerCall] | None = None  # of a forward that is our own
        self._recording = ExitStack()  # what ends with the forward that is recorded
        self._by_parts = ExitStack()  # and what ends when the next one begins
        self._kept: RootCall | None = None  # of the running forward, or of the last
        self.recorded = False  # whether calls were recorded in the last forward
        self.param_grads: dict[Tensor, Tensor] = {}
        self.probe: GradientProbe | None = None
        self.keep_forwards = False
        self.keep_losses = False  # whether the loss of every batch is wanted
        self.clock = Clock()
        self.forwards: list[RootCall] = []
        self._layers = {
            module: (name, layer.read, next(module.parameters(), None))
            for name, layer in layers.items()
            for module in layer.modules
            if layer.part is None
        }
        self._fused: dict[nn.Module, _Fused] = {}
        for name, layer in layers.items():
            for module in layer.modules if layer.part is not None else ():
                param = next(module.parameters(), None)
                self._fused.setdefault(module, _Fused(param)).names[layer.part] = name
        self._compiled = uncompiled(model) is not model
        handles = [param.register_hook(_ParamHook(self, param)) for param in watch_params]
        handles += [
            # Before any hook of the user, which will see the same arguments again.
            model.register_forward_pre_hook(
                _Hook(self, model, "_start"), prepend=True, with_kwargs=True
            ),
            model.register_forward_hook(_Hook(self, model, "_end"), always_call=True),
        ]
        stacks = self._recording, self._by_parts
        self._finalizer = weakref.finalize(self, _remove, handles, stacks)

    def close(self) -> None:
        """Remove every hook."""
        self._finalizer()
        if self.probe is not None:
            self.probe.close()

    def gradient_scale(self) -> Tensor | None:
        """Return `GradientProbe.scale`, where there is a probe."""
        return None if self.probe is None else self.probe.scale()

    @contextmanager
    def own_gradients(self) -> Iterator[None]:
        """Take gradients that no capture is to think the user's.

        There may be others on the same model, or on parts of it.
        """
        hooks = [h for m in self._model.modules() for h in m._forward_hooks.values()]
        captures = {hook.capture for hook in hooks if isinstance(hook, _Hook)} - {None}
        busy = [capture for capture in captures if capture and not capture.busy]
        try:
            for capture in busy:
                capture.busy = True
            yield
        finally:
            for capture in busy:
                capture.busy = False

    @contextmanager
    def apart(self) -> Iterator[list[LayerCall]]:
        """Record a forward for oneself, in any mode; no capture takes it for the user's.

        The list that is yielded has the calls when it is over.
        """
        kept, recorded = self._kept, self.recorded
        with self.own_gradients():
            self._apart = calls = list[LayerCall]()
            try:
                yield calls
            finally:
                self._apart = None
                self._kept, self.recorded = kept, recorded

    @property
    def _model(self) -> nn.Module:
        model = self._root()
        assert model is not None
        return model

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the input of a forward that is kept was overwritten."""
        for call in [call for call in self.forwards if call.arrived] or self.forwards:
            call.check_unchanged()

    @property
    def last_forward(self) -> RootCall | None:
        """What the running forward was given, where that is kept."""
        return self._kept

    def _start(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._recording.close()
        self._by_parts.close()
        self._tape, self._kept = None, None
        apart = self._apart is not None
        if self.busy and not apart:  # another capture's own forward
            return
        training = model.training and torch.is_grad_enabled()
        if apart or (training and self._enabled()):
            self._tape = []
            self._watch_layers()
            if model in self._fused:  # its own hooks for what comes first are running
                self._enter(model)
        keep = training and self.keep_forwards and not apart
        if keep and self._has_its_params():
            device = _device(model)
            self._kept = RootCall(args, kwargs, random_state(device))
            if torch.is_autocast_enabled(device.type):
                self._kept.autocast = torch.get_autocast_dtype(device.type)
            self.forwards.append(self._kept)

    def _watch_layers(self) -> None:
        # Prepended, to see the output before a hook of the user changes it. The root may
        # itself be a layer.
        for module in self._layers:
            handle = module.register_forward_hook(
                _Hook(self, module, "_record"), prepend=True, with_kwargs=True
            )
            self._recording.callback(handle.remove)
        for module, fused in self._fused.items():
            self._by_parts.callback(fused.running.close)  # after an interrupt, say
            for handle in (
                module.register_forward_pre_hook(_Hook(self, module, "_enter")),
                module.register_forward_hook(
                    _Hook(self, module, "_leave"), prepend=True, always_call=True
                ),
            ):
                self._by_parts.callback(handle.remove)
        if self._compiled:
            self._recording.enter_context(torch.compiler.set_stance("force_eager"))

    def _has_its_params(self) -> bool:
        """Whether a call is one of the model's own, not one under `functional_call`."""
        return all(
            next(module.parameters(), None) is param
            for module, param in [
                *((module, param) for module, (_, _, param) in self._layers.items()),
                *((module, fused.param) for module, fused in self._fused.items()),
            ]
        )

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        name, read, param = self._layers[module]
        # Under `functional_call` the layer computes with other parameters than its own.
        if self._tape is None or next(module.parameters(), None) is not param:
            return None
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        a = read(module, args, kwargs)
        return self._write(name, a, output) if isinstance(a, Tensor) else None

    def _enter(self, module: nn.Module, *_: Any) -> None:
        """Let a module compute by parts, which are recorded, until `_leave`.

        Without recording them where a checkpoint computes it again, in the backward, and
        expects what it had in the forward.
        """
        fused = self._fused[module]
        if next(module.parameters(), None) is not fused.param:
            return

        def record(part: str, a: Tensor, s: Tensor) -> Tensor:
            name = fused.names.get(part)
            if self._tape is None or name is None or not s.requires_grad:
                return s
            return self._write(name, a, s)

        fused.running.enter_context(ComputeByParts(record))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._fused[module].running.close()

    def _write(self, name: str, a: Tensor, output: Tensor) -> Tensor:
        """Put a call on the tape; return the output to go on with."""
        assert self._tape is not None
        if output._is_view():
            # A linear layer over tokens returns a view. An in-place activation behind it
            # would take the view's own place out of the graph; this one is no view.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        edge = None if self._watch_grads else get_gradient_edge(output)
        call = LayerCall(name, a.detach(), edge, a._version, output.nbytes, output.shape)
        if self._watch_grads:
            self._watch_output(output, call.grads)
        self._tape.append(call)
        return output

    def _watch_output(self, output: Tensor, grads: list[Tensor]) -> None:
        known = weakref.ref(self)

        def keep(grad: Tensor) -> None:
            capture = known()
            if capture is not None and not capture.busy:
                grads.append(grad)

        watch_gradient(output, keep)

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self.recorded = self._tape is not None
        calls, self._tape = self._tape or [], None
        self._recording.close()
        failed = output is None  # the forward raised
        if failed:
            self._by_parts.close()
        if failed and self._kept is not None:
            self.forwards.remove(self._kept)
            self._kept = None
        if self._apart is not None:
            self._apart.extend(calls)
        elif torch.is_grad_enabled() and not failed and not self.busy:
            self._on_forward(output, calls)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was given, or the module itself."""
    return getattr(model, "_orig_mod", model)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class _ParamHook:
    """Add a parameter's gradient to `param_grads` of a capture that is held weakly."""

    def __init__(self, capture: Capture, param: Tensor) -> None:
        self._capture = weakref.ref(capture)
        self._param = weakref.ref(param)

    def __call__(self, grad: Tensor) -> None:
        capture, param = self._capture(), self._param()
        if capture is None or param is None or capture.busy or torch.is_grad_enabled():
            return
        known = capture.param_grads.get(param)
        # A copy: it may become .grad itself, which clipping changes in place.
        capture.param_grads[param] = (
            grad.detach().clone() if known is None else known + grad
        )

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()


RandomState: TypeAlias = "tuple[Tensor, Tensor | None]"
"""Of the CPU's global generator, and of an accelerator's."""


def random_state(device: torch.device) -> RandomState:
    """Return the state of the global generators that a model on `device` draws from."""
    if device.type == "cpu":
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state()


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Set what `random_state` returned."""
    cpu, accelerator = state
    torch.set_rng_state(cpu)
    if accelerator is not None:
        torch.get_device_module(device).set_rng_state(accelerator)


def _remove(
    handles: list[torch.utils.hooks.RemovableHandle], stacks: Iterable[ExitStack]
) -> None:
    for stack in stacks:
        stack.close()
    for handle in handles:
        handle.remove()


def watch_gradient(tensor: Tensor, keep: Callable[[Tensor], None]) -> None:
    """Hand every gradient that a backward brings to `tensor` to `keep`.

    A gradient that is itself to be differentiated (a penalty on it, say) is not handed on.
    """

    def hook(grad: Tensor) -> None:
        if not torch.is_grad_enabled():
            keep(grad.detach())

    tensor.register_hook(hook)
