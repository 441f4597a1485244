"""Drafts without a draft model: what followed the last tokens when they were there before.

The longest suffix of prompt and text so far that occurred earlier is looked up; what came after it
is proposed, and the model verifies all of it in one step (prompt lookup, as llama.cpp's `lookup`
and vLLM's `ngram`). How much is proposed is what pays: with a the chance that a token is right and
b what one more token adds to a step, g tokens give (1 - a^(g+1)) / (1 - a) for 1 + g b.
"""

from collections.abc import Sequence

MOST = 7  # tokens of a draft: eight rows with the one before it, of which kernels take 4 at once
SHORTEST, LONGEST = 2, 12  # tokens of a suffix that are compared
PLACES = 32  # at most, the latest, where a suffix is looked at
BELIEF = 4.0  # tokens that the first guess of a chance is worth
FORGET = 0.9  # of what was seen, at each draft


class Pace:
    """What a step costs by how many tokens a sequence runs in it."""

    def __init__(self) -> None:
        self.single = 0.0  # ns, of a step of one token
        self.more = 0.1  # b: what each further one adds, over `single`

    def saw(self, tokens: int, elapsed_ns: float) -> None:
        if tokens == 1:
            self.single = elapsed_ns if not self.single else 0.8 * self.single + 0.2 * elapsed_ns
        elif self.single:
            found = (elapsed_ns / self.single - 1) / (tokens - 1)
            self.more = 0.8 * self.more + 0.2 * min(max(found, 0.0), 2.0)

    def best(self, chance: float) -> int:
        """The g of 0 .. MOST that gives most tokens a second."""
        gains, expected = [], 0.0
        for g in range(MOST + 1):
            expected += chance**g
            gains.append(expected / (1 + g * self.more))
        return max(range(MOST + 1), key=gains.__getitem__)


class Drafts:
    """Of one sequence."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._ends: dict[tuple[int, ...], list[int]] = {}  # an n-gram -> the places behind it
        self._seen = 0  # ids whose n-grams are in `_ends`
        self._length = SHORTEST  # of the suffix that the last draft stands on
        # By the length of the suffix: longer ones are believed more before anything was seen.
        self._right = [BELIEF * (1 - 1 / max(n, 1)) for n in range(LONGEST + 1)]
        self._tried = [BELIEF] * (LONGEST + 1)

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        """Up to `room` tokens that may follow `ids`; none where they would not pay."""
        for end in range(max(self._seen, SHORTEST), len(ids)):
            self._ends.setdefault(tuple(ids[end - SHORTEST : end]), []).append(end)
        self._seen = len(ids)
        ends = self._ends.get(tuple(ids[-SHORTEST:]), ())[-PLACES:]
        if not ends:
            return []
        length, end = max((_shared(ids, end), end) for end in ends)
        self._length = length
        count = min(self._pace.best(self._right[length] / self._tried[length]), room)
        # What follows may run into the suffix itself: a text that repeats with a short period.
        return [ids[end + i % (len(ids) - end)] for i in range(count)]

    def learn(self, proposed: int, accepted: int) -> None:
        """How the last draft went; what came after the first wrong token was never tried."""
        tried = min(proposed, accepted + 1)
        for counts, more in ((self._right, accepted), (self._tried, tried)):
            counts[self._length] = FORGET * counts[self._length] + more


def _shared(ids: Sequence[int], end: int) -> int:
    """Tokens that the text up to `end` and all of it have in common at their ends, to LONGEST."""
    length = SHORTEST
    while length < min(LONGEST, end) and ids[end - length - 1] == ids[-length - 1]:
        length += 1
    return length
