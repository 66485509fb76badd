"""The script that starts a planned run: SLURM's sbatch, or DeepSpeed over a file of hosts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from smaug_ds.config import ConfigError
from tools.planning.report import Plan

LAUNCHERS = ("slurm", "hosts")
MARGIN = 1.3  # on the predicted time: evaluation, checkpoints, a slower neighbour
START_UP = 900.0  # seconds that a start may take until its first step
LONGEST = 24 * 3600.0  # of a job; a longer run puts itself back into the queue, see jobs/pretrain.sbatch


def write_script(
    path: Path, launcher: str, plan: Plan, config: str | None, overrides: Sequence[str], folder: str
) -> None:
    """Writes a bash script that starts the planned run from the checkout that it is called in.

    config: the YAML file that the plan was made from. overrides: ``key=value`` of the run, without those of the plan.
    Raises ConfigError for a path that cannot be written, or SLURM with ranks on CPUs of one host.
    """
    cluster = plan.machine.cluster
    settings = [f"--config {shlex.quote(config)}"] if config else []
    words = "".join(f" \\\n    {word}" for word in [*settings, *map(shlex.quote, overrides)])
    needed = plan.seconds * MARGIN + START_UP
    lines = [
        "#!/usr/bin/env bash",
        f"# {plan.work.model.size}, {cluster.nodes} x {cluster.devices} {cluster.device}: "
        f"{plan.seconds / 3600:.1f} hours predicted ({plan.times[0][0].name}).",
        "# Call it in the checkout; it can be called again, and goes on from the last checkpoint.",
        "set -euo pipefail",
        f"export RUN={shlex.quote(folder)}",
    ]
    if launcher == "slurm":
        gpus = [] if cluster.on_cpu else [f"--gpus-per-node={cluster.devices}"]
        lines += [f"export RANKS_PER_NODE={cluster.devices}"] if cluster.on_cpu else []
        options = [f"--nodes={cluster.nodes}", *gpus, f"--time={slurm_time(needed)}"]
        lines.append(f'exec sbatch {" ".join(options)} "$@" jobs/pretrain.sbatch{words}')
    elif cluster.nodes == 1:
        lines += [f"export RANKS={cluster.devices}", f"exec bash jobs/launch_local.sh{words}"]
    else:
        lines += [
            f': "${{HOSTS:?names a file of lines HOST slots={cluster.devices}}}"',
            f"export HOSTS NUM_NODES={cluster.nodes}",
            f"exec bash jobs/launch_multinode.sh{words}",
        ]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"--write {path}: {error.strerror}") from error


def slurm_time(seconds: float) -> str:
    """``HH:MM:SS`` of a job that needs so long, or of the longest there is; what is left then takes further starts."""
    minutes = math.ceil(min(seconds, LONGEST) / 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"
