"""``hvdtrain bench``: how fast are engines here? `trial` and `comparing` for a task, `bandwidth` for collectives, `scaling` for many ranks."""
