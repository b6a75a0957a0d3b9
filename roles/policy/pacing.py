"""How fast calls may leave, so that a server's limit is kept and made use of.

Nothing here waits or reads a clock: the caller says what time it is, in seconds, and is told how
long to wait. A known limit is kept evenly. An unknown one is found by running into it, seldom:
what the server let through before it refused is what it allows.
"""

from __future__ import annotations

import math
from collections import deque

MARGIN = 0.03
"""How far below a limit to stay: what leaves evenly arrives unevenly, and one too many costs a
pause."""
LATE_S = 0.05
"""How late a call may leave without moving those behind it. Still, in no second do more leave than
the pace allows."""
HOLD_S, LONGEST_HOLD_S = 20.0, 240.0
"""After a refusal, for how long no faster pace is tried; twice as long when it found what the one
before it had found."""
CALM_S = 5.0
"""A pace that went well for so long is not slowed by more than the margin, and another not by more
than to the half."""
GROWTH = 0.2
"""By what share the pace grows in a second, when faster ones are tried again."""
SHORTEST_SPAN_S = 0.1
"""Calls that left together are taken to have left within this."""
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0
"""The pause after a refusal that does not say how long it is to be; it doubles until a call gets
through."""


class Pace:
    """When the next call may leave.

    limit: calls a second that the server is known to take. None: as many as it turns out to take.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._most = math.inf if limit is None else limit * (1 - MARGIN)
        self.rate = self._most
        """Calls a second, for now."""
        self._due = self._resume = -math.inf
        self._left: deque[float] = deque()
        self._refused_at: float | None = None
        self._paused = self._resumed = -math.inf
        self._horizon = 1.0
        self._fruitless = 0
        self._found, self._tried = 0.0, self.rate
        self._hold_s, self._grows_from = HOLD_S, math.inf

    def wait(self, now: float) -> float:
        """Seconds until a call may leave. 0: it leaves now, and counts as having left."""
        if now < self._resume:
            return self._resume - now
        if self._refused_at is not None:
            self._slow_down(self._refused_at, now)
        elif now > self._grows_from:
            grown_s = min(now - self._grows_from, LONGEST_WAIT_S)
            self.rate = min(self._most, self.rate * (1 + GROWTH) ** grown_s)
            self._grows_from = now
        if (wait_s := max(self._due, self._window_ends()) - now) > 0:
            return wait_s
        if not self._left:
            self._due = self._resumed = now
        self._due = max(self._due, now - LATE_S) + 1 / self.rate
        self._left.append(now)
        while self._left[0] < now - LONGEST_WAIT_S:
            self._left.popleft()
        return 0.0

    def _window_ends(self) -> float:
        """When a call may leave so that a second, or the time of one call, has not too many."""
        if math.isinf(self.rate):
            return -math.inf
        count = max(int(self.rate), 1)
        return self._left[-count] + count / self.rate if len(self._left) >= count else -math.inf

    def answered(self) -> None:
        """A call got through."""
        self._fruitless = 0

    def refused(self, left: float, now: float, wait_s: float | None) -> None:
        """The server had too many calls: the one that left at `left` does not count for it.

        wait_s: how long it says to wait; None if it does not say. All calls wait so long. Many
        refusals of calls that left before the first was heard of are one.
        """
        if left in self._left:
            self._left.remove(left)
        if left > self._paused:
            self._paused, self._refused_at = now, left
            self._horizon = min(max(wait_s or 0.0, 1.0), LONGEST_WAIT_S)
            self._fruitless += 1
        if wait_s is None:
            wait_s = min(FIRST_WAIT_S * 2 ** (self._fruitless - 1), LONGEST_WAIT_S)
            self.pause(self._paused + wait_s)
        else:
            self.pause(now + wait_s)

    def pause(self, until: float) -> None:
        """No call leaves before."""
        self._resume = max(self._resume, until)

    def _slow_down(self, refused_at: float, now: float) -> None:
        """Told only now, when the calls that were under way have shown whether they got through.

        What got through in a window that the server counts over is what it allows, and no window
        is longer than its waits. But a low number may also come of a lull of ours.
        """
        self._refused_at, before, self._resumed = None, self._resumed, now
        through = [left for left in self._left if left > refused_at - self._horizon]
        if math.isfinite(self.rate):
            allowed = len(through) / self._horizon
            went_well = refused_at - before > CALM_S
            least = self._tried * (1 - MARGIN) if went_well else self._tried / 2
        elif not through:
            return
        else:
            # Calls that left later got through, so it had not had as many as it allows: in a
            # whole window it might take more.
            stray = through[-1] > refused_at
            span_s = max(self._paused - through[0], SHORTEST_SPAN_S)
            allowed = len(through) / (min(span_s, self._horizon) if stray else self._horizon)
            least = 0.0
        same = 0.9 * self._found <= allowed <= self._found / 0.9
        self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S) if same else HOLD_S
        self._found = allowed
        self.rate = min(self.rate, max(allowed * (1 - MARGIN), least))
        self._tried = self.rate
        self._grows_from = now + self._hold_s
        self._due = now
