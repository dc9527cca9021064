"""Second moments of patches against patches formed one kernel offset at a time."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kfac_torch import gram, patch_lags, patch_moments, patch_slices, patch_strips
from kfac_torch.patch_moments import patch_second_moment, resolve_padding

METHODS = ["auto", "chunks", "strips", "lags", "slices"]


def formed(
    inputs: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    pairs: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int = 1,
    has_bias: bool = False,
    padding_mode: str = "zeros",
) -> Tensor:
    """The oracle: one column at a time, straight from the definition."""
    flat = [size for pair in reversed(pairs) for size in pair]
    mode = "constant" if padding_mode == "zeros" else padding_mode
    x = F.pad(inputs, flat, mode=mode) if any(flat) else inputs
    dims = range(len(kernel))
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    out = [(x.shape[2 + i] - span[i]) // stride[i] + 1 for i in dims]
    stack = []
    for channels in x.chunk(groups, 1):
        columns = []
        for channel in channels.unbind(1):
            for offset in itertools.product(*map(range, kernel)):
                column = channel
                for i in dims:
                    first = dilation[i] * offset[i]
                    where = first + stride[i] * torch.arange(out[i])
                    column = column.index_select(1 + i, where)
                columns.append(column.flatten())
        if has_bias:
            columns.append(torch.ones_like(columns[0]))
        patches = torch.stack(columns, 1)
        stack.append(patches.T @ patches / len(patches))
    return torch.stack(stack) if groups > 1 else stack[0]


def assert_agree(
    ours: Tensor, expected: Tensor, tolerance: float = 1e-12, floor: float = 0.0
) -> None:
    """To a share of the largest entry, or of floor where patches miss the input."""
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    error = (ours - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), floor)


def energy(case: dict[str, Any]) -> float:
    return case["inputs"].square().mean().item()


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Inputs and arguments."""
    dims = draw(st.integers(1, 3))
    largest = {1: 12, 2: 8, 3: 5}[dims]

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    space, kernel, dilation = sizes(1, largest), sizes(1, 4 - (dims > 2)), sizes(1, 3)
    stride = draw(st.sampled_from([(1,) * dims, sizes(1, 3)]))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    most = [{"circular": n, "reflect": n - 1}.get(mode, 4) for n in space]
    form = draw(st.sampled_from(["pairs", "tuple", "integer", "SAME", "valid"]))
    padding: Any = form
    if form == "pairs":
        pair = [st.tuples(st.integers(0, m), st.integers(0, m)) for m in most]
        padding = draw(st.tuples(*pair))
    elif form == "tuple":
        padding = tuple(draw(st.integers(0, m)) for m in most)
    elif form == "integer":
        padding = draw(st.integers(0, min(most)))
    pairs = resolve_padding(padding, space, kernel, stride, dilation)
    # Cut the kernel down to what fits, as the padding allows.
    if any(max(pair) > m for pair, m in zip(pairs, most, strict=True)):
        padding, pairs = 0, ((0, 0),) * dims
    kernel = tuple(
        min(k, (n + sum(pair) - 1) // d + 1)
        for k, n, pair, d in zip(kernel, space, pairs, dilation, strict=True)
    )
    groups, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 4)), groups * each, *space)
    return {
        "inputs": torch.randn(shape, dtype=torch.float64, generator=generator),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "has_bias": draw(st.booleans()),
        "padding_mode": mode,
    }


def expected_of(case: dict[str, Any]) -> Tensor:
    space = case["inputs"].shape[2:]
    sizes = case["kernel_size"], case["stride"], case["dilation"]
    pairs = resolve_padding(case["padding"], space, *sizes)
    return formed(
        case["inputs"],
        case["kernel_size"],
        case["stride"],
        pairs,
        case["dilation"],
        case["groups"],
        case["has_bias"],
        case["padding_mode"],
    )


@settings(deadline=None, max_examples=200)
@given(convolutions())
def test_lags_match_formed_patches(case: dict[str, Any]) -> None:
    ours = patch_second_moment(**case, method="lags")
    assert_agree(ours, expected_of(case), floor=energy(case))


@settings(deadline=None, max_examples=200)
@given(convolutions())
def test_slices_match_formed_patches(case: dict[str, Any]) -> None:
    ours = patch_second_moment(**case, method="slices")
    assert_agree(ours, expected_of(case), floor=energy(case))


@settings(deadline=None, max_examples=150)
@given(convolutions())
def test_chunks_match_formed_patches(case: dict[str, Any]) -> None:
    assert_agree(patch_second_moment(**case, method="chunks"), expected_of(case))


@settings(deadline=None, max_examples=200)
@given(convolutions())
def test_strips_match_formed_patches(case: dict[str, Any]) -> None:
    ours = patch_second_moment(**case, method="strips")
    assert_agree(ours, expected_of(case), floor=energy(case))


@settings(deadline=None, max_examples=100)
@given(convolutions())
def test_auto_matches_formed_patches(case: dict[str, Any]) -> None:
    ours = patch_second_moment(**case)
    assert_agree(ours, expected_of(case), floor=energy(case))


@settings(deadline=None, max_examples=60)
@given(convolutions(), st.sampled_from(METHODS))
def test_symmetric_and_positive(case: dict[str, Any], method: str) -> None:
    moment = patch_second_moment(**case, method=method)
    assert torch.equal(moment, moment.mT)
    values = torch.linalg.eigvalsh(moment)
    assert values.min() >= -1e-12 * max(values.max().item(), energy(case))


@settings(deadline=None, max_examples=60)
@given(convolutions(), st.sampled_from(METHODS))
def test_bias_entries(case: dict[str, Any], method: str) -> None:
    with_bias = patch_second_moment(**{**case, "has_bias": True}, method=method)
    without = patch_second_moment(**{**case, "has_bias": False}, method=method)
    assert torch.equal(with_bias[..., -1, -1], torch.ones_like(with_bias[..., -1, -1]))
    assert_agree(with_bias[..., :-1, :-1], without, floor=energy(case))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", [0, 1, "SAME", ((0, 2), (1, 0))])
def test_columns_are_those_of_unfold(method: str, padding: Any) -> None:
    inputs = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    pairs = resolve_padding(padding, (7, 6), (3, 2))
    padded = F.pad(inputs, [*pairs[1], *pairs[0]])
    patches = F.unfold(padded, (3, 2)).transpose(1, 2).flatten(0, 1)
    moment = patch_second_moment(inputs, (3, 2), padding=padding, method=method)
    assert_agree(moment, patches.T @ patches / len(patches))


@pytest.mark.parametrize("method", METHODS)
def test_first_layer_factor_gives_the_output_energy(method: str) -> None:
    """Σ over outputs of y² / (N T) is wᵀ A w for a convolution y = conv(x, w)."""
    inputs = torch.randn(5, 6, 9, 9, dtype=torch.float64)
    conv = torch.nn.Conv2d(
        6, 4, 3, padding="same", dilation=2, groups=2, padding_mode="circular"
    ).double()
    moment = patch_second_moment(
        inputs,
        3,
        padding="same",
        dilation=2,
        groups=2,
        has_bias=True,
        padding_mode="circular",
        method=method,
    )
    assert conv.bias is not None
    weight = torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1).view(2, 2, -1)
    energy = (weight @ moment * weight).sum(-1).flatten()
    torch.testing.assert_close(
        energy, conv(inputs).square().mean((0, 2, 3)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_depthwise(method: str, kernel: int) -> None:
    inputs = torch.randn(4, 5, 6, 7, dtype=torch.float64)
    moment = patch_second_moment(
        inputs, kernel, padding="SAME", groups=5, has_bias=True, method=method
    )
    assert moment.shape == (5, kernel**2 + 1, kernel**2 + 1)
    for channel, each in zip(inputs.split(1, 1), moment, strict=True):
        alone = patch_second_moment(
            channel, kernel, padding="SAME", has_bias=True, method="chunks"
        )
        assert_agree(each, alone)


@pytest.mark.parametrize("held", [1, 3, 30, 200, 2000])
@pytest.mark.parametrize("groups", [1, 2])
def test_chunk_boundaries_down_to_one_row(
    monkeypatch: pytest.MonkeyPatch, held: int, groups: int
) -> None:
    """Also one image many times the buffer, and one of its rows."""
    inputs = torch.randn(5, 4, 9, 8, dtype=torch.float64)
    kernel, stride, pairs, dilation = (3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2)
    columns = 4 * 3 * 2
    monkeypatch.setattr(patch_strips, "_HELD_BYTES", held * columns * 8)
    buffers = []
    new_empty = Tensor.new_empty

    def recorded(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        buffers.append(new_empty(self, *args, **kwargs))
        return buffers[-1]

    monkeypatch.setattr(Tensor, "new_empty", recorded)
    moment = patch_second_moment(
        inputs, kernel, stride, pairs, dilation, groups=groups, method="chunks"
    )
    assert [buffer.numel() <= held * columns for buffer in buffers] == [True]
    expected = formed(inputs, kernel, stride, pairs, dilation, groups)
    assert_agree(moment, expected)


@pytest.mark.parametrize("held", [1, 40, 200, 2000])
@pytest.mark.parametrize(
    ("stride", "dilation"), [((1, 1), (1, 2)), ((2, 1), (1, 1)), ((3, 2), (2, 1))]
)
@pytest.mark.parametrize(("groups", "mode"), [(1, "zeros"), (2, "zeros"), (4, "reflect")])
def test_strips_of_pieces_down_to_one_location(
    monkeypatch: pytest.MonkeyPatch,
    held: int,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    mode: str,
) -> None:
    """Each piece of an image has borders of its own."""
    inputs = torch.randn(5, 4, 14, 8, dtype=torch.float64)
    kernel, pairs = (5, 2), ((3, 1), (2, 1))
    monkeypatch.setattr(patch_strips, "_HELD_BYTES", held * 5 * 4 * 2 * 8)
    case = (kernel, stride, pairs, dilation)
    moment = patch_second_moment(
        inputs, *case, groups=groups, padding_mode=mode, method="strips"
    )
    assert_agree(moment, formed(inputs, *case, groups, padding_mode=mode))


@pytest.mark.parametrize("number", [2, 3, 6])
@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3), (1, 1)), ((3, 5), (1, 2)), ((2, 2), (2, 3))]
)
@pytest.mark.parametrize(("groups", "mode"), [(1, "zeros"), (2, "zeros"), (1, "reflect")])
def test_strips_of_joined_patches(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    mode: str,
) -> None:
    width = 5 * stride[1] + kernel[1] - 3  # six locations
    inputs = torch.randn(4, 4, 9, width, dtype=torch.float64)
    case = (kernel, stride, ((1, 0), (2, 1)))
    found = []

    def forced(conv: Any) -> int:
        found.append(conv.out[-1])
        return number

    monkeypatch.setattr(patch_moments, "_joined_number", forced)
    more: dict[str, Any] = {"groups": groups, "padding_mode": mode}
    moment = patch_second_moment(inputs, *case, method="strips", **more)
    assert found == [6]
    assert torch.equal(moment, moment.mT)
    assert_agree(moment, formed(inputs, *case, (1, 1), groups, padding_mode=mode))
    biased = patch_second_moment(inputs, *case, method="strips", has_bias=True, **more)
    assert_agree(biased[..., :-1, :-1], moment)


def test_stems_join_patches() -> None:
    def number(channels: int, size: int, k: int, s: int) -> int:
        inputs = torch.empty(32, channels, size, size)
        sizes = {"kernel_size": k, "stride": s, "dilation": 1}
        conv = patch_moments.describe(inputs, sizes, "SAME", 1, "zeros")
        return patch_moments._joined_number(conv)

    assert number(3, 224, 7, 2) == 4
    assert number(64, 32, 3, 2) == 1


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2), (2, 1)])
def test_strips_wide_enough_for_bands(kernel: int, stride: int) -> None:
    inputs = torch.randn(2, 420 // (kernel * stride), 7, 6, dtype=torch.float64)
    case = {"stride": stride, "padding": kernel // 2}
    moment = patch_second_moment(inputs, kernel, method="strips", **case)
    assert torch.equal(moment, moment.mT)
    assert_agree(moment, patch_second_moment(inputs, kernel, method="chunks", **case))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [5, 400])
def test_inputs_that_are_patches(layout: torch.memory_format, channels: int) -> None:
    inputs = torch.randn(3, channels, 7, 6, dtype=torch.float64)
    rows = inputs.movedim(1, -1).flatten(0, 2)
    moment = patch_second_moment(inputs.to(memory_format=layout), 1, method="chunks")
    assert torch.equal(moment, moment.mT)
    assert_agree(moment, rows.T @ rows / len(rows))


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("channels", [5, 200])
@pytest.mark.parametrize("held", [1, 5000, 2**20])
def test_locations_that_are_apart(
    monkeypatch: pytest.MonkeyPatch, size: int, channels: int, held: int
) -> None:
    monkeypatch.setattr(patch_strips, "_HELD_BYTES", held)
    inputs = torch.randn(5, channels, size, size + 2, dtype=torch.float64)
    rows = inputs[:, :, ::2, ::3].movedim(1, -1).flatten(0, 2)
    moment = patch_second_moment(inputs, 1, (2, 3), method="chunks")
    assert torch.equal(moment, moment.mT)
    assert_agree(moment, rows.T @ rows / len(rows))


def test_products_of_slices_with_themselves_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(3, 20, 6, 7, dtype=torch.float64)
    whole = patch_second_moment(inputs, 3, padding=1, method="slices")
    monkeypatch.setattr(patch_slices, "_HALVED", 0)
    halved = patch_second_moment(inputs, 3, padding=1, method="slices")
    assert_agree(halved, whole)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("size", [1, 500, 4000])
def test_small_pieces_of_work(
    monkeypatch: pytest.MonkeyPatch, method: str, size: int
) -> None:
    inputs = torch.randn(7, 6, 9, 8, dtype=torch.float64)
    whole = patch_second_moment(inputs, 3, padding=1, groups=2, method=method)
    monkeypatch.setattr(patch_strips, "_HELD_BYTES", size)
    monkeypatch.setattr(patch_lags, "_SPECTRUM_BYTES", size)
    for module in (patch_lags, gram):
        monkeypatch.setattr(module, "_CACHE_BYTES", size)
    pieces = patch_second_moment(inputs, 3, padding=1, groups=2, method=method)
    assert_agree(pieces, whole)


@settings(deadline=None, max_examples=40)
@given(convolutions(), st.sampled_from(METHODS), st.integers(1, 3))
def test_batch_splitting(case: dict[str, Any], method: str, first: int) -> None:
    inputs = case.pop("inputs")
    whole = patch_second_moment(inputs, **case, method=method)
    parts = [part for part in (inputs[:first], inputs[first:]) if len(part)]
    mean = sum(
        patch_second_moment(part, **case, method=method) * len(part) for part in parts
    ) / len(inputs)
    assert isinstance(mean, Tensor)
    assert_agree(mean, whole, floor=inputs.square().mean().item())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(method: str, dtype: torch.dtype) -> None:
    # Large enough a batch for an accumulator in half precision to be far off.
    inputs = torch.randn(64, 3, 12, 12).add(2).to(dtype)
    case: dict[str, Any] = {"padding": 1, "has_bias": True, "method": method}
    ours = patch_second_moment(inputs, 3, **case)
    theirs = patch_second_moment(inputs.float(), 3, **case)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_float32_is_as_good_as_float32(method: str, mode: str) -> None:
    inputs = torch.randn(16, 8, 10, 11).relu()
    case: dict[str, Any] = {"padding": 1, "padding_mode": mode, "method": method}
    ours = patch_second_moment(inputs, 3, **case)
    exact = patch_second_moment(inputs.double(), 3, **case)
    assert ours.dtype == torch.float32
    assert_agree(ours.double(), exact, 2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(method: str) -> None:
    inputs = torch.randn(8, 4, 8, 8)
    expected = patch_second_moment(inputs, 3, padding=1, has_bias=True, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = patch_second_moment(inputs, 3, padding=1, has_bias=True, method=method)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_history(method: str) -> None:
    inputs = torch.randn(2, 3, 5, 5, requires_grad=True)
    moment = patch_second_moment(inputs, 3, has_bias=True, method=method)
    assert not moment.requires_grad
    assert moment.grad_fn is None


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_alone_whatever_their_layout(method: str) -> None:
    plain = torch.randn(4, 6, 7, 8, dtype=torch.float64)
    expected = patch_second_moment(plain, 3, padding=1, method=method)
    for inputs in (
        plain.to(memory_format=torch.channels_last),
        plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        plain.repeat_interleave(2, 3)[..., ::2],
    ):
        before = inputs.clone()
        assert_agree(patch_second_moment(inputs, 3, padding=1, method=method), expected)
        assert torch.equal(inputs, before)


def test_auto_takes_what_pays() -> None:
    def choice(channels: int, size: int, batch: int, k: int = 3, s: int = 1) -> str:
        inputs = torch.empty(batch, channels, size, size)
        sizes = {"kernel_size": k, "stride": s, "dilation": 1}
        conv = patch_moments.describe(inputs, sizes, "SAME", 1, "zeros")
        return patch_moments._choose(conv, "auto")

    assert choice(64, 32, 128) == "lags"
    assert choice(256, 8, 128) == "lags"
    assert choice(3, 112, 16, k=7, s=2) == "strips"
    assert choice(64, 4, 512) == "slices"
    assert choice(1, 28, 128, k=5) == "slices"
    assert choice(3, 32, 128) == "strips"
    assert choice(64, 32, 128, s=2) == "strips"
    assert choice(64, 16, 128, k=1, s=2) == "chunks"
    assert choice(64, 32, 128, k=1) == "chunks"
    assert choice(16, 4, 1) == "chunks"
    assert choice(32, 7, 16) == choice(32, 7, 128) == "strips"


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("n", [5, 6, 7, 12])
@pytest.mark.parametrize("name", ["SAME", "same"])
def test_same_padding(n: int, stride: int, name: str) -> None:
    ((before, after),) = resolve_padding(name, (n,), 3, stride, 2)
    assert (n + before + after - 5) // stride + 1 == math.ceil(n / stride)
    assert after - before in (0, 1)


def test_same_padding_examples() -> None:
    assert resolve_padding("SAME", (224, 225), 7, 2) == ((2, 3), (3, 3))
    assert resolve_padding("SAME", (8,), 1, 3) == ((0, 0),)  # never negative
    assert resolve_padding("SAME", (8,), 4) == ((1, 2),)


def test_padding_forms() -> None:
    assert resolve_padding("VALID", (5, 6), 3) == ((0, 0), (0, 0))
    assert resolve_padding("valid", (5,), 3) == ((0, 0),)
    assert resolve_padding(2, (5, 6), 3) == ((2, 2), (2, 2))
    assert resolve_padding((1, 2), (5, 6), 3) == ((1, 1), (2, 2))
    assert resolve_padding([(0, 1), (2, 3)], (5, 6), 3) == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.zeros(3, 4)}, r"inputs must be .* got shape \(3, 4\)"),
        ({"inputs": torch.zeros(1, 1, 1, 1, 1, 1)}, "inputs must be"),
        ({"inputs": torch.zeros(0, 2, 6, 6)}, r"empty; got shape \(0, 2, 6, 6\)"),
        ({"groups": 3}, "groups must divide the 4 channels; got 3"),
        ({"groups": 0}, "groups must divide the 4 channels; got 0"),
        ({"padding": "full"}, "padding must be 'SAME', 'VALID'.*got 'full'"),
        ({"padding": -1}, "padding must be .*got -1"),
        ({"padding": (1,)}, r"padding must be .*got \(1,\)"),
        ({"padding": ((1, 1, 1), (1, 1))}, "padding must be"),
        ({"padding_mode": "edge"}, "padding_mode must be one of.*got 'edge'"),
        ({"method": "fft"}, "method must be one of.*got 'fft'"),
        ({"kernel_size": 7}, r"kernel_size must fit .*got \(7, 7\)"),
        ({"dilation": 3}, "kernel_size must fit .*dilation"),
        ({"kernel_size": 0}, "kernel_size must be a positive integer.*got 0"),
        ({"kernel_size": (3,)}, r"kernel_size must be .*got \(3,\)"),
        ({"stride": 0}, "stride must be a positive integer.*got 0"),
        ({"stride": (1, 1, 1)}, r"stride must be .*got \(1, 1, 1\)"),
        ({"dilation": -1}, "dilation must be a positive integer.*got -1"),
        ({"dilation": (1,)}, r"dilation must be .*got \(1,\)"),
        ({"padding": 6, "padding_mode": "reflect"}, "too large.*'reflect'"),
        ({"padding": 7, "padding_mode": "circular"}, "too large.*'circular'"),
    ],
)
def test_error_messages(arguments: dict[str, Any], message: str) -> None:
    good = {"inputs": torch.zeros(2, 4, 6, 6), "kernel_size": 3}
    with pytest.raises(ValueError, match=message):
        patch_second_moment(**{**good, **arguments})


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_dtype_error(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"inputs must be .*got {dtype}"):
        patch_second_moment(torch.zeros(2, 4, 6, 6, dtype=dtype), 3)


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_largest_padding_of_each_mode_is_accepted(mode: str) -> None:
    inputs = torch.randn(2, 1, 6, dtype=torch.float64)
    most = 5 if mode == "reflect" else 6
    ours = patch_second_moment(inputs, 3, padding=most, padding_mode=mode)
    expected = formed(inputs, (3,), (1,), ((most, most),), (1,), padding_mode=mode)
    assert_agree(ours, expected)


@pytest.mark.parametrize(
    ("method", "channels", "size", "kernel", "stride"),
    [
        ("chunks", 16, 28, 3, 2),
        ("chunks", 64, 16, 1, 2),
        ("strips", 16, 28, 3, 2),
        ("strips", 3, 56, 7, 2),
        ("strips", 32, 14, 3, 1),
        ("lags", 16, 28, 5, 1),
        ("lags", 3, 56, 7, 2),
        ("lags", 96, 8, 3, 1),
        ("lags", 48, 10, 5, 1),
        ("slices", 16, 7, 3, 1),
        ("slices", 3, 32, 3, 1),
    ],
)
def test_memory_is_a_sixth_of_the_patches(
    method: str, channels: int, size: int, kernel: int, stride: int
) -> None:
    x = torch.randn(64, channels, size, size)

    def run() -> Tensor:
        padding = kernel // 2
        return patch_second_moment(x, kernel, stride, padding, method=method)

    run()  # what is computed once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = run()
    events = trace.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    patches = 64 * channels * (kernel * (size // stride)) ** 2 * 4
    assert len(sizes) > 1
    assert max(itertools.accumulate(sizes)) - result.nbytes <= patches / 6
