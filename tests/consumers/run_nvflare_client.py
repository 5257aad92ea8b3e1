"""What each client of run_nvflare.py runs: MONAI's own client on the bundle, for NVFlare."""

import argparse
import json

import nvflare.client as flare
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType


def main(bundle, dataset_dir, output_dir, site, local_epochs):
    settings = {
        "dataset_dir": dataset_dir,
        "split_file": f"{output_dir}/{site}.json",
        "output_dir": f"{output_dir}/{site}",
    }
    algo = MonaiAlgo(
        bundle,
        local_epochs,
        send_weight_diff=False,
        train_kwargs={**settings, "val_interval": 1000},
        eval_kwargs=dict(settings),
    )
    algo.initialize({ExtraItems.CLIENT_NAME: site})
    flare.init()  # its threads import modules, which must not happen while MONAI lists them
    while flare.is_running():
        received = flare.receive()
        total = sum(float(value.double().abs().sum()) for value in received.params.values())
        dice = algo.evaluate(ExchangeObject(weights=received.params)).metrics["val_dice"]
        algo.train(ExchangeObject(weights=received.params))
        answer = algo.get_weights()
        weights = answer.weights  # tensors: of arrays NVFlare takes none here
        steps = answer.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS]
        sent = sum(value.nbytes for value in weights.values())
        flare.send(
            FLModel(
                params_type=ParamsType.FULL,
                params=weights,
                metrics={"val_dice": dice},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},
            )
        )
        report = {"dice": dice, "bytes": sent, "steps": steps, "received": total}
        with open(f"{output_dir}/{site}.jsonl", "a") as file:
            file.write(json.dumps(report) + "\n")
    algo.finalize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("bundle", "dataset_dir", "output_dir", "site"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--local_epochs", type=int, required=True)
    main(**vars(parser.parse_args()))
