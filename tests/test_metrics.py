import csv
import itertools
import logging
import math
import os
from types import SimpleNamespace

import ignite.distributed as idist
import nibabel
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler, from_engine
from monai.transforms import AsDiscreted, Compose, EnsureChannelFirstd, LoadImaged

from mednca_monai.distributed import leave
from mednca_monai.metrics import CaseMetric, CaseReport

SPACING = (0.5, 1.0, 3.0)
DIAGONAL = math.sqrt((0.5 * 12) ** 2 + (1 * 12) ** 2 + (3 * 12) ** 2)
WORST = {"dice": 0.0, "hd95": DIAGONAL, "surface_dice": 0.0}
BEST = {"dice": 1.0, "hd95": 0.0, "surface_dice": 1.0}
LABEL_NAMES = ["background", "Anterior", "Posterior part"]


def labelled(*boxes, shape=(12, 12, 12), spacing=SPACING):
    """A label map in which box number i, one slice per axis, is class i + 1."""
    affine = np.diag([*spacing, 1.0])
    labels = MetaTensor(torch.zeros(1, *shape), affine=affine)
    for number, box in enumerate(boxes, 1):
        if box is not None:
            labels[(0, *box)] = number
    return labels


def cube(start, size=6, shift=(0, 0, 0)):
    return tuple(slice(start + s, start + s + size) for s in shift)


def score(measure, pred, label, num_classes=2, **options):
    return CaseMetric(measure, num_classes, **options)([pred], [label])[0].tolist()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hd95_of_a_shifted_box_is_its_shift_in_mm(axis):
    shift = [2 * (i == axis) for i in range(3)]
    pred, label = labelled(cube(2, shift=shift)), labelled(cube(2))
    assert score("hd95", pred, label) == [2 * SPACING[axis]]


def test_hd95_takes_the_percentile_of_each_direction_and_then_the_larger_one():
    label, pred = torch.zeros(1, 1, 60), torch.zeros(1, 1, 60)
    label[..., :21] = 1
    pred[..., :21] = 1
    pred[..., [30, 40]] = 1
    # 23 distances, 0 but for 10 and 20: number 0.95 * 22 = 20.9 of them is 0.9 * 10
    assert score("hd95", pred, label) == pytest.approx([9.0])
    assert score("hd95", label, pred) == pytest.approx([9.0])


@pytest.mark.parametrize(("axis", "expected"), [(0, 1.0), (1, 1.0), (2, 0.0)])
def test_surface_dice_forgives_a_shift_of_one_voxel_up_to_the_tolerance_in_mm(axis, expected):
    plate = [slice(2, 10)] * 3
    plate[axis] = slice(4, 5)
    moved = list(plate)
    moved[axis] = slice(5, 6)
    pred, label = labelled(moved), labelled(plate)
    assert score("surface_dice", pred, label, tolerance=1.0) == [expected]
    assert score("surface_dice", pred, label, tolerance=3.0) == [1.0]
    assert score("surface_dice", pred, label, tolerance=0.4) == [0.0]


def test_surface_dice_counts_the_voxels_of_both_surfaces():
    pred, label = labelled(cube(2, shift=(0, 0, 1))), labelled(cube(2))
    # of 6^3 - 4^3 = 152 surface voxels each, the outer face, 36, is 3 mm from the other box; the
    # opposite face lies inside it, no more than 1 mm from a side
    assert score("surface_dice", pred, label) == pytest.approx([1 - 36 / 152])


def test_a_distance_of_the_tolerance_counts_in_an_oblique_float32_image():
    plates = [(slice(x, x + 1), slice(0, 2), slice(0, 2)) for x in (0, 1)]
    pred, label = (labelled(plate, shape=(2, 2, 2)) for plate in plates)
    for degree in range(90):
        c, s = (0.9 * f(math.radians(degree)) for f in (math.cos, math.sin))
        affine = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
        label.affine = affine
        assert score("surface_dice", pred, label, tolerance=0.9) == [1.0]


def test_dice_has_a_column_per_class_and_one_of_their_union():
    def rods(*spans):
        return labelled(*((slice(*span), slice(0, 1), slice(0, 1)) for span in spans))

    pred, label = rods((0, 2), (2, 8)), rods((0, 4), (4, 8))
    # 2 * 2 / (2 + 4), 2 * 4 / (6 + 4), all
    assert score("dice", pred, label, num_classes=3) == pytest.approx([2 / 3, 0.8, 1.0])


@pytest.mark.parametrize("measure", WORST)
def test_one_foreground_class_has_one_column(measure):
    assert score(measure, labelled(cube(2)), labelled(cube(2))) == [BEST[measure]]


@pytest.mark.parametrize("measure", WORST)
def test_missed_and_invented_structures_are_worst_and_absent_ones_nan(measure):
    box, other = cube(0, 3), cube(4, 3)
    best, worst = BEST[measure], WORST[measure]
    cases = [
        (labelled(None, box), labelled(other, box), [worst, best]),  # missed
        (labelled(other, box), labelled(None, box), [worst, best]),  # invented
        (labelled(None, box), labelled(None, box), [math.nan, best]),
    ]
    for pred, label, expected in cases:
        values = score(measure, pred, label, num_classes=3)
        assert values[:2] == pytest.approx(expected, nan_ok=True)
    empty = score(measure, labelled(), labelled(), num_classes=3)
    assert empty == pytest.approx([math.nan] * 3, nan_ok=True)
    missed = score(measure, labelled(), labelled(box), num_classes=3)
    assert missed == pytest.approx([worst, math.nan, worst], nan_ok=True)


@pytest.mark.parametrize("measure", WORST)
@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((5, 5, 5), (2, 2, 2)),  # one voxel
        ((5, 5, 5), (0, 0, 4)),  # one in a corner
        ((5, 5, 5), (slice(5),) * 3),  # the whole image
        ((5, 5, 1), (slice(2), slice(3), 0)),
        ((1, 5, 1), (0, slice(3), 0)),
        ((1, 1, 1), (0, 0, 0)),
        ((5, 5), (2, slice(5))),
        ((1, 5), (0, 4)),
    ],
)
def test_degenerate_structures_equal_themselves(measure, shape, box):
    spacing = SPACING[: len(shape)]
    label = labelled(box, shape=shape, spacing=spacing)
    assert score(measure, label, label) == [BEST[measure]]


def test_surfaces_include_the_border_of_the_image():
    whole, inner = labelled(cube(0, 12)), labelled(cube(1, 10))
    assert score("surface_dice", whole, inner, tolerance=0.0) == [0.0]


def test_single_voxels_are_their_distance_apart():
    pred = labelled((0, 0, 0), shape=(4, 5, 1))
    label = labelled((3, 4, 0), shape=(4, 5, 1))
    assert score("hd95", pred, label) == pytest.approx([math.hypot(1.5, 4)])


@pytest.mark.parametrize("collated", [False, True])
def test_each_case_has_its_own_spacing_and_plain_tensors_have_1_mm(collated):
    pred, label = labelled(cube(2, shift=(0, 0, 2))), labelled(cube(2))
    near = label.clone()
    near.affine = torch.eye(4)
    metric = CaseMetric("hd95", 2)
    if collated:
        batch = next(iter(DataLoader([{"label": label}, {"label": near}], batch_size=2)))["label"]
        assert metric(torch.stack([pred, pred]), batch).tolist() == [[6.0], [2.0]]
    else:
        plain = label.as_tensor()
        assert metric([pred] * 3, [label, near, plain]).tolist() == [[6.0], [2.0], [2.0]]


def test_a_2d_slice_of_an_oblique_volume_keeps_its_spacing():
    label = torch.zeros(1, 12, 12)
    label[:, 2:8, 2:8] = 1
    affine = np.array([[0.0, 0, 3, 0], [0.5, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
    for axis, expected in ((1, 1.0), (2, 4.0)):
        assert score("hd95", label.roll(2, axis), MetaTensor(label, affine=affine)) == [expected]


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.float64]
)
def test_labels_may_have_any_dtype(dtype):
    label = labelled(cube(2))
    for measure in WORST:
        assert score(measure, label.to(dtype), label) == [BEST[measure]]
        assert score(measure, label, label.to(dtype)) == [BEST[measure]]


def test_the_aggregate_is_the_mean_over_cases_of_the_mean_over_classes_present():
    left, right = cube(0, 3), cube(4, 3)
    metric = CaseMetric("dice", 3)
    label = labelled(left, right)
    metric([label], [label])  # 1 and 1
    metric([labelled(None, right)], [label])  # 0 and 1
    metric([labelled(left)], [labelled(left)])  # 1 and absent
    metric([labelled()], [labelled()])  # absent and absent
    assert metric.aggregate().item() == pytest.approx((1 + 0.5 + 1) / 3)
    metric.reset()
    metric([labelled()], [labelled()])
    assert metric.aggregate().isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("iou", 2), "`measure` must be one of dice, hd95, surface_dice, got 'iou'"),
        (("dice", 1), "`num_classes` must be an integer of at least 2, got 1"),
        (("surface_dice", 2, -1), "`tolerance` must be finite and at least 0, got -1"),
        (("surface_dice", 2, math.inf), "`tolerance` must be finite and at least 0, got inf"),
        (("surface_dice", 2, math.nan), "`tolerance` must be finite and at least 0, got nan"),
        (("surface_dice", 2, "1"), "`tolerance` must be finite and at least 0, got '1'"),
    ],
)
def test_a_wrong_setting_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CaseMetric(*arguments)


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, math.nan, math.inf])
def test_a_value_that_is_no_class_is_named(value):
    right = torch.zeros(1, 1, 4, 4)
    wrong = right.clone()
    wrong[..., 1, 2] = value
    with pytest.raises(ValueError, match=f"`y_pred` must hold integers from 0 to 1, got {value}"):
        CaseMetric("dice", 2)(wrong, right)
    with pytest.raises(ValueError, match=f"`y` must hold integers from 0 to 1, got {value}"):
        CaseMetric("dice", 2)(right, wrong)


@pytest.mark.parametrize(
    ("y_pred", "y", "message"),
    [
        ((1, 1, 4, 4), (1, 1, 4, 5), r"`y` must have `y_pred`'s shape, \[1, 1, 4, 4\], got \[1, 1"),
        ((1, 1, 4, 4), None, r"`y` must have `y_pred`'s shape, \[1, 1, 4, 4\], got None"),
        ((1, 2, 4, 4), (1, 2, 4, 4), r"`y_pred` must have one channel .* got shape \[2, 4, 4\]"),
        ((1, 1, 4), (1, 1, 4), r"`y_pred` must have one channel .* got shape \[1, 4\]"),
    ],
)
def test_a_wrong_shape_is_named(y_pred, y, message):
    with pytest.raises(ValueError, match=message):
        CaseMetric("dice", 2)(torch.zeros(y_pred), None if y is None else torch.zeros(y))


class OneHot(torch.nn.Module):
    """A network whose segmentation is its image."""

    def forward(self, image):
        return torch.cat([image == number for number in range(3)], 1).float()


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def evaluate(folder, save_dir, cases, measures=tuple(WORST), names=LABEL_NAMES):
    """Run a stock evaluator on files of (prediction, label) pairs, in their order."""
    items = []
    for name, maps in cases.items():
        items.append({key: folder / f"{name}_{key}.nii.gz" for key in ("image", "label")})
        for path, labels in zip(items[-1].values(), maps, strict=True):
            nibabel.save(nibabel.Nifti1Image(labels[0].numpy(), labels.affine.numpy()), path)
    keys = ["image", "label"]
    load = Compose([LoadImaged(keys), EnsureChannelFirstd(keys)])
    metrics = {
        measure: IgniteMetricHandler(
            metric_fn=CaseMetric(measure, 3), output_transform=from_engine(["pred", "label"])
        )
        for measure in measures
    }
    key, *others = metrics
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items, load), batch_size=2),
        network=OneHot(),
        postprocessing=AsDiscreted("pred", argmax=True),
        key_val_metric={key: metrics[key]},
        additional_metrics={other: metrics[other] for other in others},
        val_handlers=[CaseReport(str(save_dir), names)],
    )
    evaluator.run()
    return evaluator


def test_a_stock_evaluator_writes_cases_and_summary(tmp_path, caplog):
    left, right = cube(0, 3), cube(4, 3)
    label = labelled(left, right)
    cases = {
        "c": (label, label),
        "a, left": (labelled(left), labelled(left)),
        "b.1": [labelled(box, right, spacing=(1, 2, 2)) for box in (None, left)],
    }
    with caplog.at_level(logging.INFO):
        evaluator = evaluate(tmp_path, tmp_path / "new" / "report", cases)
        evaluator.run()  # a second epoch replaces the first one's files
    assert evaluator.state.metrics["dice"] == pytest.approx((1 + 1 + 0.5) / 3)
    header, *rows = read(tmp_path / "new" / "report" / "cases.csv")
    structures = ["anterior", "posterior_part", "whole"]
    columns = [
        f"{m}_{s}" for m, s in itertools.product(("dice", "hd95", "surface_dice"), structures)
    ]
    assert header == ["case", *columns]
    diagonal, one, zero = "36.000000", "1.000000", "0.000000"
    assert [row[:6] for row in rows] == [
        ["a, left_image", one, "", one, zero, ""],
        ["b.1_image", zero, one, "0.666667", diagonal, zero],
        ["c_image", one, one, one, zero, zero],
    ]
    assert {len(row) for row in rows} == {10}
    assert b"\r" not in (tmp_path / "new" / "report" / "cases.csv").read_bytes()
    summary = read(tmp_path / "new" / "report" / "summary.csv")
    assert summary[0] == ["metric", "mean", "std", "median", "min", "max", "count", "left_out"]
    assert [row[0] for row in summary[1:]] == columns
    std = f"{math.sqrt(2) / 3:.6f}"
    assert summary[1] == ["dice_anterior", "0.666667", std, one, zero, one, "3", "0"]
    assert summary[2] == ["dice_posterior_part", one, zero, one, one, one, "2", "1"]
    assert sorted(os.listdir(tmp_path / "new" / "report")) == ["cases.csv", "summary.csv"]
    assert [record.name for record in caplog.records if "dice_anterior" in record.message] == [
        evaluator.logger.name
    ] * 2
    assert f"\ndice_anterior                  0.666667    {std}" in caplog.text


def test_a_structure_that_no_case_holds_has_an_empty_summary(tmp_path):
    left = labelled(cube(0, 3))
    evaluate(tmp_path, tmp_path, {"a": (left, left)})
    summary = read(tmp_path / "summary.csv")
    assert summary[2] == ["dice_posterior_part", "", "", "", "", "", "0", "1"]


def test_a_failed_write_leaves_the_old_tables(tmp_path, monkeypatch):
    left = labelled(cube(0, 3))
    evaluate(tmp_path, tmp_path, {"a": (left, left)})
    old = read(tmp_path / "cases.csv"), read(tmp_path / "summary.csv")

    def full_disk(rows):
        raise OSError("no space left")

    writer = csv.writer
    monkeypatch.setattr(
        "mednca_monai.metrics.csv.writer",
        lambda file, **options: (
            SimpleNamespace(writerows=full_disk)
            if "summary" in file.name
            else writer(file, **options)
        ),
    )
    with pytest.raises(OSError, match="no space left"):
        evaluate(tmp_path, tmp_path, {"b": (left, left)})
    assert (read(tmp_path / "cases.csv"), read(tmp_path / "summary.csv")) == old


@pytest.mark.parametrize(
    "names", [["background"], ["background", "A b", "a_b"], ["background", "left", "Whole"]]
)
def test_columns_must_be_told_apart(tmp_path, names):
    with pytest.raises(ValueError, match=r"`label_names` must be background, .* got \['background"):
        CaseReport(str(tmp_path), names)


def test_label_names_must_be_as_many_as_the_classes(tmp_path):
    with pytest.raises(ValueError, match=r"`label_names` must name 3 classes, got \['background'"):
        CaseReport(str(tmp_path), ["background", "left"], out_channels=3)


def test_one_class_may_be_called_whole(tmp_path):
    assert CaseReport(str(tmp_path), ["background", "Whole"]).structures == ["whole"]


def test_label_names_must_fit_the_metric(tmp_path):
    left = labelled(cube(0, 3))
    with pytest.raises(ValueError, match=r"`dice` must have .* \[1, 1\], got \[1, 3\]"):
        evaluate(tmp_path, tmp_path, {"a": (left, left)}, names=["background", "left"])


def report_of_one_rank(rank, folder):
    """A process that evaluates the cases of its rank, the later ones in the alphabet on rank 0."""
    idist.initialize("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    save_dir = folder / f"rank{rank}"
    names = {0: "dc", 1: "ba"}[rank]
    left, right = labelled(cube(0, 3)), labelled(cube(4, 3))
    cases = {name: (left if name in "ad" else right, left) for name in names}
    (folder / f"data{rank}").mkdir()
    evaluate(folder / f"data{rank}", save_dir, cases, measures=["dice"])
    leave()


def test_rank_0_alone_writes_the_cases_of_all_ranks(tmp_path):
    torch.multiprocessing.spawn(report_of_one_rank, (tmp_path,), nprocs=2)
    assert not (tmp_path / "rank1").exists()
    rows = read(tmp_path / "rank0" / "cases.csv")[1:]
    assert sorted(row[:2] for row in rows) == [
        ["a_image", "1.000000"],
        ["b_image", "0.000000"],
        ["c_image", "0.000000"],
        ["d_image", "1.000000"],
    ]
