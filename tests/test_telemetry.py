"""Records of steps, what writes them, and the page of a run."""

import csv
import dataclasses
import json
import math
import sys

import pytest
import torch
from test_report import check_page
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC, telemetry
from kfac_torch.cli import main
from kfac_torch.steps import PHASES, Clock, StepRecord
from kfac_torch.telemetry import (
    CSVWriter,
    JSONLWriter,
    TensorBoardWriter,
    numbers,
    read_run,
)
from kfac_torch.view import summary


def net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5)
    )


def batches(steps, n=32):
    return [(torch.randn(n, 1, 4, 4), torch.randint(5, (n,))) for _ in range(steps)]


def train(model, optimizer, data):
    """Return every batch's loss before and after its step, and the length of the step."""
    seen = []
    for x, y in data:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.step()
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        with torch.no_grad():
            new = functional.cross_entropy(model(x), y)
        seen.append((loss.item(), new.item(), (after - before).norm().item()))
    return seen


# Records.


def test_a_step_that_is_taken_back_is_one_on_the_page():
    records = [numbers(StepRecord(n, 0.1, 0.9, 0.1, rejected=n > 0)) for n in range(3)]
    assert [record["rejected"] for record in records] == [0, 1, 1]
    assert ("steps taken back", "2") in summary(records)
    assert "steps taken back" not in dict(summary(records[:1]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.1, "damping": 0.05},
        {"lr": 0.1, "momentum_type": "adam", "damping": 0.05},
    ],
    ids=["automatic", "regular", "adam"],
)
def test_fields_are_those_of_the_step(options):
    model, records, dampings = net(), [], []
    optimizer = KFAC(model, "categorical", invert_every=4, cov_update_every=2, **options)
    optimizer.attach(records.append)
    optimizer.attach(lambda _: dampings.append(optimizer.param_groups[0]["damping"]))
    seen = train(model, optimizer, batches(11))
    assert len(records) == 11
    for i, (record, (loss, new, length)) in enumerate(zip(records, seen, strict=True)):
        assert record.step == i
        assert float(record.loss) == pytest.approx(loss, rel=1e-9)
        assert float(record.step_norm) == pytest.approx(length, rel=1e-9)
        assert 0 < float(record.norm_scale or record.region_scale) <= 1
        assert (record.norm_scale is None) == (not options)
        assert (record.region_scale is None) == bool(options)
        adapts = not options and i % 6 == 5
        assert (record.rho is not None) == adapts
        if adapts:
            assert record.actual_change.item() == pytest.approx(new - loss, rel=1e-7)
            ratio = record.actual_change / record.predicted_change
            assert record.rho == pytest.approx(ratio.item(), rel=1e-7)
        # λ of the step: what the one before it left, here where the unit is known.
        if i:
            assert record.damping == dampings[i - 1]
    # Statistics at 0, 2, 4, ...; the first three steps refresh the inverses, then 4, 8,
    # and a λ that has been adapted.
    assert [record.statistics_age for record in records[:6]] == [0, 1, 0, 1, 0, 1]
    assert [record.inverse_age for record in records[:5]] == [0, 0, 0, 1, 0]
    assert [record.inverse_age for record in records[5:7]] == (
        [1, 0] if not options else [1, 2]
    )


@pytest.mark.usefixtures("float64")
def test_pi_is_that_of_the_factors():
    model, records = net(), []
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.05)
    optimizer.attach(records.append, every=2)
    train(model, optimizer, batches(3))
    assert [record.step for record in records] == [0, 2]
    assert set(records[1].pi) == {"0", "3"}
    for name, pi in records[1].pi.items():
        A, G = (f.get_cov() for f in optimizer.estimator.blocks[name].factors)
        traces = A.trace() / len(A), G.trace() / len(G)
        torch.testing.assert_close(pi, (traces[0] / traces[1]).sqrt())


@pytest.mark.usefixtures("float64")
def test_the_norm_scale_is_kappa():
    model, records = nn.Linear(4, 3), []
    optimizer = KFAC(
        model, "categorical", lr=0.5, momentum=0.0, damping=0.05, norm_constraint=1e-4
    )
    optimizer.attach(records.append)
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    before = model.weight.detach().clone()
    functional.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    pairs = zip(grads, model.parameters(), strict=True)
    p = [v for v, _ in optimizer.estimator.multiply_inverse(pairs)]
    norm = 0.25 * sum((a * b).sum() for a, b in zip(p, grads, strict=True))
    torch.testing.assert_close(records[0].norm_scale, (1e-4 / norm).sqrt())
    torch.testing.assert_close(
        model.weight.detach(), before - 0.5 * records[0].norm_scale * p[0]
    )


def test_a_writer_changes_no_step():
    """And tensors of a record stay where they are until they are written."""
    data = batches(6)
    models = [net()]
    models.append(net())
    models[1].load_state_dict(models[0].state_dict())
    records = []
    for i, model in enumerate(models):
        optimizer = KFAC(model, "categorical", lr=0.1, damping=0.05)
        if i:
            optimizer.attach(records.append)
        train(model, optimizer, data)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)
    assert all(isinstance(r.step_norm, torch.Tensor) for r in records)


def test_a_scaled_loss_is_recorded_as_the_loss():
    model, records = net(), []
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.05)
    optimizer.attach(records.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    x, y = batches(1)[0]
    loss = functional.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert records[0].loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_a_batch_that_is_left_out_has_no_record_and_is_counted():
    model, records = net(), []
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.05)
    optimizer.attach(records.append)
    data = batches(3)
    data[1][0][0] = float("nan")
    with pytest.warns(RuntimeWarning, match="left out"):
        train(model, optimizer, data)
    assert [(r.step, r.skipped_steps) for r in records] == [(0, 0), (2, 1)]


def test_phases_within_each_other_count_once(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("kfac_torch.steps.time.perf_counter", lambda: next(times))
    clock = Clock()
    with clock.phase("step"):
        with clock.phase("inverses"):
            pass
    with clock.phase("statistics"):
        pass
    expected = {"statistics": 5.0, "inverses": 2.0, "closure": 0.0, "step": 4.0}
    assert clock.take() == expected
    assert clock.take() == dict.fromkeys(PHASES, 0.0)


def test_every_phase_is_on_the_clock():
    model = net()
    optimizer = KFAC(model, "categorical", lr=0.1, damping=0.05)
    x, y = batches(1)[0]

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert list(optimizer.last_step.seconds) == list(PHASES)
    assert all(seconds > 0 for seconds in optimizer.last_step.seconds.values())


def test_a_writer_is_attached_for_every_so_many_steps():
    with pytest.raises(ValueError, match=r"KFAC.attach\(\): every"):
        KFAC(net(), "categorical").attach(print, every=0)


# Writers.


def a_record(step=0, **changes):
    values = {
        "lr": torch.tensor(0.25, dtype=torch.float64),
        "momentum": torch.tensor(0.5),
        "damping": 0.1,
        "loss": torch.tensor(2.0),
        "new_loss": torch.tensor(1.5),
        "rho": math.inf,
        "step_norm": torch.tensor(math.nan),
        "inverse_age": 3,
        "seconds": {"step": 0.125},
        "pi": {"a.b": torch.tensor(4.0), "c": None},
    }
    return StepRecord(step, **{**values, **changes})


EXPECTED = {
    "step": 0,
    "lr": 0.25,
    "momentum": 0.5,
    "damping": 0.1,
    "loss": 2.0,
    "new_loss": 1.5,
    "actual_change": -0.5,
    "rho": math.inf,
    "step_norm": math.nan,
    "inverse_age": 3,
    "skipped_steps": 0,
    "rejected": 0,
    "seconds.step": 0.125,
    "pi.a.b": 4.0,
}


def assert_expected(found):
    known = {key: value for key, value in found.items() if value is not None}
    assert known == pytest.approx(EXPECTED, nan_ok=True)


def test_numbers_have_every_field():
    found = numbers(a_record())
    assert_expected(found)
    names = {key.split(".")[0] for key in found}
    fields = {field.name for field in dataclasses.fields(StepRecord)}
    assert names == fields | {"actual_change"}
    assert isinstance(found["inverse_age"], int)


def test_json_lines_round_trip(tmp_path):
    path = tmp_path / "folder" / "run.jsonl"
    write = JSONLWriter(path)
    write(a_record())
    write(a_record(step=1))
    assert_expected(read_run(path)[0])
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is not JSON
    JSONLWriter(path, append=True)(a_record(step=2))
    assert [record["step"] for record in read_run(path)] == [0, 1, 2]
    JSONLWriter(path)(a_record(step=7))
    assert [record["step"] for record in read_run(path)] == [7]


def test_csv_round_trip(tmp_path):
    path = tmp_path / "run.csv"
    CSVWriter(path)(a_record())
    CSVWriter(path, append=True)(a_record(step=1))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1"]
    assert_expected({key: float(text) for key, text in rows[0].items() if text})


def test_a_table_has_the_columns_of_its_first_line(tmp_path):
    path = tmp_path / "run.csv"
    write = CSVWriter(path)
    write(a_record())
    with pytest.raises(ValueError, match=r"got others: pi\.a\.b, pi\.c, pi\.d"):
        write(a_record(step=1, pi={"d": None}))
    with path.open(newline="") as file:
        assert len(list(csv.reader(file))) == 2


def test_scalars_for_tensorboard():
    class Summary:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, name, value, step):
            self.scalars[name] = (value, step)

    summary = Summary()
    TensorBoardWriter(writer=summary)(a_record(step=7))
    assert summary.scalars["kfac/loss"] == (2.0, 7)
    assert summary.scalars["pi/a.b"] == (4.0, 7)
    assert summary.scalars["seconds/step"] == (0.125, 7)
    assert "pi/c" not in summary.scalars
    assert len(summary.scalars) == len(EXPECTED) - 1


def test_tensorboard_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"kfac-torch\[tensorboard\]"):
        TensorBoardWriter("runs")


@pytest.mark.parametrize("text", ["", "{}\n", "loss,1\n", '{"step": 1}\n[3]\n'])
def test_other_files_are_no_runs(text, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"expected (a record|records) of a JSONLWriter"):
        telemetry.read_run(path)


# The page.


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "damping": 0.05}])
def test_a_page_of_a_run(options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run, page = tmp_path / "a<b.jsonl", tmp_path / "out" / "page.html"
    model = net()
    optimizer = KFAC(model, "categorical", **options)
    optimizer.attach(JSONLWriter(run))
    train(model, optimizer, batches(6))
    main(["view", str(run), "-o", str(page)])
    assert capsys.readouterr().out == f"report: {page}\n"
    text = check_page(page.read_text(encoding="utf-8"), figures=5)
    assert "a<b.jsonl" in text
    assert "6, steps 0 to 5" in text
    records = read_run(run)
    assert f"{records[0]['loss']:.5g}, {records[-1]['loss']:.5g}" in text
    seconds = sum(r[f"seconds.{phase}"] for r in records for phase in PHASES)
    assert f"{seconds:.4g} s: statistics" in text


@pytest.mark.parametrize("missing", ["run", "matplotlib"])
def test_what_is_missing_is_told(missing, tmp_path, monkeypatch, capsys):
    if missing == "matplotlib":
        monkeypatch.setattr("kfac_torch.view.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["view", str(tmp_path / "no-such.jsonl")])
    expected = {
        "run": "the run cannot be read",
        "matplotlib": "pip install 'kfac-torch[demo]'",
    }
    assert expected[missing] in capsys.readouterr().err
