"""onnxq generate as a command, and token files through compile and verify."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from language_support import following, saved, summing
from lowering_support import MODELS

import onnxq

Run = Callable[..., "subprocess.CompletedProcess[str]"]
IDS = "3,1,5"


@pytest.fixture
def command(tmp_path: Path) -> Run:
    """`onnxq generate` in a process of its own, beside a.onnx and its twin b.onnx; c.onnx knows no positions."""
    saved(summing(), tmp_path, "a.onnx")
    saved(summing(), tmp_path, "b.onnx")
    saved(summing(positions=False), tmp_path, "c.onnx")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "onnxq", "generate", *args], capture_output=True, text=True,
                              check=False, cwd=tmp_path, timeout=120, encoding="utf-8")

    return run


def test_ids_go_to_stdout_and_rates_to_stderr(command: Run) -> None:
    done = command("a.onnx", "--prompt-ids", IDS, "--tokens", "6", "--threads", "1")
    wanted = following([3, 1, 5], 6)
    assert (done.returncode, done.stdout) == (0, " ".join(map(str, wanted)) + "\n"), done.stderr
    assert done.stderr.startswith("prompt of 3 tokens at ")
    assert ", 6 tokens at " in done.stderr
    assert done.stderr.endswith("/s\n")
    assert done.stderr.count("\n") == 1


def test_json_is_all_there_is(command: Run) -> None:
    wanted = following([3, 1, 5], 6)
    done = command("a.onnx", "--prompt-ids", "3, 1, 5", "--tokens", "6", "--stop", "99", "--stop", str(wanted[1]),
                   "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert list(found["tokens_per_second"]) == ["prefill", "decode"]
    assert all(rate > 0 for rate in found.pop("tokens_per_second").values())
    assert found == {"model": "a.onnx", "prompt_ids": [3, 1, 5], "ids": wanted[:2], "text": None, "ended": "stop",
                     "cached": True}


def test_a_text_with_line_ends_but_no_escape_codes(command: Run, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed; pip install 'onnxq[text]'")
    wanted = following([3, 1, 5], 6)
    names = {number: f"w{number}" for number in range(11)} | {wanted[0]: "a\nb", wanted[1]: "\x1b[31m"}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: number for number, name in names.items()}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    made.save(str(tmp_path / "tokenizer.json"))
    shown = [names[token].replace("\x1b", "\\x1b") for token in wanted]
    prompt = " ".join(names[token] for token in (3, 1, 5))
    done = command("a.onnx", "--prompt", prompt, "--tokens", "6")
    assert (done.returncode, done.stdout) == (0, "".join(f" {piece}" for piece in shown) + "\n"), done.stderr
    done = command("a.onnx", "--prompt", prompt, "--tokens", "6", "--compare", "b.onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ".join(shown)) == 2
    assert "\x1b" not in done.stdout
    assert json.loads(command("a.onnx", "--prompt", prompt, "--tokens", "6", "--json").stdout)["text"] == "".join(
        f" {names[token]}" for token in wanted)


def test_two_models_compared(command: Run) -> None:
    done = command("a.onnx", "--compare", "c.onnx", "--prompt-ids", "5", "--tokens", "6")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0].startswith("a.onnx: prompt of 1 token at ")
    assert lines[1] == " ".join(map(str, following([5], 6)))
    assert lines[3].startswith("c.onnx: prompt of 1 token at ")
    assert lines[-1] == "1 of 6 tokens agree before the two part"
    done = command("a.onnx", "--compare", "b.onnx", "--prompt-ids", "5", "--tokens", "6")
    assert done.stdout.splitlines()[-1] == "all 6 tokens agree"
    found = json.loads(command("a.onnx", "--compare", "c.onnx", "--prompt-ids", "5", "--tokens", "6", "--json").stdout)
    assert (list(found), found["agreed"]) == (["float", "compiled", "agreed"], 1)
    assert found["float"]["ids"] == following([5], 6)
    assert (found["float"]["model"], found["compiled"]["model"]) == ("a.onnx", "c.onnx")


@pytest.mark.parametrize(("args", "status", "message"), [
    (["a.onnx"], 2, "Give the prompt, by either --prompt TEXT or --prompt-ids"),
    (["a.onnx", "--prompt", "x", "--prompt-ids", "1"], 2, "Give the prompt, by either"),
    (["a.onnx", "--prompt-ids", "1,x"], 2, "'1,x' is no list of ids; write for example --prompt-ids 1,403,407"),
    (["a.onnx", "--prompt-ids", "-1"], 2, "'-1' is no list of ids"),
    (["a.onnx", "--prompt-ids", "11"], 2, "the model's ids go from 0 to 10"),
    (["a.onnx", "--prompt-ids", "1", "--tokens", "0"], 2, "--tokens"),
    (["a.onnx", "--prompt", "x"], 3, "there is no tokenizer tokenizer.json; name the model's"),
    (["absent.onnx", "--prompt-ids", "1"], 3, "check the path"),
    ([str(MODELS / "recurrent" / "model.onnx"), "--prompt-ids", "1"], 3, "export a causal language model"),
    (["a.onnx", "--compare", str(MODELS / "recurrent" / "model.onnx"), "--prompt-ids", "1"], 3, "can't generate"),
])
def test_what_is_refused(command: Run, args: list[str], status: int, message: str) -> None:
    done = command(*args)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in " ".join(done.stderr.split())


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A folder with the decoder's rows as token files; those of evaluation as a stream, too."""
    with np.load(MODELS / "decoder" / "eval.npz") as data:
        rows = np.concatenate([data["input_ids"], data["labels"][:, -1:]], axis=1)
    np.save(tmp_path / "eval_tokens.npy", rows.astype(np.uint16))
    np.save(tmp_path / "stream.npy", rows.reshape(-1))
    with np.load(MODELS / "decoder" / "calib.npz") as data:
        np.savez(tmp_path / "calib_tokens.npz", tokens=data["input_ids"])
    return tmp_path


def test_token_files_are_data(tokens: Path) -> None:
    """The perplexity of a file of rows and of the same tokens in one stream is that of eval.npz."""
    model = MODELS / "decoder" / "model.onnx"
    report = onnxq.compile(model, tokens / "o.onnx", scheme="w8a8", calib=str(tokens / "calib_tokens.npz"), samples=16,
                           eval=str(tokens / "eval_tokens.npy"), metric="perplexity", max_drop="2%", measure=False)
    assert report.ok, report.verdict.failures
    assert report.accuracy is not None
    assert (report.accuracy.float, report.accuracy.rows) == (pytest.approx(15.358, abs=0.01), 128)
    known = onnxq.verify(model, tokens / "o.onnx", data=str(MODELS / "decoder" / "eval.npz"), metric="perplexity")
    stream = onnxq.verify(model, tokens / "o.onnx", data=str(tokens / "stream.npy"), metric="perplexity")
    for found in (known, stream):
        assert found.accuracy is not None
        assert found.accuracy.float == pytest.approx(report.accuracy.float, rel=1e-9)
        assert found.accuracy.compiled == pytest.approx(report.accuracy.compiled, rel=1e-9)
    assert [note for note in report.verdict.notices if "first 127 tokens" in note]
