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
import math
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
from tools.profiling.command import keys_of, new_parser, run, write_json
from tools.profiling.corpora import ClipStyle, render_corpus
from tools.profiling.machine import announce
from tools.profiling.rates import compare, import_decord, loader_rate, soak
from tools.profiling.stages import Case, NvdecRate, Stage, measure, nvdec_rate

_TRIMMING = {"order and index", "read", "demux, frame choice", "trim", "draws, tokens"}  # what a worker does for NVDEC
_STEP = "seconds_per_step/"  # in metrics.jsonl; "data" is the wait for the loader


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
        for name in ("image_size", "batch", "repeats", "seconds", "clips"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be above 0")
        if round(self.clip_seconds * ClipStyle.fps) < 1:
            raise ConfigError(
                f"clip_seconds is {self.clip_seconds}, which holds no frame at {ClipStyle.fps} frames/s: it must be "
                f"at least {1 / ClipStyle.fps:.2g}"
            )
        if not self.frames or min(self.frames) < 1:
            raise ConfigError(f"frames is {list(self.frames)}: give numbers from 1, such as [1,4]")


def main(arguments: Sequence[str], program: str) -> None:
    """The subcommand ``loader``, with what follows it on the command line."""
    parser = new_parser(program, __doc__)
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
    figures, args = run(parser, arguments, keys_of(LoaderProfile(), "data.workers=4"), _figures)
    if args.json:
        write_json(args.json, figures)


def _figures(args: argparse.Namespace) -> dict[str, Any]:
    profile = parse(LoaderProfile, None, args.overrides)
    profile = replace(profile, data=replace(profile.data, train=(*profile.data.train, *args.data)))
    wanted = _demand(args, profile.batch)
    if args.against:
        import_decord()  # before anything is rendered
    told = announce(to_dict(profile))
    with tempfile.TemporaryDirectory(prefix="profile.") as name:
        scratch = Path(name)
        cases = list(_cases(profile, scratch))
        if args.against:
            figures = compare(cases, profile.repeats, profile.seconds, scratch)
        elif args.soak:
            figures = soak(cases, args.soak, scratch)
        else:
            figures = [profile_case(case, profile, wanted, args.nvdec_rate, scratch) for case in cases]
    return {**told, "figures": figures}


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


# ---- from measured stages to advice: arithmetic only; a rate is samples a second of one rank


@dataclass(frozen=True)
class Demand:
    """What a model wants of the loader."""

    rate: float  # samples/s
    step_seconds: float  # of its step, the wait for data left out


@dataclass(frozen=True)
class Advice:
    """What limits the loader, in figures and in words."""

    limits: dict[str, float]  # part -> samples/s that it would allow by itself
    bottleneck: str  # the part that allows least
    waiting: float | None  # share of its time that the model waits for data
    workers: int | None  # that the wanted rate needs
    engines: int | None  # of NVDEC that the wanted rate needs
    lines: tuple[str, ...]


def demand_of_run(run: Path) -> Demand:
    """The last logged step of a run. Its wait for data is no part of what the model needs.

    Raises ValueError where the run logged none, or one without its phases.
    """
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict):
            raise ValueError(f"metrics.jsonl, line {number}: expected a JSON object, found {json.dumps(line)}")
    logged = [line for line in lines if "samples_per_second" in line]
    if not logged:
        raise ValueError("metrics.jsonl holds no logged step: let the run log one, or give --step-seconds")
    last = logged[-1]
    phases = {name.removeprefix(_STEP): value for name, value in last.items() if name.startswith(_STEP)}
    whole, step = sum(phases.values()), sum(value for phase, value in phases.items() if phase != "data")
    if not step > 0:
        raise ValueError(
            f"metrics.jsonl: phases of the last logged step take {step} s without {_STEP}data, so that nothing tells "
            "what the model wants: let a step be logged with its phases, or give --step-seconds"
        )
    return Demand(last["samples_per_second"] * whole / step, step)


def advise(
    stages: Sequence[Stage],
    loader_rate: float,
    cpu_ms: float,
    workers: int,
    cores: int,
    demand: Demand | None,
    nvdec: NvdecRate | None,
) -> Advice:
    """Names the part that allows least and what the wanted rate needs of each.

    Args:
        stages: of a sample.
        loader_rate: samples/s of the whole loader, as measured.
        cpu_ms: CPU time of all processes for a sample, as measured.
        workers: that it was measured with; 0 reads and decodes in the rank's process.
        cores: that the processes may run on.
        nvdec: measured or assumed speed of NVDEC on these clips.
    """
    worker_ms, rank_ms = (sum(s.milliseconds for s in stages if s.where == w and s.counted) for w in ("worker", "rank"))
    limits = {
        "workers": max(workers, 1) * 1e3 / worker_ms,
        "rank": 1e3 / (rank_ms if workers else rank_ms + worker_ms),
        "cores": cores * 1e3 / cpu_ms,
    }
    # A little above its own estimate, a part is not what holds the others up: cores win a tie.
    bottleneck = min(limits, key=lambda part: limits[part] * (0.9 if part == "cores" else 1))
    slowest = max((s for s in stages if s.counted), key=lambda s: s.milliseconds)
    parts = ", ".join(f"{part} {limit:.0f}" for part, limit in limits.items())
    lines = [f"each part alone would allow, samples/s: {parts}; together {loader_rate:.0f}"]
    remedy = {
        "workers": f"more data.workers; {slowest.name} takes {slowest.milliseconds / worker_ms:.0%} of a worker's time",
        "rank": "more data.dali_threads, or a GPU for the graph",
        "cores": f"more cores, or NVDEC: workers and graph share {cores} and use {cpu_ms:.1f} ms a sample",
    }
    lines.append(f"bottleneck: {bottleneck} ({remedy[bottleneck]})")
    if demand is None:
        return Advice(limits, bottleneck, None, None, None, tuple(lines))
    needed = workers_for(demand.rate, worker_ms)
    waiting = share_waiting(demand.rate, loader_rate)
    lines.append(
        f"wanted: {demand.rate:.0f} samples/s (a step of {demand.step_seconds:.3f} s); "
        f"the model would wait for data {waiting:.0%} of the time"
    )
    cores_needed = math.ceil(demand.rate * cpu_ms / 1e3)
    lines.append(f"that needs {needed} workers and {cores_needed} cores of this kind for the data path")
    trim = next((stage for stage in stages if stage.name == "trim"), None)
    engines = None
    if nvdec is not None and trim is not None:
        engines = math.ceil(demand.rate / nvdec.one_session)
        without = sum(s.milliseconds for s in stages if s.where == "worker" and s.name in _TRIMMING)
        source = "assumed" if nvdec.all_sessions is None else "measured"
        lines.append(
            f"with NVDEC: {workers_for(demand.rate, without)} workers (they trim: {without:.2f} ms a sample) and "
            f"{engines} engines at {nvdec.one_session:.0f} clips/s each, {source}"
        )
    elif trim is not None:
        lines.append("NVDEC was not measured here; --nvdec-rate CLIPS_PER_S assumes the speed of an engine")
    return Advice(limits, bottleneck, waiting, needed, engines, tuple(lines))


def workers_for(rate: float, worker_ms: float) -> int:
    """Workers that make ``rate`` samples a second when each sample takes one of them ``worker_ms``."""
    return math.ceil(rate * worker_ms / 1e3 - 1e-9)


def share_waiting(wanted: float, given: float) -> float:
    """Share of its time, 0 to 1, that a model waits which could take ``wanted`` samples/s and gets ``given``."""
    return max(0.0, 1 - given / wanted)
