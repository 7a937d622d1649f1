"""Which weights are stored in fewer bits, and how. `quantize` makes the numbers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .architecture import ConfigError

STORED_DTYPES = {"fp8": "float8_e4m3fn", "int8": "int8", "int4": "uint8"}
"""How weights may be stored, and in which arrays: of int4, two values a byte."""
_GROUPS = ("experts", "mlp", "attention", "head")
_QUANT_METHOD = "jax_eagle"
"""Under which config.json says, in Hugging Face's "quantization_config", that weights are stored
as `Quantization` has it."""


def scale_path(kernel_path: tuple[str, ...]) -> tuple[str, ...]:
    """Where the scales of a kernel are: "scale" beside "kernel", NAME_scale beside another one."""
    *module, name = kernel_path
    return *module, "scale" if name == "kernel" else f"{name}_scale"


class Stored(NamedTuple):
    """How the kernel of one linear map is stored, beside its scales in float32."""

    scheme: str
    group_size: int
    """int4: the inputs that share a scale, as far as they divide."""

    @property
    def dtype(self) -> str:
        """Of the kernel."""
        return STORED_DTYPES[self.scheme]

    def kernel_shape(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]):
        """[in..., out...], of int4 the last input axis halved."""
        *outer, last = in_shape
        return *outer, last // 2 if self.scheme == "int4" else last, *out_shape

    def groups(self, num_inputs: int) -> int:
        """Scales of one output: one, or one for each group of inputs.

        A group is the largest part of `group_size` that divides the inputs: 64 of 576.

        Raises:
          ConfigError: groups that are no multiple of 32, which the kernels cannot read.
        """
        if self.scheme != "int4":
            return 1
        size = math.gcd(self.group_size, num_inputs)
        if size % 32:
            raise ConfigError(
                f"int4 in groups of {self.group_size}: {num_inputs} inputs leave groups of {size}, "
                "expected a multiple of 32"
            )
        return num_inputs // size


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which linear maps store their weights in fewer bits, and how; None: as they are.

    "fp8" (e4m3) and "int8" have a scale for each output channel, "int4" one for each group of
    inputs of an output channel; all are symmetric. Norms, biases, routers, embeddings and a draft's
    FC stay as they are.
    """

    experts: str | None = None
    """Routed experts."""
    mlp: str | None = None
    """Dense FFNs and shared experts."""
    attention: str | None = None
    """Queries, keys, values and output."""
    head: str | None = None
    skipped_layers: tuple[int, ...] = ()
    """Layers that stay as they are; Meta's files skip the first and the last."""
    group_size: int = 128
    """int4: inputs that share a scale. See `Stored.groups` for inputs that this does not divide."""

    def __post_init__(self):
        for group in _GROUPS:
            if (scheme := getattr(self, group)) not in (None, *STORED_DTYPES):
                raise ConfigError(
                    f"quantization {group}={scheme}: expected one of {', '.join(STORED_DTYPES)}"
                )
        if self.group_size < 32 or self.group_size % 32:
            raise ConfigError(f"group_size {self.group_size}: expected a multiple of 32, as is 128")

    @classmethod
    def parse(cls, text: str) -> "Quantization":
        """From "fp8" (all linear maps but the head), or such as "mlp=int4,attention=int8".

        Other keys: group_size=64, skipped_layers=0+47.

        Raises:
          ConfigError: another form.
        """
        if text in STORED_DTYPES:
            return cls(experts=text, mlp=text, attention=text)
        given: dict[str, Any] = {}
        for part in text.split(","):
            key, _, value = part.strip().partition("=")
            if key in given or key not in {field.name for field in dataclasses.fields(cls)}:
                raise ConfigError(
                    f"quantization {text!r}: expected {', '.join(STORED_DTYPES)}, or such as "
                    f"experts=fp8,mlp=int4 (of {', '.join(_GROUPS)}, skipped_layers, group_size)"
                )
            given[key] = value
        try:
            if "group_size" in given:
                given["group_size"] = int(given["group_size"])
            if "skipped_layers" in given:
                given["skipped_layers"] = tuple(map(int, given["skipped_layers"].split("+")))
        except ValueError as error:
            raise ConfigError(f"quantization {text!r}: {error}") from None
        return cls(**given)

    @classmethod
    def from_hf(cls, section: Mapping[str, Any]) -> "Quantization | None":
        """What `to_hf` wrote; None: nothing, or what another program wrote.

        Raises:
          ConfigError: an unknown key.
        """
        fields = dict(section)
        if fields.pop("quant_method", None) != _QUANT_METHOD:
            return None
        if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(cls)}):
            raise ConfigError(f"quantization_config: unknown keys {unknown}")
        fields["skipped_layers"] = tuple(fields.get("skipped_layers", ()))
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The section "quantization_config" of a config.json."""
        return {"quant_method": _QUANT_METHOD} | dataclasses.asdict(self)

    def stored(self, group: str, layer: int | None = None) -> Stored | None:
        """How the maps of a group are stored; None: as they are."""
        scheme: str | None = getattr(self, group)
        if scheme is None or layer in self.skipped_layers:
            return None
        return Stored(scheme, self.group_size)
