"""`mambakit recipes`: what can be trained, at what cost, with what result."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from mambakit.cli.console import out
from mambakit.recipes import list_recipes


def recipes() -> None:
    """List the recipes with their hardware, cost and expected result."""
    table = Table(box=None, padding=(0, 2, 1, 0), title_justify="left")
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("what it trains, on what, for how long, and what to expect", overflow="fold")
    for recipe in list_recipes():
        if about := recipe.about:
            text = Text(f"{about.summary}\n")
            text.append(f"{about.hardware}; {about.cost}\n", style="dim")
            text.append(about.expected, style="green")
            table.add_row(recipe.name, text)
    out.print(table)
    out.print("Train one with:  mambakit train NAME [key=value ...]", markup=False, highlight=False)
