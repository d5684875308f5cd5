"""What a run folder is, and what a stage is. Knows no stage by name."""
