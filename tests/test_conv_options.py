"""Uncorrelated activations, sub-sampled examples and patches, masked patches."""

import itertools

import pytest
import torch

from kfac_torch.fisher_factors import (
    ConvInputKroneckerFactor,
    ConvInputSUAKroneckerFactor,
    FactorOptions,
    SubSampling,
    refresh_inverses,
)

pytestmark = pytest.mark.usefixtures("float64")


def update(factor, decay=0.0):
    factor.instantiate_cov_variables()
    return factor.make_covariance_update_op(decay)()


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


# Spatially uncorrelated activations.


def white_noise(num_locations):
    """All sequences of three two-channel values: locations exactly uncorrelated.

    One example per sequence, `[3^locations, locations, 2]`.
    """
    values = torch.tensor([[1.0, 0.0], [0.5, 2.0], [-1.0, 3.0]])
    return torch.stack(
        [values[list(s)] for s in itertools.product(range(3), repeat=num_locations)]
    )


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("data_format", ["NWC", "NCW"])
def test_white_noise_gives_the_exact_factor(data_format, has_bias):
    x = white_noise(4)
    x = x if data_format == "NWC" else x.movedim(-1, 1)
    args = ([x], [3, 2, 1], "VALID", None, None, data_format, None, has_bias)
    exact, sua = ConvInputKroneckerFactor(*args), ConvInputSUAKroneckerFactor(*args)
    expected = update(exact)
    update(sua)
    close(sua.get_cov(), expected)
    close(sua.cov_trace(), expected.trace())
    assert sua.cov_dim == len(expected)
    assert sua.num_rows(x) == exact.num_rows(x)


def dense(x, offsets, has_bias, zero_mean, channels_last):
    rows = x.reshape(-1, x.shape[-1])
    m = rows.mean(0)
    cov = (rows - m).T @ (rows - m) / len(rows)
    m = torch.zeros_like(m) if zero_mean else m
    eye, one = torch.eye(offsets), torch.ones(offsets)
    sides = ((eye, one), (cov, m)) if channels_last else ((cov, m), (eye, one))
    n = offsets * len(m)
    A = torch.zeros(n + has_bias, n + has_bias)
    A[:n, :n] = torch.kron(sides[0][0], sides[1][0])
    u = torch.cat([torch.kron(sides[0][1], sides[1][1]), torch.ones(int(has_bias))])
    return A + torch.outer(u, u)


@pytest.mark.parametrize("zero_mean", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sua_against_the_dense_matrix(channels_last, has_bias, zero_mean):
    """The lineage's sizes: 3x3 images of 2 channels, a 2x2 kernel, damping 0.03."""
    x = torch.randn(4, 3, 3, 2) + 1
    factor = ConvInputSUAKroneckerFactor(
        [x if channels_last else x.movedim(-1, 1)],
        [2, 2, 2, 1],
        "SAME",
        data_format="NHWC" if channels_last else "NCHW",
        has_bias=has_bias,
        zero_mean=zero_mean,
    )
    update(factor)
    A = dense(x, 4, has_bias, zero_mean, channels_last)
    close(factor.get_cov(), A)
    close(factor.cov_trace(), A.trace())
    for damping in (0.03, 1e-9):
        factor.register_inverse(damping)
        factor.instantiate_inv_variables()
    for op in factor.make_inverse_update_ops():
        op()
    v = torch.randn(len(A), 3)
    for damping in (0.03, 1e-9):
        damped = A + damping * torch.eye(len(A))
        expected = torch.linalg.solve(damped, v)
        close(factor.left_multiply_matpower(v, -1, damping), expected, 1e-7)
        close(factor.right_multiply_matpower(v.T, -1, damping), expected.T, 1e-7)
        close(factor.left_multiply_matpower(v, 1, damping), damped @ v)
        close(factor.right_multiply_matpower(v.T, 1, damping), v.T @ damped)
    close(factor.get_inverse(0.03), torch.linalg.inv(A + 0.03 * torch.eye(len(A))))


def test_sua_keeps_the_inverse_until_refreshed():
    factor = ConvInputSUAKroneckerFactor(
        [torch.randn(4, 5, 2)], [3, 2, 1], "SAME", has_bias=True
    )
    update(factor)
    factor.register_inverse(0.1)
    factor.instantiate_inv_variables()
    refresh_inverses([factor])
    before = factor.get_inverse(0.1)
    factor.make_covariance_update_op(0.5)([torch.randn(4, 5, 2)])
    assert torch.equal(factor.get_inverse(0.1), before)
    refresh_inverses([factor])
    expected = torch.linalg.inv(factor.get_cov() + 0.1 * torch.eye(7))
    close(factor.get_inverse(0.1), expected)
    e, V = factor.get_eigendecomp()
    close((V * e) @ V.T, factor.get_cov())


def sua(name="conv"):
    return ConvInputSUAKroneckerFactor([torch.ones(2, 3, 1)], [2, 1, 1], "SAME", name=name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sua().register_matpower(-0.5, 0.1), r"conv: .*inverse alone.*power -0\.5"),
        (lambda: sua().get_matpower(2, 0.1), "conv: .*inverse alone.*got the power 2"),
        (lambda: sua().register_cholesky(0.1), "conv: .*got Cholesky factors"),
        (lambda: sua().register_cholesky_inverse(0.1), "conv: .*got Cholesky factors"),
    ],
)
def test_sua_has_no_other_powers(call, message):
    with pytest.raises(NotImplementedError, match=message):
        call()


def test_sua_errors():
    factor = sua()
    with pytest.raises(KeyError, match=r"conv: the inverse .*call register_inverse\("):
        factor.left_multiply_matpower(torch.zeros(2, 1), -1, 0.1)
    with pytest.raises(ValueError, match=r"conv: right_multiply_matpower.*\[k, 2\]"):
        factor.right_multiply_matpower(torch.zeros(3, 3), -1, 0.1)
    update(factor)  # constant inputs: no variance
    factor.register_inverse(0.0)
    factor.instantiate_inv_variables()
    with pytest.raises(torch.linalg.LinAlgError, match=r"conv.*singular.*larger damping"):
        refresh_inverses([factor])


# Sub-sampling.


def conv(x, *, name="conv", **kwargs):
    return ConvInputKroneckerFactor(
        [x], [2, 2, x.shape[-1], 1], "VALID", has_bias=True, name=name, **kwargs
    )


class Spy(ConvInputKroneckerFactor):
    """Keeps what was drawn."""

    def _draw(self, population, number):
        chosen = super()._draw(population, number)
        self.drawn = [*getattr(self, "drawn", []), (population, chosen)]
        return chosen


@pytest.mark.parametrize(
    ("rows", "columns", "kept"), [(10, 2, 2), (10, 8, 8), (3, 3, 3), (2, 3, 2)]
)
def test_how_many_patches_are_kept(rows, columns, kept):
    """The lineage's sizes, at one row per column."""
    x = torch.randn(rows, 1, columns)
    factor = Spy([x], [1, columns, 1], "VALID", sub_sample_patches=1.0)
    cov = update(factor)
    chosen = factor.drawn[0][1] if kept < rows else torch.arange(rows)
    assert len(chosen.unique()) == kept
    P = x[chosen, 0]
    close(cov, P.T @ P / kept)
    assert (kept < rows) == hasattr(factor, "drawn")


def test_the_default_of_the_lineage_and_the_cap():
    x = torch.randn(6, 5, 5, 1)  # 96 patches of 4 columns
    factor = Spy([x], [2, 2, 1, 1], "VALID", sub_sample_patches=3.0)
    update(factor)
    assert [(n, len(chosen)) for n, chosen in factor.drawn] == [(96, 12)]
    options = FactorOptions(sub_sampling=SubSampling(patches=3.0, max_patches=5))
    factor = Spy([x], [2, 2, 1, 1], "VALID", options=options)
    update(factor)
    assert [(n, len(chosen)) for n, chosen in factor.drawn] == [(96, 5)]


@pytest.mark.parametrize(
    ("data_format", "groups"), [("NHWC", 1), ("NCHW", 1), ("NHWC", 2), ("NCHW", 2)]
)
def test_chosen_patches_are_rows_of_all_patches(data_format, groups):
    x = torch.randn(3, 5, 6, 4)
    x = x if data_format == "NHWC" else x.movedim(-1, 1)
    args = ([x], [2, 3, 4 // groups, 2], "SAME", [2, 1], None, data_format, None, True)
    some = Spy(*args, groups=groups, sub_sample_patches=0.5)
    cov = update(some)
    chosen = some.drawn[0][1]
    # Row by row: a factor of one example and one location each.
    rows = torch.zeros(3 * 3 * 6)
    rows[chosen] = 1
    total = torch.zeros_like(cov)
    for n, i, j in itertools.product(range(3), range(3), range(6)):
        if rows[n * 18 + i * 6 + j]:
            hwc = x[n] if data_format == "NHWC" else x[n].movedim(0, -1)
            padded = torch.nn.functional.pad(hwc, (0, 0, 1, 1, 0, 1))
            window = padded[2 * i : 2 * i + 2, j : j + 3]
            window = window if data_format == "NHWC" else window.movedim(-1, 0)
            one = ConvInputKroneckerFactor(
                [window[None]], [2, 3, 4 // groups, 2], "VALID", data_format=data_format,
                has_bias=True, groups=groups,
            )  # fmt: skip
            total += update(one)
    close(cov, total / len(chosen))


def test_examples_are_drawn_anew_at_every_update():
    x = torch.randn(11, 4, 4, 2)
    factor = Spy([x], [2, 2, 2, 1], "VALID", sub_sample_inputs=0.2)
    cov = update(factor)
    op = factor.make_covariance_update_op(0.0)
    op()
    op()
    draws = [chosen for _, chosen in factor.drawn]
    assert [len(chosen.unique()) for chosen in draws] == [3, 3, 3]  # ceil(0.2 * 11)
    assert len({tuple(chosen.tolist()) for chosen in draws}) > 1
    close(cov, update(ConvInputKroneckerFactor([x[draws[2]]], [2, 2, 2, 1], "VALID")))


def test_arguments_come_before_options():
    options = FactorOptions(sub_sampling=SubSampling(inputs=0.5, seed=3))
    x = torch.randn(8, 4, 4, 1)
    plain = Spy([x], [2, 2, 1, 1], "VALID", options=options)
    update(plain)
    assert len(plain.drawn[0][1]) == 4
    other = Spy([x], [2, 2, 1, 1], "VALID", options=options, sub_sample_inputs=0.25)
    update(other)
    assert len(other.drawn[0][1]) == 2
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(plain.drawn[0][1], torch.randperm(8, generator=generator)[:4])


def test_the_generator_is_part_of_the_state(tmp_path):
    x = torch.randn(10, 4, 4, 1)
    a, b = conv(x, sub_sample_patches=1.0), conv(x, sub_sample_patches=1.0)
    update(a)
    torch.save(a.state_dict(), tmp_path / "factor.pt")
    b.instantiate_cov_variables()
    b.load_state_dict(torch.load(tmp_path / "factor.pt", weights_only=True))
    after = [factor.make_covariance_update_op(0.5)().clone() for factor in (a, b)]
    assert torch.equal(*after)
    fresh = update(conv(x, sub_sample_patches=1.0), 0.5)
    assert not torch.equal(after[0], fresh)
    with pytest.raises(ValueError, match="expected the state of a factor without sub-s"):
        conv(x).load_state_dict(a.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": 0.0}, r"inputs: expected a fraction in \(0, 1\], got 0\.0"),
        ({"inputs": 1.1}, r"inputs: expected a fraction in \(0, 1\], got 1\.1"),
        ({"patches": 0.0}, "expected positive numbers"),
        ({"max_patches": 0}, "expected positive numbers"),
    ],
)
def test_sub_sampling_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SubSampling(**options)


def test_sub_sampling_errors_of_the_arguments():
    with pytest.raises(ValueError, match=r"expected a fraction in \(0, 1\], got 2"):
        conv(torch.ones(2, 3, 3, 1), sub_sample_inputs=2)


# Masks.


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("sub_sample_patches", [None, 1.0])
def test_a_mask_multiplies_every_patch(data_format, sub_sample_patches):
    """A mask of zeros and ones is a smaller kernel, padded with zero columns."""
    x = torch.randn(5, 5, 5, 2)
    mask = torch.zeros(2, 2, 2)
    mask[0, 1, 0], mask[1, 1, 1] = 1, 2
    x = x if data_format == "NHWC" else x.movedim(-1, 1)

    def make(**kwargs):
        return ConvInputKroneckerFactor(
            [x], [2, 2, 2, 1], "VALID", None, None, data_format, None, True,
            sub_sample_patches=sub_sample_patches, **kwargs,
        )  # fmt: skip

    flat = mask if data_format == "NHWC" else mask.movedim(-1, 0)
    flat = torch.cat([flat.flatten(), torch.ones(1)])
    close(update(make(patch_mask=mask.numpy())), update(make()) * torch.outer(flat, flat))


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"conv: patch_mask: expected shape \(2, 2, 1\)"):
        conv(torch.ones(2, 3, 3, 1), patch_mask=torch.ones(2, 2))
