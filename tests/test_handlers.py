import math
import os
import re

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.data import CacheDataset, DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.transforms import Compose, RandGaussianNoised, RandShiftIntensityd

from mednca_monai import MedNCA, RandomPatchInferer
from mednca_monai.handlers import (
    DivergenceGuard,
    EpochSeed,
    RepeatedOneCycleLR,
    ResumableCheckpoint,
    StateNorm,
    VariedIterations,
    WeightAveraging,
)
from mednca_monai.inferers import RandomPatchBatch

ITERATIONS = 3  # of an epoch


def resume_after(epoch):
    """Handler that makes an engine start after an epoch."""

    def restore(engine):
        engine.state.epoch, engine.state.iteration = epoch, epoch * ITERATIONS

    return restore


def draws(seed=0, start=0, max_epochs=3):
    """All that is random in a training: epoch, and of each item noise, shift and torch's draw."""
    transforms = [RandGaussianNoised("image", prob=1), RandShiftIntensityd("image", 1, prob=1)]
    items = [{"image": torch.full((1, 2), float(i))} for i in range(ITERATIONS)]
    dataset = CacheDataset(items, Compose(transforms), progress=False)
    seen = {}

    def step(engine, batch):
        values = [*batch["image"].flatten().tolist(), torch.rand(()).item()]
        seen.setdefault(engine.state.epoch, []).append(values)

    engine = Engine(step)
    engine.add_event_handler(Events.STARTED, resume_after(start))
    EpochSeed(dataset, seed).attach(engine)
    engine.run(DataLoader(dataset, shuffle=True), max_epochs=max_epochs)
    return seen


def test_an_epoch_draws_the_same_whatever_ran_before_it():
    whole = draws()
    torch.manual_seed(7)
    torch.rand(5)
    resumed = draws(start=1)
    assert list(resumed) == [2, 3]
    assert resumed == {epoch: whole[epoch] for epoch in resumed}


def test_epochs_seeds_and_processes_draw_differently(monkeypatch):
    runs = []
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        runs += [draws(seed=0), draws(seed=1)]
    epochs = [str(sorted(epoch)) for run in runs for epoch in run.values()]
    assert len(set(epochs)) == len(epochs) == 4 * 3


@pytest.mark.parametrize("seed", [-7, 20260101123456, 10**30])
def test_any_integer_seeds_the_epochs(seed):
    assert draws(seed, max_epochs=1) == draws(seed, max_epochs=1) != draws(max_epochs=1)


class Line(torch.nn.Module):
    """One weight, which the losses below pull down by 1 per unit of learning rate."""

    def __init__(self, width=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))

    def forward(self, inputs):
        return inputs * 0 + self.weight.sum()


class Scripted(Metric):
    """Key metric whose value in each epoch is given."""

    def __init__(self, scores):
        self.scores = scores
        super().__init__()

    def reset(self):
        pass

    def update(self, output):
        pass

    def compute(self):
        return self.scores[self.epoch]

    def attach(self, engine, name):
        def remember(engine):
            self.epoch = engine.state.epoch

        engine.add_event_handler(Events.EPOCH_STARTED, remember)
        super().attach(engine, name)


def batches():
    items = [{"image": torch.ones(1, 2), "label": torch.ones(1, 2)}] * ITERATIONS
    return DataLoader(Dataset(items))


def make_trainer(loss, handlers, network, optimizer, max_epochs=2):
    return SupervisedTrainer(
        device="cpu",
        max_epochs=max_epochs,
        train_data_loader=batches(),
        network=network,
        optimizer=optimizer,
        loss_function=loss,
        train_handlers=handlers,
    )


class Losses:
    """Loss function that is the prediction's mean, times ``factor`` and plus ``more`` later on."""

    def __init__(self, iteration=None, function=None):
        self.iteration, self.function, self.calls = iteration, function, 0

    def __call__(self, pred, label):
        self.calls += 1
        return self.function(pred.mean()) if self.calls == self.iteration else pred.mean()


def guarded_training(loss, max_norm=1.0):
    network = Line()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    guard = DivergenceGuard(network.parameters(), optimizer, max_norm)
    return network, make_trainer(loss, [guard], network, optimizer)


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan, math.inf, "1", None, True])
def test_a_norm_that_is_no_bound_is_refused(max_norm):
    message = f"`max_norm` must be a finite number above 0, got {max_norm!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        guarded_training(Losses(), max_norm)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda mean: mean * torch.nan, "loss is nan"),
        (lambda mean: mean + torch.inf, "loss is inf"),
        (lambda mean: (mean * 0).sqrt(), "gradient is nan"),
        (lambda mean: (mean - mean.detach()).sqrt(), "gradient is inf"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_ends_the_training_before_it_is_used(function, what):
    network, trainer = guarded_training(Losses(5, function))
    with pytest.raises(
        FloatingPointError, match=f"The {what} in epoch 2, iteration 5, at learning rate 0.5"
    ):
        trainer.run()
    assert network.weight.tolist() == pytest.approx([-2.0])


@pytest.mark.parametrize(("max_norm", "weight"), [(0.25, -0.75), (10.0, -3.0)])
def test_the_gradient_is_clipped_to_its_largest_norm(max_norm, weight):
    network, trainer = guarded_training(Losses(), max_norm)
    trainer.run()
    assert network.weight.tolist() == pytest.approx([weight], rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "max_norm", "weight"),
    [
        (Losses(), 0.25, -0.75),
        (Losses(), 10.0, -3.0),
        (Losses(2, lambda mean: (mean - mean.detach()).sqrt()), 1.0, -2.5),  # a step left out
    ],
)
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_the_gradient_of_a_scaled_loss_is_clipped_unscaled(monkeypatch, loss, max_norm, weight):
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda: torch.amp.GradScaler("cpu"))
    network, trainer = guarded_training(loss, max_norm)
    trainer.amp = True
    trainer.run()
    assert network.weight.tolist() == pytest.approx([weight], rel=1e-5)


def test_accumulated_gradients_whose_parts_would_be_clipped_are_refused():
    network, trainer = guarded_training(Losses())
    trainer.accumulation_steps = 2  # as MONAI 1.6 does, once the handlers are attached
    with pytest.raises(ValueError, match=r"`accumulation_steps` must be 1 .* got 2"):
        trainer.run()
    assert network.weight.tolist() == [0]


def resumable_training(folder, scores, max_epochs, interval=1, width=1):
    """A stock trainer whose weight is minus the number of epochs, and its parts."""
    network = Line(width)
    optimizer = torch.optim.SGD(network.parameters(), lr=1 / ITERATIONS, momentum=0.0)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=batches(),
        network=network,
        key_val_metric={"score": Scripted(scores)},
    )
    checkpoint = ResumableCheckpoint(
        str(folder), {"model": network, "optimizer": optimizer}, network, evaluator
    )
    trainer = make_trainer(Losses(), [], network, optimizer, max_epochs)
    validate = Events.EPOCH_COMPLETED(every=interval)
    trainer.add_event_handler(validate, lambda engine: evaluator.run(engine.state.epoch))
    checkpoint.attach(trainer)
    return network, evaluator, trainer


def train(folder, scores, max_epochs, **options):
    network, evaluator, trainer = resumable_training(folder, scores, max_epochs, **options)
    trainer.run()
    return network, evaluator, trainer


def weight(path):
    states = torch.load(path, weights_only=True)
    return round(states.get("model", states)["weight"].item(), 4)


def best_and_last(folder):
    return weight(folder / "best.pt"), weight(folder / "last.pt")


SCORES = dict(enumerate([0.1, 0.5, 0.3, 0.4, 0.6, 0.2], 1))


@pytest.mark.parametrize(
    ("max_epochs", "interval", "best"),
    [(1, 1, 1), (2, 1, 2), (3, 1, 2), (4, 1, 2), (5, 1, 5), (6, 1, 5), (5, 2, 2), (5, 3, 3)],
)
def test_the_best_checkpoint_is_of_the_validation_with_the_best_metric(
    tmp_path, max_epochs, interval, best
):
    train(tmp_path, SCORES, max_epochs, interval=interval)
    assert best_and_last(tmp_path) == (-best, -max_epochs)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]


def test_a_training_that_is_never_validated_keeps_its_end(tmp_path):
    train(tmp_path, SCORES, 3, interval=4)
    assert best_and_last(tmp_path) == (-3, -3)


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_training_that_resumes_ends_as_if_it_had_never_stopped(tmp_path, stop):
    train(tmp_path / "once", SCORES, 6)
    train(tmp_path / "twice", SCORES, stop)
    _, evaluator, trainer = train(tmp_path / "twice", SCORES, 6)
    assert best_and_last(tmp_path / "twice") == best_and_last(tmp_path / "once") == (-5, -6)
    assert (trainer.state.epoch, trainer.state.iteration) == (6, 6 * ITERATIONS)
    assert (evaluator.state.best_metric, evaluator.state.best_metric_epoch) == (0.6, 5)
    states = [torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("once", "twice")]
    for name in ("trainer", "evaluator"):
        assert states[0][name] == states[1][name]


def test_a_finished_training_that_is_started_again_changes_nothing(tmp_path, caplog):
    train(tmp_path, SCORES, 3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    network, *_ = train(tmp_path, SCORES, 3)
    assert "last.pt' is of a finished training: nothing to do." in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert round(network.weight.item(), 4) == -3


def test_best_is_a_bare_state_dict_for_the_network(tmp_path):
    train(tmp_path, SCORES, 1)
    network = Line()
    network.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert round(network.weight.item(), 4) == -1


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch, name):
    train(tmp_path, SCORES, 1)
    save = torch.save

    def killed(content, path):
        if name in str(path):
            with open(path, "wb") as file:
                file.write(b"half a file")
            raise KeyboardInterrupt
        save(content, path)

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, SCORES, 2)
    assert weight(tmp_path / name) == -1
    monkeypatch.undo()
    train(tmp_path, SCORES, 3)
    assert best_and_last(tmp_path) == (-2, -3)
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "last.pt"]


def test_of_several_processes_only_the_first_one_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    train(tmp_path, SCORES, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_network_is_refused_and_kept(tmp_path):
    train(tmp_path, SCORES, 1)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(RuntimeError, match=r"(?s)must belong to this training .*\tsize mismatch"):
        train(tmp_path, SCORES, 2, width=2)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"", b"\x80", {}, torch.ones(2), {"model": {"weight": torch.ones(1, 1)}}, None]
)
def test_a_checkpoint_that_is_none_is_refused(tmp_path, content):
    if content is None:
        (tmp_path / "last.pt").mkdir()
    elif isinstance(content, bytes):
        (tmp_path / "last.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "last.pt")
    with pytest.raises(RuntimeError, match=r"last.pt' must belong to this training"):
        train(tmp_path, SCORES, 1)


def test_a_trainer_that_runs_again_keeps_its_weights(tmp_path):
    network, _, trainer = train(tmp_path, SCORES, 1)
    with torch.no_grad():
        network.weight.fill_(100)
    trainer.state.max_epochs = 2
    trainer.run()
    assert weight(tmp_path / "last.pt") == 99


def test_a_schedule_of_another_length_is_refused(tmp_path):
    def schedule(total_steps):
        optimizer = torch.optim.SGD(Line().parameters(), lr=1)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1, total_steps)

    _, evaluator, trainer = resumable_training(tmp_path, SCORES, 1)
    save = {"schedule": schedule(5)}
    ResumableCheckpoint(str(tmp_path), save, Line(), evaluator).save(trainer)
    restore = ResumableCheckpoint(str(tmp_path), {"schedule": schedule(7)}, Line(), evaluator)
    with pytest.raises(RuntimeError, match="Its schedule has 5 iterations, not 7"):
        restore.restore(trainer)


def test_another_kind_of_optimizer_is_refused(tmp_path):
    def handler(kind):
        return ResumableCheckpoint(
            str(tmp_path), {"optimizer": kind(Line().parameters(), lr=1.0)}, Line(), evaluator
        )

    _, evaluator, trainer = resumable_training(tmp_path, SCORES, 1)
    handler(torch.optim.SGD).save(trainer)
    with pytest.raises(RuntimeError, match=r"Its optimizer has no .*'betas'"):
        handler(torch.optim.Adam).restore(trainer)
    handler(torch.optim.SGD).restore(trainer)


def test_a_one_cycle_schedule_may_rise_for_one_step():
    optimizer = torch.optim.SGD(Line().parameters(), lr=1)
    schedule = RepeatedOneCycleLR(optimizer, 1, 5, pct_start=0.2, cycle_momentum=False)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] < rates[1] > rates[2] > rates[3] > rates[4]


def test_a_one_cycle_schedule_starts_over_after_its_end():
    def rates(kind, steps):
        optimizer = torch.optim.SGD(Line().parameters(), lr=1)
        schedule = kind(optimizer, 1, total_steps=5, cycle_momentum=False)
        for _ in range(steps):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()

    cycle = list(rates(torch.optim.lr_scheduler.OneCycleLR, 5))
    assert len(set(cycle)) > 3
    assert list(rates(RepeatedOneCycleLR, 15)) == 3 * cycle


def test_averaged_weights_start_as_the_first_ones_and_follow_slowly():
    network = Line()
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)
    averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=average)
    values = []
    for value in (4.0, 8.0):
        with torch.no_grad():
            network.weight.fill_(value)
        WeightAveraging(network, averaged)(None)
        values.append(averaged.module.weight.item())
    assert values == [4.0, 5.0]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_broken_checkpoint_is_named(tmp_path, content):
    _, _, trainer = resumable_training(tmp_path, SCORES, 1)
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"last.pt' must belong to this training"):
        trainer.run()
    assert (tmp_path / "last.pt").read_bytes() == content


def variant(weight, steps, roi_size=4):
    return {"weight": weight, "steps": steps, "roi_size": roi_size}


def varied_training(variants, start=0, max_epochs=10, last_epochs=10, steps=(1, 1)):
    """Steps of both levels and size of the patch in each iteration; then all is as before."""
    network = MedNCA(2, 1, 1, steps=(8, 6))
    patches = [RandomPatchInferer(9), RandomPatchBatch((9, 9))]
    seen = {}

    def note(engine, batch):
        steps = tuple(level.steps for level in network.levels)
        seen[engine.state.iteration] = (steps, *(patch.roi_size for patch in patches))

    engine = Engine(note)
    engine.add_event_handler(Events.STARTED, resume_after(start))
    VariedIterations(network, patches, steps, variants, last_epochs).attach(engine)
    engine.run([0] * ITERATIONS, max_epochs=max_epochs)
    assert [level.steps for level in network.levels] == [8, 6]
    assert [patch.roi_size for patch in patches] == [9, (9, 9)]
    return seen


def test_variants_are_drawn_as_often_as_their_weights_say():
    variants = [variant(3, 0.5), variant(1, 1, (5, 6)), variant(0, 2)]
    seen = varied_training(variants, max_epochs=200, last_epochs=200)
    full = [found for iteration, found in seen.items() if iteration > 100 * ITERATIONS]
    fewer = [steps for steps, roi_size, _ in full if roi_size == 4]
    assert len(fewer) / len(full) == pytest.approx(0.75, abs=0.08)
    assert {*fewer} >= {(4, 3), (6, 4), (8, 6)}
    assert {found for found in full if found[1] != 4} == {((8, 6), (5, 6), (5, 6))}


@pytest.mark.parametrize("last_epochs", [0, 1, 7, 10, 20])
def test_variants_are_drawn_in_the_last_epochs(last_epochs):
    seen = varied_training([variant(1, 2)], last_epochs=last_epochs)
    first = ITERATIONS * max(10 - last_epochs, 0) + 1
    assert {i for i, found in seen.items() if found[1:] == (4, 4)} == {*range(first, 31)}
    assert {i for i, found in seen.items() if found == ((8, 6), 9, (9, 9))} == {*range(1, first)}


@pytest.mark.parametrize(("last_epochs", "times"), [(0, 1), (200, 2)])
def test_each_iteration_draws_its_steps(last_epochs, times):
    steps = (0.75, 1.5)
    seen = varied_training(
        [variant(1, times)], max_epochs=200, last_epochs=last_epochs, steps=steps
    )
    coarse = [found[0][0] for i, found in seen.items() if i > 100 * ITERATIONS]
    assert (min(coarse), max(coarse)) == pytest.approx((6, 12 * times), abs=times - 1)
    assert sum(coarse) / len(coarse) == pytest.approx(9 * (1 + times) / 2, abs=0.3 * times)
    assert all(abs(found[0][1] - 0.75 * found[0][0]) <= 1 for found in seen.values())
    sizes = {found[1:] for found in seen.values()}
    assert sizes == {(4, 4) if last_epochs else (9, (9, 9))}


def test_a_run_of_unknown_length_never_draws_a_variant():
    network, seen = MedNCA(2, 1, 1, steps=8), []
    engine = Engine(lambda engine, batch: seen.append(network.levels[0].steps))
    VariedIterations(network, [], (1, 1), [variant(1, 2)], last_epochs=3).attach(engine)
    engine.run([0], max_iters=2)
    assert seen == [8, 8]


@pytest.mark.parametrize("stop", [Engine.terminate, Engine.terminate_epoch, Engine.interrupt])
def test_an_engine_that_is_stopped_before_an_iteration_leaves_the_network_as_it_was(stop):
    network = MedNCA(2, 1, 1, steps=8)
    engine = Engine(lambda engine, batch: None)
    VariedIterations(network, [], (2, 2), [variant(1, 1)], last_epochs=0).attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED(once=1), stop)
    engine.run([0])
    assert [level.steps for level in network.levels] == [8, 8]
    engine.run([0])  # an interrupted one ends


def test_steps_grow_in_the_first_half_of_the_last_epochs():
    seen = varied_training([variant(1, 3)], max_epochs=300, last_epochs=200)
    steps = [found[0][0] for found in seen.values()]
    most = [max(steps[ITERATIONS * epoch :][: ITERATIONS * 25]) for epoch in range(0, 300, 25)]
    expected = [*[8] * 4, 12, 16, 20, *[24] * 5]
    assert most == pytest.approx(expected, abs=1)
    assert min(steps) == 8


def test_each_run_of_a_trainer_draws_in_its_own_last_epochs():
    seen, patch = [], RandomPatchInferer(9)
    engine = Engine(lambda engine, batch: seen.append(patch.roi_size))
    VariedIterations(MedNCA(2, 1, 1), [patch], (1, 1), [variant(1, 2)], last_epochs=1).attach(
        engine
    )
    for max_epochs in (3, 5):  # as a federated client's rounds do
        engine.state.max_epochs = max_epochs
        engine.run([0])
    assert seen == [9, 9, 4, 9, 4]


def test_each_level_takes_a_step_at_least():
    seen = varied_training([variant(1, 1)], steps=(0.01, 0.01))
    assert {found[0] for found in seen.values()} == {(1, 1)}


def test_a_training_that_resumes_draws_the_same_variants():
    variants = [variant(1, steps, round(10 * steps)) for steps in (0.1, 1, 2, 4)]
    whole = varied_training(variants, steps=(0.75, 1.5))
    assert {found[1] for found in whole.values()} == {1, 10, 20, 40}
    resumed = varied_training(variants, start=4, steps=(0.75, 1.5))
    assert resumed == {i: found for i, found in whole.items() if i > 4 * ITERATIONS}


@pytest.mark.parametrize(
    "steps",
    [
        1,
        "ab",
        (1,),
        ("0.6", "1.2"),
        (None, 1),
        (1, 2, 3),
        (2, 1),
        (0, 1),
        (math.nan, 1),
        (1, math.inf),
    ],
)
def test_wrong_steps_are_refused(steps):
    message = f"`steps` must be two finite factors above 0, the lowest first, got {steps!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        VariedIterations(MedNCA(2, 1, 1), [], steps, [variant(1, 1)], last_epochs=1)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], "weights in `variants` must be at least 0, not all 0, got"),
        ([variant(0, 1)], "weights in `variants` must be at least 0, not all 0, got"),
        ([variant(1, 1), variant(-1, 1)], "weights in `variants` must be at least 0, not all 0"),
        ([variant(1, 1), variant(1, 0)], "steps in `variants` must be above 0, got"),
        (
            [variant(1, 1), variant(math.nan, 1)],
            "weights in `variants` must be at least 0, not all",
        ),
        ([variant("1", 1)], "weights in `variants` must be at least 0, not all 0, got"),
        ([variant(1, math.nan)], "steps in `variants` must be above 0, got"),
        ([variant(1, None)], "steps in `variants` must be above 0, got"),
        ([variant(1, 1, 0)], "`roi_size` must be an integer of at least 1, got 0"),
        ([variant(1, 1, (4, 4, 4))], "`roi_size` must be one value or one per axis (2), got"),
        ([{"weight": 1, "steps": 1}], "`variants` must each have weight, steps and roi_size, got"),
        ([None], "`variants` must each have weight, steps and roi_size, got"),
        (None, "`variants` must each have weight, steps and roi_size, got"),
    ],
)
def test_wrong_variants_are_refused(variants, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VariedIterations(MedNCA(2, 1, 1), [], (1, 1), variants, last_epochs=1)


def test_an_error_in_a_varied_iteration_leaves_the_network_as_it_was():
    def fail(engine, batch):
        assert network.levels[0].steps == 16
        raise FloatingPointError("the loss is nan")

    network, inferer = MedNCA(2, 1, 1, steps=8), RandomPatchInferer(9)
    engine = Engine(fail)
    VariedIterations(network, [inferer], (2, 2), [variant(1, 1)], last_epochs=1).attach(engine)
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        engine.run([0])
    assert [level.steps for level in network.levels] == [8, 8]
    assert inferer.roi_size == 9


def test_the_last_epochs_must_be_a_number_of_epochs():
    with pytest.raises(ValueError, match="`last_epochs` must be an integer of at least 0, got -1"):
        VariedIterations(MedNCA(2, 1, 1), [], (1, 1), [variant(1, 1)], last_epochs=-1)


def test_the_largest_state_of_an_epoch_is_logged():
    network = MedNCA(2, 1, 1, num_channels=2, steps=1)
    for level in network.levels:
        level.forward = lambda image, *_: image
    values = [[1.0, 3.0, 2.0], [0.5, 0.5, 0.25], [1.0, math.nan, 2.0]]
    logged = []

    def step(engine, value):
        network(torch.full((1, 1, 8, 8), value))

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    StateNorm(network, bound=4).attach(engine)
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: logged.append(dict(engine.state.metrics))
    )
    for epoch in values:
        engine.run(epoch)
    for seen, largest in zip(logged, (3.0, 0.5, math.nan), strict=True):
        assert list(seen) == ["state_rms_0", "state_rms_1"]
        assert list(seen.values()) == pytest.approx([largest] * 2, nan_ok=True)


def test_numbers_beyond_the_bound_of_all_levels_but_the_finest_add_to_the_loss():
    network = MedNCA(2, 1, 1, num_levels=3, num_channels=2, steps=1)
    cells = [torch.zeros(1, 2, 4, 4, requires_grad=True) for _ in network.levels]
    with torch.no_grad():
        for state in cells:
            state[..., :2], state[..., 2] = -6.0, 3.0  # half of them 2 beyond 4, some within
    for automaton, state in zip(network.levels, cells, strict=True):
        automaton.forward = lambda *_, state=state: state

    def step(engine, passes):
        for _ in range(passes):  # the last one counts, not what a validation did before
            network(torch.zeros(1, 1, 16, 16))
        engine.state.output = {"loss": torch.tensor(0.5)}
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        return engine.state.output

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    StateNorm(network, bound=4).attach(engine)
    loss = engine.run([2]).output["loss"]
    assert loss.item() == pytest.approx(0.5 + 2 * 0.5 * math.log(3))
    loss.backward()
    assert engine.run([0]).output["loss"] == 0.5  # nothing is left of the iteration before
    assert cells[2].grad is None
    for state in cells[:2]:
        assert (state.grad[..., :2] < 0).all()
        assert (state.grad[..., 2:] == 0).all()


def trainer_of_an_image(network, optimizer):
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.zeros(1, 1, 8, 8), "label": torch.ones(1, 1, 8, 8)}],
        network=network,
        optimizer=optimizer,
        loss_function=torch.nn.MSELoss(),
    )


def test_a_coarse_state_that_is_not_finite_ends_a_training_before_its_step():
    network = MedNCA(2, 1, 1, num_channels=2, steps=1)
    coarse, fine = network.levels
    bias = fine.hidden.bias
    coarse.forward = lambda *_: torch.full((1, 2, 2, 2), math.inf)
    fine.forward = lambda *_: bias.sum().expand(1, 2, 8, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    trainer = trainer_of_an_image(network, optimizer)
    StateNorm(network, bound=4).attach(trainer)
    DivergenceGuard(network.parameters(), optimizer, max_norm=1.0).attach(trainer)
    before = bias.clone()
    with pytest.raises(FloatingPointError, match="The loss is inf"):
        trainer.run()
    assert torch.equal(bias, before)


def test_a_trained_network_is_left_as_it_was():
    network = MedNCA(2, 1, 1, num_channels=2, steps=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    trainer = trainer_of_an_image(network, optimizer)
    StateNorm(network, bound=4).attach(trainer)
    trainer.run()
    assert trainer.state.metrics["state_rms_0"] == 0
    torch.jit.script(network)  # refuses hooks


@pytest.mark.parametrize("bound", [0, -1.0, math.nan, math.inf, "1", None, True])
def test_a_bound_of_the_state_that_is_none_is_refused(bound):
    message = f"`bound` must be a finite number above 0, got {bound!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        StateNorm(MedNCA(2, 1, 1), bound)
