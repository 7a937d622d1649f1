"""What the programs print: streamed text, steps with their time, tables.

Text goes to stdout, everything about it to stderr. Accepted draft tokens and bonus tokens differ in
colour; where there is no colour the text is plain, or `marks` enclose what the draft gave.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .bench import PLAIN, Floor, Summary
from .generate import GenerateResult, RoundEvent
from .tokenizer import TextPieces, Tokenizer

ACCEPTED, BONUS = "green", "bold yellow"
OPEN, CLOSE = "‹", "›"


@dataclasses.dataclass
class Streamed:
    """What one streamed sequence came to."""

    tokens: int = 0
    rounds: int = 0
    accepted: int | None = 0
    """New tokens that the draft proposed; None: not counted."""
    seconds: float = 0.0
    """Of the rounds, prefill not included; 0: not measured."""
    finish_reason: str = ""

    @property
    def acceptance_length(self) -> float:
        """Tokens a round, bonus included; 1.0 if there was no round."""
        return (self.tokens - 1) / self.rounds if self.rounds else 1.0

    def __str__(self) -> str:
        accepted = "" if self.accepted is None else f" ({self.accepted} from the draft)"
        speed = f", {(self.tokens - 1) / self.seconds:.1f} tokens/s" if self.seconds else ""
        return (
            f"{self.tokens} tokens{accepted}, {self.rounds} rounds, acceptance length "
            f"{self.acceptance_length:.2f}{speed}, ended by {self.finish_reason}"
        )


def stream(
    console: Console,
    tokenizer: Tokenizer | None,
    events: Iterable[RoundEvent],
    *,
    marks: bool = False,
) -> Streamed:
    """Prints the first sequence of `events` as it comes."""
    pieces = tokenizer and TextPieces(tokenizer)
    done, accepted, begin, inside = Streamed(), 0, 0.0, False
    for number, event in enumerate(events):
        begin = begin or time.perf_counter()
        for i, token in enumerate(event.new_tokens[0]):
            from_draft = i < event.num_accepted[0]
            piece = pieces.push(token) if pieces else f"{token} "
            if marks and from_draft != inside and piece:
                console.out(OPEN if from_draft else CLOSE, end="", highlight=False)
                inside = from_draft
            console.out(piece, style=ACCEPTED if from_draft else BONUS, end="", highlight=False)
        console.file.flush()
        accepted += event.num_accepted[0]
        done.tokens += len(event.new_tokens[0])
        done.rounds, done.finish_reason = number, event.finish_reasons[0]
    done.accepted, done.seconds = accepted, time.perf_counter() - begin
    console.out(CLOSE if marks and inside else "", highlight=False)
    return done


def show(console: Console, tokenizer: Tokenizer | None, result: GenerateResult) -> Streamed:
    """Prints the first sequence of a result at once."""
    ids = result.tokens[0]
    text = tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else " ".join(map(str, ids))
    console.out(text, highlight=False)
    return Streamed(
        tokens=len(ids),
        rounds=result.rounds[0],
        accepted=None,
        finish_reason=result.finish_reasons[0],
    )


def legend(console: Console, *, marks: bool) -> None:
    """Says what the colours or marks of `stream` mean."""
    accepted, bonus = "accepted draft tokens", "the target's own (bonus) tokens"
    if marks:
        console.print(
            f"Text: {OPEN}{accepted}{CLOSE}; outside of the marks {bonus}", soft_wrap=True
        )
    else:
        console.print(f"Text: [{ACCEPTED}]{accepted}[/], [{BONUS}]{bonus}[/]")


@contextlib.contextmanager
def timed_step(console: Console, what: str, *, spinner: bool = True) -> Iterator[None]:
    """A line for a piece of work: a spinner while it runs, its time when it is done.

    Without `spinner` the terminal is left alone meanwhile, so that nothing disturbs a measurement.
    """
    begin = time.perf_counter()
    with console.status(what) if spinner and console.is_terminal else contextlib.nullcontext():
        if not (spinner and console.is_terminal):
            console.print(f"{what} ...", highlight=False)
        yield
    console.print(f"{what}: {time.perf_counter() - begin:.1f} s", highlight=False)


def speed_table(summaries: Sequence[Summary], title: str) -> Table:
    """One row for plain decoding and one a tree."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_edge=False
    )
    table.add_column("decoding", no_wrap=True)
    for name in ("acceptance\nlength", "rounds", "tokens/s", "ratio", "quartiles", "same\ntext"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summaries:
        speculative = row.tree != PLAIN
        low, high = row.ratio_quartiles
        table.add_row(
            row.tree,
            f"{row.acceptance_length:.2f}",
            str(row.rounds),
            f"{row.tokens_per_second:.1f}",
            f"{row.ratio:.2f}x" if speculative else "1",
            f"{low:.2f}-{high:.2f}" if speculative else "",
            f"{row.same_text:.0%}" if speculative else "",
        )
    return table


def floor_line(floor: Floor) -> str:
    """The plain round against the memory-bandwidth floor, in words."""
    bandwidth = floor.bytes_per_second / 1e9
    return (
        f"A plain round takes {floor.step_seconds * 1e3:.1f} ms; reading "
        f"{floor.weight_bytes / 1e6:.0f} MB of weights at {bandwidth:.1f} GB/s takes "
        f"{floor.floor_seconds * 1e3:.1f} ms: {floor.share:.0%} of the limit."
    )
