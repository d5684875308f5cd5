"""What "as good as before" means for a model."""
