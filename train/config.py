"""What a training run is told: frozen dataclasses read from YAML. An unknown key raises."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jax_eagle.config import ConfigError

SOURCE_KINDS = ("chat", "text")
DRAFT_KINDS = ("eagle", "eagle3", "eagle-llama4")
FEATURE_LOSSES = ("smooth_l1", "l1", "none")
LOGIT_LOSSES = ("cross_entropy", "kl", "reverse_kl", "top_k_kl", "none")
MAX_UNROLL = 7


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name} {value!r}: expected {', '.join(known)}")


def _at_least(low: float, **values: float | None) -> None:
    """None is no value; NaN is less than any bound."""
    for name, value in values.items():
        if value is not None and not value >= low:
            raise ConfigError(f"{name} {value}: expected at least {low}")


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of text."""

    kind: str
    """"chat": JSONL with `messages` in each line; "text": JSONL with `text`, or a folder."""
    path: str
    max_tokens: int | None = None
    """Take so many tokens at most; None: all."""
    prompt_weight: float = 0.0
    """Loss weight of a chat's positions whose token the assistant did not write."""
    answer_weight: float = 1.0
    """Loss weight of the other positions: answers, and all of plain text."""

    def __post_init__(self):
        _one_of("kind", self.kind, SOURCE_KINDS)
        _at_least(1, max_tokens=self.max_tokens)
        _at_least(0, prompt_weight=self.prompt_weight, answer_weight=self.answer_weight)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes batches."""

    sources: tuple[Source, ...]
    length: int = 2048
    """Tokens of a packed row."""
    batch: int = 8
    """Rows of a step, over all devices and all accumulated parts."""
    epochs: int = 1
    validation_share: float = 0.01
    """Of the records, chosen by a hash of each one's question; never trained on."""
    held_out: tuple[str, ...] = ()
    """Files of prompts (JSONL) that nothing trained on may repeat; "mt-bench", "humaneval"."""
    overlap_words: int = 13
    """A record that shares so many words in a row with a held-out prompt is left out."""
    keep_features_gb: float = 0.0
    """Keep the target's features on disk up to this size, for several epochs; 0: all online."""
    features: str | None = None
    """Folder of kept features; None: inside the run's. Runs on the same data may share it."""

    def __post_init__(self):
        if not self.sources:
            raise ConfigError("sources: expected at least one")
        _at_least(1, batch=self.batch, epochs=self.epochs, overlap_words=self.overlap_words)
        _at_least(8, length=self.length)
        _at_least(0, keep_features_gb=self.keep_features_gb)
        if not 0 <= self.validation_share < 1:
            raise ConfigError(
                f"validation_share {self.validation_share}: expected 0 or more, and less than 1"
            )


@dataclasses.dataclass(frozen=True)
class DraftSettings:
    """The draft that is trained, and where it starts."""

    kind: str = "eagle"
    """"eagle", "eagle3" (three tapped features, own head), "eagle-llama4" (Llama 4 blocks)."""
    start: str = "ridge"
    """"ridge" (closed-form FC), "random", or the folder of a draft to go on from."""
    start_rows: int = 64
    """Rows that the closed-form start is fitted on."""
    num_layers: int = 1
    input_norm: bool = False
    output_norm: bool = True
    vocab_size: int | None = None
    """Most frequent tokens of the data that the draft proposes from; None: all."""
    taps: tuple[int, ...] | None = None
    """EAGLE-3: layers whose incoming residual streams are the features; None: 2, L/2, L-3."""

    def __post_init__(self):
        _one_of("kind", self.kind, DRAFT_KINDS)
        _at_least(
            1, num_layers=self.num_layers, start_rows=self.start_rows, vocab_size=self.vocab_size
        )
        if self.taps is not None and self.kind != "eagle3":
            raise ConfigError(
                f"taps {list(self.taps)}: a setting of kind 'eagle3', not {self.kind}"
            )
        if self.taps == ():
            raise ConfigError("taps []: expected layers, or null for the usual ones")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimised; see `loss`."""

    feature: str = "smooth_l1"
    feature_weight: float = 1.0
    logits: str = "cross_entropy"
    logits_weight: float = 0.1
    top_k: int = 10
    """Of `top_k_kl`: the target's favourites that count."""
    unroll: int = 1
    """Passes of the draft over its own features in one step (training-time test)."""
    decay: float = 0.8
    """Weight of each unrolled pass relative to the one before."""
    feature_noise: float = 0.0
    """Half-width of the uniform noise on input features."""
    chunk: int = 256
    """Positions of each row that go through the vocabulary at once."""

    def __post_init__(self):
        _one_of("feature", self.feature, FEATURE_LOSSES)
        _one_of("logits", self.logits, LOGIT_LOSSES)
        if self.feature == self.logits == "none":
            raise ConfigError("feature and logits are both 'none': nothing to minimise")
        if not 1 <= self.unroll <= MAX_UNROLL:
            raise ConfigError(f"unroll {self.unroll}: expected 1 to {MAX_UNROLL}")
        _at_least(1, chunk=self.chunk, top_k=self.top_k)
        _at_least(0, feature_noise=self.feature_noise, decay=self.decay)
        _at_least(0, feature_weight=self.feature_weight, logits_weight=self.logits_weight)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine."""

    learning_rate: float = 2e-4
    final_learning_rate: float = 0.05
    """As a share of `learning_rate`, at the end of the cosine."""
    fc_scale: float = 1.0
    """Learning rate of `fc` relative to the others."""
    warmup: float = 0.02
    """Share of all steps."""
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global norm of the gradient."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after the other in the same step."""
    ema: float | None = None
    """Decay of the averaged parameters, which are then what is evaluated; None: no average."""

    def __post_init__(self):
        _at_least(1, accumulate=self.accumulate)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; their product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        _at_least(1, data=self.data, fsdp=self.fsdp, tensor=self.tensor)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Acceptance on frozen prompts, by real decoding, while the run goes on."""

    prompts: tuple[str, ...] = ("validation",)
    """"validation" (first questions of held-out records), "mt-bench", "humaneval", or files."""
    num_prompts: int = 16
    """At most so many of each."""
    max_new_tokens: int = 64
    depth: int = 5
    """Deepest drafted token whose acceptance is counted."""
    trees: tuple[str, ...] = ("chain:3", "static:8")
    """The first one chooses the best checkpoint."""
    every: int | None = 500
    """Steps between evaluations, the first of them before any step; None: at the end alone."""

    def __post_init__(self):
        _at_least(1, num_prompts=self.num_prompts, depth=self.depth, every=self.every)
        _at_least(2, max_new_tokens=self.max_new_tokens)  # the first one comes from prefill


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When states are saved, and which stay."""

    minutes: float = 10.0
    steps: int | None = None
    """Save every so many steps as well; None: by time alone."""
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self):
        _at_least(0, minutes=self.minutes)
        _at_least(1, steps=self.steps, keep_last=self.keep_last, keep_best=self.keep_best)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run; every field is a key of the YAML file."""

    target: str
    """Name or path, as `load_target` takes it."""
    run: str
    """Folder of checkpoints, metrics and the resolved config."""
    output: str
    """Folder of the finished draft."""
    data: DataConfig
    draft: DraftSettings = DraftSettings()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    dtype: str | None = None
    """Of target and draft passes; None: float32 on CPU, bfloat16 on GPU. Masters are float32."""
    remat: bool = False
    """Compute the draft's layers again in the backward pass: less memory, more time."""
    log_every: int = 20
    max_minutes: float | None = None
    """Stop after so long; the schedule does not know of it."""
    card: str = ""
    """A paragraph for the draft's card: sources and licences."""
    seed: int = 0

    def __post_init__(self):
        if self.draft.kind == "eagle3" and self.loss.feature != "none":
            raise ConfigError("an eagle3 draft has no features to estimate: loss.feature is none")
        _at_least(1, log_every=self.log_every)
        _at_least(0, max_minutes=self.max_minutes)
        parts = self.optimizer.accumulate * self.mesh.data * self.mesh.fsdp
        if self.data.batch % parts:
            raise ConfigError(
                f"a batch of {self.data.batch} rows does not divide into {parts} parts "
                "(accumulate x data x fsdp)"
            )


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies `key=value` overrides (`data.sources.0.path=...`).

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


def to_tree(config: TrainConfig) -> dict[str, Any]:
    """Nested dicts and lists that `from_tree` reads back to an equal config."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


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
        item = typing.get_args(kind)[0]
        return tuple(_value(item, each, f"{where}.{i}") for i, each in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return from_tree(typing.cast(type, kind), value, where)
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
            if isinstance(tree, list):
                tree = tree[int(parent)]
            else:
                tree = tree.setdefault(parent, {})
        tree[int(last) if isinstance(tree, list) else last] = yaml.safe_load(text)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):
        raise ConfigError(f"--set {override}: there is no such key") from None
