"""What every factor has in common, each against a brute-force expression."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from kfac_torch import fisher_factors as ff
from kfac_torch.damping import PackagedFunc
from kfac_torch.fisher_factors import FactorOptions, refresh_inverses
from kfac_torch.fisher_factors.background import PendingRefresh
from kfac_torch.fisher_factors.low_rank import sketch_matrix

pytestmark = pytest.mark.usefixtures("float64")


class Case(NamedTuple):
    make: Callable  # (entries[source][tower], **options) -> factor
    draw: Callable  # number of examples -> one tower's entry
    moment: Callable  # entry -> what new_cov should be
    shared: int = 0  # how many tensors of the entry all sources have in common
    towers: bool = True  # whether there may be several
    identity: torch.Tensor | None = None  # how it is stored, if neither matrix nor diagonal


def outer(rows):
    """The mean of the outer products of rows, one by one."""
    return sum(torch.outer(row, row) for row in rows) / len(rows)


def with_ones(rows):
    return torch.stack([torch.cat([row, torch.ones(1)]) for row in rows])


def patches(x, kernel, stride, padding, dilation):
    """Patches `[N, locations, C, *kernel]` of `x [N, C, *space]`, one by one."""
    x = F.pad(x, [side for pair in reversed(padding) for side in pair])
    starts = [
        range(0, n - d * (k - 1), s)
        for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    found = []
    for start in itertools.product(*starts):
        window = [
            slice(i, i + d * (k - 1) + 1, d)
            for i, k, d in zip(start, kernel, dilation, strict=True)
        ]
        found.append(x[(slice(None), slice(None), *window)])
    return torch.stack(found, dim=1)


class Conv(NamedTuple):
    """A convolution by brute force; its data are channels last if `last`."""

    space: tuple
    kernel: tuple
    padding: tuple  # pairs
    stride: tuple
    dilation: tuple
    channels: int  # of one group
    out_channels: int
    groups: int = 1
    last: bool = True

    @property
    def data_format(self):
        dims = len(self.space)
        return ["NWC", "NHWC", "NDHWC"][dims - 1] if self.last else (
            ["NCW", "NCHW", "NCDHW"][dims - 1]
        )  # fmt: skip

    @property
    def filter_shape(self):
        return [*self.kernel, self.channels, self.out_channels]

    def rows(self, x):
        """`[N, locations, groups, columns]`."""
        x = x.movedim(-1, 1) if self.last else x
        P = patches(x, self.kernel, self.stride, self.padding, self.dilation)
        P = P.unflatten(2, (self.groups, -1))  # [N, L, groups, C, *kernel]
        return (P.movedim(3, -1) if self.last else P).flatten(3)

    def inputs(self, N):
        C = self.channels * self.groups
        return (
            torch.randn(N, *self.space, C) if self.last else torch.randn(N, C, *self.space)
        )

    def pair(self, N):
        x = self.inputs(N)
        weight = torch.zeros(1, x.shape[-1 if self.last else 1], *self.kernel)
        y = F.pad(x.movedim(-1, 1) if self.last else x, [
            side for pair in reversed(self.padding) for side in pair
        ])  # fmt: skip
        conv = [F.conv1d, F.conv2d, F.conv3d][len(self.space) - 1]
        out = conv(y, weight, stride=self.stride, dilation=self.dilation).shape[2:]
        K = self.out_channels
        return x, torch.randn(N, *out, K) if self.last else torch.randn(N, K, *out)

    def gradients(self, entry, has_bias):
        """Per example, `[N, columns(+1), K]`."""
        x, g = entry
        g = (g.movedim(-1, 1) if self.last else g).flatten(2)  # [N, K, L]
        P, each = self.rows(x), self.out_channels // self.groups
        gradients = []
        for p, grad in zip(P, g, strict=True):
            columns = [
                sum(p[t, k // each] * grad[k, t] for t in range(len(p)))
                for k in range(self.out_channels)
            ]
            gradient = torch.stack(columns, dim=1)
            if has_bias:
                gradient = torch.cat([gradient, grad.sum(1)[None]])
            gradients.append(gradient)
        return torch.stack(gradients)


CONV1 = Conv((6,), (3,), ((1, 1),), (1,), (1,), 2, 3)
CONV2 = Conv((5, 6), (2, 3), ((0, 1), (1, 1)), (2, 1), (1, 2), 2, 3)
CONV2_FIRST = Conv((5, 6), (2, 3), ((0, 1), (1, 1)), (1, 2), (2, 1), 2, 4, 2, False)
CONV3 = Conv((3, 4, 3), (2, 1, 2), ((0, 0), (0, 0), (1, 0)), (1, 2, 1), (1, 1, 1), 1, 2)
DEPTHWISE = Conv((4, 4), (2, 2), ((0, 0), (0, 0)), (1, 1), (1, 1), 1, 6, 3, False)
MASK = torch.tensor([[0.5, 2.0], [0.0, 1.0], [3.0, 1.0]], dtype=torch.float64)


def conv_input(conv, has_bias, mask=None):
    def make(entries, **options):
        return ff.ConvInputKroneckerFactor(
            entries[0], conv.filter_shape, conv.padding, conv.stride, conv.dilation,
            conv.data_format, has_bias=has_bias, groups=conv.groups, patch_mask=mask,
            **options,
        )  # fmt: skip

    def moment(x):
        P = conv.rows(x).flatten(0, 1)
        if mask is not None:
            P = P * mask.flatten()
        groups = [P[:, g] for g in range(conv.groups)]
        covs = [outer(with_ones(rows) if has_bias else rows) for rows in groups]
        return torch.stack(covs) if conv.groups > 1 else covs[0]

    return Case(make, conv.inputs, moment)


def conv_diagonal(conv, has_bias, mask=None):
    def make(entries, **options):
        return ff.ConvDiagonalFactor(
            *unzip(entries), conv.filter_shape, conv.stride, conv.padding,
            conv.data_format, conv.dilation, has_bias, groups=conv.groups,
            patch_mask=mask, **options,
        )  # fmt: skip

    def moment(entry):
        gradients = conv.gradients(entry, has_bias)
        if mask is not None:
            gradients[:, : mask.numel()] *= mask.reshape(-1, 1)
        return (gradients**2).mean(0)

    return Case(make, conv.pair, moment, shared=1)


def conv_output(last):
    def make(entries, **options):
        return ff.ConvOutputKroneckerFactor(entries, "NHWC" if last else "NCHW", **options)

    def moment(g):
        return outer((g if last else g.movedim(1, -1)).reshape(-1, 3))

    return Case(make, lambda N: torch.randn(N, *((2, 4, 3) if last else (3, 2, 4))), moment)


def unzip(entries):
    return [x for x, _ in entries[0]], [[g for _, g in towers] for towers in entries]


def fully_connected(has_bias):
    def moment(x):
        rows = x.reshape(-1, 3)
        return outer(with_ones(rows) if has_bias else rows)

    return Case(
        lambda entries, **options: ff.FullyConnectedKroneckerFactor(
            entries, has_bias, **options
        ),
        lambda N: torch.randn(N, 2, 3),
        moment,
    )


def fully_connected_groups():
    return Case(
        lambda entries, **options: ff.FullyConnectedKroneckerFactor(
            entries, True, size=3, groups=2, **options
        ),
        lambda N: (torch.randn(N, 2, 3), torch.randn(2 * N, 3)),
        lambda entry: torch.stack([outer(with_ones(x.reshape(-1, 3))) for x in entry]),
    )


def fully_connected_diagonal(middle, has_bias):
    def draw(N):
        return torch.randn(N, *middle, 3), torch.randn(N, *middle, 2)

    def moment(entry):
        squares = []
        for a, g in zip(*entry, strict=True):
            a, g = a.reshape(-1, 3), g.reshape(-1, 2)
            a = with_ones(a) if has_bias else a
            rows = zip(a, g, strict=True)
            squares.append(sum(torch.outer(*row) for row in rows) ** 2)
        return sum(squares) / len(squares)

    return Case(
        lambda entries, **options: ff.FullyConnectedDiagonalFactor(
            *unzip(entries), has_bias, **options
        ),
        draw,
        moment,
        shared=1,
    )


def one_hot(ids, n):
    return torch.stack([torch.eye(n)[i] for i in ids.flatten().tolist()])


def diagonal_kronecker(ids, has_bias):
    def moment(x):
        rows = one_hot(x, 4) if ids else x.reshape(-1, 4)
        return outer(with_ones(rows) if has_bias else rows).diag()

    return Case(
        lambda entries, **options: ff.DiagonalKroneckerFactor(
            entries, has_bias, size=4, **options
        ),
        lambda N: torch.randint(4, (N, 3)) if ids else torch.randn(N, 2, 4),
        moment,
    )


EMBEDDING = Case(
    lambda entries, **options: ff.EmbeddingInputKroneckerFactor(entries[0], 5, **options),
    lambda N: torch.randint(5, (N, 2)),
    lambda ids: one_hot(ids, 5).sum(0) / len(ids),
)


def of_params(kind):
    def draw(N):
        return torch.randn(2, 3), torch.randn(2)

    def moment(entry):
        g = torch.cat([grad.flatten() for grad in entry])
        cov = torch.outer(g, g) / 7
        return cov if kind is ff.FullFactor else cov.diag().unsqueeze(1)

    return Case(
        lambda entries, **options: kind([towers[0] for towers in entries], 7, **options),
        draw,
        moment,
        towers=False,
    )


def lagged(uses, rows_of, has_bias):
    """C0 and C1 of uses `[T][B, ...]`, row by row."""
    rows = [rows_of(use) for use in uses]
    rows = [with_ones(use) if has_bias else use for use in rows]
    pairs = itertools.pairwise(rows)
    number = sum(map(len, rows))
    lag = sum(torch.outer(f, p) for past, future in pairs
              for f, p in zip(future, past, strict=True)) / number  # fmt: skip
    return torch.stack([outer(torch.cat(rows)), lag])


def multi_use(folded, has_bias):
    def make(entries, **options):
        factor = ff.FullyConnectedMultiKF(entries, 3, has_bias, **options)
        factor.register_cov_dt1()
        return factor

    def draw(N):
        return torch.randn(3 * N, 2) if folded else tuple(torch.randn(3, N, 2))

    def moment(entry):
        return lagged(entry.view(3, -1, 2) if folded else entry, lambda x: x, has_bias)

    return Case(make, draw, moment, shared=0)


def conv_multi_use(side, conv):
    def make(entries, **options):
        if side == "input":
            factor = ff.ConvInputMultiKF(
                entries[0], conv.filter_shape, conv.padding, 3, conv.stride, conv.dilation,
                conv.data_format, has_bias=True, **options,
            )  # fmt: skip
        else:
            factor = ff.ConvOutputMultiKF(entries, 3, conv.data_format, **options)
        factor.register_cov_dt1()
        return factor

    def rows(x):
        if side == "input":
            return conv.rows(x).flatten(0, 2)
        return (x if conv.last else x.movedim(1, -1)).flatten(0, -2)

    return Case(
        make,
        lambda N: conv.inputs(3 * N),
        lambda x: lagged(x.unflatten(0, (3, -1)), rows, side == "input"),
    )


def diagonal_multi_use():
    return Case(
        lambda entries, **options: ff.DiagonalMultiKF(entries, 3, True, **options),
        lambda N: tuple(torch.randn(3, N, 2)),
        lambda entry: outer(with_ones(torch.cat(entry))).diag(),
    )


def scale_and_shift(kind, scale_dims, shift_dims, has_shift):
    def moment(entry):
        gradients = []
        for x, g in zip(*entry, strict=True):
            dims = [dim - 1 for dim in scale_dims if dim]
            parts = [(x * g).sum(dims) if dims else x * g]
            if has_shift:
                dims = [dim - 1 for dim in shift_dims or scale_dims if dim]
                parts.append(g.sum(dims) if dims else g)
            gradients.append(torch.cat([part.flatten() for part in parts]))
        cov = outer(gradients)
        return cov if kind is ff.ScaleAndShiftFullFactor else cov.diag().unsqueeze(1)

    return Case(
        lambda entries, **options: kind(
            *unzip(entries), scale_dims, shift_dims, has_shift, **options
        ),
        lambda N: (torch.randn(N, 2, 3), torch.randn(N, 2, 3)),
        moment,
        shared=1,
    )


SUA = Case(
    lambda entries, **options: ff.ConvInputSUAKroneckerFactor(
        entries[0], [2, 2, 3, 1], "SAME", has_bias=True, **options
    ),
    lambda N: torch.randn(N, 3, 4, 3),
    lambda x: outer(with_ones(x.reshape(-1, 3))),
)


def blocks(C, features):
    """The blocks of a matrix with these features, padded with zeros at their ends."""
    width = max(map(len, features))
    stack = C.new_zeros(len(features), width, width)
    for block, some in zip(stack, features, strict=True):
        block[: len(some), : len(some)] = C[some][:, some]
    return stack


def split(has_bias):
    whole = fully_connected(has_bias)
    features = [[0, 1], [2, 3]] if has_bias else [[0, 1], [2]]
    return whole._replace(
        make=lambda entries, **options: ff.SplitKroneckerFactor(
            entries, has_bias, max_size=2, **options
        ),
        moment=lambda x: blocks(whole.moment(x), features),
        identity=blocks(torch.eye(4, dtype=torch.float64), features),
    )


def conv_input_of(kind, conv, has_bias, mask=None, **kwargs):
    return lambda entries, **options: kind(
        entries[0], conv.filter_shape, conv.padding, conv.stride, conv.dilation,
        conv.data_format, has_bias=has_bias, groups=conv.groups, **kwargs,
        **({} if mask is None else {"patch_mask": mask}), **options,
    )  # fmt: skip


def each(function, C):
    """A function of a matrix, of each of a stack."""
    return torch.stack(list(map(function, C))) if C.dim() == 3 else function(C)


def conv_input_split(conv, has_bias, max_size, channels, mask=None):
    """`channels` of each block."""
    whole = conv_input(conv, has_bias, mask)
    offsets, C = torch.Size(conv.kernel).numel(), conv.channels
    step, across = (C, 1) if conv.last else (1, offsets)
    features = [
        sorted(u * step + c * across for u in range(offsets) for c in some)
        for some in channels
    ]
    features[-1] += [offsets * C] * has_bias
    of_eye = blocks(torch.eye(offsets * C + 1, dtype=torch.float64), features)
    return whole._replace(
        make=conv_input_of(
            ff.ConvInputSplitKroneckerFactor, conv, has_bias, mask, max_size=max_size
        ),
        moment=lambda x: each(lambda A: blocks(A, features), whole.moment(x)),
        identity=of_eye if conv.groups == 1 else torch.stack([of_eye] * conv.groups),
    )


def conv_input_diagonal(conv, has_bias):
    whole = conv_input(conv, has_bias)
    return whole._replace(
        make=conv_input_of(ff.ConvInputDiagonalKroneckerFactor, conv, has_bias),
        moment=lambda x: whole.moment(x).diagonal(dim1=-2, dim2=-1),
    )


def conv_output_side(kind, last, moment, **kwargs):
    whole = conv_output(last)
    return whole._replace(
        make=lambda entries, **options: kind(
            entries, "NHWC" if last else "NCHW", **kwargs, **options
        ),
        moment=lambda g: moment(whole.moment(g)),
    )


def sketch(C, rank=1):
    omega = sketch_matrix(C.shape[-1], rank, torch.float64)
    last = C.new_zeros(*C.shape[:-2], 1, omega.shape[1])
    last[..., 0, 0] = C.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.cat([C @ omega, last], -2)


def low_rank(has_bias):
    whole = fully_connected(has_bias)
    return whole._replace(
        make=lambda entries, **options: ff.LowRankKroneckerFactor(
            entries, has_bias, rank=1, **options
        ),
        moment=lambda x: sketch(whole.moment(x)),
        identity=sketch(torch.eye(3 + has_bias, dtype=torch.float64)),
    )


def conv_input_low_rank(conv, has_bias):
    whole = conv_input(conv, has_bias)
    n = torch.Size(conv.kernel).numel() * conv.channels + has_bias
    eye = torch.eye(n, dtype=torch.float64)
    return whole._replace(
        make=conv_input_of(ff.ConvInputLowRankKroneckerFactor, conv, has_bias, rank=1),
        moment=lambda x: sketch(whole.moment(x)),
        identity=sketch(eye if conv.groups == 1 else eye.expand(conv.groups, n, n)),
    )


SPLIT_FIRST = CONV2_FIRST._replace(channels=3, out_channels=2)

CASES = {
    "split": split(False),
    "split, bias": split(True),
    "conv input split 2d": conv_input_split(
        CONV2._replace(channels=3), True, 12, [[0, 1], [2]]
    ),
    "conv input split 1d, mask": conv_input_split(CONV1, False, 3, [[0], [1]], MASK),
    "conv input split 2d, groups": conv_input_split(SPLIT_FIRST, True, 12, [[0, 1], [2]]),
    "conv input split 3d": conv_input_split(
        CONV3._replace(channels=2), True, 5, [[0], [1]]
    ),
    "conv output split": conv_output_side(
        ff.ConvOutputSplitKroneckerFactor,
        True,
        lambda G: blocks(G, [[0, 1], [2]]),
        max_size=2,
    )._replace(identity=blocks(torch.eye(3, dtype=torch.float64), [[0, 1], [2]])),
    "conv input diagonal side": conv_input_diagonal(CONV2, True),
    "conv input diagonal side, groups": conv_input_diagonal(CONV2_FIRST, True),
    "conv output diagonal side": conv_output_side(
        ff.ConvOutputDiagonalKroneckerFactor, False, lambda G: G.diagonal()
    ),
    "low rank": low_rank(False),
    "low rank, bias": low_rank(True),
    "conv input low rank": conv_input_low_rank(CONV2, True),
    "conv input low rank, groups": conv_input_low_rank(CONV2_FIRST, False),
    "conv output low rank": conv_output_side(
        ff.ConvOutputLowRankKroneckerFactor, False, sketch, rank=1
    )._replace(identity=sketch(torch.eye(3, dtype=torch.float64))),
    "fully connected": fully_connected(False),
    "fully connected, bias": fully_connected(True),
    "fully connected, groups": fully_connected_groups(),
    "conv input 1d": conv_input(CONV1, True),
    "conv input 2d": conv_input(CONV2, False),
    "conv input 2d, groups": conv_input(CONV2_FIRST, True),
    "conv input 3d": conv_input(CONV3, True),
    "conv input, mask": conv_input(CONV1, False, MASK),
    "conv output": conv_output(True),
    "conv output, channels first": conv_output(False),
    "fully connected diagonal": fully_connected_diagonal((), False),
    "fully connected diagonal, bias": fully_connected_diagonal((), True),
    "fully connected diagonal, tokens": fully_connected_diagonal((2, 2), True),
    "conv diagonal 1d": conv_diagonal(CONV1, True),
    "conv diagonal 2d": conv_diagonal(CONV2, False),
    "conv diagonal 2d, groups": conv_diagonal(CONV2_FIRST, True),
    "conv diagonal 3d": conv_diagonal(CONV3, True),
    "conv diagonal, depthwise": conv_diagonal(DEPTHWISE, True),
    "conv diagonal, mask": conv_diagonal(CONV1, True, MASK),
    "diagonal side": diagonal_kronecker(False, True),
    "diagonal side of unit trace": diagonal_kronecker(False, True)._replace(
        make=lambda entries, **options: ff.UnitTraceDiagonalFactor(
            entries, True, size=4, **options
        ),
    ),
    "diagonal side of ids": diagonal_kronecker(True, True),
    "embedding": EMBEDDING,
    "full": of_params(ff.FullFactor),
    "naive diagonal": of_params(ff.NaiveDiagonalFactor),
    "multi-use, folded": multi_use(True, True),
    "multi-use, list": multi_use(False, False),
    "multi-use conv input": conv_multi_use("input", CONV2),
    "multi-use conv output": conv_multi_use("output", CONV2),
    "multi-use conv output, channels first": conv_multi_use(
        "output", CONV2_FIRST._replace(channels=3, groups=1)
    ),
    "multi-use diagonal": diagonal_multi_use(),
    "scale and shift": scale_and_shift(ff.ScaleAndShiftFullFactor, [0, 1], None, True),
    "scale and shift, own dims": scale_and_shift(
        ff.ScaleAndShiftFullFactor, [0], [0, 1, 2], True
    ),
    "scale and shift diagonal": scale_and_shift(
        ff.ScaleAndShiftDiagonalFactor, [0, 2], [0], True
    ),
    "scale alone": scale_and_shift(ff.ScaleAndShiftDiagonalFactor, (0, 1), None, False),
    "uncorrelated locations": SUA,
}
FLOATS = [name for name in CASES if name not in ("diagonal side of ids", "embedding")]
KINDS = {
    kind
    for kind in vars(ff).values()
    if isinstance(kind, type) and issubclass(kind, ff.FisherFactor)
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def ready(case, entries=None, **options):
    factor = case.make(entries or [[case.draw(4)]], name="layer", **options)
    factor.instantiate_cov_variables()
    return factor


def parts_of(entry):
    return entry if isinstance(entry, tuple) else (entry,)


def test_every_class_is_in_the_table():
    abstract = {ff.FisherFactor, ff.InverseProvidingFactor, ff.DiagonalFactor}
    made = {type(case.make([[case.draw(2)]])) for case in CASES.values()}
    assert made == KINDS - abstract


def test_update_is_the_brute_force_expression(case):
    entry = case.draw(5)
    factor = ready(case, [[entry]])
    updated = factor.make_covariance_update_op(0.0)()
    expected = case.moment(entry)
    if isinstance(factor, ff.FullyConnectedMultiKF | ff.ConvInputMultiKF):
        close(factor.get_cov_dt1(), expected[1])
        expected = expected[0]
    close(updated, expected)
    assert updated.data_ptr() == factor.get_cov_var().data_ptr()


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.towers])
def test_towers_weigh_by_rows_or_alike(name):
    case = CASES[name]
    entries = [case.draw(2), case.draw(6)]
    a, b = (case.moment(entry) for entry in entries)
    close(case.make([entries]).new_cov([entries]), a / 4 + 3 * b / 4)
    separate = case.make([entries], options=FactorOptions(tower_strategy="separate"))
    close(separate.new_cov([entries]), (a + b) / 2)


def test_moving_average_from_the_identity(case):
    factor = ready(case, options=FactorOptions(initial="identity"))
    shape = factor.state_dict()["cov"].shape
    diagonal = isinstance(factor, ff.DiagonalFactor)
    if case.identity is not None:
        identity = case.identity
    else:
        identity = torch.ones(shape) if diagonal else torch.eye(shape[-1]).repeat(
            *shape[:-2], 1, 1
        )  # fmt: skip
    if isinstance(factor, ff.FullyConnectedMultiKF | ff.ConvInputMultiKF):
        identity[1] = 0  # the lag starts at zero
    close(factor.state_dict()["cov"], identity)
    first, second = case.draw(4), case.draw(4)
    for entry in (first, second):
        factor.accumulate(factor.new_cov([[entry]]), 0.5)
    expected = identity / 4 + case.moment(first) / 4 + case.moment(second) / 2
    close(factor.state_dict()["cov"], expected)


def test_summed_cov_is_the_sum_over_sources(case):
    entries = [parts_of(case.draw(4)) for _ in range(3)]
    # Inputs are those of the first source; the rest is stacked.
    shared = entries[0][: case.shared]
    sources = [[(*shared, *entry[case.shared :])] for entry in entries]
    if len(entries[0]) == 1:
        sources = [[entry[0]] for (entry,) in sources]
    stacked = zip(*(entry[case.shared :] for entry in entries), strict=True)
    factor = case.make(sources[:1])
    summed = factor.summed_cov(*shared, *(torch.stack(tensors) for tensors in stacked))
    close(summed, factor.new_cov(sources))
    close(summed, sum(case.moment(source[0]) for source in sources))


def test_inverse_against_the_dense_matrix(case):
    factor = ready(case)
    factor.make_covariance_update_op(0.0)()
    factor.register_inverse(0.3)
    factor.instantiate_inv_variables()
    refresh_inverses([factor])
    assert factor.is_refreshed
    C = factor.get_cov()
    close(factor.cov_trace(), C.diagonal(dim1=-2, dim2=-1).sum(-1))
    n = factor.cov_dim
    assert C.shape[-1] == n
    if C.dim() == 3:
        x = torch.randn(len(C), n, 3)
        damped = C + 0.3 * torch.eye(n)
        close(factor.left_multiply_matpower(x, -1, 0.3), torch.linalg.solve(damped, x))
        product = factor.right_multiply_matpower(x.mT, -1, 0.3)
        close(product, torch.linalg.solve(damped, x).mT)
        if isinstance(factor, ff.DiagonalFactor):
            return
        close(factor.get_inverse(0.3), torch.linalg.inv(C + 0.3 * torch.eye(n)))
        return
    shape = factor.get_cov_var().shape
    elementwise = isinstance(factor, ff.DiagonalFactor) and len(shape) == 2
    x = torch.randn(*shape) if elementwise else torch.randn(n, 3)
    flat = x.flatten() if elementwise else x
    damped = C + 0.3 * torch.eye(n)
    for exp, expected in ((-1, torch.linalg.solve(damped, flat)), (1, damped @ flat)):
        product = factor.left_multiply_matpower(x, exp, 0.3)
        close(product, expected.view(x.shape))
        if not elementwise:
            close(factor.right_multiply_matpower(x.mT, exp, 0.3), expected.mT)


def test_state_round_trip(case, tmp_path):
    entries = [[case.draw(4)]]
    a, b = ready(case, entries), ready(case, entries)
    for factor in (a, b):
        factor.register_inverse(0.3)
        factor.instantiate_inv_variables()
    a.accumulate(a.new_cov(entries), 0.9)
    refresh_inverses([a])
    torch.save(a.state_dict(), tmp_path / "factor.pt")
    b.load_state_dict(torch.load(tmp_path / "factor.pt", weights_only=True))
    assert torch.equal(a.get_inverse(0.3), b.get_inverse(0.3))
    cov = a.new_cov([[case.draw(4)]])
    for factor in (a, b):
        factor.accumulate(cov, 0.9)
    assert torch.equal(a.get_cov(), b.get_cov())
    assert a.num_updates == b.num_updates == 2


def test_refreshed_in_a_thread_as_at_once(case, tmp_path):
    """From the moment and the damping of when it began, from a file too."""
    known = {"damping": 0.3}
    damping = PackagedFunc(lambda: known["damping"], "of a block")
    entries = case.draw(4), case.draw(4)
    a, b, c = factors = [ready(case, [[entries[0]]]) for _ in range(3)]
    for factor in factors:
        factor.register_inverse(damping)
        factor.instantiate_inv_variables()
        for entry in entries:
            factor.accumulate(factor.new_cov([[entry]]), 0.9)
            refresh_inverses([factor])
    first = a.get_inverse(damping).clone()
    more = case.draw(4)
    for factor in factors:
        factor.accumulate(factor.new_cov([[more]]), 0.9)
    refresh_inverses([a])
    torch.save(PendingRefresh({"": [b]}, 7, 3).state_dict(), tmp_path / "pending.pt")
    state = torch.load(tmp_path / "pending.pt", weights_only=True)
    under_way = PendingRefresh({"": [b]}, 7, 3)
    resumed = PendingRefresh({"": [c]}, state["due"], 3, state["layers"])
    if isinstance(a, ff.InverseProvidingFactor):
        known["damping"] = 5.0
        for factor in (b, c):
            factor.accumulate(factor.new_cov([[case.draw(4)]]), 0.5)
    with ThreadPoolExecutor(1) as executor:
        for pending, factor in ((under_way, b), (resumed, c)):
            pending.start(executor)
            assert pending.finish() == ([factor], {})
    assert not torch.equal(first, a.get_inverse(damping))
    assert torch.equal(b.get_inverse(damping), a.get_inverse(damping))
    assert torch.equal(c.get_inverse(damping), a.get_inverse(damping))


def test_to_moves_the_state(case):
    factor = ready(case)
    factor.register_inverse(0.3)
    factor.instantiate_inv_variables()
    assert factor.to("meta") is factor
    assert factor.get_cov_var().device.type == "meta"


@pytest.mark.parametrize("name", FLOATS)
def test_a_bad_batch_is_left_out(name):
    case = CASES[name]
    entry = case.draw(4)
    parts = parts_of(entry)
    factor = ready(case, [[entry]])
    op = factor.make_covariance_update_op(0.9)
    good = op().clone()
    parts[-1].view(-1)[0] = torch.nan
    with pytest.warns(RuntimeWarning, match="layer: the batch has NaN or Inf"):
        op()
    assert torch.equal(factor.get_cov_var(), good)
    assert (factor.num_updates, factor.num_rejected_updates) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FLOATS)
def test_half_precision_accumulates_in_float32(name, dtype):
    case = CASES[name]
    entry = case.draw(4)
    half = tuple(part.to(dtype) for part in parts_of(entry))
    half = half if isinstance(entry, tuple) else half[0]
    exact = tuple(part.double() for part in parts_of(half))
    exact = exact if isinstance(entry, tuple) else exact[0]
    factor = case.make([[half]])
    cov = factor.new_cov([[half]])
    assert cov.dtype == torch.float32
    torch.testing.assert_close(cov.double(), case.moment(exact), rtol=1e-5, atol=1e-5)


def test_several_pieces_give_what_one_gives(monkeypatch):
    """With buffers for single examples and single rows of locations."""
    import kfac_torch.fisher_factors.conv_geometry as geometry
    from kfac_torch.fisher_factors import conv_diagonal, diagonal

    monkeypatch.setattr(geometry, "_PATCH_BYTES", 1)
    monkeypatch.setattr(diagonal, "GRADIENT_BYTES", 1)
    monkeypatch.setattr(conv_diagonal, "GRADIENT_BYTES", 1)
    for name in (
        "conv diagonal 2d, groups",
        "conv diagonal 3d",
        "fully connected diagonal, tokens",
        "multi-use conv input",
    ):
        entry = CASES[name].draw(5)
        close(CASES[name].make([[entry]]).new_cov([[entry]]), CASES[name].moment(entry))


WRONG = {  # an entry that does not fit, and what is said
    "fully connected": (torch.zeros(2, 2, 4), r"expected rows of 3 features.*\(2, 2, 4\)"),
    "fully connected, groups": (
        torch.zeros(2, 3),
        "expected 2 tensors per tower, one for each group, got 1",
    ),
    "conv diagonal 2d": (
        (torch.zeros(2, 5, 6, 2), torch.zeros(2, 3, 3, 3)),
        r"outputs_grads: expected shape .* got \(2, 3, 3, 3\)",
    ),
    "fully connected diagonal": (
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        r"inputs \[N, \.\.\., 3\] and outputs_grads \[N, \.\.\., 2\] with equal leading",
    ),
    "diagonal side": (torch.zeros(2, 3), r"expected rows of 4 features"),
    "diagonal side of ids": (torch.tensor([4]), r"ids in \[0, 4\), got ids from 4 to 4"),
    "embedding": (torch.tensor([-1, 2]), r"ids in \[0, 5\), got ids from -1 to 2"),
    "full": (
        (torch.zeros(2, 3), torch.zeros(3)),
        r"gradients of shapes .*got \[\(2, 3\), ",
    ),
    "naive diagonal": ((torch.zeros(2, 3),), r"gradients of shapes .*got \[\(2, 3\)\]"),
    "multi-use, folded": (torch.zeros(7, 2), r"a multiple of 3, got shape \(7, 2\)"),
    "multi-use, list": (tuple(torch.zeros(2, 4, 2)), r"or a list of 3, got 2 tensors"),
    "multi-use conv input": (
        torch.zeros(6, 5, 6, 3),
        r"inputs: expected 2 channels.*got 3",
    ),
    "multi-use conv output": (torch.zeros(6, 3, 3, 3), r"with 2 channels in the last"),
    "multi-use diagonal": (tuple(torch.zeros(2, 4, 2)), r"expected 3 uses.*\(4, 2\)"),
    "scale and shift": (
        (torch.zeros(2, 2, 3), torch.zeros(2, 2, 4)),
        r"inputs and outputs_grads of one shape \(N, any, 3\)",
    ),
    "uncorrelated locations": (torch.zeros(2, 3, 4, 2), r"inputs: expected 3 channels"),
    "conv input, mask": (torch.zeros(2, 2, 6), r"inputs: expected 2 channels.*got 6"),
}


@pytest.mark.parametrize("name", WRONG)
def test_data_of_another_shape(name):
    entry, message = WRONG[name]
    factor = ready(CASES[name])
    with pytest.raises(ValueError, match="layer.*" + message):
        factor.new_cov([[entry]])
    several = [CASES[name].draw(4), entry]
    with pytest.raises(ValueError, match="layer"):
        factor.new_cov([several])


def test_a_dimension_that_scale_and_shift_are_broadcast_over_may_have_any_size():
    factor = CASES["scale and shift"].make([[(torch.randn(4, 2, 3), torch.randn(4, 2, 3))]])
    other = torch.randn(5, 7, 3), torch.randn(5, 7, 3)
    close(factor.new_cov([[other]]), CASES["scale and shift"].moment(other))
    own = CASES["scale and shift, own dims"]  # here the scale has that dimension
    with pytest.raises(ValueError, match=r"of one shape \(N, 2, 3\), got"):
        ready(own).new_cov([[other]])


DESCRIPTIONS = {
    "fully connected, bias": "full 4",
    "fully connected, groups": "2 x full 4",
    "conv input 2d, groups": "2 x full 13",
    "split": "split 2x2 of 3",
    "split, bias": "split 2x2",
    "conv input split 2d, groups": "2 x split 2x12 of 19",
    "conv input diagonal side, groups": "2 x diagonal 13",
    "fully connected diagonal, bias": "diagonal 8",
    "embedding": "diagonal 5",
    "low rank, bias": "low rank 1 of 4",
    "conv input low rank, groups": "2 x low rank 1 of 12",
    "multi-use, folded": "full 3",
    "scale and shift": "full 6",
    "uncorrelated locations": "uncorrelated locations 3 of 13",
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_how_a_factor_is_kept_in_words(name):
    assert ready(CASES[name]).describe() == DESCRIPTIONS[name]
