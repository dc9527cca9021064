"""The command, end to end, on a budget of a few steps."""

import subprocess
import sys

import pytest
from test_report import check_page

from kfac_torch.cli import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_demo_in_a_pipe(tmp_path):
    report = tmp_path / "report.html"
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        "from kfac_torch.cli import main; main()",
    ]
    arguments = ["demo", "--scale", "0.01", "--seed", "1", "--out", str(report)]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == f"report: {report}"
    for task in ("conv ", "autoencoder "):
        rows = [line.split() for line in lines if line.startswith(task)]
        assert [row[1] for row in rows] == ["K-FAC", "SGD", "AdamW"]
    assert "\x1b" not in done.stdout
    text = check_page(report.read_text(encoding="utf-8"), figures=4)
    assert "kfac-torch demo --data digits --seed 1" in text
    assert "evaluation is off it" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--data", "mnist"], "--data mnist needs --data-dir DIR"),
        (["demo", "--data", "mnist", "--data-dir", "no-such"], "train-images-idx3-ubyte"),
        (["demo", "--data", "other"], "invalid choice"),
        (["demo", "--scale", "0"], "expected a positive number"),
        (["demo", "--out", "."], "expected the name of a file"),
        ([], "COMMAND"),
    ],
)
def test_errors_name_what_to_change(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["sklearn.datasets", "matplotlib"])
def test_missing_package_says_what_to_install(package, monkeypatch, capsys):
    if package == "matplotlib":
        monkeypatch.setattr("kfac_torch.demo.find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        main(["demo"])
    assert "pip install 'kfac-torch[demo]'" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["demo", "--help"])
    assert raised.value.code == 0
    assert "--data-dir" in capsys.readouterr().out
