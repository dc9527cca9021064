"""Statistics on part of the batch: of just these examples, without a trace."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy

from kfac_torch import KFAC, FisherEstimator, KFACPreconditioner, LayerCollection
from kfac_torch.options import Pace, QModel, Statistics

pytestmark = pytest.mark.usefixtures("float64")
N, STRIDE = 12, 3
WHOLE = Statistics.whole("exact")
PART = replace(WHOLE, batch_fraction=1 / STRIDE)
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
    estimator = watched(model, replace(WHOLE, batch_fraction=0.25, min_terms=N))
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
    estimator = watched(model, replace(WHOLE, batch_fraction=0.5))
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


@pytest.mark.parametrize("mode", ["gradients", "curvature_prop", "exact"])
@pytest.mark.parametrize("make", [plain, Noisy])
def test_a_forward_of_its_own_finds_the_same(mode, make):
    """The same targets too, in each of two micro-batches; and no trace is left."""
    found = []
    for rerun_above in (0, math.inf):
        torch.manual_seed(1)
        model = make()
        estimator = watched(model, replace(Statistics.whole(mode), rerun_above=rerun_above))
        factors = [gather(estimator, model, *batch(), parts=2) for _ in range(3)]
        found.append([factors, [torch.get_rng_state(), *model.buffers()]])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_forward_without_a_backward_of_its_own():
    model, (x, _) = plain(), batch()
    estimator = watched(model, replace(WHOLE, rerun_above=0))
    for _ in range(2):
        model(x)
        estimator.update_covariances()
        found = covariances(estimator)
    estimator.release()
    whole = watched(model, "exact")
    model(x)
    whole.update_covariances()
    torch.testing.assert_close(found, covariances(whole), rtol=1e-12, atol=1e-14)


def test_the_size_of_the_outputs_decides():
    """Of all layers in bytes, here 12 rows of 5 and 3 numbers of 8."""
    for limit, reruns in ((N * 8 * 8, 0), (N * 8 * 8 - 1, 1)):
        model, calls = plain(), []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        estimator = watched(model, replace(Statistics.whole(), rerun_above=limit))
        gather(estimator, model, *batch())
        assert len(calls) == 1 + reruns


def test_a_large_micro_batch_after_a_small_one():
    """Each counts once: the small one as it ran, the large one at the step."""
    model, sizes = plain(), [3, N]
    estimator = watched(model, replace(WHOLE, rerun_above=N * 8 * 8 - 1))
    x, y = batch(sum(sizes))
    for some, targets in zip(x.split(sizes), y.split(sizes), strict=True):
        cross_entropy(model(some), targets).backward()
    estimator.update_covariances()
    found = covariances(estimator)
    estimator.release()
    expected = gather(watched(model, "exact"), model, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_forward_of_its_own_lets_go_of_what_it_held():
    """Neither all inputs nor all gradients are there when the last moments are made."""
    model = nn.Sequential(
        *(layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh()))
    )
    assert most_alive(model, 0) <= 4 < 6 <= most_alive(model, math.inf)


def most_alive(model, rerun_above):
    """How many inputs and gradients of layers are there at once."""
    estimator = watched(model, replace(Statistics.whole(), rerun_above=rerun_above))
    seen, counts = [], []

    def watch(block):
        moments = block.grad_moments

        def counted(inputs, grads, *rest):
            seen.extend(StorageWeakRef(t.untyped_storage()) for t in inputs + grads)
            counts.append(sum(not known.expired() for known in seen))
            return moments(inputs, grads, *rest)

        block.grad_moments = counted

    for block in estimator.blocks.values():
        watch(block)
    gather(estimator, model, torch.randn(40, 4), torch.randint(4, (40,)))
    estimator.release()
    return max(counts)


@pytest.mark.parametrize("options", [{}, {**CLASSIC, "estimation_mode": PART}])
def test_an_input_that_is_overwritten_is_an_error(options):
    """Before the step; and nothing has changed then. Afterwards it may be."""
    model, (x, y) = plain(), batch()
    optimizer = KFAC(model, "categorical", **options)
    for step in range(3):
        x.normal_()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if step < 2:
            optimizer.step()
    x.normal_()
    before = (
        [param.clone() for param in model.parameters()],
        covariances(optimizer.estimator),
    )
    with pytest.raises(RuntimeError, match="changed in place"):
        optimizer.step()
    after = list(model.parameters()), covariances(optimizer.estimator)
    for olds, news in zip(before, after, strict=True):
        assert all(torch.equal(old, new) for old, new in zip(olds, news, strict=True))


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
        ({"mode": "empirical"}, r"expected 1 in .*use estimation_mode=\"empirical\""),
        (
            {"mode": "empirical", "batch_fraction": 1.0, "rerun_above": 1},
            "expected inf in the empirical mode",
        ),
        ({"rerun_above": -1}, "rerun_above: expected a number of bytes, 0 or more, got -1"),
        ({"rerun_above": math.nan}, "rerun_above: expected a number of bytes"),
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
