"""Texts that would act where they are not escaped, and run folders that hold one wherever others put texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hymba_align.eval.result import TaskResult

HOSTILE = (
    "</script><script>alert(1)</script>",
    "</div></details><img src=x onerror=alert(1)>",
    "\"' onclick=alert(1) x='\"><iframe src=//evil>",
    "<!-- <style>*{display:none}</style> -->]]><svg/onload=alert(1)>",
    "\u202eevil\u202c \u0000\u001b[31m\x07 &lt;b&gt; &#60;b&#62;",
    "{{ 7*7 }}{% raw %}<plaintext>",
)


def with_texts(result: TaskResult, text: str) -> TaskResult:
    """The result with a text wherever a model, a grader, a data set or a user puts one."""
    samples = [
        replace(sample, id=text + sample.id, question=text, response=text, target=text, verdict=text, group=text)
        for sample in result.samples
    ]
    samples = [replace(sample, extracted=dict.fromkeys(sample.extracted, text)) for sample in samples]
    return replace(
        result,
        samples=samples,
        first_prompt=text,
        checkpoint=text,
        suite=text,
        warnings=(text,),
        not_run={text: text},
        versions={text: text},
        settings={"x": text, "y": {text: text}},
    )


def write_texts(folder: Path, text: str, make: Callable[..., TaskResult]) -> None:
    """A run folder with the text wherever a model, a grader, a data set or a user puts one."""
    with_texts(make("gsm8k", [True, False]), text).write(folder / "eval" / "sft" / "gsm8k.json")
    (folder / "sft").mkdir(exist_ok=True)
    record = {"step": 1, "loss": 1.0, "learning_rate": 1.0, "warning": text}
    (folder / "sft" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "recipe.yaml").write_text(json.dumps({"name": text}))
    machine = {"platform": text, "gpus": [text], "versions": {"torch": text, "hymba-align": text}, "git_revision": text}
    (folder / "environment.json").write_text(json.dumps(machine))
    counted = dict.fromkeys(("rows_read", "rows_kept", "conversations", "total_tokens", "trained_tokens", "repeat"), 1)
    source = {**counted, "name": text, "lost": {text: 1}, "rows_not_chosen": 0, "rows_passed_over": 0, "shortened": 0}
    (folder / "sft" / "data.json").write_text(json.dumps({"sources": [source]}))
