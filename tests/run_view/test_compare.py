"""`hymba-align compare`: what differs between runs, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hymba_align.cli import main
from hymba_align.run_view.compare import compare_runs

Build = Callable[..., Path]
Compare = Callable[..., tuple[int, str, str]]
HALF = (True, False) * 8
MORE = (True, True, True, False) * 4


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Compare:
    """`hymba-align compare ...` in this process: exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["compare", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def cells(out: str, name: str) -> list[str]:
    """The other cells of a table's row, by its first."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    (found,) = [row for row in rows if row[0] == name]
    return found[1:]


def test_settings_that_differ_are_told_and_no_others(compare: Compare, finished: Build) -> None:
    sft = {"max_length": 512, "trainer": {"learning_rate": 1e-4, "num_train_epochs": 2, "packing": True}}
    one, other = finished("one"), finished("other", sft=sft, seed=7)

    code, out, err = compare(one, other)

    assert (code, err) == (0, "")
    assert cells(out, "seed") == ["42", "7"]
    assert cells(out, "sft.trainer.learning_rate") == ["5e-05", "0.0001"]
    assert cells(out, "sft.trainer.packing") == ["–", "true"]
    assert [row.key for row in compare_runs([one, other]).settings] == [
        "seed", "sft.trainer.learning_rate", "sft.trainer.packing",
    ]  # fmt: skip
    assert "Environment that differs: none\n" in out


def test_a_section_that_a_run_does_not_have_is_one_line(compare: Compare, finished: Build) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 4}
    random = finished(
        "random", base={"config": config}, sft={"max_length": 512, "trainer": {"packing": True, "bf16": True}}
    )
    loaded = finished("loaded", base={"model": "some/model"}, sft={"max_length": 512, "trainer": {}})

    _, out, _ = compare(random, loaded)
    _, both, _ = compare(random, loaded, finished("wide", base={"config": {**config, "hidden_size": 96}}))

    assert cells(out, "base.config") == ["2 keys", "–"]
    assert cells(out, "base.model") == ["–", "some/model"]
    assert cells(out, "sft.trainer") == ["2 keys", "–"]
    assert "hidden_size" not in out
    assert cells(both, "base.config.hidden_size") == ["64", "–", "96"], "where the others differ, all of it is told"
    fewer = finished("fewer", base={"model": "some/model"}, sft={"max_length": 512, "trainer": {"packing": True}})
    _, three, _ = compare(random, fewer, loaded)
    assert cells(three, "sft.trainer.bf16") == ["true", "–", "–"], "and where one of them has a key that another lacks"
    assert [row.key for row in compare_runs([random, loaded]).settings if row.key.startswith("base.config.")] == [
        "base.config.hidden_size", "base.config.num_hidden_layers",
    ]  # fmt: skip


def test_a_difference_over_the_same_problems_has_the_error_of_the_pairs(compare: Compare, finished: Build) -> None:
    one, other = finished("one", after_sft=HALF), finished("other", after_sft=MORE)

    _, out, _ = compare(one, other)

    # 4 gained, none lost, of 16: 25 points, and sqrt((4 - 16 (1/4)^2) / (16 * 15)) = 11.2 points.
    assert cells(out, "gsm8k after SFT, strict match") == ["50.0 ± 12.9", "75.0 ± 11.2", "+25.0 ± 11.2"]
    (row,) = [row for row in compare_runs([one, other]).scores if row.stage == "sft"]
    (found,) = row.differences
    assert (found.gained, found.lost, found.n) == (4, 0, 16)  # type: ignore[union-attr]


def test_scores_that_cannot_be_compared_say_why(compare: Compare, finished: Build) -> None:
    from hymba_align.eval.result import read_result

    one, other = finished("one"), finished("other")
    path = other / "eval" / "sft" / "gsm8k.json"
    result = read_result(path)
    type(result)(**{**vars(result), "settings": {**result.settings, "num_fewshot": 8}}).write(path)

    _, out, _ = compare(one, other)

    assert cells(out, "gsm8k after SFT, strict match")[-1] == "other settings: num_fewshot"


def test_of_three_runs_each_is_compared_with_the_first(finished: Build) -> None:
    roots = [finished("a", after_sft=HALF), finished("b", after_sft=MORE), finished("c", after_sft=(True,) * 16)]

    (row,) = [row for row in compare_runs(roots).scores if row.stage == "sft"]

    assert [found.value for found in row.differences] == [0.25, 0.5]  # type: ignore[union-attr]


def test_curves_share_their_axes(compare: Compare, finished: Build) -> None:
    one, other = finished("one", steps=20), finished("other", steps=40)

    _, out, _ = compare(one, other)

    lines = out.splitlines()
    start = lines.index("SFT: loss")
    assert lines[start + 1].split() == ["one", "other"]
    assert re.fullmatch(r" +1 +step 40 +1 +step 40", lines[start + 8])
    width = len(lines[start + 8]) // 2
    left, right = (
        re.sub(r"^ *\S*┤", "", lines[start + 7][part].rstrip()) for part in (slice(0, width), slice(width, None))
    )
    assert 0 < len(left) <= len(right) / 2 + 1


def test_runs_that_share_nothing_still_stand_beside_each_other(compare: Compare, finished: Build, begun: Build) -> None:
    whole, other = finished("whole", base={"model": None}), begun("other", data={"path": "else.csv"})
    (other / "recipe.yaml").unlink()
    (other / "eval" / "base" / "gsm8k.json").unlink()

    code, out, _ = compare(whole, other)

    assert code == 0
    assert "Problem: recipe.yaml is missing or cannot be read" in out
    assert cells(out, "data.path") == ["rows.jsonl", "–"]
    assert cells(out, "gsm8k after SFT, strict match")[1:] == ["–", "not scored in both"]
    assert cells(out, "train SFT: tokens") == ["2,000", "700"]


def test_runs_of_one_name_are_told_apart(finished: Build) -> None:
    one, other = finished("x/demo"), finished("y/demo")

    assert compare_runs([one, other]).labels == (str(one), str(other))
    assert compare_runs([one, one]).labels == (f"{one} (1)", f"{one} (2)")


@pytest.mark.parametrize(
    ("arguments", "last_line"),
    [
        (["{run}"], "Error: compare needs two runs or more"),
        (["{run}", "{run}", "--output", "x.pdf"], "Error: Invalid value for '--output': 'x.pdf' ends neither in .html nor in .md"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_a_usage_error(
    arguments: list[str], last_line: str, compare: Compare, finished: Build
) -> None:
    run = str(finished())

    code, out, err = compare(*(word.format(run=run) for word in arguments))

    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == last_line


def test_a_folder_that_is_no_run_is_named(compare: Compare, finished: Build, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    code, _, err = compare(finished(), tmp_path / "empty")

    assert code == 2
    assert err.startswith(f"Error: {tmp_path}/empty is no run folder: it has no recipe.yaml")


def test_json_has_everything(compare: Compare, finished: Build) -> None:
    _, out, err = compare(finished("one", after_sft=HALF), finished("other", after_sft=MORE, seed=7), "--json")

    found: dict[str, Any] = json.loads(out)
    assert "Settings that differ" in err
    assert [run["name"] for run in found["runs"]] == ["one", "other"]
    assert found["settings"] == {"seed": ["42", "7"]}
    (sft,) = [row for row in found["scores"] if row["stage"] == "sft"]
    assert sft["differences"] == [{"value": 0.25, "stderr": pytest.approx(0.1118034), "gained": 4, "lost": 0, "n": 16}]
    (loss,) = [each for each in found["curves"] if (each["stage"], each["name"]) == ("sft", "loss")]
    assert loss["points"]["other"][0] == [1.0, 2.0]


# --- Files ------------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_runs_say_and_does_nothing_else(compare: Compare, finished: Build, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "comparison.html"
    one, other = finished("one"), finished("other", base={"model": "<script>alert(1)</script>"})

    code, out, _ = compare(one, other, "--output", page)

    text = page.read_text(encoding="utf-8")
    assert code == 0
    assert out.endswith(f"Comparison: {page}\n")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in re.sub(r'http-equiv="[^"]*"', "", text)
    assert text.count("<polyline") == 6  # two losses and a margin of two runs
    for words in ("SFT: loss", "DPO: reward margin", "50.0 ± 12.9", "train SFT: tokens per second"):
        assert words in text


def test_markdown_shows_what_runs_say_and_does_nothing_else(compare: Compare, finished: Build, tmp_path: Path) -> None:
    page = tmp_path / "comparison.md"
    one, other = finished("one"), finished("other", base={"model": "a|b [x](http://y) <b>"})

    compare(one, other, "--output", page)

    text = page.read_text(encoding="utf-8")
    assert "| base.model | nvidia/Hymba-1.5B-Base | a\\|b \\[x\\](http:\\//y) \\<b\\> |" in text
    assert "| SFT: loss | 0.1 (step 20) | 0.1 (step 20) |" in text
    assert "| gsm8k after SFT, strict match | 50.0 ± 12.9 | 50.0 ± 12.9 | +0.0 ± 0.0 |" in text
