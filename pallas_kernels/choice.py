"""Which of its implementations a call of a kernel runs."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax


def choose(
    kernel: str,
    implementations: Mapping[str, Callable[..., Any]],
    name: str | None,
    reason: str | None,
) -> Callable[..., Any]:
    """The implementation of this name; None: the Triton one on a GPU, if it can run the call.

    On a GPU the reference is slow, so a warning says why it has to stand in.

    Args:
      kernel: its name, for messages.
      reason: why the Triton implementation cannot run the call; None: it can.

    Raises:
      ValueError: an unknown name, or "triton" where it cannot run the call.
    """
    if name is None:
        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and reason:
            warnings.warn(f"{kernel} runs slowly, without its GPU kernel: {reason}", stacklevel=3)
        name = "triton" if on_gpu and not reason else "reference"
    if name not in implementations:
        raise ValueError(
            f"{kernel} has no implementation {name!r}; choose from {sorted(implementations)}"
        )
    if name == "triton" and reason:
        raise ValueError(f"{kernel}: triton cannot run this: {reason}; use 'reference'")
    return implementations[name]
