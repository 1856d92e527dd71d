"""Commands of `kvortex`, each with its parser: `add_parser` hangs it into the command line."""
