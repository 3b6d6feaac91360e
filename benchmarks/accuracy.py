"""python -m benchmarks.accuracy: what each step towards float's accuracy is worth, model by model.

Every model is compiled with nothing, with each step alone, with all of them, and with all but one, without measuring
kernels, and scored deployed (a plain default session of this machine's processor). MODEL+outliers is MODEL with outlier
channels planted (benchmarks/outliers.py). Tables go to stdout, progress to stderr; --markdown and --json write files.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import goals, layout, models, outliers, runs
from benchmarks import options as common
from benchmarks.runs import Settings

GOALS = Path(__file__).parent / "accuracy.yaml"
PLANTED = "+outliers"
STATIC, PER_TOKEN = "w8a8", "w8a8-dynamic"

# a step's name -> the keys of a recipe that switch it on; all of it off is the plain way of other tools
_OFF: dict[str, Any] = {"outliers": {"method": "none"}, "ranges": "minmax", "rounding": "nearest",
                        "bias_correction": False}
STEPS: dict[str, dict[str, Any]] = {
    "ranges": {"ranges": "auto"},
    "smoothing": {"outliers": {"method": "smooth", "split": False}},
    "smoothing, split": {"outliers": {"method": "smooth"}},
    "GPTQ": {"rounding": "auto"},
    "bias": {"bias_correction": True},
}
_ALL = {key: value for name, step in STEPS.items() if name != "smoothing" for key, value in step.items()}


def variants(scheme: str) -> dict[str, dict[str, Any]]:
    """Name -> recipe, as plain data, from nothing to everything and everything but one."""
    steps = STEPS if scheme == STATIC else {name: STEPS[name] for name in ("smoothing", "smoothing, split", "GPTQ")}
    found = {"plain": dict(_OFF)}
    found |= {name: {**_OFF, **step} for name, step in steps.items()}
    if scheme == STATIC:
        found |= {f"ranges {method}": {**_OFF, "ranges": method} for method in ("mse", "entropy", "percentile")}
    found["all"] = dict(_ALL)
    found |= {f"all but {name}": {**_ALL, **{key: _OFF[key] for key in step}}
              for name, step in steps.items() if name != "smoothing"}
    found["all but split"] = {**_ALL, **STEPS["smoothing"]}
    return {name: _recipe(scheme, keys) for name, keys in found.items()}


def _recipe(scheme: str, keys: dict[str, Any]) -> dict[str, Any]:
    ranges = keys.pop("ranges")
    return {"version": 1, "scheme": scheme, "calibration": {"ranges": ranges}, **keys}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write; status 1 when a goal was missed (never for a smoke run), 2 for wrong usage."""
    parser = common.parser("accuracy", __doc__)
    parser.add_argument("--scheme", nargs="+", default=[STATIC, PER_TOKEN], choices=[STATIC, PER_TOKEN],
                        help="of these schemes alone")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="these variants alone, e.g. plain all")
    options = parser.parse_args(arguments)
    common.check_folders(parser, options.json, options.markdown)
    settings = Settings.make(options.threads, options.quick)
    with TemporaryDirectory(prefix="onnxq-bench-") as scratch:
        try:
            cases = find(options.models, options.only or [], Path(scratch))
        except ValueError as error:
            parser.error(str(error))
        found: list[dict[str, Any]] = []
        for case in cases:
            for scheme in options.scheme:
                found += run_case(case, scheme, options.variants, settings)
                outcomes = check(found)
                _write(found, outcomes, options, settings)  # again for each model: the last ones may be interrupted
    print(f"\n{_text(found, outcomes)}")
    return 1 if any(o.met is False for o in outcomes) and not settings.quick else 0


def _text(found: list[dict[str, Any]], outcomes: list[goals.Outcome]) -> str:
    return "\n\n".join([markdown(found), *(["### Goals", layout.goals(outcomes)] if outcomes else [])])


def _write(found: list[dict[str, Any]], outcomes: list[goals.Outcome], options: Any, settings: Settings) -> None:
    if options.markdown is not None:
        options.markdown.write_text(_text(found, outcomes), encoding="utf-8")
    if options.json is not None:
        answer = {"environment": common.where(), "settings": dataclasses.asdict(settings), "rows": found,
                  "goals": [dataclasses.asdict(o) for o in outcomes]}
        options.json.write_text(json.dumps(common.finite(answer), indent=1) + "\n", encoding="utf-8")


def check(rows: Sequence[dict[str, Any]]) -> list[goals.Outcome]:
    """The goals of the models and schemes that ran, held against the variant with everything."""
    made = [runs.Row(row["model"], row["scheme"], row["metric"], 0, score=row.get("score", {}),
                     error=row.get("error", "")) for row in rows if row["variant"] == "all"]
    ran = {(row.model, row.tool) for row in made}
    return goals.check([g for g in goals.read(GOALS) if (g.model, g.tool) in ran], made, [])


def find(folder: Path | None, only: Sequence[str], scratch: Path) -> list[models.Case]:
    """The cases, those with planted outliers where they are named. Raises ValueError for names that there are not."""
    plain = [name for name in only if not name.endswith(PLANTED)]
    cases = models.find(folder, plain, scratch, ()) if plain or not only else []
    for name in (name for name in only if name.endswith(PLANTED)):
        case = models.find(folder, [name.removesuffix(PLANTED)], scratch)[0]
        output = scratch / f"{name}.onnx"
        outliers.plant(case.model, output)
        cases.append(dataclasses.replace(case, name=name, model=output))
    return cases


def run_case(case: models.Case, scheme: str, wanted: Sequence[str] | None, settings: Settings) -> list[dict[str, Any]]:
    """Each variant of one model: what benchmarks.scoring says of it, or an `error`."""
    rows = []
    with TemporaryDirectory(prefix="onnxq-bench-") as name:
        folder = Path(name)
        for variant, recipe in variants(scheme).items():
            if wanted and variant not in wanted:
                continue
            common.say(f"{case.name}, {scheme}: {variant}")
            answer = runs.call("variant", folder, settings, case=case.to_dict(), recipe=recipe,
                               output=str(folder / "compiled.onnx"), kept=str(folder / f"{scheme}.kept"),
                               threads=settings.threads, samples=settings.samples, limit=settings.limit)
            rows.append({"model": case.name, "scheme": scheme, "variant": variant, "metric": case.scored_by, **answer})
            common.say(f"  {_cell(rows[-1])}")
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each scheme: variants down, models across."""
    parts = []
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        of_scheme = [row for row in rows if row["scheme"] == scheme]
        names = list(dict.fromkeys(row["model"] for row in of_scheme))
        cells = {(row["variant"], row["model"]): _cell(row) for row in of_scheme}
        heads = [f"{name}: {_figure(next(r for r in of_scheme if r['model'] == name))}" for name in names]
        lines = [f"| {scheme} | {' | '.join(heads)} |", "| --- " * (len(names) + 1) + "|"]
        lines += [f"| {variant} | {' | '.join(cells.get((variant, name), '') for name in names)} |"
                  for variant in dict.fromkeys(row["variant"] for row in of_scheme)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _figure(row: dict[str, Any]) -> str:
    """What a model's column shows."""
    return {"perplexity": "perplexity ratio", "spearman": "cosine mean / least, drop",
            "top1": "top-1 drop in points, same class as float"}.get(row["metric"], f"{row['metric']} drop, SQNR")


def _cell(row: dict[str, Any]) -> str:
    if "error" in row:
        return "failed"
    score = row["score"]
    if row["metric"] == "perplexity":
        return f"{score['ratio']:.4f}x"
    if "pooled_cosine" in score:
        return f"{score['pooled_cosine']:.4f} / {score['pooled_cosine_min']:.4f}, {score['drop']:.4f}"
    if "agreement" in score:
        return f"{100 * score['drop']:.2f}, {100 * score['agreement']:.1f} %"
    decibels = "identical" if score["sqnr_db"] is None else f"{score['sqnr_db']:.1f} dB"
    return f"{score['drop']:.4f}, {decibels}"


if __name__ == "__main__":
    sys.exit(main())
