"""Permissive text that every machine has: Python's standard library and installed packages.

A package is read only if its own metadata names a permissive licence (BSD, MIT, Apache-2.0, PSF and
their like); the standard library has the PSF licence. Tests, vendored copies, generated modules,
tables and files that mention the GPL are left out. A module's syntax tree is walked once, for its
documented definitions: what is made of it (prose, dialogues, questions) is made of them.
"""

import ast
import dataclasses
import functools
import importlib.metadata
import re
import sysconfig
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

from jax_eagle.config import ConfigError

MAX_DIGITS = 0.12
"""Share of digits from which on a file is a table, not text."""
_SKIPPED_FOLDERS = {
    "site-packages", "test", "tests", "testing", "idlelib", "lib2to3", "encodings", "turtledemo",
    "_vendor", "vendor", "vendored", "third_party", "_external", "external", "extern",
}  # fmt: skip
_SKIPPED_FILES = re.compile(r"test_.*|.*_tests?\.py|conftest\.py|.*_pb2(_grpc)?\.py|topics\.py")
_SUFFIXES = {".py", ".md", ".rst"}
_COPYLEFT = re.compile(r"GNU (Lesser |Library |Affero )?General Public|\b[AL]?GPL")
_PERMISSIVE = re.compile(
    r"(the )?(MIT|0?BSD|[23]-Clause BSD|Apache|PSF|Python Software Foundation|ISC|zlib|CC0)\b", re.I
)


@dataclasses.dataclass(frozen=True)
class Definition:
    """A documented module, class or function."""

    name: str
    """Dotted, from the module's; a module's own is its whole name."""
    head: str
    """First line, `def ...` or `class ...`, without the colon; empty for a module."""
    doc: str
    code: str
    """Source of a function with its docstring, otherwise empty."""

    @property
    def summary(self) -> str:
        """First paragraph of the docstring in one line."""
        return " ".join(self.doc.split("\n\n")[0].split())

    @property
    def stub(self) -> str:
        """Head and first paragraph: a function that waits for its body."""
        paragraph = self.doc.split("\n\n")[0]
        return f'{self.head}:\n    """{textwrap.indent(paragraph, "    ").lstrip()}\n    """'


@dataclasses.dataclass(frozen=True)
class LibraryFile:
    """A module (.py) or a document."""

    name: str
    """Path below the root of its library, with slashes."""
    text: str

    @property
    def is_module(self) -> bool:
        """Whether it is Python code."""
        return self.name.endswith(".py")

    @functools.cached_property
    def definitions(self) -> tuple[Definition, ...]:
        """The documented ones, in the order of the text; none of a document or of broken code."""
        if not self.is_module:
            return ()
        try:
            tree = ast.parse(self.text)
        except (SyntaxError, ValueError):
            return ()
        module = self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return tuple(_definitions(tree, module, self.text.split("\n")))


def library_files(packages: Iterable[str] = ()) -> list[LibraryFile]:
    """Files of the standard library and of installed packages, ordered by a hash of their names.

    The order mixes libraries and is the same everywhere; a file keeps its place among the others
    when packages are added.

    Raises:
      ConfigError: a package that is not installed, or whose licence is not permissive.
    """
    files = [*_standard_library(), *_language_reference()]
    for package in packages:
        files += _package(package)
    distinct = {file.name: file for file in files if _is_wanted(file.text)}
    return sorted(distinct.values(), key=lambda file: zlib.crc32(file.name.encode()))


def licence(package: str) -> str:
    """What the metadata of an installed package names as its licence.

    Raises:
      ConfigError: it is not installed, or names one that is not permissive, or none.
    """
    try:
        metadata = importlib.metadata.metadata(package).json
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"package {package!r} is not installed here: install it first") from None
    classifiers = metadata.get("classifier", [])
    of_classifiers = [c.split(" :: ")[-1] for c in classifiers if c.startswith("License ::")]
    # The field may hold the whole text of the licence, whose first line is then its name.
    field = str(metadata.get("license", "")).strip().split("\n")[0]
    named = str(metadata.get("license_expression") or " AND ".join(of_classifiers) or field)
    parts = [part for part in re.split(r"\s+(?:AND|OR)\s+|[()]", named) if part.strip()]
    if not parts or not all(_PERMISSIVE.match(part.strip()) for part in parts):
        raise ConfigError(
            f"package {package!r}: its licence is {named or 'not named'!r}, expected BSD, MIT, "
            "Apache-2.0, PSF or the like: leave it out"
        )
    return named


def _definitions(
    node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str, lines: Sequence[str]
) -> Iterator[Definition]:
    doc = ast.get_docstring(node)
    if doc:
        yield Definition(name, _head(node), doc, _code(node, lines))
    if isinstance(node, ast.FunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("__"):
            yield from _definitions(child, f"{name}.{child.name}", lines)


def _head(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"def {node.name}({ast.unparse(node.args)}){returns}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}" + (f"({bases})" if bases else "")
    return ""


def _code(node: ast.AST, lines: Sequence[str]) -> str:
    if not isinstance(node, ast.FunctionDef):
        return ""
    return textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).strip()


def _standard_library() -> Iterator[LibraryFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        yield from _read(path, path.relative_to(root))


def _language_reference() -> Iterator[LibraryFile]:
    """What `help()` tells about keywords and topics: chapters of Python's reference manual."""
    from pydoc_data.topics import topics

    for topic, text in topics.items():
        yield LibraryFile(f"pydoc_data/topics/{topic}.rst", text.strip())


def _package(package: str) -> Iterator[LibraryFile]:
    licence(package)
    distribution = importlib.metadata.distribution(package)
    readme = distribution.metadata.json.get("description")
    if isinstance(readme, str) and readme.strip():
        yield LibraryFile(f"{package}/README.md", readme.strip())
    for path in distribution.files or []:
        if ".." not in path.parts and not path.parts[0].endswith(".dist-info"):
            yield from _read(Path(str(path.locate())), path)


def _is_wanted(text: str) -> bool:
    digits = sum(map(text.count, "0123456789"))
    return digits < MAX_DIGITS * len(text) and not _COPYLEFT.search(text)


def _read(path: Path, name: PurePath) -> Iterator[LibraryFile]:
    """The file, unless it is one of those left out, empty, or not UTF-8."""
    skipped = _SKIPPED_FOLDERS & set(name.parts) or _SKIPPED_FILES.fullmatch(name.name)
    if skipped or name.suffix not in _SUFFIXES:
        return
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (UnicodeDecodeError, FileNotFoundError):
        return
    if text:
        yield LibraryFile(name.as_posix(), text)
