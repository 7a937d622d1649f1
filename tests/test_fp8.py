"""Published folders with weights in fp8: those of other programs, written here by hand."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from jax_eagle import load_target
from jax_eagle.checkpoint.mapping import CheckpointError
from jax_eagle.config import ConfigError
from jax_eagle.quantization import Quantization

D, N, K, H, F, E, V = 32, 4, 2, 8, 48, 2, 24
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V,
    "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 3, "num_attention_heads": N,
    "num_key_value_heads": K, "head_dim": H, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA4 = LLAMA3 | {
    "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "moe_layers": [0, 2],
    "intermediate_size_mlp": F, "num_local_experts": E, "num_experts_per_tok": 1,
    "no_rope_layers": [1, 0, 1], "attention_chunk_size": 8,
}  # fmt: skip
ATTENTION = {"q_proj": (N * H, D), "k_proj": (K * H, D), "v_proj": (K * H, D), "o_proj": (D, N * H)}
SWIGLU = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}


class Folder:
    """The tensors of a checkpoint twice: as published, and the numbers they stand for."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.published: dict[str, np.ndarray] = {}
        self.whole: dict[str, np.ndarray] = {}

    def add(self, name: str, *shape: int, scale: tuple[str, tuple[int, ...]] | None = None):
        """A tensor; `scale`: in fp8, with scales of this name and shape, which broadcasts."""
        values = self.rng.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5
        if scale is None:
            self.published[name] = self.whole[name] = values
            return
        eight_bits = (values * 100).astype(ml_dtypes.float8_e4m3fn)
        factor = self.rng.uniform(0.005, 0.02, scale[1]).astype(np.float32)
        self.published |= {name: eight_bits, scale[0]: factor}
        if factor.ndim == 3 and factor.shape[2] == 1:  # FBGEMM's of down
            factor = factor.swapaxes(1, 2)
        self.whole[name] = eight_bits.astype(np.float32) * factor

    def linear(self, module: str, shape: tuple[int, int], scales: str | None):
        """MODULE.weight; `scales`: "channel", "vector", "tensor", "one", or None for whole ones."""
        shapes = {"channel": (shape[0], 1), "vector": (shape[0],), "tensor": (), "one": (1,)}
        scale = None if scales is None else (f"{module}.weight_scale", shapes[scales])
        if scales == "vector":  # which does not broadcast as it is
            self.linear(module, shape, "channel")
            self.published[scale[0]] = self.published[scale[0]][:, 0]
        else:
            self.add(f"{module}.weight", *shape, scale=scale)

    def frame(self, prefix: str = ""):
        """What no layout quantises."""
        self.add(f"{prefix}model.embed_tokens.weight", V, D)
        self.add(f"{prefix}model.norm.weight", D)
        self.add(f"{prefix}lm_head.weight", V, D)
        for i in range(3):
            self.add(f"{prefix}model.layers.{i}.input_layernorm.weight", D)
            self.add(f"{prefix}model.layers.{i}.post_attention_layernorm.weight", D)

    def attention(self, scales: str | None, prefix: str = "", layers=range(3)):
        for i in layers:
            for name, shape in ATTENTION.items():
                self.linear(f"{prefix}model.layers.{i}.self_attn.{name}", shape, scales)

    def swiglu(self, module: str, scales: str | None):
        for name, shape in SWIGLU.items():
            self.linear(f"{module}.{name}", shape, scales)

    def write(self, path, config, method: dict | None):
        """The published folder, and beside it the whole one; their paths."""
        said = {} if method is None else {"quantization_config": method}
        for kind, tensors, fields in (("fp8", self.published, said), ("whole", self.whole, {})):
            (path / kind).mkdir()
            (path / kind / "config.json").write_text(json.dumps(config | fields))
            safetensors.numpy.save_file(tensors, path / kind / "model.safetensors")
        return path / "fp8", path / "whole"


def assert_equal(paths, quantization: Quantization):
    """The same numbers, in eight bits where they are said to be."""
    published, whole = (load_target(path) for path in paths)
    assert published.config.quantization == quantization
    found = traverse_util.flatten_dict(published.params)
    expected = traverse_util.flatten_dict(whole.params)
    stored = {path for path in found if path not in expected}
    for path, kernel in expected.items():
        scale = (*path[:-1], "scale" if path[-1] == "kernel" else f"{path[-1]}_scale")
        values = np.asarray(found[path])
        if scale in stored:
            assert values.dtype == ml_dtypes.float8_e4m3fn
            stored.remove(scale)
            values = values.astype(np.float32) * np.asarray(found[scale])
        np.testing.assert_array_equal(values, np.asarray(kernel), err_msg=str(path))
    assert not stored


def llama3(attention: str | None, mlp: str | None, whole_layers=()) -> Folder:
    folder = Folder()
    folder.frame()
    for i in range(3):
        whole = i in whole_layers
        folder.attention(None if whole else attention, layers=[i])
        folder.swiglu(f"model.layers.{i}.mlp", None if whole else mlp)
    return folder


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
ALL = Quantization(mlp="fp8", attention="fp8")


@pytest.mark.parametrize("method", [COMPRESSED, {"quant_method": "fp8"}, None], ids=str)
@pytest.mark.parametrize("scales", ["channel", "vector", "tensor", "one"])
def test_scales_of_linear_maps(tmp_path, scales, method):
    folder = llama3(scales, scales)
    folder.published |= {
        "model.layers.0.self_attn.q_proj.input_scale": np.ones((), np.float32),
        "model.layers.0.self_attn.k_proj.k_scale": np.ones((), np.float32),
    }
    assert_equal(folder.write(tmp_path, LLAMA3, method), ALL)


def test_some_groups_in_some_layers(tmp_path):
    """As Meta has it for the 405B: FFNs alone, and not those of the first and last layers."""
    paths = llama3(None, "channel", whole_layers=(0, 2)).write(
        tmp_path, LLAMA3, {"quant_method": "fbgemm_fp8"}
    )
    expected = Quantization(mlp="fp8", skipped_layers=(0, 2))
    assert_equal(paths, expected)
    # Who asks for the groups need not know the layers.
    assert load_target(paths[0], quantization="mlp=fp8").config.quantization == expected


def llama4(prefix: str = "") -> Folder:
    folder = Folder()
    folder.frame(prefix)
    folder.attention(None, prefix)
    folder.swiglu(f"{prefix}model.layers.1.feed_forward", None)
    for i in (0, 2):
        module = f"{prefix}model.layers.{i}.feed_forward"
        folder.add(f"{module}.router.weight", E, D)
        folder.swiglu(f"{module}.shared_expert", None)
    return folder


EXPERTS = Quantization(experts="fp8")


@pytest.mark.parametrize(
    "gate_up, down, method",
    [(("_scale", (E, 1, 2 * F)), ("_scale", (E, D, 1)), "fbgemm_fp8"),
     (("_weight_scale", ()), ("_weight_scale", ()), "modelopt")],
    ids=["fbgemm", "modelopt"],
)  # fmt: skip
def test_stacked_experts(tmp_path, gate_up, down, method):
    folder = llama4()
    for i in (0, 2):
        at = f"model.layers.{i}.feed_forward.experts."
        for name, (end, scales), shape in (
            ("gate_up_proj", gate_up, (E, D, 2 * F)), ("down_proj", down, (E, F, D)),
        ):  # fmt: skip
            folder.add(at + name, *shape, scale=(at + name + end, scales))
            folder.published[f"{at}{name}_input_scale"] = np.ones((), np.float32)
    paths = folder.write(tmp_path, LLAMA4, {"quant_method": method})
    assert_equal(paths, EXPERTS)


def test_experts_one_by_one_in_a_multimodal_folder(tmp_path):
    """Also of Llama 4: rotary pairs of queries and keys lie otherwise, and so do their scales."""
    folder, prefix = Folder(), "language_model."
    folder.frame(prefix)
    folder.attention("channel", prefix)
    folder.swiglu(f"{prefix}model.layers.1.feed_forward", "channel")
    for i in (0, 2):
        module = f"{prefix}model.layers.{i}.feed_forward"
        folder.add(f"{module}.router.weight", E, D)
        folder.swiglu(f"{module}.shared_expert", "channel")
        for e in range(E):
            folder.swiglu(f"{module}.experts.{e}", "channel")
    folder.add("vision_model.patch.weight", 3, 3)
    config = {
        "model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": LLAMA4,
    }  # fmt: skip
    paths = folder.write(tmp_path, config, COMPRESSED)
    assert_equal(paths, Quantization(experts="fp8", mlp="fp8", attention="fp8"))


# ---- what is refused -----------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"


def without_weight(tensors):
    del tensors[Q]


def without_scale(tensors):
    del tensors[f"{Q}_scale"]


def in_blocks(tensors):
    tensors[f"{Q}_scale"] = np.ones((N, 2), np.float32)


def with_inverse_scales(tensors):
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[f"{name}_inv"] = tensors.pop(name)


def whole_queries(tensors):
    tensors[Q] = tensors[Q].astype(np.float32)
    del tensors[f"{Q}_scale"]


@pytest.mark.parametrize(
    "change, method, message",
    [(without_weight, COMPRESSED, f"tensor {Q} is missing"),
     (without_scale, COMPRESSED, rf"layout that is not known.*float-quantized; {Q}\): expected"),
     (in_blocks, COMPRESSED, r"q_proj.weight_scale has shape \[4, 2\], expected one scale for all"),
     (with_inverse_scales, {"quant_method": "fp8"}, r"not known \(fp8; model.layers.0.self_attn"),
     (whole_queries, COMPRESSED, "attention of layers_1 is not stored as that of other layers"),
     (None, {"quant_method": "gptq", "bits": 4}, r"not known \(gptq; .*by compressed-tensors")],
)  # fmt: skip
def test_other_layouts_are_refused_in_one_line(tmp_path, change, method, message):
    folder = llama3("channel", "channel")
    if change is not None:
        change(folder.published)
    path, _ = folder.write(tmp_path, LLAMA3, method)
    with pytest.raises(CheckpointError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        load_target(path)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e5m2"])
def test_narrow_numbers_without_a_word_about_them_are_refused(tmp_path, dtype):
    folder = llama3(None, None)
    folder.published[Q] = folder.published[Q].astype(dtype)
    path, _ = folder.write(tmp_path, LLAMA3, None)
    with pytest.raises(CheckpointError, match=rf"tensor {Q} is in {dtype}, a layout that is not"):
        load_target(path)


def test_packed_whole_numbers_are_refused(tmp_path):
    folder = llama3(None, None)
    for name in [name for name in folder.published if "_proj" in name]:
        module = name.removesuffix(".weight")
        folder.published[f"{module}.weight_packed"] = np.zeros((4, 4), np.int32)
        del folder.published[name]
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    path, _ = folder.write(tmp_path, LLAMA3, method)
    with pytest.raises(
        CheckpointError, match=r"\(compressed-tensors, pack-quantized; 0 tensors in float8"
    ):
        load_target(path)


def test_a_folder_in_fp8_takes_no_other_quantization(tmp_path):
    path, _ = llama3("channel", "channel").write(tmp_path, LLAMA3, COMPRESSED)
    assert load_target(path, quantization="fp8").config.quantization == ALL
    with pytest.raises(ConfigError, match="stored as Quantization.*expected no quantization"):
        load_target(path, quantization="int8")
