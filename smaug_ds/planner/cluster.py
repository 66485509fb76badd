"""What a run may use: devices, links, processors, storage. Figures of data sheets stand in for what was not measured.

All bandwidths are bytes in one direction; a GB is 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from smaug_ds.config import ConfigError

# Shares of a data sheet's figure that a run is assumed to reach where nothing was measured. Not measurements.
ASSUMED_EFFICIENCY = 0.35  # of the matrix peak, by the forward and backward pass
ASSUMED_LINK_SHARE = 0.7  # of a link, by large collectives
ASSUMED_MEMORY_SHARE = 0.7  # of the memory bandwidth, by AdamW
ASSUMED_LATENCY = 15e-6  # s, of a collective on a GPU, for every doubling of the ranks
ASSUMED_RESERVE = 0.08  # share of a GPU's memory that context, libraries and fragmentation take


@dataclass(frozen=True)
class Device:
    """A kind of device, as its vendor describes it."""

    source: str  # of all the figures below
    matrix_tflops: float  # dense, bf16
    memory_gb: float
    memory_gb_s: float
    link_gb_s: float  # to the other devices of the node
    nvdec: int  # engines


# Not from a data sheet: pictures of 640x360 that an engine decodes in a second with all that opening clips costs, taken
# as what 250 pictures of 1920x1080 are.
ASSUMED_NVDEC_PICTURES = 2250.0
DEVICES = {
    "h200": Device("NVIDIA H200 SXM data sheet", 989, 141, 4800, 450, 7),
    "h100": Device("NVIDIA H100 SXM data sheet", 989, 80, 3350, 450, 7),
    "a100": Device("NVIDIA A100 SXM 80 GB data sheet", 312, 80, 2039, 300, 5),
}


@dataclass(frozen=True)
class ClusterConfig:
    """The cluster of a plan. 0 takes what the data sheet of ``device`` says, or an assumption, and the plan says so."""

    device: str = "h200"  # h200, h100, a100, or cpu
    nodes: int = 1
    devices: int = 8  # of a node: GPUs, or ranks on CPUs
    cores: int = 96  # of a node
    memory_gb: float = 1000.0  # of a node
    network_gb_s: float = 400.0  # of a node, all its adapters; 8 x 400 Gbit/s
    link_gb_s: float = 0.0  # between the devices of a node, of each; on a CPU of all together
    latency_us: float = 0.0  # of a collective, for every doubling of the ranks
    peak_tflops: float = 0.0  # of a device's matrix products, measured; on a CPU of one core
    efficiency: float = 0.0  # share of the peak that forward and backward pass reach
    device_memory_gb: float = 0.0
    storage_gb_s: float = 5.0  # of a node, reading shards
    checkpoint_gb_s: float = 2.0  # of the whole cluster, writing checkpoints
    threads: int = 1  # that a rank on CPUs computes with
    contention: float = 1.0  # how much longer a rank on CPUs takes while the other cores are busy, too

    def __post_init__(self) -> None:
        if self.device not in (*DEVICES, "cpu"):
            raise ConfigError(f"cluster.device is {self.device}: it must be one of {', '.join(DEVICES)}, cpu")
        for name in ("nodes", "devices", "cores", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("memory_gb", "network_gb_s", "storage_gb_s", "checkpoint_gb_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"cluster.{name} is {getattr(self, name)}: it must be above 0")
        for name in ("link_gb_s", "latency_us", "peak_tflops", "device_memory_gb"):
            if getattr(self, name) < 0:
                raise ConfigError(f"cluster.{name} is {getattr(self, name)}: it must be at least 0 (0: what is known)")
        if not 0 <= self.efficiency <= 1:
            raise ConfigError(f"cluster.efficiency is {self.efficiency}: it must lie in [0, 1] (0: what is known)")
        if not self.contention >= 1:
            raise ConfigError(f"cluster.contention is {self.contention}: it must be at least 1")

    @property
    def ranks(self) -> int:
        """One for each device."""
        return self.nodes * self.devices

    @property
    def on_cpu(self) -> bool:
        """Whether the model computes on the cores that also decode."""
        return self.device == "cpu"

    def with_ranks(self, ranks: int) -> ClusterConfig:
        """The same cluster with so many ranks: part of one node, or whole nodes.

        Raises ConfigError where the last node would be used in part.
        """
        if ranks <= self.devices:
            return replace(self, nodes=1, devices=ranks)
        if ranks % self.devices:
            raise ConfigError(
                f"{ranks} ranks do not fill nodes of cluster.devices = {self.devices}: take a multiple of it"
            )
        return replace(self, nodes=ranks // self.devices)


@dataclass(frozen=True)
class Machine:
    """A cluster with every gap filled, and what filled it."""

    cluster: ClusterConfig
    peak_flops: float  # of a device; on a CPU of one core
    efficiency: float
    memory_bytes: float  # of a device; on a CPU a rank's share of the node's
    memory_bytes_s: float  # that AdamW reads and writes at
    link_bytes_s: float
    network_bytes_s: float
    latency: float  # s
    nvdec: int  # engines of a device
    assumptions: tuple[str, ...]

    @classmethod
    def of(cls, cluster: ClusterConfig, calibrated: bool = False) -> Machine:
        """``cluster`` with the gaps filled from the data sheet and by assumptions.

        calibrated: a measured profile will say how fast steps are; neither peak nor efficiency is needed.

        Raises ConfigError for a CPU whose speed nothing tells.
        """
        told: list[str] = []

        def known(value: float, otherwise: float, text: str) -> float:
            if value:
                return value
            told.append(text)
            return otherwise

        if cluster.on_cpu:
            if not (cluster.peak_tflops and cluster.efficiency) and not calibrated:
                raise ConfigError(
                    "cluster.device is cpu, whose speed no data sheet tells: give --profile FILE or --run FOLDER, or "
                    "cluster.peak_tflops (of one core) and cluster.efficiency"
                )
            link = known(cluster.link_gb_s, 1.0, "ranks of a host exchange 1 GB/s in all (assumed; cluster.link_gb_s)")
            text = "ranks of a host wait 1.5 ms for each other in a collective (assumed; cluster.latency_us)"
            latency = known(cluster.latency_us, 1500.0, text)
            return cls(
                cluster=cluster,
                peak_flops=cluster.peak_tflops * 1e12,
                efficiency=cluster.efficiency,
                memory_bytes=cluster.memory_gb * 1e9 / cluster.devices,
                memory_bytes_s=10e9,
                link_bytes_s=link * 1e9,
                network_bytes_s=cluster.network_gb_s * 1e9,
                latency=latency * 1e-6,
                nvdec=0,
                assumptions=tuple(told),
            )
        sheet = DEVICES[cluster.device]
        source = f"({sheet.source})"
        peak = (
            cluster.peak_tflops
            if calibrated and cluster.peak_tflops
            else known(cluster.peak_tflops, sheet.matrix_tflops, f"matrix peak {sheet.matrix_tflops} TFLOP/s {source}")
        )
        efficiency = cluster.efficiency
        if not calibrated:
            text = f"forward and backward pass reach {ASSUMED_EFFICIENCY:.0%} of it (assumed; --profile)"
            efficiency = known(efficiency, ASSUMED_EFFICIENCY, text)
        link = known(cluster.link_gb_s, sheet.link_gb_s, f"{sheet.link_gb_s} GB/s between devices of a node {source}")
        memory = known(cluster.device_memory_gb, sheet.memory_gb, f"{sheet.memory_gb} GB a device {source}")
        told.append(
            f"large collectives reach {ASSUMED_LINK_SHARE:.0%} of a link and AdamW {ASSUMED_MEMORY_SHARE:.0%} of "
            f"{sheet.memory_gb_s} GB/s; {ASSUMED_RESERVE:.0%} of the memory is kept free (assumed)"
        )
        told.append(f"{sheet.nvdec} NVDEC engines a device {source}")
        return cls(
            cluster=cluster,
            peak_flops=peak * 1e12,
            efficiency=efficiency,
            memory_bytes=memory * 1e9,
            memory_bytes_s=sheet.memory_gb_s * 1e9 * ASSUMED_MEMORY_SHARE,
            link_bytes_s=link * 1e9 * ASSUMED_LINK_SHARE,
            network_bytes_s=cluster.network_gb_s * 1e9 * ASSUMED_LINK_SHARE,
            latency=cluster.latency_us * 1e-6 or ASSUMED_LATENCY,
            nvdec=sheet.nvdec,
            assumptions=tuple(told),
        )
