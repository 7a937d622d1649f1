"""The layout of the project: what ships, who imports whom, what stays in one place."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import serve
import train

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "jax_eagle", "train", "serve")
# What moves between JAX versions: the Triton and Mosaic modules of JAX, and Triton itself.
KERNEL_MODULE = re.compile(r"(jax|jaxlib)\.(\w+\.)*\w*(triton|mosaic)|(triton|jax_triton)(\.|$)")


def source_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def imported_modules(path: Path) -> Iterator[str]:
    """Every module or member that a file imports by an absolute name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", [train, serve], ids=lambda package: package.__name__)
def test_programs_come_from_this_checkout(package):
    assert package.__file__ is not None
    assert Path(package.__file__).resolve().parent == REPOSITORY / package.__name__
    # Anything but a docstring would run twice under `python -m`.
    (docstring,) = ast.parse(Path(package.__file__).read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)


def test_wheels_list_exactly_the_four_packages():
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    include = pyproject["tool"]["setuptools"]["packages"]["find"]["include"]
    assert sorted(include) == sorted(
        f"{package}{end}" for package in PACKAGES for end in ("", ".*")
    )
    folders = [path.name for path in REPOSITORY.iterdir() if path.name.isidentifier()]
    shipped = [name for name in folders if any(fnmatch(name, pattern) for pattern in include)]
    assert sorted(shipped) == sorted(PACKAGES)


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in source_files(*PACKAGES)}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_tests_are_flat():
    assert [path for path in source_files("tests") if path.parent.name != "tests"] == []
    assert not (REPOSITORY / "tests" / "__init__.py").exists()


def test_only_compat_names_the_triton_and_mosaic_modules():
    compat = REPOSITORY / "pallas_kernels" / "compat.py"
    offenders = {
        f"{path.relative_to(REPOSITORY)}: {module}"
        for path in source_files(*PACKAGES, "benchmarks", "tests")
        if path != compat
        for module in imported_modules(path)
        if KERNEL_MODULE.match(module)
    }
    assert offenders == set()


def test_kernels_need_jax_alone():
    """Beside JAX itself only its notation: einops and jaxtyping."""
    allowed = {"jax", "einops", "jaxtyping", "pallas_kernels", *sys.stdlib_module_names}
    found = {
        module.split(".")[0]
        for path in source_files("pallas_kernels")
        for module in imported_modules(path)
    }
    assert found - allowed == set()


def test_import_directions_hold():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [lint_imports, "--no-cache", "--no-logo"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
