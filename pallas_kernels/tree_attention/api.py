"""Public entry of tree attention: checks the shapes, chooses the implementation.

Shape letters: B sequences, M queries (tree nodes), X tree keys, N query heads, K KV heads,
H head dimension, P pages in the pool, C tokens per page, R pages per sequence.
"""

import jax
from jaxtyping import Array, Bool, Float, Int

from ..choice import choose
from .inputs import Inputs
from .reference import tree_attention_reference
from .triton import tree_attention_triton, unsupported

IMPLEMENTATIONS = {"reference": tree_attention_reference, "triton": tree_attention_triton}


def tree_attention(
    q_BMNH: Float[Array, "B M N H"],
    k_tree_BXKH: Float[Array, "B X K H"],
    v_tree_BXKH: Float[Array, "B X K H"],
    k_pages_PKCH: Float[Array, "P K C H"],
    v_pages_PKCH: Float[Array, "P K C H"],
    page_table_BR: Int[Array, "B R"],
    length_B: Int[Array, "B"],
    tree_mask_BMX: Bool[Array, "B M X"] | None,
    *,
    first_BM: Int[Array, "B M"] | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B M N H"]:
    """Attention of M tree nodes to a committed paged prefix and to the tree's own keys.

    Pass 1 reads the prefix pages with no mask but length; pass 2 reads the X tree keys under
    `tree_mask_BMX`; the two are merged exactly by log-sum-exp.

    Only the reference has a gradient.

    Args:
      q_BMNH: queries, RoPE applied. They belong to the last M of the X tree keys.
      k_tree_BXKH, v_tree_BXKH: keys (RoPE applied) and values of the tree nodes.
      k_pages_PKCH, v_pages_PKCH: the whole page pool of all layers, in the dtype of the queries or
        in float8_e4m3fn.
      page_table_BR: page ids of each sequence, with the layer's offset added.
      length_B: committed tokens of each sequence; what lies behind them is never read.
      tree_mask_BMX: True where the key is an ancestor of the node or the node itself. None:
        causal (a chain, as in prefill).
      first_BM: first prefix position that a node sees; at or past `length_B` it sees none.
      k_scale, v_scale: what the pages' keys and values are multiplied by, [K] or a scalar.
      scale: factor of the scores; default 1 / sqrt(H).
      implementation: "reference" (plain jnp), "triton" (GPU kernels), or None: the kernels on a
        GPU where they fit the shape, the reference elsewhere.
      interpret: run the kernels in interpret mode (the reference ignores it).

    Returns:
      Outputs of shape [B, M, N, H] in the dtype of the queries; zeros for a node that sees no key.

    Raises:
      ValueError: shapes that do not fit together, an unknown implementation, or a named one that
        cannot run the shape.
    """
    _check_shapes(
        q_BMNH, k_tree_BXKH, v_tree_BXKH, k_pages_PKCH, v_pages_PKCH, page_table_BR, length_B
    )
    if tree_mask_BMX is not None:
        expected = (q_BMNH.shape[0], q_BMNH.shape[1], k_tree_BXKH.shape[1])
        if tree_mask_BMX.shape != expected:
            raise ValueError(f"tree_mask has shape {tree_mask_BMX.shape}, expected {expected}")
    if first_BM is not None and first_BM.shape != q_BMNH.shape[:2]:
        raise ValueError(f"first has shape {first_BM.shape}, expected {q_BMNH.shape[:2]}")
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is not None and factor.shape not in ((), k_tree_BXKH.shape[2:3]):
            raise ValueError(
                f"{name} has shape {factor.shape}, expected () or {k_tree_BXKH.shape[2:3]}"
            )
    reason = unsupported(q_BMNH, k_pages_PKCH)
    run = choose("tree_attention", IMPLEMENTATIONS, implementation, reason)
    inputs = Inputs(
        q_BMNH, k_tree_BXKH, v_tree_BXKH, k_pages_PKCH, v_pages_PKCH, page_table_BR, length_B,
        tree_mask_BMX, first_BM, k_scale, v_scale,
    )  # fmt: skip
    scale = q_BMNH.shape[-1] ** -0.5 if scale is None else scale
    return run(inputs, scale=scale, interpret=interpret)


def _check_shapes(
    q_BMNH, k_tree_BXKH, v_tree_BXKH, k_pages_PKCH, v_pages_PKCH, page_table_BR, length_B
):
    B, M, N, H = q_BMNH.shape
    X, K = k_tree_BXKH.shape[1:3]
    if k_tree_BXKH.shape != (B, X, K, H) or v_tree_BXKH.shape != (B, X, K, H):
        raise ValueError(
            f"tree keys {k_tree_BXKH.shape} and values {v_tree_BXKH.shape} "
            f"do not fit queries {q_BMNH.shape}"
        )
    if N % K:
        raise ValueError(f"{N} query heads are not a multiple of {K} KV heads")
    if M > X:
        raise ValueError(f"{M} queries but only {X} tree keys: the queries are the last M of them")
    if k_pages_PKCH.shape != v_pages_PKCH.shape or k_pages_PKCH.shape[1::2] != (K, H):
        raise ValueError(
            f"page pools {k_pages_PKCH.shape} and {v_pages_PKCH.shape} "
            f"must be [pages, {K}, page_size, {H}]"
        )
    if page_table_BR.shape[0] != B:
        raise ValueError(f"page_table has {page_table_BR.shape[0]} rows for {B} sequences")
    if length_B.shape != (B,):
        raise ValueError(f"length has shape {length_B.shape}, expected {(B,)}")
