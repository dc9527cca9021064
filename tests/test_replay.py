"""Statistics on part of the batch: of just these examples, without a trace."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kfac_torch import KFAC, FisherEstimator, KFACPreconditioner, LayerCollection
from kfac_torch.options import Pace, QModel, Statistics

pytestmark = pytest.mark.usefixtures("float64")
N, STRIDE = 12, 3
PART = Statistics(mode="exact", batch_fraction=1 / STRIDE)
CLASSIC = {"lr": 0.1, "damping": 0.01, "norm_constraint": None}


class Noisy(nn.Module):
    """A net whose training mode draws numbers and keeps running statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def plain():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(num=N):
    return torch.randn(num, 4), torch.randint(3, (num,))


def watched(model, mode):
    layers = LayerCollection(model)
    layers.auto_register_layers()
    layers.register_categorical_predictive_distribution()
    return FisherEstimator(None, 0.0, 0.1, layers, estimation_mode=mode)


def covariances(estimator):
    return [f.get_cov().clone() for b in estimator.blocks.values() for f in b.factors]


def gather(estimator, model, x, y, parts=1, **options):
    for some, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (cross_entropy(model(some), targets, **options) / parts).backward()
    estimator.update_covariances()
    return covariances(estimator)


@pytest.mark.parametrize("num_batches", [2, 3, 4])
def test_factors_are_those_of_every_kth_example(num_batches):
    """From a start that moves on, half a stride from that of the quadratic model."""
    model = plain()
    estimator = watched(model, PART)
    for _ in range(num_batches):
        x, y = batch()
        found = gather(estimator, model, x, y)
    start = (num_batches - 2 + STRIDE // 2) % STRIDE
    estimator.release()
    whole = watched(model, "exact")
    expected = gather(whole, model, x[start::STRIDE], y[start::STRIDE])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_first_batch_counts_in_full():
    model, (x, y) = plain(), batch()
    estimator = watched(model, PART)
    found = gather(estimator, model, x, y)
    estimator.release()
    expected = gather(watched(model, "exact"), model, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_micro_batches_are_thinned_one_by_one():
    model = plain()
    estimator = watched(model, PART)
    gather(estimator, model, *batch(), parts=2)
    x, y = batch()
    found = gather(estimator, model, x, y, parts=2)
    estimator.release()
    chosen = torch.cat([part[STRIDE // 2 :: STRIDE] for part in torch.arange(N).chunk(2)])
    expected = gather(watched(model, "exact"), model, x[chosen], y[chosen])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_terms_that_do_not_count_are_left_out():
    """With no target in sight: the whole batch's gradient has shown which."""
    model = plain()
    estimator = watched(model, PART)
    gather(estimator, model, *batch())
    x, y = batch()
    y[:7] = -100  # ignore_index
    found = gather(estimator, model, x, y)
    estimator.release()
    some = slice(STRIDE // 2, None, STRIDE)
    x, y = x[some], y[some]
    whole = watched(model, "exact")
    expected = gather(whole, model, x[y >= 0], y[y >= 0])
    for index in (1, 3):  # G; that of A is a mean over all rows here and there
        torch.testing.assert_close(found[index], expected[index], rtol=1e-12, atol=1e-14)


def test_a_batch_too_small_to_be_thinned_is_recorded_as_the_model_runs():
    model, calls = plain(), []
    estimator = watched(model, Statistics(mode="exact", batch_fraction=0.25, min_terms=N))
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        x, y = batch()
        found = gather(estimator, model, x, y)
    assert len(calls) == 3
    estimator.release()
    expected = gather(watched(model, "exact"), model, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_buffers_and_random_numbers_are_as_if_it_ran_once():
    """Another model beside it, with statistics of all, sees the same numbers."""
    ends = []
    for mode in (PART, "exact"):
        torch.manual_seed(1)
        model = Noisy()
        optimizer = KFAC(model, "categorical", estimation_mode=mode, lr=0.0, damping=0.1)
        for _ in range(3):
            x, y = batch()
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        ends.append([torch.get_rng_state(), *model.buffers(), *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_same_dropout_mask_is_drawn_again():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    estimator = watched(model, Statistics(mode="exact", batch_fraction=0.5))
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(2):
        gather(estimator, model, *batch(2))
    assert [len(output) for output in seen] == [2, 2, 1]
    # One generator state, so the first numbers of a thinner batch are those of the first.
    assert torch.equal(seen[2][0] == 0, seen[1][0] == 0)


def test_another_estimator_on_the_model_does_not_see_it():
    model = plain()
    one, other = watched(model, PART), watched(model, "exact")
    for _ in range(3):
        x, y = batch()
        cross_entropy(model(x), y).backward()
        one.update_covariances()
        other.update_covariances()
    found = covariances(other)
    other.release()
    expected = gather(watched(model, "exact"), model, x, y)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_steps", [1, 6])
def test_forwards_do_not_pile_up(num_steps):
    model = plain()
    preconditioner = KFACPreconditioner(model, "categorical", estimation_mode=PART)
    for _ in range(num_steps):
        x, y = batch()
        model(x)  # no backward
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        assert preconditioner.step()
        assert not preconditioner.estimator.capture.forwards


def test_a_bad_batch_enters_no_factor():
    model = plain()
    optimizer = KFAC(model, "categorical", estimation_mode=PART, **CLASSIC)
    for bad in (False, False, True):
        x, y = batch()
        if bad:
            before = covariances(optimizer.estimator)
            x[0] = torch.nan
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if bad:
            with pytest.warns(RuntimeWarning, match="left out"):
                optimizer.step()
        else:
            optimizer.step()
    after = covariances(optimizer.estimator)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "true"}, "Statistics: mode: expected one of"),
        ({"batch_fraction": 0.0}, r"Statistics: batch_fraction: expected a number in"),
        ({"min_terms": 0}, "Statistics: min_terms: expected an integer >= 1"),
        ({"mode": "empirical", "batch_fraction": 0.5}, "expected 1 in the empirical mode"),
    ],
)
def test_options_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        Statistics(**options)


def test_what_is_not_given_is_amortised():
    """And what is given is taken as it is."""
    model = plain()
    steps = []
    for options in ({}, {"cov_update_every": 2}):
        optimizer = KFAC(model, "categorical", **options)
        due = []
        for _ in range(15):
            due.append(optimizer.estimator.collecting)
            x, y = batch()
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        steps.append([i for i, flag in enumerate(due) if flag])
        optimizer.close()
    assert steps == [[*range(10), 12], [0, 2, 4, 6, 8, 10, 12, 14]]
    assert Pace.resolve(False).cov_update_every > Pace.resolve(True).cov_update_every
    assert QModel(batch_fraction=0.125, min_terms=128).stride(2048) == 8
