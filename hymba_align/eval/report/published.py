"""The published scores, and whether a result may stand beside them: read off the result, never assumed.

Source: Hymba paper (arXiv 2411.13676), table 4, Hymba-1.5B-Instruct: lm-evaluation-harness, GSM8K 5-shot, GPQA 0-shot,
`--apply_chat_template --fewshot_as_multiturn`; BFCLv2.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hymba_align.eval.report.contents import Run
from hymba_align.eval.result import TaskResult

PUBLISHED = {"gsm8k": 58.76, "gsm8k_nvidia": 58.76, "gpqa": 31.03, "gpqa_generative": 31.03, "bfcl": 46.40}
"""In percent. GPQA's is 139 of 448 problems, so of the subset main"""
PUBLISHED_MODEL = "Hymba-1.5B-Instruct"
FAMILY = ("Hymba-1.5B-Base", "Hymba-1.5B-Instruct")
SHAPE = {"hidden_size": 1600, "num_hidden_layers": 32, "vocab_size": 32001}
TOTALS = {"gsm8k": 1319, "gsm8k_nvidia": 1319, "gpqa": 448, "gpqa_generative": 448}
SCORES = {"bfcl": "live"}
"""Which score a published one stands beside, where that is not the headline"""
GSM8K_QUESTIONS = "f74517d56b4d96e425b51d9b3ca07f9e8bb71a27c8376673481b973bbd2ec4b5"
"""`digest_of` of the questions of the official test.jsonl"""
GPQA_IDS = "a34b2869d016b4ac135f1ebed0089855d06c882bdcf49ff32be1b49da0463a5e"
"""The same of the record ids of the subset main"""
HARNESS_NEW_TOKENS = 256
"""What the packaged GSM8K task allows an answer"""
BFCL_CATEGORIES = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_relevance")

Verdict = Literal["yes", "approximately", "no"]


@dataclass(frozen=True)
class Beside:
    """A published score that stands beside a result: whether the two compare, and why or why not."""

    percent: float
    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def words(self) -> str:
        """The verdict and its reasons in one line."""
        return f"{self.verdict}: {'; '.join(self.reasons)}" if self.reasons else self.verdict


def beside(run: Run, result: TaskResult) -> Beside | None:
    """The published score of a result's task; None for a task without one and for runs of other models."""
    if result.task not in PUBLISHED or score_beside(result) not in result.scores or not is_of_family(run):
        return None
    reasons = (*_size_reasons(result), *_protocol_reasons(result))
    if reasons:
        return Beside(PUBLISHED[result.task], "no", reasons)
    note = NOTES.get(result.task)
    verdict: Verdict = "approximately" if result.task == "bfcl" else "yes"
    return Beside(PUBLISHED[result.task], verdict, (note,) if note else ())


def score_beside(result: TaskResult) -> str:
    """The name of the score that a published one stands beside."""
    return SCORES.get(result.task, result.headline)


NOTES = {
    "gsm8k": "the paper does not say which of the two matches, nor whether the prompt ended in 'Answer:', as here",
    "gsm8k_nvidia": "the paper does not say which of the two matches; the prompt is that of NVIDIA's fork",
    "gpqa": "448 problems is what 31.03 % implies; the paper names no subset",
    "bfcl": "how BFCLv2's number is averaged is not exactly defined in public",
}


def is_of_family(run: Run) -> bool:
    """Whether the run starts from a released Hymba-1.5B: by the recipe's name of it, and the shape of what is here."""
    model = str(run.section("base").get("model") or "")
    if Path(model).name not in FAMILY:
        return False
    folders = [run.root / stage / "final" for stage in ("base", "sft", "dpo")]
    configs = [_config(folder / "config.json") for folder in (Path(model), *folders)]
    return all(config[key] == value for config in configs for key, value in SHAPE.items() if key in config)


def _config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def digest_of(texts: list[str]) -> str:
    """SHA-256 of a set of texts, whatever their order and white space."""
    digests = sorted(hashlib.sha256(" ".join(text.split()).encode()).hexdigest() for text in texts)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _size_reasons(result: TaskResult) -> Iterator[str]:
    """Why a result is not on the official test set."""
    total = TOTALS.get(result.task)
    if result.partial:
        yield f"only {result.n:,} of {result.total:,} problems were scored"
    if total is not None and result.total != total:
        yield f"its test set has {result.total:,} problems, the official one {total:,}"
    elif total is not None and not result.partial:
        is_gsm8k = result.task.startswith("gsm8k")
        texts = [sample.question or "" if is_gsm8k else sample.id for sample in result.samples]
        if digest_of(texts) != (GSM8K_QUESTIONS if is_gsm8k else GPQA_IDS):
            yield "its problems are not those of the official test set"
    if result.truncated_prompts:
        yield f"{result.truncated_prompts:,} prompts lost their beginning"


def _protocol_reasons(result: TaskResult) -> Iterator[str]:
    """Why a result's protocol is not the published one."""
    if result.task == "bfcl":
        yield from _bfcl_reasons(result)
        return
    shots = 5 if result.task.startswith("gsm8k") else 0
    yield from _unless(result, "num_fewshot", shots, f"the published score is {shots}-shot")
    yield from _unless(result, "apply_chat_template", True, "the published score uses the chat template")
    if shots:
        yield from _unless(result, "fewshot_as_multiturn", True, "the published score has the examples as turns")
        yield from _unless(result, "shots", "drawn", "the harness draws other examples for every problem")
        allowed = result.generation.get("max_new_tokens")
        if isinstance(allowed, int) and allowed < HARNESS_NEW_TOKENS and result.cut_off:
            yield f"{result.cut_off:,} answers were cut off at {allowed} new tokens, where the harness allows {HARNESS_NEW_TOKENS}"
    else:
        yield from _unless(result, "subset", "main", "31.03 % is 139 of the 448 problems of main")
    if result.task == "gpqa_generative":
        yield "its answers were generated, and the published score is taken for the harness's multiple choice"


def _unless(result: TaskResult, key: str, wanted: Any, why: str) -> Iterator[str]:
    """Nothing where a setting is as published."""
    found = result.settings.get(key)
    if found != wanted:
        yield f"{key} is {'not recorded' if found is None else found}, and {why}"


def _bfcl_reasons(result: TaskResult) -> Iterator[str]:
    missing = [name for name in BFCL_CATEGORIES if name not in result.scores]
    if missing:
        yield f"not scored: {', '.join(missing)}"
