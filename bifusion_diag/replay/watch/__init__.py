"""What a step is judged by, before its update: its signs of life, and what they are compared with."""
