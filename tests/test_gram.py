"""Half of a symmetric product, mirrored."""

import pytest
import torch

from kfac_torch.gram import add_gram, add_transpose, bands, gram, mirror


@pytest.mark.parametrize("number", [7, 200])
@pytest.mark.parametrize("columns", [1, 5, 191, 192, 400, 513])
def test_gram_is_the_product(columns: int, number: int) -> None:
    rows = torch.randn(number, columns, dtype=torch.float64)
    ours = gram(rows)
    assert torch.equal(ours, ours.mT)
    torch.testing.assert_close(ours, rows.mT @ rows, rtol=0, atol=1e-13)


@pytest.mark.parametrize("columns", [3, 400])
@pytest.mark.parametrize("groups", [1, 2])
def test_added_products_mirrored(columns: int, groups: int) -> None:
    moment = torch.zeros(groups, columns, columns, dtype=torch.float64)
    pieces = torch.randn(3, groups, columns, 5, dtype=torch.float64)
    for piece in pieces:
        add_gram(moment, piece)
    mirror(moment)
    assert torch.equal(moment, moment.mT)
    expected = torch.einsum("pgir,pgjr->gij", pieces, pieces)
    torch.testing.assert_close(moment, expected, rtol=0, atol=1e-12)


def test_bands_cover_the_columns_once() -> None:
    for columns in (1, 95, 96, 97, 511, 512, 577, 1000):
        parts = bands(columns, torch.device("cpu"))
        covered = [i for part in parts for i in range(part.start, part.stop)]
        assert covered == list(range(columns))
    assert len(bands(4096, torch.device("meta"))) == 1


def test_add_transpose() -> None:
    matrix = torch.randn(2, 600, 600)
    expected = matrix + matrix.mT
    add_transpose(matrix)
    assert torch.equal(matrix, expected)
