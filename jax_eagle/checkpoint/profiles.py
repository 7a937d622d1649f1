"""Draft folders for other programs, by name.

    own                 our own form, which holds every draft and the whole of its config
    eagle-llama-vllm    EAGLE-1 and EAGLE-2 for vLLM and for the official code
    eagle-llama-sglang  the same for SGLang, with its map of the draft vocabulary in a file beside
    eagle3              EAGLE-3 for the official code, SGLang, vLLM and llama.cpp's converter
    speculators         EAGLE-3 as speculators and vLLM write it
    eagle-llama4        EAGLE with Llama 4 blocks for vLLM

`eagle.load` reads all of them; parameters come back bit-equal. A draft that a form cannot hold
whole is refused. One thing is left out of the eagle-llama forms, as their readers see in it a
choice at run time: the draft vocabulary of a draft that uses the target's head.
"""

import os

import numpy as np

from ..config import ConfigError
from ..draft import Draft
from ..llama import Target
from . import eagle, eagle3, eagle_llama

PROFILES = (
    "own", "eagle-llama-vllm", "eagle-llama-sglang", "eagle3", "speculators", "eagle-llama4",
)  # fmt: skip


def save(
    draft: Draft,
    folder: str | os.PathLike,
    profile: str = "own",
    *,
    target: Target | None = None,
    with_embedding: bool = False,
    numbering: str = "both",
    first_layer: str = "midlayer",
    verifier: str | None = None,
) -> None:
    """Writes a draft as one of `PROFILES`.

    Args:
      target: what the draft is for. Its context length and first token go into config.json.
      with_embedding: store the target's embedding as well, for readers that do not share it.
      numbering: of eagle3: where and how tapped layers are numbered: "enter", "output" or "both".
      first_layer: of eagle3: its name, "midlayer" or "layers.0".
      verifier: of speculators: the target's name for vLLM.

    Raises:
      ConfigError: no such profile, one that has no place for something that the draft has, or an
        argument that it needs is missing.
    """
    if profile not in PROFILES:
        raise ConfigError(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    if profile != "eagle3" and (numbering, first_layer) != ("both", "midlayer"):
        raise ConfigError(f"profile {profile}: numbering and first layer are choices of eagle3")
    embedding = _embedding(draft, target, profile) if with_embedding else None
    if profile == "own":
        return eagle.save(draft, folder)
    if profile == "eagle3":
        fields, tensors = eagle3.write(
            draft, target, embedding=embedding, numbering=numbering, first_layer=first_layer
        )
    elif profile == "speculators":
        if verifier is None:
            raise ConfigError("profile speculators: needs the name of the target")
        fields, tensors = eagle3.write_speculators(
            draft, target, verifier=verifier, embedding=embedding
        )
    else:
        if profile == "eagle-llama4":
            fields, tensors = eagle_llama.write_llama4(draft, target)
        else:
            fields, tensors = eagle_llama.write(draft, target, profile.rsplit("-", 1)[1])
        if embedding is not None:
            tensors["embed_tokens.weight"] = embedding
    written = eagle.write_folder(folder, fields, tensors)
    if profile == "eagle-llama-sglang" and draft.draft_to_target is not None:
        ids_U = np.asarray(draft.draft_to_target)
        eagle_llama.write_token_map(written / eagle_llama.TOKEN_MAP, ids_U)


def _embedding(draft: Draft, target: Target | None, profile: str) -> np.ndarray:
    """The target's embedding [V, D] in the draft's dtype."""
    if profile == "own" or draft.config.own_embedding:
        where = "the own form" if profile == "own" else "a draft with an embedding of its own"
        raise ConfigError(f"the target's embedding has no place in {where}")
    if target is None:
        raise ConfigError("the target's embedding: which target?")
    return np.asarray(target.params["embed"]["embedding"].astype(draft.config.layer.dtype))
