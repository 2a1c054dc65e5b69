"""What an inspection is asked for, checked as far as that can be known before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hymba_align.errors import (
    CheckpointError,
    DataError,
    DataFileError,
    InspectError,
    RecipeError,
    TokenizerError,
    UsageError,
)
from hymba_align.inside.evidence import WORTH_TELLING
from hymba_align.inside.faults import COMMAND, Called, Longest, in_words_of
from hymba_align.inside.rows import Document
from hymba_align.inspect_choices import DOCUMENTS, MAX_LENGTH, PARTS, Part
from hymba_align.recipe import DataSection, Recipe, is_local_path
from hymba_align.recipe_loading import load_section

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.data.reading.examples import Lost
    from hymba_align.inside.texts import Pair, Texts
    from hymba_align.model import HymbaConfig
    from hymba_align.recipe_eval import EvalSection

DEFAULT_SEED = 42
READS_TEXTS: frozenset[Part] = frozenset(PARTS) - {"cost"}
"""Parts for which texts are read"""


@dataclass(frozen=True)
class InspectSettings:
    """What to look at, with what, and which parts."""

    checkpoint: str
    """Folder or hub repository"""
    against: str | None = None
    """The checkpoint before"""
    data: DataSection | None = None
    """What is read; None: what ships with the package"""
    held_out: bool = False
    """Whether only the rows of `data` count that it keeps for validation"""
    preferences: DataSection | None = None
    """Where pairs of answers are from; None: `data`, where its rows have pairs"""
    domains: Mapping[str, str] = field(default_factory=dict)
    """Files by name, besides those that ship with the package and in the place of one of the same name"""
    scoring: EvalSection | None = None
    """Tasks whose accuracy is measured with each branch removed"""
    parts: Sequence[Part] = PARTS
    documents: int = DOCUMENTS
    max_length: int = MAX_LENGTH
    layers: Sequence[int] | None = None
    """Of which maps are drawn; None: a few"""
    text: Path | None = None
    """A text whose attention the maps show; None: the first document"""
    contexts: Sequence[int] | None = None
    batch_size: int = 1
    dtype: str | None = None
    """float32 or bfloat16; None: bfloat16 on a GPU, else float32"""
    seed: int = DEFAULT_SEED
    chat_template: str = "hymba"
    called: Called = COMMAND
    """How errors write what is asked for"""
    output: Path | None = None
    """Folder that it is written to, where the scores of tasks survive an interruption; None: they do not"""


@dataclass(frozen=True)
class Inputs:
    """What was read for an inspection."""

    config: HymbaConfig
    tokenizer: PreTrainedTokenizerBase | None
    """None where no part needs one and the checkpoint has none"""
    documents: tuple[Document, ...] = ()
    pairs: tuple[Pair, ...] = ()
    pairs_source: str = ""
    domains: Mapping[str, Texts] = field(default_factory=dict)
    no_domains: str = ""
    """Why there is no text of any domain, where there is none"""
    text: Document | None = None
    source: str = ""
    """Where the documents are from"""
    words: str = ""
    """About all that was read, in a line; below it one for each reason why rows are left out"""


def read_inputs(settings: InspectSettings) -> Inputs:
    """Everything that the inspection reads but the weights.

    Raises: UsageError for whatever is at fault with the settings, the checkpoints' configurations or the files.
    """
    from hymba_align.checkpoint import check_embeddings, checkpoint_config

    _check_is_there(settings.checkpoint)  # before the tokenizer, whose absence would hide it
    config = checkpoint_config(settings.checkpoint)
    check_settings(settings, config)
    _check_tasks(settings, config)
    tokenizer = _tokenizer(settings)
    if tokenizer is not None:
        check_embeddings(settings.checkpoint, config.vocab_size, tokenizer)
    told = _check_comparable(settings, config, tokenizer) if settings.against is not None else ""
    if tokenizer is None or not READS_TEXTS.intersection(settings.parts):
        return Inputs(config, tokenizer)
    inputs = read_texts_for(settings, config, tokenizer)
    words, *reasons = inputs.words.split("\n")
    return replace(inputs, words="\n".join([f"{words}{told}", *reasons]))


def check_settings(settings: InspectSettings, config: HymbaConfig) -> None:
    """Raises UsageError for what is asked of a model of this shape that it cannot do, or files that are not there."""
    from hymba_align.inside.cost import check_contexts

    if set(settings.parts) == {"alignment"} and settings.against is None:
        raise InspectError(
            "the part alignment compares with an earlier checkpoint, and none is given; name it with --against OTHER, or "
            "ask for other parts"
        )
    layers = config.num_hidden_layers
    for layer in settings.layers or ():
        if not 0 <= layer < layers:
            raise InspectError(
                f"layer {layer} is none of {settings.checkpoint}, which has layers 0 to {layers - 1}; name one of them"
            )
    if settings.scoring is not None and "importance" not in settings.parts:
        tasks = ", ".join(settings.scoring.tasks)
        raise InspectError(
            f"accuracy on {tasks} is measured in the part importance, which is not asked for; add that part, or leave the "
            "tasks out"
        )
    if settings.contexts is not None and "cost" in settings.parts:
        try:
            check_contexts(config, settings.contexts)
        except UsageError as error:
            raise InspectError(str(error).replace("--contexts", settings.called.named("contexts"))) from error
    for name, path in settings.domains.items():
        if not Path(path).expanduser().exists():
            raise DataFileError(f"the domain {name} is to be read from {path}, which does not exist; correct the path")
    if settings.text is not None and not settings.text.is_file():
        raise DataFileError(f"{settings.text}: there is no such file of text; correct the path")


def _check_is_there(checkpoint: str) -> None:
    """Raises CheckpointError for what is no checkpoint of Hymba, or no checkpoint at all."""
    from hymba_align.checkpoint import check_is_hymba

    try:
        check_is_hymba(checkpoint, None)
    except CheckpointError as error:
        if is_local_path(checkpoint):
            raise
        raise CheckpointError(f"{str(error).rstrip('.')}; if a folder is meant, check the path") from error


def _check_tasks(settings: InspectSettings, config: HymbaConfig) -> None:
    """Raises UsageError or GraderError for tasks that cannot be scored."""
    from hymba_align.eval.inputs import check_tasks

    if settings.scoring is not None:
        check_tasks(settings.scoring, settings.scoring.tasks, context=config.max_position_embeddings)


def _check_comparable(settings: InspectSettings, config: HymbaConfig, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Words about what could not be compared; empty where all could.

    Raises: CheckpointError for another shape, TokenizerError where a token id means something else to both.
    """
    from hymba_align.checkpoint import checkpoint_config, tokenizer_place
    from hymba_align.data.template import load_tokenizer
    from hymba_align.inside.alignment import check_same_vocabulary
    from hymba_align.inside.movement import check_comparable

    assert settings.against is not None, "asked only with a checkpoint to compare with"
    _check_is_there(settings.against)
    check_comparable(checkpoint_config(settings.against), config, settings.against, settings.checkpoint)
    if tokenizer is None:
        return ""
    place, revision = tokenizer_place(settings.against)
    try:
        before = load_tokenizer(place, revision=revision, chat_template="own")
    except TokenizerError as error:
        return (
            f"; {settings.against} is taken to have the tokenizer of {settings.checkpoint}, for want of one ({error})"
        )
    check_same_vocabulary(before, tokenizer, settings.against, settings.checkpoint)
    return ""


def read_texts_for(settings: InspectSettings, config: HymbaConfig, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    """Documents, pairs, domains and the text of the maps, for a model of this shape. Raises: UsageError."""
    domains, left_out = _domains(settings, config, tokenizer)
    no_domains = (
        f"no text of any domain can be used ({next(iter(left_out.values()))})" if not domains and left_out else ""
    )
    if no_domains and set(settings.parts) == {"meta_tokens"}:
        raise DataError(f"{no_domains}; name a domain of shorter texts, or ask for other parts as well")
    longest = _longest(settings, config)
    read = _read(settings, longest, tokenizer)
    text, cut = _text(settings.text, tokenizer, longest.tokens) if settings.text is not None else (None, None)
    documents = read[0].documents if read else _of_all(domains, settings.documents)
    compares = settings.against is not None and "alignment" in settings.parts
    told = read if compares else [replace(texts, pairs=(), pairs_left_out=()) for texts in read]
    words = [f"{texts.summary()}{_about_unknown(texts.documents, tokenizer)}" for texts in told]
    if not read:
        words = [f"{len(documents):,} texts of {len(domains)} domains ({', '.join(domains)})"]
        words[0] += _about_unknown(documents, tokenizer)
    words += [f"the domain {name} is left out ({reason})" for name, reason in left_out.items()]
    words += [part for name, path in settings.domains.items() for part in _about_own(name, path, domains.get(name))]
    words += [f"of {cut.place} {cut.reason}"] if cut is not None else []
    pairs = read[-1] if read and read[-1].pairs else None
    return Inputs(
        config,
        tokenizer,
        documents,
        pairs.pairs if pairs is not None else (),
        pairs.source if pairs is not None else "",
        domains,
        no_domains,
        text,
        read[0].source if read else "texts of " + ", ".join(domains),
        "\n".join(["; ".join(words), *(reason for texts in told for reason in texts.why_left_out())]),
    )


def _read(settings: InspectSettings, longest: Longest, tokenizer: PreTrainedTokenizerBase) -> list[Texts]:
    """What the data and the preferences hold, as far as they are named. Raises: DataError, in the words of who named them."""
    from hymba_align.inside.texts import read_texts

    called, read = settings.called, []
    for section, held_out, keys in (
        (settings.data, settings.held_out, called.data),
        (settings.preferences, False, called.preferences),
    ):
        if section is None:
            continue
        with in_words_of(keys, longest, of_training=called.in_recipe):
            texts = read_texts(
                section,
                tokenizer,
                documents=settings.documents,
                max_length=longest.tokens,
                seed=settings.seed,
                held_out=held_out,
            )
        read.append(texts)
    if settings.preferences is not None and not read[-1].pairs:
        with in_words_of(called.preferences, longest, of_training=called.in_recipe):
            raise DataError(_no_pair(read[-1]))
    return read


def _longest(settings: InspectSettings, config: HymbaConfig) -> Longest:
    """How long a document may be: as long as was asked for, and no longer than the model's context."""
    if config.max_position_embeddings <= settings.max_length:
        return Longest(config.max_position_embeddings)
    return Longest(settings.max_length, settings.called.named("max_length"))


def _no_pair(texts: Texts) -> str:
    """Why no pair came of the preferences, and what to do."""
    what = "name a file of preferences, or leave it out"
    if not texts.pairs_left_out:
        return f"{texts.source}: no row of it has a better and a worse answer; {what}"
    first = texts.pairs_left_out[0]
    return f"{first.place}: {first.reason} (no pair came of {texts.source}; {what})"


def _about_own(name: str, path: str, texts: Texts | None) -> Iterator[str]:
    """Words about a domain of the user's own: whose place it takes, and which of its rows are left out."""
    from hymba_align.data.counts import losses_by_reason
    from hymba_align.inside.meta_tokens import SHIPPED_DOMAINS

    if texts is None:
        return
    if name in SHIPPED_DOMAINS:
        yield f"the domain {name} is {path}, in the place of the texts of that name that ship with hymba-align"
    for reason, lost in losses_by_reason(texts.left_out):
        rows = "row is" if len(lost) == 1 else "rows are"
        yield f"of the domain {name} {len(lost):,} {rows} left out ({reason}, first {lost[0].place})"


def _domains(
    settings: InspectSettings, config: HymbaConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Texts], dict[str, str]]:
    """Texts of every domain, those that ship with the package first; and of which shipped ones nothing can be read, and why.

    Nothing where no part looks at them. Their length is not cut to `max_length`: they are compared with each other.

    Raises: DataError for a domain of the user's own, and where there is nothing else to read.
    """
    from hymba_align.inside.meta_tokens import FOLDER, SHIPPED_DOMAINS, domain_documents

    has_others = settings.data is not None or settings.preferences is not None
    if "meta_tokens" not in settings.parts and has_others:
        return {}, {}
    found: dict[str, Texts] = {}
    left_out: dict[str, str] = {}
    named: dict[str, str | Path] = {**SHIPPED_DOMAINS, **settings.domains}
    length = config.max_position_embeddings
    for name, path in named.items():
        try:
            with in_words_of(None, Longest(length)):
                found[name] = domain_documents(path, tokenizer, length, documents=settings.documents)
        except DataError as error:
            if name in settings.domains or not has_others:
                raise
            left_out[name] = str(error).replace(f"{FOLDER}/", "")  # where it is installed says nothing
    return found, left_out


def _text(path: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Document, Lost | None]:
    """The text of a file, and what of it was cut away. Raises: DataFileError."""
    from hymba_align.inside.texts import document_of_text, text_of_file

    return document_of_text(text_of_file(path), path.name, tokenizer, max_length=length)


def trained_on(checkpoint: str, path: str) -> str:
    """Words about a file whose rows the run trained on whose `final` a checkpoint is; empty where it did not, as far as known.

    Nothing of a file that the recipe names by a folder or a glob, and nothing where the recipe cannot be read.
    """
    final = Path(checkpoint).expanduser()
    written = final.parent.parent / "recipe.yaml"
    if final.name != "final" or not written.is_file():
        return ""
    try:
        recipe = load_section(Recipe, written)
    except RecipeError:
        return ""
    stages = recipe.training_stages
    until = stages.index(final.parent.name) + 1 if final.parent.name in stages else 0
    read = Path(path).expanduser().resolve()
    for stage in stages[:until]:
        data = recipe.data_for(stage)
        if any(Path(source.path).expanduser().resolve() == read for source in data.all_sources):
            kept = f" (all but {100 * data.validation_fraction:g} % of them)" if data.validation_fraction else ""
            return (
                f"The rows of {path} are those that {stage} of {written} trained on{kept}: what is found is about texts that "
                "the model has seen; name rows that were held out to learn about others"
            )
    return ""


def _of_all(domains: Mapping[str, Texts], documents: int) -> tuple[Document, ...]:
    """At most so many documents of all domains together, as many of each and at least one, from its beginning to its end."""
    chosen: list[Document] = []
    for texts in domains.values():
        there = len(texts.documents)
        share = min(there, max(1, documents // len(domains)))
        chosen += [texts.documents[place * there // share] for place in range(share)]
    return tuple(chosen)


def _about_unknown(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> str:
    """Words about characters for which the tokenizer has no piece; empty where there are next to none.

    They are no reason to refuse a text: what is measured is true of the tokens that the model reads.
    """
    from hymba_align.inside.meta_tokens import spelling

    share = spelling(documents, tokenizer).unknown
    if share < WORTH_TELLING:
        return ""
    return f"; {100 * share:.1f} % of their tokens are unknown to the tokenizer, or single bytes of characters without a piece"


def _tokenizer(settings: InspectSettings) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None where it has none and no part needs one. Raises: TokenizerError."""
    from hymba_align.checkpoint import tokenizer_place
    from hymba_align.data.template import load_tokenizer

    place, revision = tokenizer_place(settings.checkpoint)
    try:
        return load_tokenizer(place, revision=revision, chat_template=settings.chat_template)
    except TokenizerError as error:
        if not READS_TEXTS.intersection(settings.parts):
            return None
        if str(error).startswith("chat_template "):
            raise
        raise TokenizerError(
            f"{settings.checkpoint} has no tokenizer that can be used ({error}); put it there, or measure what needs none: "
            "--parts cost"
        ) from error
