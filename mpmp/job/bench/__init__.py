"""What mpmp does beside what others do: collectives, and whole training steps."""
