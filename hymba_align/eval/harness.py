"""lm-evaluation-harness on a Hymba: its own prompts, scoring and answers, with everything that they share run once.

Answers come from `model.decoding`: the beginning that all prompts have in common (the few-shot examples, where they are
the same) is run once, and a batch refills as answers end. Log-likelihoods come from `model.scoring`: a question is run
once for all its choices. Both give what lm-eval's own path gives at batch size 1. A LoRA adapter lies inside the layers
and takes part as it is. Other models, and settings that change what is generated, take lm-eval's own path; that is logged
once, with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hymba_align.model.decoding import decode
from hymba_align.model.kernels.choice import log_once
from hymba_align.model.modeling import HymbaForCausalLM
from hymba_align.model.scoring import scored_rows

TOKENS_PER_ROW = 8192
"""Text tokens of a forward pass over shots, questions and choices, unless the caller says otherwise."""

NO_EFFECT_ON_GREEDY = {"do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "use_cache"}
"""Settings that the likeliest token does not depend on"""
STORED_ONLY = {
    "max_length",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "_from_model_config",
}
"""Settings stored with a model that lm-eval overrides, or that are read elsewhere"""
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}
"""Values that change nothing, besides None and False"""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's own: texts (its key for caching), tokens of the context, tokens of the continuation"""


@dataclass(frozen=True)
class _Prompt:
    """A request to generate: where it stands in the caller's order, and how it is answered."""

    number: int
    text: str
    asked: dict[str, Any]
    """The request's generation settings as they came"""
    tokens: list[int]
    """Whole, or its end where it is too long"""


@dataclass
class StopAt:
    """Says when an answer ends, as lm-eval's own path does at batch size 1: call it with the tokens so far.

    That path looks for a stop string in the text of the last tokens, two more than the string itself has, and shows
    special tokens in it.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: Sequence[str]
    ids: Collection[int]
    """Tokens that end an answer by themselves"""
    most: int
    """Tokens after which an answer ends anyway"""
    on_end: Callable[[], object]
    """Called once for every answer that ends"""
    windows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.windows = [len(self.tokenizer.encode(one, add_special_tokens=False)) + 2 for one in self.strings]

    def __call__(self, tokens: list[int]) -> bool:
        stopped = tokens[-1] in self.ids or self._has_string(tokens)
        if stopped or len(tokens) >= self.most:
            self.on_end()
        return stopped

    def _has_string(self, tokens: list[int]) -> bool:
        if not self.strings:
            return False
        text = self.tokenizer.decode(tokens[-max(self.windows) :])  # holds what every shorter window holds
        return any(
            string in text and string in self.tokenizer.decode(tokens[-window:])
            for string, window in zip(self.strings, self.windows, strict=True)
        )


class HymbaLM(HFLM):
    """lm-eval's wrapper of a loaded model and its tokenizer, for rendered chats.

    `add_bos_token=False`, because the prompt is a rendered chat: left alone, the harness lets the tokenizer prepend the
    <s> that no training row has.

    Args:
        model: on its device, any causal language model; what is shared is run once where it is a Hymba.
        tokenizer: of the model.
        batch_size: answers that are generated side by side.
        max_length: context of the model in text tokens; longer inputs lose their beginning.
        name: of the progress bar.
        unit: what the bar counts.
        terminal: where the bar is shown; by default stderr.
        tokens_per_row: most text tokens of one forward pass over prompts, unless a single one has more.
    """

    ended: int
    """Answers with the end-of-turn token, since the wrapper was made"""
    truncated_prompts: int
    """Prompts of the last `generate_until` that lost their beginning"""
    max_prompt_tokens: int
    """Tokens of the longest of them, before it was cut"""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        max_length: int,
        name: str = "answers",
        unit: str = "problem",
        terminal: Any = None,
        tokens_per_row: int = TOKENS_PER_ROW,
    ) -> None:
        super().__init__(
            pretrained=_without_lora_wrapper(model),
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=False,
            max_length=max_length,
        )
        self.name, self.unit, self.terminal, self.tokens_per_row = name, unit, terminal, tokens_per_row
        self.ended = self.truncated_prompts = self.max_prompt_tokens = 0

    # ---- log-likelihoods ----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if reason := _not_hymba(self.model):
            log_once(f"{self.name}: lm-eval's own path scores, one question per choice, because {reason}")
            whole: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return whole
        contexts, continuations = [], []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, more than the context of {self.max_length}; "
                    "score a shorter one or raise max_length"
                )
            kept = [*context, *continuation][-(self.max_length + 1) :]  # the last token is predicted, not read
            contexts.append(kept[: -len(continuation)])
            continuations.append(continuation)
        answers: dict[int, tuple[float, bool]] = {}
        with self._bar(len(requests), disable_tqdm) as bar:
            rows = scored_rows(self.model, contexts, continuations, tokens_per_row=self.tokens_per_row)
            for numbers, scores in rows:
                for number, score in zip(numbers, scores, strict=True):
                    answers[number] = (score.log_likelihood, score.is_greedy)
                    if (texts := requests[number][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[number])
                bar.update(len(numbers))
        return [answers[number] for number in range(len(requests))]

    # ---- answers ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, without its stop string."""
        groups: dict[str, list[_Prompt]] = {}
        self.truncated_prompts = self.max_prompt_tokens = 0
        for number, request in enumerate(requests):
            prompt = self._prompt(number, *request.args)
            groups.setdefault(repr(sorted(prompt.asked.items())), []).append(prompt)
        answers: dict[int, str] = {}
        with self._bar(len(requests), disable_tqdm) as self.bar:
            for group in groups.values():
                if reason := _not_hymba(self.model) or _not_greedy(self.model.generation_config, group[0].asked):
                    log_once(f"{self.name}: lm-eval's own path answers, one padded batch at a time, because {reason}")
                    own = super().generate_until([requests[prompt.number] for prompt in group], disable_tqdm=True)
                    answers.update(zip((prompt.number for prompt in group), own, strict=True))
                else:
                    answers.update(self._decode(group))
        return [answers[number] for number in range(len(requests))]

    def _prompt(self, number: int, text: str, asked: dict[str, Any]) -> _Prompt:
        """The prompt as lm-eval encodes it, cut from the left to leave room for the answer."""
        tokens = self.tok_batch_encode([text], truncation=self.truncation)[0][0].tolist()
        most = int(normalize_gen_kwargs(asked, self.max_gen_toks)["max_gen_toks"])
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"{most} new tokens are asked for, which leaves no room for a prompt in the context of {self.max_length} tokens; "
                "lower max_gen_toks"
            )
        self.truncated_prompts += len(tokens) > room
        self.max_prompt_tokens = max(self.max_prompt_tokens, len(tokens))
        return _Prompt(number, text, asked, tokens[-room:])

    def _decode(self, group: list[_Prompt]) -> dict[int, str]:
        """Answers to prompts with the same settings, by number."""
        settings = normalize_gen_kwargs(group[0].asked, self.max_gen_toks)
        end_of_turn = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings["until"], eos=end_of_turn)
        stop = StopAt(
            self.tokenizer, until, _end_ids(self.model.generation_config), settings["max_gen_toks"], self.bar.update
        )
        decoded = decode(
            self.model,
            [prompt.tokens for prompt in group],
            max_new_tokens=settings["max_gen_toks"],
            stop=stop,
            batch_size=self.batch_size,
            prefill_tokens=self.tokens_per_row,
        )
        answers = {}
        for prompt, answer in zip(group, decoded, strict=True):
            self.ended += self.eot_token_id in answer.tokens
            text = postprocess_generated_text(self.tok_decode(answer.tokens), stop=until, think_end_token=None)
            self.cache_hook.add_partial("generate_until", (prompt.text, prompt.asked), text)
            answers[prompt.number] = text
        return answers

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        """lm-eval's own path, with its answers counted."""
        generated: torch.Tensor = super()._model_generate(context, *arguments, **settings)
        answers = generated[:, context.shape[1] :]
        self.ended += int((answers == self.eot_token_id).any(dim=1).sum())
        self.bar.update(context.shape[0])
        return generated

    def _bar(self, total: int, disable: bool) -> Any:
        return tqdm(total=total, desc=self.name, unit=self.unit, file=self.terminal, disable=disable or self.rank != 0)


def _without_lora_wrapper(model: torch.nn.Module) -> Any:
    """The model in a LoRA wrapper, whose adapters lie inside the layers; any other model as it is.

    Wrappers that act around the model (virtual tokens, adapters that begin at some token) stay.
    """
    if "peft" not in sys.modules:  # then nobody has wrapped anything, and peft takes a second to import
        return model
    from peft import PeftModel, PeftType

    if not isinstance(model, PeftModel):
        return model
    adapter = model.active_peft_config
    if adapter.peft_type != PeftType.LORA or getattr(adapter, "alora_invocation_tokens", None):
        return model
    return model.get_base_model()


def _not_hymba(model: PreTrainedModel) -> str | None:
    """Why nothing can be shared with this model, if so."""
    if isinstance(model, HymbaForCausalLM):
        return None
    return f"the model is a {type(model).__name__}, not a Hymba"


def _not_greedy(stored: GenerationConfig, asked: dict[str, Any]) -> str | None:
    """The setting, of the request or stored with the model, that asks for more than the likeliest token, if any."""
    settings = dict(normalize_gen_kwargs(asked))
    if settings.get("do_sample"):
        return "it samples (do_sample=True)"
    named = {name: value for name, value in settings.items() if name not in ("until", "max_gen_toks")}
    kept = {name: value for name, value in stored.to_diff_dict().items() if name not in STORED_ONLY}
    for source, values in (("the request", named), ("the model's generation_config", kept)):
        for name, value in values.items():
            neutral = value is None or value is False or value == NEUTRAL.get(name)
            if not neutral and name not in NO_EFFECT_ON_GREEDY:
                return f"{source} sets {name}={value!r}"
    return None


def _end_ids(stored: GenerationConfig) -> frozenset[int]:
    """Tokens at which transformers' `generate` ends a sequence."""
    ids = stored.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
