"""What every implementation of tree attention takes."""

from typing import Any, NamedTuple


class Inputs(NamedTuple):
    """The arrays of `tree_attention`, which says what each one is; None where a call has none."""

    q_BMNH: Any
    k_tree_BXKH: Any
    v_tree_BXKH: Any
    k_pages_PKCH: Any
    v_pages_PKCH: Any
    page_table_BR: Any
    length_B: Any
    tree_mask_BMX: Any
    first_BM: Any = None
    k_scale: Any = None
    v_scale: Any = None
