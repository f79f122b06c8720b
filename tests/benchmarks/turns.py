"""How a measured training loop takes turns with the others: steps are counted, and between blocks it waits.

Standard library only, so that every contestant can import it from its own environment.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_memory_mib() -> float:
    """The most memory that this process ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


class Turns:
    """One rank's side of the conversation with ``bench.py``.

    For each block the driver writes the number of steps to the pipe ``BENCH_IN`` of every rank; rank
    0 answers on ``BENCH_OUT`` with a line of JSON.  The first step is a block of its own: whatever
    happens once happens there.  When the orders end, rank 0 tells ``final_loss()``.
    """

    def __init__(
        self,
        final_loss: Callable[[], float],
        settle: Callable[[], None] = lambda: None,  # waits for the device
        memory: Callable[[], float] = peak_memory_mib,
    ):
        self.final_loss, self.settle, self.memory = final_loss, settle, memory
        self.orders = open(int(os.environ["BENCH_IN"]), encoding="utf-8")  # noqa: SIM115  (until the process ends)
        self.answers = open(int(os.environ["BENCH_OUT"]), "w", encoding="utf-8")  # noqa: SIM115
        self.left = 1
        self.begun, self.cpu_begun = time.perf_counter(), time.process_time()

    def tell(self, **figures: Any) -> None:
        """Answer the driver; rank 0 only."""
        if os.environ["RANK"] == "0":
            print(json.dumps(figures), file=self.answers, flush=True)

    def end_step(self) -> None:
        """Count a step; after a block's last one report it and wait for the next turn."""
        self.left -= 1
        if self.left:
            return
        self.settle()
        seconds, cpu_seconds = time.perf_counter() - self.begun, time.process_time() - self.cpu_begun
        self.tell(seconds=seconds, cpu_seconds=cpu_seconds, memory_mib=self.memory())
        order = self.orders.readline()
        if not order:  # the driver has seen enough, or is gone
            if os.environ["RANK"] == "0":
                self.tell(loss=self.final_loss())
            os._exit(0)
        self.left = int(order)
        self.begun, self.cpu_begun = time.perf_counter(), time.process_time()
