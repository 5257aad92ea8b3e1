"""Mirrored borders, their adjoint, blocks, and finer cells."""

import numpy as np
import pytest
import torch

from mednca_monai.grid import (
    Block,
    Coarse,
    blocks,
    enlarge,
    interior,
    reflect,
    reflect_pad,
    unreflect,
)


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


@pytest.mark.parametrize("radius", [0, 1, 3])
@pytest.mark.parametrize("size", [[1, 2], [6, 7], [3, 1, 4]])
def test_a_border_made_in_place_is_the_same(radius, size):
    state = torch.randn(2, 3, *size)
    padded = torch.full([2, 3, *(n + 2 * radius for n in size)], 9.0)
    interior(padded, radius).copy_(state)
    reflect(padded, radius)
    assert padded.equal(reflect_pad(state, radius))


@pytest.mark.parametrize("radius", [0, 1, 3])
@pytest.mark.parametrize("size", [[1, 2], [6, 7], [3, 1, 4]])
def test_unreflecting_is_the_adjoint_of_reflecting(radius, size):
    state = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn([2, 3, *(n + 2 * radius for n in size)], dtype=torch.float64)
    (reflect_pad(state, radius) * gradient).sum().backward()
    unreflect(gradient, radius)
    assert torch.allclose(interior(gradient, radius), state.grad, rtol=0, atol=1e-12)
    interior(gradient, radius).zero_()
    assert not gradient.any()


@pytest.mark.parametrize("shape", [[1, 2, 1, 1], [5, 2, 7, 3], [3, 2, 9, 4, 5]])
@pytest.mark.parametrize("radius", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("cells", [1, 10, 60, 10**6])
def test_blocks_cover_every_row_once_and_are_no_lower_than_the_radius(shape, radius, cells):
    count = torch.zeros(shape[0], shape[2])
    for block in blocks(shape, radius, cells):
        count[block.item : block.item + block.items, block.row : block.row + block.rows] += 1
        assert block.row % 2 == 0
        assert block.rows >= radius or block.row + block.rows == shape[2]
    assert count.eq(1).all()


def test_a_finer_cell_is_a_copy_of_the_coarse_one_that_stands_for_it():
    coarse = Coarse(torch.tensor([[1.0, 2.0]])[None, None], [2, 3], [[0, 0]])
    cells = enlarge(coarse, Block(item=0, items=1, row=0, rows=2), [2, 5])
    assert cells[0, 0].tolist() == [[1, 1, 1, 2, 2]] * 2


@pytest.mark.parametrize("block", [(0, 3, 0, 5), (1, 2, 3, 2), (2, 1, 1, 1)])
@pytest.mark.parametrize("starts", [[[0, 0, 0]], [[4, 1, 0]], [[0, 2, 1], [3, 0, 0], [4, 1, 3]]])
def test_a_block_of_finer_cells_has_its_own_place_in_each_item(starts, block):
    cells = torch.randn(3, 2, 3, 4, 8)
    item, items, row, rows = block
    found = enlarge(Coarse(cells, [3, 2, 1], starts), Block(*block), [5, 6, 4])
    assert found.shape == (items, 2, rows, 6, 4)
    whole = cells.numpy().repeat(3, 2).repeat(2, 3)
    for i, cells in enumerate(found, item):
        a, b, c = starts[i % len(starts)]
        expected = whole[i, :, a + row : a + row + rows, b : b + 6, c : c + 4]
        assert cells.equal(torch.from_numpy(expected))
