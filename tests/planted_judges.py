"""Judges that are bad, each in its own way."""

from judges import PairwiseJudge, PointwiseJudge
from store.records import Judgement, Verdict


def right(prompt, completion) -> float:
    return float(completion.text == prompt.reference)


class Five(PointwiseJudge):
    """Says five of everything."""

    def score(self, prompt, completion, policy, call):
        return 5


class Silent(PointwiseJudge):
    """Has no word for most answers."""

    def score(self, prompt, completion, policy, call):
        return None if right(prompt, completion) == 0.0 else 1.0


class FirstIsBetter(PairwiseJudge):
    """Goes by the order, unless one answer is right."""

    def prefer(self, prompt, first, second, policy, call):
        known = right(prompt, first), right(prompt, second)
        return 0 if known[0] == known[1] else known.index(1.0)


class Wavering:
    """Votes three times, and never the same."""

    def judge(self, groups, policy, call):
        return [
            Judgement(
                candidate_id=one.id,
                score=right(group.prompt, one),
                verdicts=tuple(
                    Verdict(candidate_id=one.id, raw="?", value=float(vote), vote=vote)
                    for vote in range(3)
                ),
            )
            for group in groups
            for one in group.candidates
        ]


class Turning:
    """Compares each answer with something else in both orders, and goes by the order if it is
    wrong."""

    def judge(self, groups, policy, call):
        return [
            Judgement(
                candidate_id=one.id,
                score=right(group.prompt, one),
                verdicts=tuple(
                    Verdict(candidate_id=one.id, raw="?", value=value, order=order)
                    for order, value in enumerate((1.0, right(group.prompt, one)))
                ),
            )
            for group in groups
            for one in group.candidates
        ]


class Longest(PointwiseJudge):
    """Likes long answers."""

    def score(self, prompt, completion, policy, call):
        return float(len(completion.token_ids))


class Inverted(PointwiseJudge):
    """Likes what is wrong."""

    def score(self, prompt, completion, policy, call):
        return 1.0 - right(prompt, completion)


class Moody(PointwiseJudge):
    """Changes its mind from round to round."""

    def score(self, prompt, completion, policy, call):
        known = right(prompt, completion)
        return known if call.round % 2 else 1.0 - known
