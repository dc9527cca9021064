"""What a real training loop does to a model, and what the factors must make of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfac_torch import KFAC, QModel

pytestmark = pytest.mark.usefixtures("float64")


class Tokens(nn.Module):
    """A linear layer over tokens, `[B T, classes]`: nothing is approximate here."""

    def __init__(self, embedding=False):
        super().__init__()
        self.embedding = nn.Embedding(7, 3) if embedding else nn.Identity()
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        return self.fc(self.embedding(x)).flatten(0, -2)


def make(model, loss="categorical", **kwargs):
    return KFAC(model, loss, lr=0.1, damping=0.1, **kwargs)


def covs(optimizer):
    return [
        factor.get_cov()
        for block in optimizer.estimator.blocks.values()
        for factor in block.factors
    ]


def locations(optimizer):
    return [block.num_locations for block in optimizer.estimator.blocks.values()]


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


REAL = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()


def statistics(model, criterion, batches, **kwargs):
    """Factors and T after forwards and backwards over batches."""
    optimizer = make(model, criterion, **kwargs)
    for x, y in batches:
        criterion(model(x), y.flatten()).backward()
    optimizer.close()
    assert optimizer.estimator.update_covariances() == []
    return covs(optimizer), locations(optimizer)


@pytest.mark.parametrize("mode", ["exact", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("embedding", [False, True])
def test_ignored_tokens_are_as_if_they_were_not_there(mode, reduction, embedding):
    model, y = Tokens(embedding), torch.randint(4, (2, 5))
    x = torch.randint(7, (2, 5)) if embedding else torch.randn(2, 5, 3)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    padded = [(x, torch.where(REAL, y, -100))]
    short = [(x[REAL][None], y[REAL])]
    found = [
        statistics(model, criterion, batch, estimation_mode=mode)
        for batch in (padded, short)
    ]
    close(*found)


def test_sampled_statistics_leave_ignored_tokens_out():
    model, x = Tokens(), torch.randn(2, 5, 3)
    y = torch.where(REAL, torch.randint(4, (2, 5)), -100)
    (A, G), (T,) = statistics(model, nn.CrossEntropyLoss(), [(x, y)])
    rows = torch.cat([x[REAL], torch.ones(7, 1)], 1)
    close(A, rows.T @ rows / 7)
    assert T == 1
    # Sampled targets of seven tokens: every row's gradient sums to 0, its square is known.
    close(G.sum(0), torch.zeros(4))
    assert 0 < G.trace() < 2


def test_a_token_that_is_certain_counts_though_it_has_no_gradient():
    model = Tokens()
    with torch.no_grad():
        model.fc.bias[0] += 1000  # certain of the right class: no gradient at all
    x, y = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)
    y[0, 0] = 1
    _, (T,) = statistics(model, nn.CrossEntropyLoss(), [(x, y)], estimation_mode="exact")
    assert T == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_and_label_smoothing(smoothing, reduction):
    """The Fisher of `Σ_n w_n F_n/Σ_n w_y`, with `w_n = (1 − ε) w_y + ε mean(w)`."""
    model, x, y = Tokens(), torch.randn(1, 6, 3), torch.tensor([0, 3, 1, 1, -100, 2])
    w = torch.tensor([0.5, 1.0, 2.0, 3.0])
    criterion = nn.CrossEntropyLoss(w, reduction=reduction, label_smoothing=smoothing)
    optimizer = make(model, criterion, estimation_mode="exact")
    z = model(x)
    criterion(z, y).backward()
    optimizer.estimator.update_covariances()
    (_, G), (T,) = covs(optimizer), locations(optimizer)
    optimizer.close()
    p, real = z.detach().softmax(-1), y >= 0
    own = w[y.clamp(min=0)] * real
    weights = ((1 - smoothing) * own + smoothing * w.mean()) * real
    F_z = torch.einsum(
        "n,nij->ij", weights, torch.diag_embed(p) - p[:, :, None] * p[:, None]
    )
    close(T * G, F_z / own.sum())


def test_weights_of_binary_targets():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    y = torch.randint(2, (5, 2)).double()
    weight, pos_weight = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.5])
    criterion = nn.BCEWithLogitsLoss(weight, pos_weight=pos_weight)
    optimizer = make(model, criterion, estimation_mode="exact")
    z = model(x)
    criterion(z, y).backward()
    optimizer.estimator.update_covariances()
    (_, G), (T,) = covs(optimizer), locations(optimizer)
    optimizer.close()
    p = z.detach().sigmoid()
    weights = torch.where(y > 0, pos_weight, 1.0) * weight
    close(T * G, torch.diag((weights * p * (1 - p)).mean(0)) / 2)


def test_the_quadratic_model_leaves_ignored_tokens_out():
    x, y = torch.randn(2, 5, 3), torch.randint(4, (2, 5))
    start = Tokens().state_dict()
    steps = []
    for batch in ((x, torch.where(REAL, y, -100)), (x[REAL][None], y[REAL])):
        model = Tokens()
        model.load_state_dict(start)
        optimizer = KFAC(
            model,
            nn.CrossEntropyLoss(),
            damping=0.1,
            momentum_type="qmodel",
            estimation_mode="exact",
        )
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1].flatten()).backward()
            optimizer.step()
        optimizer.close()
        steps.append([p.detach() for p in model.parameters()])
    close(*steps)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant=False):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        if self.use_reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)

    def inner(self, x):
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("mode", ["exact", "gradients", "empirical"])
def test_activation_checkpoints_change_nothing(mode):
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    start, found = Checkpointed().state_dict(), []
    for use_reentrant in (None, False):
        model = Checkpointed(use_reentrant)
        model.load_state_dict(start)
        optimizer = make(model, nn.CrossEntropyLoss(), estimation_mode=mode)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append([*model.parameters(), *covs(optimizer)])
        optimizer.close()
    close(*found)


@pytest.mark.parametrize("hidden", ["all", "some"])
def test_a_reentrant_checkpoint_is_named(hidden):
    model = Checkpointed(use_reentrant=True)
    if hidden == "some":
        model = nn.Sequential(nn.Linear(3, 3), model)
    optimizer = make(model)
    z = model(torch.randn(6, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        F.cross_entropy(z, torch.zeros(6, dtype=torch.long)).backward()
        optimizer.step()
    optimizer.close()


def net():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


@pytest.mark.parametrize(
    "momentum_type", ["regular", "qmodel", QModel(batch_fraction=0.5, min_terms=1)]
)
def test_a_compiled_model_makes_the_same_steps(momentum_type):
    x, y, start, found = torch.randn(6, 3), torch.randint(4, (6,)), net().state_dict(), []
    lr = 0.1 if momentum_type == "regular" else None
    for compiled in (False, True):
        model = net()
        model.load_state_dict(start)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = KFAC(
            called,
            "categorical",
            lr=lr,
            damping=0.1,
            momentum_type=momentum_type,
            cov_update_every=2,
        )
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(called(x), y).backward()
            optimizer.step()
        assert list(optimizer.estimator.blocks) == ["0", "2"]
        found.append([*model.parameters(), *covs(optimizer)])
        optimizer.close()
    close(*found)


def test_a_compiled_model_has_statistics_of_part_of_the_batch():
    start, found = net().state_dict(), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = net()
        model.load_state_dict(start)
        called = torch.compile(model, backend="eager") if compiled else model
        optimizer = KFAC(called, "categorical")
        for _ in range(3):  # the first batch is taken whole
            x, y = torch.randn(520, 3), torch.randint(4, (520,))
            optimizer.zero_grad()
            F.cross_entropy(called(x), y).backward()
            optimizer.step()
        found.append([*model.parameters(), *covs(optimizer)])
        optimizer.close()
    close(*found)


def test_a_compiled_model_is_compiled_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model = torch.compile(net(), backend=backend)
    optimizer = KFAC(model, "categorical")
    for _ in range(14):  # with statistics, without, on a whole batch and on part of one
        optimizer.zero_grad()
        x, y = torch.randn(520, 3), torch.randint(4, (520,))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.close()
    assert len(graphs) == 1


def test_a_forward_of_a_model_that_was_compiled_elsewhere_is_missed_with_a_word():
    model = net()
    optimizer = make(model)
    called = torch.compile(model, backend="aot_eager")
    F.cross_entropy(called(torch.randn(6, 3)), torch.zeros(6, dtype=torch.long)).backward()
    with pytest.raises(RuntimeError, match=r"torch\.compile.*give KFAC the compiled"):
        optimizer.step()
    optimizer.close()


def test_a_step_that_never_came_has_no_part_in_the_next():
    """As a `GradScaler` leaves out a step after an overflow."""
    model, x, y = net(), torch.randn(6, 3), torch.randint(4, (6,))
    optimizer = make(model, estimation_mode="exact")
    F.cross_entropy(model(torch.full((6, 3), torch.nan)), y).backward()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.close()
    assert optimizer.skipped_steps == 0
    rows = torch.cat([x, torch.ones(6, 1)], 1)
    close(covs(optimizer)[0], rows.T @ rows / 6)


def test_zero_grad_between_forward_and_backward():
    model, x, y = net(), torch.randn(6, 3), torch.randint(4, (6,))
    optimizer = make(model, estimation_mode="exact")
    for _ in range(2):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.close()
    assert optimizer.skipped_steps == 0
    rows = torch.cat([x, torch.ones(6, 1)], 1)
    close(covs(optimizer)[0], rows.T @ rows / 6)


def test_a_forward_without_a_backward_has_no_part_beside_one_with():
    model, x, y = net(), torch.randn(6, 3), torch.randint(4, (6,))
    optimizer = make(model, estimation_mode="exact")
    for _ in range(3):
        model(torch.randn(6, 3))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.close()
    rows = torch.cat([x, torch.ones(6, 1)], 1)
    close(covs(optimizer)[0], rows.T @ rows / 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype):
    torch.set_default_dtype(torch.float32)
    model, x = net(), torch.randn(64, 3)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    optimizer.close()
    assert losses[-1] < 0.5 * losses[0]
    assert all(cov.dtype == torch.float32 for cov in covs(optimizer))
