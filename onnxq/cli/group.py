"""The command `onnxq`, and what every error of its commands becomes."""

from __future__ import annotations

import sys
import traceback
from typing import Any, NoReturn

import click

from onnxq.cli.options import DEBUG
from onnxq.cli.output import FATE, forget_output, say
from onnxq.errors import OnnxqError

INTERNAL, INTERRUPTED, PIPE_CLOSED = 70, 130, 141  # 141: what a shell reports for a program that SIGPIPE ended
_NAMES = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> None:
    """The command `onnxq`; ends the process with its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal can't show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="onnxq")


class Commands(click.Group):
    """A group that turns every exception into one line on stderr and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order in which they are used, not the alphabet's."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except OnnxqError as e:
            _end(ctx, f"Error: {e}", e.exit_code)
        except KeyboardInterrupt:
            _end(ctx, f"interrupted{ctx.meta.get(FATE, '')}", INTERRUPTED)
        except BrokenPipeError:
            forget_output()
            ctx.exit(PIPE_CLOSED)
        except Exception as e:
            _end(ctx, f"Error: onnxq itself failed ({type(e).__name__}: {e}); please report this with what the same "
                      "command prints with --debug", INTERNAL)


def _end(ctx: click.Context, message: str, status: int) -> NoReturn:
    if ctx.meta.get(DEBUG):
        click.echo(traceback.format_exc(), err=True, nl=False)
    say(" ".join(message.split()), "red")
    ctx.exit(status)


@click.group(cls=Commands, context_settings=_NAMES)
@click.version_option(package_name="onnxq", message="%(prog)s %(version)s")
def cli() -> None:
    """Quantize ONNX models, and measure what came of it.

    \b
    Examples:
      onnxq compile model.onnx --calib calib.npz
      onnxq analyze model.onnx --calib calib.npz
      onnxq sweep model.onnx --scheme w4a16 --vary group_size=32,64,128
      onnxq verify model.onnx model.w8a8.onnx --data eval.npz --metric top1
      onnxq bench model.onnx model.w8a8.onnx --threads 2
      onnxq check model.w8a8.onnx --target cuda
      onnxq pack model.w8a8.onnx -o packed.onnx
      onnxq export model.w8a8.onnx --sample eval.npz
      onnxq generate model.onnx --prompt 'Once upon a time'
      onnxq schemes
      onnxq targets

    \b
    Exit status:
      0    done, and every check held
      1    a check failed; the result is written all the same
      2    wrong usage
      3    a model, data or output that can't be used
      70   an error in onnxq itself
      130  interrupted
    """
