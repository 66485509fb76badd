"""From all that the planner counts to seconds of a step, samples a second, their bottleneck, and what does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from smaug_ds.config import ConfigError
from smaug_ds.data.sample import Medium
from smaug_ds.losses import LossConfig
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.planner.calibration import Speed
from smaug_ds.planner.cluster import ASSUMED_RESERVE, ClusterConfig, Machine
from smaug_ds.planner.communication import exchanges, seconds
from smaug_ds.planner.flops import KEYS, Captions, Keys, Step, step_flops
from smaug_ds.planner.media import MediaConfig, slowest, supplies
from smaug_ds.planner.memory import NEGATIVES, Negatives, Precision, activations, states, transient
from smaug_ds.planner.parameters import parameters


@dataclass(frozen=True)
class Work:
    """What is trained, how, and on what mixture of media."""

    model: ModelConfig
    loss: LossConfig
    media: MediaConfig
    precision: Precision
    mix: Mapping[Medium, float]  # share of the draws, hence of the steps, of each medium
    global_batch: int
    micro_batch: int
    keys: Keys = KEYS
    negatives: Negatives = NEGATIVES

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(parameters(self.model).values())

    def steps(self, world_size: int, micro_batch: int = 0) -> Iterator[tuple[float, Step]]:
        """Share and shape of the micro steps of each medium that occurs."""
        media = self.media
        hidden = max(1.0, self.loss.mlm_probability * (media.caption_tokens - 2))
        captions = Captions(media.caption_tokens, media.longest_caption)
        for medium, share in self.mix.items():
            if share:
                frames = self.model.frames if medium == "video" else 1
                yield share, Step(frames, micro_batch or self.micro_batch, world_size, captions, hidden)

    def sample_flops(self, world_size: int = 1) -> float:
        """Forward and backward operations of a sample, the mean over the media."""
        return sum(
            share * sum(part.total for part in step_flops(self.model, self.loss, step, self.keys).values()) / step.batch
            for share, step in self.steps(world_size)
        )


@dataclass(frozen=True)
class Prediction:
    """An optimizer step on so many ranks."""

    ranks: int
    micro_batch: int
    accumulation: int
    seconds: float
    parts: dict[str, float]  # seconds of the step: arithmetic, optimizer, each exchange, waiting for data
    sent: dict[str, float]  # bytes that leave each rank, by exchange
    data_limit: str  # slowest part of the data path
    data_rate: float | None  # samples/s that it allows all nodes together; None where it is the model's own cores
    remedy: str  # for ``data_limit``

    @property
    def samples_per_second(self) -> float:
        """Of all ranks."""
        return self.ranks * self.micro_batch * self.accumulation / self.seconds

    @property
    def unhindered(self) -> float:
        """The same if the data path were never late."""
        working = self.seconds - self.parts.get("waiting for data", 0.0)
        return self.ranks * self.micro_batch * self.accumulation / working

    @property
    def bottleneck(self) -> str:
        """The slowest part of the data path where the model waits for it, since no faster model would help; else what
        takes most of the step. Cores that both share take arithmetic, optimizer and the wait together."""
        parts = dict(self.parts)
        if "waiting for data" in parts:
            if self.data_rate is not None:
                return self.data_limit
            shared = ("arithmetic", "optimizer", "waiting for data")
            parts[self.data_limit] = sum(parts.pop(name) for name in shared)
        return max(parts, key=lambda name: parts[name])


def predict(work: Work, machine: Machine, speed: Speed, micro_batch: int = 0, accumulation: int = 1) -> Prediction:
    """A step on the machine's ranks of ``accumulation`` micro steps of ``micro_batch`` (0: the plan's) samples.

    On GPUs the data path runs beside the model, which waits only where it wants more than the slowest part delivers. On
    CPUs both share the cores of a host: ranks and data path together cannot use more time than the cores have, and each
    is slowed down by ``cluster.contention`` once all cores work.
    """
    cluster = machine.cluster
    micro_batch = micro_batch or work.micro_batch
    count = work.parameters
    parts: dict[str, float] = {"arithmetic": 0.0}
    sent: dict[str, float] = {}
    held = count / cluster.ranks if work.precision.stage >= 1 else count
    optimizer = speed.optimizer * held
    for share, step in work.steps(cluster.ranks, micro_batch):
        flops = sum(part.total for part in step_flops(work.model, work.loss, step, work.keys).values())
        parts["arithmetic"] += share * accumulation * flops / speed.flops
        for exchange in exchanges(work.model, work.loss, step, work.precision, count, accumulation, work.negatives):
            name = f"exchange of {exchange.name}"
            parts[name] = parts.get(name, 0.0) + share * seconds(exchange, machine)
            sent[exchange.name] = sent.get(exchange.name, 0.0) + share * exchange.sent
    parts["optimizer"] = optimizer
    slow = slowest(supplies(work.mix, work.model.frames, work.media, machine))
    on_node = cluster.devices * micro_batch * accumulation
    data_seconds = on_node / slow.rate
    limit, remedy = slow.name, slow.needs
    rate: float | None = slow.rate * cluster.nodes
    if cluster.on_cpu:
        parts, own = _on_shared_cores(parts, work, cluster, on_node)
        if own > data_seconds:
            data_seconds, limit = own, "cores, which model and data path share"
            remedy = "more cores a rank, or fewer ranks a node"
            rate = None  # which depends on the model's own share of them
    spent = sum(parts.values())
    if data_seconds > spent * (1 + 1e-9):  # more than what rounding makes of equal times
        parts["waiting for data"] = data_seconds - spent
    total = sum(parts.values())
    return Prediction(cluster.ranks, micro_batch, accumulation, total, parts, sent, limit, rate, remedy)


def _on_shared_cores(
    parts: dict[str, float], work: Work, cluster: ClusterConfig, on_node: int
) -> tuple[dict[str, float], float]:
    """The parts of a rank's step while all ranks of its node compute, and the least time that the node's cores need."""
    data = sum(share * work.media.cpu_seconds(m, work.model.frames, False) for m, share in work.mix.items()) * on_node
    exchanged = sum(value for name, value in parts.items() if name.startswith("exchange"))
    computing = cluster.devices * cluster.threads * (parts["arithmetic"] + parts["optimizer"])
    busy = min(1.0, cluster.devices * cluster.threads / cluster.cores)
    slower = 1 + (cluster.contention - 1) * busy if cluster.devices * cluster.threads > 1 else 1.0
    parts = {name: v if name.startswith("exchange") else v * slower for name, v in parts.items()}
    needed = (computing + data) * slower / cluster.cores
    return parts, needed + exchanged


@dataclass(frozen=True)
class Fit:
    """Memory of one rank."""

    parts: dict[str, float]  # bytes
    available: float
    host: float  # bytes of a node's memory that its ranks need for what is offloaded
    host_available: float

    @property
    def needed(self) -> float:
        """Bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether both memories suffice."""
        return self.needed <= self.available and self.host <= self.host_available


def memory(work: Work, machine: Machine, stage: int | None = None) -> Fit:
    """What a rank needs, for ZeRO ``stage`` (None: the plan's), for the medium that needs most."""
    cluster, precision = machine.cluster, work.precision
    if stage is not None:
        precision = dataclasses.replace(precision, stage=stage)
    held = states(work.parameters, precision, precision.stage, cluster.ranks)
    parts = {
        "weights": held.weights,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "buckets": held.buckets,
    }
    activity: dict[str, float] = {}
    for _, step in work.steps(cluster.ranks):
        kept = activations(work.model, work.loss, step, precision, work.keys, work.negatives)
        passing = transient(work.model, step, precision)
        if sum(kept.values()) + passing > sum(activity.values()):
            gathered = kept.pop("negatives", 0.0)
            activity = {"activations": sum(kept.values()), "negatives": gathered, "passing": passing}
    parts |= activity
    if not cluster.on_cpu:
        parts["reserve"] = ASSUMED_RESERVE * machine.memory_bytes
    return Fit(parts, machine.memory_bytes, held.host * cluster.devices, cluster.memory_gb * 1e9)


def require_fit(work: Work, machine: Machine) -> Fit:
    """``memory`` of the plan. Raises ConfigError, saying what would make it fit, where it does not."""
    fit = memory(work, machine)
    if fit.fits:
        return fit
    if fit.host > fit.host_available:
        raise ConfigError(
            f"the offloaded optimizer needs {fit.host / 1e9:.0f} GB of a node's memory, cluster.memory_gb is "
            f"{fit.host_available / 1e9:.0f}: use more nodes, or a run.deepspeed without offload_optimizer"
        )
    largest = max(fit.parts, key=lambda name: fit.parts[name])
    raise ConfigError(
        f"batch.micro_size is {work.micro_batch}: a rank needs {fit.needed / 1e9:.1f} GB of the "
        f"{fit.available / 1e9:.1f} GB of a {machine.cluster.device} ({largest}: {fit.parts[largest] / 1e9:.1f} GB); "
        + (", or ".join(_ways_to_fit(work, machine)) or "take devices with more memory, or a smaller model")
    )


def _ways_to_fit(work: Work, machine: Machine) -> Iterator[str]:
    """Changes of one setting that make the plan fit."""
    smaller = work.micro_batch - 1
    while smaller and not memory(dataclasses.replace(work, micro_batch=smaller), machine).fits:
        smaller -= 1 if smaller < 16 else 8
    if smaller:
        yield f"lower batch.micro_size to {smaller} or less"
    vision = dataclasses.replace(work.model.vision, checkpoint_every=1)
    text = dataclasses.replace(work.model.text, checkpoint_every=1)
    model = dataclasses.replace(work.model, vision=vision, text=text)
    if memory(dataclasses.replace(work, model=model), machine).fits:
        yield "set model.vision.checkpoint_every=1 model.text.checkpoint_every=1"
    precision = work.precision
    if precision.stage < 2 and memory(work, machine, stage=2).fits:
        yield "take run.deepspeed=ds_configs/zero2_bf16.json (ZeRO stage 2)"
    offloaded = dataclasses.replace(precision, stage=2, offload=True, mixed=True, activation_bytes=2)
    if not precision.offload and memory(dataclasses.replace(work, precision=offloaded), machine).fits:
        yield "take run.deepspeed=ds_configs/zero2_offload.json"
    if not precision.mixed and not machine.cluster.on_cpu:
        halved = dataclasses.replace(precision, mixed=True, activation_bytes=2)
        if memory(dataclasses.replace(work, precision=halved), machine).fits:
            yield "take run.deepspeed=ds_configs/zero2_bf16.json (16-bit weights)"


RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Scale:
    """A number of ranks: with a micro batch that stays, and with a global batch that stays (None: not divisible)."""

    weak: Prediction
    strong: Prediction | None
    memory: Fit  # of a rank with the micro batch that stays


def scaling(work: Work, cluster: ClusterConfig, speed: Speed, calibrated: bool) -> list[Scale]:
    """Predictions from one rank to 1024, or as many as fill nodes of the cluster's kind."""
    found = []
    for ranks in RANKS:
        if ranks > cluster.devices and ranks % cluster.devices:
            continue
        machine = Machine.of(cluster.with_ranks(ranks), calibrated)
        strong = None
        micro = min(work.micro_batch, work.global_batch // ranks)
        if micro and work.global_batch % (micro * ranks) == 0:
            strong = predict(work, machine, speed, micro, work.global_batch // (micro * ranks))
        found.append(Scale(predict(work, machine, speed), strong, memory(work, machine)))
    return found
