"""The command line: what it calls, what it prints where, and its exit status."""

import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from onnxq import presets, request
from onnxq.cli import cli, main
from onnxq.errors import CheckFailed, DataError, ModelError, OutputError, PassError, RecipeError, UsageError
from onnxq.recipe import Recipe
from onnxq.report.report import NodeRow, Report, Size, Verdict
from onnxq.runtime.machine import target_here
from onnxq.runtime.race import KernelTime
from onnxq.runtime.timings import TimingCache, default_folder
from onnxq.schemes import scheme, scheme_text

MODEL = Path(__file__).parents[1] / "models" / "digits_cnn" / "model.onnx"
COMMANDS = ("compile", "analyze", "sweep", "verify", "bench", "check", "pack", "unpack", "export", "generate",
            "inspect", "explain", "schemes", "targets", "cache")
FUNCTIONS = {"compile": ("onnxq.compiler", "compile"), "analyze": ("onnxq.analysis", "analyze"),
             "sweep": ("onnxq.sweep", "sweep"), "verify": ("onnxq.verifier", "verify"),
             "bench": ("onnxq.bench", "bench"), "resolve": ("onnxq.request", "resolve")}
# what the library is told when an option is not given
COMPILE_DEFAULTS = {
    "output": None, "scheme": "auto", "recipe": None, "calib": None, "samples": None, "batch": None, "eval": None,
    "ranges": None, "outliers": None, "rounding": None, "group_size": None, "symmetric": None, "target_bits": None,
    "max_size": None, "sparsity": None, "prune": None, "pattern": None, "metric": None, "max_drop": None,
    "target": "cpu", "runtime": None, "threads": 0, "format": "auto",
    "keep_float": (), "fallback": None, "force": False, "measure": True, "objective": "balanced", "shapes": {},
    "save_plan": None, "plan": None, "dump": None, "dump_after": None, "max_memory": None,
    "pack": None, "load_memory": None, "prune_channels": None, "prune_heads": None}
VERIFY_DEFAULTS = {"data": None, "target": "cpu", "metric": None, "max_drop": None, "min_sqnr": None, "layers": False}
ANALYZE_DEFAULTS = {"calib": "c.npz", "scheme": "auto", "recipe": None, "ranges": None, "samples": None, "batch": None,
                    "target": "cpu", "threads": 0}
SWEEP_DEFAULTS = {"scheme": "w4a16", "vary": None, "calib": None, "samples": None, "batch": None, "eval": None,
                  "metric": None, "shapes": {}, "target": "cpu", "threads": 0, "heard": None}
SWEPT = {"model": "m.onnx", "scheme": "w4a16", "target": "cpu", "metric": None, "data": "e.npz", "vary": ["bits"],
         "float": {"bytes": 1000, "metric": None}, "feeds": [{"x": [1, 8]}], "threads": 0, "notices": ["by the way"],
         "rows": [{"bits": 4, "bytes": 300, "weight_error": 0.1, "sqnr_db": 20.0, "metric": None, "latency": [
             {"float_ms": 1.0, "compiled_ms": 0.5, "speedup": 2.0, "low": 1.9, "high": 2.1}]}]}
BENCH_DEFAULTS = {"target": "cpu", "data": None, "shapes": {}, "threads": 0}
BENCHED = {"notices": [], "model": "a.onnx", "other": "b.onnx", "a_ms": 4.0, "b_ms": 2.0, "ratio": 2.0, "low": 1.9,
           "high": 2.1, "shapes": {"x": [1, 8]}, "threads": 0, "data": "random inputs",
           "peak_memory_bytes": {"a": 2_000_000, "b": 1_000_000}, "environment": {}}


ANALYZED = {"model": "m.onnx", "scheme": "w8a8", "target": "cpu", "data": "c.npz", "rows": 8, "outputs": {"y": 30.0},
            "notices": ["by the way"], "layers": [
                {"name": name, "op": "Conv", "kernel": "QLinearConv", "reads": "x", "makes": "y", "sqnr_db": db,
                 "accumulated_db": 20.0, "range_parm": 4.0, "kurtosis": db, "clipped": 0.0, "low": -1.0, "high": 1.0,
                 "scale": 0.01, "zero_point": 128} for name, db in (("a", 30.0), ("b", 20.0), ("c", 40.0))]}


class Result:
    """Exit status and both streams."""

    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def onnxq(monkeypatch, capsys):
    """Runs the command in this process, through its entry point."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["onnxq", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def replace(monkeypatch):
    """Puts `result` (a value, an exception or a function) in the place of a library function; gives its calls."""

    def put(name, result):
        module = importlib.import_module(FUNCTIONS[name][0])
        signature = inspect.signature(getattr(module, FUNCTIONS[name][1]))
        calls = []

        def stub(*args, **options):
            signature.bind(*args, **options)  # a call that the real function would refuse
            calls.append((args, options))
            if isinstance(result, BaseException):
                raise result
            return result() if callable(result) else result

        monkeypatch.setattr(module, FUNCTIONS[name][1], stub)
        return calls

    return put


def report(failures=(), notices=(), output="model.w8a8.onnx"):
    return Report("model.onnx", output, "w8a8", size=Size(3000, 1000),
                  nodes=[NodeRow("m", "MatMul", "w8a8", "QGemm", "QGemm", "CPUExecutionProvider", "")],
                  verdict=Verdict(list(failures), list(notices)))


# ---------------------------------------------------------------- what reaches the library


@pytest.mark.parametrize(("options", "wanted"), [
    ([], {}),
    (["-o", "out.onnx"], {"output": "out.onnx"}),
    (["--output", "out.onnx"], {"output": "out.onnx"}),
    (["--force"], {"force": True}),
    (["--scheme", "w8a8"], {"scheme": "w8a8"}),
    (["--recipe", "r.yaml"], {"recipe": "r.yaml"}),
    (["--calib", "c.npz"], {"calib": "c.npz"}),
    (["--samples", "7"], {"samples": 7}),
    (["--batch", "3"], {"batch": 3}),
    (["--eval", "mod:function"], {"eval": "mod:function"}),
    (["--metric", "mod:function"], {"metric": "mod:function"}),
    (["--max-drop", "0.5%"], {"max_drop": "0.5%"}),
    (["--target", "cpu"], {"target": "cpu"}),
    (["--threads", "2"], {"threads": 2}),
    (["--format", "qdq"], {"format": "qdq"}),
    (["--ranges", "mse"], {"ranges": "mse"}),
    (["--ranges", "auto"], {"ranges": "auto"}),
    (["--outliers", "none"], {"outliers": "none"}),
    (["--rounding", "nearest"], {"rounding": "nearest"}),
    (["--group-size", "64"], {"group_size": 64}),
    (["--symmetric"], {"symmetric": True}),
    (["--asymmetric"], {"symmetric": False}),
    (["--target-bits", "4.5"], {"target_bits": 4.5}),
    (["--max-size", "40MB"], {"max_size": "40MB"}),
    (["--sparsity", "50%", "--prune", "wanda"], {"sparsity": "50%", "prune": "wanda"}),
    (["--pattern", "2:4"], {"pattern": "2:4"}),
    (["--keep-float", "a*", "--keep-float", "b.{c,d}"], {"keep_float": ("a*", "b.{c,d}")}),
    (["--fallback", "3"], {"fallback": 3}),
    (["--fallback", "0"], {"fallback": 0}),
    (["--no-measure"], {"measure": False}),
    (["--save-plan", "p"], {"save_plan": "p"}),
    (["--objective", "size"], {"objective": "size"}),
    (["--shape", "batch=1", "--shape", "seq=64,128"], {"shapes": {"batch": (1,), "seq": (64, 128)}}),
    (["--plan", "p"], {"plan": "p"}),
    (["--pack", "--load-memory", "1GB"], {"pack": True, "load_memory": "1GB"}),
    (["--no-pack"], {"pack": False}),
    (["--dump", "d"], {"dump": "d"}),
    (["--dump", "d", "--dump-after", "fold"], {"dump": "d", "dump_after": "fold"}),
    (["--json", "-q", "--debug"], {}),
])
def test_compile_options(onnxq, replace, options, wanted):
    calls = replace("compile", report())
    assert onnxq("compile", "model.onnx", *options).status == 0
    [(args, given)] = calls
    assert args == ("model.onnx",)
    del given["progress"]
    assert given == COMPILE_DEFAULTS | wanted


@pytest.mark.parametrize(("options", "wanted"), [
    ([], {}),
    (["--data", "d.npz"], {"data": "d.npz"}),
    (["--metric", "top1"], {"metric": "top1"}),
    (["--max-drop", "0.5pt"], {"max_drop": "0.5pt"}),
    (["--min-sqnr", "25.5"], {"min_sqnr": 25.5}),
    (["--layers"], {"layers": True}),
    (["--json"], {}),
])
def test_verify_options(onnxq, replace, options, wanted):
    calls = replace("verify", report())
    assert onnxq("verify", "float.onnx", "compiled.onnx", *options).status == 0
    [(args, given)] = calls
    assert args == ("float.onnx", "compiled.onnx")
    del given["progress"]
    assert given == VERIFY_DEFAULTS | wanted


@pytest.mark.parametrize(("options", "wanted"), [
    ([], {}),
    (["--scheme", "w8a8-dynamic"], {"scheme": "w8a8-dynamic"}),
    (["--recipe", "r.yaml"], {"recipe": "r.yaml"}),
    (["--samples", "7", "--batch", "2", "--ranges", "mse"], {"samples": 7, "batch": 2, "ranges": "mse"}),
    (["--target", "cpu", "--threads", "2"], {"threads": 2}),
    (["--sort", "kurtosis", "--top", "1", "-q"], {}),
])
def test_analyze_options(onnxq, replace, options, wanted):
    calls = replace("analyze", ANALYZED)
    assert onnxq("analyze", "m.onnx", "--calib", "c.npz", *options).status == 0
    [(args, given)] = calls
    assert args == ("m.onnx",)
    del given["progress"]
    assert given == ANALYZE_DEFAULTS | wanted


@pytest.mark.parametrize(("options", "wanted"), [
    ([], {}), (["--scheme", "w8a16"], {"scheme": "w8a16"}), (["--samples", "4", "--batch", "2"],
                                                            {"samples": 4, "batch": 2}),
    (["--vary", "group_size=16,32", "--vary", "symmetric=true,false", "--vary", "search=mse"],
     {"vary": {"group_size": [16, 32], "symmetric": [True, False], "search": ["mse"]}}),
    (["--calib", "c.npz", "--eval", "e.npz", "--metric", "top1"],
     {"calib": "c.npz", "eval": "e.npz", "metric": "top1"}),
    (["--shape", "n=1,8"], {"shapes": {"n": (1, 8)}}), (["--threads", "2", "--target", "cpu"], {"threads": 2})])
def test_sweep_options(onnxq, replace, options, wanted):
    calls = replace("sweep", SWEPT)
    result = onnxq("sweep", "m.onnx", *options)
    assert result.status == 0
    [(args, given)] = calls
    assert args == ("m.onnx",)
    del given["progress"]
    assert given == SWEEP_DEFAULTS | wanted
    assert "m.onnx: w4a16 on cpu, 1 combination" in result.out
    assert "Note: by the way" in result.err


def test_sweep_writes_json_and_a_plot(onnxq, replace, tmp_path):
    replace("sweep", SWEPT)
    assert json.loads(onnxq("sweep", "m.onnx", "--json").out) == SWEPT
    files = [tmp_path / name for name in ("s.json", "s.svg")]
    result = onnxq("sweep", "m.onnx", "--json", str(files[0]), "--plot", str(files[1]))
    assert f"wrote {files[0]} and {files[1]}" in result.out.replace("\n", "")
    assert json.loads(files[0].read_text()) == SWEPT
    assert files[1].read_text().startswith("<svg")
    assert onnxq("sweep", "m.onnx", "-q").out == ""


@pytest.mark.parametrize("options", [["--plot", "s.png"], ["--plot", "missing/s.svg"], ["--json", "missing/s.json"]])
def test_sweep_refuses_files_that_cannot_be_before_the_work(onnxq, replace, options):
    calls = replace("sweep", SWEPT)
    result = onnxq("sweep", "m.onnx", *options)
    assert result.status in (2, 3)
    assert "name a" in result.err
    assert calls == []


def test_analyze_prints_the_worst_first(onnxq, replace):
    replace("analyze", ANALYZED)
    result = onnxq("analyze", "m.onnx", "--calib", "c.npz", "--top", "2")
    assert [line.split()[0] for line in result.out.splitlines()[3:6]] == ["b", "a", "+1"]
    assert result.err == "Note: by the way\n"
    result = onnxq("analyze", "m.onnx", "--calib", "c.npz", "--sort", "kurtosis")
    assert [line.split()[0] for line in result.out.splitlines()[3:6]] == ["c", "a", "b"]
    assert (onnxq("analyze", "m.onnx", "--calib", "c.npz", "-q").out) == ""


def test_analyze_writes_json_and_a_plot(onnxq, replace, tmp_path):
    replace("analyze", ANALYZED)
    files = tmp_path / "a.json", tmp_path / "a.svg"
    result = onnxq("analyze", "m.onnx", "--calib", "c.npz", "--json", str(files[0]), "--plot", str(files[1]))
    assert json.loads(files[0].read_text()) == ANALYZED
    assert files[1].read_text().startswith("<svg")
    assert result.out.splitlines()[-1] == f"wrote {files[0]} and {files[1]}"
    result = onnxq("analyze", "m.onnx", "--calib", "c.npz", "--json")
    assert json.loads(result.out) == ANALYZED


@pytest.mark.parametrize("options", [["--json", "no/where.json"], ["--plot", "no/where.svg"], ["--json", "."]])
def test_analyze_refuses_files_that_cannot_be_before_the_work(onnxq, replace, options):
    calls = replace("analyze", ANALYZED)
    result = onnxq("analyze", "m.onnx", "--calib", "c.npz", *options)
    assert result.status == 3
    assert f"name another file for {options[0]}" in result.err
    assert calls == []


@pytest.mark.parametrize(("options", "other", "wanted"), [
    ([], None, {}),
    (["b.onnx"], "b.onnx", {}),
    (["--data", "d.npz"], None, {"data": "d.npz"}),
    (["--shape", "batch=8", "--shape", "a=b=64"], None, {"shapes": {"batch": 8, "a=b": 64}}),
    (["--threads", "2"], None, {"threads": 2}),
])
def test_bench_options(onnxq, replace, options, other, wanted):
    calls = replace("bench", BENCHED)
    assert onnxq("bench", "a.onnx", *options).status == 0
    [(args, given)] = calls
    assert args == ("a.onnx", other)
    del given["progress"]
    assert given == BENCH_DEFAULTS | wanted


def test_print_recipe_asks_for_what_the_options_say(onnxq, replace):
    calls = replace("resolve", Recipe(scheme("w8a8")))
    compiled = replace("compile", report())
    result = onnxq("compile", "--print-recipe", "--calib", "c.npz", "--samples", "5", "--batch", "2", "--metric", "f1",
                   "--max-drop", "1%", "--keep-float", "x*", "--threads", "3", "--outliers", "smooth", "--rounding",
                   "auto", "--group-size", "64", "--asymmetric")
    assert result.status == 0
    assert calls == [((), {"target": target_here("cpu"), "scheme": "auto", "recipe": None, "calib": "c.npz",
                           "samples": 5, "batch": 2,
                           "ranges": None, "outliers": "smooth", "rounding": "auto", "group_size": 64,
                           "symmetric": False, "target_bits": None, "max_size": None, "pack": None,
                           "load_memory": None, "metric": "f1", "max_drop": "1%", "keep_float": ("x*",),
                           "fallback": None, "sparsity": None, "prune": None, "pattern": None, "prune_channels": None,
                           "prune_heads": None})]
    assert compiled == []


# ---------------------------------------------------------------- exit status


@pytest.mark.parametrize("command", [("compile", ["m.onnx"]), ("verify", ["a.onnx", "b.onnx"])])
def test_done_is_0_and_a_failed_check_1(onnxq, replace, command):
    name, args = command
    replace(name, report(notices=["by the way"]))
    assert onnxq(name, *args).status == 0
    replace(name, report(failures=["too far off"]))
    result = onnxq(name, *args)
    assert result.status == 1
    assert "Failed: too far off" in result.err


@pytest.mark.parametrize(("error", "status"), [
    (CheckFailed("a sentence"), 1), (UsageError("a sentence"), 2), (RecipeError("a sentence"), 2),
    (ModelError("a sentence"), 3), (DataError("a sentence"), 3), (OutputError("a sentence"), 3),
    (PassError("a sentence"), 70)])
@pytest.mark.parametrize("options", [[], ["--json"], ["-q"]])
def test_an_error_is_one_sentence_and_a_status(onnxq, replace, error, status, options):
    replace("compile", error)
    result = onnxq("compile", "m.onnx", *options)
    assert (result.status, result.out, result.err) == (status, "", "Error: a sentence\n")


def test_an_error_of_many_lines_is_put_on_one(onnxq, replace):
    replace("compile", ModelError("first\n  second\x1b[31m"))
    assert onnxq("compile", "m.onnx").err == "Error: first second\\x1b[31m\n"


def test_debug_shows_the_traceback_of_an_error(onnxq, replace):
    replace("compile", ModelError("a sentence"))
    result = onnxq("compile", "m.onnx", "--debug")
    assert result.status == 3
    assert "Traceback (most recent call last)" in result.err
    assert result.err.endswith("\nError: a sentence\n")


@pytest.mark.parametrize(("command", "function"), [
    (["compile", "m.onnx"], "compile"), (["compile", "--print-recipe"], "resolve"),
    (["verify", "a.onnx", "b.onnx"], "verify"), (["bench", "a.onnx"], "bench")])
def test_an_error_of_onnxq_itself_is_70_and_asks_for_a_report(onnxq, replace, command, function):
    replace(function, ZeroDivisionError("by zero"))
    result = onnxq(*command)
    assert (result.status, result.out) == (70, "")
    assert result.err.count("\n") == 1
    for words in ("ZeroDivisionError", "by zero", "report", "--debug"):
        assert words in result.err, words
    result = onnxq(*command, "--debug")
    assert result.status == 70
    assert "Traceback" in result.err


def test_interrupted_is_130(onnxq, replace):
    replace("compile", KeyboardInterrupt())
    result = onnxq("compile", "m.onnx")
    assert (result.status, result.out, result.err) == (130, "", "interrupted; nothing half-written was left\n")
    replace("bench", KeyboardInterrupt())
    result = onnxq("bench", "m.onnx")
    assert (result.status, result.err) == (130, "interrupted\n")


def test_interrupted_after_the_model_was_written(onnxq, replace, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    replace("compile", report())
    monkeypatch.setattr(Report, "save", interrupt)
    result = onnxq("compile", "m.onnx", "--report", str(tmp_path))
    assert (result.status, result.err) == (130, "interrupted; model.w8a8.onnx was written\n")


@pytest.mark.parametrize(("args", "remedy"), [
    (["nonsense"], "nonsense"),
    (["compile"], "for example: onnxq compile model.onnx"),
    (["compile", "m.onnx", "--nonsense"], "--nonsense"),
    (["compile", "m.onnx", "--scheme", "w8a8", "--recipe", "r.yaml"], "exclude each other"),
    (["compile", "m.onnx", "--dump-after", "x"], "--dump DIR"),
    (["compile", "m.onnx", "--target", "abacus"], "cpu"),
    (["compile", "m.onnx", "--format", "zip"], "qoperator"),
    *[(["compile", "m.onnx", f"--{name}", value], name)
      for name in ("threads", "samples", "batch") for value in ("0", "-1", "many")],
    (["verify", "a.onnx"], "COMPILED"),
    (["verify", "a.onnx", "b.onnx", "--min-sqnr", "high"], "--min-sqnr"),
    (["bench"], "MODEL"),
    *[(["bench", "a.onnx", "--shape", text], "--shape batch=8")
      for text in ("batch", "=8", "batch=", "batch=0", "batch=-1", "batch=x", "batch=8.5", "batch=²")],
    (["bench", "a.onnx", "--shape", "batch=8", "--shape", "batch=9"], "twice"),
    (["analyze", "m.onnx"], "--calib"),
    (["analyze", "m.onnx", "--calib", "c.npz", "--sort", "size"], "range_parm"),
    (["analyze", "m.onnx", "--calib", "c.npz", "--top", "0"], "--top"),
    (["analyze", "m.onnx", "--calib", "c.npz", "--scheme", "w8a8", "--recipe", "r.yaml"], "exclude each other"),
    *[(["sweep", "m.onnx", "--vary", text], "--vary group_size=32,128")
      for text in ("bits", "=4", "bits=", "bits=4,,8")],
    (["sweep", "m.onnx", "--vary", "bits=4", "--vary", "bits=8"], "twice"),
    (["cache", "--older-than", "3"], "--clear"),
    (["cache", "--clear", "--older-than", "-1"], "--older-than"),
    (["cache", "--clear", "--kernels"], "exclude each other"),
])
def test_wrong_usage_is_2(onnxq, replace, args, remedy):
    calls = [replace(name, report()) for name in ("compile", "analyze", "verify", "bench")]
    result = onnxq(*args)
    assert (result.status, result.out) == (2, "")
    assert remedy in result.err
    assert "Usage: onnxq" in result.err
    assert calls == [[], [], [], []]


# ---------------------------------------------------------------- the real library, on what it refuses


@pytest.mark.parametrize("command", [["compile", "MISSING"], ["verify", "MISSING", "MISSING"], ["bench", "MISSING"]])
def test_a_missing_model_is_3(onnxq, tmp_path, command):
    missing = str(tmp_path / "missing.onnx")
    result = onnxq(*(missing if word == "MISSING" else word for word in command))
    assert (result.status, result.out) == (3, "")
    assert result.err.count("\n") == 1
    assert "missing.onnx" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [
    ["--scheme", "w9a9"], ["--scheme", "w8a8"], ["--metric", "nonsense"], ["--max-drop", "lots"],
    ["--recipe", "missing.yaml"], ["--group-size", "64"], ["--scheme", "w4a16", "--group-size", "48"],
    ["--target-bits", "4.5"], ["--scheme", "w4a16", "--max-size", "small"], ["--sparsity", "50"], ["--pattern", "4"],
    ["--sparsity", "50%"], ["--prune", "wanda"], ["--scheme", "w4a16", "--sparsity", "50%", "--prune", "magnitude"]])
def test_what_the_library_calls_wrong_usage_is_2(onnxq, tmp_path, options):
    result = onnxq("compile", str(tmp_path / "m.onnx"), *options)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("Error: ")
    assert result.err.count("\n") == 1


# ---------------------------------------------------------------- what is printed where


def test_the_summary_ends_with_where_the_result_is(onnxq, replace):
    replace("compile", report(notices=["by the way"]))
    result = onnxq("compile", "m.onnx")
    assert result.out.splitlines()[0] == "model.onnx -> w8a8"
    assert "3.00x smaller" in result.out
    assert "1 MatMul -> QGemm" in result.out
    assert result.out.splitlines()[-1] == "wrote model.w8a8.onnx"
    assert result.err == "Note: by the way\n"


def test_json_is_the_only_thing_on_stdout(onnxq, replace):
    def noisy():
        print("a function of the user's prints")
        return report(["too far off"], ["by the way"])

    replace("compile", noisy)
    result = onnxq("compile", "m.onnx", "--json")
    assert result.status == 1
    assert json.loads(result.out) == report(["too far off"], ["by the way"]).to_dict()
    assert result.err.splitlines() == ["a function of the user's prints", "Note: by the way", "Failed: too far off",
                                       "wrote model.w8a8.onnx all the same"]


def test_json_of_the_other_commands(onnxq, replace):
    replace("verify", report())
    assert json.loads(onnxq("verify", "a.onnx", "b.onnx", "--json").out) == report().to_dict()
    replace("bench", BENCHED)
    assert json.loads(onnxq("bench", "a.onnx", "--json").out) == BENCHED
    listed = json.loads(onnxq("schemes", "--json").out)
    assert [row["name"] for row in listed] == presets.names()
    assert json.loads(onnxq("schemes", "w8a8", "--json").out) == yaml.safe_load(scheme_text("w8a8"))
    resolved = json.loads(onnxq("compile", "--print-recipe", "--scheme", "w8a8", "--json").out)
    assert resolved["scheme"]["name"] == "w8a8"


def test_json_survives_any_name(onnxq, replace):
    replace("compile", report(notices=["gr\u00fcn \x1b \udcff"]))
    result = onnxq("compile", "m.onnx", "--json")
    assert result.out.isascii()
    assert json.loads(result.out)["verdict"]["notices"] == ["gr\u00fcn \x1b \udcff"]
    assert result.err == "Note: gr\u00fcn \\x1b \\udcff\n"


def test_quiet_leaves_failures_alone(onnxq, replace):
    replace("compile", report(notices=["by the way"]))
    result = onnxq("compile", "m.onnx", "-q")
    assert (result.status, result.out, result.err) == (0, "", "")
    replace("compile", report(["too far off"], ["by the way"]))
    result = onnxq("compile", "m.onnx", "--quiet")
    assert (result.status, result.out) == (1, "")
    assert result.err == "Failed: too far off\nwrote model.w8a8.onnx all the same\n"


def test_a_failed_compile_names_the_result_that_was_written(onnxq, replace):
    replace("compile", report(["too far off"]))
    result = onnxq("compile", "m.onnx")
    assert result.out.splitlines()[-1] == "wrote model.w8a8.onnx"
    assert result.err == "Failed: too far off\n"


def test_verify_does_not_say_that_it_wrote(onnxq, replace):
    replace("verify", report())
    assert onnxq("verify", "a.onnx", "b.onnx").out.splitlines()[-1] == "no check failed"
    replace("verify", report(["too far off"]))
    result = onnxq("verify", "a.onnx", "b.onnx")
    assert "wrote" not in result.out
    assert "no check failed" not in result.out
    assert result.err == "Failed: too far off\n"
    assert onnxq("verify", "a.onnx", "b.onnx", "-q").err == "Failed: too far off\n"


def test_bench_prints_both_and_the_ratio(onnxq, replace):
    replace("bench", BENCHED)
    result = onnxq("bench", "a.onnx", "b.onnx")
    assert "b.onnx is 2.00x as fast (1.90x to 2.10x)" in result.out
    assert result.err == ""


def test_progress_is_silent_when_stderr_is_no_terminal(onnxq, replace):
    calls = replace("compile", report())
    onnxq("compile", "m.onnx")
    progress = calls[0][1]["progress"]
    progress.stage("calibrate")
    progress.total(3)
    progress.step(1)
    assert onnxq("compile", "m.onnx").err == ""


# ---------------------------------------------------------------- reports


def test_report_writes_both_files_and_names_the_page(onnxq, replace, tmp_path):
    folder = tmp_path / "new"
    replace("compile", report())
    result = onnxq("compile", "m.onnx", "--report", str(folder))
    assert result.status == 0
    assert json.loads((folder / "report.json").read_text()) == report().to_dict()
    assert (folder / "report.html").is_file()
    assert result.out.splitlines()[-2:] == [f"report in {folder / 'report.html'}", "wrote model.w8a8.onnx"]


@pytest.mark.parametrize("options", [["--json"], ["-q"]])
def test_report_is_written_without_a_summary_too(onnxq, replace, tmp_path, options):
    replace("compile", report(["too far off"]))
    assert onnxq("compile", "m.onnx", "--report", str(tmp_path), *options).status == 1
    assert (tmp_path / "report.html").is_file()


def test_a_report_folder_that_cannot_be_is_refused_before_the_work(onnxq, replace, tmp_path):
    (tmp_path / "file").write_text("")
    calls = replace("compile", report())
    result = onnxq("compile", "m.onnx", "--report", str(tmp_path / "file" / "report"))
    assert (result.status, result.out) == (3, "")
    assert "choose another --report folder" in result.err
    assert calls == []


def test_a_report_that_fails_late_is_3_and_leaves_json_empty(onnxq, replace, tmp_path):
    (tmp_path / "report.json").mkdir()
    replace("compile", report())
    result = onnxq("compile", "m.onnx", "--report", str(tmp_path), "--json")
    assert (result.status, result.out) == (3, "")


# ---------------------------------------------------------------- schemes and recipes


def test_schemes(onnxq):
    result = onnxq("schemes")
    assert result.status == 0
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == presets.names()
    for name in presets.names():
        assert presets.named(name).scheme.summary in result.out
        assert onnxq("schemes", name).out == presets.text(name)


def test_an_unknown_scheme_gets_near_ones(onnxq):
    result = onnxq("schemes", "w8a9")
    assert (result.status, result.out) == (2, "")
    assert "w8a8" in result.err


@pytest.mark.parametrize(("options", "name"), [([], "w8a8-dynamic"), (["--calib", "c.npz"], "w8a8"),
                                               (["model.onnx", "--scheme", "w8a8"], "w8a8"),
                                               (["--scheme", "w4a16", "--group-size", "64", "--symmetric"], "w4a16")])
def test_print_recipe_can_be_read_back(onnxq, tmp_path, options, name):
    result = onnxq("compile", "--print-recipe", *options)
    assert (result.status, result.err) == (0, "")
    path = tmp_path / "recipe.yaml"
    path.write_text(result.out)
    assert request.resolve(recipe=path).scheme.name == name
    assert onnxq("compile", "--print-recipe", "--recipe", str(path)).out == result.out


# ---------------------------------------------------------------- the cache


@pytest.fixture
def kernels(cache_home):
    """Two environments with a kernel each, the second one 40 days old; gives their folder."""
    for threads, days in ((2, 0), (4, 40)):
        cache = TimingCache({"processor": "P", "cpu_flags": ["avx2"], "onnxruntime": "1.31.1", "threads": threads})
        cache.put({"op": "MatMul", "rows": threads, "graph": "long" * 100},
                  {"float": KernelTime(2.0, 1.9, 2.2, 300), "int8": KernelTime(0.5, 0.4, 0.6, 900)})
        cache.note_check("k", 40.0)
        then = time.time() - days * 86400
        path = max(default_folder().glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
        os.utime(path, (then, then))
    assert default_folder().is_relative_to(cache_home)
    return default_folder()


def test_cache_lists_files_and_their_age(onnxq, kernels):
    result = onnxq("cache")
    assert (result.status, result.err) == (0, "")
    title, _, new, old = result.out.splitlines()
    assert title == f"kernel times in {kernels}"
    for row, age, threads in ((new, "less than a minute ago", 2), (old, "40 days ago", 4)):
        assert row.split()[:2] == ["1", "1"]
        assert f" {age} " in row
        assert row.endswith(f" B   P (avx2), onnxruntime 1.31.1, {threads} threads")


def test_cache_lists_kernels_with_their_candidates(onnxq, kernels):
    lines = onnxq("cache", "--kernels").out.splitlines()
    place = lines.index("op MatMul, rows 2")
    assert lines[place + 1] == "  int8 0.500 ms (0.400 ms to 0.600 ms), float 2.00 ms (1.90 ms to 2.20 ms)"
    assert "op MatMul, rows 4" in lines[place + 2:]


def test_cache_as_json(onnxq, kernels):
    found = json.loads(onnxq("cache", "--json").out)
    assert found["folder"] == str(kernels)
    assert [(f["kernels"], f["checks"], f["environment"]["threads"]) for f in found["files"]] == [(1, 1, 2), (1, 1, 4)]
    assert "entries" not in found["files"][0]
    [entry] = json.loads(onnxq("cache", "--json", "--kernels").out)["files"][0]["entries"]
    assert entry["description"] == {"op": "MatMul", "rows": 2, "graph": "long" * 100}
    assert entry["times"]["float"] == {"ms": 2.0, "low": 1.9, "high": 2.2, "runs": 300}


def test_cache_clears_what_is_old_or_all(onnxq, kernels):
    result = onnxq("cache", "--clear", "--older-than", "30")
    assert (result.status, result.out) == (0, f"removed 1 file from {kernels}\n")
    assert [f["environment"]["threads"] for f in json.loads(onnxq("cache", "--json").out)["files"]] == [2]
    removed = json.loads(onnxq("cache", "--clear", "--json").out)["removed"]
    assert [Path(path).parent for path in removed] == [kernels]
    assert onnxq("cache").out == f"no kernel times in {kernels}\n"
    assert onnxq("cache", "--clear").out == f"removed 0 files from {kernels}\n"


def test_cache_says_which_file_is_damaged(onnxq, kernels):
    path = next(kernels.glob("*.jsonl"))
    path.write_text("nonsense\n")
    result = onnxq("cache", "--kernels")
    assert result.status == 0
    assert f"damaged: 1 line of {path} can't be read" in " ".join(result.out.split())


def test_a_cache_that_cannot_be_removed_is_3(onnxq, kernels):
    path = next(kernels.glob("*.jsonl"))
    path.unlink()
    path.mkdir()
    result = onnxq("cache", "--clear")
    assert (result.status, result.out) == (3, "")
    assert "can't be removed" in result.err


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples_on_lines_of_their_own(onnxq, command, flag):
    result = onnxq(*command.split(), flag)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    examples = lines[lines.index("  Examples:") + 1:]
    assert examples[0].startswith(f"    onnxq {command}")
    assert sum(line.startswith(f"    onnxq {command}") for line in examples) >= 2


def test_options_come_in_the_promised_order(onnxq):
    promised = {
        "compile": ["-o", "--force", "--scheme", "--recipe", "--calib", "--samples", "--batch", "--eval", "--metric",
                    "--max-drop", "--target", "--threads", "--format", "--keep-float", "--report", "--json", "-q",
                    "--debug", "--print-recipe", "--dump", "--dump-after"],
        "verify": ["--data", "--metric", "--max-drop", "--min-sqnr", "--layers", "--json"],
        "bench": ["--data", "--shape", "--threads", "--json"]}
    for command, options in promised.items():
        out = onnxq(command, "-h").out
        places = [out.index(f"\n  {option}") for option in options]
        assert places == sorted(places), command


def test_no_command_at_all_gets_the_help(onnxq):
    result = onnxq()
    assert result.status in (0, 2)  # as click's version has it
    assert "Examples:" in result.out + result.err


def test_help_of_the_group_names_commands_and_statuses(onnxq):
    out = onnxq("--help").out
    places = [out.index(f"\n  {command} ") for command in COMMANDS]
    assert places == sorted(places)
    for status in (0, 1, 2, 3, 70, 130):
        assert f"\n    {status} " in out


def test_version(onnxq):
    result = onnxq("--version")
    assert result.status == 0
    assert result.out.split()[0] == "onnxq"
    assert result.out.split()[1][0].isdigit()


# ---------------------------------------------------------------- as a process


def process(*args, **options):
    return subprocess.run([sys.executable, "-m", "onnxq", *args], check=False, timeout=120,
                          **({"capture_output": True, "text": True} | options))


def test_as_a_module():
    done = process("schemes", "w8a8")
    assert (done.returncode, done.stdout, done.stderr) == (0, scheme_text("w8a8"), "")
    done = process("compile")
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: onnxq compile ")


def test_with_the_runner_of_click(replace):
    replace("compile", report())
    result = CliRunner().invoke(cli, ["compile", "m.onnx"])
    assert result.exit_code == 0
    assert "wrote model.w8a8.onnx" in result.output
    replace("compile", ModelError("a sentence"))
    result = CliRunner().invoke(cli, ["compile", "m.onnx"])
    assert result.exit_code == 3
    assert "Error: a sentence" in result.output


@pytest.mark.skipif(os.name != "posix", reason="pipes that close")
def test_a_reader_that_leaves_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = process("schemes", capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_a_full_disk_behind_stdout_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = process("schemes", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert done.stderr.startswith("Error: standard output can't be written (")
    assert done.stderr.count("\n") == 1


def test_a_terminal_of_few_letters_shows_what_it_can(tmp_path):
    missing = str(tmp_path / "\u5c42.onnx")
    done = process("compile", missing, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 3
    assert "\\u5c42.onnx" in done.stderr


def test_compile_for_real_with_a_function_that_prints(tmp_path):
    (tmp_path / "rows.py").write_text(
        "import numpy as np\n"
        "def give():\n"
        "    for seed in range(4):\n"
        "        print('drawing', seed)\n"
        "        yield {'image': np.random.default_rng(seed).random((2, 1, 16, 16), np.float32)}\n")
    done = process("compile", MODEL, "-o", "small.onnx", "--calib", "rows:give", "--no-measure", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["scheme"], found["output"], found["verdict"]["ok"]) == ("w8a8", "small.onnx", True)
    assert found["latency"] is None
    assert found["size"]["compiled_bytes"] == (tmp_path / "small.onnx").stat().st_size
    assert any(node["ran_as"].endswith("QLinearConv") for node in found["nodes"])
    assert "drawing 3" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted_for_real(tmp_path):
    (tmp_path / "rows.py").write_text(
        "import os, signal\n"
        "def give():\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    yield {}\n")
    before = sorted(tmp_path.iterdir())
    done = process("compile", MODEL, "-o", "small.onnx", "--calib", "rows:give", cwd=tmp_path,
                   env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; nothing half-written was left\n")
    assert sorted(tmp_path.iterdir()) == before
