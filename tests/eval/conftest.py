"""Local GSM8K files, a tiny Hymba, and one whose answers are looked up instead of computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_align.checkpoint import base_config
from hymba_align.data.template import load_tokenizer
from hymba_align.eval import answers
from hymba_align.eval.answers import Processes
from hymba_align.eval.run import TaskRun
from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.model.decoding import Decoded
from hymba_align.recipe import BaseSection
from hymba_align.recipe_eval import EvalSection, GSM8KSection

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "data" / "arithmetic"


class LookUp(HymbaForCausalLM):
    """Answers the last question of a prompt by `answers[question]`; keeps what it was asked to generate."""

    answers: Callable[[str], str]
    tokenizer: Any
    given: list[tuple[list[list[int]], dict[str, Any]]]
    """Prompts and settings of every call"""

    def decode(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        stop: Callable[[list[int]], bool],
        on_end: Callable[[int, Decoded], None],
        **settings: Any,
    ) -> list[Decoded]:
        """As `model.decoding.decode`, token by token, with the answers looked up."""
        self.given.append((prompts, {"max_new_tokens": max_new_tokens, **settings}))
        decoded = []
        for prompt in prompts:
            turn = self.tokenizer.decode(prompt).split("Question: ")[-1].split("\n<extra_id_1>")[0]
            asked = turn.removesuffix("\nAnswer:")
            reply = self.tokenizer.encode(self.answers(asked), add_special_tokens=False)[:max_new_tokens]
            end = next((count for count in range(1, len(reply) + 1) if stop(reply[:count])), None)
            decoded.append(Decoded(reply[:end], ended=end is not None))
            on_end(len(decoded) - 1, decoded[-1])
        return decoded


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(str(SHIPPED / "tokenizer"))


@pytest.fixture
def config(tokenizer: Any, small_base: dict[str, Any]) -> HymbaConfig:
    return base_config(BaseSection(**small_base), tokenizer)


@pytest.fixture
def model(config: HymbaConfig) -> HymbaForCausalLM:
    torch.manual_seed(0)
    return HymbaForCausalLM(config).eval()


@pytest.fixture
def look_up(
    tokenizer: Any, config: HymbaConfig, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[str], str]], LookUp]:
    monkeypatch.setattr(answers, "decode", lambda model, prompts, **settings: model.decode(prompts, **settings))

    def make(replies: Callable[[str], str]) -> LookUp:
        model = LookUp(config).eval()
        model.answers, model.tokenizer, model.given = replies, tokenizer, []
        return model

    return make


@pytest.fixture
def section(tmp_path: Path) -> EvalSection:
    """Five shots, seven problems, in batches of three."""
    for name, rows in (("train", 40), ("test", 7)):
        lines = (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
        official = [json.dumps({key: json.loads(line)[key] for key in ("question", "answer")}) for line in lines]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(official) + "\n", encoding="utf-8")
    files = GSM8KSection(train_path=str(tmp_path / "train.jsonl"), test_path=str(tmp_path / "test.jsonl"))
    return EvalSection(batch_size=3, max_new_tokens=48, gsm8k=files)


@pytest.fixture
def solutions(section: EvalSection) -> dict[str, str]:
    """Question to worked answer, of the test file."""
    assert section.gsm8k.test_path is not None
    rows = [json.loads(line) for line in Path(section.gsm8k.test_path).read_text(encoding="utf-8").splitlines()]
    return {row["question"]: row["answer"] for row in rows}


@pytest.fixture
def run_of(tokenizer: Any, tmp_path: Path) -> Iterator[Callable[..., TaskRun]]:
    """A run of a model over a section, with answers of its own each time."""
    runs: list[TaskRun] = []

    def make(model: Any, section: EvalSection, *, tokenizer: Any = tokenizer) -> TaskRun:
        run = TaskRun(
            model=model,
            tokenizer=tokenizer,
            section=section,
            out_dir=tmp_path / f"run-{len(runs)}",
            checkpoint="a checkpoint",
            chat_template={"name": "hymba", "sha256": "0" * 64},
            processes=Processes.alone(),
            identity="a model",
        )
        runs.append(run)
        return run

    yield make
    for run in runs:
        for answers_of_task, _ in run._opened.values():
            answers_of_task.finish()
