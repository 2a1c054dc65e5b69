"""The model card: what is known about an exported model, from its run's own files; what is not known is called unknown.

No problem, answer or prompt of a benchmark is in it, so nothing of GPQA either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hymba_align.adapter_folder import Adapter
from hymba_align.eval.report import cost, training
from hymba_align.eval.report.asked import asked
from hymba_align.eval.report.contents import STAGE_NAMES, Scored
from hymba_align.eval.report.inert import block, code, words
from hymba_align.eval.report.meaning import meaning
from hymba_align.eval.report.words import cut_offs, first_upper, of_problems, percent, spaced
from hymba_align.export.licence import licence_words, license_fields
from hymba_align.export.source import Lineage, Source, short_path, without_places
from hymba_align.files import write_text
from hymba_align.model.configuration import REMOTE_CODE
from hymba_align.recipe import is_local_path
from hymba_align.secrets import redact, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from hymba_align.model import HymbaConfig

TEMPLATE = Path(__file__).with_name("card.md.jinja")
CARD = "README.md"
TASK_NAMES = {"gsm8k": "GSM8K", "gpqa": "GPQA", "bfcl": "BFCL"}
SNIPPET = """\
import hymba_align.model  # registers "hymba" with transformers; import it before loading model or tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
chat = [{{"role": "user", "content": "Tom buys 2 boxes with 6 keys in each. How many keys does Tom buy?"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)"""


@dataclass(frozen=True)
class Card:
    """What the card is made of."""

    title: str
    place: str
    """What its users load: a repository of the hub, or a folder"""
    source: Source
    lineage: Lineage
    license: str | None
    adapters: tuple[Adapter, ...]
    config: HymbaConfig
    dtype: str
    parameters: int
    remote_code: bool

    @property
    def scored(self) -> list[Scored]:
        """Results of the exported stage."""
        run = self.source.run
        return [one for one in run.scored if one.stage == self.source.stage] if run is not None else []

    @property
    def license_name(self) -> str:
        """The licence as the hub's metadata have it."""
        fields = license_fields(self)
        return fields.get("license_name", fields["license"])


def write_card(folder: Path, card: Card) -> list[str]:
    """Writes README.md; returns what of it is for people to complete, in sentences."""
    from huggingface_hub import ModelCard

    text = ModelCard.from_template(
        card_data=card_data(card),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=words(card.title),
        opening=_opening(card),
        use_notes=["With hymba-align installed from its repository, in any program that uses transformers:"],
        snippet=SNIPPET.format(name=json.dumps(card.place)),
        remote_code=card.remote_code,
        released_repository=REMOTE_CODE,
        origin=_origin(card),
        recipe=_recipe(card),
        data=_data(card),
        scores=_scores(card),
        costs=_costs(card),
        limitations=_limitations(card),
        licence=licence_words(card),
    )
    write_text(folder / CARD, redact(str(text.content)).rstrip() + "\n")
    if card.source.run is not None:
        return []
    return [
        f"{CARD} cannot tell recipe, data, scores and costs: the checkpoint lies in no run folder; write what you know"
    ]


def card_data(card: Card) -> ModelCardData:
    """The hub's metadata at the top of the card."""
    from huggingface_hub import ModelCardData

    results = list(_eval_results(card))
    datasets = [name for name, _ in _sources(card) if not is_local_path(name) and "://" not in name]
    stages = [stage for stage in ("sft", "dpo") if card.source.run is not None and card.source.run.section(stage)]
    fields: dict[str, Any] = dict(license_fields(card))
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hymba", "hymba-align", *stages, *(["custom_code"] if card.remote_code else [])],
        base_model=card.lineage.repository,
        base_model_relation="finetune" if card.lineage.repository is not None else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        model_name=card.title if results else None,
        eval_results=results or None,
        **fields,
    )


def _eval_results(card: Card) -> Iterator[EvalResult]:
    """Every score on the whole of a test set; partial ones are in the text alone."""
    from huggingface_hub import EvalResult

    for one in card.scored:
        if one.result.partial:
            continue
        for name, score in one.result.scores.items():
            yield EvalResult(
                task_type="text-generation",
                dataset_type=one.task,
                dataset_name=_set_name(one),
                metric_type=name,
                metric_name=f"{spaced(name)}, %",
                metric_value=round(100 * score.value, 2),
            )


def _set_name(one: Scored) -> str:
    """A task's name, with the file of its problems where that is one's own."""
    name = TASK_NAMES.get(one.task.partition("_")[0], one.task)
    own = one.result.settings.get("test_path")
    return f"{name}, problems of {short_path(str(own))}" if own else name


# ---- sections --------------------------------------------------------------------------------------------------------


def _opening(card: Card) -> str:
    model = (
        f"A Hymba language model of {card.parameters:,} parameters in {card.dtype}: {card.config.num_hidden_layers} layers of attention "
        f"and Mamba heads in parallel behind {card.config.num_memory_tokens} meta tokens, a context of "
        f"{card.config.max_position_embeddings:,} tokens ([paper](https://arxiv.org/abs/2411.13676))."
    )
    run, stage = card.source.run, card.source.stage
    if run is None or stage is None:
        return f"{model} How it was trained is not recorded here."
    trained = [name.upper() for name in ("sft", "dpo") if run.section(name)]
    how = f"trained by hymba-align: {' and then '.join(trained)}" if trained else "not trained"
    return f"{model} {first_upper(how)}."


def _origin(card: Card) -> str:
    lines = [f"Trained from: {card.lineage.words}."]
    for adapter in card.adapters:
        lines.append(
            f"- Merged into the weights: {adapter.kind} of rank {adapter.rank}, alpha {adapter.alpha:g}, in {len(adapter.parts)} layers."
        )
    return "\n".join([lines[0], "", *lines[1:]] if card.adapters else lines)


def _recipe(card: Card) -> str:
    run = card.source.run
    if run is None or not run.recipe:
        return "Unknown."
    text = yaml.safe_dump(without_places(without_secrets(run.recipe)), sort_keys=False, allow_unicode=True)
    versions = run.environment.get("versions", {})
    told = ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown"
    shown = block(text.rstrip()).replace("```text", "```yaml", 1)
    note = "As it was resolved; secrets are masked, and absolute paths are cut to their last part."
    return f"{note}\n\n{shown}\n\nVersions: {words(told)}."


def _sources(card: Card) -> list[tuple[str, dict[str, Any]]]:
    """(name, record) of every source that a stage read."""
    run = card.source.run
    records = run.data.values() if run is not None else ()
    return [(str(source["name"]), source) for record in records for source in record.get("sources", ())]


def _data(card: Card) -> str:
    run = card.source.run
    rows = [cells for stage, record in run.data.items() for cells in training.source_rows(stage, record)] if run else []
    if not rows:
        return "Unknown."
    head = ["stage", "source", "rows", "kept", "conversations or pairs", "tokens", "trained on", "left out", "licence"]
    names = [name for name, _ in _sources(card)]
    lines = [
        _row([cells[0], code(short_path(cells[1])), *map(words, cells[2:]), words(licence_of(name))])
        for cells, name in zip(rows, names, strict=True)
    ]
    return "\n".join([_row(head), _row(["---", "---", *["---:"] * 5, "---", "---"]), *lines])


def licence_of(source: str) -> str:
    """The licence that the card beside a local data file names; of a data set of the hub, where to read it."""
    if not is_local_path(source):
        return "see its page on the hub" if "://" not in source else "unknown"
    path = Path(source).expanduser()
    card = (path if path.is_dir() else path.parent) / "README.md"
    try:
        text = card.read_text(encoding="utf-8")
        values = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return "unknown"
    found = values.get("license") if isinstance(values, dict) else None
    return str(found) if isinstance(found, str) else "unknown"


def _scores(card: Card) -> str:
    run = card.source.run
    if run is None or not card.scored:
        return "None were made."
    parts = ["In percent, ± one standard error."]
    for one in card.scored:
        earlier = [other for other in run.of_task(one.task) if other.stage != one.stage]
        parts += [f"### {words(_set_name(one))}", _table([*earlier, one]), *_how(one)]
    return "\n\n".join(parts)


def _table(results: Sequence[Scored]) -> str:
    names = list(dict.fromkeys(name for one in results for name in one.result.scores))
    lines = [_row(["score", *(f"{STAGE_NAMES[one.stage]} ({_over(one)})" for one in results)])]
    lines.append(_row(["---", *["---:"] * len(results)]))
    for name in names:
        found = [one.result.scores.get(name) for one in results]
        lines.append(_row([words(spaced(name)), *(percent(score) if score is not None else "–" for score in found)]))
    return "\n".join(lines)


def _over(one: Scored) -> str:
    return of_problems(one.result, one.result.headline)


def _how(one: Scored) -> Iterator[str]:
    """What the scores mean and how they were made, in lines; warnings of the scoring too."""
    result = one.result
    facts = [
        (name, ", ".join(map(short_path, lines))) for name, lines in asked([result]).common if name != "checkpoint"
    ]
    lines = [f"- {words(meaning([result]))}"] if meaning([result]) else []
    lines.append("- Asked with " + "; ".join(f"{words(name)} {code(value)}" for name, value in facts) + ".")
    lines += [f"- Cut off were {words(cut_offs(result))}."] if result.generation else []
    lines += [f"- Not run: {words(part)}, {words(why)}." for part, why in result.not_run.items()]
    lines += [f"- Warning: {words(text)}." for text in result.warnings]
    yield "\n".join(lines)


def _costs(card: Card) -> str:
    run = card.source.run
    rows = cost.rows(run) if run is not None else []
    if run is None or not rows:
        return "Unknown."
    gpus = run.environment.get("gpus") or []
    machine = (
        ", ".join(str(gpu) for gpu in gpus)
        or f"no GPU; {run.environment.get('cpu_count', 'an unknown number of')} CPU cores"
    )
    lines = [
        _row(cost.HEAD),
        _row(["---", *["---:"] * (len(cost.HEAD) - 1)]),
        *(_row([*map(words, row)]) for row in rows),
    ]
    return "\n\n".join(["\n".join(lines), cost.NOTE, f"Machine: {words(machine)}."])


def _limitations(card: Card) -> str:
    lines = [
        "- Nothing but the scores above was measured: not safety, bias, truthfulness, or languages.",
        f"- Prompt and answer together are at most {card.config.max_position_embeddings:,} tokens.",
        "- What the base model was trained on, and what it does wrong, carries over."
        if not card.lineage.random
        else "- The model has seen nothing but the data above.",
    ]
    if card.remote_code:
        lines.append(
            "- The names of all weights and keys are those of the released code, and tests compare them. Whether that code answers "
            "alike with these weights was not tried at export."
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
