"""What tests share beside fixtures: tiny models, recorded runs, rows of answers."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
