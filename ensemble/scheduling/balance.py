"""Whether a sequence that decodes at one replica should go on at another one, its KV handed off.

It should if the tokens of all at both replicas come sooner so, by more than the sequence stands still meanwhile. The
replica that it leaves has to be slower by a fifth than the other one is with it: so what moved has no reason to return.
"""

from typing import NamedTuple

from ensemble.scheduling.placement import Site

LEAST_RATIO = 1.2  # of the two replicas' times between tokens, the sequence counted at the one that it goes to
LEAST_GAIN_S = 1.0  # of all concerned together


class Side(NamedTuple):
    """A replica that decodes."""

    site: Site
    num_seqs: int  # that decode there
    num_waiting: int = 0  # of them for their turn, resident or in the host pool

    def token_s(self, num_more: int = 0, context_len: int = 0) -> float:
        """Seconds between two tokens of each sequence, if so many come, or go."""
        if not self.num_waiting:
            return self.site.token_s(num_more, context_len)
        num_running = max(1, self.num_seqs - self.num_waiting)  # before and after
        return self.site.token_s() * (self.num_seqs + num_more) / num_running


def is_slower(source: Side, reader: Side, context_len: int) -> bool:
    return source.token_s() > LEAST_RATIO * reader.token_s(1, context_len)


def gain_s(source: Side, reader: Side, context_len: int, num_tokens: int) -> float:
    """Seconds that all sequences of both, and prompts, gain together while one of the source has so many tokens to
    come, if it goes to the reader."""
    before_s = source.num_seqs * source.token_s() + reader.num_seqs * reader.token_s()
    left_s, joined_s = source.token_s(-1, context_len), reader.token_s(1, context_len)
    after_s = (source.num_seqs - 1) * left_s + (reader.num_seqs + 1) * joined_s
    prompts_s = source.site.lost(num_tokens * source.token_s()) - reader.site.lost(num_tokens * joined_s)
    return num_tokens * (before_s - after_s) + prompts_s


def keeps_targets(source: Side, reader: Side, context_len: int, target_s: float | None, gap_s: float | None) -> bool:
    """Whether nobody at the reader misses an ITL target that is kept now, nor the sequence by the gap of its move,
    unless it misses its own anyway. `gap_s`: None: it is not known."""
    token_s = reader.token_s(1, context_len)
    if reader.site.target_s is not None and token_s > reader.site.target_s:
        return False
    if target_s is None:
        return True
    return token_s <= target_s and (source.token_s() > target_s or (gap_s is not None and gap_s <= target_s))
