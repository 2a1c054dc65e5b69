"""The look inside as a step of a run: order, what makes it anew, what is refused before training, and the run's report."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hymba_align.pipeline as pipeline
from hymba_align import plan_inspection
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import DataError, HymbaAlignError, RecipeError
from hymba_align.eval.report import write_report
from hymba_align.inside import of_recipe
from hymba_align.inside.inspecting import InspectSettings
from hymba_align.inside.result import Inspection
from hymba_align.inside.settings import read_texts_for
from hymba_align.model import HymbaConfig
from hymba_align.recipe import load_recipe
from hymba_align.run.folder import RunFolder

EMPTY = {
    "created": "2026-11-22T00:00:00+00:00", "data": "rows", "documents": 1, "tokens": 2, "shape": {"layers": 2},
    "dtype": "float32", "device": "cpu", "versions": {}, "hardware": {}, "seconds": {}, "left_out": {},
}  # fmt: skip


@pytest.fixture
def looks(work: Any, monkeypatch: pytest.MonkeyPatch) -> list[InspectSettings]:
    """What is looked into, among the stages that write files in place of their work."""
    found: list[InspectSettings] = []

    def look(settings: InspectSettings, say: Callable[[str], None]) -> Inspection:
        work.append(("inspect", settings.checkpoint))
        found.append(settings)
        return Inspection(settings.checkpoint, settings.against, **EMPTY)  # type: ignore[arg-type]

    monkeypatch.setattr(of_recipe, "inspect_checkpoint", look)
    return found


@pytest.fixture
def asking(recipe_file: str, tmp_path: Path) -> str:
    """The recipe with a section `inspect`."""
    values = json.loads(Path(recipe_file).read_text())
    values["inspect"] = {"data": str(tmp_path / "test.jsonl"), "documents": 2}
    Path(recipe_file).write_text(json.dumps(values))
    return recipe_file


def test_the_last_stage_is_inspected_after_its_scoring_beside_the_stage_before(
    asking: str, work: Any, looks: list[InspectSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"

    pipeline.run_recipe(load_recipe(asking))

    assert work.names == ["score base", "sft", "score sft", "dpo", "score dpo", "inspect"]
    (asked,) = looks
    assert (asked.checkpoint, asked.against, asked.held_out) == (f"{run}/dpo/final", f"{run}/sft/final", False)
    assert sorted(path.name for path in (run / "inspect" / "dpo").iterdir()) == [
        "inspect.html",
        "inspect.json",
        "plots",
    ]
    told = capsys.readouterr().out
    assert f"Inside: {run}/inspect/dpo/inspect.html\n" in told
    assert "[6/6] Inspect dpo: done in" in told


def test_stages_and_what_they_are_compared_with_can_be_chosen(
    asking: str, looks: list[InspectSettings], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    pipeline.run_recipe(load_recipe(asking, ["inspect.stages=[dpo,base]", "inspect.against=base"]))

    assert [(asked.checkpoint, asked.against) for asked in looks] == [
        (f"{run}/base/final", None),
        (f"{run}/dpo/final", f"{run}/base/final"),
    ]


def test_a_complete_inspection_is_skipped_until_something_that_enters_it_changes(
    asking: str, work: Any, looks: list[InspectSettings], tmp_path: Path, row: dict[str, str]
) -> None:
    def done_again(*overrides: str) -> list[str]:
        work.clear()
        pipeline.run_recipe(load_recipe(asking, overrides))
        return work.names

    done_again()
    unchanged = done_again()
    another_key = done_again("inspect.documents=3")
    no_scores = done_again("inspect.documents=3", "eval=null")
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    other_rows = done_again("inspect.documents=3", "eval=null")
    (tmp_path / "run" / "inspect" / "dpo" / "inspect.html").unlink()
    lost = done_again("inspect.documents=3", "eval=null")

    assert (unchanged, another_key, no_scores) == ([], ["inspect"], [])
    assert (other_rows, lost) == (["inspect"], ["inspect"])


def test_an_inspection_that_was_killed_begins_anew(
    asking: str, work: Any, looks: list[InspectSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path / "run")
    pipeline.run_recipe(load_recipe(asking, ["inspect.documents=3"]))  # an earlier one, of other inputs, does not count
    with monkeypatch.context() as patch:
        patch.setattr(of_recipe, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run_recipe(load_recipe(asking))
    state = folder.read_manifest("inspect/dpo")
    work.clear()

    pipeline.run_recipe(load_recipe(asking))

    assert "completed" not in state
    assert work.names == ["inspect"]
    assert folder.read_manifest("inspect/dpo")["completed"]


def test_a_file_that_changes_while_it_is_looked_at_leaves_the_step_undone(
    asking: str, looks: list[InspectSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = of_recipe.inspect_checkpoint

    def change(*given: Any) -> Inspection:
        with (tmp_path / "test.jsonl").open("a") as file:
            file.write('{"question": "?", "answer": "#### 1"}\n')
        return look(*given)

    monkeypatch.setattr(of_recipe, "inspect_checkpoint", change)

    with pytest.raises(DataError, match=r"test\.jsonl has changed since this run began"):
        pipeline.run_recipe(load_recipe(asking, ["eval=null"]))
    assert "completed" not in RunFolder(tmp_path / "run").read_manifest("inspect/dpo")


def test_a_dry_run_shows_the_step(asking: str, looks: list[InspectSettings], tmp_path: Path) -> None:
    plan = pipeline.run_recipe(load_recipe(asking), dry_run=True)

    assert plan["steps"][-1] == {
        "step": "inspect dpo",
        "data": f"{tmp_path}/test.jsonl, against sft",
        "starts_from": "dpo/final",
        "writes_to": "inspect/dpo",
        "state": "to do",
        "engine": None,
        "command": None,
    }
    assert looks == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inspect.data=null", "data.path={tmp}/alone/train.jsonl", "eval=null"], "inspect.data is not set, dpo keeps no rows for validation and no other test.jsonl lies beside {tmp}/alone/train.jsonl; set inspect.data to a file that is not trained on, keep rows with data.validation_fraction=0.05, or leave the look inside out with inspect=null"),
        (["inspect.data=null", "data.path={tmp}/test.jsonl", "eval=null", "inspect.stages=[base]"], "inspect.data is not set, the recipe keeps no rows for validation and no other test.jsonl lies beside {tmp}/test.jsonl; set inspect.data to a file that is not trained on, keep rows with data.validation_fraction=0.05, or leave the look inside out with inspect=null"),
        (["inspect.data=null", "data=null", "sft=null", "dpo=null", "eval=null"], "inspect.data is not set, and there is no other data to look at base with; set it to a file, or leave the look inside out with inspect=null"),
        (["inspect.data=null", "dpo=null", "data=null", "sft.data.sources=[{{path: {tmp}/train.jsonl}}]", "eval=null"], "inspect.data is not set, sft keeps no rows for validation; set inspect.data to a file that is not trained on, keep rows with sft.data.validation_fraction=0.05, or leave the look inside out with inspect=null"),
        (["inspect.tasks=[gsm8k]", "inspect.parts=[fusion]"], "accuracy on gsm8k is measured in the part importance, which is not asked for; add that part, or leave the tasks out"),
        (["inspect.data={tmp}/absent.jsonl"], "inspect.data is {tmp}/absent.jsonl, which does not exist; correct it"),
        (["inspect.preferences={tmp}/absent.jsonl"], "inspect.preferences is {tmp}/absent.jsonl, which does not exist; correct it"),
        (["inspect.layers=[5]"], "layer 5 is none of the dpo checkpoint, which has layers 0 to 1; name one of them"),
        (["inspect.parts=[alignment]", "inspect.against=none"], "inspect.parts asks for alignment alone, which compares with an earlier checkpoint, and inspect.against is none; set inspect.against to previous or base, or ask for other parts as well"),
        (["inspect.parts=[alignment]", "inspect.stages=[base, dpo]"], "inspect.parts asks for alignment alone, which compares with an earlier checkpoint, and none is before base; ask for other parts, or name later stages with inspect.stages"),
        (["inspect.contexts=[99999]"], "inspect.contexts names 99999, but the checkpoint's context is 8192 (max_position_embeddings); name none above 8192"),
        (["inspect.data={tmp}/titles.csv"], "{tmp}/titles.csv:2: the columns found are 'query', 'answer', neither (question, answer) nor (prompt, completion) nor (messages) nor another set of docs/data.md; say which is which, as in \"dpo.data.columns={{question: 'NAME', answer: 'answer'}}\", which holds for training too, or rename them in the file"),
        (["inspect.domains={{law: {tmp}/titles.csv}}"], "{tmp}/titles.csv:2: the columns found are 'query', 'answer', neither (question, answer) nor (prompt, completion) nor (messages) nor another set of docs/data.md; rename them in the file"),
        (["inspect.domains={{law: {tmp}/law.jsonl}}"], "the domain law is to be read from {tmp}/law.jsonl, which does not exist; correct the path"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_is_trained(
    overrides: list[str], message: str, asking: str, work: Any, looks: list[InspectSettings], tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "alone")
    (tmp_path / "titles.csv").write_text("query,answer\n2 + 2?,4\n")

    with pytest.raises(HymbaAlignError) as caught:
        pipeline.run_recipe(load_recipe(asking, [each.format(tmp=tmp_path) for each in overrides]))

    assert str(caught.value) == message.format(tmp=tmp_path)
    assert work == []
    assert not (tmp_path / "run").exists()


def test_every_key_of_the_section_arrives(asking: str, tmp_path: Path) -> None:
    keys = ["domains={law: law.jsonl}", "tasks=[gsm8k]", "parts=[importance, cost]", "documents=5", "max_length=77"]
    keys += ["layers=[1]", "contexts=[64]", "batch_size=2", "preferences=pairs.jsonl"]
    recipe = load_recipe(asking, ["seed=7", "base.chat_template=released", *(f"inspect.{key}" for key in keys)])

    found = of_recipe.settings_of(recipe, "dpo", "C", "B")

    assert (found.checkpoint, found.against, found.domains, found.parts) == (
        "C",
        "B",
        {"law": "law.jsonl"},
        ("importance", "cost"),
    )
    assert (found.documents, found.max_length, found.layers, found.contexts, found.batch_size) == (
        5,
        77,
        (1,),
        (64,),
        2,
    )
    assert (found.seed, found.chat_template, found.scoring) == (7, "released", plan_inspection.tasks_of(recipe))
    assert [section and section.path for section in (found.data, found.preferences)] == [
        f"{tmp_path}/test.jsonl",
        "pairs.jsonl",
    ]


def test_what_is_measured_depends_on_weights_tasks_and_what_files_hold(asking: str, tmp_path: Path) -> None:
    law = tmp_path / "law.jsonl"
    keys = ["inspect.tasks=[gsm8k]", f"inspect.domains={{law: {law}}}"]

    def inputs(*more: str) -> str:
        return pipeline.plan(load_recipe(asking, [*keys, *more]))[-1].fingerprint

    law.write_text('{"text": "a"}')
    first = inputs()
    other_tasks, as_before = inputs("eval.max_new_tokens=5"), inputs("eval.batch_size=7")
    other_weights = inputs("dpo.max_length=32")
    law.write_text('{"text": "b"}')

    assert as_before == first
    assert len({first, other_tasks, other_weights, inputs()}) == 4


@pytest.mark.parametrize("key", ["data", "domains"])
def test_a_text_file_is_read_and_what_it_holds_counts(key: str, asking: str, tmp_path: Path) -> None:
    text = tmp_path / "mine.TXT"
    text.write_text("Mia has 4 pens.")
    value = text if key == "data" else f"{{mine: {text}}}"
    recipe = load_recipe(asking, [f"inspect.{key}={value}", "inspect.parts=[meta_tokens]", "sft=null", "dpo=null"])

    first, as_before = (pipeline.plan(recipe)[-1].fingerprint for _ in range(2))
    text.write_text("Mia has 5 pens.")

    assert as_before == first
    assert pipeline.plan(recipe)[-1].fingerprint != first
    of_recipe.check_inspection(recipe, "base", ask_hub=True)
    text.write_text(" ")
    with pytest.raises(DataError, match=rf"^{re.escape(str(text))}: it holds no text; name a file that does$"):
        of_recipe.check_inspection(recipe, "base", ask_hub=True)


def test_rows_of_every_format_are_read_for_the_look_inside(asking: str, tmp_path: Path, row: dict[str, str]) -> None:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([row] * 3)
    pyarrow.csv.write_csv(table, tmp_path / "rows.csv")
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_file(tmp_path / "rows.arrow", table.schema) as file:
        file.write_table(table)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(f"{json.dumps(row)}\n".encode() * 3))
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "rows.csv", tmp_path / "folder")

    for name in ("rows.csv", "rows.parquet", "rows.arrow", "rows.jsonl.gz", "folder"):
        path = tmp_path / name
        keys = [f"inspect.{key}={path}" for key in ("data", "preferences")]
        recipe = load_recipe(asking, [*keys, f"inspect.domains={{sums: {path}}}", "inspect.parts=[meta_tokens]"])
        settings = of_recipe.settings_of(recipe, "dpo", "the dpo checkpoint", "the sft checkpoint")
        tokenizer = load_tokenizer("data/arithmetic/tokenizer")

        inputs = read_texts_for(settings, HymbaConfig(), tokenizer)

        assert (len(inputs.documents), len(inputs.pairs), len(inputs.domains["sums"].documents)) == (2, 2, 1), name
        digests = dict(plan_inspection.contents_of(recipe, "dpo"))
        assert digests[str(path)] is not None


def test_costs_alone_need_no_rows(asking: str, tmp_path: Path) -> None:
    alone = ["inspect.data=null", "inspect.parts=[cost]", "sft=null", "dpo=null", "eval=null", "data=null"]
    recipe = load_recipe(asking, alone)

    step = pipeline.plan(recipe)[-1]
    of_recipe.check_inspection(recipe, "base", ask_hub=True)

    assert (step.data, step.contents) == ("no texts", ())
    assert of_recipe.settings_of(recipe, "base", "checkpoint").data is None


def test_rows_that_cannot_be_joined_are_read_one_by_one_where_the_stage_joins_its_own(
    asking: str, tmp_path: Path
) -> None:
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    keys = ["data.examples_per_conversation=3", "data.question_format='Q: {question}'"]

    def read_as(*more: str) -> tuple[int, str]:
        data = of_recipe.settings_of(load_recipe(asking, [*keys, *more]), "dpo", "checkpoint").data
        assert data is not None
        return data.examples_per_conversation, data.question_format

    assert read_as(f"inspect.data={chat}") == (1, "Q: {question}")
    assert read_as() == (3, "Q: {question}")


def test_a_section_for_a_stage_that_is_not_there_is_refused(asking: str) -> None:
    with pytest.raises(
        RecipeError, match=r"inspect.stages names dpo, and there is no section dpo; add it or remove the name"
    ):
        load_recipe(asking, ["dpo=null", "inspect.stages=[dpo]"])


def test_training_one_stage_needs_nothing_to_look_at(
    asking: str, work: Any, looks: list[InspectSettings], tmp_path: Path
) -> None:
    (tmp_path / "test.jsonl").unlink()

    pipeline.run_training_stage(load_recipe(asking, ["inspect.data=null", "eval=null"]), "sft")

    assert work.names == ["sft"]


def test_without_a_file_the_test_file_beside_the_training_file_is_read_in_its_way(asking: str, tmp_path: Path) -> None:
    recipe = load_recipe(asking, ["inspect.data=null", "data.question_format='Q: {question}'"])

    settings = of_recipe.settings_of(recipe, "dpo", "checkpoint")

    assert settings.data is not None
    assert (settings.data.path, settings.data.question_format) == (str(tmp_path / "test.jsonl"), "Q: {question}")
    assert not settings.held_out


def test_without_a_file_the_rows_that_the_stage_keeps_are_read(asking: str, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": f"<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    recipe = load_recipe(asking, ["inspect.data=null", "data.validation_fraction=0.3"])

    settings = of_recipe.settings_of(recipe, "sft", "checkpoint")

    assert settings.held_out
    assert settings.data == recipe.data_for("sft")
    (step,) = [step for step in pipeline.plan(recipe) if step.kind == "inspect"]
    assert step.data == f"held-out rows of {tmp_path}/train.jsonl, against sft"


def test_a_base_is_looked_into_really_and_its_report_says_what_was_found(asking: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    only = ["sft=null", "dpo=null", "eval=null", "inspect.parts=[fusion,importance]"]

    pipeline.run_recipe(load_recipe(asking, only))

    manifest = RunFolder(run).read_manifest("inspect/base")
    summary = manifest["details"]["summary"]
    found = json.loads((run / "inspect" / "base" / "inspect.json").read_text())
    assert found["checkpoint"] == f"{run}/base/final"
    assert summary["findings"]
    page, text = ((run / f"report.{kind}").read_text() for kind in ("html", "md"))
    for finding in summary["findings"]:
        assert finding["text"].split(",")[0] in page
    assert summary["read"].startswith("Read: ")
    assert f'<p class="soft">{summary["read"]}</p>' in page
    assert summary["read"].split(" of ")[0] in text
    assert '<a href="inspect/base/inspect.html">' in page
    assert "## Inside\n\n### Base\n" in text
    assert "[inspect/base/inspect.html](inspect/base/inspect.html)" in text
    assert "| inspect base |" in text


def test_hostile_sentences_of_a_summary_stay_text_in_both_reports(
    asking: str, looks: list[InspectSettings], tmp_path: Path
) -> None:
    run, evil = tmp_path / "run", "<script>alert(1)</script> [x](http://evil) \u202e"
    pipeline.run_recipe(load_recipe(asking))
    path = run / "inspect" / "dpo.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["details"]["summary"] = {
        "head": [evil],
        "rows": [[evil]],
        "findings": [{"text": evil, "sign": True}],
        "read": evil,
    }
    path.write_text(json.dumps(manifest))
    for folder in (run / "sft", run / "dpo"):
        (folder / "metrics.jsonl").write_text("")

    write_report_of(run)

    page, text = ((run / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "Sign: &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert(1)" not in page
    assert "\\<script\\>alert" in text
    assert "\u202e" not in page + text
    assert "\\[x\\]" in text


def test_a_summary_of_another_form_is_named_and_left_out(
    asking: str, looks: list[InspectSettings], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pipeline.run_recipe(load_recipe(asking))
    path = run / "inspect" / "dpo.manifest.json"
    manifest = json.loads(path.read_text())
    of_other_lengths = {"head": ["a"], "rows": [["b", "c"]], "findings": []}
    no_text = {"head": [], "rows": [], "findings": [{"text": 3, "sign": 1}]}
    for summary in (None, {"head": "x"}, of_other_lengths, no_text):
        manifest["details"]["summary"] = summary
        path.write_text(json.dumps(manifest))

        write_report_of(run)

        text = (run / "report.md").read_text()
        assert "## Inside" not in text
        assert "inspect/dpo.manifest.json: its summary" in text


def test_a_look_at_weights_that_are_gone_or_without_its_page_is_left_out_of_the_report(
    asking: str, looks: list[InspectSettings], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pipeline.run_recipe(load_recipe(asking))
    path = run / "dpo" / "manifest.json"
    whole = path.read_text()

    def told() -> str:
        write_report_of(run)
        return (run / "report.md").read_text()

    assert "## Inside" in told()
    path.write_text(json.dumps({**json.loads(whole), "completed": "with other inputs"}))
    trained_anew = told()
    path.write_text(whole)
    (run / "inspect" / "dpo" / "inspect.html").unlink()

    assert "## Inside" not in trained_anew + told()
    assert "The look inside after DPO is of weights that were trained anew since; run it again" in trained_anew


def write_report_of(run: Path) -> None:
    """The real report, of which the stand-ins' scores are no part."""
    for result in (run / "eval").rglob("*.json"):
        result.unlink()
    REAL_REPORT(run)


REAL_REPORT = write_report  # before any test replaces it
