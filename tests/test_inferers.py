"""Patches, tiles and ensembles: each is measured against the whole image."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor, list_data_collate
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer
from torch import nn
from torch.testing import assert_close

from mednca_monai import EnsembleInferer, MedNCA, RandomPatchInferer, TiledInferer, inferers
from mednca_monai.distributed import leave
from mednca_monai.inferers import RandomPatchBatch


class Wrapped(nn.Module):
    """What wraps a network for distributed training; it notes the size of each image."""

    def __init__(self, network):
        super().__init__()
        self.module = network
        self.sizes = []

    def forward(self, *args, **kwargs):
        self.sizes.append(list(args[0].shape[2:]))
        return self.module(*args, **kwargs)


def make_image(size, batch_size=2, channels=2):
    return torch.rand(batch_size, channels, *size, dtype=torch.float64)


def copying_network(spatial_dims):
    """A network whose logits are its image, which must be positive: one fine step adds it to 0."""
    network = MedNCA(spatial_dims, 1, 1, num_channels=2, hidden_size=1, steps=1, fire_rate=1.0)
    for weight in network.parameters():
        nn.init.zeros_(weight)
    fine = network.levels[1]
    fine.hidden.weight.data[0, 0] = 1
    fine.update.weight.data[1, 0] = 1
    return network


def grown(mask, reach):
    """Cells within ``reach`` of the mask, ``(B, *spatial)``, along every axis."""
    pool = nn.functional.max_pool2d if mask.dim() == 3 else nn.functional.max_pool3d
    return pool(mask[:, None].double(), 2 * reach + 1, 1, reach)[:, 0] > 0


def reached_by_an_edge(network, regions, shape):
    """Cells of the finest level that some region's edge can influence, or that lie outside."""
    wrong = torch.zeros(len(regions[-1].start), *[1] * len(shape), dtype=torch.bool)
    for level, whole in enumerate(network.shapes(shape)):
        for axis, factor in enumerate(network.scale_factor, 1):
            wrong = wrong.repeat_interleave(factor, axis) if level else wrong
            wrong = wrong.narrow(axis, 0, whole[axis - 1]) if level else wrong
        outside = torch.ones(len(regions[-1].start), *whole, dtype=torch.bool)
        for i, mask in enumerate(outside):
            start = regions[level].start[i % len(regions[level].start)].tolist()
            stop = [a + n for a, n in zip(start, regions[level].size, strict=True)]
            mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = False
        reach = network.steps[level] * (network.kernel_size[level] // 2)
        wrong = grown(wrong | outside, reach) | outside
    return wrong


# Patches


@pytest.mark.parametrize("place", ["corner", "middle", "end"])
def test_a_patch_equals_the_whole_where_its_edge_cannot_reach(
    make_network, spatial_dims, settings, place
):
    network = make_network(spatial_dims, **settings)
    shape, patch = [25, 27, 23][:spatial_dims], [17, 16, 18][:spatial_dims]
    last = [n - k for n, k in zip(shape, patch, strict=True)]
    start = {
        "corner": torch.zeros(2, spatial_dims, dtype=torch.int64),
        "middle": torch.tensor([[3, 5, 2], [4, 1, 5]])[:, :spatial_dims],
        "end": torch.tensor([last] * 2),
    }[place]
    image, seed = make_image(shape), torch.tensor([5, 5])
    with torch.no_grad():
        logits = RandomPatchInferer(patch)(image, network, patch_start=start, seed=seed)
        whole = network(image, seed)
    wrong = reached_by_an_edge(network, network.patch_regions(shape, start, patch), shape)
    right_cells, all_differences = 0, []
    for i in range(2):
        box = tuple(slice(a, a + n) for a, n in zip(start[i].tolist(), patch, strict=True))
        right = ~wrong[i][box]
        difference = (logits[i] - whole[i][(slice(None), *box)]).abs().amax(0)
        assert difference[right].max() < 1e-12
        all_differences.append(difference.max())
        right_cells += int(right.sum())
    assert right_cells > 0
    assert max(all_differences) > 1e-6, "no cell saw the edge: the test is too weak"


def test_a_patch_of_the_size_of_the_image_is_the_whole_image(
    make_network, spatial_dims, size, settings
):
    network, image = make_network(spatial_dims, **settings), make_image(size)
    assert_close(RandomPatchInferer(size)(image, network), network(image), rtol=0, atol=1e-12)


def test_gradients_reach_all_levels_from_a_patch(make_network, spatial_dims, size, settings):
    network = make_network(spatial_dims, **settings).train()
    RandomPatchInferer(5)(make_image(size), network).square().sum().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


def test_a_patch_in_bfloat16_is_close_and_leaves_the_callers_autocast_alone(
    make_network, spatial_dims, size
):
    network, image = make_network(spatial_dims).float(), make_image(size).float()
    start = torch.zeros(2, spatial_dims, dtype=torch.int64)
    plain = RandomPatchInferer(3)(image, network, patch_start=start)
    half = RandomPatchInferer(3, amp=True)(image, network, patch_start=start)
    with torch.autocast("cpu", torch.bfloat16):
        callers = RandomPatchInferer(3)(image, network, patch_start=start)
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < 5e-2 * max(1, plain.abs().max())
    assert_close(callers, half, rtol=0, atol=0)
    half.square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters())
    network, image = network.double(), image.double()
    plain = RandomPatchInferer(3)(image, network, patch_start=start)
    assert_close(RandomPatchInferer(3, amp=True)(image, network, patch_start=start), plain)


def test_only_the_coarsest_level_sees_more_than_the_patch(make_network, spatial_dims):
    network = make_network(spatial_dims, num_levels=3, steps=1)
    sizes = []
    for level in network.levels:
        level.register_forward_pre_hook(lambda _, inputs: sizes.append(list(inputs[0].shape[2:])))
    RandomPatchInferer(6)(make_image([24] * spatial_dims), network)
    assert sizes == [[6] * spatial_dims, [4] * spatial_dims, [6] * spatial_dims]


def test_patches_lie_everywhere_and_differ_within_a_batch(spatial_dims):
    network = copying_network(spatial_dims)
    cells = torch.arange(5.0**spatial_dims).view(1, 1, *[5] * spatial_dims) + 1
    patches = RandomPatchInferer(4)(cells.expand(200, *cells.shape[1:]), network)
    corners = patches[(slice(None), 0, *[0] * spatial_dims)].detach()
    expected = cells[(0, 0, *[slice(2)] * spatial_dims)].flatten()
    assert corners.unique().tolist() == expected.tolist()


def test_labels_are_cropped_where_the_patches_are(spatial_dims):
    network = copying_network(spatial_dims)
    image = torch.rand(6, 1, *[9, 8, 7][:spatial_dims])
    size = [4, 3, 5][:spatial_dims]
    batch = {"image": MetaTensor(image), "label": MetaTensor(image)}
    inputs, label, args, kwargs = RandomPatchBatch(size)(batch, "cpu", False)
    logits = RandomPatchInferer(size)(inputs, network, *args, **kwargs)
    assert torch.Tensor(label).equal(torch.Tensor(logits))
    assert len(kwargs["patch_start"].unique(dim=0)) > 1


def test_a_stock_trainer_crops_the_label_where_the_patch_is(spatial_dims):
    network = copying_network(spatial_dims)
    items = [{"image": torch.rand(1, *[9, 8, 7][:spatial_dims]) + 0.1} for _ in range(4)]
    data = [{**item, "label": item["image"]} for item in items]
    losses, starts = [], []

    def loss_function(prediction, target):
        assert prediction.shape == (2, 1, *[4] * spatial_dims)
        losses.append(float((prediction - target).detach().abs().max()))
        return nn.functional.mse_loss(prediction, target)

    class NotedInferer(RandomPatchInferer):
        def __call__(self, *args, **kwargs):
            starts.append(kwargs["patch_start"])
            return super().__call__(*args, **kwargs)

    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(data, batch_size=2, collate_fn=list_data_collate),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss_function=loss_function,
        prepare_batch=RandomPatchBatch(4),
        inferer=NotedInferer(4),
    ).run()
    assert losses == [0, 0]
    assert len(torch.cat(starts).unique(dim=0)) > 1


def test_wrapped_networks_train_on_patches(make_network, spatial_dims, size):
    network, image = make_network(spatial_dims), make_image(size)
    start = torch.ones(2, spatial_dims, dtype=torch.int64)
    expected = RandomPatchInferer(4)(image, network, patch_start=start)
    assert RandomPatchInferer(4)(image, Wrapped(network), patch_start=start).equal(expected)


def test_a_data_parallel_network_trains_on_patches(make_network, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        network = make_network(2).train()
        parallel = nn.parallel.DistributedDataParallel(network)
        RandomPatchInferer(5)(make_image([13, 11]), parallel).square().sum().backward()
    finally:
        leave()
    assert all(weight.grad.any() for weight in network.parameters())


# Tiles


@pytest.fixture
def large(size):
    """Size of an image that tiles of 6 cells cut along all axes."""
    return [n + 8 for n in size]


@pytest.mark.parametrize("roi_size", [4, (5, 30, 3)])
def test_a_tile_equals_the_whole_image(make_network, spatial_dims, large, settings, roi_size):
    network, image = make_network(spatial_dims, **settings), make_image(large)
    roi_size = roi_size[:spatial_dims] if isinstance(roi_size, tuple) else roi_size
    seed = torch.tensor([3, 3] if "firing" in settings else [3, -4])
    with torch.no_grad():
        for given in (None, seed):
            logits = TiledInferer(roi_size)(image, network, seed=given)
            assert_close(logits, network(image, given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axis", [0, -1])
def test_a_tile_that_sees_part_of_a_long_image_equals_the_whole(
    make_network, spatial_dims, settings, axis
):
    size = [5] * spatial_dims
    size[axis] = 43
    network, image = Wrapped(make_network(spatial_dims, **settings)), make_image(size)
    seed = torch.tensor([3, 3] if "firing" in settings else [3, -4])
    with torch.no_grad():
        logits = TiledInferer(12)(image, network, seed=seed)
        assert max(part[axis] for part in network.sizes) < 43
        assert_close(logits, network(image, seed), rtol=0, atol=1e-12)


def test_a_tile_equals_the_whole_image_in_single_precision(
    make_network, spatial_dims, large, settings
):
    network, image = make_network(spatial_dims, **settings).float(), make_image(large).float()
    with torch.no_grad():
        logits, whole = TiledInferer(5)(image, network), network(image)
    assert logits.dtype == torch.float32
    assert (logits - whole).abs().max() <= 1e-5 * max(1, float(whole.abs().max()))


def test_tiles_share_the_seeds_that_training_draws(make_network, spatial_dims, large):
    network, image = make_network(spatial_dims).train(), make_image(large)
    torch.manual_seed(1)
    whole = network(image)
    torch.manual_seed(1)
    assert_close(TiledInferer(6)(image, network), whole, rtol=0, atol=1e-12)


def test_images_smaller_than_a_tile_or_a_coarse_cell_are_one_tile(make_network, spatial_dims):
    network = make_network(spatial_dims, scale_factor=4)
    for size in ([1, 1, 1], [3, 1, 2]):
        image = make_image(size[:spatial_dims])
        assert_close(TiledInferer(8)(image, network), network(image), rtol=0, atol=1e-12)
        assert_close(TiledInferer(1)(image, network), network(image), rtol=0, atol=1e-12)


def test_a_tile_sees_no_more_of_a_large_image_than_can_reach_it(make_network, spatial_dims):
    network = Wrapped(make_network(spatial_dims, steps=(1, 2), scale_factor=2))
    TiledInferer([12] * spatial_dims)(make_image([60, 36, 36][:spatial_dims], 1), network)
    # 12 cells, 2 fine steps, one coarse cell of 2 on either side, and ends rounded to coarse cells
    assert max(max(size) for size in network.sizes) == 12 + 2 * 2 + 2 * 2
    assert len(network.sizes) == (5 * 3 if spatial_dims == 2 else 5 * 3 * 3)


def test_tiles_with_their_context_are_of_one_size():
    for length, size, context in product(range(1, 30), range(1, 8), range(5)):
        tiles = inferers.cut(length, size, context)
        assert [cell for tile in tiles for cell in range(*tile)] == list(range(length))
        sizes = [min(b + context, length) - max(a - context, 0) for a, b in tiles]
        assert set(sizes[:-1]) <= {size + 2 * context}
        assert sizes[-1] <= size + 2 * context
        assert len(tiles) <= -(-length // size)


def test_tiles_keep_meta_and_go_to_the_device_that_is_asked_for(make_network, spatial_dims, large):
    network = make_network(spatial_dims)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    image = MetaTensor(make_image(large), affine=affine)
    for device in (None, "cpu"):
        logits = TiledInferer(6, device=device)(image, network)
        assert isinstance(logits, MetaTensor)
        assert logits.affine.equal(affine)
        assert_close(logits.as_tensor(), network(image.as_tensor()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "norm",
    [
        "batch",
        "syncbatch",
        ("instance", {"track_running_stats": True}),
        ("localresponse", {"size": 3}),
    ],
)
def test_normalisation_that_cells_do_not_share_can_be_tiled(
    make_network, spatial_dims, large, norm
):
    network = make_network(spatial_dims, norm=norm)
    for level in network.levels:
        for buffer in level.norm.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2)
    image = make_image(large)
    assert_close(TiledInferer(6)(image, network), network(image), rtol=0, atol=1e-12)


def test_progress_counts_the_tiles(make_network, monkeypatch):
    counted = []

    def tqdm(tiles, desc):
        counted.append((len(tiles), desc))
        return tiles

    monkeypatch.setattr("mednca_monai.inferers.tqdm", tqdm)
    network, image = make_network(2), make_image([13, 11])
    logits = TiledInferer(3, progress=True)(image, network)
    assert counted == [(6, "tiles")]  # 3 along 13 cells, 2 along 11
    assert logits.equal(TiledInferer(3)(image, network))
    assert counted == [(6, "tiles")]


def test_tiles_return_freed_memory_once_for_so_many_cells(make_network, monkeypatch):
    returned = []
    monkeypatch.setattr(inferers, "CELLS_PER_RETURN", 200)
    monkeypatch.setattr(inferers, "return_freed_memory", lambda: returned.append(1))
    TiledInferer(4)(make_image([22, 22], 1), make_network(2))  # 16 tiles, with context 10 x 10
    assert len(returned) == 8
    TiledInferer(64)(make_image([4, 4], 1), make_network(2))
    assert len(returned) == 8


@pytest.mark.parametrize(
    ("platform", "names", "expected"),
    [("linux", ["malloc_trim"], [0]), ("linux", [], []), ("darwin", ["malloc_trim"], [])],
)
def test_memory_is_returned_only_where_the_system_library_can(
    platform, names, expected, monkeypatch
):
    returned = []
    library = SimpleNamespace(**dict.fromkeys(names, returned.append))
    monkeypatch.setattr(inferers.sys, "platform", platform)
    monkeypatch.setattr(inferers.ctypes, "CDLL", lambda _: library)
    inferers.return_freed_memory()
    assert returned == expected


def test_one_sliding_window_over_the_image_is_the_whole_image(make_network, spatial_dims, size):
    network, image = make_network(spatial_dims), make_image(size)
    logits = SlidingWindowInferer(size, mode="gaussian")(image, network)
    assert_close(logits, network(image), rtol=0, atol=1e-12)


# Ensembles


def statistics(logits):
    """Mean, standard deviation and quality metric of ``(runs, B, out_channels, *spatial)``."""
    if logits.shape[2] == 1:
        p = foreground = 1 / (1 + np.exp(-logits))
    else:
        p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
        foreground = 1 - p[:, :, :1]
    axes = tuple(range(1, foreground.ndim - 1))
    nqm = foreground.std(0).sum(axes) / foreground.mean(0).sum(axes)
    return {"mean": p.mean(0), "std": p.std(0), "nqm": nqm}


@pytest.mark.parametrize("out_channels", [1, 3])
@pytest.mark.parametrize("inferer", [SimpleInferer(), TiledInferer(2)], ids=["simple", "tiled"])
def test_an_ensemble_is_the_statistics_of_its_runs(
    make_network, spatial_dims, size, settings, out_channels, inferer
):
    network = make_network(spatial_dims, out_channels=out_channels, **settings)
    image = make_image(size)
    with torch.no_grad():
        runs = [network(image, torch.tensor([seed, seed])).numpy() for seed in range(4)]
        results = EnsembleInferer(inferer, num_runs=4)(image, network)
    expected = statistics(np.stack(runs))
    assert results.keys() == expected.keys()
    assert results["nqm"].shape == (2,)
    for name, value in expected.items():
        assert value.all()
        assert_close(results[name], torch.from_numpy(value), rtol=0, atol=1e-12)


def test_an_ensemble_runs_a_flat_network_over_the_slices_of_a_volume(make_network):
    network, volume = make_network(2, out_channels=3), make_image([9, 7, 5])
    inferer = SliceInferer(roi_size=(-1, -1), spatial_dim=2, sw_batch_size=3)
    with torch.no_grad():
        results = EnsembleInferer(inferer, num_runs=3)(volume, network)
        runs = []
        for seed in range(3):
            slices = [network(part, torch.tensor([seed, seed])) for part in volume.unbind(-1)]
            runs.append(torch.stack(slices, -1).numpy())
    for name, value in statistics(np.stack(runs)).items():
        assert_close(results[name], torch.from_numpy(value), rtol=0, atol=1e-12)


def test_an_ensemble_keeps_meta_and_hands_arguments_on(make_network, spatial_dims, size):
    network = make_network(spatial_dims)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    image = make_image(size)
    start = torch.tensor([[1, 2, 0], [3, 1, 1]])[:, :spatial_dims]
    patch, seeds = RandomPatchInferer(4), torch.tensor([[0, 0], [1, 1]])
    with torch.no_grad():
        runs = [patch(image, network, patch_start=start, seed=seed).numpy() for seed in seeds]
        results = EnsembleInferer(patch, num_runs=2)(
            MetaTensor(image, affine=affine), Wrapped(network), patch_start=start
        )
    expected = statistics(np.stack(runs))
    for name in ("mean", "std"):
        assert isinstance(results[name], MetaTensor)
        assert results[name].affine.equal(affine)
        assert_close(results[name].as_tensor(), torch.from_numpy(expected[name]))
    assert type(results["nqm"]) is torch.Tensor


def test_runs_that_agree_have_no_spread(make_network, spatial_dims, size):
    network = make_network(spatial_dims, fire_rate=1.0, out_channels=3)
    results = EnsembleInferer(SimpleInferer(), num_runs=3)(make_image(size), network)
    assert results["std"].max() < 1e-12
    assert results["nqm"].max() < 1e-12


class Background:
    """A network that is the less certain of the background, the larger image and seed are."""

    def __init__(self, certainty):
        self.certainty = certainty

    def __call__(self, image, seed):
        foreground = 2 * image * seed.view(-1, 1, 1, 1) - self.certainty
        return torch.cat([torch.zeros_like(image), foreground], 1)


def test_the_quality_metric_survives_an_image_that_is_all_background():
    image = torch.rand(2, 1, 8, 8)
    nqm = EnsembleInferer(SimpleInferer(), num_runs=4)(image, Background(200))["nqm"]
    assert nqm.isfinite().all()
    assert (nqm >= 0).all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float16, 0.05)])
@pytest.mark.parametrize("certainty", [0, 20])
def test_the_quality_metric_does_not_depend_on_the_precision(dtype, rtol, certainty):
    image = torch.rand(2, 1, 300, 300).to(dtype)
    ensemble, network = EnsembleInferer(SimpleInferer(), num_runs=4), Background(certainty)
    expected = ensemble(image.double(), network)["nqm"]
    assert expected.min() > 0.1
    assert_close(ensemble(image, network)["nqm"].double(), expected, rtol=rtol, atol=0)


# Wrong arguments


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "inferer", [RandomPatchInferer(4), TiledInferer(4), EnsembleInferer(SimpleInferer())]
)
def test_inferers_refuse_values_that_are_not_finite(make_network, inferer, value):
    image = make_image([8, 8])
    image[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"`inputs` must be finite, got 1 NaN or infinite values"):
        inferer(image, make_network(2))


@pytest.mark.parametrize(
    ("roi_size", "message"),
    [
        (9, r"`roi_size` must fit into the image, \[8, 10\], got 9\."),
        ((4, 11), r"`roi_size` must fit into the image, \[8, 10\], got \(4, 11\)\."),
        ((4, 4, 4), r"`roi_size` must be one value or one per axis \(2\), got \(4, 4, 4\)\."),
        (0, r"`roi_size` must be an integer of at least 1, got 0\."),
        (4.0, r"`roi_size` must be an integer of at least 1, got 4\.0\."),
    ],
)
def test_patches_that_do_not_fit_are_refused(make_network, roi_size, message):
    image = make_image([8, 10])
    with pytest.raises(ValueError, match=message):
        RandomPatchInferer(roi_size)(image, make_network(2))
    with pytest.raises(ValueError, match=message):
        RandomPatchBatch(roi_size)({"image": image, "label": image})


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ([[0, 0], [5, 0]], r"`patch_start` must be from 0 to \[4, 6\], got"),
        ([[0, 0], [0, -1]], r"`patch_start` must be from 0 to \[4, 6\], got"),
        ([[0.0, 0.0], [1.0, 1.0]], r"`patch_start` must be int64 of shape \[2, 2\], got torch.flo"),
        ([[0, 0]], r"`patch_start` must be int64 .* got torch.int64 of shape \[1, 2\]\."),
    ],
)
def test_patches_that_start_outside_are_refused(make_network, start, message):
    with pytest.raises(ValueError, match=message):
        RandomPatchInferer(4)(make_image([8, 10]), make_network(2), patch_start=torch.tensor(start))


def test_patches_of_images_that_the_network_does_not_take_are_refused(make_network):
    with pytest.raises(ValueError, match=r"`image` must have 4 axes"):
        RandomPatchInferer(4)(make_image([8, 10, 6]), make_network(2))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": torch.rand(1, 1, 8, 8)}, r"`batchdata` must hold a label .*, got none\."),
        (
            {"image": torch.rand(1, 1, 8, 8), "label": torch.rand(1, 1, 9, 8)},
            r"`batchdata` must hold .* size, 1 of \[8, 8\], got \[1, 1, 9, 8\]\.",
        ),
        (
            {"image": torch.rand(2, 1, 8, 8), "label": torch.rand(1, 1, 8, 8)},
            r"`batchdata` must hold .* size, 2 of \[8, 8\], got \[1, 1, 8, 8\]\.",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        RandomPatchBatch(4)(batch)


@pytest.mark.parametrize(
    ("roi_size", "message"),
    [
        (0, r"`roi_size` must be an integer of at least 1, got 0\."),
        ((4, 4, 4), r"`roi_size` must be one value or one per axis \(2\), got \(4, 4, 4\)\."),
    ],
)
def test_tiles_of_wrong_sizes_are_refused(make_network, roi_size, message):
    with pytest.raises(ValueError, match=message):
        TiledInferer(roi_size)(make_image([8, 10]), make_network(2))


@pytest.mark.parametrize(
    ("norm", "training"),
    [
        (("batch", {"track_running_stats": False}), False),
        ("batch", True),
        ("instance", False),
        (("group", {"num_groups": 2}), False),
    ],
)
def test_normalisation_that_spans_cells_cannot_be_tiled(make_network, norm, training):
    network = make_network(2, norm=norm).train(training)
    with pytest.raises(ValueError, match=r"`norm` must not span cells where an image is tiled"):
        TiledInferer(4)(make_image([8, 8]), network)


def test_tiles_refuse_images_that_the_network_refuses(make_network):
    with pytest.raises(ValueError, match=r"`image` must have 2 channels, got shape \[2, 3, 8, 8\]"):
        TiledInferer(4)(make_image([8, 8], channels=3), make_network(2))


@pytest.mark.parametrize("num_runs", [1, 0, 2.0])
def test_an_ensemble_needs_runs(num_runs):
    with pytest.raises(ValueError, match=r"`num_runs` must be an integer of at least 2, got"):
        EnsembleInferer(SimpleInferer(), num_runs)


def test_a_torchscript_network_runs_on_the_whole_image(make_network):
    network = make_network(2, in_channels=1)
    image = torch.rand(2, 1, 11, 9, dtype=torch.float64)
    expected = network(image)
    scripted = torch.jit.script(network)
    torch.testing.assert_close(TiledInferer(4)(image, scripted), expected)
    ensemble = EnsembleInferer(TiledInferer(4), 2)
    assert_close(ensemble(image, scripted)["std"], ensemble(image, network)["std"])
