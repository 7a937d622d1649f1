"""`python -m train.export`: the draft of a run's newest checkpoint as a folder for `load_draft`."""

from pathlib import Path
from typing import Annotated

import typer

from jax_eagle import Draft
from jax_eagle.checkpoint import eagle, orbax
from jax_eagle.config import ConfigError
from jax_eagle.program import run_program

from .checkpoint import load_draft

_WRITERS = {"safetensors": eagle.save, "orbax": orbax.save_draft}


def export(draft: Draft, folder: Path, form: str) -> None:
    """Writes a draft as "safetensors" or "orbax".

    Raises:
      ConfigError: another form.
    """
    if form not in _WRITERS:
        raise ConfigError(f"format {form!r}: expected {' or '.join(_WRITERS)}")
    _WRITERS[form](draft, folder)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the run.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    form: Annotated[str, typer.Option("--format", help="safetensors or orbax.")] = "safetensors",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Exports the newest checkpoint of a run."""
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype {dtype!r}: expected float32 or bfloat16")
    export(load_draft(checkpoint, dtype=dtype), out, form)


if __name__ == "__main__":
    run_program(main, "train.export")
