"""Provider `megatron`: a frozen Megatron-Core GPTModel."""
