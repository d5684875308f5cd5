"""Which blocks to remove: cost and saliency of each, the layers' curves, and the allocation under a budget."""
