"""Which of their tensors are which of ours: rows of names, read in both directions.

    Row("backbone.blocks.{i}.norm.weight", "backbone.layers.{i}.norm.weight")
    Row("backbone.blocks.{2i+1}.in_proj.weight", ("layers.{i}.up.weight", "layers.{i}.gate.weight"), CONCAT)
    Row(("blocks.{i}.q.weight", "blocks.{i}.k.weight"), "layers.{i}.qk.weight", ROWS_APART)

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
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from mambakit.checkpoints.transforms import SAME, Fusion, Transform

_NUMBER = re.compile(r"\{(?:n|(\d*)i(?:\+(\d+))?)\}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of ours and what it is called elsewhere, or several of ours that are one elsewhere.

    Attributes:
        ours: Name in our model; names, where one tensor of theirs holds several of ours.
        theirs: Name, or names, in the published file.
        transform: How their tensors become ours; a `Fusion` with several names of ours.
        kind: Tag of the mixers for whose blocks the row holds; any by default.
        keeps_type: Whether it is written in its own type, whatever the others are written in.
    """

    ours: str | Sequence[str]
    theirs: str | Sequence[str]
    transform: Transform | Fusion = SAME
    kind: str | None = None
    keeps_type: bool = False

    def match(self, name: str, kinds: Sequence[str]) -> Match | None:
        """What the placeholders stand for if this row explains a name of ours, else None."""
        for pattern in _several(self.ours):
            found = _pattern(pattern).fullmatch(name)
            if found is None:
                continue
            groups = found.groupdict()
            if "block" not in groups:
                return Match(None, None, groups.get("rest", ""))
            block = int(groups["block"])
            times, plus = _numbers(pattern)
            if (block - plus) % times or block < plus or (self.kind and kinds[block] != self.kind):
                continue
            counted = "{n}" in pattern
            layer = kinds[:block].count(self.kind) if counted else (block - plus) // times
            return Match(block, layer, groups.get("rest", ""))
        return None


@dataclasses.dataclass(frozen=True)
class Match:
    """What the placeholders of a row stand for: our block, their layer, and the rest of the name."""

    block: int | None
    layer: int | None
    rest: str

    def ours(self, pattern: str) -> str:
        """A name of ours."""
        return _NUMBER.sub(str(self.block), pattern).replace("*", self.rest)

    def theirs(self, pattern: str, entries: int) -> Iterator[str]:
        """Names of theirs: one, or one for each entry of our first axis."""
        filled = pattern.replace("{i}", str(self.layer)).replace("*", self.rest)
        for entry in range(entries if "{e}" in pattern else 1):
            yield filled.replace("{e}", str(entry))


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a tensor of ours comes from.

    Attributes:
        names: Their names, in the order in which `transform` joins them.
        transform: How they become ours.
        keeps_type: Whether it is written in its own type.
        ours: Our tensors that are made of them: one, or several that theirs holds together.
        sizes: The sizes of their first axes.
    """

    names: tuple[str, ...]
    transform: Transform | Fusion
    keeps_type: bool = False
    ours: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def read(self, name: str, theirs: list[Tensor]) -> Tensor:
        """Make our tensor of this name from theirs.

        Raises:
            ValueError: Their shapes do not fit together (or a `RuntimeError` of PyTorch's).
        """
        if isinstance(self.transform, Transform):
            return self.transform.join(theirs)
        rows = theirs[0].shape[0] if theirs[0].ndim else 1
        if rows != sum(self.sizes):
            raise ValueError(f"has {rows} rows, expected {' + '.join(map(str, self.sizes))}")
        return self.transform.take_apart(theirs[0], self.sizes)[self.ours.index(name)]

    def write(self, ours: Mapping[str, Tensor]) -> list[Tensor]:
        """Make their tensors from ours."""
        if isinstance(self.transform, Transform):
            return self.transform.split(ours[self.ours[0]], len(self.names))
        return [self.transform.fuse([ours[name] for name in self.ours])]


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
        row, match = matches[0]
        ours = tuple(match.ours(pattern) for pattern in _several(row.ours))
        entries = shape[0] if len(shape) else 1
        names = tuple(one for pattern in _several(row.theirs) for one in match.theirs(pattern, entries))
        for theirs in names:
            if users.setdefault(theirs, ours) != ours:
                raise ValueError(f"{theirs} is the source of both {users[theirs][0]} and {name}")
        sizes = tuple(shapes[one][0] if len(shapes[one]) else 1 for one in ours)
        found[name] = Source(names, row.transform, row.keeps_type, ours, sizes)
    return found


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@functools.cache
def _pattern(ours: str) -> re.Pattern[str]:
    text = re.escape(_NUMBER.sub("\0", ours)).replace(re.escape("\0"), r"(?P<block>\d+)")
    return re.compile(text.replace(r"\*", r"(?P<rest>.+)"))


@functools.cache
def _numbers(ours: str) -> tuple[int, int]:
    times, plus = _NUMBER.search(ours).groups()
    return int(times or 1), int(plus or 0)
