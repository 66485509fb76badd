"""Makes what a small run needs out of any source: indexed shards for training and testing, and a vocabulary.

    python tools/prepare_corpus.py [--data DIR|LIST.json [--media-root DIR]] --out RUNS [--clips N] [--workers N]

Without ``--data`` the built-in corpus is rendered. Ready shards stay where they are, and get an index. The settings
that point a run at the result are written to ``RUNS/corpus.args``, one ``key=value`` a line. What is done is not done
again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smaug_ds.data.annotations import Source, describe_source, read_lists
from smaug_ds.data.index import Corpus, ShardIndex
from smaug_ds.data.indexing import build_index
from smaug_ds.data.sample import MEDIA
from smaug_ds.data.toy import ToyConfig, render_corpus
from smaug_ds.text import train_vocabulary
from tools.build_shards import build

HOLDOUT = 0.1  # share of the samples kept from training where the source brings no test set
BATCH = 64  # samples of a step at most
VOCABULARY = 8000  # words at most of a vocabulary trained on the captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder of shards or lists, or one list; default: the built-in corpus"
    )
    parser.add_argument("--media-root", type=Path, help="where the paths of the lists start")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=8000, help="size of the built-in corpus")
    parser.add_argument("--ranks", type=int, default=2, help="that the run will have: they share a batch")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = prepare(args.data, args.media_root, args.out, args.clips, args.workers)
        settings |= batch_sizes(settings, args.ranks)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    except OSError as error:
        parser.exit(2, f"error: {error.filename}: {error.strerror}; choose another --out, or make room there\n")
    (args.out / "corpus.args").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))


def prepare(data: Path | None, media_root: Path | None, out: Path, clips: int, workers: int) -> dict[str, str]:
    """Settings ``data.*`` of a run over ``data``; shards, index and vocabulary stand in ``out`` where they are new.

    Raises ValueError when ``out`` was prepared from another source, and as the steps do.
    """
    remember_source(out, {"data": str(data), "media_root": str(media_root), "clips": None if data else clips})
    if data is None:
        data = out / "corpus"
        render_corpus(ToyConfig(clips=clips, images=max(BATCH, clips // 4), test_clips=128), data, workers=workers)
    source = describe_source(data, media_root)
    if source.kind == "lists":
        parts = (filled(source.train), filled(source.test))
        train, test = ([shards_of(source, one, out / "shards", workers) for one in lists] for lists in parts)
    else:
        train, test = list(source.train), list(source.test)
        for folder in (*train, *test):
            if not (folder / "index").exists():
                print(build_index(folder, workers=workers, progress=True))
    return {
        "data.train": json.dumps([str(folder) for folder in train]),
        "data.test": json.dumps([str(folder) for folder in test]),
        "data.holdout": "0" if test else str(HOLDOUT),
        "data.tokenizer": str(find_vocabulary(data, source, train, out)),
    }


def batch_sizes(settings: dict[str, str], ranks: int) -> dict[str, str]:
    """Settings ``batch.*``: a step holds at most ``BATCH`` samples, and none of them twice.

    Raises ValueError when a medium has fewer samples than there are ranks.
    """
    corpus = Corpus.open(json.loads(settings["data.train"]), float(settings["data.holdout"]), "train")
    samples = {medium: corpus.count(medium) for medium in MEDIA if corpus.count(medium)}
    fewest = min(samples.values())
    micro_size = min(BATCH, fewest) // ranks
    if not micro_size:
        raise ValueError(f"the corpus has only {samples} samples for {ranks} ranks: add some, or leave a medium out")
    return {"batch.global_size": str(micro_size * ranks), "batch.micro_size": str(micro_size)}


def remember_source(out: Path, source: dict) -> None:
    """Writes down what ``out`` is prepared from. Raises ValueError when it was something else before."""
    note = out / "source.json"
    before = json.loads(note.read_text()) if note.exists() else source
    if before != source:
        raise ValueError(
            f"{out} was prepared from {told(before)}, not from {told(source)}: give another --out, or remove it"
        )
    note.write_text(json.dumps(source))


def told(source: dict) -> str:
    if source["clips"]:
        return f"the built-in corpus of {source['clips']} clips"
    root = source["media_root"]
    return source["data"] + (f" with media in {root}" if root != "None" else "")


def filled(lists: Sequence[Path]) -> Sequence[Path]:
    """The lists without the empty ones; all of them where all are empty, which building then says."""
    return [one for one in lists if next(iter(read_lists([one])), None)] or lists


def shards_of(source: Source, one: Path, shards: Path, workers: int) -> Path:
    """Builds the shards of a list in a folder of its name, unless they are there."""
    folder = shards / one.stem
    if not folder.exists():
        print(build([one], source.media_root, folder, workers=workers, progress=True))
    return folder


def find_vocabulary(data: Path, source: Source, train: Sequence[Path], out: Path) -> Path:
    """The source's own vocabulary (``vocab.txt``, ``tokenizer.json``, ``tokenizer/*vocab*.txt``), or a trained one."""
    if data.is_dir():
        for pattern in ("vocab.txt", "tokenizer.json", "tokenizer/tokenizer.json", "tokenizer/*vocab*.txt"):
            for path in sorted(data.glob(pattern)):
                return path
    path = out / "vocab.txt"
    if not path.exists():
        train_vocabulary(captions_of(source, train), VOCABULARY, path)
    return path


def captions_of(source: Source, train: Sequence[Path]) -> Iterator[str]:
    if source.kind == "lists":
        for annotation in read_lists(source.train):
            yield from annotation.captions
        return
    for folder in train:
        index = ShardIndex.open(folder)
        for number in range(len(index)):
            yield from index.read_sample(index.entry(number)).captions


if __name__ == "__main__":
    main()
