"""The benchmarks' own annotation files as small records, the videos that they name, and their counts.

    python -m smaug_ds.evaluation.benchmarks FILE...

prints what each file is, its counts against the published ones, and what reading it costs. See docs/benchmarks.md.
"""

from smaug_ds.evaluation.benchmarks.lists import write_list
from smaug_ds.evaluation.benchmarks.questions import (
    answer_list,
    coverage,
    predictions_in_order,
    read_answer_list,
    read_predictions,
    require_answers,
    write_predictions,
)
from smaug_ds.evaluation.benchmarks.reading import read_benchmark, read_ids
from smaug_ds.evaluation.benchmarks.records import Benchmark, BenchmarkError, Choice, Question, VideoTexts
from smaug_ds.evaluation.benchmarks.videos import Found, find_in_folder, find_in_shards

__all__ = [
    "Benchmark",
    "BenchmarkError",
    "Choice",
    "Found",
    "Question",
    "VideoTexts",
    "answer_list",
    "coverage",
    "find_in_folder",
    "find_in_shards",
    "predictions_in_order",
    "read_answer_list",
    "read_benchmark",
    "read_ids",
    "read_predictions",
    "require_answers",
    "write_list",
    "write_predictions",
]
