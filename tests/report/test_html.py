"""The HTML page: well-formed, escaped, self-contained, and usable with thousands of nodes."""

import math
from html.parser import HTMLParser

import pytest

from onnxq.report.html import render
from onnxq.report.report import (
    Accuracy,
    Latency,
    LayerRow,
    NodeRow,
    OutputAccuracy,
    PrunedRow,
    Report,
    Semantic,
    Size,
    Stage,
    Verdict,
)

HOSTILE = "<script>alert('x')</script>&amp;\"'\x1b[31m\x00\ud800"
VOID = {"meta"}


class Page(HTMLParser):
    """What the page holds; the parser undoes escapes, so that a text that was not escaped shows up as tags."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


def node(name, op="MatMul", scheme="w8a8", kernel="QLinearMatMul", reason="it has weights", ms=0.25):
    return NodeRow(name, op, scheme, kernel, kernel, "CPUExecutionProvider", reason, ms)


def full_report():
    return Report(
        "models/in.onnx", "models/out.onnx", "w8a8",
        size=Size(4_000_000, 1_000_000),
        latency=Latency(4.0, 2.0, 2.0, 1.9, 2.1, {"x": [8, 64]}, 2, "calib.npz"),
        accuracy=Accuracy("top1", 0.9, 0.895, 0.005, {"logits": OutputAccuracy(31.25, 0.9991, 0.5)}, "eval.npz", 500,
                          "a note on accuracy"),
        semantic=Semantic(72.5, None, 8),
        nodes=[node("m1"), node("m2"), node("s1", "Softmax", "float", "float", "Softmax stays float"),
               node("b1", "BatchNormalization", "folded", "", "folded into its neighbours")],
        layers=[LayerRow("h1", "MatMul", 41.5, 0.9999, 0.01)],
        pruned=[PrunedRow("w1", ["m1", "m2"], 1000, 0.5, "sparsegpt", 0.0123),
                PrunedRow("w2", ["s1"], 3000, 0.7, "magnitude", None)],
        verdict=Verdict(notices=["do look at this"]),
        environment={"onnxruntime": "1.31", "cpu_flags": ["avx2", "avx512f"]},
        recipe={"version": 1, "scheme": {"name": "w8a8"}},
        stages=[Stage("calibrate", 3.0), Stage("verify", 1.0)])


def test_everything_that_is_known_is_on_the_page():
    text = Page(render(full_report())).text
    for words in ("models/in.onnx", "models/out.onnx", "4.00x smaller", "4.0 MB to 1.0 MB", "2.00x as fast",
                  "4.00 ms to 2.00 ms", "1.90x to 2.10x", "x 8x64", "2 threads", "top1 89.50 %", "0.50 points worse",
                  "500 rows of eval.npz", "a note on accuracy", "31.2 dB", "72.5 dB", "identical",
                  "2 MatMul -> QLinearMatMul", "1 Softmax: Softmax stays float", "folded into its neighbours",
                  "41.5 dB", "do look at this", "avx2, avx512f", "name: w8a8", "3.00 s", "4.0 s in all",
                  "2 weights pruned: 65.0% of 4,000 numbers are 0", "m1, m2", "1.23%", "not observed"):
        assert words in text, words


def test_a_bare_report_is_a_page_too():
    page = Page(render(Report("in.onnx", None, "")))
    assert "not measured" in page.text
    assert "table" not in page.tags


def test_a_failed_check_is_said_in_words():
    report = full_report()
    report.verdict.failures.append("top1 dropped too far")
    text = Page(render(report)).text
    assert "failed" in text
    assert "top1 dropped too far" in text


def test_figures_that_are_not_finite():
    report = full_report()
    report.accuracy = Accuracy("perplexity", 12.0, math.inf, math.inf, {}, "eval.npz", 3)
    assert "no number to compare" in Page(render(report)).text


@pytest.mark.parametrize("place", ["model", "output", "scheme", "node", "op", "reason", "kernel", "provider",
                                   "failure", "notice", "output name", "metric", "note", "data", "stage", "layer",
                                   "environment key", "environment value", "recipe", "input"])
def test_hostile_text_is_escaped(place):
    report = full_report()
    target = report.nodes[0]
    assert report.accuracy is not None
    assert report.latency is not None
    match place:
        case "model" | "output" | "scheme":
            setattr(report, place, HOSTILE)
        case "node":
            target.name = HOSTILE
        case "op" | "reason" | "provider":
            setattr(target, place, HOSTILE)
        case "kernel":
            target.ran_as = target.lowering = HOSTILE
        case "failure":
            report.verdict.failures.append(HOSTILE)
        case "notice":
            report.verdict.notices.append(HOSTILE)
        case "output name":
            report.accuracy.outputs[HOSTILE] = OutputAccuracy(1.0, 1.0, 1.0)
        case "metric" | "note" | "data":
            setattr(report.accuracy, place, HOSTILE)
        case "stage":
            report.stages.append(Stage(HOSTILE, 1.0))
        case "layer":
            report.layers[0].name = HOSTILE
        case "environment key":
            report.environment[HOSTILE] = 1
        case "environment value":
            report.environment["cpu"] = HOSTILE
        case "recipe":
            report.recipe["note"] = HOSTILE
        case "input":
            report.latency.shapes[HOSTILE] = [1]
    html = render(report)
    html.encode("utf-8")  # a lone surrogate would fail
    page = Page(html)
    assert "script" not in page.tags
    assert "alert('x')" in page.text or "alert(''x'')" in page.text  # YAML doubles quotes
    assert "\x1b" not in html
    assert "\x00" not in html


def test_nothing_is_fetched_and_nothing_runs():
    html = render(full_report())
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "action", "srcset"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    for word in ("http://", "https://", "//", "@import", "url("):
        assert word not in html, word


def test_light_and_dark():
    html = render(full_report())
    assert "prefers-color-scheme: dark" in html
    assert "color-scheme: light dark" in html


def test_two_thousand_nodes_are_grouped_and_folded():
    report = full_report()
    report.nodes = [node(f"layer{k}/MatMul") for k in range(1500)]
    report.nodes += [node(f"softmax{k}", "Softmax", "float", "float", "Softmax stays float") for k in range(499)]
    report.nodes += [node("other", "Softmax", "float", "float", "another reason")]
    html = render(report)
    page = Page(html)
    assert "1500 MatMul -> QLinearMatMul" in page.text
    assert "499 Softmax: Softmax stays float" in page.text
    assert "2000 nodes: 1500 quantized, 500 float" in page.text
    assert page.tags.count("details") == 3 + 2  # and the layers, and what was pruned
    assert not any(name == "open" for name, _ in page.attributes)
    assert all(f"layer{k}/MatMul" in html for k in (0, 1499))
    assert len(html) < 1_000_000
