"""A moving average of the draft's weights, beside the main weights of any optimizer."""
