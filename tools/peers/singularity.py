"""A pre-training step of Singularity (arXiv 2206.03428), for ``tools/profile_throughput.py compare``.

    git clone https://github.com/jayleicn/singularity PEER
    SINGULARITY=PEER python tools/profile_throughput.py compare --peer tools/peers/singularity.py

The model, its losses and its optimizer are imported from the checkout that the environment variable SINGULARITY names;
only what surrounds them in the checkout's ``tasks/pretrain.py`` is done here: autocast, backward, AdamW. Full size,
BEiT-B/16 and BERT-base with random weights, since what they hold does not change what they cost. Captions are 32 tokens
long, as pre-training there pads all of them (``padding="max_length"``); more than one frame switches its temporal
encoder on, as its multi-frame stage does.

    SINGULARITY_TOKENS=12        captions of so many tokens instead
    SINGULARITY_ATTENTION=sdpa   BEiT with fused attention, which the transformers it names (4.15) does not have
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import yaml

WORDS_FROM = 1000  # ids below are BERT's special and unused tokens
SPECIAL = SimpleNamespace(pad_token_id=0, cls_token_id=101, mask_token_id=103)  # all that the model asks of a tokenizer


def make_step(batch: int, frames: int, dtype: str) -> Callable[[], torch.Tensor]:
    """A function that does one step with ``batch`` pairs of ``frames`` frames; dtype is fp32 or bf16 (autocast).

    Raises ValueError where the environment names no checkout or ``dtype`` is another.
    """
    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"dtype is {dtype}: Singularity trains in fp32 or with autocast: set dtype to fp32 or bf16")
    peer = _checkout()
    device = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")
    config = _config(peer, frames)
    torch.manual_seed(0)
    model = _model(peer, config).to(device).train()
    _draw_on(device, model)
    optimizer = importlib.import_module("utils.optimizer").create_optimizer(config.optimizer, model)

    tokens = int(os.environ.get("SINGULARITY_TOKENS", config.max_txt_l.video))
    images = torch.randn(batch, frames, 3, config.image_res, config.image_res, device=device)
    input_ids = torch.randint(WORDS_FROM, model.text_encoder.config.vocab_size, (batch, tokens), device=device)
    input_ids[:, 0] = SPECIAL.cls_token_id
    text = SimpleNamespace(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
    pairs = torch.arange(batch, device=device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext():
            loss = sum(model(images, text, idx=pairs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _checkout() -> Path:
    named = os.environ.get("SINGULARITY", "")
    if not named or not (Path(named) / "models" / "model_pretrain.py").is_file():
        raise ValueError(
            f"SINGULARITY is {named!r}, where no models/model_pretrain.py is: name a checkout of "
            "github.com/jayleicn/singularity"
        )
    peer = Path(named).resolve()
    sys.path.insert(0, str(peer))
    return peer


def _config(peer: Path, frames: int) -> Any:
    """``configs/pretrain.yaml`` of the checkout, with so many frames."""
    values = yaml.safe_load((peer / "configs" / "pretrain.yaml").read_text(encoding="utf-8"))
    config = json.loads(json.dumps(values), object_hook=lambda section: SimpleNamespace(**section))
    config.optimizer.lr = float(config.optimizer.lr)  # written 1e-4, which plain YAML takes for a text
    config.bert_config = str(peer / "configs" / "config_bert.json")
    config.video_input.num_frames = frames
    config.temporal_vision_encoder.enable = config.add_temporal_embed = frames > 1
    return config


def _model(peer: Path, config: Any) -> Any:
    """The checkout's pre-training model, without a hub: configurations out of the checkout, random weights."""
    _make_room_for_old_code()
    base = importlib.import_module("models.model_retrieval_base")
    beit = transformers.BeitConfig.from_json_file(str(next((peer / "configs").glob("beit*.json"))))
    beit.image_size = config.image_res
    beit._attn_implementation = os.environ.get("SINGULARITY_ATTENTION", "eager")
    bert = base.BertForMaskedLM
    bert.from_pretrained = classmethod(lambda cls, name, config, output_loading_info: (cls(config), {}))
    # as transformers had it: newer ones expect tables that this code does not make
    importlib.import_module("models.xbert").BertPreTrainedModel.init_weights = lambda self: self.apply(
        self._init_weights
    )
    owner = base.SingularityRetrievalBase
    owner.build_huggingface_vit_with_image_size = staticmethod(lambda name, size: transformers.BeitModel(beit))
    model = importlib.import_module("models.model_pretrain").Singularity(config=config, tokenizer=SPECIAL)
    # its MLM head shares the word embedding, which newer transformers no longer arranges for it
    model.text_encoder.cls.predictions.decoder.weight = model.text_encoder.bert.embeddings.word_embeddings.weight
    return model


def _draw_on(device: torch.device, model: Any) -> None:
    """On a GPU, draws the masked words there: the checkout draws them on the CPU, and newer torch refuses to mix."""
    original = model.mask

    def mask(*args: Any, probability_matrix: torch.Tensor, **kwargs: Any) -> Any:
        with device:
            return original(*args, probability_matrix=probability_matrix.to(device), **kwargs)

    if device.type == "cuda":
        model.mask = mask


def _make_room_for_old_code() -> None:
    """Gives the installed transformers the names that code for 4.15 imports or calls."""
    from transformers import modeling_utils, pytorch_utils

    def absent(*_: Any) -> Any:
        raise RuntimeError("Singularity asked for what a training step does not use")

    for name in ("apply_chunking_to_forward", "prune_linear_layer", "find_pruneable_heads_and_indices"):
        if not hasattr(modeling_utils, name):
            setattr(modeling_utils, name, getattr(pytorch_utils, name, absent))
    model: Any = modeling_utils.PreTrainedModel
    if not hasattr(model, "get_head_mask"):
        model.get_head_mask = lambda self, head_mask, layers: [None] * layers  # no head is ever masked here
    if not hasattr(model, "invert_attention_mask"):
        model.invert_attention_mask = _inverted
    if "scipy" not in sys.modules and importlib.util.find_spec("scipy") is None:
        # imported for resizing position embeddings of published weights
        sys.modules["scipy"] = types.ModuleType("scipy")
        sys.modules["scipy"].interpolate = SimpleNamespace(interp2d=absent)  # type: ignore[attr-defined]


def _inverted(self: Any, mask: torch.Tensor) -> torch.Tensor:
    """(B, K) of ones and zeros -> (B, 1, 1, K): 0 where to attend, the least number elsewhere."""
    return (1.0 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min
