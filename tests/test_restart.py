"""The shard tools end in the middle, by a signal or for want of room, and go on as if nothing had been."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smaug_ds.data.index import ShardIndex
from smaug_ds.data.indexing import build_index
from smaug_ds.data.parallel import alone_in, on_processes, room_in
from smaug_ds.data.shard import ShardError
from smaug_ds.data.sharding import build
from tests.conftest import ROOT
from tests.shards import crawled, make_clip, make_image, write_tar


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Ten pictures and a clip, with a file that is missing and one named twice; list.json."""
    root = tmp_path / "media"
    root.mkdir()
    rows = [{"image": f"{number}.png", "caption": f"image {number}"} for number in range(10)]
    for number in range(10):
        (root / f"{number}.png").write_bytes(make_image(20 * number, "png"))
    (root / "clip.mp4").write_bytes(make_clip(10))
    rows[3:3] = [{"video": "clip.mp4", "caption": "a clip"}, {"image": "gone.png", "caption": "nothing"}]
    rows.append({"image": "1.png", "caption": "again"})
    (root / "list.json").write_text(json.dumps(rows))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def killed_at_step(step: int, work: Callable[[], object]) -> bool:
    """Runs ``work`` in a fork that is killed at its ``step``-th write to the disk or move; whether it came to that."""
    child = os.fork()
    if not child:
        steps = 0

        def counted(function: Callable) -> Callable:
            def call(*arguments: object, **named: object) -> object:
                nonlocal steps
                steps += 1
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **named)

            return call

        for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (shutil, "rmtree")):
            setattr(module, name, counted(getattr(module, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_build_killed_at_any_step_goes_on_to_the_same_bytes(media: Path, tmp_path: Path) -> None:
    def work() -> None:
        build([media / "list.json"], media, tmp_path / "out" / "shards", samples_per_shard=6)

    build([media / "list.json"], media, tmp_path / "whole", samples_per_shard=6)
    whole = contents(tmp_path / "whole")
    for step in range(1, 1000):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if not killed_at_step(step, work):
            break
        work()
        assert contents(tmp_path / "out" / "shards") == whole, f"killed at step {step}"
        assert os.listdir(tmp_path / "out") == ["shards"], f"killed at step {step}"
    assert 15 < step < 1000


def test_an_indexing_killed_at_any_step_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / "whole" / f"{number}.tar", crawled(str(number), make_image(number), "jpg", "a"))
    shutil.copytree(tmp_path / "whole", tmp_path / "tars")
    build_index(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for step in range(1, 1000):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(tmp_path / "tars", tmp_path / "cut")
        if step % 2:
            build_index(tmp_path / "cut")  # an older index stands there
        if not killed_at_step(step, lambda: build_index(tmp_path / "cut")):
            break
        build_index(tmp_path / "cut")
        assert contents(tmp_path / "cut") == whole, f"killed at step {step}"
    assert 10 < step < 1000


def test_finished_shards_are_not_made_again(media: Path, tmp_path: Path) -> None:
    arguments = ([media / "list.json"], media, tmp_path / "out")
    killed_at_step(20, lambda: build(*arguments, samples_per_shard=2))
    records = sorted((tmp_path / "out.partial" / ".build").glob("0*.json"))
    assert 1 < len(records) < 6
    before = {record.stem: (tmp_path / "out.partial" / f"{record.stem}.tar").stat().st_mtime_ns for record in records}
    (tmp_path / "out.partial" / "00005.tar").write_bytes(b"half of it, without a record")
    (tmp_path / "out.partial" / "00001.tar.77.tmp").write_bytes(b"what another process was writing")
    last = tmp_path / "out.partial" / f"{records[-1].stem}.tar"
    os.truncate(last, 100)  # a record whose tar is not what it says
    report = build(*arguments, samples_per_shard=2)
    for name, stamp in before.items():
        kept = (tmp_path / "out" / f"{name}.tar").stat().st_mtime_ns == stamp
        assert kept == (name != last.stem)
    assert report.made < report.index.samples == 11
    build(arguments[0], media, tmp_path / "whole", samples_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 5}, "samples_per_shard = 4, this command has 5"),
        ({"form": "singularity"}, 'format = "auto", this command has "singularity"'),
        ({"media_name": "{md5}"}, "media_name"),
        ({"lists": "other.json"}, "lists"),
        ({"media_root": "other"}, "media_root"),
    ],
)
def test_another_command_on_a_started_or_finished_build_is_refused(
    media: Path, tmp_path: Path, change: dict, message: str
) -> None:
    (media / "other").mkdir()
    (media / "other.json").write_text('[{"image": "1.png", "caption": "x"}]')
    command = {"lists": [media / "list.json"], "media_root": media, "out": tmp_path / "out", "samples_per_shard": 4}
    killed_at_step(14, lambda: build(**command))
    other = command | change
    if "lists" in change:
        other["lists"] = [media / "other.json"]
    if "media_root" in change:
        other["media_root"] = media / "other"
    with pytest.raises(ShardError, match=rf"out\.partial holds a build with .*{message}"):
        build(**other)
    report = build(**command)
    with pytest.raises(ShardError, match=rf"out holds a build with .*{message}"):
        build(**other)
    again = build(**command)
    assert (again.made, again.index, again.rejects) == (0, report.index, report.rejects)


@pytest.mark.parametrize("gone", [{"plan.jsonl", "00000.json"}, {"plan.json"}, {"plan.jsonl", "bad_rows.jsonl"}, None])
def test_a_build_killed_while_it_clears_up_is_finished(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: set[str] | None
) -> None:
    """A folder is removed file by file in any order: ``gone`` are those that went before the kill, None: all."""
    arguments = ([media / "list.json"], media, tmp_path / "out")
    remove = shutil.rmtree

    def killed(path: Path, *rest: object, **named: object) -> None:
        if Path(path).name != ".build":
            return remove(path, *rest, **named)
        for file in list(Path(path).iterdir()):
            if gone is None or file.name in gone:
                file.unlink()
        if gone is None:
            Path(path).rmdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        build(*arguments, samples_per_shard=6)
    report = build(*arguments, samples_per_shard=6)
    assert (report.made, report.index.samples, report.rejects) == (0, 11, {"missing": 1})
    build([media / "list.json"], media, tmp_path / "whole", samples_per_shard=6)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["media", "out", "whole"]


def test_the_lock_is_held_until_the_folder_is_in_place(
    media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command tries before and after every removal and move of the last phase."""
    arguments = ([media / "list.json"], media, tmp_path / "out")
    tried = []

    def watched(function: Callable) -> Callable:
        def call(*paths: object, **named: object) -> object:
            attempt(f"before {function.__name__}")
            function(*paths, **named)
            attempt(f"after {function.__name__}")

        return call

    def attempt(moment: str) -> None:
        if (tmp_path / "out.partial" / "report.json").exists():
            with pytest.raises(ShardError, match="another command is at work"), alone_in(tmp_path / "out.partial"):
                pass
            tried.append(moment)

    with monkeypatch.context() as patch:
        for module, name in ((shutil, "rmtree"), (os, "replace")):
            patch.setattr(module, name, watched(getattr(module, name)))
        build(*arguments)
    assert tried[-3:] == ["before rmtree", "after rmtree", "before replace"]
    assert sorted(os.listdir(tmp_path)) == ["media", "out"]


def test_a_lock_that_was_removed_keeps_nobody_out_and_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def after_the_other_has_ended(file: Any, operation: int) -> None:
        flock(file, operation)
        (tmp_path / "work" / "lock").unlink()

    monkeypatch.setattr(fcntl, "flock", after_the_other_has_ended)
    with pytest.raises(ShardError, match="another command is at work"), alone_in(tmp_path / "work"):
        pass


def test_changed_sources_are_another_build(media: Path, tmp_path: Path) -> None:
    """The second text of SBU, captions of a folder; what the build itself writes into that folder does not count."""
    urls, captions = media / "sbu_urls.txt", media / "sbu_captions.txt"
    urls.write_text("http://x/0.png\nhttp://x/1.png\n")
    captions.write_text("a dog\na cat\n")
    sbu = ([urls], media, tmp_path / "sbu")
    build(*sbu, media_name="{basename}")
    build(*sbu, media_name="{basename}")
    captions.write_text("a dog\na cow\n")
    with pytest.raises(ShardError, match="sbu holds a build with lists"):
        build(*sbu, media_name="{basename}")
    folder = media / "files"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.png").write_bytes(make_image(1, "png"))
    (folder / "deep" / "a.txt").write_text("a dog")
    assert build([folder], folder, folder / "out").made == 1
    assert build([folder], folder, folder / "out").made == 0
    (folder / "deep" / "a.txt").write_text("two dogs")
    with pytest.raises(ShardError, match="out holds a build with lists"):
        build([folder], folder, folder / "out")


def test_two_builds_of_one_folder_do_not_meet(media: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    lock = "import fcntl, sys; fcntl.flock(f := open(sys.argv[1], 'w'), fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", lock, work / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(ShardError, match=r"another command is at work in .*out\.partial"):
            build([media / "list.json"], media, tmp_path / "out")
        other.kill()
    assert build([media / "list.json"], media, tmp_path / "out").index.samples == 11


# --- no room ---


def limited(bytes_per_file: int, *command: object) -> subprocess.CompletedProcess[str]:
    """A tool whose files may grow to so many bytes, as on a full disk."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, resource.RLIM_INFINITY)),
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_without_room_says_so_and_goes_on_later(tmp_path: Path, workers: int) -> None:
    root = tmp_path / "media"
    root.mkdir()
    noise = random.Random(1)
    for number in range(8):
        size = 400 if number < 6 else 4000
        (root / f"{number}.png").write_bytes(make_image(number, "png") + noise.randbytes(size * 10))
        (root / f"{number}.txt").write_text(f"image {number}")
    command = ("tools/build_shards.py", "--list", root, "--out", tmp_path / "out", "--samples-per-shard", 2)
    failed = limited(40_000, *command, "--workers", workers)
    assert failed.returncode == 2, failed.stderr
    line = failed.stderr.splitlines()[-1]
    assert line.startswith(
        f"error: cannot write into {tmp_path / 'out'}.partial: no larger file allowed (File too large"
    )
    needed = sum((root / f"{number}.png").stat().st_size for number in (6, 7))
    assert f"{needed} bytes needed" in line and "bytes free); what is finished is kept" in line
    assert "Traceback" not in failed.stderr
    finished = sorted(file.name for file in (tmp_path / "out.partial").glob("*.tar"))
    assert finished == ["00000.tar", "00001.tar", "00002.tar"] and not list(tmp_path.rglob("*.tar.*.tmp"))
    report = build([root], root, tmp_path / "out", samples_per_shard=2)
    assert (report.made, report.index.samples) == (2, 8)
    build([root], root, tmp_path / "whole", samples_per_shard=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_indexing_without_room_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [part for n in range(40) for part in crawled(str(n), make_image(1), "jpg", "a")])
    failed = limited(1000, "tools/index_shards.py", tmp_path, "--workers", 1)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith(f"error: cannot write into {tmp_path}: no larger file allowed")
    assert not (tmp_path / "index").exists()
    build_index(tmp_path)
    assert len(ShardIndex.open(tmp_path)) == 40


def test_only_want_of_room_is_called_so(tmp_path: Path) -> None:
    message = r"the disk is full \(No space left on device; 7 bytes needed, \d+ bytes free"
    with pytest.raises(ShardError, match=message), room_in(tmp_path, lambda: 7):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), room_in(tmp_path):
        raise PermissionError(errno.EACCES, "no")


# --- processes that are killed ---


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_ends_the_work_with_a_message() -> None:
    with (
        pytest.raises(ShardError, match=r"a worker process was killed .* run the same command again"),
        on_processes(die, range(8), 2) as results,
    ):
        list(results)


def children(process: int) -> list[int]:
    """Processes below ``process``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_the_tool_killed_at_random_moments_makes_the_same_shards(tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    for number in range(24):
        (root / f"{number:02d}.mp4").write_bytes(make_clip(number, frames=60, size=(320, 240)))
        (root / f"{number:02d}.txt").write_text(f"clip {number}")
    command = [sys.executable, "tools/build_shards.py", "--list", root, "--samples-per-shard", "2", "--workers", "2"]
    command += ["--reencode", "--short-side", "200", "--out"]
    subprocess.run([*command, tmp_path / "whole"], cwd=ROOT, check=True, capture_output=True, timeout=120)
    draw = random.Random(5)
    partial = tmp_path / "out.partial"
    kills = 0
    for _ in range(30):
        with subprocess.Popen([*command, tmp_path / "out"], cwd=ROOT, stderr=subprocess.DEVNULL) as tool:
            finished = draw.choice((1, 2, 3)) + 3 * kills  # shards; from there a moment on
            while kills < 2 and tool.poll() is None and len([*partial.glob("*.tar")]) < finished:
                time.sleep(0.005)
            if kills == 2 or tool.poll() is not None:
                tool.wait(120)
                break
            time.sleep(draw.uniform(0, 0.2))
            workers = children(tool.pid)
            tool.kill()
            tool.wait()
            kills += 1
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline, "workers outlive the tool"
            time.sleep(0.05)
    assert kills
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
