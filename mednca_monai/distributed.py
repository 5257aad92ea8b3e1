"""Loss of a batch that several processes share, and their end."""

import atexit
import gc

import torch
from torch import Tensor, distributed, nn


def gather(part: Tensor) -> Tensor:
    """Join the parts of all processes along axis 0, on each of them.

    The gradient of ``part`` is multiplied by the number of processes, as
    ``DistributedDataParallel`` divides by it.

    Args:
        part: of the same shape in each process.
    """
    count, part = distributed.get_world_size(), part.contiguous()
    parts = [torch.empty_like(part) for _ in range(count)]
    distributed.all_gather(parts, part.detach())
    parts[distributed.get_rank()] = part + (count - 1) * (part - part.detach())
    return torch.cat(parts)


class GatheredLoss(nn.Module):
    """Loss of the batches of all processes together, as one process has it.

    ``DistributedDataParallel`` averages the gradients of the processes, which gives the gradient of
    their whole batch only if a loss is a mean over its items. One that pools the batch, such as
    MONAI's Dice with ``batch=True``, must see the whole batch.

    Args:
        loss: called with logits and labels of the whole batch.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Scalar loss, the same in each process; arguments have the same shapes in each."""
        value: Tensor = self.loss(gather(logits), gather(label))
        return value


def leave() -> None:
    """Leave the process group, whose threads end with the process and before Python does.

    The threads of gloo may still have to release tensors, for which they need Python's lock. If
    the group were destroyed while Python holds it, as when a ``DistributedDataParallel`` is, both
    would wait for ever; if Python were gone, they would abort the process. Hence the backends of
    the group are kept until what else refers to them is gone: unlike the group's, their own
    destructors wait for the threads without the lock.

    Raises:
        AssertionError: where there is no group.
    """
    group = distributed.group.WORLD
    assert group is not None
    backends = [group._get_backend(device) for device in group._device_types]
    distributed.destroy_process_group()
    atexit.register(lambda *_: gc.collect(), *backends)  # the arguments keep them
