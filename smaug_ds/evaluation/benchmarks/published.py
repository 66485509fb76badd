"""How many records the benchmarks' files hold, as their authors state it; keyed by layout and file name.

A file of another name has no published counts here: a part of a file, or a list of one's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Published(NamedTuple):
    """One file of a benchmark."""

    name: str
    counts: dict[str, int]  # some of the keys of ``Benchmark.counts``


def _captions(name: str, videos: int, sentences: int) -> Published:
    return Published(name, {"videos": videos, "sentences": sentences})


def _questions(name: str, videos: int, questions: int) -> Published:
    return Published(name, {"videos": videos, "questions": questions})


_1K_A = _captions("MSR-VTT 1k-A test", 1000, 1000)  # Yu et al., arXiv 1808.02559
_MSRVTT_MC = _questions("MSRVTT-MC test", 2990, 2990)  # the same paper
_MSRVTT_QA = {  # Xu et al., ACM Multimedia 2017, table 1
    "train": _questions("MSRVTT-QA train", 6513, 158581),
    "val": _questions("MSRVTT-QA val", 497, 12278),
    "test": _questions("MSRVTT-QA test", 2990, 72821),
}
_ACTIVITYNET_QA = {  # dataset/README.md of MILVLG/activitynet-qa
    "train": _questions("ActivityNet-QA train", 3200, 32000),
    "val": _questions("ActivityNet-QA val", 1800, 18000),
    "test": _questions("ActivityNet-QA test", 800, 8000),
}

# (layout, file name without ending) -> what is published
PUBLISHED: dict[tuple[str, str], Published] = {
    ("msrvtt_csv", "MSRVTT_JSFUSION_test"): _1K_A,
    ("retrieval", "msrvtt_ret_test1k"): _1K_A,
    ("msrvtt_data", "MSRVTT_data"): _captions("MSR-VTT", 10000, 200000),  # Xu et al., CVPR 2016
    ("didemo", "train_data"): _captions("DiDeMo train", 8395, 33005),  # Hendricks et al., arXiv 1708.01641
    ("didemo", "val_data"): _captions("DiDeMo val", 1065, 4180),
    ("didemo", "test_data"): _captions("DiDeMo test", 1004, 4021),
    ("activitynet_captions", "train"): _captions("ActivityNet Captions train", 10009, 37421),
    ("activitynet_captions", "val_1"): _captions("ActivityNet Captions val_1", 4917, 17505),
    ("activitynet_captions", "val_2"): _captions("ActivityNet Captions val_2", 4885, 17031),
    ("multiple_choice", "msrvtt_mc_test"): _MSRVTT_MC,
}
for _split in ("train", "val", "test"):
    PUBLISHED["msrvtt_qa", f"{_split}_qa"] = _MSRVTT_QA[_split]
    PUBLISHED["questions", f"msrvtt_qa_{_split}"] = _MSRVTT_QA[_split]
    PUBLISHED["activitynet_qa", f"{_split}_q"] = _ACTIVITYNET_QA[_split]
    PUBLISHED["questions", f"anet_qa_{_split}"] = _ACTIVITYNET_QA[_split]

IDS = {"MSRVTT_train.9k": 9000, "val_ids": 4926}  # lists of video ids


def published(layout: str, path: Path) -> Published | None:
    """What is published on a file of this layout and name; None if nothing is known."""
    return PUBLISHED.get((layout, path.stem))


def count_notes(expected: Published, counts: dict[str, int]) -> list[str]:
    """A line for each count that is not as published."""
    return [
        f"{expected.name}: {counts[what]} {what}, published {number}"
        for what, number in expected.counts.items()
        if counts[what] != number
    ]
