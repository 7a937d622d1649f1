"""`python -m train.export RUN --out DIR`: the draft of a run as a folder for us or for others."""

from pathlib import Path
from typing import Annotated

import typer

from jax_eagle import Draft, load_target
from jax_eagle.checkpoint import eagle, orbax, profiles
from jax_eagle.checkpoint.files import read_json
from jax_eagle.config import ConfigError
from jax_eagle.hub import resolve
from jax_eagle.load import check_fit, dtype_name, read_draft
from jax_eagle.program import run_program

from .checkpoint import load_draft

_WRITERS = {"safetensors": eagle.save, "orbax": orbax.save_draft}


def export(draft: Draft, folder: Path, form: str) -> None:
    """Writes a draft in our own form, as "safetensors" or "orbax".

    Raises:
      ConfigError: another form.
    """
    if form not in _WRITERS:
        raise ConfigError(f"format {form!r}: expected {' or '.join(_WRITERS)}")
    _WRITERS[form](draft, folder)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    run: Annotated[Path | None, typer.Argument(help="Folder of a training run.")] = None,
    draft: Annotated[
        str | None, typer.Option(help="Convert this folder, of any profile, not a run's draft.")
    ] = None,
    which: Annotated[
        str, typer.Option(help="Checkpoint of the run: best (by acceptance length) or latest.")
    ] = "best",
    form: Annotated[
        str, typer.Option("--format", help="safetensors, or orbax (profile own only).")
    ] = "safetensors",
    profile: Annotated[str, typer.Option(help="Who reads it: one of the names above.")] = "own",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; else float32, or that of --draft."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The target: the draft is checked against it, and its context length and first "
            "token are written. Under this name speculators will look for it."
        ),
    ] = None,
    with_embedding: Annotated[
        bool, typer.Option("--with-embedding", help="Store the target's embedding as well.")
    ] = False,
    numbering: Annotated[
        str,
        typer.Option(
            help="Tapped layers in profile eagle3: enter (vLLM reads it), output (SGLang and "
            "NVIDIA read it) or both, each in its place."
        ),
    ] = "both",
    read_numbering: Annotated[
        str | None,
        typer.Option(help="How --draft numbers them, where its config misleads: enter or output."),
    ] = None,
    first_layer: Annotated[
        str, typer.Option(help="Name of the first layer in profile eagle3: midlayer or layers.0.")
    ] = "midlayer",
) -> None:
    """Writes the draft of a run, or converts a draft, for us or for other programs.

    A profile has the names, shapes and config fields that its readers want:

    - own: everything here; keeps all that a draft is

    - eagle-llama-vllm: vLLM and the official code, EAGLE-1 and EAGLE-2

    - eagle-llama-sglang: the same for SGLang, with its map of hot tokens

    - eagle-llama4: vLLM, EAGLE with Llama 4 blocks

    - eagle3: vLLM, SGLang, the official code, llama.cpp's converter

    - speculators: vLLM, EAGLE-3 by way of the speculators library

    A draft that a profile cannot hold is refused with the reason.
    """
    if form != "safetensors" and profile != "own":
        raise ConfigError(f"format {form!r}: profile {profile} is written as safetensors")
    source = None if target is None else load_target(target, dtype=dtype)
    if (run is None) == (draft is None):
        raise ConfigError("expected the folder of a run or --draft, one of them")
    if run is not None:
        found = _of_run(run, which, dtype)
    else:
        path = resolve(draft or "")
        kept = dtype_name(dtype or _stored_dtype(path))
        found = read_draft(path, dtype=kept, target=source, numbering=read_numbering)
    if source is not None:
        check_fit(found, source, str(run or draft))
    if profile == "own" and not with_embedding:
        export(found, out, form)
    else:
        profiles.save(
            found,
            out,
            profile,
            target=source,
            with_embedding=with_embedding,
            numbering=numbering,
            first_layer=first_layer,
            verifier=target,
        )
    print(f"{out}: profile {profile}, {found.config.layer.dtype}")


def _of_run(run: Path, which: str, dtype: str | None) -> Draft:
    if which not in ("best", "latest"):
        raise ConfigError(f"which {which!r}: expected best or latest")
    return load_draft(run, which=which, dtype=dtype_name(dtype or "float32"))


def _stored_dtype(folder: Path) -> str:
    """That of a draft folder's weights, as its config has it."""
    if folder.is_file():
        return "float32"  # refused by the reader, with the reason
    fields = read_json(folder / "config.json")
    return fields.get("torch_dtype") or fields.get("dtype") or "float32"


if __name__ == "__main__":
    run_program(main, "train.export")
