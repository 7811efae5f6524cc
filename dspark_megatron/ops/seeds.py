"""Seeds that depend on nothing but what is named: not on the layout, the order or the process."""

import hashlib


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from the text of its arguments, such as a purpose, a seed and an index."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
