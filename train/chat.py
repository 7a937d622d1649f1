"""Conversations -> tokens by the model's own chat template, and which of them the assistant wrote.

Templates seldom say where answers are, so the spans are found in the tokens, by the special tokens
that open and close a turn. An answer is what the model would generate after the open header of the
assistant: the content *and* the token that ends the turn. A token that covers the header's last
line break belongs to the header, whatever else it covers: it stands in the prompt.

Contents that hold special tokens as text would be read as headers. They are refused
(`ControlTokens`), so no text can make its own spans.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import jinja2
import numpy as np

from jax_eagle.config import ConfigError
from jax_eagle.tokenizer import Tokenizer

ROLE = "assistant"


@dataclasses.dataclass(frozen=True)
class HeaderForm:
    """How a family of models writes a turn: start, role, (middle), line break, content, end."""

    name: str
    start: str
    middle: str
    """Special token behind the role; empty: none."""
    line_break: str
    ends: tuple[str, ...]


FORMS = (
    HeaderForm("ChatML", "<|im_start|>", "", "\n", ("<|im_end|>",)),
    HeaderForm(
        "Llama 3", "<|start_header_id|>", "<|end_header_id|>", "\n\n", ("<|eot_id|>", "<|eom_id|>")
    ),
    HeaderForm("Llama 4", "<|header_start|>", "<|header_end|>", "\n\n", ("<|eot|>", "<|eom|>")),
)


class ControlTokens(ConfigError):
    """A conversation whose contents hold special tokens as text."""


class ChatRenderer:
    """Renders conversations and finds the assistant's spans."""

    def __init__(self, tokenizer: Tokenizer):
        """Recognises the form of the model's headers by what its template makes of a small chat.

        Raises:
          ConfigError: there is no chat template, or it writes none of the known forms.
        """
        self._tokenizer = tokenizer
        special = {tokenizer.decode([index]): index for index in tokenizer.special_ids}
        self._control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        probe = ({"role": "user", "content": "a"}, {"role": ROLE, "content": "b"})
        found = set(tokenizer.apply_chat_template(probe, add_generation_prompt=False))
        forms = [form for form in FORMS if special.get(form.start) in found]
        if not forms:
            known = ", ".join(f"{form.name} ({form.start})" for form in FORMS)
            raise ConfigError(f"the chat template has none of the known headers: {known}")
        self.form = forms[0]
        self._start = special[self.form.start]
        middle = [special[self.form.middle]] if self.form.middle else []
        self._role = tokenizer.encode(ROLE, special=False) + middle
        self._ends = [special[end] for end in self.form.ends if end in special]
        self._decode = functools.lru_cache(1024)(tokenizer.decode)

    def render(self, messages: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a conversation, int32 [T], and where the assistant wrote, bool [T].

        Raises:
          ControlTokens: a content holds special tokens as text.
          ConfigError: the template refuses the conversation, or the spans do not fit its turns.
        """
        for number, message in enumerate(messages):
            if held := self._control.search(message["content"]):
                raise ControlTokens(f"turn {number} holds the special token {held[0]!r} as text")
        try:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template refuses it ({error})") from None
        tokens_T = np.asarray(ids, np.int32)
        spans = self.spans(tokens_T)
        expected = sum(message["role"] == ROLE for message in messages)
        if len(spans) != expected:
            raise ConfigError(
                f"found {len(spans)} answers in {self.form.name} headers for {expected} turns of "
                "the assistant: the chat template writes them in another form"
            )
        answer_T = np.zeros(len(tokens_T), bool)
        for span in spans:
            answer_T[span] = True
        if not answer_T.any() or answer_T.all():
            kind = "no token is" if not answer_T.any() else "every token is"
            raise ConfigError(f"{kind} the assistant's: the loss mask would mean nothing")
        return tokens_T, answer_T

    def spans(self, tokens_T: np.ndarray) -> list[slice]:
        """The assistant's spans: each begins behind its header and ends behind its end of turn.

        A header that nothing ends gives no span.
        """
        ends = np.flatnonzero(np.isin(tokens_T, self._ends))
        spans = []
        for start in np.flatnonzero(tokens_T == self._start):
            begin = self._content_begin(tokens_T, int(start) + 1)
            if begin is not None and len(later := ends[ends >= begin]):
                spans.append(slice(begin, int(later[0]) + 1))
        return spans

    def _content_begin(self, tokens_T: np.ndarray, role: int) -> int | None:
        """Where the content of a turn of the assistant begins; None: another role's turn."""
        behind = role + len(self._role)
        if tokens_T[role:behind].tolist() != self._role:
            return None
        for begin in range(behind, len(tokens_T) + 1):
            text = self._decode(tuple(tokens_T[behind:begin].tolist()))
            if text.startswith(self.form.line_break):
                return begin
            if not self.form.line_break.startswith(text):
                return None
        return None
