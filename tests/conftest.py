"""Settings of the whole suite: strict JAX, one CPU device, compiled programs kept between runs."""

import os
from pathlib import Path

# Read by JAX when it is imported, and inherited by the programs that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jax-eagle" / "xla-tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# No deadline: the first example of a test compiles.
hypothesis.settings.register_profile(
    "jax-eagle", deadline=None, max_examples=25, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("jax-eagle")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
