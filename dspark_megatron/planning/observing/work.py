"""What a rank computes, moves and sends in a step: the measure that time is made of."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sent:
    """Equal collectives of one group, summed."""

    kind: str
    """`all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `broadcast`, `send`."""
    group: str
    """Its purpose in words: "draft, tensor-parallel"."""
    size: int
    """Ranks of the group."""
    span: int
    """Neighbouring ranks from its first to its last: what must fit into a node for the bytes to
    stay in it."""
    handed: int
    """Bytes that this rank hands over."""
    calls: int

    @property
    def sent(self) -> int:
        return ring_bytes(self.kind, self.handed, self.size)

    def times(self, count: int) -> "Sent":
        return replace(self, handed=count * self.handed, calls=count * self.calls)


def ring_bytes(kind: str, handed: int, group_size: int) -> int:
    """Bytes that a rank sends when the collective runs on a ring, from what it hands over: the
    measure in which an all-reduce is a reduce-scatter and an all-gather."""
    others = group_size - 1
    shares = {
        "all-reduce": 2 * others / group_size,
        "all-gather": others,
        "reduce-scatter": others / group_size,
        "all-to-all": others / group_size,
        "broadcast": min(others, 1),  # each passes it on
        "send": min(others, 1),
    }
    return round(handed * shares[kind])


@dataclass(frozen=True)
class Work:
    """Of one rank in one part of a step."""

    flops: int = 0
    """By the formulas of PyTorch's flop counter: matrix products and attention."""
    moved: int = 0
    """Bytes that operators read and write: a kernel that keeps a tensor in its cache moves less."""
    sent: tuple[Sent, ...] = ()

    def times(self, count: int) -> "Work":
        """Of as many equal micro-batches."""
        sent = tuple(one.times(count) for one in self.sent)
        return Work(count * self.flops, count * self.moved, sent)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops, self.moved + other.moved, summed((*self.sent, *other.sent))
        )


def summed(sent: tuple[Sent, ...]) -> tuple[Sent, ...]:
    """One for each kind and group."""
    found: dict[tuple, Sent] = {}
    for one in sent:
        key = one.kind, one.group, one.size, one.span
        other = found.get(key, replace(one, handed=0, calls=0))
        handed, calls = other.handed + one.handed, other.calls + one.calls
        found[key] = replace(one, handed=handed, calls=calls)
    return tuple(found.values())
