"""The pictures of the benchmarks' page: drawn from what is stored, and not out of date."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pictures
import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pictures.draw(pictures.RESULTS, folder)
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def texts(picture):
    return {
        "".join(e.itertext())
        for e in ElementTree.fromstring(picture).iter()
        if "text" in e.tag
    }


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_the_stored_picture_is_of_the_stored_figures(name, drawn):
    stored = (pictures.OUT / name).read_text(encoding="utf-8")
    table = pictures.RESULTS / f"{pictures.PICTURES[name][0]}.json"
    origin = f"<!-- from {table.name} {pictures.digest(table)} -->"
    assert origin in stored, f"{name} is out of date: run python benchmarks/pictures.py"
    assert origin in drawn[name]
    assert texts(stored) == texts(drawn[name])
    assert len(stored) < 150_000
    assert f"](pictures/{name})" in PAGE


def test_nothing_else_is_in_the_folder(drawn):
    assert (
        {path.name for path in pictures.OUT.iterdir()}
        == set(drawn)
        == set(pictures.PICTURES)
    )


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_all_that_is_dark_on_light_is_turned_in_the_dark(name, drawn):
    picture = drawn[name]
    colors = set(re.findall(r"(?:fill|stroke): (#\w{6})", picture))
    series = {style["color"] for style in pictures.STYLES.values()} | {
        *pictures.PEERS.values()
    }
    assert colors - series == set(pictures.DARK)
    for light, dark in pictures.DARK.items():
        assert f'[style*="fill: {light}"]{{fill:{dark}!important}}' in picture
    # Black is what a text or a path without a colour of its own would be.
    for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text"):
        assert f"fill: {pictures.INK}" in text.get("style")


def test_the_numbers_that_are_written(drawn):
    assert {"49", "1032", "1.1", "refuses"} <= texts(drawn["patch_moments.svg"])
    assert {"T2: MNIST autoencoder", "target 143.2"} <= texts(drawn["loss_by_steps.svg"])
