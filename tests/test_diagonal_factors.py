"""Diagonal, embedding and full factors: the lineage's numbers, products, errors."""

import pytest
import torch

from kfac_torch.fisher_factors import (
    ConvDiagonalFactor,
    DiagonalKroneckerFactor,
    EmbeddingInputKroneckerFactor,
    FactorOptions,
    FullFactor,
    FullyConnectedDiagonalFactor,
    NaiveDiagonalFactor,
    NaiveFullFactor,
    ScaleAndShiftDiagonalFactor,
    refresh_inverses,
)

pytestmark = pytest.mark.usefixtures("float64")
IDENTITY = FactorOptions(initial="identity")


def update(factor, decay=0.0):
    factor.instantiate_cov_variables()
    return factor.make_covariance_update_op(decay)()


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


def naive(diagonal):
    factor = NaiveDiagonalFactor([[torch.zeros(len(diagonal))]], 1, name="layer")
    factor.instantiate_cov_variables()
    factor.accumulate(torch.as_tensor(diagonal).unsqueeze(1), 0.0)
    return factor


def side(diagonal):
    factor = DiagonalKroneckerFactor([[torch.zeros(1, len(diagonal))]], name="side")
    factor.instantiate_cov_variables()
    factor.accumulate(torch.as_tensor(diagonal), 0.0)
    return factor


# The lineage's numbers.


def test_full_and_naive_diagonal_from_the_identity():
    g = torch.tensor([1.0, 2.0])
    close(update(FullFactor([[g]], 2, options=IDENTITY), 0.5), [[0.75, 0.5], [0.5, 1.5]])
    close(update(NaiveDiagonalFactor([g], 2, options=IDENTITY), 0.5), [[0.75], [1.5]])
    assert NaiveFullFactor is FullFactor


def test_embedding():
    ids = torch.tensor([[0], [1], [4]])
    expected = torch.tensor([1.0, 1, 0, 0, 1]) / 3
    close(update(EmbeddingInputKroneckerFactor([ids], 5)), expected)
    close(update(EmbeddingInputKroneckerFactor([ids.numpy()], 5)), expected)
    close(update(DiagonalKroneckerFactor([[ids]], size=5)), expected)


def test_embedding_counts_repeated_ids_of_an_example():
    ids = torch.tensor([[1, 1], [1, 3]])
    factor = EmbeddingInputKroneckerFactor([ids], 4, torch.float32)
    cov = update(factor)
    assert cov.dtype == torch.float32
    close(cov, torch.tensor([0.0, 1.5, 0.0, 0.5], dtype=torch.float32))
    assert factor.num_rows(ids) == 2


def test_one_location_of_a_convolution():
    """Squared outer product of the flattened input (row, column, channel) and grads."""
    x, g = torch.randn(1, 2, 3, 2), torch.randn(1, 1, 1, 4)
    cov = update(ConvDiagonalFactor([x], [[g]], [2, 3, 2, 4], [1, 1, 1, 1], "VALID"))
    close(cov, torch.outer(x.flatten(), g.flatten()) ** 2)


def test_conv_end_to_end_oracle():
    x = torch.arange(1.0, 10.0).view(1, 3, 3, 1)
    g = torch.tensor([1, -1, 2, 0.5]).view(1, 2, 2, 1)
    cov = update(ConvDiagonalFactor([x], [[g]], [2, 2, 1, 1], None, "VALID", has_bias=True))
    close(cov.flatten(), [90.25, 144.0, 289.0, 380.25, 6.25])


def test_naive_diagonal_inverse():
    """Stored 2, 3, 4 with λ = 0.5 on (4, 5, 6); and the identity on 2 gives 4/3."""
    x = torch.tensor([[4.0], [5.0], [6.0]])
    product = naive([2.0, 3.0, 4.0]).left_multiply_matpower(x, -1, 0.5)
    close(product.flatten(), [1.6, 1.4285714286, 1.3333333333])
    ones = naive([1.0, 1.0]).left_multiply_matpower(torch.full((2, 1), 2.0), -1, 0.5)
    close(ones, torch.full((2, 1), 4 / 3))


def test_full_inverse():
    factor = FullFactor([[torch.zeros(3)]], 1)
    factor.instantiate_cov_variables()
    factor.accumulate(torch.ones(3, 3) + torch.diag(torch.tensor([1.0, 2.0, 3.0])), 0.0)
    factor.register_inverse(0.5)
    factor.instantiate_inv_variables()
    refresh_inverses([factor])
    x = torch.tensor([[4.0], [5.0], [6.0]])
    product = factor.left_multiply_matpower(x, -1, 0.5)
    close(product.flatten(), [0.8582995951, 0.9149797571, 0.9392712551])


# Products.


def test_the_dense_matrix_and_the_stored_array():
    factor = naive([2.0, 3.0])
    close(factor.get_cov(), [[2.0, 0.0], [0.0, 3.0]])
    close(factor.get_cov_var(), [[2.0], [3.0]])
    assert factor.cov_dim == 2
    assert factor.cov_trace().item() == 5.0


@pytest.mark.parametrize("exp", [-1, -0.5, 0.5, 1, 2])
def test_powers_are_elementwise_and_fresh(exp):
    factor = naive([2.0, 3.0])
    x = torch.tensor([[4.0], [5.0]])
    factor.register_matpower(exp, 0.5)
    factor.instantiate_inv_variables()
    assert factor.make_inverse_update_ops() == []
    assert factor.is_refreshed
    close(
        factor.left_multiply_matpower(x, exp, 0.5), torch.tensor([[2.5], [3.5]]) ** exp * x
    )
    factor.accumulate(torch.tensor([[4.0], [6.0]]), 0.0)
    close(
        factor.left_multiply_matpower(x, exp, 0.5), torch.tensor([[4.5], [6.5]]) ** exp * x
    )


def test_cholesky_of_a_diagonal_is_its_root():
    factor, x = naive([2.0, 3.0]), torch.tensor([[4.0], [5.0]])
    root = torch.tensor([[2.5], [3.5]]).sqrt()
    for transpose in (False, True):
        close(factor.left_multiply_cholesky(x, 0.5, transpose), root * x)
        close(factor.left_multiply_cholesky_inverse(x, 0.5, transpose), x / root)
    scale, y = side([2.0, 3.0]), torch.randn(4, 2)
    close(scale.right_multiply_cholesky(y, 0.5), y * root.T)
    close(scale.right_multiply_cholesky_inverse(y, 0.5), y / root.T)


def test_sparse_rows_of_an_elementwise_factor():
    factor = FullyConnectedDiagonalFactor([torch.randn(5, 4)], [[torch.randn(5, 3)]])
    cov = update(factor)
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[3, 0]]), torch.randn(2, 3), (4, 3), check_invariants=True
    )
    product = factor.left_multiply_matpower(sparse, -1, 0.1)
    assert product.layout == torch.sparse_coo
    assert product.indices().tolist() == [[0, 3]]
    close(product.to_dense(), sparse.to_dense() / (cov + 0.1))


@pytest.mark.parametrize("exp", [-1, -0.5, 1])
def test_a_side_scales_rows_or_columns(exp):
    factor, x = side([1.0, 2.0, 3.0]), torch.randn(3, 4)
    power = torch.diag((torch.tensor([1.0, 2.0, 3.0]) + 0.1) ** exp)
    close(factor.left_multiply_matpower(x, exp, 0.1), power @ x)
    close(factor.right_multiply_matpower(x.T, exp, 0.1), x.T @ power)
    rows = torch.sparse_coo_tensor(
        torch.tensor([[2, 0]]), torch.randn(2, 4), (3, 4), check_invariants=True
    )
    product = factor.left_multiply_matpower(rows, exp, 0.1)
    assert product.layout == torch.sparse_coo
    close(product.to_dense(), power @ rows.to_dense())
    wide = torch.sparse_coo_tensor(
        torch.tensor([[4, 1]]), torch.randn(2, 3), (6, 3), check_invariants=True
    )
    product = factor.right_multiply_matpower(wide, exp, 0.1)
    assert product.layout == torch.sparse_coo
    close(product.to_dense(), wide.to_dense() @ power)


def test_refreshing_passes_over_diagonal_factors():
    refresh_inverses([naive([1.0]), side([1.0])])


# Where data are callables.


def test_providers():
    x, g = torch.randn(4, 3), torch.randn(4, 2)
    factor = FullyConnectedDiagonalFactor(
        [lambda: x], [[lambda: g]], sizes=(3, 2), name="layer", dtype=torch.float64
    )
    close(update(factor), (x**2).T @ (g**2) / 4)
    factor = FullFactor([[lambda: g]], 4, shapes=[(4, 2)], name="layer")
    close(update(factor), torch.outer(g.flatten(), g.flatten()) / 4)
    factor = ScaleAndShiftDiagonalFactor(
        [lambda: x], [[lambda: x]], [0], shape=(3,), name="layer"
    )
    close(update(factor)[:3, 0], (x**4).mean(0))
    ids = torch.tensor([1, 1])
    close(update(EmbeddingInputKroneckerFactor([lambda: ids], 2)), [0.0, 1.0])


def test_the_op_takes_new_data():
    x, g = torch.randn(4, 3), torch.randn(4, 2)
    factor = FullyConnectedDiagonalFactor([x], [[g]])
    factor.instantiate_cov_variables()
    op = factor.make_covariance_update_op(0.0)
    close(op([[(2 * x, g)]]), 4 * (x**2).T @ (g**2) / 4)
    full = FullFactor([[x, g]], 4)
    full.instantiate_cov_variables()
    flat = torch.cat([g.new_ones(12), g.flatten()])
    close(
        full.make_covariance_update_op(0.0)([[torch.ones(4, 3), g]]), flat.outer(flat) / 4
    )
    ids = EmbeddingInputKroneckerFactor([torch.tensor([0])], 2)
    ids.instantiate_cov_variables()
    close(ids.make_covariance_update_op(0.0)([torch.tensor([1])]), [0.0, 1.0])


def test_ids_outside_make_the_batch_nan_where_looking_would_cost():
    from kfac_torch.fisher_factors.diagonal_kronecker import count_ids

    for outside in (5, -1):
        assert count_ids(torch.tensor([0, outside]), 5, torch.float32).isnan().all()


# Errors.

X, G = torch.zeros(2, 3), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: naive([1.0]).right_multiply_matpower(torch.zeros(1, 1), -1, 0.1),
            NotImplementedError,
            "layer: .*use left_multiply_matpower",
        ),
        (
            lambda: naive([1.0, 2.0]).left_multiply_matpower(torch.zeros(2), 1, 0.1),
            ValueError,
            r"layer: left_multiply_matpower: expected x of shape \(2, 1\), got \(2,\)",
        ),
        (
            lambda: naive([0.0]).left_multiply_matpower(torch.zeros(1, 1), -1, 0.0),
            torch.linalg.LinAlgError,
            "layer: cannot raise.*to -1.*larger damping",
        ),
        (
            lambda: naive([1.0]).register_inverse(-0.1),
            ValueError,
            "expected a finite number >= 0",
        ),
        (
            lambda: side([1.0, 2.0]).left_multiply_matpower(torch.zeros(3, 1), 1, 0.1),
            ValueError,
            r"side: left_multiply_matpower: expected x of shape \[2, k\], got \(3, 1\)",
        ),
        (
            lambda: side([1.0, 2.0]).right_multiply_matpower(torch.zeros(2, 1), 1, 0.1),
            ValueError,
            r"side: right_multiply_matpower: expected x of shape \[k, 2\]",
        ),
        (
            lambda: side([1.0]).left_multiply_matpower(torch.eye(1).to_sparse(), 1, 0.1),
            ValueError,
            "expected a dense x or one with sparse rows",
        ),
        (
            lambda: EmbeddingInputKroneckerFactor([torch.zeros(2)], 3, name="emb"),
            TypeError,
            r"emb, tower 0: expected integers, got torch\.float",
        ),
        (
            lambda: EmbeddingInputKroneckerFactor([torch.tensor([3])], 3, name="emb"),
            ValueError,
            r"emb: expected ids in \[0, 3\), got ids from 3 to 3",
        ),
        (
            lambda: DiagonalKroneckerFactor([[torch.tensor([3])]], name="side"),
            ValueError,
            "side: expected rows .* or size= for ids",
        ),
        (
            lambda: FullyConnectedDiagonalFactor([X], [[G, G]], name="fc"),
            ValueError,
            r"fc: expected output gradients of 1 tower\(s\) in each source.*got \[2\]",
        ),
        (
            lambda: FullyConnectedDiagonalFactor([X], [], name="fc"),
            ValueError,
            r"fc: expected output gradients of 1 tower",
        ),
        (
            lambda: FullyConnectedDiagonalFactor([lambda: X], [[G]], name="fc"),
            ValueError,
            r"fc: .*sizes=\(in, out\) where they are callables",
        ),
        (
            lambda: FullFactor([[X]], 0, name="full"),
            ValueError,
            "full: batch_size: expected at least 1, got 0",
        ),
        (
            lambda: FullFactor([[lambda: X]], 1, name="full"),
            ValueError,
            "full: params_grads: .*shapes= where they are callables",
        ),
        (
            lambda: ScaleAndShiftDiagonalFactor([X], [[X]], [1], name="norm"),
            ValueError,
            r"norm: broadcast_dims_scale: .*batch dimension 0 among them, got \(1,\)",
        ),
        (
            lambda: ScaleAndShiftDiagonalFactor([X], [[X]], [0], [0, 2], name="norm"),
            ValueError,
            r"norm: broadcast_dims_shift: .*2 dimensions.*got \(0, 2\)",
        ),
        (
            lambda: ScaleAndShiftDiagonalFactor([lambda: X], [[X]], [0], name="norm"),
            ValueError,
            "norm: .*shape= of one example",
        ),
        (
            lambda: ConvDiagonalFactor(
                [torch.zeros(1, 3, 4)],
                [[torch.zeros(1, 3, 3)]],
                [1, 2, 3],
                None,
                "SAME",
                groups=2,
                name="conv",
            ),
            ValueError,
            "conv: groups: expected a divisor of the 3 output channels",
        ),
        (
            lambda: ConvDiagonalFactor(
                [X], [[X]], [1, 3, 3], None, "SAME", patch_mask=X, name="conv"
            ),
            ValueError,
            r"conv: patch_mask: expected shape \(1, 3\).*got \(2, 3\)",
        ),
        (
            lambda: naive([1.0]).summed_cov(torch.zeros(0, 1)),
            ValueError,
            "layer: summed_cov: expected data, got none",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
