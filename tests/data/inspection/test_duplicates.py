from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hymba_align.data.inspection import duplicates
from hymba_align.data.inspection.duplicates import (
    DuplicateGroup,
    Duplicates,
    find_duplicates,
    shingle_hashes,
    similarity,
)
from hymba_align.data.inspection.ngrams import ngram_hashes, word_hashes, words
from hymba_align.data.reading.examples import Conversation, Example, Located, PlainText, Preference, QuestionAnswer

WORDS = [f"word{number}" for number in range(5000)]


def find(*examples: Example) -> Duplicates:
    rows = [Located(f"d.jsonl:{number}", example) for number, example in enumerate(examples, start=1)]
    return find_duplicates(lambda: rows)


def text(rng: random.Random, length: int = 100) -> list[str]:
    return rng.choices(WORDS, k=length)


def plain(said: Sequence[str]) -> PlainText:
    return PlainText(" ".join(said))


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(
        [{"role": "user", "content": prompt}],
        [{"role": "assistant", "content": chosen}],
        [{"role": "assistant", "content": rejected}],
    )


def true_similarity(left: PlainText, right: PlainText) -> float:
    """By sets of words in tuples, without any hashing."""
    sets = []
    for example in (left, right):
        said = words(example.text)
        sets.append({tuple(said[start : start + 5]) for start in range(len(said) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates_are_found_whatever_the_changed_word_and_unlike_texts_are_not() -> None:
    rng = random.Random(0)
    originals = [text(rng) for _ in range(60)]
    changed = []
    for original in originals:
        copy = list(original)
        copy[rng.randrange(100)] = "another"  # at most 5 of 96 runs: a similarity of 0.9 or more
        changed.append(copy)
    found = find(*map(plain, originals), *map(plain, changed))
    assert [(group.first, group.others) for group in found.near] == [
        (f"d.jsonl:{number}", (f"d.jsonl:{60 + number}",)) for number in range(1, 61)
    ]
    assert found.exact == ()


def test_what_is_reported_is_the_true_similarity_and_little_above_the_threshold_is_missed() -> None:
    rng = random.Random(0)
    examples = []
    for _ in range(400):
        original = text(rng, 120)
        copy = list(original)
        for place in rng.sample(range(120), rng.randint(1, 4)):
            copy[place] = "another"
        examples += [plain(original), plain(copy)]
    alike = {number: true_similarity(*examples[2 * number : 2 * number + 2]) for number in range(400)}
    reported = {(int(group.first.split(":")[1]) - 1) // 2: group.similarities for group in find(*examples).near}
    assert all(similarities == (pytest.approx(alike[number]),) for number, similarities in reported.items())
    expected = {number for number, value in alike.items() if value >= 0.8}
    assert 100 < len(expected) < 300
    assert set(reported) <= expected
    assert len(reported) >= 0.99 * len(expected)


def test_texts_of_many_words_are_compared_as_a_whole() -> None:
    rng = random.Random(0)
    base = text(rng, 3 * duplicates.SHINGLES_AT_ONCE)
    changed, half = [*base[:-1], "another"], [*base[: len(base) // 2], *text(rng, len(base) // 2)]
    found = find(plain(base), plain(half), plain(changed))
    assert [(group.first, group.others) for group in found.near] == [("d.jsonl:1", ("d.jsonl:3",))]


def test_equal_rows_are_grouped_under_the_first() -> None:
    one, two = QuestionAnswer("q1", "a1"), QuestionAnswer("q2", "a2")
    found = find(one, two, one, QuestionAnswer("q3", "a3"), one, two)
    assert found.exact == (
        DuplicateGroup("d.jsonl:1", ("d.jsonl:3", "d.jsonl:5"), (1.0, 1.0)),
        DuplicateGroup("d.jsonl:2", ("d.jsonl:6",), (1.0,)),
    )
    assert found.compared == 6


def test_a_question_equals_the_conversation_that_it_becomes_but_not_one_with_other_roles() -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    swapped = [{"role": "assistant", "content": "q"}, {"role": "user", "content": "a"}]
    found = find(QuestionAnswer("q", "a"), Conversation(messages), Conversation(swapped))
    assert [(group.first, group.others) for group in found.exact] == [("d.jsonl:1", ("d.jsonl:2",))]


@pytest.mark.parametrize(
    "other",
    [pair("p", "c", "r2"), pair("p", "c2", "r"), pair("p2", "c", "r")],
    ids=["rejected", "chosen", "prompt"],
)
def test_preferences_are_equal_only_with_equal_prompt_chosen_and_rejected(other: Preference) -> None:
    assert len(find(pair("p", "c", "r"), pair("p", "c", "r"), other).exact[0].others) == 1


def test_tools_make_a_difference_to_equal_rows_and_none_to_near_ones() -> None:
    said = "please tell me what the weather is like in Paris on this fine day"
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": "it rains cats and dogs"}]
    found = find(Conversation(messages), Conversation(messages, [{"name": "f"}]))
    assert found.exact == ()
    assert found.near == (DuplicateGroup("d.jsonl:1", ("d.jsonl:2",), (1.0,)),)


def test_a_system_message_that_all_rows_share_makes_none_of_them_near_duplicates() -> None:
    rng = random.Random(0)
    system = {"role": "system", "content": " ".join(text(rng, 300))}
    rows = [
        Conversation(
            [
                system,
                {"role": "user", "content": " ".join(text(rng, 10))},
                {"role": "assistant", "content": " ".join(text(rng, 10))},
            ]
        )
        for _ in range(20)
    ]
    assert find(*rows).near == ()


def test_tool_calls_belong_to_what_is_said() -> None:
    def calling(arguments: str) -> Conversation:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return Conversation(
            [{"role": "user", "content": "do it"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        )

    one, other = " ".join(text(random.Random(0), 50)), " ".join(text(random.Random(1), 50))
    found = find(calling(one), calling(other), calling(one.upper()))
    assert [group.others for group in found.near] == [("d.jsonl:3",)]


def test_texts_of_fewer_than_five_words_are_compared_for_equality_only() -> None:
    found = find(PlainText("one two three four"), PlainText("One two three four!"), PlainText("one two three four"))
    assert found.near == ()
    assert [group.others for group in found.exact] == [("d.jsonl:3",)]
    assert found.short == 3


def test_words_ignore_case_and_punctuation_and_keep_numbers() -> None:
    assert words("Don't pay $1,000 for the well-known _Café_ n°7 !") == [
        *("don", "t", "pay", "1", "000", "for", "the", "well", "known", "café", "n", "7")
    ]
    assert words("東京タワーTokyo") == ["東", "京", "タ", "ワ", "ー", "tokyo"]
    assert words("\ud800 x") == ["x"]


def test_runs_of_words_never_cross_two_texts() -> None:
    together, apart = word_hashes(["a b c d e f"]), word_hashes(["a b c", "d e f"])
    shared = set(ngram_hashes(together, (3,)).tolist()) & set(ngram_hashes(apart, (3,)).tolist())
    assert shared == {*ngram_hashes(word_hashes(["a b c"]), (3,)).tolist()} | {
        *ngram_hashes(word_hashes(["d e f"]), (3,)).tolist()
    }


def test_runs_of_several_lengths_are_those_of_each_length() -> None:
    hashed = word_hashes(["a b c d e f g"])
    alone = [ngram_hashes(hashed, (length,)).tolist() for length in (2, 5)]
    assert ngram_hashes(hashed, (2, 5, 9)).tolist() == [*alone[0], *alone[1]]
    assert len(set(alone[0])) == 6
    assert ngram_hashes(word_hashes([]), (5,)).tolist() == []


def test_the_similarity_of_sets_is_shared_over_all() -> None:
    one = shingle_hashes(PlainText("a b c d e f g"))  # 3 runs
    assert similarity(one, shingle_hashes(PlainText("a b c d e f x"))) == 2 / 4
    assert similarity(one, one) == 1


def test_rows_alike_are_all_grouped_under_the_first_and_a_row_is_in_one_group() -> None:
    rng = random.Random(0)
    base = text(rng, 200)
    copies = []
    for _ in range(5):
        copy = list(base)
        copy[rng.randrange(200)] = "another"
        copies.append(copy)
    unlike = text(rng, 200)
    found = find(plain(base), plain(unlike), *map(plain, copies), plain([*unlike, "more"]))
    assert [(group.first, group.others) for group in found.near] == [
        ("d.jsonl:1", ("d.jsonl:3", "d.jsonl:4", "d.jsonl:5", "d.jsonl:6", "d.jsonl:7")),
        ("d.jsonl:2", ("d.jsonl:8",)),
    ]


def test_a_row_like_two_firsts_joins_the_one_that_it_is_more_like() -> None:
    rng = random.Random(0)
    begin, middle, end = text(rng, 18), text(rng, 164), text(rng, 18)
    first, second = plain([*begin, *middle]), plain([*middle, *end, *text(rng, 8)])
    third = plain([*middle, *end])
    assert true_similarity(first, second) < 0.8
    assert 0.8 <= true_similarity(first, third) < true_similarity(second, third)
    assert [(group.first, group.others) for group in find(first, second, third).near] == [("d.jsonl:2", ("d.jsonl:3",))]


def test_the_rows_are_read_again_only_where_candidates_are() -> None:
    read = 0

    def rows() -> Iterator[Located[Example]]:
        nonlocal read
        read += 1
        yield Located("d:1", PlainText("one two three four five six"))
        yield Located("d:2", PlainText("seven eight nine ten eleven twelve"))

    find_duplicates(rows)
    assert read == 1


def test_the_work_on_rows_that_are_all_somewhat_alike_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def counted(*sets: object) -> float:
        nonlocal compared
        compared += 1
        return 0.0

    monkeypatch.setattr(duplicates, "similarity", counted)
    rng = random.Random(0)
    base = text(rng, 200)
    rows = [plain([*base, *text(rng, 5)]) for _ in range(200)]
    find(*rows)
    assert 0 < compared <= 200 * duplicates.MOST_COMPARED


def template_rows(count: int) -> list[PlainText]:
    """Rows of 760 words of which about a sixth differ: alike enough to share bands, and too little to be duplicates."""
    rng = random.Random(0)
    template = text(rng, 760)
    rows = []
    for number in range(count):
        row = list(template)
        for place in rng.sample(range(760), 60):
            row[place] = f"own{number}x{place}"
        rows.append(plain(row))
    return rows


def test_memory_is_bounded_where_all_rows_share_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(duplicates, "KEPT_BYTES", 800_000, raising=False)
    rows = [Located(f"d.jsonl:{number}", row) for number, row in enumerate(template_rows(600))]
    finder = duplicates.DuplicateFinder()
    for row in rows:
        finder.add(row)
    finder.find(list)  # what is made once
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    found = finder.find(lambda: rows)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert found.near == ()
    assert peak < 1000 * len(rows) + 800_000  # with all of them kept, 2.9 MB


def test_what_is_found_is_the_same_however_few_rows_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    rows = template_rows(60)
    copies = [plain([*row.text.split()[:-1], f"another{number}"]) for number, row in enumerate(rows)]
    mixed = [*rows, *copies]
    rng.shuffle(mixed)
    whole = find(*mixed)
    assert len(whole.near) == 60
    monkeypatch.setattr(duplicates, "KEPT_BYTES", 30_000)
    assert find(*mixed) == whole


def test_what_is_found_does_not_depend_on_the_process(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = (
        "from hymba_align.data.inspection.duplicates import *; from hymba_align.data.inspection.duplicates import _bands\n"
        "from hymba_align.data.reading.examples import PlainText\n"
        "print(_bands(shingle_hashes(PlainText('one two three four five six seven'))).tolist())"
    )
    printed = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(printed) == 1


def test_gsm8k_has_no_duplicates(shared: Path) -> None:
    for name, rows in (("train", 7473), ("test", 1319)):
        lines = (shared / "data" / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found = find(*(QuestionAnswer(row["question"], row["answer"]) for row in map(json.loads, lines)))
        assert (found.exact, found.near, found.compared) == ((), (), rows)
