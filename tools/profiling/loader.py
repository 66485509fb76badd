"""Time of the data path stage by stage, what limits it, and what would remove the limit.

    python tools/profile_throughput.py loader [--data FOLDER data.tokenizer=FILE] [data.workers=4 frames=[1,4] ...]
        [--rate SAMPLES_PER_S | --step-seconds S | --run RUN] [--nvdec-rate CLIPS_PER_S] [--json FILE]
    python tools/profile_throughput.py loader --against decord
    python tools/profile_throughput.py loader --soak 20000

Without ``--data``, clips of 10 s and images are rendered first. The stages of a sample are timed one by one on one
core, then the whole loader as training uses it. ``--rate`` is what a rank wants of it; ``--step-seconds`` (of a step of
``batch`` samples) or a finished run of one rank tells it from the model. ``--against decord`` times a plain torch
DataLoader over the same clips in turns with ours. ``--soak`` watches memory and open files over so many samples.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from smaug_ds.config import ConfigError, naming, parse, to_dict
from smaug_ds.data.config import DataConfig
from smaug_ds.data.dali import choose_decoder
from smaug_ds.data.index import Corpus
from smaug_ds.data.mixture import open_mixture
from smaug_ds.data.sample import MEDIA, Medium
from smaug_ds.text import Tokenizer
from tools.profiling.bottleneck import Demand, advise, demand_of_run
from tools.profiling.clips import ClipStyle, render_corpus
from tools.profiling.decord import compare
from tools.profiling.machine import conditions, describe
from tools.profiling.stages import Case, NvdecRate, measure, nvdec_rate
from tools.profiling.whole import loader_rate, soak


@dataclass(frozen=True)
class LoaderProfile:
    """What is measured, and for how long."""

    data: DataConfig = field(default_factory=DataConfig)
    frames: tuple[int, ...] = (1, 4)  # T of a clip, each measured by itself
    image_size: int = 224
    batch: int = 32  # samples of a rank's step
    repeats: int = 5  # batches whose stages are timed; turns against another loader
    seconds: float = 10.0  # that a whole loader is timed at a time
    clips: int = 32  # rendered, and as many images
    clip_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("image_size", "batch", "repeats", "seconds", "clips", "clip_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be above 0")
        if not self.frames or min(self.frames) < 1:
            raise ConfigError(f"frames is {list(self.frames)}: give numbers from 1, such as [1,4]")


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``loader``, with what follows it on the command line."""
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], metavar="FOLDER", help="indexed shards; may be repeated")
    demand = parser.add_mutually_exclusive_group()
    demand.add_argument("--rate", type=float, metavar="SAMPLES_PER_S", help="wanted of each rank")
    demand.add_argument("--step-seconds", type=float, metavar="S", help="a model's step, its wait for data left out")
    demand.add_argument("--run", type=Path, metavar="RUN", help="run folder whose metrics.jsonl tells what was wanted")
    parser.add_argument("--nvdec-rate", type=float, metavar="CLIPS_PER_S", help="assumed of an engine, if not measured")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--against", choices=["decord"], help="time another loader in turns with ours")
    mode.add_argument("--soak", type=int, metavar="SAMPLES", help="watch memory and open files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    keys = ", ".join(to_dict(LoaderProfile()))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"of {keys} (as data.workers=4)")
    args = parser.parse_intermixed_args(arguments)
    try:
        profile = parse(LoaderProfile, None, args.overrides)
        profile = replace(profile, data=replace(profile.data, train=(*profile.data.train, *args.data)))
        wanted = _demand(args, profile.batch)
        told = conditions(to_dict(profile))
        print(describe(told))
        with tempfile.TemporaryDirectory(prefix="profile.") as name:
            scratch = Path(name)
            cases = list(_cases(profile, scratch))
            if args.against:
                figures = compare(cases, profile.repeats, profile.seconds, scratch)
            elif args.soak:
                figures = soak(cases, args.soak, scratch)
            else:
                figures = [profile_case(case, profile, wanted, args.nvdec_rate, scratch) for case in cases]
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    if args.json:
        args.json.write_text(json.dumps({**told, "figures": figures}, indent=1) + "\n", encoding="utf-8")


def _demand(args: argparse.Namespace, batch: int) -> Demand | None:
    for name in ("rate", "step_seconds", "nvdec_rate", "soak"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be above 0")
    if args.run is not None:
        with naming(f"--run {args.run}"):
            return demand_of_run(args.run)
    if args.step_seconds is not None:
        return Demand(batch / args.step_seconds, args.step_seconds)
    return Demand(args.rate, batch / args.rate) if args.rate is not None else None


def _cases(profile: LoaderProfile, scratch: Path) -> Iterator[Case]:
    """Images, and clips at each number of frames, as far as the corpus has them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, decoder = profile.data, choose_decoder(profile.data.decoder, device)
    if data.train or data.corpus:
        if not data.tokenizer:
            raise ConfigError("data.tokenizer is empty: name the vocab.txt or tokenizer.json for these captions")
        corpora = dict.fromkeys(MEDIA, open_mixture(data).corpus)
    else:
        style = ClipStyle(seconds=profile.clip_seconds)
        render_corpus(scratch / "corpus", profile.clips, style, os.cpu_count() or 1)
        corpora = {medium: Corpus.open([scratch / "corpus" / medium], 0.0, "train") for medium in MEDIA}
        data = replace(data, tokenizer=str(scratch / "corpus" / "vocab.txt"))
        size = corpora["video"].indexes[0].totals["media_bytes"] / profile.clips
        print(f"rendered {profile.clips} clips ({style}, {size * 8e-3 / style.seconds:.0f} kbit/s) and as many images")
    print(f"decoder {decoder}; {data.workers} workers, batch {profile.batch}, {profile.image_size} pixels")
    with naming("data.tokenizer"):
        tokenizer = Tokenizer(data.tokenizer)
    wanted: list[tuple[Medium, int]] = [("image", 1), *(("video", frames) for frames in profile.frames)]
    for medium, frames in wanted:
        if corpora[medium].count(medium):
            sizes = (profile.image_size, profile.batch)
            yield Case(corpora[medium], tokenizer, data, medium, frames, *sizes, device, decoder)


def profile_case(
    case: Case, profile: LoaderProfile, wanted: Demand | None, assumed: float | None, scratch: Path
) -> dict[str, Any]:
    """Measures one case, prints its table and the advice."""
    stages = measure(case, profile.repeats)
    whole = loader_rate(case, profile.seconds, scratch)
    nvdec = NvdecRate(assumed, None) if assumed is not None else None
    if case.decoder.codecs and case.medium == "video":
        nvdec = nvdec_rate(case)
        print(f"NVDEC: {nvdec.one_session:.0f} clips/s in one session, {nvdec.all_sessions:.0f} in all")
    print(f"\n{case}: milliseconds a sample")
    for stage in stages:
        note = "" if stage.counted else "  (told, not part of the sum)"
        print(f"  {stage.where:7} {stage.name:22} {stage.milliseconds:8.3f}{note}")
    for where in ("worker", "rank"):
        total = sum(stage.milliseconds for stage in stages if stage.where == where and stage.counted)
        print(f"  {where:7} {'sum':22} {total:8.3f}")
    print(f"  whole loader: {whole.samples_per_second:.1f} samples/s, {whole.cpu_ms:.2f} ms of CPU time a sample")
    cores = len(os.sched_getaffinity(0))
    advice = advise(stages, whole.samples_per_second, whole.cpu_ms, case.data.workers, cores, wanted, nvdec)
    print("\n".join(f"  {line}" for line in advice.lines))
    return {
        "case": str(case),
        "stages": [asdict(stage) for stage in stages],
        "whole": asdict(whole),
        "nvdec": None if nvdec is None else asdict(nvdec),
        "advice": asdict(advice),
    }
