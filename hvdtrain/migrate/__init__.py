"""Horovod's scripts moved here: their imports, or their whole loop. Needs libcst; nothing here loads torch or Horovod."""
