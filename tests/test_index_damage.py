"""Tars and indexes that are damaged, replaced or gone are named, whether while indexing, opening or reading."""

from __future__ import annotations

import errno
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from smaug_ds.data import indexing, scanning
from smaug_ds.data.index import Corpus, ShardIndex
from smaug_ds.data.indexing import build_index
from smaug_ds.data.quarantine import DataError
from smaug_ds.data.shard import ShardError
from tests.shards import crawled, make_image, read_all, write_tar


@pytest.mark.parametrize("part", ["first header", "header", "media", "end marker"])
def test_a_truncated_tar_is_named(tmp_path: Path, part: str) -> None:
    path = write_tar(
        tmp_path / "00007.tar", crawled("0", make_image(1), "jpg", "a") + crawled("1", b"x" * 5000, "jpg", "b")
    )
    with tarfile.open(path) as tar:
        last = tar.getmember("1.jpg")
        end = max(member.offset_data for member in tar) + tarfile.BLOCKSIZE
    cut = {"first header": 100, "header": last.offset + 100, "media": last.offset_data + 600, "end marker": end}[part]
    os.truncate(path, cut)
    with pytest.raises(ShardError, match=r"00007\.tar is cut short"):
        build_index(tmp_path)
    assert not (tmp_path / "index").exists()


def test_a_header_damaged_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "0.tar", crawled("0", make_image(1), "jpg", "a") + crawled("1", make_image(2), "jpg", "b")
    )
    with tarfile.open(path) as tar:
        offset = tar.getmember("1.json").offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"0\.tar is damaged: .* at byte {offset}"):
        build_index(tmp_path)


def test_what_open_refuses(tmp_path: Path) -> None:
    def opening(message: str) -> None:
        with pytest.raises(ShardError, match=message):
            ShardIndex.open(folder)

    folder = tmp_path / "shards"
    opening(r"shard folder .*shards does not exist")
    folder.mkdir()
    opening(r"shards holds no \.tar file")
    first, second = (write_tar(folder / f"{n}.tar", crawled(str(n), make_image(n), "jpg", "a")) for n in range(2))
    opening(r"has 2 tars but no index; run: python tools/index_shards\.py .*shards")
    build_index(folder)
    assert len(ShardIndex.open(folder)) == 2

    whole = second.read_bytes()
    second.write_bytes(whole + b"\0" * 512)
    opening(rf"1\.tar has {len(whole) + 512} bytes, {len(whole)} when it was indexed")
    second.unlink()
    opening(r"1\.tar is in the index but missing")
    second.write_bytes(whole)
    write_tar(folder / "2.tar", crawled("2", make_image(2), "jpg", "a"))
    opening(r"2\.tar and 0 more tars are not in the index")
    build_index(folder)
    assert len(ShardIndex.open(folder)) == 3

    manifest = folder / "index" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 1', '"format": 99'))
    opening("format 99, this version reads 1")
    manifest.write_text(text[:50])
    opening("manifest.json is damaged")
    manifest.write_text(text)
    os.truncate(folder / "index" / "bucket.npy", 40)
    opening(r"bucket\.npy cannot be read")
    assert first.exists()


def test_a_tar_replaced_by_another_of_the_same_length_is_noticed(tmp_path: Path) -> None:
    image = make_image(1)
    path = write_tar(
        tmp_path / "0.tar", crawled("a", image, "jpg", "caption a") + crawled("b", image, "jpg", "caption b")
    )
    build_index(tmp_path)
    size = path.stat().st_size
    write_tar(path, crawled("b", image, "jpg", "caption b") + crawled("a", image, "jpg", "caption a"))
    assert path.stat().st_size == size
    index = ShardIndex.open(tmp_path)
    for row in range(2):
        with pytest.raises(ShardError, match=r"0\.tar: found [ab]\.jpg .* was indexed; index it again"):
            index.read_sample(index.entry(row))


def test_a_tar_that_shrinks_or_goes_while_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", crawled("a", make_image(1), "jpg", "caption a"))
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    other = pickle.loads(pickle.dumps(index))
    path.rename(tmp_path / "gone")
    with pytest.raises(ShardError, match=r"0\.tar cannot be read at sample a"):
        other.read_sample(other.entry(0))
    (tmp_path / "gone").rename(path)
    os.truncate(path, 1100)
    with pytest.raises(ShardError, match=r"0\.tar ends at byte 1100, but sample a goes to byte"):
        index.read_sample(index.entry(0))


def test_a_handle_that_went_stale_is_opened_anew(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", crawled("a", make_image(1), "jpg", "caption a"))
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    expected = read_all(index)
    stale = os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY)  # every read of it fails
    os.dup2(stale, index._shard_file(str(path))._descriptor)
    os.close(stale)
    assert read_all(index) == expected


def test_an_index_that_can_no_longer_be_read_is_no_samples_failure(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", crawled("a", make_image(1), "jpg", "caption a"))
    build_index(tmp_path)
    index = ShardIndex.open(tmp_path)
    os.truncate(tmp_path / "index" / "samples.npy", 130)
    with pytest.raises(DataError, match=r"samples\.npy was cut short"):
        index.entry(0)
    unreadable = os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY)
    os.dup2(unreadable, index._samples._descriptor)
    os.close(unreadable)
    with pytest.raises(DataError, match=r"samples\.npy can no longer be read"):
        index.entry(0)


def test_an_index_made_anew_is_not_taken_for_the_one_in_use(tmp_path: Path) -> None:
    """A worker that is replaced would take other samples for those of the order, and their failures for theirs."""
    write_tar(tmp_path / "1.tar", crawled("old", make_image(1), "jpg", "caption a"))
    build_index(tmp_path)
    corpus = Corpus.open([tmp_path], 0.0, "train")
    pickled = pickle.dumps(corpus)
    build_index(tmp_path)  # of the same tars
    assert pickle.loads(pickled).entry("image", 0, 0) == corpus.entry("image", 0, 0)
    write_tar(tmp_path / "0.tar", crawled("new", make_image(2), "jpg", "caption b"))
    build_index(tmp_path)
    with pytest.raises(ShardError, match=f"{tmp_path} was indexed anew while it is in use"):
        pickle.loads(pickled)


def test_all_bad_tars_are_named_and_can_be_skipped(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", crawled(str(number), make_image(number), "jpg", "a"))
    os.truncate(tmp_path / "1.tar", 700)
    (tmp_path / "2.tar").unlink()
    (tmp_path / "2.tar").symlink_to("/proc/self/mem")  # opens, but reading it fails, whoever reads
    message = r"2 of 4 tars cannot be used:\n.*1\.tar is cut short.*\n.*2\.tar cannot be read: Input/output error\n"
    with pytest.raises(ShardError, match=message):
        build_index(tmp_path)
    assert not (tmp_path / "index").exists()
    report = build_index(tmp_path, skip_bad_shards=True)
    assert report.samples == 2
    index = ShardIndex.open(tmp_path)
    assert [sample.key for sample in read_all(index)] == ["0", "3"]
    assert [(tar["name"], tar["bytes"]) for tar in index.manifest["skipped"]] == [("1.tar", 700), ("2.tar", 0)]
    os.truncate(tmp_path / "1.tar", 600)
    with pytest.raises(ShardError, match=r"1\.tar and 0 more tars are not in the index"):
        ShardIndex.open(tmp_path)
    (tmp_path / "1.tar").unlink()
    assert len(ShardIndex.open(tmp_path)) == 2  # one that was skipped may go
    for name in ("0.tar", "3.tar"):
        os.truncate(tmp_path / name, 700)
    with pytest.raises(ShardError, match=r"not one usable sample in 3 tars; the first: .*0\.tar is cut short"):
        build_index(tmp_path, skip_bad_shards=True)


def test_a_broken_off_indexing_scans_only_what_is_left_or_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []

    def scan(path: Path) -> scanning.Scan:
        scanned.append(path.name)
        return scanning.scan_tar(path)

    monkeypatch.setattr(indexing, "scan_tar", scan)
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", crawled(str(number), make_image(number), "jpg", f"old {number}"))
    whole = (tmp_path / "2.tar").read_bytes()
    os.truncate(tmp_path / "2.tar", 700)
    with pytest.raises(ShardError, match="cut short"):
        build_index(tmp_path)
    assert scanned == ["0.tar", "1.tar", "2.tar", "3.tar"]
    (tmp_path / "2.tar").write_bytes(whole)
    status = (tmp_path / "1.tar").stat()
    write_tar(tmp_path / "1.tar", crawled("1", make_image(1), "jpg", "new 1"))  # of the same size
    os.utime(tmp_path / "1.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    scanned.clear()
    build_index(tmp_path)
    assert scanned == ["1.tar", "2.tar"]
    assert [sample.captions for sample in read_all(ShardIndex.open(tmp_path))] == [
        (caption,) for caption in ("old 0", "new 1", "old 2", "old 3")
    ]
    assert not (tmp_path / ".index.partial").exists()


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "0.tar", crawled("a", make_image(1), "jpg", "a dog"))

    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)  # tests may run as root, who may write everywhere
        with pytest.raises(ShardError, match=rf"cannot write into {tmp_path}: Permission denied .*\.index\.partial"):
            build_index(tmp_path)
    (tmp_path / ".index.partial").write_bytes(b"")
    with pytest.raises(ShardError, match=f"cannot write into {tmp_path}: File exists"):
        build_index(tmp_path)
