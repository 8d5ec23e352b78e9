"""The kinds of alert: a room each, with its row, its rule, and what that remembers.

A rule sees StepRecords and the static facts of the streams alone, so that it can be
replayed from a run's files with no model. It never changes anything.
"""
