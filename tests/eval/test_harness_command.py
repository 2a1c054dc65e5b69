"""Our scores are those of the harness's own command: `simple_evaluate` with its plain model at batch size 1, packaged tasks."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch.testing import assert_close

from hymba_align.eval import gpqa, gsm8k
from hymba_align.eval.lm_tasks import Outcome, run_harness
from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.recipe_eval import EvalSection, GPQASection

PACKAGED = Path(lm_eval.tasks.__file__).parent
CLOSE = {"atol": 1e-5, "rtol": 0}  # float32 models, sums of 4 tokens, down to -28; observed 1.9e-6
invented = runpy.run_path(str(Path(__file__).with_name("invented_gpqa.py")))


@pytest.fixture
def model(config: HymbaConfig) -> HymbaForCausalLM:
    """Weights large enough that answers and choices depend on the whole prompt."""
    torch.manual_seed(0)
    config.initializer_range = 0.2
    return HymbaForCausalLM(config).eval()


def command(model: HymbaForCausalLM, tokenizer: Any, config: dict[str, Any]) -> Any:
    """As `lm_eval --model hf --batch_size 1 --apply_chat_template --fewshot_as_multiturn`, without `<s>`."""
    return simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=False),
        tasks=[config],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )


def assert_the_same(ours: Outcome, theirs: Any, name: str) -> None:
    """All prompts, answers, extracted texts, verdicts, scores and standard errors."""
    records = theirs["samples"][name]
    keys = set(records[0]) - {"resps", "filtered_resps"}
    for record in records:
        own = ours.records[record["doc_id"]][record["filter"]]
        assert {key: own[key] for key in keys} == {key: record[key] for key in keys}
        if ours.answers:
            assert (own["resps"], own["filtered_resps"]) == (record["resps"], record["filtered_resps"])
        else:
            found, expected = (torch.tensor([one for one, _ in each["filtered_resps"]]) for each in (own, record))
            assert_close(found, expected, **CLOSE)
            assert [greedy for _, greedy in own["filtered_resps"]] == [greedy for _, greedy in record["filtered_resps"]]
    assert len(records) == sum(map(len, ours.records))
    expected = {key: value for key, value in theirs["results"][name].items() if key in ours.metrics}
    assert ours.metrics == {**ours.metrics, **expected}
    assert len([key for key in expected if "," in key]) == 4  # two scores or filters, each with its standard error


def test_five_shot_gsm8k_is_that_of_the_harnesss_own_command(
    model: HymbaForCausalLM,
    tokenizer: Any,
    section: EvalSection,
    run_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    section = section.model_copy(update={"max_new_tokens": 8})
    ours = run_harness(run_of(model, section), "gsm8k", gsm8k.load_task(section))

    config = load_yaml(PACKAGED / "gsm8k" / "gsm8k.yaml")
    files = {"train": section.gsm8k.train_path, "test": section.gsm8k.test_path}
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    config["generation_kwargs"] |= {"until": ["</s>", "<|im_end|>", "<extra_id_1>"], "max_gen_toks": 8}
    theirs = command(model, tokenizer, config)

    assert_the_same(ours, theirs, "gsm8k")
    assert len({record["strict-match"]["resps"][0][0] for record in ours.records}) > 3
    assert ours.first_prompt.count("Question: ") == 6


def test_gpqa_by_log_likelihood_is_that_of_the_harnesss_own_command(
    model: HymbaForCausalLM, tokenizer: Any, run_of: Callable[..., Any], tmp_path: Path
) -> None:
    from datasets import Dataset

    archive = str(invented["write_archive"](tmp_path / "dataset.zip"))
    section = EvalSection(tasks=("gpqa",), gpqa=GPQASection(path=archive))
    ours = run_harness(run_of(model, section), "gpqa", gpqa.load_task(section))

    config = load_yaml(PACKAGED / "gpqa" / "zeroshot" / "gpqa_main_zeroshot.yaml")
    rows = {"train": Dataset.from_list(gpqa.read_rows(section))}
    theirs = command(model, tokenizer, {**config, "process_docs": None, "custom_dataset": lambda **_: rows})

    assert_the_same(ours, theirs, "gpqa_main_zeroshot")
    assert len({round(by["none"]["filtered_resps"][0][0], 3) for by in ours.records}) == 7  # they depend on the problem
