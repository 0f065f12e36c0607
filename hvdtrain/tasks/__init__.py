"""Tasks to start from: each is named by ``--task`` as it stands."""
