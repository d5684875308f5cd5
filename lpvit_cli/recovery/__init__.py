"""Recovering a pruned model: what is trained on which loss, the loop, its checkpoints, LoRA-GA under a mask."""
