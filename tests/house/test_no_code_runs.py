"""No file that is read can run code: no pickle is loaded, and no model's own code unless asked.

The payload touches a file; `test_the_payload_is_live` shows that it would.
"""

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainingArguments

from selfcorrect.evaluate.prompts.dialogue import read_style, render
from selfcorrect.evaluate.prompts.stimuli import Turn
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.schema import Model
from selfcorrect.train.feedback.files import read_rows
from selfcorrect.train.planning.model_shape import _through_transformers, model_shape
from selfcorrect.train.ppo import PPOConfig, PPOTrainer
from selfcorrect.train.ppo.critic import load_reward_model
from selfcorrect.train.stages.policy import load_policy
from selfcorrect.train.trainers.guarded import GuardedTrainer, load_nested, save_nested
from tests.support import ROOT
from tests.support.tiny_models import tiny_model, tiny_tokenizer

torch.set_num_threads(1)

CODE = [
    path
    for folder in ("recipes", "evaluate", "train", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"),
    *("pd.read_pickle", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "torch.hub.load", "torch.jit.load", "importlib.import_module"),
}
SWITCHES = {"allow_pickle": True, "weights_only": False, "trust_remote_code": True, "shell": True}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "the payload ran"


def put_pickle(path: Path, mark: Path) -> None:
    torch.save({"weight": Payload(mark)}, path)


# ---- the source ------------------------------------------------------------------------------


def forbidden(tree: ast.AST) -> list[str]:
    """What of the source can unpickle, or run text as code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        found += [name for name in names if name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                found.append(ast.unparse(node.func))
            given = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            given = list(zip(keys, node.values, strict=True))
        else:
            given = []
        for name, value in given:
            wrong = SWITCHES.get(name or "")
            if wrong is not None and isinstance(value, ast.Constant) and value.value is wrong:
                found.append(f"{name}={wrong}")
    return found


def test_the_search_finds_what_it_is_to_find() -> None:
    for line in (
        "import pickle", "from joblib import load", "torch.load(p)", "eval(t)",
        "np.load(p, allow_pickle=True)", "f(weights_only=False)", "yaml.load(t, Loader=L)",
        "f(**{'trust_remote_code': True})",
    ):  # fmt: skip
        assert forbidden(ast.parse(line)), line
    assert not forbidden(ast.parse("model.eval(); yaml.safe_load(t); f(trust_remote_code=x)"))


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_unpickles_or_runs_text(path: Path) -> None:
    assert forbidden(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_every_loading_call_says_whose_code_may_run() -> None:
    """Left out, transformers asks on the terminal instead. peft's own class loads no code."""
    for path in CODE:
        if path.name.startswith(("bench", "drill")) or path.name == "learning_problems.py":
            continue  # they load what they have made themselves
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr != "from_pretrained":
                continue
            given = {keyword.arg for keyword in node.keywords}
            said = (
                given & {"trust_remote_code", None} or ast.unparse(node.func.value) == "PeftModel"
            )
            assert said, f"{path}:{node.lineno}"


def test_the_payload_is_live(mark: Path, tmp_path: Path) -> None:
    put_pickle(tmp_path / "evil.pt", mark)
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert mark.exists()


# ---- models ----------------------------------------------------------------------------------


def model_folder(folder: Path, model: Any = None) -> Path:
    (model or tiny_model()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def classifier(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)


def pickled_model(folder: Path, mark: Path) -> Path:
    put_pickle(model_folder(folder) / "pytorch_model.bin", mark)
    (folder / "model.safetensors").unlink()
    return folder


def pickled_shard(folder: Path, mark: Path) -> Path:
    """An index in the way of safetensors, whose shard is a pickle."""
    put_pickle(model_folder(folder) / "evil.bin", mark)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    shards = dict.fromkeys(tiny_model().state_dict(), "evil.bin")
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def pickled_adapter(folder: Path, mark: Path) -> Path:
    base = model_folder(folder / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    tuned = get_peft_model(tiny_model(), lora)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder / "adapter")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    put_pickle(folder / "adapter" / "adapter_model.bin", mark)
    return folder / "adapter"


def pickled_reward(folder: Path, mark: Path) -> Path:
    model_folder(folder, classifier(model_folder(folder / "base")))
    (folder / "model.safetensors").unlink()
    put_pickle(folder / "pytorch_model.bin", mark)
    return folder


def as_policy(path: Path) -> None:
    arguments = PPOConfig(str(path / "out"), use_cpu=True, report_to="none", max_steps=1)
    from datasets import Dataset

    PPOTrainer(
        str(path),
        lambda completions, **_: [0.0] * len(completions),
        arguments,
        train_dataset=Dataset.from_dict({"prompt": ["the doctor"] * 8}),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize(
    ("make", "read"),
    [
        (pickled_model, load_model),
        (pickled_model, lambda path: load_policy(str(path))),
        (pickled_model, as_policy),
        (pickled_shard, load_model),
        (pickled_shard, as_policy),
        (pickled_shard, lambda path: load_reward_model(str(path), torch.float32)),
        (pickled_adapter, load_model),
        (pickled_adapter, lambda path: load_reward_model(str(path), torch.float32)),
        (pickled_reward, lambda path: load_reward_model(str(path), torch.float32)),
    ],
)
def test_pickled_weights_are_refused_in_one_line_that_says_what_to_do(
    tmp_path: Path, mark: Path, make: Callable, read: Callable
) -> None:
    folder = make(tmp_path / "model", mark)
    with pytest.raises(InputError, match=r"convert them to safetensors|save the adapter as") as one:
        read(folder)
    assert "\n" not in str(one.value)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../other/x.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model")
    model_folder(tmp_path / "other")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny_model().state_dict(), name)}
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is not a file of this folder"):
        load_model(folder)


# ---- states to resume from -------------------------------------------------------------------


def tiny_trainer(folder: Path, steps: int) -> GuardedTrainer:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_strategy="no", lr_scheduler_type="cosine",
    )  # fmt: skip
    return GuardedTrainer(model=tiny_model(seed=1), args=arguments, train_dataset=rows)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    trainer = tiny_trainer(folder, 4)
    trainer.train()
    return folder / "checkpoint-2"


def test_a_state_holds_no_pickle_that_is_read_and_resumes_to_the_bit(
    state: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(state, tmp_path / "checkpoint-2")
    pickles = [path.name for path in copy.iterdir() if is_pickle(path)]
    assert pickles == ["training_args.bin"]
    (copy / "training_args.bin").unlink()
    tiny_trainer(tmp_path, 4).train(resume_from_checkpoint=str(copy))
    weights = "checkpoint-4/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (state.parent / weights).read_bytes()
    optimizers = (
        load_nested(f / "checkpoint-4/optimizer.safetensors") for f in (tmp_path, state.parent)
    )
    first, second = (one["state"][0]["exp_avg"] for one in optimizers)
    assert torch.equal(first, second) and first.abs().sum() > 0


def is_pickle(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04")


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin",
     "optimizer.bin", "critic/critic.bin", "default/adapter_model.bin"],
)  # fmt: skip
def test_a_pickle_put_into_a_state_is_refused_by_name(
    state: Path, tmp_path: Path, mark: Path, name: str
) -> None:
    copy = shutil.copytree(state, tmp_path / "checkpoint-2")
    (copy / name).parent.mkdir(exist_ok=True)
    put_pickle(copy / name, mark)
    with pytest.raises(InputError, match=f"{name}: a pickle, which could run code") as caught:
        tiny_trainer(tmp_path, 4).train(resume_from_checkpoint=str(copy))
    assert "\n" not in str(caught.value) and not mark.exists()


def test_training_arguments_in_a_state_are_never_read(
    state: Path, tmp_path: Path, mark: Path
) -> None:
    copy = shutil.copytree(state, tmp_path / "checkpoint-2")
    put_pickle(copy / "training_args.bin", mark)
    tiny_trainer(tmp_path, 3).train(resume_from_checkpoint=str(copy))
    assert not mark.exists()


def test_nested_values_come_back_as_they_were(tmp_path: Path) -> None:
    one = torch.arange(3.0)
    value = {
        "a": [1, 2.5, None, True, "text"], 7: (one, one, torch.tensor(3)), "nested": {"x": ()},
        "inf": float("inf"),
    }  # fmt: skip
    save_nested(tmp_path / "state.safetensors", value)
    again = load_nested(tmp_path / "state.safetensors")
    assert str(again) == str(value)
    with pytest.raises(InputError, match="missing or damaged"):
        load_nested(tmp_path / "none.safetensors")


@pytest.mark.parametrize("bytes_", [b"", b"\x80\x04.", pickle.dumps({"a": 1}), bytes(range(7, 71))])
def test_what_is_no_state_is_refused(tmp_path: Path, bytes_: bytes) -> None:
    (tmp_path / "optimizer.safetensors").write_bytes(bytes_)
    with pytest.raises(InputError, match="missing or damaged"):
        load_nested(tmp_path / "optimizer.safetensors")


# ---- code that comes with a model, a tokenizer, a data set, a template -------------------------


def with_code(folder: Path, mark: Path, of: str) -> Path:
    """A model folder whose configuration or tokenizer names a class in a file beside it."""
    model_folder(folder)
    if of == "generation":
        (folder / "custom_generate").mkdir()
        code = f"open({str(mark)!r}, 'w')\ndef generate(**_): pass\n"
        (folder / "custom_generate" / "generate.py").write_text(code)
        return folder
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    path = folder / ("config.json" if of == "model" else "tokenizer_config.json")
    content = json.loads(path.read_text())
    if of == "model":
        content["model_type"] = "evil"
        names = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
        content["auto_map"] = dict.fromkeys(names, "evil.Evil")
    else:
        content["tokenizer_class"] = "Evil"
        content["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("of", ["model", "tokenizer", "generation"])
def test_code_that_comes_with_a_model_runs_only_when_it_is_trusted_and_then_it_is_said(
    tmp_path: Path, mark: Path, of: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_code(tmp_path / "model", mark, of)
    if of == "generation":  # transformers has its own `generate` instead
        load_model(folder)
    else:
        with pytest.raises(InputError, match="trust_remote_code: true"):
            load_model(folder)
    assert not mark.exists()
    assert "trust_remote_code is on" not in caplog.text
    with suppress(Exception):  # the class does nothing useful, but it is run
        load_model(folder, trust_remote_code=True)
    assert mark.exists()
    assert f"{folder}: trust_remote_code is on" in caplog.text


def trusted(folder: Path) -> Model:
    return Model(name="m", path=str(folder), trust_remote_code=True)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: load_reward_model(str(folder), torch.float32),
        lambda folder: load_policy(str(folder), trust_remote_code=False),
        lambda folder: model_shape(trusted(folder), "models.0"),
        lambda folder: _through_transformers(trusted(folder), "models.0"),
        as_policy,
    ],
    ids=["reward", "policy", "plan", "plan from the hub", "trainer"],
)
def test_no_other_way_of_loading_runs_a_models_code(
    tmp_path: Path, mark: Path, read: Callable
) -> None:
    folder = with_code(tmp_path / "model", mark, "model")
    with pytest.raises((InputError, ValueError)):
        read(folder)
    assert not mark.exists()


def test_a_data_set_with_a_loading_script_is_refused(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(InputError, match=r"data\.preferences: .*script"):
        read_rows(str(folder), "data.preferences")
    assert not mark.exists()


TURNS = [Turn("human", "who went ?"), Turn("assistant", "")]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ namespace.__init__.__globals__['os'] }}",
    "{{ ('%s' | attr('__class__')).mro() }}",
    "{% set x = messages.append(1) %}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum.__globals__['os'] }}",
]


@pytest.mark.parametrize("template", ESCAPES)
@pytest.mark.parametrize("own", [False, True], ids=["of the model", "of one's own"])
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, template: str, own: bool) -> None:
    tokenizer = tiny_tokenizer()
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + template
    style = "chat"
    if own:
        (tmp_path / "own.jinja").write_text(text)
        style = read_style(str(tmp_path / "own.jinja"))
    else:
        tokenizer.chat_template = text
    with pytest.raises(InputError, match="the chat template refuses this dialogue") as caught:
        render(tokenizer, TURNS, style)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "more than 0.2 seconds"),
        ("{{ messages[0]['content'] * 1000000 }}", "more than the limit of 4,000,000"),
        ("{{ 1 // 0 }}", "refuses"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses"),
    ],
    ids=["range", "loops", "size", "error", "recursion"],
)  # fmt: skip
def test_a_template_without_measure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, template: str, said: str
) -> None:
    monkeypatch.setattr("selfcorrect.evaluate.prompts.dialogue.TEMPLATE_SECONDS", 0.2)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=said) as caught:
        render(tokenizer, TURNS, "chat")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
