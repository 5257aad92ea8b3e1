"""Weights of the papers' released code, turned into ours."""

from collections.abc import Mapping, Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor


def channel_first_axes(kernel: Tensor) -> Tensor:
    """Turn the spatial axes of a released kernel, ``(C, C / groups, *spatial)``, into ours.

    The released code brings the channels of ``(B, *spatial, C)`` to the front by swapping them with
    the first spatial axis, which its kernels therefore see last.
    """
    return kernel.movedim(-1, 2)


def check_levels(levels: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise ValueError where the weights do not make up one network, all levels alike."""
    if not levels:
        raise ValueError("`levels` must hold the weights of at least one level, got none.")
    dense, norm = (any(name in level for level in levels) for name in ("p1.weight", "bn.weight"))
    modules = ["p0", "fc0"] + ["p1"] * dense + ["bn"] * norm
    names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    names.add("fc1.weight")
    for number, level in enumerate(levels):
        for name in sorted(names.symmetric_difference(level)):
            rule = "all" if name in names else "not"
            raise ValueError(
                f"`levels` must {rule} hold {name!r}, got {sorted(level)} on level {number}."
            )
    channels, hidden_size = levels[0]["p0.bias"].numel(), levels[0]["fc0.bias"].numel()
    axes = levels[0]["p0.weight"].dim()
    if axes not in (4, 5):
        raise ValueError(f"`levels` must hold 'p0.weight' with 4 or 5 axes, got {axes} of them.")
    for number, level in enumerate(levels):
        width = list(level["p0.weight"].shape[-1:])
        kernel = [channels, channels if dense else 1] + width * (axes - 2)
        shapes = {
            "p0.weight": kernel,
            "p0.bias": [channels],
            "p1.weight": kernel,
            "p1.bias": [channels],
            "fc0.weight": [hidden_size, (3 if dense else 2) * channels],
            "fc1.weight": [channels, hidden_size],
        }
        for name, weight in level.items():
            shape = shapes.get(name, [hidden_size])
            if list(weight.shape) != shape:
                raise ValueError(
                    f"`levels` must hold {name!r} of shape {shape}, "
                    f"got {list(weight.shape)} on level {number}."
                )


def convert_reference_state_dict(levels: Sequence[Mapping[str, ArrayLike]]) -> dict[str, Tensor]:
    """Turn the released per-level weights of Med-NCA or M3D-NCA into a `MedNCA` state dict.

    ``fire_rate`` is no weight: it is the probability of an update here, and of none in the released
    code.

    Args:
        levels: one mapping per level, coarse to fine, of tensors or arrays: ``fc0.weight`` (hidden
            size, perceived channels), ``fc0.bias``, ``fc1.weight`` (C, hidden size) and the
            perceiving convolutions ``p0.weight``, ``p0.bias``; in Med-NCA also ``p1``, in M3D-NCA
            the batch norm ``bn``.

    Returns:
        For `MedNCA.load_state_dict`.

    Raises:
        ValueError: where a level lacks a weight, has one that is not known, or one whose shape does
            not fit the others.

    Example:
        >>> level = {"p0.weight": torch.rand(8, 1, 3, 3, 3), "p0.bias": torch.rand(8)}
        >>> level |= {"fc0.weight": torch.rand(64, 16), "fc0.bias": torch.rand(64)}
        >>> level |= {"fc1.weight": torch.rand(8, 64)}
        >>> tuple(convert_reference_state_dict([level])["levels.0.hidden.weight"].shape)
        (64, 16, 1, 1, 1)
    """
    weights = [{name: torch.as_tensor(w) for name, w in level.items()} for level in levels]
    check_levels(weights)
    state_dict: dict[str, Tensor] = {}
    for number, level in enumerate(weights):
        kernels = [level[name] for name in ("p0.weight", "p1.weight") if name in level]
        biases = [level[name] for name in ("p0.bias", "p1.bias") if name in level]
        singletons = [1] * (kernels[0].dim() - 2)
        converted = {
            "perception.weight": channel_first_axes(torch.cat(kernels)),
            "perception.bias": torch.cat(biases),
            "hidden.weight": level["fc0.weight"].reshape(*level["fc0.weight"].shape, *singletons),
            "hidden.bias": level["fc0.bias"],
            "update.weight": level["fc1.weight"].reshape(*level["fc1.weight"].shape, *singletons),
        }
        for kind in ("weight", "bias"):
            if f"bn.{kind}" in level:
                converted[f"norm.{kind}"] = level[f"bn.{kind}"]
        state_dict |= {f"levels.{number}.{name}": weight for name, weight in converted.items()}
    return state_dict
