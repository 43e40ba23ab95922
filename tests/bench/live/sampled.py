"""`python -m tests.bench.live.sampled FILE COMMAND …`: the agent, and where the time of its threads goes.

Every few milliseconds each thread is looked at, and counted with the processor time that it has had since; FILE gets
lines of "thread;outermost;…;innermost microseconds", the longest first, when the agent ends."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from time import sleep
from types import FrameType

from agent.cli.main import main

EVERY = 0.002


def _sample(found: Counter[str]) -> None:
    own = threading.get_ident()
    before: dict[int, int] = {}
    while True:
        sleep(EVERY)
        frames = sys._current_frames()
        for thread in threading.enumerate():
            ident, number = thread.ident, thread.native_id
            if ident is None or ident == own or number is None or ident not in frames:
                continue
            with suppress(OSError):
                spent = int(Path(f"/proc/self/task/{number}/schedstat").read_text().split()[0])
                if number not in before:
                    found[f"{thread.name};before it was looked at"] += spent
                elif spent > before[number]:
                    found[f"{thread.name};{_stack(frames[ident])}"] += spent - before[number]
                before[number] = spent


def _stack(frame: FrameType | None) -> str:
    parts: list[str] = []
    while frame is not None:
        parts.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return ";".join(reversed(parts))


if __name__ == "__main__":
    target = Path(sys.argv.pop(1))
    counted: Counter[str] = Counter()
    threading.Thread(target=_sample, args=(counted,), daemon=True).start()
    try:
        main()
    finally:
        target.write_text("".join(f"{stack} {spent // 1000}\n" for stack, spent in counted.most_common()))
