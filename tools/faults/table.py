"""The faults: where they happen, to whom, and how the work goes on afterwards."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Layout(NamedTuple):
    ranks: int
    tensor_parallel: int
    micro_batch_size: int

    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor_parallel={self.tensor_parallel}",
            f"train.micro_batch_size={self.micro_batch_size}",
        ]

    def __str__(self) -> str:
        data_parallel = self.ranks // self.tensor_parallel
        return f"TP {self.tensor_parallel} DP {data_parallel} micro-batch {self.micro_batch_size}"


SPLIT = Layout(2, 2, 1)
OTHERS = (Layout(1, 1, 4), Layout(2, 1, 2), Layout(1, 1, 2), Layout(4, 2, 1), Layout(2, 1, 1))
"""Where what SPLIT has begun goes on."""
IN_BACKGROUND = "train.async_save=true"
NO_ROOM = r"(?m)^error: .*File too large.*make room"
DIFFER = "all ranks must have the same"


@dataclass(frozen=True)
class Fault:
    name: str
    command: str = "train"
    deed: str = ""
    """Of `faulty.DEEDS`."""
    place: str = ""
    """Of `faulty.PLACES`."""
    ranks: tuple[int, ...] = (1,)
    """Those that the fault is in."""
    call: int = 1
    start: Layout = SPLIT
    then: Layout = OTHERS[0]
    begins: str = ""
    """`half`: with a copy of a run that was killed after its checkpoint of half the steps."""
    damage: str = ""
    """Of `damage.DAMAGE`: what is done to that copy."""
    arguments: tuple[str, ...] = ()
    """Of all ranks."""
    others: dict = field(default_factory=dict)
    """What these ranks have instead: `arguments`, a folder `cwd`, the `root` of their code."""
    says: str = ""
    """A pattern that the words of the broken command must have, on one line."""
    way_out: tuple[str, ...] = ()
    """Arguments of the command that continues."""
    goes_on: bool = False
    """Whether the command is to end well in spite of the fault."""
    same_curve: bool = True
    """Whether the result must be that of an unbroken run."""
    second: bool = False
    """Whether the same command is started once more, meanwhile."""
    seconds: float = 600.0
    """After which it counts as hanging."""
    quick: bool = False
    """Whether `make test` has it."""


WHO = {"one rank": "kill", "all": "kill all", "the launcher": "kill launcher"}


def _kills() -> list[Fault]:
    """kill -9 of one, all and the launcher, at each place of a run."""
    places = {  # the rank that gets there, and at which call
        "load": (1, 1),
        "first batch": (1, 1),
        "step": (1, 5),
        "save": (1, 2),
        "shards written": (1, 2),
        "rename": (0, 2),
        "tracker": (0, 2),
    }
    found = []
    for number, (place, (rank, call)) in enumerate(places.items()):
        for offset, (who, deed) in enumerate(WHO.items()):
            found.append(
                Fault(
                    f"kill -9 of {who} at: {place}",
                    deed=deed,
                    place=place,
                    ranks=(rank,),
                    call=call,
                    then=OTHERS[(number + offset) % len(OTHERS)],
                    quick=(who, place) == ("all", "tracker"),
                )
            )
    return found


def _kills_in_background() -> list[Fault]:
    """kill -9 while a checkpoint is written and the run goes on, and while it gets its name."""
    places = {
        "save begun": (1, 2, WHO),
        "shards begun": (1, 2, WHO),
        "file of a checkpoint": (1, 3, WHO),
        "shards written": (1, 2, {"one rank": "kill"}),
        "rename": (0, 2, {"all": "kill all"}),
        "tracker": (0, 2, {"the launcher": "kill launcher"}),
    }
    return [
        Fault(
            f"kill -9 of {who} in a background save at: {place}",
            deed=deed,
            place=place,
            ranks=(rank,),
            call=call,
            then=OTHERS[number % len(OTHERS)],
            arguments=(IN_BACKGROUND,),
            quick=(who, place) == ("the launcher", "file of a checkpoint"),
        )
        for number, (place, (rank, call, whom)) in enumerate(places.items())
        for who, deed in whom.items()
    ]


def _other_kills() -> list[Fault]:
    places = (
        ("store", "file of a store", 2, Layout(2, 1, 1), WHO),
        ("evaluate", "decoding", 1, SPLIT, WHO),
        ("evaluate", "evaluation.json", 1, SPLIT, {"all": "kill all"}),
        ("export", "files of an export", 1, Layout(1, 1, 1), {"it": "kill"}),
        ("export", "rename of an export", 1, Layout(1, 1, 1), {"it": "kill"}),
    )
    return [
        Fault(
            f"kill -9 of {who} at: {place}",
            command,
            deed,
            place,
            ranks=(0,),
            call=call,
            start=start,
            then=Layout(1, 1, 1),
        )
        for command, place, call, start, whom in places
        for who, deed in whom.items()
    ]


ENDS = (
    Fault(
        "a rank stops (SIGSTOP) in a step",
        deed="stop",
        place="step",
        call=5,
        arguments=("train.timeout_minutes=0.2",),
        says=r"rank 1\b",
        then=OTHERS[1],
    ),
    Fault(
        "a process that writes a checkpoint is killed",
        deed="kill started",
        place="writer",
        goes_on=True,  # a rank writes by itself: there is no such process
    ),
    Fault(
        "full disk in a save, on one rank",
        deed="fill disk",
        place="save",
        call=2,
        says=NO_ROOM,
        then=OTHERS[1],
    ),
    Fault(
        "full disk in a save, on the main rank",
        deed="fill disk",
        place="save",
        ranks=(0,),
        call=2,
        says=NO_ROOM,
    ),
    Fault(
        "full disk in a background save, on one rank",
        deed="fill disk",
        place="save",
        call=2,
        arguments=(IN_BACKGROUND,),
        says=NO_ROOM,
        then=OTHERS[1],
    ),
    Fault(
        "a background save of one rank does not come to its end",
        deed="hang",
        place="shards begun",
        call=2,
        arguments=(IN_BACKGROUND, "train.timeout_minutes=0.2"),
        says=r"rank 1\b.* is still at waiting for the checkpoint of iteration 4",
        then=OTHERS[1],
        seconds=900.0,
    ),
    Fault(
        "full disk while states are stored",
        "store",
        "fill disk",
        "file of a store",
        ranks=(0,),
        start=Layout(2, 1, 1),
        then=Layout(1, 1, 1),
        says=NO_ROOM,
    ),
    Fault(
        "NaN in the loss of one rank",
        deed="not a number",
        place="loss",
        call=11,
        start=Layout(2, 1, 1),
        says="(?i)skipped",
        goes_on=True,
        same_curve=False,
    ),
    Fault(
        "NaN in more steps than may be skipped",
        deed="not a number",
        place="loss",
        call=11,
        start=Layout(2, 1, 1),
        arguments=("train.max_skipped_steps=0",),
        says="train.max_skipped_steps allows 0",
        same_curve=False,
    ),
)

RANKS_DIFFER = tuple(
    Fault(
        f"rank 1 has another {what}",
        begins="half",
        others=others,
        says=DIFFER,
        then=OTHERS[number % len(OTHERS)],
    )
    for number, (what, others) in enumerate(
        {
            "learning rate": {"arguments": ["optimizer.lr=0.02"]},
            "seed": {"arguments": ["train.seed=7"]},
            "number of iterations": {"arguments": ["train.iterations=20"]},
            "tensor-parallel size": {"arguments": ["parallel.tensor_parallel=1"]},
            "code": {"root": "other_code"},
            "target": {"cwd": "other_target"},
            "data file": {"cwd": "other_data"},
        }.items()
    )
)

FOLDERS = (
    Fault(
        "the run's folder is another disk on rank 1",
        others={"cwd": "other_disk"},
        says=r"(?i)rank 1\b.*(shared|see)",
    ),
    Fault(
        "the same command is started twice",
        deed="wait",
        place="step",
        ranks=(0,),
        call=5,
        second=True,
        goes_on=True,
        says=r"(?i)(pid|process) \d+",
    ),
    Fault(
        "the tracker is lost",
        begins="half",
        damage="no tracker",
        says="whole.*iter_0000004",
        goes_on=True,
    ),
    Fault(
        "the tracker is no number",
        begins="half",
        damage="odd tracker",
        says="whole.*iter_0000004",
        goes_on=True,
    ),
    Fault(
        "the tracker names what is gone",
        begins="half",
        damage="old tracker",
        says="whole.*iter_0000004",
        goes_on=True,
    ),
    Fault(
        "the newest checkpoint is cut short",
        begins="half",
        damage="cut shard",
        says="distcp.*iter_0000002",
        way_out=("train.resume_from=2",),
    ),
    Fault(
        "a bit of the newest checkpoint has flipped",
        begins="half",
        damage="flipped bit",
        arguments=("storage.verify=full",),
        says="distcp.*iter_0000002",
        way_out=("train.resume_from=2",),
    ),
    Fault(
        "the newest checkpoint lost a file",
        begins="half",
        damage="lost shard",
        says="distcp.*iter_0000002",
        way_out=("train.resume_from=2",),
    ),
    Fault("a temporary folder is a link elsewhere", begins="half", damage="link", goes_on=True),
)

FAULTS = (*_kills(), *_kills_in_background(), *_other_kills(), *ENDS, *RANKS_DIFFER, *FOLDERS)
