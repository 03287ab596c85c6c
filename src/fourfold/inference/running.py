"""What an engine knows of the rows of its cache, and of the sequences that run in them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fourfold.inference.requests import Request, Sequence
from fourfold.inference.text import Detokenizer, StopStrings

__all__ = ["Running", "Slot"]


@dataclass(eq=False)
class Slot:
    """One row of the cache.

    Attributes:
        tokens: What stands in it.
        adapter: What wrote them.
        used_at: Number of the step that last had it.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    adapter: str | None = None
    used_at: int = 0


@dataclass(eq=False)
class Running:
    """A sequence in a slot.

    Attributes:
        todo: Tokens that are still to be written; the last one's logits give the next.
        ahead: Passes that have begun and whose token has not been read.
    """

    sequence: Sequence
    slot: Slot
    todo: list[int]
    detokenizer: Detokenizer
    stop: StopStrings
    most_tokens: int
    ahead: int = 0

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def is_live(self) -> bool:
        return self.sequence.finish_reason is None

    @property
    def goes_on(self) -> bool:
        """Whether another pass gives it a token, as far as can be foreseen."""
        generated = len(self.sequence.token_ids)
        return self.is_live and generated > 0 and generated + self.ahead < self.most_tokens
