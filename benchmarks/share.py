"""One rank's share of a large target, alone on one card: its round without the all-reduces.

Each rank of a tensor-parallel group has a share of the heads, of the units of every FFN and expert,
and of the vocabulary; all else is whole. So a share is a model of its own, with narrower layers.
"""

import dataclasses

from jax_eagle.config import DraftConfig, LlamaConfig
from jax_eagle.deployment import read_deployment
from jax_eagle.planning import read_configs


def read_share(name: str, devices: int = 8) -> tuple[LlamaConfig, DraftConfig]:
    """Shares of the target and the draft of a server's configuration (configs/NAME.yaml)."""
    target, draft = read_configs(read_deployment(f"configs/{name}.yaml"))
    assert draft is not None and draft.draft_vocab_size is not None
    own = {
        "layer": share_of(draft.layer, devices),
        "draft_vocab_size": draft.draft_vocab_size // devices,
    }
    return share_of(target, devices), dataclasses.replace(draft, **own)


def share_of(config: LlamaConfig, devices: int) -> LlamaConfig:
    """The config of what one of `devices` holds."""
    moe = config.moe
    if moe is not None:
        moe = dataclasses.replace(moe, intermediate_size=moe.intermediate_size // devices)
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size // devices,
        intermediate_size=config.intermediate_size // devices,
        num_heads=config.num_heads // devices,
        num_kv_heads=max(1, config.num_kv_heads // devices),
        moe=moe,
    )
