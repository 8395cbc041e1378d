"""Score BBQ answers that any other tool has collected."""
