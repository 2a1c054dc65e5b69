"""Answers to held-out problems while training: what is counted is what the weights generate, and nothing else changes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hymba_align.checkpoint import load_model
from hymba_align.cli import main
from hymba_align.data.prepare import examine, prepare_sft
from hymba_align.data.template import load_tokenizer
from hymba_align.errors import DataError, RecipeError
from hymba_align.eval.matching import matcher
from hymba_align.model.decoding import Decoded
from hymba_align.plan import plan
from hymba_align.recipe import AnswersSection, DataSection, Recipe
from hymba_align.run.manifest import read_manifest
from hymba_align.run.metrics import read_metrics
from hymba_align.train import answers as answers_module
from hymba_align.train import sft as sft_module
from hymba_align.train.answers import judge
from hymba_align.train.dpo import train_dpo
from hymba_align.train.problems import Problem, choose_problems, text_of
from hymba_align.train.saving import checkpoints, last_good_checkpoint
from hymba_align.train.settings import trainer_settings
from hymba_align.train.sft import train_sft
from hymba_align.train.whole_model import whole_model
from tests.forked import TwoProcesses

if TYPE_CHECKING:
    from hymba_align.model import HymbaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
NUMBERS = {"pens": 3, "books": 7, "cards": 5, "apples": 8}
HELD_OUT, EPOCH, STEPS = 35, 13, 39


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions `618 books`, whose answer follows from the word: learned in three epochs, and not known before."""
    draw = random.Random(0)
    named = [(draw.randrange(1000), draw.choice(list(NUMBERS))) for _ in range(160)]
    rows = [{"question": f"{number} {word}", "answer": f"#### {NUMBERS[word]}"} for number, word in named]
    path = tmp_path_factory.mktemp("words") / "words.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def recipe_of(words: Path) -> Callable[..., Recipe]:
    """The recipe that learns them; keyword arguments are trainer settings, `answers` the section's keys."""

    def make(answers: dict[str, Any] | None, **trainer: Any) -> Recipe:
        shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        shape |= {"num_key_value_heads": 1, "v_head_dim": 64, "mamba_d_state": 4, "mamba_dt_rank": 2}
        shape |= {"num_memory_tokens": 4, "sliding_window": 16, "global_attn_idx": [0], "kv_reuse_group": []}
        settings = {"per_device_train_batch_size": 2, "learning_rate": 5e-3, "lr_scheduler_type": "constant"}
        settings |= {"warmup_steps": 0, "num_train_epochs": 3, "save_steps": 10, **trainer}
        return Recipe.model_validate(
            {
                "name": "words",
                "seed": 1,
                "base": {"tokenizer": str(ROOT / "data/arithmetic/tokenizer"), "config": shape},
                "data": {"path": str(words), "validation_fraction": 0.2, "workers": 1},
                "sft": {"max_length": 128, "answers": answers, "trainer": settings},
            }
        )

    return make


ALL = {"match": "strict_number", "problems": 99, "max_new_tokens": 8}


class LikesMistakes:
    """Takes an answer with another number than the reference for right, so that learning makes the score fall."""

    def can_judge(self, reference: str) -> bool:
        return True

    def is_right(self, answer: str, reference: str) -> bool:
        return answer.startswith("#### ") and answer.strip() != reference.strip()


class Killed(Exception):
    """Ends a run without a word."""


class KillAt(TrainerCallback):
    """Ends a run after a step, or right after that step's checkpoint."""

    def __init__(self, step: int, event: str) -> None:
        self.step, self.event = step, event

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "step" and state.global_step == self.step:
            raise Killed

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "save" and state.global_step == self.step:
            raise Killed


def train(recipe: Recipe, folder: Path, judge: Any = None) -> dict[str, float]:
    return train_sft(recipe, None, folder, judge or matcher("strict_number"))


def scores(folder: Path) -> list[tuple[int, float, float, float]]:
    """Step, share right, share cut off and mean tokens of every record with answers."""
    keys = ("step", "eval_answers/exact", "eval_answers/cut_off", "eval_answers/tokens")
    return [tuple(record[key] for key in keys) for record in read_metrics(folder) if keys[1] in record]  # type: ignore[misc]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, recipe_of: Any) -> tuple[Path, dict[str, float]]:
    """A stage that learned the words, with a checkpoint at the end of every epoch, and its summary."""
    folder = tmp_path_factory.mktemp("learned")
    recipe = recipe_of(ALL, save_steps=EPOCH, save_total_limit=9, eval_on_start=True)
    return folder, train(recipe, folder)


@pytest.fixture(scope="session")
def forgot(tmp_path_factory: pytest.TempPathFactory, recipe_of: Any) -> tuple[Path, dict[str, float]]:
    """A stage whose score falls, and that keeps its best."""
    folder = tmp_path_factory.mktemp("forgot")
    return folder, train(recipe_of({**ALL, "keep_best": True}), folder, LikesMistakes())


# ---- the score -------------------------------------------------------------------------------------------------------


def test_the_score_rises_from_0_to_1_while_the_model_learns(learned: tuple[Path, dict[str, float]]) -> None:
    folder, summary = learned
    found = scores(folder)
    assert [step for step, *_ in found] == [0, EPOCH, 2 * EPOCH, STEPS]
    assert [found[0][1], found[0][2]] == [0.0, 1.0]
    assert 0 < found[1][1] < found[2][1] < 1
    assert found[-1][1:3] == (1.0, 0.0)
    assert summary["answers/exact"] == 1.0
    assert "best_step" not in summary
    records = [record for record in read_metrics(folder) if "eval_answers/exact" in record]
    assert {record["eval_answers/problems"] for record in records} == {HELD_OUT}
    for record in records:
        share = record["eval_answers/exact"]
        assert record["eval_answers/exact_stderr"] == pytest.approx((share * (1 - share) / (HELD_OUT - 1)) ** 0.5)
        assert record["eval_loss"] > 0


def test_a_score_is_what_the_checkpoint_of_that_step_generates_by_transformers_own_generate(
    learned: tuple[Path, dict[str, float]], recipe_of: Any
) -> None:
    folder, _ = learned
    data = recipe_of(None).data
    tokenizer = load_tokenizer(str(ROOT / "data/arithmetic/tokenizer"))
    validation = prepare_sft(data, tokenizer, 128, seed=1).validation
    assert validation is not None
    for step, exact, _, mean_tokens in scores(folder)[1:]:
        model = load_model(folder / f"checkpoint-{step}").eval()
        right, tokens = 0, 0
        for ids in validation["input_ids"]:
            question = tokenizer.decode(ids).split("User\n")[1].split("\n")[0]
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            made = model.generate(**chat, max_new_tokens=8, do_sample=False)[0, chat["input_ids"].shape[1] :]
            tokens += len(made)
            answer = tokenizer.decode(made, skip_special_tokens=True)
            right += f"#### {NUMBERS[question.split()[1]]}" == answer.strip()
        assert (right / HELD_OUT, tokens / HELD_OUT) == (exact, mean_tokens), step


def test_an_answer_ends_where_the_next_turn_begins_and_fits_into_the_context(
    small_model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(ROOT / "data/arithmetic/tokenizer"))
    own = tokenizer.encode("#### 5\n<extra_id_1>", add_special_tokens=False)
    said = own + tokenizer.encode("User\nAnd then?\n#### 6", add_special_tokens=False)

    def decode(model: Any, prompts: Any, *, max_new_tokens: list[int], stop: Any, **settings: Any) -> list[Decoded]:
        """As model.decoding.decode, with the same words for every prompt."""
        decoded = []
        for most in max_new_tokens:
            end = next((count for count in range(1, most + 1) if stop(said[:count])), None)
            decoded.append(Decoded(said[: end or most], ended=end is not None))
        return decoded

    monkeypatch.setattr(answers_module, "decode", decode)
    problems = [Problem((1,) * 127, "#"), Problem((1,) * 3, "#### 5")]  # of a context of 128
    judged = judge(small_model, tokenizer, problems, matcher("text"), 60)
    assert [(one.is_cut_off, one.tokens) for one in judged] == [(True, 1), (False, len(own))]
    assert judged[1].is_right


def test_training_is_bitwise_the_same_with_and_without_answers(
    learned: tuple[Path, dict[str, float]], recipe_of: Any, tmp_path: Path
) -> None:
    train_sft(recipe_of(None, save_steps=EPOCH, save_total_limit=9, eval_on_start=True), None, tmp_path)
    for name in (f"checkpoint-{EPOCH}", f"checkpoint-{STEPS}", "final"):
        assert same(weights(tmp_path / name), weights(learned[0] / name)), name
    keys = ("step", "loss", "eval_loss", "grad_norm")
    ours, theirs = (
        [{key: record[key] for key in keys if key in record} for record in read_metrics(folder)]
        for folder in (tmp_path, learned[0])
    )
    assert ours == theirs


def test_generating_leaves_no_trace_in_mode_random_numbers_and_weights(small_model: HymbaForCausalLM) -> None:
    small_model.train()
    before = {name: weight.clone() for name, weight in small_model.state_dict().items()}
    random.seed(5)
    torch.manual_seed(5)
    expected = (random.random(), torch.rand(3).tolist())
    random.seed(5)
    torch.manual_seed(5)
    with (
        torch.autocast("cpu", torch.bfloat16),
        whole_model(torch.nn.Sequential(small_model), torch.device("cpu")) as whole,
    ):
        assert not whole.training
        assert whole(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.float32
        random.random()
        torch.rand(7)
    assert small_model.training
    assert (random.random(), torch.rand(3).tolist()) == expected
    assert all(torch.equal(weight, before[name]) for name, weight in small_model.state_dict().items())


def test_the_terminal_has_the_score_beside_the_validation_loss(
    recipe_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe_of({**ALL, "problems": 5}, max_steps=2), tmp_path)
    told = capsys.readouterr()
    assert "answers: 5 problems of 35 held-out conversations, at every validation\n" in told.out
    loss = next(record["eval_loss"] for record in read_metrics(tmp_path) if "eval_loss" in record)
    assert f"SFT  step 2/2  validation loss {loss:.4f}  5 problems: 0.0 % right, " in told.err


def test_dpo_has_the_chosen_replies_as_references(make_recipe: Any, tmp_path: Path) -> None:
    class Asked:
        """Remembers the references."""

        found: set[str] = set()  # noqa: RUF012

        def can_judge(self, reference: str) -> bool:
            return True

        def is_right(self, answer: str, reference: str) -> bool:
            self.found.add(reference)
            return len(self.found) % 2 == 1

    recipe = make_recipe(rows=24, sft=False, max_steps=2, eval_strategy="steps", eval_steps=1)
    answers = AnswersSection(match="text", problems=99, max_new_tokens=4, keep_best=True)
    data = recipe.data.model_copy(update={"validation_fraction": 0.3})
    recipe = recipe.model_copy(update={"data": data, "dpo": recipe.dpo.model_copy(update={"answers": answers})})
    summary = train_dpo(recipe, None, tmp_path, Asked())
    rows = [json.loads(line) for line in Path(recipe.data.path).read_text().splitlines()[:24]]
    assert len(Asked.found) > 4
    assert Asked.found < {row["answer"] for row in rows}
    assert [score[0] for score in scores(tmp_path)] == [1, 2]
    assert summary["answers/exact"] == max(score[1] for score in scores(tmp_path)) > 0


# ---- the best checkpoint ---------------------------------------------------------------------------------------------


def test_final_has_the_weights_of_the_best_score_and_every_record_says_so(
    forgot: tuple[Path, dict[str, float]], learned: tuple[Path, dict[str, float]]
) -> None:
    folder, summary = forgot
    found = scores(folder)
    assert [step for step, *_ in found] == [EPOCH, 2 * EPOCH, STEPS]
    assert found[0][1] > found[1][1] > found[2][1] == 0
    assert same(weights(folder / "final"), weights(learned[0] / f"checkpoint-{EPOCH}"))
    assert not same(weights(folder / "final"), weights(learned[0] / "final"))
    manifest = read_manifest(folder / "final")
    assert manifest is not None
    assert manifest["step"] == EPOCH
    assert (summary["best_step"], summary["answers/exact"], summary["steps"]) == (EPOCH, found[0][1], STEPS)
    # the last two would be 30 and 39, and 13 is none of every tenth
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{STEPS}", f"checkpoint-{EPOCH}"]


@pytest.mark.parametrize(("step", "event"), [(20, "step"), (EPOCH, "save"), (STEPS, "save")])
def test_a_run_that_was_killed_has_the_same_scores_and_the_same_best(
    forgot: tuple[Path, dict[str, float]],
    recipe_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    event: str,
) -> None:
    recipe, callbacks = recipe_of({**ALL, "keep_best": True}), sft_module.stage_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(sft_module, "stage_callbacks", lambda *given: [*callbacks(*given), KillAt(step, event)])
        with pytest.raises(Killed):
            train(recipe, tmp_path / "run", LikesMistakes())
    (tmp_path / "run").rename(tmp_path / "moved")
    summary = train(recipe, tmp_path / "moved", LikesMistakes())
    assert scores(tmp_path / "moved") == scores(forgot[0])
    losses, expected = (
        [(record["step"], record["loss"]) for record in read_metrics(folder) if "loss" in record]
        for folder in (tmp_path / "moved", forgot[0])
    )
    assert losses == expected
    assert same(weights(tmp_path / "moved" / "final"), weights(forgot[0] / "final"))
    assert summary["best_step"] == EPOCH
    told = f"final/ gets the weights of step {EPOCH} of {STEPS}, with {100 * summary['answers/exact']:.1f} % right answers\n"
    assert capsys.readouterr().out.count(told) == 1


def test_of_equal_scores_the_latest_counts_and_the_end_says_whose_weights_are_final(
    recipe_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of({**ALL, "problems": 2, "keep_best": True}, max_steps=4, eval_steps=2, eval_strategy="steps")
    summary = train(recipe, tmp_path)
    assert [score[:2] for score in scores(tmp_path)] == [(2, 0.0), (4, 0.0)]
    assert str(summary["best_step"]) == "4"
    assert capsys.readouterr().out.count("final/ gets the weights of step 4 of 4, with 0.0 % right answers\n") == 1


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_the_last_step_is_judged_however_long_validation_is_put_off(
    recipe_of: Any, tmp_path: Path, strategy: str
) -> None:
    recipe = recipe_of({**ALL, "problems": 2, "keep_best": True}, max_steps=2, eval_delay=99, eval_strategy=strategy)
    summary = train(recipe, tmp_path)
    assert [score[0] for score in scores(tmp_path)] == [2]
    assert summary["best_step"] == 2


def test_a_checkpoint_whose_best_one_is_damaged_is_passed_over(
    forgot: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(forgot[0], folder)
    assert last_good_checkpoint(folder) == folder / f"checkpoint-{STEPS}"
    file = folder / f"checkpoint-{EPOCH}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert last_good_checkpoint(folder) is None
    assert (
        f"{folder}/checkpoint-{STEPS} is passed over: the best model until then is in checkpoint-{EPOCH}, which is gone or "
        "damaged\n"
    ) in capsys.readouterr().err


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def together(
    tmp_path_factory: pytest.TempPathFactory, recipe_of: Any, deepspeed_file: Callable[[Path, str | None], str | None]
) -> Path:
    """What two processes made of the same training: a folder for each engine."""
    folder = tmp_path_factory.mktemp("together")
    recipe = folder / "recipe.yaml"
    settings = {"per_device_train_batch_size": 1, "max_steps": EPOCH + 2, "eval_strategy": "steps", "eval_steps": EPOCH}
    recipe.write_text(recipe_of({**ALL, "keep_best": True}, **settings).dump_yaml())
    jobs = []
    for name, engine in {"ddp": None, "zero2": "zero2", "zero3": "zero3"}.items():
        place = {"recipe": str(recipe), "folder": str(folder / name)}
        jobs.append({**place, "deepspeed": deepspeed_file(folder, engine)})
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    TwoProcesses(HERE / "answers_worker.py", file, folder).wait()
    return folder


@pytest.mark.timeout(600)  # DeepSpeed compiles its shared-memory operations on first use
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_two_processes_share_the_problems_and_find_the_scores_of_one(
    together: Path, learned: tuple[Path, dict[str, float]], engine: str
) -> None:
    observed = json.loads((together / engine / "observed.json").read_text())
    assert observed["engine"] == engine
    assert scores(together / engine)[0] == scores(learned[0])[1]
    best = int(observed["summary"]["best_step"])
    assert same(weights(together / engine / "final"), weights(together / engine / f"checkpoint-{best}"))
    final = weights(together / engine / f"checkpoint-{EPOCH}")
    # float32 on the CPU; observed 2e-5
    assert (
        max(
            float((final[name] - value).abs().max())
            for name, value in weights(learned[0] / f"checkpoint-{EPOCH}").items()
        )
        < 1e-3
    )


def test_a_model_divided_by_fsdp2_generates_as_a_whole_one_and_trains_on(together: Path) -> None:
    for rank, tokens in ((0, 4), (1, 13)):
        told = json.loads((together / f"fsdp2-{rank}.json").read_text())
        assert told == {"same": True, "tokens": [tokens] * 2, "divided": True, "training": True, "gradients": True}


# ---- the problems ----------------------------------------------------------------------------------------------------


def problems_of(rows: list[dict[str, Any]], path: Path, stage: Any, match: Any = "text", count: int = 99) -> Any:
    """Prompts and references, as texts, of rows that are all held out."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tokenizer = load_tokenizer(str(ROOT / "data/arithmetic/tokenizer"))
    ((records, _),) = examine(DataSection(path=str(path), workers=1), tokenizer, 512, stage, seed=1)
    section = AnswersSection(match=match, problems=count)
    chosen = choose_problems(records.remove_columns("validation"), tokenizer, section, matcher(match), stage)
    return [(text_of(tokenizer, list(problem.prompt)), problem.reference) for problem in chosen]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_the_prompt_ends_where_the_last_trained_reply_begins(tmp_path: Path) -> None:
    talk = chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao"))
    untrained = chat(("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))
    untrained["messages"][3]["train"] = False
    assert problems_of([untrained, talk], tmp_path / "rows.jsonl", "sft") == [
        (
            "<extra_id_0>System\nBe kind.\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello \n<extra_id_1>User\nBye\n"
            "<extra_id_1>Assistant\n",
            "Ciao",
        ),
        ("<extra_id_0>System\n\n<extra_id_1>User\n1\n<extra_id_1>Assistant\n", "2"),
    ]


def test_of_a_pair_the_chosen_reply_is_the_reference(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    pair = {
        "prompt": [{"role": "user", "content": "Oslo?"}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "No idea."}],
        "tools": [tool],
    }
    ((prompt, reference),) = problems_of([pair], tmp_path / "rows.jsonl", "dpo", "calls")
    assert prompt.endswith("</tool>\n\n<extra_id_1>User\nOslo?\n<extra_id_1>Assistant\n")
    assert reference == '<toolcall> {"name": "weather", "arguments": {"city": "Oslo"}} </toolcall>'


def test_which_problems_are_chosen_depends_on_their_content_alone(tmp_path: Path) -> None:
    rows = [chat(("user", str(number)), ("assistant", f"It is {number}")) for number in range(40)]
    chosen = problems_of(rows, tmp_path / "rows.jsonl", "sft", count=7)
    assert len(chosen) == len(set(chosen)) == 7
    again = problems_of([*rows[::-1], rows[0], *rows], tmp_path / "other.jsonl", "sft", count=7)
    assert sorted(again) == sorted(chosen)
    more = problems_of(rows, tmp_path / "rows.jsonl", "sft", count=8)
    assert set(chosen) < set(more)
    assert {prompt for prompt, _ in chosen} != {
        prompt for prompt, _ in problems_of(rows[:7], tmp_path / "a.jsonl", "sft")
    }


def test_replies_without_what_is_compared_are_no_problems(tmp_path: Path) -> None:
    rows = [chat(("user", "1"), ("assistant", "one")), chat(("user", "2"), ("assistant", "two, so 2"))]
    ((prompt, _),) = problems_of(rows, tmp_path / "rows.jsonl", "sft", "number")
    assert "User\n2\n" in prompt
    with pytest.raises(DataError) as error:
        problems_of(rows, tmp_path / "rows.jsonl", "sft", "calls")
    assert str(error.value) == (
        "sft.answers.match is 'calls', and none of the 2 held-out conversations ends in a reply that has it; choose another "
        "match, hold out more (data.validation_fraction), or remove sft.answers"
    )


# ---- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "answers", "trainer", "told"),
    [
        (
            {"validation_fraction": 0.0},
            {},
            {},
            "sft.answers asks for answers to held-out conversations, and data.validation_fraction is 0; set it, for instance "
            "to 0.02, or remove sft.answers",
        ),
        (
            {"loss_on": "all"},
            {},
            {},
            "sft.answers takes the last reply that is trained on as the reference, and data.loss_on is 'all', which does not "
            "tell replies; set it to 'assistant', or remove sft.answers",
        ),
        (
            {},
            {},
            {"eval_strategy": "no"},
            "sft.trainer.eval_strategy is 'no', and problems are answered when validation runs (sft.answers); remove one of "
            "the two",
        ),
        (
            {},
            {"keep_best": True},
            {"save_strategy": "no"},
            "sft.trainer.save_strategy is 'no', and keep_best needs checkpoints (sft.answers); remove one of the two",
        ),
        (
            {},
            {"keep_best": True},
            {"metric_for_best_model": "loss"},
            "sft.trainer.metric_for_best_model is 'loss', and keep_best chooses by answers/exact (sft.answers); remove one "
            "of the two",
        ),
    ],
)
def test_answers_that_training_would_never_ask_for_are_refused(
    recipe_of: Any, data: dict[str, Any], answers: dict[str, Any], trainer: dict[str, Any], told: str
) -> None:
    recipe = recipe_of({"match": "number", **answers}, **trainer)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
    with pytest.raises(RecipeError) as error:
        trainer_settings(recipe, "sft")
    assert str(error.value) == told


def test_what_is_answered_changes_no_weights_unless_it_chooses_them(recipe_of: Any) -> None:
    def fingerprint(answers: dict[str, Any] | None) -> str:
        (step,) = plan(recipe_of(answers))
        return step.fingerprint

    plain = fingerprint(None)
    assert fingerprint(ALL) == fingerprint({**ALL, "problems": 3}) == plain
    best = fingerprint({**ALL, "keep_best": True})
    assert len({plain, best, fingerprint({**ALL, "keep_best": True, "problems": 3})}) == 3


def test_a_command_refuses_conversations_that_cannot_be_answered_before_it_trains(
    recipe_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of({"match": "calls"}).model_copy(update={"output_dir": str(tmp_path / "run")})
    (tmp_path / "recipe.yaml").write_text(recipe.dump_yaml())
    assert main(["sft", str(tmp_path / "recipe.yaml")]) == 2
    assert "sft.answers.match is 'calls', and none of the 35 held-out conversations" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
