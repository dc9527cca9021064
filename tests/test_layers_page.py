"""The page of layers says what is registered."""

import re
from pathlib import Path

import pytest
from torch import nn

from kfac_torch import LayerCollection
from kfac_torch.approximations import DEFAULT_APPROXIMATIONS
from kfac_torch.registration import KINDS, Found, kind_of

PAGE = Path(__file__).parent.parent / "docs" / "layers.md"


def rows():
    """Of the first table: layer types, the method, the default block."""
    table = PAGE.read_text().split("Beside the table:")[0]
    for line in table.splitlines():
        if line.startswith("| `"):
            layers, method, block, _ = (
                cell.strip() for cell in line.strip("|").split(" | ")
            )
            (register,) = re.findall(r"`register_(\w+)`", method)
            yield re.findall(r"`(\w+)`", layers), register, block


def test_every_kind_of_layer_is_on_the_page_with_its_method():
    found = {name: register for names, register, _ in rows() for name in names}
    assert found == {layer.__name__: register for layer, register in KINDS.items()}


def test_default_blocks():
    for names, register, block in rows():
        kind = Found(register, (getattr(nn, names[0]),)).kind
        assert block.startswith(f'`"{DEFAULT_APPROXIMATIONS[kind]}"`')


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(2, 3), lambda: nn.LSTMCell(2, 3), lambda: nn.LayerNorm(2)]
)
def test_methods_are_there(make):
    model = nn.Sequential(make())
    layers = LayerCollection(model)
    getattr(layers, f"register_{kind_of(model[0])}")(model[0])
    assert layers.blocks


def test_every_method_that_is_named_exists():
    for name in re.findall(r"`(register_\w+)`", PAGE.read_text()):
        assert hasattr(LayerCollection, name), name
