"""Federated averaging by NVFlare, two clients in a simulation, on the packaged bundle."""

import pytest

from .conftest import REQUIRED, environment

pytestmark = pytest.mark.consumers


def test_two_clients_train_one_network(run, bundle, make_dataset, tmp_path):
    result = run(
        environment(*REQUIRED, "nvflare==2.9.0"),
        "run_nvflare.py",
        *("--bundle", bundle, "--dataset_dir", make_dataset("data", slice(8), slice(2))),
        *("--output_dir", tmp_path / "output", "--rounds", 2, "--local_epochs", 2),
        *("--initial_ckpt", bundle / "models" / "model.pt"),
        PYTHONPATH=str(bundle),
    )
    assert [len(reports) for reports in result["reports"]] == [2, 2]
    for report in (*result["reports"][0], *result["reports"][1]):
        assert report["steps"] == 4
        assert report["bytes"] == 4 * 24132
        assert 200 * report["bytes"] < result["unet"]
        assert report["dice"] > 0.7
    one, other = ([report["received"] for report in reports] for reports in result["reports"])
    assert one == other
    assert one[0] != one[1]
    first, last = (report["dice"] for report in result["reports"][0])
    assert first != last
    assert result["final"]["val_dice"] > 0.7
