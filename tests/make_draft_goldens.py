"""Makes the golden files of two drafts, with other people's code (Apache-2.0) and torch.

Run by hand, in an environment of its own; the test suite reads the files and never runs this:

    pip install torch==2.13.0 transformers==4.53.1 safetensors \
      pydantic pydantic-settings loguru click httpx
    pip install --no-deps eagle-llm==1.2.1 speculators==0.2.0
    python tests/make_draft_goldens.py

Both are random drafts for a target that there is not, of 512 tokens and 64 channels. Each folder
holds config.json, model.safetensors and ``expected.npz``: tokens int32 [2, 48], features float32
[2, 48, F], and what the draft makes of each token but the first and of the feature before it:

``goldens/eagle1/``
    The state dict of the official EAGLE-1 code, with two layers and a config.json as on the hub
    (that code knows no RoPE base but 10,000). states float32 [2, 47, 64]. tree_tokens int32
    [2, 25]: the nodes that `topK_genrate` proposes behind the first 40 tokens of each text, with
    the tree of EAGLE-1, the root excluded, and the head lm_head float32 [512, 64].
``goldens/eagle3/``
    An EAGLE-3 draft that speculators saved, 128 draft tokens. states float32 [2, 47, 64] and
    logits float32 [2, 47, 128] with its norm_before_residual, and the same under ``_after`` as if
    that were false, as it is in the official code. speculators has no forward of the whole draft
    in this version: embedding, fc, layer, norm and head are called one after the other.

Same versions, same kind of CPU: same bytes (fixed seeds, one thread).
"""

import json
from pathlib import Path

import numpy as np
import torch
from eagle.model.choices import mc_sim_7b_63
from eagle.model.cnets import Model
from eagle.model.configs import EConfig
from eagle.model.utils import generate_tree_buffers
from safetensors.torch import save_file
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3Speculator, Eagle3SpeculatorConfig
from speculators.proposals import GreedyTokenProposalConfig
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

GOLDENS = Path(__file__).parent / "goldens"
LAYER = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
EAGLE1 = LAYER | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PREFIX = 40
DRAFT_TOKENS = 128


def make_eagle1() -> None:
    """The official EAGLE-1 draft, its states and its tree."""
    model = randomised(Model(EConfig(**EAGLE1), bias=EAGLE1["bias"]))
    model.reset()
    tokens, features = inputs(LAYER["hidden_size"])
    head = torch.nn.Linear(LAYER["hidden_size"], LAYER["vocab_size"], bias=False)
    states = model(features[:, :-1], input_ids=tokens[:, 1:])
    proposed = [propose(model, head, *row) for row in zip(tokens, features, strict=True)]
    folder = GOLDENS / "eagle1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(EAGLE1, indent=1) + "\n")
    save_file(model.state_dict(), folder / "model.safetensors")
    save(
        folder,
        tokens=tokens,
        features=features,
        states=states,
        lm_head=head.weight,
        tree_tokens=torch.tensor(proposed),
    )


def propose(model: Model, head: torch.nn.Linear, tokens, features) -> list[int]:
    """The drafted nodes of the official tree behind PREFIX tokens, the last of them its root."""
    model.reset_kv()
    model.diff_device = False
    model.init_tree()
    logits = model.topK_genrate(features[None, : PREFIX - 1], tokens[None, :PREFIX], head, None)
    buffers = generate_tree_buffers(mc_sim_7b_63, device="cpu")
    candidates = torch.cat([tokens[PREFIX - 1 : PREFIX], logits[0].reshape(-1)])
    model.reset()
    return candidates[buffers["tree_indices"]][1:].tolist()


def make_eagle3() -> None:
    """An EAGLE-3 draft of speculators, its states and its logits."""
    verifier = VerifierConfig(name_or_path="tiny", architectures=["LlamaForCausalLM"])
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=LlamaConfig(
            **LAYER, head_dim=16, num_hidden_layers=1, rope_theta=100000.0
        ),
        draft_vocab_size=DRAFT_TOKENS,
        norm_before_residual=True,
        eagle_aux_hidden_state_layer_ids=[2, 4, 5],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=verifier,
        ),
    )
    model = randomised(Eagle3Speculator(config, verifier_attachment_mode="detached"))
    ids = torch.randperm(LAYER["vocab_size"])[:DRAFT_TOKENS].sort().values
    model.d2t.copy_(ids - torch.arange(DRAFT_TOKENS))
    model.t2d[ids] = True
    tokens, features = inputs(3 * LAYER["hidden_size"])
    states, logits = run_eagle3(model, tokens, features)
    model.layers[0].norm_before_residual = False
    states_after, logits_after = run_eagle3(model, tokens, features)
    folder = GOLDENS / "eagle3"
    model.save_pretrained(folder)
    for other in set(folder.iterdir()) - {folder / "config.json", folder / "model.safetensors"}:
        other.unlink()
    save(
        folder,
        tokens=tokens,
        features=features,
        states=states,
        logits=logits,
        states_after=states_after,
        logits_after=logits_after,
    )


def run_eagle3(model: Eagle3Speculator, tokens, features) -> tuple[torch.Tensor, torch.Tensor]:
    """The states and logits of an EAGLE-3 draft along whole texts."""
    config = model.config.transformer_layer_config
    fused = model.fc(features[:, :-1])
    T = fused.shape[1]
    causal = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)
    layer = model.layers[0]
    [states] = layer(
        torch.cat([model.embed_tokens(tokens[:, 1:]), fused], dim=-1),
        attention_mask=causal[None, None],
        position_embeddings=LlamaRotaryEmbedding(config)(fused, torch.arange(T)[None]),
    )[:1]
    return states, model.lm_head(model.norm(states))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random weights of about unit gain."""
    for name, weight in model.eval().named_parameters():
        weight.copy_(torch.randn(weight.shape) * (weight.shape[-1] ** -0.5))
        if "norm" in name:
            weight.copy_(1 + 0.1 * torch.randn(weight.shape))
    return model


def inputs(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and features."""
    return torch.randint(0, LAYER["vocab_size"], (2, 48)), torch.randn(2, 48, width)


def save(folder: Path, **arrays: torch.Tensor) -> None:
    """Writes expected.npz."""
    as_numpy = {name: x.detach().numpy() for name, x in arrays.items()}
    ids = {name: np.int32(x) for name, x in as_numpy.items() if x.dtype == np.int64}
    np.savez(folder / "expected.npz", **as_numpy | ids)


def main() -> None:
    """Makes both golden files."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for make in make_eagle1, make_eagle3:
        torch.manual_seed(0)
        make()


if __name__ == "__main__":
    main()
