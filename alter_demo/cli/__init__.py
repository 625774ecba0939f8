"""The command line. It reads arguments and prints results; the work is done elsewhere."""
