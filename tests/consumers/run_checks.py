"""What MONAI's model zoo and its users do with a bundle: checks, export, all of its workflows.

Run: python run_checks.py bundle dataset_dir schema. The last line printed is JSON.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import monai.bundle
import numpy as np
import torch
from monai.data import load_net_with_metadata

TRAINING = {"max_epochs": 1, "val_interval": 1}


def commands(bundle, dataset_dir):
    """Every workflow as its arguments on the command line, by its name."""
    options = ["--bundle_root", bundle, "--dataset_dir", dataset_dir, "--device", "cpu"]
    training = [*options, *(f"--{key}={value}" for key, value in TRAINING.items())]
    workflows = {
        "training": (training, ["train"]),
        "evaluating": (options, ["train", "evaluate"]),
        "inference": (options, ["inference"]),
        "inference of model.ts": (options, ["inference", "inference_ts"]),
        "training by two": (training, ["train", "multi_gpu_train"]),
        "evaluating by two": (options, ["train", "evaluate", "multi_gpu_evaluate"]),
    }
    for name, (arguments, configs) in workflows.items():
        files = [f"{bundle}/configs/{config}.json" for config in configs]
        two = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
        start = [sys.executable, "-m", *(two if "two" in name else []), "monai.bundle", "run"]
        output = ["--output_dir", name.replace(" ", "_")]
        yield name, [*start, "--config_file", str(files), *arguments, *output]


def properties(bundle, dataset_dir):
    """Properties of MONAI's workflows that the bundle lacks, by workflow."""
    workflows = {
        "train": ["train"],
        "evaluate": ["train", "evaluate"],
        "infer": ["inference"],
    }
    for name, configs in workflows.items():
        workflow = monai.bundle.ConfigWorkflow(
            [f"{bundle}/configs/{config}.json" for config in configs],
            meta_file=f"{bundle}/configs/metadata.json",
            logging_file=f"{bundle}/configs/logging.conf",
            workflow_type="infer" if name == "infer" else "train",
            bundle_root=bundle,
            dataset_dir=dataset_dir,
            output_dir=f"workflow_{name}",
            **(TRAINING if name == "train" else {}),
        )
        workflow.initialize()
        lacking = workflow.check_properties()
        workflow.run()
        workflow.finalize()
        yield name, lacking


def main(bundle, dataset_dir, schema):
    package = importlib.util.find_spec("mednca_monai")
    result = {"package": None if package is None else package.origin, "returned": {}}
    metadata = json.loads(Path(bundle, "configs", "metadata.json").read_text())
    result["version in changelog"] = metadata["version"] in metadata["changelog"]
    meta, config = f"{bundle}/configs/metadata.json", f"{bundle}/configs/inference.json"
    monai.bundle.verify_metadata(meta, filepath=schema)
    for name, command in commands(bundle, dataset_dir):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result["returned"][name] = done.returncode
        print(name, done.returncode, done.stderr[-2000:] if done.returncode else "", flush=True)
    result["properties"] = dict(properties(bundle, dataset_dir))
    monai.bundle.verify_net_in_out("network_def", meta_file=meta, config_file=config, device="cpu")
    files = {"meta_file": meta, "config_file": config, "ckpt_file": f"{bundle}/models/model.pt"}
    monai.bundle.ckpt_export("network_def", filepath="exported.ts", **files)
    image = torch.from_numpy(np.random.default_rng(0).random((1, 1, 16, 20, 12), np.float32))
    with torch.no_grad():
        exported, shipped = (
            load_net_with_metadata(path)[0](image)
            for path in ("exported.ts", f"{bundle}/models/model.ts")
        )
    result["largest difference"] = float((exported - shipped).abs().max())
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
