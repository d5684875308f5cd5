"""Recipes: their schema, how they are read, and what is wrong with them in words."""

from lpvit_cli.recipe.schema import Recipe

__all__ = ["Recipe"]
