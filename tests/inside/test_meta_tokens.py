"""What meta tokens draw beside a dense model in float64, what passes for a preference, and the texts that ship."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense import Dense
from numpy.testing import assert_allclose
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase

from hymba_align.data.template import load_tokenizer
from hymba_align.inside import meta_tokens
from hymba_align.inside.attention import measure_attention
from hymba_align.inside.meta_tokens import (
    FOLDER,
    SHIPPED_DOMAINS,
    beginnings,
    document_mass,
    domain_documents,
    measure_meta_tokens,
    preferences,
    spelling,
)
from hymba_align.inside.rows import Document, pack_rows
from hymba_align.inside.texts import Texts
from hymba_align.model import HymbaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "golden" / "tiny"
CARD = (ROOT / "data" / "domains" / "README.md").read_text(encoding="utf-8")
LENGTHS = (3, 40, 17, 1, 26)
"""Some longer than the window of 16"""


@pytest.fixture(scope="module")
def tiny() -> HymbaForCausalLM:
    return HymbaForCausalLM.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("data/arithmetic/tokenizer")


@pytest.fixture(scope="module")
def shipped(tokenizer: PreTrainedTokenizerBase) -> dict[str, Texts]:
    return {name: domain_documents(file, tokenizer, 1024) for name, file in SHIPPED_DOMAINS.items()}


def documents(lengths: tuple[int, ...], *, seed: int = 0) -> tuple[Document, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = [tuple(torch.randint(3, 250, (length,), generator=generator).tolist()) for length in lengths]
    return tuple(
        Document(f"document {number}", one, tuple(token % 2 == 0 for token in one)) for number, one in enumerate(ids)
    )


def texts(*found: Document) -> Texts:
    return Texts("made up", len(found), found, ())


# ---- mass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_row", [1, 30, 1000])
def test_the_mass_on_each_meta_token_equals_a_dense_model_however_texts_are_packed(
    tiny: HymbaForCausalLM, tokens_per_row: int
) -> None:
    found = documents(LENGTHS)
    mass_NlM = document_mass(tiny.model, found, tokens_per_row=tokens_per_row)
    dense = Dense.of(tiny)
    for number, document in enumerate(found):
        _, attention = dense.run(list(document.token_ids))
        expected_lM = torch.stack([weights[:, 8:, :8].mean((0, 1)) for weights in attention])
        assert_allclose(mass_NlM[number], expected_lM, atol=2e-6, rtol=0)  # float32, observed 3e-7


def test_texts_weigh_alike_and_their_mass_adds_up_to_the_meta_tokens_share_of_attention(
    tiny: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    domains = {"a": texts(*documents(LENGTHS)), "b": texts(*documents((17, 17, 17), seed=1))}
    measured = measure_meta_tokens(tiny, domains, tokenizer, tokens_per_row=64)
    assert measured.first_tokens == 17
    for domain in measured.domains:
        cut = [Document(one.name, one.token_ids[:17], one.scored[:17]) for one in domains[domain.domain].documents]
        each = [measure_attention(tiny, pack_rows([one], 64), bos_token_id=None).all_layers.meta for one in cut]
        assert sum(domain.mass) == pytest.approx(np.mean(each), abs=1e-7)  # float32, packed and alone, observed 3e-9
        assert domain.tokens == sum(len(one.token_ids) for one in cut)
        assert_allclose(np.mean(domain.by_layer, axis=0), domain.mass, rtol=1e-12)
        assert sum(domain.share) == pytest.approx(1, abs=1e-12)
        assert domain.stderr is not None
        mass_NM = document_mass(tiny.model, cut, tokens_per_row=64).mean(1).numpy()
        assert_allclose(domain.stderr, mass_NM.std(0, ddof=1) / len(cut) ** 0.5, rtol=1e-9)
        assert_allclose(domain.share, (mass_NM / mass_NM.sum(1, keepdims=True)).mean(0), rtol=1e-9)


def test_of_one_text_nobody_knows_how_far_its_numbers_would_move(
    tiny: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    domains = {"one": texts(*documents((9,))), "many": texts(*documents((9, 9)))}
    measured = measure_meta_tokens(tiny, domains, tokenizer, tokens_per_row=64)
    assert [domain.stderr is None for domain in measured.domains] == [True, False]
    assert (measured.preferences, measured.threshold_z, measured.movement) == ((), None, None)


def test_adapters_that_are_not_merged_count(tiny: HymbaForCausalLM) -> None:
    model = get_peft_model(HymbaForCausalLM.from_pretrained(TINY), LoraConfig(target_modules=["in_proj"])).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    found = documents((20,))
    wrapped = document_mass(meta_tokens.hymba_in(model), found, tokens_per_row=64)
    whole = document_mass(model.merge_and_unload().model, found, tokens_per_row=64)
    assert_allclose(wrapped, whole, atol=1e-6, rtol=0)  # float32, observed 1e-7
    assert not np.allclose(wrapped, document_mass(tiny.model, found, tokens_per_row=64), atol=1e-4)


def test_in_bfloat16_the_mass_is_the_same_up_to_rounding(tiny: HymbaForCausalLM) -> None:
    found = documents(LENGTHS)
    expected = document_mass(tiny.model, found, tokens_per_row=64)
    rounded = HymbaForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    mass_NlM = document_mass(rounded.model, found, tokens_per_row=64)
    assert_allclose(mass_NlM, expected, atol=2e-2, rtol=0)  # bfloat16, observed 6e-3
    assert (mass_NlM - expected).abs().mean() < 3e-3  # observed 8e-4
    assert mass_NlM.dtype == torch.float64


# ---- preferences -----------------------------------------------------------------------------------------------------


def made_up_shares(draw: np.random.Generator, sizes: tuple[int, ...], meta: int = 16) -> dict[str, np.ndarray]:
    """Shares of texts that differ by chance alone: skewed, correlated, and spread wider in each next domain."""
    made = {}
    for name, size in enumerate(sizes):
        raw = draw.lognormal(sigma=0.2 * (1 + name), size=(size, meta))
        made[str(name)] = raw / raw.sum(axis=1, keepdims=True)
    return made


def members(sizes: list[int]) -> np.ndarray:
    """(C, N) 1 where a document is the domain's."""
    return np.repeat(np.eye(len(sizes)), sizes, axis=1)


def test_chance_alone_makes_a_preference_no_more_often_than_it_may() -> None:
    draw = np.random.default_rng(0)
    alarms, uncorrected = 0, 0
    for _ in range(100):
        shares = made_up_shares(draw, (6, 5, 8))
        found, threshold = preferences(shares)
        assert threshold is not None
        alarms += bool(found)
        values, sizes = np.concatenate(list(shares.values())), [6, 5, 8]
        z = meta_tokens._z(values - values.mean(0), members(sizes)[None], sizes, np.zeros(16))
        uncorrected += bool((z > 1.645).any())
    assert alarms <= 5
    assert uncorrected >= 90  # what a threshold for one comparison would call a preference, observed 93


def test_a_planted_preference_is_found_and_nothing_else_is() -> None:
    draw = np.random.default_rng(1)
    shares = {name: draw.normal(1, 0.05, (20, 128)) for name in ("maths", "code", "text")}
    shares["code"][:, 77] += 0.5
    shares["code"][:, 90] += 0.8
    shares["text"][:, 5] += 0.3
    shares = {name: raw / raw.sum(axis=1, keepdims=True) for name, raw in shares.items()}
    found, threshold = preferences(shares)
    assert threshold is not None
    assert [(one.domain, one.token) for one in found] == [("code", 90), ("code", 77), ("text", 5)]
    assert all(one.z > threshold for one in found)
    assert found[1].share / found[1].elsewhere == pytest.approx(1.5, abs=0.05)
    assert found[1].elsewhere == pytest.approx((shares["maths"][:, 77].mean() + shares["text"][:, 77].mean()) / 2)


def test_z_is_welchs_statistic_of_two_domains() -> None:
    draw = np.random.default_rng(2)
    a, b = draw.normal(1, 0.1, (7, 3)), draw.normal(1, 0.3, (12, 3))
    z = meta_tokens._z(np.concatenate([a, b]) - 1, members([7, 12])[None], [7, 12], np.zeros(3))[0]
    expected = (a.mean(0) - b.mean(0)) / np.sqrt(a.var(0, ddof=1) / 7 + b.var(0, ddof=1) / 12)
    assert_allclose(z, [expected, -expected], rtol=1e-9)


def test_of_many_texts_and_one_number_the_threshold_is_that_of_a_normal_difference_however_it_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn, z = [], meta_tokens._z

    def listening(values: np.ndarray, times: np.ndarray, *given: Any) -> np.ndarray:
        drawn.append(times.size)
        return z(values, times, *given)

    monkeypatch.setattr(meta_tokens, "_z", listening)
    draw = np.random.default_rng(5)
    shares = {name: draw.normal(1, 0.1, (200, 1)) for name in ("a", "b")}
    for at_once in (2**22, 2**16):
        monkeypatch.setattr(meta_tokens, "AT_ONCE", at_once)
        assert preferences(shares)[1] == pytest.approx(1.96, abs=0.1)  # the larger of z and -z, observed 0.05 off
        assert max(drawn) <= at_once
        drawn.clear()


def test_a_difference_that_is_certain_but_tiny_is_no_preference() -> None:
    draw = np.random.default_rng(3)
    shares = {name: draw.normal(0.1, 1e-4, (20, 4)) for name in ("a", "b")}
    shares["a"][:, 2] *= 1.04
    assert preferences(shares)[0] == ()
    shares["a"][:, 2] *= 1.02
    assert [(one.domain, one.token) for one in preferences(shares)[0]] == [("a", 2)]


def test_texts_without_any_spread_differ_by_rounding_only() -> None:
    same = np.full((5, 3), 1 / 3)
    found, threshold = preferences({"a": same, "b": same * (1 + 1e-9), "c": same})
    assert found == ()
    assert threshold is not None
    assert np.isfinite(threshold)


@pytest.mark.parametrize("sizes", [(5,), (5, 4), (4, 4, 4)])
def test_with_too_few_domains_or_texts_nothing_can_be_told(sizes: tuple[int, ...]) -> None:
    assert preferences(made_up_shares(np.random.default_rng(0), sizes)) == ((), None)


def test_a_domain_of_few_texts_is_not_compared_and_takes_nothing_from_the_others() -> None:
    shares = made_up_shares(np.random.default_rng(4), (20, 20))
    shares["0"][:, 3] *= 2
    found, threshold = preferences(shares)
    assert [(one.domain, one.token) for one in found] == [("0", 3)]
    assert preferences({**shares, "few": shares["0"][:4]}) == (found, threshold)


def test_what_a_preference_draws_elsewhere_is_the_mean_over_the_domains_that_are_compared(
    tiny: HymbaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    domains = {name: texts(*documents((9,) * n, seed=n)) for name, n in (("a", 5), ("b", 6), ("c", 7), ("few", 4))}
    measured = measure_meta_tokens(tiny, domains, tokenizer, tokens_per_row=64).domains
    (found,) = meta_tokens._with_mass([meta_tokens.Found(3, "a", 0.5, 0.25, 9.0)], measured)
    assert found.mass == measured[0].mass[3]
    assert found.elsewhere == pytest.approx((measured[1].mass[3] + measured[2].mass[3]) / 2, rel=1e-12)
    assert (found.share, found.share_elsewhere, found.z) == (0.5, 0.25, 9.0)


def test_domains_are_seen_over_the_same_number_of_tokens() -> None:
    first, cut = beginnings({"short": documents((4, 9, 6, 50)), "long": documents((20, 30))})
    assert first == 6
    assert {name: [len(one.token_ids) for one in found] for name, found in cut.items()} == {
        "short": [4, 6, 6, 6],
        "long": [6, 6],
    }
    assert cut["long"][0].token_ids == documents((20, 30))[0].token_ids[:6]


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_tokens_that_the_tokenizer_does_not_know_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    known = tokenizer("Mia has 4 pens.\nTom", add_special_tokens=False)["input_ids"]
    strange = tokenizer("→", add_special_tokens=False)["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(token) for token in strange[-3:]] == ["<0xE2>", "<0x86>", "<0x92>"]
    flags = (True,) * (len(known) + 4)
    document = Document("", (*known, tokenizer.unk_token_id, *strange[-3:]), flags)
    measured = spelling([document], tokenizer)
    assert measured.unknown == 4 / (len(known) + 4)
    assert spelling([Document("", tuple(known), flags)], tokenizer).unknown == 0  # a line break is known, as a byte
    assert spelling([Document("", tuple(known), flags)], tokenizer).characters_per_token == 19 / len(known)


@pytest.mark.parametrize(("eos", "unknown"), [(2, True), (0, False)])
def test_an_unknown_token_that_also_ends_texts_is_no_unknown_word(eos: int, unknown: bool) -> None:
    tokenizer: Any = SimpleNamespace(unk_token_id=0, eos_token_id=eos, bos_token_id=eos)  # GPT-2 has one token for all
    assert meta_tokens._is_unknown(0, tokenizer) is unknown


def test_a_file_of_one_s_own_is_named_as_it_was_given(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "maths.jsonl"
    file.write_bytes(SHIPPED_DOMAINS["maths"].read_bytes())
    found = domain_documents(file, tokenizer, 1024, documents=2)
    assert found.source == str(file)
    assert len(found.documents) == 2
    assert all(one.name.startswith(f"{file}:") for one in found.documents)


def test_a_text_that_a_file_has_twice_counts_once(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "law.jsonl"
    rows = [{"text": f"Mia has {number} pens."} for number in (4, 4, 5, 4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = domain_documents(file, tokenizer, 1024)
    assert len(found.documents) == 2
    assert [one.reason for one in found.left_out] == ["it says the same as another row"] * 2


def test_the_card_of_the_domains_says_what_is_in_them(tokenizer: PreTrainedTokenizerBase) -> None:
    listed = re.findall(r"^\| `(\w+)\.jsonl` \| (\d+) \| ([\d,]+) \|", CARD, flags=re.MULTILINE)
    assert [name for name, _, _ in listed] == list(SHIPPED_DOMAINS)
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        ["README.md", *(f"{name}.jsonl" for name in SHIPPED_DOMAINS)]
    )
    said, medians = [], []
    for name, rows, characters in listed:
        found = [json.loads(line) for line in SHIPPED_DOMAINS[name].read_text(encoding="utf-8").splitlines()]
        assert len(found) == int(rows)
        rendered = [
            tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False) for row in found
        ]
        assert sum(map(len, rendered)) == int(characters.replace(",", ""))
        medians.append(median(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in rendered))
        said += [turn["content"] for row in found for turn in row["messages"] if turn["role"] == "user"]
        assert {key for row in found for key in row} <= set(re.findall(r"`(\w+)`", CARD.split("## Columns")[1]))
    assert f"the median row has {min(medians):.0f} to {max(medians):.0f} tokens" in CARD
    assert max(Counter(said).values()) == 1, "a question stands twice"
    assert len(tokenizer.tokenize("lighthouse")) == 9
    assert "*lighthouse* is nine\ntokens" in CARD


def test_every_text_of_the_domains_is_used_whole_and_named_without_the_machine(shipped: dict[str, Texts]) -> None:
    for name, found in shipped.items():
        assert len(found.documents) == 20
        assert (found.left_out, found.shortened) == ((), ())
        assert {one.name for one in found.documents} == {f"{name}.jsonl:{line}" for line in range(1, 21)}
        assert found.source == f"{name}.jsonl, which ships with hymba-align"


def test_a_small_tokenizer_spells_the_words_of_all_domains(
    shipped: dict[str, Texts], tokenizer: PreTrainedTokenizerBase
) -> None:
    measured = {name: spelling(found.documents, tokenizer) for name, found in shipped.items()}
    assert all(1.25 < one.characters_per_token < 1.55 for one in measured.values())  # as the card says: 1.3 to 1.5
    assert {name for name, one in measured.items() if one.unknown > 0} == {"function_calls"}  # the umlauts of Finnish


def test_the_domains_come_with_the_package() -> None:
    linked = ROOT / "hymba_align" / "inside" / "domains"
    assert linked.is_symlink()
    assert linked.resolve() == ROOT / "data" / "domains" == FOLDER
