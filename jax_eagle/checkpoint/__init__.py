"""Reading and writing weights: one module per format, one mapping for all of them.

    mapping      which tensor of a file is which parameter; every check of a file against a config
    files        JSON and safetensors on disk, written atomically
    experts      files that hold each expert by itself
    hf           Hugging Face folders (config.json + safetensors, single or sharded)
    fp8          such folders with weights in float8_e4m3fn, as others publish them
    gguf         GGUF files, dequantised
    eagle        draft folders: ours, and whatever form of another program is found
    eagle_llama  the forms of EAGLE-1 and EAGLE-2, with Llama and with Llama 4 blocks
    eagle3       the forms of EAGLE-3
    profiles     the forms by name, to write a draft for other programs
    orbax        Orbax folders of a target or a draft

Loaders return a `Target` or a `Draft`; what does not fit raises `CheckpointError` with one line.
"""

from .mapping import CheckpointError as CheckpointError
