"""What the bundle module of 3D Slicer does with a bundle: a few overrides, and the evaluator run.

Run: python run_slicer.py bundle image output_dir. The last line printed is JSON.
"""

import json
import os
import sys

from monai.bundle import ConfigParser


def main(bundle, image, output_dir):
    parser = ConfigParser()
    parser.read_config(os.path.join(bundle, "configs", "inference.json"))
    parser["bundle_root"] = bundle
    parser["dataset_dir"] = os.path.dirname(image)
    parser["output_dir"] = output_dir
    parser["datalist"] = [image]
    parser["device"] = "cpu"
    parser["inferer#device"] = "cpu"
    parser["dataloader#num_workers"] = 0
    parser.get_parsed_content("evaluator").run()
    found = [os.path.join(f, n) for f, _, names in os.walk(output_dir) for n in names]
    print(json.dumps(sorted(name for name in found if name.endswith(".nii.gz"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
