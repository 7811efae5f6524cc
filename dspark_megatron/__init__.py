"""DSpark speculative-decoding drafters, trained tensor-parallel with Megatron-Core."""

__version__ = "0.1.0"
