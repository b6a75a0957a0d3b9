import re

from judges import PointwiseJudge


class LastNumber(PointwiseJudge):
    """Right is an answer whose last number is the reference."""

    def __init__(self, wrong: float = 0.0):
        self.wrong = wrong

    def score(self, prompt, completion, policy, call):
        numbers = re.findall(r"-?\d+", completion.text)
        return 1.0 if numbers[-1:] == [prompt.reference] else self.wrong
