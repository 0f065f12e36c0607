"""``hvdtrain report``: what runs have written down, as one page and pictures.

`reading` reads the folders, `telling` makes sentences of what is there, `pictures` draws, `page` puts them together.
"""
