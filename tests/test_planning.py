"""Plans from shapes alone, held against real arrays, and the configurations that are shipped."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eagle import Draft, Target, cli
from jax_eagle.cache import init_cache
from jax_eagle.checkpoint import hf
from jax_eagle.checkpoint.mapping import CheckpointError
from jax_eagle.config import ConfigError, DraftConfig, Llama4Attention, LlamaConfig, MoE
from jax_eagle.deployment import Deployment, describe_mesh, read_deployment, read_mesh
from jax_eagle.inspection import FLOOR_TITLE, plan_lines
from jax_eagle.llama import abstract_params
from jax_eagle.load import check_fit
from jax_eagle.memory import check_room, device_bytes, free_bytes, require
from jax_eagle.planning import Plan, Share, draft_rows, make_plan, read_draft
from jax_eagle.quantize import quantize
from jax_eagle.roofline import H100, Roofline, WeightBytes
from jax_eagle.tree import parse_tree
from serve.config import ServerConfig
from serve.flags import read_file

CONFIGS = Path(__file__).parents[1] / "configs"
SERVERS = ("llama_3_1_8b", "llama_3_3_70b", "llama_4_scout", "llama_4_maverick")
TARGET = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=8,
    num_kv_heads=2, head_dim=16, max_position=4096,
)  # fmt: skip
DRAFT = DraftConfig.for_target(TARGET, draft_vocab_size=128)
EXPERTS = dataclasses.replace(
    TARGET,
    llama4=Llama4Attention(nope_layers=(1,)),
    moe=MoE(num_experts=4, experts_per_token=1, layers=(1,), intermediate_size=96),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shapes of models, without weights."""
    folder = tmp_path_factory.mktemp("shapes")
    write(folder / "target", TARGET.to_hf())
    write(folder / "draft", DRAFT.to_dict())
    write(folder / "tied", dataclasses.replace(TARGET, tie_embeddings=True).to_hf())
    write(folder / "experts", EXPERTS.to_hf())
    wide = dataclasses.replace(TARGET, hidden_size=128)
    write(folder / "wide", DraftConfig.for_target(wide).to_dict())
    return folder


def write(path: Path, fields: dict) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields))


@pytest.fixture
def deployment(folder, monkeypatch) -> Deployment:
    """In the folder of shapes: a target with its draft, in float32."""
    monkeypatch.chdir(folder)
    return Deployment("target", "draft", ((None, "chain:2"),), dtype="float32", max_model_len=640)


@functools.cache
def plan_for(deployment: Deployment, tensor: int = 1, data: int = 1) -> Plan:
    return make_plan(deployment, describe_mesh(tensor, data=data), H100, H100.memory)


def real_bytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


# ---- bytes -------------------------------------------------------------------------------------


FIELDS = {field.name: getattr(TARGET, field.name) for field in dataclasses.fields(TARGET)}


def test_one_device_holds_what_real_arrays_take(deployment, make_target, make_draft):
    plan, target = plan_for(deployment), make_target(**FIELDS)
    network = make_draft(vocab=tuple(range(128)), **FIELDS | {"num_layers": 1})
    params = target.params
    draft = real_bytes(network.params) + real_bytes(network.cut_head(target))
    assert plan.weights["draft"] == draft
    assert plan.weight_bytes == real_bytes(params) + draft
    assert plan.weights["embedding"] == real_bytes(params["embed"])
    assert plan.weights["head"] == real_bytes(params["lm_head"])
    layers = [params[f"layers_{i}"] for i in range(2)]
    assert plan.weights["attention"] == sum(real_bytes(layer["attention"]) for layer in layers)
    assert plan.weights["dense FFN"] == sum(real_bytes(layer["mlp"]) for layer in layers)

    table = jnp.zeros((1, 1), jnp.int32)
    caches = [init_cache(c, table, num_pages=1, page_size=64) for c in (TARGET, DRAFT.layer)]
    assert 64 * plan.token_bytes == sum(real_bytes((c.k_pages, c.v_pages)) for c in caches)


@pytest.mark.parametrize("scheme", ["fp8", "experts=fp8,head=fp8", "mlp=int4,attention=int8"])
def test_weights_in_fewer_bits_take_what_such_arrays_take(deployment, make_target, scheme):
    target = quantize(make_target(**FIELDS), scheme)
    stored = dataclasses.replace(deployment, quantization=scheme, draft_quantization="mlp=int4")
    plan, whole = plan_for(stored), plan_for(deployment)
    assert sum(plan.target.groups.values()) == real_bytes(target.params)
    assert plan.weights["draft"] < whole.weights["draft"]
    assert plan.floor(64).step_seconds < whole.floor(64).step_seconds


def test_devices_share_all_but_norms_and_copies_share_nothing(deployment):
    one, two, copies = (
        plan_for(deployment),
        plan_for(deployment, 2),
        plan_for(deployment, 2, data=4),
    )
    for name, size in one.target.groups.items():
        assert two.weights[name] == (size if name == "norms" else size / 2), name
    assert two.token_bytes == one.token_bytes / 2
    assert copies.weights == two.weights and copies.token_bytes == two.token_bytes
    assert copies.num_sequences == 4 * two.num_sequences > 0
    assert copies.num_tokens == 4 * two.num_tokens


def test_more_devices_than_kv_heads_hold_one_each(deployment):
    two, eight = plan_for(deployment, 2), plan_for(deployment, 8)
    assert eight.token_bytes == two.token_bytes
    q_and_o, k_and_v = 2 * 2 * 64 * 128 * 4, 2 * 2 * 64 * 32 * 4
    assert eight.weights["attention"] == q_and_o / 8 + k_and_v / 2


def test_experts_are_shared_out_whole_or_in_parts(deployment):
    plain = dataclasses.replace(deployment, model="experts", draft=None)
    one, parts = plan_for(plain), plan_for(plain, 2)
    whole = plan_for(dataclasses.replace(plain, enable_expert_parallel=True), 2)
    sizes = {"routed experts": 4 * 3 * 64 * 96, "shared experts": 3 * 64 * 96, "router": 4 * 64}
    for name, size in sizes.items():
        assert one.weights[name] == 4 * size
        for two in (parts, whole):
            assert two.weights[name] == (4 * size if name == "router" else 2 * size), name
    assert one.weights["dense FFN"] == 4 * 3 * 64 * 192
    for plan in (one, parts, whole):
        assert plan.target.per_weight == WeightBytes(4, 4, 4, 4)
    with pytest.raises(ConfigError, match="4 experts do not divide over 8 devices"):
        plan_for(dataclasses.replace(plain, enable_expert_parallel=True), 8)


def test_a_tied_head_and_no_draft(deployment):
    plan = plan_for(dataclasses.replace(deployment, model="tied", draft=None))
    assert "head" not in plan.weights and "draft" not in plan.weights
    assert plan.target.per_weight.head == 4
    floor = plan.floor(1)
    assert floor.tree == "plain" and floor.break_even == 1


def test_the_cache_in_eight_bits(deployment):
    eight_bits = dataclasses.replace(deployment, kv_cache_dtype="fp8")
    assert plan_for(eight_bits).token_bytes == plan_for(deployment).token_bytes / 4


def test_nothing_is_allocated(deployment):
    before = len(jax.live_arrays())
    make_plan(deployment, describe_mesh(4), H100, H100.memory).floor(1)
    assert len(jax.live_arrays()) == before


# ---- whether it fits ---------------------------------------------------------------------------


@given(
    weights=st.integers(1, 10**9),
    token=st.integers(1, 10**6),
    length=st.integers(2, 5000),
    memory=st.integers(1, 10**10),
)
def test_what_is_said_to_fit_fits_and_one_more_does_not(weights, token, length, memory):
    share = Share(TARGET, {"all": weights}, token, WeightBytes())
    deployment = Deployment("x", gpu_memory_utilization=0.5, block_size=16)
    plan = Plan(deployment, describe_mesh(1), Roofline(H100), memory, share, None, length)
    page, pages = 16 * token, -(-length // 16)

    def taken(sequences):
        return weights + page * (sequences * pages + 1)

    if plan.num_sequences:
        assert taken(plan.num_sequences) <= memory / 2
        plan.check()
    else:
        with pytest.raises(ConfigError, match="^x does not fit: "):
            plan.check()
    assert taken(plan.num_sequences + 1) > memory / 2
    assert not plan.has_room_for(plan.num_sequences + 1)
    assert plan.num_sequences == 0 or plan.has_room_for(plan.num_sequences)


def test_weights_are_held_against_what_is_free_before_they_are_read():
    assert free_bytes(None) is free_bytes({}) is None
    free = free_bytes({"bytes_limit": 80_000_000_000, "bytes_in_use": 5_000_000_000})
    assert free == 75e9
    require(75e9, free, 8)
    with pytest.raises(ConfigError, match="^each of 8 devices needs 75.10 GB .* 75.00 GB are free"):
        require(75.1e9, free, 8)
    check_room(lambda: abstract_params(TARGET), None)  # a CPU does not tell


def test_one_device_needs_no_mesh():
    boxed = abstract_params(EXPERTS)
    assert device_bytes(boxed, None) == device_bytes(boxed, describe_mesh(1))


@pytest.fixture
def run(deployment, capsys):
    """Runs `jax-eagle inspect` there: (exit code, stdout, stderr)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["inspect", *map(str, arguments)])
        return stop.value.code, *capsys.readouterr()

    return call


def test_too_little_memory_is_one_line_with_what_is_needed_and_there(run):
    Path("server.yaml").write_text("{model: target, gpu-memory-utilization: 1.0e-4}")
    code, out, _ = run("server.yaml", "--memory-gb", 80)
    assert code == 0 and out.endswith(", 8.00 MB (0.01 % of 80.00 GB) there\n")
    assert re.findall(r"^  (\d+) .*no room", out, re.M) == ["8", "64"]
    code, out, err = run("server.yaml", "--memory-gb", 1)
    assert (code, out, err.count("\n")) == (2, "", 1)
    needed, weights = re.findall(r"([\d.]+) MB", err)[:2]
    assert "target does not fit: each of 1 devices needs" in err and float(needed) > float(weights)
    assert "there are 0.10 MB (0.01 % of 1.00 GB)" in err


def test_what_does_not_divide_is_one_line(run):
    code, out, err = run("target", "--mesh", "3")
    assert (code, out) == (2, "")
    assert err.startswith("jax-eagle: error: 8 attention heads do not divide over 3 devices")


def test_the_plan_of_a_file_and_of_a_folder(run):
    text = "{model: target, speculative-config: {model: draft}, data-parallel-size: 2, port: 9000}"
    Path("server.yaml").write_text(text)
    code, out, _ = run("server.yaml")
    assert code == 0 and out.startswith("target on 2 x H100 (data=2, tensor=1)\n")
    assert "static:eagle-26" in out and "\n  draft    " in out
    code, out, _ = run("server.yaml", "--mesh", "8", "--device", "h200")
    assert code == 0 and out.startswith("target on 8 x H200 (tensor=8)\n") and "141.00 GB" in out
    code, out, _ = run("target", "--mesh", "data=2,tensor=4")
    assert code == 0 and out.startswith("target on 8 x H100 (data=2, tensor=4)\n")
    assert "no room" not in out
    assert "\n  draft                none\n" in out and "chain" not in out


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: [", "cannot be read"),
        ("target: target", "names no model"),
        ("model: 7", "model is 7, expected a text"),
        (
            "{model: target, max-model-len: long}",
            "max-model-len is 'long', expected a whole number",
        ),
        ("{model: target, max-model-len: 5000}", "max-model-len is 5000, .* holds 4096"),
        ("{model: target, gpu-memory-utilization: 0}", "expected a number above 0"),
        ("{model: target, kv-cache-dtype: int3}", "kv-cache-dtype is 'int3', expected one of auto"),
        ("{model: target, quantization: int3}", "quantization 'int3': expected fp8, int8, int4"),
        ("{model: target, enable-expert-parallel: 1}", "expected true or false"),
        ("{model: target, enable-expert-parallel: true}", "the model has no experts"),
        ("{model: target, speculative-config: 3}", "speculative-config is 3"),
        ("{model: target, speculative-config: {model: target}}", "target: not an EAGLE draft"),
        ("{model: target, speculative-config: {model: absent}}", "absent: no such file"),
        ("{model: target, speculative-config: {model: false}}", "model is False, expected a text"),
        ("{model: target, speculative-config: {model: draft, tree: oak}}", "unknown tree 'oak'"),
        (
            "{model: target, speculative-config: {model: draft, tree: [[4, plain]]}}",
            "sequences: null",
        ),
        ("{model: target, speculative-config: {model: draft, tree: 7}}", "has tree 7"),
    ],
)
def test_files_that_cannot_be(deployment, text, message):
    Path("server.yaml").write_text(text)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        plan_for(read_deployment("server.yaml"))


def test_a_draft_of_another_target(deployment):
    with pytest.raises(CheckpointError, match="wide: a draft of another target"):
        plan_for(dataclasses.replace(deployment, draft="wide"))


@pytest.mark.parametrize("text", ["", "0", "8x1", "tensor=0", "tensor=2,data=2", "data=2", "-8"])
def test_meshes_of_no_known_form(text):
    with pytest.raises(ConfigError, match="expected a number of devices"):
        read_mesh(text)


def test_meshes():
    assert dict(read_mesh("8").shape) == dict(read_mesh("tensor=8").shape) == {"tensor": 8}
    assert dict(read_mesh("data=2,tensor=4").shape) == {"data": 2, "tensor": 4}


@pytest.mark.parametrize(
    "tree, rows",
    [
        ("plain", ()),
        ("chain:3", (4, 1, 1)),
        ("static:8", (3, 2)),
        ("dynamic:depth=4,width=3,nodes=9", (5, 3, 3, 3)),
    ],
)
def test_rows_of_the_passes_of_a_draft(tree, rows):
    assert draft_rows(parse_tree(tree)) == rows


# ---- what is shipped ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """Of the shipped configurations, on their own meshes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(CONFIGS.parent)
        found = {}
        for name in SERVERS:
            deployment = read_deployment(f"configs/{name}.yaml")
            found[name] = make_plan(deployment, deployment.mesh, H100, H100.memory)
        return found


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_reads_what_a_plan_reads(name):
    """Both readers of a file, and their defaults, agree."""
    path = CONFIGS / f"{name}.yaml"
    server, deployment = ServerConfig(**read_file(ServerConfig, path)), read_deployment(str(path))
    for field in dataclasses.fields(Deployment):
        if hasattr(server, field.name) and field.name != "dtype":
            assert getattr(deployment, field.name) == getattr(server, field.name), field.name
    speculative = server.speculative_config
    assert speculative is not None
    assert (speculative.model, speculative.tree) == (deployment.draft, deployment.trees)
    assert speculative.quantization == deployment.draft_quantization


@pytest.mark.parametrize("name", SERVERS)
def test_the_comment_of_a_file_is_its_plan(name, plans):
    """Memory and floors, as `jax-eagle inspect` prints them."""
    plan = plans[name]
    plan.check()
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert (
        f"# {plan.weight_bytes / 1e9:.1f} GB of weights on each GPU of 80 GB, room for "
        f"{plan.num_sequences} sequences of {plan.length:,} tokens.\n"
    ) in text
    lines = list(plan_lines(plan))
    table = lines[lines.index(FLOOR_TITLE) : -1]
    assert len(table) == 4
    assert "".join(f"# {line}\n" for line in table) in text


@pytest.mark.parametrize("name", sorted(path.name for path in (CONFIGS / "targets").iterdir()))
def test_the_draft_of_a_target_has_its_shape_in_three_dense_layers(name):
    target = hf.read_config(CONFIGS / "targets" / name, dtype="bfloat16")
    draft = read_draft(str(CONFIGS / "drafts" / f"{name}-eagle"), "bfloat16")
    expected = DraftConfig.for_target(
        target, num_layers=3, draft_vocab_size=32000, input_norm=target.llama4 is not None
    )
    assert draft == expected
    check_fit(Draft(None, None, draft), Target(None, target), name)
