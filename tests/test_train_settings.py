"""Settings of a run that cannot work are named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from smaug_ds.config import ConfigError, parse
from smaug_ds.data.quarantine import DataError
from smaug_ds.engine.train import BatchConfig, PretrainConfig, RunConfig
from smaug_ds.engine.watchdog import Watchdog
from tests.launching import settings, signals_kept
from tests.models import small_config, small_model
from tests.standin import ROOT, write_json


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

    with signals_kept():
        assert main([*settings(toy_shards, toy_media, tmp_path / "run"), override]) == 2
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
