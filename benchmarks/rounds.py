"""The round of a large target, and its parts, each timed in a loop of its own."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_eagle import Draft, SamplingParams, Target
from jax_eagle.cache import commit
from jax_eagle.deployment import describe_mesh
from jax_eagle.generate import decode, propose
from jax_eagle.planning import Share, draft_rows, draft_share, target_share
from jax_eagle.roofline import H100, Roofline
from jax_eagle.sampling import Sampling
from jax_eagle.state import DecodeState, Plan
from jax_eagle.tree import TreeShape
from jax_eagle.verify import verify
from pallas_kernels.compat import order_after

from .synthetic import make_plan, make_state
from .timing import Machine, Row, loop_counts, per_iteration, time_loops

TREES = {4: "chain:3", 8: "static:8", 16: "static:16", 64: "static:medusa-64"}
"""Trees by number of nodes; one node is plain decoding."""

ONE_DEVICE = describe_mesh(1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the measurements of one round have in common."""

    machine: Machine
    many: int
    """Iterations of the loops that are timed."""
    target: Target
    draft: Draft
    batch: int
    context: int
    label: str = ""
    """What the rows begin with."""

    def floor(self, nodes: int) -> float:
        """Seconds of one forward of the target at least."""
        share = self._target_share
        own = {"batch": self.batch, "context": self.context, "weights": share.per_weight}
        return self._roofline.step(self.target.config, nodes=nodes, **own).seconds

    def draft_floor(self, shape: TreeShape) -> float:
        """Seconds of the draft's passes of one round at least."""
        share = draft_share(self.draft.config, ONE_DEVICE, self._target_share.per_weight.head)
        own = {"batch": self.batch, "context": self.context, "weights": share.per_weight}
        rows = draft_rows(shape)
        return self._roofline.drafting(self.draft.config, rows=rows, **own).seconds

    @functools.cached_property
    def _target_share(self) -> Share:
        return target_share(self.target.config, ONE_DEVICE)

    @property
    def _roofline(self) -> Roofline:
        machine, config = self.machine, self.target.config
        limits = dataclasses.replace(
            H100, bandwidth=machine.bytes_per_second, flops=machine.flops_per_second
        )
        return Roofline(limits, cache_bytes=jnp.dtype(config.kv_dtype or config.dtype).itemsize)

    def time_rounds(self, tree: str, head: Any) -> tuple[float, Plan, DecodeState]:
        """(seconds a round, its plan, a state in the middle)."""
        plan, many = make_plan(tree, self.batch), self.many
        draft = None if head is None else self.draft
        room = 2 * sum(loop_counts(many)) * plan.path_length
        state = make_state(
            self.target, draft, plan, batch=self.batch, context=self.context, room=room
        )

        def loop(state, rounds):
            return decode(self.target, draft, head, plan, state, np.int32(rounds))

        seconds, state = time_loops(loop, state, many)
        if np.asarray(state.done).any():
            raise RuntimeError("the rounds ran out of room")
        return seconds, plan, state


def measure_rounds(setting: Setting, sizes_of_trees: tuple[int, ...]) -> Iterator[Row]:
    """The plain step, then for each tree the whole round and its parts."""
    label = f"{setting.label}batch {setting.batch}, {setting.context} tokens"
    plain = setting.time_rounds("root", None)[0]
    yield Row(f"plain step, {label}", plain, setting.floor(1))
    head = jax.jit(lambda draft, target: draft.bind_head(target))(setting.draft, setting.target)
    for nodes in sizes_of_trees:
        yield from _measure_tree(setting, nodes, head, plain, label)


def _measure_tree(
    setting: Setting, nodes: int, head: Any, plain: float, label: str
) -> Iterator[Row]:
    target, draft, machine, tree = setting.target, setting.draft, setting.machine, TREES[nodes]
    whole, plan, state = setting.time_rounds(tree, head)
    many = setting.many
    floor, passes = setting.floor(nodes), plan.shape.max_depth
    draft_floor = setting.draft_floor(plan.shape)
    note = f"{whole / plain:.2f} plain steps"
    yield Row(f"round of {tree}, {label}", whole, floor + draft_floor, note)

    def expand(carry, state, target, draft, head):
        cache, _ = carry
        state = state.replace(draft_cache=cache)
        grown, proposal = propose(target, draft, head, plan, state)
        return grown.replace(length=cache.length), proposal  # the same place every time

    rest = state.replace(draft_cache=None)
    proposal = _zeros(expand, (state.draft_cache, None), rest, target, draft, head)[1]
    drafting, (_, proposal) = per_iteration(
        expand, (state.draft_cache, proposal), many, rest, target, draft, head
    )
    yield Row(f"draft of {tree}, {label}", drafting, draft_floor, f"{passes} passes")

    def forward(carry, tree, cache, target):
        out = target(carry[0], tree, cache)
        logits = target.head(out.x)
        return order_after(logits, carry[0]), logits, out

    begin = _zeros(forward, (proposal.tokens,), proposal.tree, state.cache, target)
    verification, (_, logits, out) = per_iteration(
        forward, (jnp.copy(proposal.tokens), *begin[1:]), many, proposal.tree, state.cache, target
    )
    ratio = f"{verification / plain:.2f} x the plain step"
    yield Row(f"verification of {nodes}, {label}", verification, floor, ratio)
    overhead = 1 - (verification + drafting) / whole
    yield Row(f"overhead of {tree}, {label}", overhead * whole, 0.0, f"{overhead:.1%} of the round")

    def sample(carry, proposal, logits, sampling):
        verdict = verify(
            proposal.tree, proposal.tokens, proposal.law, logits, carry[0], sampling,
            max_depth=passes, max_children=plan.shape.max_children,
        )  # fmt: skip
        return order_after(verdict.bonus, carry[0]), verdict

    for sampling in (SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9)):
        stacked = Sampling.stack([sampling] * setting.batch)
        length = jnp.copy(state.cache.length)
        verdict = _zeros(sample, (length,), proposal, logits, stacked)[1]
        seconds, _ = per_iteration(sample, (length, verdict), many, proposal, logits, stacked)
        name = f"sampling of {nodes} at T = {sampling.temperature}, {label}"
        yield Row(name, seconds, machine.floor(logits.nbytes))

    def put(cache, out):
        last_B1 = jnp.full((setting.batch, 1), nodes - 1, jnp.int32)
        count_B = order_after(out.x, jnp.ones_like(cache.length))
        return commit(cache, out.new_kv, last_B1, count_B).replace(length=cache.length)

    seconds, _ = per_iteration(put, state.cache, many, out)
    written = 2 * sum(x.nbytes for x in jax.tree.leaves(out.new_kv)) // nodes
    yield Row(f"commit of one row, {label}", seconds, machine.floor(written))


def _zeros(step, *arguments):
    """Zeros of the shapes that `step` returns: what a loop begins with."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, *arguments))
