"""What the sections of the model's config have to satisfy; each message names the full key."""

from __future__ import annotations

# Metadata of a field that the config.json of a model may lack: it says nothing about the weights, or every model was
# what its default says before there was the field.
MAY_BE_MISSING = {"may_be_missing": True}


def require_positive(section: str, config: object, *names: str) -> None:
    """Raises ValueError for the first of the whole numbers ``names`` of ``config`` that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}: it must be at least 1")


def require_heads(section: str, heads: int, width_key: str, width: int) -> None:
    """Raises ValueError unless ``width`` can be split evenly among the attention ``heads``, at least one."""
    if heads < 1:
        raise ValueError(f"{section}.heads is {heads}: it must be at least 1")
    if width % heads:
        raise ValueError(f"{width_key} is {width}, not a multiple of {section}.heads, which is {heads}: change one")
