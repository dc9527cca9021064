"""Which layers of a model have a block of their own: the search behind auto-registration.

A module is of a kind where it is of a type of `KINDS`, or of a subclass that computes the
same: with the same `forward`. Modules that share parameters are one block, if there is
one for them; otherwise they are left alone, and why is told. Left out: the registration
itself, and layers found by looking at the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .fisher_blocks import linear_parts
from .fisher_blocks.embedding_bag import unsupported_bag
from .fisher_blocks.layer import same_settings
from .fisher_blocks.linear import TransposedLinear
from .fisher_blocks.normalization import NORMS

FUSED: Mapping[str, tuple[type[nn.Module], ...]] = MappingProxyType(
    {
        "attention": (nn.MultiheadAttention,),
        "recurrent": (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
    }
)
"""By kind, layers of several linear maps."""

KINDS: Mapping[type[nn.Module], str] = MappingProxyType(
    {
        nn.MultiheadAttention: "multihead_attention",
        **dict.fromkeys(FUSED["recurrent"], "recurrent"),
        nn.Linear: "fully_connected",
        nn.Bilinear: "bilinear",
        **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), "convolution"),
        **dict.fromkeys(
            (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose"
        ),
        nn.Embedding: "embedding",
        nn.EmbeddingBag: "embedding_bag",
        **dict.fromkeys(NORMS, "scale_and_shift"),
    }
)
"""By type of module, the `LayerCollection.register_...` that it is registered with."""

_FUSED = tuple(kind for kinds in FUSED.values() for kind in kinds)

SHARED: Mapping[str, str] = MappingProxyType(
    {
        "fully_connected": "fully_connected_multi",
        "convolution": "conv2d_multi",
        "embedding": "embedding_multi",
    }
)
"""That for several modules which share all their parameters, by that for one."""

_KIND_OF = MappingProxyType({"convolution": "conv2d", "multihead_attention": "attention"})

MAX_FULL_SCALES = 512
"""A normalisation layer with more features has a diagonal block by default: a full one of
n features has `(2n)²` numbers."""


@dataclass(frozen=True)
class Found:
    """What is to be registered together.

    Args:
        register: with `LayerCollection.register_...`.
        modules: one layer, or several that share parameters.
    """

    register: str
    modules: tuple[nn.Module, ...]

    @property
    def kind(self) -> str:
        """The kind of layer, as `APPROXIMATIONS` has it."""
        return _KIND_OF.get(self.register, self.register)

    @property
    def is_large_norm(self) -> bool:
        """Whether a full block would be large beside what it is for."""
        weight = getattr(self.modules[0], "weight", None)
        return (
            self.register == "scale_and_shift"
            and isinstance(weight, nn.Parameter)
            and weight.numel() > MAX_FULL_SCALES
        )


def kind_of(module: nn.Module) -> str | None:
    """Return the `register_...` of a module by what it computes; None for no known layer.

    A subclass counts as its base where it has the same `forward`.

    >>> kind_of(nn.Linear(2, 3)), kind_of(nn.Tanh())
    ('fully_connected', None)
    """
    if isinstance(module, TransposedLinear):
        return "fully_connected"
    own = type(module)
    for base in own.__mro__:
        if base in KINDS:
            parts = ("forward", "_conv_forward", "_apply_instance_norm")
            same = all(
                getattr(own, part, None) is getattr(base, part, None) for part in parts
            )
            return KINDS[base] if same else None
    return None


def find_layers(
    root: nn.Module, model: nn.Module, taken: Collection[int]
) -> Iterator[Found | tuple[nn.Module, str]]:
    """Find the layers in `root`, a part of `model`, that have a block of their own.

    Args:
        root: where to look.
        model: where parameters may be shared.
        taken: ids of parameters to leave alone.

    Yields:
        What is to be registered, or a module with trained parameters of its own that is
        left alone, and why.

    >>> list(find_layers(model := nn.Bilinear(2, 3, 4), model, ()))
    [Found(register='bilinear', modules=(Bilinear(...),))]
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in _unique([*model.modules(), *root.modules()]):
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(module)
    inside = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
        if part is not module
    }
    done = set(taken)
    for module in root.modules():
        # Attention has parameters of a layer inside, which is not called.
        whole = isinstance(module, _FUSED) and kind_of(module) is not None
        own = [p for p in module.parameters(recurse=whole) if p.requires_grad]
        if not own or done.intersection(map(id, own)):
            continue
        if id(module) in inside:
            yield module, "it is part of an nn.MultiheadAttention, which does not call it"
            continue
        found = _find(module, owners)
        parts = [p for part in linear_parts(module) for p in part.params]
        if not isinstance(found, str) and parts:
            done.update(map(id, parts))
            yield found
            if not done.issuperset(map(id, own)):
                yield module, "some of its parameters are of no linear map inside"
            continue
        if isinstance(found, str):
            yield module, found
        else:
            done.update(id(p) for p in own if len(owners[id(p)]) == len(found.modules))
            yield found
            for other in found.modules if found.register == "tied_embedding" else ():
                if isinstance(other, nn.Linear) and other.bias is not None:
                    yield other, "its bias has no block: the weight's is without it"


def _find(module: nn.Module, owners: Mapping[int, list[nn.Module]]) -> Found | str:
    """What a module is to be registered as; or why it is not."""
    kind, weight = kind_of(module), getattr(module, "weight", None)
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit has compiled it, which hides its calls: use torch.compile"
    if any(p.is_complex() for p in module.parameters(recurse=False)):
        return "its parameters are complex"
    if kind is None:
        return f"there is no block for {type(module).__name__}"
    if isinstance(module, _FUSED):
        return _find_fused(kind, module, owners)
    if not isinstance(weight, nn.Parameter):
        return "its weight is not a parameter: it is computed from others"
    if not weight.requires_grad:
        return "its weight is frozen"
    if any(map(is_lazy, module.parameters(recurse=False))):
        return "its parameters have no shape yet: run the model once before"
    problem = _problem(module)
    if problem is not None:
        return problem
    sharing = _unique(
        other for p in module.parameters(recurse=False) for other in owners[id(p)]
    )
    if len(sharing) == 1:
        return Found(kind, (module,))
    return _shared(kind, sharing, owners[id(weight)])


def _find_fused(
    kind: str, module: nn.Module, owners: Mapping[int, list[nn.Module]]
) -> Found | str:
    """What a layer of several linear maps is to be registered as."""
    params = [p for part in linear_parts(module) for p in part.params]
    if not params:
        return "its weights are frozen"
    if any(len(owners[id(p)]) > 1 for p in params):
        return "it shares some of its parameters"
    return Found(kind, (module,))


def _problem(module: nn.Module) -> str | None:
    """Why a layer of a known kind has no block."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
        return "its gradients are sparse"
    if isinstance(module, nn.EmbeddingBag):
        return unsupported_bag(module)
    return None


def _shared(
    kind: str, sharing: list[nn.Module], sharing_weight: list[nn.Module]
) -> Found | str:
    """What modules that share parameters are to be registered as."""
    kinds = {kind_of(module) for module in sharing}
    params = [[id(p) for p in module.parameters(recurse=False)] for module in sharing]
    if kinds == {kind} and all(ids == params[0] for ids in params):
        if kind in SHARED and same_settings(sharing):
            return Found(SHARED[kind], tuple(sharing))
        return "modules with other settings, or of a kind without such a block, share it"
    if is_tied(sharing) and len(sharing) == len(sharing_weight):
        return Found("tied_embedding", tuple(sharing))
    return "it shares a part of its parameters, or shares them with another kind of layer"


def is_tied(modules: list[nn.Module]) -> bool:
    """Whether modules are embeddings and linear heads with one weight."""
    embeddings = [m for m in modules if kind_of(m) == "embedding" and _problem(m) is None]
    heads = [m for m in modules if isinstance(m, nn.Linear) and kind_of(m)]
    return (
        bool(embeddings)
        and bool(heads)
        and len(embeddings) + len(heads) == len(modules)
        and len({id(module.weight) for module in modules}) == 1
        and same_settings(embeddings)
    )


def _unique(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list(dict.fromkeys(modules))
