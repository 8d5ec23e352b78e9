"""What several test files lean on."""
