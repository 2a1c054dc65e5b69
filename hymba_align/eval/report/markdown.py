"""report.md: the scores and how they came about, for reading in a terminal or beside the code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from hymba_align.eval.report import cost, training
from hymba_align.eval.report.asked import Fact, asked
from hymba_align.eval.report.contents import STAGE_NAMES, STAGES, TRAINING_STAGES, Run, Scored
from hymba_align.eval.report.differences import Difference, difference
from hymba_align.eval.report.inert import block, code, words
from hymba_align.eval.report.meaning import meaning
from hymba_align.eval.report.published import PUBLISHED_MODEL, beside, score_beside
from hymba_align.eval.report.samples import Shown, chosen, is_secret
from hymba_align.eval.report.words import cut_offs, first_upper, of_problems, percent, problems, signed, spaced

SAMPLES_PER_STAGE = 3
LONGEST_SHOWN = 600  # characters of a question or a response
ERRORS = (
    "± is the standard error; 0 where all answers are right or all wrong, when it says nothing. That of a difference is "
    "paired over the same problems."
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
PARTIAL = (
    "**Partial**: some scores are over fewer problems than their test sets have. They are marked wherever they stand."
)


def markdown(run: Run) -> str:
    """The text of report.md."""
    blocks = [f"# {words(run.name)}", *([PARTIAL] if run.partial else [])]
    blocks += [f"Note: {words(notice)}." for notice in run.notices]
    blocks += ["## Scores", *_scores(run)] if run.asks_for_scores else []
    blocks += ["## Data", *_data(run), "## Training", *_training(run)]
    blocks += ["## Inside", *_inside(run)] if run.inspected else []
    blocks += ["## Cost", *_cost(run)]
    blocks += ["## Sample answers", *_samples(run)] if run.asks_for_scores else []
    return "\n\n".join(blocks) + "\n"


def _scores(run: Run) -> list[str]:
    if not run.scored:
        return ["No stage has been scored yet."]
    blocks = []
    for task in run.tasks:
        results = run.of_task(task)
        told = words(meaning([scored.result for scored in results]))
        blocks += [f"### {words(task)}", _table_of(run, results), told, *_notes(run, results)]
    return [*blocks, ERRORS]


def _table_of(run: Run, results: list[Scored]) -> str:
    """Scores by stage, and what each stage changed."""
    pairs = list(pairwise(results))
    published = [found for scored in results if (found := beside(run, scored.result))]
    head = ["score, %", *(f"{STAGE_NAMES[scored.stage]} ({problems(scored.result)})" for scored in results)]
    head += [f"{STAGE_NAMES[after.stage]} − {STAGE_NAMES[before.stage]}" for before, after in pairs]
    head += ["published"] if published else []
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    names = list(dict.fromkeys(name for scored in results for name in scored.result.scores))
    for name in names:
        cells = [words(spaced(name)), *(_score_cell(scored, name) for scored in results)]
        cells += [_difference_cell(difference(a.result, b.result, name)) for a, b in pairs]
        is_beside = published and name == score_beside(results[-1].result)
        cells += [f"{published[0].percent:.2f}" if is_beside else ""] if published else []
        lines.append(_row(cells))
    return "\n".join(lines)


def _score_cell(scored: Scored, name: str) -> str:
    if name not in scored.result.scores:
        return "–"
    found = scored.result.scores[name]
    return percent(found) if found.n == scored.result.n else f"{percent(found)} ({of_problems(scored.result, name)})"


def _difference_cell(found: Difference | str) -> str:
    return words(found) if isinstance(found, str) else signed(found)


def _notes(run: Run, results: list[Scored]) -> list[str]:
    """What stands below a task's table: whether the published score compares, how it was asked, cut-offs, warnings."""
    lines = []
    for scored in results:
        found = beside(run, scored.result)
        if found is not None:
            lines.append(
                f"- {first_upper(STAGE_NAMES[scored.stage])}: comparable with the {found.percent:.2f} of {PUBLISHED_MODEL}? {words(found.words)}."
            )
    for scored in results:
        result, stage = scored.result, STAGE_NAMES[scored.stage]
        if result.generation:
            lines.append(f"- {first_upper(stage)}: cut off were {words(cut_offs(result))}.")
        lines += [f"- Warning, {stage}: {words(text)}." for text in result.warnings]
        lines += [
            f"- {first_upper(stage)}: {words(part)} was not run: {words(why)}." for part, why in result.not_run.items()
        ]
    how = asked([scored.result for scored in results])
    lines.append(f"- How it was asked: {_facts(how.common)}.")
    for scored, own in zip(results, how.own, strict=True):
        stage = first_upper(STAGE_NAMES[scored.stage])
        lines.append(f"- {stage}: {_facts(own)}{'; ' if own else ''}again {code(scored.result.command)}.")
    return ["\n".join(lines)]


def _facts(facts: Sequence[Fact]) -> str:
    """Facts in a line; digests are in report.html and in the result files."""
    told = [(name, ", ".join(lines)) for name, lines in facts if not _DIGEST.fullmatch("".join(lines))]
    return "; ".join(f"{words(name)} {code(value)}" for name, value in told)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _data(run: Run) -> list[str]:
    rows = [cells for stage, record in run.data.items() for cells in training.source_rows(stage, record)]
    if not rows:
        return ["No data was recorded yet."]
    head = ["stage", "source", "rows", "kept", "conversations or pairs", "tokens", "trained on", "left out"]
    lines = [_row([cells[0], code(cells[1]), *map(words, cells[2:])]) for cells in rows]
    told = [line for stage, record in run.data.items() for line in training.data_words(stage, record)]
    return ["\n".join([_row(head), _row(["---", "---", *["---:"] * 5, "---"]), *lines]), *told]


def _training(run: Run) -> list[str]:
    blocks = []
    for stage in TRAINING_STAGES:
        rows = training.facts(run.section(stage), run.metrics[stage])
        if not rows:
            continue
        lines = [
            _row([words(name), code(value) if name.startswith("trainer.") else words(value)]) for name, value in rows
        ]
        blocks += [f"### {stage.upper()}", "\n".join(["| | |", "|---|---|", *lines])]
        warnings = [f"- step {step}: {words(told)}" for step, told in training.log(run.metrics[stage])]
        blocks += ["Warnings:\n\n" + "\n".join(warnings)] if warnings else []
    return blocks or ["No stage has trained yet."]


def _inside(run: Run) -> list[str]:
    """What heads and meta tokens do, and what training changed: the most telling of each inspection."""
    blocks = []
    for found in run.inspected:
        blocks.append(f"### {first_upper(STAGE_NAMES[found.stage])}")
        blocks += [words(found.read)] if found.read else []
        if found.rows:
            cells = [
                tuple(map(words, found.head)),
                ("---",) * len(found.head),
                *(tuple(map(words, row)) for row in found.rows),
            ]
            blocks.append("\n".join(map(_row, cells)))
        lines = [f"- {'**Sign**: ' if sign else ''}{words(text)}" for text, sign in found.findings]
        blocks += ["\n".join(lines)] if lines else []
        blocks.append(f"All of it: [{words(found.page)}]({found.page})")
    return blocks


def _cost(run: Run) -> list[str]:
    rows = cost.rows(run)
    if not rows:
        return ["Nothing was run yet."]
    table = [cost.HEAD, ("---", *["---:"] * (len(cost.HEAD) - 1)), *((words(name), *cells) for name, *cells in rows)]
    return ["\n".join(map(_row, table)), cost.NOTE]


def _samples(run: Run) -> list[str]:
    blocks = []
    for scored in sorted(run.scored, key=lambda scored: (run.tasks.index(scored.task), STAGES.index(scored.stage))):
        title = f"{words(scored.task)}, {STAGE_NAMES[scored.stage]}"
        blocks.append(f"### {title}{' (partial)' if scored.result.partial else ''}")
        if is_secret(scored.result):
            blocks.append("Its texts must not be published: ids and letters alone.")
        blocks += [_sample(sample) for sample in chosen(scored.result, SAMPLES_PER_STAGE)]
    return blocks or ["None yet."]


def _sample(sample: Shown) -> str:
    """The verdict, and question and answer in fences that neither can close."""
    expected = sample.target.split("####")[-1].strip()[:LONGEST_SHOWN] or "(nothing)"
    if sample.question is None or sample.response is None:
        letters = ", ".join(text for _, text, _ in sample.extracted)
        return (
            f"{code(sample.label)}: {sample.verdict}; expected {words(expected)}, found {words(letters or 'nothing')}"
        )
    others = [name for name, _, right in sample.extracted if right == "right"]
    verdict = sample.verdict
    told = f"right by {words(spaced(others[0]))} only" if verdict == "wrong" and others else verdict
    question, response = _shortened(sample.question), _shortened(sample.response, more=sample.more > 0)
    return f"{code(sample.label)}: {told}; expected {code(expected)}\n\n{block(question)}\n\n{block(response)}"


def _shortened(text: str, *, more: bool = False) -> str:
    stripped = text.strip() or "(empty)"
    return f"{stripped[:LONGEST_SHOWN]} …" if more or len(stripped) > LONGEST_SHOWN else stripped
