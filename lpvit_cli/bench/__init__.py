"""What `lpvit bench` measures and compares."""
