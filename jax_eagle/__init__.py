"""EAGLE tree speculation for Llama targets in JAX.

Shape letters, used as suffixes of array names everywhere (`q_BMNH`) and in the annotations of
pytree fields:

    B  sequences in the batch (slots)      M  tree nodes, root included
    T  query tokens in this call           W  tree width: nodes expanded per depth
    S  key/value positions                 A  path length, root included: max depth + 1
    D  model width                         P  pages in the pool
    F  feed-forward or feature width       C  tokens per page (page_size)
    V  target vocabulary                   U  draft vocabulary
    N  query heads                         K  KV heads, or experts of a token
    G  query heads per KV head             H  head dimension
    R  pages per sequence, rows of tiles   L  layers
    X  tree keys (scratch and new ones), or any other list of nodes or blocks
    E  experts, or entries of a short list: expanded nodes, stop ids
    O  tokens of the output          J  columns of a weight block

Start reading at `generate.py`.
"""

from .draft import Draft as Draft
from .generate import GenerateResult as GenerateResult
from .generate import generate as generate
from .generate import generate_stream as generate_stream
from .llama import Target as Target
from .load import load_draft as load_draft
from .load import load_target as load_target
from .sampling import SamplingParams as SamplingParams
