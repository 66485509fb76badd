"""The entry point of the evaluation and the pictures of a run, from a checkpoint's files to theirs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from smaug_ds import distributed, evaluate
from smaug_ds.config import ConfigError, to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.data.quarantine import DataError
from smaug_ds.data.sample import Batch
from smaug_ds.evaluation import retrieval
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.positions import resize_time
from smaug_ds.model.smaug import ModelConfig, SmaugModel
from smaug_ds.text import Tokenizer
from tests.models import small_config
from tests.ranks import run_ranks
from tools import visualise


@pytest.fixture(scope="module")
def run_folder(toy_media: Path, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves behind that evaluation needs, with random weights."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer(toy_media / "vocab.txt")
    small = small_config(3, 2)
    model = dataclasses.replace(small, text=dataclasses.replace(small.text, vocab_size=tokenizer.vocab_size))
    data = DataConfig(
        train=(str(toy_shards / "train"),), test=(str(toy_shards / "test"),), tokenizer=str(tokenizer.path), workers=0
    )
    evaluation = RetrievalConfig(rerank_depth=4, batch_size=8)
    checkpoint = folder / "checkpoints" / "step_7"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(SmaugModel(model).state_dict(), checkpoint / "model.safetensors")
    settings = {"run": {"seed": 0}, "model": to_dict(model), "data": to_dict(data), "evaluation": to_dict(evaluation)}
    (checkpoint / "state.json").write_text(json.dumps({"step": 7, "config": settings}))
    (folder / "checkpoints" / "latest").write_text("step_7\n")
    return folder


def test_read_config_is_what_was_saved(run_folder: Path) -> None:
    folder, config = evaluate.read_config(str(run_folder), None)
    assert folder == run_folder / "checkpoints" / "step_7"
    saved = json.loads((folder / "state.json").read_text())["config"]
    assert json.loads(json.dumps(to_dict(config))) == {key: saved[key] for key in ("model", "data", "evaluation")}
    _, changed = evaluate.read_config(str(folder), "elsewhere", ["evaluation.rerank_depth=0", "data.workers=3"])
    assert changed.data.test == ("elsewhere",) and changed.data.workers == 3
    assert changed.evaluation.rerank_depth == 0 and changed.evaluation.batch_size == 8
    assert changed.model == config.model and isinstance(config.model, ModelConfig)


def test_writes_report_and_table(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--local_rank=0", "--checkpoint", str(run_folder)]) == 0
    (path,) = (run_folder / "evaluation").glob("retrieval-test-*.json")
    report = json.loads(path.read_text())
    assert report["n"] == report["n_texts"] == 32 and report["left_out"] == 0
    assert report["chance_r1"] == pytest.approx(100 / 32)
    assert report["protocol"]["checkpoint"] == f"{run_folder / 'checkpoints' / 'step_7'} (7 steps)"
    assert (report["protocol"]["frames"], report["protocol"]["frames_kept"]) == (3, 2)
    assert report["protocol"]["data"] == {"name": "test", "holdout": 1.0, "unreadable": 0}
    weights = (run_folder / "checkpoints" / "step_7" / "model.safetensors").read_bytes()
    assert report["checkpoint"]["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (report["checkpoint"]["run"], report["checkpoint"]["step"]) == (run_folder.name, 7)
    assert report["command"] == f"python -m smaug_ds.evaluate --local_rank=0 --checkpoint {run_folder}"
    printed = capsys.readouterr().out
    assert "32 texts, 32 clips" in printed and "no clip left out" in printed and str(path) in printed
    # Another protocol has a file of its own, the same one again has not.
    for depth in (4, 0):
        assert evaluate.main(["--checkpoint", str(run_folder), f"evaluation.rerank_depth={depth}"]) == 0
    assert len(list((run_folder / "evaluation").glob("retrieval-test-*.json"))) == 2
    assert json.loads(path.read_text())["protocol"] == report["protocol"]


def evaluate_on_rank(run_folder: Path, out: Path) -> float:
    folder, config = evaluate.read_config(str(run_folder), None, ["evaluation.rerank_depth=5"])
    return evaluate.run(folder, config, out).mean_rank


def test_two_ranks_equal_one(run_folder: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    mean_rank = evaluate_on_rank(run_folder, alone)
    assert run_ranks(evaluate_on_rank, 2, run_folder, together) == [mean_rank] * 2
    assert json.loads(alone.read_text()) == json.loads(together.read_text())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["evaluation.rerank_dept=3"], "unknown key evaluation.rerank_dept"),
        (["data.test=[nowhere]"], "data.test: "),
        (["data.tokenizer=nowhere.txt"], "data.tokenizer: nowhere.txt"),
        (["model.projection=17"], "was trained with model.projection = 16, which cannot be 17"),
        (["model.text.heads=2"], "was trained with model.text.heads = 4"),
        (["--benchmark", "nowhere.json", "--media", "nowhere"], "--benchmark: nowhere.json cannot be read"),
        (["--compare", "nowhere.json"], "--compare nowhere.json"),
        (["model.frames_kept=4"], "model.frames_kept is 4"),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(
    run_folder: Path, changed: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = [] if "--compare" in changed else ["--checkpoint", str(run_folder)]
    assert evaluate.main([*checkpoint, *changed]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("error: ") and message in printed and "\n" not in printed


def test_data_that_fail_are_one_line(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise DataError("rank 1: data worker 7 died")

    monkeypatch.setattr(evaluate, "run", fail)
    assert evaluate.main(["--checkpoint", str(run_folder)]) == 1
    assert capsys.readouterr().err == "error: rank 1: data worker 7 died\n"


def test_other_numbers_of_frames(run_folder: Path, tmp_path: Path) -> None:
    """Of a checkpoint that has learnt to choose 2 of 3 frames."""
    weights = load_file(run_folder / "checkpoints" / "step_7" / "model.safetensors")
    table = "temporal.position_embedding"
    for frames, kept in ((6, 4), (6, 6), (2, 2)):
        wanted = [f"model.frames={frames}", f"model.frames_kept={kept}"]
        folder, config = evaluate.read_config(str(run_folder), None, wanted)
        model, _ = evaluate.load_model(folder, config)
        assert torch.equal(model.state_dict()[table], resize_time(weights[table], frames))
        assert hasattr(model, "selector") == (kept < frames)
    report = evaluate.run(folder, config, tmp_path / "two.json").protocol
    assert (report["frames"], report["frames_kept"]) == (2, 2)
    written = json.loads((tmp_path / "two.json").read_text())["protocol"]["training"]
    assert (written["frames"], written["frames_kept"], written["text.max_length"]) == (3, 2, 12)
    folder, config = evaluate.read_config(str(run_folder), None, ["model.frames=1", "model.frames_kept=1"])
    assert not any(name.startswith("temporal.") for name in evaluate.load_model(folder, config)[0].state_dict())


@pytest.fixture
def single_frame_run(run_folder: Path, tmp_path: Path) -> Path:
    """A run of the single-frame stage."""
    folder = tmp_path / "single"
    shutil.copytree(run_folder / "checkpoints", folder / "checkpoints")
    checkpoint = folder / "checkpoints" / "step_7"
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["model"] |= {"frames": 1, "frames_kept": 1}
    (checkpoint / "state.json").write_text(json.dumps(state))
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: value for name, value in weights.items() if name.split(".")[0] not in ("temporal", "selector")}
    save_file(kept, checkpoint / "model.safetensors")
    return folder


def test_single_frame_checkpoint_sees_several(single_frame_run: Path) -> None:
    folder, config = evaluate.read_config(str(single_frame_run), None, ["model.frames=3"])
    assert config.model.frames_kept == 3
    model, _ = evaluate.load_model(folder, config)
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, alone = model.encode_frames(frames), model.encode_frames(frames.flatten(0, 1)[:, None])
    assert torch.allclose(together.tokens.flatten(0, 1), alone.tokens[:, 0], atol=1e-6)
    folder, config = evaluate.read_config(str(single_frame_run), None, ["model.frames=3", "model.frames_kept=2"])
    with pytest.raises(ConfigError, match=r"has not learnt to choose frames: set model\.frames_kept=3"):
        evaluate.load_model(folder, config)


def test_a_vocabulary_of_the_same_size_is_told_from_the_own(single_frame_run: Path) -> None:
    checkpoint = single_frame_run / "checkpoints" / "step_7"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"fingerprints": {"data.tokenizer": "0" * 64}}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .* holds another vocabulary"):
        evaluate.load_model(*evaluate.read_config(str(single_frame_run), None))
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": {"sha256": "0" * 64}}}))
    with pytest.raises(ConfigError, match="is damaged"):
        evaluate.identify(checkpoint)


def make_benchmark(toy_media: Path, path: Path) -> list[dict[str, Any]]:
    """A list of 6 of the test clips, with texts of its own, and of one that is nowhere."""
    rows = json.loads((toy_media / "video_test.json").read_text())[3:9]
    rows = [{"video": row["video"], "caption": [f"clip {i}", f"text {i}"][: 1 + i % 2]} for i, row in enumerate(rows)]
    path.write_text(json.dumps([*rows, {"video": "nowhere.mp4", "caption": "nothing"}]))
    return rows


def test_benchmark(
    run_folder: Path, toy_media: Path, toy_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_benchmark(toy_media, tmp_path / "bench.json")
    asked = ["--checkpoint", str(run_folder), "--benchmark", str(tmp_path / "bench.json")]
    places = {"media": ["--media", str(toy_media)], "shards": ["--data", str(toy_shards / "test")]}
    assert evaluate.main([*asked, *places["media"]]) == 2
    assert "1 of 7 videos are missing" in capsys.readouterr().err
    reports = {}
    for name, place in places.items():
        out = tmp_path / f"{name}.json"
        assert evaluate.main([*asked, *place, "--allow-missing", "1", "--out", str(out)]) == 0
        reports[name] = json.loads(out.read_text())
        assert (reports[name]["n_videos"], reports[name]["n_texts"]) == (6, 9)
        data = reports[name]["protocol"]["data"]
        assert (data["name"], data["videos"], data["missing"]) == ("bench", "6 of 7", ["nowhere.mp4"])
        assert "6 of 7 videos, 1 missing" in capsys.readouterr().out
    assert reports["media"]["mean_rank"] == reports["shards"]["mean_rank"]
    folder, config = evaluate.read_config(str(run_folder), None, ["evaluation.join_captions=true"])
    searched = evaluate.Searched(tmp_path / "bench.json", None, toy_media, 1)
    result = evaluate.run(folder, config, tmp_path / "joined.json", searched)
    assert sorted(result.details.texts) == sorted(" ".join(row["caption"]) for row in rows)
    assert result.protocol["captions"] == "joined"


def test_real_clips(run_folder: Path, shared_data: Path, tmp_path: Path) -> None:
    """The lists over real clips: every text a query, and paragraphs in the layout of ActivityNet Captions."""
    tokenizer = Tokenizer(shared_data / "tokenizer" / "bert_base_uncased_vocab.txt")
    checkpoint = tmp_path / "checkpoints" / "step_7"
    shutil.copytree(run_folder / "checkpoints" / "step_7", checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["model"]["text"]["vocab_size"] = tokenizer.vocab_size
    state["config"]["data"]["tokenizer"] = str(tokenizer.path)
    (checkpoint / "state.json").write_text(json.dumps(state))
    _, config = evaluate.read_config(str(checkpoint), None)
    save_file(SmaugModel(config.model).state_dict(), checkpoint / "model.safetensors")
    for name, counts, captions in (
        ("video_test.json", (38, 38), "each a query"),
        ("paragraph_activitynet_format.json", (3, 3), "joined"),
    ):
        searched = evaluate.Searched(
            shared_data / "annotations" / "project" / name, None, shared_data, allowed_missing=0
        )
        folder, config = evaluate.read_config(str(checkpoint), None, ["model.text.max_length=64"])
        result = evaluate.run(folder, config, tmp_path / name, searched)
        assert (result.n_videos, result.n_texts) == counts and result.protocol["captions"] == captions


def benchmark_on_rank(run_folder: Path, toy_media: Path, benchmark: Path, out: Path) -> float:
    folder, config = evaluate.read_config(str(run_folder), None, ["evaluation.batch_size=2"])
    return evaluate.run(folder, config, out, evaluate.Searched(benchmark, None, toy_media, 1)).mean_rank


def test_benchmark_over_two_ranks(run_folder: Path, toy_media: Path, tmp_path: Path) -> None:
    make_benchmark(toy_media, tmp_path / "bench.json")
    alone = benchmark_on_rank(run_folder, toy_media, tmp_path / "bench.json", tmp_path / "alone.json")
    together = tmp_path / "together.json"
    assert run_ranks(benchmark_on_rank, 2, run_folder, toy_media, tmp_path / "bench.json", together) == [alone] * 2
    assert json.loads((tmp_path / "alone.json").read_text()) == json.loads(together.read_text())


def test_a_video_that_cannot_be_decoded_is_counted(run_folder: Path, toy_media: Path, tmp_path: Path) -> None:
    rows = make_benchmark(toy_media, tmp_path / "bench.json")
    media = tmp_path / "media"
    shutil.copytree(toy_media, media)
    (media / rows[2]["video"]).write_bytes(b"no video")
    folder, config = evaluate.read_config(str(run_folder), None)
    evaluate.run(folder, config, tmp_path / "out.json", evaluate.Searched(tmp_path / "bench.json", None, media, 1))
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["n_videos"], report["left_out"]) == (5, 1)
    assert (report["protocol"]["data"]["videos"], report["protocol"]["data"]["unreadable"]) == ("5 of 7", 1)


def test_two_videos_of_one_file_are_refused(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"")
    rows = [{"video": "x.mp4", "caption": "one"}, {"video": "x", "caption": "two"}]
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    folder, config = evaluate.read_config(str(run_folder), None)
    with pytest.raises(ConfigError, match=f"x.mp4 and x are both {tmp_path}/x.mp4"):
        evaluate.run(folder, config, None, evaluate.Searched(tmp_path / "bench.json", None, tmp_path))


def test_options_that_do_not_go_together(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--checkpoint", str(run_folder)]
    for arguments, message in (
        ([], "give --checkpoint, or results"),
        ([*run, "--media", "x"], "belong to --benchmark"),
        ([*run, "--benchmark", "x"], "where its videos are"),
    ):
        with pytest.raises(SystemExit) as left:
            evaluate.main(arguments)
        assert left.value.code == 2 and message in capsys.readouterr().err


def test_compare(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for depth in (4, 0):
        paths.append(tmp_path / f"{depth}.json")
        folder, config = evaluate.read_config(str(run_folder), None, [f"evaluation.rerank_depth={depth}"])
        evaluate.run(folder, config, paths[-1])
    report = json.loads(paths[0].read_text())
    (tmp_path / "other.json").write_text(
        json.dumps(report | {"checkpoint": report["checkpoint"] | {"weights_sha256": "5"}})
    )
    (tmp_path / "summary.json").write_text(json.dumps({"retrieval": {**report, "checkpoint": None}}))
    capsys.readouterr()
    assert evaluate.main(["--compare", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert "The protocols differ, so the figures do not measure the same thing:" in printed
    assert "rerank_depth: A 4, B 0" in printed and "frames:" not in printed and "The weights are the same." in printed
    assert f"t2v_r1                      {report['t2v_r1']:11.2f}" in printed
    assert evaluate.main(["--compare", str(paths[0]), str(tmp_path / "other.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("The protocols are the same.\n")
    assert evaluate.main(["--compare", str(paths[0]), str(tmp_path / "summary.json")]) == 0
    assert "its weights are not on record" in capsys.readouterr().out
    (tmp_path / "foreign.json").write_text("[1]")
    assert evaluate.main(["--compare", str(tmp_path / "foreign.json")]) == 2


def lose_clips_on_rank_1(run_folder: Path) -> str | None:
    def clips() -> Iterator[Batch]:
        if distributed.rank() == 1:
            raise DataError("data worker 7 died")
        yield from ()

    folder, config = evaluate.read_config(str(run_folder), None)
    model, tokenizer = evaluate.load_model(folder, config)
    try:
        retrieval.evaluate(model, clips(), tokenizer, config.evaluation)
    except DataError as error:
        return str(error)
    return None


def test_data_that_fail_on_one_rank_end_the_evaluation_on_all(run_folder: Path) -> None:
    assert run_ranks(lose_clips_on_rank_1, 2, run_folder) == ["rank 1: data worker 7 died"] * 2


def test_vocabulary_of_another_size(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nball\n")
    assert evaluate.main(["--checkpoint", str(run_folder), f"data.tokenizer={tmp_path / 'vocab.txt'}"]) == 2
    assert "has 6 entries, but the checkpoint's model.text.vocab_size is " in capsys.readouterr().err


def test_visualise(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert visualise.main([str(run_folder), "--out", str(tmp_path / "pictures"), "--samples", "3"]) == 0
    names = {"reconstruction", "kept_tokens", "chosen_frames", "retrieval"}
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == names
    assert len(capsys.readouterr().out.splitlines()) == 4
    for name in names:
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            assert picture.width >= 1000
    assert visualise.main([str(tmp_path)]) == 2
