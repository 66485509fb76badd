"""How long the captions of a measurement are: all full, drawn as MSR-VTT's are, or as those of a file."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from smaug_ds.config import ConfigError, naming
from smaug_ds.data.annotations import read_list
from smaug_ds.text import Tokenizer

# Tokens -> captions, [CLS] and [SEP] included: MSR-VTT's 1k-A test split (1000 captions, 11.75 tokens in the mean),
# cleaned as for training, word pieces of BERT's uncased vocabulary.
MSRVTT = {
    5: 1, 6: 52, 7: 66, 8: 121, 9: 106, 10: 109, 11: 106, 12: 91, 13: 75, 14: 63, 15: 52, 16: 33, 17: 26,
    18: 23, 19: 18, 20: 9, 21: 8, 22: 12, 23: 9, 24: 6, 25: 6, 26: 1, 27: 3, 28: 2, 30: 1, 32: 1,
}  # fmt: skip
_COLUMNS = ("caption", "sentence", "name")  # of a CSV file: ours, MSR-VTT's, WebVid's


def draw_lengths(captions: str, tokenizer: str, longest: int, count: int, generator: torch.Generator) -> list[int]:
    """Tokens of ``count`` captions, special ones included, at most ``longest``.

    captions: "full" (all ``longest``), "msrvtt", or a file of captions, which ``tokenizer`` then cuts into tokens.
    Raises ConfigError for a file that cannot be read or holds no caption.
    """
    if captions == "full":
        return [longest] * count
    counts = MSRVTT if captions == "msrvtt" else lengths_of_file(Path(captions), tokenizer, longest)
    lengths = sorted(counts)
    reached = torch.tensor([float(counts[length]) for length in lengths]).cumsum(0)
    # one draw from each of ``count`` equal parts of the distribution: few captions have its mean and spread already
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count * reached[-1]
    drawn = torch.searchsorted(reached, places, right=True).clamp(max=len(lengths) - 1)
    return [min(lengths[i], longest) for i in drawn[torch.randperm(count, generator=generator)].tolist()]


def lengths_of_file(path: Path, tokenizer: str, longest: int) -> dict[int, int]:
    """Tokens -> captions of a file: .txt (one a line), .csv (column caption, sentence or name), .jsonl (key caption) or
    .json (a list as ``smaug_ds.data.annotations.read_list`` takes it)."""
    if not tokenizer:
        raise ConfigError(f"tokenizer is empty: name the vocab.txt or tokenizer.json for captions={path}")
    with naming("tokenizer"):
        words = Tokenizer(tokenizer)
    with naming("captions"):
        captions = [caption for caption in _read(path) if caption.strip()]
    if not captions:
        raise ConfigError(f"captions: {path} holds no caption")
    return Counter(words.encode(captions, longest).lengths)


def _read(path: Path) -> list[str]:
    if path.suffix == ".json":
        return [caption for row in read_list(path) for caption in row.captions]
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give full, msrvtt or a file of captions")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [_caption_of(json.loads(line), f"{path}, line {i}") for i, line in enumerate(text.splitlines(), 1)]
    if path.suffix == ".csv":
        rows = csv.DictReader(text.splitlines())
        column = next((name for name in _COLUMNS if name in (rows.fieldnames or ())), None)
        if column is None:
            raise ValueError(f"{path} has the columns {rows.fieldnames}, none of them {', '.join(_COLUMNS)}")
        return [row[column] or "" for row in rows]
    return text.splitlines()


def _caption_of(row: Any, place: str) -> str:
    caption = row.get("caption") if isinstance(row, dict) else None
    if not isinstance(caption, str):
        raise ValueError(f"{place}: no text under the key caption")
    return caption
