from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hymba_align.data import packing
from hymba_align.data.packing import PackingReport, add_labels, pack, packing_report
from hymba_align.data.reading.examples import Conversation
from hymba_align.data.rendering import Rendered, render_conversations

MAX_LENGTH = 8192


def documents(lengths: Sequence[int], seed: int = 0) -> Any:
    """Documents of random ids, about half of them under the loss."""
    from datasets import Dataset, Features, List, Value

    rng = np.random.default_rng(seed)
    rows = {
        "input_ids": [rng.integers(0, 32_000, length) for length in lengths],
        "assistant_masks": [rng.integers(0, 2, length) for length in lengths],
    }
    features = Features({"input_ids": List(Value("int32")), "assistant_masks": List(Value("int8"))})
    return Dataset.from_dict(rows, features=features)


def unpacked(rows: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The documents of packed rows, as ids and labels."""
    found = []
    for row in rows:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        for start, end in pairwise(np.cumsum([0, *row["seq_lengths"]])):
            found.append((tuple(row["input_ids"][start:end]), tuple(row["labels"][start:end])))
    return found


def labelled(dataset: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (
            tuple(row["input_ids"]),
            tuple(
                token if trained else -100
                for token, trained in zip(row["input_ids"], row["assistant_masks"], strict=True)
            ),
        )
        for row in dataset
    ]


def log_normal(mu: float, sigma: float, count: int) -> list[int]:
    drawn = np.exp(np.random.default_rng(1).normal(mu, sigma, count))
    return np.ceil(drawn).clip(1, MAX_LENGTH).astype(int).tolist()


def fill_rate(lengths: Sequence[int]) -> float:
    """Of documents of these lengths at MAX_LENGTH, packed as files are."""
    from datasets import Dataset, Features, List, Value

    ids = np.zeros(max(lengths), dtype=np.int32)
    columns = {column: [ids[:length] for length in lengths] for column in ("input_ids", "labels")}
    features = Features(dict.fromkeys(columns, List(Value("int32"))))
    rows = pack(Dataset.from_dict(columns, features=features), MAX_LENGTH)
    report = packing_report(rows["seq_lengths"], MAX_LENGTH, 0)
    assert report.tokens == sum(lengths)
    return report.fill_rate


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_every_document_is_whole_and_there_once_with_its_own_labels(lengths: list[int], together: int) -> None:
    dataset = documents(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PACKED_TOGETHER", together)
        rows = pack(dataset, 40)
    assert all(len(row["input_ids"]) <= 40 for row in rows)
    assert Counter(unpacked(rows)) == Counter(labelled(dataset))


def test_labels_may_be_given() -> None:
    dataset = documents([5, 9, 3, 30, 12])
    with_labels = add_labels(dataset)
    assert with_labels.column_names == ["input_ids", "labels"]
    assert [(tuple(row["input_ids"]), tuple(row["labels"])) for row in with_labels] == labelled(dataset)
    assert pack(with_labels, 40).to_list() == pack(dataset, 40).to_list()


def test_packed_rows_have_the_columns_of_trl_and_the_places_of_their_documents() -> None:
    dataset = documents([5, 9, 3])
    dataset = dataset.add_column("place", ["a:1", "a:2", "a:3"]).add_column("note", ["not for training"] * 3)
    rows = pack(dataset, 40)
    assert rows.column_names == ["input_ids", "labels", "seq_lengths", "places"]
    without = pack(dataset.select_columns(["input_ids", "assistant_masks"]), 40)
    assert rows.remove_columns("places").to_list() == without.to_list()


@pytest.mark.parametrize("streamed", [False, True])
def test_every_document_of_a_row_is_named_also_among_documents_of_equal_length(streamed: bool) -> None:
    rng = np.random.default_rng(3)
    dataset = documents(rng.integers(1, 12, 300).tolist())
    dataset = dataset.add_column("place", [f"a.jsonl:{line}" for line in range(1, 301)])
    expected = dict(zip(dataset["place"], labelled(dataset), strict=True))
    assert len(set(expected.values())) == 300, "two documents are alike, so that either could be named"
    if streamed:
        dataset = dataset.to_iterable_dataset()
    rows = list(pack(dataset, 40))
    named = [place for row in rows for place in row["places"]]
    assert sorted(named) == sorted(expected)
    assert [expected[place] for place in named] == unpacked(rows)


def test_rows_are_those_that_trl_packs() -> None:
    from trl.data_utils import pack_dataset

    dataset = documents(np.random.default_rng(4).integers(1, 40, 500).tolist())
    theirs = pack_dataset(dataset.rename_column("assistant_masks", "labels"), 40, "bfd", {"batch_size": 500})
    ours = pack(dataset, 40)
    assert (ours["input_ids"][:], ours["seq_lengths"][:]) == (theirs["input_ids"][:], theirs["seq_lengths"][:])


def test_a_slice_of_a_dataset_packs_as_its_rows_do() -> None:
    dataset = documents([5, 9, 3, 30, 12, 7, 7, 21])
    for rows in ([2, 3, 4, 5], [7, 0, 3]):
        assert Counter(unpacked(pack(dataset.select(rows), 40))) == Counter(labelled(dataset.select(rows)))


@pytest.mark.parametrize(("mu", "sigma"), [(4.5, 0.6), (5.6, 0.8), (5.6, 1.4), (7.0, 1.0), (7.5, 1.5)])
def test_98_percent_of_the_row_tokens_are_filled_on_log_normal_lengths(mu: float, sigma: float) -> None:
    assert fill_rate(log_normal(mu, sigma, 8_000 if mu < 6 else 2_000)) >= 0.98


def test_98_percent_are_filled_on_real_conversations(load: Callable[[str], Any], shared: Path) -> None:
    tokenizer = load("released")
    data = shared / "data"
    questions = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").read_text().splitlines()[:2000]]
    conversations = [
        Conversation([{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}])
        for row in questions
    ]
    speakers = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
    for row in json.loads((data / "llamafactory" / "glaive_toolcall_en_demo.json").read_text()):
        messages = [{"role": speakers[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        conversations.append(Conversation(messages, json.loads(row["tools"])))
    lengths = [
        len(one.input_ids) for one in render_conversations(tokenizer, conversations) if isinstance(one, Rendered)
    ]
    assert len(lengths) == len(conversations)
    assert fill_rate([length for length in lengths if length <= MAX_LENGTH]) >= 0.98


def test_the_same_documents_give_the_same_rows_on_every_call() -> None:
    lengths = log_normal(5.0, 1.0, 300)
    first, again = (pack(documents(lengths), 4096) for _ in range(2))
    assert first.to_list() == again.to_list()


def test_rows_on_disk_are_packed_once_and_again_for_another_length(tmp_path: Path) -> None:
    from datasets import Dataset

    documents(log_normal(5.0, 1.0, 300)).save_to_disk(tmp_path / "d")
    dataset = Dataset.load_from_disk(str(tmp_path / "d"))
    first, again, shorter = (pack(dataset, length) for length in (8192, 8192, 5000))
    assert first.cache_files == again.cache_files != shorter.cache_files
    assert Counter(unpacked(first)) == Counter(unpacked(shorter)) == Counter(labelled(dataset))


def test_the_cache_is_not_used_for_another_version_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl
    from datasets import Dataset

    documents([3, 4]).save_to_disk(tmp_path / "d")
    dataset = Dataset.load_from_disk(str(tmp_path / "d"))
    before = pack(dataset, 40).cache_files
    monkeypatch.setattr(trl, "__version__", "99")
    assert pack(dataset, 40).cache_files != before


def test_documents_that_do_not_fit_and_empty_ones_never_get_here() -> None:
    with pytest.raises(AssertionError, match="a document has 41 tokens, max_length is 40"):
        pack(documents([3, 41]), 40)
    with pytest.raises(AssertionError, match="a document is empty"):
        pack(documents([3, 0]), 40)


def test_long_documents_are_packed_fewer_at_a_time() -> None:
    assert packing._documents_together(np.full(50_000, 100)) == packing.PACKED_TOGETHER
    long = np.full(50_000, 8192)
    together = packing._documents_together(long)
    assert together * 8192 <= packing.TOKENS_PACKED_TOGETHER < 2 * together * 8192
    # Where only the last of them are long, those decide.
    mixed = np.concatenate([np.full(100_000, 10), long])
    assert packing._documents_together(mixed) == together


def test_streams_are_packed_and_checked_as_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = documents([5, 9, 3, 30, 12, 7, 7, 21])
    monkeypatch.setattr(packing, "STREAMED_TOGETHER", 3)
    rows = list(pack(dataset.to_iterable_dataset(), 40))
    assert Counter(unpacked(rows)) == Counter(labelled(dataset))
    assert len(rows) > len(pack(dataset, 40))  # three at a time
    with pytest.raises(AssertionError, match="a document has 30 tokens, max_length is 20"):
        list(pack(dataset.to_iterable_dataset(), 20))


def test_packing_shows_no_progress_and_leaves_the_setting(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    bars = sys.modules["datasets.utils.tqdm"]
    for module in (bars, datasets.config):
        monkeypatch.setattr(module, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars, "_hf_datasets_progress_bars_disabled", False)
    pack(documents([3, 4]), 40)
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()
    documents([3, 4]).map(lambda row: row)
    assert "Map" in capfd.readouterr().err  # there would have been something to see


def test_the_report_counts_what_its_definitions_say() -> None:
    report = packing_report([[30, 10], [25], [40]], 40, 128)
    assert (report.rows, report.documents, report.tokens) == (3, 4, 105)
    assert report.fill_rate == 105 / 120
    assert report.documents_per_row == 4 / 3
    assert report.padded_tokens == 4 * 40  # fewer documents than a batch: all in one
    assert report.padding_saved == 55
    assert report.meta_saved == 128
    assert report.lines() == [
        "3 rows of up to 40 tokens hold 4 documents, 1.3 per row",
        "fill rate 87.50 %: 105 tokens in room for 120",
        "tokens saved: 55 of padding (in batches of 8 documents in random order, each padded to its longest) and 128 "
        "meta tokens (128 once per row instead of once per document)",
        "a training pass computes 489 tokens instead of 672",
    ]


def test_the_report_says_one_row_and_one_document() -> None:
    assert packing_report([[3]], 40, 128).lines()[0] == "1 row of up to 40 tokens holds 1 document, 1.0 per row"
    assert packing_report([[3, 4]], 40, 128).lines()[0] == "1 row of up to 40 tokens holds 2 documents, 2.0 per row"


def test_padded_tokens_are_the_mean_over_all_orders() -> None:
    lengths, batch = [7, 1, 4, 4, 12, 9], 2
    sums = [
        sum(batch * max(order[start : start + batch]) for start in range(0, len(order), batch))
        for order in permutations(lengths)
    ]
    assert packing._padded_tokens(np.array(lengths), batch) == round(sum(sums) / len(sums))


def test_an_empty_report_divides_by_nothing() -> None:
    assert packing_report([], 40, 128) == PackingReport(0, 0, 0, 40, 128, 0)
    assert packing_report([], 40, 128).fill_rate == packing_report([], 40, 128).documents_per_row == 0


def test_the_report_agrees_with_what_was_packed() -> None:
    lengths = log_normal(5.0, 1.0, 500)
    rows = pack(documents(lengths), 2048 * 4)
    report = packing_report(rows["seq_lengths"], 8192, 128)
    assert (report.rows, report.documents, report.tokens) == (len(rows), 500, sum(lengths))
    assert report.meta_saved == 128 * (500 - len(rows))
    assert 0 < report.padding_saved < 500 * max(lengths) - sum(lengths)
