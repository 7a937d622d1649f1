"""`python -m serve.server`: an OpenAI-compatible server with EAGLE tree speculation.

Nothing heavy is imported for `--help`, `--explain`, `--version` and bad flags.
"""

import asyncio
import importlib.metadata
import os
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

        from . import follower, lifecycle
        from .loading import load

        def serve() -> None:
            if command.config.node_rank:
                follower.run(command.config)
            else:
                asyncio.run(lifecycle.run(command.config, load))

        try:
            run_program(serve, PROGRAM, [])
        except SystemExit as end:
            if command.config.nnodes > 1:  # What JAX does at exit waits for processes that are gone
                os._exit(end.code if isinstance(end.code, int) else 1)
            raise


if __name__ == "__main__":
    main()
