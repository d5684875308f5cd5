"""Time, energy and accuracy, with the doubt that belongs to each number."""
