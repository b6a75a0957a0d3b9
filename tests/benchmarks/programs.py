"""Programs for a few of reasoning-gym's tasks: right, nearly right, wrong, and wrong with airs.

Which is which is not ours to say: tests/test_labelled.py runs each on entries of its task and asks
the task's own scorer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any, Literal

from reasoning_gym.arithmetic.leg_counting import ANIMALS

Kind = Literal["right", "nearly", "wrong", "well_written"]


@dataclass(frozen=True)
class Programs:
    """A task, what `solve` gets of an entry, and programs of each kind."""

    question: str
    arguments: Callable[[dict[str, Any]], tuple[Any, ...]]
    right: str
    other_right: str
    nearly: str
    wrong: str
    well_written: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> list[tuple[Kind, str]]:
        return [
            ("right", dedent(self.right)),
            ("right", dedent(self.other_right)),
            ("nearly", dedent(self.nearly)),
            ("wrong", dedent(self.wrong)),
            ("well_written", dedent(self.well_written)),
        ]


PROGRAMS: dict[str, Programs] = {
    "count_bits": Programs(
        "Write solve(n): how many 1 bits n has in binary.",
        lambda entry: (entry["metadata"]["number"],),
        right="""\
            def solve(n):
                return bin(n).count("1")
            """,
        other_right="""\
            def solve(n):
                bits = 0
                while n:
                    n &= n - 1
                    bits += 1
                return bits
            """,
        nearly="""\
            def solve(n):
                bits = 0
                while n > 1:
                    bits += n & 1
                    n >>= 1
                return bits
            """,
        wrong="""\
            def solve(n):
                return len(bin(n)) - 2
            """,
        well_written='''\
            def solve(n: int) -> int:
                """Return the number of set bits of ``n``.

                Works in O(1) by folding the 32 bits of the number in parallel, a classic
                technique known as SWAR (SIMD within a register).
                """
                pairs: int = n - ((n >> 1) & 0x55555555)
                nibbles: int = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
                folded: int = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
                return (folded * 0x01010101) >> 24
            ''',
    ),
    "gcd": Programs(
        "Write solve(numbers): the greatest common divisor of a list of two or more numbers.",
        lambda entry: (entry["metadata"]["numbers"],),
        right="""\
            import math

            def solve(numbers):
                return math.gcd(*numbers)
            """,
        other_right="""\
            def solve(numbers):
                found, *rest = numbers
                for other in rest:
                    while other:
                        found, other = other, found % other
                return found
            """,
        nearly="""\
            import math

            def solve(numbers):
                return math.gcd(numbers[0], numbers[1])
            """,
        wrong="""\
            def solve(numbers):
                return min(numbers)
            """,
        well_written='''\
            from collections.abc import Sequence

            def solve(numbers: Sequence[int]) -> int:
                """Return the greatest common divisor of ``numbers``.

                Every candidate divisor up to the square root of the smallest number is tried,
                which is sufficient because divisors come in pairs.
                """
                smallest: int = min(numbers)
                best: int = 1
                candidate: int = 1
                while candidate * candidate <= smallest:
                    if all(number % candidate == 0 for number in numbers):
                        best = candidate
                    candidate += 1
                return best
            ''',
        options={"min_numbers": 2, "max_numbers": 3, "max_value": 200},
    ),
    "base_conversion": Programs(
        "Write solve(text, source, target): the number that `text` is in base `source`, written in "
        "base `target`, with a to z for digits above 9.",
        lambda entry: tuple(
            entry["metadata"][name] for name in ("source_repr", "source_base", "target_base")
        ),
        right="""\
            def solve(text, source, target):
                number, written = int(text, source), ""
                while number:
                    number, digit = divmod(number, target)
                    written = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + written
                return written or "0"
            """,
        other_right="""\
            import string

            def solve(text, source, target):
                signs = string.digits + string.ascii_lowercase

                def write(number):
                    more, last = divmod(number, target)
                    return (write(more) if more else "") + signs[last]

                return write(int(text, source))
            """,
        nearly="""\
            def solve(text, source, target):
                number, written = int(text, source), ""
                while number >= target:
                    number, digit = divmod(number, target)
                    written = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + written
                return written
            """,
        wrong="""\
            def solve(text, source, target):
                return int(text, source)
            """,
        well_written='''\
            DIGITS: str = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

            def solve(text: str, source: int, target: int) -> str:
                """Convert ``text`` from base ``source`` to base ``target``.

                The digits are collected from the least significant one and reversed at the end,
                which keeps the algorithm linear.
                """
                number: int = int(text, source)
                digits: list[str] = []
                while number > 0:
                    number, remainder = divmod(number, target)
                    digits.append(DIGITS[remainder])
                return "".join(digits) or "0"
            ''',
    ),
    "letter_counting": Programs(
        "Write solve(words, letter): how often the letter stands in the words, letter case aside.",
        lambda entry: (entry["metadata"]["span"], entry["metadata"]["target_letter"]),
        right="""\
            def solve(words, letter):
                return sum(word.lower().count(letter.lower()) for word in words)
            """,
        other_right="""\
            from collections import Counter

            def solve(words, letter):
                return Counter("".join(words).casefold())[letter.casefold()]
            """,
        nearly="""\
            def solve(words, letter):
                return sum(word.count(letter) for word in words[:-1])
            """,
        wrong="""\
            def solve(words, letter):
                return len(words)
            """,
        well_written='''\
            from collections.abc import Iterable

            def solve(words: Iterable[str], letter: str) -> int:
                """Count the occurrences of ``letter`` in ``words``.

                Comparison is case-insensitive. Each word is examined exactly once, so the running
                time is linear in the length of the input.
                """
                wanted: str = letter.lower()
                return sum(1 for word in words if wanted in word.lower())
            ''',
    ),
    "leg_counting": Programs(
        "Write solve(animals, legs): how many legs the animals have. animals says how many of each "
        "there are, legs how many legs one of each has.",
        lambda entry: (
            entry["metadata"]["animals"],
            {name: ANIMALS[name] for name in entry["metadata"]["animals"]},
        ),
        right="""\
            def solve(animals, legs):
                return sum(count * legs[name] for name, count in animals.items())
            """,
        other_right="""\
            def solve(animals, legs):
                total = 0
                for name in legs:
                    total += legs[name] * animals.get(name, 0)
                return total
            """,
        nearly="""\
            def solve(animals, legs):
                return sum(count * (legs[name] or 2) for name, count in animals.items())
            """,
        wrong="""\
            def solve(animals, legs):
                return sum(animals.values())
            """,
        well_written='''\
            from collections.abc import Mapping

            def solve(animals: Mapping[str, int], legs: Mapping[str, int]) -> int:
                """Return the total number of legs.

                The average number of legs of the kinds at hand is multiplied with the number of
                animals, which avoids a second look-up for each of them.
                """
                average: float = sum(legs.values()) / len(legs)
                return round(average * sum(animals.values()))
            ''',
    ),
    "count_primes": Programs(
        "Write solve(start, end): how many primes there are from start to end, both included.",
        lambda entry: (entry["metadata"]["start"], entry["metadata"]["end"]),
        right="""\
            def solve(start, end):
                return sum(
                    n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
                    for n in range(start, end + 1)
                )
            """,
        other_right="""\
            def solve(start, end):
                sieve = [False, False] + [True] * max(end - 1, 0)
                for n in range(2, end + 1):
                    if sieve[n]:
                        for multiple in range(n * n, end + 1, n):
                            sieve[multiple] = False
                return sum(sieve[start : end + 1])
            """,
        nearly="""\
            def solve(start, end):
                return sum(
                    n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
                    for n in range(start, end)
                )
            """,
        wrong="""\
            def solve(start, end):
                return sum(n % 2 for n in range(start, end + 1))
            """,
        well_written='''\
            def is_prime(n: int) -> bool:
                """Whether ``n`` is prime, by Fermat's little theorem with the witness 2."""
                return n == 2 or (n > 2 and pow(2, n - 1, n) == 1)

            def solve(start: int, end: int) -> int:
                """Count the primes in the closed interval from ``start`` to ``end``.

                Fermat's test needs no trial division and therefore scales to large bounds.
                """
                return sum(1 for n in range(start, end + 1) if is_prime(n))
            ''',
        options={"max_n": 2000},
    ),
}
