"""One level: borders, the rule itself, and how far a cell's influence travels."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mednca_monai.automaton import CellularAutomaton, reflect_pad
from mednca_monai.firing import independent_fires, step_digest

RULES = {
    "dense": {},
    "wide": {"kernel_size": 5},
    "single cell": {"kernel_size": 1},
    "depthwise": {"perception": "depthwise"},
    "normed": {"perception": "depthwise", "norm": ("batch", {"track_running_stats": False})},
    "normed dense": {"norm": ("group", {"num_groups": 2})},
}


@pytest.fixture(params=RULES.values(), ids=RULES)
def rule(request):
    return request.param


def new_automaton(spatial_dims, **arguments):
    settings = {"level": 1, "steps": 2, "fire_rate": 0.6, "firing": "independent"}
    settings |= {"kernel_size": 3, "perception": "dense", "norm": None}
    return CellularAutomaton(spatial_dims, 2, 5, 8, **{**settings, **arguments}).double()


def make_automaton(spatial_dims, **arguments):
    """An automaton with two image channels whose last layer does not start at zero."""
    automaton = new_automaton(spatial_dims, **arguments)
    torch.nn.init.normal_(automaton.update.weight, std=0.3)
    return automaton


def make_state(size):
    return torch.randn(2, 5, *size, dtype=torch.float64)


def run(automaton, state):
    start = torch.zeros(1, automaton.spatial_dims, dtype=torch.int64)
    return automaton(state, torch.tensor([7, 8]), start)


def plain_steps(automaton, state, seed, start):
    """The rule as the papers write it: layer after layer, image channels put back at the end."""
    image, size = state[:, : automaton.in_channels], list(state.shape[2:])
    for step in range(automaton.steps):
        width = [(0, 0)] * 2 + [(automaton.radius, automaton.radius)] * automaton.spatial_dims
        padded = torch.from_numpy(np.pad(state.detach().numpy(), width, mode="reflect"))
        hidden = automaton.hidden(torch.cat([state, automaton.perception(padded)], 1))
        change = automaton.update(automaton.norm(hidden).relu())
        digest = step_digest(seed, automaton.level, step)
        fires = independent_fires(digest, start, size, round(0.6 * 2**32))
        state = torch.where(fires, state + change, state)
        state = torch.cat([image, state[:, automaton.in_channels :]], 1)
    return state


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("size", [[1], [2], [3], [6, 7], [9, 1], [13, 4, 12], [1, 2, 3]])
def test_borders_reflect_as_numpy_reflects_them(radius, size):
    state = torch.randn(2, 3, *size)
    expected = np.pad(state.numpy(), [(0, 0)] * 2 + [(radius, radius)] * len(size), mode="reflect")
    assert reflect_pad(state, radius).equal(torch.from_numpy(expected))
    scripted = torch.jit.script(reflect_pad)
    assert scripted(state, radius).equal(torch.from_numpy(expected))


@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_gradients_flow_back_through_reflected_borders(length):
    state = torch.randn(1, 1, length, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reflect_pad(x, 2), state)


def test_a_new_automaton_is_the_identity_on_its_state(spatial_dims, rule, size):
    state = make_state(size)
    assert run(new_automaton(spatial_dims, **rule), state).equal(state)


def test_only_the_last_layer_of_a_new_automaton_is_zero(spatial_dims):
    weights = new_automaton(spatial_dims).named_parameters()
    assert [name for name, weight in weights if not weight.any()] == ["update.weight"]


def test_the_folded_rule_equals_the_rule_layer_by_layer(spatial_dims, rule, size):
    automaton, state = make_automaton(spatial_dims, **rule), make_state(size)
    seed, start = torch.tensor([7, -8]), torch.tensor([[2, 0, 9], [31, 5, 1]])[:, :spatial_dims]
    with torch.no_grad():
        expected = plain_steps(automaton, state, seed, start)
        assert_close(automaton(state, seed, start), expected, rtol=0, atol=1e-12)


def test_image_channels_never_change(spatial_dims, rule, size):
    automaton, state = make_automaton(spatial_dims, **rule), make_state(size)
    after = run(automaton, state)
    assert after[:, :2].equal(state[:, :2])
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
    for fire_rate in (0.1, 0.5, 0.8):
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
