"""The corpora's own files: every row becomes the right media with the right captions, or is counted as left out."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.data import corpora
from smaug_ds.data.annotations import Annotation, SourceError
from smaug_ds.data.corpora import BadRow, Reading, detect, name_of, read_corpus
from smaug_ds.data.index import ShardIndex
from smaug_ds.data.plan import make_plan, read_span
from smaug_ds.data.sharding import build
from tests.shards import crawled, make_clip, make_image


def read(path: Path, **how: Any) -> list[Annotation | BadRow]:
    form = how.pop("form", "auto")
    return list(read_corpus(path, Reading(path if path.is_dir() else path.parent, **how), form))


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def flat(found: list[Annotation | BadRow]) -> list[tuple]:
    """(first place, other places, captions, media id), or (row, reason)."""
    return [
        (f.row, f.reason) if isinstance(f, BadRow) else (f.path, f.elsewhere, f.captions, f.media_id) for f in found
    ]


# --- the real files ---


def test_the_real_webvid_csv(shared_data: Path) -> None:
    path = shared_data / "annotations" / "webvid" / "test_webvid.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = read(path)
    assert detect(path) == "webvid" and len(found) == len(rows) == 20
    for annotation, row in zip(found, rows, strict=True):
        assert isinstance(annotation, Annotation) and annotation.medium == "video"
        assert annotation.path == f"{row['page_dir']}/{row['videoid']}.mp4"
        assert annotation.elsewhere == (f"{row['videoid']}.mp4",)
        assert annotation.captions == (row["name"].strip(),)


def test_the_real_cc3m_tsv(shared_data: Path) -> None:
    path = shared_data / "annotations" / "cc3m" / "Validation_GCC_head1000.tsv"
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    found = read(path, media_name="{md5}.jpg")
    assert detect(path) == "cc" and len(found) == len(lines) == 1000
    for annotation, (caption, url) in zip(found, lines, strict=True):
        assert isinstance(annotation, Annotation) and annotation.medium == "image"
        assert (annotation.captions, annotation.media_id) == ((caption.strip(),), url)
        assert annotation.path == hashlib.md5(url.encode()).hexdigest() + ".jpg"


def test_the_real_coco_lines_and_the_projects_lists(shared_data: Path) -> None:
    path = shared_data / "annotations" / "coco" / "caps_boxes_coco2014_val_80.jsonl"
    found = read(path)
    assert detect(path) == "jsonl" and len(found) == 80
    assert all(isinstance(row, Annotation) and len(row.captions) >= 5 and row.medium == "image" for row in found)
    for name, rows in {"video_train": 86, "image_train": 61, "video_test": 38}.items():
        path = shared_data / "annotations" / "project" / f"{name}.json"
        assert detect(path) == "singularity" and len(read(path)) == rows


# --- each format ---


def test_webvid(tmp_path: Path) -> None:
    head = "videoid,name,page_idx,page_dir,duration,contentUrl\n"
    text = head + (
        '1,"a cat, two ""dogs""",0,000001_000050,PT00H00M17S,https://e/1.mp4\n'
        "2,,0,d,PT00H00M17S,https://e/2.mp4\n"
        "3,odd,0,d,seventeen,https://e/3.mp4\n"
        "4,short\n"
        "5,too,long,d,PT1S,u,more\n"
        "../6,way out,0,d,PT00H00M17S,u\n"
        "7,in no folder,0,,PT00H01M,u\n"
    )
    assert flat(read(write(tmp_path / "w.csv", text))) == [
        ("000001_000050/1.mp4", ("1.mp4",), ('a cat, two "dogs"',), "webvid/1"),
        ("d/2.mp4", ("2.mp4",), (), "webvid/2"),
        (2, "duration"),
        (3, "columns"),
        (4, "columns"),
        (5, "columns"),
        ("7.mp4", (), ("in no folder",), "webvid/7"),
    ]
    with pytest.raises(SourceError, match=r"w\.csv.*columns videoid and name; found \['id', 'x'\]"):
        read(write(tmp_path / "w.csv", "id,x\n1,2\n"), form="webvid")
    with pytest.raises(SourceError, match=r"w\.csv, row 1: field larger"):
        read(write(tmp_path / "w.csv", head + "1,a,0,d,PT1S,u\n" + '2,"open' + "x" * 2**25))


def test_captions_of_a_megabyte_and_not_in_utf8(tmp_path: Path) -> None:
    long = "word " * 200_000
    rows = [b"videoid,name\n1,fine\n2,K\xe4se\n", f'3,"{long}"\n'.encode(), b"4,good\n"]
    found = read(write(tmp_path / "w.csv", b"".join(rows)))
    assert flat(found)[1] == (1, "not_utf8") and len(found) == 4
    found = read(
        write(tmp_path / "l.json", b'[{"image": "a.jpg", "caption": "K\xe4se"}, {"image": "b", "caption": "x"}]')
    )
    assert flat(found) == [(0, "not_utf8"), ("b", (), ("x",), "b")]


def test_conceptual_captions_in_both_orders(tmp_path: Path) -> None:
    cc3m = write(tmp_path / "3.tsv", "a dog\thttp://e/a.jpg\nno url\tx\nb\tc\thttp://e/b.jpg\n\thttp://e/c.jpg\n")
    cc12m = write(tmp_path / "12.tsv", "https://e/a.jpg?w=1\ta dog \nhttps://e/b\ta cat\n")
    assert flat(read(cc3m, media_name="{row:03d}.jpg")) == [
        ("000.jpg", (), ("a dog",), "http://e/a.jpg"),
        (1, "columns"),
        (2, "columns"),
        ("003.jpg", (), (), "http://e/c.jpg"),
    ]
    assert [row[0] for row in flat(read(cc12m, media_name="x/{basename}"))] == ["x/a.jpg", "x/b"]
    with pytest.raises(SourceError, match=r"say with --media-name"):
        read(cc3m)
    with pytest.raises(SourceError, match=r"row 0: wants caption TAB url"):
        read(write(tmp_path / "no.tsv", "a\tb\n"), form="cc")
    with pytest.raises(SourceError, match=r"--media-name '\{url\}': wants fields row, md5"):
        name_of("{url}", "http://e", 0)
    assert name_of("{row}_{crc32}", "http://e/a", 7) == f"7_{zlib.crc32(b'http://e/a')}"


def test_sbu_as_json_and_as_two_texts(tmp_path: Path) -> None:
    urls = ["http://static.flickr.com/1/2_a.jpg", "http://static.flickr.com/1/3_b.jpg"]
    wanted = [("2_a.jpg", (), ("my cat",), urls[0]), ("3_b.jpg", (), ("my hat",), urls[1])]
    path = write(tmp_path / "sbu-captions-all.json", {"image_urls": urls, "captions": ["my cat", "my hat"]})
    assert flat(read(path, media_name="{basename}")) == wanted
    write(tmp_path / "SBU_captioned_photo_dataset_captions.txt", "my cat \nmy hat\n")
    path = write(tmp_path / "SBU_captioned_photo_dataset_urls.txt", "\n".join(urls) + "\n")
    assert flat(read(path, media_name="{basename}")) == wanted
    path = write(tmp_path / "short.json", {"image_urls": urls, "captions": ["my cat"]})
    with pytest.raises(SourceError, match=r"short\.json: not as many urls as captions"):
        read(path, media_name="{basename}")


def test_visual_genome_keeps_distinct_phrases_of_an_image(tmp_path: Path) -> None:
    phrases = ["the clock is green", "shade is grey ", "the clock is green", "", 3]
    rows: list[dict] = [
        {"id": 1, "regions": [{"region_id": n, "phrase": phrase, "image_id": 1} for n, phrase in enumerate(phrases)]},
        {"regions": [{"phrase": "x", "image_id": 2}]},
        {"id": None, "regions": []},
    ]
    found = read(write(tmp_path / "region_descriptions.json", rows))
    assert flat(found) == [
        ("VG_100K/1.jpg", ("VG_100K_2/1.jpg", "1.jpg"), ("the clock is green", "shade is grey"), "vg/1"),
        ("VG_100K/2.jpg", ("VG_100K_2/2.jpg", "2.jpg"), ("x",), "vg/2"),
        (2, "columns"),
    ]
    with pytest.raises(SourceError, match=r"row 0: wants \{\"id\": image, \"regions\""):
        read(write(tmp_path / "no.json", [{"id": 1}]), form="vg")


def test_coco_official_and_karpathy(tmp_path: Path) -> None:
    official = {
        "info": {},
        "images": [{"id": 9, "file_name": "COCO_train2014_9.jpg"}, {"id": 8, "file_name": "COCO_train2014_8.jpg"}],
        "annotations": [
            {"image_id": 8, "caption": "eight"},
            {"image_id": 9, "caption": " nine\n"},
            {"image_id": 9, "caption": "neuf"},
        ],
    }
    assert flat(read(write(tmp_path / "captions_train2014.json", official))) == [
        ("train2014/COCO_train2014_9.jpg", ("COCO_train2014_9.jpg",), ("nine", "neuf"), "coco/COCO_train2014_9.jpg"),
        ("train2014/COCO_train2014_8.jpg", ("COCO_train2014_8.jpg",), ("eight",), "coco/COCO_train2014_8.jpg"),
    ]
    images = [
        {"filepath": "val2014", "filename": f"{split}.jpg", "split": split, "sentences": [{"raw": f"a {split}"}]}
        for split in ("train", "val", "test", "restval")
    ]
    path = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    assert [row[0] for row in flat(read(path))] == ["val2014/train.jpg", "val2014/restval.jpg"]
    assert [row[0] for row in flat(read(path, split="test"))] == ["val2014/test.jpg"]


def test_files_that_are_of_no_format(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"odd\.txt: its first bytes tell no format; give --format"):
        read(write(tmp_path / "odd.txt", "hello\nworld\n"))
    with pytest.raises(SourceError, match=r"list .*gone\.csv does not exist"):
        read(tmp_path / "gone.csv")
    with pytest.raises(SourceError, match=r"half\.json is not JSON"):
        read(write(tmp_path / "half.json", '{"images": [{"id": 1}, '))
    with pytest.raises(SourceError, match=r"bad\.jsonl, row 1: not a JSON object"):
        read(write(tmp_path / "bad.jsonl", '{"image": "a", "caption": "b"}\n{"image": \n'))


# --- into shards ---


def samples_of(folder: Path) -> dict[str, tuple]:
    index = ShardIndex.open(folder)
    samples = (index.read_sample(index.entry(row)) for row in range(len(index)))
    return {sample.media_id: (sample.media, sample.suffix, sample.captions) for sample in samples}


def test_a_folder_of_files_with_captions_beside_them(tmp_path: Path) -> None:
    root = tmp_path / "files"
    for name, data in crawled("00000/000000001", make_image(1), "jpg", "crawled"):
        write(root / name, data)
    clip, picture = make_clip(2), make_image(3, "png")
    write(root / "b" / "x.1.mp4", clip)
    write(root / "b" / "x.1.jpg", make_image(9))  # a thumbnail
    write(root / "b" / "x.1.txt", " jumps \n")
    write(root / "c.PNG", picture)
    write(root / "c.json", {"captions": ["one", "two"]})
    for number, caption in enumerate([None, b"", b"K\xe4se", b"x " * 500_000]):
        write(root / "bad" / f"{number}.png", picture)
        if caption is not None:
            write(root / "bad" / f"{number}.txt", caption)
    write(root / "bad" / "0000.json", "{")
    write(root / "bad" / "0000.png", picture)
    report = build([root], root, tmp_path / "out")
    assert samples_of(tmp_path / "out") == {
        "https://example.org/00000/000000001.jpg": (make_image(1), "jpg", ("crawled",)),
        "b/x.1.mp4": (clip, "mp4", ("jumps",)),
        "c.PNG": (picture, "png", ("one", "two")),
    }
    assert report.rejects == {"no_caption": 2, "json_invalid": 1, "caption_not_utf8": 1, "caption_too_long": 1}
    with pytest.raises(SourceError, match=r"files lies outside --media-root"):
        list(read_corpus(root, Reading(tmp_path / "out")))


def test_media_are_found_in_any_of_their_places(tmp_path: Path) -> None:
    regions = [{"id": number, "regions": [{"phrase": f"number {number}"}]} for number in range(1, 5)]
    path = write(tmp_path / "region_descriptions.json", regions)
    for number, folder in enumerate(["VG_100K", "VG_100K_2", "."], start=1):
        write(tmp_path / folder / f"{number}.jpg", make_image(number))
    report = build([path], tmp_path, tmp_path / "out")
    assert samples_of(tmp_path / "out") == {
        f"vg/{number}": (make_image(number), "jpg", (f"number {number}",)) for number in (1, 2, 3)
    }
    assert report.rejects == {"missing": 1}


def test_images_without_a_suffix_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "cc.tsv", "".join(f"a {n}\thttp://e/{n}\n" for n in ("jpg", "png", "webp", "bmp", "none")))
    for suffix in ("jpg", "png", "webp", "bmp"):
        write(tmp_path / suffix, make_image(5, suffix))
    write(tmp_path / "none", "<html>")
    report = build([path], tmp_path, tmp_path / "out", media_name="{basename}")
    assert {
        media_id.rpartition("/")[2]: suffix for media_id, (_, suffix, _) in samples_of(tmp_path / "out").items()
    } == {suffix: suffix for suffix in ("jpg", "png", "webp", "bmp")}
    assert report.rejects == {"suffix": 1}


def test_rows_of_one_file_are_merged_wherever_they_stand(tmp_path: Path) -> None:
    names = [f"{number % 7}.jpg" if number % 3 else f"single{number}.jpg" for number in range(60)]
    rows = [{"image": name, "caption": [f"c{number % 11}"]} for number, name in enumerate(names)]
    path = write(tmp_path / "list.json", rows)
    plan = make_plan(tmp_path, [path, path], "auto", Reading(tmp_path), samples_per_shard=4)
    slow: dict[str, list[str]] = {}
    for row in rows:
        slow.setdefault(row["image"], []).extend(c for c in row["caption"] if c not in slow.get(row["image"], []))
    shards = [read_span(tmp_path, plan.span(shard)) for shard in range(plan.shards)]
    assert {len(shard) for shard in shards[:-1]} == {4} and plan.samples == len(slow)
    assert [(a.path, list(a.captions)) for shard in shards for a in shard] == list(slow.items())


def test_a_long_list_is_not_held_in_memory(tmp_path: Path) -> None:
    caption = "a picture of something that takes some words to say " * 4
    path = write(tmp_path / "cc.tsv", "".join(f"{caption}{n}\thttp://e/{n}.jpg\n" for n in range(30_000)))
    tracemalloc.start()
    try:
        plan = make_plan(tmp_path, [path], "auto", Reading(tmp_path, "{basename}"), samples_per_shard=1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.samples == 30_000
    assert peak < 60 * plan.samples  # the file itself has 230 bytes a row


def test_every_format_is_described() -> None:
    assert re.findall(r"^(\w+)  ", corpora.__doc__ or "", re.M) == list(corpora.READERS)


@pytest.mark.parametrize(
    ("form", "start"), [("jsonl", '{"image": '), ("singularity", '[{"image": '), ("coco", '{"images": '), ("vg", "[")]
)
def test_json_nested_without_end_is_a_bad_file(tmp_path: Path, form: str, start: str) -> None:
    path = write(tmp_path / "deep.json", start + "[" * 200_000 + "\n")
    with pytest.raises(SourceError, match=r"deep\.json"):
        read(path, form=form)
