"""Curvature products against dense matrices by automatic differentiation."""

import itertools

import pytest
import torch
from loss_cases import ALL, NEGATIVE_LOG_PROB, WITH_HESSIAN, close, dense, positive_variance
from torch import nn
from torch.func import functional_call, jacrev

from kfac_torch.curvature_products import (
    CurvatureMatrixVectorProductComputer,
    fisher_factor_product,
    fisher_factor_transpose_products,
    fisher_vector_product,
    ggn_vector_product,
    hessian_vector_product,
)
from kfac_torch.loss_functions import (
    CategoricalLogitsNegativeLogProbLoss,
    NegativeLogProbLoss,
    NormalMeanNegativeLogProbLoss,
    NormalMeanVarianceNegativeLogProbLoss,
)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.cell = nn.GRUCell(2, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, tokens):
        xs = self.embedding(tokens)
        h = xs.new_zeros(len(tokens), 3)
        for x in xs.unbind(1):
            h = self.cell(x, h)
        return self.head(h)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(5, 3)


def conv_net():
    layers = (nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(inplace=True))
    tail = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4, bias=False))
    return nn.Sequential(*layers, *tail), torch.randn(3, 2, 8, 8)


def recurrent_net():
    return Recurrent(), torch.randint(5, (3, 4))


NETS = {"mlp": mlp, "conv": conv_net, "embedding and GRU": recurrent_net}


class Problem:
    """A network, a loss, and the dense matrices of both."""

    def __init__(self, net, kind):
        self.model, self.x = NETS[net]()
        self.params = {n: p.detach() for n, p in self.model.named_parameters()}
        variance = kind == "mean and variance"
        self.link = positive_variance if variance else (lambda z: z)
        self.make = NormalMeanVarianceNegativeLogProbLoss.from_output
        self.make = self.make if variance else ALL[kind]
        z = self.f(self.params)
        at_z = self.make(z)
        self.targets = at_z.sample() if kind in NEGATIVE_LOG_PROB else torch.randn_like(z)
        self.at_z = self.loss(z)
        self.J = self.flat(jacrev(self.f)(self.params), z.dim()).view(z.numel(), -1)
        self.B = dense(
            self.at_z.multiply_fisher_factor, self.at_z.fisher_factor_inner_shape
        )

    def f(self, params):
        return self.link(functional_call(self.model, params, (self.x,)))

    def loss(self, z):
        return self.make(z, self.targets)

    def computer(self):
        tensors = list(self.model.parameters())
        return CurvatureMatrixVectorProductComputer(
            [self.loss(self.link(self.model(self.x)))], tensors
        )

    def vector(self):
        return {name: torch.randn_like(p) for name, p in self.params.items()}

    def flat(self, params, leading=0):
        leaves = params.values() if isinstance(params, dict) else params
        return torch.cat([leaf.flatten(leading) for leaf in leaves], -1)

    def unflat(self, vector):
        split = vector.split([p.numel() for p in self.params.values()])
        pairs = zip(self.params.items(), split, strict=True)
        return {name: part.view_as(p) for (name, p), part in pairs}

    def hessian(self):
        theta = self.flat(self.params)
        return torch.func.jacrev(
            jacrev(lambda theta: self.loss(self.f(self.unflat(theta))).evaluate())
        )(theta)


pytestmark = pytest.mark.usefixtures("float64")
every_net = pytest.mark.parametrize("net", NETS)


@every_net
@pytest.mark.parametrize("kind", ALL)
def test_products_of_the_fisher_or_gauss_newton_matrix(net, kind):
    problem = Problem(net, kind)
    C = problem.J.T @ problem.B
    v, u = problem.vector(), torch.randn(problem.at_z.fisher_factor_inner_shape)
    flat_v, vecs = problem.flat(v), list(v.values())
    computer = problem.computer()
    spellings = ["fisher"] if kind in NEGATIVE_LOG_PROB else []
    spellings += ["generalized_gauss_newton"] if kind in WITH_HESSIAN else []
    for name in spellings:
        product = getattr(computer, f"multiply_{name}")(vecs)
        close(problem.flat(product), C @ (C.T @ flat_v))
        assert [p.shape for p in product] == [v.shape for v in vecs]
        product = getattr(computer, f"multiply_{name}_factor")([u])
        close(problem.flat(product), C @ u.flatten())
        product = getattr(computer, f"multiply_{name}_factor_transpose")(vecs)
        close(product[0].flatten(), C.T @ flat_v)
        assert getattr(computer, f"{name}_factor_inner_shapes") == [u.shape]
    assert spellings


@every_net
@pytest.mark.parametrize("kind", ALL)
def test_products_of_the_hessian(net, kind):
    problem = Problem(net, kind)
    v, H = problem.vector(), problem.hessian()
    expected = H @ problem.flat(v)
    product = problem.computer().multiply_hessian(list(v.values()))
    close(problem.flat(product), expected)
    product = hessian_vector_product(problem.f, problem.params, v, problem.loss)
    close(problem.flat(product), expected)


@every_net
@pytest.mark.parametrize("kind", ALL)
def test_products_of_a_functional_model(net, kind):
    problem = Problem(net, kind)
    f, params, loss = problem.f, problem.params, problem.loss
    C = problem.J.T @ problem.B
    p, q = problem.vector(), problem.vector()
    expected = C @ (C.T @ problem.flat(p))
    product = fisher_vector_product(f, params, p, loss)
    assert product.keys() == params.keys()
    close(problem.flat(product), expected)
    if kind in WITH_HESSIAN:
        close(problem.flat(ggn_vector_product(f, params, p, loss)), expected)
    u = torch.randn(problem.at_z.fisher_factor_inner_shape)
    close(problem.flat(fisher_factor_product(f, params, u, loss)), C @ u.flatten())
    both = fisher_factor_transpose_products(f, params, [p, q], loss)
    for product, vector in zip(both, (p, q), strict=True):
        assert product.shape == u.shape
        close(product.flatten(), C.T @ problem.flat(vector))


# The computer.


def test_the_factor_is_not_its_transpose():
    """With `J = I` the products are the loss's own: the lineage's numbers for `B`."""
    logits = torch.tensor([[1.0, 2, 3]], requires_grad=True)
    loss = CategoricalLogitsNegativeLogProbLoss(logits)
    computer = CurvatureMatrixVectorProductComputer([loss], [logits])
    v = torch.tensor([[1.0, 2, 3]])
    Bv = [[-0.036332158, 0.0750166779, -0.0386845199]]
    for name in ("fisher", "generalized_gauss_newton"):
        close(getattr(computer, f"multiply_{name}_factor")([v])[0], Bv)
    close(
        computer.multiply_fisher_factor_transpose([v])[0],
        [[-0.4726433733, -0.2845567978, 0.3464682023]],
    )
    close(computer.multiply_fisher([v])[0], [[-0.1418170936, -0.1407703575, 0.2825874511]])


def two_heads():
    """Two losses on one trunk, a head each, and a tensor that none depends on."""
    trunk, heads = nn.Linear(3, 4), [nn.Linear(4, 2), nn.Linear(4, 3)]
    h = trunk(torch.randn(5, 3)).tanh()
    losses = [
        NormalMeanNegativeLogProbLoss(heads[0](h), targets=torch.randn(5, 2)),
        CategoricalLogitsNegativeLogProbLoss(heads[1](h), torch.randint(3, (5,))),
    ]
    unused = torch.randn(7, requires_grad=True)
    tensors = [*trunk.parameters(), unused]
    tensors += [param for head in heads for param in head.parameters()]
    return losses, tensors


def test_several_losses_add_up_with_their_weights():
    losses, tensors = two_heads()
    coeffs = [0.5, 3.0]
    together = CurvatureMatrixVectorProductComputer(losses, tensors, coeffs)
    alone = [CurvatureMatrixVectorProductComputer([loss], tensors) for loss in losses]
    v = [torch.randn_like(t) for t in tensors]
    for name in ("fisher", "generalized_gauss_newton", "hessian"):
        parts = [getattr(computer, f"multiply_{name}")(v) for computer in alone]
        for i, product in enumerate(getattr(together, f"multiply_{name}")(v)):
            close(product, sum(c * part[i] for c, part in zip(coeffs, parts, strict=True)))
    inner = together.fisher_factor_inner_shapes
    assert inner == [torch.Size([5, 2]), torch.Size([5, 3])]
    # C Cᵀ v, the coefficients' roots in both, and ⟨u, Cᵀv⟩ = ⟨C u, v⟩.
    for name in ("fisher", "generalized_gauss_newton"):
        factor = getattr(together, f"multiply_{name}_factor")
        CTv = getattr(together, f"multiply_{name}_factor_transpose")(v)
        product = getattr(together, f"multiply_{name}")(v)
        for actual, expected in zip(factor(CTv), product, strict=True):
            close(actual, expected)
        u = [torch.randn(shape) for shape in inner]
        close(
            sum((a * b).sum() for a, b in zip(u, CTv, strict=True)),
            sum((a * b).sum() for a, b in zip(factor(u), v, strict=True)),
        )


@pytest.mark.parametrize("which", [slice(None), slice(2, 3)], ids=["of some", "of one"])
def test_a_tensor_that_no_loss_depends_on_gets_zeros(which):
    losses, tensors = two_heads()
    unused, tensors = tensors[2], tensors[which]
    at = next(i for i, tensor in enumerate(tensors) if tensor is unused)
    v = [torch.randn_like(t) for t in tensors]
    computer = CurvatureMatrixVectorProductComputer(losses, tensors)
    u = [torch.randn(shape) for shape in computer.fisher_factor_inner_shapes]
    for name in ("fisher", "generalized_gauss_newton", "hessian"):
        product = getattr(computer, f"multiply_{name}")(v)
        assert [bool(t.any()) for t in product] == [i != at for i in range(len(tensors))]
    assert not computer.multiply_fisher_factor(u)[at].any()
    tangents = computer.multiply_fisher_factor_transpose(v)
    assert [t.shape for t in tangents] == computer.fisher_factor_inner_shapes
    assert all(bool(t.any()) == (len(tensors) > 1) for t in tangents)


def test_the_hessian_of_a_linear_model_is_the_gauss_newton_matrix():
    x, w = torch.randn(6, 3), torch.randn(3, 2, requires_grad=True)
    loss = CategoricalLogitsNegativeLogProbLoss(x @ w, torch.randint(2, (6,)))
    computer = CurvatureMatrixVectorProductComputer([loss], [w])
    v = [torch.randn(3, 2)]
    close(computer.multiply_hessian(v)[0], computer.multiply_fisher(v)[0])


def test_a_loss_that_is_linear_in_a_tensor_has_no_curvature_there():
    w = torch.randn(3, requires_grad=True)

    class Linear(NormalMeanNegativeLogProbLoss):
        def evaluate_on_targets(self, targets):
            return self.inputs.sum()

    loss = Linear(torch.randn(4, 3) * w, targets=torch.zeros(4, 3))
    product = CurvatureMatrixVectorProductComputer([loss], [w]).multiply_hessian([w])
    assert not product[0].any()


def test_gradients_and_graph_are_left_alone():
    problem = Problem("mlp", "categorical")
    computer = problem.computer()
    v = list(problem.vector().values())
    first, second = computer.multiply_fisher(v), computer.multiply_fisher(v)
    with torch.no_grad():
        third, hessian = computer.multiply_fisher(v), computer.multiply_hessian(v)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert not a.requires_grad
    close(problem.flat(hessian), problem.flat(computer.multiply_hessian(v)))
    assert all(param.grad is None for param in problem.model.parameters())


class UndetachedPoisson(NegativeLogProbLoss):
    """A user's: its factor is a function of `z` in the graph."""

    def sample(self, generator=None):
        return torch.poisson(self.inputs.detach().exp(), generator=generator)

    def evaluate_on_targets(self, targets):
        return (self.inputs.exp() - targets * self.inputs).sum()

    def multiply_fisher_factor(self, vector):
        return (self.inputs / 2).exp() * vector

    multiply_fisher_factor_transpose = multiply_fisher_factor


def test_the_curvature_at_the_output_is_a_constant():
    problem = Problem("mlp", "poisson")
    v = problem.vector()
    expected = problem.flat(problem.computer().multiply_fisher(list(v.values())))
    args = (problem.f, problem.params, v, UndetachedPoisson)
    close(problem.flat(fisher_vector_product(*args)), expected)
    problem.make = UndetachedPoisson
    computer = problem.computer()
    product = computer.multiply_fisher(list(v.values()))
    close(problem.flat(product), expected)
    (factor,) = computer.multiply_fisher_factor_transpose(list(v.values()))
    back = problem.flat(computer.multiply_fisher_factor([factor]))
    close(back, expected)
    assert not factor.requires_grad
    assert not back.requires_grad


def a_loss():
    w = torch.ones(3, requires_grad=True)
    return NormalMeanNegativeLogProbLoss(torch.eye(3) * w), w


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda loss, w, make: make([], [w]), ValueError, "got 0 losses and 1 tensors"),
        (lambda loss, w, make: make([loss], []), ValueError, "got 1 losses and 0 tensors"),
        (lambda loss, w, make: make([loss], [w], [1.0, 2.0]), ValueError, "each of 1 loss"),
        (lambda loss, w, make: make([loss], [w], [-1.0]), ValueError, r">= 0.*\[-1\.0\]"),
        (
            lambda loss, w, make: make([type(loss)(loss.inputs.detach(), name="it")], [w]),
            ValueError,
            "loss it: its inputs are not in a graph",
        ),
        (
            lambda loss, w, make: make([loss], [w, torch.ones(2)]),
            ValueError,
            r"wrt_tensors\[1\]: expected a tensor that requires a gradient",
        ),
        (
            lambda loss, w, make: make([loss], [w]).multiply_fisher([w, w]),
            ValueError,
            r"shapes of wrt_tensors, \[\(3,\)\], got \[\(3,\), \(3,\)\]",
        ),
        (
            lambda loss, w, make: make([loss], [w]).multiply_hessian([w[:2]]),
            ValueError,
            r"shapes of wrt_tensors, \[\(3,\)\], got \[\(2,\)\]",
        ),
        (
            lambda loss, w, make: make([loss], [w]).multiply_fisher_factor([w]),
            ValueError,
            r"the losses' inner shapes, \[\(3, 3\)\], got \[\(3,\)\]",
        ),
        (
            lambda loss, w, make: make([loss], [w]).multiply_fisher([2.0]),
            ValueError,
            r"got \['float'\]",
        ),
        (
            lambda loss, w, make: make([loss], [w]).multiply_hessian([w]),
            ValueError,
            "needs targets",
        ),
        (
            lambda loss, w, make: make([ALL["pseudo-Huber"](loss.inputs)], [w])
            .multiply_fisher([w]),
            TypeError,
            "loss PseudoHuber: expected a NegativeLogProbLoss",
        ),
        (
            lambda loss, w, make: make([ALL["exponential"](loss.inputs)], [w])
            .multiply_generalized_gauss_newton([w]),
            NotImplementedError,
            "Exponential: the Hessian at the output is not the Fisher",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call(*a_loss(), CurvatureMatrixVectorProductComputer)


# The functions.


@pytest.mark.parametrize("kind", ["categorical", "derived categorical", "pseudo-Huber"])
def test_functions_under_vmap(kind):
    problem = Problem("mlp", kind)
    p = [problem.vector() for _ in range(3)]
    stacked = {name: torch.stack([v[name] for v in p]) for name in problem.params}
    for product in (fisher_vector_product, ggn_vector_product, hessian_vector_product):

        def multiply(vector, product=product):
            return product(problem.f, problem.params, vector, problem.loss)

        together = torch.vmap(multiply, randomness="same")(stacked)
        for i, v in enumerate(p):
            close(
                problem.flat([t[i] for t in together.values()]), problem.flat(multiply(v))
            )


@pytest.mark.parametrize("product", [fisher_vector_product, hessian_vector_product])
def test_functions_under_compile(product):
    problem = Problem("mlp", "categorical")
    v = problem.vector()
    compiled = torch.compile(
        lambda params, v: product(problem.f, params, v, problem.loss),
        backend="aot_eager",
        fullgraph=True,
    )
    close(
        problem.flat(compiled(problem.params, v)),
        problem.flat(product(problem.f, problem.params, v, problem.loss)),
    )


def test_params_may_be_a_tensor_or_nested():
    x, w = torch.randn(6, 3), torch.randn(3, 2)
    v = torch.randn_like(w)
    make = NormalMeanNegativeLogProbLoss
    expected = 2 * x.T @ (x @ v)
    close(fisher_vector_product(lambda w: x @ w, w, v, make), expected)
    nested = fisher_vector_product(lambda p: x @ p[0]["w"], [{"w": w}], [{"w": v}], make)
    close(nested[0]["w"], expected)


def test_dropout_is_drawn_once():
    """`pᵀFp = ‖BᵀJp‖²` within one call; and both directions see one mask."""
    x, w = torch.randn(50, 3), torch.randn(3, 2)
    p = torch.randn_like(w)

    def f(w):
        return nn.functional.dropout(x, 0.5, training=True) @ w

    product = fisher_vector_product(f, w, p, NormalMeanNegativeLogProbLoss)
    torch.manual_seed(0)
    a, b = fisher_factor_transpose_products(f, w, [p, 2 * p], NormalMeanNegativeLogProbLoss)
    close(b, 2 * a)
    torch.manual_seed(1)
    seeded = fisher_vector_product(f, w, p, NormalMeanNegativeLogProbLoss)
    torch.manual_seed(1)
    mask = nn.functional.dropout(x, 0.5, training=True)
    close(seeded, 2 * mask.T @ (mask @ p))
    assert not torch.allclose(product, seeded)


def test_the_quadratic_form_of_two_directions():
    problem = Problem("conv", "categorical")
    args = (problem.f, problem.params)
    directions = [problem.vector(), problem.vector()]
    halves = fisher_factor_transpose_products(*args, directions, problem.loss)
    for i, j in itertools.product(range(2), repeat=2):
        product = fisher_vector_product(*args, directions[j], problem.loss)
        expected = problem.flat(directions[i]) @ problem.flat(product)
        close((halves[i] * halves[j]).sum(), expected)
    assert fisher_factor_transpose_products(*args, [], problem.loss) == []


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ({"w": torch.ones(2)}, r"expected it like params.*\[3\].*got.*\[2\]"),
        ({"v": torch.ones(3)}, r"expected it like params.*'w'.*got.*'v'"),
        (torch.ones(3), "expected it like params"),
        ({"w": 1.0}, "got a float among them"),
    ],
    ids=str,
)
def test_a_vector_that_is_not_like_the_parameters(vector, message):
    params = {"w": torch.ones(3)}

    def f(params):
        return torch.eye(3) * params["w"]

    make = NormalMeanNegativeLogProbLoss
    for product in (fisher_vector_product, ggn_vector_product, hessian_vector_product):
        with pytest.raises(ValueError, match=message):
            product(f, params, vector, make)
    with pytest.raises(ValueError, match=message):
        fisher_factor_transpose_products(f, params, [vector], make)


def test_functional_hessian_needs_targets():
    w = torch.ones(2)
    with pytest.raises(ValueError, match="needs targets"):
        hessian_vector_product(lambda w: w[None], w, w, NormalMeanNegativeLogProbLoss)


# Other precisions and places.


@every_net
def test_single_precision_agrees_with_double(net):
    problem = Problem(net, "categorical")
    v = problem.vector()
    expected = problem.flat(
        fisher_vector_product(problem.f, problem.params, v, problem.loss)
    )
    check_elsewhere(problem, v, expected, dtype=torch.float32)


@pytest.mark.gpu
@every_net
def test_an_accelerator_agrees_with_the_cpu(net):
    if not torch.accelerator.is_available():
        pytest.skip("no accelerator on this machine")
    problem = Problem(net, "categorical")
    v = problem.vector()
    expected = problem.flat(
        fisher_vector_product(problem.f, problem.params, v, problem.loss)
    )
    device = torch.accelerator.current_accelerator()
    check_elsewhere(problem, v, expected, dtype=torch.float32, device=device)


def check_elsewhere(problem, v, expected, dtype, device=None):
    """Both doors, to a relative 1e-5 in the norm."""
    device = device or torch.device("cpu")
    problem.model.to(device, dtype)
    problem.x, problem.targets = problem.x.to(device), problem.targets.to(device)
    if problem.x.is_floating_point():
        problem.x = problem.x.to(dtype)
    problem.params = {name: p.to(device, dtype) for name, p in problem.params.items()}
    v = {name: p.to(device, dtype) for name, p in v.items()}
    for product in (
        fisher_vector_product(problem.f, problem.params, v, problem.loss).values(),
        problem.computer().multiply_fisher(list(v.values())),
    ):
        flat = problem.flat(list(product))
        assert flat.dtype == dtype
        assert flat.device.type == device.type
        error = (flat.cpu().double() - expected).norm()
        assert error <= 1e-5 * expected.norm()
