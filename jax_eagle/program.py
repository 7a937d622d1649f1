"""Running a command line program: bad input ends with one line, not with a stack trace."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

DEBUG_VARIABLE = "JAX_EAGLE_DEBUG"


def run_program(
    main: typer.Typer | Callable[..., Any], name: str, arguments: list[str] | None = None
) -> None:
    """Runs a typer app, or a function as one, and exits with its code.

    Bad input gives one line on stderr and exit code 2, anything unexpected one line and code 1.
    The environment variable JAX_EAGLE_DEBUG (or `context.obj["debug"]`, which an option may set)
    lets the stack trace through.

    Args:
      name: what the error line begins with.
      arguments: None: those of the process.
    """
    if not isinstance(main, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(main)
        main = app
    shared = {"debug": bool(os.environ.get(DEBUG_VARIABLE))}
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="replace")  # a letter the terminal lacks must not end the run
    try:
        code = main(arguments, prog_name=name, standalone_mode=False, obj=shared)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        if shared["debug"]:
            raise
        # Usage errors of typer, or of click for its older versions, say how to print themselves.
        usage = getattr(error, "format_message", None)
        expected = usage or isinstance(error, ValueError | OSError | NotImplementedError)
        text = " ".join((usage() if usage else str(error)).split()) or type(error).__name__
        hint = "" if expected else f" ({type(error).__name__}; {DEBUG_VARIABLE}=1 shows where)"
        print(f"{name}: error: {text}{hint}", file=sys.stderr)
        sys.exit(2 if expected else 1)
    sys.exit(code if isinstance(code, int) else 0)
