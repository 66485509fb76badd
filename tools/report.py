"""Joins the summaries of a run's stages into one report, and prints it as a table.

    python tools/report.py RUN_STAGE1 RUN_STAGE2 ... [--pictures DIR] [--started EPOCH_SECONDS] --out report.json

Figures that describe the end of training (losses_last, lr_last, retrieval) come from the last stage, losses_first from
the first one, counts are sums over the stages.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

SUMMED = ("steps", "quarantined")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder of PNGs to name in the report")
    parser.add_argument("--started", type=float, help="when the whole job began; default: the sum of the stages counts")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        report = join([read_summary(run) for run in args.runs])
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    if args.started is not None:
        report["wall_seconds"] = round(time.time() - args.started, 1)
    report["pictures"] = sorted(str(path) for path in args.pictures.glob("*.png")) if args.pictures else []
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report, args.out)


def read_summary(run: Path) -> dict:
    """What the run left. Raises ValueError when it left nothing."""
    path = run / "summary.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: the run has not finished")
    return json.loads(path.read_text())


def join(stages: list[dict]) -> dict:
    """One report out of the summaries of consecutive stages."""
    first, last = stages[0], stages[-1]
    report = {**last, "losses_first": first["losses_first"], "stages": stages}
    for key in SUMMED:
        report[key] = sum(stage[key] for stage in stages)
    seconds = sum(stage["wall_seconds"] for stage in stages)
    report["wall_seconds"] = seconds
    report["samples_per_second"] = round(
        sum(stage["samples_per_second"] * stage["wall_seconds"] for stage in stages) / seconds, 2
    )
    return report


def print_report(report: dict, path: Path) -> None:
    print(f"\n{report['world_size']} ranks on {report['accelerator']}, ZeRO-{report['zero_stage']}, ", end="")
    print(f"decoder {report['decoder']}, {report['steps']} steps, {report['wall_seconds']:.0f} s")
    print(f"\n{'loss':8}" + "".join(f"{'stage ' + str(n + 1):>20}" for n in range(len(report["stages"]))))
    for name in report["losses_first"]:
        cells = [f"{stage['losses_first'][name]:.3f} -> {stage['losses_last'][name]:.3f}" for stage in report["stages"]]
        print(f"{name:8}" + "".join(f"{cell:>20}" for cell in cells))
    rates = "".join(f"{stage['samples_per_second']:20.1f}" for stage in report["stages"])
    print(f"{'clips/s':8}{rates}")
    if retrieval := report.get("retrieval"):
        print(f"\nzero-shot retrieval on {retrieval['n']} held-out clips ({retrieval['split']})")
        cosine = retrieval["dual_encoder"]
        print(f"  {'':12} {'reranked':>9} {'cosine':>9}")
        for name in ("t2v_r1", "t2v_r5", "t2v_r10", "v2t_r1"):
            print(f"  {name:12} {retrieval[name]:7.1f} % {cosine[name]:7.1f} %")
        print(f"  {'median_rank':12} {retrieval['median_rank']:9.1f} {cosine['median_rank']:9.1f}")
        print(f"  {'chance_r1':12} {retrieval['chance_r1']:7.1f} %")
    print(f"\nquarantined samples: {report['quarantined']}")
    for picture in report["pictures"]:
        print(f"picture: {picture}")
    print(f"report:  {path}")


if __name__ == "__main__":
    main()
