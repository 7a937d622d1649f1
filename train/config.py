"""What a training run is told: frozen dataclasses read from YAML. An unknown key raises."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jax_eagle.config import ConfigError

SOURCE_KINDS = ("dialogues", "stdlib-text", "stdlib-chat")


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of text; see `data.read_source` for the kinds."""

    kind: str
    path: str | None = None
    """Folder of shards, for dialogues."""
    max_tokens: int | None = None
    """Take so many tokens at most; None: all."""
    prompt_weight: float = 0.3
    """Loss weight of a position whose token the target did not have to write."""
    answer_weight: float = 1.0
    """Loss weight of the other positions: answers, and all of plain text."""

    def __post_init__(self):
        if self.kind not in SOURCE_KINDS:
            raise ConfigError(f"source kind {self.kind!r}: expected {', '.join(SOURCE_KINDS)}")
        if self.kind == "dialogues" and self.path is None:
            raise ConfigError("a source of kind 'dialogues' needs the key path")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run; every field is a key of the YAML file."""

    target: str
    """Name or path, as `load_target` takes it."""
    output: str
    """Folder of the finished draft."""
    run: str
    """Folder of checkpoints, metrics and the resolved config."""
    sources: tuple[Source, ...]
    dtype: str | None = None
    """Of target and draft passes; None: float32 on CPU, bfloat16 on GPU. Masters are float32."""
    start: str = "ridge"
    """"ridge" (closed-form FC), "random", or the folder of a draft to go on from."""
    start_rows: int = 64
    """Rows that the closed-form start is fitted on."""

    num_layers: int = 1
    input_norm: bool = False
    output_norm: bool = True
    draft_vocab_size: int | None = None

    length: int = 512
    """Tokens of a packed row."""
    batch: int = 2
    """Rows of a step."""
    epochs: int = 5
    validation_share: float = 0.02
    validation_rows: int = 16
    keep_features: bool = True
    """Keep the target's features on disk: each row runs through the target once."""
    features: str | None = None
    """Folder of the kept features; None: inside `run`. Runs with the same target may share it."""

    learning_rate: float = 1e-3
    final_learning_rate: float = 0.05
    """As a share of `learning_rate`, at the end of the cosine."""
    fc_lr_scale: float = 0.3
    warmup: float = 0.05
    """Share of all steps."""
    weight_decay: float = 0.0
    clip: float = 1.0
    ce_weight: float = 0.1
    """Soft cross entropy relative to the smooth-L1 loss on features."""
    ema: float | None = None
    """Decay of the averaged parameters, which are then what is exported; None: no average."""

    log_every: int = 20
    validate_every: int = 500
    checkpoint_minutes: float = 10.0
    max_to_keep: int = 2
    max_minutes: float | None = None
    """Stop after so long; the schedule does not know of it."""
    tensorboard: bool = False
    card: str = ""
    """A paragraph for the draft's card: sources and licences."""
    seed: int = 0

    def __post_init__(self):
        if not self.sources:
            raise ConfigError("sources: expected at least one")
        if min(self.batch, self.epochs, self.num_layers) < 1 or self.length < 8:
            raise ConfigError("batch, epochs and num_layers start at 1, length at 8")


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies `key=value` overrides (`sources.0.path=...` reaches inside).

    Raises:
      ConfigError: no such file, an unknown or missing key, or a value of the wrong type.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    for override in overrides:
        _override(tree, override)
    return from_tree(TrainConfig, tree, str(path))


def from_tree(cls: type, tree: Any, where: str) -> Any:
    """A dataclass from nested dicts and lists; raises ConfigError naming the key."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected keys and values, found {tree!r}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(tree) - set(fields)):
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}, expected one of {', '.join(sorted(fields))}"
        )
    required = [n for n, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in tree]:
        raise ConfigError(f"{where}: the key {missing[0]!r} is missing")
    hints = typing.get_type_hints(cls)
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against a field's type."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        return tuple(from_tree(Source, item, f"{where}.{i}") for i, item in enumerate(value))
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            pass
    if type(value) is not kind:
        raise ConfigError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value


def _override(tree: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected key=value")
    *parents, last = key.split(".")
    try:
        for parent in parents:
            tree = tree[int(parent)] if isinstance(tree, list) else tree[parent]
        tree[int(last) if isinstance(tree, list) else last] = yaml.safe_load(text)
    except (KeyError, IndexError, ValueError, TypeError):
        raise ConfigError(f"--set {override}: there is no such key") from None
