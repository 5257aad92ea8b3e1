"""MONAI Label's bundle tasks: segment, train twice, segment with what was trained.

Run: python run_monai_label.py bundle studies image more. `studies` is a folder of images with
their labels in labels/final, `more` a folder of the same kind that is added before the second
training. The last line printed is JSON.
"""

import json
import os
import shutil
import sys

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # a build for CUDA beside a torch without; nothing here calls them
    definitions = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        definitions.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from monailabel.datastore.local import LocalDatastore
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask


def segment(bundle, image, **request):
    task = BundleInferTask(bundle, {})
    assert task.is_valid()
    file, answer = task({"image": image, "device": "cpu", **request})
    return {"file": file, "names": answer["label_names"], "info": task.info()}


def train(bundle, studies):
    task = BundleTrainTask(bundle, {})
    assert task.is_valid()
    datastore = LocalDatastore(studies, extensions=("*.nii.gz",), auto_reload=False)
    request = {"model": os.path.basename(bundle), "device": "cpu", "max_epochs": 1}
    task({**request, "val_split": 0.25}, datastore)
    folder = f"{bundle}/output/checkpoints"
    runs = [f"{folder}/{run}" for run in os.listdir(folder)]
    return max(runs, key=os.path.getmtime)


def main(bundle, studies, image, more):
    result = {"shipped": segment(bundle, image), "trained": []}
    result["trained"].append(train(bundle, studies))
    shutil.copytree(more, studies, dirs_exist_ok=True)
    result["trained"].append(train(bundle, studies))
    shutil.copy(f"{result['trained'][-1]}/best.pt", f"{bundle}/models/model_trained.pt")
    result["after"] = segment(bundle, image, model_filename="model_trained.pt")
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
