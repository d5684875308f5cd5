"""Where models come from. Only here are architectures known."""
