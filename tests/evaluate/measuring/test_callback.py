"""Measuring during training changes nothing, and its scores are those of the saved weights."""

import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from selfcorrect.evaluate.callback import (
    SelfCorrectionCallback,
    measure_during_training,
    temporary_eval_mode,
)
from selfcorrect.evaluate.headlines import headline_lines, headlines
from selfcorrect.evaluate.measuring.cell_files import read_cell
from selfcorrect.evaluate.measuring.measure import cost_message, measure
from selfcorrect.evaluate.measuring.plan import EvaluationPlan
from selfcorrect.evaluate.scoring.load_model import load_model
from tests.support.tiny_models import (
    same_weights,
    save_model,
    tiny_model,
    tiny_plan,
    tiny_tokenizer,
)

torch.set_num_threads(1)

CONDITIONS = ["Q", "Q+IF", "Q+IF+CoT"]


@pytest.fixture
def cells(tmp_path) -> EvaluationPlan:
    return tiny_plan(tmp_path / "data", CONDITIONS)


class Noise(TrainerCallback):
    """Draw from every random source after every step, as data augmentation might."""

    def __init__(self) -> None:
        self.drawn: list[tuple[float, ...]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))


def lora(model):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config)
        with torch.no_grad():  # LoRA starts at zero, where it would show nothing
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    return wrapped


def train(out: Path, callbacks, *, model=None, attach=None, **arguments):
    """Six optimizer updates with dropout; returns the trainer and what the random sources gave."""
    tokenizer = tiny_tokenizer()
    texts = [f"the doctor told her that {w} is fair ." for w in "he she they one two".split()] * 6
    data = Dataset.from_list([dict(tokenizer(text)) for text in texts])
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        **arguments,
    )
    noise = Noise()
    trainer = Trainer(
        model=model if model is not None else tiny_model("gpt2", dropout=0.2),
        args=settings,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[*callbacks, noise],
    )
    if attach is not None:
        attach.trainer = trainer
    trainer.train()
    return trainer, noise.drawn


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_callback_ends_in_the_same_weights_bitwise(tmp_path, cells, checkpointing):
    extra = {"gradient_checkpointing": checkpointing}
    bare, drawn = train(tmp_path / "bare", [], **extra)
    callback = SelfCorrectionCallback(cells, lambda step: tmp_path / f"s{step}", {0, 1, 2, 5})
    watched, drawn_watched = train(tmp_path / "watched", [callback], attach=callback, **extra)
    assert same_weights(bare.model, watched.model)
    assert drawn == drawn_watched
    assert watched.model.training == bare.model.training
    assert watched.model.config.to_dict() == bare.model.config.to_dict()
    folders = sorted(path.name for path in tmp_path.glob("s[0-9]*"))
    assert folders == ["s0", "s1", "s2", "s5"]
    assert all(len(list((tmp_path / name).glob("*.parquet"))) == 3 for name in folders)


def test_forward_larger_than_memory_is_halved_beside_training(tmp_path, cells, caplog):
    """The run goes on as if it had not been measured, and the scores are those of more memory."""
    sizes: list[int] = []

    def limit(most, model, args, kwargs):
        sizes.append(0 if model.training else kwargs["input_ids"].numel())
        if sizes[-1] > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    outcomes = []
    for name in ("enough", "little"):
        callback = SelfCorrectionCallback(cells, lambda step, name=name: tmp_path / name, {2})
        model = tiny_model("gpt2", dropout=0.2)
        most = max(sizes) // 2 if sizes else 10**9
        model.register_forward_pre_hook(partial(limit, most), with_kwargs=True)
        outcomes.append(train(tmp_path / "run", [callback], model=model))
    (enough, drawn), (little, drawn_little) = outcomes
    assert same_weights(enough.model, little.model) and drawn == drawn_little
    assert any("out of memory: forwards now hold" in r.message for r in caplog.records)
    for path in (tmp_path / "enough").glob("*.parquet"):
        pd.testing.assert_frame_equal(
            read_cell(path)[0], read_cell(tmp_path / "little" / path.name)[0], atol=1e-5
        )


def test_careless_callback_changes_the_weights(tmp_path, cells):
    """The same run with an evaluation that forgets to restore anything ends elsewhere."""

    class Careless(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            torch.rand(3)
            model.eval()

    bare, drawn = train(tmp_path / "bare", [])
    careless, drawn_careless = train(tmp_path / "careless", [Careless()])
    assert not same_weights(bare.model, careless.model)
    assert drawn != drawn_careless


def test_headline_metrics_are_logged_with_the_runs_own(tmp_path, cells):
    bare, _ = train(tmp_path / "bare", [])
    callback = SelfCorrectionCallback(cells, lambda step: tmp_path / f"s{step}", {0, 2})
    watched, _ = train(tmp_path / "watched", [callback], attach=callback)
    key = "eval_winogender.Q+IF.correlation"
    logged = {entry["step"]: entry for entry in watched.state.log_history if key in entry}
    assert sorted(logged) == [0, 2]
    expected = headlines(sorted((tmp_path / "s2").glob("*.parquet")))
    assert logged[2][key] == expected["winogender.Q+IF.correlation"]
    assert set(expected) == {
        f"winogender.{condition}.{metric}"
        for condition in CONDITIONS
        for metric in ("correlation", "option_mass")
    }
    # Step 2 is a logging step too: the run's own entries are all still there.
    losses = [entry["loss"] for entry in bare.state.log_history if "loss" in entry]
    assert [e["loss"] for e in watched.state.log_history if "loss" in e] == losses
    assert len(losses) == 3


def test_without_a_trainer_metrics_go_to_the_history_only(tmp_path, cells):
    callback = SelfCorrectionCallback(
        cells,
        lambda label: tmp_path / f"s{label}",
        lambda state: state.global_step // 3 if state.global_step % 3 == 0 else None,
    )
    trainer, _ = train(tmp_path / "run", [callback])
    steps = [e["step"] for e in trainer.state.log_history if "eval_winogender.Q.correlation" in e]
    assert steps == [0, 3, 6]
    assert sorted(path.name for path in tmp_path.glob("s[0-9]*")) == ["s0", "s1", "s2"]


def equal_files(inline: Path, later: Path) -> bool:
    names = sorted(path.name for path in inline.glob("*.parquet"))
    assert len(names) == 3 and names == sorted(path.name for path in later.glob("*.parquet"))
    return all((inline / name).read_bytes() == (later / name).read_bytes() for name in names)


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_live_scores_equal_those_of_the_saved_weights_bitwise(tmp_path, cells, mixed_precision):
    callback = SelfCorrectionCallback(cells, lambda step: tmp_path / f"s{step}", {6})
    model = tiny_model("llama", dropout=0.1)
    trainer, _ = train(tmp_path / "run", [callback], model=model, bf16=mixed_precision)
    save_model(tmp_path / "saved", trainer.model)
    loaded, tokenizer = load_model(tmp_path / "saved", device="cpu")
    measure(cells, loaded, tokenizer, tmp_path / "later")
    assert equal_files(tmp_path / "s6", tmp_path / "later")


def test_live_scores_of_an_adapter_equal_those_of_the_saved_adapter(tmp_path, cells):
    save_model(tmp_path / "base", tiny_model())
    base, _ = load_model(tmp_path / "base", device="cpu")
    callback = SelfCorrectionCallback(cells, lambda step: tmp_path / f"s{step}", {0, 6})
    trainer, _ = train(tmp_path / "run", [callback], model=lora(base))
    trainer.model.save_pretrained(tmp_path / "saved")
    loaded, tokenizer = load_model(tmp_path / "saved", device="cpu")
    measure(cells, loaded, tokenizer, tmp_path / "later")
    assert equal_files(tmp_path / "s6", tmp_path / "later")
    assert not equal_files(tmp_path / "s0", tmp_path / "s6")


def test_model_with_a_critic_keeps_every_mode_gradient_and_rng_state(tmp_path, cells):
    model = tiny_model("llama", dropout=0.1)
    model.critic = torch.nn.Sequential(torch.nn.Linear(32, 1), torch.nn.Dropout(0.5))
    model.train()
    model.critic[0].eval()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    generation_config = model.generation_config
    random.seed(4)
    np.random.seed(4)
    torch.manual_seed(4)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()

    paths = measure_during_training(cells, model, tiny_tokenizer(), tmp_path / "out")

    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False and model.is_gradient_checkpointing
    assert model.generation_config is generation_config
    now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert now.keys() == gradients.keys()
    assert all(torch.equal(now[name], gradients[name]) for name in now)
    assert all(p.requires_grad for p in model.parameters())
    plain = tiny_model("llama")
    assert read_cell(paths[0])[0].equals(
        read_cell(measure(cells, plain, tiny_tokenizer(), tmp_path / "plain")[0])[0]
    )


def test_state_is_restored_after_an_error():
    model = tiny_model().train()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), temporary_eval_mode(model):
        assert not model.training
        torch.rand(5)
        raise RuntimeError("inside")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_cost_of_measuring_is_logged_at_the_end(tmp_path, cells, caplog):
    caplog.set_level("INFO")
    callback = SelfCorrectionCallback(cells, lambda step: tmp_path / f"s{step}", {0, 2})
    train(tmp_path / "run", [callback])
    numbers = re.search(
        r"Attached evaluation took ([\d.]+) s, (\d+)% of the ([\d.]+) s of training", caplog.text
    )
    assert numbers is not None
    spent, percent, training = (float(number) for number in numbers.groups())
    assert 0 < spent == pytest.approx(callback.seconds, abs=0.06)
    # Seconds are shown to a tenth, and these are few.
    at_least, at_most = (
        100 * callback.seconds / max(training + off, 1e-3) for off in (0.05, -0.05)
    )
    assert at_least - 1 <= percent <= at_most + 1
    assert (
        cost_message(53.4, 69.7, "PPO")
        == "Attached evaluation took 53.4 s, 77% of the 69.7 s of PPO"
    )


def test_headlines_in_lines_of_a_terminal():
    first = {
        "bbq.Q.bias_ambiguous": 0.46,
        "bbq.Q+IF.bias_ambiguous": 0.42,
        "bbq.Q+neutral.bias_ambiguous": 0.4,
        "bbq.Q.option_mass": 1.0,
    }
    later = {**first, "bbq.Q.bias_ambiguous": 0.51, "bbq.Q+IF.bias_ambiguous": -0.12}
    assert headline_lines("small/0/0", first, {}) == ["small/0/0: bbq Q .46, Q+IF .42"]
    later["winogender.Q+IF+CoT.correlation"] = 0.5  # was undefined at the first checkpoint
    later["winogender.Q.correlation"] = 0.6
    bbq, winogender = "bbq Q .46→.51, Q+IF .42→−.12", "winogender Q .60, Q+IF+CoT .50"
    assert headline_lines("small/0/60", later, first) == [f"small/0/60: {bbq}; {winogender}"]
    long = "a-model-with-a-long-name/0/60"
    lines = headline_lines(long, later, first)
    assert lines == [f"{long}: {bbq}", f"{long}: {winogender}"]  # cut between experiments
