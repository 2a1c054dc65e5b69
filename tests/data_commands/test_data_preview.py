"""`hymba-align data preview`, from the command line to what it prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.data_commands.rows import BAD, CHATS, PAIR, RECIPE, TINY, Run, chats, spans, write, write_recipe


def test_conversations_are_shown_with_place_counts_and_marks(run: Run, tmp_path: Path, small: Any) -> None:
    from hymba_align.data.rendering import render

    path = chats(tmp_path / "my.jsonl")

    code, out, _ = run("preview", path, *TINY, "-n", "3")

    assert code == 0
    assert spans(out) == ["It is 0.</s>", "It is 4.</s>", "It is 8.</s>"]
    one = render(small, CHATS[4])
    tokens, trained = len(one.input_ids), sum(one.assistant_mask)
    assert f"{path}:5  {tokens} tokens, {trained} trained ({100 * trained / tokens:.0f} %)\n" in out
    assert "Question 4: what is ␛[31m[red]4[/red]?↵\n" in out
    assert "\x1b" not in out


def test_colours_on_a_terminal(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")

    _, out, _ = run("preview", chats(tmp_path / "my.jsonl"), *TINY, "-n", "1")

    green = re.findall(r"\x1b\[(?:1;7;|4;)?32m([^\x1b]*)", out)
    assert "".join(green) == "trainedIt is 0.</s>"
    assert "⟦" not in out
    assert "\x1b[31m" not in out


def test_ids_are_the_tokenizers(run: Run, tmp_path: Path, small: Any) -> None:
    from hymba_align.data.rendering import render

    path = chats(tmp_path / "my.jsonl")

    _, out, _ = run("preview", path, *TINY, "-n", "1", "--ids")

    lines = out.split(f"{path}:1  ")[1].split("\n\n")[0].splitlines()[1:]
    assert [int(token) for line in lines[1::2] for token in line.split()] == render(small, CHATS[0]).input_ids


def test_every_source_is_shown(run: Run, tmp_path: Path, small_base: dict[str, Any]) -> None:
    sources = [{"path": str(chats(tmp_path / f"{name}.jsonl"))} for name in ("a", "b", "c")]
    recipe = write_recipe(tmp_path, small_base, data={"sources": sources}, sft={"max_length": 256})

    code, out, _ = run("preview", recipe, "-n", "3")

    assert code == 0
    shown = re.findall(r"(\w)\.jsonl:\d+  \d+ tokens, ", out)
    assert sorted(shown) == ["a", "b", "c"]


def test_rows_that_stop_training_are_told_and_the_others_shown(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", BAD)

    code, out, _ = run("preview", path, *TINY, "--max-length", "128")

    assert code == 0
    assert f"2 rows would stop a training run (data.bad_rows is refuse); the first, {path}:2: the conversation" in out
    assert (
        f"1 row would stop a training run (data.over_long is refuse); the first, {path}:4: longer than max_length=128: it has "
        in out
    )
    assert spans(out) == ["It is 0.</s>"]


def test_the_tree_is_the_segment_tree_of_the_packed_row(
    run: Run, tmp_path: Path, small: Any, small_base: dict[str, Any]
) -> None:
    from hymba_align.data.packing import pack
    from hymba_align.data.prepare import prepare_sft
    from hymba_align.model.segments import SegmentTree
    from hymba_align.recipe import load_recipe

    path = chats(tmp_path / "my.jsonl")
    recipe = write_recipe(tmp_path, small_base, data={"path": str(path)}, sft={"max_length": 256})

    _, out, _ = run("preview", recipe)

    prepared = prepare_sft(load_recipe(recipe).data_for("sft"), small, 256, seed=42)
    rows = pack(prepared.dataset, 256)
    first = prepared.dataset[0]["input_ids"]
    (number,) = [number for number, row in enumerate(rows["input_ids"]) if str(first)[1:-1] in str(row)]
    segments = SegmentTree.from_lengths(rows[number]["seq_lengths"])
    drawn = re.findall(r"document (\d+): (\d+) tokens, positions (\d+) to (\d+), continues (.*)", out)
    assert "\n4 meta tokens, positions 0 to 3\n" in out
    assert [int(length) for _, length, *_ in drawn] == segments.lengths.tolist()
    before = segments.ancestor_tokens.tolist()
    assert [int(start) for _, _, start, *_ in drawn] == [4 + ancestors for ancestors in before]
    assert [int(end) for _, _, _, end, _ in drawn] == [3 + int(n) for n in segments.lengths]
    assert {parent.removesuffix(" (shown above)") for *_, parent in drawn} == {"the meta tokens"}
    assert any(parent.endswith(" (shown above)") for *_, parent in drawn)
    places = re.findall(rf"{path}:(\d+)  Question (\d+): what is", out)
    assert len(places) == segments.num_segments
    assert all(int(line) == int(question) + 1 for line, question in places)


def test_equal_conversations_of_a_row_have_their_own_places(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", [{"messages": CHATS[0]}] * 3)

    _, out, _ = run("preview", path, *TINY)

    assert sorted(re.findall(rf"{path}:(\d)  Question 0", out)) == ["1", "2", "3"]


def test_the_tree_of_a_pair_is_its_segment_tree(run: Run, tmp_path: Path, small: Any) -> None:
    from hymba_align.data.rendering import render

    path = write(tmp_path / "my.jsonl", [PAIR])
    asked = [{"role": "user", "content": PAIR["prompt"]}]
    prompt = len(render(small, asked, add_generation_prompt=True).input_ids)
    chosen, rejected = (
        len(render(small, [*asked, {"role": "assistant", "content": PAIR[side]}]).input_ids) - prompt
        for side in ("chosen", "rejected")
    )

    _, out, _ = run("preview", path, *TINY)

    answers = 128 + prompt
    assert [line.strip("│├└─ ") for line in out.splitlines() if "positions" in line] == [
        "128 meta tokens, positions 0 to 127",
        f"prompt: {prompt} tokens, positions 128 to {answers - 1}, continues the meta tokens",
        f"chosen: {chosen} tokens, positions {answers} to {answers + chosen - 1}, continues prompt",
        f"rejected: {rejected} tokens, positions {answers} to {answers + rejected - 1}, continues prompt",
    ]
    assert spans(out) == ["It is 2.</s>", "It is 3, I think.</s>"]
    total = 2 * prompt + chosen + rejected
    assert f"1 pairs have {total} tokens on their two sides; with each prompt computed once, {prompt} of them" in out


def test_sides_that_do_not_share_their_prompt_are_drawn_apart(
    run: Run, tmp_path: Path, small_base: dict[str, Any]
) -> None:
    path = write(tmp_path / "my.jsonl", [PAIR])
    recipe = write_recipe(
        tmp_path, small_base, data={"path": str(path)}, dpo={"max_length": 256, "share_prefix": False}
    )

    _, out, _ = run("preview", recipe)

    drawn = re.findall(r"prompt and (\w+): .*, continues (.*)", out)
    assert drawn == [("chosen", "the meta tokens"), ("rejected", "the meta tokens")]
    assert "computed once" not in out


def test_what_is_coloured_in_pairs_is_what_preparation_counts(run: Run) -> None:
    from hymba_align.data_commands import preview
    from hymba_align.stage_data import prepare_leniently, stages_of

    (data,) = stages_of(RECIPE, ["dpo.data.max_rows=8"], stage="dpo")

    shown = preview(data, 100).shown

    trained = sum(part.trained for one in shown for part in one.parts)
    assert trained == prepare_leniently(data).trained_tokens


def test_without_packing_the_row_is_one_conversation(run: Run, tmp_path: Path, small_base: dict[str, Any]) -> None:
    sft = {"max_length": 256, "trainer": {"packing": False}}
    recipe = write_recipe(tmp_path, small_base, data={"path": str(chats(tmp_path / "my.jsonl"))}, sft=sft)

    _, out, _ = run("preview", recipe)

    assert len(re.findall(r"document \d+:", out)) == 1
    assert "packing is off (sft.trainer.packing is false): every row is one conversation" in out


def test_meta_tokens_come_from_the_tokenizers_own_checkpoint(run: Run, tmp_path: Path, small: Any) -> None:
    small.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"num_memory_tokens": 7}')

    _, out, _ = run("preview", chats(tmp_path / "my.jsonl"), "--tokenizer", tmp_path / "model")

    assert "7 meta tokens, positions 0 to 6" in out


def test_of_a_streamed_set_the_beginning_is_shown(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hymba_align.stage_data

    monkeypatch.setattr(hymba_align.stage_data, "STREAMED_ROWS", 5)

    code, out, _ = run("preview", chats(tmp_path / "my.jsonl"), *TINY, "streaming=true")

    assert code == 0
    assert "5 of 5 rows kept" in out
    assert "data.streaming is true, so this is about the first 5 rows of each source" in out


def test_the_page_is_written_instead(run: Run, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "<script>alert(1)</script>"}, CHATS[0][1]]}]
    page = tmp_path / "pages" / "preview.html"

    code, out, _ = run("preview", write(tmp_path / "my.jsonl", rows), *TINY, "--html", page)

    assert (code, out) == (0, f"Preview: {page}\n")
    text = page.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;" in text
    assert "128 meta tokens" in text
    assert "fill rate" in text
