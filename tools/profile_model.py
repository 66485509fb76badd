"""Where the parameters and the arithmetic of the model are.

    python tools/profile_throughput.py model --size base [model.frames=4 model.frames_kept=2 ...]

counts parameters, and forward floating-point operations of one sample (2 per multiply-add), part by part, with torch's
flop counter on tensors without storage: nothing is computed, so base size takes seconds on any machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from smaug_ds.config import ConfigError, parse
from smaug_ds.model.packing import Packing
from smaug_ds.model.smaug import ModelConfig, SmaugModel

BERT_VOCABULARY = 30522
# Forward GFLOPs of one single-frame sample at base size: as planned, and of Singularity, which masks nothing.
PLANNED = {
    "vision encoder": (35.0, 12.8),
    "pixel decoder": (None, 3.7),
    "text encoder": (8.2, 8.2),
    "multi-modal encoder": (11.9, 7.9),
    "vocabulary logits": (1.5, 0.2),
}


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """The model to count."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mlm_probability: float = 0.15  # share of the words whose logits are computed


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``model``, with what follows it on the command line."""
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", help="base or tiny")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(arguments)
    try:
        config = parse(ProfileConfig, None, [f"model.size={args.size}", *args.overrides])
        text = config.model.text
        if not text.vocab_size:
            text = dataclasses.replace(text, vocab_size=BERT_VOCABULARY)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    parameters, flops = count_parameters(config.model), count_flops(config)
    print_table(config, parameters, flops)
    if args.json:
        args.json.write_text(json.dumps({"parameters": parameters, "forward_flops": flops}, indent=1))


def parts_of(model: SmaugModel) -> dict[str, list[nn.Module]]:
    """The modules behind each row of the table."""
    optional = {"temporal encoder": "temporal", "frame selector": "selector"}
    parts: dict[str, list[nn.Module]] = {
        "vision encoder": [model.vision],
        **{name: [getattr(model, part)] for name, part in optional.items() if hasattr(model, part)},
        "pixel decoder": [model.pixel_decoder],
        "text encoder": [model.text],
        "multi-modal encoder": [model.fusion],
        "vocabulary logits": [model.word_head],
        "projections and match head": [model.vision_projection, model.text_projection, model.match_head],
    }
    return parts


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part. The word embedding is shared with the vocabulary logits and counted in the text encoder."""
    with torch.device("meta"):
        model = SmaugModel(config)
    counts = {name: sum(count(module) for module in modules) for name, modules in parts_of(model).items()}
    counts["temperature"] = model.logit_scale.numel() + model.logit_bias.numel()
    assert sum(counts.values()) == count(model), "a part of the model is missing from the table"
    return counts


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(config: ProfileConfig) -> dict[str, int]:
    """Forward FLOPs of one training sample by part, captions at full length."""
    shape = config.model
    with torch.device("meta"):
        model = SmaugModel(shape).train()
        frames = torch.zeros(1, shape.frames, 3, shape.vision.image_size, shape.vision.image_size, dtype=torch.uint8)
        noise = torch.zeros(1, shape.vision.patches)
        words = torch.zeros(shape.text.max_length, dtype=torch.long)
        packing = Packing.of([shape.text.max_length], "meta")
        hidden = torch.zeros(round(config.mlm_probability * shape.text.max_length), shape.text.width)
        flops: dict[str, int] = {}
        encoded = counted(flops, "vision encoder", lambda: model.vision(model.patchify(frames), noise))
        tokens = encoded.tokens
        if shape.frames > 1:
            tokens = counted(flops, "temporal encoder", lambda: model.temporal(encoded.tokens))
        states = counted(flops, "text encoder", lambda: [model.text(words, packing) for _ in range(2)])[0]
        if shape.frames > shape.frames_kept:
            # positive, hard negative text, hard negative video, hidden words: each chooses its frames
            counted(flops, "frame selector", lambda: [model.look_at(tokens, packing.first(states)) for _ in range(4)])
        seen = model.look_at(tokens, packing.first(states))
        fused = counted(flops, "multi-modal encoder", lambda: [model.fuse(states, packing, seen) for _ in range(4)])[0]
        visual = model.encode_frames(frames, noise)
        counted(flops, "pixel decoder", lambda: model.predict_pixels(visual, frames))
        counted(flops, "vocabulary logits", lambda: model.word_logits(hidden))
        heads = [(model.vision_projection, tokens[:, 0, 0]), (model.text_projection, packing.first(states))]
        heads += [(model.match_head, packing.first(fused))] * 3
        counted(flops, "projections and match head", lambda: [head(x) for head, x in heads])
    return flops


def counted(flops: dict[str, int], name: str, function: Callable):
    """Runs ``function``, adds what it cost to ``flops`` and returns its result."""
    counter = FlopCounterMode(display=False)
    with counter:
        result: Tensor | list = function()
    flops[name] = counter.get_total_flops()
    return result


def print_table(config: ProfileConfig, parameters: dict[str, int], flops: dict[str, int]) -> None:
    model = config.model
    compared = model == dataclasses.replace(ModelConfig.of_size("base"), text=model.text)
    print(f"size {model.size}, frames {model.frames}, kept {model.frames_kept}, caption {model.text.max_length} tokens")
    print(f"tokens per frame, class token included: {' -> '.join(map(str, model.vision.token_counts()))}\n")
    header = f"{'part':28} {'parameters':>12} {'GFLOPs':>9}"
    print(header + (f" {'planned':>9} {'Singularity':>12}" if compared else ""))
    for name in parameters:
        row = f"{name:28} {parameters[name]:12,} {flops.get(name, 0) / 1e9:9.3f}"
        if compared and name in PLANNED:
            singularity, planned = PLANNED[name]
            row += f" {planned:9.1f} {'-' if singularity is None else singularity:>12}"
        print(row)
    total = f"{'sum':28} {sum(parameters.values()):12,} {sum(flops.values()) / 1e9:9.3f}"
    if compared:
        planned_sum = sum(planned for _, planned in PLANNED.values())
        total += f" {planned_sum:9.1f} {sum(value or 0 for value, _ in PLANNED.values()):12.1f}"
    print(total)
