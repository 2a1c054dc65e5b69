"""All answers of an evaluation: greedy texts and log-likelihoods, shared among processes and kept on disk as they come.

Texts come from `model.decoding`: the beginning that all prompts have in common (the few-shot examples, where they are
the same) is run once, and a batch refills as answers end. Log-likelihoods come from `model.scoring`: a question is run
once for all its choices. Both are those of lm-eval's own path at batch size 1, whatever the batch size, the rows and the
number of processes.

Every process asks for everything, answers a share, and gets all answers; see `sharing.py` and `answer_store.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hymba_align.errors import UsageError
from hymba_align.eval.answer_store import AnswerStore, Record
from hymba_align.eval.sharing import Processes, deal
from hymba_align.files import fingerprint
from hymba_align.model.decoding import Decoded, decode
from hymba_align.model.modeling import HymbaForCausalLM
from hymba_align.model.scoring import scored_rows
from hymba_align.progress import Display, counting, current_place

__all__ = ["Answer", "Answers", "Processes", "StopAt", "end_ids"]

TOKENS_PER_ROW = 8192
"""Text tokens of a forward pass over shots, questions and choices, unless the caller says otherwise."""

Compute = Callable[[list[int], Callable[[int, Record], None]], None]
"""Answers the requests of these numbers, and hands over each answer as soon as it is there"""


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    """Without what ended it, and without special tokens"""
    tokens: int
    """New tokens, with the one that ended it"""
    cut_off: bool
    """Whether it ran into the most new tokens"""


@dataclass
class StopAt:
    """Says whether an answer ends, as lm-eval's own path does at batch size 1: call it with the tokens so far.

    That path looks for a stop string in the text of the last tokens, two more than the string itself has, and shows
    special tokens in it.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: Sequence[str]
    ids: Collection[int]
    """Tokens that end an answer by themselves"""
    windows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.windows = [len(self.tokenizer.encode(one, add_special_tokens=False)) + 2 for one in self.strings]

    def __call__(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.ids or self._has_string(tokens)

    def _has_string(self, tokens: list[int]) -> bool:
        if not self.strings:
            return False
        text = self.tokenizer.decode(tokens[-max(self.windows) :])  # holds what every shorter window holds
        return any(
            string in text and string in self.tokenizer.decode(tokens[-window:])
            for string, window in zip(self.strings, self.windows, strict=True)
        )


class Answers:
    """Answers of one model to one task's requests.

    Args:
        model: a Hymba on its device; a LoRA adapter inside it takes part. (`harness.py` also puts other models in here, whose answers
            it gets elsewhere.)
        tokenizer: of the model.
        processes: those that ask for the same and share the work.
        store: of the files that keep the answers, `<store>.answers-<rank>.jsonl`; None keeps none.
        identity: of all that answers depend on besides prompts and settings: the checkpoint, versions. Stored answers of
            another identity are not used.
        batch_size: answers that are generated side by side.
        max_length: context of the model in text tokens; longer prompts lose their beginning.
        tokens_per_row: most prompt tokens of one forward pass, unless a single prompt has more.
        terminal: where the progress is shown; by default stderr.
    """

    new_tokens: int
    """Generated in this session, by all processes"""
    generation_s: float
    """That generating them took, prompts included: of the slowest process each time"""
    reused: int
    """Answers taken over from earlier sessions"""
    reused_tokens: int
    """Of those answers"""
    truncated_prompts: int
    """Distinct prompts that lost their beginning"""
    longest_prompt: int
    """Tokens of the longest one, before it was cut"""
    on_progress: Callable[[int, int], None] | None = None
    """Called after each answer of this process, with how many are there and of how many"""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        processes: Processes,
        store: Path | None,
        identity: str,
        batch_size: int,
        max_length: int,
        tokens_per_row: int = TOKENS_PER_ROW,
        terminal: Any = None,
    ) -> None:
        self.model: PreTrainedModel = without_lora_wrapper(model)
        self.tokenizer, self.processes, self.identity = tokenizer, processes, identity
        self.batch_size, self.max_length, self.tokens_per_row = batch_size, max_length, tokens_per_row
        self.terminal = terminal
        self.store = AnswerStore(store, processes)
        self.new_tokens = self.reused = self.reused_tokens = self.truncated_prompts = self.longest_prompt = 0
        self.generation_s = 0.0

    # ---- texts --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        until: Sequence[str] = (),
        name: str,
        redact: Callable[[int, str], str] | None = None,
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """The greedy answer to each prompt, in the order given, in every process.

        Args:
            prompts: token ids of each, at least 1.
            max_new_tokens: of an answer; also the room that a prompt leaves in the context.
            until: strings that end an answer and are not part of it; the tokenizer's end token is always one.
            name: of what is answered, for the progress display.
            redact: gives, for the number of a prompt and its answer's text, what may be kept and returned of the text; the
                rest exists nowhere afterwards. What it gives must follow from the prompt and the text.
            on_answer: called with the number of a prompt and its answer as soon as this process has it; equal prompts are
                answered once.

        Raises:
            UsageError: no room for prompts in the context.
            StorageError: answers cannot be kept.
        """
        room = self.room_for(max_new_tokens, name)
        cut = [list(prompt[-room:]) for prompt in prompts]
        self._note_lengths(prompts, room)
        strings = self.stop_strings(until)
        ids = end_ids(self.model.generation_config)
        settings = {"most": max_new_tokens, "until": strings, "end": sorted(ids), "redacted": redact is not None}
        keys = self._keys("text", settings, cut)

        def compute(numbers: list[int], done: Callable[[int, Record], None]) -> None:
            def on_end(place: int, decoded: Decoded) -> None:
                kept = None if redact is None else partial(redact, numbers[place])
                answer = self.as_answer(decoded.tokens, not decoded.ended, strings, kept)
                done(numbers[place], asdict(answer))
                if on_answer is not None:
                    on_answer(numbers[place], answer)

            decode(
                self._hymba(),
                [cut[number] for number in numbers],
                max_new_tokens=max_new_tokens,
                stop=StopAt(self.tokenizer, strings, ids),
                on_end=on_end,
                batch_size=self.batch_size,
                prefill_tokens=self.tokens_per_row,
            )

        units = [[number] for number in range(len(cut))]
        costs = [len(prompt) + max_new_tokens for prompt in cut]
        records, seconds = self._answered(keys, units, costs, compute, name)
        self.generation_s += seconds
        return [Answer(**record) for record in records]

    def room_for(self, max_new_tokens: int, name: str) -> int:
        """Tokens that a prompt may have. Raises: UsageError where that is none."""
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UsageError(
                f"{name}: {max_new_tokens} new tokens are asked for, which leaves no room for a prompt in the context of "
                f"{self.max_length} tokens; lower max_new_tokens"
            )
        return room

    def stop_strings(self, until: Sequence[str]) -> list[str]:
        """With the end token's, as lm-eval adds it."""
        end = cast(str, self.tokenizer.decode(self.tokenizer.eos_token_id, skip_special_tokens=False))
        return handle_stop_sequences(list(until), eos=end)

    def as_answer(
        self, tokens: list[int], cut_off: bool, strings: list[str], redact: Callable[[str], str] | None
    ) -> Answer:
        """The answer that generated tokens make: its text, cut at the first of `strings`, redacted where asked."""
        whole = self.tokenizer.decode(tokens, skip_special_tokens=True)
        text = postprocess_generated_text(cast(str, whole), stop=strings, think_end_token=None)
        return Answer(text if redact is None else redact(text), len(tokens), cut_off)

    # ---- log-likelihoods ----------------------------------------------------------------------------------------

    def score(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], *, name: str
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether it is what greedy decoding gives.

        Args:
            contexts: token ids, at least 1 each; the beginning of too long ones is left out. Give equal ones again for each
                choice of a question.
            continuations: token ids, at least 1 each.
            name: of what is answered, for the progress display.

        Raises:
            UsageError: a continuation that does not fit into the context.
            StorageError: scores cannot be kept.
        """
        before, after = self._fitting(contexts, continuations, name)
        keys = self._keys("score", {}, list(zip(before, after, strict=True)))

        def compute(numbers: list[int], done: Callable[[int, Record], None]) -> None:
            rows = scored_rows(
                self._hymba(),
                [before[number] for number in numbers],
                [after[number] for number in numbers],
                tokens_per_row=self.tokens_per_row,
            )
            for places, scores in rows:
                for place, score in zip(places, scores, strict=True):
                    done(numbers[place], score._asdict())

        units: dict[tuple[int, ...], list[int]] = {}
        for number, context in enumerate(before):
            units.setdefault(tuple(context), []).append(number)
        costs = [len(context) + sum(len(after[one]) for one in numbers) for context, numbers in units.items()]
        records, _ = self._answered(keys, list(units.values()), costs, compute, name)
        return [(record["log_likelihood"], record["is_greedy"]) for record in records]

    def _fitting(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], name: str
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Contexts without what does not fit, and continuations."""
        before, after = [], []
        for context, continuation in zip(contexts, continuations, strict=True):
            if len(continuation) > self.max_length:
                raise UsageError(
                    f"{name}: a continuation has {len(continuation)} tokens, more than the context of {self.max_length}; "
                    "score a shorter one or raise max_length"
                )
            kept = [*context, *continuation][-(self.max_length + 1) :]  # the last token is predicted, not read
            before.append(kept[: -len(continuation)])
            after.append(list(continuation))
        whole = {tuple(context) for context in contexts}
        self.longest_prompt = max(self.longest_prompt, *map(len, whole), 0)
        cut = {tuple(context) for context, kept in zip(contexts, before, strict=True) if len(kept) < len(context)}
        self.truncated_prompts += len(cut)
        return before, after

    # ---- what both need -----------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Removes the stored answers; call it once the result of the task is on the disk."""
        self.store.remove()

    def _answered(
        self, keys: list[str], units: list[list[int]], costs: list[int], compute: Compute, name: str
    ) -> tuple[list[Record], float]:
        """One record per key, from the store or from the process whose share it is; seconds of the slowest process.

        Args:
            keys: of the requests.
            units: numbers of requests that one process takes together.
            costs: of each unit.
            compute: the answers.
            name: of what is answered, for the progress display.
        """
        found = {key: self.store.known[key] for key in keys if key in self.store.known}
        earlier = [record for key, record in found.items() if key in self.store.earlier]
        self.reused += len(earlier)
        self.reused_tokens += sum(record.get("tokens", 0) for record in earlier)
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        missing = {number for key, number in first.items() if key not in found}
        open_units = [
            (kept, cost)
            for unit, cost in zip(units, costs, strict=True)
            if (kept := [number for number in unit if number in missing])
        ]
        shares = deal([cost for _, cost in open_units], self.processes.world_size)
        mine = [number for unit in shares[self.processes.rank] for number in open_units[unit][0]]
        new: dict[str, Record] = {}
        started = time.perf_counter()
        if mine:
            with self._display(name, len(mine), len(first) - len(missing)) as display, self.store.appending():
                ended = counting(display, lambda: sum(record.get("tokens", 0) for record in new.values()))

                def done(number: int, record: Record) -> None:
                    new[keys[number]] = record
                    self.store.add(keys[number], record)
                    ended()
                    if self.on_progress is not None:
                        self.on_progress(display.done, display.total)

                compute(mine, done)
        return self._gathered(keys, found, new, time.perf_counter() - started)

    def _gathered(
        self, keys: list[str], found: dict[str, Record], new: dict[str, Record], seconds: float
    ) -> tuple[list[Record], float]:
        """All records, with what the other processes answered; seconds of the slowest process."""
        asked = fingerprint(keys)
        parts = self.processes.gather({"asked": asked, "new": new, "seconds": seconds})
        slowest = 0.0
        for part in cast(list[dict[str, Any]], parts):
            assert part["asked"] == asked, "the processes ask for different answers"
            found.update(part["new"])
            self.store.take(part["new"])
            slowest = max(slowest, part["seconds"])
            self.new_tokens += sum(record.get("tokens", 0) for record in part["new"].values())
        return [found[key] for key in keys], slowest

    def _keys(self, kind: str, settings: dict[str, Any], requests: Sequence[Any]) -> list[str]:
        """SHA-256 of all that an answer depends on."""
        common = fingerprint([self.identity, str(self.model.dtype), self.model.device.type, kind, settings])
        return [fingerprint([common, request]) for request in requests]

    def _note_lengths(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        distinct = {tuple(prompt) for prompt in prompts}
        self.truncated_prompts += sum(len(prompt) > room for prompt in distinct)
        self.longest_prompt = max(self.longest_prompt, *map(len, distinct), 0)

    def _hymba(self) -> HymbaForCausalLM:
        if not isinstance(self.model, HymbaForCausalLM):
            raise UsageError(f"the model is a {type(self.model).__name__}, not a Hymba; only that answers here")
        return self.model

    def _display(self, name: str, mine: int, kept: int) -> Display:
        """The progress of answers: this process's, and those `kept` from earlier, which count in one process alone."""
        if self.processes.world_size > 1:
            name, kept = f"{name} (1 of {self.processes.world_size} processes)", 0
        words = f"{current_place().what or 'score'} {name}"
        first = self.processes.rank == 0
        batch = min(mine, self.batch_size)
        return Display(words, kept + mine, unit="answers", together=batch, done=kept, stream=self.terminal, shown=first)


def end_ids(stored: GenerationConfig | None) -> frozenset[int]:
    """Tokens at which transformers' `generate` ends a sequence."""
    ids = None if stored is None else stored.eos_token_id
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def without_lora_wrapper(model: torch.nn.Module) -> Any:
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
