"""The target answers prompts, which makes training data: `python -m train.regenerate --help`.

A draft must match the target's own distribution, so a dialogue is trained on with answers that the
target wrote, whoever wrote the questions. Each line of the prompts is a conversation: `messages`
(whose assistant turns are thrown away), `turns` (the user's), or one `prompt`; its `id`, or else
its line number, names it. The output has a line {"messages", "id", "finish_reason"} for each.

Batches join conversations of similar length and come in a shuffled order, so that the output of a
run that was stopped is a fair sample. A second start answers what is missing: usually in the same
batches, as whole ones were taken out of the order of lengths.
Whether a conversation is sampled or greedy, and its seeds, follow from its id alone.
"""

import dataclasses
import hashlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jax_eagle import Draft, SamplingParams, Target, generate, load_draft, load_target
from jax_eagle.config import ConfigError
from jax_eagle.program import run_program

from .jsonl import append_batches, chunks, read_lines

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What the users of one dialogue say."""

    id: int | str
    where: str
    """FILE:LINE, for messages."""
    system: str | None
    questions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Answering:
    """How conversations are answered."""

    max_new_tokens: int
    turns: int
    """Questions that are asked of a conversation, at most."""
    sampled_share: float
    """Share of the conversations that `sampling` is for; the others are greedy."""
    sampling: SamplingParams
    """Its seed is combined with that of each answer."""
    tree: str

    def __post_init__(self):
        if min(self.max_new_tokens, self.turns) < 1:
            raise ConfigError("max-new-tokens and turns start at 1")
        if not 0.0 <= self.sampled_share <= 1.0:
            raise ConfigError(f"sampled-share {self.sampled_share}: expected 0 to 1")

    def sampling_of(self, conversation: Conversation, turn: int) -> SamplingParams:
        """The sampling of one answer."""
        if _hash(self.sampling.seed, conversation.id) >= self.sampled_share * 2**32:
            return SamplingParams()
        seed = _hash(self.sampling.seed, conversation.id, turn)
        return dataclasses.replace(self.sampling, seed=seed)


def read_conversations(path: Path) -> list[Conversation]:
    """The conversations of a file of prompts.

    Raises:
      ConfigError: names file and line: malformed JSON, a field missing or of a wrong type, an
        unknown role, no question, an id that came before.
    """
    found: dict[int | str, Conversation] = {}
    for number, line in read_lines(path):
        where, name = f"{path}:{number}", line.get("id", number)
        if not isinstance(name, int | str):
            raise ConfigError(f"{where}: 'id' is {name!r}, expected a number or a string")
        if name in found:
            raise ConfigError(f"{where}: id {name!r} was given before, at {found[name].where}")
        found[name] = Conversation(name, where, *_questions(line, where))
    if not found:
        raise ConfigError(f"{path}: no prompts")
    return list(found.values())


def _questions(line: dict[str, Any], where: str) -> tuple[str | None, tuple[str, ...]]:
    """(system prompt, questions) of a line of any form."""
    if "messages" in line:
        messages = [_message(message, where) for message in _list(line["messages"], where)]
    elif "turns" in line:
        messages = [("user", turn) for turn in _list(line["turns"], where)]
    elif "prompt" in line:
        messages = [("user", line["prompt"])]
    else:
        raise ConfigError(f"{where}: expected 'messages', 'turns' or 'prompt', got {list(line)}")
    for role, text in messages:
        if role != "assistant" and (not isinstance(text, str) or not text.strip()):
            raise ConfigError(f"{where}: a message is {text!r}, expected text")
    questions = tuple(text for role, text in messages if role == "user")
    if not questions:
        raise ConfigError(f"{where}: no message of the user")
    return next((text for role, text in messages if role == "system"), None), questions


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{where}: expected a list of turns, got {type(value).__name__}")
    return value


def _message(message: Any, where: str) -> tuple[str, Any]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ConfigError(f"{where}: a message is {message!r}, expected 'role' and 'content'")
    if message["role"] not in ROLES:
        raise ConfigError(f"{where}: unknown role {message['role']!r}, expected {', '.join(ROLES)}")
    return message["role"], message["content"]


@dataclasses.dataclass
class _Dialogue:
    """A conversation while it is answered."""

    conversation: Conversation
    messages: list[dict[str, str]]
    finish_reason: str = "stop"
    prompt: list[int] = dataclasses.field(default_factory=list)
    """Token ids up to where the next answer begins."""

    @classmethod
    def of(cls, conversation: Conversation) -> "_Dialogue":
        system = conversation.system
        return cls(conversation, [] if system is None else [{"role": "system", "content": system}])

    def ask(self, target: Target, turn: int) -> bool:
        """Asks the question of this turn, if there is one, it fits, and the last was answered."""
        if self.finish_reason != "stop" or turn >= len(self.conversation.questions):
            return False
        question = {"role": "user", "content": self.conversation.questions[turn]}
        self.prompt = target.require_tokenizer().apply_chat_template([*self.messages, question])
        if len(self.prompt) >= target.config.max_position:
            return False
        self.messages.append(question)
        return True

    def reply(self, target: Target, tokens: Sequence[int], finish_reason: str) -> None:
        """Takes the target's answer; characters that the limit cut are left out."""
        if finish_reason == "error":
            raise ConfigError(f"{self.conversation.where}: the target's logits are not finite here")
        text = target.require_tokenizer().decode(tokens, skip_special_tokens=True)
        text = text if finish_reason == "stop" else text.rstrip("\ufffd")
        self.messages.append({"role": "assistant", "content": text})
        self.finish_reason = finish_reason


def answer(
    target: Target,
    draft: Draft | None,
    conversations: Sequence[Conversation],
    how: Answering,
) -> tuple[list[dict[str, Any]], int]:
    """Lines {"messages", "id", "finish_reason"} of conversations; and how many tokens are new.

    A dialogue ends early after an answer that reached the limit, or where the context is full.
    """
    dialogues = [_Dialogue.of(conversation) for conversation in conversations]
    num_tokens = 0
    for turn in range(how.turns):
        asked = [dialogue for dialogue in dialogues if dialogue.ask(target, turn)]
        if not asked:
            break
        result = generate(
            target,
            draft,
            [dialogue.prompt for dialogue in asked],
            max_new_tokens=how.max_new_tokens,
            sampling=[how.sampling_of(dialogue.conversation, turn) for dialogue in asked],
            tree=how.tree,
        )
        for dialogue, tokens, reason in zip(
            asked, result.tokens, result.finish_reasons, strict=True
        ):
            dialogue.reply(target, tokens, reason)
        num_tokens += sum(map(len, result.tokens))
    lines = [
        {"messages": d.messages, "id": d.conversation.id, "finish_reason": d.finish_reason}
        for d in dialogues
    ]
    return lines, num_tokens


def batches_of(
    target: Target, conversations: Sequence[Conversation], batch: int
) -> list[Sequence[Conversation]]:
    """Conversations joined by the length of their first question, the batches shuffled.

    Those whose first question leaves no room in the context are left out, and counted on stderr.
    """
    sized, too_long = [], []
    for conversation in conversations:
        dialogue = _Dialogue.of(conversation)
        if dialogue.ask(target, 0):
            sized.append((len(dialogue.prompt), str(conversation.id), conversation))
        else:
            too_long.append(conversation.where)
    if too_long:
        limit = target.config.max_position
        print(f"{len(too_long)} prompts of {limit} tokens or more left out: {too_long[0]}, ...",
              file=sys.stderr)  # fmt: skip
    ordered = [conversation for *_, conversation in sorted(sized, key=lambda entry: entry[:2])]
    batches = chunks(ordered, batch)
    random.Random(0).shuffle(batches)
    return batches


def _hash(*parts: Any) -> int:
    """32 well-mixed bits."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL of prompts or dialogues.")],
    out: Annotated[Path, typer.Option(help="JSONL of dialogues; goes on after what is there.")],
    model: Annotated[str, typer.Option(help="Target: a name, folder or .gguf.")] = (
        "smollm2-135m-instruct"
    ),
    draft: Annotated[str | None, typer.Option(help="Speculate with this draft.")] = None,
    tree: Annotated[str, typer.Option(help="The draft's tree.")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Dialogues answered at once.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 224,
    turns: Annotated[int, typer.Option(help="Questions asked of a dialogue, at most.")] = 1,
    sampled_share: Annotated[
        float, typer.Option(help="Share of the dialogues that is sampled; the rest is greedy.")
    ] = 0.4,
    temperature: Annotated[float, typer.Option(help="Of sampled dialogues.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Of sampled dialogues.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Of sampled dialogues.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Other seeds sample other answers.")] = 0,
) -> None:
    """Lets the target answer prompts, to train its draft on the answers."""
    sampling = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, seed=seed)
    how = Answering(max_new_tokens, turns, sampled_share, sampling, tree)
    conversations = read_conversations(prompts)
    target = load_target(model)
    loaded = None if draft is None else load_draft(draft, target)
    done = append_batches(
        out,
        conversations,
        id_of=lambda conversation: conversation.id,
        group=lambda missing: batches_of(target, missing, batch),
        make=lambda part: answer(target, loaded, part, how),
    )
    print(f"{out}: {done}")


if __name__ == "__main__":
    run_program(main, "train.regenerate")
