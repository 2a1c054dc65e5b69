"""Task definitions: the harness's own, with what eval/tasks/ and the recipe replace, and nothing else."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import yaml
from lm_eval.config.task import TaskConfig
from lm_eval.tasks._yaml_loader import load_yaml

from hymba_align.errors import RecipeError
from hymba_align.eval import gpqa, gsm8k
from hymba_align.eval.lm_tasks import TASKS_FOLDER, check_context, read_definition
from hymba_align.recipe_eval import EvalSection, GPQASection, GSM8KSection, Task

invented = runpy.run_path(str(Path(__file__).with_name("invented_gpqa.py")))
PACKAGED = Path(lm_eval.tasks.__file__).parent
STOPS = ["</s>", "<|im_end|>", "<extra_id_1>"]
# What lm-eval 0.4.13 packages as stops of all these tasks.
PACKAGED_STOPS = {"Question:", "</s>", "<|im_end|>"}

GSM8K_CHANGES: dict[str, Any] = {
    "custom_dataset": "ours",
    "generation_kwargs": {"until": STOPS, "do_sample": False, "temperature": 0.0, "max_gen_toks": 512},
}
NVIDIA_CHANGES = {**GSM8K_CHANGES, "task": "gsm8k_nvidia", "doc_to_text": "Question: {{question}}"}
GPQA_CHANGES: dict[str, Any] = {"custom_dataset": "ours", "process_docs": None}
GENERATIVE_CHANGES = {
    **GPQA_CHANGES,
    "num_fewshot": 0,
    "generation_kwargs": {"until": STOPS, "temperature": 0.0, "max_gen_toks": 1024},
}
ADDED_BY_THE_HARNESS = "config_source"


@pytest.fixture
def data(tmp_path: Path) -> EvalSection:
    row = json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n"
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(row * 6, encoding="utf-8")
    files = GSM8KSection(train_path=str(tmp_path / "train.jsonl"), test_path=str(tmp_path / "test.jsonl"))
    return EvalSection(gsm8k=files, gpqa=GPQASection(path=str(invented["write_archive"](tmp_path / "dataset.zip"))))


def differences(ours: TaskConfig, packaged: str) -> dict[str, Any]:
    """Keys whose value is not the packaged one, with ours; `tag` only groups tasks by name, and the harness drops it."""
    theirs = vars(TaskConfig(**{key: value for key, value in load_yaml(PACKAGED / packaged).items() if key != "tag"}))
    metadata = dict(ours.metadata or {})
    assert metadata.pop(ADDED_BY_THE_HARNESS) == "inline"
    assert metadata == theirs["metadata"]
    found = {key: value for key, value in vars(ours).items() if key != "metadata" and value != theirs[key]}
    own = {key: value for key, value in vars(ours).items() if key != "fewshot_config"}
    if found.get("fewshot_config") == TaskConfig(**own).fewshot_config:
        del found["fewshot_config"]  # only repeats the task's own keys
    return {key: "ours" if key == "custom_dataset" and callable(value) else value for key, value in found.items()}


@pytest.mark.parametrize(
    ("variant", "subset", "packaged", "changes"),
    [
        ("gsm8k", "main", "gsm8k/gsm8k.yaml", GSM8K_CHANGES),
        ("gsm8k_nvidia", "main", "gsm8k/gsm8k.yaml", NVIDIA_CHANGES),
        *(
            ("gpqa", subset, f"gpqa/zeroshot/gpqa_{subset}_zeroshot.yaml", GPQA_CHANGES)
            for subset in ("main", "diamond", "extended")
        ),
        *(
            ("gpqa_generative", subset, f"gpqa/generative/gpqa_{subset}_generative_n_shot.yaml", GENERATIVE_CHANGES)
            for subset in ("main", "diamond", "extended")
        ),
    ],
)
def test_a_task_differs_from_the_packaged_one_in_these_keys_alone(
    data: EvalSection, variant: Any, subset: Any, packaged: str, changes: dict[str, Any]
) -> None:
    section = data.model_copy(update={"gpqa": data.gpqa.model_copy(update={"subset": subset})})
    task = (gsm8k if variant.startswith("gsm8k") else gpqa).load_task(section, variant)
    assert differences(task.config, packaged) == changes


def test_first_shots_change_the_sampler_and_nothing_else(data: EvalSection) -> None:
    first = data.model_copy(update={"gsm8k": data.gsm8k.model_copy(update={"shots": "first"})})
    config = gsm8k.load_task(first).config
    found = differences(config, "gsm8k/gsm8k.yaml")
    sampler = found.pop("fewshot_config")
    assert found == GSM8K_CHANGES
    own = gsm8k.load_task(data).config.fewshot_config
    assert {key: value for key, value in vars(sampler).items() if value != vars(own)[key]} == {"sampler": "first_n"}


def test_the_packaged_stops_are_kept_but_for_the_word_that_answers_may_begin_with() -> None:
    for path in ("gsm8k/gsm8k.yaml", "gpqa/generative/gpqa_main_generative_n_shot.yaml"):
        assert set(load_yaml(PACKAGED / path)["generation_kwargs"]["until"]) == PACKAGED_STOPS
    assert set(STOPS) == PACKAGED_STOPS - {"Question:"} | {"<extra_id_1>"}


def test_every_definition_names_a_packaged_file_and_only_keys_that_it_changes_or_adds() -> None:
    files = sorted(TASKS_FOLDER.glob("*.yaml"))
    assert [file.stem for file in files] == ["gpqa", "gpqa_generative", "gsm8k", "gsm8k_nvidia"]
    for file in files:
        ours = yaml.safe_load(file.read_text(encoding="utf-8"))
        packaged = load_yaml(PACKAGED / ours.pop("include").format(subset="main"))
        complete = read_definition(file.stem, subset="main")
        assert complete == {**packaged, **ours}
        assert {key for key in ours if packaged.get(key) == ours[key] and key in packaged} == set()


@pytest.mark.parametrize(
    ("task", "section", "message"),
    [
        (
            "gsm8k",
            EvalSection(),
            "eval.gsm8k.max_new_tokens is 512, which leaves no room for a prompt in the model's context of 512 tokens; lower it",
        ),
        (
            "gpqa_generative",
            EvalSection(max_new_tokens=700),
            "eval.max_new_tokens is 700, which leaves no room for a prompt in the model's context of 512 tokens; lower it",
        ),
    ],
)
def test_answers_that_fill_the_context_are_refused_with_the_key(task: Task, section: EvalSection, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_context(512, section, task)
    assert str(raised.value) == message


def test_choices_need_no_room_and_answers_one_token_less_than_the_context_have_some() -> None:
    check_context(512, EvalSection(max_new_tokens=511), "gsm8k")
    check_context(8, EvalSection(), "gpqa")
