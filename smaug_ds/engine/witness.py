"""The process beside a rank that outlives it by a moment, to say on which host which rank died after which step.

    python witness.py FOLDER WHO

Standard input is a pipe from the rank: the number of each finished step, a line each, and ``end`` when it leaves in
order. A pipe that closes without ``end`` means that the rank was killed or crashed; nothing else could tell.
A program of its own, without the package and its large imports, so that it costs a rank 10 MB and no time.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """Reads until the rank is gone."""
    folder, who = Path(sys.argv[1]), sys.argv[2]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # meant for the rank; they may go to all processes
        signal.signal(number, signal.SIG_IGN)
    last = ""
    while line := sys.stdin.readline():
        last = line.strip() or last
    if last == "end":
        return
    when = f"after step {last}" if last else "while it started"
    message = (
        f"error: {time.strftime('%F %T')} {who} died {when} without a word: killed (out of memory, or by the launcher "
        "since another rank had failed), or crashed"
    )
    with contextlib.suppress(OSError):  # whoever read it may be gone, too
        print(message, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "deaths.txt").open("a", encoding="utf-8") as file:
            file.write(message + "\n")


if __name__ == "__main__":
    main()
