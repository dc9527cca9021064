"""The noise meter: 0 where batches are one and the same, 1 where they share nothing."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from kfac_torch import KFAC, QModel
from kfac_torch.gradient_noise import GradientNoise, fingerprint
from kfac_torch.options import TrustRegion

pytestmark = pytest.mark.usefixtures("float64")
EXACT = QModel.exact()
AVERAGED = replace(EXACT, average_gradients=True)
SMALL = {"damping": 0.1, "norm_constraint": TrustRegion(fraction=1e-3)}


def train(model, batches, momentum_type=AVERAGED, **options):
    optimizer = KFAC(model, "normal", momentum_type=momentum_type, **{**SMALL, **options})
    records = []
    for x, y in batches:
        optimizer.zero_grad()
        (0.5 * mse_loss(model(x), y, reduction="sum") / len(x)).backward()
        optimizer.step()
        records.append(optimizer.last_step)
    return records


def linear():
    return nn.Linear(4, 2)


def test_a_quadratic_loss_of_one_batch_has_no_noise():
    """There the model foresees the slope exactly."""
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    records = train(linear(), [(x, y)] * 6)
    assert records[0].gradient_noise is None
    for record in records[2:]:
        assert record.gradient_noise < 1e-12


def test_without_noise_averaging_changes_nothing():
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    model = linear()
    twin = linear()
    twin.load_state_dict(model.state_dict())
    train(model, [(x, y)] * 6)
    train(twin, [(x, y)] * 6, EXACT)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_batches_that_share_nothing_are_noise():
    """Targets of mean 0 where the model already is: what a batch asks for is its own."""
    model = linear()
    for p in model.parameters():
        nn.init.zeros_(p)
    batches = [(torch.randn(20, 4), torch.randn(20, 2)) for _ in range(60)]
    records = train(model, batches)
    late = torch.stack([record.gradient_noise for record in records[20:]])
    assert late.mean() > 0.6
    assert late.max() <= 1


def test_the_fraction_by_hand():
    one = torch.tensor(1.0)
    noise = GradientNoise().after(-2 * one, 0.5 * one)
    assert noise.fraction is None
    noise = noise.seen(-1.0 * one)  # expected was −1.5: a quarter of 2 was noise
    torch.testing.assert_close(noise.fraction, 0.2 * 0.25 * one)
    again = noise.after(-one, 0 * one).seen(5 * one)  # no more than 1
    torch.testing.assert_close(again.fraction, 0.8 * noise.fraction + 0.2)
    better = noise.after(-one, 0 * one).seen(-3 * one)  # no less than 0
    torch.testing.assert_close(better.fraction, 0.8 * noise.fraction)
    assert not noise.after(0 * one, 0 * one).seen(one).fraction > noise.fraction


def test_the_average_by_hand():
    g, m = [torch.tensor([1.0, 3.0])], [torch.tensor([3.0, 3.0])]
    found = GradientNoise(torch.tensor(0.5)).averaged(g, m)
    torch.testing.assert_close(found, [torch.tensor([2.0, 3.0])])
    found = GradientNoise(torch.tensor(1.0)).averaged(g, m)  # a gradient always enters
    torch.testing.assert_close(found, [torch.tensor([0.7 * 3 + 0.3, 3.0])])
    first = GradientNoise().averaged(g, m)[0]
    assert torch.equal(first, g[0])
    assert first.data_ptr() != g[0].data_ptr()  # or zero_grad would clear it


def test_what_is_kept_is_apart_from_the_gradients():
    """`zero_grad(set_to_none=False)` writes into them."""
    ends = []
    data = [(torch.randn(20, 4), torch.randn(20, 2)) for _ in range(8)]
    start = linear().state_dict()
    for to_none in (True, False):
        model = linear()
        model.load_state_dict(start)
        optimizer = KFAC(model, "normal", momentum_type=AVERAGED, **SMALL)
        for x, y in data:
            optimizer.zero_grad(set_to_none=to_none)
            (0.5 * mse_loss(model(x), y, reduction="sum") / len(x)).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_without_noise_the_whole_batch_makes_the_quadratic_model_later():
    """And the momentum may be larger; a look is taken at every tenth step from 60 on."""
    little, much = (GradientNoise(torch.tensor(fraction)) for fraction in (0.05, 0.5))
    assert [
        little.looked_at(step, lambda: None).negligible for step in (59, 60, 61, 70)
    ] == [
        False,
        True,
        False,
        True,
    ]
    assert not much.looked_at(60, lambda: None).negligible
    known = little.looked_at(60, lambda: None).after(-torch.ones(()), torch.zeros(()))
    assert (
        known.seen(torch.ones(())).looked_at(61, lambda: None).negligible
    )  # until the next look
    assert not known.seen(torch.ones(())).looked_at(70, lambda: None).negligible
    x, y = torch.randn(20, 4), torch.randn(20, 2)
    model, seen = linear(), []
    optimizer = KFAC(
        model,
        "normal",
        momentum_type=QModel(batch_fraction=0.25, min_terms=1),
        norm_constraint=TrustRegion(fraction=1e-6),  # far from the minimum to the end
    )
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for step in range(62):
        optimizer.zero_grad()
        (0.5 * mse_loss(model(x), y, reduction="sum") / len(x)).backward()
        seen.clear()
        optimizer.step()
        assert (min(seen) == len(x)) == (step > 60)


def test_a_fingerprint_is_that_of_the_examples_in_any_order():
    x, y = torch.randn(50, 4, dtype=torch.float32), torch.randint(9, (50, 3))
    order = torch.randperm(50)
    here, there = fingerprint([x, {"y": y}]), fingerprint([x[order], {"y": y[order]}])
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)
    one_hot = torch.eye(9)[y]  # of which all norms are alike
    for another in (torch.randn_like(x), 1.001 * x):
        assert (fingerprint([another, y]) - fingerprint([x, y])).norm() > 1e-4
    shifted = torch.eye(9)[(y + 1) % 9]
    assert (fingerprint([one_hot]) - fingerprint([shifted])).norm() > 1e-4
    nested = torch.nested.nested_tensor([x[:2], x[:3]], layout=torch.jagged)
    assert fingerprint([3, None, torch.zeros(0), torch.eye(3).to_sparse(), nested]) is None
    assert fingerprint([torch.tensor(2.0), torch.ones(2, 1) * 1j]).isfinite().all()


@pytest.mark.parametrize("repeats", [True, False])
def test_a_batch_that_repeats_is_seen_where_the_model_is_of_a_part(monkeypatch, repeats):
    """Of a part, ν is far from 0 however often the batch comes again."""
    monkeypatch.setattr("kfac_torch.gradient_noise._FIRST_LOOK", 10)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    x, y = torch.randn(64, 6), torch.randn(64, 2)
    batches = [
        (x[order], y[order]) if repeats else (torch.randn(64, 6), torch.randn(64, 2))
        for order in (torch.randperm(64) for _ in range(40))
    ]
    optimizer = KFAC(
        model, "normal", momentum_type=QModel(batch_fraction=1 / 16, min_terms=1)
    )
    seen = []
    for a, b in batches:
        optimizer.zero_grad()
        (0.5 * mse_loss(model(a), b, reduction="sum") / len(a)).backward()
        optimizer.step()
        seen.append(optimizer._updates.noise.repeats)
    assert not any(seen[:10])
    assert seen[10:] == [repeats] * 30


def test_batches_that_come_in_turn_do_not_repeat(monkeypatch):
    monkeypatch.setattr("kfac_torch.gradient_noise._FIRST_LOOK", 10)
    model = linear()
    ten = [(torch.randn(20, 4), torch.randn(20, 2)) for _ in range(10)]
    optimizer = KFAC(model, "normal", momentum_type=AVERAGED, **SMALL)
    for x, y in 3 * ten:
        optimizer.zero_grad()
        (0.5 * mse_loss(model(x), y, reduction="sum") / len(x)).backward()
        optimizer.step()
        assert not optimizer._updates.noise.repeats
