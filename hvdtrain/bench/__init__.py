"""``hvdtrain bench``: the user's own task under each engine, in turns. `trial` reads one run, `comparing` makes a choice of many."""
