"""One level: borders, the rule itself, and how far a cell's influence travels."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mednca_monai import convolution
from mednca_monai.automaton import CellularAutomaton
from mednca_monai.firing import independent_fires, row_digests, step_digests
from mednca_monai.grid import Coarse

RULES = {
    "dense": {},
    "two products": {"hidden_size": 64},
    "wide": {"kernel_size": 5},
    "single cell": {"kernel_size": 1},
    "depthwise": {"perception": "depthwise"},
    "normed": {"perception": "depthwise", "norm": ("batch", {"track_running_stats": False})},
    "normed dense": {"norm": ("batch", {"track_running_stats": False, "affine": False})},
    "normed by group": {"norm": ("group", {"num_groups": 2})},
}


@pytest.fixture(params=RULES.values(), ids=RULES)
def rule(request):
    return request.param


def new_automaton(spatial_dims, **arguments):
    settings = {"hidden_size": 8, "level": 1, "steps": 2, "fire_rate": 0.6, "firing": "independent"}
    settings |= {"kernel_size": 3, "perception": "dense", "norm": None, "segment_steps": 1}
    return CellularAutomaton(spatial_dims, 2, 5, **{**settings, **arguments}).double()


@pytest.mark.parametrize("fire_rate", [0.5, 1.0])  # where cells are gathered and where not
def test_perception_and_hidden_layer_fold_where_that_is_faster(spatial_dims, rule, fire_rate):
    automaton = new_automaton(spatial_dims, fire_rate=fire_rate, **rule)
    two = rule.get("hidden_size") == 64 or rule.get("perception") == "depthwise"
    folds = automaton.folds(torch.zeros(1, 2, *[4] * spatial_dims))
    assert folds != two
    assert len(automaton.rule(folds)) == (3 if folds else 4)


def test_a_normed_rule_folds_as_one_that_computes_all_cells():
    image = torch.zeros(1, 2, 4, 4)
    rules = [{"fire_rate": 0.5}, {"fire_rate": 1.0}, {"fire_rate": 0.5, "norm": "batch"}]
    folds = [new_automaton(2, hidden_size=16, **rule).folds(image) for rule in rules]
    assert folds == [False, True, True]


def make_automaton(spatial_dims, **arguments):
    """An automaton with two image channels whose last layer does not start at zero."""
    automaton = new_automaton(spatial_dims, **arguments)
    torch.nn.init.normal_(automaton.update.weight, std=0.3)
    return automaton


def alone(cells):
    """Cells that stand for themselves."""
    axes = cells.dim() - 2
    return Coarse(cells, [1] * axes, [[0] * axes])


def make_state(size):
    return torch.randn(2, 5, *size, dtype=torch.float64)


def cells_after(automaton, image, cells, seed, start):
    """The cells' own channels after all steps."""
    room = automaton.room(image, image.new_empty(0))
    return automaton(image, alone(cells), seed, start, room)


def run(automaton, state, seed=(7, 8), start=None):
    """The whole state afterwards."""
    if start is None:
        start = torch.zeros(1, automaton.spatial_dims, dtype=torch.int64)
    cells = cells_after(automaton, state[:, :2], state[:, 2:], torch.tensor(seed), start)
    return torch.cat([state[:, :2], cells], 1)


def plain_steps(automaton, state, seed, start):
    """The rule as the papers write it: layer after layer, image channels put back at the end."""
    image, size = state[:, : automaton.in_channels], list(state.shape[2:])
    for step in range(automaton.steps):
        width = [(0, 0)] * 2 + [(automaton.radius, automaton.radius)] * automaton.spatial_dims
        padded = torch.from_numpy(np.pad(state.detach().numpy(), width, mode="reflect"))
        hidden = automaton.hidden(torch.cat([state, automaton.perception(padded)], 1))
        change = automaton.update(automaton.norm(hidden).relu())
        digests = step_digests(seed, automaton.level, automaton.steps)
        rows = row_digests(digests, start[:, 0], size[0])[step]
        fires = independent_fires(rows, start[:, 1:], size[1:], round(0.6 * 2**32))
        state = torch.where(fires, state + change, state)
        state = torch.cat([image, state[:, automaton.in_channels :]], 1)
    return state


def test_a_new_automaton_is_the_identity_on_its_state(spatial_dims, rule, size):
    state = make_state(size)
    assert run(new_automaton(spatial_dims, **rule), state).equal(state)


def test_only_the_last_layer_of_a_new_automaton_is_zero(spatial_dims):
    weights = new_automaton(spatial_dims).named_parameters()
    assert [name for name, weight in weights if not weight.any()] == ["update.weight"]


def test_the_steps_equal_the_rule_layer_by_layer(spatial_dims, rule, size):
    automaton, state = make_automaton(spatial_dims, **rule), make_state(size)
    seed, start = torch.tensor([7, -8]), torch.tensor([[2, 0, 9], [31, 5, 1]])[:, :spatial_dims]
    with torch.no_grad():
        expected = plain_steps(automaton, state, seed, start)
        assert_close(run(automaton, state, [7, -8], start), expected, rtol=0, atol=1e-12)


def test_image_channels_never_change(spatial_dims, rule, size):
    automaton, state = make_automaton(spatial_dims, **rule), make_state(size)
    before = state.clone()
    after = run(automaton, state)
    assert state.equal(before)
    assert not after[:, 2:].isclose(state[:, 2:]).all(1).all()


@pytest.mark.parametrize(("kernel_size", "steps"), [(3, 1), (3, 3), (5, 2), (1, 3)])
@pytest.mark.parametrize("perception", ["dense", "depthwise"])
def test_influence_travels_one_radius_a_step_and_no_further(
    spatial_dims, kernel_size, steps, perception
):
    automaton = make_automaton(
        spatial_dims, kernel_size=kernel_size, steps=steps, perception=perception, fire_rate=1.0
    )
    state = make_state([15] * spatial_dims)
    other = state.clone()
    other[(0, slice(None), *[7] * spatial_dims)] += 5
    changed = (run(automaton, other) != run(automaton, state)).any(1)
    reach = steps * (kernel_size // 2)
    cells = changed[0].nonzero()
    assert cells.amin(0).tolist() == [7 - reach] * spatial_dims
    assert cells.amax(0).tolist() == [7 + reach] * spatial_dims
    assert not changed[1].any()


def test_the_fraction_of_cells_that_a_step_updates_is_the_fire_rate(spatial_dims):
    size = [64, 65] if spatial_dims == 2 else [16, 16, 17]
    for fire_rate in (0.1, 0.5, np.float16(0.8)):
        automaton = make_automaton(spatial_dims, steps=1, fire_rate=fire_rate)
        torch.nn.init.ones_(automaton.hidden.bias)
        state = make_state(size)
        updated = (run(automaton, state) != state).any(1).double()
        deviation = (fire_rate * (1 - fire_rate) / updated.numel()) ** 0.5
        assert abs(float(updated.mean()) - fire_rate) < 4 * deviation


def test_exactly_half_of_the_cells_update_where_sublattices_fire(spatial_dims):
    automaton = make_automaton(spatial_dims, steps=1, fire_rate=0.5, firing="sublattices")
    torch.nn.init.ones_(automaton.hidden.bias)
    state = make_state([8, 6, 4][:spatial_dims])
    assert float((run(automaton, state) != state).any(1).double().mean()) == 0.5


def test_every_parameter_gets_a_gradient(spatial_dims, rule, size):
    automaton = make_automaton(spatial_dims, **rule)
    run(automaton, make_state(size))[:, 2:].square().sum().backward()
    for name, weight in automaton.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any(), name


# The fast ways equal the plain one


def gradients(automaton, state, seed, start, weight):
    """Cells afterwards, and the gradients of image, cells and all weights."""
    image, cells = (x.clone().requires_grad_() for x in (state[:, :2], state[:, 2:]))
    after = cells_after(automaton, image, cells, seed, start)
    inputs = [image, cells, *automaton.parameters()]
    return [after, *torch.autograd.grad((after * weight).sum(), inputs)]


@pytest.mark.parametrize("segment_steps", [1, 2, 4, 9])
@pytest.mark.parametrize("block_cells", [1, 30, 2**20])
@pytest.mark.parametrize(
    "firing", [{}, {"fire_rate": 0.9}, {"fire_rate": 0.5, "firing": "sublattices"}]
)
def test_blocks_and_recomputed_segments_change_neither_result_nor_gradients(
    spatial_dims, rule, size, firing, block_cells, segment_steps, monkeypatch
):
    settings = {**rule, **firing, "segment_steps": segment_steps, "steps": 5}
    automaton = make_automaton(spatial_dims, **settings)
    automaton.block_cells = block_cells
    state = torch.randn(3, 5, *size, dtype=torch.float64)
    start = torch.tensor([[2, 0, 9], [31, 5, 1], [4, 4, 3]])[:, :spatial_dims]
    weight = torch.randn_like(state[:, 2:])
    found = gradients(automaton, state, torch.tensor([7, 8, -9]), start, weight)
    with torch.no_grad():
        image, cells = state.split([2, 3], 1)
        inference = cells_after(automaton, image, cells, torch.tensor([7, 8, -9]), start)
    monkeypatch.setattr("mednca_monai.automaton.is_traced", lambda: True)  # the plain graph
    expected = gradients(automaton, state, torch.tensor([7, 8, -9]), start, weight)
    assert_close(inference, expected[0], rtol=0, atol=1e-10)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-10 * max(1, float(other.detach().abs().max())))


@pytest.mark.parametrize(
    ("norm", "is_whole"),
    [
        (("batch", {"track_running_stats": False}), False),
        (("batch", {"track_running_stats": False, "affine": False}), False),
        ("batch", True),
        (("syncbatch", {"track_running_stats": False}), True),
        ("instance", True),
        (("group", {"num_groups": 2}), True),
    ],
)
def test_norms_other_than_batch_norm_without_running_statistics_take_all_cells_at_once(
    spatial_dims, norm, is_whole, monkeypatch
):
    automaton = make_automaton(spatial_dims, perception="depthwise", norm=norm)
    automaton.block_cells, state, sizes = 30, make_state([12] * spatial_dims), []
    hidden_layer = automaton.hidden_layer

    def spy(window, rule, stride):
        sizes.append(window.shape[2])
        return hidden_layer(window, rule, stride)

    monkeypatch.setattr(automaton, "hidden_layer", spy)
    run(automaton, state).sum().backward()
    assert set(sizes) == ({14} if is_whole else {4})


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_batch_norm_may_lack_weight_or_bias(spatial_dims, missing):
    automaton = make_automaton(spatial_dims, **RULES["normed"])
    for weight in automaton.norm.parameters():
        torch.nn.init.normal_(weight)
    setattr(automaton.norm, missing, None)
    state, start = make_state([6] * spatial_dims), torch.zeros(1, spatial_dims, dtype=torch.int64)
    weight, seed = torch.randn_like(state[:, 2:]), torch.tensor([7, 8])
    expected = gradients(automaton, state, seed, start, weight)
    automaton.block_cells = 30
    for one, other in zip(gradients(automaton, state, seed, start, weight), expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-10 * max(1, float(other.detach().abs().max())))


def test_a_norm_of_all_cells_at_once_needs_no_room(spatial_dims):
    image, rooms = torch.zeros(1, 2, *[16] * spatial_dims, dtype=torch.float64), []
    for norm in (None, ("group", {"num_groups": 2})):
        automaton = new_automaton(spatial_dims, fire_rate=0.3, norm=norm)
        rooms.append(len(automaton.room(image, image.new_empty(0))))
    assert rooms[0] > rooms[1] == 0


def test_the_backward_pass_by_blocks_is_of_the_forward_passs_type(spatial_dims):
    automaton = make_automaton(spatial_dims, **RULES["normed"]).float()
    automaton.block_cells, state = 30, make_state([6] * spatial_dims).float()
    weights, loss = [*automaton.parameters()], run(automaton, state).square().sum()
    expected = torch.autograd.grad(loss, weights, retain_graph=True)
    with torch.autocast("cpu"):
        found = torch.autograd.grad(loss, weights)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=0, atol=1e-2 * (1 + float(other.abs().max())))


def test_batch_norm_in_16_bits_takes_all_cells_at_once(spatial_dims):
    automaton = make_automaton(spatial_dims, **RULES["normed"])
    state = make_state([6] * spatial_dims)
    automaton.block_cells = 30
    assert len(automaton.blocks(state)) == len(automaton.blocks(state.float())) > 1
    assert len(automaton.blocks(state.bfloat16())) == 1
    with torch.autocast("cpu"):
        assert len(automaton.blocks(state.float())) == 1


@pytest.mark.parametrize("settings", [{}, {"firing": "sublattices"}, RULES["normed"]])
def test_single_precision_stays_close_over_many_steps(spatial_dims, settings, monkeypatch):
    automaton = new_automaton(spatial_dims, fire_rate=0.5, steps=64, **settings).float()
    automaton.block_cells = 30
    torch.nn.init.normal_(automaton.update.weight, std=0.02)
    image, cells = torch.rand(1, 5, *[12] * spatial_dims).split([2, 3], 1)
    start = torch.zeros(1, spatial_dims, dtype=torch.int64)
    with torch.no_grad():
        fast = cells_after(automaton, image, cells, torch.tensor([3]), start)
        monkeypatch.setattr("mednca_monai.automaton.is_traced", lambda: True)
        plain = cells_after(automaton, image, cells, torch.tensor([3]), start)
    assert not fast.isclose(cells, atol=0.1).all()
    assert_close(fast, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("fire_rate", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if "norm" not in rule])
def test_gradients_in_single_precision_are_those_in_double(
    spatial_dims, rule, size, fire_rate, onednn, monkeypatch
):
    monkeypatch.setattr("mednca_monai.convolution.FEW", 0)
    monkeypatch.setattr("mednca_monai.convolution.ON_X86", onednn)
    automaton = make_automaton(spatial_dims, fire_rate=fire_rate, **rule)
    state, start = make_state(size), torch.zeros(1, spatial_dims, dtype=torch.int64)
    weight, seed = torch.randn_like(state[:, 2:]), torch.tensor([7, 8])
    expected = gradients(automaton, state, seed, start, weight)
    found = gradients(automaton.float(), state.float(), seed, start, weight.float())
    for one, other in zip(found, expected, strict=True):
        limit = 1e-5 * max(1, float(other.detach().abs().max()))
        assert_close(one, other, rtol=0, atol=limit, check_dtype=False)


@pytest.mark.parametrize("later", [1, 7])
def test_gradients_are_those_of_the_forward_pass_whatever_steps_are_set_after_it(
    spatial_dims, later
):
    automaton = make_automaton(spatial_dims, steps=4, segment_steps=3)
    state = make_state([6] * spatial_dims)
    gradients = []
    for steps in (4, later):
        automaton.zero_grad()
        automaton.steps = 4
        loss = run(automaton, state).square().sum()
        automaton.steps = steps
        loss.backward()
        gradients.append([weight.grad.clone() for weight in automaton.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("segment_steps", [1, 3])
def test_a_second_backward_pass_gives_the_same_gradients(spatial_dims, rule, segment_steps):
    automaton = make_automaton(spatial_dims, steps=5, segment_steps=segment_steps, **rule)
    automaton.block_cells = 30
    loss, weights = run(automaton, make_state([6] * spatial_dims)).sum(), [*automaton.parameters()]
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, weights)))


def test_cells_that_never_fire_train_nothing(spatial_dims):
    automaton = make_automaton(spatial_dims, fire_rate=2**-32, steps=3)
    after = run(automaton, make_state([6] * spatial_dims))
    after.sum().backward()
    assert all(not weight.grad.any() for weight in automaton.parameters())


@pytest.fixture
def rooms(monkeypatch):
    """The rooms of all gathered neighbourhoods, kept alive, and whether these lie in them."""
    found, neighbourhoods = [], convolution.neighbourhoods

    def spy(window, cells, radius, room):
        rows = neighbourhoods(window, cells, radius, room)
        if len(cells) > 0:
            found.append((room, rows.data_ptr() == room.data_ptr()))
        return rows

    monkeypatch.setattr(convolution, "neighbourhoods", spy)
    return found


@pytest.mark.parametrize("fire_rate", [0.1, 0.3, 0.5, 0.7])
def test_the_firing_cells_of_all_blocks_have_room(fire_rate, rooms):
    automaton = make_automaton(2, fire_rate=fire_rate)
    automaton.block_cells = 256
    for size in (4, 8, 16, 100, 200):
        run(automaton, make_state([size, size])).sum().backward()
    assert len(rooms) > 100
    assert all(inside for _, inside in rooms)


def test_all_levels_share_one_room(make_network, rooms):
    network = make_network(2, num_levels=3, steps=2)
    with torch.no_grad():
        network(torch.rand(1, 2, 96, 96, dtype=torch.float64))
    assert len(rooms) == sum(network.steps)
    assert all(inside for _, inside in rooms)
    assert len({room.data_ptr() for room, _ in rooms}) == 1


@pytest.mark.parametrize(("segment_steps", "share"), [(1, 0.3), (2, 0.51), (10, 1)])
def test_training_keeps_what_every_segment_overwrites_and_no_more(
    spatial_dims, segment_steps, share
):
    automaton = make_automaton(spatial_dims, fire_rate=0.3, steps=10, segment_steps=segment_steps)
    image, cells = make_state([16] * spatial_dims).split([2, 3], 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        cells_after(
            automaton, image, cells, torch.tensor([1, 2]), torch.zeros(1, spatial_dims).long()
        )
    counts = [shape[0] for shape in kept if shape[1:] == (3,)]
    assert len(counts) == (10 // segment_steps if share < 1 else 0)
    assert all(abs(count / (2 * 16**spatial_dims) - share) < 0.1 for count in counts)
    assert kept.count(cells.shape) == (1 if share < 1 else 2)  # the last, and those of a segment
    assert kept.count(image.shape) == 1
    assert not any(shape[:2] == (2, 8) for shape in kept)  # no hidden layer


def test_the_backward_pass_leaves_running_statistics_alone(spatial_dims):
    automaton = make_automaton(spatial_dims, norm="batch", steps=4, segment_steps=3)
    after = run(automaton, make_state([6] * spatial_dims))
    statistics = [buffer.clone() for buffer in automaton.norm.buffers()]
    after.sum().backward()
    assert all(a.equal(b) for a, b in zip(statistics, automaton.norm.buffers(), strict=True))


@pytest.mark.parametrize("size", [(4, 48, 36), (6, 52, 34)])
def test_gradients_in_bfloat16_are_near_those_in_float32(size):
    # for such sizes oneDNN's own, of a dense layer as a convolution, are NaN on processors with AMX
    settings = {"hidden_size": 96, "steps": 1, "fire_rate": 0.9}
    automaton = make_automaton(3, **settings).float()
    state = torch.randn(1, 5, *size)
    gradients = []
    for enabled in (False, True):
        automaton.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled):
            run(automaton, state, seed=(7,)).square().mean().backward()
        gradients.append([weight.grad for weight in automaton.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_sublattices_of_cells_that_see_only_themselves_train():
    # for such sizes PyTorch's own gradients of strided 1 x 1 convolutions corrupt the heap
    settings = {"kernel_size": 1, "hidden_size": 64, "firing": "sublattices", "fire_rate": 0.5}
    automaton = make_automaton(2, **settings).float()
    for _ in range(10):
        state = torch.randn(1, 5, 120, 131)
        run(automaton, state, seed=(7,))[:, 2:].sum().backward()
    assert all(weight.grad.isfinite().all() for weight in automaton.parameters())


def test_the_package_can_be_imported_again_and_under_another_default_device():
    code = """if True:
        import sys, torch, mednca_monai
        for name in [name for name in sys.modules if name.startswith("mednca_monai")]:
            del sys.modules[name]
        torch.set_default_device("cuda")  # where there is none, whatever is made there fails
        import mednca_monai"""
    subprocess.run([sys.executable, "-c", code], check=True)
