"""What a step must compute, and what the machine computes at best: throughput as a share of it.

The work of a step is counted from shapes: matrix products alone, attention only where it is causal,
nothing that is computed twice. So masked-out scores, recomputation and padding lower the share
instead of raising the work.
"""

import time

import jax
import jax.numpy as jnp

from jax_eagle.config import DraftConfig, LlamaConfig

from .config import TrainConfig


def step_flops(
    config: TrainConfig, target: LlamaConfig, draft: DraftConfig, *, kept: bool
) -> float:
    """Floating-point operations of a step of batch x length tokens.

    Counted are the target's layers, its head for the draft vocabulary (the teacher), and of each
    pass of the draft its forward, its backward and its way through the head.

    Args:
      kept: features come from disk, so the target's layers do not run.
    """
    T = config.data.length
    layer, loss = draft.layer, config.loss
    head = 2 * layer.hidden_size * (draft.draft_vocab_size or layer.vocab_size)
    teacher_head = 2 * target.hidden_size * (draft.draft_vocab_size or target.vocab_size)
    total = float(teacher_head)
    if not kept:
        total += sum(_layer_flops(target, T, index) for index in range(target.num_layers))
    # Forward, and backward to the states and to the weights of a head that is trained.
    trains_logits = loss.logits != "none"
    head *= 1 + trains_logits * (1 + draft.own_head)
    for number in range(loss.unroll):
        layers = sum(_layer_flops(layer, T, index) for index in range(layer.num_layers))
        if draft.is_eagle3:  # the first layer's q, k and v read embedding and state
            layers += 2 * layer.hidden_size * _qkv_width(layer)
        total += 3 * layers + _fc_flops(draft, number) + head
    return total * config.data.batch * T


def _qkv_width(c: LlamaConfig) -> int:
    return (c.num_heads + 2 * c.num_kv_heads) * c.head_dim


def _layer_flops(c: LlamaConfig, length: int, index: int) -> float:
    """A layer's forward, per token of a text."""
    D, NH = c.hidden_size, c.num_heads * c.head_dim
    weights = D * _qkv_width(c) + NH * D + 3 * D * c.intermediate_size
    seen = length
    if c.llama4 is not None and c.llama4.chunk is not None and c.uses_rope(index):
        seen = min(length, c.llama4.chunk)
    # Scores and weighted values, over half of the text on average.
    return 2 * weights + 2 * 2 * NH * seen / 2


def _fc_flops(draft: DraftConfig, number: int) -> float:
    """FC in pass `number`: forward, gradient of its weights, and of the states it took."""
    D = draft.layer.hidden_size
    if draft.is_eagle3:  # later passes begin with the state itself
        return 2 * 2 * draft.feature_width * D if number == 0 else 0.0
    inputs = D + draft.feature_width
    return 2 * 2 * inputs * D + (2 * draft.feature_width * D if number else 0)


class Probe:
    """Matrix products as large as this machine needs them to be at its best.

    What else runs on a machine slows products and steps alike: a share of the peak is worth
    something only if both were measured side by side.
    """

    def __init__(self, dtype: str):
        """Makes the operands and compiles."""
        size = 8192 if jax.default_backend() == "gpu" else 1024
        self.flops = float(_PRODUCTS * 2 * size**3)  # of one call
        shape = size, size
        a, b = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(2))
        # Products of products stay of the same size.
        self._operands = a, b * jnp.asarray(size**-0.5, dtype)
        jax.block_until_ready(_products(*self._operands))

    def __call__(self) -> float:
        """Floating-point operations a second of one call, some tens of milliseconds long."""
        begin = time.perf_counter()
        jax.block_until_ready(_products(*self._operands))
        return self.flops / (time.perf_counter() - begin)


_PRODUCTS = 4
"""Of one call: enough to hide what it takes to start one."""


@jax.jit
def _products(a, b):
    for _ in range(_PRODUCTS):
        a = a @ b
    return a


def measured_peak(dtype: str) -> float:
    """Floating-point operations a second of a device at its best: about a second of products."""
    probe, end = Probe(dtype), time.perf_counter() + 1.0
    best = 0.0
    while time.perf_counter() < end:
        best = max(best, probe())
    return best
