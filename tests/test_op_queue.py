"""Operations spread over steps: every one in its turn, and inverses refreshed that way."""

import random
from collections import Counter

import pytest
import torch
from torch import nn

from kfac_torch import KFAC
from kfac_torch.estimator import FisherEstimator
from kfac_torch.layer_collection import LayerCollection
from kfac_torch.op_queue import OpQueue, batch_execute
from kfac_torch.refresh_schedule import Refresh


def counters(number):
    counts = [0] * number

    def thunk(i):
        counts[i] += 1
        return i

    return counts, [lambda i=i: thunk(i) for i in range(number)]


# The queue.


def test_every_op_comes_up_once_per_pass():
    queue = OpQueue(range(5), seed=3)
    passes = [[queue.next_op() for _ in range(5)] for _ in range(40)]
    assert all(sorted(ops) == [0, 1, 2, 3, 4] for ops in passes)


def test_passes_are_shuffled_anew():
    queue = OpQueue(range(3), seed=0)
    passes = {tuple(queue.next_op() for _ in range(3)) for _ in range(100)}
    assert len(passes) == 6  # every order there is


def test_the_seed_is_the_order_and_the_global_generator_is_left_alone():
    before = random.getstate()
    one, same, other = (OpQueue(range(20), seed=seed) for seed in (1, 1, 2))
    orders = [[queue.next_op() for _ in range(60)] for queue in (one, same, other)]
    assert orders[0] == orders[1] != orders[2]
    assert random.getstate() == before


def test_equal_ops_are_ops_of_their_own():
    queue = OpQueue(["a", "a", "b"], seed=0)
    assert Counter(queue.next_op() for _ in range(6)) == {"a": 4, "b": 2}


def test_a_queue_of_nothing():
    with pytest.raises(ValueError, match="OpQueue: ops: expected at least one, got none"):
        OpQueue([])


# Round robin.


def test_round_robin_oracle():
    """The counts asserted by the lineage's own test."""
    counts, thunks = counters(3)
    seen = []
    for step in range(5):
        batch_execute(step, thunks, 2)
        seen.append(tuple(counts))
    assert seen == [(1, 1, 0), (2, 1, 1), (2, 2, 2), (3, 3, 2), (4, 3, 3)]


@pytest.mark.parametrize(("number", "batch_size"), [(1, 1), (5, 1), (5, 3), (5, 5), (6, 4)])
def test_exactly_batch_size_distinct_thunks_per_step(number, batch_size):
    counts, thunks = counters(number)
    for step in range(number):
        ran = batch_execute(step, thunks, batch_size)
        assert len(set(ran)) == batch_size
    assert counts == [batch_size] * number


@pytest.mark.parametrize(
    ("step", "number", "batch_size", "message"),
    [
        (0, 3, 0, "batch_size: expected a number from 1 .* got 0 and 3 thunks"),
        (0, 3, 4, "batch_size: expected a number from 1 .* got 4 and 3 thunks"),
        (0, 0, 1, "batch_size: expected a number from 1 .* got 1 and 0 thunks"),
        (-1, 3, 1, "step: expected a number >= 0, got -1"),
    ],
)
def test_bad_arguments_run_nothing(step, number, batch_size, message):
    counts, thunks = counters(number)
    with pytest.raises(ValueError, match=message):
        batch_execute(step, thunks, batch_size)
    assert not any(counts)


# Inverses, spread over steps.


@pytest.fixture
def estimators(float64):
    """Two estimators that have seen the same two batches and refreshed after the first."""
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        layers = LayerCollection(model)
        layers.auto_register_layers()
        layers.register_categorical_predictive_distribution()
        estimator = FisherEstimator(None, 0.9, 0.1, layers, estimation_mode="exact")
        model(torch.randn(8, 4))
        estimator.update_covariances()
        estimator.update_inverses()
        model(3 * torch.randn(8, 4))
        estimator.update_covariances()
        made.append(estimator)
    return made


def products(estimator):
    params = estimator.layers.registered_variables
    return [product for product, _ in estimator.multiply_inverse([(p, p) for p in params])]


@pytest.mark.parametrize("spread", ["queue", "round robin"])
def test_a_pass_over_the_thunks_refreshes_every_inverse(estimators, spread):
    at_once, in_turn = estimators
    stale = products(in_turn)
    at_once.update_inverses()
    thunks = in_turn.inv_update_thunks
    queue = OpQueue(thunks, seed=0)
    for step in range(len(thunks)):
        # Something is stale until the pass is complete.
        fresh = zip(products(in_turn), products(at_once), strict=True)
        assert not all(torch.allclose(x, y, rtol=1e-9) for x, y in fresh)
        if spread == "queue":
            queue.next_op()()
        else:
            batch_execute(step, thunks, 1)
    for product, expected, old in zip(
        products(in_turn), products(at_once), stale, strict=True
    ):
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(product, old)


def test_an_optimizer_whose_inverses_are_refreshed_in_turn():
    """Each thunk changes the inverse of its own factor alone, in the plain loop too."""
    x, y = torch.randn(16, 4), torch.randint(3, (16,))

    def run(invert_every, spread):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = KFAC(
            model, "categorical", lr=0.1, damping=0.1, invert_every=invert_every
        )
        thunks = optimizer.estimator.inv_update_thunks
        changed = []
        for step in range(7):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            before = inverses(optimizer)
            if spread:
                batch_execute(step, thunks, spread)
            pairs = zip(before, inverses(optimizer), strict=True)
            changed.append([i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)])
        return changed

    def inverses(optimizer):
        return [
            factor.get_inverse(damping).clone()
            for block in optimizer.estimator.blocks.values()
            for factor, damping in zip(block.factors, block._damping_funcs(), strict=True)
        ]

    never = Refresh(every=10**6, early=3)
    # Steps 0 to 2 have refreshed everything themselves; then each in its turn.
    assert run(never, 1)[3:] == [[3], [0], [1], [2]]
    assert run(never, 2)[3:] == [[2, 3], [0, 1], [2, 3], [0, 1]]
    assert run(never, 0) == [[]] * 7
