"""What may be kept of GPQA's generated answers, and what may be said when scoring it fails."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.errors import GraderError, HymbaAlignError

if TYPE_CHECKING:
    from lm_eval.config.task import TaskConfig

LETTERS = "ABCD"
STRICT, FLEXIBLE = "strict-match", "flexible-extract"
NOT_SETTINGS = ("metric", "aggregation", "higher_is_better")
WRAPS = (("", ""), ("$", "$"), ("<", ">"), ("=", "="), ("^", "^"), ("~", "~"))
"""Signs around a letter that the strict match passes over. Each choice of a problem can spoil one wrap at most."""


class Redaction:
    """Makes of a problem and an answer a text of which the harness's own filters extract the same letters, and nothing else.

    A letter is one of A to D for which the harness's metric counts what was extracted as right; all else is none. The
    text is one of "", "(A)", "The answer is (A).", "The answer is (A).\\n(B)" and "The answer is A.", with A and B any of
    the letters, and the last one with signs around the letter where a choice of the problem says the same.

    Args:
        config: of the harness's task, with its filters and its metric.
    """

    def __init__(self, config: TaskConfig) -> None:
        from lm_eval.filters import build_filter_ensemble

        components = {
            one["name"]: [(step["function"], _without(step, ("function",))) for step in one["filter"]]
            for one in config.filter_list
        }
        self.filters = {name: build_filter_ensemble(name, steps) for name, steps in components.items()}
        # The flexible filter builds a table of all of Unicode each time, in 0.14 s. Where its pattern occurs, it gives what
        # the plain filter with the pattern gives.
        [pattern, *rest] = components[FLEXIBLE]
        plain = ("regex", {key: pattern[1][key] for key in ("regex_pattern", "group_select")})
        self.pattern_alone = build_filter_ensemble(FLEXIBLE, [plain, *rest])
        self.metric = _without(config.metric_list[0], NOT_SETTINGS)

    def __call__(self, problem: dict[str, Any], answer: str) -> str:
        strict, flexible = self._letters(problem, answer)
        if strict is None:
            return "" if flexible is None else f"({flexible})"
        if flexible is not None:
            return f"The answer is ({strict})." + (f"\n({flexible})" if flexible != strict else "")
        for before, after in WRAPS:
            text = f"The answer is {before}{strict}{after}."
            if self._letters(problem, text) == (strict, None):
                return text
        raise AssertionError("a problem has more choices than there are wraps")

    def letter(self, extracted: str) -> str | None:
        """The letter for which the harness's metric counts an extracted text as right, if any."""
        from lm_eval.api.metrics import exact_match_fn

        for letter in LETTERS:
            score = exact_match_fn(predictions=[extracted], references=[f"({letter})"], **self.metric)
            if score["exact_match"] == 1:
                return letter
        return None

    def extracted(self, problems: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[tuple[str, str]]:
        """What the harness's strict and flexible filters make of each answer."""
        found = {name: _apply(ensemble, problems, answers) for name, ensemble in self.filters.items()}
        return list(zip(found[STRICT], found[FLEXIBLE], strict=True))

    def _letters(self, problem: dict[str, Any], answer: str) -> tuple[str | None, str | None]:
        """Of the strict and of the flexible match."""
        [strict] = _apply(self.filters[STRICT], [problem], [answer])
        [flexible] = _apply(self.pattern_alone, [problem], [answer])
        if flexible == "[invalid]":
            [flexible] = _apply(self.filters[FLEXIBLE], [problem], [answer])
        return self.letter(strict), self.letter(flexible)


def _apply(ensemble: Any, problems: Sequence[dict[str, Any]], answers: Sequence[str]) -> list[str]:
    from lm_eval.api.instance import Instance

    asked = [
        Instance("generate_until", problem, (), 0, resps=[answer])
        for problem, answer in zip(problems, answers, strict=True)
    ]
    ensemble.apply(asked)
    return [one.filtered_resps[ensemble.name] for one in asked]


def _without(settings: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Keeps to itself what errors of other packages say inside, for they could quote an item.

    Errors about the machine (a full disk, no memory) and this project's own pass as they are.

    Raises: GraderError, with the kind of error and its place.
    """
    import torch

    try:
        yield
    except (HymbaAlignError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise GraderError(
            f"scoring GPQA failed with a {type(error).__name__} in {Path(place.filename).name}:{place.lineno}; its message "
            "is withheld, for it could quote an item"
        ) from None
