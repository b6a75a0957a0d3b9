"""Ask a model how well each answer agrees with the right one, which the data has.

A model that could not answer the question itself can still tell whether two answers are the same.
"""

# No `from __future__ import annotations` here: see judges/model_judge.py.

from dataclasses import dataclass

from judges.rubric import Grader
from roles.template import Template


@dataclass(kw_only=True)
class Reference(Grader):
    """A judge that asks a model to grade each answer against the prompt's reference answer.

    A candidate's score is the mean of its votes. Every prompt needs a reference.
    prompt_path: a text of your own with {question}, {answer} and {reference}.
    """

    def _template(self) -> Template:
        return self.take_template("reference", ("question", "answer", "reference"))
