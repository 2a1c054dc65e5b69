"""The plan, and the checks before the first stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hymba_align.pipeline as pipeline
from hymba_align.cli import main
from hymba_align.errors import UsageError
from hymba_align.files import file_digest
from hymba_align.recipe import load_recipe


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    recipe_file: str, work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))

    pipeline.run_recipe(load_recipe(recipe_file), dry_run=True)

    assert work == []
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    for text in ("score base", "random weights", "train.jsonl", "test.jsonl", "sft/final", "dpo/final", "to do"):
        assert text in out


def test_a_dry_run_of_dpo_says_that_sft_has_to_be_there_first(
    recipe_file: str, work, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run_training_stage(load_recipe(recipe_file), "dpo", dry_run=True)
    assert "needs sft first" in capsys.readouterr().out

    pipeline.run_training_stage(load_recipe(recipe_file), "sft")
    capsys.readouterr()
    pipeline.run_training_stage(load_recipe(recipe_file), "dpo", dry_run=True)
    assert "to do" in capsys.readouterr().out


def test_one_override_of_the_data_path_moves_training_and_test(
    recipe_file: str, row: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "test"):
        (other / f"{name}.jsonl").write_text(json.dumps(row) + "\n")

    steps = pipeline.plan(load_recipe(recipe_file, [f"data.path={other}/train.jsonl"]))

    assert {step.data for step in steps} == {f"{other}/train.jsonl", f"gsm8k: {other}/test.jsonl (limit 2)"}


def test_what_is_wrong_with_rows_of_ones_own_is_told_at_once(
    recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine" / "own.jsonl"
    own.parent.mkdir()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    own.write_text(json.dumps({"messages": turns}) + "\n")
    overrides = [f"data.path={own}", "data.examples_per_conversation=6", "eval=null", "inspect={}"]

    assert main(["run", recipe_file, *overrides, "sft.max_length=9999"]) == 2

    assert capsys.readouterr().err == (
        "Error: 4 things are wrong:\n"
        f"  inspect.data is not set, dpo keeps no rows for validation and no other test.jsonl lies beside {own}; set "
        "inspect.data to a file that is not trained on, keep rows with data.validation_fraction=0.05, or leave the look "
        "inside out with inspect=null\n"
        "  sft.max_length is 9999, above the model's context of 8192; lower it\n"
        f"  {own}: examples_per_conversation is 6, but only rows of question and answer can be joined; set it to 1\n"
        f"  {own}:1: the rows are of messages, but DPO takes prompt, chosen, rejected; or conversations, chosen, rejected; "
        "or prompt, responses, scores; or chosen, rejected; or question, answer\n"
        "More: hymba-align explain several\n"
    )
    assert not (tmp_path / "run").exists()


def digests(root: Path) -> dict[str, str]:
    return {str(path): file_digest(path) if path.is_file() else "" for path in sorted(root.rglob("*"))}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path={tmp}/bad.jsonl"], "{tmp}/bad.jsonl:2: malformed JSON"),
        (["dpo.data.path={tmp}/bad.jsonl"], "{tmp}/bad.jsonl:2: malformed JSON"),
        (["sft.max_length=9"], "{tmp}/train.jsonl:1: longer than max_length=9: it has "),
        (
            ["sft.trainer.lr_scheduler_type=foo"],
            "sft.trainer is refused by SFTConfig: foo is not a valid SchedulerType",
        ),
        (["eval.max_new_tokens=8192"], "eval.max_new_tokens is 8192, which leaves no room"),
    ],
)
def test_bad_input_leaves_a_finished_run_as_it_is(
    recipe_file: str, work, row: dict[str, str], tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n{\n")
    pipeline.run_recipe(load_recipe(recipe_file))
    before = digests(tmp_path / "run")
    work.clear()

    with pytest.raises(UsageError) as caught:
        pipeline.run_recipe(load_recipe(recipe_file, [text.format(tmp=tmp_path) for text in overrides]))

    assert str(caught.value).startswith(message.format(tmp=tmp_path))
    assert digests(tmp_path / "run") == before
    assert work == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=absent.jsonl"], "data.path is absent.jsonl, which does not exist (looked for {cwd}/"),
        (["dpo.data.path=a/b/c.csv"], "dpo.data.path is a/b/c.csv, which does not exist (looked for {cwd}/"),
        (["eval.gsm8k.test_path=absent.jsonl"], "eval.gsm8k.test_path is absent.jsonl, which does not exist (looked for {cwd}/"),
        (["sft.max_length=9000"], "sft.max_length is 9000, above the model's context of 8192; lower it"),
        (["base.config.max_position_embeddings=32", "base.config.orig_max_position_embeddings=32"], "sft.max_length is 64, above the model's context of 32; lower it"),
        (["base={model: ./absent}"], "./absent: there is no such checkpoint folder; check the path"),
        (["base.config.hidden_siz=32"], "base.config.hidden_siz is not a key of HymbaConfig; the nearest is base.config.hidden_size"),
        (["eval.max_new_tokens=8192"], "eval.max_new_tokens is 8192, which leaves no room for a prompt in the model's context of 8192 tokens; lower it"),
        (["eval.gsm8k.num_fewshot=9"], "{tmp}/train.jsonl: the file has 8 rows; eval.gsm8k.train_path needs at least 9"),
        (["data.path={tmp}/alone/train.jsonl"], "eval.gsm8k.test_path is missing: training data is also the source of few-shot examples, and no test.jsonl lies beside {tmp}/alone/train.jsonl; set the path, or leave scoring out with eval=null"),
        (["dpo.data.path={tmp}/bad.jsonl"], "{tmp}/bad.jsonl:2: malformed JSON, "),
        (["sft.trainer.lr_scheduler_type=foo"], "sft.trainer is refused by SFTConfig: foo is not a valid SchedulerType"),
        (["sft.trainer.bf16=true", "sft.trainer.use_cpu=false"], "sft.trainer is refused by SFTConfig: Your setup doesn't support bf16/gpu."),
        (["sft.trainer.fp16=true"], "sft.trainer.fp16 is true, and float16 training needs a GPU; remove it"),
        (["sft.trainer.loss_type=nil"], "sft.trainer.loss_type has the value 'nil', which TRL does not know; the nearest is 'nll'"),
        (["dpo.trainer.loss_type=[sigmoid, nope]"], "dpo.trainer.loss_type has the value 'nope', which TRL does not know; it knows sigmoid, hinge, "),
        (["dpo.trainer.betta=1"], "dpo.trainer.betta is not a field of DPOConfig; did you mean 'beta'?"),
        (["launch.accelerate_config=absent.yaml"], "launch.accelerate_config is absent.yaml, which does not exist; accelerate_configs/ holds some"),
        (
            ["launch.accelerate_config=.ci/run"],
            "launch.accelerate_config .ci/run is not an accelerate configuration",
        ),
        (
            ["launch.launcher=multi_node_zero3", "launch.num_processes=16"],
            "launch.launcher is multi_node_zero3, which is made for several machines; in Slurm submit "
            "recipes/hymba-1.5b/slurm.sh, elsewhere start on each machine 'torchrun --nnodes MACHINES --nproc_per_node GPUS "
            "--rdzv_backend c10d --rdzv_endpoint HOST_0:29500 -m hymba_align sft RECIPE' (then dpo)",
        ),
        (
            ["launch.launcher=fsdp2", "launch.num_processes=2", "sft.trainer.use_cpu=true"],
            "launch.launcher is fsdp2, and sft computes on the CPU, where accelerate trains with plain DDP instead, or with "
            "processes that never meet; take a machine with GPUs, or launch.launcher=zero3",
        ),
        (
            ["launch.accelerate_config=accelerate_configs/single.yaml", "launch.num_processes=2"],
            "launch.accelerate_config is accelerate_configs/single.yaml, which is one process (distributed_type NO), and "
            "launch.num_processes is 2; choose another file, or launch.launcher",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_the_first_stage(
    recipe_file: str, work, row: dict[str, str], tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "train.jsonl").write_text((json.dumps(row) + "\n") * 8)
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n{\n")

    with pytest.raises(UsageError) as caught:
        pipeline.run_recipe(load_recipe(recipe_file, [text.replace("{tmp}", str(tmp_path)) for text in overrides]))

    assert str(caught.value).startswith(message.format(cwd=Path.cwd(), tmp=tmp_path))
    assert work == []
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_is_said_in_a_dry_run_too(recipe_file: str, row: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n{\n")

    with pytest.raises(UsageError, match=r"bad\.jsonl:2: malformed JSON"):
        pipeline.run_recipe(load_recipe(recipe_file, [f"dpo.data.path={tmp_path}/bad.jsonl"]), dry_run=True)


def test_a_dry_run_asks_the_hub_for_nothing_and_a_run_asks_before_it_touches_anything(
    recipe_file: str, work, tmp_path: Path
) -> None:
    offline = ["dpo.data.path=nobody/pairs"]
    pipeline.run_recipe(load_recipe(recipe_file, offline), dry_run=True)

    with pytest.raises(UsageError, match="nobody/pairs"):
        pipeline.run_recipe(load_recipe(recipe_file, offline))
    assert work == []
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_stops_the_run_before_it_starts(recipe_file: str, work) -> None:
    pipeline.run_training_stage(load_recipe(recipe_file), "sft")
    work.clear()

    with pytest.raises(UsageError, match="belongs to the run 'demo', and this recipe's name is 'other'"):
        pipeline.run_recipe(load_recipe(recipe_file, ["name=other"]))
    assert work == []


def test_a_stage_that_the_recipe_lacks_cannot_run(recipe_file: str) -> None:
    with pytest.raises(UsageError) as caught:
        pipeline.run_training_stage(load_recipe(recipe_file, ["sft=null"]), "sft")

    assert str(caught.value) == "the recipe 'demo' has no section sft; add one, or run another stage"


def test_a_dry_run_shows_the_plan_and_names_the_grader_that_the_run_would_stop_for(
    recipe_file: str, work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYMBA_ALIGN_BFCL", str(tmp_path / "absent"))
    told = f"BFCL's grader is not installed in {tmp_path}/absent; run 'hymba-align install-bfcl --output {tmp_path}/absent' once"

    assert main(["run", recipe_file, "eval.tasks=[bfcl]", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needed_first"] == [
        f"Needed first, for eval/base, eval/sft, eval/dpo: {told}"
    ]
    looks = ["eval=null", "inspect.tasks=[bfcl]", "inspect.data=data/arithmetic/test.jsonl", "inspect.against=none"]
    assert main(["run", recipe_file, *looks, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needed_first"] == [f"Needed first, for inspect/dpo: {told}"]
    assert main(["run", recipe_file, "eval.tasks=[bfcl]", "--dry-run"]) == 0
    assert (
        f"Needed first, for eval/base, eval/sft, eval/dpo: {told}\nDry run: nothing was run" in capsys.readouterr().out
    )
    assert main(["run", recipe_file, "eval.tasks=[bfcl]"]) == 1
    assert f"Error: {told}\n" in capsys.readouterr().err
    assert work == []


def test_a_dry_run_as_json_is_its_plan(
    recipe_file: str, work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", recipe_file, "--dry-run", "--json"]) == 0

    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert [step["step"] for step in plan["steps"]] == ["score base", "sft", "score sft", "dpo", "score dpo"]
    assert [step["writes_to"] for step in plan["steps"][:2]] == ["eval/base", "sft/final"]
    assert {step["state"] for step in plan["steps"]} == {"to do"}
    assert (plan["dry_run"], plan["folder"]) == (True, str(tmp_path / "run"))
    assert plan["guards"]["sft"]["on_nonfinite"] == "stop"
    assert "Dry run: nothing was run and nothing was written." in err
    assert not (tmp_path / "run").exists()
    assert work == []
