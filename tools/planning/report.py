"""A plan in words, tables and JSON."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smaug_ds.planner.calibration import Measured, Speed
from smaug_ds.planner.cluster import Machine
from smaug_ds.planner.flops import step_flops
from smaug_ds.planner.memory import checkpoint_bytes
from smaug_ds.planner.parameters import parameters
from smaug_ds.planner.prediction import Fit, Prediction, Scale, Work, memory
from tools.planning.corpus import Recipe

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """All that is told of a run."""

    work: Work
    machine: Machine
    speed: Speed
    fit: Fit
    step: Prediction
    times: list[tuple[Recipe, float]]  # seconds of the whole run on each corpus
    scaling: list[Scale]
    checks: list[tuple[Measured, float]]  # measured steps, and the seconds predicted for them

    @property
    def seconds(self) -> float:
        """Of the whole run on the first corpus."""
        return self.times[0][1]


def report(plan: Plan) -> str:
    """The whole plan as text."""
    sections = [_model(plan), _memory(plan), _step(plan), _run(plan), _scaling(plan)]
    if plan.checks:
        sections.append(_checks(plan))
    sections.append("\n".join(["assumed, not measured:", *(f"  {text}" for text in _assumptions(plan))]))
    return "\n\n".join(sections)


def _assumptions(plan: Plan) -> list[str]:
    """Figures of data sheets, and of the settings ``cluster`` and ``media``, that nothing here has measured."""
    cluster, media = plan.machine.cluster, plan.work.media
    found = [*plan.machine.assumptions]
    if not cluster.on_cpu and media.nvdec:
        found.append(f"an NVDEC engine decodes {media.nvdec_pictures_s:g} pictures of 640x360 a second")
    found.append(
        f"clips of {media.clip_mb:g} MB and {media.clip_seconds:g} s, a key frame every {media.key_frame_every:g} "
        f"pictures; images of {media.image_mb:g} MB; captions of {media.caption_tokens:g} tokens (media.*)"
    )
    network = f"{cluster.network_gb_s:g} GB/s between nodes, " if cluster.nodes > 1 or not cluster.on_cpu else ""
    found.append(
        f"{network}{cluster.storage_gb_s:g} GB/s from storage to a node, {cluster.checkpoint_gb_s:g} GB/s to it from "
        f"all, {cluster.cores} cores a node (cluster.*)"
    )
    return found


def _model(plan: Plan) -> str:
    work = plan.work
    counts = parameters(work.model)
    lines = [f"model {work.model.size}, {work.model.frames} frames, {work.model.frames_kept} kept"]
    _, step = max(work.steps(plan.machine.cluster.ranks), key=lambda found: found[1].frames)
    flops = step_flops(work.model, work.loss, step, work.keys)
    lines.append(f"  {'part':28} {'parameters':>13} {'forward':>9} {'backward':>9}  GFLOPs of a sample")
    for name in dict.fromkeys([*counts, *flops]):
        cost = flops.get(name)
        shown = f"{cost.forward / step.batch / 1e9:9.3f} {cost.backward / step.batch / 1e9:9.3f}" if cost else ""
        lines.append(f"  {name:28} {counts.get(name, 0):13,} {shown}")
    total = sum(part.total for part in flops.values()) / step.batch / 1e9
    lines.append(f"  {'sum':28} {sum(counts.values()):13,} {total:19.3f} forward and backward")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    fit, cluster = plan.fit, plan.machine.cluster
    parts = ", ".join(f"{name} {value / GB:.2f}" for name, value in fit.parts.items() if value)
    lines = [f"memory of a rank: {fit.needed / GB:.1f} of {fit.available / GB:.1f} GB ({parts})"]
    stages = [f"ZeRO-{stage} {memory(plan.work, plan.machine, stage).needed / GB:.1f} GB" for stage in range(4)]
    lines.append(f"  by ZeRO stage on {cluster.ranks} ranks: {', '.join(stages)}")
    if fit.host:
        lines.append(f"  offloaded to a node's memory: {fit.host / GB:.1f} of {fit.host_available / GB:.0f} GB")
    size = checkpoint_bytes(plan.work.parameters, plan.work.precision)
    writing = size / (cluster.checkpoint_gb_s * GB)
    lines.append(
        f"  a checkpoint: {size / GB:.2f} GB, {writing:.1f} s at cluster.checkpoint_gb_s {cluster.checkpoint_gb_s:g}"
    )
    return "\n".join(lines)


def _step(plan: Plan) -> str:
    step, cluster = plan.step, plan.machine.cluster
    lines = [
        f"step of {step.ranks * step.micro_batch * step.accumulation} samples on {cluster.nodes} x {cluster.devices} "
        f"{cluster.device} ({step.micro_batch} a micro step, accumulation {step.accumulation}): "
        f"{_time(step.seconds)}, {_rate(step.samples_per_second)} samples/s",
        f"  a rank computes {plan.speed.flops / 1e12:.3g} TFLOP/s ({plan.speed.source})",
    ]
    for name, value in sorted(step.parts.items(), key=lambda item: -item[1]):
        sent = step.sent.get(name.removeprefix("exchange of "))
        moved = f"  {sent / 1e6:,.1f} MB leave each rank" if sent else ""
        lines.append(f"  {name:24} {_time(value):>10} {value / step.seconds:6.1%}{moved}")
    if step.data_rate is not None:
        lines.append(f"  {step.data_limit} would allow {_rate(step.data_rate)} samples/s")
    told = f"  bottleneck: {step.bottleneck}"
    lines.append(told + (f"; it would help: {step.remedy}" if step.bottleneck == step.data_limit else ""))
    return "\n".join(lines)


def _run(plan: Plan) -> str:
    ranks = plan.machine.cluster.ranks
    lines = [f"  {'corpus':40} {'draws an epoch':>15} {'clips':>7} {'hours':>9} {'rank hours':>11}"]
    for recipe, seconds in plan.times:
        hours, share = seconds / 3600, recipe.mix.get("video", 0.0)
        draws = sum(recipe.draws.values())
        lines.append(
            f"  {_shortened(recipe.name, 40):40} {draws:15,.0f} {share:7.0%} {hours:9.2f} {hours * ranks:11.1f}"
        )
    return "\n".join(["the whole run, without evaluation, checkpoints and failures:", *lines])


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[3 - width :]


def _scaling(plan: Plan) -> str:
    first = plan.scaling[0].weak.unhindered / plan.scaling[0].weak.ranks
    work = plan.work
    lines = [
        f"scaling, samples/s: micro batch {work.micro_batch} on every rank (!: does not fit), or global batch "
        f"{work.global_batch}; efficiency is that of model and network",
        f"  {'ranks':>6} {'model':>11} {'efficiency':>10} {'with data':>11} {'GB a rank':>10}  {'bottleneck':38} "
        f"{'same batch':>11} {'efficiency':>10} {'with data':>11}",
    ]
    for row in plan.scaling:
        weak, strong = row.weak, row.strong
        line = (
            f"  {weak.ranks:6} {_rate(weak.unhindered):>11} {weak.unhindered / weak.ranks / first:10.1%} "
            f"{_rate(weak.samples_per_second):>11} {row.memory.needed / GB:9.1f}{' ' if row.memory.fits else '!'}  "
            f"{weak.bottleneck:38} "
        )
        if strong is not None:
            share = strong.unhindered / strong.ranks / first
            line += f"{_rate(strong.unhindered):>11} {share:10.1%} {_rate(strong.samples_per_second):>11}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _checks(plan: Plan) -> str:
    lines = [f"  {'ranks':>6} {'batch':>6} {'measured':>10} {'predicted':>10} {'difference':>10}"]
    for row, predicted in plan.checks:
        lines.append(
            f"  {row.world_size:6} {row.batch:6} {_time(row.seconds):>10} {_time(predicted):>10} "
            f"{predicted / row.seconds - 1:+10.1%}"
        )
    return "\n".join(["against what was measured, seconds of a step:", *lines])


def as_json(plan: Plan, config: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """The plan as plain values."""
    return {
        "command": shlex.join(["python", *command]),
        "config": config,
        "parameters": parameters(plan.work.model),
        "flops_per_sample": plan.work.sample_flops(plan.machine.cluster.ranks),
        "memory": {**plan.fit.parts, "needed": plan.fit.needed, "available": plan.fit.available},
        "checkpoint_bytes": checkpoint_bytes(plan.work.parameters, plan.work.precision),
        "speed": asdict(plan.speed),
        "step": {**asdict(plan.step), "samples_per_second": plan.step.samples_per_second},
        "bottleneck": plan.step.bottleneck,
        "runs": [{"corpus": recipe.name, "draws": recipe.draws, "seconds": s} for recipe, s in plan.times],
        "scaling": [
            {
                "ranks": row.weak.ranks,
                "samples_per_second": row.weak.samples_per_second,
                "without_data": row.weak.unhindered,
                "bottleneck": row.weak.bottleneck,
                "bytes_of_a_rank": row.memory.needed,
                "fits": row.memory.fits,
                "same_global_batch": None if row.strong is None else row.strong.samples_per_second,
            }
            for row in plan.scaling
        ],
        "checks": [{**asdict(row), "predicted_seconds": predicted} for row, predicted in plan.checks],
        "assumptions": _assumptions(plan),
    }


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
