"""What can be configured, and how it is said: fields, flags, YAML, and the objects that names stand for."""
