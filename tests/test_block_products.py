"""What every block's products have in common, each against its dense damped matrix.

A block is a row of `CASES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from kfac_torch import fisher_blocks as fb
from kfac_torch.fisher_blocks.kronecker import KroneckerProductFB
from kfac_torch.fisher_factors import refresh_inverses
from kfac_torch.size_limit import SizeLimit

pytestmark = pytest.mark.usefixtures("float64")
DAMPING = 0.3


class Conv1D(nn.Module):
    """A linear layer with its weight `[in, out]`, as in GPT-2."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Case(NamedTuple):
    make: Callable  # -> block
    inputs: (
        tuple  # shapes of a batch of 6, one per call; "ids" or "bags" in front says which
    )
    outputs: tuple  # of the gradients, one per call, or per parameter
    exps: tuple = (-1, -0.5, 0.5, 2, 1)
    cholesky: bool = True


def layer(kind, make, inputs, outputs, *rest, **kwargs):
    return Case(lambda: kind(make(), "layer", **kwargs), (inputs,), (outputs,), *rest)


LINEAR = (6, 4, 3), (6, 4, 2)
LINEAR_OUT = ((6, 4, 3),)
CONV = (6, 2, 4, 5), (6, 3, 2, 4)
GROUPED = (6, 4, 4, 5), (6, 6, 2, 4)
DEPTHWISE = (6, 2, 4, 5), (6, 4, 2, 4)
TRANSPOSED = (6, 2, 2, 3), (6, 3, 4, 4)
TRANSPOSED_GROUPED = (6, 4, 2, 3), (6, 6, 5, 4)  # as by output_size=(5, 4)
IDS = ("ids", 6, 2), (6, 2, 3)
BAGS = ("bags", 6, 5), (6, 3)
TIED = (("ids", 6, 2), (6, 4, 3)), ((6, 2, 3), (6, 4, 5))
SERIES = (6, 4, 3), (6, 4, 2)
BOTH = {"diagonal_approx_for_input": True, "diagonal_approx_for_output": True}
INPUT = {"diagonal_approx_for_input": True}


SPLIT, LOW_RANK = SizeLimit(2), SizeLimit(2, above="low_rank", rank=1)
DIAGONAL = SizeLimit(1, above="diagonal")


def linear():
    return nn.Linear(3, 2)


def conv():
    return nn.Conv2d(2, 3, (3, 2))


def grouped():
    return nn.Conv2d(4, 6, (3, 2), groups=2)


def depthwise():
    return nn.Conv2d(2, 4, (3, 2), groups=2)


def transposed():
    return nn.ConvTranspose2d(2, 3, 2, stride=(2, 1))


def transposed_grouped():
    return nn.ConvTranspose2d(4, 6, 2, stride=(2, 1), groups=2)


def embedding():
    return nn.Embedding(5, 3)


def conv1d():
    return Conv1D(2, 3)


def bag():
    return nn.EmbeddingBag(5, 3)


def bilinear():
    return nn.Bilinear(3, 1, 2)


def tied():
    embedding, head = nn.Embedding(5, 3, padding_idx=1), nn.Linear(3, 5)
    head.weight = embedding.weight
    return [embedding, head]


def linear_map(module, index=0, **kwargs):
    return fb.LinearMapFB(fb.linear_parts(module)[index], module, "layer", **kwargs)


def corrected_map(module, index=0, **kwargs):
    return fb.LinearMapEKFACFB(fb.linear_parts(module)[index], module, "layer", **kwargs)


def params():
    return [nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(()))]


CASES = {
    "linear": layer(fb.FullyConnectedKFACBasicFB, linear, *LINEAR),
    "linear, diagonal input": layer(fb.FullyConnectedKFACBasicFB, linear, *LINEAR, **INPUT),
    "linear, both diagonal": layer(fb.FullyConnectedKFACBasicFB, linear, *LINEAR, **BOTH),
    "linear, several uses": layer(fb.FullyConnectedMultiIndepFB, linear, *LINEAR),
    "linear, several uses, diagonal": layer(
        fb.FullyConnectedMultiIndepFB, linear, *LINEAR, **BOTH
    ),
    "linear diagonal": layer(fb.FullyConnectedDiagonalFB, linear, *LINEAR),
    "linear, split": layer(
        fb.FullyConnectedKFACBasicFB,
        lambda: nn.Linear(4, 3),  # blocks of 2, 2, 1 and of 2, 1
        (6, 4, 4),
        (6, 4, 3),
        size_limit=SPLIT,
    ),
    "linear, low rank": layer(
        fb.FullyConnectedKFACBasicFB,
        lambda: nn.Linear(6, 5),
        (6, 4, 6),
        (6, 4, 5),
        (-1, -0.5, 0.5, 2, 1),
        False,
        size_limit=LOW_RANK,
    ),
    "linear, several uses, split": layer(
        fb.FullyConnectedMultiIndepFB, linear, *LINEAR, size_limit=SPLIT
    ),
    "conv": layer(fb.ConvKFCBasicFB, conv, *CONV),
    "conv, split": layer(  # blocks of 2 channels and of 1, with a bias; of 3 and of 2
        fb.ConvKFCBasicFB,
        lambda: nn.Conv2d(3, 15, 1),
        (6, 3, 2, 4),
        (6, 15, 2, 4),
        size_limit=SizeLimit(2),
    ),
    "conv, split, groups": layer(
        fb.ConvKFCBasicFB,
        lambda: nn.Conv2d(6, 6, (2, 1), groups=2),
        (6, 6, 3, 4),
        (6, 6, 2, 4),
        size_limit=SizeLimit(4),
    ),
    "conv, split, groups of outputs": layer(
        fb.ConvKFCBasicFB,
        lambda: nn.Conv2d(6, 6, (2, 1), groups=2, bias=False),
        (6, 6, 3, 4),
        (6, 6, 2, 4),
        size_limit=SPLIT,
    ),
    "conv, large kernel": layer(  # a diagonal: one channel is larger than a block
        fb.ConvKFCBasicFB, conv, *CONV, size_limit=SizeLimit(5)
    ),
    "conv, diagonal sides": layer(fb.ConvKFCBasicFB, conv, *CONV, size_limit=DIAGONAL),
    "conv, diagonal sides, groups": layer(
        fb.ConvKFCBasicFB, grouped, *GROUPED, size_limit=DIAGONAL
    ),
    "conv, low rank": layer(
        fb.ConvKFCBasicFB,
        conv,
        *CONV,
        (-1, -0.5, 0.5, 2, 1),
        False,
        size_limit=LOW_RANK,
    ),
    "conv, low rank, groups": layer(
        fb.ConvKFCBasicFB,
        grouped,
        *GROUPED,
        (-1, 0.5, 1),
        False,
        size_limit=LOW_RANK,
    ),
    "conv, uncorrelated locations, split": layer(
        fb.ConvKFCBasicFB,
        conv,
        *CONV,
        (-1, 1),
        False,
        sua_approx_for_input=True,
        size_limit=SPLIT,
    ),
    "conv, groups": layer(fb.ConvKFCBasicFB, grouped, *GROUPED),
    "conv, uncorrelated locations": layer(
        fb.ConvKFCBasicFB, conv, *CONV, (-1, 1), False, sua_approx_for_input=True
    ),
    "conv, several calls": Case(
        lambda: fb.ConvKFCBasicMultiIndepFB(conv(), "layer"), CONV[:1] * 3, CONV[1:] * 3
    ),
    "conv diagonal": layer(fb.ConvDiagonalFB, conv, *CONV),
    "conv diagonal, groups": layer(fb.ConvDiagonalFB, grouped, *GROUPED),
    "depthwise": layer(fb.DepthwiseConvKFCBasicFB, depthwise, *DEPTHWISE),
    "depthwise diagonal": layer(fb.DepthwiseConvDiagonalFB, depthwise, *DEPTHWISE),
    "conv transpose": layer(fb.ConvTransposeKFCFB, transposed, *TRANSPOSED),
    "conv transpose, groups": layer(
        fb.ConvTransposeKFCFB, transposed_grouped, *TRANSPOSED_GROUPED
    ),
    "conv transpose diagonal": layer(fb.ConvTransposeDiagonalFB, transposed, *TRANSPOSED),
    "conv transpose diagonal, groups": layer(
        fb.ConvTransposeDiagonalFB, transposed_grouped, *TRANSPOSED_GROUPED
    ),
    "linear, reduced": layer(fb.FullyConnectedKFACReduceFB, linear, *LINEAR),
    "linear, reduced, both diagonal": layer(
        fb.FullyConnectedKFACReduceFB, linear, *LINEAR, **BOTH
    ),
    "conv, reduced": layer(fb.ConvKFCReduceFB, conv, *CONV),
    "conv, groups, reduced, several calls": Case(
        lambda: fb.ConvKFCReduceFB(grouped(), "layer"), GROUPED[:1] * 3, GROUPED[1:] * 3
    ),
    "conv transpose, groups, reduced": layer(
        fb.ConvTransposeKFCReduceFB, transposed_grouped, *TRANSPOSED_GROUPED
    ),
    "linear, corrected": layer(fb.FullyConnectedEKFACFB, linear, *LINEAR),
    "linear, corrected, split": layer(
        fb.FullyConnectedEKFACFB, linear, *LINEAR, size_limit=SPLIT
    ),
    "linear, transposed, corrected": layer(fb.FullyConnectedEKFACFB, conv1d, *LINEAR),
    "conv, corrected": layer(fb.ConvEKFACFB, conv, *CONV),
    "conv, groups, corrected, several calls": Case(
        lambda: fb.ConvEKFACFB(grouped(), "layer"), GROUPED[:1] * 3, GROUPED[1:] * 3
    ),
    "depthwise, corrected": layer(fb.DepthwiseConvEKFACFB, depthwise, *DEPTHWISE),
    "conv transpose, groups, corrected": layer(
        fb.ConvTransposeEKFACFB, transposed_grouped, *TRANSPOSED_GROUPED
    ),
    "map of a cell, corrected, several calls": Case(
        lambda: corrected_map(nn.GRUCell(3, 1)), ((6, 3),) * 3, ((6, 3),) * 3
    ),
    "maps of attention, corrected": Case(
        lambda: corrected_map(nn.MultiheadAttention(2, 1)),
        ((3, 6, 2), (5, 6, 2), (5, 6, 2)),
        ((3, 6, 2), (5, 6, 2), (5, 6, 2)),
    ),
    "embedding": layer(fb.EmbeddingKFACFB, embedding, *IDS),
    "embedding, both diagonal": layer(
        fb.EmbeddingKFACFB, embedding, *IDS, diagonal_approx_for_output=True
    ),
    "embedding, split": layer(fb.EmbeddingKFACFB, embedding, *IDS, size_limit=SPLIT),
    "embedding, several calls": Case(
        lambda: fb.EmbeddingKFACMultiIndepFB(embedding(), "layer"),
        IDS[:1] * 2,
        IDS[1:] * 2,
    ),
    "linear, transposed": layer(fb.FullyConnectedKFACBasicFB, conv1d, *LINEAR),
    "linear, transposed, diagonal input": layer(
        fb.FullyConnectedKFACBasicFB, conv1d, *LINEAR, **INPUT
    ),
    "linear, transposed, diagonal": layer(fb.FullyConnectedDiagonalFB, conv1d, *LINEAR),
    "linear, transposed, reduced": layer(fb.FullyConnectedKFACReduceFB, conv1d, *LINEAR),
    "bilinear": layer(fb.BilinearKFACFB, bilinear, *LINEAR),
    "bilinear, both diagonal": layer(fb.BilinearKFACFB, bilinear, *LINEAR, **BOTH),
    "bilinear, split": layer(fb.BilinearKFACFB, bilinear, *LINEAR, size_limit=SPLIT),
    "bilinear diagonal": layer(fb.BilinearDiagonalFB, bilinear, *LINEAR),
    "bag": layer(fb.EmbeddingBagKFACFB, bag, *BAGS),
    "bag, both diagonal": layer(
        fb.EmbeddingBagKFACFB, bag, *BAGS, diagonal_approx_for_output=True
    ),
    "bag, split": layer(fb.EmbeddingBagKFACFB, bag, *BAGS, size_limit=SPLIT),
    "bag, several calls": Case(
        lambda: fb.EmbeddingBagKFACFB(bag(), "layer"), BAGS[:1] * 2, BAGS[1:] * 2
    ),
    "tied embedding": Case(lambda: fb.TiedEmbeddingFB(tied(), "layer"), *TIED),
    "tied embedding, both diagonal": Case(
        lambda: fb.TiedEmbeddingFB(tied(), "layer", diagonal_approx_for_output=True), *TIED
    ),
    "tied embedding, split": Case(
        lambda: fb.TiedEmbeddingFB(tied(), "layer", size_limit=SPLIT), *TIED
    ),
    "scale and shift": layer(
        fb.ScaleAndShiftFullFB, lambda: nn.LayerNorm(3), (6, 3), (6, 3)
    ),
    "scale and shift diagonal": layer(
        fb.ScaleAndShiftDiagonalFB, lambda: nn.GroupNorm(1, 3), (6, 3, 4), (6, 3, 4)
    ),
    "scale and shift, large": layer(
        fb.ScaleAndShiftFullFB, lambda: nn.LayerNorm(3), (6, 3), (6, 3), size_limit=SPLIT
    ),
    "full": Case(lambda: fb.FullFB(params(), "layer"), (), ((2, 2), ())),
    "naive diagonal": Case(lambda: fb.NaiveDiagonalFB(params(), "layer"), (), ((2, 2), ())),
    "series, option 1": layer(
        fb.FullyConnectedSeriesFB, linear, *SERIES, (-1,), False, option=1, time_dim=1
    ),
    "series, option 2": layer(
        fb.FullyConnectedSeriesFB, linear, *SERIES, (-1,), False, option=2, time_dim=1
    ),
    "map of a cell": Case(lambda: linear_map(nn.GRUCell(3, 1)), LINEAR[:1], LINEAR_OUT[:1]),
    "map of a cell, several calls, both diagonal": Case(
        lambda: linear_map(nn.GRUCell(3, 1), **BOTH), LINEAR[:1] * 3, LINEAR_OUT * 3
    ),
    "maps of attention": Case(
        lambda: linear_map(nn.MultiheadAttention(2, 1)),
        ((6, 3, 2), (6, 5, 2), (6, 5, 2)),
        ((6, 3, 2), (6, 5, 2), (6, 5, 2)),
    ),
    "maps of attention, several calls": Case(
        lambda: linear_map(nn.MultiheadAttention(2, 1)),
        ((6, 3, 2), (6, 5, 2), (6, 5, 2)) * 2,
        ((6, 3, 2), (6, 5, 2), (6, 5, 2)) * 2,
    ),
    "bias of separate maps": Case(
        lambda: linear_map(nn.MultiheadAttention(2, 1, kdim=3), 3),
        ((6, 3, 1), (6, 5, 1), (6, 5, 1)),
        ((6, 3, 2), (6, 5, 2), (6, 5, 2)),
    ),
}
EXPS = [(name, exp) for name, case in CASES.items() for exp in case.exps]
DENSE = [name for name in CASES if "series" not in name]
CHOLESKY = [name for name, case in CASES.items() if case.cholesky]


def close(actual, expected, tol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def ids(*shape):
    return torch.randint(5, shape)


def bags(*shape):
    """Rows of an embedding bag, none of them empty."""
    rows = torch.randn(shape) * (torch.rand(shape) < 0.6)
    rows[:, 2] = 1
    return rows.to_sparse()


def part(inputs, rows):
    """Some examples of a batch."""
    return [
        torch.stack([x[i].to_dense() for i in range(*rows.indices(len(x)))]).to_sparse()
        if x.is_sparse
        else x[rows]
        for x in inputs
    ]


def draw(case):
    inputs = [
        {"ids": ids, "bags": bags}[shape[0]](*shape[1:])
        if isinstance(shape[0], str)
        else torch.randn(shape)
        for shape in case.inputs
    ]
    return inputs, [[torch.randn(shape) for shape in case.outputs]]


def register(block, case):
    block.instantiate_factors(DAMPING)
    for exp in case.exps:
        block.register_matpower(exp)
    if case.cholesky:
        block.register_cholesky()
        block.register_cholesky_inverse()
    return block


def ready(name):
    """Two batches with 4 loss terms each have entered, each refreshed: T is not 1."""
    case = CASES[name]
    block = register(case.make(), case)
    for _ in range(2):
        block.accumulate(block.moments(*draw(case), num_terms=4), decay=0.9)
        refresh_inverses(block.factors)
    return block


def vector_for(block):
    return block.params_to_vector([torch.randn_like(param) for param in block.params])


def matrices(cov):
    return list(cov) if cov.dim() == 3 else [cov]


def corrected(block):
    """`Q diag(S) Qᵀ` of each group, in the basis of the current factors."""
    A, G, S = (factor.get_cov_var() for factor in block.factors)
    products = []
    for *sides, scales in zip(
        *(x if x.dim() == 3 else [x] for x in (A, G, S)), strict=True
    ):
        Q = torch.kron(*(torch.linalg.eigh(side)[1] for side in sides))
        products.append(Q @ scales.flatten().diag() @ Q.T)
    return torch.block_diag(*products)


def damped(block):
    """`F_λ`, dense over the row-major entries of V: λ split by π, of each group."""
    T = block.num_locations
    if len(block.factors) == 3:  # λ adds to it what it adds to K-FAC's
        A, G, _ = block.factors
        K = torch.block_diag(*map(torch.kron, *map(matrices, (A.get_cov(), G.get_cov()))))
        return T * (corrected(block) - K) + damped_product(block, (A, G))
    if not isinstance(block, KroneckerProductFB):
        C = block.factors[0].get_cov()
        return T * C + DAMPING * torch.eye(len(C))
    return damped_product(block, block.factors)


def damped_product(block, sides):
    T = block.num_locations
    products, root = [], (DAMPING / T) ** 0.5
    covs = [matrices(factor.get_cov()) for factor in sides]
    for A, G in zip(*covs, strict=True):
        pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
        left = A + pi * root * torch.eye(len(A))
        right = G + root / pi * torch.eye(len(G))
        products.append(torch.kron(left, right))
    return T * torch.block_diag(*products)


def test_every_block_is_in_the_table():
    kinds = {
        kind
        for kind in vars(fb).values()
        if isinstance(kind, type) and issubclass(kind, fb.FisherBlock)
    }
    made = {type(case.make()) for case in CASES.values()}
    abstract = {fb.FisherBlock, fb.KroneckerProductFB, fb.EigenKroneckerFB}
    assert made == kinds - abstract


@pytest.mark.parametrize(("name", "exp"), [e for e in EXPS if e[0] in DENSE])
def test_powers_are_those_of_the_dense_damped_block(name, exp):
    block = ready(name)
    assert block.num_locations != 1 or not block.modules
    V = vector_for(block)
    e, U = torch.linalg.eigh(damped(block))
    expected = (U * e**exp) @ U.T @ V.flatten()
    close(block.multiply_matpower(V, exp), expected.view(V.shape), 1e-8)


@pytest.mark.parametrize("name", DENSE)
def test_the_undamped_block_and_its_products(name):
    block = ready(name)
    F = block.full_fisher_block()
    assert F.shape == (vector_for(block).numel(),) * 2
    covs = [matrices(factor.get_cov()) for factor in block.factors]
    products = {
        1: lambda: covs[0],
        2: lambda: [torch.kron(*sides) for sides in zip(*covs, strict=True)],
        3: lambda: [corrected(block)],
    }[len(covs)]()
    close(F, block.num_locations * torch.block_diag(*products))
    close(block.trace(), F.trace())
    V = vector_for(block)
    close(block.multiply_inverse(block.multiply(V)), V)
    close(block.multiply(V), (damped(block) @ V.flatten()).view(V.shape))


@pytest.mark.parametrize("name", CHOLESKY)
def test_cholesky_factors(name):
    block = ready(name)
    V, W = vector_for(block), vector_for(block)
    L, inverse = block.multiply_cholesky, block.multiply_cholesky_inverse
    close(L(L(V, transpose=True)), block.multiply(V))
    close(inverse(inverse(V), transpose=True), block.multiply_inverse(V))
    close((W * L(V)).sum(), (L(W, transpose=True) * V).sum())
    close((W * inverse(V)).sum(), (inverse(W, transpose=True) * V).sum())
    close(inverse(L(V)), V)
    close(L(inverse(V)), V)
    close(inverse(L(V, transpose=True), transpose=True), V)
    if len(block.factors) == 3:
        return  # a root in the eigenbasis
    # Triangular: what L makes of the last coordinate is there alone.
    last = V.new_zeros(V.shape)
    last.view(-1)[-1] = 1
    assert L(last).count_nonzero() == 1


@pytest.mark.parametrize("name", [n for n in CASES if n not in CHOLESKY])
def test_what_a_block_does_not_have(name):
    block = CASES[name].make()
    block.instantiate_factors(DAMPING)
    powers = -0.5 in CASES[name].exps or 0.5 in CASES[name].exps
    message = "powers 0.5 and -0.5" if powers else "exp=-1"
    early = [block.register_cholesky, block.register_cholesky_inverse]
    early += [] if powers else [lambda: block.register_matpower(-0.5)]
    for register in early:
        with pytest.raises(NotImplementedError, match=rf"layer.*{message}"):
            register()
    if "series" in name:
        block = ready(name)
        V = vector_for(block)
        for product in (block.multiply, block.multiply_cholesky):
            with pytest.raises((NotImplementedError, KeyError), match="layer"):
                product(V)
        with pytest.raises(NotImplementedError, match="use multiply_inverse"):
            block.full_fisher_block()


@pytest.mark.parametrize("name", CASES)
def test_parameters_to_vector_and_back(name):
    block = CASES[name].make()
    parts = [torch.randn_like(param) for param in block.params]
    back = block.vector_to_params(block.params_to_vector(parts))
    assert all(map(torch.equal, parts, back))


@pytest.mark.parametrize("name", CASES)
def test_multiply_tensors_is_in_the_shapes_and_dtype_of_the_parameters(name):
    block = ready(name)
    parts = [torch.randn_like(param) for param in block.params]
    expected = block.vector_to_params(block.multiply_inverse(block.params_to_vector(parts)))
    assert all(map(torch.equal, block.multiply_tensors(parts, -1), expected))
    single = block.multiply_tensors([part.float() for part in parts], -1)
    for part, like in zip(single, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part, like.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_state_round_trip(name, tmp_path):
    case, block = CASES[name], ready(name)
    fresh = register(case.make(), case)
    torch.save(block.state_dict(), tmp_path / "block.pt")
    fresh.load_state_dict(torch.load(tmp_path / "block.pt", weights_only=True))
    V = vector_for(block)
    batch = draw(case)
    for _ in range(2):
        assert fresh.num_locations == block.num_locations
        for exp in case.exps:
            product = fresh.multiply_matpower(V, exp)
            assert torch.equal(product, block.multiply_matpower(V, exp))
        if case.cholesky:
            assert torch.equal(fresh.multiply_cholesky(V), block.multiply_cholesky(V))
            assert torch.equal(
                fresh.multiply_cholesky_inverse(V), block.multiply_cholesky_inverse(V)
            )
        for each in (block, fresh):  # and what comes next
            each.accumulate(each.moments(*batch, num_terms=3), decay=0.9)
            refresh_inverses(each.factors)


def test_a_state_of_another_block_changes_nothing():
    linear_block, conv_block = ready("linear"), ready("linear diagonal")
    before = linear_block.full_fisher_block().clone()
    with pytest.raises(ValueError, match="expected the state of 2 factors, got 1"):
        linear_block.load_state_dict(conv_block.state_dict())
    with pytest.raises(ValueError, match="layer"):
        linear_block.load_state_dict(ready("linear, diagonal input").state_dict())
    assert torch.equal(linear_block.full_fisher_block(), before)


@pytest.mark.parametrize("T", [0.25, 1.0, 9.0])
@pytest.mark.parametrize("name", [n for n in DENSE if "locations" not in n])
def test_damping_is_lambda_whatever_the_number_of_locations(name, T):
    case = CASES[name]
    block = register(case.make(), case)
    for factor in block.factors:
        factor.accumulate(torch.zeros_like(factor.get_cov_var()), 0.0)
    block.num_locations = T
    refresh_inverses(block.factors)
    V = vector_for(block)
    for exp in case.exps:
        close(block.multiply_matpower(V, exp), DAMPING**exp * V)


NOT_MERGED = ("full", "naive diagonal", "maps of attention, corrected")


@pytest.mark.parametrize("name", [n for n in CASES if n not in NOT_MERGED])
def test_micro_batches_are_merged(name):
    """Moments of halves, merged, are those of the whole.

    Not so of generic blocks: the square of a sum is no mean over halves; and of attention
    the first dimension is not that of examples.
    """
    case = CASES[name]
    inputs, (grads,) = draw(case)
    block = ready(name)
    whole = block.moments(inputs, [grads], num_terms=6)
    some, others = slice(2), slice(2, None)
    merged = block.moments(part(inputs, some), [[g[:2] for g in grads]], 2)
    rest = block.moments(part(inputs, others), [[g[2:] for g in grads]], 4)
    for one, two, both in zip(merged, rest, whole, strict=True):
        one.merge(two)
        assert (one.rows, one.terms, one.uses) == (both.rows, 6, both.uses)
        close(one.cov, both.cov)


@pytest.mark.parametrize("name", CASES)
def test_sources_add_up(name):
    case = CASES[name]
    inputs, (first,) = draw(case)
    second = draw(case)[1][0]
    block = ready(name)
    both = block.moments(inputs, [first, second], 4)
    one, two = (block.moments(inputs, [grads], 4) for grads in (first, second))
    close(both[-1].cov, one[-1].cov + two[-1].cov)
    if block.input_moments(inputs):  # which are the same
        close(both[0].cov, one[0].cov)


GROUPS = ["conv, groups", "depthwise", "conv, split, groups", "conv transpose, groups"]
GROUPS += ["conv, diagonal sides, groups", "conv, low rank, groups"]


@pytest.mark.parametrize("name", GROUPS)
def test_pi_is_that_of_each_group(name):
    """Scaling one group's gradients moves the damping of that group alone."""
    case = CASES[name]
    inputs, (grads,) = draw(case)
    scaled = [g.clone() for g in grads]
    half = scaled[0].shape[1] // 2
    scaled[0][:, half:] *= 7
    products = []
    for each in (grads, scaled):
        block = register(case.make(), case)
        block.accumulate(block.moments(inputs, [each], 6), 0.9)
        refresh_inverses(block.factors)
        products.append(block.multiply_inverse(torch.ones_like(vector_for(block))))
    close(products[0][0], products[1][0])
    assert not torch.allclose(products[0][1], products[1][1])


@pytest.mark.parametrize("name", CASES)
def test_use_before_the_factors_are_made(name):
    block = CASES[name].make()
    for early in (block.register_inverse, block.state_dict):
        with pytest.raises(RuntimeError, match=r"layer.*instantiate_factors"):
            early()


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(3, elementwise_affine=False), nn.BatchNorm1d(3, affine=False)]
)
def test_a_layer_without_a_trained_weight(module):
    with pytest.raises(
        ValueError, match=r"layer norm: expected a layer with a trained.*none"
    ):
        fb.ScaleAndShiftFullFB(module, "norm")


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (fb.FullyConnectedKFACBasicFB, nn.Linear(2, 3)),
        (fb.FullyConnectedDiagonalFB, nn.Linear(2, 3)),
        (fb.ConvDiagonalFB, nn.Conv2d(1, 1, 1)),
        (fb.EmbeddingKFACFB, nn.Embedding(2, 3)),
    ],
)
def test_a_frozen_weight(kind, module):
    module.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer x: .*a frozen one.*register_generic"):
        kind(module, "x")
