import numpy as np
import pytest
import torch

from mednca_monai.checks import check_classes, check_finite, is_number


def test_numbers_may_be_of_numpy_and_large_but_are_finite():
    for value in (np.float32(1), np.int64(0), np.float16(0.5), 10**400):
        assert is_number(value)
    for value in (np.float32("inf"), np.float64("nan"), np.bool_(True), np.ones(1), 1j):
        assert not is_number(value)


@pytest.mark.parametrize("count", [1, 2])
def test_values_that_are_not_finite_are_counted_in_every_part_of_a_large_image(count):
    image = torch.zeros(1, 1, 1100, 1000)
    check_finite("inputs", image)
    image[..., -1, -1] = torch.nan
    image[..., 0, : count - 1] = torch.inf
    with pytest.raises(ValueError, match=f"got {count} NaN or infinite values"):
        check_finite("inputs", image)


def test_classes_may_be_booleans():
    check_classes("label", torch.tensor([True, False]), 2)
    with pytest.raises(ValueError, match="`label` must hold integers from 0 to 0, got 1"):
        check_classes("label", torch.tensor([True, False]), 1)
