"""Items, conditions and dialogues: what a model is asked, and as which tokens."""
