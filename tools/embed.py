"""Embeds the clips and captions of a set of shards, and finds the clips that a text describes.

    deepspeed tools/embed.py write --checkpoint RUN --out DIR [--data FOLDER] [key=value ...]
    python tools/embed.py write ...                                                        (one rank)
    python tools/embed.py query DIR "a text" ["another" ...] [--top N] [--out FOLDER]

``write`` goes on where it was broken off. What DIR then holds stands in smaug_ds/evaluation/embeddings.py. It embeds
the run's test split; ``evaluation.split=train`` the other part, ``--data`` a folder of indexed shards.
``query`` prints the best clips by cosine and writes them as clips.png and clips.html into FOLDER, by default
DIR/queries/FIRST_TEXT. Exit codes: 0 done, 2 a setting is wrong, 1 anything else.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from smaug_ds import distributed
from smaug_ds.config import ConfigError
from smaug_ds.data.draw import centre_crop
from smaug_ds.data.image import decode_image
from smaug_ds.data.media import MediaError
from smaug_ds.data.quarantine import DataError, Ledger
from smaug_ds.data.shard import ShardError
from smaug_ds.data.video import Video
from smaug_ds.engine.pictures import Pixels, Tile, sheet
from smaug_ds.engine.trained import identify, load_model, read_config
from smaug_ds.evaluation.embeddings import Rows, keys_of, read_manifest, search, write_embeddings
from smaug_ds.evaluation.held_out import open_corpus

TIMEOUT_SECONDS = 1800.0  # a rank that waits longer for the others gives up
COLUMNS = 5  # of the contact sheet
THUMBNAIL = 320  # pixels of the longer side, in the page


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can mend is one line on standard error."""
    parser = argparse.ArgumentParser(prog="embed", description="Embeds clips and texts, and searches in them.")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; LOCAL_RANK is what counts")
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write", help="embed a set of shards")
    writer.add_argument("--checkpoint", required=True, help="run folder, checkpoint or exported folder")
    writer.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to make, or to go on with")
    writer.add_argument("--data", metavar="FOLDER", help="folder of indexed shards instead of the run's own")
    writer.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the checkpoint's")
    asker = commands.add_parser("query", help="find the clips that a text describes")
    asker.add_argument("embeddings", type=Path, metavar="DIR", help="what write has made")
    asker.add_argument("texts", nargs="+", metavar="TEXT")
    asker.add_argument("--top", type=int, default=10, metavar="N", help="clips for each text (default 10)")
    asker.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: in DIR/queries")
    options = parser.parse_args(arguments)
    if options.command == "query" and options.top < 1:
        parser.error(f"--top is {options.top}: it must be at least 1")
    try:
        if options.command == "write":
            distributed.init(TIMEOUT_SECONDS)
            data = str(Path(options.data).resolve()) if options.data else None  # a query may come from elsewhere
            write(options.checkpoint, data, options.overrides, options.out)
        else:
            query(options.embeddings, options.texts, options.top, options.out)
    except (ConfigError, DataError) as error:
        distributed.print_error(error)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        distributed.shutdown()
    return 0


def write(checkpoint: str, data: str | None, overrides: Sequence[str], out: Path) -> None:
    """Embeds on all ranks. Raises ConfigError for what a setting can mend, DataError when a data worker dies."""
    with distributed.agreeing(ConfigError):
        folder, config = read_config(checkpoint, data, overrides)
        model, tokenizer = load_model(folder, config)
        corpus = open_corpus(config.data, config.evaluation.split)
    identity = identify(folder)
    facts = {
        "checkpoint": str(folder.resolve()),
        "weights_sha256": identity["weights_sha256"],
        "data": data,
        "overrides": list(overrides),
        "samples": {str(index.folder): index.totals["samples"] for index in corpus.indexes},
        "frames": config.model.frames,
    }
    ledger = Ledger(out, distributed.rank())
    lost = write_embeddings(out, corpus, model, tokenizer, config.data, config.evaluation.batch_size, facts, ledger)
    if distributed.is_main():
        manifest = read_manifest(out)
        print(f"{out}: {manifest['clips']} clips, {manifest['texts']} texts; {lost} clips could not be decoded")


@dataclass(frozen=True)
class Hit:
    """One clip that was found."""

    score: float  # cosine
    name: str  # shard/key
    captions: tuple[str, ...]
    frame: Pixels  # its middle one


def query(embeddings: Path, texts: Sequence[str], top: int, out: Path | None) -> Path:
    """Prints and draws the ``top`` clips for each text; returns the folder of the pictures.

    Raises ConfigError when checkpoint or shards are no longer what was embedded.
    """
    manifest = read_manifest(embeddings)
    folder, config = read_config(manifest["checkpoint"], manifest["data"], manifest["overrides"])
    if identify(folder)["weights_sha256"] != manifest["weights_sha256"]:
        raise ConfigError(f"{folder} has other weights than {embeddings} was made with: write it anew")
    model, tokenizer = load_model(folder, config)
    ids = tokenizer.encode(list(texts), model.config.text.max_length)
    with torch.no_grad():
        encoded = model.encode_text(ids.input_ids.to(distributed.device()), ids.lengths).embedding
    found = search(embeddings / "video.npy", encoded.float().cpu().numpy(), top)
    if not all(found):
        raise ConfigError(f"{embeddings} holds no embedding yet: write it to the end")
    keys = keys_of(embeddings, [row for best in found for row, _ in best])
    rows = Rows(open_corpus(config.data, config.evaluation.split))
    hits = []
    for text, best in zip(texts, found, strict=True):
        print(f"“{text}”")
        hits.append([_open(rows, row, score, "/".join(keys[row])) for row, score in best])
        for place, hit in enumerate(hits[-1], start=1):
            print(f"{place:4}  {hit.score:6.3f}  {hit.name}  {hit.captions[0]}")
    out = out or embeddings / "queries" / (re.sub(r"\W+", "_", texts[0]).strip("_")[:60] or "query")
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(contact_sheet(texts, hits)).save(out / "clips.png", optimize=True)
    (out / "clips.html").write_text(page(texts, hits, manifest), encoding="utf-8")
    print(out / "clips.png", out / "clips.html", sep="\n")
    return out


def _open(rows: Rows, row: int, score: float, name: str) -> Hit:
    try:
        entry = rows.entry(row)
        if f"{entry.shard}/{entry.key}" != name:
            raise ShardError(
                f"row {row} was {name}, but now it is {entry.shard}/{entry.key}: write the embeddings anew"
            )
        sample = rows.read_sample(entry)
        if sample.medium == "image":
            return Hit(score, name, sample.captions, decode_image(sample.media)[0])
        video = Video(sample.media)
        return Hit(score, name, sample.captions, video.decode([len(video) // 2])[0])
    except (IndexError, ShardError, MediaError) as error:
        raise ConfigError(f"{name} is not what was embedded: {error}") from error


def contact_sheet(texts: Sequence[str], hits: Sequence[Sequence[Hit]]) -> Pixels:
    """The middle frames of the clips of each text, best first, with their cosines."""
    rows: list[tuple[str, list[Tile]]] = []
    for text, best in zip(texts, hits, strict=True):
        tiles = [Tile(_square(hit.frame), f"{place}   {hit.score:.3f}") for place, hit in enumerate(best, start=1)]
        for start in range(0, len(tiles), COLUMNS):
            rows.append((f"“{text}”" if start == 0 else "", tiles[start : start + COLUMNS]))
    return sheet(rows)


def page(texts: Sequence[str], hits: Sequence[Sequence[Hit]], manifest: dict[str, Any]) -> str:
    """The same as HTML with the captions; the pictures are in it, so it can be sent as it is."""
    parts = [_HEAD]
    for text, best in zip(texts, hits, strict=True):
        parts.append(f"<h2>{html.escape(text)}</h2>\n<div>")
        for place, hit in enumerate(best, start=1):
            captions = "<br>".join(html.escape(caption) for caption in hit.captions)
            parts.append(
                f'<figure><img src="data:image/jpeg;base64,{_jpeg(hit.frame)}" alt="">'
                f"<figcaption><b>{place}</b> &ensp; {hit.score:.3f}<br>{captions}<br>"
                f"<small>{html.escape(hit.name)}</small></figcaption></figure>"
            )
        parts.append("</div>")
    told = f"{manifest['clips']} clips searched; {manifest['checkpoint']}, weights {manifest['weights_sha256'][:12]}"
    return "\n".join([*parts, f"<p><small>{html.escape(told)}</small></p>\n"])


_HEAD = """<!DOCTYPE html>
<meta charset="utf-8">
<title>Clips</title>
<style>
body { font: 15px sans-serif; margin: 2em; color: #1f2328 }
div { display: flex; flex-wrap: wrap; gap: 18px }
figure { margin: 0; width: 320px }
img { max-width: 320px; border-radius: 6px }
small { color: #656d76; overflow-wrap: anywhere }
</style>"""


def _square(frame: Pixels) -> Pixels:
    top, left, height, width = centre_crop(*frame.shape[:2])
    return np.ascontiguousarray(frame[top : top + height, left : left + width])


def _jpeg(frame: Pixels) -> str:
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode("ascii")


if __name__ == "__main__":
    sys.exit(main())
