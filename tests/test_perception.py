"""Convolutions of perception: the values and the gradients of PyTorch's own."""

import pytest
import torch
from torch.testing import assert_close

from mednca_monai.perception import depthwise_convolution, gathered_convolution


def test_depthwise_values_and_gradients_are_those_of_a_plain_convolution(spatial_dims):
    x = torch.randn(2, 4, *[7, 9, 8][:spatial_dims], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, *[5, 3, 5][:spatial_dims], dtype=torch.float64, requires_grad=True)
    convolve = torch.nn.functional.conv2d if spatial_dims == 2 else torch.nn.functional.conv3d
    expected = convolve(x, weight, groups=4)
    found = depthwise_convolution(x, weight)
    assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    of_expected = torch.autograd.grad(expected, [x, weight], upstream)
    for one, other in zip(
        torch.autograd.grad(found, [x, weight], upstream), of_expected, strict=True
    ):
        assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_gathered_values_and_gradients_are_those_of_a_plain_convolution(spatial_dims, width, dtype):
    generator = torch.Generator().manual_seed(0)
    size, radius = [5, 4, 6][:spatial_dims], width // 2
    window = torch.randn(3, *[n + 2 * radius for n in size], 4, generator=generator)
    window = window.to(dtype).movedim(-1, 1).requires_grad_()
    weight = torch.randn(7, 4, *[width] * spatial_dims, generator=generator).to(dtype)
    weight.requires_grad_()
    fires = torch.rand(3, *size, generator=generator) < 0.4
    cells = torch.nn.functional.pad(fires, [radius] * 2 * spatial_dims).flatten().nonzero()
    convolve = torch.nn.functional.conv2d if spatial_dims == 2 else torch.nn.functional.conv3d
    expected = convolve(window, weight).movedim(1, -1)[fires]
    found = gathered_convolution(window, weight, cells.flatten())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert_close(found, expected, rtol=0, atol=tolerance)
    upstream = torch.randn(expected.shape, generator=generator).to(dtype)
    of_expected = torch.autograd.grad(expected, [window, weight], upstream)
    of_found = torch.autograd.grad(found, [window, weight], upstream)
    assert_close(of_found, of_expected, rtol=0, atol=tolerance)
