"""Factors against the numbers of the lineage's tests, and every error they raise."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from kfac_torch.damping import PackagedFunc
from kfac_torch.fisher_factors import (
    ConvInputKroneckerFactor,
    ConvOutputKroneckerFactor,
    FactorOptions,
    FullyConnectedKroneckerFactor,
    append_homog,
    compute_cov,
    refresh_inverses,
    scope_string_from_params,
)

pytestmark = pytest.mark.usefixtures("float64")
ARANGE = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 3, 3, 1)
IDENTITY = FactorOptions(initial="identity")


def update(factor, decay=0.0):
    factor.instantiate_cov_variables()
    return factor.make_covariance_update_op(decay)()


def with_cov(cov, **options):
    cov = torch.as_tensor(cov)
    factor = FullyConnectedKroneckerFactor(
        [[torch.zeros(1, len(cov))]], options=FactorOptions(**options), name="fc"
    )
    factor.instantiate_cov_variables()
    factor.accumulate(cov, 0.0)
    return factor


def refresh(factor):
    factor.instantiate_inv_variables()
    for op in factor.make_inverse_update_ops():
        op()


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


# Second moments.


def test_compute_cov():
    x, y = np.random.default_rng(0).standard_normal((2, 100, 3))
    X, Y = torch.from_numpy(x), torch.from_numpy(y)
    close(compute_cov(X), x.T @ x / 100)
    close(compute_cov(X, normalizer=10), x.T @ x / 10)
    close(compute_cov(X, Y), x.T @ y / 100)


def test_append_homog():
    x = torch.randn(4, 3)
    close(append_homog(x), np.hstack([x.numpy(), np.ones((4, 1))]))


SAME_BIAS = [
    [285, 186, 154, 94, 45],
    [186, 219, 106, 122, 33],
    [154, 106, 271, 178, 39],
    [94, 122, 178, 206, 28],
    [45, 33, 39, 28, 9],
]
ORACLES = {  # of a 2x2 kernel on 1..9
    "VALID": [
        [11.5, 14.5, 20.5, 23.5],
        [14.5, 18.5, 26.5, 30.5],
        [20.5, 26.5, 38.5, 44.5],
        [23.5, 30.5, 44.5, 51.5],
    ],
    "SAME stride 2": [
        [35, 14.5, 5.5, 1.25],
        [14.5, 17, 2, 2.5],
        [5.5, 2, 13, 5],
        [1.25, 2.5, 5, 6.25],
    ],
    "VALID dilation 2": np.outer([1, 3, 7, 9], [1, 3, 7, 9]),
}


@pytest.mark.parametrize(
    ("padding", "kwargs", "expected"),
    [
        ("VALID", {}, ORACLES["VALID"]),
        ("SAME", {"has_bias": True}, np.array(SAME_BIAS) / 9),
        ("SAME", {"strides": [2, 2]}, ORACLES["SAME stride 2"]),
        ("VALID", {"dilation_rate": [2, 2]}, ORACLES["VALID dilation 2"]),
    ],
)
def test_conv_input(padding, kwargs, expected):
    factor = ConvInputKroneckerFactor([ARANGE], [2, 2, 1, 7], padding, **kwargs)
    close(update(factor), np.asarray(expected, float))


def test_conv_input_with_bias_has_the_mean_patch_last():
    cov = update(ConvInputKroneckerFactor([ARANGE], (2, 2, 1, 1), "VALID", has_bias=True))
    close(cov[:-1, :-1], ORACLES["VALID"])
    assert cov[-1].tolist() == cov[:, -1].tolist() == [3.0, 4.0, 6.0, 7.0, 1.0]


def test_column_order_has_the_channel_fastest():
    x = torch.arange(1.0, 13.0).view(1, 2, 3, 2)
    cov = update(ConvInputKroneckerFactor([x], [1, 2, 2, 1], "VALID", has_bias=True))
    expected = [
        [35, 40, 45, 50, 5],
        [40, 46, 52, 58, 6],
        [45, 52, 59, 66, 7],
        [50, 58, 66, 74, 8],
        [5, 6, 7, 8, 1],
    ]
    close(cov, np.asarray(expected, float))


@pytest.mark.parametrize("num_dims", [1, 2, 3])
def test_channels_first_has_the_order_of_flattened_weights(num_dims):
    """Rows of P times `weight.flatten(1)` are the convolution."""
    x = torch.randn(3, 2, *[5] * num_dims)
    data_format = {1: "NCW", 2: "NCHW", 3: "NCDHW"}[num_dims]
    kernel = [2, 3, 1][:num_dims]
    factor = ConvInputKroneckerFactor(
        [x], [*kernel, 2, 4], "VALID", data_format=data_format, has_bias=True
    )
    conv = [None, torch.conv1d, torch.conv2d, torch.conv3d][num_dims]
    weight, bias = torch.randn(4, 2, *kernel), torch.randn(4)
    rows = conv(x, weight, bias).movedim(1, -1).reshape(-1, 4)
    matrix = torch.cat([weight.flatten(1), bias[:, None]], 1)
    close(matrix @ update(factor) @ matrix.T, rows.T @ rows / len(rows))


@pytest.mark.parametrize(
    ("shape", "kernel", "strides", "pad", "extractor"),
    [
        # Kernel 5, 3, 3 with strides 1, 2, 1: "SAME" pads (2, 2), (0, 1), (1, 1).
        ((2, 6, 6, 4, 2), (5, 3, 3), (1, 2, 1), (1, 1, 0, 1, 2, 2), None),
        ((2, 6, 5, 7), (1, 1), None, (0, 0, 0, 0), "extract_pointwise_conv2d_patches"),
    ],
    ids=["3-D", "1x1"],
)
def test_patches_times_the_filter_are_the_convolution(
    shape, kernel, strides, pad, extractor
):
    """As many outputs as columns: the second moment of the outputs tells all of `A`."""
    x, n = torch.randn(shape), int(np.prod(kernel)) * shape[-1]
    matrix = torch.randn(n, n)  # [columns, out]
    weight = matrix.view(*kernel, shape[-1], n).movedim((-1, -2), (0, 1))
    conv = torch.conv3d if len(kernel) == 3 else torch.conv2d
    padded = torch.nn.functional.pad(x.movedim(-1, 1), pad)
    rows = conv(padded, weight, stride=strides or 1).movedim(1, -1).reshape(-1, n)
    cov = update(
        ConvInputKroneckerFactor(
            [x], [*kernel, shape[-1], n], "SAME", strides, extract_patches_fn=extractor
        )
    )
    inverse = torch.linalg.inv(matrix)
    close(cov, inverse.T @ (rows.T @ rows / len(rows)) @ inverse, 1e-8)


@pytest.mark.parametrize(
    "extractor",
    [
        None,
        "extract_convolution_patches",
        "extract_image_patches",
        "extract_pointwise_conv2d_patches",
    ],
)
def test_every_extractor_obeys_the_data_format(extractor):
    """A 1x1 kernel has one order of columns; its strides tell the formats apart."""
    x, strides = torch.randn(2, 3, 5, 4), {"NHWC": None, "NCHW": None}
    if extractor == "extract_image_patches":
        strides = {"NHWC": (1, 2, 3, 1), "NCHW": (1, 1, 2, 3)}
    pixels = (x[:, ::2, ::3] if strides["NHWC"] else x).reshape(-1, 4)
    for data_format, data in (("NHWC", x), ("NCHW", x.movedim(-1, 1))):
        args = [1, 1, 4, 7], "VALID", strides[data_format], None
        factor = ConvInputKroneckerFactor([data], *args, data_format, extractor)
        close(update(factor), pixels.T @ pixels / len(pixels))
        with pytest.raises(ValueError, match="expected 4 channels"):
            other = x if data_format == "NCHW" else x.movedim(-1, 1)
            ConvInputKroneckerFactor([other], *args, data_format, extractor)


@pytest.mark.parametrize(
    ("has_bias", "expected"), [(0, [[2.5]]), (1, [[2.5, 1.5], [1.5, 1]])]
)
def test_conv_input_one_pixel(has_bias, expected):
    x = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    close(
        update(ConvInputKroneckerFactor([x], [1, 1, 1, 1], "SAME", has_bias=has_bias)),
        expected,
    )


@pytest.mark.parametrize(
    ("shape", "filter_shape", "padding", "kwargs", "rank"),
    [
        ((1, 3, 3, 3, 27), (3, 3, 3, 27, 2), "SAME", {"strides": (2, 2, 2)}, 8),
        (
            (1, 3, 3, 9),
            (1, 1, 9, 2),
            "VALID",
            {"extract_patches_fn": "extract_pointwise_conv2d_patches"},
            9,
        ),
        (
            (1, 3, 3, 9),
            (1, 1, 9, 2),
            "VALID",
            {"extract_patches_fn": "extract_image_patches", "strides": (1, 2, 1, 1)},
            6,
        ),
        ((1, 3, 3, 2), (3, 3, 2, 2), "SAME", {"dilation_rate": (3, 3)}, 2),
    ],
)
def test_conv_input_ranks(shape, filter_shape, padding, kwargs, rank):
    cov = update(
        ConvInputKroneckerFactor([torch.rand(shape)], filter_shape, padding, **kwargs)
    )
    assert cov.shape == (np.prod(filter_shape[:-1]),) * 2
    assert (torch.linalg.eigvalsh(cov) > 1e-5).sum() == rank


@pytest.mark.parametrize("has_bias", [False, True])
def test_conv_input_shape_and_dtype(has_bias):
    x = torch.zeros(64, 1, 2, 3)
    factor = ConvInputKroneckerFactor([x], (1, 2, 3, 4), "SAME", has_bias=has_bias)
    assert factor.get_cov_var() is None
    factor.instantiate_cov_variables()
    assert factor.get_cov_var() is factor.get_cov()
    assert factor.get_cov().shape == (6 + has_bias, 6 + has_bias)
    assert factor.get_cov().dtype == torch.float64


def test_conv_output():
    grads = torch.arange(1.0, 17.0).view(2, 2, 2, 2)
    last = ConvOutputKroneckerFactor([[grads]], "NHWC", options=IDENTITY)
    close(update(last, 0.5), [[43, 46.5], [46.5, 51.5]])
    first = ConvOutputKroneckerFactor([[grads.movedim(-1, 1)]], "NCHW", options=IDENTITY)
    close(update(first, 0.5), [[43, 46.5], [46.5, 51.5]])


def test_conv_output_rank():
    grads = torch.rand(1, 3, 3, 3, 27)
    cov = update(ConvOutputKroneckerFactor([[grads]]))
    assert torch.linalg.matrix_rank(cov) == 27


@pytest.mark.parametrize(
    ("has_bias", "expected"),
    [
        (False, [[3, 3.5], [3.5, 5.5]]),
        (True, [[3, 3.5, 1], [3.5, 5.5, 1.5], [1, 1.5, 1]]),
    ],
)
def test_fully_connected_from_the_identity(has_bias, expected):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    factor = FullyConnectedKroneckerFactor([[x]], has_bias, options=IDENTITY)
    close(update(factor, 0.5), expected)


def test_leading_dimensions_are_rows():
    x = torch.randn(2, 3, 4, 5)
    a = update(FullyConnectedKroneckerFactor([[x]], True))
    b = update(FullyConnectedKroneckerFactor([[x.view(24, 5)]], True))
    close(a, b)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (IDENTITY, [1.45, 2.3775, 3.758625]),
        (FactorOptions(), [10.0, 15.1282051282, 20.3418054338]),
    ],
)
def test_moving_averages(options, expected):
    x = torch.tensor([[10.0**0.5]])
    factor = FullyConnectedKroneckerFactor([[x]], options=options)
    factor.instantiate_cov_variables()
    op = factor.make_covariance_update_op(0.95)
    for value, average in zip((10, 20, 30), expected, strict=True):
        cov = op([[torch.tensor([[value**0.5]])]])
        assert cov.item() == pytest.approx(average, abs=1e-9)


def test_decay_zero_forgets_and_one_averages():
    a, b = torch.randn(2, 4, 3)
    for decay, expected in (
        (0.0, compute_cov(b)),
        (1.0, (compute_cov(a) + compute_cov(b)) / 2),
    ):
        factor = FullyConnectedKroneckerFactor([[a]])
        factor.instantiate_cov_variables()
        op = factor.make_covariance_update_op(torch.tensor(decay))
        op()
        close(op([[b]]), expected)


# Towers, sources, and where the data come from.


@pytest.mark.parametrize(("strategy", "expected"), [("concat", 7.5), ("separate", 16 / 3)])
def test_towers(strategy, expected):
    towers = [torch.tensor(v).view(-1, 1, 1, 1) for v in ([1.0], [2.0, 3.0, 4.0])]
    options = FactorOptions(tower_strategy=strategy)
    cov = update(ConvInputKroneckerFactor(towers, [1, 1, 1, 1], "SAME", options=options))
    assert cov.item() == pytest.approx(expected, abs=1e-12)


def test_one_large_tower_is_two_halves():
    x = torch.randn(6, 4, 4, 2)
    whole = update(ConvInputKroneckerFactor([x], [3, 3, 2, 1], "SAME", has_bias=True))
    halves = update(
        ConvInputKroneckerFactor([x[:2], x[2:]], [3, 3, 2, 1], "SAME", has_bias=True)
    )
    close(whole, halves)


def test_sources_are_summed():
    a, b = torch.randn(2, 4, 3)
    cov = update(FullyConnectedKroneckerFactor([[a], [b]]))
    close(cov, compute_cov(a) + compute_cov(b))


def test_every_tower_of_every_source_is_checked():
    good, bad = torch.randn(2, 3), torch.randn(2, 4)
    factor = FullyConnectedKroneckerFactor([[good, good], [good, good]], name="fc")
    factor.instantiate_cov_variables()
    op = factor.make_covariance_update_op(0.0)
    for source, tower in ((0, 0), (0, 1), (1, 0), (1, 1)):
        data = [[good, good], [good, good]]
        data[source][tower] = bad
        with pytest.raises(ValueError, match="fc: expected rows of 3 features"):
            op(data)
        data[source].pop(tower)
        with pytest.raises(ValueError, match=r"fc: expected towers per source \[2, 2\]"):
            op(data)
    assert factor.num_updates == 0


def test_the_op_reads_its_inputs_again():
    x, y = ARANGE.clone(), ARANGE.numpy().copy()
    for data in (x, y):
        factor = ConvInputKroneckerFactor([data], [2, 2, 1, 1], "VALID")
        factor.instantiate_cov_variables()
        op = factor.make_covariance_update_op(0.0)
        before = op().clone()
        data *= 2
        close(op(), 4 * before)
    calls = []

    def provider():
        calls.append(1)
        return ARANGE

    factor = ConvInputKroneckerFactor(
        [provider], [2, 2, 1, 1], "VALID", dtype=torch.float64
    )
    assert not calls
    close(update(factor), ORACLES["VALID"])
    assert calls == [1]


class DLPackOnly:
    def __init__(self, tensor):
        self.tensor = tensor
        self.shape = tensor.shape

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_arrays_and_dlpack():
    array = ARANGE.numpy().copy()
    read_only = array.copy()
    read_only.flags.writeable = False
    reversed_twice = array[:, ::-1].copy()[:, ::-1]
    for data in (array, read_only, reversed_twice, DLPackOnly(ARANGE)):
        close(
            update(ConvInputKroneckerFactor([data], [2, 2, 1, 1], "VALID")),
            ORACLES["VALID"],
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    x = torch.randn(8, 5, 5, 2).to(dtype)
    cov = update(ConvInputKroneckerFactor([x], [3, 3, 2, 1], "SAME", has_bias=True))
    assert cov.dtype == torch.float32
    expected = update(
        ConvInputKroneckerFactor([x.float()], [3, 3, 2, 1], "SAME", has_bias=True)
    )
    torch.testing.assert_close(cov, expected)
    rows = torch.full((4096, 1), 1.0, dtype=dtype)  # 4096 + 1 is 4096 in half precision
    assert update(FullyConnectedKroneckerFactor([[rows]])).item() == 1.0


def test_long_forms_equal_short_ones():
    x = torch.randn(2, 7, 7, 2)
    short = ConvInputKroneckerFactor([x], [3, 3, 2, 1], "SAME", [2, 1], [1, 2])
    long = ConvInputKroneckerFactor([x], [3, 3, 2, 1], "SAME", [1, 2, 1, 1], [1, 1, 2, 1])
    image = ConvInputKroneckerFactor(
        [x],
        [3, 3, 2, 1],
        "SAME",
        [1, 2, 1, 1],
        [1, 1, 2, 1],
        "NHWC",
        "extract_image_patches",
    )
    first = ConvInputKroneckerFactor(
        [x.movedim(-1, 1)], [3, 3, 2, 1], "SAME", [1, 1, 2, 1], [1, 1, 1, 2], "NCHW"
    )
    expected = update(short)
    close(update(long), expected)
    close(update(image), expected)
    order = torch.arange(18).view(9, 2).T.reshape(-1)  # channel-major from offset-major
    close(update(first), expected[order][:, order])


def test_groups():
    x = torch.randn(4, 5, 5, 6)
    grouped = ConvInputKroneckerFactor([x], [3, 3, 2, 9], "SAME", groups=3, has_bias=True)
    cov = update(grouped)
    assert cov.shape == (3, 19, 19)
    for g in range(3):
        single = ConvInputKroneckerFactor(
            [x[..., 2 * g : 2 * g + 2]], [3, 3, 2, 3], "SAME", has_bias=True
        )
        close(cov[g], update(single))
    grouped.register_inverse(0.1)
    refresh(grouped)
    close(grouped.get_inverse(0.1), torch.linalg.inv(cov + 0.1 * torch.eye(19)))


# Powers.


def test_inverse_oracle():
    factor = with_cov([[5.0, 2.0], [2.0, 4.0]])
    factor.register_inverse(0.0)
    refresh(factor)
    close(factor.get_inverse(0), [[0.25, -0.125], [-0.125, 0.3125]])


@pytest.mark.parametrize(
    ("exp", "expected"),
    [
        (2, [[46.25, 22], [22, 24.25]]),
        (-0.5, [[0.4131489854, -0.0867510095], [-0.0867510095, 0.4998999949]]),
    ],
)
def test_power_oracles(exp, expected):
    factor = with_cov([[6.0, 2.0], [2.0, 4.0]])
    factor.register_matpower(exp, 0.5)
    refresh(factor)
    close(factor.get_matpower(exp, 0.5), expected)


def test_equal_dampings_share_one_matrix():
    factor = with_cov([[6.0, 2.0], [2.0, 4.0]])
    for value in (0.1, 0.1, 1e-5, 1e-5):
        factor.register_inverse(PackagedFunc(lambda value=value: value, f"damping {value}"))
    assert len(factor.state_dict()["powers"]) == 2
    factor.register_matpower(-0.5, 0.1)
    assert len(factor.state_dict()["powers"]) == 3
    factor.register_matpower(1, 0.1)  # served on the fly
    assert len(factor.state_dict()["powers"]) == 3
    factor.register_matpower(-0.5, 0.1)
    factor.register_matpower(-1.0, PackagedFunc(lambda: 0.1, "damping 0.1"))
    assert len(factor.state_dict()["powers"]) == 3


def test_the_first_function_of_an_identity_wins():
    factor = with_cov([[2.0]])
    factor.register_inverse(PackagedFunc(lambda: 1.0, "id"))
    factor.register_inverse(PackagedFunc(lambda: 5.0, "id"))
    refresh(factor)
    assert factor.get_inverse(PackagedFunc(lambda: 9.0, "id")).item() == pytest.approx(
        1 / 3
    )


@pytest.mark.parametrize("threshold", [2, 4])
def test_when_eigenvectors_are_used(threshold):
    factor = with_cov(
        [[6.0, 2.0], [2.0, 4.0]], eigenvalue_decomposition_threshold=threshold
    )
    for damping in range(1, 5):
        factor.register_inverse(float(damping))
        factor.instantiate_inv_variables()
        shared = damping >= threshold
        assert len(factor.make_inverse_update_ops()) == (1 if shared else damping)
    refresh_inverses([factor])
    for damping in (1.0, 2.0, 3.0, 4.0):
        expected = torch.linalg.inv(factor.get_cov() + damping * torch.eye(2))
        close(factor.get_inverse(damping), expected)


def test_an_eigendecomposition_at_hand_is_used_once():
    """Seen in the result: eigenvalues are clipped, a direct inverse's are not."""
    factor = with_cov([[-0.5, 0.0], [0.0, 1.0]], eigenvalue_clipping_threshold=0.0)
    factor.register_inverse(1.0)
    factor.instantiate_inv_variables()
    e, V = factor.get_eigendecomp()
    assert e.tolist() == [0.0, 1.0]
    close(V @ V.T, torch.eye(2))
    for op in factor.make_inverse_update_ops():
        op()
    close(factor.get_inverse(1.0), [[1.0, 0.0], [0.0, 0.5]])
    for op in factor.make_inverse_update_ops():
        op()
    close(factor.get_inverse(1.0), [[2.0, 0.0], [0.0, 0.5]])


def test_eigendecomp_follows_the_covariance():
    factor = with_cov([[2.0, 1.0], [1.0, 2.0]])
    close(factor.get_eigendecomp()[0], [1.0, 3.0])
    factor.get_cov_var().mul_(2)
    e, V = factor.get_eigendecomp()
    close(e, [2.0, 6.0])
    close((V * e) @ V.T, factor.get_cov())


def test_each_damping_function_is_called_once_per_refresh():
    calls = []

    def damping():
        calls.append(1)
        return 0.5

    factor = with_cov([[6.0, 2.0], [2.0, 4.0]])
    for exp in (-1, -0.5, 2):
        factor.register_matpower(exp, damping)
    refresh(factor)
    assert len(calls) == 1


def test_stored_powers_are_stale_until_refreshed():
    factor = with_cov([[1.0]])
    factor.register_inverse(1.0)
    refresh(factor)
    factor.accumulate(torch.tensor([[3.0]]), 0.0)
    assert factor.get_inverse(1.0).item() == pytest.approx(0.5)
    assert factor.get_matpower(1, 1.0).item() == 4.0
    refresh_inverses([factor])
    assert factor.get_inverse(1.0).item() == pytest.approx(0.25)


@pytest.mark.parametrize("exp", [-1, -0.5, 1, 2])
def test_multiplications(exp):
    C = compute_cov(torch.randn(9, 3))
    factor = with_cov(C)
    factor.register_matpower(exp, 0.3)
    refresh(factor)
    e, V = torch.linalg.eigh(C + 0.3 * torch.eye(3))
    power = (V * e**exp) @ V.T
    x = torch.randn(3, 4)
    close(factor.left_multiply_matpower(x, exp, 0.3), power @ x)
    close(factor.right_multiply_matpower(x.T, exp, 0.3), x.T @ power)
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[4, 1]]), x.T[:2], (6, 3), check_invariants=True
    )
    product = factor.right_multiply_matpower(sparse, exp, 0.3)
    assert product.layout == torch.sparse_coo
    assert sorted(product.indices()[0].tolist()) == [1, 4]
    close(product.to_dense(), sparse.to_dense() @ power)


def test_refresh_in_batches_equals_one_by_one():
    factors = [with_cov(compute_cov(torch.randn(9, n))) for n in (3, 3, 2, 3)]
    for i, factor in enumerate(factors):
        factor.register_inverse(0.1 * (i + 1))
        if i == 3:
            factor.register_matpower(-0.5, 0.7)
        factor.instantiate_inv_variables()
    refresh_inverses([*factors, factors[0]])
    for i, factor in enumerate(factors):
        C = factor.get_cov()
        expected = torch.linalg.inv(C + 0.1 * (i + 1) * torch.eye(len(C)))
        close(factor.get_inverse(0.1 * (i + 1)), expected)


def test_a_failing_refresh_changes_nothing():
    good, bad, by_eigenvectors = (with_cov(torch.eye(2)) for _ in range(3))
    by_eigenvectors.register_matpower(-0.5, 0.0)
    for factor in (good, bad, by_eigenvectors):
        factor.register_inverse(0.0)
        refresh(factor)
        factor.get_cov_var().mul_(2)
    bad.get_cov_var().fill_(1.0)
    with pytest.raises(torch.linalg.LinAlgError, match=r"fc.*singular"):
        refresh_inverses([by_eigenvectors, good, bad])
    for factor in (good, bad, by_eigenvectors):
        close(factor.get_inverse(0.0), torch.eye(2))


# Names, devices, state.


def test_names():
    x, y = torch.zeros(1), torch.zeros(2)
    assert scope_string_from_params([x]) == "Tensor"
    assert scope_string_from_params([x, y, x]) == "Tensor_Tensor_1_Tensor"
    assert (
        scope_string_from_params([[1, 2, 3], "foo", True, 4, (x, y)])
        == "1-2-3_foo_True_4_Tensor__Tensor_1"
    )
    with pytest.raises(ValueError, match=r"name of a factor.*got 0\.5"):
        scope_string_from_params([0.5])


def test_the_name_of_a_conv_factor_tells_its_extractor():
    def name(**kwargs):
        return ConvInputKroneckerFactor([ARANGE], [1, 1, 1, 1], "SAME", **kwargs).name

    assert name() == "ff_convinkron_Tensor_1-1-1-1_None_SAME_None_None_False"
    for option in (
        {"extract_patches_fn": "extract_pointwise_conv2d_patches"},
        {"sub_sample_inputs": 0.2},
        {"sub_sample_patches": 0.2},
        {"patch_mask": torch.ones(1, 1, 1)},
    ):
        assert name(**option) != name()
    assert name(sub_sample_inputs=0.2) != name(sub_sample_patches=0.2)
    assert name(name="conv1.input") == "conv1.input"


def test_to_moves_state():
    factor = with_cov(torch.eye(2))
    factor.register_inverse(1.0)
    refresh(factor)
    moved = factor.to("meta")
    assert moved is factor
    assert factor.get_cov().device.type == factor.get_inverse(1.0).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu():
    x = torch.randn(8, 6, 6, 3)
    cpu = ConvInputKroneckerFactor([x], [3, 3, 3, 1], "SAME", has_bias=True)
    gpu = ConvInputKroneckerFactor([x.cuda()], [3, 3, 3, 1], "SAME", has_bias=True)
    for factor in (cpu, gpu):
        update(factor)
        factor.register_inverse(0.1)
        refresh(factor)
    close(gpu.get_inverse(0.1).cpu(), cpu.get_inverse(0.1))


def test_state_is_restored_bit_for_bit(tmp_path):
    def make():
        factor = ConvInputKroneckerFactor([ARANGE], [2, 2, 1, 1], "SAME", has_bias=True)
        factor.instantiate_cov_variables()
        factor.register_inverse(0.1)
        factor.register_matpower(-0.5, 0.2)
        factor.instantiate_inv_variables()
        return factor, factor.make_covariance_update_op(0.9)

    a, op_a = make()
    op_a()
    op_a([3 * ARANGE])
    refresh_inverses([a])
    torch.save(a.state_dict(), tmp_path / "factor.pt")
    b, op_b = make()
    b.load_state_dict(torch.load(tmp_path / "factor.pt", weights_only=True))
    assert torch.equal(a.get_inverse(0.1), b.get_inverse(0.1))
    for op, factor in ((op_a, a), (op_b, b)):
        op([5 * ARANGE])
        refresh_inverses([factor])
    assert torch.equal(a.get_cov(), b.get_cov())
    assert torch.equal(a.get_matpower(-0.5, 0.2), b.get_matpower(-0.5, 0.2))


def test_loading_forgets_the_eigendecomposition():
    a, b = with_cov([[2.0]]), with_cov([[3.0]])
    assert a.get_eigendecomp()[0].item() == 2.0
    a.load_state_dict(b.state_dict())
    assert a.get_eigendecomp()[0].item() == pytest.approx(3.0)


def test_state_of_another_factor_is_refused():
    a, b = with_cov(torch.eye(2)), with_cov(torch.eye(3))
    before = b.get_cov().clone()
    with pytest.raises(ValueError, match=r"fc.*\(3, 3\).*got \(2, 2\)"):
        b.load_state_dict(a.state_dict())
    c = with_cov(2 * torch.eye(3))
    c.register_inverse(1.0)
    with pytest.raises(ValueError, match=r"powers \[\].*got \[-1\.0\]"):
        b.load_state_dict(c.state_dict())
    assert torch.equal(b.get_cov(), before)


# A bad batch.


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_batch_leaves_the_last_good_value(bad):
    factor = ConvInputKroneckerFactor([ARANGE], [2, 2, 1, 1], "VALID")
    good = update(factor, 0.95).clone()
    poisoned = ARANGE.clone()
    poisoned[0, 1, 1, 0] = bad
    with pytest.warns(RuntimeWarning, match=r"ff_convinkron.*NaN or Inf.*last good"):
        factor.make_covariance_update_op(0.95)([poisoned])
    assert torch.equal(factor.get_cov(), good)
    assert factor.num_rejected_updates == 1
    factor.make_covariance_update_op(0.95)([ARANGE])
    close(factor.get_cov(), good)


# Errors.


def conv(x=ARANGE, filter_shape=(2, 2, 1, 1), padding="VALID", *args, **kwargs):
    return ConvInputKroneckerFactor(
        [x], filter_shape, padding, *args, name="conv1", **kwargs
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: conv(torch.zeros(3, 3, 1)),
            r"conv1: inputs: expected rank 4.*\(3, 3, 1\)",
        ),
        (
            lambda: conv(torch.zeros(1, 3, 3, 2)),
            r"conv1: inputs: expected 1 channels.*got 2",
        ),
        (lambda: conv(data_format="NCHW"), r"conv1: inputs: expected 1 channels.*got 3"),
        (lambda: conv(padding="same"), r"conv1: padding: expected one of.*got 'same'"),
        (lambda: conv(data_format="CHWN"), r"conv1: data_format: expected one of.*'CHWN'"),
        (lambda: conv(data_format="NWC"), r"conv1: data_format: expected one of.*'NWC'"),
        (
            lambda: conv(extract_patches_fn="im2col"),
            r"extract_patches_fn: expected.*'im2col'",
        ),
        (lambda: conv(filter_shape=(4, 2, 1, 1)), r"conv1: kernel larger than the padded"),
        (lambda: conv(filter_shape=(2, 2)), r"conv1: filter_shape: expected positive"),
        (
            lambda: conv(filter_shape=(0, 2, 1, 1)),
            r"conv1: filter_shape: expected positive",
        ),
        (lambda: conv(strides=(2,)), r"conv1: strides: expected one positive.*got \[2\]"),
        (lambda: conv(strides=(0, 1)), r"conv1: strides: expected one positive"),
        (lambda: conv(strides=(2, 1, 1, 1)), r"conv1: strides: expected one positive"),
        (lambda: conv(dilation_rate=(1, 1, 1)), r"conv1: dilation_rate: expected one"),
        (
            lambda: conv(extract_patches_fn="extract_image_patches"),
            r"conv1: strides: .* needs the long form \(1, 'sh', 'sw', 1\)",
        ),
        (
            lambda: conv(strides=(1, 1), extract_patches_fn="extract_image_patches"),
            r"conv1: strides: .*always the long form",
        ),
        (
            lambda: conv(
                torch.zeros(1, 3, 1),
                (2, 1, 1),
                strides=(1, 1, 1),
                extract_patches_fn="extract_image_patches",
            ),
            r"conv1: extract_patches_fn: .*two spatial dimensions",
        ),
        (
            lambda: conv(extract_patches_fn="extract_pointwise_conv2d_patches"),
            r"conv1: extract_patches_fn: .*1x1 kernel",
        ),
        (
            lambda: conv(padding="SAME", padding_mode="circular"),
            r"conv1: padding_mode: 'circular' needs padding in integers",
        ),
        (
            lambda: ConvInputKroneckerFactor(
                [ARANGE, torch.zeros(1, 4, 3, 1)], (2, 2, 1, 1), "VALID", name="conv1"
            ),
            r"conv1: towers of different shape.*tower 1 has \(1, 4, 3, 1\)",
        ),
        (
            lambda: ConvInputKroneckerFactor([], (2, 2, 1, 1), "VALID"),
            "at least one tensor",
        ),
        (
            lambda: conv(torch.zeros(0, 3, 3, 1)),
            "conv1, tower 0: expected data, got an empty",
        ),
        (
            lambda: ConvOutputKroneckerFactor([[ARANGE]], "HWC"),
            "data_format: expected one of",
        ),
        (
            lambda: ConvOutputKroneckerFactor([[torch.zeros(2, 2)]]),
            r"outputs_grads: expected",
        ),
        (
            lambda: ConvOutputKroneckerFactor([[ARANGE]], num_channels=4, name="conv1"),
            r"conv1: outputs_grads: expected rank 4 with 4 channels",
        ),
        (
            lambda: FullyConnectedKroneckerFactor([[torch.zeros(2, 3)]], size=4, name="fc"),
            r"fc: expected rows of 4 features.*got shape \(2, 3\)",
        ),
        (lambda: FullyConnectedKroneckerFactor([[lambda: ARANGE]]), "size= where they are"),
        (lambda: FactorOptions(initial="ones"), "initial: expected one of"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(1, 3, 3, 1, dtype=torch.int64), r"conv1, tower 0: .*torch\.int64"),
        ("pixels", "conv1, tower 0: expected a tensor.*got str"),
    ],
)
def test_bad_types(data, message):
    with pytest.raises(TypeError, match=message):
        conv(data)


def test_bad_data_for_an_op():
    factor = conv()
    factor.instantiate_cov_variables()
    op = factor.make_covariance_update_op(0.9)
    before = op().clone()
    with pytest.raises(
        ValueError, match=r"conv1: expected towers per source \[1\].*got \[2\]"
    ):
        op([ARANGE, ARANGE])
    with pytest.raises(ValueError, match="conv1: inputs: expected 1 channels"):
        op([torch.zeros(1, 3, 3, 2)])
    assert torch.equal(factor.get_cov(), before)
    with pytest.raises(
        ValueError, match=r"ema_decay: expected a number in \[0, 1\], got 1\.5"
    ):
        factor.make_covariance_update_op(1.5)


def test_calls_out_of_order():
    factor = conv()
    for early in (factor.get_cov, lambda: factor.make_covariance_update_op(0.9)):
        with pytest.raises(
            RuntimeError, match=r"conv1.*instantiate_cov_variables\(\) first"
        ):
            early()
    factor.instantiate_cov_variables()
    with pytest.raises(RuntimeError, match="called twice"):
        factor.instantiate_cov_variables()
    with pytest.raises(KeyError, match=r"conv1.*not registered.*register_matpower"):
        factor.get_inverse(0.1)
    assert factor.make_inverse_update_ops() == []
    factor.register_inverse(0.1)
    for _ in range(2):  # before instantiating, and before refreshing
        with pytest.raises(RuntimeError, match=r"conv1.*make_inverse_update_ops"):
            factor.get_inverse(0.1)
        if not factor.state_dict()["powers"][0]["tensors"]:
            factor.instantiate_inv_variables()
    with pytest.raises(RuntimeError, match="called twice"):
        factor.instantiate_inv_variables()
    with pytest.raises(ValueError, match="damping: expected a finite number >= 0, got -1"):
        factor.register_inverse(-1)


def test_singular_factor_with_zero_damping():
    factor = conv()  # four patches of rank two
    update(factor)
    factor.register_inverse(0.0)
    factor.instantiate_inv_variables()
    (op,) = factor.make_inverse_update_ops()
    with pytest.raises(torch.linalg.LinAlgError, match=r"conv1.*singular.*larger damping"):
        op()


@pytest.mark.parametrize("shape", [(3,), (4, 2, 2), (5, 2)])
def test_operands_of_another_shape(shape):
    factor = with_cov(torch.eye(4))
    with pytest.raises(ValueError, match=r"fc: left_multiply.*\[4, k\], got"):
        factor.left_multiply_matpower(torch.zeros(shape), 1, 0.1)
    with pytest.raises(ValueError, match=r"fc: right_multiply.*\[k, 4\], got"):
        factor.right_multiply_matpower(torch.zeros(shape), 1, 0.1)
    with pytest.raises(ValueError, match="expected a dense x"):
        factor.left_multiply_matpower(torch.eye(4).to_sparse(), 1, 0.1)


# Properties.


@given(
    batch=st.integers(1, 6),
    split=st.integers(1, 5),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_moments_are_psd_and_do_not_depend_on_order_or_split(batch, split, has_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 5, 2, dtype=torch.float64, generator=generator)
    cov = update(ConvInputKroneckerFactor([x], [2, 3, 2, 1], "SAME", has_bias=has_bias))
    assert torch.equal(cov, cov.T)
    assert torch.linalg.eigvalsh(cov)[0] > -1e-12
    parts = [part.flip(0) for part in x.split(split)]
    other = update(ConvInputKroneckerFactor(parts, [2, 3, 2, 1], "SAME", has_bias=has_bias))
    close(cov, other)
