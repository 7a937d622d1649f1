"""Reading and writing weights: one module per format, one mapping for all of them.

    mapping   which tensor of a file is which parameter; every check of a file against a config
    files     JSON and safetensors on disk, written atomically
    hf        Hugging Face folders (config.json + safetensors, single or sharded)
    gguf      GGUF files, dequantised
    eagle     draft folders (ours and the official EAGLE-1 ones)
    orbax     Orbax folders of a target or a draft

Loaders return a `Target` or a `Draft`; what does not fit raises `CheckpointError` with one line.
"""

from .mapping import CheckpointError as CheckpointError
