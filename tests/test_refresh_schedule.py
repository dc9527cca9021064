"""Which layers are refreshed at which step, and that nothing else depends on it."""

import copy
import io
import itertools

import pytest
import torch
from dense_fisher import dense_fisher
from refresh_cases import Tokens, batches, net, step
from torch import nn
from torch.nn.functional import cross_entropy

from kfac_torch import KFAC, KFACPreconditioner, LevenbergMarquardt, Refresh
from kfac_torch.fisher_blocks.kronecker import KroneckerProductFB
from kfac_torch.refresh_schedule import RefreshPlan, as_refresh

WIDTHS = (6, 9, 5, 8, 7, 4, 3)


def make(model, **options):
    return KFAC(model, "categorical", **{"lr": 0.05, "damping": 0.1, **options})


def stored(block):
    """What a refresh of a block writes."""
    if hasattr(block, "scales"):
        return [q.clone() for q in block.scales.basis]
    pairs = zip(block.factors, block._damping_funcs(), strict=True)
    return [factor.get_inverse(damping).clone() for factor, damping in pairs]


def refreshed(optimizer, model, data):
    """By step, the layers whose inverses changed."""
    blocks, changed, before = optimizer.estimator.blocks, [], {}
    for batch in data:
        step(model, optimizer, batch)
        after = {name: stored(block) for name, block in blocks.items()}
        changed.append(
            [n for n in blocks if not before or not torch.equal(before[n][0], after[n][0])]
        )
        before = after
    return changed


# The plan.


class Costs:
    """A block of which only the cost of a refresh is known."""

    def __init__(self, cost):
        self.factors = [self]
        self.refresh_cost = cost


def plan_of(costs, **options):
    blocks = {str(i): Costs(cost) for i, cost in enumerate(costs)}
    return RefreshPlan(blocks, Refresh(staggered=True, **options))


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_layer_once_per_interval_whatever_the_start(every):
    plan = plan_of([1, 50, 3, 3, 20, 8], every=every)
    for start in (0, 5):
        due = [n for s in range(start, start + every) for n in plan.due_at(s)]
        assert sorted(due) == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("costs", "every", "loads"),
    [
        ([5, 5, 4, 4, 3, 3, 3], 3, [8, 11, 8]),
        ([7, 1, 1, 1, 1, 1, 1, 1], 2, [7, 7]),
        ([1], 3, [1, 0, 0]),
        ([2, 2], 4, [2, 2, 0, 0]),
    ],
)
def test_the_balance_by_hand(costs, every, loads):
    plan = plan_of(costs, every=every)
    assert sorted(plan.cost_at(s) for s in range(every)) == sorted(loads)


def test_the_bound_of_longest_processing_time_first():
    """No step has more than 4/3 of the mean, or than the dearest layer."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        costs = (torch.rand(40, generator=generator) ** 4 * 10**6).long().tolist()
        for every in (2, 5, 10):
            plan = plan_of(costs, every=every)
            most = max(plan.cost_at(s) for s in range(every))
            best = max(sum(costs) / every, *costs)
            assert most <= (4 / 3) * best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"Refresh: every: expected an integer >= 1, got 0"),
        ({"basis_every": 1.5}, r"Refresh: basis_every: .*got 1\.5"),
        ({"basis_tolerance": 0.0}, r"Refresh: basis_tolerance: expected a positive.*0\.0"),
        ({"basis_tolerance": float("nan")}, r"basis_tolerance: .*got nan"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Refresh(**options)


@pytest.mark.parametrize("given", [0, 2.5, "often"])
def test_neither_a_number_nor_a_refresh(given):
    with pytest.raises(ValueError, match=r"invert_every: expected an integer >= 1"):
        as_refresh(given)


# Inside an optimizer.


@pytest.mark.parametrize(
    ("options", "early"),
    [
        ({"invert_every": 100}, 10),
        ({"invert_every": 100, "cov_update_every": 1}, 3),
        ({"invert_every": Refresh(every=100, early=5)}, 5),
        ({"invert_every": Refresh(every=100, basis_every=5), "approx": "ekfac"}, 10),
    ],
)
def test_the_first_steps_refresh_all(options, early):
    model = net(WIDTHS)
    optimizer = make(model, **options)
    names = list(optimizer.estimator.blocks)
    changed = refreshed(optimizer, model, batches(12))
    assert changed == [names] * early + [[]] * (12 - early)
    optimizer.close()


def test_staggered_refreshes_are_spread_after_the_first_three():
    model, every = net(WIDTHS), 4
    optimizer = make(model, invert_every=Refresh(every=every, staggered=True, early=3))
    plan, names = optimizer._schedule.plan, list(optimizer.estimator.blocks)
    changed = refreshed(optimizer, model, batches(12))
    assert changed[:3] == [names] * 3
    for number, layers in enumerate(changed[3:], start=3):
        assert layers == plan.due_at(number)
    assert sorted(n for layers in changed[4:8] for n in layers) == sorted(names)
    most = max(plan.cost_at(s) for s in range(every))
    assert most < sum(plan.costs.values()) / 2
    optimizer.close()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_a_staggered_inverse_is_that_of_its_factors_at_its_turn(kind):
    model, data = net(WIDTHS), batches(9)
    options = {"lr": 0.05} if kind is KFAC else {}
    refresh = Refresh(every=3, staggered=True)
    optimizer = kind(model, "categorical", damping=0.1, invert_every=refresh, **options)
    plan = optimizer._schedule.plan
    for number, batch in enumerate(data):
        model.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        for name, block in optimizer.estimator.blocks.items():
            if number < 3 or name in plan.due_at(number):
                pairs = zip(block.factors, block._damping_funcs(), strict=True)
                for factor, damping in pairs:
                    C = factor.get_cov() + damping() * torch.eye(factor.cov_dim)
                    torch.testing.assert_close(
                        factor.get_inverse(damping), torch.linalg.inv(C)
                    )
    optimizer.close()


def test_with_an_interval_of_one_staggered_is_the_same():
    model = net(WIDTHS)
    twin, data = copy.deepcopy(model), batches(6)
    optimizers = [
        make(model, invert_every=1),
        make(twin, invert_every=Refresh(every=1, staggered=True)),
    ]
    for batch in data:
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            step(m, optimizer, batch)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_plain_refresh_is_its_number():
    model = net(WIDTHS)
    state = make(model, invert_every=Refresh(every=3)).state_dict()
    assert state["kfac"]["subject"]["options"]["invert_every"] == 3
    other = make(copy.deepcopy(model), invert_every=3)
    other.load_state_dict(state)
    staggered = Refresh(every=3, staggered=True)
    with pytest.raises(
        ValueError, match=r"invert_every: expected 'Refresh\(every=3, stagg"
    ):
        make(copy.deepcopy(model), invert_every=staggered).load_state_dict(state)


def test_a_new_damping_waits_for_its_turn_staggered_alone():
    rule = LevenbergMarquardt(initial=1.0, decay=0.5, interval=1)
    for staggered in (False, True):
        torch.manual_seed(0)
        model = net(WIDTHS)
        refresh = Refresh(every=4, staggered=staggered, early=3)
        optimizer = make(model, damping=rule, invert_every=refresh)
        names = list(optimizer.estimator.blocks)
        damping, changed, data = set(), [], batches(1)[0]
        for _ in range(8):
            blocks = optimizer.estimator.blocks
            before = {n: stored(b) for n, b in blocks.items()} if changed else {}

            def closure(model=model, optimizer=optimizer, data=data):
                optimizer.zero_grad()
                loss = cross_entropy(model(data[0]), data[1])
                loss.backward()
                return loss

            optimizer.step(closure)
            damping.add(optimizer.param_groups[0]["damping"])
            after = {n: stored(b) for n, b in optimizer.estimator.blocks.items()}
            changed.append(
                [
                    n
                    for n in names
                    if not before or not torch.equal(before[n][0], after[n][0])
                ]
            )
        assert len(damping) > 4
        plan = optimizer._schedule.plan
        wanted = [plan.due_at(s) if staggered else names for s in range(3, 8)]
        assert changed[3:] == wanted
        optimizer.close()


def test_what_was_due_at_a_step_left_out_is_due_at_the_next():
    model = net(WIDTHS)
    optimizer = make(model, invert_every=Refresh(every=3, staggered=True, early=3))
    data = batches(6)
    data[4] = (torch.full_like(data[4][0], torch.nan), data[4][1])
    plan = optimizer._schedule.plan
    with pytest.warns(RuntimeWarning, match="left out"):
        changed = refreshed(optimizer, model, data)
    assert changed[4] == []
    both = {*plan.due_at(4), *plan.due_at(5)}
    assert set(changed[5]) == both
    assert len(both) > len(plan.due_at(5))


class Late(nn.Module):
    """A layer that is not called at first."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(6, 6) for _ in range(3))
        self.late = False

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(x)) if self.late else x)[:, :3]


def test_a_layer_that_is_called_late_is_refreshed_at_once():
    model, data = Late(), batches(7)
    optimizer = make(model, invert_every=Refresh(every=100, staggered=True, early=3))
    for number, batch in enumerate(data):
        model.late = number > 4
        step(model, optimizer, batch)
        known = optimizer.estimator.blocks["second"].factors[0].is_refreshed
        assert known == model.late
    optimizer.close()


def test_some_layers_alone():
    model = net(WIDTHS)
    optimizer = make(model, invert_every=Refresh(every=100, early=3))
    for batch in batches(4):
        step(model, optimizer, batch)
    blocks = optimizer.estimator.blocks
    before = {name: stored(block) for name, block in blocks.items()}
    optimizer.estimator.update_inverses(["2", "6"])
    changed = [n for n in blocks if not torch.equal(before[n][0], stored(blocks[n])[0])]
    assert changed == ["2", "6"]
    with pytest.raises(ValueError, match=r"update_inverses: .*0, 2, 4.*; got 1, nine"):
        optimizer.estimator.update_inverses(["nine", "0", "1"])
    optimizer.close()


# Bases of EKFAC.


def test_bases_are_decomposed_every_so_many_refreshes():
    model = net(WIDTHS)
    refresh = Refresh(every=2, basis_every=3)
    optimizer = make(
        model,
        invert_every=refresh,
        cov_update_every=1,
        approx={"0": "ekfac", "2": "ekfac"},
    )
    changed = refreshed(optimizer, model, batches(14))
    slow = [number for number, layers in enumerate(changed) if "0" in layers]
    assert slow == [0, 1, 2, 6, 12]
    assert slow == [number for number, layers in enumerate(changed) if "2" in layers]
    fast = [number for number, layers in enumerate(changed) if "4" in layers]
    assert fast == [0, 1, 2, 4, 6, 8, 10, 12]
    optimizer.close()


def test_between_decompositions_scales_and_damping_act_at_once():
    model = net(WIDTHS)
    optimizer = make(
        model, invert_every=Refresh(every=1, basis_every=50, early=3), approx="ekfac"
    )
    for batch in batches(4):
        step(model, optimizer, batch)
    block = optimizer.estimator.blocks["0"]
    V = torch.randn(7, 9)
    seen = []
    for batch in batches(3):
        basis = stored(block)
        step(model, optimizer, batch)
        assert all(map(torch.equal, basis, stored(block)))
        seen.append(block.multiply_inverse(V))
        optimizer.param_groups[0]["damping"] *= 2
        seen.append(block.multiply_inverse(V))
    for a, b in itertools.pairwise(seen):
        assert not torch.equal(a, b)
    optimizer.close()


def test_a_damping_that_adapts_leaves_rare_bases_alone():
    model = net(WIDTHS)
    rule = LevenbergMarquardt(initial=1.0, decay=0.5, interval=1)
    refresh = Refresh(every=1, basis_every=50, early=3)
    optimizer = make(model, damping=rule, invert_every=refresh, approx="ekfac")
    basis, (x, y) = [], batches(1)[0]

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
        basis.append(stored(optimizer.estimator.blocks["0"])[0])
    assert optimizer.param_groups[0]["damping"] < 0.1
    assert all(torch.equal(basis[2], later) for later in basis[3:])
    optimizer.close()


def test_a_basis_is_kept_while_it_is_near():
    """With a tolerance above any residual nothing is decomposed after the first time."""
    changes = {}
    for tolerance in (None, 1e-6, 10.0):
        torch.manual_seed(0)
        model = net(WIDTHS)
        refresh = Refresh(every=1, basis_tolerance=tolerance)
        optimizer = make(model, invert_every=refresh, approx="ekfac")
        changed = refreshed(optimizer, model, batches(8))
        changes[tolerance] = [number for number, layers in enumerate(changed) if layers]
        optimizer.close()
    assert changes[None] == changes[1e-6] == list(range(8))
    assert changes[10.0] == [0]


def linear_after_three_steps(basis_tolerance):
    """An optimizer of one linear layer by EKFAC, refreshed at every step, and its block."""
    model = nn.Linear(3, 4)
    refresh = Refresh(every=1, basis_tolerance=basis_tolerance)
    optimizer = KFAC(
        model, "categorical", lr=0.0, damping=0.1, invert_every=refresh, approx="ekfac"
    )
    x, y = torch.randn(50, 3), torch.randint(4, (50,))
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer, next(iter(optimizer.estimator.blocks.values()))


@pytest.mark.usefixtures("float64")
def test_the_diagonals_in_a_basis_that_is_kept_are_those_of_now():
    optimizer, block = linear_after_three_steps(basis_tolerance=10.0)
    A, G, scales = block.factors
    S, basis = scales.get_cov_var().clone(), stored(block)
    A.get_cov_var().mul_(2).add_(torch.ones(4, 4))
    optimizer.estimator.update_inverses()
    assert all(map(torch.equal, basis, stored(block)))
    assert torch.equal(scales.get_cov_var(), S)
    for side, Q, s in zip((A, G), basis, scales.diagonals, strict=True):
        torch.testing.assert_close(s, (Q.mT @ side.get_cov() @ Q).diagonal())
    optimizer.close()


@pytest.mark.usefixtures("float64")
def test_a_kept_side_beside_one_that_is_decomposed():
    optimizer, block = linear_after_three_steps(basis_tolerance=0.3)
    A, _, scales = block.factors
    old_A, old_G = (q.clone() for q in scales.basis)
    S = scales.get_cov_var().clone()
    A.get_cov_var().add_(torch.ones(4, 4) * A.cov_trace() * 3)  # far; G as it was
    optimizer.estimator.update_inverses()
    Q_A, Q_G = scales.basis
    assert torch.equal(Q_G, old_G)
    assert not torch.equal(Q_A, old_A)
    M = Q_A.mT @ A.get_cov() @ Q_A
    torch.testing.assert_close(M, torch.diag(M.diagonal()))
    left = (Q_A.mT @ old_A) ** 2
    evened = left @ (old_A.mT @ A.get_cov() @ old_A).diagonal()
    moved = (M.diagonal() / evened).unsqueeze(1) * (left @ S)
    torch.testing.assert_close(scales.get_cov_var(), moved)
    torch.testing.assert_close(scales.diagonals[0], M.diagonal())
    optimizer.close()


# Resumed.


@pytest.mark.parametrize(
    "refresh",
    [
        Refresh(every=3, staggered=True),
        Refresh(every=2, staggered=True, basis_every=2),
        Refresh(every=2, basis_every=2),
        Refresh(every=1, basis_tolerance=0.3),
    ],
)
def test_resumed_bit_for_bit(refresh):
    options = {
        "invert_every": refresh,
        "approx": {"0": "ekfac", "4": "ekfac"},
        "damping": LevenbergMarquardt(initial=0.3, decay=0.8, interval=2),
        "lr": 0.05,
    }
    data, start = batches(9), net(WIDTHS)
    model = copy.deepcopy(start)
    optimizer = KFAC(model, "categorical", **options)
    states, ends = [], []
    for batch in data:
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        states.append(file.getvalue())
        step(model, optimizer, batch)
        ends.append([p.clone() for p in model.parameters()])
    for stop, saved in enumerate(states):
        twin = copy.deepcopy(start)
        resumed = KFAC(twin, "categorical", **options)
        weights, state = torch.load(io.BytesIO(saved), weights_only=True)
        twin.load_state_dict(weights)
        resumed.load_state_dict(state)
        for number in range(stop, len(data)):
            step(twin, resumed, data[number])
            assert all(map(torch.equal, twin.parameters(), ends[number]))


def test_a_state_without_what_is_due_loads():
    model = net(WIDTHS)
    optimizer = make(model, invert_every=Refresh(every=3, staggered=True, early=3))
    step(model, optimizer, batches(1)[0])
    state = optimizer.state_dict()
    assert state["kfac"].pop("layers_due") == optimizer._schedule.plan.due_at(1)
    optimizer.load_state_dict(state)
    assert optimizer._schedule.layers_due == []


# How near to the Fisher.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "refresh",
    [
        Refresh(every=2, basis_every=5),
        Refresh(every=2, basis_tolerance=0.1),
        Refresh(every=2, staggered=True, basis_tolerance=0.1),
    ],
)
def test_ekfac_in_an_old_basis_is_nearer_to_the_fisher_than_kfac(refresh):
    """In the Frobenius norm, all blocks together, after steps that decomposed nothing."""
    model, x, y = Tokens(), torch.randn(30, 4, 6), torch.randint(3, (30,))
    optimizer = make(
        model,
        estimation_mode="exact",
        cov_ema_decay=0.0,
        cov_update_every=1,
        approx="ekfac",
        invert_every=refresh,
    )
    blocks = optimizer.estimator.blocks
    changed = refreshed(optimizer, model, [(x, y)] * 20)
    optimizer.param_groups[0]["lr"] = 0.0  # the statistics are of where the model stays
    step(model, optimizer, (x, y))
    optimizer.close()
    # After the first three steps, less than one decomposition in three steps.
    assert sum(map(len, changed[3:])) < len(blocks) * 17 / 3
    ours, theirs, size = 0.0, 0.0, 0.0
    for block in blocks.values():
        F = dense_fisher(model, x, optimizer.estimator.layers, block)
        size += F.norm() ** 2
        ours += (block.full_fisher_block() - F).norm() ** 2
        theirs += (KroneckerProductFB.full_fisher_block(block) - F).norm() ** 2
    assert ours < 0.9 * theirs < size
