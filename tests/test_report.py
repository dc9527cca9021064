"""The page holds all it shows, and the table says what the runs did."""

import base64
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from kfac_torch.report import (
    COLUMNS,
    RunResult,
    TaskResult,
    format_table,
    table_rows,
    verdicts,
    write_report,
)

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """Collect what a page loads, and whether its tags match."""

    VOID = ("img", "meta", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.loads, self.images, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object")
        self.loads += [attrs[key] for key in ("src", "href", "srcset") if key in attrs]
        if tag == "img":
            self.images.append(attrs["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_page(text, figures):
    page = Page(text)
    assert page.open == []
    assert len(page.images) == figures
    assert all(load.startswith("data:") for load in page.loads)
    assert not re.search(r"https?://|@import|url\(", text)
    prefix = "data:image/svg+xml;base64,"
    for image in page.images:
        assert image.startswith(prefix)
        assert b"<svg" in base64.b64decode(image.removeprefix(prefix))
    return " ".join(page.text)


def a_task(**changes):
    runs = [
        RunResult(
            "K-FAC", {"lr": 0.1}, [0, 1, 2], [0.0, 0.1, 0.2], [4.0, 2.0, 1.0], 100, 0.9
        ),
        RunResult(
            "SGD", {"lr": 0.2}, [0, 1, 2, 8], [0, 0.2, 0.4, 1.6], [4, 3, 2, 0.5], 200, 0.8
        ),
        RunResult("AdamW", {"lr": 0.3}, [0, 1, 2], [0, 0.1, 0.2], [4.0, 3.0, 2.5], 50, 0.7),
    ]
    spectra = {
        "a<b": {"input": torch.tensor([0.0, 1.0]), "output": torch.tensor([1.0, 2.0])}
    }
    values = {
        "name": "conv",
        "title": "net & co",
        "details": "a <small> net",
        "target": 1.0,
        "test_metric": "accuracy",
        "runs": runs,
        "spectra": spectra,
    }
    return TaskResult(**(values | changes))


def test_table():
    rows = table_rows([a_task()])
    assert [row[2:4] for row in rows] == [
        ["2", "0.20"],
        ["8", "1.60"],
        ["-", "-"],
    ]
    assert rows[0][-1] == "accuracy 90.0%"
    lines = format_table([a_task()]).splitlines()
    assert len(lines) == 5
    assert all(name in lines[0] for name in COLUMNS)


def test_verdicts_are_computed_and_admit_defeat():
    first, second = verdicts([a_task()])
    assert "SGD took 4.0 times the steps and 8.0 times the seconds of K-FAC" in first
    assert "AdamW did not reach the target in 2 steps" in second
    assert verdicts([a_task(target=0.7)])[0].endswith("K-FAC did not reach the target")


def test_loss_metric_and_diverged_run():
    task = a_task(test_metric="loss")
    task.runs[1].losses[-1] = math.inf
    assert table_rows([task])[1][-2:] == ["inf", "loss 0.8"]


def test_page_is_self_contained(tmp_path):
    path = tmp_path / "deep" / "report.html"
    write_report(path, [a_task(), a_task()], command="run <this>", notes=["a & b"])
    text = check_page(path.read_text(encoding="utf-8"), figures=4)
    for part in ("net & co", "a <small> net", "run <this>", "a & b", torch.__version__):
        assert part.lower() in text.lower()
    assert "lr 0.2" in text


def test_page_of_a_run_that_diverged(tmp_path):
    task = a_task()
    task.runs[1].losses[-1] = math.nan
    write_report(tmp_path / "r.html", [task], command="c", notes=[])
    check_page((tmp_path / "r.html").read_text(encoding="utf-8"), figures=2)
