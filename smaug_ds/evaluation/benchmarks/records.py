"""What the benchmark files are read into: one record for each video with its texts, each question, each choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["retrieval", "paragraph retrieval", "multiple choice", "question answering"]


class BenchmarkError(ValueError):
    """A benchmark file, or the videos that it names, cannot be used; the message names the file and the row."""


@dataclass(frozen=True)
class VideoTexts:
    """One video and what describes it."""

    video: str  # as the file names it
    sentences: tuple[str, ...]  # stripped, one blank between words
    row: int  # of its first sentence in the file, from 0, a header not counted
    paragraph: bool = False  # the sentences are one query together
    other_names: tuple[str, ...] = ()  # other names of the same video in the file

    @property
    def names(self) -> tuple[str, ...]:
        """All names that the file gives to the video."""
        return (self.video, *self.other_names)

    @property
    def texts(self) -> tuple[str, ...]:
        """The queries: the sentences, or the paragraph that they make, joined by blanks in the order of the file."""
        return (" ".join(self.sentences),) if self.paragraph else self.sentences


@dataclass(frozen=True)
class Choice:
    """A video and the descriptions of which one is right."""

    video: str
    choices: tuple[str, ...]
    answer: int  # position of the right one in choices
    row: int

    @property
    def names(self) -> tuple[str, ...]:
        """The one name of the video."""
        return (self.video,)


@dataclass(frozen=True)
class Question:
    """An open-ended question on a video."""

    question_id: str
    video: str
    question: str  # stripped, one blank between words
    answer: str  # as it stands in the file: the official tools compare letter by letter
    row: int
    type: int | None = None  # 0 to 8 in ActivityNet-QA

    @property
    def names(self) -> tuple[str, ...]:
        """The one name of the video."""
        return (self.video,)


Record = VideoTexts | Choice | Question


@dataclass(frozen=True)
class Benchmark:
    """The records of one benchmark file, in its order; all of one type."""

    name: str  # "DiDeMo test", or the layout where the file's name is none of the published ones
    layout: str  # key of ``formats.READERS``
    task: Task
    files: tuple[str, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()  # what is not as published, what was left out: a line each

    def __len__(self) -> int:
        return len(self.records)

    @property
    def texts(self) -> tuple[VideoTexts, ...]:
        """The records of a retrieval benchmark. Raises BenchmarkError for another task."""
        return self._only(VideoTexts)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The records of a multiple-choice benchmark. Raises BenchmarkError for another task."""
        return self._only(Choice)

    @property
    def questions(self) -> tuple[Question, ...]:
        """The records of a question-answering benchmark. Raises BenchmarkError for another task."""
        return self._only(Question)

    @property
    def videos(self) -> dict[str, Record]:
        """Each video once, with the first record that names it."""
        first: dict[str, Record] = {}
        for record in self.records:
            first.setdefault(record.video, record)
        return first

    @property
    def counts(self) -> dict[str, int]:
        """How many videos, and how many queries, sentences or questions."""
        counts = {"videos": len(self.videos)}
        if self.task in ("question answering", "multiple choice"):
            return counts | {"questions": len(self.records)}
        counts["sentences"] = sum(len(record.sentences) for record in self.texts)
        return counts | {"queries": sum(len(record.texts) for record in self.texts)}

    def without(self, videos: Collection[str]) -> Benchmark:
        """The benchmark without the records of ``videos``; a note tells how many were left out."""
        left = set(videos)
        kept = tuple(record for record in self.records if record.video not in left)
        if len(kept) == len(self.records):
            return self
        if not kept:
            raise BenchmarkError(f"{self.files[0]}: none of its {len(self.videos)} videos is left")
        note = f"{len(self.records) - len(kept)} of {len(self.records)} records left out for {len(left)} missing videos"
        return dataclasses.replace(self, records=kept, notes=(*self.notes, note))

    def _only(self, kind: Any) -> Any:
        if not isinstance(self.records[0], kind):
            raise BenchmarkError(f"{self.files[0]} is a {self.task} file ({self.layout}), not one of {kind.__name__}")
        return self.records


def words(text: str) -> str:
    """``text`` stripped, with one blank between words."""
    return " ".join(text.split())
