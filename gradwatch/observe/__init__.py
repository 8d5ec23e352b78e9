"""All that touches the user's objects while they train."""
