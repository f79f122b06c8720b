"""What compiling costs as a model grows deeper: its first step without what a later one takes, on the CPU.

python tests/benchmarks/compile_time.py [TURNS]     each in a fresh process with an empty cache, taking turns
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import median_and_range, model_options, provenance, table, take_turns

LAYERS = (4, 8, 24)  # of tiny's width


def measure(layers: str) -> None:
    """Print elapsed and processor seconds of compiling, and the number of graphs."""
    import torch
    from samples import Words, config

    import train_h100_dual as t

    def clocks() -> list[float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return [time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)]

    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_hidden_layers": int(layers)}
    with tempfile.TemporaryDirectory() as name:
        cfg = config(Path(name), "--compile", *model_options(Path(name), **shape))
        loss_module = t.build_loss(cfg, Words(2048))
    rows, moments = torch.randint(0, 2000, (4, 65)), [clocks()]
    for _ in range(4):
        loss_module(rows).backward()
        moments.append(clocks())
    (begun, first), (before, last) = moments[:2], moments[-2:]
    figures = [first[kind] - begun[kind] - (last[kind] - before[kind]) for kind in (0, 1)]
    print(json.dumps([*figures, torch._dynamo.utils.counters["stats"]["unique_graphs"]]))


def ask(layers: int) -> list[float]:
    """Measure in a process of its own, in which g++ is called by no worker beside it."""
    with tempfile.TemporaryDirectory() as cache:
        more = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, __file__, "--layers", str(layers)]
        answer = subprocess.run(command, env={**os.environ, **more}, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(answer)


def main() -> None:
    """Print the table."""
    turns = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    results = take_turns({str(layers): functools.partial(ask, layers) for layers in LAYERS}, turns)
    rows = [[name, *map(median_and_range, zip(*found, strict=True))] for name, found in results.items()]
    print(table(["layers", "elapsed, s", "processor time, s", "graphs"], rows))
    print(f"\n{provenance('torch', 'transformers')}")


if __name__ == "__main__":
    measure(sys.argv[2]) if sys.argv[1:2] == ["--layers"] else main()
