"""Several processes for one command: how they meet, agree and keep quiet."""

import argparse
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_wan.errors import UserError, WanError

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_wan.parallel.guard import Guard
    from mlx_wan.parallel.plan import Parallel
    from mlx_wan.weights.checkpoint import Checkpoint

SHARING = ("ulysses_size", "cfg_parallel", "dit_fsdp", "t5_fsdp")
LONGEST = 60  # characters of a value in a message


def add_sharing_flags(parser: argparse.ArgumentParser) -> None:
    """The official flags of several GPUs, and one for guidance."""
    group = parser.add_argument_group("processes: several for one video, started by mlx.launch (docs/distributed.md)")
    group.add_argument("--ulysses_size", type=int, default=1, metavar="N", help="processes that share the tokens")
    group.add_argument(
        "--cfg_parallel", action="store_true", help="the two passes of guidance at once, half of the processes each"
    )
    group.add_argument("--dit_fsdp", action="store_true", help="spread the transformer's weights over all processes")
    group.add_argument("--t5_fsdp", action="store_true", help="spread the text encoder's weights over all processes")


@dataclass(frozen=True)
class Crew:
    """The processes of a command, seen from one of them. world, guard: None where it is the only one."""

    parallel: "Parallel"
    world: "mx.distributed.Group | None" = None
    guard: "Guard | None" = None

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.world is None else self.world.size()

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.world is None or self.world.rank() == 0

    def same_seed(self, seed: Any, drawn: bool) -> int:
        """The first process's if it was drawn by each, else what was given."""
        return int(self.from_first(str(seed))) if drawn else seed

    def from_first(self, text: str) -> str:
        """The text that the first process has."""
        if self.world is None or self.guard is None:
            return text
        from mlx_wan.parallel.guard import tell_or_fail

        return tell_or_fail(self.world, self.guard.hosts, text)[0]

    def attempt(self, function: Callable[[], Any]) -> Any:
        """What the function returns; a WanError of one process is one of all, wherever in the function they are.

        Of these they may exchange what `from_first`, `same_seed` and `agree` do, and nothing else.
        """
        if self.world is None or self.guard is None:
            return function()
        from mlx_wan.parallel.guard import DisagreementError, tell_or_fail

        try:
            result = function()
        except DisagreementError:
            raise  # all have it
        except WanError as error:
            tell_or_fail(self.world, self.guard.hosts, failure=str(error))
            raise
        tell_or_fail(self.world, self.guard.hosts)
        return result

    def steady(self, is_steady: bool) -> None:
        """Says whether this process is among steps that take as long as those before: how soon it counts as hanging."""
        from mlx_wan.parallel.pulse import PATIENCE, PULSE, STEADY

        PULSE.patience = STEADY if is_steady else PATIENCE

    def agree(self, checkpoint: "Checkpoint", values: dict[str, Any]) -> None:
        """UserError, in all processes, if one was given another model or another value."""
        if self.world is None:
            return
        import mlx_wan
        from mlx_wan.fingerprint import model_fingerprint

        facts = {"version of mlx-wan": mlx_wan.__version__, "model": model_fingerprint(checkpoint)}
        self._check(facts | {name: _short(value) for name, value in values.items()})

    def same(self, values: dict[str, Any]) -> None:
        """UserError, in all processes, if one was given another value of these."""
        self._check({name: _short(value) for name, value in values.items()})

    def _check(self, facts: dict[str, str]) -> None:
        if self.world is None or self.guard is None:
            return
        from mlx_wan.parallel.guard import check_agreement

        check_agreement(self.world, facts, self.guard.hosts)

    def on_stop(self, function: Callable[[], None]) -> None:
        """Calls `function` if another process makes this one end."""
        if self.guard is not None:
            self.guard.on_stop(function)


@contextlib.contextmanager
def together(args: argparse.Namespace) -> Iterator[Crew]:
    """Meets the other processes, if there are any, and leaves together with them; all but the first print nothing.

    Raises UserError if their number is not what the flags ask for.
    """
    from mlx_wan.parallel.plan import ALONE, Parallel
    from mlx_wan.parallel.world import is_launched, meet

    sharing = {name: getattr(args, name) for name in SHARING}
    if args.ulysses_size < 1:
        raise UserError(f"--ulysses_size {args.ulysses_size}: must be at least 1")
    if not is_launched():
        yield Crew(Parallel(None, **sharing) if any(sharing.values()) else ALONE)
        return
    from mlx_wan.parallel.guard import DisagreementError, Guard, check_agreement

    world = meet()
    with Guard(world) as guard, _quiet(world.rank() > 0):
        check_agreement(world, {f"--{name}": str(value) for name, value in sharing.items()}, guard.hosts)
        try:
            parallel = Parallel(world, **sharing)
        except UserError as error:
            raise DisagreementError(str(error)) from None  # all processes find the same
        yield Crew(parallel, world, guard)


@contextlib.contextmanager
def alongside() -> Iterator[Crew]:
    """As `together` for a command whose work meets by `mx.distributed.init()`: training. All processes may print."""
    from mlx_wan.parallel.plan import ALONE
    from mlx_wan.parallel.world import is_launched, meet

    if not is_launched():
        yield Crew(ALONE)
        return
    from mlx_wan.parallel.guard import Guard

    world = meet()
    with Guard(world) as guard:
        yield Crew(ALONE, world, guard)


@contextlib.contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def _short(value: Any) -> str:
    """A value as messages show it; pictures and long texts by a hash."""
    if hasattr(value, "tobytes"):
        value = f"{value.size} {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:20]}… ({hashlib.sha256(text.encode()).hexdigest()[:16]})"
