"""The flight recorder: a bad step is caught before its update, run again exactly, explained, and kept as a capsule."""
