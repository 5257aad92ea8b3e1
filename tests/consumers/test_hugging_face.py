"""The packaged bundle pushed to the Hugging Face Hub, by the real client to a local server."""

import pytest

from .conftest import REQUIRED, environment

pytestmark = pytest.mark.consumers


def test_a_push_holds_every_file_and_a_model_card(run, bundle, tmp_path):
    before = {p.relative_to(bundle): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    python = environment(*REQUIRED, "huggingface_hub==2.4.0")
    result = run(python, "run_hugging_face.py", bundle.parent, bundle.name)
    assert result["tags"] == ["0.1.0", "latest_version"]
    pushed = tmp_path / "pushed"
    found = {p.relative_to(pushed): p.read_bytes() for p in pushed.rglob("*") if p.is_file()}
    [card] = found.keys() - before.keys()
    assert str(card) == "README.md"
    text = found.pop(card).decode()
    assert text.startswith(
        "---\ntags:\n- monai\n- medical\nlibrary_name: monai\nlicense: apache-2.0"
    )
    assert text.endswith((bundle / "docs" / "README.md").read_text())
    assert found == before
