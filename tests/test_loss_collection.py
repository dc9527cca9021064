import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from loss_cases import Poisson, PseudoHuber, close
from torch import Tensor, nn
from torch.nn import functional

from kfac_torch.loss_collection import LossCollection, find_output
from kfac_torch.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss as Categorical,
    MultiBernoulliNegativeLogProbLoss as MultiBernoulli,
    NormalMeanNegativeLogProbLoss as NormalMean,
    NormalMeanVarianceNegativeLogProbLoss as NormalMeanVariance,
    Objective,
    OnehotCategoricalLogitsNegativeLogProbLoss as OnehotCategorical,
)

pytestmark = pytest.mark.usefixtures("float64")

LOG_2PI = math.log(2 * math.pi)
REGISTER = {
    "categorical_predictive_distribution": Categorical,
    "onehot_categorical_predictive_distribution": OnehotCategorical,
    "softmax_cross_entropy_loss": Categorical,
    "normal_predictive_distribution": NormalMean,
    "squared_error_loss": NormalMean,
    "normal_mean_variance_predictive_distribution": NormalMeanVariance,
    "multi_bernoulli_predictive_distribution": MultiBernoulli,
    "sigmoid_cross_entropy_loss": MultiBernoulli,
}


def test_the_categorical_value_of_the_lineage():
    losses = LossCollection()
    losses.register_categorical_predictive_distribution()
    logits, targets = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1])
    # Over there a loss is a sum over the batch, here the mean over its terms.
    ((loss, _),) = losses.losses(logits)
    close(loss.evaluate_on_targets(targets), 1.6265233, atol=1e-7)
    close(losses.eval_losses(logits, targets)["loss"], 1.6265233 / 2, atol=1e-7)
    close(losses.total_loss(logits, targets), 1.6265233 / 2, atol=1e-7)


def test_the_normal_value_of_the_lineage():
    losses = LossCollection()
    losses.register_normal_predictive_distribution(var=4)
    mean = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    targets = torch.tensor([[3.0, 1.0], [4.0, 2.0]])
    ((loss, _),) = losses.losses(mean)
    ulp = 2**-21  # of the lineage's value, which is a float32
    close(loss.evaluate_on_targets(targets), 7.6983433, atol=ulp)
    close(losses.eval_losses(mean, targets)["loss"], 7.6983433 / 2, atol=ulp)
    close(losses.total_loss(mean, targets), 7.6983433 / 2, atol=ulp)


VALUES = {
    "categorical_predictive_distribution": (
        torch.tensor([0, 1]),
        functional.cross_entropy,
    ),
    "onehot_categorical_predictive_distribution": (
        torch.eye(4)[:2],
        functional.cross_entropy,
    ),
    "softmax_cross_entropy_loss": (torch.tensor([3, 1]), functional.cross_entropy),
    "normal_predictive_distribution": (
        torch.ones(2, 4),
        lambda z, y: (y - z).square().sum(1).mean() + 2 * math.log(math.pi),
    ),
    "squared_error_loss": (
        torch.ones(2, 4),
        lambda z, y: (y - z).square().sum(1).mean() + 2 * math.log(math.pi),
    ),
    "normal_mean_variance_predictive_distribution": (
        torch.ones(2, 2),
        lambda z, y: (
            ((y - z[:, :2]).square() / (2 * z[:, 2:]) + (z[:, 2:].log() + LOG_2PI) / 2)
            .sum(1)
            .mean()
        ),
    ),
    "multi_bernoulli_predictive_distribution": (
        torch.eye(4)[:2],
        lambda z, y: 4 * functional.binary_cross_entropy_with_logits(z, y),
    ),
    "sigmoid_cross_entropy_loss": (
        torch.eye(4)[:2],
        lambda z, y: 4 * functional.binary_cross_entropy_with_logits(z, y),
    ),
}


@pytest.mark.parametrize("method", REGISTER)
def test_every_registration(method):
    """The loss, its mean over terms and its weight, alone and found in a dict."""
    z = torch.rand(2, 4) + 0.1
    targets, criterion = VALUES[method]
    targets = targets.to(z.dtype) if targets.is_floating_point() else targets
    for where, output in ((None, z), ("head", {"head": z}), (1, (None, z))):
        losses = LossCollection()
        getattr(losses, f"register_{method}")(where, coeff=0.25, name="the loss")
        ((loss, coeff),) = losses.losses(output)
        assert type(loss) is REGISTER[method]
        assert coeff == 0.25
        assert loss.num_terms == 2
        close(losses.eval_losses(output, targets)["the loss"], criterion(z, targets))
        close(losses.total_loss(output, targets), 0.25 * criterion(z, targets))


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("categorical", Categorical),
        ("bernoulli", MultiBernoulli),
        (nn.MSELoss(), NormalMean),
        (Poisson, Poisson),
        (lambda z: PseudoHuber(z, torch.zeros_like(z)), PseudoHuber),
        (Objective(Poisson, scale=3.0), Poisson),
    ],
)
def test_any_loss(loss, kind):
    losses = LossCollection()
    losses.register_loss_function(loss, coeff=2.0)
    z = torch.ones(3, 5)
    ((made, coeff),) = losses.losses(z)
    assert type(made) is kind
    scale = {nn.MSELoss: 2 / 5, Objective: 3.0}.get(type(loss), 1.0)
    assert coeff == pytest.approx(2 * scale)
    if isinstance(loss, nn.MSELoss):  # a square summed over outputs, weighted by 2/D
        constant = coeff * 5 * LOG_2PI / 2
        close(losses.total_loss(z, torch.zeros(3, 5)), 2 * loss(z, z * 0) + constant)


@dataclass
class Heads:
    label: Tensor
    box: Tensor
    seen: Tensor


PLACES = {
    "dict": (lambda z: z, ("label", "box", "seen")),
    "dataclass": (lambda z: Heads(**z), ("label", "box", "seen")),
    "namespace": (lambda z: SimpleNamespace(**z), ("label", "box", "seen")),
    "tuple": (lambda z: tuple(z.values()), (0, 1, 2)),
    "list": (lambda z: [*z.values()], (0, 1, -1)),
    "nested": (
        lambda z: ({"a": z["label"]}, [z["box"], z["seen"]]),
        (lambda o: o[0]["a"], lambda o: o[1][0], lambda o: o[1][1]),
    ),
}


@pytest.mark.parametrize("kind", PLACES)
def test_several_losses(kind):
    """Three heads with numbers of loss terms and weights of their own."""
    pack, (label, box, seen) = PLACES[kind]
    z = {"label": torch.randn(2, 3, 5), "box": torch.randn(2, 4), "seen": torch.randn(7, 1)}
    y = {
        "label": torch.randint(5, (2, 3)),
        "box": torch.randn(2, 4),
        "seen": torch.ones(7, 1),
    }
    losses = LossCollection()
    losses.register_softmax_cross_entropy_loss(label, coeff=2.0, name="label")
    losses.register_normal_predictive_distribution(box, 1.0, coeff=0.5, name="box")
    losses.register_sigmoid_cross_entropy_loss(seen, name="seen")
    output = pack(z)
    assert [loss.num_terms for loss, _ in losses.losses(output)] == [6, 2, 7]
    assert [coeff for _, coeff in losses.losses(output)] == [2.0, 0.5, 1.0]
    expected = {
        "label": functional.cross_entropy(z["label"].flatten(0, 1), y["label"].flatten()),
        "box": (z["box"] - y["box"]).square().sum(1).mean() / 2 + 2 * LOG_2PI,
        "seen": functional.binary_cross_entropy_with_logits(z["seen"], y["seen"]),
    }
    for targets in (y, [*y.values()], tuple(y.values())):
        values = losses.eval_losses(output, targets)
        assert list(values) == ["label", "box", "seen"]
        for name, value in values.items():
            close(value, expected[name])
        total = 2 * expected["label"] + 0.5 * expected["box"] + expected["seen"]
        close(losses.total_loss(output, targets), total)


def test_losses_at_drawn_targets():
    """Weighted by the root, so that the square of the gradient has the weight."""
    z = {"a": torch.randn(3, 4), "b": torch.randn(3, 2)}
    losses = LossCollection()
    losses.register_categorical_predictive_distribution("a", coeff=9.0)
    losses.register_squared_error_loss("b", coeff=0.25)

    def generator():
        return torch.Generator().manual_seed(3)

    before = torch.get_rng_state()
    values = losses.eval_losses_on_samples(z, generator())
    draws = generator()
    made = [loss for loss, _ in losses.losses(z)]
    for loss, value in zip(made, values.values(), strict=True):
        close(value, loss.evaluate_on_targets(loss.sample(draws)) / 3)
    close(losses.total_sampled_loss(z, generator()), 3 * values["a"] + 0.5 * values["b"])
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("coeff", [0.04, 1.0, 4.0])
def test_the_second_moment_of_a_sampled_gradient_is_the_weighted_fisher(coeff):
    losses = LossCollection()
    losses.register_squared_error_loss(coeff=coeff)
    N, generator = 20000, torch.Generator().manual_seed(0)
    z = torch.zeros(N, 1, requires_grad=True)
    (g,) = torch.autograd.grad(losses.total_sampled_loss(z, generator), z)
    ((loss, weight),) = losses.losses(z.detach())
    fisher = weight * loss.multiply_fisher(torch.ones(N, 1))[0, 0]
    assert fisher.item() == 2 * coeff
    assert (N * g).square().mean().item() == pytest.approx(2 * coeff, rel=0.03)


def test_a_loss_without_a_distribution_has_no_samples():
    losses = LossCollection()
    losses.register_loss_function(lambda z: PseudoHuber(z, z * 0), name="robust")
    with pytest.raises(
        TypeError, match=r"loss robust: expected a NegativeLogProbLoss, .*Huber"
    ):
        losses.eval_losses_on_samples(torch.ones(2, 3))


def test_names():
    losses = LossCollection()
    losses.register_squared_error_loss()
    losses.register_squared_error_loss(1)
    losses.register_squared_error_loss("box")
    losses.register_squared_error_loss("box", name="again")
    names = [entry.name for entry in losses.registered_losses]
    assert names == ["loss", "loss_1", "box", "again"]
    with pytest.raises(
        ValueError, match=r"loss box: expected a name .*'again'\]; pass name="
    ):
        losses.register_squared_error_loss("box")
    assert len(losses.registered_losses) == 4


@pytest.mark.parametrize("coeff", [0, -1.0, math.nan])
def test_a_weight_is_positive(coeff):
    losses = LossCollection()
    with pytest.raises(ValueError, match=r"coeff: expected a positive number, got"):
        losses.register_squared_error_loss(coeff=coeff)
    assert not losses.registered_losses


def test_what_cannot_be_registered():
    losses = LossCollection()
    with pytest.raises(ValueError, match="hinge"):
        losses.register_loss_function("hinge")
    losses.register_squared_error_loss()
    with pytest.raises(ValueError, match="loss_1: expected several losses to be means"):
        losses.register_loss_function(nn.CrossEntropyLoss(reduction="sum"))
    summed = LossCollection()
    summed.register_loss_function(nn.CrossEntropyLoss(reduction="sum"))
    assert summed.reduction == "sum"
    with pytest.raises(ValueError, match="loss_1: expected several losses to be means"):
        summed.register_squared_error_loss()


def test_targets_that_do_not_fit():
    losses = LossCollection()
    losses.register_squared_error_loss("a")
    losses.register_squared_error_loss("b")
    z = {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}
    for targets, got in (
        (z["a"], "got 1"),
        ([z["a"]] * 3, "got 3"),
        ({"a": z["a"]}, "'a'"),
        (None, "got NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"targets: expected .*\['a', 'b'\].*{got}"):
            losses.eval_losses(z, targets)


@pytest.mark.parametrize(
    "call",
    [
        lambda losses: losses.check_losses(),
        lambda losses: losses.eval_losses(torch.ones(1, 1), torch.ones(1, 1)),
        lambda losses: losses.total_sampled_loss(torch.ones(1, 1)),
    ],
)
def test_no_losses(call):
    with pytest.raises(ValueError, match="no loss is registered: call a register_"):
        call(LossCollection())


@pytest.mark.parametrize(
    ("output", "where", "message"),
    [
        ({"a": torch.ones(1)}, "b", "output='b' does not fit .* a dict: 'b'"),
        ((torch.ones(1),), 1, "output=1 does not fit .* a tuple"),
        (SimpleNamespace(), "z", "output='z' does not fit .* a SimpleNamespace"),
        ((torch.ones(1),), None, "expected the model to return .* a tensor, got tuple"),
        ({"a": 1.0}, "a", "expected the model to return .* a tensor, got float"),
    ],
)
def test_outputs_that_are_not_there(output, where, message):
    with pytest.raises(ValueError, match=message):
        find_output(output, where)


def test_logits_are_found_by_themselves():
    z = torch.zeros(2, 3)

    @dataclass
    class Output:
        logits: torch.Tensor
        hidden: torch.Tensor | None = None

    assert find_output({"logits": z, "hidden": 1}, None) is z
    assert find_output(Output(z), None) is z
    assert find_output(z, None) is z
    with pytest.raises(ValueError, match="expected the model to return its network output"):
        find_output({"scores": z}, None)
    with pytest.raises(ValueError, match="expected the model to return its network output"):
        find_output((z, z), None)
