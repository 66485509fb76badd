"""The look at all hosts before a run: what is wrong is named with its host, and nothing waits for ever."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from smaug_ds.config import parse, to_dict
from smaug_ds.engine import inspection
from smaug_ds.engine.inspection import Facts, Inspection
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.engine.verdict import judge, slow, table
from smaug_ds.preflight import READERS
from tests.launching import settings
from tests.ranks import free_port
from tests.standin import ROOT

HOST = re.escape(socket.gethostname())


def fact(rank: int, host: str, clock: float = 100.0, **marks: str) -> Facts:
    """A rank whose ``marks`` are one name=value for each group."""
    return Facts(rank, host, clock, {group: {f"{group}.x": value} for group, value in marks.items()})


def texts(facts: list[Facts]) -> list[str]:
    return [text for groups in judge(facts).values() for told in groups.values() for text in told]


def test_hosts_that_agree_are_fine() -> None:
    assert texts([fact(0, "a", code="1", data="2"), fact(1, "a"), fact(2, "b", 100.5, code="1", data="2")]) == []


def test_the_host_that_differs_from_most_is_blamed_even_if_it_is_the_first() -> None:
    facts = [fact(0, "a", code="old"), fact(1, "b", code="new"), fact(2, "c", code="new")]
    assert texts(facts) == ["a: code.x is old, on b new"]


def test_of_two_the_main_ranks_host_is_right() -> None:
    assert texts([fact(0, "a", code="old"), fact(1, "b", code="new")]) == ["b: code.x is new, on a old"]


def test_many_differences_are_told_by_the_first() -> None:
    facts = [fact(0, "a"), fact(1, "b")]
    facts[0].marks["code"] = {f"file{i}": "1" for i in range(5)}
    facts[1].marks["code"] = {f"file{i}": "2" for i in range(4)}
    assert texts(facts) == ["b: file0 is 2, on a 1 (4 more differ)"]


def test_what_a_host_could_not_read_is_told_once() -> None:
    facts = [fact(0, "a", data="1"), fact(1, "b", data="1"), fact(2, "c")]
    facts[2].marks["data"] = {}
    facts[2].problems["data"] = ["/data is missing"]
    assert texts(facts) == ["c: /data is missing"]


def test_the_same_trouble_of_all_ranks_of_a_host_is_told_once() -> None:
    facts = [fact(0, "a"), fact(1, "b"), fact(2, "b")]
    for one in facts[1:]:
        one.problems["accelerator"] = ["no CUDA"]
    assert texts(facts) == ["b: no CUDA"]


def test_a_clock_that_is_off_is_told() -> None:
    assert texts([fact(0, "a", 1000.0), fact(1, "b", 1009.0)]) == []
    assert texts([fact(0, "a", 1000.0), fact(1, "b", 940.0)]) == ["b: the clock is -60 s off that of a: set it by NTP"]


def test_the_table_has_a_line_per_host() -> None:
    facts = [fact(rank, host, code="1") for rank, host in enumerate(["a", "a", "bb"])]
    facts[2].problems["data"] = ["gone"]
    paces = {0: 3e12, 1: 2.5e12, 2: 4e9}
    head, first, second = table(facts, judge(facts), paces, {0: 9.87654, 2: 1.0}).splitlines()
    assert head.split()[:3] == ["host", "ranks", "code"]
    assert first.split()[:3] == ["a", "0-1", "ok"] and "FAILS" not in first
    assert first.endswith("2.5 TFLOP/s  9.88 Gbit/s") and "4 GFLOP/s" in second
    assert second.split()[:5] == ["bb", "2", "ok", "ok", "FAILS"]


def test_a_rank_that_computes_at_less_than_half_the_pace_is_named() -> None:
    hosts = {0: "a", 1: "a", 2: "b"}
    assert slow(hosts, {0: 10e9, 1: 9e9, 2: 5.1e9}, {}) == []
    (warning,) = slow(hosts, {0: 10e9, 1: 9e9, 2: 4.9e9}, {})
    assert warning.startswith("b: rank 2 computes 4.9 GFLOP/s, rank 0 on a 10 GFLOP/s: ")


@pytest.mark.parametrize(
    ("links", "named"),
    [
        ({0: 100.0, 1: 0.0, 2: 34.0, 3: 90.0}, []),
        ({0: 100.0, 1: 0.0, 2: 33.0, 3: 90.0}, ["b: the link to c carries 33 Gbit/s, the fastest 1e+02"]),
        ({0: 100.0, 1: 0.0, 2: 90.0, 3: 0.9}, ["c: the link to a carries 0.9 Gbit/s, the fastest 1e+02"]),
        ({0: 0.8, 2: 0.9, 3: 1.1}, ["a: the link to b carries 0.8", "b: the link to c carries 0.9"]),
        ({0: 0.0, 1: 0.0}, []),  # ranks of one host
    ],
)
def test_a_slow_link_is_named(links: dict[int, float], named: list[str]) -> None:
    warnings = slow({0: "a", 1: "a", 2: "b", 3: "c"}, {}, links)
    assert len(warnings) == len(named)
    assert all(warning.startswith(start) for warning, start in zip(warnings, named, strict=True))


# ---- what one rank finds


@pytest.fixture
def own(toy_shards: Path, toy_media: Path, tmp_path: Path) -> list[str]:
    return settings(toy_shards, toy_media, tmp_path / "run")


def look(own: list[str], task: str = "pretrain") -> Facts:
    inspected = Inspection(0, 0, READERS[task](own))
    with inspected.seal() as seal:
        return inspected.facts(0.0, seal)


def test_a_host_without_faults(own: list[str], tmp_path: Path) -> None:
    found = look(own)
    assert found.problems == {}
    assert found.marks.keys() == {"accelerator", "code", "config", "data", "decoder"}
    assert "smaug_ds/losses.py" in found.marks["code"] and found.marks["config"]["batch.global_size"] == "16"
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("override", "group", "told"),
    [
        ("model.framse=2", "config", "unknown key model.framse"),
        ("run.deepspeed=none.json", "config", "run.deepspeed: .*none.json"),
        ("run.init_from=nowhere", "config", "run.init_from: nowhere does not exist"),
        ("data.train=[nowhere]", "data", "shard folder nowhere does not exist"),
        ("data.test=[nowhere]", "data", "shard folder nowhere does not exist"),
        ("data.tokenizer=nowhere", "config", "data.tokenizer: .*nowhere"),
        ("data.decoder=nvdec", "decoder", "data.decoder is nvdec, but no GPU"),
        (f"run.folder={__file__}/run", "run folder", "run.folder: .*Not a directory"),
        ("run.keep_checkpoints=1000000000", "run folder", "GB free, but 1000000001 more checkpoints"),
    ],
)
def test_a_fault_of_a_host_is_noted(own: list[str], override: str, group: str, told: str) -> None:
    problems = look([*own, override]).problems
    assert re.search(told, " | ".join(problems[group])), problems


def test_finetuning_needs_its_questions_and_its_start(own: list[str], toy_media: Path, tmp_path: Path) -> None:
    questions = [f"questions.train=[{toy_media / 'qa_train.json'}]", f"questions.test=[{tmp_path / 'none.json'}]"]
    found = look([*own, "task=question_answering", "model.answer_layers=1", *questions], "finetune")
    assert list(found.problems) == ["config"]
    assert re.fullmatch(r"questions.test: .*none.json'?", found.problems["config"][0])
    assert found.marks["config"][f"{toy_media / 'qa_train.json'} (questions.train)"].startswith("version ")
    assert found.marks["config"]["task"] == "question_answering" and found.marks["config"]["loss.mlm"] == "0.0"
    problems = look([*own, "run.init_from=nowhere"], "finetune").problems
    assert re.search("run.init_from: nowhere does not exist", problems["config"][0])


def test_an_evaluation_needs_its_checkpoint_and_what_it_searches(
    own: list[str], toy_shards: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").touch()
    settings = to_dict(parse(PretrainConfig, None, own))
    (checkpoint / "state.json").write_text(json.dumps({"step": 7, "config": settings}))
    (checkpoint.parent / "latest").write_text("step_7\n")
    asked = ["--checkpoint", str(tmp_path / "run")]
    found = look(asked, "evaluate")
    assert found.problems == {} and list(found.marks["data"]) == [str(toy_shards / "test")]
    assert found.marks["config"][f"{checkpoint / 'state.json'} (--checkpoint)"].startswith("version ")
    assert found.marks["config"]["evaluation.rerank_depth"] == "4"
    assert list(look([*asked, "evaluation.split=train"], "evaluate").marks["data"]) == [str(toy_shards / "train")]
    for more, group, told in [
        (["--data", "nowhere"], "data", "shard folder nowhere does not exist"),
        (["--benchmark", "none.json", "--media", "nowhere"], "data", "--media nowhere is not a folder"),
        (["--benchmark", "none.json", "--media", "nowhere"], "config", "--benchmark: .*none.json"),
        (["model.vision.depth=3"], "config", "was trained with model.vision.depth = 2"),
        (["--checkpoint", "nowhere"], "config", "checkpoint nowhere: nowhere does not exist"),
    ]:
        problems = look([*asked, *more], "evaluate").problems
        assert re.search(told, " | ".join(problems[group])), problems


def test_a_tar_that_is_cut_short_is_noted(own: list[str], toy_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for path in (toy_shards / "train").iterdir():
        (tmp_path / "shards" / path.name).symlink_to(path)
    tar = next((tmp_path / "shards").glob("*.tar"))
    tar.unlink()
    tar.write_bytes(b"short")
    assert "5 bytes" in look([*own, f"data.train=[{tmp_path / 'shards'}]"]).problems["data"][0]


def test_a_run_folder_of_its_own_is_noted(own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "SHARED_SECONDS", 0.2)
    problems = Inspection(1, 0, READERS["pretrain"](own)).facts(0.0, "nodeA 17 5.0").problems
    assert re.search(r"run\.folder: \S+/run does not show what nodeA wrote into it", problems["run folder"][0])


def test_another_rank_of_the_host_looks_at_its_device_only(own: list[str]) -> None:
    assert Inspection(1, 1, READERS["pretrain"](own)).facts(0.0, "").marks == {"accelerator": {"accelerator": "cpu"}}


# ---- ranks that meet, or do not


def start(rank: int, world_size: int, port: int, own: list[str], *more: str) -> subprocess.Popen:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": 1, "MASTER_PORT": port}
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "smaug_ds.preflight", "--join_seconds=3", *more, *own]
    return subprocess.Popen(
        command, cwd=ROOT, env={**environment, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_who_does_not_come_is_named_in_time(own: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        processes = [
            start(0, 3, free_port(), own, "--hosts=a,b,c"),
            start(0, 2, taken.getsockname()[1], own),
            start(1, 2, free_port(), own),
        ]
        ended = [(*process.communicate(timeout=100), process.returncode) for process in processes]
    assert [code for _, _, code in ended] == [2, 2, 2]
    alone, refused, lost = (errors for _, errors, _ in ended)
    assert re.search(rf"2 of 3 ranks did not come in 3 s: those of b, c \(ranks 1-2\); came: {HOST}\n", alone)
    assert re.search(rf"error: preflight: {HOST}: port \d+ cannot be opened, set another MASTER_PORT", refused)
    unreached = r"rank 1 cannot reach 127\.0\.0\.1:\d+ \(MASTER_ADDR, MASTER_PORT\) in 3 s"
    assert re.search(rf"error: preflight: {HOST}: {unreached}", lost)
