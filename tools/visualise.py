"""Pictures of a run: what it masks, keeps, chooses and retrieves on held-out clips.

    python tools/visualise.py RUN_FOLDER [--out DIR] [--samples N] [--data FOLDER] [key=value ...]

Writes reconstruction.png, kept_tokens.png, chosen_frames.png (of a multi-frame model) and retrieval.png into DIR,
by default RUN_FOLDER/pictures. RUN_FOLDER may be a checkpoint, too; settings as in ``smaug_ds.evaluate``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.quarantine import Ledger
from smaug_ds.data.sample import Batch
from smaug_ds.engine.pictures import Pixels, make_pictures, retrieval_sheet
from smaug_ds.evaluate import describe, load_model, read_config
from smaug_ds.evaluation.held_out import open_held_out
from smaug_ds.evaluation.retrieval import RetrievalDetails, evaluate
from smaug_ds.model.smaug import SmaugModel

TOP = 5  # retrieved clips shown for each caption
SEED = 0  # of the masks and of the choice of clips


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can mend is one line on standard error."""
    parser = argparse.ArgumentParser(prog="visualise", description="Pictures of a run.")
    parser.add_argument("run_folder", help="run folder (its latest checkpoint) or checkpoint folder")
    parser.add_argument("--out", metavar="DIR", help="where to write; default: pictures in RUN_FOLDER")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="clips and captions shown (default 4)")
    parser.add_argument("--data", metavar="FOLDER", help="folder of indexed shards to use instead of the run's own")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the checkpoint's")
    options = parser.parse_intermixed_args(arguments)
    try:
        out = Path(options.out) if options.out else Path(options.run_folder) / "pictures"
        for path in draw(options.run_folder, options.data, options.overrides, out, max(1, options.samples)):
            print(path)
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def draw(run_folder: str, data: str | None, overrides: Sequence[str], out: Path, samples: int) -> list[Path]:
    """Writes the pictures of ``samples`` held-out clips and returns their paths.

    Raises ConfigError when checkpoint, tokenizer or shards cannot be used.
    """
    folder, config = read_config(run_folder, data, overrides)
    model, tokenizer = load_model(folder, config)
    ledger = Ledger(out / "evaluation", distributed.rank())
    loader = open_held_out(config.model, config.data, config.evaluation, tokenizer, distributed.device(), ledger)
    pool = Pool(model)
    result = evaluate(model, pool.watch(loader), tokenizer, config.evaluation, describe(folder))
    pictures = make_pictures(model, pool.examples(samples), samples)
    pictures["retrieval"] = retrieved(result.details, pool.middle_frames, samples)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures.items():
        paths.append(out / f"{name}.png")
        Image.fromarray(picture).save(paths[-1], optimize=True)
    return paths


class Pool:
    """What pictures need of the batches that pass by on their way to the evaluation."""

    def __init__(self, model: SmaugModel) -> None:
        self.model = model
        self.first: Batch | None = None
        self.middle_frames: dict[str, Pixels] = {}  # of each clip, by its key

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches."""
        for batch in batches:
            self.first = self.first or batch
            middles = batch.frames[:, batch.frames.shape[1] // 2].permute(0, 2, 3, 1).cpu().numpy()
            self.middle_frames |= dict(zip(batch.keys, middles, strict=True))
            yield batch

    def examples(self, samples: int) -> Batch:
        """The first batch on the model's device, with masks drawn: evaluation masks nothing."""
        assert self.first is not None, "an evaluation without batches raises"
        noise = torch.rand(self.first.patch_noise.shape, generator=torch.Generator().manual_seed(SEED))
        return dataclasses.replace(self.first, patch_noise=noise).to(next(self.model.parameters()).device)


def retrieved(details: RetrievalDetails, frames: dict[str, Pixels], samples: int) -> Pixels:
    """The best clips for ``samples`` captions drawn from all."""
    count = min(samples, len(details.texts))
    chosen = np.sort(np.random.default_rng(SEED).choice(len(details.texts), count, replace=False))
    order = np.argsort(-details.t2v_scores[chosen], axis=1, kind="stable")[:, :TOP]
    return retrieval_sheet(
        [details.texts[query] for query in chosen],
        [[frames[details.keys[clip]] for clip in best] for best in order],
        [[bool(details.relevant[query, clip]) for clip in best] for query, best in zip(chosen, order, strict=True)],
    )


if __name__ == "__main__":
    sys.exit(main())
