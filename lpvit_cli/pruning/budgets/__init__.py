"""What a budget may count, one file for each kind."""
