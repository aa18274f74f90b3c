"""What a run takes before it starts: memory by a dry run, in parts, advice, duration (notebook 07)."""
