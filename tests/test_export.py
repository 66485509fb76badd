"""From a run's ZeRO files to an exported folder: every number, one tensor at a time, or a clear refusal."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smaug_ds import evaluate as evaluation
from smaug_ds.config import parse
from smaug_ds.data.quarantine import Ledger
from smaug_ds.engine import checkpoint
from smaug_ds.evaluation import retrieval
from smaug_ds.evaluation.held_out import open_held_out
from smaug_ds.exchange.export import compare, export
from smaug_ds.exchange.zero import MasterWeights
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer
from tests import launching
from tests.models import small_config, small_model
from tests.standin import write_json
from tests.zero_files import ZeroFiles, write_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(45))]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return tmp_path / "vocab.txt"


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 0), (torch.bfloat16, 3), (torch.bfloat16, None)])
def test_master_weights_come_out_whole(
    tmp_path: Path, vocabulary: Path, ranks: int, dtype: torch.dtype, gap: int | None
) -> None:
    model = small_model(small_config(4, 2))
    folder = write_run(tmp_path / "run", model, vocabulary, ranks, dtype, gap)
    assert export(tmp_path / "run", tmp_path / "out") == folder
    weights, expected = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    largest = compare(folder, tmp_path / "out")
    assert (max(largest.values()) == 0) is (dtype == torch.float32)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "state.json", "vocab.txt",
    ]  # fmt: skip
    assert not list(tmp_path.glob(".writing-*"))


def test_shared_and_frozen_weights_and_buffers(tmp_path: Path) -> None:
    word, frozen, buffer = torch.randn(5, 3), torch.randn(4).half(), torch.arange(3)
    extra = {
        "shared_params": {"head.weight": "word.weight"},
        "frozen_param_fragments": {"frozen": frozen},
        "buffer_names": ["steps"],
        "module": {"word.weight": word, "head.weight": word, "frozen": frozen, "steps": buffer},
    }
    ZeroFiles([{"word.weight": word}, {"bias": torch.randn(7)}], 2, gap=1, extra=extra).save_checkpoint(
        str(tmp_path), "engine"
    )
    weights = MasterWeights(tmp_path / "engine")
    assert set(weights) == {"word.weight", "head.weight", "bias", "frozen", "steps"} and len(weights) == 5
    assert torch.equal(weights["head.weight"], word) and torch.equal(weights["word.weight"], word)
    assert torch.equal(weights["frozen"], frozen.float()) and torch.equal(weights["steps"], buffer.float())
    assert weights.shape("head.weight") == (5, 3) and weights.shape("frozen") == (4,)


def test_exported_folder_starts_a_run_and_is_evaluated(tmp_path: Path, vocabulary: Path) -> None:
    model = small_model()
    write_run(tmp_path / "run", model, vocabulary, 2)
    export(tmp_path / "run", tmp_path / "out")
    other = SmaugModel(model.config)
    told = checkpoint.initialise(other, checkpoint.load_weights(tmp_path / "out"))
    assert "missing: none" in told and "unused: none" in told
    _, config = evaluation.read_config(str(tmp_path / "out"), None)
    assert config.model == model.config
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 5 |" in card and "Evaluation" in card and "16" in card


def test_card_states_the_last_result_with_its_protocol(tmp_path: Path, vocabulary: Path) -> None:
    write_run(tmp_path / "run", small_model(), vocabulary, 1)
    (tmp_path / "run" / "evaluation").mkdir()
    for name, recall in (("summary.json", 11.5), ("evaluation/retrieval-test-0.json", 22.5)):
        result: dict[str, Any] = {"t2v_r1": recall, "protocol": {"rerank_depth": 4}}
        (tmp_path / "run" / name).write_text(json.dumps({"retrieval": result} if name == "summary.json" else result))
    os.utime(tmp_path / "run" / "summary.json", (1, 1))
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| t2v_r1 | 22.5 |" in card and "| protocol: rerank_depth | 4 |" in card and "11.5" not in card


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def remove_rank(folder: Path) -> None:
    (folder / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()


def truncate(folder: Path) -> None:
    file = folder / "engine" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-500])


def run_code(folder: Path) -> None:
    file = folder / "engine" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": Evil()}, file)


def foreign_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["projection"] += 1
    (folder / "config.json").write_text(json.dumps(config))


def changed_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["text.embedding.norm.bias"] += 1
    save_file(weights, folder / "model.safetensors")


def other_stage(folder: Path) -> None:
    for file in folder.glob("engine/zero_*.pt"):
        torch.save({"optimizer_state_dict": {"fp32_flat_groups": [], "partition_count": 2}}, file)


def no_engine(folder: Path) -> None:
    for file in folder.glob("engine/*"):
        file.unlink()
    (folder / "engine").rmdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what is done; what is said of it while the manifest stands; what, if the manifest was made anew
    "rank": (remove_rank, r"rank_1_mp_rank_00_optim_states\.pt is missing", r"was one of 2 ranks, but there are 1"),
    "truncated": (truncate, r"rank_1_mp_rank_00_optim_states\.pt is damaged", r"rank_1_.*\.pt cannot be read"),
    "code": (run_code, "is damaged", r"rank_0_.*\.pt asks for (os|posix|nt)\.system .* refused"),
    "foreign": (foreign_config, "is damaged", r"config\.json describes a model of type 'bert'"),
    "wider": (wider, "is damaged", r"vision_projection\.weight has shape \[16, 32\].* says \[17, 32\]"),
    "weight": (changed_weight, "is damaged", r"text\.embedding\.norm\.bias of the ZeRO files is not"),
    "stage": (other_stage, "is damaged", "holds no weights of ZeRO stage 1 or 2"),
    "engine": (no_engine, "has no folder engine", "has no folder engine"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("manifest", ["old", "new"])
def test_bad_checkpoints_are_refused_and_nothing_is_left(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch, case: str, manifest: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, old, new = DAMAGE[case]
    folder = write_run(tmp_path / "run", small_model(), vocabulary, 2)
    damage(folder)
    if manifest == "new":
        files = checkpoint.describe_all(folder)
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(ValueError, match=old if manifest == "old" else new):
        export(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "vocab.txt"], "something was left, or code ran"


def test_what_the_user_can_mend_is_told(tmp_path: Path, vocabulary: Path) -> None:
    write_run(tmp_path / "run", small_model(), vocabulary, 1)
    (tmp_path / "other.txt").write_text(vocabulary.read_text().replace("w7", "w77"))
    with pytest.raises(ValueError, match="not the tokenizer that the run was made with"):
        export(tmp_path / "run", tmp_path / "out", tmp_path / "other.txt")
    vocabulary.rename(tmp_path / "moved.txt")
    with pytest.raises(ValueError, match=r"vocab\.txt is missing: name the run's tokenizer with --tokenizer"):
        export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "out", tmp_path / "moved.txt")
    with pytest.raises(ValueError, match="exists already: name a new folder"):
        export(tmp_path / "run", tmp_path / "out", tmp_path / "moved.txt")
    with pytest.raises(ValueError, match="neither a run folder with a checkpoint nor a checkpoint"):
        export(tmp_path, tmp_path / "no")


def test_breaking_off_leaves_nothing(tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", small_model(), vocabulary, 1)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smaug_ds.exchange.export.model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "vocab.txt"]


def test_tool_exports_and_verifies_without_deepspeed(tmp_path: Path, vocabulary: Path) -> None:
    write_run(tmp_path / "run", small_model(), vocabulary, 2, torch.bfloat16)
    script = "import sys; sys.modules['deepspeed'] = None; from tools.convert_checkpoint import main; main()"
    command = [sys.executable, "-c", script, "export", "run", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--verify"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "every tensor agrees" in done.stdout and "largest differences" in done.stdout
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.strip() == "error: out exists already: name a new folder"


MEMORY = """
import sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from smaug_ds.exchange.export import write_safetensors
from smaug_ds.exchange.zero import MasterWeights

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
masters = MasterWeights(Path("engine"))
write_safetensors(Path("out.safetensors"), {name: masters.shape(name) for name in masters}, masters.__getitem__)
done.set()
watcher.join()
print(peak - before)
"""


def test_memory_stays_under_twice_the_largest_tensor(tmp_path: Path) -> None:
    size = 10 * 2**20  # numbers: from 32 MiB on the C library gives memory back at once
    groups = [{f"w{i}": torch.full((size,), float(i)) for i in range(4)}, {"b": torch.ones(5)}]
    ZeroFiles(groups, 3, gap=0).save_checkpoint(str(tmp_path), "engine")
    command = [sys.executable, "-c", MEMORY, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * 4 * size
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], value) for group in groups for name, value in group.items())


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage", "precision"), [(2, 2, "fp32"), (3, 1, "bf16"), (3, 2, "bf16")])
def test_a_real_run_exports_to_the_same_scores(
    toy_shards: Path, toy_media: Path, tmp_path: Path, ranks: int, stage: int, precision: str
) -> None:
    half = {
        "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
    }  # fmt: skip
    zero = {"stage": stage, "overlap_comm": False, "round_robin_gradients": False}
    changes = {"zero_optimization": zero, **(half if precision == "bf16" else {})}
    given = launching.settings(toy_shards, toy_media, tmp_path / "run")
    changed = [
        f"run.deepspeed={write_json(tmp_path / 'ds.json', **changes)}", "run.max_steps=4", "batch.global_size=12",
        "batch.micro_size=2", "model.frames=2",
    ]  # fmt: skip
    launching.finish(launching.launch([*given, *changed], ranks))
    folder = export(tmp_path / "run", tmp_path / "out")

    exported = SmaugModel.from_pretrained(tmp_path / "out")
    if precision == "bf16":  # the run computed with rounded weights, and so has its copy to be compared
        exported.bfloat16().float()
    found, expected = scores(tmp_path / "out", exported), scores(folder, None)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.slow
def test_a_run_that_changed_its_world_size_exports_to_the_same_scores(
    toy_shards: Path, toy_media: Path, tmp_path: Path
) -> None:
    given = launching.settings(toy_shards, toy_media, tmp_path / "run")
    given += ["run.max_steps=4", "batch.global_size=12", "model.frames=2"]  # contrasted 6 at a time, here and there
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()  # asks for a stop after the first step
    process = launching.launch([*given, "batch.micro_size=3"], 2)
    process.communicate(timeout=240)
    assert checkpoint.find(tmp_path / "run").name == "step_1"
    (tmp_path / "run" / "stop").unlink(missing_ok=True)
    assert "resumed from" in launching.finish(launching.launch([*given, "batch.micro_size=2"], 3))
    folder = export(tmp_path / "run", tmp_path / "out")
    assert len(list((folder / "engine").glob("zero_pp_rank_*"))) == 3
    found, expected = scores(tmp_path / "out", SmaugModel.from_pretrained(tmp_path / "out")), scores(folder, None)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-5


def scores(folder: Path, model: SmaugModel | None) -> tuple[np.ndarray, np.ndarray]:
    """Text-to-video and video-to-text scores of the run's test split."""
    _, config = evaluation.read_config(str(folder), None)
    if model is None:
        model, tokenizer = evaluation.load_model(folder, config)
    else:
        tokenizer = Tokenizer(folder)
    ledger = Ledger(folder / "evaluation", 0)
    device = torch.device("cpu")
    loader = open_held_out(config.model, config.data, config.evaluation, tokenizer, device, ledger)
    details = retrieval.evaluate(model, loader, tokenizer, config.evaluation).details
    return details.t2v_scores, details.v2t_scores


def test_config_is_kept_to_the_last_field(tmp_path: Path, vocabulary: Path) -> None:
    config = dataclasses.replace(small_config(4, 2), temperature=0.05)
    write_run(tmp_path / "run", small_model(config), vocabulary, 1)
    export(tmp_path / "run", tmp_path / "out")
    assert SmaugModel.from_pretrained(tmp_path / "out").config == config
    settings = evaluation.read_config(str(tmp_path / "out"), None)[1]
    assert parse(type(settings), None) != settings and settings.model == config
