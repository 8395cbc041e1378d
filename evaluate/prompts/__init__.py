"""Items, conditions and dialogues, and the tokens that a model gets of them."""
