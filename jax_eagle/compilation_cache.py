"""Compiled programs on disk, so that the second start of a program does not compile again.

The folder is `xla` in the user's cache (`hub.cache_folder`); JAX's own settings go before:
JAX_COMPILATION_CACHE_DIR, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, JAX_ENABLE_COMPILATION_CACHE.
"""

import os

import jax

from .hub import cache_folder

MIN_COMPILE_SECONDS = 0.5


def enable_compilation_cache() -> None:
    """Keeps what takes longer than MIN_COMPILE_SECONDS to compile. Call it before compiling."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
