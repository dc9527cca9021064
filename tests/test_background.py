"""Refreshes in a thread: what is used at a step depends on the staleness, not on timing."""

import copy
import io
import threading

import pytest
import torch
from refresh_cases import batches, net, step
from torch.nn.functional import cross_entropy

from kfac_torch import KFAC, KFACPreconditioner, LevenbergMarquardt, Refresh
from kfac_torch.fisher_factors import refreshing
from kfac_torch.fisher_factors.background import BackgroundRefreshes
from kfac_torch.fisher_factors.eigen_scales import carrying
from kfac_torch.layer_choice import Layers
from kfac_torch.linalg import diagonal_in_basis
from kfac_torch.size_limit import SizeLimit

WIDTHS = (6, 9, 5, 8, 3)


def make(model, **options):
    options = {"lr": 0.05, "damping": 0.1, "cov_update_every": 1, **options}
    return KFAC(model, "categorical", **options)


def stored(factor):
    """What a refresh of a factor writes."""
    if hasattr(factor, "basis"):
        return [*factor.basis, *factor.diagonals]
    return [tensor for power in factor._powers.values() for tensor in power.tensors]


def stored_of(optimizer):
    blocks = optimizer.estimator.blocks.items()
    return {name: [t for f in block.factors for t in stored(f)] for name, block in blocks}


def copied(by_layer):
    return {name: [t.clone() for t in tensors] for name, tensors in by_layer.items()}


def equal(a, b):
    return all(map(torch.equal, a, b))


# What comes in, and when.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
@pytest.mark.parametrize(("every", "staleness"), [(4, 1), (4, 3), (4, 4), (1, 1)])
def test_inverses_are_those_of_the_factors_so_many_steps_ago(kind, every, staleness):
    model, data = net(WIDTHS), batches(14)
    options = {"lr": 0.05} if kind is KFAC else {}
    refresh = Refresh(every=every, background=staleness)
    optimizer = kind(
        model,
        "categorical",
        damping=0.1,
        invert_every=refresh,
        cov_update_every=1,
        **options,
    )
    damped = []
    for number, batch in enumerate(data):
        step(model, optimizer, batch)
        now = []
        for block in optimizer.estimator.blocks.values():
            pairs = zip(block.factors, block._damping_funcs(), strict=True)
            now += [f.get_cov() + d() * torch.eye(f.cov_dim) for f, d in pairs]
        damped.append(now)
        began = [s for s in range(3, number - staleness + 1) if s % every == 0]
        last = began[-1] if began else min(number, 2)
        found = [
            factor.get_inverse(damping)
            for block in optimizer.estimator.blocks.values()
            for factor, damping in zip(block.factors, block._damping_funcs(), strict=True)
        ]
        for C, inverse in zip(damped[last], found, strict=True):
            torch.testing.assert_close(inverse, torch.linalg.inv(C))
        if kind is KFAC:
            assert optimizer.last_step.inverse_age == number - last
    optimizer.close()


def moved(factors, old, new):
    """From the old basis of EKFAC to the new one, by the factors of now."""
    if len(factors) < 3:
        return []
    scales = factors[2]
    decomposed = scales.tolerance is None and not scales.warm_start
    return [
        carrying(
            new[i],
            new[2 + i],
            old[i],
            None if decomposed else diagonal_in_basis(factors[i].get_cov(), old[i]),
        )
        for i in (0, 1)
    ]


def by_hand(optimizer, staleness):
    """Refresh at once, and let it come in later: what a thread has to come to."""
    schedule, waiting = optimizer._schedule, []
    estimator, at_once = optimizer.estimator, optimizer._update_inverses

    def write(name, tensors, moves):
        factors = estimator.blocks[name].factors
        old = [t for f in factors for t in stored(f)]
        if moves:  # EKFAC's scales follow
            S = factors[2].get_cov_var()
            S.copy_(moves[0] @ S @ moves[1].mT)
        for tensor, new in zip(old, tensors, strict=True):
            tensor.copy_(new)

    def update():
        now = schedule.num_steps
        for item in [w for w in waiting if w[0] == now]:
            write(*item[1:])
            waiting.remove(item)
        if now < 3:
            at_once()
            return
        names = schedule._due()
        before = copied(stored_of(optimizer))
        scales = {
            n: [f.get_cov_var().clone() for f in b.factors]
            for n, b in estimator.blocks.items()
        }
        at_once()
        found = copied(stored_of(optimizer))
        for name, tensors in stored_of(optimizer).items():
            for tensor, old in zip(tensors, before[name], strict=True):
                tensor.copy_(old)
            for factor, old in zip(
                estimator.blocks[name].factors, scales[name], strict=True
            ):
                factor.get_cov_var().copy_(old)
        for name in names:
            moves = moved(estimator.blocks[name].factors, before[name], found[name])
            waiting.append((now + staleness, name, found[name], moves))

    optimizer._update_inverses = update


@pytest.mark.parametrize(
    ("refresh", "options"),
    [
        (Refresh(every=4, background=3), {}),
        (Refresh(every=3, background=3, staggered=True), {}),
        (Refresh(every=2, background=2), {"approx": "ekfac"}),
        (Refresh(every=2, background=1, basis_every=2), {"approx": {"2": "ekfac"}}),
        (
            Refresh(every=2, background=2),
            {"approx": Layers(size_limit=SizeLimit(6, "split"))},
        ),
        (
            Refresh(every=2, background=2),
            {"approx": Layers(size_limit=SizeLimit(6, "low_rank"))},
        ),
    ],
)
def test_as_a_refresh_at_once_that_comes_in_later_by_hand(refresh, options):
    model, data = net(WIDTHS), batches(16)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    plain = Refresh(**{**vars(refresh), "background": None})
    ours = make(model, invert_every=refresh, **options)
    theirs = make(twin, invert_every=plain, **options)
    by_hand(theirs, refresh.background)
    for batch in data:
        step(model, ours, batch)
        step(twin, theirs, batch)
        assert equal(model.parameters(), twin.parameters())
        for name, tensors in stored_of(ours).items():
            assert equal(tensors, stored_of(theirs)[name])
        for block, other in zip(
            ours.estimator.blocks.values(), theirs.estimator.blocks.values(), strict=True
        ):
            covs = [[f.get_cov_var() for f in b.factors] for b in (block, other)]
            assert equal(*covs)
    at_once = make(third, invert_every=plain, **options)
    for batch in data:
        step(third, at_once, batch)
    assert not equal(model.parameters(), third.parameters())
    ours.close()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("corrected", [False, True])
def test_scales_of_ekfac_that_were_none_when_it_began(corrected):
    """They become eigenvalues; or, where they were corrected since, are carried over."""
    model, [(x, y), *_] = net(WIDTHS), batches(1)
    optimizer = make(model, invert_every=100, approx="ekfac", lr=0.0)
    step(model, optimizer, (x, y))
    estimator = optimizer.estimator
    A, G, scales = estimator.blocks["2"].factors
    assert scales.num_corrections == 0
    for factor in (A, G):
        rows = torch.randn(20, factor.cov_dim)
        factor.accumulate(rows.mT @ rows / 20, 0.5)
    estimator.start_inverses(["2"], due=1)
    S = torch.outer(*(torch.linalg.eigvalsh(factor.get_cov()) for factor in (A, G)))
    if corrected:
        scales.accumulate(torch.rand_like(scales.get_cov_var()), 0.0)
        S = scales.get_cov_var().clone()
    old_A, old_G = (Q.clone() for Q in scales.basis)
    estimator.finish_inverses(1)
    Q_A, Q_G = scales.basis
    assert not torch.equal(Q_A, old_A)
    if corrected:
        for Q, old, side in ((Q_A, old_A, A), (Q_G, old_G, G)):
            R, C = (Q.mT @ old) ** 2, side.get_cov()
            evened = R @ (old.mT @ C @ old).diagonal()
            S = (((Q.mT @ C @ Q).diagonal() / evened).unsqueeze(1) * R @ S).mT
    torch.testing.assert_close(scales.get_cov_var(), S)
    optimizer.close()


def slowed(monkeypatch):
    """A thread that waits at every refresh until it is let go, and how."""
    gate, plain = threading.Event(), refreshing._of_one
    main = threading.main_thread()

    def slow(factor):
        if threading.current_thread() is not main:
            assert gate.wait(60)
        return plain(factor)

    monkeypatch.setattr(refreshing, "_of_one", slow)
    return gate


def test_a_slow_thread_and_a_fast_one_come_to_the_same(monkeypatch):
    model, data, ends = net(WIDTHS), batches(9), []
    for slow in (False, True):
        twin = copy.deepcopy(model)
        optimizer = make(twin, invert_every=Refresh(every=3, background=2))
        gate = slowed(monkeypatch) if slow else None
        for number, batch in enumerate(data):
            if gate:
                # Just before the wait, or not even begun in the step that begins it.
                (gate.set if number % 3 == 2 else gate.clear)()
            step(twin, optimizer, batch)
        optimizer.close()
        ends.append(list(twin.parameters()))
    assert equal(*ends)


def test_training_goes_on_while_the_thread_works(monkeypatch):
    """Of a thread that is stopped nothing is seen before its results are due."""
    model, data = net(WIDTHS), batches(6)
    optimizer = make(model, invert_every=Refresh(every=3, background=3))
    gate = slowed(monkeypatch)
    for batch in data[:4]:
        step(model, optimizer, batch)
    before = copied(stored_of(optimizer))
    assert optimizer.estimator.background.layers == set(optimizer.estimator.blocks)
    for batch in data[4:]:
        step(model, optimizer, batch)
        for name, tensors in stored_of(optimizer).items():
            assert equal(tensors, before[name])
    gate.set()
    step(model, optimizer, data[0])
    assert not any(
        torch.equal(new, before[name][0])
        for name, (new, *_) in stored_of(optimizer).items()
    )
    optimizer.close()


def test_what_is_due_again_waits_for_what_is_under_way():
    """A λ that adapts at each step refreshes whenever the last refresh has come in."""
    rule = LevenbergMarquardt(initial=1.0, decay=0.5, interval=1)
    model, (x, y) = net(WIDTHS), batches(1)[0]
    optimizer = make(model, damping=rule, invert_every=Refresh(every=5, background=3))
    changed, before, dampings = [], {}, []

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    for number in range(13):
        optimizer.step(closure)
        dampings.append(optimizer.last_step.damping)
        after = copied(stored_of(optimizer))
        if before and not any(equal(after[name], before[name]) for name in after):
            changed.append(number)
        before = after
    assert len(set(dampings)) > 6
    assert changed == [1, 2, 6, 9, 12]
    optimizer.close()


def test_a_step_that_is_left_out_puts_the_swap_off():
    model, data = net(WIDTHS), batches(8)
    optimizer = make(model, invert_every=Refresh(every=3, background=2))
    data[5] = (torch.full_like(data[5][0], torch.nan), data[5][1])
    ages = []
    with pytest.warns(RuntimeWarning, match="left out"):
        for batch in data:
            step(model, optimizer, batch)
            ages.append(optimizer.last_step.inverse_age)
    assert ages == [0, 0, 0, 1, 2, 2, 3, 4]  # at 5 there is no step, at 6 two refreshes
    optimizer.close()


def test_an_update_by_hand_takes_the_place_of_what_is_under_way():
    model, data = net(WIDTHS), batches(8)
    optimizer = make(model, invert_every=Refresh(every=4, background=4))
    for batch in data[:5]:
        step(model, optimizer, batch)
    estimator = optimizer.estimator
    assert estimator.background.layers == {"0", "2", "4", "6"}
    estimator.update_inverses(["2"])
    assert estimator.background.layers == {"0", "4", "6"}
    estimator.inv_update_thunks[0]()  # of a factor of "0"
    assert estimator.background.layers == {"4", "6"}
    before = copied(stored_of(optimizer))
    optimizer._schedule.at_once = True
    optimizer.estimator.finish_inverses(8)
    changed = [n for n, t in stored_of(optimizer).items() if not equal(t, before[n])]
    assert changed == ["4", "6"]
    optimizer.close()


def test_the_global_generator_and_the_grad_mode_do_not_matter():
    """The thread has a grad mode of its own; moments that need gradients do no harm."""
    model, data = net(WIDTHS), batches(6)
    optimizer = make(model, invert_every=Refresh(every=3, background=1))
    with torch.enable_grad():
        for batch in data:
            step(model, optimizer, batch)
    tensors = [t for tensors in stored_of(optimizer).values() for t in tensors]
    assert not any(t.requires_grad for t in tensors)
    optimizer.close()


# Failures.


def singular(monkeypatch, names, threads_only=True):
    """Let some factors fail, as where no rung of the ladder holds."""
    plain, main = refreshing._of_one, threading.main_thread()

    def failing(factor):
        in_thread = threading.current_thread() is not main
        if factor.name in names and (in_thread or not threads_only):
            raise torch.linalg.LinAlgError(f"matrix {factor.name} is singular")
        return plain(factor)

    monkeypatch.setattr(refreshing, "_of_one", failing)


@pytest.mark.parametrize("approx", ["kron", "ekfac"])
def test_a_failure_in_the_thread_keeps_the_last_good_inverse(monkeypatch, caplog, approx):
    model, data = net(WIDTHS), batches(8)
    optimizer = make(model, invert_every=Refresh(every=3, background=2), approx=approx)
    block = optimizer.estimator.blocks["2"]
    factor = block.factors[-1]
    for batch in data[:3]:
        step(model, optimizer, batch)
    before = copied(stored_of(optimizer))
    singular(monkeypatch, [factor.name])
    for number, batch in enumerate(data[3:6], start=3):
        assert not optimizer.health().factors
        step(model, optimizer, batch)
        assert factor.health.kept == (number == 5)
    counts = optimizer.health().factors
    assert {name: c.kept_in_a_row for name, c in counts.items()} == {factor.name: 1}
    assert f"the last good inverse of {factor.name} is kept, 1 in a row" in caplog.text
    assert equal(stored(factor), before["2"][-len(stored(factor)) :])
    others = [n for n, t in stored_of(optimizer).items() if not equal(t, before[n])]
    assert set(others) >= {"0", "4", "6"}
    optimizer.close()


def test_what_may_be_an_error_is_refreshed_at_once(monkeypatch):
    """After too many failures in the thread the next one is raised by the step."""
    model, data = net(WIDTHS), batches(20)
    optimizer = make(model, invert_every=Refresh(every=2, background=2))
    for batch in data[:3]:
        step(model, optimizer, batch)
    singular(monkeypatch, ["2.output"], threads_only=False)
    kept = []
    with pytest.raises(torch.linalg.LinAlgError, match=r"2\.output.*kept for 3 refreshes"):
        for batch in data[3:]:
            step(model, optimizer, batch)
            kept.append(optimizer.estimator.blocks["2"].factors[1].health.kept)
    assert kept == [0, 0, 0, 1, 1, 2, 2]
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(torch.linalg.LinAlgError):
        step(model, optimizer, data[0])
    assert equal(weights, model.parameters())
    monkeypatch.undo()
    step(model, optimizer, data[0])
    assert optimizer.estimator.blocks["2"].factors[1].health.kept_in_a_row == 0
    optimizer.close()


def test_a_nan_that_was_written_is_kept_out_of_the_inverse():
    model, data = net(WIDTHS), batches(6)
    optimizer = make(model, invert_every=Refresh(every=3, background=2))
    for batch in data[:3]:
        step(model, optimizer, batch)
    factor = optimizer.estimator.blocks["4"].factors[0]
    factor.get_cov_var()[0, 0] = torch.nan
    for batch in data[3:6]:
        step(model, optimizer, batch)
    assert factor.health.kept == 1
    assert all(t.isfinite().all() for t in stored(factor))
    optimizer.close()


def test_rescues_in_the_thread_are_counted_when_they_come_in():
    model, data = net(WIDTHS), batches(6, size=2)
    options = {"damping": 1e-16, "lr": 1e-8, "cov_ema_decay": 0.0}
    optimizer = make(model, invert_every=Refresh(every=3, background=2), **options)
    seen = []
    for batch in data:
        step(model, optimizer, batch)
        factors = optimizer.health().factors.values()
        seen.append(sum(c.float64 + c.jittered + c.clamped for c in factors))
    assert 0 < seen[0] < seen[1] < seen[2] == seen[3] == seen[4] < seen[5]
    optimizer.close()


class Stopped(Exception):
    """No fault of a matrix."""


def test_another_error_of_the_thread_is_raised_by_the_step(monkeypatch):
    model, data = net(WIDTHS), batches(6)
    optimizer = make(model, invert_every=Refresh(every=3, background=2))
    for batch in data[:3]:
        step(model, optimizer, batch)
    monkeypatch.setattr(refreshing, "_factorise", lambda *_: (_ for _ in ()).throw(Stopped))
    for batch in data[3:5]:
        step(model, optimizer, batch)
    before = copied(stored_of(optimizer))
    [pending] = optimizer.estimator.background._pending
    with pytest.raises(Stopped):
        pending.wait()  # the thread is through
    monkeypatch.undo()
    with pytest.raises(Stopped):
        step(model, optimizer, data[5])
    step(model, optimizer, data[5])
    assert all(equal(t, before[n]) for n, t in stored_of(optimizer).items())
    optimizer.close()


# Resumed.


CASES = [
    (Refresh(every=4, background=3), {}),
    (Refresh(every=3, background=2, staggered=True), {"approx": {"0": "ekfac"}}),
    (Refresh(every=2, background=2, basis_tolerance=0.2), {"approx": "ekfac"}),
    (
        Refresh(every=4, background=3),
        {"damping": LevenbergMarquardt(initial=0.3, decay=0.8, interval=2)},
    ),
    (
        Refresh(every=3, background=3),
        {"approx": Layers(size_limit=SizeLimit(6, "low_rank"))},
    ),
]


@pytest.mark.parametrize(("refresh", "options"), CASES)
def test_resumed_at_every_step_bit_for_bit(refresh, options):
    data, start = batches(20), net(WIDTHS)
    model = copy.deepcopy(start)
    optimizer = make(model, invert_every=refresh, **options)
    states, ends, under_way = [], [], 0
    for batch in data:
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        under_way += bool(optimizer.state_dict()["kfac"]["estimator"]["background"])
        states.append(file.getvalue())
        step(model, optimizer, batch)
        ends.append([p.clone() for p in model.parameters()])
    assert under_way > 8
    resumed = None
    for stop, saved in enumerate(states):
        twin = copy.deepcopy(start)
        resumed = make(twin, invert_every=refresh, **options)
        weights, state = torch.load(io.BytesIO(saved), weights_only=True)
        twin.load_state_dict(weights)
        resumed.load_state_dict(state)
        for number in range(stop, len(data)):
            step(twin, resumed, data[number])
            assert equal(twin.parameters(), ends[number])
        assert str(resumed.health()) == str(optimizer.health())
        resumed.close()
    optimizer.close()


def test_a_preconditioner_resumed_at_every_step_bit_for_bit():
    data, start = batches(20), net(WIDTHS)
    refresh = Refresh(every=4, background=3)
    model = copy.deepcopy(start)

    def made(m):
        return KFACPreconditioner(m, "categorical", invert_every=refresh)

    def both(m, preconditioner, batch):
        step(m, preconditioner, batch)
        with torch.no_grad():
            for p in m.parameters():
                p -= 0.1 * p.grad

    preconditioner, states, ends = made(model), [], []
    for batch in data:
        states.append(
            (copy.deepcopy(model.state_dict()), copy.deepcopy(preconditioner.state_dict()))
        )
        both(model, preconditioner, batch)
        ends.append([p.clone() for p in model.parameters()])
    for stop, (weights, state) in enumerate(states):
        twin = copy.deepcopy(start)
        resumed = made(twin)
        twin.load_state_dict(weights)
        resumed.load_state_dict(state)
        for number in range(stop, len(data)):
            both(twin, resumed, data[number])
            assert equal(twin.parameters(), ends[number])
        resumed.close()
    preconditioner.close()


def test_a_state_is_no_wait_and_of_the_copies(monkeypatch):
    model, data = net(WIDTHS), batches(6)
    optimizer = make(model, invert_every=Refresh(every=3, background=3))
    gate = slowed(monkeypatch)
    for batch in data[:4]:
        step(model, optimizer, batch)
    factor = optimizer.estimator.blocks["2"].factors[0]
    cov = factor.get_cov_var().clone()
    step(model, optimizer, data[4])
    assert not torch.equal(cov, factor.get_cov_var())
    [pending] = optimizer.state_dict()["kfac"]["estimator"]["background"]
    assert pending["due"] == 6
    assert torch.equal(pending["layers"]["2"][0]["cov"], cov)
    gate.set()
    optimizer.close()


def test_loading_forgets_what_is_under_way():
    model, data = net(WIDTHS), batches(6)
    optimizer = make(model, invert_every=Refresh(every=3, background=3))
    for batch in data[:3]:
        step(model, optimizer, batch)
    state, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    assert state["kfac"]["estimator"]["background"] == []
    for batch in data[3:5]:
        step(model, optimizer, batch)
    assert optimizer.estimator.background.layers
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert not optimizer.estimator.background.layers
    del state["kfac"]["estimator"]["background"]  # as of an older version
    optimizer.load_state_dict(state)
    optimizer.close()


def test_a_load_that_fails_leaves_what_is_under_way():
    model, data = net(WIDTHS), batches(8)
    optimizer = make(model, invert_every=Refresh(every=4, background=3))
    twin = copy.deepcopy(model)
    other = make(twin, invert_every=Refresh(every=4, background=3))
    for batch in data[:6]:
        step(model, optimizer, batch)
        step(twin, other, batch)
    state = optimizer.state_dict()
    del state["kfac"]["estimator"]["background"][0]["layers"]["2"][0]["cov"]
    with pytest.raises(KeyError):
        other.load_state_dict(state)
    assert other.estimator.background.layers == {"0", "2", "4", "6"}
    for batch in data[6:]:
        step(model, optimizer, batch)
        step(twin, other, batch)
        assert equal(model.parameters(), twin.parameters())
    optimizer.close()
    other.close()


# Ends.


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("kfac-refresh")]


def test_one_thread_that_close_ends_and_nothing_is_lost():
    model, data = net(WIDTHS), batches(8)
    optimizer = make(model, invert_every=Refresh(every=3, background=3, staggered=True))
    twin = copy.deepcopy(model)
    other = make(twin, invert_every=Refresh(every=3, background=3, staggered=True))
    before = len(threads())
    for batch in data[:6]:
        step(model, optimizer, batch)
        step(twin, other, batch)
    assert len(threads()) == before + 2
    other.estimator.background.close()
    assert len(threads()) == before + 1
    for batch in data[6:]:
        step(model, optimizer, batch)
        step(twin, other, batch)
        assert equal(model.parameters(), twin.parameters())
    optimizer.close()
    other.close()
    assert len(threads()) == before


def test_release_leaves_the_collection_to_another():
    model, data = net(WIDTHS), batches(5)
    optimizer = make(model, invert_every=Refresh(every=3, background=3))
    for batch in data:
        step(model, optimizer, batch)
    optimizer.estimator.release()
    assert not optimizer.estimator.background.layers
    assert not threads()
    again = KFAC(model, layer_collection=optimizer.estimator.layers, lr=0.1, damping=0.1)
    step(model, again, data[0])
    again.close()


def test_a_deep_copy_has_what_was_found_and_a_thread_of_its_own():
    model, data = net(WIDTHS), batches(8)
    preconditioner = KFACPreconditioner(
        model, "categorical", damping=0.1, invert_every=Refresh(every=3, background=2)
    )
    for batch in data[:5]:
        step(model, preconditioner, batch)
    _, twin = copy.deepcopy((model, preconditioner))
    assert twin.estimator.background.layers == preconditioner.estimator.background.layers
    assert twin.estimator.background._executor is None
    preconditioner.estimator.finish_inverses(5)
    twin.estimator.finish_inverses(5)
    for ours, theirs in zip(
        preconditioner.estimator.blocks.values(),
        twin.estimator.blocks.values(),
        strict=True,
    ):
        for a, b in zip(ours.factors, theirs.factors, strict=True):
            assert a is not b
            assert equal(stored(a), stored(b))
            assert stored(a)[0] is not stored(b)[0]
    preconditioner.close()
    twin.close()


def test_off_there_is_no_thread_and_nothing_in_the_state():
    model, data = net(WIDTHS), batches(5)
    optimizer = make(model, invert_every=Refresh(every=2))
    for batch in data:
        step(model, optimizer, batch)
    assert optimizer.state_dict()["kfac"]["estimator"]["background"] == []
    assert optimizer.estimator.background._executor is None
    assert not threads()
    optimizer.close()


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": 0}, r"Refresh: background: expected an integer >= 1, got 0"),
        ({"background": 2.0}, r"Refresh: background: .*got 2\.0"),
        (
            {"every": 3, "background": 4},
            r"background: expected at most .*every=3, got 4",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Refresh(**options)


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_elsewhere_than_on_the_cpu(kind):
    model = net(WIDTHS).to("meta")
    with pytest.raises(NotImplementedError, match=r"on the CPU.*got layers on meta"):
        kind(model, "categorical", invert_every=Refresh(every=5, background=2))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_layer_that_was_moved():
    class Elsewhere:
        def get_cov_var(self):
            return torch.empty(1, device="meta")

    background = BackgroundRefreshes()
    with pytest.raises(NotImplementedError, match="meta"):
        background.start({"0": [Elsewhere()]}, 5, 3)
    assert not background.layers
