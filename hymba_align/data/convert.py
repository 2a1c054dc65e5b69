"""Questions and answers turned into conversations and preferences; wrong answers made where a row has none."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from decimal import Decimal

from hymba_align.data.reading.examples import Preference, QuestionAnswer
from hymba_align.data.reading.messages import Message
from hymba_align.errors import DataError

QUESTION_FORMAT = "{question}"
NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
# An annotation `<<48/2=24>>` and the number that repeats its result, if one follows.
CALCULATION = re.compile(rf"<<(?P<left>[^<>]*)=(?P<result>{NUMBER})>>(?P<currency>\$?)(?P<shown>{NUMBER})?")
SLIPS = tuple(map(Decimal, (-10, -2, -1, 1, 2, 10)))


def conversation(examples: Sequence[QuestionAnswer], question_format: str = QUESTION_FORMAT) -> list[Message]:
    """A user and an assistant turn per question and answer, in order; texts are left as they are."""
    turns: list[Message] = []
    for example in examples:
        turns += [question_turn(example.question, question_format), {"role": "assistant", "content": example.answer}]
    return turns


def question_turn(question: str, question_format: str = QUESTION_FORMAT) -> Message:
    """The user's turn that asks a question; `{question}` in the format stands for it."""
    return {"role": "user", "content": question_format.replace("{question}", question)}


def preference(
    example: QuestionAnswer,
    earlier: Sequence[QuestionAnswer],
    rng: random.Random,
    question_format: str = QUESTION_FORMAT,
) -> Preference:
    """The answer against the wrong one, which is made where there is none; the prompt begins with `earlier`, solved.

    Raises: DataError where a wrong answer is needed and none can be made.
    """
    wrong = wrong_answer(example.answer, rng) if example.wrong_answer is None else example.wrong_answer
    return Preference(
        prompt=[*conversation(earlier, question_format), question_turn(example.question, question_format)],
        chosen=[{"role": "assistant", "content": example.answer}],
        rejected=[{"role": "assistant", "content": wrong}],
    )


def final_number(answer: str) -> str:
    """What stands after the last `####` of an answer in GSM8K's format.

    Raises: DataError.
    """
    # Line by line: a regular expression would try every space of a long run of them.
    lines = (line[4:].strip(" \t") for line in answer.split("\n") if line.startswith("####"))
    found = [line for line in lines if line]
    if not found or not re.fullmatch(rf"\$?{NUMBER}", found[-1]):
        raise DataError("the answer does not end in a line '#### <number>'; add one, or a column wrong_answer")
    return str(found[-1])


def wrong_answer(answer: str, rng: random.Random) -> str:
    """The worked answer with a slip in one calculation and the final number changed to match; equal for equal `rng`.

    The calculation is the last one that gives the final number, else the last one.
    Raises: DataError where the answer does not end in `#### <number>`.
    """
    final = final_number(answer)
    value = _value(final)
    slip = rng.choice([slip for slip in SLIPS if value + slip > 0 or value <= 0])
    body, tail = answer[: answer.rindex("####")], answer[answer.rindex("####") :]
    calculations = list(CALCULATION.finditer(body))
    giving_it = [match for match in calculations if _value(match["result"]) == value]
    if calculations:
        body = _with_slip(body, (giving_it or calculations)[-1], slip)
    else:
        body = _with_last_number_replaced(body, value, _written_like(final, value + slip))
    return body + tail.replace(final, _written_like(final, value + slip))


def _with_slip(body: str, match: re.Match[str], slip: Decimal) -> str:
    result = _value(match["result"])
    wrong = _written_like(match["result"], result + slip)
    shown = match["shown"] or ""
    if shown and _value(shown) == result:
        shown = _written_like(shown, result + slip)
    slipped = f"<<{match['left']}={wrong}>>{match['currency']}{shown}"
    return body[: match.start()] + slipped + body[match.end() :]


def _with_last_number_replaced(body: str, value: Decimal, wrong: str) -> str:
    """The last mention of `value` replaced; unchanged where the text never names it."""
    mentions = [match for match in re.finditer(NUMBER, body) if _value(match[0]) == value]
    return body[: mentions[-1].start()] + wrong + body[mentions[-1].end() :] if mentions else body


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").lstrip("$"))


def _written_like(pattern: str, value: Decimal) -> str:
    """A number with the currency sign and the thousands separators of another."""
    return ("$" if pattern.startswith("$") else "") + format(value, ",f" if "," in pattern else "f")
