"""lm-evaluation-harness on a Hymba: its own tasks, prompts, filters and scores, with the answers of `answers.py`.

Other models, and settings that change what is generated, take lm-eval's own path; that is logged once, with the reason.
It runs in one process and keeps nothing on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import GenerationConfig, PreTrainedModel

from hymba_align.errors import UsageError
from hymba_align.eval.answers import Answer, Answers, StopAt, end_ids
from hymba_align.model.kernels.choice import log_once
from hymba_align.model.modeling import HymbaForCausalLM

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


class HymbaLM(HFLM):
    """lm-eval's wrapper of a loaded model and its tokenizer, for rendered chats.

    `add_bos_token=False`, because the prompt is a rendered chat: left alone, the harness lets the tokenizer prepend the
    <s> that no training row has. For lm-eval this is one process, whatever their number: each builds all requests, gets
    all answers and computes all scores.

    Args:
        answers: of the model; what is shared is run once where it is a Hymba.
        name: of the progress bar.
        redact: gives, for a problem and its answer's text, what may be kept of the text; see `Answers.generate`.
    """

    answers_of: dict[tuple[str | None, int | None], Answer]
    """Generated answers by task and number of the problem in its file"""

    def __init__(
        self, answers: Answers, *, name: str, redact: Callable[[dict[str, Any], str], str] | None = None
    ) -> None:
        super().__init__(
            pretrained=answers.model,
            tokenizer=answers.tokenizer,
            batch_size=answers.batch_size,
            add_bos_token=False,
            max_length=answers.max_length,
        )
        self.answers, self.name, self.redact = answers, name, redact
        self.answers_of = {}
        self._own_path: dict[tuple[int, ...], list[int]] = {}

    # ---- log-likelihoods ----------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if reason := _not_hymba(self.model):
            self._take_own_path("scores, one question per choice", reason)
            own: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return own
        scores = self.answers.score([one[1] for one in requests], [one[2] for one in requests], name=self.name)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    # ---- answers ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, without its stop string."""
        groups: dict[str, list[_Prompt]] = {}
        for number, request in enumerate(requests):
            text, asked = request.args
            tokens = self.tok_batch_encode([text], truncation=self.truncation)[0][0].tolist()
            groups.setdefault(repr(sorted(asked.items())), []).append(_Prompt(number, text, asked, tokens))
        answers: dict[int, Answer] = {}
        for group in groups.values():
            if reason := _not_hymba(self.model) or _not_greedy(self.model.generation_config, group[0].asked):
                self._take_own_path("answers, one padded batch at a time", reason)
                found = self._own_answers(group, [requests[prompt.number] for prompt in group], disable_tqdm)
            else:
                found = self._greedy_answers(group, [requests[prompt.number] for prompt in group])
            for prompt, answer in zip(group, found, strict=True):
                answers[prompt.number] = answer
                self.answers_of[requests[prompt.number].task_name, requests[prompt.number].doc_id] = answer
        return [answers[number].text for number in range(len(requests))]

    def _greedy_answers(self, group: list[_Prompt], requests: list[Instance]) -> list[Answer]:
        """Answers to prompts with the same settings."""
        settings = normalize_gen_kwargs(group[0].asked, self.max_gen_toks)
        answers = self.answers.generate(
            [prompt.tokens for prompt in group],
            max_new_tokens=settings["max_gen_toks"],
            until=settings["until"],
            name=self.name,
            redact=None if self.redact is None else lambda number, text: self._kept(requests[number], text),
        )
        for prompt, answer in zip(group, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (prompt.text, prompt.asked), answer.text)
        return answers

    def _kept(self, request: Instance, text: str) -> str:
        """What may be kept of an answer."""
        return text if self.redact is None else self.redact(request.doc, text)

    # ---- lm-eval's own path -------------------------------------------------------------------------------------

    def _take_own_path(self, what: str, reason: str) -> None:
        """Says so. Raises: UsageError in several processes, which that path does not divide its work among."""
        if self.answers.processes.world_size > 1:
            raise UsageError(
                f"{self.name}: lm-eval's own path {what}, because {reason}; that runs in one process, not in "
                f"{self.answers.processes.world_size}: set num_processes=1"
            )
        log_once(f"{self.name}: lm-eval's own path {what}, because {reason}")

    def _own_answers(self, group: list[_Prompt], requests: list[Instance], disable_tqdm: bool) -> list[Answer]:
        settings = normalize_gen_kwargs(group[0].asked, self.max_gen_toks)
        strings = self.answers.stop_strings(settings["until"])
        room = self.answers.room_for(settings["max_gen_toks"], self.name)
        stop = StopAt(self.tokenizer, strings, end_ids(self.model.generation_config))
        self._own_path.clear()
        texts = super().generate_until(requests, disable_tqdm)
        answers = []
        for prompt, request, text in zip(group, requests, texts, strict=True):
            tokens = self._own_path[self._unpadded(prompt.tokens[-room:])]
            end = next((count for count in range(1, len(tokens) + 1) if stop(tokens[:count])), None)
            answers.append(Answer(self._kept(request, text), len(tokens) if end is None else end, cut_off=end is None))
        return answers

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        """lm-eval's own path, with its tokens kept for `_own_answers`."""
        generated: torch.Tensor = super()._model_generate(context, *arguments, **settings)
        for prompt, tokens in zip(context.tolist(), generated[:, context.shape[1] :].tolist(), strict=True):
            self._own_path[self._unpadded(prompt)] = tokens
        return generated

    def _unpadded(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Without padding tokens at the beginning."""
        pad = self.tokenizer.pad_token_id
        first = next((place for place, token in enumerate(tokens) if token != pad), len(tokens))
        return tuple(tokens[first:])


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
