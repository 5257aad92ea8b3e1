"""Federated learning by MONAI's client, on the packaged bundle in the environment it asks for."""

import pytest

from .conftest import REQUIRED, environment

pytestmark = pytest.mark.consumers


def test_monais_client_trains_in_rounds_and_evaluates(run, bundle, make_dataset):
    dataset = make_dataset("data", slice(8), slice(2))
    result = run(environment(*REQUIRED), "run_monai_algo.py", bundle, dataset)
    for report in (*result["rounds"], result["again"]):
        assert report["type"] == "fl_weight_diff"
        assert report["values"] == 24132
        assert report["iterations"] == 4
        assert 0 < report["largest"] < 0.1
        assert report["learning rate"] > 0
    assert result["metrics"]["val_dice"] > 0.8
