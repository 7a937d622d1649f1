"""Products of few rows with the weights of those experts that are hit, quantised or not."""

from .api import IMPLEMENTATIONS as IMPLEMENTATIONS
from .api import grouped_matmul as grouped_matmul
from .arrangement import Arrangement as Arrangement
from .arrangement import arrange as arrange
from .config import rows_per_tile as rows_per_tile
from .int4 import pack_int4 as pack_int4
from .int4 import unpack_int4 as unpack_int4
from .reference import dequantize as dequantize
