"""Blocks of embeddings: sparse gradients, padding."""

import pytest
import torch
from torch import nn

from kfac_torch.fisher_blocks import EmbeddingKFACFB, EmbeddingKFACMultiIndepFB
from kfac_torch.fisher_factors import refresh_inverses

pytestmark = pytest.mark.usefixtures("float64")
EXPS = (-1, -0.5, 2, 1)


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def gathered(embedding, ids, grads, num_terms, damping=0.3, **kwargs):
    block = EmbeddingKFACFB(embedding, "words", **kwargs)
    block.instantiate_factors(damping)
    for exp in EXPS:
        block.register_matpower(exp)
    block.accumulate(block.moments([ids], [[grads]], num_terms), 0.9)
    refresh_inverses(block.factors)
    return block


def sparse_rows(rows, size):
    values = torch.randn(len(rows), 2)
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), values, (size, 2), check_invariants=True
    )


def test_the_sparse_inverse_is_an_explicit_solve():
    """At rows 1, 3, 4, as in the lineage's test; here with damping, and T = 3/2."""
    ids, grads = torch.tensor([[0, 1], [4, 4], [3, 1]]), torch.randn(3, 2, 2)
    block = gathered(nn.Embedding(5, 2), ids, grads, 4)
    assert block.num_locations == 1.5
    counts = torch.tensor([1.0, 2, 0, 1, 2]) / 6
    G = grads.view(-1, 2).T @ grads.view(-1, 2) / 6
    pi = (counts.mean() / (G.trace() / 2)).sqrt()
    root = (0.3 / 1.5) ** 0.5
    dense = 1.5 * torch.kron((counts + pi * root).diag(), G + root / pi * torch.eye(2))
    V = sparse_rows([1, 3, 4], 5)
    product = block.multiply_inverse(V)
    assert product.layout == torch.sparse_coo
    assert product.coalesce().indices().tolist() == [[1, 3, 4]]
    expected = torch.linalg.solve(dense, V.to_dense().flatten()).view(5, 2)
    close(product.to_dense(), expected)
    close(block.multiply_inverse(V.to_dense()), expected)


@pytest.mark.parametrize("exp", EXPS)
@pytest.mark.parametrize("diagonal", [False, True])
def test_sparse_and_dense_gradients_have_the_same_products(diagonal, exp):
    ids, grads = torch.randint(7, (5, 3)), torch.randn(5, 3, 2)
    block = gathered(nn.Embedding(7, 2), ids, grads, 5, diagonal_approx_for_output=diagonal)
    V = sparse_rows([5, 0, 5], 7)  # a row twice, as autograd leaves it
    product = block.multiply_matpower(V, exp)
    assert product.layout == torch.sparse_coo
    assert product.coalesce().indices().tolist() == [[0, 5]]
    close(product.to_dense(), block.multiply_matpower(V.to_dense(), exp))


def test_the_gradient_of_a_sparse_embedding_stays_sparse():
    embedding = nn.Embedding(6, 2, sparse=True)
    ids = torch.tensor([2, 4, 2])
    block = gathered(embedding, ids, torch.randn(3, 2), 3)
    embedding(ids).square().sum().backward()
    (product,) = block.multiply_tensors([embedding.weight.grad], -1)
    assert product.layout == torch.sparse_coo
    dense = embedding.weight.grad.to_dense()
    close(product.to_dense(), block.multiply_tensors([dense], -1)[0])


def test_wrong_gradients():
    block = gathered(nn.Embedding(5, 2), torch.tensor([1]), torch.randn(1, 2), 1)
    with pytest.raises(ValueError, match=r"words\.output: right_multiply.*\[k, 2\]"):
        block.multiply(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"words\.input: left_multiply.*\[5, k\]"):
        block.multiply(torch.zeros(4, 2).to_sparse(1))


def test_padding_is_as_if_it_were_not_there():
    """Its output gradient is there, but no gradient of its row."""
    ids, grads = torch.tensor([3, 0, 3, 1, 1, 4]), torch.randn(6, 2)
    block = gathered(nn.Embedding(5, 2, padding_idx=3), ids, grads, 6)
    kept = ids != 3
    without = gathered(nn.Embedding(5, 2), ids[kept], grads[kept], 6)
    close(block.full_fisher_block(), without.full_fisher_block())
    assert block.full_fisher_block()[6:8].count_nonzero() == 0


def test_nothing_but_padding():
    block = gathered(
        nn.Embedding(3, 2, padding_idx=1), torch.tensor([1, 1]), torch.randn(2, 2), 2
    )
    close(block.full_fisher_block(), torch.zeros(6, 6))
    close(block.multiply_inverse(torch.ones(3, 2)), torch.full((3, 2), 1 / 0.3))


def test_several_calls_are_rows_of_one():
    """Of different shape too: ids are counted alike."""
    embedding, grads = nn.Embedding(5, 2, padding_idx=0), torch.randn(8, 2)
    ids = torch.tensor([0, 2, 2, 4, 1, 0, 3, 2])
    block = EmbeddingKFACMultiIndepFB(embedding)
    block.instantiate_factors(0.1)
    whole = block.moments([ids], [[grads]], 4)
    parts = [ids[:2], ids[2:].view(2, 3)], [[grads[:2], grads[2:].view(2, 3, 2)]]
    for one, other in zip(whole, block.moments(*parts, 4), strict=True):
        assert one.rows == other.rows == 8
        close(one.cov, other.cov)


def test_ids_outside_the_vocabulary():
    block = EmbeddingKFACFB(nn.Embedding(5, 2), "words")
    block.instantiate_factors(0.1)
    with pytest.raises(ValueError, match=r"words\.input: expected ids in \[0, 5\)"):
        block.moments([torch.tensor([5])], [[torch.zeros(1, 2)]], 1)
