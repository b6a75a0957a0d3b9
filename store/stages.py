"""What the stages of a round write, and what is left for them to do.

Every "what is left?" is answered from rows, never from a mark that could disagree with them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from sqlalchemy import exists, func, text
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, select

from store import rows
from store.records import (
    Answer,
    Candidate,
    Completion,
    Earlier,
    Example,
    Group,
    Health,
    Judgement,
    Prompt,
    Purpose,
    Selection,
    Split,
    Verdict,
)
from store.session import Database, candidate_columns, columns, insert_rows, of_asked
from store.tables import (
    AskedRow,
    CandidateRow,
    DroppedRow,
    ExampleRow,
    HealthRow,
    JudgementRow,
    PromptRow,
    RoundRow,
    VerdictRow,
)

Table = dict[str, Any]
REJUDGED = "rejudged"
"""How a round's counts name what another judge scored when it was over: "rejudged:track:judge"."""


class Stages(Database):
    """Prompts, what was asked, candidates, judgements and examples of a run."""

    # Prompts and what is asked

    def add_prompts(self, prompts: Sequence[Prompt]) -> None:
        with self._write() as session:
            self._prompt_ids(session, prompts)

    def _prompt_ids(self, session: Session, prompts: Sequence[Prompt]) -> list[int]:
        """Ids of the prompts' rows, made where there are none."""
        digests = [prompt.digest for prompt in prompts]
        known = self._known(session, digests)
        new = {d: p for d, p in zip(digests, prompts, strict=True) if d not in known}
        if new:
            made = [rows.prompt_row(prompt, self._run_id) for prompt in new.values()]
            insert_rows(session, PromptRow, made)
            known = self._known(session, digests)
        for digest, prompt in zip(digests, prompts, strict=True):
            if known[digest][1] != prompt.split:
                raise ValueError(
                    f"a prompt of split {prompt.split!r} is already kept for {known[digest][1]!r}: "
                    f"{prompt.messages[-1].content[:80]!r}"
                )
        return [known[digest][0] for digest in digests]

    def _known(self, session: Session, digests: Sequence[str]) -> dict[str, tuple[int, str]]:
        known: dict[str, tuple[int, str]] = {}
        for start in range(0, len(digests), 10_000):
            found = session.exec(
                select(PromptRow.digest, PromptRow.id, PromptRow.split).where(
                    PromptRow.run_id == self._run_id,
                    col(PromptRow.digest).in_(digests[start : start + 10_000]),
                )
            )
            known |= {digest: (cast(int, id), split) for digest, id, split in found}
        return known

    def prompts(self, split: Split, suite: str | None = None) -> list[Prompt]:
        """The prompts of a split (and suite, if one is named) in the order they were added."""
        chosen = select(PromptRow).where(PromptRow.run_id == self._run_id, PromptRow.split == split)
        if suite is not None:
            chosen = chosen.where(PromptRow.suite == suite)
        with self._read() as session:
            found = session.exec(chosen.order_by(col(PromptRow.id)))
            return [rows.prompt_record(row) for row in found]

    def count_prompts(self, split: Split, suite: str) -> int:
        found = self.query(
            "SELECT count(*) AS n FROM prompt "
            "WHERE run_id = :run AND split = :split AND suite = :suite",
            split=split,
            suite=suite,
        )
        return int(found[0]["n"])

    def held_out_digests(self) -> frozenset[str]:
        """Of the questions (`Prompt.question_digest`) of every split but train."""
        chosen = columns(PromptRow).where(
            col(PromptRow.run_id) == self._run_id, col(PromptRow.split) != "train"
        )
        with self._read() as session:
            found = session.connection().execute(chosen)
            return frozenset(rows.prompt_record(row).question_digest for row in found)

    def asked_digests(self) -> frozenset[str]:
        """Of the prompts asked for training in any round so far."""
        found = self.query(
            "SELECT DISTINCT digest FROM prompt JOIN asked ON asked.prompt_id = prompt.id "
            "WHERE run_id = :run AND purpose = 'train'"
        )
        return frozenset(row["digest"] for row in found)

    def asked_prompts(self, round_id: int, track: str) -> list[Prompt]:
        """Those asked for training in a round and track, in the order they were asked."""
        chosen = of_asked(columns(PromptRow).join(AskedRow), round_id, track, "train")
        with self._read() as session:
            found = session.connection().execute(chosen.order_by(col(AskedRow.id)))
            return [rows.prompt_record(row) for row in found]

    def is_asked(self, round_id: int, track: str, purpose: Purpose) -> bool:
        with self._read() as session:
            return (
                session.exec(of_asked(select(AskedRow.id), round_id, track, purpose)).first()
                is not None
            )

    def ask(
        self,
        round_id: int,
        track: str,
        purpose: Purpose,
        prompts: Sequence[Prompt],
        batch_size: int,
        proposed_tokens: int = 0,
    ) -> None:
        """Write which prompts are asked, and in which batches; new prompts are stored.

        proposed_tokens: sampled to find them, also for those that were thrown away.
        """
        with self._write() as session:
            ids = self._prompt_ids(session, prompts)
            made = [
                {
                    "round_id": round_id,
                    "prompt_id": prompt_id,
                    "track": track,
                    "purpose": purpose,
                    "batch": place // batch_size,
                }
                for place, prompt_id in enumerate(ids)
            ]
            insert_rows(session, AskedRow, made)
            spent = {"proposed_tokens": proposed_tokens} if proposed_tokens else {}
            self._count(session, round_id, f"{purpose}:{track}", asked=len(made), **spent)

    # Candidates

    def unsampled(self, round_id: int, track: str, purpose: Purpose) -> list[int]:
        """The batches with a prompt that has no candidates yet and was not dropped for length."""
        answered = exists().where(col(CandidateRow.asked_id) == AskedRow.id)
        dropped = exists().where(col(DroppedRow.asked_id) == AskedRow.id)
        return self._batches(round_id, track, purpose, ~answered & ~dropped)

    def _batches(self, round_id: int, track: str, purpose: Purpose, left: Any) -> list[int]:
        with self._read() as session:
            chosen = (
                of_asked(select(AskedRow.batch), round_id, track, purpose).where(left).distinct()
            )
            return sorted(session.exec(chosen))

    def groups(
        self, round_id: int, track: str, purpose: Purpose, batch: int | None = None
    ) -> list[Group]:
        """Asked prompts with the candidates that they have so far."""
        with self._read() as session:
            chosen = columns(PromptRow, asked_id=AskedRow.id).join(AskedRow)
            chosen = of_asked(chosen, round_id, track, purpose).order_by(col(AskedRow.id))
            answered = candidate_columns().join(AskedRow)
            answered = of_asked(answered, round_id, track, purpose)
            answered = answered.order_by(CandidateRow.asked_id, CandidateRow.index)
            if batch is not None:
                chosen = chosen.where(AskedRow.batch == batch)
                answered = answered.where(AskedRow.batch == batch)
            candidates: dict[int, list[Candidate]] = defaultdict(list)
            for each in map(rows.candidate_record, session.connection().execute(answered)):
                candidates[each.asked_id].append(each)
            return [
                Group(
                    asked_id=row.asked_id,
                    prompt=rows.prompt_record(row),
                    candidates=tuple(candidates[row.asked_id]),
                )
                for row in session.connection().execute(chosen)
            ]

    def add_candidates(
        self,
        round_id: int,
        track: str,
        purpose: Purpose,
        checkpoint_id: int | None,
        completions: Mapping[int, Sequence[Completion]],
        lost: Mapping[int, str] | None = None,
        sampled_tokens: int | None = None,
    ) -> None:
        """Write a batch: asked id -> its completions. What nobody sampled has no checkpoint.

        lost: asked id -> why it has no completion, for those that have none.
        sampled_tokens: in all, also for what was written on the way to a completion.
        """
        made: list[dict[str, Any]] = []
        generated = 0
        settings: dict[Any, dict[str, Any] | None] = {None: None}
        for asked_id, answers in completions.items():
            for index, answer in enumerate(answers):
                if answer.sampling not in settings:
                    settings[answer.sampling] = asdict(cast(Any, answer.sampling))
                sampled = answer.sampling is not None
                generated += len(answer.token_ids) if sampled else 0
                writer = checkpoint_id if sampled else None
                made.append(
                    rows.candidate_row(answer, asked_id, index, writer, settings[answer.sampling])
                )
        dropped = [{"asked_id": id, "reason": reason} for id, reason in (lost or {}).items()]
        reasons = Counter(f"dropped {each['reason']}" for each in dropped)
        beside = 0 if sampled_tokens is None else sampled_tokens - generated
        with self._write() as session:
            insert_rows(session, CandidateRow, made)
            insert_rows(session, DroppedRow, dropped)
            self._count(
                session,
                round_id,
                f"{purpose}:{track}",
                candidates=len(made),
                generated_tokens=generated,
                truncated=sum(row["finish_reason"] == "length" for row in made),
                **({"making_tokens": beside} if beside else {}),
                **({"dropped": len(dropped), **reasons} if dropped else {}),
            )

    # Judgements

    def unjudged(self, round_id: int, track: str, purpose: Purpose, judge: str) -> list[int]:
        """The batches with a candidate on which `judge` has not concluded in this round."""
        judged = exists().where(
            col(JudgementRow.candidate_id) == CandidateRow.id,
            col(JudgementRow.judge) == judge,
            col(JudgementRow.round_id) == round_id,
        )
        left = exists().where(col(CandidateRow.asked_id) == AskedRow.id, ~judged)
        return self._batches(round_id, track, purpose, left)

    def add_judgements(
        self,
        round_id: int,
        track: str,
        purpose: Purpose,
        judge: str,
        judge_version: str,
        judge_model: str | None,
        judgements: Sequence[Judgement],
    ) -> None:
        """Write a batch's judgements and the verdicts behind them.

        What is judged when the round is over is counted apart: it is none of the round's own work.
        """
        by = {"round_id": round_id, "judge": judge, "judge_version": judge_version}
        concluded = [
            {
                **by,
                "candidate_id": judgement.candidate_id,
                "score": judgement.score,
                "status": judgement.status,
                "reason": judgement.reason,
                "variance": judgement.variance,
            }
            for judgement in judgements
        ]
        said = [
            {**by, **vars(verdict), "judge_model": verdict.judge_model or judge_model}
            for judgement in judgements
            for verdict in judgement.verdicts
        ]
        tokens = sum(row["tokens"] or 0 for row in said if not row["cached"])
        micros = round(1e6 * math.fsum(row["cost"] or 0.0 for row in said))
        with self._write() as session:
            insert_rows(session, JudgementRow, concluded)
            insert_rows(session, VerdictRow, said)
            again = session.get_one(RoundRow, round_id).status != "running"
            of = "rejudge" if again else "judge"
            self._count(
                session,
                round_id,
                f"{REJUDGED}:{track}:{judge}" if again else f"{purpose}:{track}",
                judged=len(concluded),
                verdicts=len(said),
                **({f"{of}_tokens": tokens} if tokens else {}),
                **({f"{of}_micros": micros} if micros else {}),
                unscored=sum(row["status"] != "ok" for row in concluded),
            )

    def judgements(
        self,
        round_id: int,
        track: str,
        purpose: Purpose,
        judge: str,
        batch: int | None = None,
        *,
        verdicts: bool = False,
    ) -> list[Judgement]:
        """What `judge` concluded, with or without the verdicts behind it."""
        with self._read() as session:
            chosen = columns(JudgementRow).join(CandidateRow).join(AskedRow)
            chosen = of_asked(chosen, round_id, track, purpose)
            chosen = chosen.where(JudgementRow.judge == judge, JudgementRow.round_id == round_id)
            if batch is not None:
                chosen = chosen.where(AskedRow.batch == batch)
            found = session.connection().execute(chosen.order_by(col(JudgementRow.id)))
            said: dict[int, list[Verdict]] = defaultdict(list)
            if verdicts:
                heard = columns(VerdictRow)
                heard = heard.join(CandidateRow, col(CandidateRow.id) == VerdictRow.candidate_id)
                heard = of_asked(heard.join(AskedRow), round_id, track, purpose)
                heard = heard.where(VerdictRow.judge == judge, VerdictRow.round_id == round_id)
                for row in session.connection().execute(heard.order_by(col(VerdictRow.id))):
                    said[row.candidate_id].append(rows.verdict_record(row))
            return [
                rows.judgement_record(row, tuple(said.get(row.candidate_id, ()))) for row in found
            ]

    def answers(self, round_id: int, model: str, judge: str) -> list[Answer]:
        """A model's answers to held-out prompts in a round, prompt by prompt, as `judge` saw them.

        model: the track under which they were asked. Those to one prompt come in the order of
        their index.
        """
        found = text(
            "SELECT prompt.id, prompt.split, asked.purpose = 'greedy', candidate.text, tokens, "
            "finish_reason = 'length', score FROM asked "
            "JOIN prompt ON prompt.id = asked.prompt_id "
            "JOIN candidate ON candidate.asked_id = asked.id "
            "JOIN judgement ON judgement.candidate_id = candidate.id "
            "WHERE asked.round_id = :round AND asked.track = :model "
            "AND asked.purpose <> 'train' "
            "AND judgement.judge = :judge AND judgement.round_id = :round "
            "ORDER BY asked.id, candidate.id"
        )
        chosen = {"round": round_id, "model": model, "judge": judge}
        with self._read() as session:
            return [Answer(*row) for row in session.connection().execute(found, chosen)]

    def score_counts(
        self, round_id: int, track: str, purpose: Purpose, judge: str
    ) -> dict[float | None, int]:
        """Score, or None for none -> how many candidates have it."""
        found = self.query(
            "SELECT score, count(*) AS n FROM judgement "
            "JOIN candidate ON candidate.id = judgement.candidate_id "
            "JOIN asked ON asked.id = candidate.asked_id "
            "WHERE asked.round_id = :round AND asked.track = :track AND purpose = :purpose "
            "AND judge = :judge AND judgement.round_id = :round "
            "GROUP BY score ORDER BY score NULLS FIRST",
            round=round_id,
            track=track,
            purpose=purpose,
            judge=judge,
        )
        return {row["score"]: row["n"] for row in found}

    def variances(self, round_id: int, track: str, judge: str) -> list[float]:
        """The votes' variance of each judgement on a track that has one."""
        found = self.query(
            "SELECT variance FROM judgement "
            "JOIN candidate ON candidate.id = judgement.candidate_id "
            "JOIN asked ON asked.id = candidate.asked_id "
            "WHERE asked.round_id = :round AND asked.track = :track AND judge = :judge "
            "AND judgement.round_id = :round AND variance IS NOT NULL ORDER BY judgement.id",
            round=round_id,
            track=track,
            judge=judge,
        )
        return [row["variance"] for row in found]

    # How judges did

    def judged(self, round_id: int, track: str, purpose: Purpose, judge: str) -> list[Table]:
        """asked, score, status and the answer's tokens of each judgement."""
        return self._of_judge(
            "SELECT asked.id AS asked, score, said.status AS status, candidate.tokens AS tokens",
            "judgement",
            (round_id, track, purpose, judge),
            "ORDER BY said.id",
        )

    def judge_versions(
        self, round_id: int, track: str, purpose: Purpose, judge: str
    ) -> frozenset[str]:
        """The versions of a judge that have judged a track in a round."""
        found = self._of_judge(
            "SELECT DISTINCT judge_version", "judgement", (round_id, track, purpose, judge)
        )
        return frozenset(row["judge_version"] for row in found)

    def votes(self, round_id: int, track: str, purpose: Purpose, judge: str) -> list[Table]:
        """member, candidate and value of each verdict on one answer by itself that has a value."""
        return self._of_judge(
            "SELECT member, candidate.id AS candidate, value",
            "verdict",
            (round_id, track, purpose, judge),
            'AND other_candidate_id IS NULL AND "order" IS NULL AND value IS NOT NULL '
            "ORDER BY said.id",
        )

    def turned(self, round_id: int, track: str, purpose: Purpose, judge: str) -> list[Table]:
        """member, candidate, vote and value of each comparison with what is no candidate."""
        return self._of_judge(
            "SELECT member, candidate.id AS candidate, vote, value",
            "verdict",
            (round_id, track, purpose, judge),
            'AND other_candidate_id IS NULL AND "order" IS NOT NULL AND value IS NOT NULL '
            "ORDER BY said.id",
        )

    def comparisons(self, round_id: int, track: str, purpose: Purpose, judge: str) -> list[Table]:
        """member, first, second and value (1: the first won) of each comparison of two answers."""
        return self._of_judge(
            "SELECT member, candidate.id AS first, other_candidate_id AS second, value",
            "verdict",
            (round_id, track, purpose, judge),
            'AND other_candidate_id IS NOT NULL AND "order" IS NOT NULL AND value IS NOT NULL '
            "ORDER BY said.id",
        )

    def judged_cost(self, round_id: int, track: str, purpose: Purpose, judge: str) -> Table:
        """verdicts, seconds, tokens, cost and cached (how many were) of a judge; None: not told."""
        found = self._of_judge(
            "SELECT count(*) AS verdicts, sum(said.seconds) AS seconds, sum(said.cost) AS cost, "
            "sum(CASE WHEN cached THEN 0 ELSE said.tokens END) AS tokens, "
            "nullif(sum(CASE WHEN cached THEN 1 ELSE 0 END), 0) AS cached",
            "verdict",
            (round_id, track, purpose, judge),
        )
        return found[0]

    def _of_judge(
        self, select: str, table: str, of: tuple[int, str, Purpose, str], more: str = ""
    ) -> list[Table]:
        round_id, track, purpose, judge = of
        return self.query(
            f"{select} FROM asked JOIN candidate ON candidate.asked_id = asked.id "
            f"JOIN {table} AS said ON said.candidate_id = candidate.id AND said.judge = :judge "
            "AND said.round_id = :round WHERE asked.round_id = :round AND asked.track = :track "
            f"AND asked.purpose = :purpose {more}",
            round=round_id,
            track=track,
            purpose=purpose,
            judge=judge,
        )

    def has_health(self, round_id: int, track: str, purpose: Purpose, judge: str) -> bool:
        found = self.query(
            "SELECT 1 FROM health WHERE round_id = :round AND track = :track "
            "AND purpose = :purpose AND judge = :judge LIMIT 1",
            round=round_id,
            track=track,
            purpose=purpose,
            judge=judge,
        )
        return bool(found)

    def add_health(
        self, round_id: int, track: str, purpose: Purpose, judge: str, found: Sequence[Health]
    ) -> None:
        by = {"round_id": round_id, "track": track, "purpose": purpose, "judge": judge}
        with self._write() as session:
            insert_rows(session, HealthRow, [by | asdict(each) for each in found])

    def health(self, round_id: int, purpose: Purpose | None = None) -> list[Table]:
        """track, purpose, judge and health of each number there is on a round's judges."""
        chosen = select(HealthRow).where(HealthRow.round_id == round_id)
        if purpose is not None:
            chosen = chosen.where(HealthRow.purpose == purpose)
        with self._read() as session:
            return [
                {
                    "track": row.track,
                    "purpose": row.purpose,
                    "judge": row.judge,
                    "health": rows.health_record(row),
                }
                for row in session.exec(chosen.order_by(col(HealthRow.id)))
            ]

    # Examples

    def is_filtered(self, round_id: int, track: str) -> bool:
        """Whether each prompt asked for training gave an example or a reason."""
        with self._read() as session:
            left = of_asked(select(AskedRow.id), round_id, track, "train").where(*_unaccounted())
            return session.exec(left).first() is None

    def add_selection(self, round_id: int, track: str, selection: Selection) -> None:
        made = [
            {
                "asked_id": example.asked_id,
                "kind": example.kind,
                "chosen_id": example.chosen.id,
                "rejected_id": None if example.rejected is None else example.rejected.id,
                "label": example.label,
                "margin": example.margin,
                "weight": example.weight,
                "rule": example.rule,
                "chosen_judgement_id": example.chosen_judgement_id,
                "rejected_judgement_id": example.rejected_judgement_id,
            }
            for example in selection.examples
        ]
        lost = [{"asked_id": drop.asked_id, "reason": drop.reason} for drop in selection.dropped]
        reasons = Counter(f"dropped {drop.reason}" for drop in selection.dropped)
        with self._write() as session:
            insert_rows(session, ExampleRow, made)
            insert_rows(session, DroppedRow, lost)
            self._count(
                session,
                round_id,
                f"train:{track}",
                examples=len(made),
                dropped=len(lost),
                **reasons,
            )

    def earlier(self, round_id: int, track: str, judge: str) -> dict[int, list[Earlier]]:
        """What earlier rounds of a track answered to prompts that this one asks again.

        Asked id in this round -> those answers, oldest first, as `judge` saw them.
        """
        now, then = aliased(AskedRow), aliased(AskedRow)
        with self._read() as session:
            again = session.exec(
                select(then.id, now.id, RoundRow.number)
                .join(now, col(now.prompt_id) == then.prompt_id)
                .join(RoundRow, col(RoundRow.id) == then.round_id)
                .where(now.round_id == round_id, now.track == track, now.purpose == "train")
                .where(then.track == track, then.purpose == "train", then.round_id < round_id)
                .where(RoundRow.number > 0)
            )
            places = {cast(int, id): (cast(int, asked), number) for id, asked, number in again}
            answers: list[Candidate] = []
            judged: dict[int, Judgement] = {}
            ids = list(places)
            for start in range(0, len(ids), 10_000):
                some = ids[start : start + 10_000]
                asked = candidate_columns().where(col(CandidateRow.asked_id).in_(some))
                found = session.connection().execute(asked.order_by(CandidateRow.id))
                answers += map(rows.candidate_record, found)
                said = columns(JudgementRow).join(CandidateRow)
                said = said.where(col(CandidateRow.asked_id).in_(some), JudgementRow.judge == judge)
                for each in map(rows.judgement_record, session.connection().execute(said)):
                    judged[each.candidate_id] = each
        known: dict[int, list[Earlier]] = defaultdict(list)
        for answer in answers:
            asked_id, number = places[answer.asked_id]
            known[asked_id].append(Earlier(number, answer, judged.get(answer.id)))
        return dict(known)

    def count_examples(self, round_id: int) -> int:
        """How many examples the round's tracks gave."""
        found = self.query(
            "SELECT count(*) AS n FROM example JOIN asked ON asked.id = example.asked_id "
            "WHERE asked.round_id = :round",
            round=round_id,
        )
        return int(found[0]["n"])

    def examples(self, round_id: int, tracks: Sequence[str]) -> list[Example]:
        """The examples that these tracks gave in a round, in the order they were selected."""
        with self._read() as session:
            mine = (AskedRow.round_id == round_id, col(AskedRow.track).in_(tracks))
            chosen = columns(ExampleRow, prompt_id=AskedRow.prompt_id).join(AskedRow).where(*mine)
            found = session.connection().execute(chosen.order_by(col(ExampleRow.id))).all()
            asked = columns(PromptRow).join(AskedRow).where(*mine)
            prompts = {
                row.id: rows.prompt_record(row) for row in session.connection().execute(asked)
            }
            # Not those of `mine` alone: a pair may hold what an earlier round answered.
            of_mine = select(AskedRow.id).where(*mine)
            used = exists().where(
                (col(ExampleRow.chosen_id) == CandidateRow.id)
                | (col(ExampleRow.rejected_id) == CandidateRow.id),
                col(ExampleRow.asked_id).in_(of_mine),
            )
            needed = candidate_columns().where(used)
            answers = map(rows.candidate_record, session.connection().execute(needed))
            candidates = {each.id: each for each in answers}
        return [
            Example(
                id=row.id,
                kind=row.kind,
                asked_id=row.asked_id,
                prompt=prompts[row.prompt_id],
                chosen=candidates[row.chosen_id],
                rejected=None if row.rejected_id is None else candidates[row.rejected_id],
                label=row.label,
                margin=row.margin,
                weight=row.weight,
                rule=row.rule,
                chosen_judgement_id=row.chosen_judgement_id,
                rejected_judgement_id=row.rejected_judgement_id,
            )
            for row in found
        ]

    def count_unaccounted(self) -> int:
        """Prompts asked for training in finished rounds with neither example nor reason."""
        with self._read() as session:
            chosen = (
                select(func.count())
                .select_from(AskedRow)
                .join(RoundRow)
                .where(AskedRow.purpose == "train", RoundRow.status != "running", *_unaccounted())
            )
            return session.exec(chosen).one()


def _unaccounted() -> tuple[Any, Any]:
    """Of an asked prompt: it gave neither an example nor a reason."""
    kept = exists().where(col(ExampleRow.asked_id) == AskedRow.id)
    dropped = exists().where(col(DroppedRow.asked_id) == AskedRow.id)
    return ~kept, ~dropped
