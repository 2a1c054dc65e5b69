"""The sections `sft` and `dpo` of a recipe, with what both may hold: guards, answers and samples."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hymba_align.recipe_data import StageDataSection
from hymba_align.recipe_loading import Section


class GuardSection(Section):
    """What happens when training goes wrong.

    `on_nonfinite`: a batch whose loss or gradient is NaN or infinite is never applied. "stop" names its rows in
    bad_batch.json, saves the weights from before and ends the run; "skip" leaves out up to `max_skipped` such batches.
    `on_spike`: a loss more than `spike_deviations` robust standard deviations above the median of the last
    `spike_window` logged ones, in `spike_logs` log events in a row, is told ("warn"), stops ("stop") or is let pass
    ("ignore").
    """

    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: int = Field(default=10, ge=0)
    on_spike: Literal["warn", "stop", "ignore"] = "warn"
    spike_window: int = Field(default=20, ge=4)
    spike_deviations: float = Field(default=6.0, gt=0)
    spike_logs: int = Field(default=3, ge=1)


class DPOGuardSection(GuardSection):
    """The same for DPO, where chosen answers must not lose probability either.

    `on_spike` also happens where `rewards/chosen` is below `min_chosen_reward`, or has fallen by more than
    `max_chosen_fall` within the last `spike_window` log events, in `spike_logs` of them in a row. Rewards are beta times
    nats: at beta 0.1 a reward of -5 makes a chosen answer e^50 times less probable than the reference has it.
    """

    min_chosen_reward: float = -5.0
    max_chosen_fall: float = Field(default=3.0, gt=0)


class AnswersSection(Section):
    """Answers to held-out conversations, generated and compared whenever validation runs (`trainer.eval_strategy`).

    Of `data.validation_fraction`, up to `problems` conversations, chosen by their content: the last reply is the
    reference, what precedes it the prompt (DPO: the chosen reply). `match` is what has to be the same: the last `number`,
    the `strict_number` after ####, the `text` but for white space, or the tool `calls` in any order. With `keep_best`,
    `final` holds the weights of the highest share, of equal ones the latest; each new best one is saved as a checkpoint.
    """

    match: Literal["number", "strict_number", "text", "calls"]
    problems: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=256, ge=1)
    keep_best: bool = False


class SamplesSection(Section):
    """What the model writes after held-out prompts, kept in `samples.jsonl` whenever validation runs.

    Of `data.validation_fraction`, up to `prompts` conversations (0: none), chosen by their content; each is continued
    greedily by up to `max_new_tokens`. Where the stage has `answers`, they are the first of its problems, and nothing is
    generated besides. No weight depends on them.
    """

    prompts: int = Field(default=4, ge=0, le=64)
    max_new_tokens: int = Field(default=128, ge=1)


class SFTSection(Section):
    """Supervised fine-tuning. `trainer` holds fields of `trl.SFTConfig`, `guard` what happens when it goes wrong.

    `answers`: held-out conversations are answered while training, and the answers compared. None: only the loss is known.
    `samples`: what the model writes after some of them. None: four, unless the engine divides the weights (ZeRO-3, FSDP) and
    there are no `answers`: then generating takes a copy of all weights in every process.
    """

    data: StageDataSection | None = None
    max_length: int = Field(default=8192, ge=8)
    guard: GuardSection = GuardSection()
    answers: AnswersSection | None = None
    samples: SamplesSection | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)


class DPOSection(Section):
    """Direct preference optimisation. `trainer` holds fields of `trl.DPOConfig`.

    `row_tokens` packs several pairs into a row of up to so many tokens (prompt once, chosen, rejected), so that every
    batch of every process has about as many; a longer pair has a row of its own. `trainer.per_device_train_batch_size`
    then counts rows. None: it counts pairs. `answers` and `samples` as for SFT.
    """

    data: StageDataSection | None = None
    max_length: int = Field(default=2048, ge=8)
    share_prefix: bool = True
    row_tokens: int | None = Field(default=None, ge=8)
    guard: DPOGuardSection = DPOGuardSection()
    answers: AnswersSection | None = None
    samples: SamplesSection | None = None
    trainer: dict[str, Any] = Field(default_factory=dict)
