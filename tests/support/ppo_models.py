"""Tiny random models, prompts, a reward and a trainer for the tests of PPO.

Unlike tests/support/tiny_models.py, the tokenizer has ids that tests spell out: 0 pads, 1 ends,
3 and 4 open turns, 5 to 28 are words. The models are as small as an architecture allows, since a
test trains several of them.
"""

import random
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from selfcorrect.train.ppo import PPOConfig, PPOTrainer

WORDS = [f"w{i}" for i in range(24)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "Human:", "Assistant:"]
VOCABULARY = len(SPECIAL) + len(WORDS)
PADDING, END = 0, 1
TARGETS = range(5, 13)  # the tokens that `target_share` rewards
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Human: {{ m['content'] }} "
    "{% else %}Assistant: {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
NEOX = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LLAMA = {**NEOX, "num_key_value_heads": 1}
# Sliding windows narrower than the rows; tied and widened, these models would repeat the prompt.
WINDOWED = {**LLAMA, "head_dim": 8, "sliding_window": 4, "tie_word_embeddings": False}
SHAPES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gemma": {**LLAMA, "head_dim": 8},
    "gemma2": WINDOWED,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": END},
    "gpt_neox": NEOX,
    "gemma3_text": {**WINDOWED, "layer_types": ["sliding_attention", "full_attention"]},
}
EXPERTS = {
    **LLAMA, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2,
}  # fmt: skip
CRITICS = ("shared", "separate", "lora")


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", chat_template=TEMPLATE,
    )  # fmt: skip


def make_config(architecture: str, **more):
    ids = {"pad_token_id": PADDING, "eos_token_id": END}
    if architecture != "gpt2":
        ids["max_position_embeddings"] = 64
    shape = SHAPES.get(architecture, EXPERTS)
    return AutoConfig.for_model(architecture, vocab_size=VOCABULARY, **shape, **ids, **more)


def make_policy(architecture: str):
    """Return a random model with widened weights.

    Plain random models are near uniform. Wider weights make errors visible, and an adapter learns.
    """
    model = AutoModelForCausalLM.from_config(make_config(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        model.get_output_embeddings().weight.mul_(4)
    return model


def save_models(folder: Path) -> None:
    """Save a policy of each architecture (llama as `base`), and a classifier as `reward`."""
    torch.manual_seed(0)
    for architecture in SHAPES:
        make_policy(architecture).save_pretrained(folder / policy_name(architecture))
    config = make_config("llama", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    for path in folder.iterdir():
        make_tokenizer().save_pretrained(path)


def policy_name(architecture: str) -> str:
    return "base" if architecture == "llama" else architecture


def make_prompts(count: int = 24, plain: bool = False) -> Dataset:
    """Return prompts of one to eight words, as conversations or as rendered text."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(count)]
    if plain:
        return Dataset.from_dict({"prompt": [f"Human: {t} Assistant:" for t in texts]})
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in texts]})


def target_share(completion_ids, **_):
    """Return the share of target tokens in each completion: the reward."""
    return [sum(token in TARGETS for token in ids) / len(ids) for ids in completion_ids]


class RecordingReward:
    """`target_share`, with the prompts, completions and scores of each call in `calls`."""

    __name__ = "recording"

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, prompts, completion_ids, **_):
        scores = target_share(completion_ids)
        self.calls.append((prompts, completion_ids, scores))
        return scores


def make_args(folder: Path, **settings) -> PPOConfig:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,
        "max_completion_length": 6,
        "max_steps": 8,
        "learning_rate": 3e-3,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
    }
    return PPOConfig(**{**defaults, **settings})


def make_trainer(
    models: Path, folder: Path, critic: str = "shared", *, policy="base", reward=target_share,
    prompts: Dataset | None = None, tokenizer=None, lora: LoraConfig | None = None,
    callbacks: list[TrainerCallback] | None = None, **settings,
) -> PPOTrainer:  # fmt: skip
    """Return a trainer whose steps are two epochs of two minibatches of four rows.

    `policy` is a folder of `models` or a model. A critic "lora" comes with an adapter to train.
    """
    if critic == "lora" and lora is None:
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return PPOTrainer(
        str(models / policy) if isinstance(policy, str) else policy, reward,
        make_args(folder, critic=critic, **settings),
        train_dataset=make_prompts() if prompts is None else prompts,
        processing_class=tokenizer or make_tokenizer(), callbacks=callbacks, peft_config=lora,
    )  # fmt: skip


class Counters(TrainerCallback):
    """The public counters of `trainer` after each optimizer update: PPO step, episodes, tokens."""

    def __init__(self) -> None:
        self.trainer: PPOTrainer | None = None
        self.rows = []

    def on_step_end(self, args, state, control, **_):
        self.rows.append((self.trainer.ppo_step, self.trainer.episodes, self.trainer.tokens))


def copy_weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in trainer.model.state_dict().items()}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Assert that two state dicts are equal to the bit."""
    assert first and first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
