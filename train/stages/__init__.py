"""The stages of a job: base model, reward model, policy."""
