"""The block OBS solver by its former name; it is in block_obs.py."""

from lpvit_cli.pruning.block_obs import prune_layer

__all__ = ["prune_layer"]
