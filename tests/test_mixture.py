"""Sets with weights: what a manifest may say, what must lie on disk, how often each sample comes, in which steps."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from smaug_ds import distributed
from smaug_ds.config import ConfigError, parse, to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.data.indexing import build_index
from smaug_ds.data.loader import TrainLoader
from smaug_ds.data.mixture import Manifest, Mixture, open_mixture, training_folders
from smaug_ds.data.order import Order, SetShards
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.sample import MEDIA, BatchShape, Medium
from smaug_ds.text import Tokenizer
from tests.shards import crawled, make_clip, make_image, write_tar

ROOT = Path(__file__).resolve().parent.parent
SHAPE = BatchShape(frames=2, image_size=16, patches=4, max_text_length=8, mlm_probability=0.15)
# Folder -> (suffix, samples of each shard)
FOLDERS = {"clips": ("mp4", [5, 4, 6]), "photos": ("jpg", [9, 8, 7, 9]), "few": ("jpg", [3, 2]), "odd": ("png", [7])}
WEIGHTS = {"clips": 1.0, "photos": 1.0, "few": 3.0, "odd": 0.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four indexed folders of tiny media."""
    root = tmp_path_factory.mktemp("sets")
    media = {"mp4": make_clip(50), "jpg": make_image(90), "png": make_image(140, "png")}
    for folder, (suffix, counts) in FOLDERS.items():
        for shard, count in enumerate(counts):
            keys = [f"{folder}_{shard}_{number}" for number in range(count)]
            samples = [crawled(key, media[suffix], suffix, key, media_id=key) for key in keys]
            write_tar(root / folder / f"{shard:05d}.tar", list(chain.from_iterable(samples)))
        build_index(root / folder)
    return root


def write_manifest(folder: Path, text: str) -> str:
    path = folder / "corpus.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def mixture(root: Path, tmp_path: Path) -> Mixture:
    lines = [f"  - {{name: {name}, shards: [{name}], weight: {weight}}}" for name, weight in WEIGHTS.items()]
    return open_mixture(DataConfig(corpus=write_manifest(tmp_path, "\n".join([f"root: {root}", "sets:", *lines]))))


# ---- the order of a mixture

SETS = (SetShards(0, 3, 1), SetShards(3, 5, 2.5), SetShards(5, 6, 0.25), SetShards(6, 9, 1))
SIZES: dict[Medium, list[int]] = {"video": [40, 31, 0, 9, 8, 52, 70, 0, 5], "image": [0, 12, 0, 3, 2, 0, 0, 6, 0]}


def set_of(shard: int) -> int:
    return next(number for number, part in enumerate(SETS) if part.first <= shard < part.end)


def reference_sets(counts: list[int], periods: int) -> list[int]:
    """The set at each position, written out: the first set is laid evenly over all places, the others over the rest."""
    places: list[int | None] = [None] * sum(counts)
    for number, count in enumerate(counts):
        free = [i for i, owner in enumerate(places) if owner is None]
        for nth in range(len(free)):
            reached = (nth + 1) * count / len(free)  # where the line of slope count / free is after this place
            if math.floor(reached + 0.5) > math.floor(nth * count / len(free) + 0.5):
                places[free[nth]] = number
    assert None not in places
    return [owner for owner in places if owner is not None] * periods


@pytest.mark.parametrize("medium", MEDIA)
def test_each_sample_comes_once_per_epoch_and_weight(medium: Medium) -> None:
    order = Order(SIZES, global_batch=16, seed=4, group=2, sets=SETS)
    per_set = [sum(SIZES[medium][part.first : part.end]) for part in SETS]
    draws = [max(1, round(part.weight * count)) if count else 0 for part, count in zip(SETS, per_set, strict=True)]
    assert order.draws(medium) == sum(draws) and order.samples(medium) == sum(per_set)
    located = [order.locate(medium, position) for position in range(12 * sum(draws))]
    present = [number for number, count in enumerate(draws) if count]
    expected = [present[i] for i in reference_sets([draws[number] for number in present], 12)]
    assert [set_of(shard) for _, shard, _ in located] == expected
    for number in present:
        own = [(shard, row) for _, shard, row in located if set_of(shard) == number]
        for start in range(0, len(own) - per_set[number] + 1, per_set[number]):  # each epoch of the set
            epoch = own[start : start + per_set[number]]
            assert len(set(epoch)) == per_set[number]
        assert len(own) == 12 * draws[number]


def test_any_window_holds_each_set_by_its_share() -> None:
    order = Order(SIZES, global_batch=16, seed=4, group=2, sets=SETS)
    total = order.draws("video")
    sets = [set_of(order.locate("video", position)[1]) for position in range(3 * total)]
    shares = {number: count / len(sets) for number, count in Counter(sets).items()}
    for start in range(0, len(sets) - 64, 7):
        window = Counter(sets[start : start + 64])
        for number, share in shares.items():
            assert abs(window[number] - 64 * share) <= 3


def test_sets_of_the_same_size_are_shuffled_differently() -> None:
    order = Order({"video": [50] * 4}, 8, seed=1, group=2, sets=[SetShards(0, 2), SetShards(2, 4)])
    rows: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for position in range(200):
        _, shard, row = order.locate("video", position)
        rows[shard >= 2].append((shard % 2, row))
    assert sorted(rows[False]) == sorted(rows[True]) and rows[False] != rows[True]


def test_replacements_stay_in_their_set_for_a_while() -> None:
    order = Order(SIZES, global_batch=16, seed=4, group=2, sets=SETS)
    for position in range(60):
        places = [order.candidate("video", position, attempt) for attempt in range(300)]
        assert len({set_of(shard) for shard, _ in places[:5]}) == 1 and len(set(places[:5])) == 5
        assert {set_of(shard) for shard, _ in places[5:9]} == {0, 1, 2, 3}  # then all sets in turn
        reached = {place for place in places if set_of(place[0]) == 1}
        assert len(reached) == 9 + 8  # every sample of a set


def test_a_set_of_one_bad_sample_is_replaced_from_the_others() -> None:
    order = Order({"video": [1, 50]}, 8, seed=0, sets=[SetShards(0, 1, 5.0), SetShards(1, 2)])
    alone = [position for position in range(55) if order.locate("video", position)[1] == 0]
    assert len(alone) == 5
    for position in alone:
        assert order.candidate("video", position, 0) == (0, 0)
        assert order.candidate("video", position, 1)[0] == 1


def test_media_steps_follow_the_draws() -> None:
    order = Order(SIZES, global_batch=16, seed=4, group=2, sets=SETS)
    media = Counter(order.medium(step) for step in range(1000))
    assert abs(media["video"] - 1000 * order.draws("video") / order.total) <= 1


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([SetShards(0, 3)], "hold 3 shards of 9"),
        ([SetShards(0, 3), SetShards(4, 9)], "one ends at shard 3, the next begins at 4"),
        ([SetShards(0, 9, 0.0)], "weight 0.0"),
    ],
)
def test_sets_must_hold_every_shard_once(sets: list[SetShards], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(SIZES, 16, 0, 2, sets)


# ---- the global sequence, whatever the layout


def keys_of(
    mixture: Mixture, tokenizer: Tokenizer, folder: Path, ranks: int, workers: int, first: int, end: int
) -> list[list[str]]:
    """Keys of the global batches of steps ``first`` to ``end`` - 1, by the loaders of all ``ranks`` in turn."""
    order = mixture.order(8, 5, 2)
    config = DataConfig(train=("unused",), workers=workers, shuffle_group=2)
    steps: list[list[str]] = [[] for _ in range(first, end)]
    for rank in range(ranks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            patch.setattr(distributed, "world_size", lambda: ranks)
            loader = TrainLoader(
                mixture.corpus,
                order,
                tokenizer,
                config,
                SHAPE,
                5,
                8 // ranks,
                1,
                torch.device("cpu"),
                Ledger(folder, 0),
            )
            loader.load_state_dict({"step": first})
            with loader:
                for own, batch in zip(steps, islice(loader, end - first), strict=True):
                    assert order.medium(batch.step) == batch.medium
                    own += [key.rpartition("/")[2] for key in batch.keys]
    return steps


def test_every_layout_sees_the_same_global_sequence(mixture: Mixture, toy_media: Path, tmp_path: Path) -> None:
    """Three epochs at (ranks, workers) of (1, 0), (1, 2), (2, 1), (4, 3); and 4 ranks that go on as 2 in mid-epoch."""
    tokenizer = Tokenizer(toy_media / "vocab.txt")
    end = 3 * mixture.order(8, 5, 2).steps_per_epoch
    alone = keys_of(mixture, tokenizer, tmp_path, 1, 0, 0, end)
    for ranks, workers in ((1, 2), (2, 1), (4, 3)):
        assert keys_of(mixture, tokenizer, tmp_path, ranks, workers, 0, end) == alone, (ranks, workers)
    middle = end // 2  # in the middle of the second epoch
    assert middle % (end // 3)
    before = keys_of(mixture, tokenizer, tmp_path, 4, 1, 0, middle)
    after = keys_of(mixture, tokenizer, tmp_path, 2, 1, middle, end)
    assert before + after == alone
    assert not (tmp_path / "quarantine.0.jsonl").exists()
    counts = Counter(chain.from_iterable(alone))
    for folder, weight in WEIGHTS.items():
        times = [count for key, count in counts.items() if key.startswith(folder)]
        assert len(times) == sum(FOLDERS[folder][1])
        # Three epochs, but for the part of a step that is not over.
        assert all(abs(count - 3 * weight) <= 1 for count in times), (folder, times)


# ---- manifests


def test_manifest_of_the_paper_is_read() -> None:
    expected = {
        "webvid": 2_500_000,
        "cc3m": 2_950_000,
        "cc12m": 10_770_000,
        "sbu": 860_000,
        "vg": 770_000,
        "coco": 570_000,
    }
    whole = parse(Manifest, ROOT / "jobs/experiments/corpus_17m.yaml")
    assert {part.name: part.expected for part in whole.sets} == expected
    part = parse(Manifest, ROOT / "jobs/experiments/corpus_5m.yaml")
    assert {each.name for each in part.sets} == {"webvid", "cc3m"}
    assert all(each in whole.sets for each in part.sets)
    assert to_dict(part)["sets"][0]["shards"] == ["webvid"]


def test_expected_against_found(root: Path, tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path,
        """
sets:
  - {name: clips, shards: [clips], expected: 20, allowed_shortfall: 0.3}
  - {name: photos, shards: [photos, few], expected: 38, unit: captions, weight: 2}
  - {name: gone, shards: [gone], expected: 1000, allowed_shortfall: 1}
""",
    )
    config = DataConfig(corpus=manifest, corpus_root=str(root))
    mixture = open_mixture(config)
    assert [part for part in mixture.sets] == [SetShards(0, 3, 1.0), SetShards(3, 9, 2.0)]
    assert [stock.found for stock in mixture.stocks] == [15, 38, 0]
    lines = mixture.table().splitlines()
    assert lines[1].split()[:5] == ["clips", "20", "15", "samples", "1"] and "25.0% short, 30% allowed" in lines[1]
    assert lines[2].split() == ["photos", "38", "38", "captions", "2"]
    assert lines[3].split()[:4] == ["gone", "1,000", "0", "absent"]
    assert training_folders(config) == [str(root / name) for name in ("clips", "photos", "few")]
    order = mixture.order(8, 0, 2)
    assert order.draws("video") == 15 and order.draws("image") == 2 * 38


SETS_THAT_FAIL = {
    "a shortfall": (
        "sets: [{name: clips, shards: [clips], expected: 20, allowed_shortfall: 0.2}]",
        r"data\.corpus .*set clips has 15 of 20 expected samples: 25\.0% are missing, allowed_shortfall is 20\.0%",
    ),
    "an absent set": (
        "sets: [{name: gone, shards: [gone], allowed_shortfall: 0.5}]",
        "set gone: folder .* does not exist",
    ),
    "a folder without tars": ("sets: [{name: a, shards: [.]}]", "set a: folder .* holds no .tar file"),
    "nothing at all": ("sets: [{name: gone, shards: [gone], allowed_shortfall: 1}]", "not one of its sets is on disk"),
    "no sets": ("root: somewhere", "sets is empty"),
    "a name twice": ("sets: [{name: a, shards: [clips]}, {name: a, shards: [few]}]", "set a occurs 2 times"),
    "no folders": ("sets: [{name: a, shards: []}]", "set a: shards is empty"),
    "an endless weight": ("sets: [{name: a, shards: [few], weight: 1e400}]", r"sets\[0\]\.weight: expected a number"),
    "a weight of 0": ("sets: [{name: a, shards: [few], weight: 0}]", r"set a: weight is 0\.0"),
    "an unknown key": (
        "sets: [{name: a, shards: [few], wieght: 2}]",
        r"unknown key sets\[0\]\.wieght; did you mean sets\[0\]\.weight",
    ),
    "a wrong type": (
        "sets: [{name: a, shards: [few], expected: many}]",
        r"sets\[0\]\.expected: expected a whole number",
    ),
    "no name": ("sets: [{shards: [few]}]", r"sets\[0\]\.name has no default"),
    "no section": ("sets: [few]", r"sets\[0\]: expected a section"),
    "a missing share": ("sets: [{name: a, shards: [few], allowed_shortfall: 2}]", "allowed_shortfall 2.0"),
}


@pytest.mark.parametrize("case", SETS_THAT_FAIL)
def test_what_is_wrong_with_a_manifest_is_told(case: str, root: Path, tmp_path: Path) -> None:
    text, message = SETS_THAT_FAIL[case]
    manifest = write_manifest(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        open_mixture(DataConfig(corpus=manifest, corpus_root=str(root)))
    assert "data.corpus" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_manifest_that_is_no_yaml_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.corpus: the manifest .*not valid YAML: line 1") as error:
        open_mixture(DataConfig(corpus=write_manifest(tmp_path, "sets: [}")))
    assert "--config" not in str(error.value)


def test_manifest_and_folders_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpus is a\.yaml and data\.train \['b'\]"):
        DataConfig(corpus="a.yaml", train=("b",))
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        open_mixture(DataConfig(corpus="nowhere.yaml"))


def test_fingerprint_tells_shards_and_weights(root: Path, tmp_path: Path) -> None:
    def mark(weight: float, **settings: float) -> str:
        text = f"sets: [{{name: clips, shards: [clips], weight: {weight}}}, {{name: few, shards: [few]}}]"
        config = DataConfig(corpus=write_manifest(tmp_path, text), corpus_root=str(root))
        return open_mixture(dataclasses.replace(config, **settings)).fingerprint()  # type: ignore[arg-type]

    assert mark(1.0) == mark(1.0)
    assert len({mark(1.0), mark(2.0), mark(1.0, holdout=0.3)}) == 3
    moved = tmp_path / "moved"
    moved.symlink_to(root)
    folders = DataConfig(train=(str(root / "clips"),)), DataConfig(train=(str(moved / "clips"),))
    assert len({open_mixture(config).fingerprint() for config in folders}) == 1
