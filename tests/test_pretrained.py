"""One line in, one line out: folders, the hub (stood in for), and both encoders as a user calls them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from smaug_ds import distributed
from smaug_ds.data.config import DataConfig
from smaug_ds.data.quarantine import Ledger
from smaug_ds.encoders import SmaugEncoders
from smaug_ds.evaluation.encoding import encode_clips, encode_texts
from smaug_ds.evaluation.held_out import open_held_out
from smaug_ds.evaluation.retrieval import RetrievalConfig
from smaug_ds.model.smaug import SmaugModel
from smaug_ds.text import Tokenizer
from tests.models import random_batch, small_config, small_model


@pytest.fixture
def folder(tmp_path: Path, toy_media: Path) -> Path:
    """What an export leaves, of random weights."""
    words = Tokenizer(toy_media / "vocab.txt").vocab_size
    small = small_config(3, 2)
    model = small_model(dataclasses.replace(small, text=dataclasses.replace(small.text, vocab_size=words)))
    model.save_pretrained(tmp_path / "model")
    shutil.copy(toy_media / "vocab.txt", tmp_path / "model")
    return tmp_path / "model"


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = small_model(small_config(4, 2)).eval()
    model.save_pretrained(tmp_path / "model")
    again = SmaugModel.from_pretrained(tmp_path / "model")
    assert again.config == model.config and not again.training
    batch = random_batch(model.config)
    assert torch.equal(again.encode_frames(batch.frames).tokens, model.encode_frames(batch.frames).tokens)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    model.bfloat16().save_pretrained(str(tmp_path / "model"))  # over the first one
    assert SmaugModel.from_pretrained(str(tmp_path / "model")).logit_scale.dtype == torch.float32


# config.json of ``small_config(3, 2)`` as it was written before there were layouts and kinds of recomputing.
OLDER = """{
 "model_type": "smaug", "architectures": ["SmaugModel"], "size": "tiny", "frames": 3, "frames_kept": 2,
 "answer_layers": 0, "projection": 16, "temperature": 0.07,
 "vision": {"image_size": 32, "patch_size": 8, "width": 32, "depth": 3, "heads": 4, "mlp_width": 64, "mask_ratio": 0.5,
  "keep_rate": 0.8, "sparsify_layers": [1, 2], "sparsify_at_inference": true, "checkpoint_every": 0},
 "temporal": {"depth": 2, "heads": 4},
 "decoder": {"width": 32, "depth": 1, "heads": 4, "predicted_share": 1.0, "normalise_targets": false},
 "selector": {"depth": 2, "heads": 2, "mlp_width": 64, "temperature": 1.0},
 "text": {"vocab_size": 50, "width": 32, "heads": 4, "mlp_width": 64, "text_layers": 2, "fusion_layers": 1,
  "max_length": 12, "max_positions": 64, "dropout": 0.0, "checkpoint_every": 0}
}"""


def test_an_export_of_an_older_version_loads(tmp_path: Path) -> None:
    model = small_model(small_config(3, 2))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(OLDER)
    again = SmaugModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_other_architectures_are_refused(folder: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SmaugModel.from_pretrained(folder)

    original = (folder / "config.json").read_text()
    for changes, message in (
        ({"model_type": "bert"}, r"config\.json describes a model of type 'bert', not 'smaug'"),
        ({"hidden_size": 768}, "does not describe a SMAUG model: unknown key hidden_size"),
        ({"frames_kep": 1}, r"unknown key frames_kep \(frames_kept\?\)"),
        ({"frames": "4"}, "frames is '4', which is no int"),
        ({"vision": 3}, "vision is 3, not a section"),
        ({"text": {"width": 32}}, r"text\.vocab_size is missing"),
        ({"projection": 17}, r"vision_projection\.weight has shape \[16, 32\], but its config\.json says \[17, 32\]"),
        ({"frames_kept": 3}, r"selector\.\S+ has no place in the architecture"),
        ({"frames_kept": 4}, r"model\.frames_kept is 4"),
    ):
        edit(folder, **changes)
        refused(message)
        (folder / "config.json").write_text(original)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(r"model\.safetensors cannot be read")
    weights.unlink()
    refused(r"model\.safetensors is missing")
    (folder / "config.json").write_text("{")
    refused(r"config\.json cannot be read")


def test_the_hub_is_asked_only_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repository: str, file: str) -> str:
        asked.append(repository)
        if not (folder / file).is_file():
            raise FileNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ValueError, match="someone/smaug is no folder of a model"):
        SmaugModel.from_pretrained("someone/smaug")
    assert not asked
    assert SmaugEncoders.from_pretrained("hf-hub:someone/smaug").model.config.frames == 3
    assert set(asked) == {"someone/smaug"}
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"hf-hub:someone/smaug: config\.json could not be had"):
        SmaugModel.from_pretrained("hf-hub:someone/smaug")


def test_push_uploads_what_loads_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            assert (name, private, exist_ok) == ("me/smaug", True, True)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    (folder / "README.md").write_text("What it was trained on.")
    (folder / "state.json").write_text("{}")
    SmaugModel.from_pretrained(folder).push_to_hub("me/smaug")
    assert SmaugModel.from_pretrained(tmp_path / "me" / "smaug").config == SmaugModel.from_pretrained(folder).config
    SmaugEncoders.from_pretrained(tmp_path / "me" / "smaug")
    for name in ("README.md", "state.json", "vocab.txt"):
        assert (tmp_path / "me" / "smaug" / name).read_bytes() == (folder / name).read_bytes()

    shutil.rmtree(tmp_path / "me")
    changed = SmaugModel.from_pretrained(folder)
    with torch.no_grad():
        changed.logit_scale.add_(1)
    changed.push_to_hub("me/smaug")  # of other weights the card says nothing
    assert "What it was trained on." not in (tmp_path / "me" / "smaug" / "README.md").read_text()
    names = {"README.md", "config.json", "model.safetensors", "vocab.txt"}
    assert {path.name for path in (tmp_path / "me" / "smaug").iterdir()} == names

    shutil.rmtree(tmp_path / "me")
    small_model().push_to_hub("me/smaug")
    assert "SmaugModel.from_pretrained" in (tmp_path / "me" / "smaug" / "README.md").read_text()


def test_encoders_equal_the_evaluation(folder: Path, toy_media: Path, toy_shards: Path, tmp_path: Path) -> None:
    encoders = SmaugEncoders.from_pretrained(folder)
    data = DataConfig(test=(str(toy_shards / "test"),), tokenizer=str(toy_media / "vocab.txt"), workers=0)
    ledger = Ledger(tmp_path / "ledger", distributed.rank())
    settings = RetrievalConfig(batch_size=8)
    loader = open_held_out(encoders.model.config, data, settings, encoders.tokenizer, torch.device("cpu"), ledger)
    with torch.no_grad():
        clips = encode_clips(encoders.model, loader)
        captions = [caption for batch in clips for several in batch.captions for caption in several]
        expected = encode_texts(encoders.model, captions, encoders.tokenizer, 7).embedding
    rows = json.loads((toy_media / "video_test.json").read_text())  # a sample's key is its row
    keys = [key for batch in clips for key in batch.keys]
    ours = encoders.encode_video([toy_media / rows[int(key[-9:])]["video"] for key in keys])
    theirs = torch.from_numpy(np.concatenate([batch.embedding for batch in clips]))
    assert (encoders.encode_text(captions) - expected).abs().max() < 1e-5
    assert torch.allclose(ours.norm(dim=1), torch.ones(len(ours)))
    # DALI's resize and torch's agree to one grey level
    assert ((ours * theirs).sum(dim=1) > 0.999).all()


def test_encoders_take_frames_of_any_size(folder: Path) -> None:
    encoders = SmaugEncoders.from_pretrained(folder)
    clip = np.random.default_rng(0).integers(0, 256, (9, 40, 70, 3), dtype=np.uint8)
    found = encoders.encode_video([clip, torch.from_numpy(clip[[1, 4, 7]]), clip[:, :, 15:55]])
    assert found.shape == (3, 16)
    assert torch.allclose(found[0], found[1]) and torch.allclose(found[0], found[2])
    tall = clip.transpose(0, 2, 1, 3)
    found = encoders.encode_video([tall, tall[:, 15:55], tall[:, :40]])
    assert torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])
    assert (encoders.encode_text(["A red ball!"]) == encoders.encode_text(["a red ball"])).all()
    for wrong in (clip[0], clip.astype(np.float32), clip[..., :2], clip[:0]):
        with pytest.raises(ValueError, match=r"it must be \(T, H, W, 3\) uint8"):
            encoders.encode_video([wrong])
    with pytest.raises(ValueError, match=r"config\.json cannot be decoded"):
        encoders.encode_video([folder / "config.json"])


def test_a_foreign_tokenizer_is_refused(folder: Path) -> None:
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nball\n")
    with pytest.raises(ValueError, match="has 6 entries, but the model knows"):
        SmaugEncoders.from_pretrained(folder)
    (folder / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer \(tokenizer\.json or vocab\.txt\)"):
        SmaugEncoders.from_pretrained(folder)
