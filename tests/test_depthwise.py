"""Depthwise convolution: the values and the gradients of PyTorch's own."""

import torch
from torch.testing import assert_close

from mednca_monai.depthwise import depthwise_convolution


def test_values_and_gradients_are_those_of_a_plain_convolution(spatial_dims):
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
