import json
from pathlib import Path

import pytest
from monai.apps import DecathlonDataset

import mednca_monai.data
from mednca_monai.data import case_name, fetch_decathlon, inside, list_images, load_datalist

TASK = "Task04_Hippocampus"
SPLIT = Path(__file__).parents[1] / "bundle" / "configs" / "split.json"


def make_dataset(folder, names=(), test=(), **properties):
    """An MSD folder whose images and labels are empty files."""
    cases = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]
    files = [path for case in cases for path in case.values()] + list(test)
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    folder.mkdir(exist_ok=True)
    description = {"training": cases, "test": list(test), **properties}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def numbered(count):
    return [f"case_{i:02}.nii.gz" for i in range(count)]


def names(datalist):
    return [Path(case["image"]).name.removesuffix(".nii.gz") for case in datalist]


def write_split(path, training=(), validation=()):
    path.write_text(json.dumps({"training": training, "validation": validation}))
    return path


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "dataset", reversed(numbered(7)))


@pytest.fixture
def download(monkeypatch):
    """Let the download of a task call a function with its arguments."""

    def replace(function):
        monkeypatch.setattr(mednca_monai.data, "download_and_extract", function)

    return replace


def test_without_a_split_file_every_fifth_case_by_sorted_name_is_validation(dataset):
    validation = names(load_datalist(dataset, None, "validation"))
    training = names(load_datalist(dataset, None, "training"))
    assert validation == ["case_00", "case_05"]
    assert training == ["case_01", "case_02", "case_03", "case_04", "case_06"]


def test_an_image_comes_with_its_own_label_and_both_paths_are_absolute(dataset, monkeypatch):
    monkeypatch.chdir(dataset.parent)
    case = load_datalist("dataset", None, "validation")[1]
    assert case == {
        "image": str(dataset / "imagesTr" / "case_05.nii.gz"),
        "label": str(dataset / "labelsTr" / "case_05.nii.gz"),
    }


def test_cases_that_a_split_file_does_not_name_are_in_neither_part(dataset, tmp_path):
    split = write_split(tmp_path / "split.json", ["case_05", "case_01", "other"], ["case_02"])
    assert names(load_datalist(dataset, split, "training")) == ["case_01", "case_05"]
    assert names(load_datalist(str(dataset), str(split), "validation")) == ["case_02"]


def test_all_labelled_cases_are_a_part_whatever_the_split_file_names(dataset, tmp_path):
    split = write_split(tmp_path / "split.json", ["case_05"], ["case_02"])
    for split_file in (split, None):
        assert names(load_datalist(dataset, split_file, "all")) == [n[:7] for n in numbered(7)]


def test_a_split_file_of_another_data_set_counts_as_none(dataset):
    for part in ("training", "validation"):
        assert load_datalist(dataset, SPLIT, part) == load_datalist(dataset, None, part)


def test_the_shipped_split_is_every_fifth_of_the_stored_volumes(shared):
    folder = shared / "data" / TASK
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    for part, count in (("training", 145), ("validation", 37)):
        chosen = load_datalist(folder, SPLIT, part)
        assert len(chosen) == count
        assert chosen == load_datalist(folder, None, part)


def test_the_parts_of_the_shipped_split_share_no_case():
    split = json.loads(SPLIT.read_text())
    together = split["training"] + split["validation"]
    assert len(set(together)) == len(together)


def test_one_image_file_is_a_list_of_one(tmp_path):
    path = tmp_path / "scan.nii"
    path.touch()
    assert list_images(path) == list_images(str(path)) == [{"image": str(path)}]


def test_images_of_a_folder_are_sorted_and_other_files_ignored(tmp_path):
    for name in ("b.nii.gz", "a.nii", "notes.txt", "b.json"):
        (tmp_path / name).touch()
    names = [Path(item["image"]).name for item in list_images(tmp_path)]
    assert names == ["a.nii", "b.nii.gz"]


def test_a_list_of_images_keeps_its_order(tmp_path):
    paths = [str(tmp_path / name) for name in ("b.nii", "a.nii")]
    for path in paths:
        Path(path).touch()
    assert list_images(paths) == [{"image": path} for path in paths]


def test_an_msd_folder_stands_for_its_test_images_or_else_its_training_images(tmp_path):
    both = make_dataset(
        tmp_path / "both", numbered(2), ["./imagesTs/b.nii.gz", "imagesTs/a.nii.gz"]
    )
    assert list_images(both) == [
        {"image": str(both / "imagesTs" / name)} for name in ("a.nii.gz", "b.nii.gz")
    ]
    labelled = make_dataset(tmp_path / "labelled", numbered(2))
    assert names(list_images(labelled)) == ["case_00", "case_01"]


def test_a_missing_msd_task_is_fetched_whole_with_monais_address_and_checksum(tmp_path, download):
    def archive(url, filepath, output_dir, hash_val):
        assert url == DecathlonDataset.resource[TASK]
        assert hash_val == DecathlonDataset.md5[TASK]
        assert not target.exists()
        make_dataset(Path(output_dir) / TASK, numbered(2))
        Path(filepath).touch()

    target = tmp_path / "data" / TASK
    download(archive)
    assert names(load_datalist(target, None, "all")) == ["case_00", "case_01"]
    assert list(target.parent.iterdir()) == [target]

    def not_again(*_, **__):
        raise AssertionError("fetched a data set that is there")

    download(not_again)
    assert len(list_images(target)) == 2


def test_a_failed_download_names_the_ways_out_and_leaves_nothing_behind(tmp_path, download):
    def broken(url, filepath, output_dir, hash_val):
        make_dataset(Path(output_dir) / TASK, numbered(1))
        Path(filepath).write_bytes(b"half")
        raise RuntimeError("connection lost")

    target = tmp_path / "data" / TASK
    download(broken)
    with pytest.raises(
        FileNotFoundError,
        match=rf"`dataset_dir` to a folder .*{TASK}'.* could not be fetched \(connection lost\)"
        r".*configs/synthetic.json",
    ):
        load_datalist(target, None, "training")
    assert list(target.parent.iterdir()) == []


def test_of_two_processes_that_fetch_a_task_the_slower_one_takes_the_faster_ones(
    tmp_path, download
):
    def overtaken(url, filepath, output_dir, hash_val):
        make_dataset(Path(output_dir) / TASK, numbered(2))
        make_dataset(target, numbered(3))

    target = tmp_path / TASK
    download(overtaken)
    assert len(load_datalist(target, None, "all")) == 3
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_no_msd_task_is_not_fetched(tmp_path, download):
    download(None)
    with pytest.raises(FileNotFoundError, match=r"Point `dataset_dir` to .*'.*my_data'"):
        fetch_decathlon(tmp_path / "my_data")
    with pytest.raises(FileNotFoundError, match="`datalist` must name image files, got"):
        list_images(tmp_path / "missing.nii.gz")


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../outside.nii.gz", "imagesTr/../../outside.nii.gz", "."]
)
def test_a_dataset_names_no_file_outside_its_folder(dataset, name):
    (dataset.parent / "outside.nii.gz").touch()
    with pytest.raises(ValueError, match=r"`dataset.json` must name files in '.*dataset', got"):
        inside(dataset, name)


def test_a_dataset_reads_no_file_outside_its_folder_through_a_link(dataset, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "case.nii.gz").touch()
    (dataset / "linked").symlink_to(outside)
    (dataset / "linked.nii.gz").symlink_to(outside / "case.nii.gz")
    for name in ("linked/case.nii.gz", "linked.nii.gz"):
        with pytest.raises(ValueError, match=rf"must name files in '.*dataset', got '{name}'"):
            inside(dataset, name)


def test_a_dataset_may_itself_be_a_link_and_hold_links_to_its_own_files(dataset, tmp_path):
    (tmp_path / "link").symlink_to(dataset)
    (dataset / "again.nii.gz").symlink_to(dataset / "imagesTr" / "case_01.nii.gz")
    assert inside(tmp_path / "link", "again.nii.gz") == str(tmp_path / "link" / "again.nii.gz")


@pytest.mark.parametrize(
    ("cases", "part", "error", "message"),
    [
        (2, "test", ValueError, r"`part` must be 'training', 'validation' or 'all', got 'test'"),
        (1, "training", ValueError, r"must leave cases for training, got none of the 1 in"),
        (0, "all", ValueError, r"`dataset.json` must list cases under 'training', got \[\]"),
    ],
)
def test_a_part_must_be_known_and_have_cases(tmp_path, cases, part, error, message):
    folder = make_dataset(tmp_path / "dataset", numbered(cases))
    with pytest.raises(error, match=message):
        load_datalist(folder, None, part)


def test_a_split_file_must_leave_each_part_a_case(dataset, tmp_path):
    split = write_split(tmp_path / "split.json", ["case_01"])
    with pytest.raises(ValueError, match="must leave cases for validation"):
        load_datalist(dataset, split, "validation")


def test_a_label_that_is_missing_is_named(dataset):
    (dataset / "labelsTr" / "case_05.nii.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must name files that exist, got .*labelsTr/case_05"
    ):
        load_datalist(dataset, None, "validation")


def test_images_whose_results_would_be_one_file_are_refused(tmp_path):
    images = [tmp_path / name for name in ("a.nii.gz", "a.npy")]
    images[0].touch()
    with pytest.raises(ValueError, match=r"`datalist` must name files that differ, got 'a' twice"):
        list_images(images)


def test_suffixes_may_be_upper_case_and_what_is_left_out_is_told(tmp_path, caplog):
    for name in ("A.NII.GZ", "b.Nii", "c.mha", ".d.nii"):
        (tmp_path / name).touch()
    assert [Path(item["image"]).name for item in list_images(tmp_path)] == ["A.NII.GZ", "b.Nii"]
    assert caplog.messages == [f"Of '{tmp_path}' only NIfTI files are segmented, not ['c.mha']."]
    assert case_name("A.NII.GZ") == "A"


@pytest.mark.parametrize("test", ["image.nii", 5, [7], [{"label": "label.nii"}]])
def test_a_dataset_must_list_its_images(tmp_path, test):
    (tmp_path / "dataset.json").write_text(json.dumps({"test": test}))
    with pytest.raises(ValueError, match=r"`dataset.json` must list images, got"):
        list_images(tmp_path)


def test_cases_must_differ_in_their_names(tmp_path):
    files = ["./one/t2.nii.gz", "./two/t2.nii.gz"]
    folder = make_dataset(
        tmp_path / "dataset", test=files, training=[{"image": f, "label": f} for f in files]
    )
    with pytest.raises(
        ValueError, match=r"`dataset.json` must name files that differ, got 't2' twice"
    ):
        load_datalist(folder, None, "all")
    with pytest.raises(ValueError, match=r"`datalist` must name files that differ, got 't2' twice"):
        list_images(folder)


@pytest.mark.parametrize(
    "case", ["a.nii", {"image": "a.nii"}, {"label": "b.nii"}, {"image": "a.nii", "label": None}]
)
def test_a_case_must_have_image_and_label(tmp_path, case):
    folder = make_dataset(tmp_path / "dataset", training=[case])
    with pytest.raises(ValueError, match=r"`dataset.json` must give each case image and label"):
        load_datalist(folder, None, "all")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"split.json' must be JSON, got: Expecting"),
        ("[]", r"split.json' must hold a JSON object, got list"),
        ('{"training": []}', r"`split_file` must list 'training' and 'validation', got \['train"),
        (
            '{"training": ["a"], "validation": ["a", "b"]}',
            r"name each case once, got \['a', 'a', 'b'\]",
        ),
    ],
)
def test_a_split_file_must_list_each_case_in_one_part(dataset, tmp_path, text, message):
    split = tmp_path / "split.json"
    split.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_datalist(dataset, split, "training")


def test_a_folder_that_holds_other_files_is_not_replaced(tmp_path, download):
    download(None)
    folder = tmp_path / TASK
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="Point `dataset_dir` to"):
        load_datalist(folder, None, "all")
    assert (folder / "notes.txt").is_file()


@pytest.mark.parametrize("kind", ["empty folder", "empty list", "missing file"])
def test_there_must_be_an_image(tmp_path, kind):
    paths = {"empty folder": tmp_path, "empty list": [], "missing file": [str(tmp_path / "x.nii")]}
    with pytest.raises(FileNotFoundError, match="`datalist` must name image files, got"):
        list_images(paths[kind])


def test_images_that_are_missing_among_others_are_left_to_the_reader(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "b.nii.gz").symlink_to("nothing")
    paths = [str(tmp_path / name) for name in ("a.nii.gz", "b.nii.gz")]
    expected = [{"image": path} for path in paths]
    assert list_images(paths) == list_images(tmp_path) == expected


def test_hidden_files_of_a_folder_are_ignored(tmp_path):
    for name in ("._a.nii.gz", "a.nii.gz"):
        (tmp_path / name).touch()
    assert [Path(item["image"]).name for item in list_images(tmp_path)] == ["a.nii.gz"]


def test_cases_of_a_split_file_that_the_data_lack_are_told(dataset, tmp_path, caplog):
    split = write_split(tmp_path / "split.json", ["case_01", "case_99"], ["case_02"])
    split.write_bytes(b"\xef\xbb\xbf" + split.read_bytes())  # as some editors save it
    load_datalist(dataset, split, "training")
    assert "lacks 1 cases" in caplog.text
    assert "['case_99']" in caplog.text
