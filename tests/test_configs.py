"""The bundle's configs as they stand, without a run: what other software reads off them."""

import copy
import csv
import hashlib
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import monai.bundle
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.properties import InferProperties, MetaProperties, TrainProperties
from monai.data import load_net_with_metadata
from monai.utils import BundlePropertyConfig

from mednca_monai import MedNCA

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "bundle" / "configs"
WEIGHTS = ROOT / "bundle" / "models" / "model.pt"
ALONE = ["inference.json", "metadata.json", "split.json", "train.json"]
# what an overlay is laid over; train.json, where it is not named here
BASES = {
    "inference_ts.json": ["inference.json"],
    "multi_gpu_evaluate.json": ["train.json", "evaluate.json"],
}
OVERLAYS = sorted(path.name for path in CONFIGS.glob("*.json") if path.name not in ALONE)


def read(name):
    return json.loads((CONFIGS / name).read_text(encoding="utf-8"))


def base_of(overlay):
    return BASES.get(overlay, ["train.json"])


def parse(*names, **overrides):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in names])
    parser.update(overrides)
    return parser


def parts(content, place=""):
    """All dictionaries, lists and values of a config, with their ids."""
    yield place, content
    pairs = content.items() if isinstance(content, dict) else []
    pairs = enumerate(content) if isinstance(content, list) else pairs
    for key, value in pairs:
        yield from parts(value, f"{place}#{key}".removeprefix("#"))


@pytest.fixture(scope="module", autouse=True)
def _logging():
    """MONAI's workflows set up the root logger."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.json")))
def test_json_is_indented_by_four_spaces_and_ends_with_a_newline(name):
    text = (CONFIGS / name).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"


def test_training_and_inference_share_all_that_both_of_them_name():
    train, inference = read("train.json"), read("inference.json")
    own = {"imports", "initialize", "run"}
    shared = train.keys() & inference.keys() - own
    assert shared >= {"network_def", "network", "spacing", "in_channels", "out_channels"}
    assert {key: train[key] for key in shared} == {key: inference[key] for key in shared}
    assert train["validate"]["inferer"] == inference["inferer"]


def on_image(transform):
    """Arguments of a transform of the image, with those of the label cut away."""
    transform = copy.deepcopy(transform)
    if transform["keys"] == ["image", "label"]:
        transform["keys"] = "image"
        if isinstance(transform.get("mode"), list):
            transform["mode"] = transform["mode"][0]
    return transform


def test_training_validation_and_inference_prepare_the_image_alike():
    train, inference = read("train.json"), read("inference.json")
    expected = inference["preprocessing"]["transforms"]
    assert all(transform["keys"] == "image" for transform in expected)
    for transforms in (
        train["train"]["deterministic_transforms"],
        train["validate"]["preprocessing"]["transforms"],
    ):
        on_images = [t for t in transforms if "image" in t["keys"]]
        assert [on_image(transform) for transform in on_images] == expected


@pytest.mark.parametrize("name", ["train.json", "inference.json", *OVERLAYS])
def test_custom_components_are_found_through_the_code_path(name):
    content = read(name)
    custom = [
        part
        for _, part in parts(content)
        if isinstance(part, dict) and "mednca_monai" in str(part.get("_target_", ""))
    ]
    assert all(part["_requires_"] == "@code_path" for part in custom)
    assert custom or name not in ("train.json", "inference.json")
    # its import comes before the path is known
    assert not re.search(r"import\s+mednca_monai", json.dumps(content))


@pytest.mark.parametrize("name", ["train.json", "inference.json", *OVERLAYS])
def test_configs_refer_only_to_ids_that_exist(name):
    files = [name] if name in ALONE else [*base_of(name), name]
    parser = parse(*files)
    texts = [value for _, value in parts(read(name)) if isinstance(value, str)]
    found = {
        reference
        for text in texts
        if text.startswith(("@", "$"))
        for reference in re.findall(r"@(\w+(?:#\w+)*)", text)
    }
    assert {reference for reference in found if reference not in parser} == set()


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_change_what_exists_or_add_what_is_used(name):
    base, overlay = parse(*base_of(name)), read(name)
    text = json.dumps(overlay)
    for key in overlay:
        parent = key.rpartition("#")[0]
        used = f"@{key}" in text or parent in base or key == "evaluating"
        assert key in base or used, key


@pytest.mark.parametrize("name", ["multi_gpu_train.json", "multi_gpu_evaluate.json"])
def test_on_several_gpus_only_the_first_one_writes(name):
    parser = parse(*base_of(name), name)
    silent = {"StatsHandler", "TensorBoardStatsHandler", "TensorBoardImageHandler"}
    for place in ("train#handlers", "validate#handlers"):
        for handler in parser[place]:
            if place == "train#handlers" and "evaluate" in name:
                continue
            disabled = handler.get("_disabled_", "")
            assert ("get_rank() > 0" in disabled) == (handler["_target_"] in silent)


def test_the_benchmarks_unet_leaves_out_what_is_for_cell_automata():
    overlay = json.loads((ROOT / "benchmarks" / "unet.json").read_text())
    disabled = [key.removesuffix("#_disabled_") for key in overlay if key.endswith("_disabled_")]
    names = [parse("train.json")[key]["_target_"] for key in disabled]
    assert names == [f"mednca_monai.handlers.{name}" for name in ("StateNorm", "VariedIterations")]


@pytest.mark.parametrize(
    ("crop_size", "roi_size", "larger", "smaller"),
    [
        ([36, 52, 36], [28, 38, 28], [32, 45, 32], [19, 26, 19]),
        (40, 20, [30, 30, 30], [14, 14, 14]),
        (1, 1, [1, 1, 1], [1, 1, 1]),
        (-1, [20, 24, 20], [20, 24, 20], [14, 16, 14]),  # the whole image, of any size
    ],
)
def test_patches_of_variants_are_larger_or_take_more_steps(crop_size, roi_size, larger, smaller):
    parser = parse("train.json", crop_size=crop_size, roi_size=roi_size)
    variants = parser.get_parsed_content("train#handlers#4#variants")
    found = [(variant["steps"], variant["roi_size"]) for variant in variants]
    assert found == [(1, larger), (4, smaller)]


@pytest.mark.parametrize("names", [["unet"], ["unet", "basic_unet"], ["unet", "dyn_unet"]])
def test_the_benchmarks_networks_take_their_crops(names):
    parser = parse("train.json")
    for name in names:
        parser.update(json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()))
    network = parser.get_parsed_content("network_def").eval()
    with torch.no_grad():
        logits = network(torch.zeros(1, 1, *parser["crop_size"]))
    assert list(logits.shape) == [1, 3, *parser["crop_size"]]


def test_the_benchmarks_unet_trains_without_what_asks_for_cell_automata():
    parser = parse("train.json")
    for name in ("unet", "basic_unet"):  # which does not tell its dimensions
        parser.update(json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()))
    for place in (2, 4):
        assert parser.get_parsed_content(f"train#handlers#{place}") is None


def test_the_benchmarks_paper_changes_what_it_means_to():
    overlay = json.loads((ROOT / "benchmarks" / "paper.json").read_text())
    train = parse("train.json")
    assert train["train#handlers#2"]["_target_"] == "mednca_monai.handlers.StateNorm"
    assert train["train#handlers#3"]["_target_"] == "mednca_monai.handlers.DivergenceGuard"
    assert train["train#handlers#4"]["_target_"] == "mednca_monai.handlers.VariedIterations"
    assert train["train#random_transforms#6"]["_target_"] == "RandCropByPosNegLabeld"
    for key in overlay.keys() - {"as_slice"}:
        assert key in train
    train.update(overlay)
    larger = train.get_parsed_content("train#handlers#4#variants#0#roi_size")
    assert larger == [28, 38]
    assert parse("train.json")["train#handlers#4#steps"] == [0.6, 1.2]
    assert train["train#handlers#4#steps"] == [1, 1]


def test_the_end_of_a_training_is_validated():
    train = parse("train.json")
    assert train["max_epochs"] % train.get_parsed_content("val_interval") == 0


def test_metadata_follows_the_schema(shared):
    schema = shared / "reference" / "meta_schema_20240725.json"
    if not schema.is_file():
        pytest.skip(f"no {schema}")
    assert read("metadata.json")["schema"].endswith(schema.name)
    checksum = hashlib.md5(schema.read_bytes()).hexdigest()
    monai.bundle.verify_metadata(
        str(CONFIGS / "metadata.json"), filepath=str(schema), hash_val=checksum
    )


def test_metadata_describes_the_configs():
    meta, train = read("metadata.json"), read("train.json")
    assert meta["version"] in meta["changelog"]
    image = meta["network_data_format"]["inputs"]["image"]
    pred = meta["network_data_format"]["outputs"]["pred"]
    assert image["num_channels"] == train["in_channels"]
    assert pred["num_channels"] == train["out_channels"] == len(train["label_names"])
    assert list(pred["channel_def"].values()) == train["label_names"]
    assert len(image["spatial_shape"]) == train["network_def"]["spatial_dims"]
    parameters = sum(weight.numel() for weight in random_network().parameters())
    assert f"{parameters:,} parameters" in meta["description"]
    with open(ROOT / "bundle" / "docs" / "validation_cases.csv", newline="") as file:
        cases = list(csv.DictReader(file))
    for name, value in meta["eval_metrics"].items():
        assert round(np.mean([float(case[name]) for case in cases]), 4) == value


@pytest.fixture
def _monai_warns():
    """MONAI warns that a config may run any code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "parsing config_file", UserWarning)
        yield


@pytest.fixture
def dataset(tmp_path):
    """Two cases, one of each part."""
    rng = np.random.default_rng(0)
    cases = []
    for name in ("a", "b"):
        image = nibabel.Nifti1Image(rng.normal(size=(3, 4, 5)).astype(np.float32), np.eye(4))
        label = nibabel.Nifti1Image(rng.integers(0, 3, (3, 4, 5)).astype(np.uint8), np.eye(4))
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
        nibabel.save(label, tmp_path / f"{name}_label.nii.gz")
        cases.append({"image": f"{name}.nii.gz", "label": f"{name}_label.nii.gz"})
    (tmp_path / "dataset.json").write_text(json.dumps({"training": cases}))
    return tmp_path


@pytest.mark.usefixtures("_monai_warns")
@pytest.mark.parametrize(
    ("files", "workflow_type", "properties"),
    [
        (["train.json"], "train", TrainProperties),
        (["train.json", "evaluate.json"], "train", TrainProperties),
        (["inference.json"], "infer", InferProperties),
        (["inference.json", "inference_ts.json"], "infer", InferProperties),
    ],
    ids=["train", "evaluate", "inference", "inference_ts"],
)
def test_a_workflow_has_all_properties_that_monai_knows(
    files, workflow_type, properties, dataset, tmp_path
):
    workflow = ConfigWorkflow(
        [str(CONFIGS / name) for name in files],
        workflow_type=workflow_type,
        logging_file=False,
        bundle_root=str(ROOT / "bundle"),
        output_dir=str(tmp_path / "output"),
        dataset_dir=str(dataset),
        device="cpu",
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    for name, description in {**properties, **MetaProperties}.items():
        assert description[BundlePropertyConfig.ID] in workflow.parser, name
        assert getattr(workflow, name) is not None or name == "key_metric"
    workflow.finalize()


@pytest.mark.parametrize("size", [1, 3, 64])
def test_the_network_takes_and_gives_what_the_metadata_says(size):
    monai.bundle.verify_net_in_out(
        "network_def",
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
        n=size,
        device="cpu",
    )


def test_what_a_dataset_names_is_not_evaluated(tmp_path):
    names = ["$1 + 1.nii", "@device.nii", "%seed.nii"]
    for name in names:
        (tmp_path / name).touch()
    cases = [{"image": name, "label": name} for name in names]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": cases, "test": []}))
    train = parse("train.json", bundle_root=str(tmp_path), dataset_dir=str(tmp_path))
    train.update({"split_file": None, "validate#dataset#data#part": "all"})
    expected = sorted(str(tmp_path / name) for name in names)
    listed = train.get_parsed_content("validate#dataset#data")
    assert [case["label"] for case in listed] == expected
    inference = parse("inference.json", bundle_root=str(tmp_path), dataset_dir=str(tmp_path))
    assert [case["image"] for case in inference.get_parsed_content("dataset").data] == expected


def numpy_preprocessing(volume, affine):
    """Orientation, percentile scaling and linear resampling to 1 mm without MONAI."""
    turn = nibabel.io_orientation(affine)
    image = nibabel.apply_orientation(volume, turn).astype(np.float64)
    low, high = np.percentile(image, [0.5, 99.5])
    image = ((image - low) / (high - low)).clip(0, 1)
    spacing = nibabel.affines.voxel_sizes(
        affine @ nibabel.orientations.inv_ornt_aff(turn, volume.shape)
    )
    for axis, step in enumerate(spacing):
        last = image.shape[axis] - 1
        place = (np.arange(round(last * step + 1)) / step).clip(0, last)
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, last)
        share = np.expand_dims(place - below, [a for a in range(3) if a != axis])
        image = image.take(below, axis) * (1 - share) + image.take(above, axis) * share
    return image


@pytest.mark.parametrize("shape", [(9, 7, 11), (4, 20, 6), (5, 40, 3), (1, 6, 1)])
@pytest.mark.parametrize(
    "axes",
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[-1, 0, 0], [0, -1, 0], [0, 0, 1]],
        [[0, 0.28, -1.92], [-0.5, 0, 0], [0, 0.96, 0.56]],
    ],
    ids=["RAS", "LPS", "PSL oblique"],
)
def test_preprocessing_is_what_numpy_makes_of_it(tmp_path, axes, shape):
    affine = np.eye(4)
    affine[:3, :3] = axes
    volume = np.random.default_rng(0).gamma(2, 100, shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, affine), tmp_path / "scan.nii.gz")
    parser = parse("inference.json", bundle_root=str(tmp_path))
    prepare = parser.get_parsed_content("preprocessing")
    image = prepare({"image": str(tmp_path / "scan.nii.gz")})["image"]

    expected = numpy_preprocessing(volume, affine)
    np.testing.assert_allclose(image[0].numpy(), expected, rtol=0, atol=1e-5)


def random_network():
    """The bundle's network with weights that no training leaves: it tells its classes apart."""
    settings = {
        key: value
        for key, value in read("inference.json")["network_def"].items()
        if not key.startswith("_") and not str(value).startswith("@")
    }
    network = MedNCA(in_channels=1, out_channels=3, **settings)
    for level in network.levels:
        torch.nn.init.normal_(level.update.weight, std=0.1)
    return network.eval()


def shipped_weights():
    if not WEIGHTS.is_file():
        pytest.skip(f"no {WEIGHTS.relative_to(ROOT)} yet")
    return torch.load(WEIGHTS, weights_only=True)


@pytest.mark.parametrize("weights", ["shipped", "random"])
def test_the_exported_model_gives_the_networks_logits(tmp_path, weights):
    network = random_network()
    if weights == "shipped":
        network.load_state_dict(shipped_weights())
    torch.save(network.state_dict(), tmp_path / "model.pt")
    monai.bundle.ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(tmp_path / "model.pt"),
        meta_file=str(CONFIGS / "metadata.json"),
        config_file=str(CONFIGS / "inference.json"),
    )
    exported, meta, _ = load_net_with_metadata(str(tmp_path / "model.ts"))
    assert meta["version"] == read("metadata.json")["version"]
    for image in (torch.rand(2, 1, 16, 20, 12), torch.rand(1, 1, 5, 30, 1)):
        with torch.no_grad():
            logits, expected = exported(image), network(image)
        assert expected.std() > 0.01
        rounding = 1e-5 * max(1, float(expected.abs().max()))
        torch.testing.assert_close(logits, expected, rtol=0, atol=rounding)


def test_the_shipped_torchscript_model_is_of_the_shipped_weights():
    network = random_network()
    network.load_state_dict(shipped_weights())
    exported = WEIGHTS.with_suffix(".ts")
    if not exported.is_file():
        pytest.skip(f"no {exported.relative_to(ROOT)} yet")
    model, meta, _ = load_net_with_metadata(str(exported))
    assert meta["version"] == read("metadata.json")["version"]
    image = torch.rand(2, 1, 16, 20, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(image), network(image), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("_monai_warns")
@pytest.mark.parametrize("workflow_type", ["train", "inference"])
@pytest.mark.parametrize("weights", ["shipped", "random"])
def test_monai_loads_the_network_with_its_weights(tmp_path, monkeypatch, weights, workflow_type):
    folder, state = ROOT / "bundle", {}
    if weights == "shipped":
        state = shipped_weights()
    else:
        folder, state = tmp_path / "bundle", random_network().state_dict()
        (folder / "models").mkdir(parents=True)
        torch.save(state, folder / "models" / "model.pt")
        (folder / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    network = monai.bundle.load(
        folder.name, bundle_dir=folder.parent, workflow_type=workflow_type, device="cpu"
    )
    assert isinstance(network, MedNCA)
    loaded = network.state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[key].equal(state[key]) for key in state)
    assert any(value.count_nonzero() for key, value in state.items() if "update" in key)


@pytest.mark.parametrize("name", ["evaluate.json", "inference.json"])
@pytest.mark.parametrize(
    ("trained", "channels", "shipped"),
    [(False, (1, 3), True), (True, (1, 3), False), (False, (2, 3), False), (False, (1, 2), False)],
)
def test_the_shipped_weights_stand_in_for_no_other_training(
    tmp_path, name, trained, channels, shipped
):
    if trained:
        (tmp_path / "checkpoints").mkdir()
    parser = ConfigParser({**read("inference.json"), "ckpt_path": read(name)["ckpt_path"]})
    parser.update({"bundle_root": "root", "output_dir": str(tmp_path)})
    parser.update({"in_channels": channels[0], "out_channels": channels[1]})
    expected = Path("root/models/model.pt") if shipped else tmp_path / "checkpoints" / "best.pt"
    assert Path(parser.get_parsed_content("ckpt_path")) == expected


def test_each_training_in_monai_label_has_checkpoints_of_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "monailabel", None)
    folder = Path(parse("train.json").get_parsed_content("ckpt_dir"))
    assert re.fullmatch(r"label_\d{8}_\d{6}", folder.name)
    assert folder.parent == Path("output/checkpoints")


def test_a_run_with_a_name_has_checkpoints_of_its_own():
    folders = [
        Path(parse("train.json", **name).get_parsed_content("ckpt_dir"))
        for name in ({}, {"run_name": "client_1"}, {"run_name": 2})
    ]
    assert folders == [Path("output/checkpoints", name) for name in ("", "client_1", "2")]
