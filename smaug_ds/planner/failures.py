"""Failures on paper: how often to save, what share of the time is useful, and which steps a broken run really did.

Nodes fail independently after exponentially distributed times. A failure loses what was done since the last checkpoint,
and a save that it breaks off; then the run starts again, which may fail as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smaug_ds.data.order import Order, slots
from smaug_ds.data.sample import Medium


@dataclass(frozen=True)
class Trouble:
    """What goes wrong, and what it costs. Seconds."""

    node_mtbf: float  # mean time between failures of one node; infinite: none fails
    restart: float  # from a failure to the first step after it: noticing, start-up, loading
    save: float  # that a checkpoint keeps training waiting
    repair: float = 0.0  # until a failed node, or another in its place, is back

    def __post_init__(self) -> None:
        if not self.node_mtbf > 0:
            raise ValueError(f"the mean time between failures is {self.node_mtbf} s: it must be above 0")
        for name in ("restart", "save", "repair"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)} s: it must be at least 0")


def young(save: float, mtbf: float) -> float:
    """Seconds of work between checkpoints by Young (1974): sqrt(2 save mtbf). ``mtbf`` of the whole cluster."""
    return math.sqrt(2 * save * mtbf)


def daly(save: float, mtbf: float) -> float:
    """The same by Daly (2006), equation 37: two more terms of the series, and ``mtbf`` where saving takes too long."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return young(save, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def expected_seconds(steps: int, step_seconds: float, every: int, trouble: Trouble, nodes: int) -> float:
    """Mean time of a run of ``steps`` that saves after every ``every`` of them and at its end.

    Exact for exponential failures (Daly 2006, equation 13): a piece of w seconds that must not be broken takes
    M exp(R / M) (exp(w / M) - 1), with M the cluster's mean time between failures and R the restart; to which comes,
    exp(w / M) - 1 times, the wait for the repair.
    """
    pieces, rest = divmod(steps, every)
    lengths = [(pieces, every * step_seconds + trouble.save), (bool(rest), rest * step_seconds + trouble.save)]
    mtbf = trouble.node_mtbf / nodes
    if math.isinf(mtbf):
        return sum(count * length for count, length in lengths)
    again = mtbf * math.exp(trouble.restart / mtbf) + trouble.repair
    return sum(count * again * math.expm1(length / mtbf) for count, length in lengths)


def best_interval(steps: int, step_seconds: float, trouble: Trouble, nodes: int) -> int:
    """Steps between checkpoints for which ``expected_seconds`` is least, among whole numbers 5 % apart."""
    candidates = {min(steps, math.ceil(1.05**power)) for power in range(math.ceil(math.log(steps, 1.05)) + 1)}

    def cost(every: int) -> float:
        try:
            return expected_seconds(steps, step_seconds, every, trouble, nodes)
        except OverflowError:  # such a piece is never done
            return math.inf

    return min(sorted(candidates), key=cost)


@dataclass(frozen=True)
class Attempt:
    """One start of a run: it did steps ``first`` to ``reached`` - 1, of which those before ``saved`` are kept."""

    first: int
    reached: int
    saved: int
    nodes: int


@dataclass(frozen=True)
class Outcome:
    """A simulated run."""

    seconds: float  # from its first start to its end
    failures: int
    attempts: tuple[Attempt, ...]


def simulate(
    steps: int,
    every: int,
    step_seconds: Callable[[int], float],
    trouble: Trouble,
    nodes: int,
    generator: np.random.Generator,
    elastic: Sequence[int] = (),
) -> Outcome:
    """A run of ``steps`` on ``nodes``, saved after every ``every`` steps, until it is done.

    Args:
        step_seconds: of a step on so many nodes.
        elastic: smaller numbers of nodes that the run can go on with while one is repaired; the run then takes the
            largest that is left, and all again at the first checkpoint after the repair. Empty: it waits for the node.
    """
    now, step, failures, working = 0.0, 0, 0, nodes
    repairs: list[float] = []  # when nodes come back
    attempts: list[Attempt] = []
    while step < steps:
        took, attempt, failed = _attempt(
            step,
            steps,
            every,
            step_seconds(working),
            trouble,
            working,
            generator,
            (max(repairs) - now if working < nodes else math.inf),
        )
        attempts.append(attempt)
        now, step = now + took, attempt.saved
        repairs = [back for back in repairs if back > now]
        failures += failed
        if step < steps:
            now = now + _restart(trouble, working, generator)
            if failed and trouble.repair:
                repairs.append(now + trouble.repair)
                possible = [count for count in elastic if count <= nodes - len(repairs)]
                if not possible:
                    now, repairs = max(repairs), []
            repairs = [back for back in repairs if back > now]
            left = nodes - len(repairs)
            working = nodes if left == nodes else max(count for count in elastic if count <= left)
    return Outcome(now, failures, tuple(attempts))


def _attempt(
    first: int,
    steps: int,
    every: int,
    seconds: float,
    trouble: Trouble,
    nodes: int,
    generator: np.random.Generator,
    until: float,
) -> tuple[float, Attempt, bool]:
    """Runs from step ``first`` to the end, to a failure, or to the first checkpoint after ``until`` seconds."""
    piece = every * seconds + trouble.save
    pieces, rest = divmod(steps - first, every)
    end = pieces * piece + (rest * seconds + trouble.save if rest else 0.0)
    enough = math.ceil(max(until, 1e-9) / piece) * piece if until < end else end
    failure = generator.exponential(trouble.node_mtbf / nodes) if math.isfinite(trouble.node_mtbf) else math.inf
    if failure >= min(enough, end):
        reached = steps if end <= enough else first + round(enough / piece) * every
        return min(enough, end), Attempt(first, reached, reached, nodes), False
    saved = first + int(failure // piece) * every
    reached = min(steps, saved + every, saved + int((failure % piece) // seconds))
    return failure, Attempt(first, reached, saved, nodes), True


def _restart(trouble: Trouble, nodes: int, generator: np.random.Generator) -> float:
    """Seconds until a start gets through; one that fails on the way begins again."""
    if math.isinf(trouble.node_mtbf):
        return trouble.restart
    total = 0.0
    while (failure := generator.exponential(trouble.node_mtbf / nodes)) < trouble.restart:
        total += failure
    return total + trouble.restart


def committed(attempts: Sequence[Attempt], steps: int) -> list[tuple[range, int]]:
    """Steps that are in the final weights, and the nodes that did them.

    Raises ValueError where a step is missing or comes twice.
    """
    found: list[tuple[range, int]] = []
    expected = 0
    for attempt in attempts:
        if attempt.first != expected:
            kind = "lost" if attempt.first > expected else "done twice"
            raise ValueError(f"steps {min(expected, attempt.first)} to {max(expected, attempt.first) - 1} are {kind}")
        found.append((range(attempt.first, attempt.saved), attempt.nodes))
        expected = attempt.saved
    if expected != steps:
        raise ValueError(f"steps {expected} to {steps - 1} are lost")
    return found


def drawn(
    order: Order, kept: Sequence[tuple[range, int]], ranks_of_node: int, micro_batch: int
) -> Iterator[tuple[int, list[tuple[Medium, int, int, int]]]]:
    """Each kept step with its samples, (medium, epoch of the set, shard, index), rank by rank as they would draw them.

    A rank takes ``micro_batch`` samples at a time, or fewer where that many do not divide its share of the batch.
    """
    for steps, nodes in kept:
        world = nodes * ranks_of_node
        own = order.global_batch // world
        micro = max(size for size in range(1, min(own, micro_batch) + 1) if own % size == 0)
        for step in steps:
            medium, positions = order.medium(step), order.positions(step)
            taken: dict[int, tuple[Medium, int, int, int]] = {}
            for rank in range(world):
                for turn in range(own // micro):
                    for slot in slots(turn, rank, world, micro):
                        if slot in taken:
                            raise ValueError(f"step {step}: slot {slot} is drawn twice on {world} ranks")
                        taken[slot] = (medium, *order.locate(medium, positions[slot]))
            if len(taken) != order.global_batch:
                raise ValueError(f"step {step}: {order.global_batch - len(taken)} slots are lost on {world} ranks")
            yield step, [taken[slot] for slot in range(order.global_batch)]


def check_samples(
    order: Order, kept: Sequence[tuple[range, int]], ranks_of_node: int, micro_batch: int, steps: int
) -> Mapping[Medium, int]:
    """Draws by medium of a broken run, after comparing them with those of one that nothing broke.

    Raises ValueError at the first sample that was lost, came twice, or stands elsewhere.
    """
    counts: dict[Medium, int] = {"image": 0, "video": 0}
    seen: set[tuple[Medium, int]] = set()
    number = 0
    for step, samples in drawn(order, kept, ranks_of_node, micro_batch):
        if step != number:
            raise ValueError(f"step {step} was done in the place of step {number}")
        medium = order.medium(step)
        for slot, position in enumerate(order.positions(step)):
            if samples[slot] != (medium, *order.locate(medium, position)):
                raise ValueError(f"step {step}, slot {slot}: another sample than in an uninterrupted run")
            if (medium, position) in seen:
                raise ValueError(f"step {step}: position {position} of the {medium}s was drawn before")
            seen.add((medium, position))
        counts[medium] += len(samples)
        number += 1
    if number != steps:
        raise ValueError(f"{number} steps of {steps} were drawn")
    return counts
