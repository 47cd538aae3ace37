"""The command line: parse, call the API, draw. Everything heavy is imported inside the commands."""
