"""Convolutions of the states around cells, dense layers, and the gradients of both, fast."""

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight, conv3d_weight
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

ON_X86 = platform.machine() in ("x86_64", "AMD64")  # elsewhere oneDNN may have no fast 3-D
FEW = 2**22  # multiplications in a product, up to which a call of oneDNN takes longer than MKL's


def as_rows(x: Tensor) -> Tensor:
    """``(B, C, *spatial)`` as ``(N, C)``: a view, where the channels are last in memory."""
    return x.movedim(1, -1).flatten(0, -2)


def neighbourhoods(window: Tensor, cells: Tensor, radius: int, room: Tensor) -> Tensor:
    """Gather what lies around some cells as the rows of a matrix.

    Args:
        window: states, ``(B, C, *padded)``, with the radius on each side, channels last in memory.
        cells: flat positions in ``(B, *padded)``, int64, ``(N,)``.
        radius: of a neighbourhood.
        room: memory for the rows, ``(n,)``, of the window's type; new one is taken if it is small.

    Returns:
        ``(N, (2 * radius + 1)**spatial_dims * C)``, the channels of a neighbour side by side.
    """
    channels, width = window.shape[1], 2 * radius + 1
    firsts = [0]  # of the neighbours in a line, which lie side by side in memory
    for length in window.shape[3:]:
        planes = firsts
        firsts = []
        for plane in planes:
            firsts += [(plane + i) * length for i in range(-radius, radius + 1)]
    lines = (cells.unsqueeze(1) + (torch.tensor(firsts) - radius)).flatten()
    rows = as_rows(window).contiguous()
    rows = rows.as_strided([len(rows) - 2 * radius, width * channels], [channels, 1])
    size = len(lines) * width * channels
    found = room[:size] if len(room) >= size else window.new_empty([size])
    torch.index_select(rows, 0, lines, out=found.view(len(lines), width * channels))
    return found.view(len(cells), len(firsts) * width * channels)


def as_matrix(weight: Tensor) -> Tensor:
    """Kernel ``(out, in, *kernel)`` as the matrix ``(out, -1)`` for `neighbourhoods`."""
    return weight.movedim(1, -1).flatten(1)


def channels_last(x: Tensor) -> Tensor:
    """``(B, C, *spatial)`` with the channels last in memory, faster on CPU and GPU."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last_3d)


def is_traced() -> bool:
    """Whether a compiler or an exporter watches, which needs a plain graph."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return False
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore


def is_fast_in_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether to call oneDNN itself: for small images PyTorch takes slower ways."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return False
    if is_traced() or not ON_X86:
        return False
    mkldnn = torch.backends.mkldnn
    available = mkldnn.is_available() and bool(mkldnn.enabled)  # type: ignore[no-untyped-call]
    return available and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32


def padded_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Dense convolution of ``(B, C, *spatial)``, padded with zeros."""
    dims, weight = x.dim() - 2, channels_last(weight)
    if is_fast_in_onednn(x, weight):
        one = [1] * dims
        return torch.mkldnn_convolution(x, weight, bias, [padding] * dims, one, one, 1)
    function = nn.functional.conv2d if dims == 2 else nn.functional.conv3d
    return function(x, weight, bias, padding=padding)


def turned(weight: Tensor) -> Tensor:
    """Kernel that convolves an output's gradient to the input's: axes swapped, sides flipped."""
    return weight.transpose(0, 1).flip(*range(2, weight.dim()))


def count_operations(x: list[int], weight: list[int], *_: Any, out_shape: list[int]) -> int:
    """Operations of oneDNN's convolution, for PyTorch's counter, which does not know it."""
    operations: int = conv_flop_count(x, weight, out_shape)
    return operations


if torch.ops.aten.mkldnn_convolution not in flop_registry:  # which refuses a second formula
    register_flop_formula(torch.ops.aten.mkldnn_convolution)(count_operations)


def gradient_of_kernel(x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Gradient of the kernel that convolves ``x`` without padding, from that of the output.

    The images are cut in two along their first spatial axis, with what the kernel needs around each
    half, and taken as twice as many: for a single one PyTorch takes a slower way.
    """
    rows, border = gradient.shape[2], shape[2] - 1
    half = (rows + 1) // 2
    halves = torch.cat([x[:, :, : half + border], x[:, :, rows - half :]])
    gradients = torch.cat([gradient[:, :, :half], gradient[:, :, rows - half :]])
    gradients[len(x) :, :, : 2 * half - rows] = 0  # a row in both
    function = conv2d_weight if x.dim() == 4 else conv3d_weight
    of_kernel: Tensor = function(halves, shape, gradients)  # type: ignore[no-untyped-call]
    return of_kernel


class DenseConvolution(torch.autograd.Function):
    """Dense convolution without padding, all sides of the kernel the same odd number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve ``(B, C, *spatial)``."""
        ctx.save_for_backward(x, weight)
        return padded_convolution(x, weight, bias, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of input, kernel and bias."""
        x, weight = ctx.saved_tensors
        width = weight.shape[2]
        of_x = padded_convolution(gradient, turned(weight), None, width - 1)
        rows = as_rows(gradient)
        if width == 1:
            of_weight = (rows.t() @ as_rows(x)).view_as(weight)
        else:
            of_weight = gradient_of_kernel(x, gradient, weight.shape)
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


@torch.jit.unused
def fast_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`DenseConvolution`, hidden from TorchScript."""
    result: Tensor = DenseConvolution.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def dense_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolve ``(B, C, *spatial)`` with ``(out, C, *kernel)``, without padding, in 2-D or 3-D.

    All sides of the kernel are the same odd number.
    """
    if stride == 1 and is_fast_in_onednn(x, weight):
        return fast_dense(x, weight, bias)
    if x.dim() == 4:
        return nn.functional.conv2d(x, weight, bias, stride)
    return nn.functional.conv3d(x, weight, bias, stride)


def exact_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, groups: int = 1
) -> Tensor:
    """Convolve on a GPU without padding: deterministic, and float32 is not rounded to TF32.

    Depthwise convolutions are PyTorch's own: cuDNN's fast ones are of TF32.
    """
    axes = x.dim() - 2
    return torch._convolution(
        x,
        weight,
        bias,
        [stride] * axes,
        [0] * axes,
        [1] * axes,
        transposed=False,
        output_padding=[0] * axes,
        groups=groups,
        benchmark=False,
        deterministic=True,
        cudnn_enabled=groups == 1,
        allow_tf32=False,
    )


def dense_layer(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply ``(N, in)`` with the transpose of ``(out, in)``.

    Large products are convolutions by oneDNN: on AMD's processors MKL takes twice the time.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return nn.functional.linear(rows, weight, bias)
    if rows.numel() * weight.shape[0] > FEW and is_fast_in_onednn(rows, weight):
        image = rows[None, None].movedim(-1, 1)  # a line of N cells
        return fast_dense(image, weight[:, :, None, None], bias).squeeze((0, 2)).t()
    return nn.functional.linear(rows, weight, bias)


class GatheredConvolution(torch.autograd.Function):
    """Dense convolution of some cells of a window, on the CPU.

    The gradient of the window is the convolution of theirs, on a grid of zeros, with the turned
    kernel: faster than adding to the neighbours of each cell.
    """

    @staticmethod
    def forward(
        ctx: Any, window: Tensor, weight: Tensor, cells: Tensor, count: int, room: Tensor
    ) -> Tensor:
        """Convolve the neighbourhoods of ``cells``, as `neighbourhoods` has them."""
        rows = neighbourhoods(window, cells, weight.shape[2] // 2, room)
        ctx.save_for_backward(weight, cells[:count], rows)
        ctx.shape = window.shape
        return dense_layer(rows, as_matrix(weight), None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Gradients of window and kernel."""
        weight, cells, rows = ctx.saved_tensors
        out, channels, *kernel = weight.shape
        of_weight = (gradient.t() @ rows).view(out, *kernel, channels).movedim(-1, 1)
        batch, _, *size = ctx.shape
        grid = gradient.new_zeros(batch, *size, out)
        grid.view(-1, out).index_copy_(0, cells, gradient[: len(cells)])
        of_window = padded_convolution(grid.movedim(-1, 1), turned(weight), None, kernel[0] // 2)
        return of_window, of_weight, None, None, None


class GatheredCells(torch.autograd.Function):
    """Rows of a matrix; their gradient is written, not added, as none recurs but to fill up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cells: Tensor, count: int) -> Tensor:
        """Gather the rows ``cells``, the first ``count`` of which are different."""
        ctx.save_for_backward(cells[:count])
        ctx.shape = rows.shape
        return rows.index_select(0, cells)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of all rows; PyTorch's own allows for rows that recur, which takes longer."""
        (cells,) = ctx.saved_tensors
        of_rows = gradient.new_zeros(ctx.shape)
        return of_rows.index_copy_(0, cells, gradient[: len(cells)]), None, None


class DepthwiseConvolution(torch.autograd.Function):
    """3-D depthwise convolution; both of its gradients are depthwise convolutions as well.

    The gradient of the input convolves that of the output with the turned kernel, the gradient of
    the kernel convolves the input with that of the output. PyTorch's own backward pass takes about
    ten times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve ``(B, C, *spatial)`` with ``(C, 1, *kernel)``, without padding."""
        ctx.save_for_backward(x, weight)
        return nn.functional.conv3d(x, weight, groups=len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of input and kernel."""
        x, weight = ctx.saved_tensors
        groups, reach = len(weight), [n - 1 for n in weight.shape[2:]]
        of_x = nn.functional.conv3d(gradient, weight.flip(2, 3, 4), padding=reach, groups=groups)
        of_weight = torch.zeros_like(weight).transpose(0, 1)
        for i in range(len(x)):
            kernel = gradient[i : i + 1].transpose(0, 1)
            of_weight += nn.functional.conv3d(x[i : i + 1], kernel, groups=groups)
        return of_x, of_weight.transpose(0, 1)


@torch.jit.unused
def fast_gathered(
    window: Tensor, weight: Tensor, cells: Tensor, count: int, room: Tensor
) -> Tensor:
    """`GatheredConvolution`, hidden from TorchScript."""
    result: Tensor = GatheredConvolution.apply(window, weight, cells, count, room)  # type: ignore[no-untyped-call]
    return result


@torch.jit.unused
def fast_gathered_cells(rows: Tensor, cells: Tensor, count: int) -> Tensor:
    """`GatheredCells`, hidden from TorchScript."""
    result: Tensor = GatheredCells.apply(rows, cells, count)  # type: ignore[no-untyped-call]
    return result


@torch.jit.unused
def fast_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """`DepthwiseConvolution`, hidden from TorchScript."""
    result: Tensor = DepthwiseConvolution.apply(x, weight)  # type: ignore[no-untyped-call]
    return result


def gathered_cells(rows: Tensor, cells: Tensor, count: int) -> Tensor:
    """Gather some rows of a matrix, with a fast gradient.

    Args:
        rows: ``(M, C)``.
        cells: which ones, int64, ``(N,)``.
        count: how many of them there are; the rest only fills up and is to be dropped.

    Returns:
        ``(N, C)``.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return rows.index_select(0, cells)
    return fast_gathered_cells(rows, cells, count)


def gathered_convolution(
    window: Tensor, weight: Tensor, cells: Tensor, count: int, room: Tensor
) -> Tensor:
    """Convolve the neighbourhoods of some cells only, on the CPU.

    Args:
        window: states, ``(B, C, *padded)``, with the kernel's radius on each side, channels last in
            memory; of the dtype of ``weight``, also under autocast.
        weight: ``(out, C, *kernel)``, all sides of the kernel the same odd number.
        cells: flat positions in ``(B, *padded)``, int64, ``(N,)``.
        count: how many of them there are; the rest only fills up and is to be dropped.
        room: as in `neighbourhoods`; not to be written to before the backward pass.

    Returns:
        ``(N, out)``.
    """
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        rows = neighbourhoods(window, cells, weight.shape[2] // 2, room)
        return dense_layer(rows, as_matrix(weight), None)
    return fast_gathered(window, weight, cells, count, room)


def depthwise_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each channel of ``(B, C, *spatial)`` with its own kernel, without padding.

    Args:
        x: 2-D or 3-D, of the dtype of ``weight``, also under autocast.
        weight: ``(C, 1, *kernel)``.
    """
    if x.dim() == 4:
        return nn.functional.conv2d(x, weight, groups=weight.shape[0])
    scripting = torch.jit.is_scripting()  # type: ignore[attr-defined]
    if not scripting and x.device.type == "cpu":
        return fast_depthwise(x, weight)
    return nn.functional.conv3d(x, weight, groups=weight.shape[0])
