"""Text from the standard library and from packages whose licence permits it."""

import ast
import zlib
from pathlib import Path

import pytest

from jax_eagle.config import ConfigError
from train.library import LibraryFile, library_files, licence
from train.library_text import chats, reference, texts

CODE = '''"""A module.

More of it.
"""

import os


class Box(dict):
    """Holds things."""

    @property
    def size(self, unit: str = "m") -> float:
        """Volume of the box
        in a unit.

        Not cached.
        """
        def helper():
            """Not listed."""
        return len(self) * 1.0  # a line that makes this function as long as one in a dialogue is

    def __len__(self):
        """Special."""

    def bare(self):
        pass
'''
PROSE = '"""' + "This module has much to say and little to do. " * 20 + '"""\n\nx = 1\n'


def install(folder: Path, name: str, *metadata: str, **files: str) -> None:
    """Puts a distribution into a folder of `sys.path`."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("\n".join(
        ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *metadata, "", "# Read me\n"]
    ))  # fmt: skip
    paths = [f"{path.replace('__', '/')}.py" for path in files]
    for path, text in zip(paths, files.values(), strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    record = [f"{path},," for path in [*paths, f"{info.name}/METADATA", "../../bin/tool.py"]]
    (info / "RECORD").write_text("\n".join(record))


@pytest.mark.parametrize(
    "metadata",
    [
        "License-Expression: MIT",
        "License-Expression: BSD-3-Clause AND (0BSD OR Apache-2.0)",
        "License: 3-Clause BSD License",
        "License: Apache License\n                   Version 2.0",
        "License: Copyright (c) Somebody\nClassifier: License :: OSI Approved :: BSD License",
        "Classifier: License :: OSI Approved :: Python Software Foundation License",
    ],
)
def test_permissive_licences(tmp_path, monkeypatch, metadata):
    install(tmp_path, "woodwork", metadata)
    monkeypatch.syspath_prepend(tmp_path)
    assert licence("woodwork")


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ("License-Expression: GPL-3.0-only", "GPL-3.0-only"),
        ("License-Expression: MIT AND MPL-2.0", "MPL-2.0"),
        ("License: Proprietary\nClassifier: License :: Other/Proprietary License", "Proprietary"),
        ("Classifier: License :: OSI Approved :: BSD License\n"
         "Classifier: License :: OSI Approved :: GNU General Public License (GPL)", "GNU"),
        ("License: Copyright (c) Somebody", "Copyright"),
        ("Summary: nothing said", "not named"),
    ],
)  # fmt: skip
def test_other_licences_are_refused_by_name(tmp_path, monkeypatch, metadata, named):
    install(tmp_path, "woodwork", metadata)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"package 'woodwork': its licence is '.*{named}"):
        library_files(["woodwork"])


def test_a_package_that_is_not_there():
    with pytest.raises(ConfigError, match="'no-such-wood' is not installed"):
        library_files(["no-such-wood"])


def test_files_of_a_package_and_of_the_standard_library(tmp_path, monkeypatch):
    install(
        tmp_path, "woodwork", "License-Expression: MIT", woodwork__box=CODE, woodwork__empty="",
        woodwork__tests__box=CODE, woodwork___vendor__other=CODE, woodwork__test_box=CODE,
        woodwork__free="# GNU General Public License\n" + CODE, woodwork__table="x = [1, 2, 3]\n",
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    alone, both = library_files(), library_files(["woodwork"])
    added = {file.name: file.text for file in both if file not in alone}
    assert added == {"woodwork/README.md": "# Read me", "woodwork/box.py": CODE.strip()}
    assert [file for file in both if file.name not in added] == alone
    names = [file.name for file in alone]
    assert names == sorted(set(names), key=lambda name: zlib.crc32(name.encode()))
    assert {"json/decoder.py", "pydoc_data/topics/lambda.rst"} <= set(names)
    assert not any("test" in Path(name).parts for name in names)


def test_definitions_of_a_module():
    file = LibraryFile("box/__init__.py", CODE)
    module, box, size = file.definitions
    assert (module.name, module.head, module.summary) == ("box", "", "A module.")
    assert (box.name, box.head, box.code) == ("box.Box", "class Box(dict)", "")
    assert size.name == "box.Box.size"
    assert size.head == "def size(self, unit: str='m') -> float"
    assert size.summary == "Volume of the box in a unit."
    (function,) = ast.parse(size.code).body
    assert isinstance(function, ast.FunctionDef) and len(function.body) == 3
    (stub,) = ast.parse(size.stub).body
    assert isinstance(stub, ast.FunctionDef) and len(stub.body) == 1
    assert ast.get_docstring(stub) == "Volume of the box\nin a unit."
    assert LibraryFile("box.py", "def (").definitions == ()
    assert LibraryFile("box.md", CODE).definitions == ()


def test_prose_comes_first_and_no_file_twice():
    files = [
        LibraryFile("a.py", "x = 1"),
        LibraryFile("b.md", "# Wood"),
        LibraryFile("c.py", PROSE),
        LibraryFile("d.py", "y = 2"),
    ]
    lines = list(texts(files))
    assert [line["name"] for line in lines] == ["b.md", "c.py", "a.py", "d.py"]
    assert [line["text"] for line in lines[::2]] == ["# Wood", "x = 1"]
    assert lines[1]["text"].startswith("c\n\nThis module has much to say")
    assert "x = 1" not in lines[1]["text"]
    assert reference(files[0]) == ""


def test_dialogues_ask_for_a_function_and_show_its_source():
    (line,) = chats([LibraryFile("box.py", CODE)])
    user, assistant = line["messages"]
    assert line["id"] == "box.Box.size"
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert "Volume of the box" in user["content"]
    assert (
        assistant["content"].startswith("```python\ndef size(self") and "1.0" not in user["content"]
    )
    assert list(chats([LibraryFile("box.py", CODE)])) == [line]
