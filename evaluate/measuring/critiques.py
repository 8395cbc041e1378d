"""Critiques by another model, from the cell in which it wrote them (condition `write critique`)."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from selfcorrect.evaluate.prompts.items import Item, LoadedItems
from selfcorrect.evaluate.prompts.stimuli import critique_field, option_orders, spelled
from selfcorrect.recipes.foundation.checksums import file_has_valid_checksum
from selfcorrect.recipes.foundation.errors import InputError

_COLUMNS = ["item", "order", "draw", "samples"]


def with_critiques(loaded: LoadedItems, path: Path, permutations: int) -> LoadedItems:
    """Return the items with the last text that the cell `path` has for each, as fields.

    There is one for each of the orders in which options are shown (`option_orders`). Of several
    draws the first counts. Raises InputError for a file that is missing, damaged, or lacks a text.
    """
    key = f"{path} (critiques in the stimuli)"
    if not path.is_file():
        raise InputError(f"{key}: not found; evaluate the critic under `write critique` first")
    try:
        if not file_has_valid_checksum(path):
            raise ValueError("checksum mismatch")
        texts = {
            (row["item"], row["order"]): row["samples"][-1].strip()
            for row in pq.read_table(path, columns=_COLUMNS).to_pylist()
            if row["samples"] and row["draw"] == 0
        }
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{key}: damaged, or not an evaluation file; evaluate the critic again"
        ) from None

    def criticised(item: Item) -> Item:
        fields = dict(item.fields)
        for order in option_orders(len(item.options), permutations):
            text = texts.get((item.id, spelled(order)))
            if not text:
                raise InputError(
                    f"{key}: has no text for item {item.id} in the order {spelled(order)}; "
                    "evaluate the critic with the same items and orders"
                )
            fields[critique_field(order)] = text
        return replace(item, fields=fields)

    return replace(loaded, items=[criticised(item) for item in loaded.items])
