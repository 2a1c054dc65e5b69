"""report.html: one file, nothing fetched, nothing that a text can script, all that a reader asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import runpy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hymba_align.eval.report import write_report
from hymba_align.eval.report.contents import read_run
from hymba_align.eval.report.html import html
from hymba_align.eval.report.markdown import markdown
from hymba_align.eval.result import TaskResult

Make = Callable[..., TaskResult]
VOID = {"meta", "br", "input", "link", "img", "hr"}
hostile = runpy.run_path(str(Path(__file__).with_name("hostile.py")))
HOSTILE = hostile["HOSTILE"]


class Page(HTMLParser):
    """The elements of a page with the names of their attributes, and its texts; fails where elements are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def shape(self) -> Counter[tuple[str, tuple[str, ...]]]:
        return Counter((tag, tuple(sorted(attributes))) for tag, attributes in self.elements)


@pytest.fixture(scope="session")
def source(full_run: Path) -> str:
    return html(read_run(full_run))


@pytest.fixture(scope="session")
def page(source: str) -> Page:
    return Page(source)


# ---- one file ----------------------------------------------------------------------------------------------------------


def test_it_is_written_beside_the_markdown(tmp_path: Path) -> None:
    assert write_report(tmp_path) == tmp_path / "report.md"
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_nothing_is_fetched(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint(
        {"link", "img", "iframe", "object", "embed", "base", "video", "audio", "source", "use", "image"}
    )
    for tag, attributes in page.elements:
        assert attributes.keys().isdisjoint({"src", "srcset", "action", "formaction", "data", "style", "background"})
        assert (attributes.get("href") or "#").startswith("#"), tag
        assert not any(name.startswith("on") for name in attributes)


def test_no_style_or_script_names_an_address(source: str) -> None:
    inline = "".join(re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", source, flags=re.DOTALL))
    assert len(inline) > 1000
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch|XMLHttp|import\(", inline)


def test_the_policy_allows_its_own_style_and_script_by_their_digests_and_nothing_else(source: str, page: Page) -> None:
    def digest(kind: str) -> str:
        [text] = re.findall(rf"<{kind}>(.*?)</{kind}>", source, flags=re.DOTALL)
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    [policy] = [attributes["content"] for _, attributes in page.elements if "http-equiv" in attributes]
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest('style')}'; script-src 'sha256-{digest('script')}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_five_tasks_and_three_stages_stay_small(source: str) -> None:
    assert len(source.encode()) < 400_000  # observed 219,000


def test_very_long_answers_do_not_make_it_large(tmp_path: Path, result_of: Make) -> None:
    made = result_of("gsm8k", [True, False] * 10)
    long = [replace(sample, response="word " * 50_000, question="why " * 50_000) for sample in made.samples]
    replace(made, samples=long, first_prompt="x" * 10**6).write(tmp_path / "eval" / "sft" / "gsm8k.json")
    source = html(read_run(tmp_path))
    assert len(source.encode()) < 120_000
    assert "248,000 more characters are in the result file." in source


# ---- texts that others wrote -------------------------------------------------------------------------------------------


def shape_with(folder: Path, text: str, make: Make) -> Counter[tuple[str, tuple[str, ...]]]:
    hostile["write_texts"](folder, text, make)
    return Page(html(read_run(folder))).shape


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_can_make_an_element(tmp_path: Path, result_of: Make, text: str) -> None:
    assert shape_with(tmp_path, text, result_of) == shape_with(tmp_path, "plain", result_of)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.strip))
def test_no_text_at_all_can_make_an_element(tmp_path: Path, result_of: Make, text: str) -> None:
    assert shape_with(tmp_path, f"<{text}>", result_of) == shape_with(tmp_path, "plain", result_of)


def test_characters_that_act_are_shown_in_place(tmp_path: Path, result_of: Make) -> None:
    shape_with(tmp_path, HOSTILE[4], result_of)
    source = html(read_run(tmp_path))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", source)
    assert "‹U+202E›evil‹U+202C› ␀␛[31m␇" in Page(source).text


def test_secrets_of_the_recipe_are_masked(source: str) -> None:
    assert "secret-token" not in source
    assert "hf://a/b?token=***" in source


def test_gpqa_shows_ids_and_letters_whatever_its_file_holds(tmp_path: Path, result_of: Make) -> None:
    for task in ("gpqa", "gpqa_generative"):
        made = hostile["with_texts"](result_of(task, [True, False]), "SECRET")
        kept = replace(made, checkpoint="c", suite="s", warnings=(), not_run={}, versions={}, settings={})
        samples = [replace(sample, id=f"rec{number}") for number, sample in enumerate(kept.samples)]
        replace(kept, samples=samples).write(tmp_path / "eval" / "sft" / f"{task}.json")
    source = html(read_run(tmp_path))
    assert "SECRET" not in source
    assert "The texts of this test must not be published: ids and letters alone." in source
    assert source.count("rec0") == 2


# ---- what it shows -----------------------------------------------------------------------------------------------------


def test_scores_stand_by_stage_with_their_differences_and_the_published_number(page: Page) -> None:
    assert "strict match 9.0 ± 2.0 partial: 200 of 1,319 57.5 ± 3.5 partial: 200 of 1,319" in page.text
    assert "+48.5 ± 4.3 108 gained, 11 lost" in page.text
    assert (
        "Base, after SFT, after DPO: comparable with the 58.76 of Hymba-1.5B-Instruct? no only 200 of 1,319 problems were scored."
        in page.text
    )


def test_partial_results_are_announced_and_marked_wherever_they_stand(page: Page) -> None:
    assert "Partial results. 9 of 15 results are over fewer problems than their test sets have." in page.text
    scores, rest = page.text.split("Training SFT", 1)
    answers, machine = rest.split("Machine and cost", 1)
    cost, how = machine.split("How it was asked", 1)
    # gsm8k: in the overview, at two scores; at its histogram and at its samples; at its cost; at its settings
    assert [part.count("200 of 1,319") for part in (scores, answers, cost, how)] == [3 + 6 + 1, 3 + 3, 3, 3]


def test_whole_results_are_marked_nowhere(tmp_path: Path, result_of: Make) -> None:
    result_of("gsm8k", [True] * 12).write(tmp_path / "eval" / "sft" / "gsm8k.json")
    assert "artial" not in Page(html(read_run(tmp_path))).text


def test_a_run_of_another_model_shows_no_published_number(full_run: Path) -> None:
    other = replace(read_run(full_run), recipe={"base": {"model": "me/my-tiny"}})
    text = Page(html(other)).text
    assert "Hymba-1.5B-Instruct" not in text
    assert not re.search(r"58\.76|31\.03|46\.40|omparable", text)


def test_irrelevance_stands_apart_beside_a_model_that_never_calls(page: Page) -> None:
    apart = page.text.split("Irrelevance right is who calls nothing")[1][:400]
    assert "irrelevance 8.3 ± 5.8 n = 24" in apart
    assert "irrelevance (never calls) 100.0 ± 0.0 n = 24" in apart


def test_every_curve_says_in_words_what_it_shows(page: Page) -> None:
    drawn = [attributes["aria-label"] or "" for tag, attributes in page.elements if tag == "svg"]
    assert sum(words.startswith("Loss: training from") for words in drawn) == 2
    for title in ("Learning rate", "Gradient norm", "Reward margin", "Rewards", "Pairs preferred rightly"):
        assert any(words.startswith(f"{title}: ") for words in drawn), title


def test_scores_taken_while_training_are_a_curve(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    records = [{"step": step, "eval_answers/exact": step / 10, "eval_answers/cut_off": 0.5} for step in (2, 4)]
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    expected = 'aria-label="Answers while training: right from 0.2 at 2 to 0.4 at 4; cut off from 0.5 at 2 to 0.5 at 4"'
    assert expected in html(read_run(tmp_path))


def test_lengths_and_cut_offs_are_shown_for_what_was_generated(page: Page) -> None:
    assert "22 of 200 cut off (11.0 %) at 512 new tokens; partial: 200 of 1,319" in page.text
    drawn = [attributes["aria-label"] or "" for tag, attributes in page.elements if tag == "svg"]
    assert sum("median" in words for words in drawn) == 12  # not for gpqa, whose choices were compared


def test_every_sample_can_be_filtered_and_all_are_there_without_the_script(page: Page) -> None:
    samples = [attributes for _, attributes in page.elements if attributes.get("class") == "sample"]
    assert Counter((one["data-task"], one["data-stage"]) for one in samples) == {
        (task, stage): 10
        for task in ("gsm8k", "gsm8k_nvidia", "gpqa", "gpqa_generative", "bfcl")
        for stage in ("base", "sft", "dpo")
    }
    assert {one["data-verdict"] for one in samples} == {"right", "wrong"}
    assert {one["data-cut"] for one in samples} == {"yes", "no"}
    assert not any("hidden" in one for one in samples)
    [form] = [attributes for tag, attributes in page.elements if tag == "form"]
    assert "hidden" in form  # the script shows it


def test_data_recipe_machine_cost_and_protocol_are_there(page: Page) -> None:
    for words in (
        "60 turn is empty; 40 not chosen; 3 shortened",
        "beta: 0.1",
        "Linux-x86_64, Python 3.11.7, 2 CPU cores, no GPU, trained in 2 processes.",
        "train SFT 1 h 7 min 810,000 199 2.50 GiB",
        "score after SFT, gsm8k (partial: 200 of 1,319) 1 min 1 s 4,200 82",
        "seed 1234",
        "SHA-256 of the chat template 0000",
        "new tokens at most 512",
        "<extra_id_1>User Max has 0 bags",
        "hymba-align eval runs/my-run/sft/final --tasks gsm8k",
        "step 450: sft: the loss rose to 6.1 in one step",
    ):
        assert words in page.text, words


def test_what_the_scores_mean_cut_offs_and_warnings_stand_below_the_table(tmp_path: Path, result_of: Make) -> None:
    result_of("gsm8k", [True] * 12, warnings=("3 prompts lost their beginning",)).write(
        tmp_path / "eval/sft/gsm8k.json"
    )
    text = Page(html(read_run(tmp_path))).text
    assert (
        "flexible match 100.0 ± 0.0 n = 12 Strict match: the number after #### is right; flexible match: the last number of "
        "the answer is right. An answer counts as right by strict match. Cut off before their end: "
        "after SFT, 1 of 12 answers at 512 new tokens. After SFT: 3 prompts lost their beginning. ±" in text
    )


def test_what_all_stages_were_asked_alike_stands_once_and_differences_at_their_stage(
    tmp_path: Path, result_of: Make
) -> None:
    for stage, shots in (("base", 3), ("sft", 5)):
        made = result_of("gsm8k", [True] * 12, checkpoint=f"{stage}/final")
        replace(made, settings={**made.settings, "num_fewshot": shots}).write(tmp_path / "eval" / stage / "gsm8k.json")
    common, base, sft = re.split(
        r" (?:Base|After SFT) (?=checkpoint)", Page(html(read_run(tmp_path))).text.split("How it was asked gsm8k")[1]
    )
    assert "new tokens at most 512" in common
    assert "texts that end an answer </s>" in common
    assert "The first problem as the model read it <extra_id_1>User Max has 0 bags" in common
    assert base.startswith("checkpoint base/final examples in the prompt 3 To repeat it")
    assert sft.startswith("checkpoint sft/final examples in the prompt 5 To repeat it")


def test_first_problems_that_differ_stand_at_their_stage(tmp_path: Path, result_of: Make) -> None:
    for stage in ("base", "sft"):
        result_of("gsm8k", [True], first_prompt=f"asked of {stage}").write(tmp_path / "eval" / stage / "gsm8k.json")
    text = Page(html(read_run(tmp_path))).text
    assert text.count("The first problem as the model read it") == 2
    assert text.index("asked of base") < text.index("After SFT To repeat it") < text.index("asked of sft")


def test_a_curve_alone_has_no_legend(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    record = {"step": 1, "loss": 2.0, "mean_token_accuracy": 0.5, "eval_mean_token_accuracy": 0.4}
    (tmp_path / "sft" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    source = html(read_run(tmp_path))
    assert source.count('class="key key0"') == 1  # of the token accuracy, and none of the loss
    assert 'aria-label="Loss: training from' in source


def test_headings_go_down_one_level_at_a_time_and_every_table_heading_has_a_scope(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")


def test_an_empty_run_says_so_in_every_part(tmp_path: Path) -> None:
    text = Page(html(read_run(tmp_path))).text
    for words in (
        "No stage has been scored yet.",
        "No stage has trained yet.",
        "No data was recorded yet.",
        "None yet.",
    ):
        assert words in text
    assert "The run folder holds no recipe." in text
    assert "Nothing was run yet." in text


def test_a_run_whose_recipe_scores_nothing_has_no_part_about_scores(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: mine\nsft: {}\neval: null\n")
    run = read_run(tmp_path)

    assert re.findall(r'<h2 id="(.*?)"', html(run)) == ["training", "data", "recipe", "machine-and-cost"]
    assert re.findall(r'<li><a href="#(.*?)"', html(run)) == ["training", "data", "recipe", "machine-and-cost"]
    assert re.findall(r"^## (.*)", markdown(run), re.MULTILINE) == ["Data", "Training", "Cost"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("eval/sft.manifest.json", "{", "eval/sft.manifest.json cannot be read"),
        ("eval/sft.manifest.json", '{"details": [1]}', ""),
        ("sft/data.json", '{"sources": [{"name": 1}]}', "sft/data.json lacks what this version writes there (KeyError: 'lost')"),
        ("sft/data.json", '{"validation": "many"}', "sft/data.json lacks what this version writes there (ValueError: "),
        ("recipe.yaml", "base: 3\nlaunch: [1]\nsft: true", ""),
        ("recipe.yaml", "sft: {trainer: 3.5}", ""),
        ("environment.json", '{"gpus": 3, "versions": "none"}', "no GPU"),
        ("sft/metrics.jsonl", '{"step": 1, "loss": 2.0, "learning_rate": "x", "epoch": null, "seconds": "y", "tokens": true}', ""),
    ],
)  # fmt: skip
def test_files_that_hold_other_things_than_they_should_do_not_keep_the_scores_from_being_shown(
    tmp_path: Path, result_of: Make, name: str, content: str, told: str
) -> None:
    hostile["write_texts"](tmp_path, "plain", result_of)
    (tmp_path / "eval" / "sft.manifest.json").write_text("{}")
    (tmp_path / name).write_text(content)
    write_report(tmp_path)
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "strict match 50.0" in text
    assert told in text


def test_files_that_cannot_be_read_are_named_and_the_rest_is_shown(tmp_path: Path, result_of: Make) -> None:
    result_of("gsm8k", [True] * 12).write(tmp_path / "eval" / "sft" / "gsm8k.json")
    (tmp_path / "eval" / "sft" / "gpqa.json").write_text("{")
    (tmp_path / "environment.json").write_text("[]")
    (tmp_path / "recipe.yaml").write_text("{")
    text = Page(html(read_run(tmp_path))).text
    assert "eval/sft/gpqa.json cannot be read as JSON" in text
    assert "environment.json cannot be read:" in text
    assert "recipe.yaml cannot be read" in text
    assert "strict match 100.0 ± 0.0 n = 12" in text
