"""The command line: printing, exit codes and progress bars live only here, and nobody imports it."""
