"""A frozen dataclass as command line flags and as a YAML file.

Every field made by `flag` is one flag and one key: `max_num_seqs` is `--max-num-seqs 8` on the
command line, `max-num-seqs: 8` or `max_num_seqs: 8` in the file. A tuple is a flag that may be
repeated, or a list. Values are checked by the field's type; range and choices by `check`.
"""

import argparse
import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, NoReturn

import yaml

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def flag(default: Any, group: str, text: str, *aliases: str, **more: Any) -> Any:
    """A field that is a flag.

    Args:
      group: heading in the help.
      more: `least` and `most`, `choices`, or `parse`: from a flag's text or a file's value.
    """
    metadata = {"group": group, "help": text, "aliases": aliases, **more}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def check(config: Any) -> None:
    """Raises ValueError for a field out of its range or choices."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), flag_of(field.name)
        least, most = (field.metadata.get(key) for key in ("least", "most"))
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
        for number in value if isinstance(value, tuple) else (value,):
            if least is None or number is None or least <= number <= (most or math.inf):
                continue
            limits = f"{least} or more" if most is None else f"from {least} to {most}"
            raise ValueError(f"{name} is {number}, expected {limits}")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors: one line, like those of all our programs.

    What is not given is not in the result, so that a file can give it.
    """

    def __init__(self, cls: type, **options: Any):
        """`cls` is the dataclass; its fields become flags in their groups."""
        super().__init__(
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.about = self.add_argument_group("about")
        groups: dict[str, Any] = {}
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            title = field.metadata["group"]
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            _add(groups[title], field, hints[field.name])

    def error(self, message: str) -> NoReturn:
        """Bad usage."""
        raise ValueError(f"{message} (--help lists the flags)")


def _add(group: Any, field: dataclasses.Field, hint: Any) -> None:
    """One flag; its value stays text until `read_value`."""
    text, default = field.metadata["help"].replace("%", "%%"), field.default
    if default is not None and isinstance(default, bool | int | float | str):
        text += f" (default: {('on' if default else 'off') if hint is bool else default})"
    options: dict[str, Any] = {"dest": field.name, "help": text}
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        choices = field.metadata.get("choices")
        kind = {str: "TEXT", int: "N", float: "X"}.get(_kind(hint), "JSON")
        options["metavar"] = "|".join(choices) if choices else kind
        if typing.get_origin(hint) is tuple:
            options["action"] = "append"
    group.add_argument(flag_of(field.name), *field.metadata["aliases"], **options)


def read_file(cls: type, path: Path) -> dict[str, Any]:
    """The fields of `cls` in a YAML file.

    Raises:
      ValueError: no such file, not YAML, an unknown key, or a value of the wrong type.
    """
    where = f"--config {path}"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected keys and values, found {tree!r}")
    names, values = {field.name for field in dataclasses.fields(cls)}, {}
    for key, value in tree.items():
        name = str(key).replace("-", "_")
        if name not in names:
            known = ", ".join(sorted(name.replace("_", "-") for name in names))
            raise ValueError(f"{where}: unknown key {key!r}, expected one of {known}")
        values[name] = read_value(cls, name, value, f"{where}: {key}")
    return values


def read_value(cls: type, name: str, value: Any, where: str) -> Any:
    """`value`, the text of a flag or out of YAML, as the field `name` of `cls`.

    Raises:
      ValueError: it is of another type; the message begins with `where`.
    """
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if parse := field.metadata.get("parse"):
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
    hint = typing.get_type_hints(cls)[name]
    if value is None and isinstance(hint, types.UnionType):
        return None
    if typing.get_origin(hint) is tuple:
        entries = value if isinstance(value, list) else [value]
        return tuple(_plain(_kind(hint), entry, where) for entry in entries)
    return _plain(_kind(hint), value, where)


def _kind(hint: Any) -> Any:
    """The type of a field, without None and without the tuple around it."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0]
    return typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint


def _plain(kind: type, value: Any, where: str) -> Any:
    """A number, a text, or true and false; numbers may be written as texts."""
    if kind in (bool, str) and type(value) is kind:
        return value
    if kind in (int, float) and type(value) in (int, float, str):
        try:
            number = kind(value)
            if math.isfinite(number) and (type(value) is str or number == value):
                return number
        except (ValueError, OverflowError):
            pass
    raise ValueError(f"{where} is {value!r}, expected {EXPECTED[kind]}")
