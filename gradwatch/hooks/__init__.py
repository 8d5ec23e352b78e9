"""The only wing that touches the user's objects. It reports, and decides nothing."""
