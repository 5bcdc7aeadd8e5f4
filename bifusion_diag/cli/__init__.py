"""The command line: one command a file. Each parses, calls the room that does the work, and prints."""
