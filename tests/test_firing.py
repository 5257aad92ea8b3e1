"""Fire masks: the published formula bit for bit, and the statistics that training relies on."""

from itertools import combinations, pairwise, product

import pytest
import torch

from mednca_monai.firing import (
    absorb,
    drawn_sublattices,
    independent_fires,
    row_digests,
    step_digests,
    sublattice_fires,
    sublattice_firsts,
)

HALF = 2**31
SEEDS = [0, 1, 7, -1, -(2**40) - 3, 2**32, 2**62 + 5]


def plain_absorb(digest, word):
    """The docstring's formula on Python's unbounded integers."""
    x = ((digest ^ word) + 0x9E3779B9) % 2**32
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ (x >> 15)


def plain_digest(*words):
    digest = 0
    for word in words:
        digest = plain_absorb(digest, word)
    return digest


def plain_words(seed, level, step):
    """What a step's digest absorbs; Python's modulo reads a negative seed as two's complement."""
    return seed % 2**32, seed // 2**32 % 2**32, level, step


def fires_at(digests, start, size, threshold=HALF):
    """Mask of the last of some steps."""
    rows = row_digests(digests, start[:, 0], size[0])[-1]
    return independent_fires(rows, start[:, 1:], size[1:], threshold)


def independent(seed, level, step, size, threshold=HALF):
    start = torch.zeros(1, len(size), dtype=torch.int64)
    return fires_at(step_digests(torch.tensor([seed]), level, step + 1), start, size, threshold)


def sublattices(seed, level, step, size):
    start = torch.zeros(1, len(size), dtype=torch.int64)
    digest = step_digests(torch.tensor([seed]), level, step + 1)[step]
    return sublattice_fires(drawn_sublattices(digest, len(size))[0], start, size)


def drawn(mask):
    return ["".join("#" if fires else "." for fires in row) for row in mask]


def correlation(a, b):
    """Correlation times the root of the count, which is standard normal where there is none."""
    a, b = (x.double().flatten() - x.double().mean() for x in (a, b))
    return float((a * b).sum() / (a.norm() * b.norm()) * len(a) ** 0.5)


def test_absorbing_equals_the_formula_on_plain_integers():
    words = torch.randint(2**32, (2, 1000))
    words[:, :4] = torch.tensor([[0, 0, 2**32 - 1, 2**32 - 1], [0, 2**32 - 1, 0, 2**32 - 1]])
    expected = [plain_absorb(*pair) for pair in words.T.tolist()]
    assert absorb(words[0], words[1]).tolist() == expected


@pytest.mark.parametrize(
    ("seed", "level", "step", "digest"),
    [
        (0, 0, 0, 0x7F889C4E),
        (7, 1, 63, 0x5A35EC0D),
        (-1, 0, 5, 0x6191ABD0),
        (2**32, 2, 9, 0xF971AA9F),
    ],
)
def test_the_digest_of_a_step_has_known_values(seed, level, step, digest):
    assert int(step_digests(torch.tensor([seed]), level, step + 1)[step]) == digest


def test_masks_have_known_values():
    assert drawn(independent(7, 1, 3, [4, 12])[0, 0]) == [
        ".####.....##",
        "###.##.#....",
        "#..#..##...#",
        "#...#.#.#..#",
    ]
    assert drawn(sublattices(7, 1, 3, [3, 6])[0, 0]) == [".#.#.#", "#.#.#.", ".#.#.#"]
    assert drawn(sublattices(3, 0, 1, [3, 6])[0, 0]) == ["#.#.#.", "#.#.#.", "#.#.#."]


@pytest.mark.parametrize("starts", [[[0, 0, 0]], [[5, 1, 1000]], [[3, 2, 1], [0, 70000, 4]]])
def test_a_cell_fires_where_the_digest_of_its_position_is_below_the_threshold(spatial_dims, starts):
    size, threshold = [4, 3, 5][:spatial_dims], round(0.3 * 2**32)
    start = torch.tensor(starts)[:, :spatial_dims]
    for seed, level, step in product(SEEDS, (0, 2), (0, 63)):
        seeds = torch.tensor([seed, 123][: len(start)])
        fires = fires_at(step_digests(seeds, level, step + 1), start, size, threshold)
        assert fires.shape == (len(start), 1, *size)
        for item, cell in product(range(len(start)), product(*map(range, size))):
            position = [a + i for a, i in zip(start[item].tolist(), cell, strict=True)]
            digest = plain_digest(*plain_words(int(seeds[item]), level, step), *position)
            assert bool(fires[(item, 0, *cell)]) == (digest < threshold)


def test_one_seed_serves_a_batch_of_places(spatial_dims):
    start = torch.tensor([[3, 2, 1], [0, 9, 4]])[:, :spatial_dims]
    digests = step_digests(torch.tensor([5]), 0, 1)
    fires = fires_at(digests, start, [4] * spatial_dims)
    for item, place in zip(fires, start, strict=True):
        assert item.equal(fires_at(digests, place[None], [4] * spatial_dims)[0])


@pytest.mark.parametrize("fire_rate", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_fraction_that_fires_is_the_fire_rate(spatial_dims, fire_rate):
    size = [256, 256] if spatial_dims == 2 else [40, 40, 40]
    for seed, step in product(SEEDS, range(3)):
        fires = independent(seed, 0, step, size, round(fire_rate * 2**32)).double()
        deviation = (fire_rate * (1 - fire_rate) / fires.numel()) ** 0.5
        assert abs(float(fires.mean()) - fire_rate) < 4 * deviation


def test_all_cells_fire_at_a_fire_rate_of_one_and_none_at_zero(spatial_dims):
    assert independent(3, 0, 0, [32] * spatial_dims, 2**32).all()
    assert not independent(3, 0, 0, [32] * spatial_dims, 0).any()


def test_neighbours_fire_independently_of_each_other(spatial_dims):
    size = [256, 256] if spatial_dims == 2 else [40, 40, 40]
    for seed, axis, distance in product(SEEDS, range(2, 2 + spatial_dims), (1, 2, 4, 16)):
        fires = independent(seed, 1, 2, size)
        length = fires.shape[axis] - distance
        a, b = fires.narrow(axis, 0, length), fires.narrow(axis, distance, length)
        assert abs(correlation(a, b)) < 4.5


def test_steps_levels_and_seeds_fire_independently_of_each_other(spatial_dims):
    size = [128, 128] if spatial_dims == 2 else [25, 25, 25]
    keys = [(seed, 0, 0) for seed in SEEDS] + [(0, 0, step) for step in (1, 2, 64)]
    keys += [(0, level, 0) for level in (1, 2)] + [(0, 1, 1), (1, 1, 0), (1, 0, 1)]
    keys += [(-2, 0, 0), (1 + 2**32, 0, 0), (-(2**63), 0, 0), (2**63 - 1, 0, 0)]
    masks = [independent(*key, size) for key in keys]
    for a, b in combinations(masks, 2):
        assert abs(correlation(a, b)) < 4.5


def test_the_sublattices_with_the_smallest_draws_fire(spatial_dims):
    size, half = [4, 3, 5][:spatial_dims], 2**spatial_dims // 2
    start = torch.tensor([[5, 2, 8], [0, 1, 3]])[:, :spatial_dims]
    for seed, step in product(SEEDS, range(5)):
        digest = step_digests(torch.tensor([seed]), 1, step + 1)[step]
        fires = sublattice_fires(drawn_sublattices(digest, spatial_dims)[0], start, size)
        words = plain_words(seed, 1, step)
        draws = [plain_digest(*words, number) for number in range(2**spatial_dims)]
        for item, cell in product(range(2), product(*map(range, size))):
            parities = [(a + i) % 2 for a, i in zip(start[item].tolist(), cell, strict=True)]
            number = sum(parity * 2**axis for axis, parity in enumerate(parities))
            assert bool(fires[(item, 0, *cell)]) == (draws[number] in sorted(draws)[:half])


def test_the_first_cells_of_sublattices_lie_where_their_masks_begin(spatial_dims):
    drawn = drawn_sublattices(step_digests(torch.tensor([7]), 1, 9)[:, 0], spatial_dims)
    for start in (torch.tensor([place]) for place in product([2, 3], repeat=spatial_dims)):
        for step, firsts in enumerate(sublattice_firsts(drawn, start[0] & 1)):
            fires = sublattice_fires(drawn[step], start, [2] * spatial_dims)
            assert sorted(firsts) == fires[0, 0].nonzero().tolist()


def test_exactly_half_of_the_sublattices_fire_each_half_equally_often(spatial_dims):
    counts = {half: 0 for half in combinations(range(2**spatial_dims), 2 ** (spatial_dims - 1))}
    expected = 20
    for step in range(expected * len(counts)):
        fires = sublattices(-5, 1, step, [2] * spatial_dims).flatten()
        counts[tuple(fires.nonzero().flatten().tolist())] += 1
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = len(counts) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_half_of_an_even_number_of_cells_fires_and_nearly_half_of_an_odd_one(spatial_dims):
    for step in range(20):
        assert float(sublattices(3, 0, step, [6, 4, 8][:spatial_dims]).double().mean()) == 0.5
        odd = sublattices(3, 0, step, [25, 31, 27][:spatial_dims]).double().mean()
        assert abs(float(odd) - 0.5) < 0.05


def test_sublattices_fire_independently_of_other_steps_levels_and_seeds(spatial_dims):
    def series(seed, level, count=200):
        size = [2] * spatial_dims
        return torch.stack([sublattices(seed, level, step, size) for step in range(count)])

    runs = [series(*key) for key in ((0, 0), (0, 1), (1, 0), (-1, 0), (2**32, 0))]
    for run in runs:
        assert abs(correlation(run[1:], run[:-1])) < 4.5
    for a, b in combinations(runs, 2):
        assert abs(correlation(a, b)) < 4.5
    assert not any(a.equal(b) for a, b in pairwise(runs))
