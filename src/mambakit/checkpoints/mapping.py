"""Which of their tensors are which of ours: rows of names, read in both directions.

    Row("backbone.blocks.{i}.norm.weight", "backbone.layers.{i}.norm.weight")
    Row("backbone.blocks.{2i+1}.in_proj.weight", ("layers.{i}.up.weight", "layers.{i}.gate.weight"), CONCAT)

In our name `{i}`, `{2i}` or `{2i+1}` is the number of a block, which fixes their layer `{i}`; or `{n}`, and
their layer counts the blocks of the row's kind before it. A trailing `*` is any rest, which theirs repeats.
`{e}` in their name counts from 0 to the size of our first axis. A row may hold for blocks of one kind only.
A model's own names are looked up in the rows, so that one list serves loading and saving, and a name that
no row or two rows explain is an error in the family's file.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from mambakit.checkpoints.transforms import SAME, Transform

_NUMBER = re.compile(r"\{(?:n|(\d*)i(?:\+(\d+))?)\}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of ours and what it is called elsewhere.

    Attributes:
        ours: Name in our model.
        theirs: Name, or names, in the published file.
        transform: How their tensors become ours.
        kind: Tag of the mixers for whose blocks the row holds; any by default.
        keeps_type: Whether it is written in its own type, whatever the others are written in.
    """

    ours: str
    theirs: str | Sequence[str]
    transform: Transform = SAME
    kind: str | None = None
    keeps_type: bool = False

    def match(self, name: str, kinds: Sequence[str]) -> tuple[int | None, str] | None:
        """Their layer and the rest that `*` stands for if this row explains a name of ours, else None."""
        found = _pattern(self.ours).fullmatch(name)
        if found is None:
            return None
        layer, groups = None, found.groupdict()
        if "block" in groups:
            block = int(groups["block"])
            times, plus = _numbers(self.ours)
            if (block - plus) % times or block < plus or (self.kind and kinds[block] != self.kind):
                return None
            counted = "{n}" in self.ours
            layer = kinds[:block].count(self.kind) if counted else (block - plus) // times
        return layer, groups.get("rest", "")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a tensor of ours comes from.

    Attributes:
        names: Their names, in the order in which `transform` joins them.
        transform: How they become ours.
        keeps_type: Whether it is written in its own type.
    """

    names: tuple[str, ...]
    transform: Transform
    keeps_type: bool = False


def sources(
    rows: Iterable[Row], shapes: Mapping[str, Sequence[int]], kinds: Sequence[str]
) -> dict[str, Source]:
    """Find out where every tensor of a model comes from.

    Args:
        rows: The rows of a family.
        shapes: Name -> shape of every tensor of ours.
        kinds: Tag of each block's mixer, in order.

    Returns:
        Our name -> its source, in the order of `shapes`.

    Raises:
        ValueError: A name that no row explains, or more than one, or a name of theirs that is used twice.
    """
    rows, found, users = tuple(rows), {}, {}
    for name, shape in shapes.items():
        matches = [(row, match) for row in rows if (match := row.match(name, kinds)) is not None]
        if len(matches) != 1:
            raise ValueError(f"{name} is explained by {len(matches)} rows of the family, expected one")
        row, (layer, rest) = matches[0]
        patterns = (row.theirs,) if isinstance(row.theirs, str) else tuple(row.theirs)
        filled = [p.replace("{i}", str(layer)).replace("*", rest) for p in patterns]
        names = tuple(p.replace("{e}", str(e)) for p in filled for e in range(shape[0] if "{e}" in p else 1))
        for theirs in names:
            if theirs in users:
                raise ValueError(f"{theirs} is the source of both {users[theirs]} and {name}")
            users[theirs] = name
        found[name] = Source(names, row.transform, row.keeps_type)
    return found


@functools.cache
def _pattern(ours: str) -> re.Pattern[str]:
    text = re.escape(_NUMBER.sub("\0", ours)).replace(re.escape("\0"), r"(?P<block>\d+)")
    return re.compile(text.replace(r"\*", r"(?P<rest>.+)"))


@functools.cache
def _numbers(ours: str) -> tuple[int, int]:
    times, plus = _NUMBER.search(ours).groups()
    return int(times or 1), int(plus or 0)
