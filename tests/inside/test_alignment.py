"""What lies between two checkpoints, against dense computations over whole vocabularies in float64, and against TRL."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hymba_align.data.template import load_tokenizer
from hymba_align.errors import CheckpointError, DataError, TokenizerError
from hymba_align.inside import alignment
from hymba_align.inside.alignment import check_same_vocabulary, measure_divergence, measure_pairs
from hymba_align.inside.result import Divergence
from hymba_align.inside.rows import Document, pack_rows
from hymba_align.inside.texts import Pair, read_texts
from hymba_align.model import HymbaConfig, HymbaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "golden" / "tiny"
VOCABULARY = 257
EXACT: dict[str, Any] = {"abs": 1e-10, "rel": 0}
"""Both in float64, nats; observed 7e-15."""
END = 2


class Models(NamedTuple):
    """A checkpoint, and what a training might have made of it; both also in float64."""

    before: HymbaForCausalLM
    after: HymbaForCausalLM
    before64: HymbaForCausalLM
    after64: HymbaForCausalLM


@pytest.fixture(scope="module")
def models() -> Models:
    before = AutoModelForCausalLM.from_pretrained(TINY).eval()
    after = copy.deepcopy(before)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in after.parameters():
            weight += 0.05 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)
    return Models(before, after, copy.deepcopy(before).double(), copy.deepcopy(after).double())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(ROOT / "data" / "arithmetic" / "tokenizer"))


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCABULARY, count).tolist())


def documents() -> list[Document]:
    """Five of different lengths: a text, conversations with one and two answers, an answer of one token, none scored."""
    made = []
    for number, (count, scored) in enumerate(
        [(70, range(70)), (45, range(30, 45)), (60, [*range(10, 25), *range(40, 60)]), (20, [19]), (12, [0])]
    ):
        ids = list(tokens(count, number))
        if number in (0, 1, 2):
            ids[-1] = END
        flags = tuple(place in set(scored) for place in range(count))
        made.append(Document(f"document {number}", tuple(ids), flags))
    return made


def pairs() -> list[Pair]:
    """Some of which share a prompt, or the beginning of one."""
    prompts = [tokens(40, 10), tokens(40, 10), tokens(40, 10)[:25] + tokens(9, 11), tokens(1, 12)]
    return [
        Pair(f"pair {number}", prompt, tokens(5 + number, 20 + number), tokens(9 - 2 * number, 30 + number))
        for number, prompt in enumerate(prompts)
    ]


# ---- dense references ------------------------------------------------------------------------------------------------


def log_probs(model: HymbaForCausalLM, ids: tuple[int, ...]) -> Any:
    """(T, V): every token's distribution over the next one; the sequence runs alone."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    return logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1)[:, None]


class Token(NamedTuple):
    document: int
    position: int
    kl: float
    reverse_kl: float
    losses: tuple[float, float]
    entropies: tuple[float, float]
    likeliest: tuple[int, int]
    target: int


def dense_tokens(models: Models) -> list[Token]:
    """Every scored token, one document and one token at a time."""
    found = []
    for number, document in enumerate(documents()):
        old, new = (log_probs(model, document.token_ids) for model in (models.before64, models.after64))
        for position in range(1, len(document.token_ids)):
            if document.scored[position]:
                p, q, target = new[position - 1], old[position - 1], document.token_ids[position]
                found.append(
                    Token(
                        number,
                        position,
                        sum(np.exp(p[v]) * (p[v] - q[v]) for v in range(VOCABULARY)),
                        sum(np.exp(q[v]) * (q[v] - p[v]) for v in range(VOCABULARY)),
                        (-q[target], -p[target]),
                        (-(np.exp(q) @ q), -(np.exp(p) @ p)),
                        (int(q.argmax()), int(p.argmax())),
                        target,
                    )
                )
    return found


@pytest.fixture(scope="module")
def dense(models: Models) -> list[Token]:
    return dense_tokens(models)


@pytest.fixture(scope="module")
def found(models: Models, tokenizer: Any) -> Divergence:
    return divergence(models.before64, models.after64, tokenizer)


def divergence(before: Any, after: Any, tokenizer: Any, tokens_per_row: int = 130) -> Divergence:
    return measure_divergence(before, after, pack_rows(documents(), tokens_per_row), tokenizer, source="made up")


def between_documents(dense: list[Token], values: list[float]) -> tuple[float, float]:
    """The mean over tokens, and its standard error by leaving out one document at a time (the jackknife)."""
    by_document = [
        [value for token, value in zip(dense, values, strict=True) if token.document == document]
        for document in range(4)
    ]
    means = [
        np.mean([value for place, group in enumerate(by_document) if place != without for value in group])
        for without in range(4)
    ]
    return float(np.mean(values)), float(np.sqrt(3 / 4 * np.square(means - np.mean(means)).sum()))


# ---- distributions ---------------------------------------------------------------------------------------------------


def test_divergences_losses_and_entropies_are_those_of_a_dense_computation(
    found: Divergence, dense: list[Token]
) -> None:
    assert (found.documents, found.tokens) == (4, len(dense))
    for name, values in {
        "kl": [one.kl for one in dense],
        "reverse_kl": [one.reverse_kl for one in dense],
        "loss_before": [one.losses[0] for one in dense],
        "loss_after": [one.losses[1] for one in dense],
        "entropy_before": [one.entropies[0] for one in dense],
        "entropy_after": [one.entropies[1] for one in dense],
        "loss_change": [one.losses[1] - one.losses[0] for one in dense],
        "entropy_change": [one.entropies[1] - one.entropies[0] for one in dense],
    }.items():
        measured = getattr(found, name)
        assert measured.mean == pytest.approx(np.mean(values), **EXACT), name
    assert found.same_likeliest == np.mean([one.likeliest[0] == one.likeliest[1] for one in dense])
    assert found.kl.mean > 0.01, "the models differ"
    assert abs(found.kl.mean - found.reverse_kl.mean) > 1e-4, "and the directions can be told apart"


def test_standard_errors_are_between_documents(found: Divergence, dense: list[Token]) -> None:
    mean, jackknife = between_documents(dense, [one.losses[1] for one in dense])
    assert found.loss_after.mean == pytest.approx(mean, **EXACT)
    assert found.loss_after.stderr == pytest.approx(jackknife, rel=0.5)  # two estimates from four documents
    tokens_alone = np.std([one.losses[1] for one in dense]) / np.sqrt(len(dense))
    assert found.loss_after.stderr != pytest.approx(tokens_alone, rel=0.01)


def test_ranges_of_positions_cover_every_token_once_with_the_mean_of_theirs(
    found: Divergence, dense: list[Token]
) -> None:
    covered = 0
    for (first, last, kl), following in zip(found.by_position, [*found.by_position[1:], None], strict=True):
        inside = [one.kl for one in dense if first <= one.position <= last]
        assert kl == pytest.approx(np.mean(inside), **EXACT)
        assert following is None or last < following[0]
        covered += len(inside)
    assert covered == len(dense)
    assert len(found.by_position) == 8


def test_growth_is_the_second_half_of_a_document_against_its_first(found: Divergence, dense: list[Token]) -> None:
    growths = []
    for document in range(3):  # the fourth has one token, and no halves
        kl = [one.kl for one in dense if one.document == document]
        growths.append(np.mean(kl[len(kl) - len(kl) // 2 :]) - np.mean(kl[: len(kl) // 2]))
    assert found.halved_documents == 3
    assert found.kl_growth is not None
    assert found.kl_growth.mean == pytest.approx(np.mean(growths), **EXACT)
    assert found.kl_growth.stderr == pytest.approx(np.std(growths, ddof=1) / np.sqrt(3), **EXACT)


def test_the_end_tokens_change_is_that_of_its_log_probability(found: Divergence, dense: list[Token]) -> None:
    changes = [one.losses[0] - one.losses[1] for one in dense if one.target == END]
    assert len(changes) == found.ended_documents == 3
    assert found.end_change is not None
    assert found.end_change.mean == pytest.approx(np.mean(changes), **EXACT)
    assert found.end_change.stderr == pytest.approx(np.std(changes, ddof=1) / np.sqrt(3), **EXACT)


def test_the_largest_shifts_are_named_with_their_context(found: Divergence, dense: list[Token], tokenizer: Any) -> None:
    largest = sorted(dense, key=lambda one: -one.kl)[:10]
    assert [one.kl for one in found.largest] == pytest.approx([one.kl for one in largest], **EXACT)
    for shift, token in zip(found.largest, largest, strict=True):
        document = documents()[token.document]
        assert shift.document == document.name
        assert shift.before == tokenizer.decode(list(document.token_ids[max(0, token.position - 16) : token.position]))
        for text, wanted in zip(
            (shift.token, shift.was_likeliest, shift.is_likeliest), (token.target, *token.likeliest), strict=True
        ):
            whole = tokenizer.decode([tokenizer.convert_tokens_to_ids("a"), wanted])
            assert text in (whole[1:], tokenizer.convert_ids_to_tokens(wanted))


def test_rows_and_tiles_change_nothing(
    models: Models, found: Divergence, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "LOGITS_AT_ONCE", 3 * VOCABULARY)
    other = divergence(models.before64, models.after64, tokenizer, tokens_per_row=1)
    assert other.kl.mean == pytest.approx(found.kl.mean, **EXACT)
    assert other.loss_after.mean == pytest.approx(found.loss_after.mean, **EXACT)
    assert [one.document for one in other.largest] == [one.document for one in found.largest]


@pytest.mark.parametrize(
    ("dtype", "loss", "kl"),
    [(torch.float32, 5e-6, 2e-6), (torch.bfloat16, 0.02, 0.02)],  # observed 8e-8 and 1e-7; 0.003 and 0.0001
)
def test_in_smaller_dtypes_the_numbers_are_the_same_up_to_their_rounding(
    models: Models, found: Divergence, tokenizer: Any, dtype: torch.dtype, loss: float, kl: float
) -> None:
    rounded = divergence(*(copy.deepcopy(one).to(dtype) for one in models[:2]), tokenizer)
    assert rounded.loss_after.mean == pytest.approx(found.loss_after.mean, abs=loss)
    assert rounded.kl.mean == pytest.approx(found.kl.mean, abs=kl)
    assert rounded.kl.mean > 0.1
    assert len(rounded.largest) == 10


def test_a_model_does_not_differ_from_itself(models: Models, tokenizer: Any) -> None:
    same = divergence(models.before, copy.deepcopy(models.before), tokenizer)
    assert (same.kl.mean, same.kl.stderr, same.reverse_kl.mean, same.same_likeliest, same.largest) == (0, 0, 0, 1, ())


def test_adapters_beside_the_weights_count(models: Models, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["in_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(models.before), config).eval()
    beside = divergence(models.before, adapted, tokenizer)
    scored = measure_pairs(models.before, adapted, pairs(), source="made up")
    merged = adapted.merge_and_unload()
    # float32; merging rounds the weights: observed 3e-8
    assert beside.kl.mean == pytest.approx(divergence(models.before, merged, tokenizer).kl.mean, abs=2e-6)
    assert beside.kl.mean > 1e-4
    wanted = measure_pairs(models.before, merged, pairs(), source="made up")
    assert scored.margin_change.mean == pytest.approx(wanted.margin_change.mean, abs=1e-4)  # observed 7e-6


def test_documents_without_a_scored_token_are_refused(models: Models, tokenizer: Any) -> None:
    with pytest.raises(DataError) as error:
        measure_divergence(models.before, models.after, pack_rows(documents()[4:], 100), tokenizer, source="data.jsonl")
    assert str(error.value) == (
        "data.jsonl: none of the 1 documents has a token under the loss behind its first one; give documents with text of "
        "the assistant, or plain text"
    )


# ---- pairs -----------------------------------------------------------------------------------------------------------


def answer_logp(model: HymbaForCausalLM, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    table = log_probs(model, prompt + answer)
    return float(sum(table[len(prompt) + place - 1, token] for place, token in enumerate(answer)))


@pytest.mark.parametrize("tokens_per_row", [4096, 1])
def test_answers_have_the_log_probabilities_of_a_dense_computation(models: Models, tokens_per_row: int) -> None:
    scored = measure_pairs(models.before64, models.after64, pairs(), source="made up", tokens_per_row=tokens_per_row)
    for change, pair in zip(scored.pairs, pairs(), strict=True):
        assert (change.name, change.chosen_tokens, change.rejected_tokens) == (
            pair.name,
            len(pair.chosen_ids),
            len(pair.rejected_ids),
        )
        for side in ("chosen", "rejected"):
            for when, model in (("before", models.before64), ("after", models.after64)):
                wanted = answer_logp(model, pair.prompt_ids, getattr(pair, f"{side}_ids"))
                assert getattr(change, f"{side}_{when}") == pytest.approx(wanted, **EXACT)


def test_changes_are_per_token_and_margins_per_pair(models: Models) -> None:
    given = [
        *pairs(),
        *(Pair("even", tokens(9, seed), tokens(2, seed + 1), tokens(2, seed + 2)) for seed in (50, 60, 70)),
    ]
    scored = measure_pairs(models.before, models.after, given, source="made up")
    chosen = [one.chosen_after - one.chosen_before for one in scored.pairs]
    rejected = [one.rejected_after - one.rejected_before for one in scored.pairs]
    margins = np.subtract(chosen, rejected)
    assert scored.chosen_change.mean == pytest.approx(sum(chosen) / (5 + 6 + 7 + 8 + 3 * 2))
    assert scored.rejected_change.mean == pytest.approx(sum(rejected) / (9 + 7 + 5 + 3 + 3 * 2))
    assert scored.margin_change.mean == pytest.approx(margins.mean())
    assert scored.margin_change.stderr == pytest.approx(margins.std(ddof=1) / np.sqrt(7))
    assert scored.chosen_fell == np.mean(np.array(chosen) < 0)
    for when in ("before", "after"):
        wins = [getattr(one, f"chosen_{when}") > getattr(one, f"rejected_{when}") for one in scored.pairs]
        assert getattr(scored, f"preferred_{when}") == np.mean(wins)
    assert scored.preferred_before != scored.preferred_after


def test_the_end_of_a_prompt_and_the_beginnings_of_answers_are_shown(
    models: Models, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "SHOWN_CHARACTERS", 4)
    pair = pairs()[0]
    (shown,) = measure_pairs(models.before, models.before, [pair], source="made up", tokenizer=tokenizer).examples
    assert shown.prompt == tokenizer.decode(list(pair.prompt_ids))[-4:]
    assert shown.chosen == tokenizer.decode(list(pair.chosen_ids))[:4]
    assert shown.rejected == tokenizer.decode(list(pair.rejected_ids))[:4]


def test_the_log_probabilities_are_those_that_trl_computes_for_the_dpo_stage(
    small_base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    from hymba_align.recipe import Recipe
    from hymba_align.train import dpo as dpo_module
    from hymba_align.train.common import load_start, load_start_tokenizer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(dpo_module, "run_stage", lambda trainer, _: trainer)
    rows = [json.loads(line) for line in (ROOT / "data/arithmetic/train.jsonl").read_text().splitlines()[:6]]
    for row in rows[3:]:
        del row["wrong_answer"]  # made, with the recipe's seed
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 7,
            "base": small_base,
            "data": {"path": str(data), "question_format": "Question: {question}"},
            "dpo": {"max_length": 256, "trainer": {"per_device_train_batch_size": 2}},
        }
    )
    tokenizer = load_start_tokenizer(recipe, None)
    trained: Any = dpo_module.train_dpo(recipe, None, tmp_path / "dpo")
    of_trl = {row["place"]: row for row in trained.train_dataset}

    read = read_texts(recipe.data_for("dpo"), tokenizer, documents=6, max_length=256, seed=recipe.seed)
    model = load_start(recipe, None, tokenizer).eval()
    found = measure_pairs(model, model, read.pairs, source="data.jsonl", tokenizer=tokenizer)
    assert len(found.pairs) == len(of_trl) == 6
    assert found.made_rejected == 3
    assert [one.chosen for one in found.examples] == [tokenizer.decode(pair.chosen_ids) for pair in read.pairs[:2]]
    for pair, change in zip(read.pairs, found.pairs, strict=True):
        row = of_trl[pair.name]
        for side in ("prompt", "chosen", "rejected"):
            assert list(getattr(pair, f"{side}_ids")) == row[f"{side}_ids"]
        # float32, sums of about -170 where neighbouring numbers are 1.5e-5 apart; observed 2.4e-5
        assert change.chosen_before == pytest.approx(row["ref_chosen_logps"], abs=5e-5)
        assert change.rejected_before == pytest.approx(row["ref_rejected_logps"], abs=5e-5)


# ---- what cannot be compared -----------------------------------------------------------------------------------------


def test_no_pair_and_models_of_other_shapes_are_refused(
    models: Models, small_config: HymbaConfig, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=r"^there is no pair to measure$"):
        measure_pairs(models.before, models.after, [], source="made up")
    other = HymbaForCausalLM(small_config)
    told = r"^after and before cannot be compared: vocab_size is 61 in the one and 257 in the other; "
    with pytest.raises(CheckpointError, match=told):
        measure_pairs(models.before, other, pairs(), source="made up")
    with pytest.raises(CheckpointError, match=told):
        divergence(models.before, other, tokenizer)


def test_vocabularies_in_which_a_number_means_another_token_are_refused(tokenizer: Any) -> None:
    other = load_tokenizer(str(ROOT / "data" / "arithmetic" / "tokenizer"))
    check_same_vocabulary(tokenizer, other, "a", "b")
    other.add_tokens(["<new>", "<zone>"])
    with pytest.raises(TokenizerError) as error:
        check_same_vocabulary(tokenizer, other, "runs/sft/final", "runs/dpo/final")
    assert str(error.value) == (
        "runs/dpo/final and runs/sft/final cannot be compared: their tokenizers differ in 2 tokens, such as '<new>' (596 in "
        "the one, missing in the other); compare checkpoints with one vocabulary"
    )
