"""The command `inspect`: all parts of a small checkpoint, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hymba_align.checkpoint import load_model
from hymba_align.cli import main
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import DataError
from hymba_align.inside import alignment, attention, movement
from hymba_align.inside.inspecting import InspectSettings, inspect_checkpoint, map_layers
from hymba_align.inside.rows import Document, pack_rows
from hymba_align.inside.settings import _of_all, trained_on
from hymba_align.inside.stored import read
from hymba_align.inside.texts import Texts, read_texts
from hymba_align.inspect_choices import PARTS
from hymba_align.model import HymbaConfig
from hymba_align.plan_inspection import keys_of_run
from hymba_align.recipe import DataSection
from tests.inside.looking import FEW, ROWS, files_below, inspect, look


def test_all_parts_are_measured_and_written_as_page_numbers_and_plots(
    checkpoint: Path, earlier: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["inspect", checkpoint, "--against", earlier, *FEW, "--contexts", "24,48", "--batch-size", "2"]
    words += ["--output", out, "--json"]

    assert main([str(word) for word in words]) == 0

    told = json.loads(capfd.readouterr().out)
    found = read(out / "inspect.json")
    assert found.left_out == {}
    assert list(found.seconds) == list(PARTS)
    assert (found.documents, len(found.importance), found.dtype, found.device) == (3, 1, "float32", "cpu")
    assert found.alignment is not None
    assert found.alignment.pairs is not None
    assert (found.alignment.against, len(found.alignment.pairs.pairs)) == (str(earlier), 3)
    assert found.meta_tokens is not None
    assert found.meta_tokens.movement is not None
    assert [domain.domain for domain in found.meta_tokens.domains] == ["maths", "code", "text", "function_calls"]
    assert found.cost is not None
    assert [one.context for one in found.cost.cache] == [24, 48]
    assert found.cost.batch_size == 2
    assert found.shape["meta tokens"] == 4
    plots = [f"plots/{Path(path).name}" for path in told["plots"]]
    assert files_below(out) == sorted(["inspect.html", "inspect.json", *plots])
    assert len(plots) > 5
    assert all((out / plot).read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert [finding["text"] for finding in told["findings"]] == [finding.text for finding in found.findings]
    assert (told["page"], told["numbers"]) == (str(out / "inspect.html"), str(out / "inspect.json"))


def test_what_training_changed_goes_from_the_other_checkpoint_to_this_one(checkpoint: Path, earlier: Path) -> None:
    before, after = (load_model(str(folder)).eval() for folder in (earlier, checkpoint))
    tokenizer = load_tokenizer(str(checkpoint))
    texts = read_texts(ROWS, tokenizer, documents=3, max_length=96, seed=42)
    rows = list(pack_rows(texts.documents, 2048))

    found = look(checkpoint, against=str(earlier), parts=("meta_tokens", "alignment"))

    assert found.meta_tokens is not None
    assert found.alignment is not None
    assert found.alignment.pairs is not None
    assert found.alignment.divergence is not None
    assert found.meta_tokens.movement == movement.meta_movement(before, after)
    assert (found.alignment.weights, found.alignment.whole) == movement.weight_movement(before, after)
    assert found.alignment.attention_before == attention.measure_attention(
        before, rows, bos_token_id=tokenizer.bos_token_id
    )
    assert found.alignment.pairs.pairs == alignment.measure_pairs(before, after, texts.pairs, source=ROWS).pairs
    assert found.alignment.divergence == alignment.measure_divergence(before, after, rows, tokenizer, source=ROWS)


def test_documents_are_as_long_as_is_asked_for_and_the_model_can_take(
    checkpoint: Path, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    short = write_checkpoint(tmp_path / "short", 1, max_position_embeddings=96, orig_max_position_embeddings=96)
    joined = DataSection(path=ROWS, examples_per_conversation=6)

    asked = look(checkpoint, data=joined, parts=("fusion",), documents=2).tokens
    possible = look(short, data=joined, parts=("fusion",), documents=2, max_length=1024).tokens
    longer = look(checkpoint, data=joined, parts=("fusion",), documents=2, max_length=1024).tokens

    assert asked == possible <= 2 * 96
    assert longer > 2 * 96


def test_only_the_rows_that_are_kept_are_read_where_that_is_asked_for(checkpoint: Path) -> None:
    data = DataSection(path=ROWS, validation_fraction=0.1)

    told = [look(checkpoint, data=data, held_out=kept, parts=("fusion",)).data for kept in (False, True)]

    assert told[0].startswith("3 documents chosen from 200 rows")
    kept = int(told[1].split(" rows")[0].rpartition(" ")[2])
    assert 5 <= kept <= 40  # of 200, each with a chance of a tenth


def test_what_is_not_asked_for_or_not_possible_is_left_out_with_a_reason(checkpoint: Path) -> None:
    settings = InspectSettings(str(checkpoint), data=DataSection(path=ROWS), parts=("fusion", "alignment"), documents=2)
    lines: list[str] = []

    found = inspect_checkpoint(settings, lines.append)

    assert found.left_out == {
        **dict.fromkeys(("attention", "importance", "meta_tokens", "cost"), "not asked for"),
        "alignment": "there is no checkpoint to compare with",
    }
    assert found.fusion is not None
    assert lines[0] == f"Read: 2 documents chosen from 200 rows of {ROWS}"
    assert lines[2] == "what training changed: left out, there is no checkpoint to compare with"
    assert lines[1].startswith("fusion: ")


def test_without_data_the_texts_that_ship_with_the_package_are_read(checkpoint: Path) -> None:
    found = inspect_checkpoint(InspectSettings(str(checkpoint), parts=("fusion",), documents=8), lambda line: None)

    assert found.data.startswith("8 texts of 4 domains (maths, code, text, function_calls)")


def test_texts_of_domains_are_read_from_each_alike_and_from_its_beginning_to_its_end() -> None:
    def texts(name: str, count: int) -> Texts:
        documents = tuple(Document(f"{name}:{place}", (1, 2), (False, True)) for place in range(count))
        return Texts(name, count, documents, pairs=())

    domains = {"long": texts("long", 20), "short": texts("short", 3)}

    assert [one.name for one in _of_all(domains, 8)] == [
        "long:0",
        "long:5",
        "long:10",
        "long:15",
        "short:0",
        "short:1",
        "short:2",
    ]
    assert [one.name for one in _of_all(domains, 1)] == ["long:0", "short:0"]
    assert len(_of_all(domains, 100)) == 23


def test_bfloat16_is_computed_in_and_told(checkpoint: Path) -> None:
    found = look(checkpoint, dtype="bfloat16", parts=("attention", "fusion"))

    assert found.dtype == "bfloat16"
    assert found.attention is not None


def test_what_training_changed_is_compared_in_float32_whatever_the_rest_is_computed_in(
    checkpoint: Path, earlier: Path
) -> None:
    rounded, exact = (
        look(checkpoint, against=str(earlier), dtype=dtype, parts=("attention", "meta_tokens", "alignment"))
        for dtype in ("bfloat16", "float32")
    )
    assert rounded.attention is not None
    assert exact.attention is not None
    assert rounded.alignment is not None
    assert exact.alignment is not None
    assert rounded.attention.all_layers != exact.attention.all_layers
    assert replace(rounded.alignment, attention_after=None) == exact.alignment
    assert rounded.attention_compared == replace(exact.attention, maps=())
    assert rounded.meta_tokens is not None
    assert exact.meta_tokens is not None
    assert rounded.meta_tokens.movement == exact.meta_tokens.movement


def test_an_adapter_is_looked_into_as_the_model_that_it_makes(tmp_path: Path) -> None:
    from tests.adapters_of_others import write_adapter, write_base

    base = write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base)

    found = look(tmp_path / "adapter", against=str(base), parts=("alignment",)).alignment

    assert found is not None
    moved = {one.part: one.distance for one in found.weights}
    assert moved["embeddings"] == 0
    assert moved["attention"] > 0


def test_rows_are_read_as_the_checkpoints_run_reads_its_own(
    tmp_path: Path, asked: list[InspectSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = {
        "name": "run",
        "base": {"model": "somebody/hymba"},
        "data": {"path": "rows.jsonl", "question_format": "Q: {question}", "convert": "evil:run", "max_rows": 5},
        "sft": {"data": {"question_format": "Question: {question}"}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = [tmp_path / "sft" / "final", "--data", ROWS, "--output", tmp_path / "out"]

    assert inspect(*words) == 130
    told = capsys.readouterr().out.splitlines()[0]
    assert inspect(*words, "data.question_format='Mine: {question}'") == 130

    path = tmp_path / "recipe.yaml"
    assert told == (
        f"Rows of {ROWS} are read as {path} says (question_format); its converter evil:run is not called; "
        "data.KEY=VALUE says otherwise"
    )
    sections = [settings.data.model_dump(exclude_unset=True) for settings in asked if settings.data is not None]
    assert sections == [
        {"path": ROWS, "question_format": "Question: {question}"},
        {"path": ROWS, "question_format": "Mine: {question}"},
    ]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"data": {"paht": "rows.jsonl"}}, "{path} cannot be read as a recipe ({path}:1: data.paht is not a key of a recipe; the nearest is data.path): rows of {rows} are read by what they hold, and data.KEY=VALUE says otherwise"),
        ({"data": {"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}}, "{path} has several sources of data: rows of {rows} are read by what they hold, and data.KEY=VALUE says otherwise"),
        ({"data": {"path": "rows.jsonl"}}, ""),
    ],
)  # fmt: skip
def test_a_run_whose_recipe_does_not_say_how_its_rows_are_read_is_told(
    changed: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"name": "run", "base": {"model": "somebody/hymba"}, "sft": {}, **changed}))

    assert keys_of_run(str(tmp_path / "sft" / "final"), ROWS) == ({}, told.format(path=path, rows=ROWS))


def test_preferences_are_read_as_the_runs_dpo_reads_them(tmp_path: Path, asked: list[InspectSettings]) -> None:
    stages = {"sft": {"data": {"path": "a.jsonl"}}, "dpo": {"data": {"path": "b.jsonl", "format": "preference"}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "run", "base": {"model": "somebody/hymba"}, **stages}))
    final = str(tmp_path / "sft" / "final")

    assert [keys_of_run(final, ROWS, of_pairs=pairs)[0] for pairs in (False, True)] == [{}, {"format": "preference"}]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}) + "\n")
    assert inspect(final, "--data", ROWS, "--preferences", pairs, "--output", tmp_path / "out") == 130
    assert [section and section.format for section in (asked[0].data, asked[0].preferences)] == [None, "preference"]


def write_run(folder: Path, **data: Any) -> str:
    """A recipe as a run leaves it; the `final` of its SFT, which holds nothing."""
    recipe = {"name": "run", "base": {"model": "somebody/hymba"}, "data": data, "sft": {}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return str(folder / "sft" / "final")


def test_keys_of_the_run_that_do_not_fit_the_rows_are_left_out_and_told(
    tmp_path: Path, asked: list[InspectSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    final = write_run(tmp_path, path="rows.jsonl", examples_per_conversation=6, loss_on="last")
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "Ana has 2 coins."}) + "\n")
    words = ("--output", tmp_path / "out")

    assert inspect(final, "--data", texts, *words) == 130
    told = capsys.readouterr().out.splitlines()
    assert inspect(final, "--data", ROWS, *words) == 130
    assert inspect(final, "--data", texts, *words, "data.examples_per_conversation=6") == 130
    plain = tmp_path / "plain.txt"
    plain.write_text("Ana has 2 coins.")
    capsys.readouterr()
    assert inspect(final, "--data", plain, *words) == 130
    assert capsys.readouterr().out == ""

    assert told[1] == (f"Of these keys, examples_per_conversation is left out: the rows of {texts} are of another kind")
    sections = [settings.data for settings in asked if settings.data is not None]
    assert [(one.examples_per_conversation, one.loss_on) for one in sections] == [
        (1, "last"), (6, "last"), (6, "last"), (1, "assistant"),
    ]  # fmt: skip


@pytest.mark.parametrize(("kept", "told"), [(0.0, ""), (0.05, " (all but 5 % of them)")])
def test_that_the_rows_were_trained_on_is_told(
    kept: float, told: str, tmp_path: Path, asked: list[InspectSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    final = write_run(tmp_path, path=str(Path(ROWS).resolve()), validation_fraction=kept)

    assert inspect(final, "--data", ROWS, "--output", tmp_path / "out") == 130

    assert capsys.readouterr().out.splitlines() == [
        f"The rows of {ROWS} are those that sft of {tmp_path / 'recipe.yaml'} trained on{told}: what is found is about "
        "texts that the model has seen; name rows that were held out to learn about others"
    ]
    assert trained_on(final, "data/arithmetic/train.jsonl") == ""
    assert trained_on(str(tmp_path / "base" / "final"), ROWS) == ""


def test_every_option_arrives(asked: list[InspectSettings], tmp_path: Path) -> None:
    words = ["--against", "B", "--domain", f"law={ROWS}", "--tasks", "gsm8k", "limit=3", "--layers", "0,1,0", "--dtype"]
    words += ["bfloat16", "--contexts", "64", "--batch-size", "2", "--documents", "5", "--max-length", "77"]

    assert inspect("A", *words, "--output", tmp_path / "out", "--text", "t.txt", parts="cost,fusion") == 130

    (found,) = asked
    assert (found.checkpoint, found.against, found.domains, found.text) == ("A", "B", {"law": ROWS}, Path("t.txt"))
    assert (found.layers, found.contexts, found.batch_size, found.dtype) == ((0, 1), (64,), 2, "bfloat16")
    assert (found.documents, found.max_length, found.parts, found.data) == (5, 77, ("fusion", "cost"), None)
    assert found.scoring is not None
    assert (found.scoring.tasks, found.scoring.limit) == (("gsm8k",), 3)


def test_pairs_are_those_of_the_preferences(checkpoint: Path, earlier: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {n} + 1?", "chosen": f"{n + 1}", "rejected": "I do not know."} for n in range(5)]
    pairs.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    preferences = DataSection(path=str(pairs))

    found = look(checkpoint, against=str(earlier), preferences=preferences, parts=("alignment",)).alignment

    assert found is not None
    assert found.pairs is not None
    assert (found.pairs.source, len(found.pairs.pairs)) == (str(pairs), 3)
    assert found.divergence is not None
    assert found.divergence.source == ROWS


def test_the_chosen_text_and_layers_are_drawn(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("Mia has 4 pens.\n")

    found = look(checkpoint, text=text, layers=(1,), parts=("attention",)).attention

    assert found is not None
    assert [(one.layer, one.document) for one in found.maps] == [(1, "mine.txt")]


def test_of_a_text_that_is_too_long_the_beginning_is_drawn_and_that_is_told(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("Mia has 4 pens. " * 40)

    found = look(checkpoint, text=text, layers=(1,), parts=("attention",))

    assert found.attention is not None
    assert found.attention.maps[0].document == "mine.txt"
    assert found.data.endswith("; of mine.txt its first 96 of 203 tokens are read")


def test_a_domain_of_ones_own_stands_beside_those_that_ship(checkpoint: Path) -> None:
    found = look(checkpoint, domains={"sums": ROWS}, parts=("meta_tokens",)).meta_tokens

    assert found is not None
    assert [(one.domain, one.source) for one in found.domains][-1] == ("sums", ROWS)
    assert len(found.domains) == 5


def test_of_a_domain_of_ones_own_it_is_told_what_it_replaces_and_what_counts_once(
    checkpoint: Path, tmp_path: Path
) -> None:
    said = "Ana has two coins and Ben has three books and Mia buys four pens in the shop by the river on a cold morning"
    others = ["The tallest lighthouse stands in the north.", "Seven is a prime number, as is eleven, and nine is none."]
    file = tmp_path / "sums.jsonl"
    texts = [said, f"{said} again", *others, said]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "no JSON\n")

    found = look(checkpoint, domains={"maths": str(file)}, documents=9, parts=("meta_tokens",))

    assert found.meta_tokens is not None
    assert next((one.domain, one.documents) for one in found.meta_tokens.domains) == ("maths", 3)
    replaced, *left_out = found.data.split("; ")[1:]
    assert replaced == f"the domain maths is {file}, in the place of the texts of that name that ship with hymba-align"
    assert left_out[:2] == [
        f"of the domain maths 1 row is left out (it says the same as another row, first {file}:5)",
        f"of the domain maths 1 row is left out (malformed JSON, Expecting value, first {file}:6)",
    ]
    assert [re.sub(r":\d+\)", ":N)", part) for part in left_out[2:]] == [
        f"of the domain maths 1 row is left out (it says nearly the same as another row: at least 80 % of their runs of 5 "
        f"words are the same, first {file}:N)",
    ]


def test_domains_whose_texts_do_not_fit_are_left_out_and_told(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    short = write_checkpoint(tmp_path / "short", 1, max_position_embeddings=96, orig_max_position_embeddings=96)

    found = look(short, parts=("fusion", "meta_tokens"))

    assert found.meta_tokens is None
    reason = (
        r"maths\.jsonl:\d+: the turns up to the assistant's first answer are longer than the model's context of 96 tokens; "
        r"shorten them \(11 more rows of \S*maths\.jsonl give no document either\)"
    )
    none = rf"no text of any domain can be used \({reason}\)"
    assert re.fullmatch(none, found.left_out["meta_tokens"])
    assert re.search(rf"; the domain maths is left out \({reason}\)", found.data)
    assert re.search(r"; the domain function_calls is left out \(function_calls\.jsonl:\d+: ", found.data)
    with pytest.raises(DataError, match=reason):
        look(short, data=None, parts=("fusion",))
    with pytest.raises(DataError, match=f"{none}; name a domain of shorter texts, or ask for other parts as well"):
        look(short, parts=("meta_tokens",))


def test_maps_are_of_global_layers_and_a_local_one() -> None:
    assert map_layers(HymbaConfig()) == [0, 15, 16, 31]
