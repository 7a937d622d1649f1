"""Compiles for an H100 on a machine without one, and reads what the compiler made of it.

XLA needs only the CUDA plugin (`pip install jax-cuda13-plugin jax-cuda13-pjrt`), no driver and no
CUDA libraries, and a description of the card; registers and spills come from `ptxas` (in the image
or from `nvidia-cuda-nvcc`). JAX_PLATFORMS=cpu must be set: the plugin looks for cuDNN otherwise.

What this cannot see: speed, and the choice of GEMM kernels, which is made by measuring.
"""

import dataclasses
import importlib.util
import math
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

SHARED_MEMORY_LIMIT = 232_448
"""Bytes that a block of threads may take on an H100."""

_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def has_plugin() -> bool:
    """Whether the CUDA plugin is installed."""
    packages = "jax_plugins", "jax_plugins.xla_cuda13"  # the second's parent must exist to be asked
    return all(importlib.util.find_spec(name) is not None for name in packages)


def h100_mesh(num_devices: int = 1, axis: str = "tensor") -> jax.sharding.Mesh:
    """A mesh of described H100s: programs compile for it, nothing can run on it.

    Raises:
      RuntimeError: the CUDA plugin is not installed.
    """
    if not has_plugin():
        raise RuntimeError(
            "compiling for an H100 needs the CUDA plugin: "
            "pip install jax-cuda13-plugin jax-cuda13-pjrt in the version of jax"
        )
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_H100, topology=f"1x1x{num_devices}"
    )
    return topologies.make_mesh(topology, (num_devices,), (axis,))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kernel takes of a multiprocessor."""

    name: str
    registers: int
    spill_bytes: int
    """Stores and loads of registers that did not fit, in the code (not per launch)."""
    shared_memory: int
    threads: int
    grid: tuple[int, ...]
    wgmma: int
    """Tensor-core instructions of a warp group, in the code."""
    mma: int
    """Tensor-core instructions of a warp."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and how long the compiler took."""

    compiled: jax.stages.Compiled
    seconds: float
    kernels: list[Kernel]
    """Those whose name begins with the prefix that was asked for."""


def compile_for_h100(lowered: jax.stages.Lowered, *, kernels: str = "tree_attention") -> Program:
    """Compiles what was lowered for the devices of `h100_mesh`.

    Raises:
      RuntimeError: `ptxas` was not found, or rejects the code.
    """
    with tempfile.TemporaryDirectory() as folder:
        # There is no device to measure on, and trying hundreds of GEMMs takes half a minute.
        options: Any = {"xla_dump_to": folder, "xla_gpu_autotune_level": 0}
        begin = time.perf_counter()
        compiled = lowered.compile(compiler_options=options)
        seconds = time.perf_counter() - begin
        return Program(compiled, seconds, _read_kernels(Path(folder), kernels))


def lower_for_cuda(function: Callable, **arguments) -> str:
    """The StableHLO that `function` lowers to for a GPU; needs neither GPU nor plugin.

    A kernel that Pallas cannot lower raises.
    """
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(**arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def _read_kernels(folder: Path, prefix: str) -> list[Kernel]:
    launches = {}
    for file in folder.glob("*thunk_sequence.txt"):
        pattern = r"(\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]\s+shared_memory: (\d+)"
        for name, grid, threads, shared in re.findall(pattern, file.read_text()):
            grid, threads = (tuple(map(int, x.split(","))) for x in (grid, threads))
            launches[name] = int(shared), math.prod(threads), grid
    kernels = []
    for file in folder.glob("*.ptx"):
        text = file.read_text()
        entries = re.split(r"(?=\.entry )", text)[1:]
        names = [match[1] for part in entries if (match := re.match(r"\.entry (\w+)", part))]
        if not any(name.startswith(prefix) for name in names):
            continue
        used = _assemble(file)
        for name, body in zip(names, entries, strict=True):
            if name.startswith(prefix):
                kernels.append(
                    Kernel(
                        name,
                        *used[name],
                        *launches[name],
                        wgmma=body.count("wgmma.mma_async"),
                        mma=body.count("mma.sync"),
                    )  # fmt: skip
                )
    return sorted(kernels, key=lambda kernel: kernel.name)


def _assemble(file: Path) -> dict[str, tuple[int, int]]:
    """(registers, spill bytes) of each kernel in a PTX file, as ptxas reports them."""
    with tempfile.NamedTemporaryFile() as out:
        command = [_find_ptxas(), "-v", "-arch=sm_90a", str(file), "-o", out.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas rejects {file.name}: {done.stderr.strip()}")
    used = {}
    for report in done.stderr.split("Compiling entry function '")[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = re.search(r"Used (\d+) registers", report)
        assert spills and registers, report
        used[report.split("'")[0]] = int(registers[1]), int(spills[1]) + int(spills[2])
    return used


def _find_ptxas() -> str:
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        if (path := Path(folder, "cu13", "bin", "ptxas")).is_file():
            return str(path)
    if path := shutil.which("ptxas"):
        return path
    raise RuntimeError("ptxas not found: pip install nvidia-cuda-nvcc")
