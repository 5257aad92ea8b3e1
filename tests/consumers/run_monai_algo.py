"""Rounds of federated training and an evaluation by MONAI's own client.

Run: python run_monai_algo.py bundle dataset_dir. The last line printed is JSON.
"""

import json
import sys

from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, ModelType
from monai.fl.utils.exchange_object import ExchangeObject


def make_algo(bundle, dataset_dir):
    """The client with its defaults, but for where the data are."""
    arguments = {"dataset_dir": dataset_dir}
    algo = MonaiAlgo(bundle, train_kwargs=dict(arguments), eval_kwargs=dict(arguments))
    algo.initialize(extra={ExtraItems.CLIENT_NAME: "client"})
    return algo


def train(algo, weights):
    """One round from these weights; what the client tells the server of it, and its changes."""
    algo.train(ExchangeObject(weights=weights))
    answer = algo.get_weights()
    report = {
        "type": answer.weight_type.value,
        "values": sum(change.numel() for change in answer.weights.values()),
        "largest": max(float(change.abs().max()) for change in answer.weights.values()),
        "iterations": answer.statistics["num_executed_iterations"],
        "learning rate": algo.trainer.optimizer.param_groups[0]["lr"],
    }
    return report, answer.weights


def main(bundle, dataset_dir):
    algo = make_algo(bundle, dataset_dir)
    best = algo.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL})
    shipped = {key: value.numpy() for key, value in best.weights.items()}
    weights, rounds = shipped, []
    for _ in range(3):
        report, changes = train(algo, weights)
        rounds.append(report)
        weights = {key: value + changes[key].numpy() for key, value in weights.items()}
    algo.finalize()
    # a client that starts anew trains from the server's weights, not from its last checkpoint
    algo = make_algo(bundle, dataset_dir)
    again, _ = train(algo, {key: 0.9 * value for key, value in shipped.items()})
    metrics = algo.evaluate(ExchangeObject(weights=shipped)).metrics
    algo.finalize()
    print(json.dumps({"rounds": rounds, "again": again, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
