"""Export the bundle's weights to TorchScript and ONNX, for images of any size.

Run: python -m mednca_monai.export [--bundle_dir bundle]   (a few minutes; needs the extra `export`)
"""

import argparse
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import onnx
from monai.bundle.config_parser import ConfigParser
from monai.bundle.scripts import ckpt_export, onnx_export

from mednca_monai.package import BUNDLE


def strip_script(path: Path) -> None:
    """Remove from a TorchScript file what tells where on this machine its code comes from."""
    with zipfile.ZipFile(path) as file:
        items = [item for item in file.infolist() if not item.filename.endswith(".debug_pkl")]
        contents = [file.read(item) for item in items]
    with zipfile.ZipFile(path, "w") as file:
        for item, content in zip(items, contents, strict=True):
            file.writestr(item, content)


def strip_graph(path: Path) -> None:
    """Remove from an ONNX file what only tells where its nodes come from; it is most of it."""
    model = onnx.load(str(path))
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    del model.graph.value_info[:]
    onnx.save(model, str(path))


def export(bundle_dir: str = str(BUNDLE)) -> None:
    """Write ``models/model.ts`` and ``models/model.onnx`` by MONAI's own commands.

    Batch size and spatial size of both are free; the fire masks are part of the graph.

    Args:
        bundle_dir: holds ``configs`` and ``models/model.pt``; by default that of the source tree.
    """
    root = Path(bundle_dir)
    config = ConfigParser.load_config_file(str(root / "configs" / "inference.json"))
    spatial_dims = config["network_def"]["spatial_dims"]
    sizes = [2, config["in_channels"], *(20 + 4 * axis for axis in range(spatial_dims))]
    free = {0: "batch", **{axis + 2: f"size_{axis}" for axis in range(spatial_dims)}}
    onnx_settings: dict[str, Any] = {"dynamo": True, "opset_version": 18}
    onnx_settings |= {"input_names": ["image"], "output_names": ["pred"]}
    with tempfile.TemporaryDirectory(prefix=".export_", dir=root / "models") as folder:
        built = Path(folder)
        files: dict[str, Any] = {
            "net_id": "network_def",
            "ckpt_file": str(root / "models" / "model.pt"),
            "meta_file": str(root / "configs" / "metadata.json"),
            "config_file": str(root / "configs" / "inference.json"),
        }
        ckpt_export(filepath=str(built / "model.ts"), **files)
        onnx_export(
            filepath=str(built / "model.onnx"),
            input_shape=sizes,
            use_trace=True,
            converter_kwargs={**onnx_settings, "dynamic_axes": {"image": free}},
            **files,
        )
        strip_script(built / "model.ts")
        strip_graph(built / "model.onnx")
        for name in ("model.ts", "model.onnx"):
            os.replace(built / name, root / "models" / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bundle_dir", default=str(BUNDLE))
    export(**vars(parser.parse_args()))
