"""The server on several devices gives the text of one, over HTTP, whichever way they are used."""

import dataclasses
import os

import httpx2
import pytest

from benchmarks.server_process import ServerProcess
from jax_eagle.config import Llama4Attention, MoE
from serve.config import ServerConfig, SpeculativeConfig, parse
from serve.loading import meshes
from serve.request import EngineStatus, together
from tests.serving import (
    TINY,
    assert_serves_text_of_one_device,
    metrics,
    save_tiny_model,
    tiny_flags,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Eight devices are twice as many as KV heads; all else divides.
DENSE = dataclasses.replace(TINY, vocab_size=264, num_layers=1, num_heads=8, num_kv_heads=4)
EXPERTS = dataclasses.replace(
    DENSE,
    num_layers=2,
    llama4=Llama4Attention(nope_layers=(1,), chunk=16, floor_scale=8),
    moe=MoE(num_experts=8, experts_per_token=1, layers=(1,), intermediate_size=16),
)
QUANTISED = {"quantization": "int8", "kv_dtype": "fp8"}
CASES = {
    "tp 8": (DENSE, {}, 1, "-tp", "8"),
    "tp 2 x dp 2": (DENSE, {}, 2, "-tp", "2", "-dp", "2"),
    "tp 4 x dp 2": (DENSE, {}, 2, "-tp", "4", "-dp", "2"),
    "experts, tp 8": (EXPERTS, {}, 1, "-tp", "8"),
    "experts, tp 4 x dp 2": (EXPERTS, {}, 2, "-tp", "4", "-dp", "2"),
    "experts, ep 8": (EXPERTS, {}, 1, "-tp", "8", "--enable-expert-parallel"),
    "quantised, dp 2": (DENSE, QUANTISED, 2, "-dp", "2", "-q", "int8", "--kv-cache-dtype", "fp8"),
}
"""Model, how it is loaded, engines, flags."""
FAST = ("tp 2 x dp 2",)
"""The others run with `pytest -m slow`."""
FLAGS = ("--max-num-batched-tokens", "64", "--max-model-len", "128")


@pytest.fixture
def eight_devices(monkeypatch):
    """For the processes that a test starts; how many there are here is settled before."""
    # Eight devices on a busy machine may take longer to meet than XLA waits before it gives up.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
    count = "--xla_force_host_platform_device_count=8"
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {count} {patience}")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in FAST)) for case in CASES]
)
def test_the_text_of_one_device(case, eight_devices, tmp_path):
    config, options, engines, *flags = CASES[case]
    save_tiny_model(tmp_path, config=config, favourites=3)
    with ServerProcess(*tiny_flags(tmp_path, tree="chain:2"), *FLAGS, *flags) as server:
        server.wait_until_ready()
        try:
            assert_serves_text_of_one_device(server.url, tmp_path, **options)
            with httpx2.Client(base_url=server.url) as client:
                values = metrics(client)
        finally:
            print(server.text())
    own = [values["vllm:generation_tokens_total", str(i)] for i in range(engines)]
    assert all(count > sum(own) / engines / 2 for count in own), own
    answered = [values["vllm:request_generation_tokens_sum", str(i)] for i in range(engines)]
    assert answered == own
    assert ("vllm:generation_tokens_total", str(engines)) not in values


# ---- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [({"tensor_parallel_size": 40, "data_parallel_size": 3}, r"needs 120 devices, there (is|are)"),
     ({"data_parallel_size": 99}, r"needs 99 devices, there (is|are)")],
)  # fmt: skip
def test_too_few_devices(config, message):
    with pytest.raises(ValueError, match=message):
        meshes(ServerConfig(**config))


@pytest.mark.parametrize(
    "flags, message",
    [(["-n", "2", "-r", "2"], "--node-rank is 2, expected 0 to 1"),
     (["-n", "2", "-tp", "3"], "-size 3 does not divide over --nnodes 2"),
     (["-n", "2", "-tp", "2", "-dp", "2"], "--data-parallel-size 2 needs --nnodes 1"),
     (["--kv-cache-dtype", "int3"], "is 'int3', expected one of auto, fp8, fp8_e4m3"),
     (["--speculative-config", '{"quantization": 4}'], "has quantization 4"),
     (["-dp", "0"], "--data-parallel-size is 0, expected 1 or more")],
)  # fmt: skip
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(flags)


def test_vllms_names():
    given = parse([
        "-tp", "4", "-dp", "2", "-ep", "-q", "fp8", "--kv-cache-dtype", "fp8",
        "--speculative-config", '{"quantization": "mlp=int4"}',
    ]).config  # fmt: skip
    assert (given.tensor_parallel_size, given.data_parallel_size) == (4, 2)
    assert given.enable_expert_parallel
    assert (given.quantization, given.kv_cache_dtype) == ("fp8", "fp8")
    assert given.speculative_config == SpeculativeConfig(quantization="mlp=int4")


def test_the_log_line_is_about_all_engines():
    one = EngineStatus(
        running=1, kv_usage=0.5, rounds_by_tree={"a": 2, "plain": 1}, accepted_by_depth=(3,)
    )
    two = EngineStatus(
        running=2, kv_usage=0.1, rounds_by_tree={"a": 5}, accepted_by_depth=(1, 1), steps=4
    )
    assert together([one, two]) == EngineStatus(
        running=3, kv_usage=0.3, rounds_by_tree={"a": 7, "plain": 1}, accepted_by_depth=(4, 1),
        steps=4,
    )  # fmt: skip
    assert together([one]) == one
