"""*Equal text*: when two runs of one prompt count as giving the same tokens, in float32.

Token ids must be identical up to the first difference. That difference is excused only where the
reference run's own choice was within rounding: its margin is below

    1e-4 + 2e-5 * max abs logit        (divided by the temperature when sampling).

The margin at T = 0 is the gap of the two largest logits; when sampling, the gap of the two largest
perturbed scores (the processed law's logits plus the Gumbel noise of that position), and zero where
a filter cuts so close that a threshold moved by 1e-5 changes the choice. Behind an excused
difference the texts have different prefixes, so the rest of the prompt is not compared. One prompt
in 50 may be excused, and one always; each is listed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_eagle import SamplingParams, Target
from jax_eagle.sampling import Purpose, Sampling, gumbel, processed_scores

EXCUSED_ONE_IN = 50
_LENGTH_BUCKET = 64


@dataclass(frozen=True)
class Margins:
    """How clear each choice of a reference run was, one entry a new token."""

    margin: np.ndarray
    max_abs_logit: np.ndarray
    temperature: float = 0.0

    @property
    def bound(self) -> np.ndarray:
        """Below this margin two float32 programs may choose differently."""
        return (1e-4 + 2e-5 * self.max_abs_logit) / (self.temperature or 1.0)


@dataclass(frozen=True)
class Difference:
    """The first difference of one prompt's texts."""

    prompt: int
    position: int
    """Index of the new token."""
    expected: int | None
    """None: the text ends here."""
    actual: int | None
    margin: float
    bound: float

    @property
    def excused(self) -> bool:
        return self.margin < self.bound

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt}, new token {self.position}: {self.actual} for {self.expected}, "
            f"margin {self.margin:.2e} of {self.bound:.2e}"
            f"{' (excused)' if self.excused else ''}"
        )


@dataclass(frozen=True)
class Comparison:
    """Outcome over all prompts."""

    prompts: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether the two runs gave equal text."""
        allowed = max(1, self.prompts // EXCUSED_ONE_IN)
        return all(d.excused for d in self.differences) and len(self.differences) <= allowed

    def __str__(self) -> str:
        same = self.prompts - len(self.differences)
        return "\n".join([f"{same} of {self.prompts} texts identical", *map(str, self.differences)])


def first_difference(expected: Sequence[int], actual: Sequence[int]) -> int | None:
    """The first index at which the texts differ or one of them ends; None if they are the same."""
    for i, pair in enumerate(zip(expected, actual, strict=False)):
        if pair[0] != pair[1]:
            return i
    return None if len(expected) == len(actual) else min(len(expected), len(actual))


def compare(
    target: Target,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    actual: Sequence[Sequence[int]],
    *,
    sampling: Sequence[SamplingParams] | None = None,
    margins: Callable[[int], Margins] | None = None,
) -> Comparison:
    """Compares new tokens prompt by prompt.

    Args:
      expected: the reference run.
      sampling: of each prompt; None: greedy.
      margins: of the reference run, by prompt; None: computed with the target where texts differ.
    """
    if not len(prompts) == len(expected) == len(actual):
        raise ValueError(f"{len(prompts)} prompts, {len(expected)} and {len(actual)} texts")

    def computed(i: int) -> Margins:
        params = sampling[i] if sampling else SamplingParams()
        return reference_margins(target, prompts[i], expected[i], params)

    differences = []
    for i, texts in enumerate(zip(expected, actual, strict=True)):
        if (at := first_difference(*texts)) is None:
            continue
        ids = [int(text[at]) if at < len(text) else None for text in texts]
        margin, bound = np.inf, 0.0  # a text that should have ended has no margin to be excused by
        if ids[0] is not None:
            its = (margins or computed)(i)
            margin, bound = float(its.margin[at]), float(its.bound[at])
        differences.append(Difference(i, at, ids[0], ids[1], margin, bound))
    return Comparison(len(prompts), tuple(differences))


def summarise(comparison: Comparison) -> dict[str, Any]:
    """The figures of a report; prints every difference."""
    for difference in comparison.differences:
        print(difference, flush=True)
    excused = sum(d.excused for d in comparison.differences)
    return {
        "equal": comparison.equal,
        "prompts": comparison.prompts,
        "identical": comparison.prompts - len(comparison.differences),
        "excused": excused,
        "different": len(comparison.differences) - excused,
    }


def reference_margins(
    target: Target, prompt: Sequence[int], new_ids: Sequence[int], sampling: SamplingParams
) -> Margins:
    """Margins of one text, from one plain forward over the whole of it."""
    ids = [*prompt, *new_ids]
    padded = np.zeros((1, -(-len(ids) // _LENGTH_BUCKET) * _LENGTH_BUCKET), np.int32)
    padded[0, : len(ids)] = ids
    choices = np.arange(len(prompt) - 1, len(ids) - 1)
    position = np.arange(1, padded.shape[1] + 1, dtype=np.int32)[None]
    margin, largest = _margins(
        target.replace(tokenizer=None), padded, position, Sampling.stack([sampling])
    )
    return Margins(
        np.asarray(margin)[0, choices], np.asarray(largest)[0, choices], sampling.temperature
    )


@jax.jit
def _margins(target: Target, tokens_1T, position_1T, sampling: Sampling):
    logits_1TV = target.logits(tokens_1T)
    V = logits_1TV.shape[-1]
    largest_1T = jnp.max(jnp.abs(logits_1TV), axis=-1)

    def gap(scores_1TV):
        top_1T2 = jax.lax.top_k(scores_1TV, 2)[0]
        return top_1T2[..., 0] - top_1T2[..., 1]

    def sampled():
        noise_1TV = gumbel(sampling.seed, position_1T, Purpose.TARGET, V)

        def perturbed(step: float):
            moved = sampling.replace(
                top_p=jnp.where(sampling.top_p < 1, sampling.top_p + step, sampling.top_p),
                min_p=jnp.where(sampling.min_p > 0, sampling.min_p + step, sampling.min_p),
            )
            return processed_scores(logits_1TV, moved) + noise_1TV

        best = partial(jnp.argmax, axis=-1)
        stable_1T = best(perturbed(-1e-5)) == best(perturbed(1e-5))
        return jnp.where(stable_1T, gap(perturbed(0.0)), 0.0)

    greedy = sampling.temperature[0] == 0
    return jax.lax.cond(greedy, lambda: gap(logits_1TV), sampled), largest_1T
