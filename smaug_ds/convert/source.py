"""A state dict that remembers what was taken from it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor


class Source:
    """A state dict, or the part of it under a prefix, that remembers what was taken."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        # the oldest BERT weights call a norm's weight gamma and its bias beta
        self._weights = {
            re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", key)): (key, value)
            for key, value in weights.items()
        }
        self._prefix = ""
        self._taken: set[str] = set()

    def inside(self, prefix: str) -> Source:
        """The part under ``prefix``; the whole where nothing is: a part is also published alone."""
        part = Source({})
        part._weights, part._taken, part._prefix = self._weights, self._taken, self._prefix
        if any(key.startswith(self._prefix + prefix) for key in self._weights):
            part._prefix += prefix
        return part

    def has(self, key: str) -> bool:
        return self._prefix + key in self._weights

    def peek(self, key: str) -> Tensor:
        """A weight that stays unused. Raises ValueError when it is missing."""
        if not self.has(key):
            raise ValueError(f"the weights have no {self._prefix}{key}: they hold {some(self._weights)}")
        return self._weights[self._prefix + key][1]

    def take(self, key: str) -> Tensor:
        value = self.peek(key)
        self._taken.add(self._prefix + key)
        return value

    def get(self, key: str) -> Tensor | None:
        return self.take(key) if self.has(key) else None

    def drop_copy(self, key: str, of: Tensor) -> None:
        """Counts ``key`` as used where it only repeats ``of``, as tied weights do."""
        if self.has(key) and (of.is_meta or torch.equal(self.peek(key), of)):
            self._taken.add(self._prefix + key)

    def linear(self, theirs: str, ours: str) -> dict[str, Tensor]:
        return {f"{ours}.{part}": self.take(f"{theirs}.{part}") for part in ("weight", "bias")}

    def join(self, theirs: list[str], ours: str, bias_optional: bool = False) -> dict[str, Tensor]:
        """Several linear layers as one; with ``bias_optional`` a missing bias is 0."""
        weights = [self.take(f"{key}weight") for key in theirs]
        biases = [
            weight.new_zeros(len(weight)) if bias_optional and not self.has(f"{key}bias") else self.take(f"{key}bias")
            for key, weight in zip(theirs, weights, strict=True)
        ]
        return {f"{ours}.weight": torch.cat(weights), f"{ours}.bias": torch.cat(biases)}

    def layers(self, template: str) -> int:
        """How many layers there are whose keys begin as ``template`` does."""
        pattern = re.compile(re.escape(self._prefix + template).replace(r"\{\}", r"(\d+)"))
        return 1 + max((int(match[1]) for key in self._weights if (match := pattern.match(key))), default=-1)

    def unused(self) -> list[str]:
        return sorted(original for key, (original, _) in self._weights.items() if key not in self._taken)


def some(keys: Mapping[str, object]) -> str:
    """How many keys, and which for instance."""
    return f"{len(keys)} keys such as {', '.join(sorted(keys)[:3])}"
