"""From a file and overrides to a RunConfig, or to everything that is wrong with them."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from prefkit.config import ConfigError, dump_yaml, load_config
from prefkit.config.schema import KEYS
from tests.config.conftest import MINIMAL

ROOT = Path(__file__).parents[2]


def one_value(load, lines: str, key: str, *overrides: str):
    return load(lines, *overrides).config.value(key)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 5e-6", 5e-6),
        ("learning_rate: 5.0e-6", 5e-6),
        ("learning_rate: 1", 1.0),
        ("learning_rate: .5", 0.5),
        ("pref_beta: 1.", 1.0),
        ("lora_rank: 500.0", 500),
        ("save_steps: 500.0", 500),
        ("save_steps: 0.5", 0.5),
        ("warmup_steps: 20", 20),
        ("bf16: on", True),
        ("bf16: No", False),
        ("bf16: TRUE", True),
        ("eval_strategy: no", "no"),
        ("save_strategy: no", "no"),
        ("include_num_input_tokens_seen: yes", True),
        ("run_name: 'off'", "off"),
        ("run_name: 12:30", "12:30"),
        ("run_name: 1_000", "1_000"),
        ("run_name: 2024-01-01", "2024-01-01"),
        ("run_name: 007", "007"),
        ("run_name: y", "y"),
        ("cutoff_len: null", 2048),
        ("cutoff_len:", 2048),
        ("template: ~", None),
        ("enable_thinking: null", None),
        ("enable_thinking: false", False),
        ("eval_dataset: a, b,", ("a", "b")),
        ("lora_target: [q_proj, v_proj]", ("q_proj", "v_proj")),
        ("report_to: [wandb, tensorboard]", ["wandb", "tensorboard"]),
        ("report_to: wandb", "wandb"),
        ("lr_scheduler_kwargs: {num_cycles: 2}", {"num_cycles": 2}),
        ("accelerator_config: ds.json", "ds.json"),
        ("default_system: 'solve ${x}$'", "solve ${x}$"),
        ("max_samples: 1e3", 1000),
        ("lora_rank: 4", 4),
        ("include_num_input_tokens_seen: true", True),
    ],
)
def test_values_are_read_as_they_look(load, line, value):
    lines = line + "\nval_size: 0.1" if "eval_dataset" not in line else line
    found = one_value(load, lines, line.partition(":")[0])
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("[0.7, 0.3]", (0.7, 0.3)),
        ("0.7, 0.3", (0.7, 0.3)),
        ("['5e-1', 0.5]", (0.5, 0.5)),
        ("[1, 1e-3]", (1.0, 0.001)),
    ],
)
def test_a_list_of_numbers(load, written, value):
    base = MINIMAL.replace("pairs", "a,b")
    config = load(f"interleave_probs: {written}\nmix_strategy: interleave_over", base=base).config
    assert config.data.interleave_probs == value
    assert all(type(number) is float for number in config.data.interleave_probs)
    assert load(base=dump_yaml(config.to_yaml_dict())).config == config
    override = f"interleave_probs={written}"
    again = load("mix_strategy: interleave_over", override, base=base).config
    assert again.data.interleave_probs == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pref_beta: fast", 'pref_beta: a number is wanted, such as 0.1, not "fast" (line 6)'),
        ("pref_beta: '5e-6'", "pref_beta: a number is wanted: write 5e-6, plain and without quotes (line 6)"),
        ("lora_rank: 1_000", "write 1000, plain"),
        ("lora_rank: 12:30", "a whole number is wanted"),
        ("lora_rank: 017", "write 017"),
        ("lora_rank: 0x1F", "a whole number is wanted"),
        ("lora_rank: 8.5", "a whole number is wanted, such as 8, not 8.5"),
        ("lora_rank: true", "a whole number is wanted, such as 8, not true"),
        ("learning_rate: yes", 'write "yes" in quotes if it is text'),
        ("learning_rate: .inf", "must be a finite number"),
        ("learning_rate: .nan", "must be a finite number"),
        ("learning_rate: 1" + "0" * 400, "too large"),
        ("learning_rate: [1]", "a number is wanted"),
        ("seed: " + "9" * 5000, "not a number that can be read"),
        ("run_name: off", 'write "off" in quotes if it is text'),
        ("run_name: 5", 'text is wanted: write "5" in quotes'),
        ("run_name: [a]", "text is wanted"),
        ("run_name: {a: b}", "text is wanted, not a mapping"),
        ("bf16: 1", "true or false is wanted, not 1"),
        ("bf16: 'true'", "write true, without quotes"),
        ("eval_strategy: false", 'one of "no", steps, epoch is wanted, not false'),
        ("eval_strategy: NO", 'one of "no", steps, epoch is wanted, not "NO"'),
        ("optim: adamw_torchh", "did you mean adamw_torch?"),
        ("pref_loss: xyz", "write one of sigmoid, hinge"),
        ("lora_target: [q_proj, 1]", "a list of names is wanted"),
        ("lora_target: [q_proj, no]", "holds no: write"),
        ("lora_target: 3", "a list of names is wanted"),
        ("include_for_metrics: {a: b}", "a list of names is wanted"),
        ("lr_scheduler_kwargs: {x: yes}", "holds yes: write"),
        ("lr_scheduler_kwargs: {x: 1, x: 2}", "x is given twice"),
        ("lr_scheduler_kwargs: {1: 2}", "must be text"),
        ("accelerator_config: 3", "is wanted"),
        ("interleave_probs: much", "a list of numbers is wanted, such as 0.7,0.3, not"),
        ("interleave_probs: [0.5, yes]", "a list of numbers is wanted"),
        ("interleave_probs: [0.5, true]", "a list of numbers is wanted"),
        ("interleave_probs: [[1]]", "a list of numbers is wanted"),
        ("interleave_probs: {a: 1}", "a list of numbers is wanted"),
        ("interleave_probs: [0.5, 0]", "must be in the range 0 < interleave_probs <= 1, not 0"),
        ("interleave_probs: -1,2", "must be in the range 0 < interleave_probs <= 1, not -1"),
        ("run_name: !!python/object:os.system x", "is not supported"),
        ("lora_rank: !!int x", "not a number that can be read"),
        ("cutoff_len: 7", "must be in the range 8 <= cutoff_len, not 7"),
        ("pref_beta: 0", "must be in the range 0 < pref_beta, not 0"),
        ("dpo_label_smoothing: 0.5", "0 <= dpo_label_smoothing < 0.5, not 0.5: at 0.5 a label carries no"),
        ("lora_dropout: 1", "0 <= lora_dropout < 1"),
        ("ld_alpha: 1.5", "0 <= ld_alpha <= 1"),
        ("per_device_train_batch_size: 0", "1 <= per_device_train_batch_size"),
        ("gradient_accumulation_steps: 0", "1 <= gradient_accumulation_steps"),
        ("learning_rate: -1e-6", "0 <= learning_rate"),
        ("max_steps: -2", "-1 <= max_steps"),
        ("warmup_ratio: 1.0", "0 <= warmup_ratio < 1"),
        ("pref_bta: 0.2", "pref_bta: unknown key; did you mean pref_beta? (line 6)"),
        ("beta: 0.2", "did you mean pref_beta?"),
        ("zzzzqqqqxxxx: 1", "unknown key; docs/keys.md lists all keys"),
        ("1: x", "1: unknown key"),
        ("[a]: x", "?: unknown key"),
        ("<<: {seed: 1}", "<<: unknown key"),
        ("a.b: 1", "a.b: unknown key"),
        ("dataset: again", "dataset: given more than once (lines 4 and 6)"),
        ("stage.x: 1", "is not a mapping that stage.x could be set in"),
    ],
)
def test_one_problem_is_named(problems, line, message):
    (problem,) = problems(line)
    assert message in problem


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_stages_that_learn_no_preference_are_refused(problems, stage):
    (problem,) = problems(base=MINIMAL.replace("dpo", stage))
    assert problem == (
        f"stage: {stage} is not in this version of prefkit: write dpo or kto or rm or ppo (line 2)"
    )


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("finetuning_type: oft", "lora or freeze or full"),
        ("rope_scaling: dynamic", "linear or yarn or llama3"),
        ("flash_attn: fa3", "auto or disabled or sdpa or fa2"),
    ],
)
def test_other_values_of_llama_factory_are_not_here_yet(problems, line, instead):
    assert problems(line) == [f"{line} is not in this version of prefkit: write {instead} (line 6)"]


def test_required_keys_and_their_examples(problems):
    assert problems(base="do_train: true\ndataset: a\n") == [
        "model_name_or_path: missing; write model_name_or_path: Qwen/Qwen3-8B",
        "stage: missing; write stage: dpo",
        "output_dir: missing; write output_dir: saves/my-run",
    ]


def test_a_misspelt_key_is_not_missing_too(problems):
    found = problems(base=MINIMAL.replace("stage", "stagge").replace("dataset", "datset"))
    assert [problem.split(";")[0] for problem in found] == ["stagge: unknown key", "datset: unknown key"]


def test_all_problems_come_at_once_in_the_order_of_the_file(problems, tmp_path):
    found = problems("pref_bta: 1\nlora_rank: no\npacking: true\nfp16: true\nbf16: true\nseed: 1\nseed: 2")
    assert [problem.split(":")[0] for problem in found] == [
        "pref_bta", "lora_rank", "packing", "fp16", "seed"
    ]  # fmt: skip
    text = str(ConfigError(tmp_path / "run.yaml", found))
    assert text.splitlines()[0] == f"{tmp_path}/run.yaml: 5 problems"
    assert len(text.splitlines()) == 6


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("pref_beta=0.2", "pref_beta", 0.2),
        ("learning_rate=1e-5", "learning_rate", 1e-5),
        ("template=null", "template", None),
        ("run_name=a b = c: d # e", "run_name", "a b = c: d # e"),
        ("run_name='5'", "run_name", "5"),
        ("run_name=*x", "run_name", "*x"),
        ("lora_target=[a, b]", "lora_target", ("a", "b")),
        ("lora_target=a,b", "lora_target", ("a", "b")),
        ("bf16=yes", "bf16", True),
        ("cutoff_len=", "cutoff_len", 2048),
        ("template=", "template", None),
        ("dataset=a,b", "dataset", ("a", "b")),
        ("dataset= a , b ", "dataset", ("a", "b")),
        ("dataset=my pairs/a.jsonl,b", "dataset", ("my pairs/a.jsonl", "b")),
        ("lora_target=[q_proj,v_proj]", "lora_target", ("q_proj", "v_proj")),
        ("ref_model=null", "ref_model", None),
        ("ref_model=~", "ref_model", None),
        ("ref_model=", "ref_model", None),
        ("enable_thinking=null", "enable_thinking", None),
        (" pref_beta = 0.2 ", "pref_beta", 0.2),
        (
            'default_system=Be brief. Say "no": or yes, 1 = 1',
            "default_system",
            'Be brief. Say "no": or yes, 1 = 1',
        ),
        ("lr_scheduler_kwargs={a: 1}", "lr_scheduler_kwargs", {"a": 1}),
        ("lr_scheduler_kwargs.num_cycles=2", "lr_scheduler_kwargs", {"power": 1, "num_cycles": 2}),
        ("lr_scheduler_kwargs.power=2", "lr_scheduler_kwargs", {"power": 2}),
        ("accelerator_config.zero.stage=2", "accelerator_config", {"zero": {"stage": 2}}),
    ],
)
def test_overrides(load, override, key, value):
    assert one_value(load, "template: x\nlr_scheduler_kwargs: {power: 1}", key, override) == value


def test_a_later_override_wins(load):
    assert one_value(load, "seed: 1", "seed", "seed=2", "seed=3") == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--pref_beta=0.2"], "pref_beta: write pref_beta=0.2, without dashes (command line)"),
        (["--pref_beta", "0.2"], "pref_beta: write pref_beta=0.2, without dashes (command line)"),
        (["--bf16", "seed=1"], "bf16: write bf16=value, without dashes (command line)"),
        (["bf16"], "bf16: write bf16=value (command line)"),
        (["pref_bta=0.2"], "pref_bta: unknown key; did you mean pref_beta? (command line)"),
        (["lora_target=[a"], "lora_target: its value is not valid YAML (command line)"),
        (["lora_target=[*a]"], "lora_target: its value is not valid YAML (command line)"),
        (["seed.x=1"], "seed: is not a mapping that seed.x could be set in (command line)"),
        (
            ["accelerator_config=ds.json", "accelerator_config.x=1"],
            "accelerator_config: is not a mapping that accelerator_config.x could be",
        ),
        (
            ["accelerator_config.x=1", "accelerator_config.x.y=1"],
            "accelerator_config: holds no mapping that accelerator_config.x.y could be",
        ),
        (["lr_scheduler_kwargs.x=yes"], "lr_scheduler_kwargs: holds yes"),
    ],
)
def test_wrong_overrides(problems, overrides, message):
    (problem,) = problems("", *overrides)
    assert message in problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "stage: [dpo\n", "is not valid YAML: expected ',' or ']', but got '<stream end>' (line 2"),
        ("a.yaml", "a: b: c\n", "is not valid YAML: mapping values are not allowed here (line 1, column 5)"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "is not valid YAML: but found another document (line 2, column 1)"),
        ("a.yaml", "a: *b\n", "is not valid YAML: found undefined alias 'b'"),
        ("a.yaml", "a: \x07\n", "is not valid YAML: special characters are not allowed"),
        ("a.yaml", "", "is not a mapping"),
        ("a.yaml", "- a\n", "is not a mapping"),
        ("a.yaml", "dpo\n", "is not a mapping"),
        ("a.yaml", "a: " + "[" * 900, "is nested too deeply"),
        ("a.yaml", "#" * 300_000, "300,000 bytes are too many for a config"),
        ("a.json", "{\n", "is not valid JSON: Expecting property name enclosed in double quotes (line 2, "),
        ("a.json", "[1]", "is not an object"),
        ("a.txt", "stage: dpo\n", "a config is a .yaml, .yml or .json file"),
    ],
)  # fmt: skip
def test_unreadable_files(problems, name, content, message):
    (problem,) = problems(base=content, name=name)
    assert message in problem


def test_missing_file_folder_and_wrong_encoding(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes("run_name: caf\xe9".encode("latin-1"))
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    for name in ("none.yaml", "folder.yaml", "latin.yaml", "latin.json"):
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "value",
    [
        "&a [*a]",
        "[" * 30 + "]" * 30,
        "{a: &a [x,x,x,x,x,x,x,x,x,x], b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], "
        "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], d: [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]}",
    ],
)
def test_alias_bombs_are_bounded(problems, value):
    (problem,) = problems("lr_scheduler_kwargs: " + value)
    assert "too large or too deep" in problem


def test_no_damage_to_a_file_ends_in_another_error(tmp_path):
    dice, path = random.Random(0), tmp_path / "run.yaml"
    for _ in range(300):
        content = bytearray((MINIMAL + "lr_scheduler_kwargs: {a: [1]}\nbf16: true\n").encode())
        for _ in range(dice.randint(1, 4)):
            content.insert(dice.randrange(len(content)), dice.choice(b"&*![]{}:\"'|>%@`\t\n#-? ,\x00\xff"))
            del content[dice.randrange(len(content))]
        path.write_bytes(content)
        try:
            load_config(path)
        except ConfigError as error:
            assert error.problems


def test_a_plain_alias_is_fine(load):
    assert one_value(load, "run_name: &n mine\nhub_model_id: *n", "hub_model_id") == "mine"


def test_json(load, problems):
    values = {
        "model_name_or_path": "m",
        "stage": "dpo",
        "do_train": True,
        "dataset": ["a"],
        "output_dir": "o",
    }
    more = values | {
        "learning_rate": 1e-6,
        "template": None,
        "run_name": "no",
        "accelerator_config": {"a": [1]},
    }
    config = load(base=json.dumps(more), name="run.json").config
    assert (config.value("learning_rate"), config.value("run_name")) == (1e-6, "no")
    assert config.training["accelerator_config"] == {"a": [1]}
    text = json.dumps(values)[:-1]
    assert problems(base=text + ', "stage": "dpo"}', name="a.json") == ["stage: given more than once"]
    (problem,) = problems(base=text + ', "bf16": "yes", "seed": NaN}', name="a.json")[:1]
    assert problem.startswith("bf16: true or false is wanted")
    (problem,) = problems(base=text + ', "accelerator_config": {"a": 1, "a": 2}}', name="a.json")
    assert problem == "accelerator_config: a is given twice in its mapping"


def test_null_and_off_foreign_keys_say_nothing(load):
    lines = "quantization_bit: null\nref_model:\nstreaming: false\npacking: null\nuse_unsloth: off\n"
    assert (
        load(lines + "hf_hub_token: ''\naudio_sampling_rate: 16000\nskip_special_tokens: yes").warnings == ()
    )


def test_ignored_keys_come_in_one_warning(load):
    lines = "use_ipex: true\nlength_penalty: 2.0\nlow_cpu_mem_usage: false\naudio_sampling_rate: 8000"
    assert load(lines).warnings == (
        "ignored: use_ipex, low_cpu_mem_usage (concerns speed or memory only); length_penalty (belongs to "
        "num_beams); audio_sampling_rate (sound is not in this version, and rows without need no such key)",
    )


def test_keys_of_other_verbs_come_before_ignored_ones_in_a_warning_of_their_own(load):
    assert load("pissa_convert: true\ntop_k: 5\nexport_dir: out").warnings == (
        "without effect: top_k (needs stage: ppo)",
        "not used here: export_dir",
        "ignored: pissa_convert (decided by prefkit itself)",
    )


def test_refused_keys(problems):
    found = problems("shift_attn: true\ninit_special_tokens: desc_init\nevaluation_strategy: steps")
    assert [problem.split(":")[0] for problem in found] == [
        "shift_attn",
        "init_special_tokens",
        "evaluation_strategy",
    ]
    assert "write eval_strategy" in found[2]


def test_warmup_ratio_becomes_warmup_steps(load):
    config = load("warmup_ratio: 0.1").config
    assert config.training["warmup_steps"] == 0.1
    assert "warmup_ratio" not in config.training
    assert load("warmup_ratio: 0\nwarmup_steps: 20").config.training["warmup_steps"] == 20


def test_lora_alpha_is_twice_the_rank_unless_given(load):
    assert load("lora_rank: 6").config.tuning.lora_alpha == 12
    assert load("lora_rank: 6\nlora_alpha: 6").config.tuning.lora_alpha == 6
    assert load("lora_rank: 6\nlora_alpha: null").config.tuning.lora_alpha == 12


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "enable_thinking: null\nwarmup_ratio: 0.1\nlearning_rate: 5e-6\nsave_steps: 0.25\nbf16: true",
        "run_name: '5e-6'\nhub_model_id: 'no'\ndefault_system: '1_000'\ntemplate: '12:30'\nproject: 'null'",
        "default_system: \"a: b # c\\n\\td \\u00e9\\u4e2d 'x'\"\nrun_name: ' '\ntemplate: '2024-01-01'",
        "lr_scheduler_kwargs: {a: [1, {b: 'yes'}], c: null, d: 1.0e+20}\nreport_to: [wandb]",
        "eval_dataset: a,b\nlora_target: q_proj\nadditional_target: head\nmax_samples: 5\nld_alpha: 0.5",
        "finetuning_type: freeze\nfreeze_trainable_layers: -3\nfreeze_extra_modules: norm\npure_bf16: true",
        "adapter_name_or_path: a,b\ncreate_new_adapter: true\nadd_special_tokens: [<x>, '5']\n"
        "ref_model: r\nref_model_adapters: c\nref_cache: false\nquantization_bit: null\nrope_scaling: yarn",
    ],
)
def test_a_saved_config_loads_as_itself(load, lines):
    config = load(lines).config
    again = load(base=dump_yaml(config.to_yaml_dict()))
    assert again.config == config
    assert again.warnings == ()
    assert load(base=json.dumps(config.to_yaml_dict()), name="run.json").config == config


def test_every_type_survives_saving(load):
    """Whatever the default of a key, writing it out and reading it back changes nothing."""
    config = load().config
    assert set(config.to_yaml_dict()) == {
        name for name, key in KEYS.items() if key.group not in ("training", "export")
    } | {"do_train", "output_dir"}  # fmt: skip
    assert yaml.safe_load(dump_yaml(config.to_yaml_dict())) == config.to_yaml_dict()


TEN_MISTAKES = """\
pref_bta: 0.2
stage: dpo
dataset: pairs
do_train: true
learning_rate: 1e-6x
lora_rank: ${env:NOT_SET_ANYWHERE}
run_name: ${lora_rnak}
bf16: maybe
fp16: 12:30
packing: true
eval_strategy: off
val_size: 1
hf_hub_token: hf_abcdefghijklmnopqrstuvwxyz
dataset: again
"""


def test_ten_mistakes_are_told_before_torch_could_be_imported(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(TEN_MISTAKES)
    code = (
        "import sys, time; start = time.process_time()\n"
        "from prefkit.config import ConfigError, load_config\n"
        "try: load_config(sys.argv[1])\n"
        "except ConfigError as error: print(time.process_time() - start, *error.problems, sep='\\n')\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *found = done.stdout.splitlines()
    assert float(seconds) < 0.5
    assert [problem.partition(":")[0] for problem in found] == [
        *("pref_bta", "learning_rate", "lora_rank", "run_name", "bf16", "fp16", "packing", "eval_strategy"),
        *("val_size", "hf_hub_token", "dataset", "model_name_or_path", "output_dir"),
    ]
