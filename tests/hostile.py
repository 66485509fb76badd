"""A corpus that does evil to the workers that read it. Workers import this module: it needs little."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Literal

from smaug_ds.data.index import Corpus
from smaug_ds.data.media import MediaError
from smaug_ds.data.sample import Sample
from smaug_ds.data.shard import Entry


class HostileCorpus(Corpus):
    """A corpus of which some samples (by key) do something to the process that reads them."""

    acts: dict[str, str]  # key -> "fail", "sleep", "stop" or "crash"

    def __reduce__(self) -> tuple:
        return open_hostile, (self.indexes[0].folder, self.split, self.acts)

    def read_sample(self, entry: Entry) -> Sample:
        act = self.acts.get(entry.key)
        if act == "fail":
            raise MediaError("decode", "broken")
        if act == "sleep":
            time.sleep(1000)
        if act is not None:
            os.kill(os.getpid(), signal.SIGSTOP if act == "stop" else signal.SIGSEGV)
        return super().read_sample(entry)


def open_hostile(folder: Path, split: Literal["train", "test"], acts: dict[str, str]) -> HostileCorpus:
    corpus = HostileCorpus.open([folder], holdout=float(split == "test"), split=split)
    assert isinstance(corpus, HostileCorpus)
    corpus.acts = acts
    return corpus
