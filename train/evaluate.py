"""Acceptance while a run goes on: frozen prompts, the training weights, real decoding.

The prompts' answers are the target's own and are written once, when the run begins. An evaluation
takes a draft in memory; parameters are arguments of the compiled programs, so the next one compiles
nothing. The figures are those of `jax_eagle.acceptance`, under flat names:

    acceptance_length/TREE            by real decoding, all prompts; its interval under
    acceptance_length_low/TREE        ..._low and ..._high
    acceptance_length/TREE/SUITE      of one of several suites of prompts
    decoded_conditional/TREE/depthN   acceptance by depth in those rounds
    chain_length/depthK               acceptance length that chain:K would have, for every K
    conditional/depthN, joint/depthN  chains under every token of the answers, with intervals
    rank/depthN/rankR                 of the chains that got there: the R-th choice is right
    expected_acceptance/depth1        at temperature 1: sum of min(target_probs, draft_probs)
    chains                            how many chains the last four rest on
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jax_eagle import Draft, Target
from jax_eagle.acceptance import (
    CONVENTION,
    NUM_RANKS,
    Decoded,
    Estimate,
    Forced,
    Prompts,
    decode_acceptance,
    forced_acceptance,
    greedy_answers,
)
from jax_eagle.config import ConfigError
from jax_eagle.prompts import SUITES, prompts_of
from jax_eagle.tokenizer import Tokenizer
from jax_eagle.tree import parse_tree

from .config import EvaluationConfig

VALIDATION = "validation"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The figures of one draft."""

    figures: dict[str, float]
    """See above; the acceptance length of the first tree comes first."""
    trees: tuple[str, ...]

    @property
    def acceptance_length(self) -> float:
        """Of the first tree over all prompts, the bonus token counted: the best draft has most."""
        return self.figures[f"acceptance_length/{self.trees[0]}"]

    def line(self) -> str:
        """The main figures, with what they mean."""

        def interval(name: str, key: str) -> str:
            value, low, high = (self.figures[f"{name}{end}/{key}"] for end in ("", "_low", "_high"))
            return f"{value:.3f} [{low:.3f}, {high:.3f}]"

        shown = [f"{tree} {interval('acceptance_length', tree)}" for tree in self.trees]
        depths = [name for name in self.figures if name.startswith("conditional/")]
        by_depth = " ".join(f"{self.figures[name]:.3f}" for name in depths)
        lengths = ", ".join(shown)
        return f"acceptance length {lengths}; conditional by depth {by_depth} ({CONVENTION})"


class Evaluator:
    """Evaluates drafts of one target on the same prompts."""

    def __init__(
        self,
        target: Callable[[], Target],
        prompts: Mapping[str, Prompts],
        config: EvaluationConfig,
        *,
        batch: int = 8,
    ):
        """Writes the target's own answers.

        Args:
          target: makes the target; called for each evaluation, so that none stays in memory.
          prompts: suites of prompts as token ids, as `evaluation_prompts` gives them.
          batch: prompts that are decoded together.

        Raises:
          ConfigError: no prompts, no tree, or a tree that cannot be.
        """
        if not any(prompts.values()) or not config.trees:
            raise ConfigError("evaluation: expected at least one prompt and one tree")
        for tree in config.trees:
            parse_tree(tree, platform=jax.default_backend())
        self._target, self._config, self._batch = target, config, batch
        self._prompts = [list(prompt) for suite in prompts.values() for prompt in suite]
        ends = np.cumsum([len(suite) for suite in prompts.values()])
        self._suites = dict(zip(prompts, np.split(np.arange(ends[-1]), ends[:-1]), strict=True))
        self._answers = greedy_answers(
            target().replace(tokenizer=None),
            self._prompts,
            max_new_tokens=config.max_new_tokens,
            batch=batch,
        )

    def __call__(self, draft: Draft) -> Evaluation:
        """The figures of a draft, whose parameters stay as they are."""
        config, target = self._config, self._target().replace(tokenizer=None)
        decoded = decode_acceptance(
            target, draft, self._prompts,
            trees=config.trees, max_new_tokens=config.max_new_tokens, batch=self._batch,
        )  # fmt: skip
        forced = forced_acceptance(
            target, draft, self._prompts, self._answers,
            depth=config.depth, batch=self._batch,
        )  # fmt: skip
        figures: dict[str, float] = {}
        for tree in config.trees:
            _add(figures, "acceptance_length", tree, decoded[tree].acceptance_length())
        for tree in config.trees:
            figures |= self._decoded_figures(tree, decoded[tree])
        return Evaluation(figures | _forced_figures(forced), config.trees)

    def _decoded_figures(self, tree: str, decoded: Decoded) -> dict[str, float]:
        figures: dict[str, float] = {}
        if len(self._suites) > 1:
            for suite, rows in self._suites.items():
                length = decoded.take(rows).acceptance_length()
                _add(figures, "acceptance_length", f"{tree}/{suite}", length)
        for depth in range(1, decoded.depths.max_depth + 1):
            value = decoded.depths.conditional(depth).value
            figures[f"decoded_conditional/{tree}/depth{depth}"] = value
        return figures


def _forced_figures(forced: Forced) -> dict[str, float]:
    figures: dict[str, float] = {}
    for depth in range(1, forced.depths.max_depth + 1):
        key = f"depth{depth}"
        _add(figures, "chain_length", key, forced.acceptance_length(depth))
        _add(figures, "conditional", key, forced.depths.conditional(depth))
        _add(figures, "joint", key, forced.depths.joint(depth))
        shares = zip(range(1, NUM_RANKS + 1), forced.depths.by_rank(depth), strict=True)
        figures |= {f"rank/{key}/rank{rank}": share for rank, share in shares}
    _add(figures, "expected_acceptance", "depth1", forced.expected_acceptance())
    return figures | {"chains": float(forced.gained.sum())}


def _add(figures: dict[str, float], name: str, key: str, estimate: Estimate) -> None:
    for end, value in zip(("", "_low", "_high"), estimate, strict=True):
        figures[f"{name}{end}/{key}"] = float(value)


def evaluation_prompts(
    config: EvaluationConfig, tokenizer: Tokenizer, questions: Sequence[str]
) -> dict[str, list[list[int]]]:
    """The first prompts of each suite that the config names, as the user's turn of a chat.

    Args:
      questions: of the held-out records, for "validation".

    Returns:
      Token ids by the name of the suite; that of a file is without its folder.

    Raises:
      ConfigError: an unknown suite, two of one name, one without prompts, or a tokenizer without
        chat template.
      ValueError: a file that holds no prompts.
    """
    prompts = {}
    for name in config.prompts:
        texts = list(questions) if name == VALIDATION else prompts_of(name)
        if not texts:
            raise ConfigError(
                f"evaluation.prompts {name!r}: there are none; raise data.validation_share, or "
                f"name {', '.join(SUITES)} or a file"
            )
        suite = name if name in SUITES else Path(name).name
        if suite in prompts:
            raise ConfigError(f"evaluation.prompts: {suite!r} twice, expected different names")
        prompts[suite] = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}])
            for text in texts[: config.num_prompts]
        ]
    return prompts
