"""Our side of the comparison with kfac-jax: what is sent, and what becomes of answers."""

import itertools
import sys

import kfac_jax_tasks
import numpy as np
import pytest
import torch
from kfac_jax_tasks import OURS, UNTUNED, PeerRun, better, race, row, start_of, table
from tasks import load_task

STUB = """
import io, json, sys
import numpy as np
while head := sys.stdin.buffer.read(8):
    size = int.from_bytes(head, "little")
    frame = np.load(io.BytesIO(sys.stdin.buffer.read(size)))
    sums = {n: float(frame[n].sum()) for n in frame.files if frame[n].dtype.kind in "fi"}
    print(json.dumps({"do": str(frame["do"]), "sums": sums}), flush=True)
"""


class FakePeer:
    """Losses and seconds as given; keeps what it was sent."""

    def __init__(self, losses):
        self.losses, self.frames = iter(losses), []

    def ask(self, do, **entries):
        self.frames.append((do, entries))
        if do == "step":
            return {"cpu": 0.5, "compiled": 0.0, "loss": next(self.losses), "damping": 2.0}
        return None


@pytest.fixture
def task():
    return load_task("T1")


def test_a_start_has_torchs_own_weights_and_first_batches(task):
    start = start_of(task, 3)
    for name, p in task.make_model(3).named_parameters():
        assert torch.equal(torch.from_numpy(start.pop(f"p:{name}")), p)
    for i, (x, y) in enumerate(itertools.islice(task.batches(3), kfac_jax_tasks.BURN_IN)):
        assert torch.equal(torch.from_numpy(start.pop(f"x{i}")), x)
        assert torch.equal(torch.from_numpy(start.pop(f"y{i}")), y)
    assert not start


def test_a_run_of_the_peer_begins_and_sees_batches_as_ours(task):
    peer = FakePeer([40.0, 20.0, 15.0, 14.0])
    run = PeerRun(task, peer, 0.1, 3)
    race([run], 10)
    [(begin, given), *steps] = peer.frames
    assert (begin, given["damping"], given["seed"]) == ("begin", 0.1, 3)
    assert given.keys() == start_of(task, 3).keys() | {"damping", "seed"}
    assert len(steps) == 3  # 15.0 is under the target, 15.1
    for (do, sent), (x, y) in zip(steps, task.batches(3), strict=False):
        assert do == "step"
        assert np.array_equal(sent["x"], x.numpy())
        assert np.array_equal(sent["y"], y.numpy())
    found = row(run, 3)
    assert (found["steps_to_target"], found["cpu_to_target"], found["steps"]) == (3, 1.5, 3)
    assert found["curve"] == [[1, 0.5, 40.0], [2, 1.0, 20.0], [3, 1.5, 15.0]]
    assert (found["end_damping"], found["compiled"]) == (2.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), 401.0])
def test_a_run_that_diverges_ends(bad, task):
    run = PeerRun(task, FakePeer([40.0, bad, 3.0]), 0.1, 0)
    race([run], 10)
    found = row(run, 0)
    assert (found["steps"], found["steps_to_target"], run.alive) == (2, None, False)


def test_ours_and_the_peer_take_turns_on_the_same_curve_format(task):
    peer = FakePeer(itertools.repeat(40.0))
    runs = [PeerRun(task, peer, 1.0, 0), kfac_jax_tasks.ours(task, 0)]
    race(runs, 2)
    curves = [row(run, 0)["curve"] for run in runs]
    assert [entry[0] for entry in curves[0]] == [1, 2]
    assert [entry[0] for entry in curves[1]] == [0, 1, 2]
    assert all(len(entry) == 3 for curve in curves for entry in curve)


def test_the_better_trial_has_fewer_steps_or_the_lower_loss():
    trials = [
        {"steps_to_target": steps, "loss": loss}
        for steps, loss in ((None, None), (None, 3.0), (None, 2.0), (9, 2.5), (8, 2.6))
    ]
    assert sorted(trials, key=better) == trials[::-1]


def test_the_table_leaves_the_first_step_out_of_the_time_of_a_step():
    run = {"steps_to_target": 3, "cpu_to_target": 7.0, "steps": 3, "cpu": 7.0, "loss": 15.0}
    run["curve"] = [[1, 5.0, 40.0], [2, 6.0, 20.0], [3, 7.0, 15.0]]
    entry = {"target": 15.1, "dampings": {UNTUNED: 1.0}}
    entry["methods"] = {OURS: [run], UNTUNED: [run, run | {"steps_to_target": None}]}
    lines = table({"T": entry}).splitlines()[2:]
    assert lines[0] == "| T, 15.1 | K-FAC |  | 3 | 7.0 | 1000 | 15.0 |"
    assert lines[1] == "|  | kfac-jax, untuned | 1 | - [3--] | 7.0 | 1000 | 15.0 |"


def test_frames_cross_the_pipe(task, tmp_path, monkeypatch):
    stub = tmp_path / "stub.py"
    stub.write_text(STUB, encoding="utf-8")
    monkeypatch.setattr(kfac_jax_tasks, "PEER", stub)
    peer = kfac_jax_tasks.Peer(task, sys.executable, {})
    x = task.train_cases[0].numpy()
    assert peer.about["do"] == "start"
    assert peer.about["sums"]["x"] == float(x.sum())
    assert peer.ask("step", x=np.ones(3)) == {"do": "step", "sums": {"x": 3.0}}
    peer.close()
    assert peer.process.returncode == 0
