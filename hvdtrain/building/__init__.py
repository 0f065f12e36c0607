"""Out of a configuration: what a run trains, what it steps it with, and what it says in the end."""
