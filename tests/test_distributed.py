"""Two processes with half the batch each learn what one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from mednca_monai.distributed import leave

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "bundle" / "configs"
SETTINGS = {"network_def#steps": 3, "network_def#num_channels": 6, "roi_size": [8, 6, 7]}
SETTINGS["amp"] = False


def step(parser, batch):
    """Loss and gradients of a batch, by the network, inferer and loss of a training's config."""
    parser.update({"device": "cpu", "code_path": None, **SETTINGS})
    parser.get_parsed_content("network_def").load_state_dict(batch["weights"])
    network = parser.get_parsed_content("network")
    loss_function = parser.get_parsed_content("train#trainer#loss_function")
    starts, seeds = batch["starts"], batch["seeds"]
    infer = parser.get_parsed_content("train#inferer")
    logits = infer(batch["images"], network, patch_start=starts, seed=seeds)
    loss = loss_function(logits, batch["labels"])
    loss.backward()
    return loss.item(), [parameter.grad for parameter in network.parameters()]


def part(batch, rank):
    """Half of a batch."""
    half = slice(2 * rank, 2 * rank + 2)
    return {k: value if k == "weights" else value[half] for k, value in batch.items()}


def read(*names):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
    return parser


def main(folder):
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    parser = read("train", "multi_gpu_train")
    parser.get_parsed_content("initialize")
    rank = int(os.environ["RANK"])
    found = step(parser, part(torch.load(folder / "batch.pt"), rank))
    torch.save(found, folder / f"{rank}.pt")
    parser.get_parsed_content("finalize")


@pytest.fixture
def batch():
    """Four crops whose labels differ in size, and weights that tell the classes apart."""
    parser = read("train")
    parser.update({"code_path": None, **SETTINGS})
    network = parser.get_parsed_content("network_def")
    for level in network.levels:
        torch.nn.init.normal_(level.update.weight, std=0.1)
    shares = torch.tensor([0.02, 0.1, 0.3, 0.6])[:, None, None, None, None]
    size = SETTINGS["roi_size"]
    return {
        "weights": network.state_dict(),
        "images": torch.rand(4, 1, 12, 10, 11),
        "labels": (torch.rand(4, 1, *size) < shares) * torch.randint(1, 3, (4, 1, *size)),
        "starts": torch.tensor([[0, 0, 0], [4, 4, 4], [1, 2, 3], [3, 0, 2]]),
        "seeds": torch.arange(4),
    }


def test_two_processes_with_half_the_batch_each_have_the_gradient_of_one(batch, tmp_path):
    loss, gradients = step(read("train"), batch)
    torch.save(batch, tmp_path / "batch.pt")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found, theirs = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(loss, rel=1e-5)
        assert len(theirs) == len(gradients)
        for one, other in zip(theirs, gradients, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def leave_while_tensors_are_sent(rank, folder):
    """A process that ends while gloo still sends, with a wrapped network that Python collects."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=1
    )
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    network.itself = [network]
    for _ in range(2000):
        torch.distributed.all_gather([torch.empty(9999)], torch.ones(9999), async_op=True)
    leave()


def test_a_process_that_left_ends(tmp_path):
    torch.multiprocessing.spawn(leave_while_tensors_are_sent, (tmp_path,))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
