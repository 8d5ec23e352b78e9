"""What gradwatch does, pinned: so that it can be rebuilt and nothing else change.

    python -m tests.pins check              # against what is stored beside this file
    python -m tests.pins check runs surface # a part of it
    python -m tests.pins write families     # once a change is meant, and listed

Each part is a function that returns plain values. Floats are stored to seven digits
and compared to five: another machine's arithmetic is no change. Steps, words and what
is there at all are compared to the letter.
"""
