"""How far the bundle's exports are from its weights: logits of images, labels of real volumes.

Run: python benchmarks/exports.py dataset_dir   (needs onnxruntime)
"""

import sys
from collections.abc import Callable

import onnxruntime
import torch
from measure import BUNDLE
from monai.bundle import ConfigParser
from torch import Tensor

SHAPES = [(64, 64, 1), (256, 256, 1), (36, 52, 36)]


def load(dataset_dir: str) -> tuple[list[Tensor], dict[str, Callable[[Tensor], Tensor]]]:
    """The prepared validation volumes, ``(1, 1, *spatial)``, and each way to logits by its file."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "train.json"))
    parser.update({"bundle_root": str(BUNDLE), "dataset_dir": dataset_dir, "device": "cpu"})
    images = [
        item["image"].as_tensor()[None] for item in parser.get_parsed_content("validate#dataset")
    ]
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(BUNDLE / "models" / "model.pt", weights_only=True))
    session = onnxruntime.InferenceSession(BUNDLE / "models" / "model.onnx")
    return images, {
        "model.pt": network,
        "model.ts": torch.jit.load(BUNDLE / "models" / "model.ts"),
        "model.onnx": lambda x: torch.from_numpy(session.run(["pred"], {"image": x.numpy()})[0]),
    }


if __name__ == "__main__":
    images, ways = load(sys.argv[1])
    reference = ways.pop("model.pt")
    titles = [f"largest difference, {' x '.join(map(str, shape))}" for shape in SHAPES]
    print(f"| file | {' | '.join(titles)} | voxels that differ, {len(images)} volumes |")
    print("| --- " * (len(SHAPES) + 2) + "|")
    torch.manual_seed(0)
    random = [torch.rand(1, 1, *shape) for shape in SHAPES]
    with torch.no_grad():
        for name, way in ways.items():
            far = [float((way(image) - reference(image)).abs().max()) for image in random]
            pairs = [(way(image).argmax(1), reference(image).argmax(1)) for image in images]
            differ = sum(int((one != other).sum()) for one, other in pairs)
            print(f"| {name} | {' | '.join(f'{d:.1e}' for d in far)} | {differ} |", flush=True)
