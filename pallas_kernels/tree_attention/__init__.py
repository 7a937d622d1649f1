"""Two-pass tree attention over a paged KV cache (arXiv 2508.08192)."""

from .api import IMPLEMENTATIONS as IMPLEMENTATIONS
from .api import tree_attention as tree_attention
