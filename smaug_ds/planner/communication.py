"""Bytes that ranks exchange in a step, and how long that takes.

A ring moves 2 (W - 1) / W of an all-reduced tensor through each rank, and (W - 1) / W of one that is gathered or
scattered (Thakur et al. 2005, section 4); each collective waits for the latency of log2 W hops besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smaug_ds.losses import LossConfig
from smaug_ds.model.smaug import ModelConfig
from smaug_ds.planner.cluster import Machine
from smaug_ds.planner.flops import Step
from smaug_ds.planner.memory import FLOAT, NEGATIVES, Negatives, Precision, gathered_elements

# All-reduces of a few bytes. In a micro step: that the data came, and over how many pairs each of the four losses is a
# mean. In an optimizer step: that all is finite, the norm of the gradient (twice), that nobody was told to stop.
AGREED_IN_MICRO_STEP, AGREED_IN_STEP = 5, 4
PARAMETER_GROUPS = 2  # with weight decay and without, see engine/optim.py: the weights of each are gathered by itself


@dataclass(frozen=True)
class Exchange:
    """One purpose for which ranks exchange something in an optimizer step."""

    name: str
    sent: float  # bytes that leave each rank
    calls: float  # collectives
    pairwise: bool = False  # each pair of ranks has its own bytes (all-to-all); else a ring


def exchanges(
    model: ModelConfig,
    loss: LossConfig,
    step: Step,
    precision: Precision,
    parameters: int,
    accumulation: int,
    negatives: Negatives = NEGATIVES,
) -> list[Exchange]:
    """What leaves a rank in an optimizer step of ``accumulation`` micro steps, by purpose. Empty for one rank."""
    world = step.world_size
    if world == 1:
        return []
    ring = (world - 1) / world
    # With the gradients divided, each micro step reduces them; else only the last one does.
    reductions = accumulation if precision.stage >= 2 else 1
    turns = 2 if precision.whole_reduction or precision.stage < 2 else 1
    buckets = max(1, math.ceil(parameters / precision.bucket))
    found = [
        Exchange(
            "gradients", turns * ring * parameters * precision.sent_bytes * reductions, float(buckets * reductions)
        )
    ]
    if precision.stage >= 1:
        gathered = 2 * accumulation if precision.stage == 3 else 1
        calls = float(gathered if precision.stage == 3 else PARAMETER_GROUPS)
        found.append(Exchange("weights", ring * parameters * precision.weight_bytes * gathered, calls))
    found.append(Exchange("agreement", 8.0, float(AGREED_IN_MICRO_STEP * accumulation + AGREED_IN_STEP)))
    embedding = step.batch * model.projection * FLOAT
    if loss.vtc or loss.vtm:
        found.append(_embeddings(embedding, world, loss, accumulation))
    if loss.vtm:
        elements = gathered_elements(model, loss, step, negatives)
        size = precision.activation_bytes
        if negatives == "all":
            # gathered, and the gradient of everything all-reduced on the way back
            everything = elements * world / (world - 1) * size
            sent = (elements * size + 2 * ring * everything) * accumulation
            found.append(Exchange("negatives", sent, 5.0 * accumulation))
        else:
            found.append(Exchange("negatives", 2 * elements * size * accumulation, 5.0 * accumulation, True))
    return found


def _embeddings(own: float, world: int, loss: LossConfig, accumulation: int) -> Exchange:
    """Embeddings of both sides: gathered for the loss, all-reduced as gradients, gathered again for the draw."""
    everything = own * world
    sent, calls = 0.0, 0
    if loss.vtc and loss.contrastive == "sigmoid":
        sent, calls = 2 * (world - 1) * own, 2 * (world - 1)
    elif loss.vtc:
        sent, calls = 2 * (world - 1) * own + 2 * 2 * (world - 1) / world * everything, 5
    if loss.vtm:
        sent, calls = sent + 2 * (world - 1) * own, calls + 4
    return Exchange("embeddings", sent * accumulation, float(calls * accumulation))


def seconds(exchange: Exchange, machine: Machine) -> float:
    """Time that an exchange takes, ranks doing nothing else meanwhile (``overlap_comm`` is off in ``ds_configs``)."""
    cluster = machine.cluster
    waiting = exchange.calls * machine.latency * max(1.0, math.log2(cluster.ranks))
    if cluster.on_cpu:
        # the ranks of a host share its memory and its cores; across hosts its network
        moved = exchange.sent * cluster.devices
        rate = machine.link_bytes_s if cluster.nodes == 1 else min(machine.link_bytes_s, machine.network_bytes_s)
        return moved / rate + waiting
    if cluster.nodes == 1:
        return exchange.sent / machine.link_bytes_s + waiting
    if exchange.pairwise:  # all devices of a node share its adapters, and most partners are on other nodes
        away = exchange.sent * (1 - 1 / cluster.nodes) * cluster.devices
        return away / machine.network_bytes_s + waiting
    # rings cross each border between nodes once, so all adapters of a node serve one rank's bytes
    return exchange.sent / min(machine.link_bytes_s, machine.network_bytes_s) + waiting


def total_seconds(found: Sequence[Exchange], machine: Machine) -> float:
    """Time of all ``found`` exchanges, one after the other."""
    return sum(seconds(exchange, machine) for exchange in found)
