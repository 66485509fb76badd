"""A benchmark's videos as a list that ``tools/build_shards.py`` reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

from smaug_ds.evaluation.benchmarks.records import Benchmark, Choice, Record, VideoTexts
from smaug_ds.evaluation.benchmarks.videos import Found


def write_list(path: str | Path, benchmark: Benchmark, found: Found[Path]) -> None:
    """Writes the found videos in Singularity's layout, each once, paths relative to the folder that was searched.

    Captions are the queries: sentences or the paragraph; the questions, or the right choices, where the task is
    another. The file is whole or absent.
    """
    captions: dict[str, dict[str, None]] = {}
    for record in benchmark.records:
        if record.video in found.places:
            place = found.places[record.video].relative_to(found.searched).as_posix()
            captions.setdefault(place, {}).update(dict.fromkeys(_captions(record)))
    table = [{"video": place, "caption": list(texts)} for place, texts in captions.items()]
    aside = Path(f"{path}.{os.getpid()}.part")
    aside.write_text(json.dumps(table, ensure_ascii=False, indent=0), encoding="utf-8")
    aside.replace(path)


def _captions(record: Record) -> tuple[str, ...]:
    if isinstance(record, VideoTexts):
        return record.texts
    return (record.choices[record.answer],) if isinstance(record, Choice) else (record.question,)
