"""A step of an automaton on an NVIDIA GPU as Triton kernels, forward and backward; see `fused`.

A program of a kernel takes some cells through perception, hidden layer and update, which forward do
not pass through the GPU's memory. Cells are counted through a whole batch, whose states are
``(B, *spatial, C)``; a 2-D image is of depth 1. Products are of the weights' dtype, bfloat16 or
float16; states and what products add up to are float32. Widths are filled up to powers of two.

- ``states``, ``upstream``, ``downstream``: states and gradients after and before a step;
- ``perception``, ``hidden``, ``bias``, ``update``: of `fused.packed`;
- ``draws``, ``starts``, ``threshold``: of `fused.Steps`;
- ``taps``: places in a neighbourhood of ``dims`` axes and ``radius``;
- ``channels``: of a state, ``padded``: their number filled up; ``around``: what a cell perceives;
  ``hidden_size``: of the hidden layer;
- ``block``: cells of a program.
"""

import triton
import triton.language as tl


@triton.jit
def mirrored(position, length):
    """Cell of an axis that a position stands for, less than ``length`` beyond its ends."""
    return length - 1 - tl.abs(length - 1 - tl.abs(position))


@triton.jit
def extended(position, length, radius, way: tl.constexpr):
    """Position itself (0), or that of its mirror image before (1) or after the axis (2).

    Returns:
        The position and whether there is one.
    """
    if way == 1:
        return -position, (position >= 1) & (position <= radius)
    if way == 2:
        last = length - 1
        return 2 * last - position, (position >= last - radius) & (position < last)
    return position, position >= 0


@triton.jit
def absorb(digest, word):
    """As `mednca_monai.firing.absorb`, of unsigned 32-bit integers."""
    x = (digest ^ word.to(tl.uint32)) + 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def positions(cells, depth, height, width):
    """Item and place of cells, counted through the whole batch; a 2-D image is of depth 1."""
    rows = cells // width
    planes = rows // height
    return planes // depth, planes % depth, rows % height, cells % width


@triton.jit
def fires(
    draws,
    starts,
    threshold,
    place,
    depth,
    height,
    is_inside,
    dims: tl.constexpr,
    sublattices: tl.constexpr,
):
    """Whether cells fire, as `mednca_monai.firing` has it.

    ``draws`` points to what a step has of `row_digests` or, for sublattices, `drawn_sublattices`.
    """
    item, z, y, x = place
    first = starts + item * dims
    x += tl.load(first + dims - 1, mask=is_inside, other=0)
    if sublattices:
        y += tl.load(first + dims - 2, mask=is_inside, other=0)
        number = (y & 1) + 2 * (x & 1)
        if dims == 3:
            z += tl.load(first, mask=is_inside, other=0)
            number = (z & 1) + 2 * number
        return tl.load(draws + number, mask=is_inside, other=0) != 0
    if dims == 3:
        digest = tl.load(draws + item * depth + z, mask=is_inside, other=0).to(tl.uint32)
        digest = absorb(digest, y + tl.load(first + 1, mask=is_inside, other=0))
    else:
        digest = tl.load(draws + item * height + y, mask=is_inside, other=0).to(tl.uint32)
    return absorb(digest, x).to(tl.int64) < threshold


@triton.jit
def neighbours(place, tap, depth, height, width, dims: tl.constexpr, radius: tl.constexpr):
    """Cells that lie at place ``tap`` of the neighbourhood, beyond the border mirrored."""
    item, z, y, x = place
    side: tl.constexpr = 2 * radius + 1
    x = mirrored(x + tap % side - radius, width)
    y = mirrored(y + tap // side % side - radius, height)
    if dims == 3:
        z = mirrored(z + tap // (side * side) - radius, depth)
    return ((item * depth + z) * height + y) * width + x


@triton.jit
def load(states, cells, is_inside, channels: tl.constexpr, padded: tl.constexpr):
    """Rows of cells, ``(N, channels)``, filled up with zeros to ``(N, padded)``."""
    channel = tl.arange(0, padded)[None, :]
    places = states + cells.to(tl.int64)[:, None] * channels + channel
    return tl.load(places, mask=is_inside[:, None] & (channel < channels), other=0.0)


@triton.jit
def store(
    rows,
    cells,
    values,
    is_inside,
    channels: tl.constexpr,
    stride: tl.constexpr,
    padded: tl.constexpr,
):
    """Write the first ``channels`` of ``(N, padded)`` to rows that are ``stride`` apart."""
    channel = tl.arange(0, padded)[None, :]
    places = rows + cells.to(tl.int64)[:, None] * stride + channel
    tl.store(places, values, mask=is_inside[:, None] & (channel < channels))


@triton.jit
def rectified(x):
    """Negative numbers to zero; NaN stays."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def matrix(weights, rows: tl.constexpr, columns: tl.constexpr):
    """Matrix ``(rows, columns)`` in memory."""
    return tl.load(weights + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :])


@triton.jit
def perceive(
    states,
    perception,
    hidden,
    bias,
    place,
    depth,
    height,
    width,
    is_inside,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    hidden_size: tl.constexpr,
    block: tl.constexpr,
):
    """State of cells, what they perceive, in the products' dtype, and the hidden layer's sums."""
    dtype: tl.constexpr = perception.dtype.element_ty
    perceived = tl.zeros([block, around], tl.float32)
    for tap in range(taps):
        cells = neighbours(place, tap, depth, height, width, dims, radius)
        state = load(states, cells, is_inside, channels, padded).to(dtype)
        weight = matrix(perception + tap * padded * around, padded, around)
        perceived = tl.dot(state, weight, perceived)
    perceived = perceived.to(dtype)
    cells = neighbours(place, taps // 2, depth, height, width, dims, radius)
    state = load(states, cells, is_inside, channels, padded)
    sums = (
        tl.zeros([block, hidden_size], tl.float32)
        + tl.load(bias + tl.arange(0, hidden_size))[None, :]
    )
    own = matrix(hidden, padded, hidden_size)
    sums = tl.dot(state.to(dtype), own, sums)
    other = matrix(hidden + padded * hidden_size, around, hidden_size)
    sums = tl.dot(perceived, other, sums)
    return state, perceived, sums


@triton.jit
def advance_kernel(
    states,
    after,
    perception,
    hidden,
    bias,
    update,
    draws,
    starts,
    threshold,
    count,
    depth,
    height,
    width,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    hidden_size: tl.constexpr,
    sublattices: tl.constexpr,
    block: tl.constexpr,
):
    """States after a step."""
    cells = tl.program_id(0) * block + tl.arange(0, block)
    is_inside = cells < count
    place = positions(cells, depth, height, width)
    state, _, sums = perceive(
        states, perception, hidden, bias, place, depth, height, width, is_inside,
        dims, radius, taps, channels, padded, around, hidden_size, block,
    )  # fmt: skip
    layer = rectified(sums).to(perception.dtype.element_ty)
    change = tl.dot(layer, matrix(update, hidden_size, padded))
    fire = fires(draws, starts, threshold, place, depth, height, is_inside, dims, sublattices)
    state = tl.where(fire[:, None], state + change, state)
    store(after, cells, state, is_inside, channels, channels, padded)


@triton.jit
def retreat_kernel(
    states,
    upstream,
    downstream,
    of_around,
    features,
    of_sums,
    layers,
    changes,
    perception,
    hidden,
    bias,
    update,
    draws,
    starts,
    threshold,
    count,
    depth,
    height,
    width,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    hidden_size: tl.constexpr,
    sublattices: tl.constexpr,
    block: tl.constexpr,
):
    """Gradients of what cells perceive and, by all other ways, of their states.

    The dense layers' gradients are products of what else it writes: features, gradients of the
    hidden layer's sums, hidden layers, changes.
    """
    dtype: tl.constexpr = perception.dtype.element_ty
    cells = tl.program_id(0) * block + tl.arange(0, block)
    is_inside = cells < count
    place = positions(cells, depth, height, width)
    state, perceived, sums = perceive(
        states, perception, hidden, bias, place, depth, height, width, is_inside,
        dims, radius, taps, channels, padded, around, hidden_size, block,
    )  # fmt: skip
    store(features, cells, state.to(dtype), is_inside, padded, padded + around, padded)
    store(features + padded, cells, perceived, is_inside, around, padded + around, around)
    store(
        layers, cells, rectified(sums).to(dtype), is_inside, hidden_size, hidden_size, hidden_size
    )
    fire = fires(draws, starts, threshold, place, depth, height, is_inside, dims, sublattices)
    gradient = load(upstream, cells, is_inside, channels, padded)
    change = tl.where(fire[:, None], gradient, 0.0).to(dtype)
    store(changes, cells, change, is_inside, padded, padded, padded)
    of_sum = tl.dot(change, tl.trans(matrix(update, hidden_size, padded)))
    of_sum = tl.where(sums <= 0.0, 0.0, of_sum).to(dtype)
    store(of_sums, cells, of_sum, is_inside, hidden_size, hidden_size, hidden_size)
    gradient = tl.dot(of_sum, tl.trans(matrix(hidden, padded, hidden_size)), gradient)
    store(downstream, cells, gradient, is_inside, channels, channels, padded)
    weight = tl.trans(matrix(hidden + padded * hidden_size, around, hidden_size))
    gradient = tl.dot(of_sum, weight).to(dtype)
    store(of_around, cells, gradient, is_inside, around, around, around)


@triton.jit
def retreat_to_perception_kernel(
    states,
    of_around,
    of_perception,
    count,
    depth,
    height,
    width,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    block: tl.constexpr,
):
    """Gradient of the perception's weights at one place of the neighbourhood."""
    program, tap = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = of_around.dtype.element_ty
    sums = tl.zeros([padded, around], tl.float32)
    for first in range(program * block, count, tl.num_programs(0) * block):
        cells = first + tl.arange(0, block)
        is_inside = cells < count
        gradient = load(of_around, cells, is_inside, around, around)
        place = positions(cells, depth, height, width)
        cells = neighbours(place, tap, depth, height, width, dims, radius)
        state = load(states, cells, is_inside, channels, padded).to(dtype)
        sums = tl.dot(tl.trans(state), gradient, sums)
    rows = (program * taps + tap) * padded + tl.arange(0, padded)
    channel = tl.arange(0, around)
    places = of_perception + rows[:, None] * around + channel[None, :]
    tl.store(places, tl.load(places) + sums)


@triton.jit
def retreat_to_states_kernel(
    of_around,
    downstream,
    perception,
    count,
    depth,
    height,
    width,
    dims: tl.constexpr,
    radius: tl.constexpr,
    taps: tl.constexpr,
    channels: tl.constexpr,
    padded: tl.constexpr,
    around: tl.constexpr,
    block: tl.constexpr,
):
    """Add the gradient of the states that were perceived, by their cells and mirror images."""
    cells = tl.program_id(0) * block + tl.arange(0, block)
    is_inside = cells < count
    item, z, y, x = positions(cells, depth, height, width)
    side: tl.constexpr = 2 * radius + 1
    sums = load(downstream, cells, is_inside, channels, padded)
    for way_z in tl.static_range(3 if dims == 3 else 1):
        for way_y in tl.static_range(3):
            for way_x in tl.static_range(3):
                z0, is_z = extended(z, depth, radius, way_z)
                y0, is_y = extended(y, height, radius, way_y)
                x0, is_x = extended(x, width, radius, way_x)
                is_any = is_inside & is_z & is_y & is_x
                if tl.max(is_any.to(tl.int32), 0) > 0:
                    for tap in range(taps):
                        x1 = x0 - tap % side + radius
                        y1 = y0 - tap // side % side + radius
                        z1 = z0
                        if dims == 3:
                            z1 = z0 - tap // (side * side) + radius
                        here = is_any & (x1 >= 0) & (x1 < width) & (y1 >= 0) & (y1 < height)
                        here = here & (z1 >= 0) & (z1 < depth)
                        source = ((item * depth + z1) * height + y1) * width + x1
                        gradient = load(of_around, source, here, around, around)
                        weight = matrix(perception + tap * padded * around, padded, around)
                        weight = tl.trans(weight)
                        sums = tl.dot(gradient, weight, sums)
    store(downstream, cells, sums, is_inside, channels, channels, padded)


@triton.jit
def probe_kernel(number):
    """Write a number: shows whether Triton compiles and starts kernels."""
    tl.store(number, 1.0)
