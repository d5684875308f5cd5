"""Training a pruned model again: the loss it is trained on, the loop, and its checkpoints."""
