"""Questions and multiple choices on the videos of a corpus as training samples: one for each. No shard is written anew.

Media, question and answer make one sample, as media, right and wrong texts do: what fails, fails together, and is
replaced together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from smaug_ds.data.index import Corpus
from smaug_ds.data.mixture import Mixture
from smaug_ds.data.sample import MEDIA, Medium, Sample
from smaug_ds.data.shard import Entry


class QuestionAnswer(NamedTuple):
    """What is asked about a video, and the answer."""

    question: str
    answer: str


class TextChoice(NamedTuple):
    """Which text describes a video, and which do not."""

    right: str
    wrong: tuple[str, ...]


Asked = QuestionAnswer | TextChoice


@dataclass(frozen=True)
class QuestionEntry(Entry):
    """A video with one of its questions or multiple choices."""

    asked: Asked


class QuestionCorpus(Corpus):
    """The videos of ``corpus``, each as often as there are questions on it; those without any are left out.

    questions: of each video by ``shard/key``, the shard being the tar's path.
    """

    def __init__(self, corpus: Corpus, questions: Mapping[str, Sequence[Asked]]) -> None:
        super().__init__(corpus.indexes, corpus.holdout, corpus.split)
        self.videos, self.questions = corpus, dict(questions)
        self._asked: list[list[tuple[int, Asked]]] = []  # by shard: number of the video in it, question
        for shard, count in enumerate(corpus.sizes()["video"].tolist()):
            names = [_name(corpus.entry("video", shard, row)) for row in range(count)]
            self._asked.append([(row, asked) for row, name in enumerate(names) for asked in questions.get(name, ())])
        counts = np.array([len(asked) for asked in self._asked])
        self._sizes = {medium: counts if medium == "video" else np.zeros_like(counts) for medium in MEDIA}
        self._ends = {medium: np.cumsum(sizes) for medium, sizes in self._sizes.items()}

    def __reduce__(self) -> tuple:
        return QuestionCorpus, (self.videos, self.questions)

    def entry(self, medium: Medium, shard: int, index: int) -> QuestionEntry:
        """The ``index``-th question on the videos of shard number ``shard``."""
        row, asked = self._asked[shard][index]
        return QuestionEntry(**vars(self.videos.entry(medium, shard, row)), asked=asked)

    def read_sample(self, entry: Entry) -> Sample:
        """The video of ``entry`` with its question as the only caption, and the answer; or with the right text as the
        only caption, and the wrong ones. See ``Corpus.read_sample``."""
        assert isinstance(entry, QuestionEntry), "entries come from this corpus"
        sample = super().read_sample(entry)
        match entry.asked:
            case QuestionAnswer(question, answer):
                return dataclasses.replace(sample, captions=(question,), answer=answer)
            case TextChoice(right, wrong):
                return dataclasses.replace(sample, captions=(right,), wrong=wrong)


@dataclass(frozen=True)
class QuestionMixture(Mixture):
    """A mixture whose corpus is one of questions."""

    def fingerprint(self) -> str:
        """Equal for the same shards, split, weights, questions and answers, wherever they lie."""
        corpus = self.corpus
        assert isinstance(corpus, QuestionCorpus), "of_questions makes it"
        asked = [[(row, *pair) for row, pair in shard] for shard in corpus._asked]
        return hashlib.sha256(json.dumps([super().fingerprint(), asked]).encode()).hexdigest()


def of_questions(mixture: Mixture, questions: Mapping[str, Sequence[Asked]]) -> QuestionMixture:
    """The mixture of ``questions`` on the videos of ``mixture``, see ``QuestionCorpus``."""
    return QuestionMixture(QuestionCorpus(mixture.corpus, questions), mixture.sets, mixture.stocks)


def _name(entry: Entry) -> str:
    return f"{entry.shard}/{entry.key}"
