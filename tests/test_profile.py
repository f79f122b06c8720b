"""--profile: the operators that take the time of a step, and a trace."""

from __future__ import annotations

import gzip
import json
import logging

from samples import tiny_run

import train_h100_dual as t


def test_a_profiled_run_leaves_a_trace_and_tells_which_operators_took_the_time(tmp_path, caplog):
    run = tiny_run(tmp_path, "--profile", "--max-steps", "8", "--eval-steps", "1000", "--no-save-initial")
    t.logger.propagate = True
    with caplog.at_level(logging.INFO, "h100_dual"):
        t.train(run, t.TrainState())
        run.saver.busy(None)
    with gzip.open(run.cfg.output_dir / "profile_trace.json.gz") as stream:
        events = [item for item in json.load(stream)["traceEvents"] if item.get("ph") == "X"]
    assert len([item for item in events if item["name"].startswith("ProfilerStep#")]) == 3
    (table,) = [text for text in caplog.messages if text.startswith("🔬 프로파일: 3스텝")]
    for name in ("aten::mm", "scaled_dot_product", "Optimizer.step", "Self CPU"):
        assert name in table
    assert "profile_trace.json.gz" in caplog.text
