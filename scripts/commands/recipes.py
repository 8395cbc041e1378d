"""`selfcorrect recipes`: the recipes that come with the package, and their JSON schema."""

import json
from typing import Annotated

import typer

from selfcorrect.recipes.load import (
    file_schema,
    load_measured,
    recipe_path,
    shipped_recipes,
    shipped_series,
)
from selfcorrect.recipes.series import Series

app = typer.Typer(no_args_is_help=True, help="List and show recipes, and their JSON schema.")


@app.command("list")
def list_() -> None:
    """List the shipped recipes and series with their description and models."""
    paths = [*shipped_recipes(), *shipped_series()]
    width = max(len(path.stem) for path in paths)
    for path in paths:
        recipe = load_measured(str(path))
        models = ", ".join(model.name for model in recipe.models)
        typer.echo(f"{path.stem:{width}} {recipe.description} [{models}]")


@app.command()
def show(recipe: str) -> None:
    """Print a recipe's file unchanged."""
    typer.echo(recipe_path(recipe).read_text(encoding="utf-8"), nl=False)


@app.command()
def schema(
    series: Annotated[bool, typer.Option("--series", help="That of a series instead.")] = False,
) -> None:
    """Print the JSON schema of recipes, with which editors complete and check them."""
    typer.echo(json.dumps(Series.model_json_schema() if series else file_schema(), indent=2))
