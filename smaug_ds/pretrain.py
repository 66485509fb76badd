"""Pre-trains SMAUG: either stage, any number of ranks.

    deepspeed --module smaug_ds.pretrain --config FILE key=value ...

A run in ``run.folder`` that was broken off goes on from its last checkpoint. Exit codes: 0 finished, 85 told to stop
and saved (start it again), 86 it hung, 87 too many samples or a loss fail, 2 a setting is wrong or there is no room, 1
anything else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from smaug_ds import distributed
from smaug_ds.config import add_arguments, parse
from smaug_ds.engine.run import REPORTED, exit_code, run
from smaug_ds.engine.tasks import RetrievalTask
from smaug_ds.engine.train import PretrainConfig
from smaug_ds.engine.watchdog import Watchdog


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. What a user can mend is one line on standard error."""
    parser = argparse.ArgumentParser(prog="smaug_ds.pretrain", description="Pre-trains SMAUG.")
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    try:
        config = parse(PretrainConfig, options.config, options.overrides)
        with Watchdog(Path(config.run.folder) / "logs", config.run.hang_seconds, quiet=REPORTED) as watchdog:
            return pretrain(config, watchdog)
    except REPORTED as error:
        distributed.print_error(error)  # all ranks raise it, see distributed.agreeing
        return exit_code(error)
    finally:
        distributed.shutdown()


def pretrain(config: PretrainConfig, watchdog: Watchdog) -> int:
    """Does or resumes the run that ``config`` describes; returns 0, or 85 when told to stop before the end."""
    return run(config, watchdog, RetrievalTask)


if __name__ == "__main__":
    sys.exit(main())
