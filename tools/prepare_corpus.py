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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smaug_ds.data.annotations import Source, describe_source, json_rows, read_lists
from smaug_ds.data.index import Corpus, ShardIndex
from smaug_ds.data.indexing import build_index
from smaug_ds.data.parallel import write_whole
from smaug_ds.data.sample import MEDIA
from smaug_ds.data.toy import ToyConfig, render_corpus
from smaug_ds.text import train_vocabulary
from tools.build_shards import build

HOLDOUT = 0.1  # share of the samples kept from training where the source brings no test set
BATCH = 64  # samples of a step at most
VOCABULARY = 8000  # words at most of a vocabulary trained on the captions


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder of shards or lists, or one list; default: the built-in corpus"
    )
    parser.add_argument("--media-root", type=Path, help="where the paths of the lists start")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=8000, help="size of the built-in corpus")
    parser.add_argument("--ranks", type=int, default=2, help="that the run will have: they share a batch")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(arguments)
    if args.media_root and not args.data:
        parser.exit(2, f"error: --media-root {args.media_root} is where the files of --data lie: give --data\n")
    # one name each, wherever the command is given
    args.data, args.media_root, args.out = (path and path.resolve() for path in (args.data, args.media_root, args.out))
    try:
        settings = prepare(args.data, args.media_root, args.out, args.clips, args.workers)
        settings |= batch_sizes(settings, args.ranks)
        (args.out / "corpus.args").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    except KeyboardInterrupt:
        parser.exit(130, "stopped: the same command goes on from here\n")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    except OSError as error:
        parser.exit(
            2, f"error: {error.filename or args.out}: {error.strerror}; --out needs room and a right to write\n"
        )


def prepare(data: Path | None, media_root: Path | None, out: Path, clips: int, workers: int) -> dict[str, str]:
    """Settings ``data.*`` of a run over ``data``; shards, index and vocabulary stand in ``out`` where they are new.

    Raises ValueError when ``out`` was prepared from another source, and as the steps do.
    """
    built_in = ToyConfig(clips=clips, images=max(BATCH, clips // 4), test_clips=128)
    source = describe_source(data, media_root) if data else None
    out.mkdir(parents=True, exist_ok=True)
    remember_source(out, {"data": str(data), "media_root": str(media_root), "clips": None if data else clips})
    if not data or not source:
        data = out / "corpus"
        render_corpus(built_in, data, workers=workers)
        source = describe_source(data)
    if source.kind == "lists":
        train, test = (shards_of(source, lists, out / "shards", workers) for lists in (source.train, source.test))
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

    Raises ValueError when a medium has fewer samples than there are ranks, or none is kept to test on.
    """
    folders, holdout = json.loads(settings["data.train"]), float(settings["data.holdout"])
    corpus = Corpus.open(folders, holdout, "train")
    if holdout:
        try:
            Corpus.open(folders, holdout, "test")
        except ValueError as error:
            raise ValueError(f"{error}: give more samples, or some to test on, and another --out") from error
    samples = {medium: corpus.count(medium) for medium in MEDIA if corpus.count(medium)}
    fewest = min(samples.values())
    micro_size = min(BATCH, fewest) // ranks
    if not micro_size:
        few = f"the corpus has only {samples} samples for {ranks} ranks"
        raise ValueError(f"{few}: add some, or leave a medium out, with another --out")
    return {"batch.global_size": str(micro_size * ranks), "batch.micro_size": str(micro_size)}


def remember_source(out: Path, source: dict[str, Any]) -> None:
    """Writes down what ``out`` is prepared from, which may change until something of it stands there.

    Raises ValueError when shards, a vocabulary or settings of another source do. Nothing is removed.
    """
    note = out / "source.json"
    finished = any((folder / "index").exists() for folder in (out / "shards").glob("*"))
    trained = (out / "vocab.txt").exists() and source["data"] != str(out)  # there it is the source's own
    if finished or (out / "corpus.args").exists() or (trained and note.exists()):
        before = noted(note)
        if before is None:
            raise ValueError(f"{out} was prepared, but {note} does not tell from what: name another --out")
        if before != source:
            raise ValueError(f"{out} was prepared from {told(before)}, not from {told(source)}: name another --out")
    write_whole(note, json.dumps(source).encode("utf-8"))


def noted(note: Path) -> dict[str, Any] | None:
    """What ``remember_source`` has written; None where it has not, or the file is damaged."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):
        return None
    return found if isinstance(found, dict) and set(found) == {"data", "media_root", "clips"} else None


def told(source: dict[str, Any]) -> str:
    if source["data"] == "None":
        return f"the built-in corpus of {source['clips']} clips"
    root = source["media_root"]
    return source["data"] + (f" with media in {root}" if root != "None" else "")


def shards_of(source: Source, lists: Sequence[Path], shards: Path, workers: int) -> list[Path]:
    """Builds the shards of each list in a folder of its name, unless they are there; empty lists have none.

    Raises ShardError as ``build``, also where shards of other lists are: a list that cannot be built is not left out,
    for its data would be missed.
    """
    filled = [one for one in lists if any(True for _ in json_rows(one))] if len(lists) > 1 else lists
    folders = []
    for one in filled or lists:
        folder = shards / one.stem
        print(build([one], source.media_root, folder, workers=workers, progress=True))
        folders.append(folder)
    return folders


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
