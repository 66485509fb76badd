"""What the findings of all ranks say together: what is wrong on which host, what is slow, and the table of it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from smaug_ds.engine.inspection import GROUPS, Facts

SKEW_SECONDS = 10.0  # that clocks may differ: a run stops before its job's end by them
SLOW_RANK = 0.5  # of the fastest rank's pace: below it a rank holds all others up
SLOW_LINK = 1 / 3  # of the fastest link's speed; less than for ranks, as a network may have narrower parts
LINK_GBIT = 1.0  # no link of a cluster is meant to be slower


def judge(facts: Sequence[Facts]) -> dict[str, dict[str, list[str]]]:
    """What is wrong, by host and group; each text begins with the host.

    Where hosts differ, most of them are right; if there are no most, the main rank's host is.
    """
    faults: dict[str, dict[str, list[str]]] = {fact.host: {} for fact in facts}

    def blame(fact: Facts, group: str, text: str) -> None:
        told = faults[fact.host].setdefault(group, [])
        if f"{fact.host}: {text}" not in told:  # of several ranks of one host
            told.append(f"{fact.host}: {text}")

    for fact in facts:
        for group, problems in fact.problems.items():
            for problem in problems:
                blame(fact, group, problem)
        skew = fact.clock - facts[0].clock
        if abs(skew) > SKEW_SECONDS:
            blame(fact, "clock", f"the clock is {skew:+.0f} s off that of {facts[0].host}: set it by NTP")
    for group in GROUPS:
        told = [fact for fact in facts if group in fact.marks]
        differing: dict[int, list[str]] = {fact.rank: [] for fact in told}
        for name in dict.fromkeys(name for fact in told for name in fact.marks[group]):
            values = Counter(fact.marks[group].get(name) for fact in told)
            right = values.most_common(1)[0][0]  # of equally many the first met, which is the main rank's
            reference = next(fact for fact in told if fact.marks[group].get(name) == right)
            for fact in told:
                value = fact.marks[group].get(name)
                # what could not be read is a problem already
                if value != right and not (value is None and fact.problems.get(group)):
                    text = f"{name} is {value or 'absent'}, on {reference.host} {right or 'absent'}"
                    differing[fact.rank].append(text)
        for fact in told:
            if texts := differing[fact.rank]:
                blame(fact, group, texts[0] + (f" ({len(texts) - 1} more differ)" if texts[1:] else ""))
    return faults


def slow(hosts: Mapping[int, str], paces: Mapping[int, float], links: Mapping[int, float]) -> list[str]:
    """Warnings about ranks that compute, and links that carry, much less than the fastest. Nothing is wrong with a run
    that they are in, but all others wait for them.

    Args:
        hosts: of all ranks.
        paces: FLOP/s of each rank.
        links: Gbit/s from the first rank of each host to that of the next host; 0 for what is no such rank.
    """
    warnings = []
    fastest = max(paces.values(), default=0.0)
    for rank, flops in sorted(paces.items()):
        if flops < SLOW_RANK * fastest:
            best = max(paces, key=lambda other: paces[other])
            warnings.append(
                f"{hosts[rank]}: rank {rank} computes {_rate(flops)}, rank {best} on {hosts[best]} {_rate(fastest)}: "
                "all wait for the slowest, see what else runs there, or whether its device is throttled"
            )
    first = [rank for rank, speed in sorted(links.items()) if speed]
    fastest = max(links.values(), default=0.0)
    for here, there in zip(first, [*first[1:], *first[:1]], strict=True):
        if links[here] < max(LINK_GBIT, SLOW_LINK * fastest):
            warnings.append(
                f"{hosts[here]}: the link to {hosts[there]} carries {links[here]:.2g} Gbit/s, the fastest "
                f"{fastest:.2g}: an all-reduce goes by the slowest link (NETWORK names another interface)"
            )
    return warnings


def table(
    facts: Sequence[Facts],
    faults: Mapping[str, Mapping[str, Sequence[str]]],
    paces: Mapping[int, float],
    links: Mapping[int, float],
) -> str:
    """One line per host: its ranks, what is well, FLOP/s of its slowest rank, and Gbit/s to the next host."""
    lines = [["host", "ranks", *GROUPS, "computes", "to next host"]]
    hosts = list(dict.fromkeys(fact.host for fact in facts))
    for host in hosts:
        own = [fact for fact in facts if fact.host == host]
        shown = {**own[0].shown, "clock": f"{own[0].clock - facts[0].clock:+.2f} s"}
        cells = ["FAILS" if faults[host].get(group) else shown.get(group, "ok") for group in GROUPS]
        pace = min((paces[fact.rank] for fact in own if fact.rank in paces), default=0.0)
        speed = links.get(own[0].rank, 0.0)
        measured = [_rate(pace) if pace else "", f"{speed:.3g} Gbit/s" if speed else ""]
        lines.append([host, brief([fact.rank for fact in own]), *cells, *measured])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def brief(numbers: Sequence[int]) -> str:
    """Sorted numbers with runs drawn together: 0-3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"
