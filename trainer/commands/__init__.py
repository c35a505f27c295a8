"""What the `octavo` command does, one file a subcommand."""
