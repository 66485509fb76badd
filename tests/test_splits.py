"""A corpus over folders of indexed shards: its splits do not overlap, its samples are numbered through."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from smaug_ds.data.index import Corpus, ShardIndex
from smaug_ds.data.indexing import build_index
from smaug_ds.data.order import stable_hash
from smaug_ds.data.sample import MEDIA, Sample
from smaug_ds.data.shard import ShardError
from tests.shards import captioned, crawled, make_clip, make_image, read_all, write_tar


@pytest.mark.parametrize("holdout", [0.0, 0.1, 0.5, 1.0])
def test_splits_are_disjoint_and_complete_and_keep_media_together(tmp_path: Path, holdout: float) -> None:
    folder = captioned(tmp_path, shards=5, per_shard=40)
    index = ShardIndex.open(folder)
    splits: dict[str, list[Sample]] = {"train": [], "test": []}
    for split in ("train", "test"):
        if holdout == (0.0 if split == "test" else 1.0):
            with pytest.raises(
                ShardError, match=rf"no {split} samples in .*: 200 samples with data\.holdout={holdout}"
            ):
                Corpus.open([folder], holdout, split)
            continue
        corpus = Corpus.open([folder], holdout, split)
        splits[split] = [
            corpus.read_sample(corpus.entry(medium, shard, number))
            for medium, sizes in corpus.sizes().items()
            for shard, size in enumerate(sizes)
            for number in range(size)
        ]
        assert len(corpus) == len(splits[split]) == sum(corpus.count(medium) for medium in MEDIA)
    keys = {split: {sample.key for sample in samples} for split, samples in splits.items()}
    ids = {split: {sample.media_id for sample in samples} for split, samples in splits.items()}
    assert sorted(keys["train"] | keys["test"]) == [sample.key for sample in read_all(index)]
    assert not keys["train"] & keys["test"] and not ids["train"] & ids["test"]
    expected = {name for name in ids["train"] | ids["test"] if stable_hash(name) < holdout * 2**63}
    assert ids["test"] == expected
    assert len(keys["test"]) == pytest.approx(holdout * 200, abs=25)


def test_a_corpus_numbers_the_shards_of_several_folders_through(tmp_path: Path) -> None:
    folders = [captioned(tmp_path / "a", 2, 3, tag="a"), captioned(tmp_path / "b", 3, 2, tag="b")]
    write_tar(
        tmp_path / "c" / "clips.tar",
        crawled("clip", make_clip(1), "mp4", "moves") + crawled("x", make_image(1), "jpg", "is"),
    )
    build_index(tmp_path / "c")
    corpus = Corpus.open([*folders, tmp_path / "c"], holdout=0.0, split="train")
    sizes = corpus.sizes()
    assert sizes["image"].tolist() == [3, 3, 2, 2, 2, 1]
    assert sizes["video"].tolist() == [0, 0, 0, 0, 0, 1]
    assert corpus.entry("video", 5, 0).key == "clip"
    assert corpus.entry("image", 5, 0).key == "x"
    assert corpus.entry("image", 3, 1).shard == str(tmp_path / "b" / "00001.tar")
    in_order = [
        corpus.entry("image", shard, number) for shard, size in enumerate(sizes["image"]) for number in range(size)
    ]
    assert [corpus.nth("image", number) for number in range(corpus.count("image"))] == in_order
    with pytest.raises(IndexError):
        corpus.nth("image", corpus.count("image"))
    copy = pickle.loads(pickle.dumps(corpus))
    assert [copy.nth("image", number) for number in range(copy.count("image"))] == in_order
    assert copy.read_sample(in_order[4]) == corpus.read_sample(in_order[4])


def test_bad_arguments_of_a_corpus_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no shard folders: set data\.train"):
        Corpus.open([], 0.0, "train")
    folder = captioned(tmp_path, 1, 1)
    with pytest.raises(ShardError, match=r"data\.holdout is 1\.5"):
        Corpus.open([folder], 1.5, "train")
