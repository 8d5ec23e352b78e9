"""The depths of measurement, a room each: what is launched, and how it is finished."""
