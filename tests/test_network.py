"""The pyramid: laws that every network keeps, numbers, seeds, types, export and wrong arguments."""

import warnings
from itertools import product

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.utils import set_determinism
from torch.testing import assert_close

from mednca_monai import MedNCA, automaton
from mednca_monai.network import Region, crop, reduce


def make_image(size, batch_size=2, channels=2):
    return torch.rand(batch_size, channels, *size, dtype=torch.float64)


def fill(network):
    """Set the weights without a random generator, which may differ from one torch to the next."""
    for number, weight in enumerate(network.parameters()):
        angles = torch.arange(weight.numel(), dtype=torch.float64) * 1.7 + number
        weight.data = angles.sin().view_as(weight) * 0.3


# Scales


@pytest.mark.parametrize(
    ("size", "scale_factor"),
    [([5, 7], [2, 3]), ([1, 1], [4, 4]), ([9, 2], [4, 1]), ([5, 4, 7], [2, 3, 4])],
)
def test_a_coarse_cell_is_the_mean_of_the_cells_it_stands_for(size, scale_factor):
    image = make_image(size)
    coarse = reduce(image, scale_factor)
    assert list(coarse.shape[2:]) == [-(-n // s) for n, s in zip(size, scale_factor, strict=True)]
    for cell in product(*map(range, coarse.shape[2:])):
        block = [slice(i * s, (i + 1) * s) for i, s in zip(cell, scale_factor, strict=True)]
        expected = image[(..., *block)].flatten(2).mean(2)
        assert_close(coarse[(..., *cell)], expected, rtol=0, atol=1e-12)


def test_blocks_at_the_end_are_means_of_what_is_there():
    image = torch.tensor([[1.0, 3.0, 5.0], [5.0, 7.0, 9.0], [2.0, 4.0, 8.0]])[None, None]
    assert reduce(image, [2, 2])[0, 0].tolist() == [[4, 7], [3, 8]]


def test_a_crop_has_its_own_place_in_each_image():
    x = torch.arange(24).view(2, 1, 3, 4)
    regions = Region(torch.tensor([[0, 1], [1, 2]]), [2, 2])
    assert crop(x, regions).tolist() == [[[[1, 2], [5, 6]]], [[[18, 19], [22, 23]]]]
    same = Region(torch.tensor([[1, 0]]), [1, 4])
    assert crop(x, same).equal(x[:, :, 1:2])


def test_the_coarse_state_is_enlarged_and_cut_to_start_the_fine_level(make_network, spatial_dims):
    size, scale_factor = [5, 4, 7][:spatial_dims], (2, 3, 4)[:spatial_dims]
    network = make_network(spatial_dims, scale_factor=scale_factor, out_channels=4, steps=2)
    torch.nn.init.zeros_(network.levels[1].update.weight)
    image = make_image(size)
    coarse = make_network(spatial_dims, num_levels=1, out_channels=4, steps=2)
    coarse.load_state_dict(network.state_dict(), strict=False)
    expected = coarse(reduce(image, list(scale_factor)))
    for axis, factor in enumerate(scale_factor, 2):
        expected = expected.repeat_interleave(factor, axis).narrow(axis, 0, image.shape[axis])
    assert_close(network(image), expected, rtol=0, atol=1e-12)


# Laws


def test_a_new_network_has_zero_logits(spatial_dims, size, settings):
    settings = {"num_channels": 6, "hidden_size": 8, **settings, "steps": 2}
    logits = MedNCA(spatial_dims, 2, 3, **settings)(torch.rand(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    assert not logits.any()


def test_a_batch_equals_its_items(make_network, spatial_dims, size, settings):
    network, image = make_network(spatial_dims, **settings), make_image(size, 3)
    seed = torch.tensor([4, 4, 4] if "firing" in settings else [4, -5, 2**40])
    with torch.no_grad():
        for given in (seed, None):
            logits = network(image, given)
            for i in range(3):
                item = network(image[i : i + 1], None if given is None else given[i : i + 1])
                assert_close(logits[i : i + 1], item, rtol=0, atol=1e-12)


def test_image_channels_never_change(make_network, spatial_dims, size, settings):
    network = make_network(spatial_dims, in_channels=3, out_channels=2, **settings)
    images, cells = [], []
    for level in network.levels:
        level.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
        level.register_forward_hook(lambda _, inputs, after: cells.append(after))
    image = make_image(size, channels=3)
    before = image.clone()
    network(image)
    assert images[-1].equal(before)
    for reduced, after in zip(images, cells, strict=True):
        assert after.shape == (2, 3, *reduced.shape[2:])
        assert after.any()


def test_every_level_has_its_own_weights_and_all_get_a_gradient(
    make_network, spatial_dims, size, settings
):
    network = make_network(spatial_dims, **settings)
    network(make_image(size)).square().sum().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


def test_influence_travels_through_both_levels_and_no_further(make_network, spatial_dims):
    network = make_network(spatial_dims, steps=(1, 2), scale_factor=2, fire_rate=1.0)
    size = [21, 19, 17][:spatial_dims]
    image = make_image(size, 1)
    other = image.clone()
    place = [10, 8, 8][:spatial_dims]
    other[(..., *place)] += 5
    cells = (network(image) != network(other)).any(1)[0].nonzero()
    # one coarse cell around cell place // 2, enlarged, then two fine cells around that
    first = [2 * (p // 2 - 1) - 2 for p in place]
    last = [2 * (p // 2 + 1) + 1 + 2 for p in place]
    assert cells.amin(0).tolist() == first
    assert cells.amax(0).tolist() == last


@pytest.mark.parametrize("size", [[1, 1, 1], [1, 5, 2], [3, 2, 1]])
def test_images_smaller_than_a_coarse_cell_have_logits(make_network, spatial_dims, settings, size):
    network = make_network(spatial_dims, **settings)
    logits = network(make_image(size[:spatial_dims]))
    assert logits.shape == (2, 2, *size[:spatial_dims])
    assert logits.isfinite().all()
    assert logits.any()


# Numbers


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (MedNCA.med_nca(num_channels=16), 25_920),
        (MedNCA.med_nca(), 70_016),
        (MedNCA.m3d_nca(), 12_480),
    ],
)
def test_the_papers_networks_have_the_papers_numbers_of_parameters(network, count):
    assert sum(weight.numel() for weight in network.parameters()) == count


@pytest.mark.parametrize(
    ("arguments", "size", "seeds", "expected"),
    [
        (
            {"spatial_dims": 2, "in_channels": 2, "out_channels": 2, "num_channels": 6}
            | {"steps": (2, 3), "scale_factor": (3, 2), "fire_rate": 0.6},
            [7, 10],
            [3, -4],
            {
                (0, 0, 0, 0): -0.4234539432406226,
                (1, 1, 3, 8): -0.859766058777688,
                (1, 0, 6, 9): -2.250114447552197,
            },
        ),
        (
            {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "num_channels": 4}
            | {"steps": (2, 1), "scale_factor": (2, 3, 1), "kernel_size": (5, 3)}
            | {"perception": "depthwise"},
            [5, 4, 6],
            [3, -4],
            {
                (0, 0, 0, 0, 0): -0.19916036235175766,
                (1, 1, 2, 3, 1): -0.1323183581443344,
                (1, 0, 4, 3, 5): -0.26788555604521164,
            },
        ),
        (
            {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_channels": 4}
            | {"steps": 2, "scale_factor": 2, "num_levels": 3, "firing": "sublattices"},
            [7, 10],
            [-4, -4],
            {
                (0, 0, 0, 0): 0.07303138634372594,
                (1, 0, 3, 8): 0.6567499413158482,
                (1, 0, 6, 9): -0.8684788777607529,
            },
        ),
    ],
    ids=["2-D", "3-D depthwise", "sublattices"],
)
def test_logits_equal_those_of_a_plain_loop_over_cells(arguments, size, seeds, expected):
    # computed apart from this package, cell by cell in numpy with Python's integers for the masks
    network = MedNCA(hidden_size=8, **arguments).double().eval()
    fill(network)
    shape = [2, arguments["in_channels"], *size]
    image = torch.arange(np.prod(shape), dtype=torch.float64).mul(0.9).cos().view(shape)
    logits = network(image, torch.tensor(seeds))
    for cell, value in expected.items():
        assert logits[cell].item() == pytest.approx(value, abs=1e-12)


# Seeds


def test_eval_without_a_seed_always_gives_the_same_logits(make_network, spatial_dims, settings):
    network, image = make_network(spatial_dims, **settings), make_image([9] * spatial_dims)
    logits = network(image)
    torch.manual_seed(1)
    assert network(image).equal(logits)
    assert network(image, torch.zeros(2, dtype=torch.int64)).equal(logits)


@pytest.mark.parametrize("seed", [1, -1, 2**32])
def test_another_seed_gives_other_logits(make_network, spatial_dims, settings, seed):
    network, image = make_network(spatial_dims, **settings), make_image([9] * spatial_dims, 1)
    assert not network(image, torch.tensor([seed])).equal(network(image))


def test_set_determinism_rules_training(make_network, spatial_dims, settings):
    network, image = make_network(spatial_dims, **settings).train(), make_image([9] * spatial_dims)
    runs = []
    for _ in range(2):
        set_determinism(5)
        runs += [network(image), network(image)]
    set_determinism(None)
    assert runs[0].equal(runs[2])
    assert runs[1].equal(runs[3])
    assert not runs[0].equal(runs[1])


def test_training_draws_a_seed_for_each_image(make_network, spatial_dims):
    network = make_network(spatial_dims).train()
    twice = make_image([9] * spatial_dims, 1).expand(2, *[-1] * (spatial_dims + 1))
    logits = network(twice)
    assert not logits[0].isclose(logits[1]).all()


def test_levels_fire_differently(make_network, spatial_dims):
    network = make_network(spatial_dims, scale_factor=1, steps=1)
    network.levels[1].load_state_dict(network.levels[0].state_dict())
    for level in network.levels:
        torch.nn.init.ones_(level.hidden.bias)
    cells = []
    for level in network.levels:
        level.register_forward_pre_hook(lambda _, inputs: cells.append(inputs[1][0]))
        level.register_forward_hook(lambda _, inputs, after: cells.append(after))
    network(make_image([9] * spatial_dims))
    coarse, fine = (cells[i] != cells[i + 1] for i in (0, 2))
    assert not coarse.any(1).equal(fine.any(1))


# Types


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_other_precisions_are_close_to_double(
    make_network, spatial_dims, size, settings, dtype, tolerance
):
    network, image = make_network(spatial_dims, **settings), make_image(size)
    expected = network(image)
    logits = network.to(dtype)(image.to(dtype))
    assert logits.dtype == dtype
    assert (logits.double() - expected).abs().max() < tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("matrix_units", [False, True])
def test_bfloat16_autocast_trains_and_is_close_to_double(
    make_network, spatial_dims, size, settings, monkeypatch, matrix_units
):
    monkeypatch.setattr(automaton, "HAS_AMX", matrix_units)
    network, image = make_network(spatial_dims, **settings, segment_steps=2), make_image(size)
    expected = network(image)
    network.float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(image.float())
        assert {weight.dtype for weight in network.levels[0].rule(folds=True)} == {torch.float32}
    assert logits.dtype == torch.float32
    assert (logits.double() - expected).abs().max() < 5e-2 * max(1, expected.abs().max())
    logits.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())


@pytest.mark.parametrize(
    ("dtype", "tolerance", "matrix_units"),
    [(torch.float32, 1e-5, False), (torch.bfloat16, 5e-2, False), (torch.bfloat16, 5e-2, True)],
)
def test_a_compiler_takes_the_whole_network(
    make_network, spatial_dims, monkeypatch, dtype, tolerance, matrix_units
):
    monkeypatch.setattr(automaton, "HAS_AMX", matrix_units)
    network = make_network(spatial_dims, hidden_size=64, steps=1).to(dtype)
    image = make_image([9] * spatial_dims).to(dtype)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits, expected = compiled(image), network(image)
    assert_close(logits, expected, rtol=0, atol=tolerance * max(1, float(expected.abs().max())))


def test_a_meta_tensor_keeps_its_meta_and_is_a_plain_tensor_inside(make_network, spatial_dims):
    network = make_network(spatial_dims)
    inside = []
    for level in network.levels:
        level.register_forward_pre_hook(lambda _, inputs: inside.append(type(inputs[0])))
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    image = make_image([9] * spatial_dims)
    logits = network(MetaTensor(image, affine=affine, meta={"filename_or_obj": "a.nii.gz"}))
    assert isinstance(logits, MetaTensor)
    assert logits.affine.equal(affine)
    assert logits.meta["filename_or_obj"] == "a.nii.gz"
    assert logits.as_tensor().equal(network(image))
    assert inside == [torch.Tensor] * 4


# Export


def test_a_scripted_network_equals_the_network(
    make_network, spatial_dims, size, settings, tmp_path
):
    if settings.get("perception") == "depthwise":
        settings["norm"] = ("batch", {"track_running_stats": False})
    network, image = make_network(spatial_dims, **settings), make_image(size)
    torch.jit.save(torch.jit.script(network), tmp_path / "network.ts")
    scripted = torch.jit.load(tmp_path / "network.ts")
    with torch.no_grad():
        for seed in (None, torch.tensor([3, -4])):
            assert_close(scripted(image, seed), network(image, seed), rtol=0, atol=1e-12)


def test_a_scripted_network_trains(make_network, spatial_dims):
    network = torch.jit.script(make_network(spatial_dims)).train()
    image = make_image([9] * spatial_dims)
    torch.manual_seed(3)
    logits = network(image)
    assert not network(image).equal(logits)
    logits.square().sum().backward()
    assert all(weight.grad.any() for weight in network.parameters())


def test_weights_make_a_round_trip(make_network, spatial_dims, settings, tmp_path):
    network, image = make_network(spatial_dims, **settings), make_image([9] * spatial_dims)
    torch.save(network.state_dict(), tmp_path / "network.pt")
    other = make_network(spatial_dims, **settings)
    other.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    assert other(image).equal(network(image))


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 1}, r"`spatial_dims` must be 2 or 3, got 1\."),
        ({"spatial_dims": 2.0}, r"`spatial_dims` must be 2 or 3, got 2\.0\."),
        ({"fire_rate": "a"}, r"`fire_rate` must be a number in \[2\*\*-32, 1\], got 'a'\."),
        ({"norm": ("batch", {"x": 1})}, r"`norm` must be a MONAI normalisation, got \('batch'"),
        ({"in_channels": 0}, r"`in_channels` must be an integer of at least 1, got 0\."),
        ({"in_channels": 1.0}, r"`in_channels` must be an integer of at least 1, got 1\.0\."),
        ({"out_channels": 0}, r"`out_channels` must be an integer of at least 1, got 0\."),
        ({"out_channels": True}, r"`out_channels` must be an integer of at least 1, got True\."),
        ({"num_channels": 3}, r"`num_channels` must be an integer of at least 4, got 3\."),
        ({"hidden_size": 0}, r"`hidden_size` must be an integer of at least 1, got 0\."),
        ({"num_levels": 0}, r"`num_levels` must be an integer of at least 1, got 0\."),
        ({"segment_steps": 0}, r"`segment_steps` must be an integer of at least 1, got 0\."),
        ({"steps": 0}, r"`steps` must be an integer of at least 1, got 0\."),
        ({"steps": 4.0}, r"`steps` must be an integer of at least 1, got 4\.0\."),
        ({"steps": (4, "8")}, r"`steps` must be an integer of at least 1, got '8'\."),
        ({"steps": (4, 4, 4)}, r"`steps` must be one value or one per level \(2\), got \(4, 4, "),
        ({"scale_factor": (4, 0)}, r"`scale_factor` must be an integer of at least 1, got 0\."),
        (
            {"scale_factor": (4, 4, 1)},
            r"`scale_factor` must be one value or one per axis \(2\), got \(4, 4, 1\)\.",
        ),
        ({"kernel_size": (3, 4)}, r"`kernel_size` must be odd, got \(3, 4\)\."),
        ({"kernel_size": [3]}, r"`kernel_size` must be one value or one per level \(2\), got "),
        ({"fire_rate": 0}, r"`fire_rate` must be a number in \[2\*\*-32, 1\], got 0\."),
        ({"fire_rate": 1.5}, r"`fire_rate` must be a number in \[2\*\*-32, 1\], got 1\.5\."),
        (
            {"fire_rate": float("nan")},
            r"`fire_rate` must be a number in \[2\*\*-32, 1\], got nan\.",
        ),
        ({"fire_rate": 1e-10}, r"`fire_rate` must be a number in \[2\*\*-32, 1\], got 1e-10\."),
        ({"firing": "all"}, r"`firing` must be 'independent' or 'sublattices', got 'all'\."),
        (
            {"firing": "sublattices", "fire_rate": 0.6},
            r"`fire_rate` must be 0\.5 where firing is 'sublattices', got 0\.6\.",
        ),
        ({"perception": "sobel"}, r"`perception` must be 'dense' or 'depthwise', got 'sobel'\."),
        ({"norm": "none"}, r"Unsupported option 'NONE'"),
    ],
)
def test_a_network_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MedNCA(**{"spatial_dims": 2, "in_channels": 1, "out_channels": 3, **arguments})


@pytest.mark.parametrize(
    ("image", "seed", "message"),
    [
        (torch.rand(1, 2, 8), None, r"`image` must have 4 axes .*, got shape \[1, 2, 8\]\."),
        (torch.rand(2, 8, 8), None, r"`image` must have 4 axes .*, got shape \[2, 8, 8\]\."),
        (torch.rand(1, 2, 8, 8, 8), None, r"`image` must have 4 axes"),
        (torch.rand(1, 3, 8, 8), None, r"`image` must have 2 channels, got shape \[1, 3, 8, 8\]"),
        (torch.rand(0, 2, 8, 8), None, r"`image` must not be empty, got shape \[0, 2, 8, 8\]\."),
        (torch.rand(1, 2, 8, 0), None, r"`image` must not be empty, got shape \[1, 2, 8, 0\]\."),
        (torch.rand(2, 2, 8, 8), torch.tensor([1]), r"`seed` must be int64 of shape \[2\], got"),
        (torch.rand(1, 2, 8, 8), torch.tensor(1), r"`seed` must be int64 of shape \[1\], got"),
        (
            torch.rand(1, 2, 8, 8),
            torch.tensor([1.0]),
            r"`seed` must be int64 of shape \[1\], got torch\.float32 of shape \[1\]\.",
        ),
    ],
)
def test_forward_refuses_wrong_arguments(make_network, image, seed, message):
    with pytest.raises(ValueError, match=message):
        make_network(2).float()(image, seed)


@pytest.mark.skipif(torch.__version__ < "2.8", reason="takes no image of any size")
def test_an_exported_onnx_graph_gives_the_same_logits_at_any_size(
    make_network, spatial_dims, tmp_path
):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = make_network(spatial_dims, steps=2).float().eval()
    sizes = [(2, 9, 7, 6), (1, 5, 30, 4), (3, 2, 4, 1)]
    images = [
        torch.rand([batch, network.in_channels, *size[:spatial_dims]]) for batch, *size in sizes
    ]
    path = tmp_path / "network.onnx"
    free = {0: "batch", **{axis + 2: f"size_{axis}" for axis in range(spatial_dims)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about its own parts
        torch.onnx.export(
            network,
            (images[0],),
            path,
            opset_version=18,
            dynamo=True,
            input_names=["image"],
            dynamic_axes={"image": free},
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path)
    for image in images:
        (logits,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(logits), network(image), rtol=0, atol=1e-5)
