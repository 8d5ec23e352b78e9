"""How right are the alarms: labelled training runs, and tools judged by them."""
