"""Convolutions and dense layers: the values and the gradients of PyTorch's own."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from mednca_monai import convolution
from mednca_monai.convolution import (
    dense_convolution,
    dense_layer,
    depthwise_convolution,
    gathered_cells,
    gathered_convolution,
)


def test_depthwise_values_and_gradients_are_those_of_a_plain_convolution(spatial_dims):
    x = torch.randn(2, 4, *[7, 9, 8][:spatial_dims], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, *[5, 3, 5][:spatial_dims], dtype=torch.float64, requires_grad=True)
    convolve = torch.nn.functional.conv2d if spatial_dims == 2 else torch.nn.functional.conv3d
    expected = convolve(x, weight, groups=4)
    found = depthwise_convolution(x, weight)
    assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    of_expected = torch.autograd.grad(expected, [x, weight], upstream)
    of_found = torch.autograd.grad(found, [x, weight], upstream)
    assert_close(of_found, of_expected, rtol=0, atol=1e-12)


TOLERANCES = {torch.float64: (0, 1e-12), torch.float32: (0, 1e-4), torch.bfloat16: (0.01, 0.2)}


@pytest.mark.parametrize("room", [0, 10**6])
@pytest.mark.parametrize("share", [0, 0.4])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [1, 3, 5])
def test_gathered_values_and_gradients_are_those_of_a_plain_convolution(
    spatial_dims, width, dtype, share, room
):
    size, radius = [5, 4, 6][:spatial_dims], width // 2
    shape = [n + 2 * radius for n in size]
    window = torch.randn(3, *shape, 4, dtype=dtype).movedim(-1, 1).requires_grad_()
    weight = torch.randn(7, 4, *[width] * spatial_dims, dtype=dtype, requires_grad=True)
    fires = torch.rand(3, *size) < share
    cells = torch.nn.functional.pad(fires, [radius] * 2 * spatial_dims).flatten().nonzero()[:, 0]
    count = len(cells)
    filled = torch.cat([cells, cells[:1].expand(5)]) if count else cells
    memory = window.new_empty(room)
    found = gathered_convolution(window, weight, filled, count, memory)[:count]
    convolve = torch.nn.functional.conv2d if spatial_dims == 2 else torch.nn.functional.conv3d
    exact = [x.detach().double().requires_grad_() for x in (window, weight)]
    expected = convolve(*exact).movedim(1, -1)[fires]
    relative, absolute = TOLERANCES[dtype]
    assert_close(found.double(), expected, rtol=relative, atol=absolute)
    upstream = torch.randn_like(found)
    of_found = torch.autograd.grad(found, [window, weight], upstream)
    of_expected = torch.autograd.grad(expected, exact, upstream.double())
    assert [x.dtype for x in of_found] == [dtype, dtype]
    of_found = [x.double() for x in of_found]
    assert_close(of_found, [*of_expected], rtol=relative, atol=absolute)


@pytest.mark.parametrize(("positions", "count"), [([4, 0, 7, 4, 4], 3), ([4, 0, 7], 3), ([], 0)])
def test_gathered_cells_and_their_gradients_are_those_of_an_index(positions, count):
    rows = torch.randn(9, 4, requires_grad=True)
    found = gathered_cells(rows, torch.tensor(positions, dtype=torch.int64), count)[:count]
    expected = rows[positions[:count]]
    assert found.equal(expected)
    upstream = torch.randn(count, 4)
    of_found, of_expected = (torch.autograd.grad(x, rows, upstream)[0] for x in (found, expected))
    assert of_found.equal(of_expected)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("width", "stride"), [(1, 1), (3, 1), (5, 1), (3, 2)])
def test_dense_values_and_gradients_are_those_in_double_precision(
    spatial_dims, width, stride, has_bias, onednn, monkeypatch
):
    monkeypatch.setattr(convolution, "ON_X86", onednn)
    x = torch.randn(2, *[7, 9, 8][:spatial_dims], 5).movedim(-1, 1).requires_grad_()
    weight = torch.randn(4, 5, *[width] * spatial_dims, requires_grad=True)
    inputs = [x, weight, torch.randn(4, requires_grad=True)][: 3 if has_bias else 2]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    convolve = torch.nn.functional.conv2d if spatial_dims == 2 else torch.nn.functional.conv3d
    expected = convolve(*exact, stride=stride)
    found = dense_convolution(*inputs, *[None] * (not has_bias), stride)
    upstream = torch.randn_like(found)
    of_found = torch.autograd.grad(found, inputs, upstream)
    fast = type(found.grad_fn).__name__ == "DenseConvolutionBackward"
    assert fast == (onednn and stride == 1)
    of_expected = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip([found, *of_found], [expected, *of_expected], strict=True):
        assert_close(one, other, rtol=0, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("count", [1, 64, 200])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_dense_layer_and_its_gradients_are_those_of_a_product(count, has_bias, monkeypatch):
    monkeypatch.setattr(convolution, "FEW", 0)
    inputs = [torch.randn(size, requires_grad=True) for size in ((count, 6), (9, 6), (9,))]
    inputs = inputs if has_bias else inputs[:2]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.nn.functional.linear(*exact)
    found = dense_layer(*inputs, *[None] * (not has_bias))
    upstream = torch.randn_like(found)
    of_found = torch.autograd.grad(found, inputs, upstream)
    of_expected = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip([found, *of_found], [expected, *of_expected], strict=True):
        assert_close(one, other, rtol=0, atol=1e-4, check_dtype=False)


def test_operations_of_dense_convolutions_are_counted(spatial_dims):
    x, weight = torch.randn(2, 5, *[6] * spatial_dims), torch.randn(4, 5, *[3] * spatial_dims)
    with FlopCounterMode(display=False) as counter:
        dense_convolution(x, weight, None, 1)
    assert counter.get_total_flops() == 2 * 2 * 4**spatial_dims * 4 * 5 * 3**spatial_dims
