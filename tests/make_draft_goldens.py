"""Makes the golden file of an EAGLE-1 draft, with the official code (Apache-2.0) and torch.

Run by hand, in an environment of its own; the test suite reads the files and never runs this:

    pip install torch==2.13.0 transformers==4.53.1 safetensors
    pip install --no-deps eagle-llm==1.2.1
    python tests/make_draft_goldens.py

It writes ``goldens/eagle1/``: a random draft of two layers as the official code stores it, its
state dict, with a config.json as on the hub (that code knows no RoPE base but 10,000); and
``expected.npz``: tokens int32 [2, 48], features float32 [2, 48, 64] of a target that there is not,
and states float32 [2, 47, 64], what the draft makes of each token but the first and of the feature
before it. ``tree_tokens`` int32 [2, 25] are the nodes that `topK_genrate` proposes behind the first
40 tokens of each text with the tree of EAGLE-1 and ``lm_head`` float32 [512, 64], root excluded.

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

FOLDER = Path(__file__).parent / "goldens" / "eagle1"
FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PREFIX = 40


def main() -> None:
    """Makes the draft and runs it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model(EConfig(**FIELDS), bias=FIELDS["bias"]).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape) * (weight.shape[-1] ** -0.5))
            if "norm" in name:
                weight.copy_(1 + 0.1 * torch.randn(weight.shape))
    model.reset()
    tokens = torch.randint(0, FIELDS["vocab_size"], (2, 48))
    features = torch.randn(2, 48, FIELDS["hidden_size"])
    head = torch.nn.Linear(FIELDS["hidden_size"], FIELDS["vocab_size"], bias=False)
    with torch.no_grad():
        states = model(features[:, :-1], input_ids=tokens[:, 1:])
        proposed = [propose(model, head, *row) for row in zip(tokens, features, strict=True)]

    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "config.json").write_text(json.dumps(FIELDS, indent=1) + "\n")
    save_file(model.state_dict(), FOLDER / "model.safetensors")
    np.savez(
        FOLDER / "expected.npz",
        tokens=np.int32(tokens),
        features=features.numpy(),
        states=states.numpy(),
        lm_head=head.weight.detach().numpy(),
        tree_tokens=np.int32(proposed),
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


if __name__ == "__main__":
    main()
