"""`LayerCollection`: which parameters get which block, and the losses of a model.

The counterpart of `tf.contrib.kfac.layer_collection` with modules in place of graph
tensors: a layer is registered as a module, a loss by where its input is in what the
model returns. Left out: layers found by looking at the graph.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from .approximations import APPROXIMATIONS, DefaultApproximations, takes_size_limit
from .capture import uncompiled
from .coverage import Reports
from .fisher_blocks import FisherBlock, linear_parts
from .fisher_factors import FactorOptions, FisherFactor
from .fisher_factors.base import check_choice
from .fused_registration import FusedRegistration
from .layer_choice import Choices, Layers
from .plain_updates import PLAIN_RULES
from .registration import Found, find_layers
from .registration_checks import RegistrationChecks, as_list
from .size_limit import SizeLimit
from .use_count import UseWatch

_Factor = TypeVar("_Factor", bound=FisherFactor)


class LayerCollection(
    FusedRegistration, DefaultApproximations, RegistrationChecks, Reports
):
    """The blocks of a model by name, and its losses.

    Args:
        model: the root module, whose forward returns what the losses are of.
        options: of all factors.
        size_limit: what sides of Kronecker products become above a size, in every layer
            registered; None for none.

    Raises:
        TypeError: `model` is no module.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))
    >>> layers = LayerCollection(model)
    >>> layers.register_fully_connected(model[0], approx="diagonal")
    >>> layers.auto_register_layers()
    >>> layers.register_categorical_predictive_distribution()
    >>> [(name, type(block).__name__) for name, block in layers.blocks.items()]
    [('0', 'FullyConnectedDiagonalFB'), ('2', 'FullyConnectedKFACBasicFB')]
    >>> layers.check_registration()
    """

    def __init__(
        self,
        model: nn.Module,
        options: FactorOptions = FactorOptions(),
        size_limit: SizeLimit | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "model: expected the root module itself, whose forwards are watched, got "
                f"{type(model).__name__}; pass model rather than model.parameters()"
            )
        DefaultApproximations.__init__(self)
        RegistrationChecks.__init__(self, model)
        self.use_watch = UseWatch(self.blocks)
        self._options = options
        self._size_limit = size_limit
        self.left_alone: dict[str, str] = {}  # by auto_register_layers, and why
        self._linked: dict[frozenset[int], str | None] = {}
        self._factors: dict[Hashable, FisherFactor] = {}
        self._choices = Choices()
        self.fallback = "adamw"
        # Shared modules are known by their first name.
        modules = uncompiled(model).named_modules()
        self._module_names = {id(m): name for name, m in modules}

    # Linked parameters.

    def define_linked_parameters(
        self, params: Tensor | Sequence[Tensor], approximation: str | None = None
    ) -> None:
        """Say that parameters are to be registered together, maybe how.

        Their registration by other groups, or with another approximation than this one,
        is refused; `auto_register_layers` leaves them alone unless the group is a layer.

        Args:
            params: the group, parameters of the model.
            approximation: the name of one; any if None.

        Raises:
            ValueError: a parameter that is linked or registered already, or that the
                model does not have, or an approximation that no layer has.
        """
        group = as_list(params)
        taken = {i for linked in self._linked for i in linked}
        taken |= {id(p) for p in self.registered_variables}
        for param in group:
            if id(param) in taken or id(param) not in self._param_names:
                raise ValueError(
                    f"{self.describe(param)}: expected a parameter of the model that is "
                    "neither linked nor registered yet, got one that is"
                    f"{'' if id(param) in taken else ' not of the model'}"
                )
        if approximation is not None:
            known = {name for kind in APPROXIMATIONS.values() for name in kind}
            check_choice("approximation", approximation, tuple(sorted(known)))
        self._linked[frozenset(map(id, group))] = approximation

    @property
    def linked_parameters(self) -> dict[frozenset[str], str | None]:
        """The groups that were linked, by names, and their approximations."""
        return {
            frozenset(self._param_names[i] for i in group): approx
            for group, approx in self._linked.items()
        }

    # Layers.

    def register_block(self, block: FisherBlock, num_uses: int | None = None) -> None:
        """Register any block; `num_uses` of its parameters, None for any number.

        Raises:
            ValueError: a name or a parameter that is registered or given twice,
                parameters that are linked with others, one that is frozen or that the
                model does not have.
        """
        taken = {id(param) for param in self.registered_variables}
        ids = frozenset(map(id, block.params))
        if len(ids) < len(block.params):
            raise ValueError(
                f"layer {block.name}: expected every parameter once, got one twice"
            )
        if block.name in self.blocks or ids & taken:
            raise ValueError(
                f"layer {block.name}: expected a layer whose name and parameters are not "
                "registered yet, got one that is; for a layer that is used several times "
                "register it once, with a register_..._multi method"
            )
        if not ids:
            raise ValueError(f"layer {block.name}: expected trained parameters, got none")
        frozen = [self.describe(p) for p in block.params if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"layer {block.name}: expected trained parameters, got frozen ones: "
                f"{', '.join(frozen)}; register the others with register_generic"
            )
        strangers = ids - self._param_names.keys()
        if strangers:
            raise ValueError(
                f"layer {block.name}: expected parameters of "
                f"{type(self.model).__name__}, the model of this collection, got others"
            )
        for linked in self._linked:
            if linked & ids and linked != ids:
                names = ", ".join(sorted(self._param_names[i] for i in linked))
                raise ValueError(
                    f"layer {block.name}: its parameters are linked to others; expected "
                    f"exactly {names} to be registered together"
                )
        self.blocks[block.name] = block
        self._uses[block.name] = num_uses

    def _register(
        self,
        kind: str,
        module: nn.Module | Sequence[nn.Module],
        approx: str | None,
        name: str | None,
        num_uses: int | None = 1,
        **kwargs: Any,
    ) -> None:
        layers = [module] if isinstance(module, nn.Module) else list(module)
        known = self._module_names.get(id(layers[0])) if layers else None
        if known is None:
            raise ValueError(
                f"{name or kind}: expected a module of {type(self.model).__name__}, the "
                f"model of this collection, got {module!r}"
            )
        first = layers[0]
        params = frozenset(id(p) for p in first.parameters() if p.requires_grad)
        approx = self._choose(kind, approx, params, name or known or "model")
        if self._size_limit is not None and takes_size_limit(kind, approx):
            kwargs["size_limit"] = self._size_limit
        block = APPROXIMATIONS[kind][approx](
            module, name or known or "model", options=self._options, **kwargs
        )
        # Gradients of parameters do not care how often they are used.
        self.register_block(block, None if block.needs_param_grads else num_uses)

    def _choose(
        self, kind: str, approx: str | None, params: frozenset[int], name: str
    ) -> str:
        linked = self._linked.get(params)
        if linked is not None and approx not in (None, linked):
            raise ValueError(
                f"layer {name}: approx: its parameters are linked with approximation "
                f"{linked!r}, got {approx!r}"
            )
        if approx is None:
            approx = linked or self.default_approximation(kind)
        check_choice(f"layer {name}: approx", approx, tuple(APPROXIMATIONS[kind]))
        return approx

    def register_generic(
        self,
        params: nn.Module | nn.Parameter | Iterable[nn.Parameter],
        approx: str | None = None,
        name: str | None = None,
    ) -> None:
        """Register any parameters, by the gradients of the loss with respect to them.

        The square of a batch's gradient is the Fisher in expectation only, with a high
        variance; `"exact"` estimation has none.

        Args:
            params: one, several, or a module: all that it trains, as one block.
            approx: `"diagonal"` or `"full"`.
            name: of the block; the module's or the parameters' if None.

        Raises:
            TypeError: no module, and no parameters.
            ValueError: as `register_block`, or an unknown approximation.
        """
        if isinstance(params, nn.Module):
            name = name or self._module_names.get(id(params)) or "model"
            params = [p for p in params.parameters() if p.requires_grad]
        params = as_list(params)
        if not all(isinstance(p, Tensor) for p in params):
            raise TypeError(
                f"register_generic: expected a module or parameters that are trained, got "
                f"{params!r}"
            )
        name = name or "+".join(self._param_names.get(id(p), "?") for p in params)
        name = name or "generic"
        approx = self._choose("generic", approx, frozenset(map(id, params)), name)
        block = APPROXIMATIONS["generic"][approx](params, name, self._options)
        self.register_block(block)

    def register_fully_connected(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register an `nn.Linear`, or a `Conv1D` of transformers, called once in a forward.

        `approx`: `"kron"`, with diagonal sides `"kron_in_diag"`, `"kron_out_diag"`,
        `"kron_both_diag"`, `"kron_reduce"` (averaged over the positions of an example,
        with diagonal sides likewise), `"ekfac"` (eigenvalues corrected), `"diagonal"` or
        `"full"`.

        Raises:
            ValueError: as `register_block`, or an unknown approximation.
        """
        self._register("fully_connected", module, approx, name)

    def register_convolution(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with groups or without.

        `approx`: `"kron"`, `"kron_sua"` (spatially uncorrelated activations),
        `"kron_reduce"` (averaged over locations), `"ekfac"` (eigenvalues corrected),
        `"diagonal"` or `"full"`.

        Raises:
            ValueError: as `register_block`, or an unknown approximation.
        """
        self._register("conv2d", module, approx, name)

    def register_conv2d(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register an `nn.Conv2d`; see `register_convolution`."""
        self._register("conv2d", module, approx, name)

    def register_conv_transpose(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register an `nn.ConvTranspose1d`, `..2d` or `..3d`, with groups or without.

        `approx`: `"kron"`, `"kron_reduce"` (averaged over locations), `"ekfac"`
        (eigenvalues corrected), `"diagonal"` or `"full"`.

        Raises:
            ValueError: as `register_block`, or an unknown approximation.
        """
        self._register("conv_transpose", module, approx, name)

    def register_depthwise_conv2d(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register a convolution with one group per input channel.

        `approx`: `"kron"` (each channel by itself), `"ekfac"`, `"diagonal"` or `"full"`.

        Raises:
            ValueError: as `register_block`, or an unknown approximation.
        """
        self._register("depthwise_conv2d", module, approx, name)

    def register_separable_conv2d(
        self, depthwise: nn.Module, pointwise: nn.Module, approx: str | None = None
    ) -> None:
        """Register a depthwise convolution and the pointwise one behind it, or neither.

        Raises:
            ValueError: as the two methods.
        """
        before = dict(self.blocks)
        self.register_depthwise_conv2d(depthwise, approx)
        try:
            self.register_conv2d(pointwise, approx)
        except (TypeError, ValueError):
            (name,) = self.blocks.keys() - before.keys()
            del self.blocks[name], self._uses[name]
            raise

    def register_embedding(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register an `nn.Embedding` that is called once in a forward.

        `approx`: `"kron"` (counts of the ids, never a vocabulary x vocabulary matrix; the
        same is `"kron_in_diag"`), `"kron_both_diag"` (the same is `"kron_out_diag"`),
        `"diagonal"` or `"full"`.

        Raises:
            ValueError: as `register_block`, or an unknown approximation.
        """
        self._register("embedding", module, approx, name)

    def register_embedding_bag(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register an `nn.EmbeddingBag` of mode `"sum"` or `"mean"`.

        `approx`: as `register_embedding`; `"kron"` leaves out how the words of a bag occur
        together.

        Raises:
            ValueError: as `register_block`, an unknown approximation, or mode `"max"`,
                which has `"diagonal"` and `"full"` alone.
        """
        self._register("embedding_bag", module, approx, name)

    def register_tied_embedding(
        self,
        modules: Sequence[nn.Module],
        approx: str | None = None,
        name: str | None = None,
    ) -> None:
        """Register embeddings and linear heads that share one weight.

        A bias of a head is not in the block; see `register_generic`.

        `approx`: as `register_embedding`, of `"kron"` and its sides alone.

        Raises:
            TypeError: a module of another type.
            ValueError: as `register_block`, an unknown approximation, or modules that do
                not share their weight.
        """
        self._register("tied_embedding", modules, approx, name, num_uses=None)

    def register_bilinear(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register an `nn.Bilinear`: a linear layer of the products of its inputs.

        `approx`: as `register_fully_connected`, but for `"kron_reduce"`.

        Raises:
            ValueError: as `register_block`, or an unknown approximation.
        """
        self._register("bilinear", module, approx, name)

    def register_scale_and_shift(
        self, module: nn.Module, approx: str | None = None, name: str | None = None
    ) -> None:
        """Register a normalisation layer with a trained scale, and maybe a shift.

        It may be called any number of times. `approx`: `"full"` or `"diagonal"`.

        Raises:
            ValueError: as `register_block`, or an unknown approximation.
        """
        self._register("scale_and_shift", module, approx, name, num_uses=None)

    def register_fully_connected_multi(
        self,
        module: nn.Module | Sequence[nn.Module],
        approx: str | None = None,
        name: str | None = None,
        num_uses: int | None = None,
        time_dim: int | None = None,
    ) -> None:
        """Register an `nn.Linear` that is used several times, by calls or over time.

        Args:
            module: the layer, or several that share all their parameters.
            approx: `"kron_indep"` (uses are independent, with diagonal sides
                `"kron_indep_in_diag"`, `..._out_diag`, `..._both_diag`),
                `"kron_series_1"` or `"kron_series_2"` (a linear chain over time),
                `"kron_reduce"` (averaged over the uses of an example, with diagonal sides
                likewise), `"ekfac"` (eigenvalues corrected, uses of an example summed).
            name: of the layer; that in the model if None.
            num_uses: calls in a forward, for `check_registration`.
            time_dim: the input's dimension that is time, where the layer is called once
                for a whole sequence; for the series approximations and `"ekfac"`.

        Raises:
            ValueError: as `register_block`, or an unknown approximation.
        """
        kwargs = {} if time_dim is None else {"time_dim": time_dim}
        self._register("fully_connected_multi", module, approx, name, num_uses, **kwargs)

    def register_conv2d_multi(
        self,
        module: nn.Module | Sequence[nn.Module],
        approx: str | None = None,
        name: str | None = None,
        num_uses: int | None = None,
    ) -> None:
        """Register a convolution that is called several times; see
        `register_fully_connected_multi`.
        """
        self._register("conv2d_multi", module, approx, name, num_uses)

    def register_embedding_multi(
        self,
        module: nn.Module | Sequence[nn.Module],
        approx: str | None = None,
        name: str | None = None,
        num_uses: int | None = None,
    ) -> None:
        """Register an `nn.Embedding` that is called several times; see
        `register_fully_connected_multi`.
        """
        self._register("embedding_multi", module, approx, name, num_uses)

    def auto_register_layers(
        self, model: nn.Module | None = None, layers: Layers | None = None
    ) -> None:
        """Register every layer that has a block of its own: `registration.KINDS`.

        Modules that share all their parameters are registered together, and so are
        embeddings and linear heads with one weight. Left alone is what is registered
        already, parameters that are linked otherwise, and modules of which `left_alone`
        says by name why. A normalisation layer with many features has a diagonal block
        where the default is the full one.

        Args:
            model: a part of the collection's model; all of it if None.
            layers: which approximation, if not the default, what to leave alone, and what
                becomes of parameters without a block.

        Raises:
            ValueError: a choice that means nothing in the model, an approximation that a
                layer cannot have, or trained parameters without a block where
                `fallback="error"`. What was registered until then stays.
        """
        root = self.model if model is None else model
        if layers is not None:
            self._choices = layers.resolve(uncompiled(self.model))
            self.fallback = layers.fallback
            self._size_limit = layers.size_limit or self._size_limit
        taken = {id(param) for param in self.registered_variables}
        for found in find_layers(root, self.model, taken):
            if isinstance(found, Found):
                self._register_found(found)
            else:
                module, reason = found
                name = self._module_names.get(id(module))
                self.left_alone[name or type(module).__name__] = reason
        self._fall_back(root)

    def _register_found(self, found: Found) -> None:
        names = [self._module_names.get(id(module), "") for module in found.modules]
        excluded = any(name in self._choices.excluded for name in names)
        if excluded or any(map(self._linked_otherwise, found.modules)):
            return
        approx = self._choices.approximation(names[0], tuple(APPROXIMATIONS[found.kind]))
        if approx in PLAIN_RULES:
            return
        large_norm = found.is_large_norm and self._prefers_full_scales(found.modules[0])
        if approx is None and large_norm:
            approx = "diagonal"
        for module in found.modules:
            for own, param in module.named_parameters(names[0]):
                name = self._param_names.get(id(param), own)
                if self.is_excluded(param) or self.is_chosen(name):
                    raise ValueError(
                        f"{own}: expected a choice for its whole layer, of whose block it "
                        f"is a part, got one for itself: choose for {names[0] or 'all'}"
                    )
        register = getattr(self, f"register_{found.register}")
        one = len(found.modules) == 1
        register(found.modules[0] if one else found.modules, approx)

    def _fall_back(self, root: nn.Module) -> None:
        """See to the trained parameters that no layer type covers."""
        owned = {id(param) for param in self.registered_variables}
        rest = {
            self._param_names[id(p)]: p
            for p in root.parameters()
            if p.requires_grad and id(p) not in owned and not self.is_excluded(p)
        }
        rest = {name: p for name, p in rest.items() if not self.is_chosen(name)}
        if self.fallback == "error" and rest:
            raise ValueError(
                f"these trained parameters have no K-FAC block: {', '.join(rest)}; "
                'expected none with fallback="error". Register them (register_generic), '
                'exclude them, choose a rule for them (approx={...: "adamw"}), or use '
                "another fallback; report() says why each has none"
            )
        if self.fallback == "diagonal":
            linked = {i for group in self._linked for i in group}
            for name, param in rest.items():
                if id(param) not in linked:
                    self.register_generic(param, "diagonal", name)

    def _prefers_full_scales(self, module: nn.Module) -> bool:
        """Whether a normalisation layer has a full block for want of another choice."""
        linked = self._linked.get(frozenset(map(id, module.parameters())))
        return linked is None and self.default_scale_and_shift_approximation == "full"

    def _linked_otherwise(self, module: nn.Module) -> bool:
        """Whether a layer's parameters are linked, but not as this layer."""
        groups = [frozenset(map(id, part.params)) for part in linear_parts(module)] or [
            frozenset(id(p) for p in module.parameters(recurse=False) if p.requires_grad)
        ]
        ids = frozenset[int]().union(*groups)
        return any(linked & ids and linked not in groups for linked in self._linked)

    # What is registered.

    def get_blocks(self) -> list[FisherBlock]:
        """Return all blocks, in order of registration."""
        return list(self.blocks.values())

    def get_factors(self) -> list[FisherFactor]:
        """Return all factors, in the order of their blocks."""
        return [factor for block in self.blocks.values() for factor in block.factors]

    def make_or_get_factor(self, cls: type[_Factor], args: tuple[Any, ...]) -> _Factor:
        """Return the factor `cls(*args)`, the same one for the same class and arguments.

        Raises:
            TypeError: arguments that cannot be hashed, lists for example.
        """
        key = (cls, args)
        try:
            factor = self._factors.get(key)
        except TypeError as error:
            raise TypeError(
                f"make_or_get_factor: expected arguments of {cls.__name__} that can be "
                f"hashed, tuples rather than lists: {error}"
            ) from error
        if not isinstance(factor, cls):
            factor = self._factors[key] = cls(*args)
        return factor

    def is_excluded(self, param: Tensor) -> bool:
        """Whether a parameter is another optimizer's."""
        return self._param_names.get(id(param)) in self._choices.excluded

    def is_chosen(self, name: str) -> bool:
        """Whether the user said which rule moves a parameter."""
        return self._choices.rule(name) is not None

    def plain_rule(self, param: Tensor) -> str:
        """Return the rule that moves a parameter while it has no block."""
        chosen = self._choices.rule(self._param_names.get(id(param), ""))
        return chosen or (self.fallback if self.fallback in PLAIN_RULES else "adamw")
