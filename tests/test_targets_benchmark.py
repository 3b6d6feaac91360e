"""The benchmarks of targets and of older runtimes, each on as little as it takes."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks import runtimes, targets


def test_a_model_through_two_targets(tmp_path, capsys):
    found = tmp_path / "found.json"
    status = targets.main(["--quick", "--only", "digits_cnn", "--target", "portable", "tensorrt", "--threads", "1",
                           "--json", str(found)])
    assert status == 0
    rows = {row["target"]: row for row in json.loads(found.read_text())["rows"]}
    assert rows["portable"]["expected"]["kernel"] >= 0.98 * rows["portable"]["expected"]["nodes"] > 10
    assert rows["portable"]["missed"] == []
    assert "score" not in rows["tensorrt"]
    assert rows["tensorrt"]["away"] == []
    assert "| digits_cnn |" in capsys.readouterr().out


def test_every_probe_runs_in_this_onnxruntime():
    done = subprocess.run([sys.executable, "-m", "benchmarks.runtimes", sys.executable, "--json"], capture_output=True,
                          text=True, check=True)
    table = json.loads(done.stdout)
    assert len(table) == len(runtimes.probes()) > 60
    refused = {name for name, of in table.items() if set(of.values()) != {"runs"}}
    assert refused <= {name for name in table if name.startswith(("opset", "IR version", "SpaceToDepth"))}
