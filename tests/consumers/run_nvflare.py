"""Federated training of the bundle by NVFlare, two clients with half of the cases each, simulated.

Run: PYTHONPATH=<bundle> python run_nvflare.py --bundle <bundle> --dataset_dir <MSD folder>
--output_dir <folder> [--rounds 10] [--local_epochs 2] [--initial_ckpt <bundle>/models/model.pt].
Training starts from new weights if none are given. Prints the Dice of the server's network in each
round, mean over the clients of their own validation cases (in the end, of all), and the bytes that
a client sends, beside those of the weights of a UNet. The last line printed is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.fl.client import MonaiAlgo
from monai.fl.utils.exchange_object import ExchangeObject
from monai.networks.nets import BasicUNet
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv
from nvflare.recipe.utils import set_per_site_config

SITES = ("site-1", "site-2")


def weight_bytes(state):
    return sum(value.numel() * value.element_size() for value in state.values())


def main(bundle, dataset_dir, output_dir, rounds, local_epochs, initial_ckpt=None):
    output = Path(output_dir).resolve()
    output.mkdir(parents=True)
    split = json.loads((Path(bundle) / "configs" / "split.json").read_text())
    cases = json.loads((Path(dataset_dir) / "dataset.json").read_text())["training"]
    present = {Path(case["image"]).name.removesuffix(".nii.gz") for case in cases}
    for number, site in enumerate(SITES):
        half = {part: [n for n in split[part] if n in present][number::2] for part in split}
        (output / f"{site}.json").write_text(json.dumps(half))
    config = ConfigParser()
    config.read_config(f"{bundle}/configs/train.json")
    definition = config.get_parsed_content("network_def", instantiate=False).get_config()
    arguments = {k: v for k, v in definition.items() if not k.startswith("_")}
    recipe = FedAvgRecipe(
        name="mednca",
        model={"class_path": definition["_target_"], "args": arguments},
        initial_ckpt=initial_ckpt,
        min_clients=len(SITES),
        num_rounds=rounds,
        train_script=str(Path(__file__).with_name("run_nvflare_client.py")),
        launch_external_process=True,
        command=f"{sys.executable} -u",
        key_metric="val_dice",
    )
    shared = f"--bundle {bundle} --dataset_dir {dataset_dir} --output_dir {output}"
    shared += f" --local_epochs {local_epochs} --site"
    set_per_site_config(recipe, {site: {"train_args": f"{shared} {site}"} for site in SITES})
    recipe.execute(SimEnv(clients=list(SITES), workspace_root=str(output / "workspace")))

    [file] = (output / "workspace").rglob("FL_global_model.pt")
    state = torch.load(file, weights_only=True)["model"]
    settings = {"dataset_dir": dataset_dir, "output_dir": str(output)}
    algo = MonaiAlgo(bundle, config_train_filename=None, eval_kwargs=settings)
    algo.initialize()
    final = algo.evaluate(ExchangeObject(weights={k: v.numpy() for k, v in state.items()})).metrics
    unet = weight_bytes(BasicUNet(spatial_dims=3, in_channels=1, out_channels=3).state_dict())

    lines = [(output / f"{site}.jsonl").read_text().splitlines() for site in SITES]
    reports = [[json.loads(line) for line in part] for part in lines]
    print("| round | Dice | bytes sent by a client | by a client with a UNet |")
    print("| --- | --- | --- | --- |")
    for number, both in enumerate(zip(*reports, strict=True)):
        dice = sum(report["dice"] for report in both) / len(both)
        print(f"| {number} | {dice:.3f} | {both[0]['bytes']:,} | {unet:,} |")
    print(f"| {rounds} | {final['val_dice']:.3f} |  |  |")
    print(json.dumps({"reports": reports, "final": final, "unet": unet}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("bundle", "dataset_dir", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--local_epochs", type=int, default=2)
    parser.add_argument("--initial_ckpt")
    main(**vars(parser.parse_args()))
