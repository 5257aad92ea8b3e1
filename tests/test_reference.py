"""Released weights: our networks with them compute what the released code computes."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from mednca_monai import MedNCA, convert_reference_state_dict

BATCH_NORM = ("batch", {"track_running_stats": False})


def released_level(spatial_dims, dense, channels=4, hidden_size=8, width=3):
    """Random weights in the released code's names and shapes."""
    kernel = [channels, channels if dense else 1] + [width] * spatial_dims
    shapes = {"p0.weight": kernel, "p0.bias": [channels]}
    shapes |= {"fc0.weight": [hidden_size, (3 if dense else 2) * channels]}
    shapes |= {"fc0.bias": [hidden_size], "fc1.weight": [channels, hidden_size]}
    if dense:
        shapes |= {"p1.weight": kernel, "p1.bias": [channels]}
    else:
        shapes |= {"bn.weight": [hidden_size], "bn.bias": [hidden_size]}
    return {name: 0.3 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def released_step(level, state):
    """One step as the released code takes it, all cells firing, ``(B, *spatial, C)``."""
    dense = "p1.weight" in level
    swapped = state.transpose(1, -1)
    width = level["p0.weight"].shape[-1] // 2
    convolve = functional.conv2d if state.dim() == 4 else functional.conv3d
    padded = functional.pad(swapped, [width, width] * (state.dim() - 2), mode="reflect")
    perceived = [swapped]
    for name in ("p0", "p1") if dense else ("p0",):
        groups = 1 if dense else state.shape[-1]
        weight, bias = level[f"{name}.weight"], level[f"{name}.bias"]
        perceived.append(convolve(padded, weight, bias, groups=groups))
    hidden = torch.cat(perceived, 1).transpose(1, -1) @ level["fc0.weight"].T + level["fc0.bias"]
    if not dense:
        rows = hidden.flatten(0, -2)
        weight, bias = level["bn.weight"], level["bn.bias"]
        rows = functional.batch_norm(rows, None, None, weight, bias, training=True)
        hidden = rows.view_as(hidden)
    after = state + hidden.relu() @ level["fc1.weight"].T
    return torch.cat([state[..., :1], after[..., 1:]], -1)


@pytest.mark.parametrize("dense", [True, False], ids=["Med-NCA", "M3D-NCA"])
def test_converted_weights_step_as_the_released_code_does(spatial_dims, dense):
    level = released_level(spatial_dims, dense)
    network = MedNCA(
        spatial_dims,
        1,
        3,
        num_channels=4,
        hidden_size=8,
        steps=2,
        fire_rate=1.0,
        num_levels=1,
        perception="dense" if dense else "depthwise",
        norm=None if dense else BATCH_NORM,
    ).double()
    network.load_state_dict(convert_reference_state_dict([level]))
    image = torch.rand(2, 1, *[5, 7, 6][:spatial_dims], dtype=torch.float64)
    state = functional.pad(image.movedim(1, -1), [0, 3])
    for _ in range(2):
        state = released_step(level, state)
    assert_close(network(image), state[..., 1:].movedim(-1, 1), rtol=0, atol=1e-12)


def test_levels_are_numbered_from_coarse_to_fine_and_arrays_serve_as_well():
    levels = [released_level(3, dense=False, width=width) for width in (7, 3)]
    converted = convert_reference_state_dict(levels)
    network = MedNCA.m3d_nca(num_channels=4, hidden_size=8).double()
    network.load_state_dict(converted)
    assert converted["levels.0.perception.weight"].shape[2:] == (7, 7, 7)
    arrays = [{name: w.numpy() for name, w in level.items()} for level in levels]
    for name, weight in convert_reference_state_dict(arrays).items():
        assert weight.equal(converted[name])


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        ("med_nca_c16_h128", {"spatial_dims": 2, "num_channels": 16}),
        (
            "m3d_nca_c16_h64",
            {"spatial_dims": 3, "num_channels": 16, "hidden_size": 64, "scale_factor": 2}
            | {"kernel_size": (7, 3), "perception": "depthwise", "norm": BATCH_NORM},
        ),
    ],
)
def test_the_papers_networks_compute_the_stored_states_and_logits(shared, case, arguments):
    stored = np.load(shared / "reference" / f"{case}.npz")
    levels = [
        {name[7:]: stored[name] for name in stored.files if name.startswith(f"level{number}.")}
        for number in range(2)
    ]
    network = MedNCA(
        in_channels=1, out_channels=1, steps=int(stored["steps"]), fire_rate=1.0, **arguments
    ).eval()
    network.load_state_dict(convert_reference_state_dict(levels))
    states = []
    for level in network.levels:
        level.register_forward_hook(
            lambda _, inputs, cells: states.append(torch.cat([inputs[0], cells], 1))
        )
    with torch.no_grad():
        logits = network(torch.from_numpy(stored["image"]).movedim(-1, 1))
    results = {"level0_state": states[0], "level1_state": states[1], "logits": logits}
    for name, result in results.items():
        expected = torch.from_numpy(stored[name]).movedim(-1, 1)
        assert_close(result, expected, rtol=1e-5, atol=1e-5)


def changed(**weights):
    """Two levels of Med-NCA weights, the second with some of them replaced, or without them."""
    levels = [released_level(2, dense=True) for _ in range(2)]
    for name, weight in weights.items():
        if weight is None:
            del levels[1][name.replace("_", ".")]
        else:
            levels[1][name.replace("_", ".")] = weight
    return levels


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([], r"`levels` must hold the weights of at least one level, got none\."),
        (changed(fc0_bias=None), r"`levels` must all hold 'fc0\.bias', got \[.*\] on level 1\."),
        (changed(p0_weight=None), r"`levels` must all hold 'p0\.weight', got"),
        (changed(p1_weight=None), r"`levels` must all hold 'p1\.weight', got"),
        (changed(bn_weight=torch.ones(8)), r"`levels` must all hold 'bn\.bias', got"),
        (changed(fc1_bias=torch.ones(4)), r"`levels` must not hold 'fc1\.bias', got \[.*\] on l"),
        (
            changed(fc0_weight=torch.ones(8, 8)),
            r"`levels` must hold 'fc0\.weight' of shape \[8, 12\], got \[8, 8\] on level 1\.",
        ),
        (changed(fc0_bias=torch.ones(9)), r"'fc0\.bias' of shape \[8\], got \[9\] on level 1\."),
        (changed(fc1_weight=torch.ones(8, 4)), r"'fc1\.weight' of shape \[4, 8\], got \[8, 4\]"),
        (changed(p0_bias=torch.ones(5)), r"'p0\.bias' of shape \[4\], got \[5\]"),
        (
            changed(p0_weight=torch.ones(4, 1, 3, 3)),
            r"'p0\.weight' of shape \[4, 4, 3, 3\], got \[4, 1, 3, 3\]",
        ),
        (
            changed(p0_weight=torch.ones(4, 4, 3, 5)),
            r"'p0\.weight' of shape \[4, 4, 5, 5\], got \[4, 4, 3, 5\]",
        ),
        (
            changed(p1_weight=torch.ones(4, 4, 5, 5)),
            r"'p1\.weight' of shape \[4, 4, 3, 3\], got \[4, 4, 5, 5\]",
        ),
        (changed(p0_weight=torch.tensor(1.0)), r"'p0\.weight' of shape \[4, 4\], got \[\]"),
        (
            [released_level(1, dense=True)],
            r"`levels` must hold 'p0\.weight' with 4 or 5 axes, got 3 of them\.",
        ),
        (
            [released_level(2, dense=True), released_level(3, dense=True)],
            r"'p0\.weight' of shape \[4, 4, 3, 3\], got \[4, 4, 3, 3, 3\] on level 1\.",
        ),
        (
            [released_level(2, dense=True), released_level(2, dense=True, hidden_size=9)],
            r"of shape .*, got .* on level 1\.",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        convert_reference_state_dict(levels)
