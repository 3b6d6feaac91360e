"""onnxq generate."""

from __future__ import annotations

from typing import Any

import click

from onnxq.cli.options import POSITIVE, debug_option, json_option, threads_option
from onnxq.cli.output import print_json, print_piece, print_text, say
from onnxq.report import terminal, wording


def _ids(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """The ids of 1,2,3."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise click.BadParameter(f"{value!r} is no list of ids; write for example --prompt-ids 1,403,407")
    return [int(part) for part in parts]


@click.command("generate", short_help="Let a language model go on with a prompt, for a quick look.")
@click.argument("model", metavar="MODEL")
@click.option("--prompt", metavar="TEXT", help="What to go on with.")
@click.option("--prompt-ids", metavar="ID[,ID]", callback=_ids,
              help="The same as ids of tokens; without --tokenizer ids are printed, too.")
@click.option("--tokenizer", metavar="FILE", help="The model's tokenizer.json.  [default: the one beside MODEL]")
@click.option("--tokens", type=POSITIVE, metavar="N", default=64, show_default=True,
              help="Tokens that are made at most.")
@click.option("--stop", type=click.IntRange(min=0), metavar="ID", multiple=True,
              help="End with this token, too, beside those that are known to end a text; may be repeated.")
@click.option("--compare", "other", metavar="COMPILED",
              help="Let this model go on with the same prompt, and tell how many tokens agree.")
@threads_option
@json_option
@debug_option
def generate_text(model: str, prompt: str | None, prompt_ids: list[int] | None, other: str | None,
                  threads: int | None, as_json: bool, **options: Any) -> None:
    """Let MODEL, a causal language model, go on with a prompt: the likeliest token each time, with the key/value cache
    if it has one. The text goes to stdout as it comes, tokens per second to stderr; the first run of a session, which
    the prompt's is, also sets the model up.

    Inputs are known by the names that exporters give them: input_ids, attention_mask, position_ids, past_key_values.*
    or past_key_*. The end of a text is known from the tokenizer, and from generation_config.json, config.json or
    genai_config.json beside MODEL.

    \b
    Examples:
      onnxq generate model.onnx --prompt 'Once upon a time'
      onnxq generate model.onnx --prompt-ids 1,403,407 --tokens 20
      onnxq generate model.onnx --compare model.w8a8.onnx --prompt 'def main():' --threads 2
    """
    from onnxq import generation

    given = prompt if prompt is not None else prompt_ids
    if given is None or (prompt is not None and prompt_ids is not None):
        raise click.UsageError("Give the prompt, by either --prompt TEXT or --prompt-ids ID[,ID].")
    options |= {"threads": threads or 0}
    if other is not None:
        first, second, agreed = generation.compare(model, other, given, **options)
        found = {"float": first.to_dict(), "compiled": second.to_dict(), "agreed": agreed}
        print_json(found) if as_json else print_text(terminal.continuations(found))
    elif as_json:
        print_json(generation.generate(model, given, **options).to_dict())
    else:
        made = generation.generate(model, given, show=lambda text: print_piece(wording.printable(text)), **options)
        print_piece("\n")
        say(wording.generated(made.to_dict()))
