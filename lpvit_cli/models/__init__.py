"""Models: how they are built, saved and loaded, and what they are made of."""
