"""INT4 scale groups: making them smaller without changing a value."""

from __future__ import annotations

import torch

from sglang_w4afp8.errors import ConfigError


def resize_group_scale(scale: torch.Tensor, group_size: int, new_group_size: int) -> torch.Tensor:
    """Scales of the same INT4 weight under smaller groups: repetition along K.

    Args:
        scale: ``(..., K/group_size)``, any dtype.
        group_size: codes per scale now.
        new_group_size: must divide ``group_size``.

    Returns:
        ``(..., K/new_group_size)``, same dtype.

    Raises:
        ConfigError: the new size does not divide the old one.
    """
    if new_group_size <= 0 or group_size % new_group_size:
        raise ConfigError(
            f"groups of {group_size} to be cut into {new_group_size}",
            "only a divisor keeps each new group inside one old group; coarser or shifted groups "
            "would need requantisation",
            [f"--group-size {group_size // 2}"],
        )
    if new_group_size == group_size:
        return scale
    return scale.repeat_interleave(group_size // new_group_size, dim=-1).contiguous()
