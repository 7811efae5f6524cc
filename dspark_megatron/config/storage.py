"""The section `storage`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class StorageConfig:
    """How checkpoints and stored states are checked when a run opens them."""

    verify: Literal["size", "full"] = "size"
    """`size`: every file is there and as long as it was saved, and small ones have their checksums.
    `full`: every byte is read and compared with the checksums before anything else starts. Stored
    states are compared in full in the background of the first epoch either way."""

    def validate(self) -> None:
        """Its choices are all there is to check."""
