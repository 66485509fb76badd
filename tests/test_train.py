"""The loop at two ranks: resume, stopping together, refusing what is not finite; then real runs, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smaug_ds import distributed
from smaug_ds.config import ConfigError, parse
from smaug_ds.data.index import Corpus
from smaug_ds.data.quarantine import DataError, Failure, read_ledgers
from smaug_ds.engine import checkpoint
from smaug_ds.engine.deepspeed import build_engine
from smaug_ds.engine.files import Retention
from smaug_ds.engine.monitor import Monitor, NonFiniteError, truncate_lines
from smaug_ds.engine.optim import OptimConfig, Schedule
from smaug_ds.engine.preempt import EXIT_CODE, StopRequest
from smaug_ds.engine.saving import Saver
from smaug_ds.engine.train import Actions, BatchConfig, PretrainConfig, RunConfig, train
from smaug_ds.engine.watchdog import Watchdog
from tests.launching import finish, launch, settings
from tests.models import small_config, small_model
from tests.ranks import run_ranks
from tests.standin import CPU_JSON, ROOT, Batches, Standin, order_of, write_json

TOTAL, GLOBAL, MICRO, ACCUMULATION = 9, 8, 2, 2  # of 2 ranks
OPTIM = OptimConfig(lr=0.01, min_lr=0.0, warmup_steps=2)
TIMINGS = ("seconds_per_step", "samples_per_second")


def run(
    folder: Path,
    module: Standin,
    stop_at: int = -1,
    log_every: int = 1,
    total: int = TOTAL,
    lose_at: int = -1,
    json: Path = CPU_JSON,
) -> dict[str, Any]:
    """Trains the stand-in from its latest checkpoint on, ``total`` steps in all; the last rank is told to stop once
    step ``stop_at`` is logged, and has no data for the second micro step of step ``lose_at``."""
    schedule = Schedule.of(OPTIM, 1, total)
    micro = 2 * MICRO // distributed.world_size()
    engine = build_engine(module, json, OPTIM, schedule, micro, ACCUMULATION)
    torch.manual_seed(distributed.rank())
    latest, state = checkpoint.open_latest(folder, print) or (None, {"step": 0})
    first_step = state["step"]
    if distributed.is_main():
        folder.mkdir(exist_ok=True)
    distributed.barrier()
    monitor = Monitor(folder, engine.device, total, GLOBAL, first_step)
    if latest:
        monitor.meters.load_state_dict(checkpoint.restore(engine, latest)["meters"], engine.device)
    order, stop = order_of(GLOBAL), StopRequest()
    calls: dict[str, list[int]] = {"finished": [], "save": [], "evaluate": [], "draw": []}
    saver = Saver(engine, module, folder, {}, Retention(9))

    def save(step: int) -> None:
        calls["save"].append(step)
        saver.begin(step, {}, {"meters": monitor.meters.state_dict(), "budget": []})

    def evaluate(step: int) -> bool:
        calls["evaluate"].append(step)
        return False

    def draw(batch: Any) -> dict[str, np.ndarray]:
        calls["draw"].append(batch.step + 1)
        return {"gray": np.zeros((4, 4, 3), np.uint8)}

    is_last = distributed.rank() == distributed.world_size() - 1

    class Signalled(Batches):
        def __iter__(self) -> Any:
            for number, batch in enumerate(super().__iter__()):
                if is_last and batch.step + 1 == lose_at and number % ACCUMULATION == 1:
                    raise DataError("too many samples fail")
                if is_last and batch.step + 1 == stop_at:
                    stop._handle(signal.SIGUSR1, None)
                yield batch

    batches = Signalled(order, micro, ACCUMULATION, first_step)
    config = RunConfig(log_every=log_every, save_every=4, picture_every=5, evaluate_every=3)
    actions = Actions(calls["finished"].append, save, lambda: saver.writing, saver.advance, evaluate, draw)
    try:
        done = train(engine, batches, order, config, total, ACCUMULATION, monitor, stop, actions)
        error = None
    except (NonFiniteError, DataError) as caught:
        done, error = -1, str(caught)
    saver.finish()
    monitor.close()
    weights = {name: value.float().numpy() for name, value in module.state_dict().items()}
    return {"done": done, "error": error, "weights": weights, **calls}


def figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock had a hand in."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMINGS)} for line in lines]


def all_runs(folder: str) -> dict[str, Any]:
    """Every run of the tests below, since starting ranks is what takes the time."""
    base = Path(folder)
    results: dict[str, Any] = {"whole": run(base / "whole", Standin(dropout=0.2))}
    # stopped after 6 of 9 steps, in the middle of a window of 4 logged steps, and resumed in a fresh module
    results["whole_by_4"] = run(base / "whole_by_4", Standin(dropout=0.2), log_every=4)
    results["stopped"] = run(base / "resumed", Standin(dropout=0.2), stop_at=6, log_every=4)
    results["resumed"] = run(base / "resumed", Standin(dropout=0.2), log_every=4)
    # killed after its checkpoint of step 4: what it logged since is not there twice
    results["killed"] = run(base / "killed", Standin(dropout=0.2), stop_at=6)
    if distributed.is_main():
        (base / "killed" / "latest").write_text("step_4")
    distributed.barrier()
    results["from_4"] = run(base / "killed", Standin(dropout=0.2))
    for name in ("break_loss_at", "break_gradient_at"):
        module = Standin()
        setattr(module, name, 2)
        results[name] = run(base / name, module)
    results["lost"] = run(base / "lost", Standin(), lose_at=6)
    run(base / "extended", Standin(), total=5)  # to its end, and then further
    results["extended"] = run(base / "extended", Standin())
    results["before_break"] = run(base / "before_break", Standin(), stop_at=2)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(all_runs, 2, str(folder))


def assert_same_weights(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_everything_happens_when_it_is_due(ranks: list[dict[str, Any]], folder: Path) -> None:
    for rank, results in enumerate(ranks):
        whole = results["whole"]
        assert (whole["done"], whole["error"]) == (TOTAL, None)
        assert whole["finished"] == list(range(1, TOTAL + 1))
        assert whole["save"] == [4, 8, 9]
        assert whole["evaluate"] == [3, 6]  # the last step's is the caller's
        assert whole["draw"] == ([5] if rank == 0 else [])
    lines = figures(folder / "whole")
    order = order_of(GLOBAL)
    assert [line["step"] for line in lines] == list(range(1, TOTAL + 1))
    for line in lines:
        medium = order.medium(line["step"] - 1)
        names = {f"{name}/{medium}" for name in ("loss", "mlm", "vtc", "temperature")}
        assert line.keys() == {"step", "lr", "gradient_norm"} | names
    assert {order.medium(step) for step in range(TOTAL)} == {"image", "video"}
    schedule = Schedule.of(OPTIM, 1, TOTAL)
    assert [line["lr"] for line in lines] == pytest.approx([0.01 * schedule(step) for step in range(TOTAL)])
    assert list((folder / "whole" / "tensorboard").iterdir())


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(ranks: list[dict[str, Any]], folder: Path) -> None:
    for results in ranks:
        assert (results["stopped"]["done"], results["resumed"]["done"]) == (6, TOTAL)
        assert_same_weights(results["resumed"]["weights"], results["whole_by_4"]["weights"])
        assert_same_weights(results["resumed"]["weights"], results["whole"]["weights"])
    assert figures(folder / "resumed") == figures(folder / "whole_by_4")
    assert [line["step"] for line in figures(folder / "resumed")] == [4, 8, 9]


def test_what_was_logged_after_the_checkpoint_is_not_there_twice(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert ranks[0]["from_4"]["done"] == TOTAL
    assert figures(folder / "killed") == figures(folder / "whole")


def test_a_signal_on_one_rank_stops_all_after_the_same_step(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["stopped"]["done"] == 6
        assert results["stopped"]["save"] == [4, 6]


@pytest.mark.parametrize(("name", "blamed"), [("break_loss_at", "loss, vtc"), ("break_gradient_at", "gradient")])
def test_what_is_not_finite_on_one_rank_stops_all_before_the_step(
    ranks: list[dict[str, Any]], name: str, blamed: str
) -> None:
    for results in ranks:
        assert results[name]["error"].startswith(f"step 3: not finite: {blamed}.")
        assert results[name]["save"] == []
        assert_same_weights(results[name]["weights"], results["before_break"]["weights"])


def test_data_that_fail_on_one_rank_stop_all_and_name_it(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["lost"]["error"] == "rank 1: too many samples fail"
        assert results["lost"]["save"] == [4]


def test_an_extended_run_takes_the_rate_of_its_own_schedule(ranks: list[dict[str, Any]], folder: Path) -> None:
    assert ranks[0]["extended"]["done"] == TOTAL
    before, after = Schedule.of(OPTIM, 1, 5), Schedule.of(OPTIM, 1, TOTAL)
    expected = [0.01 * (before if step < 5 else after)(step) for step in range(TOTAL)]
    assert [line["lr"] for line in figures(folder / "extended")] == pytest.approx(expected)


def test_a_figure_that_is_not_finite_is_null(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, torch.device("cpu"), total_steps=2, global_batch=1)
    for step, loss in enumerate((float("nan"), 2.0), start=1):
        monitor.meters.add("video", {"loss": torch.tensor(loss)})
        monitor.log(step, {"lr": 0.1, "gradient_norm": float("inf")})
    monitor.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(text, parse_constant=refuse) for text in texts)
    assert (first["loss/video"], first["gradient_norm"], second["loss/video"]) == (None, None, 2.0)
    assert monitor.summary()["losses_first"] == {}
    again = Monitor(tmp_path, torch.device("cpu"), total_steps=2, global_batch=1, first_step=2)
    again.close()
    assert again.summary()["losses_last"] == {"loss": 2.0}


def test_signals_set_the_flag_and_a_second_interrupt_ends_at_once() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        for number in handlers:
            stop = StopRequest().install()
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_lines_beyond_a_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert truncate_lines(path, 3) == [] and not path.exists()
    path.write_text('{"step": 1}\n{"step": 3, "é": "ü"}\n{"step": 4}\n{"step": 2}\n')
    assert truncate_lines(path, 3) == [{"step": 1}, {"step": 3, "é": "ü"}]
    assert path.read_text() == '{"step": 1}\n{"step": 3, "é": "ü"}\n'
    path.write_text('{"step": 1}\n{"step": 2, "lo')  # killed while writing
    assert truncate_lines(path, 3) == [{"step": 1}]
    assert path.read_text() == '{"step": 1}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("half", [b'{"step": 2, "lo', '{"step": 2, "é'.encode()[:-1], b"\0\0\0\0"])
def test_half_a_line_drops_nothing_else(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    first, later = '{"step": 1, "text": "a\u2028b\u0085c"}\n'.encode(), b'{"step": 3}\n'
    path.write_bytes(first + half + b"\n" + later + half)
    assert truncate_lines(path, 3) == [{"step": 1, "text": "a\u2028b\u0085c"}, {"step": 3}]
    assert path.read_bytes() == first + later


def test_a_run_killed_while_it_drops_lines_has_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 4}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        truncate_lines(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'


def test_the_batch_sizes_have_to_meet() -> None:
    assert BatchConfig(global_size=24, micro_size=4).accumulation(world_size=2) == 3
    with pytest.raises(ConfigError, match=r"batch\.global_size is 24, not a multiple of 10 = batch\.micro_size 5 \* 2"):
        BatchConfig(global_size=24, micro_size=5).accumulation(world_size=2)


def test_a_medium_has_to_fill_a_batch() -> None:
    sizes = BatchConfig(global_size=64, micro_size=4)
    sizes.require({"video": 64, "image": 0})
    with pytest.raises(
        ConfigError, match=r"batch\.global_size is 64, .* only 61 samples of medium image.*to 61 or less"
    ):
        sizes.require({"video": 86, "image": 61})


@pytest.mark.parametrize("key", ["log_every", "keep_checkpoints", "max_steps", "save_every"])
def test_a_bad_run_setting_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.{key} is -1"):
        RunConfig(**{key: -1})


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.vision.mask_ratio=0"], r"model\.vision\.mask_ratio is 0\.0, which masks none .* loss\.mvm is 1\.0"),
        (["model.vision.mask_ratio=0.001"], r"model\.vision\.mask_ratio is 0\.001, which masks none of the 196"),
        ([f"loss.{name}=0" for name in ("vtc", "vtm", "mlm", "mvm")], r"loss\.vtc, .* and loss\.mvm are all 0"),
        (["run.seed=2147483648"], r"run\.seed is 2147483648: it must be below 2\*\*31"),
        (["model.vision.patch_size=0"], r"model\.vision\.patch_size is 0"),
        (["model.selector.temperature=0"], r"model\.selector\.temperature is 0\.0"),
    ],
)
def test_settings_that_cannot_work_are_named(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(PretrainConfig, None, overrides)


def test_without_reconstruction_no_mask_is_needed() -> None:
    assert parse(PretrainConfig, None, ["model.vision.mask_ratio=0", "loss.mvm=0"]).loss.mvm == 0


def test_the_defaults_are_a_config() -> None:
    assert PretrainConfig().model.size == "base"


# ---- the real thing: launcher, model, loader


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_bit_for_bit(toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(launch(settings(toy_shards, toy_media, whole)))

    process = launch(settings(toy_shards, toy_media, killed))
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline, "the run should have been killed by now"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = [line["step"] for line in figures(killed)]
    assert 5 <= reached[-1] < 8, "killed between the checkpoints of steps 3 or 6 and the end"

    output = finish(launch(settings(toy_shards, toy_media, killed)))
    assert "resumed from" in output
    assert figures(killed) == figures(whole)
    one, other = checkpoint.load_weights(whole), checkpoint.load_weights(killed)
    assert all(torch.equal(value, other[name]) for name, value in one.items())

    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"], summary["zero_stage"]) == (8, 2, 2)
    assert summary["accelerator"] == "cpu" and summary["decoder"].startswith("pyav") and summary["quarantined"] == 0
    assert summary["lr_last"] == pytest.approx(1e-6)
    assert {"loss", "vtc", "vtm", "mlm", "mvm"} == summary["losses_first"].keys() == summary["losses_last"].keys()
    assert summary["retrieval"]["n_videos"] == 32
    assert (whole / "config.yaml").exists() and (whole / "deepspeed.json").exists()


@pytest.mark.slow
def test_a_lost_ledger_loses_nothing_that_a_checkpoint_holds(toy_shards: Path, toy_media: Path, tmp_path: Path) -> None:
    shards, folder = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(toy_shards, shards)
    corpus = Corpus.open([shards / "train"], holdout=0.0, split="train")
    for medium in ("image", "video"):
        for number in range(0, corpus.count(medium), 4):
            entry = corpus.nth(medium, number)
            with open(entry.shard, "r+b") as tar:
                tar.seek(entry.media_offset)
                tar.write(bytes(entry.media_size))
    arguments = [*settings(shards, toy_media, folder), "data.test=[]", "data.max_failed_share=1"]
    finish(launch([*arguments, "run.max_steps=4"], ranks=1))
    failures = read_ledgers(folder / "quarantine")
    assert failures
    shutil.rmtree(folder / "quarantine")
    finish(launch(arguments, ranks=1))
    later = read_ledgers(folder / "quarantine")
    assert not {failure.name for failure in failures} & {failure.name for failure in later}
    _, state = checkpoint.open_latest(folder / "checkpoints", print) or (None, {})
    assert [Failure.from_dict(failure) for failure in state["quarantine"]] == failures + later
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["quarantined"] == len({failure.name for failure in failures + later})


@pytest.mark.slow
def test_a_signal_to_a_real_run_saves_and_stage_two_starts_from_it(
    toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = [*settings(toy_shards, toy_media, first), "run.max_steps=400", "run.save_every=0"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "smaug_ds.pretrain", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (first / "metrics.jsonl").exists() or not (first / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE, output
    assert "told to stop: saved after step" in output
    assert checkpoint.find(first).parent == first / "checkpoints"

    stage_two = ["model.frames=4", "model.frames_kept=2", f"run.init_from={first}", "run.max_steps=3"]
    output = finish(launch([*settings(toy_shards, toy_media, second), *stage_two]))
    assert "losses see batch.micro_size * ranks = 8 pairs at a time (accumulation 2 does not widen them)" in output
    assert "missing: " in output and "(selector, temporal), unused: none" in output
    losses = [value for line in figures(second) for name, value in line.items() if name.startswith("loss/")]
    assert len(losses) == 3 and all(np.isfinite(losses))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.frames_kept=2", "model.frames_kept is 2"),
        ("model.framse=2", "unknown key model.framse; did you mean model.frames"),
        ("batch.global_size=many", "batch.global_size: expected a whole number, found 'many'"),
        ("batch.global_size=17", "batch.global_size is 17, not a multiple of 4"),
        ("data.train=[nowhere]", "data.train: "),
        ("data.test=[nowhere]", "data.test: "),
        ("data.tokenizer=nowhere", "data.tokenizer: "),
        ("model.text.vocab_size=7", "model.text.vocab_size is 7, but data.tokenizer"),
        ("run.init_from=nowhere", "run.init_from: nowhere does not exist"),
        ("optim.warmup_steps=8", "optim.warmup_steps makes 8 warm-up steps"),
        ("batch.global_size=1000", "batch.global_size is 1000, but the corpus has only "),
        (f"run.folder={__file__}", f"run.folder: {__file__} is a file"),
        (f"run.folder={__file__}/run", "run.folder: "),
        ("model.text.heads=3", "model.text.width is 32, not a multiple of model.text.heads, which is 3"),
        ("loss.mlm_probability=1", "loss.mlm_probability is 1"),
    ],
)
def test_a_bad_setting_ends_the_run_with_one_line_that_names_it(
    toy_shards: Path, toy_media: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], override: str, told: str
) -> None:
    from smaug_ds.pretrain import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        assert main([*settings(toy_shards, toy_media, tmp_path / "run"), override]) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and told in lines[0]


def test_checkpoints_of_which_none_is_whole_end_the_run_with_one_line(
    toy_shards: Path, toy_media: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old" / "checkpoints" / "step_4").mkdir(parents=True)
    test_a_bad_setting_ends_the_run_with_one_line_that_names_it(
        toy_shards, toy_media, tmp_path, capfd, f"run.folder={tmp_path / 'old'}", "none of step_4 in "
    )


def test_weights_of_another_vision_encoder_end_the_run_with_one_line(
    toy_shards: Path, toy_media: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small_model(small_config(layout="beit")).save_pretrained(tmp_path / "beit")
    told = "config.json is of a model with model.vision.layout = beit, but this one has clip: set model.vision.layout="
    test_a_bad_setting_ends_the_run_with_one_line_that_names_it(
        toy_shards, toy_media, tmp_path, capfd, f"run.init_from={tmp_path / 'beit'}", told
    )


def test_data_that_fail_end_the_run_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from smaug_ds import pretrain

    def fail(config: PretrainConfig, watchdog: Watchdog) -> int:
        raise DataError("rank 1: data worker 7\ndied")

    monkeypatch.setattr(pretrain, "pretrain", fail)
    assert pretrain.main([]) == 1
    assert capfd.readouterr().err == "error: rank 1: data worker 7 died\n"


def test_a_bad_deepspeed_json_ends_the_run_with_one_line(
    toy_shards: Path, toy_media: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_json(tmp_path / "ds.json", train_batch_size=3)
    test_a_bad_setting_ends_the_run_with_one_line_that_names_it(
        toy_shards, toy_media, tmp_path, capfd, f"run.deepspeed={path}", "train_batch_size belongs to the run config"
    )


def test_settings_may_stand_before_and_after_the_options(capfd: pytest.CaptureFixture[str]) -> None:
    from smaug_ds.pretrain import main

    assert (
        main(["data.workers=1", "--config", str(ROOT / "jobs/experiments/pretrain_stage1.yaml"), "model.framse=1"]) == 2
    )
    assert "unknown key model.framse" in capfd.readouterr().err
