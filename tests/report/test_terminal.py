"""Text for the terminal: figures in words, nodes in groups, nothing that steers the terminal."""

import io
import math

import pytest

from onnxq.progress import Silent
from onnxq.report import terminal, wording
from onnxq.report.report import Accuracy, Latency, LayerRow, NodeRow, OutputAccuracy, PrunedRow, Report, Size


def node(name="n", op="MatMul", scheme="w8a8", lowering="QLinearMatMul", ran_as=None, reason=""):
    return NodeRow(name, op, scheme, lowering, lowering if ran_as is None else ran_as, "CPUExecutionProvider", reason)


def in_float(op, reason, count=1):
    return [node(op=op, scheme="float", lowering="float", ran_as=op, reason=reason) for _ in range(count)]


def report(**parts):
    return Report("in.onnx", "out.onnx", "w8a8", **parts)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(("seconds", "words"), [
    (0, "less than a minute"), (60, "1 minute"), (7199, "1 hour"), (86400, "1 day"), (40 * 86400 + 5, "40 days")])
def test_ages(seconds, words):
    assert wording.age(seconds) == words


@pytest.mark.parametrize(("environment", "words"), [
    ({"processor": "P", "cpu_flags": ["avx2", "fma"], "onnxruntime": "1.31.1", "threads": 2},
     "P (avx2, fma), onnxruntime 1.31.1, 2 threads"),
    ({"threads": 0, "config": {}, "emitter": 3, "processor": "P", "cpu_flags": []}, "P, default threads, emitter 3"),
    ({}, "")])
def test_environments(environment, words):
    assert wording.measured_in({"environment": environment, "damaged_lines": 0}) == words


def test_kernels_are_described_without_their_graphs():
    assert wording.described({"op": "MatMul", "shapes": [[8, 64]], "graph": "x" * 200}) == (
        "op MatMul, shapes [[8, 64]]")


def test_the_fastest_candidate_comes_first():
    times = {"slow": {"ms": 2.0, "low": 1.9, "high": 2.1, "runs": 6}, "fast": {"ms": 0.5, "low": 0.5, "high": 0.6,
                                                                             "runs": 6}}
    assert wording.candidates(times) == "fast 0.500 ms (0.500 ms to 0.600 ms), slow 2.00 ms (1.90 ms to 2.10 ms)"


@pytest.mark.parametrize(("count", "words"), [
    (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (519_300, "519.3 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
    (2_500_000_000, "2.50 GB")])
def test_sizes(count, words):
    assert wording.size(count) == words


@pytest.mark.parametrize(("ms", "words"), [(0.0421, "0.042 ms"), (1.234, "1.23 ms"), (12.34, "12.3 ms"),
                                           (1234.5, "1234 ms")])
def test_milliseconds(ms, words):
    assert wording.milliseconds(ms) == words


@pytest.mark.parametrize(("sizes", "words"), [((300, 100), "3.00x smaller"), ((100, 150), "1.50x larger"),
                                              ((100, 100), "1.00x smaller"), ((100, 0), "100.00x smaller")])
def test_size_changes(sizes, words):
    assert wording.size_change(Size(*sizes)) == words


@pytest.mark.parametrize(("metric", "drop", "words"), [
    ("top1", 0.002, "0.20 points worse"), ("top5", -0.01, "1.00 points better"), ("perplexity", 0.125, "0.125 worse"),
    ("cosine", 0.0, "the same"), ("f1", math.inf, "no number to compare"), ("f1", math.nan, "no number to compare"),
    ("sqnr", None, "")])
def test_drops(metric, drop, words):
    assert wording.drop(Accuracy(metric, 0.5, 0.5, drop, {}, "", 1)) == words


def test_scores():
    assert wording.score("top1", 0.998) == "99.80 %"
    assert wording.score("perplexity", 12.3456789) == "12.346"
    assert wording.score("sqnr", None) == "-"


def test_clean_leaves_one_printable_line():
    assert wording.clean("a\x1b[31mb\nc\x07") == "a\\x1b[31mb\\nc\\x07"
    assert wording.clean("Schicht-\u00fc/\u5c42") == "Schicht-\u00fc/\u5c42"
    assert wording.clean("\udcff") == "\\udcff"


# ---------------------------------------------------------------- groups


def test_groups_of_quantized_nodes_go_by_operator_and_kernel():
    nodes = [node(f"m{k}", ran_as="com.microsoft.MatMulIntegerToFloat", lowering="MatMulIntegerToFloat",
                  reason=f"reason {k}") for k in range(36)]
    found = wording.groups([*nodes, node("c", "Conv", lowering="QLinearConv")])
    assert [group.line for group in found] == ["36 MatMul -> MatMulIntegerToFloat", "1 Conv -> QLinearConv"]
    assert [row.name for row in found[0].nodes] == [f"m{k}" for k in range(36)]


def test_an_absorbed_node_comes_after_the_one_whose_kernel_it_is():
    conv, add = node("c", "Conv"), node("a", "Add")
    conv.ms = 0.5
    assert [group.nodes[0].op for group in wording.groups([add, conv])] == ["Conv", "Add"]


def test_groups_of_float_nodes_go_by_reason():
    found = wording.groups(in_float("Softmax", "Softmax stays float", 12) + in_float("Softmax", "other", 3))
    assert [group.line for group in found] == ["float: 12 Softmax: Softmax stays float", "float: 3 Softmax: other"]


def test_a_kernel_other_than_the_planned_one_is_named():
    found = wording.groups([node(ran_as="MatMul"), node("b", ran_as=""),
                            node("c", "MaxPool", lowering="MaxPool", ran_as="com.microsoft.NhwcMaxPool")])
    assert sorted(group.line for group in found) == [
        "1 MatMul -> MatMul (planned QLinearMatMul)",
        "1 MatMul -> QLinearMatMul (planned; not seen by itself when it ran)", "1 MaxPool -> NhwcMaxPool"]


def test_nodes_of_unknown_making_and_nodes_quantized_before():
    unknown = node(op="com.microsoft.QLinearAdd", scheme="int8", lowering="", ran_as="com.microsoft.QLinearAdd")
    given = node(op="QLinearConv", scheme="given", lowering="given", ran_as="QLinearConv", reason="whatever")
    found = wording.groups([unknown, given])
    assert sorted(group.line for group in found) == ["1 QLinearAdd", "given: 1 QLinearConv"]
    assert wording.tally(found) == "2 nodes: 1 quantized, 1 given"


# ---------------------------------------------------------------- summary


def test_summary_has_the_figures():
    text = terminal.summary(report(
        size=Size(3000, 1000), latency=Latency(4.0, 2.0, 2.0, 1.9, 2.1, {"x": [8, 64]}, 2, "calib.npz"),
        accuracy=Accuracy("top1", 0.9, 0.898, 0.002, {"y": OutputAccuracy(31.25, 0.9991, 0.5)}, "eval.npz", 500),
        nodes=[node()]))
    rows = [line.split("  ") for line in text.splitlines()]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert cells["size"] == ["3.0 kB", "1.0 kB", "3.00x smaller"]
    assert cells["latency"] == ["4.00 ms", "2.00 ms", "2.00x as fast (1.90x to 2.10x)"]
    assert cells["top1"] == ["90.00 %", "89.80 %", "0.20 points worse"]
    assert cells["y"] == ["SQNR 31.2 dB, cosine 0.9991, max error 0.5"]
    assert "latency on x 8x64, 2 threads, calib.npz" in text
    assert "accuracy on 500 rows of eval.npz" in text
    assert text.splitlines()[0] == "in.onnx -> w8a8"
    assert text.splitlines()[-2:] == ["1 node: 1 quantized", "  1 MatMul -> QLinearMatMul"]


def test_pruned_layers_are_listed_by_their_error():
    rows = [PrunedRow(f"w{k}", [f"fc{k}"], 1000, 0.5, "wanda", k / 1000) for k in range(7)]
    rows.append(PrunedRow("t", ["embed"], 9, 1 / 3, "magnitude", None))
    lines = terminal.summary(report(pruned=rows)).splitlines()
    assert "8 weights pruned: 50.0% of 7,009 numbers are 0" in lines
    assert lines[-6].split() == ["fc6", "1,000", "50.0%", "wanda", "0.60%"]
    assert lines[-1] == "  +3 more, see --report DIR or --json"


def test_summary_of_nothing_measured():
    assert terminal.summary(report()) == "in.onnx -> w8a8"


def test_only_the_first_outputs_are_listed():
    outputs = {f"out{k}": OutputAccuracy(30.0, 0.99, 0.1) for k in range(7)}
    text = terminal.summary(report(accuracy=Accuracy("cosine", 1.0, 0.99, 0.01, outputs, "eval.npz", 5)))
    assert "out3" in text
    assert "out4" not in text
    assert "+3 more outputs" in text


def test_only_the_largest_groups_are_listed_quantized_ones_first():
    nodes = [row for k in range(20) for row in in_float("Mul", f"reason {k:02d}", 30 - k)] + [node()] * 25
    lines = terminal.summary(report(nodes=nodes), details="elsewhere").splitlines()
    listed = [line for line in lines if line.startswith("  ")]
    assert listed[0] == "  25 MatMul -> QLinearMatMul"
    assert listed[1:15] == [f"  float: {30 - k} Mul: reason {k:02d}" for k in range(14)]
    assert listed[15:] == ["  +6 more, see elsewhere"]


def test_long_texts_are_not_cut_or_wrapped_in_a_file():
    reason = "because " * 60 + "of this"
    text = terminal.summary(report(nodes=in_float("Mul", reason)))
    assert text.splitlines()[-1] == f"  float: 1 Mul: {reason}"


def test_names_are_text_and_not_markup_or_control():
    outputs = {"[red]a[/red]\x1b[0m": OutputAccuracy(30.0, 0.99, 0.1)}
    text = terminal.summary(report(accuracy=Accuracy("m", 1.0, 0.9, 0.1, outputs, ":smile:", 5),
                                   nodes=in_float("[bold]Op", "[link=x]y")))
    assert "[red]a[/red]\\x1b[0m" in text
    assert ":smile:" in text
    assert "1 [bold]Op: [link=x]y" in text
    assert "\x1b" not in text


def test_layers_are_listed_in_order():
    layers = [LayerRow(f"h{k}", "MatMul", 40.0 - k, 0.999, 0.01) for k in range(30)]
    lines = terminal.summary(report(layers=layers)).splitlines()
    assert [line.split()[0] for line in lines[-30:]] == [f"h{k}" for k in range(30)]
    assert lines[-30].split() == ["h0", "MatMul", "40.0", "dB", "0.99900", "0.01"]


class Screen(io.StringIO):
    """A terminal, as far as isatty() tells."""

    def isatty(self):
        return True


def test_colour_only_on_a_terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.line("done", "green") == "done"
    monkeypatch.setattr("sys.stdout", Screen())
    assert "\x1b[32m" in terminal.line("done", "green")
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.line("done", "green") == "done"


# ---------------------------------------------------------------- bench


def test_bench_of_two_models():
    found = {"model": "a.onnx", "other": "b.onnx", "a_ms": 4.0, "b_ms": 2.0, "ratio": 2.0, "low": 1.9, "high": 2.1,
             "shapes": {"x": [1, 8]}, "threads": 0, "data": "random inputs",
             "peak_memory_bytes": {"a": 120_000_000, "b": 0}}
    lines = terminal.bench(found).splitlines()
    assert lines[1].split() == ["a.onnx", "4.00", "ms", "120.0", "MB"]
    assert lines[2].split() == ["b.onnx", "2.00", "ms", "-"]
    assert lines[3:] == ["on x 1x8, default threads, random inputs", "b.onnx is 2.00x as fast (1.90x to 2.10x)"]


def test_bench_of_one_model():
    found = {"model": "a.onnx", "other": None, "a_ms": 4.0, "shapes": {}, "threads": 2, "data": "d.npz",
             "peak_memory_bytes": {"a": 1000}}
    lines = terminal.bench(found).splitlines()
    assert lines[1:] == ["a.onnx   4.00 ms   1.0 kB", "on 2 threads, d.npz"]


# ---------------------------------------------------------------- progress


def work(progress):
    progress.stage("calibrate")
    progress.total(3)
    progress.step(2)
    progress.stage("verify")
    progress.total(None)
    progress.step(7)


def test_progress_is_silent_where_nobody_looks(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes rich take anything for a terminal
    with terminal.progress() as progress:
        assert isinstance(progress, Silent)
        work(progress)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("quiet", "term"), [(True, "xterm"), (False, "dumb")])
def test_progress_is_silent_when_asked_to_be(monkeypatch, quiet, term):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", term)
    with terminal.progress(quiet) as progress:
        work(progress)
    assert screen.getvalue() == ""


def test_progress_on_a_terminal(monkeypatch, capsys):
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.progress() as progress:
        work(progress)
        progress.stage("[bold]last\x1b")
    shown = screen.getvalue()
    for words in ("calibrate", "verify", "[bold]last\\x1b"):
        assert words in shown, words
    assert capsys.readouterr().out == ""
