"""Other implementations of attention under the signature of `tree_attention`, for timing.

ejkernel (Apache-2.0, `pip install 'ejkernel[cuda]'`, jax 0.10 alone) has paged attention with a
bias between queries, which a tree needs; one bias for all sequences, so dynamic trees cannot batch.
It finds the tree's keys in the pages, and its pages are [pages, page_size, kv_heads, head_dim].
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.tree_attention import tree_attention


def peers(platform: str = "triton") -> dict[str, Callable[..., jax.Array]]:
    """By name: attention through XLA alone, and ejkernel's where it is installed."""

    def through_xla(**arguments):
        return tree_attention(**arguments, implementation="reference")

    found: dict[str, Callable[..., jax.Array]] = {"reference": through_xla}
    if importlib.util.find_spec("ejkernel") is not None:
        found["ejkernel"] = _ejkernel(platform)
    return found


def _ejkernel(platform: str) -> Callable[..., jax.Array]:
    from ejkernel.modules.operations import unified_attention

    def attend(
        q_BMNH, k_tree_BXKH, v_tree_BXKH, k_pages_PKCH, v_pages_PKCH, page_table_BR, length_B,
        tree_mask_BMX,
    ):  # fmt: skip
        """As fast as if the last M tokens in the pages were the tree; the data is any data."""
        del k_tree_BXKH, v_tree_BXKH
        B, M, N, H = q_BMNH.shape
        P, K, C, _ = k_pages_PKCH.shape
        pools = (jnp.reshape(pages, (P, C, K, H)) for pages in (k_pages_PKCH, v_pages_PKCH))
        bias_MM = jnp.where(tree_mask_BMX[0], 0.0, -jnp.inf).astype(jnp.float32)
        out = unified_attention(
            jnp.reshape(q_BMNH, (B * M, N, H)), *pools, length_B, page_table_BR,
            jnp.arange(B + 1, dtype=jnp.int32) * M, None, bias_MM, causal=True, platform=platform,
        )  # fmt: skip
        return jnp.reshape(out, q_BMNH.shape)

    return attend
