"""The tokenizer and chat template of a checkpoint.

A thin wrapper around transformers' fast tokenizer. Two loads of the same files are equal and hash
alike, so a tokenizer can be a static field of a pytree without causing a new compilation.
transformers is imported on first use: it is slow to import and most of it is not needed.
"""

import functools
import hashlib
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checkpoint.mapping import CheckpointError, one_line
from .config import ConfigError

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_NAMED_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
CONTROL, USER_DEFINED = 3, 4
"""GGUF token types that are matched in the text before it is split."""


class Tokenizer:
    """Text to token ids and back, special tokens and chat template of one checkpoint."""

    def __init__(self, backend: Any):
        """Wraps a `transformers.PreTrainedTokenizerFast`."""
        self._backend = backend
        content = repr((
            backend.backend_tokenizer.to_str(),
            backend.chat_template,
            sorted((name, str(token)) for name, token in backend.special_tokens_map.items()),
        ))  # fmt: skip
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json and the chat template of a folder.

        Raises:
          CheckpointError: there is no tokenizer.json, or it cannot be read.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder}: tokenizer.json is missing")
        try:
            return cls(_fast_tokenizer().from_pretrained(folder, local_files_only=True))
        except Exception as error:  # the tokenizers library raises bare Exception
            message = f"{folder}: tokenizer.json cannot be read ({one_line(error)})"
            raise CheckpointError(message) from error

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Builds the byte-level BPE tokenizer that the metadata of a GGUF file describes.

        Raises:
          ConfigError: another tokenizer model or an unknown pre-tokenizer.
          CheckpointError: metadata that is missing or contradicts itself.
        """
        try:
            tokens = metadata["tokenizer.ggml.tokens"]
            named = {
                f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
                for name, key in GGUF_NAMED_TOKENS.items()
                if f"tokenizer.ggml.{key}_token_id" in metadata
            }
            core = _byte_level_bpe(metadata)
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"GGUF tokenizer metadata: {error} is missing") from None
        backend = _fast_tokenizer()(
            tokenizer_object=core,
            chat_template=metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **named,
        )
        return cls(backend)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of plain text; `special`: with what the model expects around it (BOS)."""
        return self._backend(text, add_special_tokens=special, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self._backend.decode(
            [int(i) for i in ids],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a dialogue; `messages` are {"role": ..., "content": ...}.

        Raises:
          ConfigError: the checkpoint has no chat template.
        """
        if self._backend.chat_template is None:
            raise ConfigError("the checkpoint has no chat template: give the prompt as plain text")
        return self._backend.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, return_dict=False
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files that `from_folder` reads."""
        self._backend.save_pretrained(folder)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return len(self._backend)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token at the beginning of a text, if there is one."""
        return self._backend.bos_token_id

    @property
    def fingerprint(self) -> str:
        """A hash of vocabulary, merges, special tokens and chat template."""
        return self._fingerprint

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of all special tokens."""
        added = self._backend.added_tokens_decoder
        return tuple(sorted(index for index, token in added.items() if token.special))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, {self._fingerprint[:8]})"


class TextPieces:
    """Turns tokens into text one by one; a character cut by a token border waits for its rest."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        """`skip_special_tokens`: leave out tokens such as the end of a turn."""
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._before = ""
        """Text of the first `_shown` of them, which was given out."""
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) - self._shown < _LONGEST_CHARACTER:
            return ""
        return self._give(text)

    def rest(self) -> str:
        """What still waits, at the end of a text: a cut character as its replacement mark."""
        return self._give(self._decode(self._ids))

    def _give(self, text: str) -> str:
        piece = text[len(self._before) :]
        # A token's text may depend on the token before it (leading spaces), so that one stays.
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        self._before = self._decode(self._ids)
        return piece


_LONGEST_CHARACTER = 8
"""Tokens that a character can need; an invalid one is not waited for any longer."""


@functools.cache
def _fast_tokenizer() -> Any:
    """transformers.PreTrainedTokenizerFast, imported without its advice to install PyTorch."""
    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        return importlib.import_module("transformers").PreTrainedTokenizerFast
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _byte_level_bpe(metadata: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` from GGUF metadata."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConfigError(
            f"GGUF tokenizer model {model!r} is not supported, expected byte-level BPE ('gpt2'): "
            "load the Hugging Face folder of this model instead"
        )
    split = metadata.get("tokenizer.ggml.pre", "default")
    llama3 = split in ("llama-bpe", "llama3", "llama-v3")
    tokens = metadata["tokenizer.ggml.tokens"]
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]],
            # Llama 3 takes a word that is a token as it is, whatever the merges say.
            ignore_merges=llama3,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(_splits(split))
    backend.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    backend.add_tokens([
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ])  # fmt: skip
    if metadata.get("tokenizer.ggml.add_bos_token", llama3):
        index = metadata["tokenizer.ggml.bos_token_id"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[index]} $A", special_tokens=[(tokens[index], index)]
        )
    return backend


def _splits(name: str) -> list[Any]:
    """The pre-tokenizers that GGUF knows under `name`; the last one maps bytes to characters."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

    if name in ("llama-bpe", "llama3", "llama-v3"):
        split = Split(Regex(LLAMA3_SPLIT), behavior="isolated")
        return [split, ByteLevel(add_prefix_space=False, use_regex=False)]
    if name == "smollm":
        return [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    if name in ("gpt-2", "gpt2"):
        return [ByteLevel(add_prefix_space=False, use_regex=True)]
    raise ConfigError(
        f"GGUF pre-tokenizer {name!r} is not supported, expected smollm, llama-bpe or gpt-2: "
        "load the Hugging Face folder of this model instead"
    )
