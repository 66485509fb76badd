"""Signals to a job spare the workers of its loader, and nothing is left over of a rank that is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Runs in a process group of its own, to all of which the tests send signals.
JOB = """
import dataclasses, multiprocessing, os, signal, sys
from pathlib import Path
from smaug_ds.data.index import Corpus
from smaug_ds.text import Tokenizer
from tests.loading import CONFIG, make_loader

caught = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: caught.append(number))
shards, vocabulary, folder = map(Path, sys.argv[1:])
corpus = Corpus.open([shards], holdout=0.0, split="train")
with make_loader(corpus, Tokenizer(vocabulary), folder, dataclasses.replace(CONFIG, workers=2)) as loader:
    batches = iter(loader)
    next(batches)
    for _ in sys.stdin:
        for _ in range(30):
            next(batches)
        print(*[signal.Signals(number).name for number in caught], flush=True)
"""


@pytest.fixture
def job(toy_shards: Path, toy_media: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A rank with two workers that takes 30 batches for each line it is sent, then prints the signals it caught."""
    arguments = [str(path) for path in (toy_shards / "train", toy_media / "vocab.txt", tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-c", JOB, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def take_thirty(job: subprocess.Popen[str]) -> str:
    assert job.stdin is not None and job.stdout is not None
    job.stdin.write("\n")
    job.stdin.flush()
    return job.stdout.readline().strip()


def test_signals_to_a_job_spare_all_that_its_loader_needs(job: subprocess.Popen[str]) -> None:
    assert take_thirty(job) == ""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.killpg(job.pid, number)
        assert take_thirty(job).endswith(number.name), job.communicate()[1]
    output, errors = job.communicate(timeout=60)
    assert (job.returncode, output, errors) == (0, "", "")


def test_a_killed_rank_leaves_no_process(job: subprocess.Popen[str]) -> None:
    assert take_thirty(job) == ""
    job.kill()
    assert job.communicate(timeout=60)[1] == ""  # returns when the last process that inherited stderr is gone
