"""Products of a block-diagonal Fisher with vectors in the shape of a model's parameters.

Notation: `F_λ` the damped Fisher of the mean loss, one block for each layer; `v` a vector
in parameter space, given as pairs `(vector, variable)`, and `L` with `L Lᵀ = F_λ`: where
`ε ~ N(0, I)`, `L ε` has the covariance `F_λ` and `L⁻ᵀ ε` its inverse. A layer's weight and
bias are one block, so a vector has all parameters of a block or none. Left out: what makes
the factors (the estimator's business).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from torch import Tensor

from .fisher_blocks import FisherBlock
from .layer_collection import LayerCollection

VectorsAndVariables: TypeAlias = Iterable[tuple[Tensor, Tensor]]


class BlockProducts:
    """Multiply by powers and Cholesky factors of the Fisher, block by block.

    Every product returns `[(product, variable), ...]` in the order given, in the
    variables' shapes. They read what the last refresh stored, `multiply` alone the current
    factors.

    Args:
        layer_collection: the blocks.
    """

    def __init__(self, layer_collection: LayerCollection) -> None:
        self.layers = layer_collection
        self.blocks = layer_collection.blocks
        self._owners = {
            id(param): block for block in self.blocks.values() for param in block.params
        }

    def register_matpower(self, exp: float) -> None:
        """Ask for `F_λ^exp` to be kept, from the next refresh on.

        Raises:
            NotImplementedError: an approximation does not have it.
        """
        for block in self.blocks.values():
            block.register_matpower(exp)

    def register_cholesky(self) -> None:
        """Ask for `L` to be kept, from the next refresh on.

        Raises:
            NotImplementedError: an approximation does not have it.
        """
        for block in self.blocks.values():
            block.register_cholesky()

    def register_cholesky_inverse(self) -> None:
        """Ask for `L⁻¹` to be kept, from the next refresh on.

        Raises:
            NotImplementedError: an approximation does not have it.
        """
        for block in self.blocks.values():
            block.register_cholesky_inverse()

    def multiply(self, vecs_and_vars: VectorsAndVariables) -> list[tuple[Tensor, Tensor]]:
        """Return `F_λ v` with the current factors, as `multiply_matpower(1, ...)`."""
        return self.multiply_matpower(1, vecs_and_vars)

    def multiply_inverse(
        self, vecs_and_vars: VectorsAndVariables
    ) -> list[tuple[Tensor, Tensor]]:
        """Return `F_λ⁻¹ v`, as `multiply_matpower(-1, ...)`."""
        return self.multiply_matpower(-1, vecs_and_vars)

    def multiply_matpower(
        self, exp: float, vecs_and_vars: VectorsAndVariables
    ) -> list[tuple[Tensor, Tensor]]:
        """Return `[(F_λ^exp v, variable), ...]` in the order given.

        Args:
            exp: 1, or an exponent that is registered.
            vecs_and_vars: pairs `(vector, variable)`, the vector in the variable's shape;
                of a block's parameters either all or none.

        Raises:
            ValueError: a variable without a block, one that is given twice, part of a
                block, or another shape.
            KeyError: this exponent is not registered.
            RuntimeError: no statistics, or not refreshed yet.
        """
        return self._map_blocks(
            vecs_and_vars, lambda block, v: block.multiply_matpower(v, exp)
        )

    def multiply_cholesky(
        self, vecs_and_vars: VectorsAndVariables, transpose: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Return `L v`, or `Lᵀ v`, with `L Lᵀ = F_λ`.

        Raises:
            ValueError: as `multiply_matpower`.
            KeyError: `register_cholesky()` was not called.
            RuntimeError: not refreshed since.
        """
        return self._map_blocks(
            vecs_and_vars, lambda block, v: block.multiply_cholesky(v, transpose)
        )

    def multiply_cholesky_inverse(
        self, vecs_and_vars: VectorsAndVariables, transpose: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Return `L⁻¹ v`, or `L⁻ᵀ v`, with `L Lᵀ = F_λ`.

        Raises:
            ValueError: as `multiply_matpower`.
            KeyError: `register_cholesky_inverse()` was not called.
            RuntimeError: not refreshed since.
        """
        return self._map_blocks(
            vecs_and_vars, lambda block, v: block.multiply_cholesky_inverse(v, transpose)
        )

    def _map_blocks(
        self,
        vecs_and_vars: VectorsAndVariables,
        product: Callable[[FisherBlock, Tensor], Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        pairs = list(vecs_and_vars)
        vectors: dict[int, Tensor] = {}
        blocks: dict[int, FisherBlock] = {}
        for vector, variable in pairs:
            block = self._check_pair(vector, variable, known=vectors)
            blocks[id(block)] = block
            vectors[id(variable)] = vector
        for block in blocks.values():
            missing = [p for p in block.params if id(p) not in vectors]
            if missing:
                raise ValueError(
                    f"block {block.name}: expected vectors for all its parameters, got "
                    f"none for {', '.join(map(self.layers.describe, missing))}"
                )
        result: dict[int, Tensor] = {}
        for block in blocks.values():
            parts = _multiply(block, [vectors[id(p)] for p in block.params], product)
            result |= {id(p): part for p, part in zip(block.params, parts, strict=True)}
        return [(result[id(variable)], variable) for _, variable in pairs]

    def _check_pair(
        self, vector: Tensor, variable: Tensor, known: dict[int, Tensor]
    ) -> FisherBlock:
        block, problem = self._owners.get(id(variable)), None
        if block is None:
            problem = "has no block"
        elif vector.shape != variable.shape:
            problem = "has another shape"
        elif id(variable) in known:
            problem = "is given twice"
        if block is None or problem is not None:
            raise ValueError(
                f"{self.layers.describe(variable)} {problem}: expected pairs (vector, "
                "variable) of equal shape, the variables those of the layer collection "
                f"and each once, got a vector of shape {tuple(vector.shape)}"
            )
        return block


def _multiply(
    block: FisherBlock,
    tensors: Sequence[Tensor],
    product: Callable[[FisherBlock, Tensor], Tensor],
) -> list[Tensor]:
    """A product with tensors like the block's parameters, in their shapes and dtype."""
    vector = block.params_to_vector(tensors).to(block.dtype)
    parts = block.vector_to_params(product(block, vector))
    return [part.to(like.dtype) for part, like in zip(parts, tensors, strict=True)]
