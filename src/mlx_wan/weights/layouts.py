"""Dialects of checkpoints: what others call our parameters, and which way round they keep their convolutions.

Inside this package parameters have the names of the official files and convolutions are channels last. A dialect is
a table of patterns; nothing else in the package knows other names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from mlx_wan.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dialect:
    """A naming of parameters.

    Attributes:
        name: how it is called in messages.
        pairs: (this dialect's pattern, official pattern); N stands for a number, * for any rest. Names that no
            pattern matches are the same in both.
    """

    name: str
    pairs: tuple[tuple[str, str], ...] = ()

    def to_official(self, name: str) -> str:
        """The official name of a parameter that this dialect calls `name`."""
        return _rename(name, self.pairs)

    def from_official(self, name: str) -> str:
        """What this dialect calls the parameter with the official `name`."""
        return _rename(name, tuple((official, own) for own, official in self.pairs))


OFFICIAL = Dialect("official")
# wan_model_mlx.safetensors, as the Wan2.2-mlx conversion script wrote it; its VAE and T5 files have official names.
WAN22_MLX = Dialect(
    "Wan2.2-mlx",
    (
        ("blocks.N.ffn.layer_0.*", "blocks.N.ffn.0.*"),
        ("blocks.N.ffn.layer_2.*", "blocks.N.ffn.2.*"),
        ("head.1.*", "head.head.*"),
        ("head_modulation", "head.modulation"),
    ),
)
DIALECTS = (OFFICIAL, WAN22_MLX)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(escaped.replace("N", r"(\d+)").replace(r"\*", "(.+)"))


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for source, target in pairs:
        if match := _pattern(source).fullmatch(name):
            parts = list(match.groups())[::-1]
            return re.sub(r"N|\*", lambda _, parts=parts: parts.pop(), target)
    return name


def detect_dialect(names: Iterable[str]) -> Dialect:
    """The dialect with most names of its own among `names`; the official one when there are none."""
    names = list(names)
    return max(DIALECTS, key=lambda dialect: sum(dialect.to_official(name) != name for name in names))


def official_names(names: Iterable[str]) -> dict[str, str]:
    """Each of `names` -> its official name.

    Raises:
        CheckpointError: two of them are the same parameter.
    """
    names = list(names)
    dialect = detect_dialect(names)
    renamed = {name: dialect.to_official(name) for name in names}
    seen: dict[str, str] = {}
    for name, official in renamed.items():
        if official in seen:
            raise CheckpointError(f"holds the same parameter twice, as {seen[official]} and {name}")
        seen[official] = name
    return renamed


# What is done to a tensor on its way into a module.
KEEP, TURN, SQUEEZE = "keep", "turn", "squeeze"


def fits(found: Shape, wanted: Shape) -> set[str]:
    """The ways in which a tensor of shape `found` can become one of shape `wanted`.

    TURN takes a convolution from torch's order (O, I, *kernel) to channels last (O, *kernel, I). SQUEEZE drops
    the ones torch keeps around the VAE's norm weights: (C, 1, 1, 1) -> (C,). A convolution of as many channels as
    its kernel is wide fits both KEEP and TURN.
    """
    ways: set[str] = set()
    if found == wanted:
        ways.add(KEEP)
    elif len(wanted) == 1 and tuple(n for n in found if n != 1) == tuple(n for n in wanted if n != 1):
        ways.add(SQUEEZE)
    is_convolution = len(wanted) in (4, 5) and len(found) == len(wanted)
    # One input channel and a kernel of one: both orders are the same numbers.
    if is_convolution and _turned(found) == wanted and not (found == wanted and found[1] == 1):
        ways.add(TURN)
    return ways


def _turned(shape: Shape) -> Shape:
    return (shape[0], *shape[2:], shape[1])


def plan_turns(found: Mapping[str, Shape], wanted: Mapping[str, Shape], usual: str | None = None) -> dict[str, str]:
    """What to do with each tensor, told by its shape; a tensor that fits no way is left out.

    Args:
        found, wanted: shapes by official name, in the file and in the module.
        usual: KEEP or TURN, what the file's origin promises; None if it promises nothing.

    Raises:
        CheckpointError: a convolution fits both ways, and neither the other convolutions of the file nor `usual`
            say which it is.
    """
    ways = {name: fits(shape, wanted[name]) for name, shape in found.items() if name in wanted}
    clear = {next(iter(w)) for name, w in ways.items() if len(w) == 1 and len(wanted[name]) >= 4}
    plan: dict[str, str] = {}
    for name, options in ways.items():
        if len(options) == 1:
            plan[name] = next(iter(options))
        elif options:
            choices = clear or ({usual} if usual else options)
            if len(choices) != 1:
                raise CheckpointError(
                    f"cannot tell whether {name} {found[name]} is channels first or last, "
                    "and the file's other convolutions do not settle it"
                )
            plan[name] = next(iter(choices))
    return plan


def turn(array: mx.array, way: str, wanted: Shape) -> mx.array:
    """Carries out one entry of `plan_turns`."""
    if way == TURN:
        return mx.contiguous(mx.moveaxis(array, 1, -1))
    return array.reshape(wanted) if way == SQUEEZE else array
