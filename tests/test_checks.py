import pytest
import torch

from mednca_monai.checks import check_finite


@pytest.mark.parametrize("count", [1, 2])
def test_values_that_are_not_finite_are_counted_in_every_part_of_a_large_image(count):
    image = torch.zeros(1, 1, 1100, 1000)
    check_finite("inputs", image)
    image[..., -1, -1] = torch.nan
    image[..., 0, : count - 1] = torch.inf
    with pytest.raises(ValueError, match=f"got {count} NaN or infinite values"):
        check_finite("inputs", image)
