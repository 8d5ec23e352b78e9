"""Families that others wrote, each set without sight of the rules and of the others."""
