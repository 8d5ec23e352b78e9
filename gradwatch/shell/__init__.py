"""The verbs of the command ``gradwatch``, a room each.

A verb returns what it found, as text and as plain values; :mod:`gradwatch.cli` prints
one of the two. What cannot be done is raised, as one sentence.
"""
