"""What a step of several machines should take, from arithmetic: a model of costs, not a measurement.

    uv run python benchmarks/distributed_cost.py                    # Macs: 5B and A14B, Thunderbolt and Ethernet
    uv run python benchmarks/distributed_cost.py --tflops 12 --gbytes 3 --milliseconds 0.1    # your own machines

A step is two transformer calls (guidance). Each call: compute, divided among the ranks of a group by tokens; in every
block an all_gather of keys and one of values; and, with weights spread, one of the block's matrices. Decoding: divided
by rows, with an exchange of the rows at the edges before every convolution. Nothing overlaps here: keys and values are
exchanged beside other work, but on two H200s that hid only a sixth of it (docs/distributed.md).
"""

import argparse
import math
from dataclasses import dataclass

# Assumptions, to be replaced by measurements on the machines in question. TFLOPS: what one Mac reaches in bfloat16
# products of this size. Links: bytes a second that arrive at each machine while all exchange, and the time
# of one small exchange between neighbours. Thunderbolt 5 is 80 Gbit/s and Thunderbolt 4 is 40 by name.
TFLOPS = 15.0
LINKS = {
    "Thunderbolt 5": (6.0e9, 50e-6),
    "Thunderbolt 4": (3.0e9, 100e-6),
    "10 Gb Ethernet": (1.1e9, 200e-6),
    "1 Gb Ethernet": (0.11e9, 300e-6),
}
MACHINES = (1, 2, 4, 8, 16)
BYTES = 2  # of a value in bfloat16
PAYS = 0.5  # efficiency below which another machine is called a waste: half of its time is spent on waiting


@dataclass(frozen=True)
class Model:
    """Dimensions of a transformer, a clip's grid of tokens, and TFLOP of decoding one latent frame (0: not counted).

    edges: bytes that a rank sends of its rows at the edges for each latent frame, in `EXCHANGES` exchanges.
    """

    name: str
    dim: int
    ffn_dim: int
    layers: int
    grid: tuple[int, int, int]
    decode_tflop: float
    steps: int
    text_len: int = 512
    edges: float = 0.0

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def weights(self) -> int:
        """Values in the matrices of one block."""
        return 8 * self.dim**2 + 2 * self.dim * self.ffn_dim

    def flop(self) -> float:
        """Of one call: products with matrices, and attention to all tokens and to the text."""
        length, dim = self.tokens, self.dim
        # query and output twice, key and value once for the tokens; key and value of cross-attention for the text
        products = 2 * length * (6 * dim**2 + 2 * dim * self.ffn_dim) + 2 * self.text_len * 2 * dim**2
        attention = 4 * length * dim * (length + self.text_len)
        return self.layers * (products + attention)


# The decoder: 57 TFLOP a latent frame of the 5B at 1280x704, counted from its convolutions, and 89 MB of rows in
# bfloat16, from their shapes. For the A14B's there is no count here: left out.
EXCHANGES = 33
MODELS = (
    Model("TI2V-5B, 1280x704, 121 frames", 3072, 14336, 30, (31, 22, 40), 57.0, 50, edges=89.2e6),
    Model("A14B, 1280x720, 81 frames", 5120, 13824, 40, (21, 45, 80), 0.0, 40),
)


@dataclass(frozen=True)
class Machines:
    """count machines of `tflops` each, on a link of `rate` bytes a second into each and `latency` seconds a hop."""

    count: int
    tflops: float
    rate: float
    latency: float


def gather_seconds(machines: Machines, ranks: int, nbytes: float) -> float:
    """An all_gather in a ring: every rank receives the parts of all others, one after the other."""
    if ranks == 1:
        return 0.0
    return nbytes * (ranks - 1) / ranks / machines.rate + (ranks - 1) * machines.latency


@dataclass(frozen=True)
class Step:
    """Seconds of a step: compute, keys and values, weights."""

    compute: float
    tokens: float
    weights: float

    @property
    def seconds(self) -> float:
        return self.compute + self.tokens + self.weights


def step(model: Model, machines: Machines, guidance: bool = False, spread: bool = False) -> Step:
    """One step. guidance: the two passes at the same time, half of the machines each (an even number of them).

    Where groups cannot be split (ring, JACCL), keys and values of both groups reach all machines.
    """
    ranks = machines.count // 2 if guidance else machines.count
    passes = 1 if guidance else 2
    frame = model.grid[1] * model.grid[2]
    busiest = math.ceil(frame / ranks) / frame  # the rank with the largest share keeps the others waiting
    compute = passes * model.flop() * busiest / (machines.tflops * 1e12)
    exchanged = model.tokens * model.dim * BYTES  # keys of a block, or values
    reached = machines.count if ranks > 1 else 1
    gather = 2 * gather_seconds(machines, reached, exchanged * reached / ranks)
    block = gather_seconds(machines, machines.count, model.weights * BYTES) if spread else 0.0
    return Step(compute, passes * model.layers * gather, passes * model.layers * block)


def decode_seconds(model: Model, machines: Machines) -> float:
    """Decoding a clip with rows shared by all machines."""
    rows = 2 * model.grid[1]  # of latents; patches are 2x2
    busiest = math.ceil(rows / machines.count) / rows
    sent = gather_seconds(machines, machines.count, model.edges * machines.count)
    sent += (EXCHANGES - 1) * gather_seconds(machines, machines.count, 0)
    return model.grid[0] * (model.decode_tflop * busiest / machines.tflops + sent)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict the time of a step on several machines.")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="of one machine (%(default)s)")
    parser.add_argument("--gbytes", type=float, help="of a link of your own: GB/s into each machine")
    parser.add_argument("--milliseconds", type=float, default=0.1, help="of one exchange between neighbours on it")
    args = parser.parse_args()
    links = LINKS if args.gbytes is None else {"your link": (args.gbytes * 1e9, args.milliseconds / 1e3)}
    for model in MODELS:
        call, block = model.flop() / 1e12, model.weights * BYTES / 1e6
        exchanged = 2 * model.tokens * model.dim * BYTES / 1e6
        print(f"\n{model.name}: {call:.0f} TFLOP a call, two calls a step; a block has {block:.0f} MB of weights")
        print(f"and {exchanged:.0f} MB of keys and values; one machine of {args.tflops:g} TFLOP/s")
        for link, (rate, latency) in links.items():
            print(f"\n| {link} | tokens | + guidance | tokens, weights spread | + guidance | whole video |")
            print("|---|---|---|---|---|---|")
            for count in MACHINES:
                machines = Machines(count, args.tflops, rate, latency)
                print(f"| {count} | {' | '.join(cells(model, machines))} |")


def cells(model: Model, machines: Machines) -> list[str]:
    """Seconds a step and efficiency for each way of sharing, and the speed-up of a whole video with its decoding."""
    alone = step(model, Machines(1, machines.tflops, machines.rate, machines.latency)).seconds
    found, best = [], math.inf
    for spread in (False, True):
        for guidance in (False, True):
            if machines.count == 1 and (guidance or spread):
                found.append("")
                continue
            seconds = step(model, machines, guidance, spread).seconds
            best = min(best, seconds)
            efficiency = alone / seconds / machines.count
            found.append(f"{seconds:.1f} s ({efficiency:.0%}{'' if efficiency >= PAYS else ', no'})")
    if not model.decode_tflop:
        return [*found, "not counted"]
    one = Machines(1, machines.tflops, machines.rate, machines.latency)
    whole = model.steps * alone + decode_seconds(model, one)
    return [*found, f"{whole / (model.steps * best + decode_seconds(model, machines)):.1f}x"]


if __name__ == "__main__":
    main()
