"""What a stock trainer needs to be reproducible, safe from divergence, and resumable."""

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from monai.handlers.checkpoint_loader import CheckpointLoader
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from mednca_monai.checks import check_int, check_ints, is_number
from mednca_monai.files import whole_file
from mednca_monai.inferers import RandomPatchBatch, RandomPatchInferer
from mednca_monai.network import MedNCA


class EpochSeed:
    """Seed torch and the data's random transforms anew in each epoch, from the epoch's number.

    A training that resumes at an epoch then continues as if it had never stopped.

    Args:
        dataset: whose random transforms are seeded.
        seed: of the training, any integer.
    """

    def __init__(self, dataset: object, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Run at the start of each epoch."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed with a number of its own for each training seed, epoch and process."""
        epoch = self.seed * 1_000_003 + engine.state.epoch
        seed = epoch * idist.get_world_size() + idist.get_rank()
        torch.manual_seed(seed % 2**63)
        set_rnd(self.dataset, seed)


class VariedIterations:
    """Train at varied numbers of steps and, in the last epochs, with varied sizes of patches.

    A network that is trained at one number of steps segments worse at more. So each iteration
    multiplies ``network.steps`` by a factor drawn from the range ``steps``, the same for all
    levels. In the last epochs it also draws a variant: the size of its patches, and a second
    factor, between 1 and the variant's ``steps``. That range widens from epoch to epoch and is
    whole from the middle of the last epochs on, as many more steps at once would let the states
    grow. Larger patches teach the finer levels what the mirrored border of a small one does not.
    Both would make the first epochs slow; the first factor achieves less in the last epochs alone.
    Draws depend on the iteration's number only, not on the training's seed: processes agree, and a
    training resumes unchanged.

    Args:
        network: that is trained.
        patches: inferer and batch preparation of the trainer, whose ``roi_size`` varies.
        steps: lowest and highest first factor, above 0.
        variants: each with a ``weight`` (how likely it is, at least 0), ``steps`` (one end of the
            second factor's range, above 0; the other is 1) and a ``roi_size`` in cells of the
            finest level.
        last_epochs: number of epochs, at least 0, at the end of each run that draw a variant.

    Raises:
        ValueError: where an argument breaks its rule.
    """

    def __init__(
        self,
        network: MedNCA,
        patches: Sequence[RandomPatchInferer | RandomPatchBatch],
        steps: Sequence[float],
        variants: Sequence[Mapping[str, Any]],
        last_epochs: int,
    ) -> None:
        pair = isinstance(steps, Sequence) and len(steps) == 2
        if not (pair and all(map(is_number, steps)) and 0 < steps[0] <= steps[1]):
            raise ValueError(
                f"`steps` must be two finite factors above 0, the lowest first, got {steps!r}."
            )
        mappings = isinstance(variants, Sequence) and all(isinstance(v, Mapping) for v in variants)
        if not mappings or any(set(v) != {"weight", "steps", "roi_size"} for v in variants):
            raise ValueError(
                f"`variants` must each have weight, steps and roi_size, got {variants!r}."
            )
        weights = [variant["weight"] for variant in variants]
        if not (all(map(is_number, weights)) and min(weights, default=0) >= 0 and sum(weights) > 0):
            raise ValueError(f"weights in `variants` must be at least 0, not all 0, got {weights}.")
        if not all(is_number(v["steps"]) and v["steps"] > 0 for v in variants):
            raise ValueError(f"steps in `variants` must be above 0, got {variants!r}.")
        for variant in variants:
            check_ints("roi_size", variant["roi_size"], network.spatial_dims, "axis")
        self.network = network
        self.patches = patches
        self.steps = steps
        self.variants = [(variant["steps"], variant["roi_size"]) for variant in variants]
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.last_epochs = check_int("last_epochs", last_epochs, 0)
        self.roi_sizes = [patch.roi_size for patch in patches]

    def attach(self, engine: Engine) -> None:
        """Draw before each iteration, restore after it, also where it fails or is not run."""
        engine.add_event_handler(Events.ITERATION_STARTED, self.draw)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.restore)
        for stop in (Events.EPOCH_COMPLETED, Events.INTERRUPT, Events.TERMINATE):
            engine.add_event_handler(stop, self.restore)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def draw(self, engine: Engine) -> None:
        """Take a factor for this iteration, and a variant in the last epochs."""
        generator = torch.Generator().manual_seed(engine.state.iteration)
        lowest, highest = self.steps
        factor = lowest + (highest - lowest) * float(torch.rand(1, generator=generator))
        roi_sizes = self.roi_sizes
        left = (engine.state.max_epochs or 0) - engine.state.epoch
        if 0 <= left < self.last_epochs:
            drawn = int(torch.multinomial(self.weights, 1, generator=generator))
            times, roi_size = self.variants[drawn]
            part = min(1, 2 - 2 * left / self.last_epochs)
            part *= float(torch.rand(1, generator=generator))
            factor *= 1 + (times - 1) * part
            roi_sizes = [roi_size] * len(self.patches)
        self.vary(factor, roi_sizes)

    def restore(self, engine: Engine) -> None:
        """Let network and patches be as they were."""
        self.vary(1, self.roi_sizes)

    def fail(self, engine: Engine, error: BaseException) -> None:
        """Restore, and let the error go on."""
        self.restore(engine)
        raise error

    def vary(self, factor: float, roi_sizes: Sequence[int | Sequence[int]]) -> None:
        """Multiply the numbers of steps, and set the sizes of patches."""
        for automaton, steps in zip(self.network.levels, self.network.steps, strict=True):
            automaton.steps = max(1, round(steps * factor))  # type: ignore[assignment]
        for patch, roi_size in zip(self.patches, roi_sizes, strict=True):
            patch.roi_size = roi_size


class StateNorm:
    """Log how large the states grow, and add to the loss what keeps the coarse ones small.

    The loss of the segmentation hardly sees that coarse states grow from step to step, which spoils
    the segmentation at more steps than usual. Let ``x`` be the cells' own channels (without the
    image's) after a level's last step. Logged is the root mean square of ``x``, the largest of an
    epoch in this process, as ``state_rms_<level>`` among the trainer's metrics. Added to the loss
    is the mean of ``log(1 + max(0, |x| - bound))``, summed over all levels but the finest, whose
    channels hold the logits; of several forward passes before the loss only the last counts. Attach
    it before a `DivergenceGuard`, which then checks the whole loss.

    Args:
        network: that is trained.
        bound: of a cell's numbers, finite and above 0.

    Raises:
        ValueError: where ``bound`` breaks its rule.
    """

    def __init__(self, network: MedNCA, bound: float) -> None:
        if not (is_number(bound) and bound > 0):
            raise ValueError(f"`bound` must be a finite number above 0, got {bound!r}.")
        self.network = network
        self.bound = bound
        self.largest: dict[str, Tensor] = {}
        self.penalties: dict[int, Tensor] = {}
        self.hooks: list[RemovableHandle] = []

    def attach(self, engine: Engine) -> None:
        """Look at the states of each forward pass while the trainer runs, and no more at its end.

        After a training that failed the network keeps its hooks.
        """
        engine.add_event_handler(Events.STARTED, self.watch)
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.add_penalty)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.log)
        engine.add_event_handler(Events.COMPLETED, self.release)

    def reset(self, engine: Engine) -> None:
        """Forget the epoch before."""
        self.largest.clear()

    def watch(self, engine: Engine) -> None:
        """Look at the states from now on."""
        for level, automaton in enumerate(self.network.levels):
            self.hooks.append(automaton.register_forward_hook(partial(self.note, level)))

    def release(self, engine: Engine) -> None:
        """Leave the network as it was."""
        while self.hooks:
            self.hooks.pop().remove()

    def note(self, level: int, automaton: nn.Module, inputs: object, cells: Tensor) -> None:
        """Keep the largest, and the penalty."""
        name, rms = f"state_rms_{level}", cells.detach().square().mean().sqrt()
        self.largest[name] = torch.maximum(self.largest.get(name, rms), rms)  # NaN stays
        if level < len(self.network.levels) - 1:
            self.penalties[level] = (cells.abs() - self.bound).relu().log1p().mean()

    def add_penalty(self, engine: Engine) -> None:
        """Add the penalties to the trainer's loss."""
        output: Any = engine.state.output
        output["loss"] = output["loss"] + sum(self.penalties.values())
        self.penalties.clear()

    def log(self, engine: Engine) -> None:
        """Tell the trainer, whose statistics handlers show it."""
        engine.state.metrics.update({name: float(rms) for name, rms in self.largest.items()})


class RepeatedOneCycleLR(OneCycleLR):
    """One-cycle learning rate that starts over after ``total_steps``, where stock raises.

    Each round of a federated training, which runs the same trainer again, is then a cycle.

    Args:
        optimizer: as stock's, and ``max_lr``, ``total_steps``, ``pct_start`` and ``options``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_lr: float,
        total_steps: int,
        pct_start: float = 0.3,
        **options: Any,
    ) -> None:
        if pct_start * total_steps == 1:
            pct_start *= 1.01  # stock would divide by zero
        super().__init__(optimizer, max_lr, total_steps, pct_start=pct_start, **options)

    def step(self, epoch: int | None = None) -> None:
        """Go to the next step, after the last one to the first."""
        if self.last_epoch == self.total_steps - 1:
            self.last_epoch = -1
        super().step(epoch)


class WeightAveraging:
    """Average the weights over the iterations.

    Args:
        network: that is trained.
        averaged: copy of it whose weights follow; its first update copies them.
    """

    def __init__(self, network: nn.Module, averaged: AveragedModel) -> None:
        self.network = network
        self.averaged = averaged

    def attach(self, engine: Engine) -> None:
        """Run after each iteration."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Update the averaged weights."""
        self.averaged.update_parameters(self.network)


class DivergenceGuard:
    """Clip the gradient, and end the training before a loss or gradient that is not finite is used.

    The weights stay as the last finite step left them; the error is a FloatingPointError. Where the
    trainer scales its loss (``amp``), the gradient is clipped unscaled, and one that is not finite
    only leaves its step out, as the scaler does.

    Args:
        parameters: of the network.
        optimizer: whose learning rate the message tells.
        max_norm: bound of the gradient's 2-norm, above 0.

    Raises:
        ValueError: where ``max_norm`` breaks its rule.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, max_norm: float
    ) -> None:
        if not (is_number(max_norm) and max_norm > 0):
            raise ValueError(f"`max_norm` must be a finite number above 0, got {max_norm!r}.")
        self.parameters = list(parameters)
        self.optimizer = optimizer
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Run after each loss and each gradient."""
        engine.add_event_handler(Events.STARTED, self.check_trainer)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.check_loss)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.clip_gradient)

    def check_trainer(self, engine: Engine) -> None:
        """Raise ValueError where gradients are accumulated, whose parts would be clipped."""
        accumulated = getattr(engine, "accumulation_steps", 1)  # MONAI 1.6 sets it after attaching
        if accumulated != 1:
            raise ValueError(
                f"`accumulation_steps` must be 1 with a DivergenceGuard, got {accumulated!r}."
            )

    def check_loss(self, engine: Engine) -> None:
        """Raise FloatingPointError where the loss is not finite."""
        output: Any = engine.state.output
        self.check(engine, "loss", output["loss"])

    def clip_gradient(self, engine: Engine) -> None:
        """Clip the gradient; raise FloatingPointError where it is not finite, unless scaled."""
        scaler: Any = getattr(engine, "scaler", None)  # of a trainer with ``amp``
        scales = scaler is not None and scaler.is_enabled()
        if scales:
            scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        if not scales:  # else the scaler leaves the step out, and scales less
            self.check(engine, "gradient", norm)

    def check(self, engine: Engine, what: str, value: Tensor) -> None:
        """Raise FloatingPointError where ``value`` is not finite."""
        if not bool(value.isfinite().all()):
            rate = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"The {what} is {value.item()} in epoch {engine.state.epoch}, iteration "
                f"{engine.state.iteration}, at learning rate {rate:g}. "
                "Lower the learning rate and train in another folder; a checkpoint, if there is "
                "one, is of the end of an earlier epoch."
            )


class CheckpointLoaderNaming(CheckpointLoader):
    """``CheckpointLoader`` whose errors name the file."""

    def __call__(self, engine: Engine) -> None:
        """Load the file.

        Raises:
            ValueError: where it cannot be read or holds something else than it should.
        """
        try:
            super().__call__(engine)
        except Exception as error:
            raise ValueError(
                f"`ckpt_path` must name weights of this network, got '{self.load_path}': {error}"
            ) from error


class ResumableCheckpoint:
    """Keep two checkpoints, and resume from the last one when the training is started again.

    ``last.pt`` holds the state of all that training needs, after each epoch; ``best.pt`` is the
    bare state dict of the model with the best validated key metric, or of the end where none was
    validated. Stock ``CheckpointSaver`` writes in place, so that a kill leaves half a file; and to
    restore epoch and best metric, stock handlers need the trainer that holds them, which a config
    cannot name.

    Args:
        save_dir: folder of both files.
        save_dict: name and object (with ``state_dict``) of all that training needs but the trainer.
        model: whose state dict is saved as ``best.pt``.
        evaluator: runs before this handler and compares its key metric.
    """

    def __init__(
        self, save_dir: str, save_dict: Mapping[str, Any], model: nn.Module, evaluator: Workflow
    ) -> None:
        self.save_dict = save_dict
        self.model = model
        self.evaluator = evaluator
        self.last = os.path.join(save_dir, "last.pt")
        self.best = os.path.join(save_dir, "best.pt")

    def attach(self, engine: Engine) -> None:
        """Restore at the start, save at the end of each epoch."""
        engine.add_event_handler(Events.STARTED, self.restore)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def restore(self, engine: Engine) -> None:
        """Continue from ``last.pt`` if there is one.

        Raises:
            RuntimeError: where it belongs to another network, optimizer or length of training.
        """
        if engine.state.iteration > 0 or not os.path.exists(self.last):
            return  # a trainer that runs again goes on with what it has
        device = engine.state.device  # type: ignore[attr-defined]
        try:
            states = torch.load(self.last, map_location=device, weights_only=True)
            for name, item in self.save_dict.items():
                steps = getattr(item, "total_steps", None)
                groups = getattr(item, "param_groups", [])
                expected = {key for group in groups for key in group}
                item.load_state_dict(states[name])
                lacking = expected.difference(*getattr(item, "param_groups", []))
                if lacking:
                    raise ValueError(f"Its optimizer has no {sorted(lacking)}.")
                if getattr(item, "total_steps", None) != steps:
                    raise ValueError(
                        f"Its schedule has {item.total_steps} iterations, not {steps}."
                    )
            for state, part in ((engine.state, "trainer"), (self.evaluator.state, "evaluator")):
                for name, value in states[part].items():
                    setattr(state, name, value)
        except Exception as error:
            raise RuntimeError(
                f"'{self.last}' must belong to this training (network, optimizer, schedule): "
                f"remove it or train in another folder. {error}"
            ) from error
        engine.logger.info(f"Resumed from '{self.last}', after epoch {engine.state.epoch}.")
        if engine.state.epoch >= (engine.state.max_epochs or 0):
            engine.logger.warning(f"'{self.last}' is of a finished training: nothing to do.")

    def save(self, engine: Engine) -> None:
        """Save ``last.pt``, and ``best.pt`` where this epoch is the best, or the last of none."""
        if idist.get_rank() > 0:
            return
        os.makedirs(os.path.dirname(self.last), exist_ok=True)
        best = self.evaluator.state
        ends_unseen = engine.state.epoch == engine.state.max_epochs and best.best_metric_epoch < 1
        if best.best_metric_epoch == engine.state.epoch or ends_unseen:
            self.write(self.model.state_dict(), self.best)
        states = {name: item.state_dict() for name, item in self.save_dict.items()}
        states["trainer"] = {"epoch": engine.state.epoch, "iteration": engine.state.iteration}
        states["evaluator"] = {
            "best_metric": float(best.best_metric),
            "best_metric_epoch": best.best_metric_epoch,
        }
        self.write(states, self.last)

    @staticmethod
    def write(states: object, path: str) -> None:
        """Save with ``torch.save``, whole or not at all."""
        with whole_file(path) as part:
            torch.save(states, part)
