"""What `hymba-align data` does: the data of a recipe's stages, or of a file alone, checked and shown before training."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba_align.data.inspection.preview import (
    Kind,
    Node,
    Part,
    Piece,
    Preview,
    Row,
    Shown,
    choose,
    first_words,
    pieces,
    visible,
)
from hymba_align.errors import DataError
from hymba_align.files import write_json, write_text
from hymba_align.secrets import shown
from hymba_align.stage_data import StageData, only_beginning, prepare_leniently, read_before_training
from hymba_align.terminal import open_console, print_rule

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from hymba_align.data.prepare import Prepared
    from hymba_align.model.segments import SegmentTree

NOT_PACKED = "packing is off (sft.trainer.packing is false): every row is one conversation"
SIDES: tuple[Kind, Kind] = ("chosen", "rejected")


# --- check ------------------------------------------------------------------------------------------------------------


def check_stages(
    stages: Sequence[StageData],
    *,
    gsm8k: Path | None = None,
    gpqa: Path | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Everything found, after printing every stage's report; `allowed` is False where rows would be lost that may not be.

    Args:
        gsm8k: GSM8K's test file, or the folder that holds test.jsonl; None for the recipe's, else the cache's, else the hub's.
        gpqa: GPQA's dataset.zip; None: not compared with.
        output: a file for everything, all findings included, as JSON.
    Raises: UsageError.
    """
    from hymba_align.data.inspection.check import check_data
    from hymba_align.data.inspection.check_printing import print_comparisons, print_report, verdict
    from hymba_align.data.inspection.contamination import find_benchmarks
    from hymba_align.eval.bfcl.environment import bfcl_folder
    from hymba_align.train.common import quiet_libraries

    console = open_console()
    written = []
    allowed = True
    _say_what_takes_time(stages)
    with quiet_libraries():
        test_file = gsm8k / "test.jsonl" if gsm8k is not None and gsm8k.is_dir() else gsm8k
        benchmarks = find_benchmarks(test_file or stages[0].gsm8k_test, gpqa, bfcl_folder())
        for number, data in enumerate(stages):
            section, notes = read_before_training(data.section), only_beginning(data)
            report = check_data(
                section, data.stage, data.tokenizer, data.max_length, seed=data.seed, benchmarks=benchmarks
            )
            packing = _packing_of(data)
            if number:
                print_rule(console)
            print_report(report, packing, console, data.name, notes, comparisons=len(stages) == 1)
            more = {"packing": list(packing), "verdict": verdict(report), "notes": list(notes)}
            written.append({**report.to_json(), **more})
            allowed = allowed and report.allowed
    if len(stages) > 1:  # the same for all
        print_rule(console)
        print_comparisons(report, console)
    found = {"name": stages[0].name, "allowed": allowed, "stages": written}
    if output is not None:
        write_json(output, found)
        console.print(f"Report: {output}", soft_wrap=True, markup=False)
    return found


def _say_what_takes_time(stages: Sequence[StageData]) -> None:
    """A line for whoever waits, on a terminal only."""
    waiting = open_console(stderr=True)
    if waiting.is_terminal:
        names = dict.fromkeys(shown(source.path) for data in stages for source in data.section.all_sources)
        waiting.print(f"Reading {visible(', '.join(names))} ...", style="dim", markup=False)


def _packing_of(data: StageData) -> tuple[str, ...]:
    """How well the rows that training would keep are packed; nothing where none is left."""
    from hymba_align.data.packing import pack, packing_report

    try:
        prepared = prepare_leniently(data)
    except DataError:  # which the report tells
        return ()
    if data.stage == "dpo":
        return _shared_prompts(data, prepared)
    if not data.packs:
        return (NOT_PACKED,)
    packed = pack(prepared.dataset, data.max_length)
    report = packing_report(packed["seq_lengths"], data.max_length, data.meta_tokens)
    return tuple(report.lines())


# --- preview ----------------------------------------------------------------------------------------------------------


def preview_data(
    stages: Sequence[StageData], count: int, *, with_ids: bool = False, html: Path | None = None
) -> dict[str, Any]:
    """The preview of every stage as plain values, after printing it, or writing it as one page. Raises: UsageError."""
    from hymba_align.data.inspection.preview import html_page, print_preview
    from hymba_align.train.common import quiet_libraries

    console = open_console()
    _say_what_takes_time(stages)
    previews = []
    for number, data in enumerate(stages):
        with quiet_libraries():
            previews.append(preview(data, count))
        if html is None:
            if number:
                print_rule(console)
            print_preview(previews[-1], console, with_ids=with_ids)
    if html is not None:
        write_text(html, html_page(previews, f"Preview of {stages[0].name}"))
        console.print(f"Preview: {html}", soft_wrap=True, markup=False)
    shown = [asdict(each) for each in previews]
    return {"name": stages[0].name, "html": str(html) if html is not None else None, "stages": shown}


def preview(data: StageData, count: int) -> Preview:
    """What one stage would train on: `count` conversations or pairs, the row that the first is packed into, the packing.

    Rows that cannot be used are left out here, with a warning that names the first.
    Raises: UsageError.
    """
    prepared = prepare_leniently(data)
    facts = (
        f"max_length {data.max_length:,}",
        *prepared.summary().splitlines(),
        *only_beginning(data),
    )
    chosen = choose(_source_of_each(prepared), count)
    title = f"{data.name}: {'supervised fine-tuning (SFT)' if data.stage == 'sft' else 'preferences (DPO)'}"
    warnings = tuple(_warnings(data, prepared))
    if data.stage == "dpo":
        shown, rows = _pairs(data, prepared, chosen)
        return Preview(title, facts, warnings, shown, rows, _shared_prompts(data, prepared))
    shown = tuple(_conversation(data, prepared.dataset[number]) for number in chosen)
    row, report = _packed(data, prepared.dataset, {one.place for one in shown})
    return Preview(title, facts, warnings, shown, (row,), report)


def _warnings(data: StageData, prepared: Prepared) -> Iterator[str]:
    """What would stop a training run."""
    for key, choice, overlong in (
        ("bad_rows", data.section.bad_rows, False),
        ("over_long", data.section.over_long, True),
    ):
        lost = [one for one in prepared.lost if one.overlong == overlong]
        if lost and choice == "refuse":
            yield (
                f"{len(lost):,} {'row' if len(lost) == 1 else 'rows'} would stop a training run (data.{key} is refuse); "
                f"the first, {lost[0].place}: {lost[0].reason}"
            )


def _source_of_each(prepared: Prepared) -> list[str]:
    """The file, or table, of each row."""
    places: list[str] = prepared.dataset["place"][:]
    return [place.rpartition(":")[0] for place in places]


def _conversation(data: StageData, row: dict[str, Any]) -> Shown:
    return Shown(row["place"], (Part(pieces(data.tokenizer, row["input_ids"], row["assistant_masks"])),))


def _pairs(data: StageData, prepared: Prepared, chosen: Sequence[int]) -> tuple[tuple[Shown, ...], tuple[Row, ...]]:
    shown, rows = [], []
    for number in chosen:
        record = prepared.dataset[number]
        parts = _pair_parts(data.tokenizer, record)
        place = record.get("place") or f"pair {number + 1}"
        shown.append(Shown(place, parts))
        rows.append(_pair_row(data, place, parts))
    return tuple(shown), tuple(rows)


def _pair_parts(tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> tuple[Part, ...]:
    """Prompt, chosen and rejected as TRL divides them: whatever follows the prompt is trained on."""
    from hymba_align.data.reading.tool_calls import canonical_tools
    from hymba_align.data.rendering import render

    tools = canonical_tools(record.get("tools"))
    prompt = render(tokenizer, record["prompt"], tools, add_generation_prompt=True).input_ids
    parts = [Part(pieces(tokenizer, prompt, [0] * len(prompt)), "prompt")]
    for kind in SIDES:
        answer = render(tokenizer, [*record["prompt"], *record[kind]], tools).input_ids[len(prompt) :]
        parts.append(Part(pieces(tokenizer, answer, [1] * len(answer), kind), kind))
    return tuple(parts)


def _pair_row(data: StageData, place: str, parts: Sequence[Part]) -> Row:
    """The pair as the model computes it: both answers continue the prompt, or each side is a document of its own."""
    from hymba_align.model.segments import SegmentTree

    prompt, chosen, rejected = (part.tokens for part in parts)
    words = [first_words(_text(part.pieces)) for part in parts]
    if data.share_prefix:
        tree = SegmentTree.from_preferences([prompt], [chosen], [rejected])
        title = f"{place}: the pair as one row, with the prompt computed once"
        return _row(data, title, tree, ("prompt", "chosen", "rejected"), ("", "", ""), words, ("context", *SIDES))
    tree = SegmentTree.from_preferences([0], [prompt + chosen], [prompt + rejected])
    title = f"{place}: the pair's two sides (dpo.share_prefix is false, so the prompt is computed twice)"
    return _row(data, title, tree, ("prompt and chosen", "prompt and rejected"), ("", ""), words[1:], SIDES)


def _shared_prompts(data: StageData, prepared: Prepared) -> tuple[str, ...]:
    if not data.share_prefix:
        return ()
    total = prepared.total_tokens
    prompts = (total - prepared.trained_tokens) // 2
    share = f"{100 * prompts / max(total, 1):.1f} %"
    return (
        f"{len(prepared.dataset):,} pairs have {total:,} tokens on their two sides; with each prompt computed once, "
        f"{prompts:,} of them ({share}) are not computed",
    )


def _packed(data: StageData, documents: Dataset, shown: Collection[str]) -> tuple[Row, tuple[str, ...]]:
    """The row that the first conversation is packed into, by the packing that training uses, and the packing report.

    Args:
        shown: places of the conversations that the preview shows.
    """
    from hymba_align.data.packing import pack, packing_report
    from hymba_align.model.segments import SegmentTree

    first: list[int] = documents[0]["input_ids"]
    lengths, ids = [len(first)], first
    report = [NOT_PACKED]
    if data.packs:
        packed = pack(documents, data.max_length)
        report = packing_report(packed["seq_lengths"], data.max_length, data.meta_tokens).lines()
        lengths, ids = _row_with(first, packed)
    tree = SegmentTree.from_lengths(lengths)
    parts = [ids[start : start + length] for start, length in zip(tree.offsets.tolist(), lengths, strict=True)]
    known = _places(documents)
    row = _row(
        data,
        f"The packed row of the first conversation: {tree.num_segments:,} document{'s' * (tree.num_segments > 1)}, "
        f"{tree.num_tokens:,} of {data.max_length:,} tokens",
        tree,
        [f"document {number + 1}" for number in range(tree.num_segments)],
        [next(known.get(_key(part), iter(())), "") for part in parts],
        [first_words(str(data.tokenizer.decode(part))) for part in parts],
        ["context"] * tree.num_segments,
    )
    nodes = tuple(replace(node, shown_above=node.place in shown) for node in row.nodes)
    return replace(row, nodes=nodes), tuple(report)


def _row_with(document: list[int], packed: Dataset) -> tuple[list[int], list[int]]:
    """The lengths of the documents, and the tokens, of the packed row that holds a document."""
    for number, lengths in enumerate(packed["seq_lengths"]):
        if len(document) not in lengths:
            continue
        ids: list[int] = packed[number]["input_ids"]
        ends = list(accumulate(lengths))
        if any(ids[end - length : end] == document for end, length in zip(ends, lengths, strict=True)):
            return lengths, ids
    raise AssertionError("packing keeps every document")


def _places(documents: Dataset) -> dict[bytes, Iterator[str]]:
    """The places of the documents that are packed together with the first, by their tokens, which several may share."""
    from hymba_align.data.packing import PACKED_TOGETHER

    together = documents.select(range(min(len(documents), PACKED_TOGETHER)))
    places: dict[bytes, list[str]] = {}
    for batch in together.select_columns(["input_ids", "place"]).iter(batch_size=1000):
        for ids, place in zip(batch["input_ids"], batch["place"], strict=True):
            places.setdefault(_key(ids), []).append(place)
    return {key: iter(those) for key, those in places.items()}


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()


def _row(
    data: StageData,
    title: str,
    tree: SegmentTree,
    names: Sequence[str],
    places: Sequence[str],
    words: Sequence[str],
    kinds: Sequence[Kind],
) -> Row:
    """A segment tree with what there is to say about its segments; lengths, parents and positions are the tree's."""
    from hymba_align.model.segments import ROOT

    columns = (tree.lengths.tolist(), tree.parents.tolist(), tree.ancestor_tokens.tolist(), names, places, words, kinds)
    nodes = tuple(
        Node(name, length, None if parent == ROOT else parent, data.meta_tokens + before, kind, place, said)
        for length, parent, before, name, place, said, kind in zip(*columns, strict=True)
    )
    return Row(title, data.meta_tokens, nodes, data.max_length)


def _text(several: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in several)
