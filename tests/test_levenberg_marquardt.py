"""Adaptive damping: the rule, and the rule in the loop."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_torch import KFAC, LayerCollection, LevenbergMarquardt
from kfac_torch.damping_search import best
from kfac_torch.loss_functions import CategoricalLogitsNegativeLogProbLoss
from kfac_torch.refresh_schedule import Refresh
from kfac_torch.trials import Judgement

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("rho", "expected"),
    [
        (0.1, 1 / 0.81),
        (0.25, 1.0),
        (0.5, 1.0),
        (0.75, 1.0),
        (0.9, 0.81),
        (-2.0, 1 / 0.81),
        (math.nan, 1 / 0.81),
        (math.inf, 0.81),
        (-math.inf, 1 / 0.81),
    ],
)
def test_damping_follows_the_ratio(rho, expected):
    rule = LevenbergMarquardt(initial=1.0, decay=0.9, interval=2)
    assert rule.update(1.0, rho) == pytest.approx(expected, rel=1e-15)


def test_damping_stays_within_its_bounds():
    rule = LevenbergMarquardt(initial=1.0, decay=0.5, min_damping=0.9, max_damping=1.1)
    assert rule.update(1.0, 1.0) == 0.9
    assert rule.update(1.0, 0.0) == 1.1


@pytest.mark.parametrize(
    ("actual", "predicted", "rho"),
    [(-1.0, -2.0, 0.5), (1.0, -2.0, -0.5), (-1.0, 2.0, math.inf), (3.0, 2.0, 1.5)],
)
def test_a_fall_where_a_rise_was_predicted_is_good(actual, predicted, rho):
    assert LevenbergMarquardt(initial=1.0).ratio(actual, predicted) == rho


def test_a_ratio_to_nothing_counts_as_bad():
    rule = LevenbergMarquardt(initial=1.0)
    assert math.isnan(rule.ratio(0.0, 0.0))
    assert math.isnan(rule.ratio(math.nan, -1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0.0}, "initial: expected a positive number, got 0"),
        ({"initial": math.nan}, "initial: expected a finite number"),
        ({"decay": 1.0}, r"decay: expected a number in \(0, 1\), got 1"),
        ({"interval": 0}, "interval: expected an integer >= 1, got 0"),
        ({"thresholds": (0.8, 0.2)}, "thresholds: expected two numbers in ascending"),
        ({"min_damping": 0.0}, "min_damping: expected a positive number <= max_damping"),
        ({"min_damping": 2.0, "max_damping": 1.0}, "min_damping: expected"),
        ({"reject_below": 0.3}, "reject_below: expected None or a number <= 0.25, below"),
        ({"reject_below": math.nan}, "reject_below: expected None or a number"),
        ({"trial_steps": -1}, "trial_steps: expected an integer >= 0, got -1"),
        ({"trial_steps": 1.5}, "trial_steps: expected an integer >= 0, got 1.5"),
        ({"l2_reg": -1.0}, "l2_reg: expected a finite number >= 0"),
    ],
)
def test_a_rule_that_is_none(options, message):
    with pytest.raises(ValueError, match=f"LevenbergMarquardt: {message}"):
        LevenbergMarquardt(**{"initial": 1.0, **options})


# In the loop.


def net(dropout=0.0):
    return nn.Sequential(
        nn.Linear(6, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(5, 4),
    )


def linear():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def batch(n=24):
    return torch.randn(n, 6), torch.randint(4, (n,))


def closure_of(model, optimizer, x, y, l2=0.0, criterion=functional.cross_entropy):
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss = loss + l2 / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        calls.append(loss.item())
        return loss

    closure.calls = calls
    return closure


def make(model, rule=None, **options):
    if "damping" not in options:
        options["damping"] = LevenbergMarquardt(
            **{"initial": 0.1, "decay": 0.5, "interval": 1, **(rule or {})}
        )
    if not options.get("momentum_type", "regular").startswith("qmodel"):
        options.setdefault("lr", 0.3)
    return KFAC(model, "categorical", **{"estimation_mode": "exact", **options})


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


TYPES = ["regular", "adam", "qmodel", "qmodel_fixedmu"]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("momentum_type", TYPES)
def test_the_predicted_change_is_that_of_the_step_taken(momentum_type, include):
    """With dense matrices: exact for the models, Kronecker-factored for the others."""
    model, (x, y), l2 = linear(), batch(), 0.02
    rule = {"l2_reg": l2, "include_damping": include}
    optimizer = make(model, rule, momentum_type=momentum_type, norm_constraint=None)
    closure = closure_of(model, optimizer, x, y, l2)
    for _ in range(3):
        before, old = vector(model), closure().item()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        if momentum_type.startswith("qmodel"):
            matrix = exact_fisher(model, x)
        else:
            matrix = None
        damping = optimizer.param_groups[0]["damping"]
        optimizer.step(closure)
        delta = vector(model) - before
        if matrix is None:
            matrix = kronecker_fisher(optimizer, model)
        included = l2 + damping * include
        matrix = matrix + included * torch.eye(len(delta))
        expected = gradient @ delta + 0.5 * delta @ matrix @ delta
        last = optimizer.last_step
        torch.testing.assert_close(last.predicted_change, expected)
        with torch.no_grad():
            new = (
                functional.cross_entropy(model(x), y)
                + l2 / 2 * vector(model).square().sum()
            )
        rho = optimizer._damping.ratio(new.item() - old, expected.item())
        assert last.rho == pytest.approx(rho, rel=1e-6)
        assert last.damping == damping
        followed = optimizer._damping.update(damping, last.rho)
        assert optimizer.param_groups[0]["damping"] == followed


def exact_fisher(model, x):
    model = copy.deepcopy(model)  # without the hooks
    params = {n: p.detach() for n, p in model.named_parameters()}
    jac = torch.func.jacrev(lambda q: torch.func.functional_call(model, q, (x,)))(params)
    J = torch.cat([j.flatten(2) for j in jac.values()], 2)
    p = model(x).detach().softmax(1)
    F_L = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("nki,nkl,nlj->ij", J, F_L, J) / len(x)


def kronecker_fisher(optimizer, model):
    """Block-diagonal, in the order of `vector`: weight row by row, then bias."""
    blocks = []
    for block in optimizer.estimator.blocks.values():
        A, G = (factor.get_cov() for factor in block.factors)
        n_out, n_in = len(G), len(A) - 1
        # Entries of [out, in + 1], row-major, to the weight's and then the bias's.
        grid = torch.arange(n_out * (n_in + 1)).view(n_out, n_in + 1)
        order = torch.cat([grid[:, :-1].flatten(), grid[:, -1]])
        blocks.append(torch.kron(G, A)[order][:, order])
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("momentum_type", TYPES)
def test_the_second_evaluation_leaves_no_trace(momentum_type):
    """Against a twin whose damping is set by hand: buffers, gradients, random numbers."""
    model, (x, y) = net(dropout=0.3), batch()
    twin = copy.deepcopy(model)
    a = make(model, momentum_type=momentum_type, estimation_mode="gradients")
    b = make(twin, damping=0.1, momentum_type=momentum_type, estimation_mode="gradients")
    first, second = closure_of(model, a, x, y), closure_of(twin, b, x, y)
    state = torch.get_rng_state()
    for _ in range(4):
        b.param_groups[0]["damping"] = a.param_groups[0]["damping"]
        b._schedule.inverses_due = a._schedule.inverses_due
        torch.set_rng_state(state)
        a.step(first)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        b.step(second)
        assert torch.equal(after, torch.get_rng_state())
        state = after
        ours, theirs = model.state_dict(), twin.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert len(first.calls) == 2 * len(second.calls) == 8


def test_the_second_evaluation_has_the_dropout_mask_of_the_first():
    model, (x, y) = (
        nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 4)),
        batch(),
    )
    optimizer = make(model, lr=0.0)
    closure = closure_of(model, optimizer, x, y)
    optimizer.step(closure)
    assert closure.calls[0] == closure.calls[1]
    assert optimizer.last_step.rho is not None


def test_an_adapted_damping_reaches_the_preconditioner_at_the_next_step():
    model, (x, y) = linear(), batch()
    optimizer = make(model, {"interval": 4}, invert_every=Refresh(every=1000, early=3))
    closure = closure_of(model, optimizer, x, y)
    factor = optimizer.estimator.blocks["0"].factors[0]
    func = next(iter(factor._powers.values())).damping_func
    inverses = []
    for _ in range(6):
        optimizer.step(closure)
        inverses.append(factor.get_inverse(func).clone())
    assert optimizer.last_step.damping != 0.1
    assert torch.equal(inverses[2], inverses[3])  # the first three are fresh
    assert not torch.equal(inverses[3], inverses[4])
    assert torch.equal(inverses[4], inverses[5])


def test_l2_regularisation_damps_the_preconditioner():
    model, (x, y) = linear(), batch()
    twin = copy.deepcopy(model)
    a = make(model, {"initial": 0.1, "l2_reg": 0.2, "interval": 10})
    b = make(twin, damping=0.3)
    for _ in range(3):
        a.step(closure_of(model, a, x, y, 0.2))
        b.step(closure_of(twin, b, x, y, 0.2))
    torch.testing.assert_close(vector(model), vector(twin))


def test_a_sum_is_judged_like_a_mean():
    model, (x, y) = linear(), batch()
    twin = copy.deepcopy(model)
    mean, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    rule = LevenbergMarquardt(initial=0.1, interval=1)
    a = KFAC(model, mean, lr=0.3, damping=rule, estimation_mode="exact")
    b = KFAC(twin, total, lr=0.3, damping=rule, estimation_mode="exact")
    for _ in range(4):
        a.step(closure_of(model, a, x, y, criterion=mean))
        b.step(closure_of(twin, b, x, y, criterion=total))
        assert a.last_step.rho == pytest.approx(b.last_step.rho)
    torch.testing.assert_close(vector(model), vector(twin))


TINY = {"initial": 1e-30, "min_damping": 1e-80, "decay": 1e-3, "interval": 2}


def test_a_singular_factor_is_rescued_before_the_damping_is_raised():
    model = nn.Linear(6, 4)
    optimizer = make(model, TINY)
    x, y = batch(3)
    optimizer.step(closure_of(model, optimizer, x, y))
    assert optimizer.last_step.damping == 1e-30
    assert optimizer.health().factors["model.input"].jittered == 1
    assert vector(model).isfinite().all()


def test_where_no_rescue_holds_the_damping_is_raised():
    model = nn.Linear(6, 4, bias=False).float()
    optimizer = make(model, {**TINY, "initial": 1e-80})
    x, y = batch(3)
    with torch.no_grad():
        model.weight.fill_(0.25)
    closure = closure_of(model, optimizer, 0 * x.float(), y)  # A = 0: (0 + λI)⁻¹ overflows
    optimizer.step(closure)
    assert 1e-80 < optimizer.last_step.damping < 1e-50
    assert vector(model).eq(0.25).all()


def test_no_damping_mends_a_nan():
    model = nn.Linear(6, 4)
    optimizer = make(model, {"initial": 0.1})
    x, y = batch(30)
    optimizer.step(closure_of(model, optimizer, x, y))
    before, damping = vector(model), optimizer.param_groups[0]["damping"]
    optimizer.estimator.max_kept_inverses = 0
    optimizer.estimator.blocks["model"].factors[0].get_cov_var()[1, 2] = math.nan
    with pytest.raises(torch.linalg.LinAlgError, match=r"model\.input has NaN or Inf"):
        optimizer.step(closure_of(model, optimizer, x, y))
    assert torch.equal(before, vector(model))
    assert optimizer.param_groups[0]["damping"] == damping


def test_a_nan_after_the_step_is_a_bad_step():
    model, (x, y) = linear(), batch()
    optimizer = make(model)
    calls = []

    def criterion(z, y):
        calls.append(1)
        loss = functional.cross_entropy(z, y)
        return loss if len(calls) == 1 else loss * torch.nan

    optimizer.step(closure_of(model, optimizer, x, y, criterion=criterion))
    assert math.isnan(optimizer.last_step.rho)
    assert optimizer.param_groups[0]["damping"] == 0.2


# Calibration.


@pytest.mark.parametrize("initial", [1e3, 0.05, 1e-6])
@pytest.mark.parametrize("momentum_type", ["regular", "qmodel"])
def test_calibration_settles_at_the_first_step(momentum_type, initial):
    """As if the settled λ had been given, and with the parameters where they were."""
    model, (x, y) = linear(), batch()
    twin = copy.deepcopy(model)
    rule = {"initial": initial, "interval": 3, "decay": 0.8}
    a = make(model, {**rule, "calibrate": True}, momentum_type=momentum_type)
    a.step(closure_of(model, a, x, y))
    settled = a.last_step.damping
    b = make(twin, {**rule, "initial": settled}, momentum_type=momentum_type)
    b.step(closure_of(twin, b, x, y))
    assert torch.equal(vector(model), vector(twin))
    closure = closure_of(model, a, x, y)
    a.step(closure)
    assert len(closure.calls) == 1  # only once
    assert settled < initial if initial == 1e3 else settled >= 1e-8


def test_calibration_ends_where_it_would_go_round_in_circles():
    """Without a band between the thresholds, λ never stays: the larger one is kept."""
    model, (x, y) = linear(), batch()
    rule = {"thresholds": (0.9, 0.9), "calibrate": True, "initial": 10.0, "decay": 0.8}
    optimizer = make(model, rule, momentum_type="qmodel")
    closure = closure_of(model, optimizer, x, y)
    optimizer.step(closure)
    assert len(closure.calls) < 60
    assert optimizer.last_step.damping < 10


def test_calibration_waits_for_the_end_of_burn_in():
    model, (x, y) = linear(), batch()
    optimizer = make(model, {"initial": 1e3, "calibrate": True}, num_burnin_steps=2)
    for calls in (1, 2):
        closure = closure_of(model, optimizer, x, y)
        optimizer.step(closure)
        assert len(closure.calls) == 1, calls
    optimizer.step(closure_of(model, optimizer, x, y))
    assert optimizer.last_step.damping < 1e3


# Trials at the first steps.


def judged_by(losses, tried):
    """The change of the loss by λ, from a table; where it is None, no ratio is known."""

    def judged(damping):
        tried.append(damping)
        change = losses[float(f"{damping:.9g}")]
        if change == "not finite":
            return None, damping
        rho = None if change is None else 1.0
        return Judgement(None, rho, True, change or 0.0), damping

    return judged


@pytest.mark.parametrize(
    ("start", "losses", "tried", "found"),
    [
        (1.0, {1.0: -1, 0.1: -2, 0.01: -1.5}, [1.0, 0.1, 0.01], 0.1),
        (1.0, {1.0: -1, 0.1: -1, 10.0: -2, 100.0: 3}, [1.0, 0.1, 10.0, 100.0], 10.0),
        (1.0, {1.0: -1, 0.1: -0.9, 10.0: -1.11, 100.0: -1.2}, None, 10.0),  # a tenth
        (1.0, {1.0: -1, 0.1: -1.01, 0.01: -1.02}, None, 0.01),
        (0.01, {0.01: -1, 0.1: -0.5}, [0.01, 0.1], 0.01),  # at the lower bound
        (1e-5, {0.01: 5, 0.1: 4, 1.0: 6}, [0.01, 0.1, 1.0], 0.1),  # below it
        (100.0, {100.0: -1, 10.0: math.nan}, [100.0, 10.0], 100.0),  # at the upper one
        (1e9, {100.0: 5, 10.0: 6}, [100.0, 10.0], 100.0),
        (1.0, {1.0: "not finite", 0.1: "not finite", 10.0: 7, 100.0: 8}, None, 10.0),
        (1.0, {1.0: None, 0.1: None, 10.0: None}, None, 1.0),
    ],
)
def test_trials_go_on_while_the_loss_is_less(start, losses, tried, found):
    rule = LevenbergMarquardt(initial=1.0, min_damping=0.01, max_damping=100.0)
    those = []
    assert best(rule, start, judged_by(losses, those)) == pytest.approx(found)
    assert those == pytest.approx(tried or list(losses))


@pytest.mark.parametrize("initial", [1e4, 1.0, 1e-4])
@pytest.mark.parametrize("momentum_type", ["regular", "qmodel"])
def test_trials_are_of_the_steps_that_would_be_taken(momentum_type, initial):
    """The losses that choose are those behind the steps with every λ given."""
    model, (x, y) = linear(), batch()
    options = {"momentum_type": momentum_type, "norm_constraint": None}
    changes, ends = {}, {}
    before = functional.cross_entropy(model(x), y).item()
    for damping in [float(f"1e{exponent}") for exponent in range(-6, 7)]:
        twin = copy.deepcopy(model)
        other = make(twin, damping=damping, **options)
        other.step(closure_of(twin, other, x, y))
        changes[damping] = functional.cross_entropy(twin(x), y).item() - before
        ends[damping] = vector(twin)
    rule = {"min_damping": 1e-6, "max_damping": 1e6, "initial": initial}
    found = best(LevenbergMarquardt(**rule), initial, judged_by(changes, []))
    assert found < initial or initial < 1e4
    optimizer = make(model, {**rule, "trial_steps": 1}, **options)
    optimizer.step(closure_of(model, optimizer, x, y))
    assert optimizer.last_step.damping == found
    end = ends[float(f"{found:.9g}")]
    torch.testing.assert_close(vector(model), end, rtol=1e-9, atol=1e-12)


def test_trials_are_of_the_first_steps_alone():
    model, (x, y) = linear(), batch()
    optimizer = make(model, {"trial_steps": 2, "interval": 50}, momentum_type="qmodel")
    counts = []
    for _ in range(4):
        closure = closure_of(model, optimizer, x, y)
        optimizer.step(closure)
        counts.append(len(closure.calls))
    assert min(counts[:2]) >= 3  # the first call is the step's own
    assert counts[2:] == [1, 1]


# Errors and state.


class Untold(CategoricalLogitsNegativeLogProbLoss):
    """A loss whose gradient does not tell how it changes."""

    def change_from_gradient(self, outputs, gradient, weights=None):
        return None


def test_a_step_without_a_closure():
    model, (x, y) = linear(), batch()
    rule = LevenbergMarquardt(initial=0.1, interval=1)
    optimizer = KFAC(model, Untold, lr=0.3, damping=rule)
    before = vector(model)
    functional.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"expected step\(closure\).*got none"):
        optimizer.step()
    assert torch.equal(vector(model), before)
    assert optimizer.estimator.blocks["0"].factors[0].num_updates == 0


@pytest.mark.parametrize("value", [None, True, "low", torch.zeros(2)])
def test_a_closure_that_does_not_return_the_loss(value):
    model, (x, y) = linear(), batch()
    optimizer = make(model)
    before = vector(model)

    def closure():
        functional.cross_entropy(model(x), y).backward()
        return value

    with pytest.raises(TypeError, match="expected the closure to return the loss, one"):
        optimizer.step(closure)
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("momentum_type", TYPES)
def test_resuming_is_bit_for_bit(momentum_type):
    batches = [batch() for _ in range(9)]
    options = {
        "rule": {"interval": 2, "calibrate": True, "trial_steps": 2},
        "momentum_type": momentum_type,
        "estimation_mode": "gradients",
        "num_burnin_steps": 2,
        "invert_every": 3,
    }

    def run(model, optimizer, batches):
        steps = []
        for x, y in batches:
            optimizer.step(closure_of(model, optimizer, x, y))
            steps.append(repr(optimizer.last_step))
        return steps, vector(model)

    model = net()
    start = copy.deepcopy(model)
    reference, end = run(model, make(model, **options), batches)
    for stop in (1, 2, 3, 4, 6):
        model = copy.deepcopy(start)
        optimizer = make(model, **options)
        run(model, optimizer, batches[:stop])
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        twin = net()
        resumed = make(twin, **options)
        weights, state = torch.load(file, weights_only=True)
        twin.load_state_dict(weights)
        resumed.load_state_dict(state)
        ahead, final = run(twin, resumed, batches[stop:])
        assert ahead == reference[stop:]
        assert torch.equal(final, end)


def test_a_closure_that_fails_after_the_step_leaves_a_step_that_counts():
    torch.manual_seed(0)
    model, x, calls = nn.Linear(2, 2), torch.randn(8, 2), []
    rule = LevenbergMarquardt(initial=0.1, interval=1)
    optimizer = KFAC(model, nn.MSELoss(), lr=0.1, damping=rule)

    def closure():
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("inside")
        optimizer.zero_grad()
        value = model(x).square().mean()
        value.backward()
        return value

    with pytest.raises(ValueError, match="inside"):
        optimizer.step(closure)
    assert optimizer.state_dict()["kfac"]["num_steps"] == 1
    assert optimizer.last_step.step == 0
    assert optimizer.last_step.rho is None
    assert optimizer.param_groups[0]["damping"] == 0.1
    optimizer.step(closure)
    assert optimizer.last_step.step == 1
    assert optimizer.last_step.rho is not None


def test_a_chain_over_time_has_no_prediction_but_that_of_the_quadratic_model():
    model = nn.Linear(2, 2)
    layers = LayerCollection(model)
    layers.register_fully_connected_multi(model, "kron_series_2", time_dim=1)
    rule = LevenbergMarquardt(initial=0.1)
    with pytest.raises(NotImplementedError, match=r"layer model.*momentum_type=\"qmodel\""):
        KFAC(model, "categorical", layers, lr=0.1, damping=rule)
    KFAC(model, "categorical", layers, damping=rule, momentum_type="qmodel")
