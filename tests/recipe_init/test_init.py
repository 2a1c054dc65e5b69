"""The first recipe: what is chosen on machines of four kinds, that it runs, and what init refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hymba_align.cli import main
from hymba_align.errors import CheckpointError, ColumnsError, DataFileError, LaunchError, OutOfMemoryError, RecipeError
from hymba_align.hardware import GPU, ROOM, Hardware, detect
from hymba_align.memory import Shape, estimate
from hymba_align.model import HymbaConfig, HymbaForCausalLM
from hymba_align.recipe import load_recipe
from hymba_align.recipe_init.command import write_recipe
from hymba_align.recipe_init.ways import TITLES, best, ways
from hymba_align.recipe_init.writing import LEARNING_RATES

GIB = 2**30
ROOT = Path(__file__).resolve().parents[2]
BASE = "nvidia/Hymba-1.5B-Base"
RELEASED = Shape.of(HymbaConfig())


def gpus(count: int, gib: int, *, bf16: bool = True, host_gib: int = 512) -> Hardware:
    return Hardware((GPU("a card", gib * GIB, bf16),) * count, 16, host_gib * GIB, 2000 * GIB)


CPU = Hardware((), 2, 24 * GIB, 50 * GIB, cpu_flops=5e10)
MACHINES = {
    "1 x 24 GB": (gpus(1, 24), "lora", None),
    "1 x 80 GB": (gpus(1, 80), "full", None),
    "8 x 80 GB": (gpus(8, 80), "full", ("ddp", 8)),
    "4 x 32 GB": (gpus(4, 32), "zero1", ("zero1", 4)),
    "4 x 18 GB": (gpus(4, 18), "zero2", ("zero2", 4)),
    "1 x 3 GB": (gpus(1, 3), "qlora", None),
    "1 x 16 GB without bfloat16": (gpus(1, 16, bf16=False), "lora", None),
    "CPU only": (CPU, "lora", None),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name: str = "mine", **given: Any) -> tuple[Path, dict[str, Any]]:
    options = {"data": None, "model": BASE, "output": None, **given}
    return Path("recipes") / f"{name}.yaml", write_recipe(name, **options)


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer: Any = AutoTokenizer.from_pretrained(ROOT / "data" / "arithmetic" / "tokenizer")
    config = HymbaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, v_head_dim=32, num_memory_tokens=4, sliding_window=16, global_attn_idx=[0, 2],
        kv_reuse_group=[], mamba_d_state=4, mamba_dt_rank=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    HymbaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(path: str, row: dict[str, Any], count: int) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for _ in range(count)))
    return path


@pytest.mark.parametrize("machine", MACHINES)
def test_the_recipe_for_a_machine_passes_a_dry_run(
    machine: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware, way, launch = MACHINES[machine]
    path, result = written(hardware=hardware)
    assert [each["way"] for each in result["ways"] if each["chosen"]] == [way]
    recipe = load_recipe(path)
    assert (recipe.lora is not None) == (way in ("lora", "qlora"))
    assert launch == ((recipe.launch.launcher, recipe.launch.num_processes) if launch else None)
    assert recipe.sft is not None
    trainer = recipe.sft.trainer
    processes = launch[1] if launch else 1
    batch = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] * processes
    assert batch == (1024 if hardware.gpus else 8)
    assert trainer.get("bf16") == (hardware.bf16 if hardware.gpus else None)
    assert (recipe.base.dtype == "bfloat16") == (way in ("lora", "qlora") and hardware.bf16)
    capsys.readouterr()
    assert main(["run", str(path), "--dry-run"]) == 0, capsys.readouterr().err


def test_every_way_has_its_estimate_and_what_fits_is_within_the_device() -> None:
    for hardware, _, _ in MACHINES.values():
        found = ways(hardware, RELEASED, 8192)
        assert [way.name for way in found] == list(TITLES)
        for way in found:
            assert way.estimate == estimate(RELEASED, way.setting)
            assert not way.fits or way.estimate.total <= ROOM * hardware.device_bytes
            assert way.setting.row_tokens == way.max_length


def test_a_batch_grows_as_far_as_memory_goes(here: Path) -> None:
    _, small = written("small", hardware=gpus(1, 40))
    _, large = written("large", hardware=gpus(1, 141))
    batches = [load_recipe(result["recipe"]).sft.trainer["per_device_train_batch_size"] for result in (small, large)]  # type: ignore[union-attr]
    assert batches[0] < batches[1]
    for result, gib in ((small, 40), (large, 141)):
        said = re.search(
            r"per_device_train_batch_size: \d+ # what fits: about ([\d.]+) GiB", result["recipe"].read_text()
        )
        assert said is not None
        assert float(said[1]) <= ROOM * gib


@pytest.mark.parametrize(
    ("row", "schema", "stages"),
    [
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
            "messages",
            ["sft"],
        ),
        ({"instruction": "Add", "output": "3"}, "alpaca", ["sft"]),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, "preference", ["dpo"]),
        ({"question": "1+1", "answer": "2", "wrong_answer": "3"}, "question_answer", ["sft", "dpo"]),
        ({"question": "1+1", "answer": "2"}, "question_answer", ["sft"]),
    ],
    ids=["messages", "alpaca", "preference", "question_answer with wrong ones", "question_answer"],
)
def test_the_data_section_and_the_stages_follow_from_the_file(
    row: dict[str, Any], schema: str, stages: list[str], here: Path
) -> None:
    data = rows("my data.jsonl", row, 1200)
    path, result = written(data=data, hardware=gpus(1, 80))
    recipe = load_recipe(path)
    assert recipe.data is not None
    assert (recipe.data.path, recipe.data.format) == (data, schema)
    assert list(recipe.training_stages) == stages
    assert recipe.data.validation_fraction == 0.02
    assert result["data"].rows == 1200
    assert recipe.eval is None, "nobody asked for school mathematics"
    assert "# eval: {tasks: [gsm8k]" in path.read_text()
    # 1,200 short rows are few packed rows, but 1,200 pairs.
    for stage in stages:
        trainer = getattr(recipe, stage).trainer
        batch = trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"]
        assert batch == (16 if stage == "dpo" else 8)


def test_the_rates_that_are_written_are_those_that_a_recipe_without_any_takes() -> None:
    from hymba_align.train.settings import ADAPTER_RATES, STAGE_DEFAULTS

    for (stage, adapts), (rate, _) in LEARNING_RATES.items():
        assert float(rate) == (ADAPTER_RATES[stage] if adapts else STAGE_DEFAULTS[stage]["learning_rate"]), stage


def test_a_recipe_on_a_file_and_a_checkpoint_of_ones_own_runs(
    here: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows("my.jsonl", {"question": "1+1", "answer": "2"}, 40)
    path, result = written(data=data, model=str(tiny_checkpoint), hardware=CPU)
    recipe = load_recipe(path)
    assert recipe.lora is None
    assert recipe.eval is None, "GSM8K's tests would be looked for beside the rows"
    assert "validation_fraction" not in path.read_text()
    assert "about 1 step an epoch" in path.read_text()
    assert "so few steps teach next to nothing: more epochs" in path.read_text()
    assert result["next"][0] == "hymba-align data check recipes/mine.yaml"
    capsys.readouterr()
    assert main(["run", str(path), "--dry-run"]) == 0, capsys.readouterr().err


def test_the_folder_above_a_checkpoint_is_told_where_the_checkpoint_is(here: Path, tiny_checkpoint: Path) -> None:
    (here / "base").mkdir()
    (here / "base" / "final").symlink_to(tiny_checkpoint)
    with pytest.raises(CheckpointError, match=r"no config\.json, so it is no checkpoint; there is one in base/final"):
        written(model="base", hardware=CPU)


def test_init_refuses_to_overwrite(here: Path) -> None:
    path, _ = written(hardware=CPU)
    before = path.read_text()
    with pytest.raises(RecipeError) as raised:
        written(hardware=CPU)
    assert str(raised.value) == (
        "recipes/mine.yaml is there already, and init overwrites nothing; give another name, or --output FILE"
    )
    assert path.read_text() == before
    assert [each.name for each in Path("recipes").iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("name", ["", "../x", "a b", "-x"])
def test_a_name_that_no_run_can_have_is_refused_before_anything_is_made(name: str, here: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        written(name, hardware=CPU)
    assert str(raised.value) == (
        f"'{name}' cannot be the name of a run; use letters, digits, '.', '_' and '-', with a letter or digit first, and --output "
        "for the recipe's place"
    )
    assert list(here.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_named(here: Path) -> None:
    Path("recipes").write_text("")
    with pytest.raises(RecipeError) as raised:
        written(hardware=CPU)
    assert str(raised.value) == "recipes/mine.yaml cannot be made: recipes is no folder; name another --output"


def test_a_machine_on_which_nothing_fits_is_told_what_the_least_takes(here: Path) -> None:
    with pytest.raises(OutOfMemoryError) as raised:
        written(hardware=Hardware((), 2, GIB, GIB))
    message = str(raised.value)
    assert re.fullmatch(
        r"nothing fits: this machine has 1\.0 GiB, and the least that this base takes is [\d.]+ GiB \(QLoRA \(4 bits\), rows of "
        r"512 tokens\); take a machine with more memory, or a smaller base with --model",
        message,
    )
    assert not Path("recipes").exists()


def test_a_way_that_was_asked_for_and_does_not_fit_is_refused() -> None:
    hardware = gpus(1, 24)
    found = ways(hardware, RELEASED, 8192)
    assert best(found, hardware, "qlora").name == "qlora"
    with pytest.raises(
        OutOfMemoryError, match=r"^all parameters takes [\d.]+ GiB of a device with rows of 512 tokens, and a GPU"
    ):
        best(found, hardware, "full")


@pytest.mark.parametrize(("way", "why"), [("zero2", "one device: divides nothing"), ("zero3_offload", "fits, slow")])
def test_a_way_for_other_machines_is_refused_with_the_reason(way: str, why: str) -> None:
    hardware = gpus(1, 80)
    found = ways(hardware, RELEASED, 8192)
    if why.startswith("fits"):
        assert best(found, hardware, way).verdict == why
        return
    with pytest.raises(LaunchError) as raised:
        best(found, hardware, way)
    assert str(raised.value) == (
        "all, ZeRO-2, which --way asks for, is of no use here (one device: divides nothing); take another way (without --way the "
        "best that fits is chosen)"
    )


def test_pairs_get_as_long_as_fits_and_no_comment_promises_more(here: Path) -> None:
    hardware = Hardware(
        (), 2, 8 * GIB, 50 * GIB, cpu_flops=5e10
    )  # on which rows of 512 tokens fit, and pairs of 2 x 512 do not
    path, _ = written(hardware=hardware)
    recipe = load_recipe(path)
    assert recipe.sft is not None
    assert recipe.dpo is not None
    assert (recipe.sft.max_length, recipe.dpo.max_length) == (512, 256)
    told = re.findall(r"per_device_train_batch_size: \d+ # what fits: about ([\d.]+) GiB", path.read_text())
    assert len(told) == 2
    assert max(map(float, told)) <= ROOM * 8
    assert "8 packed rows a step: at most 62 steps an epoch" in path.read_text()


def test_what_a_comment_says_of_adapters_and_bfloat16_holds_where_they_were_asked_for(here: Path) -> None:
    text = written(hardware=gpus(1, 80, bf16=False), way="lora")[0].read_text()
    assert "do not fit" not in text
    assert "    bf16: false # these GPUs have no bfloat16; float32 is computed in" in text


def test_offload_needs_main_memory_and_comes_last() -> None:
    starved, rich = gpus(2, 10, host_gib=16), gpus(2, 10, host_gib=128)
    verdicts = [
        next(way for way in ways(hardware, RELEASED, 8192) if way.name == "zero3_offload").verdict
        for hardware in (starved, rich)
    ]
    assert verdicts == ["host memory: 25.5 GiB", "fits, slow"]
    assert best(ways(rich, RELEASED, 8192), rich).name == "lora"


def test_without_a_gpu_the_recipe_says_how_long_it_takes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(hardware=CPU)
    # 6 operations a parameter and token (2 forward, 2 again, 2 backward) at 50 GFLOP/s.
    hours = 1e6 * 6 * RELEASED.parameters / 5e10 / 3600
    assert f"at which 1,000,000 tokens of SFT take {hours:.0f} hours or more" in capsys.readouterr().out


def test_data_that_is_not_there_or_has_no_known_columns_is_named(here: Path) -> None:
    with pytest.raises(DataFileError, match=r"nowhere\.jsonl"):
        written(data="nowhere.jsonl", hardware=CPU)
    with pytest.raises(ColumnsError, match=r"^.*my\.jsonl:1: the columns found are 'colour'"):
        written(data=rows("my.jsonl", {"colour": "red"}, 1), hardware=CPU)
    assert not Path("recipes").exists()


def test_columns_of_other_names_are_told_as_the_command_takes_them_and_go_into_the_recipe(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows("my.jsonl", {"frage": "1+1", "answer": "2"}, 3)
    assert main(["init", "mine", "--data", data, "--gpus", "1x80"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == (
        "Error: my.jsonl:1: the columns found are 'frage', 'answer', neither (question, answer) nor (prompt, chosen, rejected) "
        "nor (conversations, chosen, rejected) nor another set of docs/data.md; say which is which, as in "
        "\"columns={question: 'NAME', answer: 'answer'}\" behind the command, or name a function with convert=MODULE:FUNCTION"
    )
    given = ["columns={question: 'frage', answer: 'answer'}", "data.bad_rows=drop"]
    assert main(["init", "mine", *given, "--data", data, "--gpus", "1x80"]) == 0
    recipe = load_recipe("recipes/mine.yaml")
    assert recipe.data is not None
    assert recipe.data.columns == {"question": "frage", "answer": "answer"}
    assert (recipe.data.format, recipe.data.bad_rows, recipe.data.over_long) == ("question_answer", "drop", "refuse")


def test_rows_that_a_function_converts_need_no_known_columns(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my_rows.py").write_text(
        "def pair(row):\n    return [{'prompt': row['a'], 'chosen': row['b'], 'rejected': 'no'}]\n"
    )
    monkeypatch.syspath_prepend(str(here))
    data = rows("my.jsonl", {"a": "1+1", "b": "2"}, 3)
    path, result = written(data=data, keys=("convert=my_rows:pair",), hardware=gpus(1, 80))
    recipe = load_recipe(path)
    assert recipe.data is not None
    assert (recipe.data.convert, recipe.data.format, result["data"].schema) == ("my_rows:pair", None, None)
    assert recipe.training_stages == ("dpo",)


def test_what_a_function_makes_wrong_is_told_with_its_row(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("wrong_rows.py").write_text("def nothing(row):\n    return {'nonsense': 1}\n")
    monkeypatch.syspath_prepend(str(here))
    data = rows("my.jsonl", {"a": "1+1"}, 3)
    with pytest.raises(DataFileError, match=r"^my\.jsonl:1: .*nonsense"):
        written(data=data, keys=("convert=wrong_rows:nothing",), hardware=gpus(1, 80))


def test_a_stream_keeps_no_rows_back_and_a_share_of_rows_makes_fewer_steps(here: Path) -> None:
    data = rows("my.jsonl", {"question": "1+1" * 1000, "answer": "2"}, 600)

    def rows_of_an_epoch(name: str, *keys: str) -> int:
        text = written(name, data=data, keys=keys, hardware=gpus(1, 80))[0].read_text()
        assert ("validation_fraction" in text) is (name != "streamed")
        found = re.search(r"= (\d+) packed rows a step: about (\d+) step", text)
        assert found is not None, text
        return int(found[1]) * int(found[2])

    assert rows_of_an_epoch("streamed", "streaming=true") == rows_of_an_epoch("whole")
    assert rows_of_an_epoch("tenth", "keep_fraction=0.1") * 10 < rows_of_an_epoch("twice", "repeat=2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keys": ("bad_rows=drop",)}, "'bad_rows=drop' is about the data, and --data names none; give --data FILE"),
        (
            {"data": "my.jsonl", "keys": ("path=other.jsonl",)},
            "override 'path=other.jsonl': --data says already what is read, my.jsonl; leave one of them out",
        ),
        (
            {"data": "my.jsonl", "keys": ("column=3",)},
            "override 'column=3': data.column is not a key of a recipe; the nearest is data.columns",
        ),
    ],
)
def test_a_key_that_is_none_of_the_data_is_refused(given: dict[str, Any], message: str, here: Path) -> None:
    rows("my.jsonl", {"question": "1+1", "answer": "2"}, 1)
    with pytest.raises(RecipeError) as caught:
        written(**given, hardware=CPU)
    assert str(caught.value) == message


def test_for_gpus_that_are_not_here_the_recipe_is_what_a_machine_with_them_gets_and_says_that_they_are_assumed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assumed, _ = written("assumed", hardware=CPU, gpus="8x80")
    told = capsys.readouterr().out.replace("\n", " ")
    found, _ = written("found", hardware=gpus(8, 80))
    text = assumed.read_text()
    assert text.startswith(
        "# Written by 'hymba-align init assumed' (hymba-align 0.1.0) for GPUs that were assumed, not found:\n"
        "#   8 x 80.0 GiB of GPU memory, bfloat16, as --gpus says; here: 2 cores, 24.0 GiB; 50.0 GiB of disk free.\n"
    )
    assert text.splitlines()[2:] == found.read_text().replace("found", "assumed").splitlines()[2:]
    assert "hymba-align doctor recipes/assumed.yaml --gpus 8x80" in told
    assert "hymba-align run recipes/assumed.yaml  # on the machine that has these GPUs" in told


def test_this_machine_is_found() -> None:
    found = detect(Path("nowhere/runs"), timed=True)
    assert found.memory_bytes > GIB // 4
    assert found.disk_free_bytes > 0
    assert found.cpus >= 1
    assert found.on_cpu == (found.cpu_flops is not None)


def test_json_holds_the_ways_and_the_next_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "mine", "--json"]) in (0, 1)  # 1 where this machine has too little memory for any way
    said = json.loads(capsys.readouterr().out)
    if "error" not in said:
        assert [way["way"] for way in said["ways"]] == list(TITLES)
        assert sum(way["chosen"] for way in said["ways"]) == 1
        assert said["next"][-1] == "hymba-align run recipes/mine.yaml"
