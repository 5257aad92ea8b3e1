"""The packaged bundle alone, in an environment that has what its metadata asks for and no more."""

import pytest

from .conftest import REQUIRED, environment

pytestmark = pytest.mark.consumers


def test_the_zip_file_alone_passes_the_zoos_checks(run, bundle, make_dataset, shared):
    dataset = make_dataset("data", slice(4), slice(3))
    schema = shared / "reference" / "meta_schema_20240725.json"
    python = environment(*REQUIRED, "jsonschema")
    result = run(python, "run_checks.py", bundle, dataset, schema)
    assert result["package"] is None
    assert result["version in changelog"]
    assert set(result["returned"].values()) == {0}, result["returned"]
    assert result["properties"] == {"train": [], "evaluate": [], "infer": []}
    assert result["largest difference"] < 1e-5
