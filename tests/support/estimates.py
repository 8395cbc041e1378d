"""A recipe, feedback and a model shape whose estimates can be computed by hand."""

from typing import Any

from selfcorrect.recipes.load import apply_override, check_recipe
from selfcorrect.recipes.schema import Recipe
from selfcorrect.train.planning.feedback import FeedbackFacts
from selfcorrect.train.planning.settings import Lengths

LENGTHS = Lengths(100.0, 200, 30.0, 60)
FACTS = FeedbackFacts(1000, 1000, LENGTHS, "made up")
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10}  # fmt: skip


def recipe_with(method: str = "ppo", lora: dict[str, Any] | None = None, **trainer: Any) -> Recipe:
    """Return a recipe whose policy is trained by `method` with these `trainer:` keys."""
    policy = {"method": method, "steps": 10, "checkpoints": [0, 10]}
    content = {
        "name": "made",
        "models": [{"name": "m", "path": "somewhere"}],
        "data": {"preferences": {"path": "none", "limit": 1000}},
        "reward": {"trainer": {"per_device_train_batch_size": 2}},
        "policy": {**policy, "trainer": trainer, "lora": lora},
        "evaluate": {"attach": "off", "limit": 10},
    }
    return check_recipe(content, "made")


def overridden(recipe: Recipe, overrides: list[str]) -> Recipe:
    """Return the recipe with dotted overrides."""
    content = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(content, override)
    return check_recipe(content, "changed")
