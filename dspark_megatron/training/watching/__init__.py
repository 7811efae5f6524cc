"""What a person sees of a run: lines, times and memory."""
