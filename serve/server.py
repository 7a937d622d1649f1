"""`python -m serve.server`: an OpenAI-compatible server with EAGLE tree speculation.

Nothing heavy is imported for `--help`, `--explain`, `--version` and bad flags.
"""

import asyncio
import importlib.metadata
import sys
from collections.abc import Sequence

from .config import parse
from .features import explain

PROGRAM = "serve.server"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program; `arguments` None: those of the process."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(2)
    if command.show == "explain":
        print(explain())
    elif command.show == "version":
        print(f"jax-eagle {importlib.metadata.version('jax-eagle')}")
    else:
        from jax_eagle.program import run_program

        from . import lifecycle
        from .loading import load

        def serve() -> None:
            asyncio.run(lifecycle.run(command.config, load))

        run_program(serve, PROGRAM, [])


if __name__ == "__main__":
    main()
